"""Connections that move while a sparse network trains: the weakest go, as many others come (SET, RigL).

The same places on a mask and on a pattern of connections, which never becomes a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
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

# Entries of a gradient asked for at a time; up to four times as many where these are fewer rows than _ROWS, since a product
# of few rows takes several times as long for each.
_ASKED = 8 << 20
_ROWS = 320
_BLOCK = 1 << 18  # entries looked at at a time: few enough for a cache
_DRAWS = 1 << 16  # places drawn at a time


def regrow(
    mask: Any,
    weight: Any,
    fraction: Sparsity,
    gradient: Any = None,
    *,
    seed: int = 0,
    exclude_dropped: bool = False,
) -> NDArray[np.bool_]:
    """Return a mask with as many live connections, of which a fraction has moved.

    The live connections of the smallest ``|w|`` are dropped, ``floor(fraction * live)`` of them. As many come: with a
    gradient where its magnitude is largest (RigL), without one at random (SET). Candidates are all places that are not
    kept, those just dropped among them: what is dropped may come back at once, and then it has not moved::

        >>> from maskedlinear import pruning
        >>> pruning.regrow([[1, 1, 0, 0]], [[0.1, 5, 0, 0]], 0.5, [[9.0, 0, 1, 2]]).astype(int)
        array([[1, 1, 0, 0]])
        >>> pruning.regrow([[1, 1, 0, 0]], [[0.1, 5, 0, 0]], 0.5, [[9.0, 0, 1, 2]], exclude_dropped=True).astype(int)
        array([[0, 1, 0, 1]])

    Of equal weights the one of the smaller flat index goes first, of equal gradients the one of the larger index comes
    first. A connection that is new should start at 0 with a clean state of the optimizer (what is dormant keeps the value
    that it had); one that is back at once keeps its weight and its state, as in the authors' code (``reinit_when_same``
    is false there, and jaxpruner does the same).

    Sources: D. Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired
    by network science", Nature Communications 2018 (SET); U. Evci et al., "Rigging the Lottery: Making All Tickets
    Winners", ICML 2020 (RigL), and ``sparse_optimizers_base.py`` of github.com/google-research/rigl.

    Args:
        mask: shape ``(out, in)``, of any framework.
        weight: the same shape.
        fraction: the share of live connections that move, in [0, 1], taken as the decimal that it prints as; see
            :func:`cosine_decay`.
        gradient: the loss's gradient with respect to *all* weights, ``gᵀ · x``, the same shape; a masked layer's own
            gradient is 0 where the mask is. Or a function, as :func:`regrow_pattern` takes it.
        seed: of the random places, an integer in [0, 2⁶⁴); another at each step.
        exclude_dropped: whether only places that were not live are candidates, so that exactly as many connections move;
            fewer if there are not as many such places.

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

    stays, come, _ = _moved(places, array.reshape(-1)[places], live.shape, fraction, blocks, seed, exclude_dropped)
    found = np.array(live, order="C")
    found.reshape(-1)[places] = stays
    found.reshape(-1)[come] = True
    return found


def regrow_pattern(
    pattern: SparsityPattern,
    values: Any,
    fraction: Sparsity,
    gradient: Callable[[int, int], Any] | None = None,
    *,
    seed: int = 0,
    exclude_dropped: bool = False,
) -> tuple[SparsityPattern, NDArray[np.int64]]:
    """Return a pattern with as many connections, of which a fraction has moved: :func:`regrow` without any matrix.

    Args:
        pattern: the connections.
        values: shape ``(nnz,)``.
        fraction: the share of connections that move, in [0, 1].
        gradient: a function of two rows, ``start`` and ``stop``, that returns this part of the loss's gradient with respect
            to all weights, ``gᵀ[start:stop] · x``, shape ``(stop - start, in)``. It is asked once for each row, the last
            ones first, for 8 to 32 million entries at a time. ``None`` grows at random.
        seed: of the random places.
        exclude_dropped: as :func:`regrow` takes it.

    Returns:
        The pattern, and where each of its connections was in the old one, shape ``(nnz,)``; -1 for a new one.

    Raises:
        ValueError: if there is not a value for each connection, the fraction is out of its range, or a value or a gradient
            is NaN.
    """
    array = as_numpy(values)
    if array.shape != (pattern.nnz,):
        raise ValueError(f"there must be a value for each of the {pattern.nnz} connections; got {array.shape}")
    out, in_ = pattern.shape
    stays, come, before = _moved(pattern.places, array, pattern.shape, fraction, gradient, seed, exclude_dropped)
    stayed = np.concatenate([[0], np.cumsum(stays)])  # of the connections before each
    source = np.insert(np.flatnonzero(stays), stayed[before], -1)
    columns = pattern.indices[source]
    columns[source < 0] = come % max(in_, 1)
    starts = stayed[pattern.indptr] + np.searchsorted(come, np.arange(out + 1, dtype=np.int64) * in_)
    return SparsityPattern(starts, columns, in_), source


