"""Random masks on ``mask_v1``: the same bits for the same (seed, shape), in every framework and for any shard.

The stream is frozen. A change of algorithm would be a new name, ``mask_v2``; ``mask_v1`` stays for ever.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from numbers import Integral, Rational, Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from maskedlinear.masks._threefry import words

__all__ = ["ALGORITHM", "bernoulli", "random"]

ALGORITHM = "mask_v1"

Mask = NDArray[np.bool_]
Shard = tuple[slice, slice]
Sparsity = float | Fraction | Decimal

_WORDS = 1 << 32  # how many values a word can have
_CHUNK = 1 << 17  # words held at a time: 512 KiB, and about four times as much beside them


def random(
    shape: tuple[int, int],
    *,
    sparsity: Sparsity | None = None,
    num_zeros: int | None = None,
    seed: int = 0,
    shard: Shard | None = None,
) -> Mask:
    """Return a random mask with an exact number of zeros.

    The k zeros are the k positions of smallest ``(word(i), i)``, with ``i = row * in + column``. So masks of one seed and
    shape are nested: a sparser one only removes connections.

    Args:
        shape: ``(out, in)``.
        sparsity: the fraction of zeros, in [0, 1]: the mask gets ``floor(sparsity * out * in)`` of them. The fraction is
            taken as the decimal that it prints as, so that 0.29 of 100 is 29, although the nearest double is below 0.29.
        num_zeros: the number of zeros instead, from 0 to ``out * in``. Give exactly one of the two.
        seed: an integer in [0, 2⁶⁴).
        shard: two slices (rows, columns) of step 1: return only that part of the whole mask, in memory that the part
            costs. It is what ``jax.make_array_from_callback`` passes to its callback.

    Returns:
        A boolean array of shape ``(out, in)``, or of the shard's shape; ``True`` is a live connection.

    Raises:
        ValueError: if a value is out of its range, or both or neither of ``sparsity`` and ``num_zeros`` are given.
        TypeError: if a size, ``num_zeros`` or the seed is not an integer.
    """
    shape = checked_shape(shape)
    size = math.prod(shape)
    seed = checked_seed(seed)
    zeros = checked_zeros(size, sparsity, num_zeros)
    rows, columns = _checked_shard(shape, shard)

    # The k-th smallest of n uniform words lies close to k/n of their range. One pass clears every word below a narrow
    # window around that place and collects the few inside it; sorting those finds the exact boundary. Eight standard
    # deviations of slack fail about once in 10¹⁵ masks; then the window grows until it holds the boundary.
    slack = 8 * math.sqrt(zeros * (size - zeros) / size) + 64 if size else 0.0
    while True:
        low = max(0, math.floor((zeros - slack) / size * _WORDS)) if size else 0
        high = min(_WORDS, math.ceil((zeros + slack) / size * _WORDS)) if size else 0
        mask = np.empty(_size(rows, columns), np.bool_)
        below, near_words, near_places = 0, [], []
        for start, chunk in _stream(seed, 0, size):
            cleared = chunk < np.uint32(low)
            below += int(np.count_nonzero(cleared))
            near = np.flatnonzero(~cleared & (chunk <= np.uint32(max(high - 1, 0))))
            near_words.append(chunk[near])
            near_places.append(near.astype(np.int64) + start)
            _write(mask, ~cleared, start, shape[1], rows, columns)
        left = zeros - below
        found = sum(part.size for part in near_places)
        if 0 <= left <= found:
            break
        slack *= 8
    if left:
        near_word, place = np.concatenate(near_words), np.concatenate(near_places)
        last = place[np.lexsort((place, near_word))[:left]]
        row, column = np.divmod(last, shape[1])
        inside = (row >= rows.start) & (row < rows.stop) & (column >= columns.start) & (column < columns.stop)
        mask[row[inside] - rows.start, column[inside] - columns.start] = False
    return mask


def bernoulli(
    shape: tuple[int, int],
    *,
    sparsity: Sparsity | None = None,
    threshold: int | None = None,
    probabilities: ArrayLike | None = None,
    seed: int = 0,
    shard: Shard | None = None,
) -> Mask:
    """Return a random mask whose connections are kept independently of each other.

    Connection i is kept iff ``word(i) < threshold``, so it is kept with probability ``threshold / 2³²``, and any shard
    costs only its own size. With ``probabilities`` each connection has a threshold of its own: a matrix that falls with
    the distance between nodes, blocks of communities, a connectome's counts::

        distance = np.abs(np.arange(100)[:, None] - np.arange(100))
        mask = bernoulli((100, 100), probabilities=np.exp(-distance / 5), seed=1)

    Args:
        shape: ``(out, in)``.
        sparsity: the expected fraction of zeros, in [0, 1], taken as the decimal that it prints as; then
            ``threshold = floor((1 - sparsity) * 2³²)``.
        threshold: the threshold itself, an integer in [0, 2³²].
        probabilities: the probability that each connection is kept, each in [0, 1], of ``shape`` or one that broadcasts to
            it: ``(out, 1)`` is one for each output. Thresholds are ``floor(probability * 2³²)``, exact in float64. Give
            exactly one of the three.
        seed: an integer in [0, 2⁶⁴).
        shard: two slices (rows, columns) of step 1: return only that part of the whole mask.

    Returns:
        A boolean array of shape ``(out, in)``, or of the shard's shape; ``True`` is a live connection.

    Raises:
        ValueError: if a value is out of its range, or not exactly one of ``sparsity``, ``threshold`` and ``probabilities``
            is given.
        TypeError: if a size, the threshold or the seed is not an integer, or probabilities are no real numbers.
    """
    shape = checked_shape(shape)
    seed = checked_seed(seed)
    if [sparsity, threshold].count(None) + (probabilities is None) != 2:
        raise ValueError(
            f"give exactly one of sparsity, threshold and probabilities; got sparsity={sparsity}, threshold={threshold}"
            + (" and probabilities" if probabilities is not None else "")
        )
    if probabilities is not None:
        return _of_probabilities(
            shape, _checked_probabilities(shape, probabilities), seed, _checked_shard(shape, shard)
        )
    if sparsity is not None:
        keep = math.floor((1 - checked_fraction(sparsity)) * _WORDS)
    else:
        keep = integer("threshold", threshold)
        if not 0 <= keep <= _WORDS:
            raise ValueError(f"threshold must be in [0, 2**32]; got {threshold}")
    rows, columns = _checked_shard(shape, shard)
    mask = np.empty(_size(rows, columns), np.bool_)
    for start, chunk in _stream(seed, rows.start * shape[1], rows.stop * shape[1]):
        kept = chunk < np.uint32(keep) if keep < _WORDS else np.ones(chunk.size, np.bool_)
        _write(mask, kept, start, shape[1], rows, columns)
    return mask


def _of_probabilities(shape: tuple[int, int], probabilities: NDArray[np.float64], seed: int, shard: Shard) -> Mask:
    """Return a mask made by blocks of whole rows."""
    rows, columns = shard
    mask = np.empty(_size(rows, columns), np.bool_)
    step = max(1, _CHUNK // max(1, shape[1]))
    for first in range(rows.start, rows.stop, step):
        last = min(first + step, rows.stop)
        drawn = words(seed, first * shape[1], last * shape[1]).reshape(last - first, shape[1])[:, columns]
        least = np.floor(probabilities[first:last, columns] * _WORDS)  # exact, as words are, below 2⁵³
        mask[first - rows.start : last - rows.start] = drawn < least
    return mask


def _checked_probabilities(shape: tuple[int, int], probabilities: ArrayLike) -> NDArray[np.float64]:
    given: Any = probabilities
    given = np.asarray(given.detach().cpu() if hasattr(given, "detach") else given)  # PyTorch's
    if given.dtype.kind not in "fiub":
        raise TypeError(f"probabilities must be real numbers in [0, 1]; got dtype {given.dtype}")
    numbers = given.astype(np.float64, copy=False)
    if not ((numbers >= 0) & (numbers <= 1)).all():  # a NaN is neither
        first = numbers[~((numbers >= 0) & (numbers <= 1))][0]
        raise ValueError(f"probabilities must be in [0, 1]; got {first}")
    try:
        return np.broadcast_to(numbers, shape)
    except ValueError:
        hint = ", which is the transpose: pass its .T" if numbers.shape == shape[::-1] else ""
        raise ValueError(
            f"probabilities must have the mask's shape (out, in) = {shape}, or one that broadcasts to it; "
            f"got {numbers.shape}{hint}"
        ) from None


def _stream(seed: int, start: int, stop: int) -> Iterator[tuple[int, NDArray[np.uint32]]]:
    """Yield the words from ``start`` to ``stop`` in pieces, each with the index of its first word."""
    for begin in range(start, stop, _CHUNK):
        yield begin, words(seed, begin, min(begin + _CHUNK, stop))


def _write(mask: Mask, values: Mask, start: int, width: int, rows: slice, columns: slice) -> None:
    """Copy ``values``, the whole mask's flat entries from ``start`` on, to where they belong in the shard ``mask``."""
    stop = start + values.size
    if columns.start == 0 and columns.stop == width:
        first, last = max(start, rows.start * width), min(stop, rows.stop * width)
        if first < last:
            mask.reshape(-1)[first - rows.start * width : last - rows.start * width] = values[
                first - start : last - start
            ]
        return
    for row in range(max(rows.start, start // width), min(rows.stop, -(-stop // width))):
        first, last = max(start, row * width + columns.start), min(stop, row * width + columns.stop)
        if first < last:
            left = first - row * width - columns.start
            mask[row - rows.start, left : left + last - first] = values[first - start : last - start]


def _size(rows: slice, columns: slice) -> tuple[int, int]:
    return rows.stop - rows.start, columns.stop - columns.start


def integer(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    return int(value)


def checked_shape(shape: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(shape, tuple | list) or len(shape) != 2:
        raise ValueError(f"a mask's shape must be (out, in); got {shape!r}")
    out, in_ = (integer("a size", n) for n in shape)
    if out < 0 or in_ < 0:
        raise ValueError(f"a mask's sizes (out, in) must not be negative; got ({out}, {in_})")
    return out, in_


def checked_seed(seed: int) -> int:
    seed = integer("seed", seed)
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be in [0, 2**64); got {seed}")
    return seed


def checked_fraction(sparsity: Sparsity) -> Fraction:
    if isinstance(sparsity, bool) or not isinstance(sparsity, Real | Decimal):
        raise TypeError(f"sparsity must be a number in [0, 1]; got {sparsity!r}")
    is_nan = not isinstance(sparsity, Rational) and math.isnan(sparsity)  # a Decimal NaN cannot be compared
    if is_nan or not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity is the fraction of zeros and must be in [0, 1]; got {sparsity}")
    return Fraction(str(sparsity))


def checked_zeros(size: int, sparsity: Sparsity | None, num_zeros: int | None) -> int:
    if (sparsity is None) == (num_zeros is None):
        raise ValueError(f"give exactly one of sparsity and num_zeros; got sparsity={sparsity}, num_zeros={num_zeros}")
    if sparsity is not None:
        return math.floor(checked_fraction(sparsity) * size)
    zeros = integer("num_zeros", num_zeros)
    if not 0 <= zeros <= size:
        raise ValueError(f"num_zeros must be from 0 to the mask's size, {size}; got {zeros}")
    return zeros


def _checked_shard(shape: tuple[int, int], shard: Shard | None) -> Shard:
    if shard is None:
        return slice(0, shape[0]), slice(0, shape[1])
    if len(shard) != 2 or not all(isinstance(part, slice) and part.step in (None, 1) for part in shard):
        raise ValueError(f"a shard is two slices (rows, columns) of step 1; got {shard!r}")
    bounds = [part.indices(n) for part, n in zip(shard, shape, strict=True)]
    rows, columns = (slice(start, max(start, stop)) for start, stop, _ in bounds)
    return rows, columns
