"""Which way a GPU forms a product of the sparse form: one rule for both frameworks, by count of bytes and operations.

Nothing here was timed: rates are those of an H100's data sheet, brought down to what large programs reach, and each way's
count is of what it must move and multiply. It tells ways apart that differ by factors, not by percents; launches of kernels
are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

__all__ = ["PANEL_BYTES", "Multiply", "Product", "Way", "choose", "panel_rows", "seconds"]

Multiply = Literal["float64", "float32", "tf32", "half"]
Way = Literal["dense", "panels", "gathered", "cusparse", "rows", "bits", "tiles"]

PANEL_BYTES = 32 << 20  # the most that is unpacked at once: it stays in the second-level cache, 50 MB

_MEMORY = 3.0e12  # bytes a second
_L2 = 5.5e12
_L1 = 20e12
_L1_BYTES = 128 << 10  # of what is gathered from, if it is to stay in the first-level cache
_SECTOR = 32  # bytes, the least that is read or written at a place of its own
_MULTIPLIES: dict[Multiply, float] = {"float64": 20e12, "float32": 25e12, "tf32": 170e12, "half": 340e12}  # a second
_SIMPLE = 25e12  # other operations of numbers a second
_BIT_OPERATIONS = 16  # on each place of a row of bits: which value is there
_CUSPARSE = 5.5  # its products move, so to say, so many times what they gather: 236k connections x 2048 take 1.9 ms
_LARGEST_BITS_BATCH = 16


class Product(NamedTuple):
    """W (rows, depth) of ``nnz`` connections times (depth, batch); or, sampled, (rows, batch) times (batch, depth) at them.

    ``itemsize`` is the bytes of a number of either side, ``multiply`` how the dense product multiplies them.
    """

    rows: int
    depth: int
    nnz: int
    batch: int
    itemsize: int
    multiply: Multiply
    sampled: bool = False


def panel_rows(product: Product) -> int:
    """Return how many rows a panel has: at most :data:`PANEL_BYTES`, 0 if a single row has more."""
    return min(product.rows, PANEL_BYTES // max(1, product.depth * product.itemsize))


def seconds(way: Way, product: Product) -> float:
    """Return the time of a product by count; infinite where the way cannot be gone."""
    rows, depth, nnz, batch, size, multiply, sampled = product
    weights, connections = rows * depth, nnz * (size + 4) / _MEMORY
    sides = (rows + depth) * batch * size / _MEMORY
    multiplied = weights * batch / _MULTIPLIES[multiply]
    if way == "dense":
        return max(multiplied, weights * size / _MEMORY + sides)
    if way == "panels":  # made and read in the cache, and, once more, the sectors where connections are
        if not panel_rows(product):
            return float("inf")
        unpacked = (2 * weights * size + min(nnz * _SECTOR, weights * size)) / _L2
        return max(multiplied, sides) + unpacked + connections
    if way in ("bits", "tiles") and nnz * 32 < weights:
        return float("inf")  # bits would take more memory than the indices do
    if way == "tiles":
        return _seconds_by_tiles(product)
    if way == "bits":
        if sampled or batch > _LARGEST_BITS_BATCH:
            return float("inf")
        return max((weights / 8 + nnz * size) / _MEMORY + sides, weights * (_BIT_OPERATIONS + batch) / _SIMPLE)
    gathered = nnz * max(batch * size, _SECTOR)
    near = _L1 if depth * batch * size <= _L1_BYTES else _L2
    if way == "rows":  # of a sampled product the row's own side stays near
        return gathered / near + connections + sides
    if way == "gathered":  # read once, and added to or, sampled, read from, another place
        return gathered * (2 if sampled else 3) / _L2 + connections + nnz * 4 / _MEMORY + sides
    return gathered * _CUSPARSE * (2 if sampled else 1) / _L2 + connections + sides


def _seconds_by_tiles(product: Product) -> float:
    """Return the time of a product whose tiles of W are unpacked once for each tile of the batch, or once if sampled."""
    rows, depth, nnz, batch, size, multiply, sampled = product
    if size == 8:
        return float("inf")
    weights, tile = rows * depth, 64 if multiply == "float32" else 128
    times = 1 if sampled else -(-batch // tile)
    packed = weights / 4 + nnz * size
    sides = weights * batch * size / tile / _L2 * (2 if sampled else 1)  # read again by each tile
    read = packed / _MEMORY + (times - 1) * packed / _L2 + sides
    return max(read, weights * batch / _MULTIPLIES[multiply] + times * weights * _BIT_OPERATIONS / _SIMPLE)


def choose(ways: Iterable[Way], product: Product) -> Way:
    """Return the way of the least time; of two alike the first."""
    return min(ways, key=lambda way: seconds(way, product))
