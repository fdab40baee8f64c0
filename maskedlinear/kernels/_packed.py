"""The packed layout of a sparse matrix, for its product with one vector: what rows side by side read, lies side by side.

Rows come in groups, as many as a register has lanes, those with as many connections together. A window is the numbers of x
that registers hold at a time. It moves over x by one register's; where a row has connections that it is about to leave, its
group takes as many steps as the slowest of its rows needs, and rows that are done with those go on, in these steps, with
what lies further in the window: so few lanes idle. A kernel picks the numbers of x from registers, by an index of one byte,
and gathers nothing.

The steps at one place of the window are cut into pieces of at most :data:`MOST_STEPS`; a group's pieces lie by their length,
the longest first, so that the kernel has one loop without branches for each length.

A layout is made of a :class:`~maskedlinear.pattern.SparsityPattern`, whose indices are valid, and keeps within them: no
kernel reads beyond x, whatever the values are.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from maskedlinear.pattern import SparsityPattern

__all__ = ["MOST_STEPS", "PADDING", "Layout"]

MOST_STEPS = 4
PADDING = 0x80  # the index of a lane that has no connection: negative as a number with a sign
_MOST = np.iinfo(np.int32).max


class Layout(NamedTuple):
    """Where a packed matrix has its connections.

    Attributes:
        lanes: the rows of a group, and the columns by which the window moves.
        window: the columns of the window.
        shape: the rows and the columns of the matrix.
        groups: int32, shape ``(groups, MOST_STEPS + 2 + lanes)``: of each group how many pieces of each length it has, the
            longest first; its first step, and its first piece; and its rows, the number of all where there is none.
        columns: int32, shape ``(pieces,)``: the first column of the window at each piece.
        indices: uint8, shape ``(steps, lanes)``: which column of the window each lane multiplies; :data:`PADDING` if none.
        places: int64, shape ``(nnz,)``: where each connection of the pattern is in ``indices``, flattened.
    """

    lanes: int
    window: int
    shape: tuple[int, int]
    groups: NDArray[np.int32]
    columns: NDArray[np.int32]
    indices: NDArray[np.uint8]
    places: NDArray[np.int64]

    @classmethod
    def of(cls, pattern: SparsityPattern, lanes: int, window: int, most_steps: int = _MOST) -> Self | None:
        """Return the layout of a pattern that has at least ``window`` columns, and a connection.

        ``None`` if it would have more than ``most_steps``.
        """
        out = pattern.shape[0]
        rows = np.argsort(-np.diff(pattern.indptr), kind="stable")  # of each lane
        lane = np.empty(out, np.int64)
        lane[rows] = np.arange(out)
        rows = np.concatenate([rows, np.full(-out % lanes, out)]).reshape(-1, lanes)
        runs = _schedule(pattern, lane, lanes, window, min(most_steps, _MOST))
        if runs is None:
            return None
        pieces_of = -(-runs.steps // MOST_STEPS)
        run = np.repeat(np.arange(len(pieces_of)), pieces_of)  # of each piece, as are all that follow
        first = np.cumsum(pieces_of) - pieces_of
        height = np.minimum(runs.steps[run] - (np.arange(len(run)) - first[run]) * MOST_STEPS, MOST_STEPS)
        order = np.lexsort((-height, runs.group[run]))  # stable
        begin = np.empty(len(order), np.int64)
        begin[order] = np.cumsum(height[order]) - height[order]
        counts = np.bincount(runs.group[run] * MOST_STEPS + MOST_STEPS - height, minlength=len(rows) * MOST_STEPS)
        counts = counts.reshape(-1, MOST_STEPS)
        taken = np.stack([counts @ np.arange(MOST_STEPS, 0, -1), counts.sum(1)], 1)
        groups = np.concatenate([counts, np.cumsum(taken, 0) - taken, rows], 1)
        piece = first[runs.of] + runs.step // MOST_STEPS
        places = (begin[piece] + runs.step % MOST_STEPS) * lanes + lane[pattern.rows] % lanes
        indices = np.full(int(runs.steps.sum()) * lanes, PADDING, np.uint8)
        indices[places] = pattern.indices - runs.column[runs.of]
        columns = runs.column[run][order].astype(np.int32)
        return cls(lanes, window, pattern.shape, groups.astype(np.int32), columns, indices.reshape(-1, lanes), places)

    @property
    def fill(self) -> float:
        """The fraction of lanes that multiply a connection, in (0, 1]."""
        return len(self.places) / self.indices.size

    def values(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the values of the pattern's connections in this layout, shape ``(steps, lanes)``, 0 where there is none."""
        packed = np.zeros(self.indices.size, values.dtype)
        packed[self.places] = values
        return packed.reshape(self.indices.shape)


