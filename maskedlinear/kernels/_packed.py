"""The packed layout of a sparse matrix, for its product with one vector: what rows side by side read, lies side by side.

Rows come in groups, as many as a register has lanes, and columns in blocks, as many as the registers that hold x's numbers
of them have lanes. Where a group meets a block there is a cell: its rows' connections one below the other, padded with zeros
to the longest. A kernel picks the numbers of x from registers, by an index of one byte, so it gathers nothing.

Cells are cut into pieces of at most :data:`MOST_STEPS` steps; a group's pieces lie by their length, the longest first, so
that the kernel has one loop without branches for each length.

A layout is made of a :class:`~maskedlinear.pattern.SparsityPattern`, whose indices are valid, and keeps within them: no
kernel reads beyond x, whatever the values are.
"""

from __future__ import annotations

from typing import NamedTuple

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
        lanes: the rows of a group.
        block: the columns of a block.
        shape: the rows and the columns of the matrix.
        counts: int32, shape ``(groups, MOST_STEPS)``: how many pieces of each length a group has, the longest first.
        starts: int32, shape ``(groups + 1, 2)``: where a group's steps and its pieces begin.
        columns: int32, shape ``(pieces,)``: the first column of each piece's block.
        indices: uint8, shape ``(steps, lanes)``: which column of the block each lane multiplies; :data:`PADDING` if none.
        places: int64, shape ``(nnz,)``: where each connection of the pattern is in ``indices``, flattened.
    """

    lanes: int
    block: int
    shape: tuple[int, int]
    counts: NDArray[np.int32]
    starts: NDArray[np.int32]
    columns: NDArray[np.int32]
    indices: NDArray[np.uint8]
    places: NDArray[np.int64]

    @classmethod
    def of(cls, pattern: SparsityPattern, lanes: int, block: int) -> Layout:
        """Return the layout of a pattern that has at least ``block`` columns and one connection."""
        out, in_ = pattern.shape
        groups, blocks = -(-out // lanes), -(-in_ // block)
        group, across = pattern.rows // lanes, pattern.indices // block
        # Stretches: what a row has in a block. Their connections follow each other.
        stretch = pattern.rows.astype(np.int64) * blocks + across
        first = np.flatnonzero(np.diff(stretch, prepend=-1))
        lengths = np.diff(first, append=pattern.nnz)
        rank = np.arange(pattern.nnz) - np.repeat(first, lengths)
        cells, cell = np.unique(group[first].astype(np.int64) * blocks + across[first], return_inverse=True)
        steps = np.zeros(len(cells), np.int64)
        np.maximum.at(steps, cell, lengths)
        if steps.sum() > _MOST:
            raise ValueError(f"a packed matrix has at most 2**31 - 1 steps; this one would have {steps.sum()}")
        # Pieces of cells, and their order.
        number = -(-steps // MOST_STEPS)
        first_piece = np.cumsum(number) - number
        of_cell = np.repeat(np.arange(len(cells)), number)
        height = np.minimum(steps[of_cell] - (np.arange(len(of_cell)) - first_piece[of_cell]) * MOST_STEPS, MOST_STEPS)
        of_group = cells[of_cell] // blocks
        order = np.lexsort((-height, of_group))  # stable
        heights = height[order]
        begins = np.empty(len(order), np.int64)
        begins[order] = np.cumsum(heights) - heights
        counts = np.bincount(of_group * MOST_STEPS + MOST_STEPS - height, minlength=groups * MOST_STEPS)
        counts = counts.reshape(groups, MOST_STEPS)
        starts = np.zeros((groups + 1, 2), np.int64)
        np.cumsum(counts @ np.arange(MOST_STEPS, 0, -1), out=starts[1:, 0])
        np.cumsum(counts.sum(1), out=starts[1:, 1])
        begin = np.minimum(cells % blocks * block, in_ - block).astype(np.int32)  # the last block may overlap another
        piece = np.repeat(first_piece[cell], lengths) + rank // MOST_STEPS
        places = (begins[piece] + rank % MOST_STEPS) * lanes + pattern.rows % lanes
        indices = np.full(int(starts[-1, 0]) * lanes, PADDING, np.uint8)
        indices[places] = pattern.indices - np.repeat(begin[cell], lengths)
        columns, whole = begin[of_cell][order], indices.reshape(-1, lanes)
        return cls(
            lanes, block, pattern.shape, counts.astype(np.int32), starts.astype(np.int32), columns, whole, places
        )

    @property
    def fill(self) -> float:
        """The fraction of lanes that multiply a connection, in (0, 1]."""
        return len(self.places) / self.indices.size

    def values(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the values of the pattern's connections in this layout, shape ``(steps, lanes)``, 0 where there is none."""
        packed = np.zeros(self.indices.size, values.dtype)
        packed[self.places] = values
        return packed.reshape(self.indices.shape)
