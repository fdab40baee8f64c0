"""The gradient that RigL grows by: of all weights of masked layers, those under the mask too.

A layer in the sparse form is not given a matrix: what goes in and the cotangent of what comes out are recorded, and the
gradient's rows are made of them as they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from maskedlinear_jax._tree import named_leaves
from maskedlinear_jax.flax._adapter import refuse_linen_module
from maskedlinear_jax.flax._kernel import masked_kernel, weight_name
from maskedlinear_jax.flax._modules import check_alone, layers_of
from maskedlinear_jax.flax._sparse_nnx import SparseLinear
from maskedlinear_jax.flax._variables import is_linen, linen_weights, set_linen_masks
from maskedlinear_jax.flax._weights import masked_weights

__all__ = ["dense_gradients"]


class _Added(nnx.Variable[Array]):
    """0, added to what a layer returns: its gradient is the cotangent there."""


class _Seen(nnx.Variable[Array]):
    """What a layer was called on."""


class _Recorded(SparseLinear):
    """A sparse layer that takes down what each of its calls is given, and adds to what it returns."""

    seen: Any
    added: Any

    @classmethod
    def adopt(cls, layer: Any) -> None:
        layer.__class__ = cls
        layer.seen, layer.added = nnx.List([]), nnx.List([])

    def __call__(self, inputs: Array) -> Array:
        place = len(self.seen)
        self.seen.append(_Seen(jnp.asarray(inputs)))
        y = super().__call__(inputs)
        if place == len(self.added):
            self.added.append(_Added(jnp.zeros_like(y)))
        recorded: Array = y + self.added[place][...]
        return recorded


def dense_gradients(loss: Callable[..., Array], model: Any, *arguments: Any) -> dict[str, Array | Rows]:
    """Return the loss's gradient with respect to *all* entries of masked weights, those under the mask too (RigL).

    They are the gradients of a model whose masks are full and whose masked weights are 0, which computes the same.

    Args:
        loss: a function of the model and ``arguments`` that returns a scalar; may be jitted with ``nnx.jit``.
        model: a module with masked weights of either form; or linen's variables with them, which ``loss`` then takes.
        arguments: passed on to ``loss``.

    Returns:
        For each masked weight, by name, what :func:`regrow_model` grows by: the gradient, of the weight's shape; of a
        ``SparseLinear`` a function of two rows, ``start`` and ``stop``, that makes this part of it, shape
        ``(stop - start, in)``, so that it never exists as a whole. Stacks in the sparse form, by ``nnx.vmap``, are left out:
        they grow at random, or in the dense form.

    Raises:
        ValueError: if a layer shares its weight with another module, or ``loss`` does not call a sparse layer.
    """
    refuse_linen_module("dense_gradients", model)
    if is_linen(model):
        return _of_variables(loss, model, arguments)
    every = masked_weights(model, sparse=True)
    check_alone(model, [one.weight_values if isinstance(one, SparseLinear) else one.kernel for one in every.values()])
    whole = _prepared(loss, model, arguments)
    wanted = nnx.DiffState(0, nnx.Any(nnx.Param, _Added))
    gradients = nnx.grad(loss, argnums=wanted)(whole, *arguments)
    dense = named_leaves(gradients)
    return {
        name: _rows(name, one, gradients) if isinstance(one, SparseLinear) else dense[one.full_name]
        for name, one in masked_weights(whole, sparse=True).items()
        if not isinstance(one, SparseLinear) or _is_alone(one)
    }


def _is_alone(layer: SparseLinear) -> bool:
    """Whether this is one layer, and no stack, whose calls inside a scan nobody can look at."""
    return layer.indptr.get_value().ndim == 1


def _of_variables(loss: Callable[..., Array], variables: Any, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Return the gradient of each masked weight of linen's variables, by name, where all masks are full."""
    weights = linen_weights(variables)
    clean = set_linen_masks(variables, {path: (mask, None) for path, (_, mask) in weights.items()})
    full = {
        **clean,
        "masks": jax.tree.map(lambda mask: jnp.ones_like(mask, bool), clean.get("masks", {})),
    }
    found = jax.grad(lambda params: loss({**full, "params": params}, *arguments))(clean["params"])
    gradients = named_leaves(found)
    return {weight_name(path): gradients[".".join(path)] for path in weights}


def _prepared(loss: Callable[..., Array], model: Any, arguments: tuple[Any, ...]) -> Any:
    """Return a copy of a model with full masks, whose sparse layers record, with a zero to add for each of their calls."""
    whole = nnx.clone(model)
    for weight in masked_weights(whole).values():
        weight.kernel.set_value(masked_kernel(weight.value, weight.live))
        weight.mask_variable.set_value(jnp.ones(weight.value.shape, bool))
    recorded = {name: layer for name, layer in layers_of(whole, SparseLinear).items() if _is_alone(layer)}
    for layer in recorded.values():
        _Recorded.adopt(layer)
    if not recorded:
        return whole
    definition, state = nnx.split(whole)
    calls: dict[str, list[Any]] = {}

    def call(state: Any) -> None:
        copy = nnx.merge(definition, state)
        loss(copy, *arguments)
        for name, layer in layers_of(copy, _Recorded).items():
            calls[name] = [(added[...].shape, added[...].dtype) for added in layer.added]

    jax.eval_shape(call, state)
    for name, layer in recorded.items():
        layer.added = nnx.List([_Added(jnp.zeros(*kind)) for kind in calls[name]])
    return whole


def _rows(name: str, layer: Any, gradients: Any) -> Rows:
    """Return what makes rows of a sparse layer's whole gradient, ``gᵀ · x``, of what was recorded."""
    found = {path: leaf for path, leaf in nnx.to_flat_state(gradients) if "added" in path}
    pairs = []
    for place, seen in enumerate(layer.seen):
        path = (*filter(None, name.split(".")), "added", str(place))
        (g,) = (leaf for at, leaf in found.items() if tuple(map(str, at)) == path)
        g, x = (jnp.asarray(array[...]) for array in (g, seen))
        pairs.append((g.reshape(-1, layer.out_features), x.reshape(-1, layer.in_features)))
    if not pairs:
        raise ValueError(
            f"growth by gradient needs a call of each layer; the loss does not call {name or 'the layer'}: leave it "
            "out of the model, or grow at random"
        )
    return Rows(pairs)


class Rows:
    """Makes rows of a sparse layer's whole gradient: called with ``start`` and ``stop``, of shape ``(stop - start, in)``."""

    def __init__(self, pairs: Sequence[tuple[Array, Array]]) -> None:
        self.pairs = pairs

    def __call__(self, start: int, stop: int) -> Array:
        """Return the rows from ``start`` to before ``stop``."""
        total: Array = sum(_product(g, x, start, stop - start) for g, x in self.pairs)
        return total


def are_finite(gradients: Iterable[Any]) -> bool:
    """Whether gradients, those of :func:`dense_gradients` too, are of finite numbers."""
    arrays = (array for one in gradients for array in (jax.tree.leaves(one.pairs) if isinstance(one, Rows) else [one]))
    return all(bool(jnp.isfinite(array).all()) for array in arrays)


@partial(jax.jit, static_argnums=3)
def _product(g: Array, x: Array, start: int, size: int) -> Array:
    wide = jnp.promote_types(g.dtype, jnp.float32)
    some = lax.dynamic_slice_in_dim(g, start, size, axis=1)
    return jnp.matmul(some.T.astype(wide), x.astype(wide))
