"""Which way a GPU forms a product of the sparse form: one rule for both frameworks, by what was measured on an H100.

Each way's time is of what it moves, multiplies and, of the kernels in Triton, of the instructions that they are compiled to,
at rates that were measured (``benchmarks/results/h100``). XLA's kernels, which were not, are taken to wait as Triton's do.
It tells ways apart that differ by factors, not by percents; launches of kernels are not counted, nor copies of a side that
lies another way, nor what small products leave idle.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Literal, NamedTuple

__all__ = [
    "AT_ONCE",
    "LARGEST_BITS_BATCH",
    "LARGEST_PANEL",
    "PANEL_BYTES",
    "ROUND",
    "TALL",
    "Multiply",
    "Product",
    "Tiles",
    "Way",
    "choose",
    "has_bits",
    "instructions",
    "is_read_along",
    "panels",
    "panels_by_bits",
    "seconds",
    "tiles_of",
    "words_of",
]

Multiply = Literal["float64", "float32", "tf32", "half"]
Way = Literal["dense", "panels", "gathered", "cusparse", "rows", "bits", "reduced", "tiles"]

PANEL_BYTES = 32 << 20  # of a panel that stays in the second-level cache, 50 MB
LARGEST_PANEL = 128 << 20  # the most that is unpacked at once

_MEMORY = 2.4e12  # bytes a second
_L2 = 5.5e12
_L1 = 20e12
_L1_BYTES = 48 << 10  # of what is gathered from, if it is to stay in the first-level cache
_SECTOR = 32  # bytes, the least that is read or written at a place of its own
_BY_ROWS = {False: (8.8e12, 6.3e12), True: (6.5e12, 4.0e12)}  # gathered a second; sampled; of half types last
_ORDERED = 40  # bytes for each connection whose value lies in another order,
_ORDERED_L2 = 10e12  # beside which so much is gathered a second, if that takes longer than without an order
_MULTIPLIES: dict[Multiply, float] = {"float64": 20e12, "float32": 26e12, "tf32": 208e12, "half": 397e12}  # a second
# Instructions of each thread a second, a third of what can be issued: they wait for the address of a place.
_UNPACKING = 10e12
_SAMPLING = 7e12  # of tiles and panels that are multiplied first
_MULTIPLYING = 12e12  # without tensor cores
_WARPS = 8  # of a multiprocessor, for that
_STEPS = 8  # of a tile that are worth a program
TALL = 128  # rows of a tile
_MULTIPROCESSORS = 132
_TILE_RATE = 0.88  # of the dense product's multiplications a second
AT_ONCE = 4  # connections that a word looks at together when bits are formed,
ROUND = 54  # and in how many instructions
_LOADED = 1.13  # instructions of a multiplication without tensor cores, its loads included
_PANEL = 4e-6  # seconds that a panel takes more, as it takes two kernels
_CUSPARSE = 5.5  # its products move, so to say, so many times what they gather: 236k connections x 2048 take 1.9 ms
LARGEST_BITS_BATCH = 16
_LARGEST_REDUCED_BATCH = 2  # of four XLA writes to memory which places are live

# Of tiles of W · right, or of its transpose, by their columns: how many instructions of a thread it takes to unpack a place,
# beside those that multiply, and how many programs a multiprocessor has registers for. Of what the kernels are compiled to
# for an H100, as the tests count; in IEEE one instruction more multiplies it, for each column.
_TILES: dict[tuple[Multiply, bool], dict[int, tuple[float, int]]] = {
    ("tf32", False): {16: (13.2, 4), 32: (13.2, 3), 64: (14.9, 3), 128: (17, 2), 256: (17.4, 1)},
    ("tf32", True): {16: (13.1, 3), 32: (13.5, 2), 64: (15.2, 3), 128: (19, 1), 256: (27.7, 1)},
    ("half", False): {16: (13.5, 4), 32: (13.1, 3), 64: (13.3, 2), 128: (18.2, 2), 256: (18.5, 1)},
    ("half", True): {16: (13.6, 4), 32: (13.2, 3), 64: (13.6, 3), 128: (19.4, 2), 256: (21.1, 1)},
    ("float32", False): {16: (15.9, 5), 32: (18.7, 4), 64: (20, 2)},
    ("float32", True): {16: (14.3, 5), 32: (16.4, 4), 64: (19.2, 2)},
}


class Product(NamedTuple):
    """W (rows, depth) of ``nnz`` connections times (depth, batch); or, sampled, (rows, batch) times (batch, depth) at them.

    ``itemsize`` is the bytes of a number of either side, ``multiply`` how the dense product multiplies them. ``transposed``,
    W is the transpose of what is stored in compressed rows. ``place_bytes`` is what is read and written, for each
    connection, to know where in a panel it is; 0 if bits say so, to a kernel in Triton, or to XLA's (``by_xla``).
    ``forms_bits`` is the part of forming a pattern's bits that the product is charged with, if it goes by them: 0 where they
    are kept.
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
    by_xla: bool = False


