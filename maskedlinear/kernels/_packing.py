"""A matrix that is packed for inference: made once of a pattern and values, then multiplied with one vector, or a few.

Packing is a step of its own, because values have another order there: what is packed does not follow the values it was
made of.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from maskedlinear.kernels import _engine, _openmp
from maskedlinear.kernels._packed import Layout
from maskedlinear.kernels._permute import SLOTS, Way
from maskedlinear.pattern import SparsityPattern

__all__ = ["CHUNKS", "GRAIN", "MOST_VECTORS", "PackedMatrix", "layout_of"]

MOST_VECTORS = 4  # from five on, the products by rows are faster
_LEAST_CONNECTIONS = 2  # of a step, on average, from which permutations are faster than the products by rows
CHUNKS = 16  # that the groups are cut into
GRAIN = 4_000  # steps that are worth a thread

_CALL = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 4, ctypes.c_int64, *[ctypes.c_void_p] * 3)
_Told = ctypes.c_int64 * len(SLOTS)


def layout_of(pattern: SparsityPattern) -> Layout | None:
    """Return the layout of a pattern for this machine, or ``None`` where the products by rows are as fast.

    The rule: this machine has AVX-512 or AVX2, W has at least a group of rows and a window of columns, and a step of the
    kernel multiplies two connections or more on average; below, it would mostly multiply the zeros that fill up.
    """
    way = _engine.host().way
    if way is None or not pattern.nnz or pattern.shape[0] < way.lanes or pattern.shape[1] < way.window:
        return None
    return Layout.of(pattern, way.lanes, way.window, pattern.nnz // _LEAST_CONNECTIONS)


@cache
def _program() -> Any:
    return _CALL(_engine.address("permute_program", "float32"))


class PackedMatrix:
    """A float32 matrix W in the packed layout of this machine. It holds memory of its own; nothing in it changes.

    Attributes:
        way: how it was packed.
        fill: the fraction of its lanes that multiply a connection.
        nbytes: the bytes that it holds.
    """

    def __init__(self, layout: Layout, values: NDArray[np.float32], way: Way) -> None:
        """Pack values of the layout's connections, in the pattern's order."""
        self.way, self.fill, self.shape = way, layout.fill, layout.shape
        groups = len(layout.groups)
        height = -(-groups // CHUNKS)
        self._arrays = {
            "groups": layout.groups,
            "columns": layout.columns,
            "indices": _aligned(layout.indices),
            "values": _aligned(layout.values(np.asarray(values, np.float32))),
        }
        self.nbytes = sum(array.nbytes for array in self._arrays.values())
        sizes = {"rows": layout.shape[0], "depth": layout.shape[1], "height": height, "chunks": -(-groups // height)}
        sizes |= {"pieces": len(layout.columns), "steps": len(layout.indices)}
        told = sizes | {name: array.ctypes.data for name, array in self._arrays.items()}
        self._told = _Told(*(told[slot] for slot in SLOTS))
        self._place = ctypes.addressof(self._told)
        self._threads = len(layout.indices) // GRAIN + 1
        self._tasks: dict[int, int] = {}

    @classmethod
    def of(cls, pattern: SparsityPattern, values: NDArray[np.float32]) -> Self | None:
        """Return a packed matrix, or ``None`` where :func:`layout_of` gives no layout."""
        layout, way = layout_of(pattern), _engine.host().way
        return None if layout is None or way is None else cls(layout, values, way)

    def times(self, right: int, out: int, batch: int = 1, *, bias: int = 0, threads: int = 1) -> None:
        """Write W · x + bias to ``out`` for each of up to :data:`MOST_VECTORS` vectors, by the addresses of their first
        numbers. The bits of the result do not depend on ``threads``, nor on the other vectors.

        Args:
            right: float32, shape ``(batch, columns)``.
            out: float32, shape ``(batch, rows)``.
            batch: from 1 on.
            bias: float32, shape ``(rows,)``; 0 for none.
            threads: the most threads that take part.
        """
        task = self._tasks.get(batch) or self._tasks.setdefault(batch, _engine.address(self.way.kind, "float32", batch))
        _program()(self._place, right, bias, out, min(threads, self._threads), task, *_openmp.pool())


def _aligned(array: NDArray[Any]) -> NDArray[Any]:
    """Return a copy that begins where a register's worth of bytes does."""
    room = np.empty(array.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    made = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    made[...] = array
    return made
