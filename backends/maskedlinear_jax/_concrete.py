"""Pruning and regrowth of parameters whose numbers are known: on the host; or, of those spread over devices, where they lie.

There nothing is gathered but counts, and of weights that grow at random their masks: the same places, bit for bit.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from maskedlinear import pruning
from maskedlinear._arrays import as_numpy
from maskedlinear._progress import progress_callback
from maskedlinear.models import Prunable, WeightAxes, prune_weights, refuse_unknown, regrow_weight
from maskedlinear.pruning._growth import number_to_move, places_at_random
from maskedlinear.pruning._layers import layer_seed
from maskedlinear_jax._compat import is_traced
from maskedlinear_jax._placement import is_spread, to_host, to_like
from maskedlinear_jax._select import check_comparable, clear_smallest, number, reduced
from maskedlinear_jax._stacks import (
    Shapes,
    clear_group,
    grouped,
    masked_so_far,
    of_matrices,
    refuse_lost,
    refuse_more,
)

__all__ = ["counts_of", "masks_on_host", "prune_known", "regrow_known"]

_logger = logging.getLogger("maskedlinear")


def prune_known(
    weights: Mapping[str, Prunable], sparsity: float, *, num_zeros: int | None = None, **how: Any
) -> dict[str, Any]:
    """Return the masks of parameters, pruned further to a sparsity, by name: laid as these are.

    Args:
        weights: by name; each of its own shape.
        sparsity: as :func:`maskedlinear.models.prune_weights` takes it, and so the rest.
        num_zeros: as above.
        how: as above.

    Raises:
        ValueError: as there.
    """
    if _are_compared_on_devices(weights, how):
        return _prune_spread(weights, sparsity, num_zeros, how["scope"], how["on_empty"], how.get("progress", False))
    parts = {name: _matrices_of(weight) for name, weight in weights.items()}
    made = prune_weights(parts, sparsity, num_zeros=num_zeros, **how)
    return {name: to_like(_restored(weights[name], made[name]), weights[name].weight) for name in weights}


def regrow_known(
    axes: WeightAxes | None,
    mask: Any,
    weight: Any,
    fraction: float,
    gradient: Any,
    seed: int,
    first: int,
    exclude_dropped: bool,
) -> tuple[Any, int]:
    """Return what :func:`regrow_traced` does, of arrays whose numbers are known; the mask is laid as the weight is."""
    every = [array for array in (weight, mask, gradient) if array is not None]
    spread = [array for array in every if is_spread(array)]
    if spread and all(_is_comparable([array]) for array in (weight, gradient) if array is not None):
        like = weight if is_spread(weight) else spread[0]
        parts: list[Any] = [None if array is None else to_like(array, like) for array in (weight, mask, gradient)]
        axes = axes or WeightAxes.of_entries(weight.ndim)
        return _regrow_spread(axes, parts[0], parts[1], parts[2], fraction, seed, first, exclude_dropped)
    rows: Any = None
    if gradient is not None:
        matrices = (axes or WeightAxes.of_entries(gradient.ndim)).matrices(to_host(gradient))
        whole = matrices.reshape(-1, matrices.shape[2])

        def rows(start: int, stop: int) -> Any:
            return whole[start:stop]

    arrays = to_host(mask), as_numpy(to_host(weight))
    new, count = regrow_weight(axes, *arrays, fraction, rows, layer_seed(seed, first), exclude_dropped)
    return to_like(new, weight), count


def counts_of(axes: WeightAxes, mask: Any) -> NDArray[np.int64]:
    """Return how many entries of each matrix of a weight are set, shape ``(stacked,)``."""
    if not isinstance(mask, jax.Array):
        return np.asarray(np.count_nonzero(axes.matrices(np.asarray(mask)), axis=(1, 2)), np.int64)
    counts: NDArray[np.int64] = axes.matrices(to_host(_counted(axes, mask))).reshape(-1).astype(np.int64)
    return counts


def masks_on_host(weights: Mapping[str, Prunable]) -> dict[str, Prunable]:
    """Return parameters with their masks as NumPy's, but for traced ones."""
    return {name: one if is_traced(one.mask) else one._replace(mask=to_host(one.mask)) for name, one in weights.items()}


