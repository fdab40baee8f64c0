"""Which way a GPU forms a product of the sparse form: one rule for both frameworks, by count of bytes and operations.

Nothing here was timed: rates are those of an H100's data sheet, brought down to what large programs reach, and each way's
count is of what it must move, multiply and, of the kernels in Triton, of the instructions that they are compiled to. What
different parts of the machine do counts as done at once. It tells ways apart that differ by factors, not by percents;
launches of kernels are not counted, nor copies of a side that lies another way, nor what small products leave idle.
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
    "instructions_of_tiles",
    "is_read_along",
    "panels",
    "panels_by_bits",
    "sampled_width",
    "seconds",
    "tiles_of",
    "words_of",
]

Multiply = Literal["float64", "float32", "tf32", "half"]
Way = Literal["dense", "panels", "gathered", "cusparse", "rows", "bits", "reduced", "tiles"]

PANEL_BYTES = 32 << 20  # the most that is unpacked at once: it stays in the second-level cache, 50 MB
LARGEST_PANEL = 128 << 20  # but where panels add up to a product that is as large

_MEMORY = 3.0e12  # bytes a second
_L2 = 5.5e12
_L1 = 20e12
_L1_BYTES = 128 << 10  # of what is gathered from, if it is to stay in the first-level cache
_SECTOR = 32  # bytes, the least that is read or written at a place of its own
_MULTIPLIES: dict[Multiply, float] = {"float64": 20e12, "float32": 25e12, "tf32": 170e12, "half": 340e12}  # a second
_INSTRUCTIONS = 28e12  # of each thread a second, five sixths of what can be issued
TALL = 128  # rows of a tile
_MULTIPROCESSORS = 132
_STEPS = 8  # of a tile that are worth a program
_TILE_RATE = 0.88  # of the dense product's multiplications a second
_TILES_L2 = 8e12  # bytes a second, which the dense product's rate takes, if its tiles are of 128 x 256
AT_ONCE = 4  # connections that a word looks at together when bits are formed,
ROUND = 54  # and in how many instructions
_LOADED = 1.13  # instructions of a multiplication without tensor cores, its loads included
_CUSPARSE = 5.5  # its products move, so to say, so many times what they gather: 236k connections x 2048 take 1.9 ms
LARGEST_BITS_BATCH = 16
_LARGEST_REDUCED_BATCH = 2  # of four XLA writes to memory which places are live


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
    which each takes ``steps`` at most, and what they make is added up. A tile has ``tail`` more columns, since ``wide`` and
    ``tail`` are powers of two each.

    Of four warps, two programs fit a multiprocessor, and one unpacks while the other multiplies. One of eight is alone; by
    tensor cores the products of its two parts go on while it unpacks the next step.
    """

    wide: int
    deep: int
    warps: int
    steps: int
    programs: int
    tail: int = 0
    tall: int = TALL


