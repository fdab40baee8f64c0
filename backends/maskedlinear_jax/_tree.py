"""Pruning of parameter trees, for plain JAX and linen: masks in the form that ``freeze_masked`` takes.

Which parameters are weights, and which of their axes are inputs and outputs, is read off their names, as Flax gives them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from maskedlinear import pruning
from maskedlinear._progress import Progress
from maskedlinear.models import (
    UNKNOWN,
    ModelSummary,
    Of,
    Prunable,
    UnmaskedParameter,
    WeightAxes,
    WeightSummary,
    axes_by_name,
    check_of,
    count_masked,
    first_names,
    refuse_fixed,
    why_left_out,
    zeros_left,
)
from maskedlinear.pruning._layers import Include, Scoring, asked_by_name, check_known, matches
from maskedlinear_jax._compat import is_traced
from maskedlinear_jax._concrete import masks_on_host, prune_known, regrow_known
from maskedlinear_jax._functional import as_array, boolean_mask
from maskedlinear_jax._placement import to_host, to_like
from maskedlinear_jax._stacks import prune_traced, regrow_traced

__all__ = [
    "Axes",
    "ConstrainedMask",
    "apply_masks",
    "axes_of",
    "chosen_parameters",
    "is_mask_leaf",
    "is_unmasked",
    "leaves_like",
    "named_leaves",
    "plain_mask",
    "plain_masks",
    "prune_tree",
    "refuse_constrained",
    "regrow_tree",
    "stack_axes",
]

Axes = Mapping[str, WeightAxes] | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class ConstrainedMask:
    """What stands for the mask of a weight that has constraints, in the tree that ``param_masks`` makes.

    All arrays broadcast to the weight's shape; ``None`` of what it has not.

    Attributes:
        mask: the mask.
        fixed: where it is fixed.
        ties: int32: which entries train one value, those of the same number >= 0; less than there are entries.
        lower: the least values.
        upper: the greatest.
    """

    mask: Any
    fixed: Any
    ties: Any
    lower: Any
    upper: Any


def plain_mask(mask: Any) -> Any:
    """Return a mask that stands in a tree of masks, without what is kept of the weight's connections."""
    return mask.mask if isinstance(mask, ConstrainedMask) else mask


def plain_masks(masks: Any) -> Any:
    """Return a tree of masks alone."""
    return jax.tree.map(plain_mask, masks, is_leaf=lambda node: isinstance(node, ConstrainedMask))


def refuse_constrained(function: str, masks: Any) -> None:
    """Raise a ``ValueError`` if a tree of masks is of a model with constraints, which a function does not know."""
    nodes = jax.tree.leaves(masks, is_leaf=lambda node: isinstance(node, ConstrainedMask))
    if any(isinstance(node, ConstrainedMask) for node in nodes):
        raise ValueError(
            f"{function} knows no constraints, and these masks are of a model that has some: free it before, by "
            "constrain(model, {name: None}), or use prune_model and regrow_model between steps"
        )