def _moved(
    places: Places,
    values: NDArray[Any],
    shape: tuple[int, int],
    fraction: Sparsity,
    gradient: Any,
    seed: int,
    exclude_dropped: bool,
) -> tuple[NDArray[np.bool_], Places, NDArray[np.int64]]:
    """Return whether each of the live places stays; which places are new, ascending; and before which of the live ones."""
    nan = first_nan(values)
    if nan is not None:
        raise ValueError(f"a live weight must be a number; got NaN at {where(int(places[nan]), shape)}")
    size = math.prod(shape)
    count = number_to_move(fraction, len(places), size, exclude_dropped)
    stays = np.ones(len(places), bool)
    magnitudes = np.abs(values)
    dtype = np.result_type(np.float32, magnitudes.dtype)
    clear_smallest([np.ascontiguousarray(magnitudes, dtype)], [stays], count)
    seed = checked_seed(seed)
    taken = places if exclude_dropped else places[stays]
    come = places_at_random(taken, size, count, seed) if gradient is None else _largest(taken, shape, count, gradient)
    near, back = _found_in(places, come)
    stays[near[back]] = True
    return stays, come[~back], near[~back]


def _found_in(places: Places, chosen: Places) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return before which of ``places``, ascending, each of the chosen ones belongs, and whether it is that one."""
    near = np.searchsorted(places, chosen)
    if not len(places):
        return near, np.zeros(len(chosen), bool)
    return near, places.take(near, mode="clip") == chosen


def number_to_move(fraction: Sparsity, live: int, size: int, exclude_dropped: bool = False) -> int:
    """Return how many connections of so many live ones are dropped, in a matrix of so many places: none where all are live,
    as all of them would come back."""
    free = size - live
    count = math.floor(checked_fraction(fraction) * live) if free else 0
    return min(count, free) if exclude_dropped else count


def _largest(taken: Places, shape: tuple[int, int], count: int, gradient: Callable[[int, int], Any]) -> Places:
    """Return the ``count`` places, of those not taken, where the gradient's magnitude is largest, ascending.

    From the last rows to the first, so that of equal magnitudes the first seen come; what is not above the smallest of the
    best so far is passed over, and only where twice as many have gathered are they sorted out.
    """
    in_ = shape[1]
    scores: list[NDArray[Any]] = []
    at: list[Places] = []
    gathered, wrong = 0, None
    least = -1.0 if count else math.inf  # above infinity are those alone that are no numbers
    rows = max(1, min(max(_ASKED // max(in_, 1), _ROWS), 4 * _ASKED // max(in_, 1)))
    for start in range(shape[0] - 1 - (shape[0] - 1) % rows, -1, -rows) if shape[0] else ():
        stop = min(start + rows, shape[0])
        asked = as_numpy(gradient(start, stop))
        if asked.shape != (stop - start, in_):
            raise ValueError(
                f"the gradient of rows {start} to {stop} must have shape {(stop - start, in_)}; got {asked.shape}"
            )
        flat = asked.reshape(-1)
        begins = range(start * in_, stop * in_, _BLOCK)
        edges = np.searchsorted(taken, [*begins, stop * in_])
        for begin, (first, last) in reversed([*zip(begins, pairwise(edges), strict=True)]):
            own, live = np.abs(flat[begin - start * in_ :][:_BLOCK]), taken[first:last] - begin
            found = _above(own, least, live)
            values = own[found]
            if np.isnan(own[live]).any() or np.isnan(values).any():
                wrong, least = begin + int(np.argmax(np.isnan(own))), math.inf
            if not count or wrong is not None:
                continue
            scores.append(values)
            at.append(found + begin)
            gathered += len(found)
            if gathered > 2 * count:
                scores, at, least = _best_of(scores, at, count)
                gathered = count
    if wrong is not None:
        raise ValueError(f"a gradient must hold numbers; got NaN at {where(wrong, shape)}")
    return np.sort(_best_of(scores, at, count)[1][0])


def _above(magnitudes: NDArray[Any], least: float, live: Places) -> Places:
    """Return the places, ascending, of magnitudes above ``least``, or no numbers, that are not among those ``live``."""
    whole = magnitudes.dtype.kind in "biu"  # numbers, among which neither -1 nor infinity need be
    edge: Any = np.float64(least) if whole else magnitudes.dtype.type(least)
    flags = np.less_equal(magnitudes, edge if edge == least else np.float64(least))
    np.logical_not(flags, out=flags)  # not "greater", which no number is not
    flags[live] = False
    return np.flatnonzero(flags)


def _best_of(
    scores: list[NDArray[Any]], at: list[Places], count: int
) -> tuple[list[NDArray[Any]], list[Places], float]:
    """Return the ``count`` largest scores, of equal ones those of the larger places, with their places; and the smallest."""
    if not scores:
        return [], [np.empty(0, np.int64)], -1.0
    values, places = np.concatenate(scores), np.concatenate(at)
    if len(values) <= count:
        return [values], [places], -1.0
    least = np.partition(values, len(values) - count)[len(values) - count]
    above, equal = np.flatnonzero(values > least), np.flatnonzero(values == least)
    equal = equal[np.argsort(places[equal])[len(equal) - (count - len(above)) :]]
    best = np.concatenate([above, equal])
    return [values[best]], [places[best]], float(least)


def places_at_random(places: Places, size: int, count: int, seed: int) -> Places:
    """Return ``count`` places other than those given, ascending, drawn at random."""

    among_free = draws_free(len(places), size)
    free = np.setdiff1d(np.arange(size), places, assume_unique=True) if among_free else np.empty(0, np.int64)
    return drawn(
        count, len(places), size, seed, lambda chosen: _found_in(places, chosen)[1], lambda numbers: free[numbers]
    )


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
