"""Pruning of stacked matrices inside ``jit``: which are compared with each other, how many go, and which.

A parameter is a stack of matrices, ``(stacked, out, in)``, most often of one; each of them is a layer to
:func:`maskedlinear.pruning.prune`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from maskedlinear import pruning
from maskedlinear.masks._random import checked_seed
from maskedlinear.models import Prunable, WeightAxes, refuse_unknown
from maskedlinear.pruning._edges import check_scope, zeros_by_scope
from maskedlinear_jax._compat import is_traced
from maskedlinear_jax._growth import key_words, regrow_stack, share_words
from maskedlinear_jax._select import check_comparable, clear_smallest, largest, number, reduced

__all__ = [
    "Counts",
    "Group",
    "Shapes",
    "check_compiled_scope",
    "check_on_empty",
    "clear_group",
    "grouped",
    "masked_so_far",
    "of_matrices",
    "prune_traced",
    "refuse_empty",
    "refuse_lost",
    "refuse_more",
    "regrow_parameter",
    "regrow_traced",
]

Shapes = Mapping[str, tuple[int, int, int]]  # (stacked, out, in)
Counts = Mapping[str, NDArray[np.int64]]  # of each matrix


class Group(NamedTuple):
    """Parameters by name, and how many zeros they get: all together, ``()``, or each matrix of one, ``(stacked,)``."""

    names: tuple[str, ...]
    zeros: NDArray[np.int64]


def grouped(
    shapes: Shapes,
    live: Counts,
    sparsity: Any,
    scope: pruning.Scope,
    num_zeros: int | None = None,
    *,
    sums: Mapping[str, int],
) -> list[Group]:
    """Return the parameters that are compared with each other, as :func:`zeros_by_scope` does for their matrices.

    ``sums`` are the sums of their sizes, for ``"erdos_renyi"``.
    """
    matrices = {(name, place): shape[1:] for name, shape in shapes.items() for place in range(shape[0])}
    counts = {(name, place): int(live[name][place]) for name, place in matrices}
    sums_of_sizes = {key: sums[key[0]] for key in matrices} if scope == "erdos_renyi" else None
    parts = zeros_by_scope(matrices, counts, sparsity, num_zeros, scope, sums_of_sizes)
    if scope == "global" or len(parts) < len(matrices):
        return [Group(tuple(shapes), np.asarray(parts[0][1], np.int64))]
    zeros = iter([zeros for _, zeros in parts])
    return [
        Group((name,), np.array([next(zeros) for _ in range(shape[0])], np.int64)) for name, shape in shapes.items()
    ]


def masked_so_far(group: Group, shapes: Shapes, live: Counts) -> NDArray[np.int64]:
    """Return how many zeros a group has already, in the form of its ``zeros``."""
    masked = [math.prod(shapes[name][1:]) - live[name] for name in group.names]
    return masked[0] if group.zeros.ndim else np.asarray(sum(int(part.sum()) for part in masked), np.int64)


def refuse_more(group: Group, masked: NDArray[np.int64], asked: str, remedy: str) -> None:
    """Raise a ``ValueError`` if more is masked, in a matrix or together, than a group is to have.

    Args:
        group: the group.
        masked: how many zeros it has, in the form of its ``zeros``.
        asked: how the number that was asked for came about, with braces where it belongs.
        remedy: what to do.
    """
    more = masked > group.zeros
    if more.any():
        first = np.unravel_index(int(np.argmax(more)), more.shape)
        names = _named(group.names[0], more) if more.ndim else ", ".join(group.names)
        raise ValueError(
            f"pruning only removes connections; got {masked[first]} masked ones of {names}, where "
            f"{asked.format(group.zeros[first])}: {remedy}"
        )


def refuse_empty(group: Group, shapes: Shapes, live: Counts) -> None:
    """Raise a ``ValueError`` if a matrix that has connections loses all of them."""
    for name in group.names if group.zeros.ndim else ():
        lost = (live[name] > 0) & (group.zeros == math.prod(shapes[name][1:]))
        if lost.any():
            raise ValueError(
                f"a layer must keep a connection; all would be gone of {_named(name, lost)}: prune less, or pass "
                "on_empty='allow'"
            )


def refuse_lost(before: Counts, after: Counts) -> None:
    """Raise a ``ValueError`` if a matrix that had connections has none any more."""
    for name, left in after.items():
        lost = (before[name] > 0) & (left == 0)
        if lost.any():
            raise ValueError(
                f"a layer must keep a connection; all would be gone of {_named(name, lost)}: prune less, prune by "
                "scope='layer', or pass on_empty='keep' or 'allow'"
            )


def clear_group(
    zeros: Array, weights: Sequence[Any], masks: Sequence[Any], keep: bool, axes: Sequence[WeightAxes]
) -> list[Array]:
    """Return the masks of a group with as many zeros, or more where more are masked already.

    Args:
        zeros: of a :class:`Group`, int32.
        weights: of each of its parameters.
        masks: booleans of their shapes.
        keep: whether each matrix keeps its best connection; there are fewer zeros, if need be.
        axes: of each of the parameters.
    """
    parts = list(zip(weights, masks, axes, strict=True))
    kept = [largest(*part) if keep else jnp.zeros_like(part[1]) for part in parts]
    free = [mask & ~stays for mask, stays in zip(masks, kept, strict=True)]
    by_matrix = bool(zeros.ndim)
    over, size = None, sum(mask.size for mask in masks)
    if by_matrix:
        over, shape = reduced(axes[0], weights[0].ndim), weights[0].shape
        size = math.prod(shape[axis] for axis in over)
        zeros = of_matrices(axes[0], zeros, shape)
    masked = jnp.int32(size) - number(masks, over)
    count = jnp.minimum(jnp.maximum(zeros - masked, 0), number(free, over))
    cleared = clear_smallest(weights, free, count, axes, by_matrix=by_matrix)
    return [mask | stays for mask, stays in zip(cleared, kept, strict=True)]


def of_matrices(axes: WeightAxes, numbers: Any, shape: tuple[int, ...]) -> Any:
    """Return a number of each matrix of a weight of this shape, ``(stacked,)``, as :func:`number` counts by matrix."""
    over = reduced(axes, len(shape))
    return axes.from_matrices(numbers, tuple(1 if axis in over else size for axis, size in enumerate(shape)))


def prune_traced(
    weights: Mapping[str, Prunable],
    sparsity: Any,
    *,
    score: Any = "magnitude",
    scope: pruning.Scope = "global",
    block: Any = None,
    seed: int = 0,
    on_empty: pruning.OnEmpty = "raise",
    keep_at_least: Any = None,
    progress: Any = False,
) -> dict[str, Any]:
    """Return what :func:`maskedlinear.models.prune_weights` does, of arrays inside a transform.

    Raises:
        ValueError: if what is asked for cannot be done, or not be refused, where numbers are not known.
        TypeError: if the sparsity is traced, or weights are not real floating-point.
    """
    del seed, progress  # nothing is drawn, and nothing can be shown
    _check_traced(sparsity, score, scope, block, on_empty, keep_at_least)
    if scope == "erdos_renyi":
        refuse_unknown([name for name, weight in weights.items() if weight.axes is None])
    axes = {name: weight.axes or WeightAxes.of_entries(weight.mask.ndim) for name, weight in weights.items()}
    shapes = {name: axes[name].matrix_shape(weight.mask.shape) for name, weight in weights.items()}
    known = not any(is_traced(weight.mask) for weight in weights.values())
    if scope == "erdos_renyi" and not known:
        raise ValueError(
            "scope='erdos_renyi' shares out what is masked already, which traced masks do not tell while they are "
            "compiled: close over the masks so far, or prune by scope='layer' or 'global'"
        )
    live = {
        name: np.count_nonzero(axes[name].matrices(weight.mask), axis=(1, 2))
        if known
        else np.full(shapes[name][0], math.prod(shapes[name][1:]))
        for name, weight in weights.items()
    }
    made: dict[str, Any] = {}
    sums = {name: axes[name].sum_of_sizes(weight.mask.shape) for name, weight in weights.items()}
    for group in grouped(shapes, live, sparsity, scope, sums=sums):
        if known and on_empty != "keep":
            refuse_more(
                group,
                masked_so_far(group, shapes, live),
                "{} were asked for",
                "ask for at least as many, or pass no masks",
            )
        if on_empty == "raise":
            refuse_empty(group, shapes, live)
        check_comparable([weights[name].weight for name in group.names])
        values = [jnp.asarray(weights[name].weight) for name in group.names]
        before, zeros = [jnp.asarray(weights[name].mask) for name in group.names], jnp.asarray(group.zeros, jnp.int32)
        cleared = clear_group(zeros, values, before, on_empty == "keep", [axes[name] for name in group.names])
        made |= zip(group.names, cleared, strict=True)
    return made


def regrow_traced(
    axes: WeightAxes | None,
    mask: Any,
    weight: Any,
    fraction: Any,
    gradient: Any,
    seed: Any,
    first: int,
    exclude_dropped: bool,
) -> tuple[Any, int]:
    """Return what :func:`maskedlinear.models.regrow_weight` does, of arrays inside a transform.

    Args:
        axes: as it takes them, and so ``mask`` and ``weight``.
        mask: as above.
        weight: as above.
        fraction: a number, not traced.
        gradient: of the weight's shape, or ``None``.
        seed: an integer, not traced; matrix i takes ``seed + first + i``.
        first: as above.
        exclude_dropped: as above.

    Raises:
        ValueError: if the gradient has another shape, or the fraction or seed is out of its range.
        TypeError: if the fraction or seed is traced, or the weight is not real floating-point.
    """
    if is_traced(fraction) or is_traced(seed):
        raise TypeError(
            "inside a transform the fraction and the seed of regrow_tree must be known when it is compiled; got traced "
            "ones: make them static arguments, or move connections by scheduled_regrowth"
        )
    share, key = jnp.asarray(share_words(fraction)), jnp.asarray(key_words(checked_seed(seed)))
    axes = axes or WeightAxes.of_entries(mask.ndim)
    return regrow_parameter(axes, mask, weight, gradient, share, key, first, exclude_dropped)


def regrow_parameter(
    axes: WeightAxes,
    mask: Any,
    weight: Any,
    gradient: Any,
    share: Array,
    key: Array,
    first: int,
    exclude_dropped: bool,
) -> tuple[Any, int]:
    """Return the new mask of a parameter, and the number of its matrices, each of which has moved.

    Args:
        axes: of the parameter.
        mask: of its shape.
        weight: its values.
        gradient: of its shape, or ``None``.
        share: as :func:`regrow_stack` takes it, and so the rest.
        key: as above.
        first: as above.
        exclude_dropped: as above.

    Raises:
        ValueError: if the gradient has another shape.
        TypeError: if the weight is not real floating-point.
    """
    if gradient is not None and gradient.shape != weight.shape:
        raise ValueError(
            f"growth by gradient needs the gradient of all weights, of their shape {weight.shape}; got {gradient.shape}: "
            "take the mean over examples, or grow at random"
        )
    for array in (weight,) if gradient is None else (weight, gradient):
        check_comparable([array])
    parts: list[Any] = [None if part is None else jnp.asarray(part) for part in (weight, mask, gradient)]
    moved = regrow_stack(axes, parts[0], parts[1], parts[2], share, key, first, exclude_dropped)
    return moved, axes.matrix_shape(weight.shape)[0]


def _check_traced(sparsity: Any, score: Any, scope: str, block: Any, on_empty: str, keep_at_least: Any) -> None:
    """Raise unless this can be pruned where numbers are not known."""
    if is_traced(sparsity):
        raise TypeError(
            "inside a transform the sparsity must be known when it is compiled; got a traced one: make it a static "
            "argument, or prune by scheduled_pruning"
        )
    asked = {"score": score, "block": block, "keep_at_least": keep_at_least or None}
    for name, value in asked.items():
        if not (value is None or (isinstance(value, str) and value == "magnitude")):
            raise ValueError(
                f"inside a transform weights are pruned one by one and by their magnitude; got {name}={value!r}: prune "
                "outside of it"
            )
    check_compiled_scope(scope)
    check_on_empty(on_empty, scope)


def check_compiled_scope(scope: str) -> None:
    """Raise a ``ValueError`` if ``scope`` is none, or not one that a compiled step can prune by."""
    check_scope(scope)
    if scope == "row":
        raise ValueError(
            "scope='row' is not made for compiled steps: prune outside of jit, or by one of the other scopes"
        )


def check_on_empty(on_empty: str, scope: str) -> None:
    """Raise a ``ValueError`` if ``on_empty`` is none of the three, or asks for what a compiled step cannot do."""
    if on_empty not in get_args(pruning.OnEmpty):
        raise ValueError(f"on_empty must be 'raise', 'allow' or 'keep'; got {on_empty!r}")
    if scope == "global" and on_empty == "raise":
        raise ValueError(
            "pruning by scope='global' may take a parameter's last connection, which a compiled step cannot refuse: say "
            "on_empty='keep' or 'allow', or scope='layer'"
        )


def _named(name: str, where: NDArray[np.bool_]) -> str:
    """Return the name of the first matrix that is meant, as :func:`maskedlinear.models.prune_weights` gives it."""
    return name if where.size == 1 else f"{name}[{int(np.argmax(where))}]"
