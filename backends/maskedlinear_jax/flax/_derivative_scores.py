"""Scores of an nnx model's masked weights by its derivatives: Fisher, OBD and GraSP, as ``prune_model`` takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax import Array
from numpy.typing import NDArray

from maskedlinear import pruning
from maskedlinear.pruning._layers import Include, matches
from maskedlinear_jax._placement import to_host
from maskedlinear_jax._tree import named_leaves
from maskedlinear_jax.flax._adapter import masked_of, refuse_unfit
from maskedlinear_jax.flax._kernel import masked_kernel
from maskedlinear_jax.flax._variables import is_linen

__all__ = ["fisher_scores", "grasp_scores", "obd_scores"]

Scores = dict[str, NDArray[np.float64]]
Batch = TypeVar("Batch")
Loss = Callable[[Any, Batch], Array]


def fisher_scores(model: Any, loss: Loss[Batch], examples: Iterable[Batch], *, include: Include = None) -> Scores:
    """Return :func:`maskedlinear.pruning.fisher` of each masked weight, by name; the squares are of examples' gradients::

        scores = fisher_scores(model, lambda model, batch: loss(model(batch[0]), batch[1]), examples)
        prune_model(model, 0.5, score=scores)

    Args:
        model: an nnx module with masked weights, trained; it stays as it is, statistics and random streams too.
        loss: of the model and a batch, a scalar; it is jitted, and differentiated in reverse.
        examples: batches of one example each, trees of arrays of the same shapes (each other one compiles anew): of more,
            the square of their mean's gradient would be taken.
        include: which weights, as in :func:`mask_model`.

    Raises:
        ValueError: if there is no masked weight in the dense form, or no batch.
        TypeError: if ``model`` is linen's, whose parameters ``prune_tree`` takes gradients of.
    """
    of = _Derivatives("fisher_scores", model, loss, include)

    @jax.jit
    def add(squares: Any, example: Batch) -> Any:
        return jax.tree.map(lambda total, own: total + own * own, squares, of.gradient(of.params, example))

    squares, kept = of.zeros, list(examples)
    for example in _some(kept):
        squares = add(squares, example)
    return of.scored(pruning.fisher, jax.tree.map(lambda total: total / len(kept), squares))


def obd_scores(
    model: Any, loss: Loss[Batch], batches: Iterable[Batch], *, draws: int = 16, seed: int = 0, include: Include = None
) -> Scores:
    """Return :func:`maskedlinear.pruning.obd` of each masked weight, by name, with the Hessian's diagonal estimated.

    The diagonal is the mean of ``z ⊙ H z`` over random signs z, as in PyTorch, whose signs are others.

    Args:
        model: as :func:`fisher_scores` takes it.
        loss: as above; differentiated twice, in reverse.
        batches: trees of arrays.
        draws: of z for each batch; the estimate's error falls with its root.
        seed: of z.
        include: as above.

    Raises:
        ValueError: as above; or if there are no draws.
        TypeError: as above.
    """
    if not isinstance(draws, int) or draws < 1:
        raise ValueError(f"draws must be a number of 1 or more; got {draws!r}")
    of = _Derivatives("obd_scores", model, loss, include)

    @jax.jit
    def add(diagonal: Any, batch: Batch, key: Array) -> Any:
        leaves, tree = jax.tree.flatten(of.params)
        keys = jax.random.split(key, len(leaves))
        signs = [jax.random.rademacher(own, leaf.shape, leaf.dtype) for own, leaf in zip(keys, leaves, strict=True)]
        vectors = jax.tree.unflatten(tree, signs)
        products = of.product_with_hessian(batch, vectors)
        return jax.tree.map(lambda total, sign, product: total + sign * product, diagonal, vectors, products)

    diagonal, kept, key = of.zeros, list(batches), jax.random.key(seed)
    for batch in _some(kept):
        for _ in range(draws):
            key, own = jax.random.split(key)
            diagonal = add(diagonal, batch, own)
    return of.scored(pruning.obd, jax.tree.map(lambda total: total / (draws * len(kept)), diagonal))


def grasp_scores(model: Any, loss: Loss[Batch], batches: Iterable[Batch], *, include: Include = None) -> Scores:
    """Return :func:`maskedlinear.pruning.grasp` of each masked weight, by name; gradients are summed over batches.

    Args:
        model: as :func:`fisher_scores` takes it, before it is trained.
        loss: as above, outputs divided by a temperature (200 in the paper) before it; differentiated twice, in reverse.
        batches: trees of arrays; held in memory, since each is used twice.
        include: as above.

    Raises:
        ValueError: as above.
        TypeError: as above.
    """
    of = _Derivatives("grasp_scores", model, loss, include)
    gradient, product = jax.jit(of.gradient), jax.jit(of.product_with_hessian)
    total, products, kept = of.zeros, of.zeros, list(batches)
    for batch in _some(kept):
        total = jax.tree.map(jnp.add, total, gradient(of.params, batch))
    chosen = of.only_chosen(total)
    for batch in kept:
        products = jax.tree.map(jnp.add, products, product(batch, chosen))
    return of.scored(pruning.grasp, products)


class _Derivatives:
    """The derivatives of a loss by the parameters of a model."""

    def __init__(self, function: str, model: Any, loss: Loss[Any], include: Include) -> None:
        if is_linen(model) or isinstance(model, linen.Module):
            raise TypeError(
                f"{function} takes an nnx module; of linen's parameters collect gradients with jax.grad, for "
                "prune_tree(params, sparsity, score=..., gradients=...), or take grasp_scores of maskedlinear.jax"
            )
        self._weights: dict[Any, tuple[str, Any]] = {}
        for name, one in masked_of(model).items():
            if matches(name, one.owner, include):
                refuse_unfit(function, name, one)
                self._weights.setdefault(one.key, (name, one))
        if not self._weights:
            raise ValueError(
                f"{function} scores masked weights in the dense form, and include={include!r} means none: make them with "
                "mask_model(model)"
            )
        graph, *states = nnx.split(model, nnx.Param, ...)
        self.params: Any = states[0]

        def of_params(params: Any, batch: Any) -> Array:
            return loss(nnx.merge(graph, params, *states[1:], copy=True), batch)

        self.gradient = jax.grad(of_params)
        self.zeros = jax.tree.map(jnp.zeros_like, self.params)

    def product_with_hessian(self, batch: Any, vectors: Any) -> Any:
        """Return the Hessian's product with a tree of vectors, by reverse mode alone, which each layer has."""

        def along(params: Any) -> Array:
            pairs = zip(jax.tree.leaves(self.gradient(params, batch)), jax.tree.leaves(vectors), strict=True)
            return jnp.stack([jnp.sum(one * other) for one, other in pairs]).sum()

        return jax.grad(along)(self.params)

    def only_chosen(self, tree: Any) -> Any:
        """Return a tree in which what is no live weight of those to score is 0."""
        live = {one.full_name: one.live for _, one in self._weights.values()}
        leaves, shape = jax.tree.flatten(tree)
        names = list(named_leaves(tree))
        kept = [
            masked_kernel(leaf, live[name]) if name in live else jnp.zeros_like(leaf)
            for name, leaf in zip(names, leaves, strict=True)
        ]
        return jax.tree.unflatten(shape, kept)

    def scored(self, score: Callable[[Any, Any], Any], factors: Any) -> Scores:
        """Return the scores, ``(out, in)`` where axes are known."""
        by_name, scores = named_leaves(factors), {}
        for name, one in self._weights.values():
            made = np.asarray(score(to_host(masked_kernel(one.value, one.live)), to_host(by_name[one.full_name])))
            if one.axes is not None:
                made = one.axes.matrices(made)
                made = made[0] if len(made) == 1 else made
            scores[name] = made
        return scores


def _some(batches: list[Batch]) -> list[Batch]:
    if not batches:
        raise ValueError("scores need data: there must be at least one batch; got none (an iterator that is used up?)")
    return batches
