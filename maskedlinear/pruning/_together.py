"""The same selection where each process has a part of the scores, which nobody puts together.

Processes add up histograms of what they have, sixteen bits of the scores at a time, which finds the boundary that one
process finds in the whole; of entries that are equal to it the places decide, by histograms likewise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from maskedlinear._progress import Progress, progress_callback
from maskedlinear.masks._random import Sparsity, checked_seed
from maskedlinear.pruning._edges import (
    OnEmpty,
    Scope,
    are_too_large,
    check_empty,
    check_scope,
    checked_least,
    clear_by_scope,
    nan_error,
    prune,
    refuse_empty,
    scores_of_blocks,
    too_large_error,
)
from maskedlinear.pruning._growth import drawn, draws_free, number_to_move, where
from maskedlinear.pruning._select import AddUp, best_entries, boundary, ordered

__all__ = ["Matrix", "Part", "PartAxis", "places_of", "prune_together", "regrow_together"]

Array = NDArray[Any]
Mask = NDArray[np.bool_]
Places = NDArray[np.int64]  # flat ones in the whole matrix, row * in + column

_BLOCK = 1 << 18  # entries looked at at a time


_ONES = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)  # of a byte


def _ignore(seen: int) -> None:
    """Take no note of progress."""


class PartAxis(NamedTuple):
    """An axis of a part: its places in the whole axis, how far apart neighbours are in the matrix, and how long it is."""

    places: Places
    stride: int
    size: int


def places_of(axes: Sequence[PartAxis], entries: NDArray[np.intp]) -> Places:
    """Return where entries of a part with these axes stand in the whole matrix, by their flat index in the part."""
    places = np.zeros(len(entries), np.int64)
    for axis in reversed(axes):
        places += axis.places[entries % len(axis.places)] * axis.stride
        entries = entries // len(axis.places)
    return places


@dataclass(eq=False)
class Part:
    """Entries of a matrix that a process has: some places of each axis, and all that they make together.

    Attributes:
        mask: of these entries, flat; changed by the functions here.
        scores: returns those of the entries from one flat index to before another.
        axes: of the part, in the order in which its entries lie.
        counts: whether this process is the one that counts these entries, of those that have them.
    """

    mask: Mask
    scores: Callable[[int, int], Array]
    axes: Sequence[PartAxis]
    counts: bool = True

    def places(self, entries: NDArray[np.intp]) -> Places:
        """Return where entries stand in the whole matrix, by their flat index here."""
        return places_of(self.axes, entries)

    def entries(self, places: Places) -> NDArray[np.intp]:
        """Return the flat index of places of the whole matrix here; -1 where they are not."""
        entries, has = np.zeros(len(places), np.intp), np.full(len(places), self.mask.size > 0)
        for axis in self.axes:
            known = np.full(axis.size, -1)
            known[axis.places] = np.arange(len(axis.places))
            own = known[places // axis.stride % axis.size]
            entries, has = entries * len(axis.places) + own, has & (own >= 0)
        return np.where(has, entries, -1)

    def set(self, places: Places, value: bool) -> None:
        """Set the mask at those of places of the whole matrix that are here."""
        entries = self.entries(places)
        self.mask[entries[entries >= 0]] = value

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Yield where blocks of entries begin and end."""
        return ((start, min(start + _BLOCK, self.mask.size)) for start in range(0, self.mask.size, _BLOCK))

    def keys(
        self, dtype: np.dtype[Any], tell: Callable[[int], object] = _ignore
    ) -> Iterator[tuple[NDArray[np.intp], Array]]:
        """Yield live entries, and whole numbers that are ordered as their scores are, block by block."""
        for start, stop in self.blocks():
            live = np.flatnonzero(self.mask[start:stop])
            if live.size:
                yield start + live, ordered(self.scores(start, stop)[live].astype(dtype, copy=False))
            tell(stop - start)


