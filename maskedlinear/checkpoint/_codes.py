"""How a block of a mask is coded: as bits, gaps, rows, runs, groups, or through zlib. One class each, in a closed list.

A block is a stretch of the flattened mask. Its live entries are given by their distance from its start, ascending.
"""

from __future__ import annotations

import zlib
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from maskedlinear.checkpoint._rice import Stream, pack, pack_by, unpack, unpack_by

__all__ = ["CODES", "LARGEST_BITS", "LARGEST_LIVE", "WIDEST", "Code", "group_of"]

LARGEST_LIVE = 1 << 20  # live entries of a block
LARGEST_BITS = 1 << 23  # entries of a block of bits
WIDEST = 1 << 32  # entries of a row, in a block of rows

Places = NDArray[np.int64]
Bytes = NDArray[np.uint8]


class Code(Protocol):
    """How a block of a mask is written and read."""

    def write(self, places: Places, size: int, width: int) -> list[Bytes]:
        """Return the parts of a block's stream.

        Args:
            places: the live entries, shape ``(nnz,)``.
            size: the number of all.
            width: the number of entries of a row.
        """

    def read(self, stream: Stream, nnz: int, size: int, width: int) -> Places:
        """Return the live entries that :meth:`write` wrote; ascending, and below ``size``.

        Raises:
            ValueError: if there are none of this number that the stream could stand for.
        """


class Bits:
    """A bit for each entry."""

    def write(self, places: Places, size: int, width: int) -> list[Bytes]:
        """As :meth:`Code.write` says."""
        live = np.zeros(size, np.uint8)
        live[places] = 1
        return [np.packbits(live, bitorder="little")]

    def read(self, stream: Stream, nnz: int, size: int, width: int) -> Places:
        """As :meth:`Code.read` says."""
        places = np.flatnonzero(stream.bits(size).view(np.bool_))
        return _checked(places, nnz, size)


class Gaps:
    """The number of dead entries before each live one, by a Rice code."""

    def write(self, places: Places, size: int, width: int) -> list[Bytes]:
        """As :meth:`Code.write` says."""
        return pack(_gaps(places, size))

    def read(self, stream: Stream, nnz: int, size: int, width: int) -> Places:
        """As :meth:`Code.read` says."""
        return _checked(_ends(stream, nnz, size), nnz, size)


