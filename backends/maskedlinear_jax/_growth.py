"""Connections of stacked matrices that move inside ``jit``: the places of :func:`maskedlinear.pruning.regrow`, bit for bit.

Nothing is sorted: what goes and what comes by gradient is found by counting, and what comes at random by drawing. Numbers
above 32 bits are held in several words, as JAX has no wider ones by default.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpy.typing import NDArray

from maskedlinear.masks._random import Sparsity, checked_fraction
from maskedlinear.models import WeightAxes
from maskedlinear_jax._compat import threefry_2x32
from maskedlinear_jax._placement import replicated
from maskedlinear_jax._select import bound, clear_smallest, number, reduced

__all__ = ["key_words", "portion", "regrow_stack", "share_words"]

_BITS = 127  # behind the binary point of a share
_DRAWS = 1 << 16  # places drawn at a time
_NEVER = (1 << 32) - 1


def share_words(fraction: Sparsity) -> NDArray[np.uint32]:
    """Return a share of connections, taken as the decimal that it prints as, in the form that :func:`portion` takes."""
    return _words(math.ceil(checked_fraction(fraction) * (1 << _BITS)), 4)


def key_words(seed: int) -> NDArray[np.uint32]:
    """Return a seed in [0, 2⁶⁴) as its two words, the higher first."""
    return _words(seed, 2)


def _words(whole: int, count: int) -> NDArray[np.uint32]:
    return np.array([whole >> 32 * place & 0xFFFFFFFF for place in reversed(range(count))], np.uint32)


def portion(share: Array, live: Array) -> Array:
    """Return ``floor(fraction * live)``, exactly.

    A fraction of 17 digits, times fewer than 2³¹ connections, is further below the next whole number than the rounding of
    the share, which goes up, can bridge.

    Args:
        share: what :func:`share_words` returns, shape ``(4,)``.
        live: how many there are, int32.
    """
    twice = live.astype(jnp.uint32) << jnp.uint32(1)  # of a share of 127 bits, the 128 bits are below the point
    carry = jnp.zeros((), jnp.uint32)
    for place in (3, 2, 1, 0):
        low = share[place] * twice
        carry = _high(share[place], twice) + (low + carry < low).astype(jnp.uint32)
    return carry.astype(jnp.int32)


def regrow_stack(
    axes: WeightAxes,
    weight: Array,
    mask: Array,
    gradient: Array | None,
    share: Array,
    key: Array,
    first: int,
    exclude_dropped: bool,
) -> Array:
    """Return the mask of a weight, each of whose matrices moves a share of its connections.

    Args:
        axes: of the weight.
        weight: of any shape, of a dtype that :func:`check_comparable` lets pass. NaN counts as the largest.
        mask: booleans of this shape.
        gradient: of this shape; ``None`` grows at random.
        share: what :func:`share_words` returns, shape ``(4,)``.
        key: what :func:`key_words` returns of the seed, shape ``(2,)``.
        first: matrix i takes ``seed + first + i``.
        exclude_dropped: as :func:`maskedlinear.pruning.regrow` takes it.
    """
    over = reduced(axes, weight.ndim)
    live = number([mask], over)
    free = jnp.int32(math.prod(weight.shape[axis] for axis in over)) - live
    count = jnp.where(free > 0, portion(share, live), 0)
    if exclude_dropped:
        count = jnp.minimum(count, free)
    (kept,) = clear_smallest([weight], [mask], count, [axes], by_matrix=True)
    candidates, others = (~mask, free - count) if exclude_dropped else (~kept, free)
    if gradient is not None:
        (come,) = clear_smallest([gradient], [candidates], others, [axes], by_matrix=True)
    else:
        laid: list[Any] = [replicated(part) for part in (candidates, count)]
        matrices, counts = (axes.matrices(part) for part in laid)
        places = jnp.arange(len(matrices), dtype=jnp.uint32) + jnp.uint32(first)
        low = key[1] + places
        keys = jnp.stack([key[0] + (low < places).astype(jnp.uint32), low], 1)
        grown: Any = jax.vmap(_at_random)(jnp.asarray(matrices), jnp.asarray(counts).reshape(-1), keys)
        come = jnp.asarray(axes.from_matrices(grown, weight.shape))
    moved: Array = kept | come
    return moved


def _at_random(free: Array, count: Array, key: Array) -> Array:
    """Return ``count`` of the free places: those that come first among the draws of ``maskedlinear.pruning._growth``.

    It draws places among all, or, if fewer than a quarter are free, among the free ones by their number: these are the
    slots here. For each slot the first draw of it is noted, until enough free ones have one.
    """
    size = free.size
    if not size:
        return free
    flat = free.reshape(-1)
    every, among = jnp.arange(size, dtype=jnp.int32), number([flat])
    listed = among < -(-size // 4)
    slots = jnp.where(listed, jnp.cumsum(flat, dtype=jnp.int32) - 1, every)
    usable = jnp.where(listed, every < among, flat)
    slot_count = jnp.where(listed, among, size).astype(jnp.uint32)
    block = min(size, _DRAWS)

    def draw(state: tuple[Array, Array]) -> tuple[Array, Array]:
        firsts, start = state
        draws = start + jnp.arange(block, dtype=jnp.uint32)
        return firsts.at[_drawn(key, draws, slot_count)].min(draws), start + jnp.uint32(block)

    def few(state: tuple[Array, Array]) -> Array:
        return number([usable & (state[0] != jnp.uint32(_NEVER))]) < count

    firsts, _ = lax.while_loop(few, draw, (jnp.full(size, _NEVER, jnp.uint32), jnp.zeros((), jnp.uint32)))
    order = firsts[jnp.maximum(slots, 0)]
    come: Array = flat & (order < bound([order], [flat], count))
    return come.reshape(free.shape)


def _drawn(key: Array, draws: Array, slots: Array) -> Array:
    """Return ``floor(u * slots / 2⁶⁴)`` for the 64-bit number u of each draw, the words 2i and 2i + 1 of ``mask_v1``."""
    if threefry_2x32 is None:  # pragma: no cover - of no release so far
        raise NotImplementedError(
            "growth at random inside jit needs threefry_2x32, which this JAX has not where it was"
        )
    words: Any = threefry_2x32(key, jnp.concatenate([jnp.zeros_like(draws), draws]))
    high, low = words[: len(draws)], words[len(draws) :]
    part = high * slots
    drawn: Array = _high(high, slots) + (part + _high(low, slots) < part).astype(jnp.uint32)
    return drawn


def _high(left: Array, right: Array) -> Array:
    """Return the higher 32 of the 64 bits of a product of two uint32."""
    half, low = jnp.uint32(16), jnp.uint32(0xFFFF)
    (a, b), (c, d) = ((left >> half, left & low), (right >> half, right & low))
    middle = a * d + (b * d >> half)
    high: Array = a * c + (middle >> half) + (b * c + (middle & low) >> half)
    return high
