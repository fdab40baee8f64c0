"""Rice codes in two streams, of which NumPy alone makes numbers again, some nanoseconds each.

The number v with the parameter k is its quotient ``v >> k``, in unary (that many zeros and a one, in a stream of bits), and
its k low bits. These stand in planes: the lowest bits of all numbers, then the next ones. Source: R. F. Rice, "Some
practical universal noiseless coding techniques", JPL 79-22, 1979.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Stream", "pack", "pack_by", "unpack", "unpack_by"]

Bytes = NDArray[np.uint8]


class Stream:
    """The bytes of a block, taken from its front one part after the other."""

    def __init__(self, data: Bytes) -> None:
        self._data = data

    def take(self, count: int) -> Bytes:
        """Return the next bytes.

        Raises:
            ValueError: if there are fewer.
        """
        if count > len(self._data):
            raise ValueError(f"a block is too short: {count} bytes were due where {len(self._data)} are left")
        taken, self._data = self._data[:count], self._data[count:]
        return taken

    def number(self, count: int) -> int:
        """Return the number in the next bytes, the lowest first."""
        return int.from_bytes(self.take(count).tobytes(), "little")

    def bits(self, count: int) -> Bytes:
        """Return that many bits, a byte each; those that fill up the last byte must be 0.

        Raises:
            ValueError: if they are not, or there are fewer.
        """
        data = self.take(-(-count // 8))
        if count % 8 and data[-1] >> (count % 8):
            raise ValueError("bits that only fill a byte are 0; got others")
        return np.unpackbits(data, count=count, bitorder="little")

    def rest(self) -> Bytes:
        """Return all bytes that are left."""
        return self.take(len(self._data))

    def end(self) -> None:
        """Raise a ValueError if something is left."""
        if len(self._data):
            raise ValueError(f"a block is too long, by {len(self._data)} bytes")


def pack(values: NDArray[Any]) -> list[Bytes]:
    """Return the code of numbers with a parameter that is good for them: this, and what :func:`pack_by` returns."""
    k = _parameter(values)
    return [np.array([k], np.uint8), *pack_by(values, k)]


def pack_by(values: NDArray[Any], k: int | NDArray[np.int64]) -> list[Bytes]:
    """Return the code of numbers with a parameter, or one for each: length of the unary stream, the stream, planes."""
    lengths = values >> k
    lengths += 1
    ends = np.cumsum(lengths, dtype=np.int64)
    unary = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
    ends -= 1
    unary[ends] = 1
    stream = np.packbits(unary, bitorder="little")
    parts = [np.array([len(stream)], "<u4").view(np.uint8), stream]
    if isinstance(k, int):
        narrow = values.astype(np.min_scalar_type((1 << k) - 1))  # only low bits matter
        return parts + [np.packbits(narrow & narrow.dtype.type(1 << plane), bitorder="little") for plane in range(k)]
    for plane in range(int(k.max(initial=0))):
        parts.append(np.packbits(values[k > plane] & (1 << plane), bitorder="little"))
    return parts


def unpack(stream: Stream, count: int, limit: int) -> tuple[NDArray[np.int64], NDArray[Any], int]:
    """Return numbers that :func:`pack` packed, as ``(ones, low bits, k)``: quotients are what lies between the ones.

    Args:
        stream: where they stand.
        count: how many there are.
        limit: what their sum is at most. No sum of what is returned can exceed 4 of it.

    Raises:
        ValueError: if what stands there is no such code, or the parameter is none that a mean of theirs calls for.
    """
    k = stream.number(1)
    if k and (k > 62 or count << (k - 1) > limit):
        raise ValueError(f"{count} numbers of a sum up to {limit} have no parameter {k}")
    ones = _ones(stream, count)
    if count and int(ones[-1]) - (count - 1) > limit >> k:
        raise ValueError(f"numbers have a sum up to {limit}; got a larger one")
    low = np.zeros(count, np.min_scalar_type((1 << k) - 1))
    for plane in range(k):
        bits = stream.bits(count).astype(low.dtype, copy=False)
        bits *= low.dtype.type(1 << plane)  # several times as fast as a shift
        low |= bits
    return ones, low, k


def unpack_by(stream: Stream, k: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """Return the numbers that :func:`pack_by` packed with a parameter for each.

    Args:
        stream: where they stand.
        k: their parameters; ``1 << k`` is at most ``limit``.
        limit: what each of them is at most. None that is returned exceeds 2 of it.

    Raises:
        ValueError: if what stands there is no such code.
    """
    quotients = np.diff(_ones(stream, len(k)), prepend=-1) - 1
    if (quotients > limit >> k).any():
        raise ValueError(f"numbers are at most {limit}; got a larger one")
    values = quotients << k
    for plane in range(int(k.max(initial=0))):
        there = k > plane
        values[there] |= stream.bits(int(np.count_nonzero(there))).astype(np.int64) << plane
    return values


def _ones(stream: Stream, count: int) -> NDArray[np.int64]:
    """Return where the ones of a unary stream are. A parameter at their mean makes it 3 bits a number long."""
    length = stream.number(4)
    if not count <= 8 * length <= 3 * count + 7:
        raise ValueError(f"{length} bytes are no unary stream of {count} numbers")
    data = stream.take(length)
    ones = np.flatnonzero(np.unpackbits(data, bitorder="little").view(np.bool_))
    if len(ones) != count or (length and not data[-1]):
        raise ValueError(f"a unary stream has {count} ones, one of them in its last byte; got {len(ones)}")
    return ones


def _parameter(values: NDArray[Any]) -> int:
    """Return the best parameter for numbers, of those up to the logarithm of their mean.

    Their sum fits their dtype, since they are what lies between entries of one block; a sum in another takes three times as
    long.
    """
    if not len(values):
        return 0
    total = int(values.sum(dtype=values.dtype))
    k = max((total // len(values)).bit_length() - 1, 0)
    cost = len(values) * k + int((values >> k).sum(dtype=values.dtype)) if k else total
    while k:
        less = len(values) * (k - 1) + (int((values >> (k - 1)).sum(dtype=values.dtype)) if k > 1 else total)
        if less > cost:
            break
        k, cost = k - 1, less
    return k