class _Runs(NamedTuple):
    """What groups do at places of the window: a run's group, first column and steps; a connection's run, and step in it."""

    group: NDArray[Any]
    column: NDArray[Any]
    steps: NDArray[Any]
    of: NDArray[Any]
    step: NDArray[Any]


def _schedule(
    pattern: SparsityPattern, lane: NDArray[np.int64], lanes: int, window: int, most_steps: int
) -> _Runs | None:
    """Return when each lane takes its row's connections, one a step and in their order; ``None`` beyond ``most_steps``.

    A group's step is put off until one of its lanes must take what the window is about to leave. ``lane`` is that of each
    row, counted through all groups.
    """
    out, in_ = pattern.shape
    places, lanes_in_all = -(-in_ // lanes), -(-out // lanes) * lanes
    # Cells: what a lane has in the columns that the window leaves at once, place by place.
    cell = pattern.indices.astype(np.int64) // lanes * lanes_in_all + lane[pattern.rows]
    first = np.flatnonzero(np.diff(cell, prepend=-1))
    order = np.argsort(cell[first])
    cell, size = cell[first][order], np.diff(first, append=pattern.nnz)[order]
    bounds = np.searchsorted(cell, np.arange(places + 1) * lanes_in_all)
    cell %= lanes_in_all
    entered, leaving, taken = (np.zeros(lanes_in_all, np.int64) for _ in range(3))  # connections of each lane so far
    found, steps_so_far, seen = [], 0, 0
    for place in range(places):
        inside = min(place + window // lanes, places)
        new, seen = slice(bounds[seen], bounds[inside]), inside
        np.add.at(entered, cell[new], size[new])
        here = slice(bounds[place], bounds[place + 1])
        leaving[cell[here]] += size[here]
        first = np.flatnonzero(np.diff(cell[here] // lanes, prepend=-1))
        if not len(first):
            continue
        group = cell[here][first] // lanes
        needed = np.maximum.reduceat(leaving[cell[here]] - taken[cell[here]], first)
        group, needed = group[needed > 0], needed[needed > 0]
        of_group = group[:, None] * lanes + np.arange(lanes)
        ready = entered[of_group] - taken[of_group]
        steps_so_far += int(needed.sum())
        if steps_so_far > most_steps:
            return None
        done = np.minimum(ready, needed[:, None])
        taken[of_group] += done
        found.append((group, np.full(len(group), min(place * lanes, in_ - window)), needed, done.astype(np.int32)))
    group, column, steps, done = (np.concatenate(of_run) for of_run in zip(*found, strict=True))
    # A row's connections follow each other, from run to run.
    by_row = np.full(lanes_in_all, out)
    by_row[lane] = np.arange(out)
    order = np.argsort(by_row[group[:, None] * lanes + np.arange(lanes)], axis=None, kind="stable")
    counts = done.ravel()[order]
    step = np.arange(pattern.nnz) - np.repeat(np.cumsum(counts) - counts, counts)
    return _Runs(group, column, steps, np.repeat(order // lanes, counts), step)
