"""Connections that move while a sparse network trains: the weakest go, as many others come (SET, RigL).

The same places on a mask and on a pattern of connections, which never becomes a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskedlinear._arrays import as_numpy
from maskedlinear._check import as_mask
from maskedlinear.masks._random import Sparsity, checked_fraction, checked_seed
from maskedlinear.masks._threefry import words
from maskedlinear.pattern import SparsityPattern
from maskedlinear.pruning._select import clear_smallest, first_nan

__all__ = ["drawn", "draws_free", "number_to_move", "places_at_random", "regrow", "regrow_pattern", "where"]

Places = NDArray[np.int64]  # flat ones, row * in + column, ascending

_BLOCK = 1 << 22  # entries of a gradient looked at at a time
_DRAWS = 1 << 16  # places drawn at a time


def regrow(mask: Any, weight: Any, fraction: Sparsity, gradient: Any = None, *, seed: int = 0) -> NDArray[np.bool_]:
    """Return a mask with as many live connections, of which a fraction has moved.

    The live connections of the smallest ``|w|`` go, ``floor(fraction * live)`` of them, or fewer if there are not as many
    places to grow at. As many come: with a gradient where its magnitude is largest (RigL), without one at random (SET).
    Candidates are all connections that were not live. Of equal weights the one of the smaller flat index goes first, of
    equal gradients the one of the larger index comes first.

    A revived weight should start at 0 with a clean state of the optimizer: what is dormant keeps the value that it had.

    Sources: D. Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired
    by network science", Nature Communications 2018 (SET); U. Evci et al., "Rigging the Lottery: Making All Tickets
    Winners", ICML 2020 (RigL).

    Args:
        mask: shape ``(out, in)``, of any framework.
        weight: the same shape.
        fraction: the share of live connections that move, in [0, 1], taken as the decimal that it prints as; see
            :func:`cosine_decay`.
        gradient: the loss's gradient with respect to *all* weights, ``gᵀ · x``, the same shape; a masked layer's own
            gradient is 0 where the mask is. Or a function, as :func:`regrow_pattern` takes it.
        seed: of the random places, an integer in [0, 2⁶⁴); another at each step.

    Returns:
        A boolean NumPy array of shape ``(out, in)``.

    Raises:
        ValueError: if shapes differ, the fraction is out of its range, or a live weight or a gradient is NaN.
    """
    array = as_numpy(weight)
    live = as_mask(as_numpy(mask), array.shape)
    if live.ndim != 2:
        raise ValueError(f"a mask must have shape (out, in); got {live.shape}")
    places = np.flatnonzero(live)
    blocks = gradient
    if gradient is not None and not callable(gradient):
        full = as_numpy(gradient)
        if full.shape != live.shape:
            raise ValueError(f"a gradient must have its weight's shape, {live.shape}; got {full.shape}")

        def blocks(start: int, stop: int) -> Any:
            return full[start:stop]

    gone, come = _moved(places, array.reshape(-1)[places], live.shape, fraction, blocks, seed)
    found = np.array(live, order="C")
    found.reshape(-1)[places[gone]] = False
    found.reshape(-1)[come] = True
    return found


def regrow_pattern(
    pattern: SparsityPattern,
    values: Any,
    fraction: Sparsity,
    gradient: Callable[[int, int], Any] | None = None,
    *,
    seed: int = 0,
) -> tuple[SparsityPattern, NDArray[np.int64]]:
    """Return a pattern with as many connections, of which a fraction has moved: :func:`regrow` without any matrix.

    Args:
        pattern: the connections.
        values: shape ``(nnz,)``.
        fraction: the share of connections that move, in [0, 1].
        gradient: a function of two rows, ``start`` and ``stop``, that returns this part of the loss's gradient with respect
            to all weights, ``gᵀ[start:stop] · x``, shape ``(stop - start, in)``. It is asked for a few million entries at a
            time. ``None`` grows at random.
        seed: of the random places.

    Returns:
        The pattern, and where each of its connections was in the old one, shape ``(nnz,)``; -1 for a new one.

    Raises:
        ValueError: if there is not a value for each connection, the fraction is out of its range, or a value or a gradient
            is NaN.
    """
    array = as_numpy(values)
    if array.shape != (pattern.nnz,):
        raise ValueError(f"there must be a value for each of the {pattern.nnz} connections; got {array.shape}")
    in_ = pattern.shape[1]
    places = pattern.places
    gone, come = _moved(places, array, pattern.shape, fraction, gradient, seed)
    kept = np.delete(np.arange(len(places)), gone)
    found = np.concatenate([places[kept], come])
    source = np.concatenate([kept, np.full(len(come), -1)])
    order = np.argsort(found, kind="stable")
    found = found[order]
    starts = np.searchsorted(found, np.arange(pattern.shape[0] + 1, dtype=np.int64) * in_)
    return SparsityPattern(starts, found % max(in_, 1), in_), source[order]


def _moved(
    places: Places, values: NDArray[Any], shape: tuple[int, int], fraction: Sparsity, gradient: Any, seed: int
) -> tuple[NDArray[np.int64], Places]:
    """Return which of the live places go (as indices into ``places``) and which places come."""
    nan = first_nan(values)
    if nan is not None:
        raise ValueError(f"a live weight must be a number; got NaN at {where(int(places[nan]), shape)}")
    size = math.prod(shape)
    count = number_to_move(fraction, len(places), size)
    stays = np.ones(len(places), bool)
    magnitudes = np.abs(values)
    dtype = np.result_type(np.float32, magnitudes.dtype)
    clear_smallest([np.ascontiguousarray(magnitudes, dtype)], [stays], count)
    seed = checked_seed(seed)
    come = places_at_random(places, size, count, seed) if gradient is None else _largest(places, shape, count, gradient)
    return np.flatnonzero(~stays), come


def number_to_move(fraction: Sparsity, live: int, size: int) -> int:
    """Return how many connections of so many live ones move, in a matrix of so many places."""
    return min(math.floor(checked_fraction(fraction) * live), size - live)


def _largest(places: Places, shape: tuple[int, int], count: int, gradient: Callable[[int, int], Any]) -> Places:
    """Return the ``count`` places without a connection where the gradient's magnitude is largest, ascending."""
    best, at = np.empty(0, np.float64), np.empty(0, np.int64)
    rows = max(1, _BLOCK // max(shape[1], 1))
    for start in range(0, shape[0], rows):
        stop = min(start + rows, shape[0])
        block = as_numpy(gradient(start, stop))
        if block.shape != (stop - start, shape[1]):
            wanted = (stop - start, shape[1])
            raise ValueError(f"the gradient of rows {start} to {stop} must have shape {wanted}; got {block.shape}")
        nan = first_nan(np.ascontiguousarray(block))
        if nan is not None:
            raise ValueError(f"a gradient must hold numbers; got NaN at {where(start * shape[1] + nan, shape)}")
        scores = np.abs(block).reshape(-1)
        open_ = np.ones(scores.size, bool)
        first, last = np.searchsorted(places, (start * shape[1], stop * shape[1]))
        open_[places[first:last] - start * shape[1]] = False
        found = np.flatnonzero(open_)
        if len(found) > count:  # the largest of the block, ties at the boundary included
            least = np.partition(scores[found], len(found) - count)[len(found) - count] if count else np.inf
            found = found[scores[found] >= least]
        best = np.concatenate([best, scores[found].astype(np.float64)])
        at = np.concatenate([at, found + start * shape[1]])
        order = np.lexsort((at, best))[max(0, len(at) - count) :] if count else np.empty(0, np.int64)
        best, at = best[order], at[order]
    return np.sort(at)


def places_at_random(places: Places, size: int, count: int, seed: int) -> Places:
    """Return ``count`` places without a connection, ascending, drawn at random."""

    def are_live(chosen: Places) -> NDArray[np.bool_]:
        near = np.minimum(np.searchsorted(places, chosen), max(len(places) - 1, 0))
        return places[near] == chosen if len(places) else np.zeros(len(chosen), bool)

    among_free = draws_free(len(places), size)
    free = np.setdiff1d(np.arange(size), places, assume_unique=True) if among_free else np.empty(0, np.int64)
    return drawn(count, len(places), size, seed, are_live, lambda numbers: free[numbers])


def draws_free(live: int, size: int) -> bool:
    """Whether so few of all places are free that it is one of the free ones that is drawn: fewer than a quarter."""
    return 4 * (size - live) < size


def drawn(
    count: int,
    live: int,
    size: int,
    seed: int,
    are_live: Callable[[Places], NDArray[np.bool_]],
    free_places: Callable[[Places], Places],
) -> Places:
    """Return ``count`` free places, ascending: drawn one after the other from ``mask_v1``.

    Draw i is the place ``floor(u * size)`` of the 64-bit number u / 2⁶⁴ made of words 2i and 2i + 1; one that is taken is
    drawn again. Where :func:`draws_free` says so, it is the number of a place among the free ones.

    Args:
        count: how many.
        live: how many places have a connection.
        size: of how many.
        seed: of the stream.
        are_live: which of places have a connection.
        free_places: the places of which so many free ones are before.
    """
    among_free = draws_free(live, size)
    found: dict[int, None] = {}
    draws = min(_DRAWS, 2 * count + 64)  # at a time, which changes none of them
    for numbers in _draws(seed, size - live if among_free else size, draws) if count else ():
        chosen = free_places(numbers) if among_free else numbers[~are_live(numbers)]
        for place in chosen.tolist():
            found.setdefault(place)
            if len(found) == count:
                return np.sort(np.fromiter(found, np.int64, len(found)))
    return np.empty(0, np.int64)


def _draws(seed: int, size: int, draws: int) -> Iterator[Places]:
    start = 0
    while True:
        pairs = words(seed, start, start + 2 * draws).reshape(-1, 2).astype(np.uint64)
        high, low = pairs[:, 0], pairs[:, 1]
        # floor((high * 2^32 + low) * size / 2^64) in 64-bit arithmetic, for sizes below 2^62: by the halves of size.
        big, small = np.uint64(size >> 32), np.uint64(size & 0xFFFFFFFF)
        shift, part = np.uint64(32), np.uint64(0xFFFFFFFF)
        middle = (low * small >> shift) + (high * small & part) + (low * big & part)
        yield (high * big + (high * small >> shift) + (low * big >> shift) + (middle >> shift)).astype(np.int64)
        start += 2 * draws


def where(place: int, shape: tuple[int, int]) -> tuple[int, int]:
    """Return the row and the column of a flat place."""
    return place // shape[1], place % shape[1]
