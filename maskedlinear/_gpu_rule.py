"""Which way a GPU forms a product of the sparse form: one rule for both frameworks, by what was measured on an H200.

Each way's time is of what it moves, multiplies and, of the kernels in Triton, of the instructions that they are compiled to,
at rates that were measured (``benchmarks/results/h200/kernels.json``), but for XLA's. It tells ways apart that differ by
factors, not by percents; copies of a side that lies another way are not counted.
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
    "WIDEST_ROW",
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

_MEMORY = 3.0e12  # bytes a second
_L2 = 5.5e12
_L1 = 20e12
_L1_BYTES = 48 << 10  # of what is gathered from, if it is to stay in the first-level cache
_SECTOR = 32  # bytes, the least that is read or written at a place of its own
_BY_ROWS = {False: (10.5e12, 6.0e12), True: (6.8e12, 4.4e12)}  # gathered a second; sampled; of half types last
# Numbers a second, not sampled and sampled, where the batch is no multiple of 16: they are not read together then.
_ONE_BY_ONE = {False: 1.1e12, True: 0.55e12}
_LEAST_COLUMNS = 64  # that cuBLAS multiplies without tensor cores, more than one
WIDEST_ROW = 128  # columns of the batch, at most, that a program of a row takes,
_ROW = 1.2e-9  # and the seconds that it takes beside
_ORDERED = 40  # bytes for each connection whose value lies in another order,
_ORDERED_L2 = 15e12  # beside which so much is gathered a second, if that takes longer than without an order
_MULTIPLIES: dict[Multiply, float] = {"float64": 20e12, "float32": 26e12, "tf32": 208e12, "half": 397e12}  # a second
# Instructions of each thread a second, of some 30e12 that can be issued: they wait for the address of a place.
_BITS = 10e12  # XLA's are taken to wait as long
_BUSY_ROWS = 4096  # that the programs by bits need to keep all multiprocessors busy
_PANELS = 20e12
_BY_XLA = 12e12  # of XLA's kernels for panels, which were not measured: between by bits and panels
_SAMPLING = 19e12  # of tiles that are multiplied first
_MULTIPLYING = 12e12  # those too, without tensor cores
# Of tiles of W · right, or of its transpose, which lies across in shared memory.
_UNPACKING: dict[tuple[Multiply, bool], float] = {
    ("tf32", False): 12.5e12,
    ("tf32", True): 7e12,
    ("half", False): 13e12,
    ("half", True): 13.5e12,
    ("float32", False): 7.5e12,
    ("float32", True): 19e12,
}
_WARPS = 8  # of a multiprocessor, that reach such a rate
_STEPS = 8  # of a tile that are worth a program,
_STEP = 2e-6  # and how many seconds a step takes at least
_TALL = 128  # rows of a tile of the dense product, and of a sampled one by tensor cores
_MULTIPROCESSORS = 132
_TILE_RATE = 0.88  # of the dense product's multiplications a second
AT_ONCE = 4  # connections that a word looks at together when bits are formed,
ROUND = 54  # and in how many instructions
_LOADED = 1.13  # instructions of a multiplication without tensor cores, its loads included
_READ_BACK = 1.25  # how many times longer than by what is moved it takes to sample a panel
_LAUNCH = 3e-6  # seconds that a kernel takes at least; of a panel there are two
_CUSPARSE = 5.5  # its products move, so to say, so many times what they gather: 236k connections x 2048 take 1.9 ms
LARGEST_BITS_BATCH = 16
_LARGEST_REDUCED_BATCH = 2  # of four XLA writes to memory which places are live


class Shape(NamedTuple):
    """How a tile of so many columns is cut, and what it takes, as the kernel is compiled for an H100.

    It is ``tall`` rows of the product; ``deep`` places of each make a step, which ``warps`` unpack in so many
    ``instructions`` of a thread for each place, beside those that multiply: in IEEE one more, for each column. A
    multiprocessor has room for so many programs ``beside`` each other.
    """

    tall: int
    deep: int
    warps: int
    beside: int
    instructions: float


# Of tiles of W · right, or of its transpose, by their columns: the shapes that took the least time.
_TILES: dict[tuple[Multiply, bool], dict[int, Shape]] = {
    ("tf32", False): {
        16: Shape(64, 64, 4, 4, 13.3),
        32: Shape(128, 64, 4, 3, 13.2),
        64: Shape(128, 64, 8, 2, 13.7),
        128: Shape(128, 32, 8, 2, 17),
        256: Shape(128, 32, 8, 1, 17.4),
    },
    ("tf32", True): {
        16: Shape(64, 64, 4, 4, 14.5),
        32: Shape(64, 64, 4, 4, 14.6),
        64: Shape(64, 32, 4, 4, 15.4),
        128: Shape(128, 32, 8, 1, 19),
        256: Shape(128, 32, 8, 1, 27.7),
    },
    ("half", False): {
        16: Shape(64, 128, 4, 4, 13.3),
        32: Shape(64, 128, 4, 4, 13.5),
        64: Shape(64, 64, 4, 4, 14.1),
        128: Shape(64, 64, 8, 2, 13.8),
        256: Shape(64, 64, 4, 2, 16.9),
    },
    ("half", True): {
        16: Shape(128, 64, 4, 4, 13.6),
        32: Shape(128, 64, 4, 3, 13.2),
        64: Shape(128, 64, 4, 3, 13.6),
        128: Shape(128, 32, 8, 2, 19.4),
        256: Shape(128, 32, 8, 1, 21.1),
    },
    ("float32", False): {
        16: Shape(128, 32, 4, 5, 15.9),
        32: Shape(128, 32, 4, 4, 18.7),
        64: Shape(128, 32, 4, 2, 20),
    },
    ("float32", True): {
        16: Shape(128, 32, 4, 5, 14.3),
        32: Shape(128, 32, 4, 4, 16.4),
        64: Shape(128, 32, 4, 2, 19.2),
    },
}


class Product(NamedTuple):
    """W (rows, depth) of ``nnz`` connections times (depth, batch); or, sampled, (rows, batch) times (batch, depth) at them.

    ``itemsize`` is the bytes of a number of either side, ``multiply`` how the dense product multiplies them. ``transposed``,
    W is the transpose of what is stored in compressed rows. ``place_bytes`` is what is read and written, for each
    connection, to know where in a panel it is; 0 if a kernel in Triton finds it, or XLA's by bits (``by_xla``).
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
    """How W x is cut into tiles of ``tall`` rows, each ``wide`` columns of the batch.

    ``deep`` places of W's rows make a step, which ``warps`` take together. A tile is shared by so many ``programs``, of
    which each takes ``steps`` at most, and what they make is added up.
    """

    tall: int
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


