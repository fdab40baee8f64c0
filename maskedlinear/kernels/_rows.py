"""The products by rows: a row of W against a few columns of the batch, which stay in registers from its first connection on.

Source of the scheme: "rows in registers". One broadcast and as many fused multiply-adds as there are registers, for each
connection. Where a row has many connections, columns of W are taken in blocks whose panel stays in the first cache.

All of it is memory-safe for any indices: an index beyond the end is taken for the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from llvmlite import ir

from maskedlinear.kernels._emit import HALF_TYPES, I32, I64, PTR, Emitter, float_type, function, item_bytes, wide
from maskedlinear.kernels._panels import COPY, STRIP

__all__ = [
    "AHEAD",
    "CHAINS",
    "MOST_ROWS",
    "ORDERED_AT_ONCE",
    "SLOTS",
    "Arguments",
    "Connections",
    "Pattern",
    "Shape",
    "chunk_rows",
    "dots_of",
    "line_of",
    "order_task",
    "pack_task",
    "panel_of",
    "rows_by_blocks",
    "spmm_task",
    "sums_of",
    "tile_columns",
    "total_of",
    "until",
    "widths",
]

CHAINS = 8  # sums that are added to at once, so that none waits for its last addition
_GROUP = 4  # connections from which on a look at all their indices at once takes less time than one at each
# Rows ahead of which indices and values are fetched: of a block, each row has a few, far from the next row's.
AHEAD = 2
_LINES = 3  # of the cache that are fetched
MOST_ROWS = 256  # of a chunk at most: with 128 sampled products took 5 % longer
ORDERED_AT_ONCE = 1 << 16  # values that a thread brings into order at a time

# What a task is told, as numbers of 64 bits: pointers, sizes, flags.
SLOTS = (
    "rows", "depth", "batch", "nnz", "starts", "across", "order", "values", "right", "right_by_batch",
    "panels", "direct", "left", "left_by_batch", "left_panels", "out", "out_by_batch", "block", "height", "chunks",
    "tasks", "column", "tiles", "widest", "threads", "bias", "parts", "out_right", "packed", "sums", "first",
    "part_count", "apart",
)  # fmt: skip


class Shape(NamedTuple):
    """How wide the kernels are: lanes of a register, and how many registers a tile has."""

    lanes: int
    registers: int = 8


def widths(shape: Shape, dtype: str) -> list[int]:
    """Return the widths of the tiles, from the widest on."""
    smallest = 2 if dtype == "float64" else 4
    width = shape.lanes * shape.registers
    found = [width]
    while width > smallest:
        width //= 2
        found.append(width)
    return found


class Arguments:
    """What a task was told, by name."""

    def __init__(self, code: Emitter, pointer: Any) -> None:
        self._code, self._pointer = code, pointer

    def number(self, name: str) -> Any:
        return self._code.get(self._pointer, SLOTS.index(name), I64)

    def pointer(self, name: str) -> Any:
        return self._code.get(self._pointer, SLOTS.index(name), PTR, I64)

    def put(self, name: str, value: Any) -> None:
        self._code.put(value, self._pointer, SLOTS.index(name))

    def flag(self, name: str) -> Any:
        return self._code.icmp_unsigned("!=", self.number(name), I64(0))


class Pattern:
    """Starts, indices and values of the rows, read at no place beyond the end.

    ``ordered``, the values lie in another order, and each is found by its place in it.
    """

    def __init__(self, code: Emitter, told: Arguments, dtype: str, *, checked: bool, ordered: bool = False) -> None:
        self._code, self._dtype, self._checked = code, dtype, checked
        self._starts, self._across = told.pointer("starts"), told.pointer("across")
        self._nnz, self._last = told.number("nnz"), code.sub(told.number("depth"), I64(1))
        self._last_value = code.sub(self._nnz, I64(1))
        self._order, self._values = (told.pointer("order") if ordered else None), told.pointer("values")

    def start(self, row: Any) -> Any:
        start = self._code.whole(self._code.get(self._starts, row, I32))
        return self._code.least(start, self._nnz) if self._checked else start

    def column(self, connection: Any, *, is_known: bool = False) -> Any:
        """Return the column of a connection, that of a group ``is_known`` to be of W."""
        column = self._code.whole(self._code.get(self._across, connection, I32))
        return self._code.least(column, self._last) if self._checked and not is_known else column

    def is_group_below(self, connection: Any, together: int, bound: Any) -> Any:
        """Whether as many connections from one on have columns below ``bound``, and places in the order that there are."""
        code, kind = self._code, ir.VectorType(I32, together)
        are_below = code.are_all_below(code.get(self._across, connection, kind, I32), bound)
        if self._order is None or not self._checked:
            return are_below
        places = code.get(self._order, connection, kind, I32)
        return code.and_(are_below, code.are_all_below(places, self._nnz))

    def fetch(self, connection: Any, numbers: Any = None) -> None:
        """Have what belongs to some connections brought into the first cache: their columns, and ``numbers``, of results.

        Without numbers, their values, or where these are.
        """
        code = self._code
        if numbers is not None:
            there = code.at(numbers, connection, wide(self._dtype))
        elif self._order is not None:
            there = code.place(self._order, connection, I32)
        else:
            there = code.at(self._values, connection, self._dtype)
        for line in range(_LINES):
            code.fetch(code.place(self._across, connection, I32), 64 * line)
            code.fetch(there, 64 * line)

    def value(self, connection: Any, *, is_known: bool = False) -> Any:
        """Return the value of a connection, that of a group ``is_known`` to have places that there are."""
        if self._order is not None:
            connection = self._code.whole(self._code.get(self._order, connection, I32))
            is_checked = self._checked and not is_known
            connection = self._code.least(connection, self._last_value) if is_checked else connection
        return self._code.read(self._values, connection, self._dtype)

    def values(self, connection: Any, lanes: int) -> Any:
        """Return the values of as many connections from one on; not of an order."""
        return self._code.read(self._values, connection, self._dtype, lanes)


def chunk_rows(code: Emitter, told: Arguments, chunk: Any) -> tuple[Any, Any]:
    """Return the rows of a chunk: the first, and that behind the last."""
    first = code.times(chunk, told.number("height"))
    return first, code.least(code.sum(first, told.number("height")), told.number("rows"))


def order_task(module: ir.Module, name: str, dtype: str) -> None:
    """Emit the task that brings some values into ``order``: chunk = a part of ``height`` of them."""
    kind = ir.IntType(8 * item_bytes(dtype))  # copied as they are
    with function(module, name, ir.VoidType(), [PTR, I64]) as code:
        told = Arguments(code, code.function.args[0])
        values, order, out = (told.pointer(slot) for slot in ("values", "order", "out"))
        nnz, first = told.number("nnz"), code.times(code.function.args[1], told.number("height"))
        with code.loop(first, code.least(code.sum(first, told.number("height")), nnz)) as place:
            source = code.least(code.whole(code.get(order, place, I32)), code.sub(nnz, I64(1)))
            code.put(code.get(values, source, kind), out, place)


def pack_task(module: ir.Module, name: str, shape: Shape, dtype: str, side: str, read_panel: int) -> None:
    """Emit the task that packs ``side``, "right" or "left", into panels: chunk = tile · strips + strip of features.

    ``read_panel`` is the address of what packs one. In the order of tiles, most of them are read by who packs them.
    """
    kind = float_type(dtype)
    with function(module, name, ir.VoidType(), [PTR, I64]) as code:
        told = Arguments(code, code.function.args[0])
        features = told.number("depth" if side == "right" else "rows")
        batch = told.number("batch")
        source, by_batch = told.pointer(side), told.number(f"{side}_by_batch")
        panels = told.pointer("panels" if side == "right" else "left_panels")
        strips, chunk = code.rounded_up(features, STRIP), code.function.args[1]
        if dtype in HALF_TYPES:  # a vector is widened
            of_tiles = code.append_basic_block()
            with code.if_then(code.icmp_unsigned("==", batch, I64(1))):
                begin = code.times(chunk, STRIP)
                end = code.least(code.sum(begin, STRIP), features)
                whole = code.sub(end, code.urem(code.sub(end, begin), I64(shape.lanes)))
                for start, stop, lanes in ((begin, whole, shape.lanes), (whole, end, 0)):
                    with code.loop(start, stop, lanes or 1) as feature:
                        code.put(code.read(source, feature, dtype, lanes), panels, feature, kind)
                code.ret_void()
            code.branch(of_tiles)
            code.position_at_end(of_tiles)
        first = code.times(code.urem(chunk, strips), STRIP)
        last = code.least(code.sum(first, STRIP), features)
        column: Any = code.sum(told.number("first"), code.times(code.udiv(chunk, strips), told.number("widest")))
        end = code.least(code.sum(column, told.number("widest")), batch)
        sizes = widths(shape, dtype)
        for width in sizes:
            stop = code.sum(column, tile_columns(code, told, column, end, width, sizes))
            with code.loop(column, stop, width) as at:
                before = code.times(_in_room(code, told, at, side), features)
                panel = code.place(panels, code.sum(before, code.times(first, width)), kind)
                where = (features, batch, at, I64(width))
                code.call_address(read_panel, COPY, [source, by_batch, *where, panel, first, last])
            column = stop


def tile_columns(code: Emitter, told: Arguments, column: Any, end: Any, width: int, sizes: list[int]) -> Any:
    """Return how many of the columns from ``column`` to ``end`` tiles of ``width`` take: the narrowest are filled up."""
    left = code.sub(end, code.least(column, end))
    if width == sizes[-1]:
        left = code.sum(left, width - 1)
    is_too_wide = code.less(told.number("widest"), width)
    return code.select(is_too_wide, I64(0), code.times(code.over(left, width), width))


def spmm_task(
    module: ir.Module,
    name: str,
    shape: Shape,
    dtype: str,
    width: int,
    write_panel: int,
    *,
    checked: bool,
    ordered: bool,
) -> None:
    """Emit the task that multiplies some rows of W with one tile of the batch: chunk = tile · chunks + rows.

    ``write_panel`` is the address of what writes a tile to the product. ``ordered``, values are found by their order: a
    pass that brought them into the pattern's order would read, write and read them, and take room for them.
    """
    kind = float_type(dtype)
    vector = ir.VectorType(kind, min(shape.lanes, width))
    count = width // vector.count
    with function(module, name, ir.VoidType(), [PTR, I64]) as code:
        tile, cursors = code.room(kind, MOST_ROWS * width), code.room(I64, MOST_ROWS + AHEAD)
        told = Arguments(code, code.function.args[0])
        pattern = Pattern(code, told, dtype, checked=checked, ordered=ordered)
        chunks, height = told.number("chunks"), code.function.args[1]
        first, last = chunk_rows(code, told, code.urem(height, chunks))
        column = code.sum(told.number("column"), code.times(code.udiv(height, chunks), width))
        panel, stride = panel_of(code, told, kind, width, column)
        zero = ir.Constant(vector, [0.0] * vector.count)
        for ahead in range(AHEAD):
            code.put(I64(0), cursors, MOST_ROWS + ahead)
        with code.loop(first, last) as row:
            at = code.sub(row, first)
            code.put(pattern.start(row), cursors, at)
            for k in range(count):
                code.put(zero, tile, code.sum(code.times(at, width), k * vector.count), kind)

        def add(sums: list[Any], connection: Any, across: Any, *, is_known: bool) -> list[Any]:
            source = line_of(code, panel, across, stride, kind, count)
            value = code.spread(pattern.value(connection, is_known=is_known), vector)
            numbers = [code.get(source, k * vector.count, vector, kind) for k in range(count)]
            return [code.multiply_add(value, *pair) for pair in zip(numbers, sums, strict=True)]

        for row, bound in rows_by_blocks(code, told, first, last):
            at = code.sub(row, first)
            mine = code.times(at, width)
            sums = [code.get(tile, code.sum(mine, k * vector.count), vector, kind) for k in range(count)]
            place, end = code.get(cursors, at, I64), pattern.start(code.sum(row, 1))
            pattern.fetch(code.get(cursors, code.sum(at, AHEAD), I64))
            for together in sorted({max(1, CHAINS // count), 1}, reverse=True):
                others = [zero] * (count * (together - 1))
                loop = Connections(code, pattern, together, end, bound)
                with loop.over([place, *sums, *others]) as (carried, following):
                    following.append(code.sum(carried[0], together))
                    for one, across in enumerate(loop.columns(carried[0])):
                        part = carried[1 + one * count : 1 + (one + 1) * count]
                        following.extend(add(part, code.sum(carried[0], one), across, is_known=loop.is_known))
                place, *parts = carried
                sums = [total_of(code, parts[k::count]) for k in range(count)]
            code.put(place, cursors, at)
            for k, total in enumerate(sums):
                code.put(total, tile, code.sum(mine, k * vector.count), kind)
        with code.if_then(told.flag("bias")), code.loop(first, last) as row:
            number = code.spread(code.read(told.pointer("bias"), row, dtype), vector)
            for k in range(count):
                here = code.sum(code.times(code.sub(row, first), width), k * vector.count)
                code.put(code.fadd(code.get(tile, here, vector, kind), number), tile, here, kind)
        sizes = (told.number("rows"), told.number("batch"), column, I64(width))
        target = (told.pointer("out"), told.number("out_by_batch"))
        code.call_address(write_panel, COPY, [*target, *sizes, tile, first, last])


def panel_of(code: Emitter, told: Arguments, kind: Any, width: int, column: Any, side: str = "") -> tuple[Any, Any]:
    """Return where the panel of a column starts, and how far its features lie from each other: packed, or as they came."""
    features, panels = ("rows", "left_panels") if side else ("depth", "panels")
    direct = told.flag("direct")
    start = code.times(_in_room(code, told, column, side or "right"), told.number(features))
    start = code.select(direct, column, start)
    return code.place(told.pointer(panels), start, kind), code.select(direct, told.number("batch"), I64(width))


def _in_room(code: Emitter, told: Arguments, column: Any, side: str) -> Any:
    """Return the column of the room for panels in which one of the batch is: those on the right give way to the next.

    So what is packed stays in the second cache. Panels on the left stay, for the product that reads them afterwards.
    """
    return code.sub(column, told.number("first")) if side == "right" else column


def line_of(code: Emitter, panel: Any, feature: Any, stride: Any, kind: Any, registers: int) -> Any:
    """Return where a feature's numbers lie in a panel, of which as many ``registers`` are read."""
    line = code.place(panel, code.times(feature, stride), kind)
    return code.in_register(line) if registers > 1 else line