def prune_tree(
    params: Any,
    sparsity: float,
    *,
    masks: Any = None,
    include: Include = None,
    axes: Axes = None,
    score: Scoring = "magnitude",
    scope: pruning.Scope = "global",
    of: Of = "masked",
    block: tuple[int, int] | None = None,
    gradients: Any = None,
    seed: int = 0,
    on_empty: pruning.OnEmpty = "raise",
    keep_at_least: Mapping[str, int] | None = None,
    progress: Progress = False,
    constraints: Any = None,
) -> Any:
    """Return masks for a tree of parameters, pruned to a sparsity: a tree as :func:`freeze_masked` takes it.

    Pruned are matrices and kernels: parameters of two dimensions, and those of more that are called ``kernel``, ``weight``
    or ``w``; never biases, scales, positions, embeddings or adapters, unless ``include`` is or has their very name. A matrix
    called ``kernel`` is ``(in, out)``, as Flax keeps it, and is read transposed, so that PyTorch's layers of the same
    weights get the same masks; any other is ``(out, in)``. Kernels of Flax's attention and convolutions are known by their
    modules' names; any other of more dimensions is pruned entry by entry, unless ``axes`` says what it is.

    Inside ``jit`` the masks are the same, by ``score="magnitude"``, without blocks, and with an ``on_empty`` that can be
    kept there: ``"keep"``, ``"allow"``, or ``"raise"`` by layer. What depends on numbers cannot be refused there: a weight
    that is NaN counts as the largest, and where traced masks have more zeros than are asked for none more is masked.

    Masks lie on the devices as their parameters do. By magnitude, without blocks, parameters that are spread over devices
    are compared where they lie; for anything else the host gathers them, one after the other. Processes that have parts
    of them all call this.

    Args:
        params: the tree.
        sparsity: the fraction of masked connections, in [0, 1]; see :func:`maskedlinear.pruning.prune`.
        masks: the tree of masks so far, from an earlier call; what is masked stays so.
        include: which parameters: a shell pattern of names (paths with dots between, ``"encoder.*"``), a sequence of them,
            or a function of name and parameter.
        axes: what the axes of parameters mean, by name: ``{"experts.up": WeightAxes(batch_axis=0, in_axis=1, out_axis=2)}``.
            :func:`trace_axes` reads them off the program.
        score: ``"magnitude"``, ``"random"``, ``"snip"`` or ``"taylor"`` (these two need ``gradients``), a function of
            weight and gradient, both ``(out, in)``, that returns scores of their shape; or the scores ``(out, in)`` by name.
            Of a parameter that is pruned entry by entry, ``(1, size)``; the matrices of a stack follow each other.
        scope: ``"global"``, ``"layer"``, ``"row"``, ``"erdos_renyi"`` or ``"uniform_plus"``, as
            :func:`maskedlinear.pruning.prune` takes it; each matrix of a stack is a layer.
        of: what the sparsity is a fraction of: the parameters that are pruned here (``"masked"``), all ``"weights"`` of the
            tree, those that ``include`` leaves out too, or all numbers of the ``"model"``.
        block: prune whole blocks of ``(outputs, inputs)``.
        gradients: a tree like ``params``.
        seed: for ``"random"``.
        on_empty: ``"raise"`` or ``"allow"`` where a parameter would lose its last connection; ``"keep"`` leaves it its best.
        keep_at_least: as in :func:`maskedlinear.pruning.prune`.
        progress: as in :func:`maskedlinear.pruning.prune`.
        constraints: as :func:`freeze_masked` takes them: what is fixed is not pruned, by magnitude alone.

    Returns:
        A tree like ``params``: boolean masks of the parameters' shapes, and ``None`` for those that are not pruned, which is
        no leaf to JAX: a jitted function may take the masks as an argument.

    Raises:
        ValueError: as by :func:`maskedlinear.pruning.prune`; if no parameter is meant, a gradient is missing, a tree does
            not fit, or structure is asked for (blocks, Erdős–Rényi) of a parameter whose axes nobody knows; inside ``jit``,
            if what is asked for cannot be had there; or, of known weights, if fixed connections would go.
        TypeError: inside ``jit``, if the sparsity is traced, or weights are not real floating-point.
    """
    refuse_constrained("prune_tree", masks)
    structure = jax.tree.structure(params)
    chosen = chosen_parameters(params, include, axes, warn=True)
    before, moved = leaves_like(structure, masks, "masks"), leaves_like(structure, gradients, "gradients")
    fixed = _fixed(params, constraints)
    if fixed and score != "magnitude":
        raise ValueError("fixed connections are left alone by score='magnitude'; got another score")
    weights = {}
    for name, (place, leaf) in chosen.items():
        live: Any = np.ones(leaf.shape, bool)
        if before is not None and not is_unmasked(before[place]):
            live = boolean_mask(before[place], leaf.shape, name)
        gradient = None if moved is None else moved[place]
        weights[name] = Prunable(axes_of(name, leaf.ndim, axes), _held_fast(leaf, fixed.get(name)), gradient, live)
    traced = any(map(is_traced, jax.tree.leaves((params, masks, gradients, sparsity))))
    check_of(of)
    if traced and of != "masked":
        raise ValueError(
            f"inside a transform the sparsity is of the parameters to prune; got of={of!r}: prune outside of it"
        )
    how: dict[str, Any] = {"score": score, "scope": scope, "block": block, "seed": seed, "on_empty": on_empty}
    how |= {"keep_at_least": keep_at_least, "progress": progress}
    if traced:  # what is known of masks is of the program
        made = prune_traced(masks_on_host(weights), sparsity, **how)
    else:
        if of != "masked":
            how["num_zeros"] = zeros_left(
                _table(params, before, chosen), sparsity, of, count_masked(masks_on_host(weights))
            )
        made = prune_known(weights, sparsity, **how)
        _refuse_fixed(fixed, made)
    leaves: list[Any] = [None] * len(jax.tree.leaves(params)) if before is None else list(before)
    for name, (place, leaf) in chosen.items():
        leaves[place] = to_like(made[name], leaf)
    return jax.tree.unflatten(structure, leaves)