def _matrices_of(weight: Prunable) -> Prunable:
    """Return a parameter as its matrix (out, in), a stack of them, or, if nobody knows its axes, as it is."""
    parts: list[Any] = [to_host(array) if is_spread(array) else array for array in (weight.weight, weight.gradient)]
    parts += [to_host(weight.mask), weight.fixed]
    if weight.axes is None:
        return Prunable(None, *parts)
    alone = weight.axes.matrix_shape(weight.mask.shape)[0] == 1
    parts = [None if part is None else weight.axes.matrices(part) for part in parts]
    parts = [part if part is None or not alone else part[0] for part in parts]
    axes = WeightAxes() if alone else WeightAxes(1, 2, 0)
    return Prunable(axes, *parts)._replace(sum_of_sizes=weight.axes.sum_of_sizes(weight.mask.shape))


def _restored(weight: Prunable, mask: Any) -> Any:
    """Return a mask of what :func:`_matrices_of` made as one of the parameter."""
    return mask if weight.axes is None else weight.axes.from_matrices(mask, weight.mask.shape)


def _are_compared_on_devices(weights: Mapping[str, Prunable], how: Mapping[str, Any]) -> bool:
    """Whether parameters are pruned where they lie: spread ones, by their magnitudes, as far as counts go."""
    plain = how.get("block") is None and not how.get("keep_at_least") and how.get("scope") != "row"
    if not (plain and isinstance(score := how.get("score", "magnitude"), str) and score == "magnitude"):
        return False
    values = [weight.weight for weight in weights.values()]
    if any(weight.fixed is not None for weight in weights.values()):
        return False
    if not any(map(is_spread, values)) or not all(isinstance(value, jax.Array) and value.size for value in values):
        return False
    places = {frozenset(value.sharding.device_set) for value in values if value.committed}
    return len(places) == 1 and _is_comparable(values)


def _is_comparable(arrays: Sequence[Any]) -> bool:
    try:
        check_comparable(arrays)
    except (TypeError, ValueError):
        return False
    return True


def _prune_spread(
    weights: Mapping[str, Prunable],
    sparsity: float,
    num_zeros: int | None,
    scope: pruning.Scope,
    on_empty: pruning.OnEmpty,
    progress: Any,
) -> dict[str, Any]:
    """Return what :func:`maskedlinear.models.prune_weights` does, of parameters that no device has whole."""
    if scope == "erdos_renyi":
        refuse_unknown([name for name, weight in weights.items() if weight.axes is None])
    tell = progress_callback(progress, "pruning")
    axes = {name: weight.axes or WeightAxes.of_entries(weight.weight.ndim) for name, weight in weights.items()}
    shapes: Shapes = {name: axes[name].matrix_shape(weight.weight.shape) for name, weight in weights.items()}
    masks = {name: to_like(weight.mask, weight.weight) for name, weight in weights.items()}
    for name, weight in weights.items():
        _refuse_nan("scores must be numbers", weight.weight, name)
    live = {name: counts_of(axes[name], mask) for name, mask in masks.items()}
    if num_zeros is not None and scope == "layer":
        sparsity, num_zeros = num_zeros / sum(weight.weight.size for weight in weights.values()), None
    wanted: Any = None if num_zeros is not None else sparsity
    sums = {name: axes[name].sum_of_sizes(weight.weight.shape) for name, weight in weights.items()}
    made: dict[str, Any] = {}
    for place, group in enumerate(groups := grouped(shapes, live, wanted, scope, num_zeros, sums=sums)):
        masked = masked_so_far(group, shapes, live)
        if on_empty != "keep":
            refuse_more(group, masked, "{} were asked for", "ask for at least as many, or pass no masks")
        known = tuple(axes[name] for name in group.names)
        values = [weights[name].weight for name in group.names]
        lying = tuple(value.sharding if value.committed else None for value in values)
        clear = _clearing(known, on_empty == "keep", lying)
        cleared = clear(jnp.asarray(group.zeros, jnp.int32), values, [masks[name] for name in group.names])
        made |= zip(group.names, cleared, strict=True)
        left = {name: counts_of(axes[name], made[name]) for name in group.names}
        if on_empty == "raise":
            refuse_lost(live, left)
        zeros = masked_so_far(group, shapes, left)
        if (zeros != group.zeros).any():
            _logger.log(
                logging.INFO if on_empty == "keep" and (masked > group.zeros).any() else logging.WARNING,
                "%d connections are masked of %s, where %d were asked for: the others are kept, or were masked before",
                int(zeros.sum()),
                ", ".join(group.names[:8]),
                int(group.zeros.sum()),
            )
        tell((place + 1) / len(groups))
    return {name: made[name] if value.weight.committed else to_host(made[name]) for name, value in weights.items()}