def rows_by_blocks(code: Emitter, told: Arguments, first: Any, last: Any) -> Iterator[tuple[Any, Any]]:
    """Give each row of a chunk, block by block, and the column that is behind the block; behind the last is none."""
    block, depth = told.number("block"), told.number("depth")
    with code.loop(0, depth, block) as beginning:
        bound = code.sum(beginning, block)
        bound = code.select(code.less(bound, depth), bound, depth)
        with code.loop(first, last) as row:
            yield row, bound


class Connections:
    """A loop over a row's connections in a block, ``together`` at a time; the first value carried says where it is."""

    def __init__(self, code: Emitter, pattern: Pattern, together: int, end: Any, bound: Any) -> None:
        self._code, self._pattern, self._together, self._end, self._bound = code, pattern, together, end, bound
        self._last: Any = None
        self.is_known = together >= _GROUP  # whether indices are looked at together, and need no look each

    def over(self, starts: list[Any]) -> AbstractContextManager[tuple[list[Any], list[Any]]]:
        return self._code.while_loop(starts, until(self._code, self._end, self._together), self._is_in_block)

    def _is_in_block(self, carried: list[Any]) -> Any:
        if self.is_known:
            return self._pattern.is_group_below(carried[0], self._together, self._bound)
        self._last = self._pattern.column(self._code.sum(carried[0], self._together - 1))
        return self._code.less(self._last, self._bound)

    def columns(self, place: Any) -> list[Any]:
        """Return the columns of the connections that are taken together."""
        places = [self._code.sum(place, one) for one in range(self._together)]
        if self.is_known:
            return [self._pattern.column(one, is_known=True) for one in places]
        return [*map(self._pattern.column, places[:-1]), self._last]


