"""Which way a GPU forms a product of the sparse form: one rule for both frameworks, by count of bytes and operations.

Nothing here was timed: rates are those of an H100's data sheet, brought down to what large programs reach, and each way's
count is of what it must move, multiply and, of the kernels in Triton, of the instructions that they are compiled to. What
different parts of the machine do counts as done at once. It tells ways apart that differ by factors, not by percents;
launches of kernels are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

__all__ = [
    "AT_ONCE",
    "LARGEST_BITS_BATCH",
    "LARGEST_PANEL",
    "PANEL_BYTES",
    "ROUND",
    "Multiply",
    "Product",
    "Way",
    "choose",
    "has_bits",
    "instructions",
    "panels",
    "seconds",
    "words_of",
]

Multiply = Literal["float64", "float32", "tf32", "half"]
Way = Literal["dense", "panels", "gathered", "cusparse", "rows", "bits", "tiles"]

PANEL_BYTES = 32 << 20  # the most that is unpacked at once: it stays in the second-level cache, 50 MB
LARGEST_PANEL = 128 << 20  # but where panels add up to a product that is as large

_MEMORY = 3.0e12  # bytes a second
_L2 = 5.5e12
_L1 = 20e12
_L1_BYTES = 128 << 10  # of what is gathered from, if it is to stay in the first-level cache
_SECTOR = 32  # bytes, the least that is read or written at a place of its own
_MULTIPLIES: dict[Multiply, float] = {"float64": 20e12, "float32": 25e12, "tf32": 170e12, "half": 340e12}  # a second
_INSTRUCTIONS = 28e12  # of each thread a second, five sixths of what can be issued
_TILE = 128  # rows of a tile
_TILE_RATE = 0.88  # of the dense product's multiplications a second
_TILES_L2 = 8e12  # bytes a second, which the dense product's rate takes, if its tiles are of 128 x 256
AT_ONCE = 4  # connections that a word looks at together when bits are formed,
ROUND = 61  # and in how many instructions
_LOADED = 1.13  # instructions of a multiplication without tensor cores, its loads included
_CUSPARSE = 5.5  # its products move, so to say, so many times what they gather: 236k connections x 2048 take 1.9 ms
LARGEST_BITS_BATCH = 16


class Product(NamedTuple):
    """W (rows, depth) of ``nnz`` connections times (depth, batch); or, sampled, (rows, batch) times (batch, depth) at them.

    ``itemsize`` is the bytes of a number of either side, ``multiply`` how the dense product multiplies them. ``transposed``,
    W is the transpose of what is stored in compressed rows. ``place_bytes`` is what is read and written, for each
    connection, to know where in a panel it is; 0 if bits say so. ``forms_bits`` is the part of forming a
    pattern's bits that the product is charged with, if it goes by them: 0 where they are kept.
    """

    rows: int
    depth: int
    nnz: int
    batch: int
    itemsize: int
    multiply: Multiply
    sampled: bool = False
    transposed: bool = False
    place_bytes: int = 8
    forms_bits: float = 0.0


def panels(product: Product) -> int:
    """Return how many panels there are, of rows that are stored or of the sampled product; 0 if a single row is too large.

    A panel has at most :data:`PANEL_BYTES`. Transposed, when each of them adds to the whole product, it may be as large as
    the product, up to :data:`LARGEST_PANEL`, so that less is moved for that.
    """
    rows, depth, most = product.rows, product.depth, PANEL_BYTES
    size = _sum_bytes(product) if product.sampled else product.itemsize
    if product.transposed:
        most = max(most, min(rows * product.batch * _sum_bytes(product), LARGEST_PANEL))
        rows, depth = depth, rows
    height = min(rows, most // max(1, depth * size))
    return -(-rows // height) if height else 0


def words_of(depth: int) -> int:
    """Return how many words of 32 bits a row of W has."""
    return -(-depth // 32)


def has_bits(rows: int, depth: int, nnz: int) -> bool:
    """Whether a pattern has bits: not if these, and the numbers beside them, take more than 32 bytes for each connection."""
    return nnz > 0 and rows * depth <= 128 * nnz


def _sum_bytes(product: Product) -> int:
    return max(4, product.itemsize)  # half types are added up in float32


def instructions(way: Literal["bits", "tiles", "sampled"], multiply: Multiply, batch: int) -> float:
    """Return how many instructions of a thread it takes to unpack a place of W, by bits to multiply it too.

    Of what the kernels are compiled to for an H100, which the tests count. ``batch`` is of one tile, at most. ``"sampled"``
    is to look at a place of a tile that was multiplied, and to write it where it is live.
    """
    if way == "bits":
        return 25 + 8 * batch if multiply == "float64" else 14.5 + 2 * batch
    if way == "sampled":
        return 14.5
    return {"float32": max(16.5, 11.5 + batch / 7), "tf32": 21 + batch / 36, "half": 16 + batch / 128}[multiply]


def seconds(way: Way, product: Product) -> float:
    """Return the time of a product by count; infinite where the way cannot be gone."""
    rows, depth, nnz, batch, size, multiply, sampled, *_ = product
    weights, connections = rows * depth, nnz * (size + 4) / _MEMORY
    sides = (rows + depth) * batch * size / _MEMORY
    multiplied = weights * batch / _MULTIPLIES[multiply]
    if way == "dense":
        return max(multiplied, weights * size / _MEMORY + sides)
    if way == "panels":
        return _seconds_by_panels(product)
    if way in ("bits", "tiles") and not has_bits(rows, depth, nnz):
        return float("inf")
    if way == "tiles":
        return _seconds_by_tiles(product) + _seconds_of_bits(product)
    if way == "bits":
        if sampled or batch > LARGEST_BITS_BATCH:
            return float("inf")
        issued = weights * instructions("bits", multiply, batch)
        read = (weights / 4 + nnz * size) / _MEMORY + sides
        return max(read, issued / _INSTRUCTIONS) + _seconds_of_bits(product)
    gathered = nnz * max(batch * size, _SECTOR)
    near = _L1 if depth * batch * size <= _L1_BYTES else _L2
    if way == "rows":  # of a sampled product the row's own side stays near
        return gathered / near + connections + sides
    if way == "gathered":  # read once, and added to or, sampled, read from, another place
        return gathered * (2 if sampled else 3) / _L2 + connections + nnz * 4 / _MEMORY + sides
    return gathered * _CUSPARSE * (2 if sampled else 1) / _L2 + connections + sides


def _seconds_by_panels(product: Product) -> float:
    """Return the time of a product whose panels are made and read in the cache: unpacked or sampled, and multiplied."""
    rows, depth, nnz, batch, size, multiply, sampled, transposed, place_bytes, _ = product
    weights, count = rows * depth, panels(product)
    if not count:
        return float("inf")
    full = weights * (_sum_bytes(product) if sampled else size)
    near = _L2 if full <= count * PANEL_BYTES else _MEMORY
    sectors, values = min(nnz * _SECTOR, full), nnz * size / _MEMORY
    if place_bytes:  # zeros in one step, places in another, and then what is at them
        unpacked = (sectors if sampled else full + sectors) / near + values + nnz * place_bytes / _MEMORY
    else:  # in one step
        issued = weights * instructions("sampled", multiply, batch) / _INSTRUCTIONS
        unpacked = max((sectors if sampled else full) / near, values + weights / 4 / _MEMORY, issued)
    added = 0.0
    if transposed:  # each panel but the first adds to the whole product
        whole = rows * batch * _sum_bytes(product)
        added = 2 * (count - 1) * whole / (_L2 if whole <= PANEL_BYTES else _MEMORY)
    sides, multiplied = (rows + depth) * batch * size / _MEMORY, weights * batch / _MULTIPLIES[multiply]
    return unpacked + max(multiplied, sides, full / near + added)


def _seconds_of_bits(product: Product) -> float:
    """Return the time in which bits are formed: indices are read, and bits and numbers written, of words side by side.

    The first connection of each word is searched for in its row, and then some at a time are looked at, as many as the
    fullest word has of those that a program forms: three standard deviations more than words have on average.
    """
    if not product.forms_bits:
        return 0.0
    places = product.rows * product.depth
    average = 32 * product.nnz / places
    rounds = min(32 / AT_ONCE, 1 + (average + 3 * math.sqrt(average)) / AT_ONCE)
    issued = places / 32 * (160 + ROUND * rounds)
    return product.forms_bits * max((product.nnz * 4 + places / 4) / _MEMORY, issued / _INSTRUCTIONS)


def _seconds_by_tiles(product: Product) -> float:
    """Return the time of a product whose tiles of W are unpacked once for each tile of the batch, or once if sampled."""
    rows, depth, nnz, batch, size, multiply, sampled, *_ = product
    if size == 8:
        return float("inf")
    weights, ieee = rows * depth, multiply == "float32"
    wide = min(128 if ieee else 256, batch)
    times = 1 if sampled else -(-batch // wide)
    packed, sides = weights / 4 + nnz * size, (rows + depth) * batch * size
    again = weights * batch * size / _TILE * (2 if sampled else 1)  # sides are read again by each tile
    near = again if sampled else times * packed + again  # beside what is written, which the dense product does too
    read = max((packed + sides) / _MEMORY, near / _TILES_L2)
    each = instructions("sampled" if sampled else "tiles", multiply, wide)
    unpacked = times * weights * each / _INSTRUCTIONS
    if ieee:  # by instructions too; a sampled product loads both its sides from near memory
        return max(read, weights * batch * (_LOADED if sampled else 1) / _INSTRUCTIONS + unpacked)
    # While one program of a multiprocessor multiplies, or one tile is multiplied, the next is unpacked.
    return max(read, weights * batch / (_TILE_RATE * _MULTIPLIES[multiply]), unpacked)


def choose(ways: Iterable[Way], product: Product) -> Way:
    """Return the way of the least time; of two alike the first."""
    return min(ways, key=lambda way: seconds(way, product))
