"""The k smallest magnitudes of many weights, exactly and with ties broken by place, inside ``jit``.

Bits are compared, not floats: subnormal numbers, which XLA takes for 0 on the CPU, count as what they are.

Weights stay in their own shape, however their axes lie: all that is done is entry by entry, or a sum, so that of weights
spread over devices no device ever gets more than its part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax

from maskedlinear.models import WeightAxes

__all__ = ["bound", "check_comparable", "clear_smallest", "largest", "magnitudes", "number", "reduced"]

_MOST = (1 << 31) - 1  # entries that int32 can count


def check_comparable(weights: Sequence[Array]) -> None:
    """Raise unless :func:`clear_smallest` can compare these with each other.

    Raises:
        ValueError: if they have 2³¹ entries or more together.
        TypeError: if they are not real floating-point, or some are float64 and others are not.
    """
    dtypes = {jnp.dtype(weight.dtype).name for weight in weights}
    if not all(jnp.issubdtype(weight.dtype, jnp.floating) for weight in weights) or (
        "float64" in dtypes and len(dtypes) > 1
    ):
        raise TypeError(
            "weights that are compared with each other must be real floating-point, all of them float64 or none; got "
            f"{', '.join(sorted(dtypes))}: choose them with include=..., or compare by scope='layer'"
        )
    size = sum(math.prod(weight.shape) for weight in weights)
    if size > _MOST:
        raise ValueError(
            f"at most {_MOST} weights can be compared with each other in a compiled step; got {size}: choose them with "
            "include=..., or compare by scope='layer'"
        )


def clear_smallest(
    weights: Sequence[Array],
    masks: Sequence[Array],
    count: Array,
    axes: Sequence[WeightAxes] | None = None,
    *,
    by_matrix: bool = False,
) -> list[Array]:
    """Return masks without the ``count`` live entries of smallest ``(|weight|, layer, place)``.

    The masks that :func:`maskedlinear.pruning.prune` gives for magnitudes, found by counting, a pass a bit, which needs no
    other array of the weights' size. NaN counts as the largest magnitude.

    Args:
        weights: of any shapes, which :func:`check_comparable` lets pass.
        masks: the masks so far, booleans of their shapes.
        count: how many, int32; at most as many as are live.
        axes: what the weights' axes mean; ``None`` of matrices (out, in).
        by_matrix: whether each matrix of one weight is looked at by itself: ``count`` is as :func:`number` returns it then.
    """
    axes = axes or [WeightAxes()] * len(weights)
    over = reduced(axes[0], weights[0].ndim) if by_matrix else None
    keys = [magnitudes(weight) for weight in weights]
    starts = [sum(math.prod(weight.shape) for weight in weights[:place]) for place in range(len(weights))]
    numbered = zip(weights, starts, axes, strict=True)
    places = [_places(weight.shape, start, known) for weight, start, known in numbered]
    least = bound(keys, masks, count, over)
    below = [mask & (key < least) for key, mask in zip(keys, masks, strict=True)]
    equal = [mask & (key == least) for key, mask in zip(keys, masks, strict=True)]
    first = bound(places, equal, count - number(below, over), over)
    return [
        mask & ~gone & ~(tie & (place < first))
        for mask, gone, tie, place in zip(masks, below, equal, places, strict=True)
    ]


def largest(weight: Array, mask: Array, axes: WeightAxes) -> Array:
    """Return a mask of the live entry of each matrix that has the largest magnitude; of equal ones the last."""
    over = reduced(axes, weight.ndim)
    key, places = magnitudes(weight), _places(weight.shape, 1, axes)  # 0 stands for what is not live
    best = mask & (key == jnp.max(key, over, where=mask, initial=0, keepdims=True))
    found: Array = best & (places == jnp.max(places, over, where=best, initial=0, keepdims=True))
    return found


def bound(arrays: Sequence[Array], where: Sequence[Array], count: Array, over: tuple[int, ...] | None = None) -> Array:
    """Return the largest whole number that at most ``count`` of the entries chosen are below; as :func:`number` counts."""
    dtype = arrays[0].dtype
    bits = 8 * dtype.itemsize

    def decide(step: Array, least: Array) -> Array:
        higher = least | jnp.left_shift(jnp.ones((), dtype), (bits - 1 - step).astype(dtype))
        few = number([chosen & (array < higher) for array, chosen in zip(arrays, where, strict=True)], over) <= count
        return jnp.where(few, higher, least)

    found: Array = lax.fori_loop(0, bits, decide, jnp.zeros_like(count, dtype))
    return found


def number(masks: Sequence[Array], over: tuple[int, ...] | None = None) -> Array:
    """Return how many entries are set, int32: of all masks together; or along the axes ``over`` of one, which become 1."""
    if over is not None:
        (mask,) = masks
        return jnp.sum(mask, over, dtype=jnp.int32, keepdims=True)
    return sum((jnp.sum(mask, dtype=jnp.int32) for mask in masks), jnp.zeros((), jnp.int32))


def reduced(axes: WeightAxes, ndim: int) -> tuple[int, ...]:
    """Return the axes of a weight within its matrices: all but those of the stack."""
    _, out, in_ = axes.order(ndim)
    return (*out, *in_)


def _places(shape: tuple[int, ...], start: int, axes: WeightAxes) -> Array:
    """Return the number of each entry, matrix by matrix and row by row, from ``start`` on."""
    places, step = jnp.full(shape, start, jnp.uint32), 1
    for axis in reversed([axis for group in axes.order(len(shape)) for axis in group]):
        places += lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(step)
        step *= shape[axis]
    return places


def magnitudes(weight: Array) -> Array:
    """Return whole numbers that are ordered as the magnitudes are: the bits of float32, or of float64."""
    name = weight.dtype.name
    if name in ("float32", "float64"):
        whole = jnp.uint32 if name == "float32" else jnp.uint64
        bits: Array = lax.bitcast_convert_type(weight, whole) & whole((1 << 8 * weight.dtype.itemsize - 1) - 1)
        return bits
    half: Array = (lax.bitcast_convert_type(weight, jnp.uint16) & jnp.uint16(0x7FFF)).astype(jnp.uint32)
    if name == "bfloat16":
        return jnp.left_shift(half, jnp.uint32(16))
    # float16: five bits of exponent with bias 15 become eight with bias 127; its subnormals are normal in float32.
    small = lax.bitcast_convert_type(half.astype(jnp.float32) * jnp.float32(2.0**-24), jnp.uint32)
    bias = jnp.where(half >= 0x7C00, jnp.uint32((255 - 31) << 23), jnp.uint32((127 - 15) << 23))
    wide: Array = jnp.where(half < 0x400, small, (half << jnp.uint32(13)) + bias)
    return wide