def until(code: Emitter, end: Any, together: int) -> Callable[[list[Any]], Any]:
    """Return the condition that ``together`` of what is counted are left before ``end``."""
    return lambda carried: code.less(code.sum(carried[0], together - 1), end)


def total_of(code: Emitter, parts: list[Any]) -> Any:
    while len(parts) > 1:
        parts = [code.fadd(*parts[at : at + 2]) for at in range(0, len(parts), 2)]
    return parts[0]


def dots_of(code: Emitter, line: Any, sources: list[Any], vector: Any, count: int) -> list[Any]:
    """Return, lane by lane, the dot products of one row with some."""
    totals: list[Any] = []
    for k in range(count):
        side = code.get(line, k * vector.count, vector, vector.element)
        others = [code.get(source, k * vector.count, vector, vector.element) for source in sources]
        totals = (
            [code.multiply_add(side, *pair) for pair in zip(others, totals, strict=True)]
            if totals
            else [code.fmul(side, other) for other in others]
        )
    return totals


def sums_of(code: Emitter, vectors: list[Any], kind: Any) -> Any:
    """Return the sums of the lanes of some vectors, as one vector; of one vector as a number.

    Two vectors are added up to one, which has partial sums of both, until there is one; numbers are of powers of two.
    """
    lanes, many = vectors[0].type.count, len(vectors)
    if many > lanes:  # two halves, side by side
        halves = [sums_of(code, part, kind) for part in (vectors[: many // 2], vectors[many // 2 :])]
        return code.lanes(halves[0], halves[1], range(many)) if many > 2 else _pair(code, halves)
    group = lanes
    while len(vectors) > 1:
        group //= 2
        half = len(vectors) // 2
        low = [
            lane % group + 2 * group * (lane // (2 * group)) + (lanes if lane & group else 0) for lane in range(lanes)
        ]
        high = [lane + group for lane in low]
        vectors = [
            code.fadd(code.lanes(one, other, low), code.lanes(one, other, high))
            for one, other in zip(vectors[:half], vectors[half:], strict=True)
        ]
    total = vectors[0]
    while group > 1:  # partial sums of one vector lie side by side
        group //= 2
        places = [lane * 2 * group + one for lane in range(total.type.count // (2 * group)) for one in range(group)]
        total = code.fadd(code.lanes(total, total, places), code.lanes(total, total, [lane + group for lane in places]))
    return code.extract_element(total, I32(0)) if many == 1 else total


def _pair(code: Emitter, numbers: list[Any]) -> Any:
    pair = ir.Constant(ir.VectorType(numbers[0].type, 2), ir.Undefined)
    for place, number in enumerate(numbers):
        pair = code.insert_element(pair, number, I32(place))
    return pair
