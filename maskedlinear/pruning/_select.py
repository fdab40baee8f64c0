"""The k smallest of many scores, exactly, with ties broken by place, in one pass a sixteen bits and little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["AddUp", "best_entries", "boundary", "clear_smallest", "first_nan", "ordered", "passes"]

Array = NDArray[Any]
Mask = NDArray[np.bool_]
AddUp = Callable[[NDArray[np.int64]], NDArray[np.int64]]  # the sum over all processes, to each of them

_BLOCK = 1 << 20  # scores looked at at a time
_DIGIT = 16  # bits that a pass decides


def passes(scores: Array) -> int:
    """Return how many times :func:`clear_smallest` looks at each of these scores."""
    return 8 * scores.dtype.itemsize // _DIGIT + 1


def clear_smallest(
    scores: Sequence[Array], masks: Sequence[Mask], count: int, tell: Callable[[int], object] = lambda seen: None
) -> None:
    """Set the ``count`` live entries of smallest ``(score, layer, place)`` to ``False``, in ``masks``.

    The order of floats is that of their bits, so a histogram of their leading bits finds where the boundary is, one of the
    next bits within it, and so on; -0 counts as 0.

    Args:
        scores: arrays of one floating dtype, without NaN, C-contiguous.
        masks: the masks, C-contiguous, of the scores' shapes; changed in place.
        count: how many to clear; at most as many as are live.
        tell: called with the number of scores that have been looked at once more.
    """
    if not count or not scores:
        return
    bits = 8 * scores[0].dtype.itemsize
    edge, left, _ = boundary(lambda: (keys for keys, _ in _keys(scores, masks, tell)), bits, count)
    for keys, live in _keys(scores, masks, tell):
        kept = keys > edge
        equal = np.flatnonzero(keys == edge)
        kept[equal[left:]] = True
        left = max(0, left - len(equal))
        live[np.flatnonzero(live)[~kept]] = False


def boundary(
    blocks: Callable[[], Iterator[Array]], bits: int, count: int, add_up: AddUp = lambda numbers: numbers
) -> tuple[int, int, int]:
    """Return the ``count``-th smallest of many whole numbers; how many of those equal to it are among the ``count``
    smallest, at least one; and how many are equal to it.

    Args:
        blocks: yields them, unsigned, block by block, each time it is called.
        bits: how many each has, a multiple of 16.
        count: from 1 to how many there are.
        add_up: sums over processes, of each of which ``blocks`` has its own; none of them may be left out.
    """
    prefix, left, equal = 0, count, 0  # the boundary's leading digits; how many of those that share them are below it
    for shift in range(bits - _DIGIT, -1, -_DIGIT):
        histogram = np.zeros(1 << _DIGIT, np.int64)
        for keys in blocks():
            if shift + _DIGIT < bits:
                keys = keys[keys >> np.asarray(shift + _DIGIT, keys.dtype) == prefix]
            digits = keys >> np.asarray(shift, keys.dtype) & np.asarray((1 << _DIGIT) - 1, keys.dtype)
            histogram += np.bincount(digits.astype(np.int64), minlength=1 << _DIGIT)
        histogram = add_up(histogram)
        before = np.cumsum(histogram)
        digit = int(np.searchsorted(before, left))
        equal = int(histogram[digit])
        left -= int(before[digit]) - equal
        prefix = prefix << _DIGIT | digit
    return prefix, left, equal


def best_entries(scores: Array, mask: Mask, row: int, layer: int) -> NDArray[np.intp]:
    """Return the flat places of the live entries of highest score: ``row`` of each row and ``layer`` of all; later ones of
    equal score.

    Args:
        scores: shape ``(out, in)``, of a floating dtype, without NaN.
        mask: of its shape.
        row: how many of each row; all its live ones where they are fewer.
        layer: how many of all, likewise.
    """
    height, width = scores.shape
    best = [_last_of_largest(scores.reshape(-1), mask.reshape(-1), layer)]
    if row:
        best += [i * width + _last_of_largest(scores[i], mask[i], row) for i in range(height)]
    return np.unique(np.concatenate(best))


def _last_of_largest(scores: Array, mask: Mask, count: int) -> NDArray[np.intp]:
    """Return where the ``count`` largest live scores are; block by block, of which the best ones meet again."""
    best = np.empty(0, np.intp)
    for start in range(0, scores.size if count else 0, _BLOCK):
        places = np.concatenate([best, start + np.flatnonzero(mask[start : start + _BLOCK])])
        if len(places) > count:
            values = scores[places]
            edge = np.partition(values, len(values) - count)[len(values) - count]
            above, equal = np.flatnonzero(values > edge), np.flatnonzero(values == edge)
            places = places[np.sort(np.concatenate([above, equal[len(equal) - (count - len(above)) :]]))]
        best = places
    return best


def first_nan(scores: Array) -> int | None:
    """Return where the first NaN is, in the flattened array."""
    flat = scores.reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        found = np.isnan(flat[start : start + _BLOCK])
        if found.any():
            return start + int(np.argmax(found))
    return None


def _keys(
    scores: Sequence[Array], masks: Sequence[Mask], tell: Callable[[int], object]
) -> Iterator[tuple[Array, Mask]]:
    """Yield whole numbers that are ordered as the live scores are, block by block, and the block's part of the mask."""
    for layer, mask in zip(scores, masks, strict=True):
        flat, live = layer.reshape(-1), mask.reshape(-1)
        for start in range(0, flat.size, _BLOCK):
            part = live[start : start + _BLOCK]
            block = flat[start : start + _BLOCK]
            yield ordered(block if part.all() else block[part]), part
            tell(part.size)


def ordered(block: Array) -> Array:
    """Return whole numbers, unsigned, that are ordered as floats without NaN are; -0 counts as 0."""
    whole = np.dtype(f"u{block.dtype.itemsize}")
    sign = np.asarray(1 << 8 * whole.itemsize - 1, whole)
    keys: Array = (block + np.zeros((), block.dtype)).view(whole)  # -0 + 0 is 0
    negative = keys & sign != 0
    if negative.any():
        return np.where(negative, ~keys, keys | sign)
    keys |= sign
    return keys