def _table(params: Any, masks: list[Any] | None, chosen: Mapping[str, Any]) -> ModelSummary:
    """Return the table of a tree's parameters: masked are those that are to be pruned, and those with masks so far."""
    rows, unmasked = [], []
    for place, (name, leaf) in enumerate(named_leaves(params).items()):
        mask = None if masks is None else masks[place]
        if is_unmasked(mask) and name not in chosen:
            unmasked.append(UnmaskedParameter(name, leaf.shape, why_left_out(name, leaf.ndim)))
        else:
            live = np.ones(leaf.shape, bool) if is_unmasked(mask) else to_host(boolean_mask(mask, leaf.shape, name))
            rows.append(WeightSummary.of_mask(name, live, leaf.nbytes, WeightAxes.of_entries(leaf.ndim)))
    return ModelSummary(rows, unmasked)


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
    leaves = leaves_like(structure, plain_masks(masks), "masks") or []
    return jax.tree.unflatten(
        structure, [_masked(_name(path), leaf, mask) for (path, leaf), mask in zip(flat, leaves, strict=True)]
    )


def regrow_tree(
    params: Any,
    masks: Any,
    fraction: float,
    *,
    gradients: Any = None,
    include: Include = None,
    axes: Axes = None,
    seed: int = 0,
    exclude_dropped: bool = False,
    constraints: Any = None,
) -> tuple[Any, Any]:
    """Move a fraction of each masked parameter's connections; return the parameters, 0 but for those that stay, and masks.

    Source: SET (at random) and RigL (by gradient); see :func:`maskedlinear.pruning.regrow`. Layers of other frameworks with
    the same weights move alike. An optimizer guarded by :func:`freeze_masked` starts new connections with a clean state at
    its next step.

    Inside ``jit`` the masks are the same, if fraction and seed are known when it is compiled; :func:`scheduled_regrowth`
    changes them from step to step. A weight or gradient that is NaN cannot be refused there, and counts as the largest.

    Args:
        params: the tree.
        masks: a tree as :func:`prune_tree` returns it.
        fraction: the share of live connections that move, in [0, 1]; :func:`maskedlinear.pruning.cosine_decay` lets it
            fall.
        gradients: the loss's gradient with respect to *all* weights, a tree like ``params``, to grow where it is largest:
            ``jax.grad(dense_loss)(apply_masks(params, masks))``. ``None`` grows at random.
        include: which parameters, as in :func:`prune_tree`.
        axes: as in :func:`prune_tree`.
        seed: of the random places; another at each step. Matrix i of the parameters that have a mask takes ``seed + i``.
        exclude_dropped: as :func:`maskedlinear.pruning.regrow` takes it.
        constraints: as :func:`freeze_masked` takes them: what is fixed does not move.

    Returns:
        The parameters and the masks, trees like those given.

    Raises:
        ValueError: as by :func:`maskedlinear.pruning.regrow`; or if no parameter has a mask, or a tree does not fit; or,
            of known weights, if fixed connections would move.
        TypeError: inside ``jit``, if fraction or seed is traced, or weights are not real floating-point.
    """
    refuse_constrained("regrow_tree", masks)
    structure = jax.tree.structure(params)
    traced = any(map(is_traced, jax.tree.leaves((params, masks, gradients, fraction, seed))))
    before, moved = leaves_like(structure, masks, "masks") or [], leaves_like(structure, gradients, "gradients")
    leaves, found = jax.tree.leaves(params), list(before)
    named = enumerate(named_leaves(params).items())
    chosen = {
        name: (place, leaf)
        for place, (name, leaf) in named
        if not is_unmasked(before[place]) and matches(name, leaf, include)
    }
    if not chosen:
        raise ValueError("connections move in parameters with masks, and there is none: make masks with prune_tree")
    number, fixed = 0, _fixed(params, constraints)
    for name, (place, leaf) in chosen.items():
        gradient = None if moved is None else moved[place]
        old = to_like(boolean_mask(before[place], leaf.shape, name), leaf, f"the mask of {name}")
        held = _held_fast(leaf, fixed.get(name))
        parts = (axes_of(name, leaf.ndim, axes), old, held, fraction, gradient, seed, number, exclude_dropped)
        new, matrices = (regrow_traced if traced else regrow_known)(*parts)
        if not traced and name in fixed:
            _refuse_fixed({name: fixed[name]}, {name: new})
        number += matrices
        leaves[place] = jnp.where(new & old, leaf, jnp.zeros((), leaf.dtype))
        found[place] = new
    return jax.tree.unflatten(structure, leaves), jax.tree.unflatten(structure, found)


