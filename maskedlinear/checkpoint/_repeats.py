"""Masks of equal rectangles (blocks, whole rows, whole columns): which they are, and all their entries again."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

__all__ = ["repeated", "repeats"]

Places = NDArray[np.int64]

_FEW = 4096  # places that are looked at before all are
_ROWS = 64  # rows, likewise
_PART = 1 << 18  # entries made at a time


def repeats(places: Places, shape: tuple[int, int]) -> tuple[int, int]:
    """Return the sizes of the largest rectangles, all of one size and side by side from the corner, that a mask consists of.

    Args:
        places: the live entries of the flattened matrix, ascending.
        shape: the matrix's.
    """
    height, width = shape
    if len(places) == 0 or height > len(places):  # most rows are empty
        return 1, 1
    return _height(places, shape), _breadth(places, width)


def _breadth(places: Places, width: int) -> int:
    """Return the greatest common divisor of where runs start and end, and of the width."""
    breadth = width
    for some in (places[:_FEW], places):
        breaks = np.flatnonzero(np.diff(some) != 1)
        edges = np.concatenate([some[:1], some[breaks] + 1, some[breaks + 1]])
        breadth = math.gcd(breadth, int(np.gcd.reduce(edges)))
        if breadth == 1:
            return 1
    return math.gcd(breadth, int(places[-1]) + 1)


def _height(places: Places, shape: tuple[int, int]) -> int:
    """Return the greatest common divisor of where a row differs from the one above it, and of the number of rows."""
    height, width = shape
    tall = height
    for some in (min(_ROWS, height), height):
        starts = np.searchsorted(places, np.arange(some + 1) * width)
        counts = np.diff(starts)
        tall = math.gcd(tall, int(np.gcd.reduce(np.flatnonzero(np.diff(counts)) + 1)))
        if tall == 1:
            return 1
    # Rows of equal numbers: those of equal sums of a hash of their columns are compared.
    columns = places - np.repeat(np.arange(height) * width, counts)
    hashed = (columns.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    hashed ^= hashed >> np.uint64(29)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(hashed * np.uint64(0xBF58476D1CE4E5B9))])[starts]
    tall = math.gcd(tall, int(np.gcd.reduce(np.flatnonzero(np.diff(np.diff(sums))) + 1)))
    if tall == 1:
        return 1
    rows = np.repeat(np.arange(height), counts)
    above = rows % tall != 0
    back = np.repeat(np.concatenate([[0], counts[:-1]]), counts)  # from an entry to the one in the row above
    equal = columns[above] == columns[np.flatnonzero(above) - back[above]]
    return tall if equal.all() else 1


def repeated(places: Places, width: int, repeat: tuple[int, int]) -> Iterator[Places]:
    """Yield all live entries of a mask of rectangles, ascending, a part at a time.

    Args:
        places: of the rectangles, in the matrix that has an entry for each.
        width: this matrix's.
        repeat: the rectangles' sizes.
    """
    tall, broad = repeat
    if tall == 1:
        for start in range(0, len(places), _PART):
            part = places[start : start + _PART, None] * broad + np.arange(broad)
            yield part.reshape(-1)
        return
    rows, columns = np.divmod(places, width)
    first = np.flatnonzero(np.diff(rows, prepend=-1))
    lengths = np.diff(first, append=len(rows)) * broad
    for row, start, length in zip(rows[first].tolist(), (first * broad).tolist(), lengths.tolist(), strict=True):
        line = columns[start // broad : (start + length) // broad, None] * broad + np.arange(broad)
        for upper in range(0, tall, max(1, _PART // length)):
            lines = np.arange(row * tall + upper, row * tall + min(tall, upper + max(1, _PART // length)))
            yield (lines[:, None] * (width * broad) + line.reshape(-1)).reshape(-1)
