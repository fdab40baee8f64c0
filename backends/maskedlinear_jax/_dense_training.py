"""Sparse weights that are computed of dense parameters, which train: straight-through gradients (SR-STE) and Top-KAST.

Functions of trees of parameters for use inside a loss: their values are masked, and their gradients arrive at more entries
than are live, and decay some. Masks are trees apart, made inside ``jit`` or outside of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from maskedlinear.masks._structured import check_groups
from maskedlinear.models import WeightAxes, refuse_unknown
from maskedlinear.pruning._layers import Include
from maskedlinear_jax._functional import as_array, boolean_mask
from maskedlinear_jax._select import check_comparable, magnitudes
from maskedlinear_jax._tree import Axes, axes_of, chosen_parameters, is_unmasked, leaves_like, named_leaves, prune_tree

__all__ = ["n_of_m_tree", "straight_through", "top_kast", "top_kast_masks"]


@jax.custom_vjp
def _sparse_of_dense(dense: Array, live: Array, trained: Array, decay_live: Array, decay_rest: Array) -> Array:
    """Return ``where(live, dense, 0)``, whose gradient arrives where ``trained`` says, with decays of both parts."""
    del trained, decay_live, decay_rest
    return jnp.where(live, dense, jnp.zeros((), dense.dtype))


def _forward(dense: Array, live: Array, trained: Array, *decays: Array) -> tuple[Array, tuple[Array, ...]]:
    return _sparse_of_dense(dense, live, trained, *decays), (dense, live, trained, *decays)


def _backward(residuals: tuple[Array, ...], gradient: Array) -> tuple[Array | None, ...]:
    dense, live, trained, decay_live, decay_rest = residuals
    decay = jnp.where(live, decay_live.astype(dense.dtype) * dense, decay_rest.astype(dense.dtype) * dense)
    return jnp.where(trained, gradient + decay, jnp.zeros((), dense.dtype)), None, None, None, None


_sparse_of_dense.defvjp(_forward, _backward)


def straight_through(params: Any, masks: Any, decay: Any = 2e-4) -> Any:
    """Return the parameters with 0 where they are masked, and gradients that arrive at all of them, SR-STE::

        def sparse_loss(params, x):
            masks = n_of_m_tree(params, 2, 4)
            return loss(straight_through(params, masks), x)

    The gradient is ``g + decay * (1 - mask) * params``, of what is masked too. Any optimizer trains ``params``, which are
    dense; when training ends, ``apply_masks(params, masks)`` are the weights, and ``freeze_masked`` keeps them.

    Source: A. Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", ICLR 2021, and
    ``sparse_ops.py`` of github.com/aojunzz/NM-sparsity.

    Args:
        params: a tree, or an array.
        masks: a tree like it, as :func:`n_of_m_tree` and :func:`prune_tree` return it, booleans or 0s and 1s; ``None`` for
            parameters that stay as they are. Most often made of ``params`` anew in each pass, inside ``jit``.
        decay: as above; multiplied by what the loss is multiplied by.

    Returns:
        A tree like ``params``. Only in reverse mode can it be differentiated.

    Raises:
        ValueError: if the trees differ, or a mask does not have its parameter's shape or holds anything but 0 and 1.

    >>> import jax, jax.numpy as jnp
    >>> from maskedlinear.jax import n_of_m_tree, straight_through
    >>> w = jnp.array([[1.0, -4.0, 3.0, 2.0]])
    >>> straight_through(w, n_of_m_tree(w, 2, 4)).tolist()
    [[0.0, -4.0, 3.0, 0.0]]
    >>> jax.grad(lambda w: straight_through(w, n_of_m_tree(w, 2, 4), decay=0.5).sum())(w).tolist()
    [[1.5, 1.0, 1.0, 2.0]]
    """

    def sparse(name: str, dense: Array, mask: Any) -> Array:
        live = jnp.asarray(boolean_mask(mask, dense.shape, name))
        zero = jnp.zeros((), jnp.float32)
        made: Array = _sparse_of_dense(dense, live, jnp.ones_like(live), zero, jnp.asarray(decay))
        return made

    return _mapped(sparse, params, masks)


def top_kast(params: Any, forward_masks: Any, backward_masks: Any, penalty: Any = 1e-4) -> Any:
    """Return the parameters with 0 where the forward masks say, and gradients where the backward masks say, Top-KAST::

        @jax.jit
        def step(params, state, masks, x):
            grads = jax.grad(lambda params: loss(top_kast(params, *masks), x))(params)
            ...

        masks = top_kast_masks(params, 0.9, 0.8)  # anew every 100 steps

    With the gradient goes that of the L2 exploration loss: ``penalty`` times the entry where it is live (A), and
    ``penalty / D`` times the entry in the rest of the backward mask, D being the share of A in each matrix, or in all of a
    stack. Nothing else gets a gradient; an optimizer with momentum or weight decay moves it nonetheless.

    Source: S. Jayakumar et al., "Top-KAST: Top-K Always Sparse Training", NeurIPS 2020.

    Args:
        params: a tree, or an array.
        forward_masks: a tree like it of what is live, A, as for :func:`straight_through`.
        backward_masks: a tree like it of what gets a gradient, B; A does in any case.
        penalty: as above; multiplied by what the loss is multiplied by.

    Returns:
        A tree like ``params``. Only in reverse mode can it be differentiated.

    Raises:
        ValueError: as by :func:`straight_through`.

    >>> import jax, jax.numpy as jnp
    >>> from maskedlinear.jax import top_kast, top_kast_masks
    >>> w = jnp.array([[1.0, -4.0, 3.0, 2.0]])
    >>> masks = top_kast_masks(w, 0.75, 0.5)
    >>> top_kast(w, *masks).tolist()
    [[0.0, -4.0, 0.0, 0.0]]
    >>> jax.grad(lambda w: top_kast(w, *masks, penalty=0.5).sum())(w).tolist()
    [[0.0, -1.0, 7.0, 0.0]]
    """

    def sparse(name: str, dense: Array, live: Any, trained: Any) -> Array:
        live, trained = (jnp.asarray(boolean_mask(mask, dense.shape, name)) for mask in (live, trained))
        share = jnp.mean(live, dtype=jnp.float32)
        rest = jnp.where(share > 0, penalty / share, 0)
        made: Array = _sparse_of_dense(dense, live, live | trained, jnp.asarray(penalty), rest)
        return made

    return _mapped(sparse, params, forward_masks, backward_masks)


def top_kast_masks(
    params: Any, forward_sparsity: float, backward_sparsity: float, *, include: Include = None, axes: Axes = None
) -> tuple[Any, Any]:
    """Return masks of the largest magnitudes of each matrix, for :func:`top_kast`: what is live, and what gets a gradient.

    Those that ``maskedlinear.torch.TopKAST`` chooses of the same weights, inside ``jit`` too.

    Args:
        params: the tree.
        forward_sparsity: the fraction of each matrix that is 0, in [0, 1): 1 - D.
        backward_sparsity: the fraction that gets no gradient, in [0, ``forward_sparsity``]: 1 - (D + M).
        include: which parameters, as in :func:`prune_tree`.
        axes: as there.

    Raises:
        ValueError: if a value is out of its range, or as by :func:`prune_tree`.
        TypeError: as by :func:`prune_tree`.
    """
    if backward_sparsity > forward_sparsity:
        raise ValueError(
            "what is live gets a gradient: backward_sparsity is at most forward_sparsity; got "
            f"{backward_sparsity!r} and {forward_sparsity!r}"
        )
    how: dict[str, Any] = {"scope": "layer", "include": include, "axes": axes}
    return prune_tree(params, forward_sparsity, **how), prune_tree(params, backward_sparsity, **how)


def n_of_m_tree(params: Any, n: int, m: int, *, include: Include = None, axes: Axes = None) -> Any:
    """Return N:M masks for a tree of parameters, for :func:`straight_through`: of each m successive inputs of an output the
    n of largest magnitude.

    The masks of ``maskedlinear.torch.StraightThrough`` and, for matrices, of :func:`maskedlinear.pruning.n_of_m`, inside
    ``jit`` too. The inputs of a convolution that its name tells are its channels, at each place of the window; those that
    ``axes`` tells follow each other in the order of ``in_axis``, the last one fastest. NaN counts as the largest.

    Args:
        params: the tree.
        n: the live inputs of a group, from 0 to ``m``.
        m: the size of a group.
        include: which parameters, as in :func:`prune_tree`.
        axes: as there.

    Returns:
        A tree like ``params``, as :func:`prune_tree` returns it.

    Raises:
        ValueError: if no parameter is meant, inputs do not divide into groups, or nobody knows the axes of a parameter.
        TypeError: if parameters are not real floating-point.
    """
    chosen = chosen_parameters(params, include, axes, warn=True)
    refuse_unknown([name for name, (_, leaf) in chosen.items() if axes_of(name, leaf.ndim, axes) is None])
    leaves: list[Any] = [None] * len(jax.tree.leaves(params))
    for name, (place, leaf) in chosen.items():
        known = axes_of(name, leaf.ndim, axes)
        assert known is not None
        _, out, in_ = known.order(leaf.ndim)
        if name not in (axes or {}) and len(in_) > 1 and in_[0] > in_[1]:  # a convolution's channels, before its window
            known = WeightAxes(out_axis=out, in_axis=(*in_[1:], in_[0]))
            successive = leaf.shape[in_[0]]
        else:
            successive = known.matrix_shape(leaf.shape)[2]
        try:
            check_groups((1, successive), n, m)
        except ValueError as error:
            raise ValueError(f"{name or 'the parameter'}: {error}; leave it out with include=...") from error
        leaves[place] = _largest_in_groups(as_array(name, leaf), n, m, known)
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _largest_in_groups(weight: Array, n: int, m: int, axes: WeightAxes) -> Array:
    check_comparable([weight])
    order = [axis for group in axes.order(weight.ndim) for axis in group]
    keys = magnitudes(weight).transpose(order)
    groups = keys.reshape(-1, m)
    other, own = groups[:, None, :], groups[:, :, None]
    earlier = jnp.arange(m)[None, :] < jnp.arange(m)[:, None]
    smaller = jnp.sum(
        (other < own) | ((other == own) & earlier), axis=2
    )  # how many of its group each entry comes after
    live = (smaller >= m - n).reshape(keys.shape)
    return live.transpose([order.index(axis) for axis in range(weight.ndim)])


def _mapped(sparse: Callable[..., Array], params: Any, *trees: Any) -> Any:
    """Return a tree of sparse parameters; those without a mask stay as they are."""
    structure = jax.tree.structure(params)
    masks = [leaves_like(structure, tree, "masks") or [] for tree in trees]
    leaves = [
        leaf if any(map(is_unmasked, own)) else sparse(name, as_array(name, leaf), *own)
        for (name, leaf), *own in zip(named_leaves(params).items(), *masks, strict=True)
    ]
    return jax.tree.unflatten(structure, leaves)