def _regrow_spread(
    axes: WeightAxes,
    weight: Array,
    mask: Array,
    gradient: Array | None,
    fraction: float,
    seed: int,
    first: int,
    exclude_dropped: bool,
) -> tuple[Any, int]:
    """Return what :func:`maskedlinear.models.regrow_weight` does, of a parameter that no device has whole."""
    if gradient is not None:
        if gradient.shape != weight.shape:
            raise ValueError(f"a gradient must have its weight's shape, {weight.shape}; got {gradient.shape}")
        _refuse_nan("a gradient must hold numbers", gradient)
    stacked, out, in_ = axes.matrix_shape(weight.shape)
    live = counts_of(axes, mask)
    count = np.array([number_to_move(fraction, int(number), out * in_, exclude_dropped) for number in live], np.int64)
    _refuse_nan("a live weight must be a number", jnp.where(mask, weight, jnp.zeros((), weight.dtype)))
    clear = _clearing_each(axes, weight.sharding)

    def cleared(weight: Array, mask: Array, counts: Any) -> Array:
        new: Array = clear(weight, mask, of_matrices(axes, np.asarray(counts, np.int32), weight.shape))
        return new

    kept = cleared(weight, mask, count)
    taken = mask if exclude_dropped else kept
    if gradient is not None:
        come: Any = cleared(gradient, ~taken, out * in_ - live - (count if exclude_dropped else 0))
    else:
        matrices = axes.matrices(to_host(taken))
        grown = np.zeros((stacked, out * in_), bool)
        for place, (row, matrix, number) in enumerate(zip(grown, matrices, count, strict=True)):
            places = np.flatnonzero(matrix)
            row[places_at_random(places, out * in_, number, layer_seed(seed, first + place))] = True
        come = to_like(axes.from_matrices(grown, weight.shape), weight)
    return jax.device_put(kept | come, weight.sharding), stacked


@functools.partial(jax.jit, static_argnums=0)
def _counted(axes: WeightAxes, mask: Array) -> Array:
    return number([mask], reduced(axes, mask.ndim))


@functools.lru_cache(maxsize=512)
def _clearing(axes: tuple[WeightAxes, ...], keep: bool, lying: tuple[Any, ...]) -> Any:
    """Return :func:`clear_group` of parameters with these axes, compiled; the masks lie as is said."""
    return jax.jit(
        lambda zeros, weights, masks: tuple(clear_group(zeros, weights, masks, keep, axes)), out_shardings=lying
    )


@functools.lru_cache(maxsize=512)
def _clearing_each(axes: WeightAxes, lying: Any) -> Any:
    """Return :func:`clear_smallest` of each matrix of a parameter with these axes, compiled."""
    return jax.jit(
        lambda weight, mask, count: clear_smallest([weight], [mask], count, [axes], by_matrix=True)[0],
        out_shardings=lying,
    )


def _refuse_nan(rule: str, array: Array, name: str = "") -> None:
    if bool(to_host(jnp.isnan(array).any())):
        raise ValueError(f"{rule}; got NaN{name and f' of {name}'}")