def panels(product: Product) -> int:
    """Return how many panels there are, of rows that are stored or of the sampled product; 0 if a single row is too large.

    A panel of at most :data:`PANEL_BYTES` stays in the cache; of one as large as :data:`LARGEST_PANEL` the product takes
    less time, and it adds to the product of a transpose less often.
    """
    rows, depth = (product.depth, product.rows) if product.transposed else (product.rows, product.depth)
    row = max(1, depth * (_sum_bytes(product) if product.sampled else product.itemsize))
    most_bytes = {PANEL_BYTES, min(2 * PANEL_BYTES, LARGEST_PANEL), LARGEST_PANEL}
    heights = {min(rows, most // row) for most in most_bytes}
    counts = sorted({-(-rows // height) for height in heights if height}, reverse=True)
    return min(counts, key=lambda count: _seconds_by_panels(product, count), default=0)


def panels_by_bits(product: Product) -> Product:
    """Return a product, whose bits are kept, as XLA forms its panels in less time: by these, or by two indices a connection.

    It is ``by_xla``, then, or as it was.
    """
    by_bits = product._replace(place_bytes=0, by_xla=True)
    return min(by_bits, product, key=lambda of: seconds("panels", of))


def words_of(depth: int) -> int:
    """Return how many words of 32 bits a row of W has."""
    return -(-depth // 32)


def has_bits(rows: int, depth: int, nnz: int) -> bool:
    """Whether a pattern has bits: not if these, and the numbers beside them, take more than 32 bytes for each connection."""
    return nnz > 0 and rows * depth <= 128 * nnz


class Tiles(NamedTuple):
    """How W x is cut into tiles of :data:`TALL` rows, each ``wide`` columns of the batch.

    ``deep`` places of W's rows make a step, which ``warps`` take together. A tile is shared by so many ``programs``, of
    which each takes ``steps`` at most, and what they make is added up.
    """

    wide: int
    deep: int
    warps: int
    steps: int
    programs: int


@lru_cache(maxsize=1024)
def tiles_of(product: Product) -> Tiles:
    """Return how W x is cut: as takes the least time, so that W is unpacked for few tiles, and few columns too many.

    So many programs share a tile as a GPU has registers for, if their steps are worth it: each waits for what it reads, and
    more of them wait at once. Kept, since each call of a product asks twice.
    """
    most = max(16, 1 << max(0, product.batch - 1).bit_length())
    if product.multiply == "half" and not _is_read_by_16(product):
        most = min(most, 128)  # one number after the other, they would take more registers than there are
    widths = [wide for wide in _TILES[product.multiply, product.transposed] if wide <= most]
    return min((_cut(product, wide) for wide in widths), key=lambda cut: _seconds_as_cut(product, cut))


def _is_read_by_16(product: Product) -> bool:
    """Whether x is read in pieces of 16 bytes: if its lines are of a multiple of 16 numbers, as the compiler asks for."""
    return (product.depth if is_read_along(product.multiply, product.transposed) else product.batch) % 16 == 0


def _cut(product: Product, wide: int) -> Tiles:
    """Return tiles of a width."""
    rows, depth, _, batch, size, *_ = product
    _, beside = _TILES[product.multiply, product.transposed][wide]
    deep = 64 if wide <= (0 if product.multiply == "float32" else 128 // size) else 32
    tiles, steps = max(1, -(-rows // TALL) * -(-batch // wide)), max(1, -(-depth // deep))
    programs = max(1, min(_MULTIPROCESSORS * beside // tiles, steps // _STEPS))
    each = -(-steps // programs)
    return Tiles(wide, deep, 4 if wide <= 64 else 8, each, -(-steps // each))


def is_read_along(multiply: Multiply, transposed: bool) -> bool:
    """Whether tiles of W · right read right as a layer has it, (batch, depth), and as tensor cores take TF32.

    Not the transposed product of half types, which takes twice the registers then.
    """
    return not (transposed and multiply == "half")


def _sum_bytes(product: Product) -> int:
    return max(4, product.itemsize)  # half types are added up in float32


def instructions(
    way: Literal["bits", "reduced", "sampled", "panel", "panel by XLA", "sampled by XLA"],
    multiply: Multiply,
    batch: int = 0,
) -> float:
    """Return how many instructions of a thread it takes to go over a place of W by bits; ``batch``, to multiply it, too.

    At most, of what the kernels are compiled to for an H100, which the tests count. ``"sampled"`` is to look at a place of a
    tile that was multiplied, and to write it where it is live; ``"panel"`` to go over one. XLA's kernels look at some places
    together in a panel that they unpack, and at one in a sampled one; ``"reduced"``, they multiply them too.
    """
    half = multiply == "half"
    if way == "bits":
        return 17 + 4.7 * batch if multiply == "float64" else 12.6 + 1.7 * batch if half else 11 + 1.8 * batch
    if way == "sampled":
        return 12.4 if multiply == "float32" else 14.2
    if way == "reduced":
        return 18 if batch == 1 else 37 if multiply == "float64" else 31
    if way in ("panel by XLA", "sampled by XLA"):
        return 23 if way == "panel by XLA" else 46
    return 19 if multiply == "float64" else 17.5 if half else 16


def seconds(way: Way, product: Product) -> float:
    """Return the time of a product by count; infinite where the way cannot be gone."""
    rows, depth, nnz, batch, size, multiply, sampled, *_ = product
    weights, connections = rows * depth, nnz * (size + 4) / _MEMORY
    sides = (rows + depth) * batch * size / _MEMORY
    multiplied = weights * batch / _MULTIPLIES[multiply]
    if way == "dense":
        return max(multiplied, weights * size / _MEMORY + sides)
    if way == "panels":
        return _seconds_by_panels(product, panels(product))
    if way in ("bits", "reduced", "tiles") and not has_bits(rows, depth, nnz):
        return float("inf")
    if way == "tiles":
        return _seconds_by_tiles(product) + _seconds_of_bits(product)
    if way in ("bits", "reduced"):
        if sampled or batch > (LARGEST_BITS_BATCH if way == "bits" else _LARGEST_REDUCED_BATCH):
            return float("inf")
        issued = weights * instructions(way, multiply, 1 << max(0, batch - 1).bit_length())
        read = (weights / 4 + nnz * size) / _MEMORY + sides
        return max(read, issued / _UNPACKING) + _seconds_of_bits(product)
    gathered = nnz * max(batch * size, _SECTOR)
    if way == "rows":  # of a sampled product the row's own side stays near
        near = _L1 if depth * batch * size <= _L1_BYTES else _BY_ROWS[sampled][multiply == "half"]
        ordered = nnz * _ORDERED / _L2 + gathered / _ORDERED_L2 if product.transposed else 0
        return max(gathered / near, ordered) + connections + sides
    if way == "gathered":  # read once, and added to or, sampled, read from, another place
        return gathered * (2 if sampled else 3) / _L2 + connections + nnz * 4 / _MEMORY + sides
    return gathered * _CUSPARSE * (2 if sampled else 1) / _L2 + connections + sides


def _seconds_by_panels(product: Product, count: int) -> float:
    """Return the time of a product by so many panels, which are made and read: unpacked or sampled, and multiplied."""
    rows, depth, nnz, batch, size, multiply, sampled, transposed, place_bytes, _, by_xla = product
    weights = rows * depth
    if not count:
        return float("inf")
    full = weights * (_sum_bytes(product) if sampled else size)
    near = _L2 if full <= count * PANEL_BYTES else _MEMORY
    sectors, values = min(nnz * _SECTOR, full), nnz * size / _MEMORY
    if place_bytes:  # zeros in one step, places in another, and then what is at them
        unpacked = (sectors if sampled else full + sectors) / near + values + nnz * place_bytes / _MEMORY
    else:  # in one step
        kernel: Literal["panel", "panel by XLA", "sampled by XLA"] = "panel"
        if by_xla:
            kernel = "sampled by XLA" if sampled else "panel by XLA"
        rate = _SAMPLING if sampled and not by_xla else _UNPACKING
        unpacked = max(full / near, values + weights / 4 / _MEMORY, weights * instructions(kernel, multiply) / rate)
    added = 0.0
    if transposed:  # each panel but the first adds to the whole product
        whole = rows * batch * _sum_bytes(product)
        added = 2 * (count - 1) * whole / (_L2 if whole <= PANEL_BYTES else _MEMORY)
    sides, multiplied = (rows + depth) * batch * size / _MEMORY, weights * batch / _MULTIPLIES[multiply]
    if multiply in ("tf32", "half"):  # of fewer tiles than multiprocessors, it takes longer, but not as many times
        tall, wide = (rows, batch) if transposed else (-(-rows // count), depth if sampled else batch)
        tiles = max(1, -(-tall // TALL) * -(-wide // TALL))
        multiplied /= math.sqrt(min(1, tiles / _MULTIPROCESSORS))
    if (
        transposed and multiply == "tf32"
    ):  # tensor cores take rows of a panel, not columns, the less well the fewer there are
        multiplied *= min(2, 1 + count / 8)
    return unpacked + max(multiplied, sides, full / near + added) + count * _PANEL


def _seconds_of_bits(product: Product) -> float:
    """Return the time in which bits are formed: indices are read, and bits and numbers written, of words side by side.

    The first connection of each word is searched for in its row, and then some at a time are looked at, as many as the
    fullest word has of the 64 that a program forms: two and a half standard deviations more than words have on average.
    """
    if not product.forms_bits:
        return 0.0
    places = product.rows * product.depth
    average = 32 * product.nnz / places
    rounds = min(32 / AT_ONCE, 1 + (average + 2.5 * math.sqrt(average)) / AT_ONCE)
    issued = places / 32 * (160 + ROUND * rounds)
    return product.forms_bits * max((product.nnz * 4 + places / 4) / _MEMORY, issued / _UNPACKING)


def _seconds_by_tiles(product: Product) -> float:
    """Return the time of a product whose tiles of W are unpacked for each tile of the batch, or once if sampled."""
    if product.itemsize == 8:
        return float("inf")
    if product.sampled:
        return _seconds_sampled(product)
    return _seconds_as_cut(product, tiles_of(product))


def _seconds_as_cut(product: Product, cut: Tiles) -> float:
    """Return the time of W x by tiles: a step is unpacked, and multiplied."""
    rows, depth, nnz, batch, size, multiply, *_ = product
    tiles, steps, times = -(-rows // TALL), -(-depth // cut.deep), -(-batch // cut.wide)
    weights, columns = tiles * TALL * steps * cut.deep, times * cut.wide  # with what is beyond W
    packed, sides = rows * depth / 4 + nnz * size, (rows + depth) * batch * size
    again = tiles * depth * batch * size  # x is read again by each tile of W
    read = max((packed + sides) / _MEMORY, (times * packed + again) / _L2)
    issued, rate = times * weights * _TILES[multiply, product.transposed][cut.wide][0], _UNPACKING
    multiplied = 0.0
    if multiply == "float32":  # by instructions, too
        issued, rate = issued + weights * columns, _MULTIPLYING
    else:
        multiplied = weights * columns / (_TILE_RATE * _MULTIPLIES[multiply])
    busy = min(1, max(1, tiles * times) * cut.programs * cut.warps / (_MULTIPROCESSORS * _WARPS))
    added = 2 * cut.programs * rows * batch * 4 / _L2 if cut.programs > 1 else 0.0
    return max(read, issued / (rate * busy) + multiplied) + added


def _seconds_sampled(product: Product) -> float:
    """Return the time of a sampled product by tiles of 128 columns of W."""
    rows, depth, nnz, batch, size, multiply, *_ = product
    tall = TALL // 2 if multiply == "float32" else TALL
    weights = -(-rows // tall) * tall * -(-depth // TALL) * TALL  # with what is beyond W
    packed, sides = rows * depth / 4 + nnz * size, (rows + depth) * batch * size
    again = weights * batch * size * (1 / tall + 1 / TALL)  # each tile reads a piece of both sides
    read = max((packed + sides) / _MEMORY, again / _L2)
    issued, multiplied = weights * instructions("sampled", multiply) / _SAMPLING, 0.0
    if multiply == "float32":  # by instructions, too, and it loads both its sides from near memory
        issued = weights * (instructions("sampled", multiply) + batch * _LOADED) / _MULTIPLYING
    else:
        multiplied = weights * batch / (_TILE_RATE * _MULTIPLIES[multiply])
    return max(read, issued + multiplied)


def choose(ways: Iterable[Way], product: Product) -> Way:
    """Return the way of the least time; of two alike the first."""
    return _choose(tuple(ways), product)


@lru_cache(maxsize=1024)
def _choose(ways: tuple[Way, ...], product: Product) -> Way:  # kept: counting takes as long as a small product
    return min(ways, key=lambda way: seconds(way, product))