class Rows:
    """How many live entries each row has, less the fewest; and by them gaps with a parameter for each row.

    For rows of very different numbers.
    """

    def write(self, places: Places, size: int, width: int) -> list[Bytes]:
        """As :meth:`Code.write` says."""
        rows, columns = np.divmod(places, width)
        counts = np.bincount(rows, minlength=size // width)
        fewest = int(counts.min())
        gaps = np.diff(columns, prepend=-1) - 1
        first = np.flatnonzero(np.diff(rows, prepend=-1))
        gaps[first] = columns[first]
        head = np.array([fewest], "<u4").view(np.uint8)
        return [head, *pack(counts - fewest), *pack_by(gaps, np.repeat(self._parameters(counts, width), counts))]

    def read(self, stream: Stream, nnz: int, size: int, width: int) -> Places:
        """As :meth:`Code.read` says."""
        height, fewest = size // width, stream.number(4)
        if fewest * height > nnz:
            raise ValueError(f"{nnz} live entries are no {fewest} in each of {height} rows")
        counts = np.diff(_ends(stream, height, nnz), prepend=-1) - 1 + fewest
        if int(counts.sum()) != nnz or counts.max() > width:
            raise ValueError(f"rows have {nnz} live entries together, and {width} at most; got others")
        gaps = unpack_by(stream, np.repeat(self._parameters(counts, width), counts), width)
        ends = np.cumsum(gaps + 1)
        stops = np.cumsum(counts)
        before = np.where(stops > counts, ends[stops - counts - 1], 0) if nnz else np.zeros_like(stops)
        columns = ends - np.repeat(before, counts) - 1
        if (columns >= width).any():
            raise ValueError("a row's live entries lie beyond its end")
        places: Places = columns + np.repeat(np.arange(height) * width, counts)
        return places

    def _parameters(self, counts: NDArray[np.int64], width: int) -> NDArray[np.int64]:
        """Return for each row the largest k with ``count << k <= width - count``, 0 if there is none."""
        mean = (width - counts) // np.maximum(counts, 1)
        return np.maximum(np.frexp(mean.astype(np.float64))[1].astype(np.int64) - 1, 0)


class Runs:
    """Lengths of dead and of live runs in turn, each by a Rice code of its own."""

    def write(self, places: Places, size: int, width: int) -> list[Bytes]:
        """As :meth:`Code.write` says."""
        first = np.flatnonzero(np.diff(places, prepend=-2) != 1)
        lengths = np.diff(first, append=len(places))
        starts = places[first]
        dead = starts - np.concatenate([[-1], (starts + lengths)[:-1]]) - 1 if len(starts) else starts
        return [np.array([len(starts)], "<u4").view(np.uint8), *pack(dead), *pack(lengths - 1)]

    def read(self, stream: Stream, nnz: int, size: int, width: int) -> Places:
        """As :meth:`Code.read` says."""
        count = stream.number(4)
        if count > nnz:
            raise ValueError(f"{nnz} live entries are no {count} runs")
        dead = _ends(stream, count, size)
        stops = _ends(stream, count, nnz) + 1
        if (int(stops[-1]) if count else 0) != nnz:
            raise ValueError(f"live runs have {nnz} entries together; got {stops[-1:]}")
        return _checked(np.arange(nnz) + np.repeat(dead, np.diff(stops, prepend=0)), nnz, size)


class Deflate:
    """Gaps, of as many bytes as the largest takes, through zlib. For what comes again: N:M groups, dilated windows."""

    def write(self, places: Places, size: int, width: int) -> list[Bytes]:
        """As :meth:`Code.write` says."""
        gaps = _gaps(places, size)
        kind = np.min_scalar_type(int(gaps.max(initial=0))).newbyteorder("<")
        data = zlib.compress(gaps.astype(kind).tobytes(), 6)
        return [np.array([kind.itemsize], np.uint8), np.frombuffer(data, np.uint8)]

    def read(self, stream: Stream, nnz: int, size: int, width: int) -> Places:
        """As :meth:`Code.read` says."""
        itemsize = stream.number(1)
        if itemsize not in (1, 2, 4, 8):
            raise ValueError(f"a gap takes 1, 2, 4 or 8 bytes; got {itemsize}")
        inflate = zlib.decompressobj()
        try:
            data = inflate.decompress(stream.rest().data, nnz * itemsize + 1)
        except zlib.error as error:
            raise ValueError(f"zlib cannot read it: {error}") from error
        if len(data) != nnz * itemsize or not inflate.eof or inflate.unused_data:
            raise ValueError(f"zlib makes other than {nnz} gaps of it")
        gaps = np.frombuffer(data, f"<u{itemsize}")
        if nnz and int(gaps.max()) >= size:
            raise ValueError(f"a gap in {size} entries is smaller; got {gaps.max()}")
        return _checked(np.cumsum(gaps.astype(np.int64) + 1) - 1, nnz, size)


class Groups:
    """As many live entries in each group of successive ones (N:M): for each group, which of the possible ones it is."""

    def write(self, places: Places, size: int, width: int) -> list[Bytes]:
        """As :meth:`Code.write` says."""
        group = group_of(places, size)
        live = np.zeros(size, np.uint8)
        live[places] = 1
        words = (live.reshape(-1, group).astype(np.uint16) << np.arange(group, dtype=np.uint16)).sum(axis=1)
        numbers = np.searchsorted(_words(group, len(places) * group // size), words)
        planes = range(int(numbers.max()).bit_length())
        return [np.array([group, len(planes)], np.uint8)] + [
            np.packbits(numbers >> plane & 1, bitorder="little") for plane in planes
        ]

    def read(self, stream: Stream, nnz: int, size: int, width: int) -> Places:
        """As :meth:`Code.read` says."""
        group, planes = stream.number(1), stream.number(1)
        if group not in GROUPS or size % group or nnz * group % size or not nnz or planes > group:
            raise ValueError(f"{nnz} of {size} entries are not as many in each group of {group}")
        words, numbers = _words(group, nnz * group // size), np.zeros(size // group, np.uint16)
        for plane in range(planes):
            numbers |= stream.bits(len(numbers)).astype(np.uint16) << np.uint16(plane)
        if int(numbers.max()) >= len(words):
            raise ValueError(f"a group is one of {len(words)}; got {numbers.max()}")
        live = np.unpackbits(words[numbers].view(np.uint8).reshape(len(numbers), -1), axis=1, bitorder="little")
        return _checked(np.flatnonzero(live[:, :group]), nnz, size)


GROUPS = (2, 4, 8, 16)


def group_of(places: Places, size: int) -> int:
    """Return the size of the smallest groups of which each has as many live entries; 0 if there are none such."""
    for group in GROUPS:
        if size % group == 0 and len(places) * group % size == 0:
            counts = np.bincount(places // group, minlength=size // group)
            if (counts == len(places) * group // size).all():
                return group
    return 0


def _words(group: int, live: int) -> NDArray[np.uint16]:
    """Return all numbers of so many bits, so many of them 1, ascending."""
    words = np.arange(1 << group, dtype=np.uint32)
    bits = np.unpackbits(words.astype("<u4").view(np.uint8).reshape(-1, 4), axis=1)
    found: NDArray[np.uint16] = words[bits.sum(axis=1) == live].astype("<u2")
    return found


#: By the names that a file has them under.
CODES: dict[str, Code] = {
    "bits": Bits(),
    "gaps": Gaps(),
    "rows": Rows(),
    "runs": Runs(),
    "deflate": Deflate(),
    "groups": Groups(),
}


def _gaps(places: Places, size: int) -> NDArray[Any]:
    """Return how many dead entries are before each live one; in 32 bits if they fit, which is faster."""
    narrow: NDArray[Any] = places.astype(np.int32 if size < 1 << 31 else np.int64)
    gaps = np.empty_like(narrow)
    gaps[:1] = narrow[:1]
    np.subtract(narrow[1:], narrow[:-1], out=gaps[1:])
    gaps[1:] -= 1
    return gaps


def _ends(stream: Stream, count: int, limit: int) -> Places:
    """Return where the last of each of ``count`` stretches lies, which are a number that was packed and 1 long."""
    ones, low, k = unpack(stream, count, limit)
    # One i (from 0) lies behind i other ones and the quotients up to its own; so many low parts, and i, are to be added.
    most = (1 << k) - 1
    lows: NDArray[Any] = low.astype(
        np.int32 if k < 31 and limit < 1 << 30 else np.int64
    )  # count << k is 2 limits at most
    lows[1:] -= lows.dtype.type(most)
    np.cumsum(lows, dtype=lows.dtype, out=lows)
    ones *= 1 << k
    ones += lows
    return ones


def _checked(places: Places, nnz: int, size: int) -> Places:
    if len(places) != nnz:
        raise ValueError(f"a block has {nnz} live entries; got {len(places)}")
    if nnz and int(places[-1]) >= size:
        raise ValueError(f"a block has {size} entries; got a live one at {places[-1]}")
    return places
