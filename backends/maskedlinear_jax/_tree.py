"""Pruning of parameter trees, for plain JAX and linen: masks in the form that ``freeze_masked`` takes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from maskedlinear import pruning
from maskedlinear._progress import Progress
from maskedlinear.pruning._layers import Include, Scoring, layer_seed, matches, score_layers
from maskedlinear_jax._functional import as_array, boolean_mask

__all__ = ["apply_masks", "chosen_parameters", "is_turned", "named_leaves", "prune_tree", "regrow_tree", "turned"]


def prune_tree(
    params: Any,
    sparsity: float,
    *,
    masks: Any = None,
    include: Include = None,
    score: Scoring = "magnitude",
    scope: pruning.Scope = "global",
    block: tuple[int, int] | None = None,
    gradients: Any = None,
    seed: int = 0,
    on_empty: Any = "raise",
    progress: Progress = False,
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
        score: ``"magnitude"``, ``"random"``, ``"snip"`` or ``"taylor"`` (these two need ``gradients``), a function of
            weight and gradient, both ``(out, in)``, that returns scores of their shape; or the scores ``(out, in)`` by name.
        scope: ``"global"``, ``"layer"`` or ``"erdos_renyi"``.
        block: prune whole blocks of ``(outputs, inputs)``.
        gradients: a tree like ``params``.
        seed: for ``"random"``.
        on_empty: ``"raise"`` or ``"allow"`` where a parameter would lose its last connection.
        progress: as in :func:`maskedlinear.pruning.prune`.

    Returns:
        A tree like ``params``: boolean masks of the parameters' shapes, and ``True`` for those that are not pruned.

    Raises:
        ValueError: as by :func:`maskedlinear.pruning.prune`; if no parameter is meant, a gradient is missing, or a tree does
            not fit.
    """
    structure = jax.tree.structure(params)
    chosen = chosen_parameters(params, include)
    before, moved = _like(structure, masks, "masks"), _like(structure, gradients, "gradients")
    weights = {name: turned(name, leaf) for name, (_, leaf) in chosen.items()}
    found = {name: turned(name, moved[place]) for name, (place, _) in chosen.items() if moved is not None}
    live = None
    if before is not None:
        full = {name: jnp.ones(leaf.shape, bool) for name, (_, leaf) in chosen.items()}
        so_far = {name: full[name] if before[place] is True else before[place] for name, (place, _) in chosen.items()}
        live = {name: turned(name, boolean_mask(so_far[name], full[name].shape, name)) for name in chosen}
    made = pruning.prune(
        score_layers(score, weights, found, seed),
        sparsity=sparsity,
        masks=live,
        scope=scope,
        block=block,
        on_empty=on_empty,
        progress=progress,
    )
    leaves: list[Any] = [True] * len(jax.tree.leaves(params)) if before is None else list(before)
    for name, (place, _) in chosen.items():
        leaves[place] = jnp.asarray(turned(name, made[name]))
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


def regrow_tree(
    params: Any, masks: Any, fraction: float, *, gradients: Any = None, include: Include = None, seed: int = 0
) -> tuple[Any, Any]:
    """Move a fraction of each masked parameter's connections; return the parameters, 0 but for those that stay, and masks.

    Source: SET (at random) and RigL (by gradient); see :func:`maskedlinear.pruning.regrow`. Layers of other frameworks with
    the same weights move alike. An optimizer guarded by :func:`freeze_masked` starts new connections with a clean state at
    its next step.

    Args:
        params: the tree.
        masks: a tree as :func:`prune_tree` returns it.
        fraction: the share of live connections that move, in [0, 1]; :func:`maskedlinear.pruning.cosine_decay` lets it
            fall.
        gradients: the loss's gradient with respect to *all* weights, a tree like ``params``, to grow where it is largest:
            ``jax.grad(dense_loss)(apply_masks(params, masks))``. ``None`` grows at random.
        include: which parameters, as in :func:`prune_tree`.
        seed: of the random places; another at each step. Parameter i of those that have a mask takes ``seed + i``.

    Returns:
        The parameters and the masks, trees like those given.

    Raises:
        ValueError: as by :func:`maskedlinear.pruning.regrow`; or if no parameter has a mask, or a tree does not fit.
    """
    structure = jax.tree.structure(params)
    before, moved = _like(structure, masks, "masks") or [], _like(structure, gradients, "gradients")
    leaves, found = jax.tree.leaves(params), list(before)
    chosen = {name: entry for name, entry in chosen_parameters(params, include).items() if before[entry[0]] is not True}
    if not chosen:
        raise ValueError("connections move in parameters with masks, and there is none: make masks with prune_tree")
    for number, (name, (place, leaf)) in enumerate(chosen.items()):
        old = np.asarray(boolean_mask(before[place], leaf.shape, name))
        gradient = None if moved is None else turned(name, moved[place])
        new = pruning.regrow(turned(name, old), turned(name, leaf), fraction, gradient, seed=layer_seed(seed, number))
        new = turned(name, new)
        leaves[place] = jnp.where(new & old, leaf, jnp.zeros((), leaf.dtype))
        found[place] = jnp.asarray(new)
    return jax.tree.unflatten(structure, leaves), jax.tree.unflatten(structure, found)


def chosen_parameters(params: Any, include: Include) -> dict[str, tuple[int, Any]]:
    """Return the parameters to prune, by name: their place among the tree's leaves, and the leaf itself.

    Raises:
        ValueError: if there is none.
    """
    leaves = named_leaves(params)
    found = {
        name: (place, leaf)
        for place, (name, leaf) in enumerate(leaves.items())
        if getattr(leaf, "ndim", 0) == 2 and matches(name, leaf, include)
    }
    if not found:
        raise ValueError(
            f"there is no parameter of two dimensions to prune: include={include!r} means none of {list(leaves)}"
        )
    return found


def named_leaves(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree, in its order, by their paths with dots between."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def turned(name: str, array: Any) -> Any:
    """Return a parameter as ``(out, in)``, or turn it back: Flax keeps its ``kernel`` as ``(in, out)``."""
    return array.T if is_turned(name) else array


def is_turned(name: str) -> bool:
    """Whether a parameter is ``(in, out)``."""
    return name.rpartition(".")[2] == "kernel"


def _masked(name: str, leaf: Any, mask: Any) -> Any:
    if mask is True:
        return leaf
    array = as_array(name, leaf)
    return jnp.where(boolean_mask(mask, array.shape, name), array, jnp.zeros((), array.dtype))


def _name(path: Any) -> str:
    if path and getattr(path[-1], "name", None) == "value":  # of the box of a partitioned parameter, or of a Variable
        path = path[:-1]
    return ".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


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