def _fixed(params: Any, constraints: Any) -> dict[str, Any]:
    """Return which entries of parameters are fixed, by name."""
    from maskedlinear_jax._constraints import HeldTree  # which needs this module

    return {} if constraints is None else HeldTree(constraints).fixed(params)


def _held_fast(leaf: Any, fixed: Any) -> Any:
    """Return values by whose magnitude fixed connections are the last to go."""
    return leaf if fixed is None else jnp.where(fixed, jnp.asarray(np.inf, leaf.dtype), leaf)


def _refuse_fixed(fixed: Mapping[str, Any], masks: Mapping[str, Any]) -> None:
    for name, places in fixed.items():
        if name in masks:
            refuse_fixed(name, int(np.count_nonzero(places & ~to_host(masks[name]))))


def chosen_parameters(
    params: Any, include: Include, axes: Axes = None, *, warn: bool = False
) -> dict[str, tuple[int, Any]]:
    """Return the parameters to prune, by name: their place among the tree's leaves, and the leaf itself.

    If it is to ``warn``, it names those of which nobody knows whether they are weights.

    Raises:
        ValueError: if there is none.
    """
    leaves = named_leaves(params)
    check_known("axes", axes or (), list(leaves))
    asked = [*asked_by_name(include), *(axes or ())]
    why = {name: why_left_out(name, getattr(leaf, "ndim", 0)) for name, leaf in leaves.items()}
    found = {
        name: (place, leaf)
        for place, (name, leaf) in enumerate(leaves.items())
        if (not why[name] or (name in asked and bool(getattr(leaf, "ndim", 0)))) and matches(name, leaf, include)
    }
    if not found:
        raise ValueError(
            f"there is no matrix or kernel to prune: include={include!r} means none of {list(leaves)}, but for "
            f"{', '.join(sorted(set(filter(None, why.values())))) or 'none'}"
        )
    left = [name for name, reason in why.items() if reason == UNKNOWN and name not in found]
    if left and include is None and warn:
        warnings.warn(
            f"{first_names(left)} are left out, since their names do not say whether they are weights: name them in axes or "
            "include",
            stacklevel=3,
        )
    return found


def axes_of(name: str, ndim: int, axes: Axes) -> WeightAxes | None:
    """Return what the axes of a parameter mean: as it was told, or by its name; ``None`` if neither says."""
    return (axes or {}).get(name) or axes_by_name(name, ndim)


def stack_axes(name: str, ndim: int, axes: Axes = None) -> WeightAxes:
    """Return the axes by which a parameter is a stack of matrices; each entry stands for itself if nobody knows them."""
    return axes_of(name, ndim, axes) or WeightAxes.of_entries(ndim)


def named_leaves(tree: Any, *, of_masks: bool = False) -> dict[str, Any]:
    """Return the leaves of a tree, in its order, by their paths with dots between; ``None`` is one in a tree of masks."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_mask_leaf if of_masks else None)
    return {_name(path): leaf for path, leaf in flat}


def is_mask_leaf(node: Any) -> bool:
    """Whether a node of a tree of masks is what stands for one parameter, though it may be none to JAX."""
    return node is None or isinstance(node, ConstrainedMask)


def is_unmasked(mask: Any) -> bool:
    """Whether this stands in a tree of masks for a parameter that has none."""
    return mask is None or mask is True


def _masked(name: str, leaf: Any, mask: Any) -> Any:
    if is_unmasked(mask):
        return leaf
    array = as_array(name, leaf)
    return jnp.where(boolean_mask(mask, array.shape, name), array, jnp.zeros((), array.dtype))


def _name(path: Any) -> str:
    if path and getattr(path[-1], "name", None) == "value":  # of the box of a partitioned parameter, or of a Variable
        path = path[:-1]
    return ".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def leaves_like(structure: Any, tree: Any, what: str) -> list[Array | bool | None] | None:
    """Return the leaves of a tree with the parameters' structure."""
    if tree is None:
        return None
    try:
        leaves: list[Array | bool | None] = structure.flatten_up_to(tree)
    except ValueError as error:
        raise ValueError(
            f"{what} must be a tree like the parameters', {structure}; got {jax.tree.structure(tree)}"
        ) from error
    return leaves