@lru_cache(maxsize=1024)
def tiles_of(product: Product) -> Tiles:
    """Return how W x is cut: as takes the least time, so that W is unpacked for few tiles, and few columns too many.

    So many programs share a tile as keep all multiprocessors at work, each with one program or two, if their steps are worth
    it. Kept, since each call of a product asks twice.
    """
    has_all = product.multiply == "float32" or _is_read_by_16(product)
    most = min(max(16, _power_of_2(product.batch)), 128 if has_all else 64)
    cuts = []
    for wide in (128, 64, 32, 16):
        if wide <= most:
            longest = _longest_tail(product, wide) if wide < product.batch else 0
            tails = [tail for tail in (0, 16, 32, 64, 128) if tail <= longest]
            cuts += [_cut(product, wide, tail, beside) for tail in tails for beside in (1, 2)]
            if product.multiply == "half" and wide in tails and 16 < wide < 128:
                cuts.append(_cut(product, wide, wide, tall=TALL // 2))  # twice as many tiles, which none has to share
    return min(cuts, key=lambda cut: _seconds_as_cut(product, cut))


def _is_read_by_16(product: Product) -> bool:
    """Whether x is read in pieces of 16 bytes: if its lines are of a multiple of 16 numbers, as the compiler asks for.

    Tiles have fewer columns where not, and one part, or they would take more registers than there are.
    """
    return (product.depth if is_read_along(product.multiply, product.transposed) else product.batch) % 16 == 0


def _longest_tail(product: Product, wide: int) -> int:
    """Return how many columns more the registers have room for."""
    if product.multiply == "float32":
        at_64 = not product.transposed and _is_read_by_16(product)
        return 16 if wide in (32, 128) or (wide == 64 and at_64) else 0
    return 0 if wide < 32 else wide if _is_read_by_16(product) else 16


def _goes_on(wide: int, tail: int) -> bool:
    """Whether the product of a tile by tensor cores goes on while the next step is unpacked: its two parts take turns."""
    return tail == wide or (wide == 128 and tail > 0)


def _part_going_on(cut: Tiles) -> float:
    """Return how much of a step's product goes on while its program unpacks the next step: but a half of the first part."""
    return (cut.wide / 2 + cut.tail) / (cut.wide + cut.tail)


def _cut(product: Product, wide: int, tail: int = 0, beside: int = 1, tall: int = TALL) -> Tiles:
    """Return tiles of a size, shared by as many programs as make ``beside`` of them for each multiprocessor."""
    rows, depth, _, batch, size, *_ = product
    deep = 32 if size == 4 else 64 if tall == TALL else 256
    alone = wide == 128 if product.multiply == "float32" else _goes_on(wide, tail)
    tiles, steps = max(1, -(-rows // tall) * -(-batch // (wide + tail))), max(1, -(-depth // deep))
    programs = max(1, min(_MULTIPROCESSORS * beside // tiles, steps // _STEPS))
    each = -(-steps // programs)
    return Tiles(wide, deep, 8 if alone else 4, each, -(-steps // each), tail, tall)


def sampled_width(product: Product) -> int:
    """Return how many columns of W a tile of a sampled product has.

    With 192 in place of 128 its sides are read from near memory less often; but the last tile of a row may have more that
    are beyond W.
    """
    if product.multiply == "float32":
        return 128
    return min((192, 128), key=lambda width: _seconds_sampled(product, width))


def is_read_along(multiply: Multiply, transposed: bool) -> bool:
    """Whether tiles of W · right read right as a layer has it, (batch, depth), and as tensor cores take TF32.

    Not the transposed product of half types, which takes twice the registers then.
    """
    return not (transposed and multiply == "half")


def _power_of_2(batch: int) -> int:
    return 1 << max(0, batch - 1).bit_length()


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
        return 17 + 4.7 * batch if multiply == "float64" else 12.4 + 1.7 * batch if half else 11 + 1.8 * batch
    if way == "sampled":
        return 11.6 if multiply == "float32" else 15.5
    if way == "reduced":
        return 18 if batch == 1 else 37 if multiply == "float64" else 31
    if way in ("panel by XLA", "sampled by XLA"):
        return 23 if way == "panel by XLA" else 46
    return 19 if multiply == "float64" else 17.5 if half else 14


def instructions_of_tiles(cut: Tiles, product: Product) -> float:
    """Return how many instructions of a thread it takes to unpack a place of W in tiles, beside those that multiply.

    At most, as :func:`instructions`. In IEEE one more multiplies it, for each column.
    """
    wide, tail, multiply, transposed = cut.wide, cut.tail, product.multiply, product.transposed
    if multiply == "float32":
        alone = 29 if wide > 64 else (10 if transposed else 9.4) + wide / 10
        return alone + (0 if not tail else 5 if wide > 64 else 2.5)
    if multiply == "half" and not _is_read_by_16(product):
        return 12.5 + wide / 11 + (2.5 if tail else 0) if transposed else 12.7 if wide < 64 else 14.2
    if multiply == "half":
        return 12.3 if cut.warps == 4 else 17.5
    if cut.warps == 8:  # values of four bytes are on their way, as sides are
        return 25.8 if not transposed else 26.4 if wide <= 64 else 29 + tail / 30
    if transposed:
        return 11.5 + wide / 33 + (1 if tail else 0)
    return max(9.4 + wide / 65, 0 if _is_read_by_16(product) else 12) + (1.7 if tail else 0)


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
    if way in ("bits", "reduced", "tiles") and not has_bits(rows, depth, nnz):
        return float("inf")
    if way == "tiles":
        return _seconds_by_tiles(product) + _seconds_of_bits(product)
    if way in ("bits", "reduced"):
        if sampled or batch > (LARGEST_BITS_BATCH if way == "bits" else _LARGEST_REDUCED_BATCH):
            return float("inf")
        issued = weights * instructions(way, multiply, _power_of_2(batch))
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
    rows, depth, nnz, batch, size, multiply, sampled, transposed, place_bytes, _, by_xla = product
    weights, count = rows * depth, panels(product)
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
        issued = weights * instructions(kernel, multiply) / _INSTRUCTIONS
        unpacked = max(full / near, values + weights / 4 / _MEMORY, issued)
    added = 0.0
    if transposed:  # each panel but the first adds to the whole product
        whole = rows * batch * _sum_bytes(product)
        added = 2 * (count - 1) * whole / (_L2 if whole <= PANEL_BYTES else _MEMORY)
    sides, multiplied = (rows + depth) * batch * size / _MEMORY, weights * batch / _MULTIPLIES[multiply]
    return unpacked + max(multiplied, sides, full / near + added)


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
    return product.forms_bits * max((product.nnz * 4 + places / 4) / _MEMORY, issued / _INSTRUCTIONS)


def _seconds_by_tiles(product: Product) -> float:
    """Return the time of a product whose tiles of W are unpacked for each tile of the batch, or once if sampled."""
    if product.itemsize == 8:
        return float("inf")
    if product.sampled:
        return _seconds_sampled(product, sampled_width(product))
    return _seconds_as_cut(product, tiles_of(product))


def _seconds_as_cut(product: Product, cut: Tiles) -> float:
    """Return the time of W x by tiles."""
    rows, depth, nnz, batch, size, multiply, *_ = product
    tiles, steps, width = -(-rows // cut.tall), -(-depth // cut.deep), cut.wide + cut.tail
    weights, times = tiles * cut.tall * steps * cut.deep, -(-batch // width)  # with what is beyond W
    packed, sides = rows * depth / 4 + nnz * size, (rows + depth) * batch * size
    again = tiles * depth * batch * size  # x is read again by each tile of W
    read = max((packed + sides) / _MEMORY, (times * packed + again) / _TILES_L2)
    unpacked = times * weights * instructions_of_tiles(cut, product) / _INSTRUCTIONS
    columns = times * width
    added = 2 * cut.programs * rows * batch * 4 / _L2 if cut.programs > 1 else 0.0
    if multiply == "float32":  # by instructions, too
        return max(read, weights * columns / _INSTRUCTIONS + unpacked) + added
    multiplied = weights * columns / (_TILE_RATE * _MULTIPLIES[multiply])
    if cut.warps == 8:
        meanwhile = _part_going_on(cut) * multiplied
        return max(read, max(meanwhile, unpacked) + multiplied - meanwhile) + added
    if tiles * times * cut.programs < 1.5 * _MULTIPROCESSORS:
        return max(read, multiplied + unpacked) + added  # a program waits for its own products
    return max(read, multiplied, unpacked) + added


def _seconds_sampled(product: Product, width: int) -> float:
    """Return the time of a sampled product by tiles of so many columns of W.

    Two programs of a multiprocessor have half of its registers each: one unpacks what it has multiplied while the other one
    multiplies.
    """
    rows, depth, nnz, batch, size, multiply, *_ = product
    tall = TALL // 2 if multiply == "float32" else TALL
    weights = -(-rows // tall) * tall * -(-depth // width) * width  # with what is beyond W
    packed, sides = rows * depth / 4 + nnz * size, (rows + depth) * batch * size
    again = weights * batch * size * (1 / tall + 1 / width)  # each tile reads a piece of both sides
    read = max((packed + sides) / _MEMORY, again / _TILES_L2)
    unpacked = weights * instructions("sampled", multiply) / _INSTRUCTIONS
    if multiply == "float32":  # by instructions, too, and it loads both its sides from near memory
        return max(read, weights * batch * _LOADED / _INSTRUCTIONS + unpacked)
    return max(read, weights * batch / (_TILE_RATE * _MULTIPLIES[multiply]), unpacked)


def choose(ways: Iterable[Way], product: Product) -> Way:
    """Return the way of the least time; of two alike the first."""
    return _choose(tuple(ways), product)


@lru_cache(maxsize=1024)
def _choose(ways: tuple[Way, ...], product: Product) -> Way:  # kept: counting takes as long as a small product
    return min(ways, key=lambda way: seconds(way, product))