def unit_of(stride: int) -> int:
    """Return the largest power of two, 16 at most, that a stride is a multiple of: so many numbers lie side by side."""
    return math.gcd(stride, 16)


def _is_read_by_16(product: Product) -> bool:
    """Whether x is read in pieces of 16 bytes: if its lines are of a multiple of these."""
    stride = product.depth if is_read_along(product.multiply, product.transposed) else product.batch
    return unit_of(stride) * product.itemsize >= 16


def _cut(product: Product, wide: int) -> Tiles:
    """Return tiles of a width."""
    rows, depth, _, batch, *_ = product
    shape = _TILES[product.multiply, product.transposed][wide]
    tiles, steps = max(1, -(-rows // shape.tall) * -(-batch // wide)), max(1, -(-depth // shape.deep))
    programs = max(1, min(_MULTIPROCESSORS * shape.beside // tiles, steps // _STEPS))
    each = -(-steps // programs)
    return Tiles(shape.tall, wide, shape.deep, shape.warps, each, -(-steps // each))


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
    multiplied = _seconds_multiplied(product)
    if way == "dense":
        return max(multiplied, weights * size / _MEMORY + sides) + _LAUNCH
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
        busy = min(1, rows / _BUSY_ROWS)
        return max(read, issued / (_BITS * busy)) + _LAUNCH + _seconds_of_bits(product)
    gathered = nnz * max(batch * size, _SECTOR)
    if way == "rows":  # of a sampled product the row's own side stays near; connections are read meanwhile, in parts
        near = _L1 if depth * batch * size <= _L1_BYTES else _BY_ROWS[sampled][multiply == "half"]
        ordered = nnz * _ORDERED / _L2 + gathered / _ORDERED_L2 if product.transposed else 0
        one_by_one = nnz * _columns(batch) / _ONE_BY_ONE[sampled] if batch > 16 and unit_of(batch) * size < 16 else 0
        beside = rows * -(-batch // WIDEST_ROW) * _ROW
        return max(gathered / near, ordered, one_by_one) + connections / 2 + sides + beside + _LAUNCH
    if way == "gathered":  # read once, and added to or, sampled, read from, another place
        return gathered * (2 if sampled else 3) / _L2 + connections + nnz * 4 / _MEMORY + sides
    return gathered * _CUSPARSE * (2 if sampled else 1) / _L2 + connections + sides


def _seconds_multiplied(product: Product) -> float:
    """Return the time of the dense product's multiplications."""
    batch = product.batch
    if product.multiply == "float32" and batch > 1 and not product.sampled:
        batch = max(batch, _LEAST_COLUMNS)
    return product.rows * product.depth * batch / _MULTIPLIES[product.multiply]


def _columns(batch: int) -> int:
    """Return how many columns the programs of a row go over, those beyond the batch too."""
    wide = min(WIDEST_ROW, 1 << max(0, batch - 1).bit_length())
    return -(-batch // wide) * wide


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
    elif by_xla:  # in one step
        kernel: Literal["panel by XLA", "sampled by XLA"] = "sampled by XLA" if sampled else "panel by XLA"
        unpacked = max(full / near, values + weights / 4 / _MEMORY, weights * instructions(kernel, multiply) / _BY_XLA)
    elif sampled:
        unpacked = (sectors / near + values + nnz * 4 / _MEMORY) * _READ_BACK
    else:
        unpacked = (
            max(full / near, weights * instructions("panel", multiply) / _PANELS) + values + weights / 4 / _MEMORY
        )
    added = 0.0
    if transposed:  # each panel but the first adds to the whole product
        whole = rows * batch * _sum_bytes(product)
        added = 2 * (count - 1) * whole / (_L2 if whole <= PANEL_BYTES else _MEMORY)
    sides, multiplied = (rows + depth) * batch * size / _MEMORY, _seconds_multiplied(product)
    if multiply in ("tf32", "half"):  # of fewer tiles than multiprocessors, it takes longer, but not as many times
        tall, wide = (rows, batch) if transposed else (-(-rows // count), depth if sampled else batch)
        tiles = max(1, -(-tall // _TALL) * -(-wide // _TALL))
        multiplied /= math.sqrt(min(1, tiles / _MULTIPROCESSORS))
    if (
        transposed and multiply == "tf32"
    ):  # tensor cores take rows of a panel, not columns, the less well the fewer there are
        multiplied *= min(2, 1 + count / 8)
    return unpacked + max(multiplied, sides, full / near + added) + 2 * count * _LAUNCH


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
    return product.forms_bits * max((product.nnz * 4 + places / 4) / _MEMORY, issued / _BITS)


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
    tiles, steps, times = -(-rows // cut.tall), -(-depth // cut.deep), -(-batch // cut.wide)
    weights, columns = tiles * cut.tall * steps * cut.deep, times * cut.wide  # with what is beyond W
    packed, sides = rows * depth / 4 + nnz * size, (rows + depth) * batch * size
    again = tiles * depth * batch * size  # x is read again by each tile of W
    read = max((packed + sides) / _MEMORY, (times * packed + again) / _L2)
    kind = multiply, product.transposed
    issued, rate, multiplied = times * weights * _TILES[kind][cut.wide].instructions, _UNPACKING[kind], 0.0
    if multiply == "float32":  # by instructions, too
        issued += weights * columns
    else:
        multiplied = weights * columns / (_TILE_RATE * _MULTIPLIES[multiply])
    busy = min(1, max(1, tiles * times) * cut.programs * cut.warps / (_MULTIPROCESSORS * _WARPS))
    added = 2 * cut.programs * rows * batch * 4 / _L2 + _LAUNCH if cut.programs > 1 else 0.0
    return max(read, issued / (rate * busy) + multiplied, cut.steps * _STEP) + added + _LAUNCH


def _seconds_sampled(product: Product) -> float:
    """Return the time of a sampled product by tiles of 128 columns of W."""
    rows, depth, nnz, batch, size, multiply, *_ = product
    tall = _TALL // 2 if multiply == "float32" else _TALL
    weights = -(-rows // tall) * tall * -(-depth // _TALL) * _TALL  # with what is beyond W
    packed, sides = rows * depth / 4 + nnz * size, (rows + depth) * batch * size
    again = weights * batch * size * (1 / tall + 1 / _TALL)  # each tile reads a piece of both sides
    read = max((packed + sides) / _MEMORY, again / _L2)
    written = nnz * _SECTOR / _L2  # one by one, each to a place of its own
    if multiply == "float32":  # multiplied by instructions, too, which load both sides from near memory
        issued = weights * (instructions("sampled", multiply) + batch * _LOADED) / _MULTIPLYING
        return max(read, issued, written) + _LAUNCH
    issued, multiplied = (
        weights * instructions("sampled", multiply) / _SAMPLING,
        weights * batch / _MULTIPLIES[multiply],
    )
    return max(read, issued + multiplied / _TILE_RATE + written) + _LAUNCH


def choose(ways: Iterable[Way], product: Product) -> Way:
    """Return the way of the least time; of two alike the first."""
    return _choose(tuple(ways), product)


@lru_cache(maxsize=1024)
def _choose(ways: tuple[Way, ...], product: Product) -> Way:  # kept: counting takes as long as a small product
    return min(ways, key=lambda way: seconds(way, product))
