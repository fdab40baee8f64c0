"""Pruning of parameter trees, for plain JAX and linen: masks in the form that ``freeze_masked`` takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from maskedlinear import pruning
from maskedlinear.pruning._layers import Include, Score, is_meant, score_layers
from maskedlinear_jax._functional import as_array, boolean_mask

__all__ = ["apply_masks", "prune_tree"]


def prune_tree(
    params: Any,
    sparsity: float,
    *,
    masks: Any = None,
    include: Include = None,
    score: Score | Callable[[Any, Any], Any] = "magnitude",
    scope: pruning.Scope = "global",
    block: tuple[int, int] | None = None,
    gradients: Any = None,
    seed: int = 0,
    empty: Any = "refuse",
) -> Any:
    """Return masks for a tree of parameters, pruned to a sparsity: a tree as :func:`freeze_masked` takes it.

    Every parameter of two dimensions is pruned. One whose name is ``kernel`` is ``(in, out)``, as Flax keeps it, and is read
    transposed, so that PyTorch's layers of the same weights get the same masks; any other is ``(out, in)``.

    Args:
        params: the tree.
        sparsity: the fraction of masked connections, in [0, 1]; see :func:`maskedlinear.pruning.prune`.
        masks: the tree of masks so far, from an earlier call; what is masked stays so.
        include: which parameters: a shell pattern of names (paths with dots between, ``"encoder.*"``), a sequence of them,
            or a function of name and parameter.
        score: ``"magnitude"``, ``"random"``, ``"snip"`` or ``"taylor"`` (these two need ``gradients``), or a function of
            weight and gradient, both ``(out, in)``, that returns scores of their shape.
        scope: ``"global"``, ``"layer"`` or ``"erdos_renyi"``.
        block: prune whole blocks of ``(outputs, inputs)``.
        gradients: a tree like ``params``.
        seed: for ``"random"``.
        empty: ``"refuse"`` or ``"allow"`` that a parameter loses its last connection.

    Returns:
        A tree like ``params``: boolean masks of the parameters' shapes, and ``True`` for those that are not pruned.

    Raises:
        ValueError: as by :func:`maskedlinear.pruning.prune`; if no parameter is meant, a gradient is missing, or a tree does
            not fit.
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(params)
    names = [_name(path) for path, _ in flat]
    chosen = {
        name: (place, leaf)
        for place, (name, (_, leaf)) in enumerate(zip(names, flat, strict=True))
        if getattr(leaf, "ndim", 0) == 2 and is_meant(name, leaf, include)
    }
    if not chosen:
        raise ValueError(f"there is no parameter of two dimensions to prune: include={include!r} means none of {names}")
    before, moved = _like(structure, masks, "masks"), _like(structure, gradients, "gradients")
    weights = {name: _turned(name, leaf) for name, (_, leaf) in chosen.items()}
    found = {name: _turned(name, moved[place]) for name, (place, _) in chosen.items() if moved is not None}
    live = None
    if before is not None:
        full = {name: jnp.ones(leaf.shape, bool) for name, (_, leaf) in chosen.items()}
        so_far = {name: full[name] if before[place] is True else before[place] for name, (place, _) in chosen.items()}
        live = {name: _turned(name, boolean_mask(so_far[name], full[name].shape, name)) for name in chosen}
    made = pruning.prune(
        score_layers(score, weights, found, seed), sparsity=sparsity, masks=live, scope=scope, block=block, empty=empty
    )
    leaves: list[Any] = [True] * len(flat) if before is None else list(before)
    for name, (place, _) in chosen.items():
        leaves[place] = jnp.asarray(_turned(name, made[name]))
    return jax.tree.unflatten(structure, leaves)


def apply_masks(params: Any, masks: Any) -> Any:
    """Return the parameters with 0 where they are masked: for a model that knows nothing of masks.

    Inside a loss, ``loss(apply_masks(params, masks))``, the gradient is 0 there too; the stored weights stay.

    Args:
        params: a tree.
        masks: a tree as :func:`prune_tree` returns it.

    Raises:
        ValueError: if the trees differ, or a mask does not have its parameter's shape or holds anything but 0 and 1.
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(params)
    leaves = _like(structure, masks, "masks") or []
    return jax.tree.unflatten(
        structure, [_masked(_name(path), leaf, mask) for (path, leaf), mask in zip(flat, leaves, strict=True)]
    )


def _masked(name: str, leaf: Any, mask: Any) -> Any:
    if mask is True:
        return leaf
    array = as_array(name, leaf)
    return jnp.where(boolean_mask(mask, array.shape, name), array, jnp.zeros((), array.dtype))


def _name(path: Any) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def _turned(name: str, array: Any) -> Any:
    return array.T if name.rpartition(".")[2] == "kernel" else array


def _like(structure: Any, tree: Any, what: str) -> list[Array | bool] | None:
    """Return the leaves of a tree with the parameters' structure."""
    if tree is None:
        return None
    try:
        leaves: list[Array | bool] = structure.flatten_up_to(tree)
    except ValueError as error:
        raise ValueError(
            f"{what} must be a tree like the parameters', {structure}; got {jax.tree.structure(tree)}"
        ) from error
    return leaves
