"""Threefry2x32-20, the counter-based generator under every random mask.

A counter-based generator computes the i-th word from i alone, so that any part of a mask can be made anywhere, in any
order. Source: J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; the constants and the known
answers are those of its Random123 distribution.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["threefry2x32", "words", "words_at"]

UInt32 = NDArray[np.uint32]

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
_CHUNK = 1 << 16  # words of a pass: the working set stays in the second-level cache


def threefry2x32(key: tuple[int, int], c0: UInt32, c1: UInt32) -> tuple[UInt32, UInt32]:
    """Encrypt counters with Threefry2x32, 20 rounds.

    Args:
        key: two integers in [0, 2³²).
        c0: the counters' first words, uint32, any shape.
        c1: the counters' second words, uint32, the same shape.

    Returns:
        The two output words of every counter, uint32, the counters' shape.
    """
    keys = [np.uint32(key[0]), np.uint32(key[1]), np.uint32(key[0] ^ key[1] ^ _PARITY)]
    x0, x1 = c0 + keys[0], c1 + keys[1]
    spill = np.empty_like(x1)
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            np.add(x0, x1, out=x0)
            np.right_shift(x1, np.uint32(32 - rotation), out=spill)
            np.left_shift(x1, np.uint32(rotation), out=x1)
            np.bitwise_or(x1, spill, out=x1)
            np.bitwise_xor(x1, x0, out=x1)
        np.add(x0, keys[(group + 1) % 3], out=x0)
        injected = (int(keys[(group + 2) % 3]) + group + 1) & 0xFFFFFFFF
        np.add(x1, np.uint32(injected), out=x1)
    return x0, x1


def words(seed: int, start: int, stop: int) -> UInt32:
    """Return the words ``start`` to ``stop - 1`` of the ``mask_v1`` stream of ``seed``, as uint32.

    ``word(i) = Threefry2x32-20(key, counter)[i & 1]`` with ``key = (seed >> 32, seed & 0xffffffff)`` and
    ``counter = ((i >> 1) >> 32, (i >> 1) & 0xffffffff)``.

    Args:
        seed: an integer in [0, 2⁶⁴).
        start: the first index, at least 0.
        stop: one past the last index, at least ``start``.
    """
    out = np.empty(stop - start, np.uint32)
    for begin in range(start, stop, _CHUNK):
        end = min(begin + _CHUNK, stop)
        counters = np.arange(begin >> 1, (end + 1) >> 1, dtype=np.uint64)
        both = np.empty((counters.size, 2), np.uint32)
        both[:, 0], both[:, 1] = threefry2x32(
            (seed >> 32, seed & 0xFFFFFFFF), (counters >> np.uint64(32)).astype(np.uint32), counters.astype(np.uint32)
        )
        offset = begin & 1
        out[begin - start : end - start] = both.reshape(-1)[offset : offset + end - begin]
    return out


def words_at(seed: int, places: NDArray[np.int64]) -> UInt32:
    """Return the words of the ``mask_v1`` stream of ``seed`` at places in any order; shape ``(n,)``."""
    if len(places) and int(places[-1]) - int(places[0]) == len(places) - 1 and (np.diff(places) == 1).all():
        return words(seed, int(places[0]), int(places[-1]) + 1)
    out = np.empty(len(places), np.uint32)
    for begin in range(0, len(places), _CHUNK):
        part = places[begin : begin + _CHUNK].astype(np.uint64)
        counters = part >> np.uint64(1)
        both = threefry2x32(
            (seed >> 32, seed & 0xFFFFFFFF), (counters >> np.uint64(32)).astype(np.uint32), counters.astype(np.uint32)
        )
        out[begin : begin + _CHUNK] = np.where(part & np.uint64(1), both[1], both[0])
    return out
