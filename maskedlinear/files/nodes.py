"""Masks as matrices (out, in) of nodes, from the places that are live: no array of a weight's shape is made."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from maskedlinear.checkpoint import MaskedArray
from maskedlinear.models import WeightAxes, axes_by_name

__all__ = ["Nodes", "Panel", "entropy_bits"]

_TILES = 256  # of a picture, along each axis


@dataclass(frozen=True)
class Nodes:
    """The nodes that a mask's live entries join, of a stack of matrices one below the other.

    Attributes:
        outputs: of each live entry, its matrix and output; shape ``(nnz,)``.
        inputs: of each its matrix and input; shape ``(nnz,)``.
        shape: ``(stacked, out, in)``.
    """

    outputs: NDArray[np.int64]
    inputs: NDArray[np.int64]
    shape: tuple[int, int, int]

    @classmethod
    def of(cls, name: str, array: MaskedArray) -> Nodes | None:
        """Return those of an array; ``None`` if neither its file nor its name says which axes are outputs and inputs."""
        axes = array.axes or axes_by_name(name, len(array.shape))
        if axes is None or axes == WeightAxes.of_entries(len(array.shape)):
            return None
        return cls.by_axes(array, axes)

    @classmethod
    def by_axes(cls, array: MaskedArray, axes: WeightAxes) -> Nodes:
        """Return those of an array by these axes."""
        batch, out, in_ = axes.order(len(array.shape))
        coordinates: list[NDArray[np.int64]] = []
        rest = array.places
        for size in reversed(array.shape):
            rest, coordinate = np.divmod(rest, max(size, 1))
            coordinates.insert(0, coordinate)

        def flat(along: tuple[int, ...]) -> NDArray[np.int64]:
            found = np.zeros(array.nnz, np.int64)
            for axis in along:
                found = found * array.shape[axis] + coordinates[axis]
            return found

        return cls(flat(batch + out), flat(batch + in_), axes.matrix_shape(array.shape))

    @property
    def dead_outputs(self) -> int:
        """How many outputs have no live input, in all matrices of the stack."""
        count = self.shape[0] * self.shape[1]
        return count - _distinct(self.outputs, count)

    @property
    def dead_inputs(self) -> int:
        """How many inputs no output uses, in all matrices of the stack."""
        count = self.shape[0] * self.shape[2]
        return count - _distinct(self.inputs, count)

    def densities(self, most: int) -> NDArray[np.float64]:
        """Return the live share of each tile of the mask, at most ``most`` by ``most`` of them; small masks as they are."""
        stacked, out, in_ = self.shape
        height, width = stacked * out, in_
        tall, wide = (max(1, -(-count // most)) for count in (height, width))  # the size of a tile
        rows, columns = -(-height // tall), -(-width // wide)
        tiles = self.outputs // tall * columns + self.inputs % max(in_, 1) // wide
        live = np.bincount(tiles, minlength=rows * columns).reshape(rows, columns)
        heights, widths = (
            np.minimum(size, count - size * np.arange(number))
            for size, count, number in ((tall, height, rows), (wide, width, columns))
        )
        return np.asarray(live / np.outer(heights, widths), np.float64)


@dataclass(frozen=True)
class Panel:
    """A mask as a picture.

    Attributes:
        name: its array's.
        of: the array's shape.
        sparsity: the fraction that is masked, in [0, 1].
        tiles: the live share of each tile, outputs down and inputs across.
        shape: how many outputs and inputs there are.
        labels: what they are called.
    """

    name: str
    of: tuple[int, ...]
    sparsity: float
    tiles: NDArray[np.float64]
    shape: tuple[int, int]
    labels: tuple[str, str]

    @classmethod
    def from_array(cls, name: str, array: MaskedArray, nodes: Nodes | None) -> Panel:
        """Return the picture of an array's mask; where nobody knows its nodes, its first axis against the others."""
        ndim = len(array.shape)
        outputs, inputs = "outputs", "inputs"
        if nodes is None and ndim > 1:
            nodes = Nodes.by_axes(array, WeightAxes(0, tuple(range(1, ndim))))
            outputs, inputs = "axis 0", "axis 1" if ndim == 2 else f"axes 1 to {ndim - 1}"
        elif nodes is None:
            nodes = Nodes.by_axes(array, WeightAxes.of_entries(ndim))
            outputs, inputs = "", "axis 0"
        stacked, out, in_ = nodes.shape
        if stacked != 1:
            outputs += f" of {stacked} matrices"
        return cls(name, array.shape, array.sparsity, nodes.densities(_TILES), (stacked * out, in_), (outputs, inputs))


def _distinct(indices: NDArray[np.int64], count: int) -> int:
    """Return how many different ones there are of ``count``; a file may claim many nodes and have few connections."""
    if count > 16 * len(indices) + 2**20:
        return len(np.unique(indices))
    there = np.zeros(count, bool)
    there[indices] = True
    return int(np.count_nonzero(there))


def entropy_bits(size: int, live: int) -> float:
    """Return the bits that a random mask of this density takes on average: ``size`` times its entropy."""
    if not 0 < live < size:
        return 0.0
    density = live / size
    return -size * (density * math.log2(density) + (1 - density) * math.log1p(-density) / math.log(2))