@dataclass(eq=False)
class Matrix:
    """What a process has of a matrix ``(out, in)``: its parts, no one where it has nothing.

    Attributes:
        shape: of the whole.
        parts: those that this process has.
        dtype: of the scores, the same in all processes.
    """

    shape: tuple[int, int]
    parts: Sequence[Part]
    dtype: np.dtype[Any]

    @property
    def size(self) -> int:
        """How many entries the whole has."""
        return math.prod(self.shape)

    @property
    def counted(self) -> list[Part]:
        """The parts that this process counts."""
        return [part for part in self.parts if part.counts]


def prune_together(
    matrices: Mapping[str, Matrix],
    *,
    sparsity: Sparsity | None = None,
    num_zeros: int | None = None,
    scope: Scope = "global",
    block: tuple[int, int] | None = None,
    on_empty: OnEmpty = "raise",
    keep_at_least: Mapping[str, int] | None = None,
    progress: Progress = False,
    add_up: AddUp,
    sums_of_sizes: Mapping[str, int] | None = None,
) -> None:
    """Clear the entries in the masks of parts that :func:`maskedlinear.pruning.prune` clears in the whole, bit for bit.

    Every process calls this, with the same arguments but its own parts. Blocks are found in the scores of one whole matrix
    after the other, of which a process keeps those of blocks; and so are rows, for ``scope="row"`` and for what
    ``keep_at_least`` keeps of them, where some process has parts of rows only.

    Args:
        matrices: by name, in the order of the model.
        sparsity: as :func:`maskedlinear.pruning.prune` takes it, and so the rest.
        num_zeros: as above.
        scope: as above.
        block: as above.
        on_empty: as above.
        keep_at_least: as above.
        progress: as above.
        add_up: returns the sum of an array of whole numbers over the processes.
        sums_of_sizes: of matrices that are kernels', in whose proportion ``"erdos_renyi"`` shares out.

    Raises:
        ValueError: as by :func:`maskedlinear.pruning.prune`, in all processes; the masks are of no use then.
    """
    check_scope(scope)
    check_empty(on_empty, matrices)
    least = checked_least(keep_at_least, on_empty)
    _refuse_scores(matrices, add_up)
    amount: Any = {"sparsity": sparsity, "num_zeros": num_zeros, "on_empty": on_empty, "keep_at_least": keep_at_least}
    if scope == "row" and block is None:
        for name, matrix in matrices.items():
            scores, mask = _whole(matrix, add_up)
            rows = prune({name: scores}, masks={name: mask}, scope=scope, progress=progress, **amount)
            _follow_blocks(matrix, rows[name], (1, 1))
        return
    if block is not None:
        sums: dict[str, Array] = {}
        masks: dict[str, Mask] = {}
        for name, matrix in matrices.items():  # one whole matrix at a time
            scores, mask = _whole(matrix, add_up)
            of_blocks, live_blocks = scores_of_blocks({name: scores}, {name: mask}, block)
            sums |= of_blocks
            masks |= live_blocks
        found = prune(sums, masks=masks, scope=scope, progress=progress, **amount)
        for name, matrix in matrices.items():
            _follow_blocks(matrix, found[name], block)
        return
    dtype = np.dtype(np.result_type(np.float32, *(matrix.dtype for matrix in matrices.values())))
    tell = progress_callback(progress, "pruning")
    live = _count_live(matrices, add_up)
    kept = {
        name: _best(matrix, live[name], **least, add_up=add_up)
        for name, matrix in matrices.items()
        if any(least.values())
    }
    work, seen = (dtype.itemsize // 2 + 1) * sum(part.mask.size for one in matrices.values() for part in one.parts), 0

    def look(number: int) -> None:
        nonlocal seen
        seen += number
        tell(min(seen / work, 0.99))

    def clear(names: Sequence[str], count: int) -> None:
        stays = [kept[name] for name in names if name in kept]
        for best in stays:
            best.hide()  # which the selection passes over
        _clear_smallest([matrices[name] for name in names], count, dtype, add_up, look)
        for best in stays:
            best.show()

    shapes, kept_by_name = (
        {name: one.shape for name, one in matrices.items()},
        {name: best.number for name, best in kept.items()},
    )
    clear_by_scope(clear, shapes, live, kept_by_name, scope=scope, sums_of_sizes=sums_of_sizes, **amount)
    if on_empty == "raise":
        refuse_empty(live, _count_live(matrices, add_up))
    tell(1.0)


def regrow_together(
    matrix: Matrix,
    fraction: Sparsity,
    gradients: Sequence[Callable[[int, int], Array]] | None = None,
    *,
    seed: int = 0,
    exclude_dropped: bool = False,
    add_up: AddUp,
) -> None:
    """Move connections in the masks of parts as :func:`maskedlinear.pruning.regrow` does in the whole, bit for bit.

    Every process calls this. Where fewer than a quarter of all places are candidates and growth is at random, the mask of
    the whole matrix is put together, as bits.

    Args:
        matrix: whose scores are the magnitudes of the weight.
        fraction: the share of live connections that move, in [0, 1].
        gradients: of each part, returns the gradient's magnitudes of entries, as the part does scores; ``None`` grows at
            random.
        seed: of the random places.
        exclude_dropped: as :func:`maskedlinear.pruning.regrow` takes it.
        add_up: as in :func:`prune_together`.

    Raises:
        ValueError: if the fraction is out of its range, or a live weight or a gradient is NaN, in all processes.
    """
    seed, free = checked_seed(seed), None
    if gradients is not None:
        pairs = zip(matrix.parts, gradients, strict=True)
        parts = [Part(~part.mask, scores, part.axes, part.counts) for part, scores in pairs]
        free = Matrix(matrix.shape, parts, np.dtype(np.float64))
    counts = [_count(matrix), _count_nan(matrix, live=True), 0 if free is None else _count_nan(free, live=False)]
    live, no_weights, no_gradients = add_up(np.array(counts, np.int64)).tolist()
    for what, wrong, found in (("a live weight", no_weights, matrix), ("a gradient", no_gradients, free)):
        if wrong and found is not None:
            place = where(_first_nan(found, add_up, live=found is matrix), matrix.shape)
            raise ValueError(f"{what} must {'be a number' if found is matrix else 'hold numbers'}; got NaN at {place}")
    count = number_to_move(fraction, live, matrix.size, exclude_dropped)
    taken = _copy(matrix) if exclude_dropped else matrix
    _clear_smallest([matrix], count, np.result_type(np.float32, matrix.dtype), add_up)
    number = live if exclude_dropped else live - count
    if free is None:
        free_places = _free_places(taken, number, add_up)
        places = drawn(count, number, matrix.size, seed, partial(_are_live, taken, add_up), free_places)
        for part in matrix.parts:
            part.set(places, True)
        return
    for part, own in zip(free.parts, taken.parts, strict=True):
        part.mask[...] = ~own.mask
    _clear_smallest([free], matrix.size - number - count, free.dtype, add_up)
    for part, come in zip(matrix.parts, free.parts, strict=True):
        part.mask |= come.mask


def _copy(matrix: Matrix) -> Matrix:
    """Return a matrix whose masks are its own."""
    parts = [Part(part.mask.copy(), part.scores, part.axes, part.counts) for part in matrix.parts]
    return Matrix(matrix.shape, parts, matrix.dtype)


def _clear_smallest(
    matrices: Sequence[Matrix], count: int, dtype: np.dtype[Any], add_up: AddUp, tell: Callable[[int], object] = _ignore
) -> None:
    """Set the ``count`` live entries of smallest ``(score, matrix, place)`` to ``False``, in all processes together."""
    if not count:
        return
    starts = [0, *np.cumsum([matrix.size for matrix in matrices]).tolist()]

    def scores() -> Iterator[Array]:
        return (keys for one in matrices for part in one.counted for _, keys in part.keys(dtype, tell))

    edge, left, equal = boundary(scores, 8 * dtype.itemsize, count, add_up)

    def places() -> Iterator[Array]:
        for start, matrix in zip(starts, matrices, strict=False):
            for part in matrix.counted:
                for entries, keys in part.keys(dtype):
                    yield (start + part.places(entries[keys == edge])).astype(np.uint64)

    last = starts[-1]
    if left < equal:  # of those at the boundary, the first go
        last, _, _ = boundary(places, 16 * (last.bit_length() // 16 + 1), left, add_up)
    for start, matrix in zip(starts, matrices, strict=False):
        for part in matrix.parts:
            for entries, keys in part.keys(dtype, tell):
                gone = keys < edge
                equals = np.flatnonzero(keys == edge)
                gone[equals[start + part.places(entries[equals]) <= last]] = True
                part.mask[entries[gone]] = False


class _Best(NamedTuple):
    """Entries of a matrix that stay whatever is asked for: how many in all processes, and of each part which."""

    number: int
    parts: Sequence[tuple[Part, NDArray[np.intp]]]

    def hide(self) -> None:
        for part, entries in self.parts:
            part.mask[entries] = False

    def show(self) -> None:
        for part, entries in self.parts:
            part.mask[entries] = True


def _best(matrix: Matrix, live: int, row: int, layer: int, add_up: AddUp) -> _Best:
    """Return the live entries of highest score that :func:`best_entries` finds in the whole."""
    dtype = np.dtype(np.result_type(np.float32, matrix.dtype))
    best = _copy(matrix)
    _clear_smallest([best], max(0, live - layer), dtype, add_up)
    if row and matrix.size:
        for part, places in zip(best.parts, _best_of_rows(matrix, row, dtype, add_up), strict=True):
            part.set(places, True)
    number = _count_live({"": best}, add_up)[""]
    return _Best(number, [(part, np.flatnonzero(own.mask)) for part, own in zip(matrix.parts, best.parts, strict=True)])


def _best_of_rows(matrix: Matrix, count: int, dtype: np.dtype[Any], add_up: AddUp) -> list[Places]:
    """Return for each part the places of the ``count`` best live entries of each row, at least those that it has."""
    in_ = matrix.shape[1]
    cut = any(len(axis.places) < axis.size for part in matrix.parts for axis in part.axes if axis.stride < in_)
    if add_up(np.array([cut], np.int64))[0]:
        scores, mask = _whole(matrix, add_up)
        return [best_entries(scores.astype(dtype, copy=False), mask, count, 0)] * len(matrix.parts)
    found = []
    for part in matrix.parts:
        places = part.places(np.arange(part.mask.size))
        order = np.argsort(places, kind="stable")  # row by row
        scores = np.concatenate([part.scores(*block) for block in part.blocks()] or [np.empty(0)]).astype(dtype)
        own = best_entries(scores[order].reshape(-1, in_), part.mask[order].reshape(-1, in_), count, 0)
        found.append(places[order[own]])
    return found


def _follow_blocks(matrix: Matrix, found: Mask, block: tuple[int, int]) -> None:
    """Clear what is in blocks that are gone."""
    for part in matrix.parts:
        for start, stop in part.blocks():
            rows, columns = np.divmod(part.places(np.arange(start, stop)), max(matrix.shape[1], 1))
            part.mask[start:stop] &= found[rows // block[0], columns // block[1]]


def _count(matrix: Matrix) -> int:
    """Return how many live entries this process counts."""
    return sum(int(np.count_nonzero(part.mask)) for part in matrix.counted)


def _count_live(matrices: Mapping[str, Matrix], add_up: AddUp) -> dict[str, int]:
    """Return how many entries of each matrix are live, in all processes together."""
    own = np.array([_count(matrix) for matrix in matrices.values()], np.int64)
    return dict(zip(matrices, add_up(own).tolist(), strict=True))


def _refuse_scores(matrices: Mapping[str, Matrix], add_up: AddUp) -> None:
    """Raise an error, in all processes, if scores of one are NaN, or whole numbers that no float holds."""
    wrong = np.zeros((2, len(matrices)), np.int64)
    for number, matrix in enumerate(matrices.values()):
        for part in matrix.counted:
            for start, stop in part.blocks():
                scores = part.scores(start, stop)
                wrong[0, number] += np.count_nonzero(np.isnan(scores))
                wrong[1, number] += are_too_large(scores)
    wrong = add_up(wrong)
    for number, (name, matrix) in enumerate(matrices.items()):
        if wrong[1, number]:
            raise too_large_error(name)
        if wrong[0, number]:
            raise nan_error(name, _first_nan(matrix, add_up, live=False), matrix.shape)


def _nan_places(matrix: Matrix, live: bool) -> Iterator[Array]:
    """Yield the places where scores are NaN that this process counts, of live entries or of all, block by block."""
    for part in matrix.counted:
        for start, stop in part.blocks():
            wrong = np.isnan(part.scores(start, stop))
            if live:
                wrong &= part.mask[start:stop]
            if wrong.any():
                yield part.places(start + np.flatnonzero(wrong)).astype(np.uint64)


def _count_nan(matrix: Matrix, live: bool) -> int:
    return sum(len(places) for places in _nan_places(matrix, live))


def _first_nan(matrix: Matrix, add_up: AddUp, live: bool) -> int:
    """Return the first place of the whole matrix where a score is NaN, as one is in some process."""
    return boundary(lambda: _nan_places(matrix, live), 16 * (matrix.size.bit_length() // 16 + 1), 1, add_up)[0]


def _whole(matrix: Matrix, add_up: AddUp) -> tuple[Array, Mask]:
    """Return the scores and the mask of a whole matrix, put together from all processes."""
    scores = np.zeros(matrix.size, np.int64)
    for part in matrix.counted:
        for start, stop in part.blocks():
            places = part.places(np.arange(start, stop))
            scores[places] = part.scores(start, stop).astype(np.float64).view(np.int64)
    whole = add_up(scores).view(np.float64).astype(matrix.dtype, copy=False).reshape(matrix.shape)
    bits = _bits(matrix, add_up, True).view(np.uint8)
    return whole, np.unpackbits(bits, count=matrix.size, bitorder="little").view(bool).reshape(matrix.shape)


def _bits(matrix: Matrix, add_up: AddUp, value: bool) -> NDArray[np.int64]:
    """Return where the mask of a whole matrix has a value, one bit a place, the first of a word the lowest."""
    words = np.zeros(-(-matrix.size // 64), "<u8")
    for part in matrix.counted:
        for start, stop in part.blocks():
            places = part.places(start + np.flatnonzero(part.mask[start:stop] == value))
            np.add.at(words, places >> 6, np.uint64(1) << (places & 63).astype(np.uint64))
    return add_up(words.view(np.int64))  # no two have a bit in common: their sum is their union


def _are_live(matrix: Matrix, add_up: AddUp, places: Places) -> Mask:
    """Whether places of the whole matrix are live."""
    live = np.zeros(len(places), np.int64)
    for part in matrix.counted:
        entries = part.entries(places)
        has = np.flatnonzero(entries >= 0)
        live[has] = part.mask[entries[has]]
    return np.asarray(add_up(live) > 0)


def _free_places(matrix: Matrix, live: int, add_up: AddUp) -> Callable[[Places], Places]:
    """Return what finds the places of the whole matrix without a connection, by how many free ones are before."""
    if not draws_free(live, matrix.size):
        return lambda numbers: numbers  # which are places
    words = _bits(matrix, add_up, False).view(np.uint8).reshape(-1, 8)
    free = _ONES[words].sum(axis=1, dtype=np.int64)
    before = np.cumsum(free)

    def places(numbers: Places) -> Places:
        word = np.searchsorted(before, numbers, side="right")
        rank = numbers - (before[word] - free[word])
        seen = np.cumsum(np.unpackbits(words[word], axis=1, bitorder="little"), axis=1, dtype=np.uint8)
        return np.asarray(64 * word + np.argmax(seen > rank[:, None], axis=1), np.int64)

    return places
