"""Whole products as programs: which tasks run, one after the other, each divided among the threads of a pool.

A program is told what its tasks are told, how to run a task in parallel, and the pool. It is the same whoever calls it, and
plans for itself: how many threads take part, in chunks of how many rows, over how many columns of W at a time.
Tasks are found by address, because each is compiled when a batch first needs it.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from maskedlinear.kernels._emit import I64, PTR, Emitter, function
from maskedlinear.kernels._panels import STRIP
from maskedlinear.kernels._pool import PARALLEL
from maskedlinear.kernels._rows import MOST_ROWS, Arguments, tile_columns
from maskedlinear.kernels._sampled import ADDED_AT_ONCE

__all__ = ["ADD_PARTS", "GRAIN", "PACK_LEFT", "PACK_RIGHT", "PROGRAM", "VECTOR", "WIDTHS", "emit_program", "run_task"]

# The entries of the table of tasks; from the last on, one a width.
PACK_RIGHT, PACK_LEFT, VECTOR, ADD_PARTS, WIDTHS = range(5)
PROGRAM = ir.FunctionType(I64, [PTR, PTR, PTR])  # what it is told, the parallel way, the pool

_BLOCK_BYTES = 32 << 10  # of a panel's block at least: the first cache; at most twice that
_PANEL_BYTES = 256 << 10  # of a panel, in the second cache
# Of a panel that is not halved again, to stay there: beyond, tiles half as wide took 0.57 to 0.93 of the time, once 1.07.
_MOST_PANEL_BYTES = 3 << 19
# Connections of a row that a block should have, on average, and from which blocks pay, in the widest tiles; in those half as
# wide twice as many, since what a block costs is there once a row, and what it saves with each column of the batch.
_FULL_BLOCK, _FEWEST_IN_BLOCK = 16, 10
# They pay from more on where a batch fills one tile of the widest, and W is of few rows and columns: what one thread packs
# and another reads costs up to a quarter of a product there, which takes 0.75 to 0.95 of the time in two tiles half as wide.
_FEWEST_IF_ALONE, _TOO_MANY_FEATURES = 13, 1536
# They pay from fewer on where a panel without blocks is too large for a second cache.
_FAR_BYTES, _FEWEST_IF_FAR = 1 << 20, 7
# Of panels that are packed before they are multiplied, for who reads them: the second cache. If all is packed first, sampled
# products of a per cent take up to 1.6 times as long, others 1.08 times.
_TOGETHER_BYTES = 1 << 20
_FEWEST_READ = 2  # times that a line of a panel is read, on average, for which it is worth it that it lies near
GRAIN = 40_000  # additions of vectors that are worth a thread
_COPIED = 3  # additions that take as long as it takes to copy one vector to a panel, or from one


def emit_program(module: ir.Module, name: str, dtype: str, sizes: list[int], *, sampled: bool) -> None:
    """Emit ``name(told, parallel, pool)``: spmm, or, ``sampled``, sddmm, by tiles of the widths ``sizes``.

    Tiles are packed and multiplied group by group, as many as stay in the second cache between the two.
    It returns 0, or, if a task is not compiled yet, 1 more than its entry in the table: compile it, tell all again, and
    call it again. Panels of the right side that are ``packed`` already, in tiles as wide as its own, are read as they are.
    A sampled product of some tiles has up to ``part_count`` parts, which are added up last: a thread has tiles of its own.
    """
    with function(module, name, I64, PROGRAM.args) as code:
        told = Arguments(code, code.function.args[0])
        item_bytes = 8 if dtype == "float64" else 4
        batch, threads = told.number("batch"), _plan(code, told, sizes, item_bytes)
        chunks, widest = told.number("chunks"), told.number("widest")
        depth, rows, nnz = (told.number(name) for name in ("depth", "rows", "nnz"))

        def run(task: int, pieces: Any) -> None:
            run_task(code, told, task, pieces, threads)

        is_direct = code.icmp_unsigned("!=", told.number("direct"), I64(0))
        is_packed = code.or_(is_direct, code.icmp_unsigned("==", told.number("packed"), widest))
        tiles = code.rounded_up(batch, widest)
        # A thread reads its own tiles, or, of a sampled product in one part, all.
        parts, features, readers = I64(1), depth, threads
        if sampled:  # one thread forms the same sums in one part, where each part would be one whole tile
            most = code.most(told.number("part_count"), 1)
            is_one = code.icmp_unsigned("==", code.times(code.least(most, tiles), widest), batch)
            is_one = code.and_(is_one, code.less(threads, 2))
            parts = code.select(is_one, I64(1), code.least(most, tiles))
            told.put("part_count", parts)
            features, readers = code.sum(depth, rows), code.select(code.less(parts, 2), I64(1), threads)
        few = code.most(code.over(_TOGETHER_BYTES, code.times(features, widest, item_bytes)), 1)
        is_whole = is_packed if sampled else code.or_(is_packed, code.less(nnz, code.times(depth, _FEWEST_READ)))
        group = code.select(is_whole, tiles, code.times(few, readers))
        with code.loop(0, tiles, group) as first:
            together = code.least(group, code.sub(tiles, first))
            told.put("first", code.times(first, widest))
            with code.if_then(code.not_(is_direct)):
                with code.if_then(code.not_(is_packed)):
                    run(PACK_RIGHT, code.times(together, code.rounded_up(depth, STRIP)))
                if sampled:
                    run(PACK_LEFT, code.times(together, code.rounded_up(rows, STRIP)))
            with code.if_then(code.icmp_unsigned("==", batch, I64(1))):
                run(VECTOR, chunks)
                code.ret(I64(0))
            column: Any = code.times(first, widest)
            end = code.least(code.sum(column, code.times(together, widest)), batch)
            for place, width in enumerate(sizes):
                taken = tile_columns(code, told, column, end, width, sizes)
                with code.if_then(code.icmp_unsigned("!=", taken, I64(0))):
                    of_width = code.over(taken, width)
                    told.put("column", column)
                    told.put("tiles", of_width)
                    apart: Any = of_width
                    if sampled:  # narrower ones are of the tile that they fill together
                        is_widest = code.icmp_unsigned("==", I64(width), widest)
                        apart = code.select(is_widest, code.least(parts, of_width), I64(1))
                        told.put("apart", apart)
                    run(WIDTHS + place, code.times(apart, chunks))
                column = code.sum(column, taken)
        if sampled:
            sums = code.select(told.flag("sums"), rows, I64(0))
            with code.if_then(code.less(1, parts)):
                run(ADD_PARTS, code.rounded_up(code.sum(nnz, sums), ADDED_AT_ONCE))
        code.ret(I64(0))


def _plan(code: Emitter, told: Arguments, sizes: list[int], item_bytes: int) -> Any:
    """Emit the choice of chunks and blocks, which is told to the tasks, and return how many threads take part.

    Blocks, in whose order a row's terms are added up, do not depend on threads.
    """
    rows, depth, batch, nnz = (told.number(name) for name in ("rows", "depth", "batch", "nnz"))
    counted = code.sum(nnz, code.times(code.sum(rows, depth), _COPIED))
    work = code.over(code.times(counted, code.over(code.sum(batch, 7), 8)), GRAIN)
    threads = code.least(told.number("threads"), code.sum(work, 1))
    # Some chunks for each thread, of whole cache lines of a product by batch.
    height = code.times(code.rounded_up(code.rounded_up(rows, code.times(threads, 4)), 16), 16)
    most = code.select(code.less(batch, sizes[0]), I64(MOST_ROWS // 2), I64(MOST_ROWS))  # short chunks end together
    height = code.least(code.most(height, 16), most)
    width: Any = I64(sizes[-1])
    for size in reversed(sizes):  # that of the first tile
        width = code.select(code.less(batch, size), width, I64(size))
    # How far a row's connections are from each other, in sixteenths of a column.
    distance = code.over(code.times(rows, depth, 16), code.most(nnz, 1))
    narrower = code.over(sizes[0], width)
    least = code.most(code.over(_BLOCK_BYTES // item_bytes, width), 16)
    columns = code.over(code.times(distance, narrower, _FULL_BLOCK), 16)
    columns = code.least(code.most(columns, least), code.times(least, 2))
    panel_bytes = code.times(depth, code.least(width, sizes[1]), item_bytes)
    is_far = code.less(_FAR_BYTES, panel_bytes)
    # One tile of the widest can be two, of which a thread reads what it packs itself.
    is_alone = code.and_(code.less(sizes[1], batch), code.less(batch, sizes[0] + 1))
    is_alone = code.and_(is_alone, code.less(code.most(rows, depth), _TOO_MANY_FEATURES))
    fewest = code.times(narrower, code.select(is_alone, I64(_FEWEST_IF_ALONE), I64(_FEWEST_IN_BLOCK)))
    fewest = code.select(is_far, I64(_FEWEST_IF_FAR), fewest)
    is_full = code.less(code.times(distance, fewest), code.sum(code.times(columns, 16), 1))
    # Without blocks the panel of all columns stays in the second cache, down to a quarter of the widest tile.
    fits = code.less(code.times(depth, sizes[0] * item_bytes), _PANEL_BYTES + 1)
    fits = code.and_(fits, code.not_(is_alone))
    is_larger = code.less(_MOST_PANEL_BYTES, code.times(depth, sizes[1] * item_bytes))
    is_larger = code.and_(is_larger, code.less(code.times(depth, _FEWEST_READ), nnz))
    unblocked = code.select(fits, I64(sizes[0]), code.select(is_larger, I64(sizes[2]), I64(sizes[1])))
    told.put("widest", code.select(is_full, I64(sizes[0]), unblocked))
    told.put("height", height)
    told.put("chunks", code.rounded_up(rows, height))
    told.put("block", code.select(is_full, columns, code.most(depth, 1)))
    return threads


def run_task(code: Emitter, told: Arguments, task: int, chunks: Any, threads: Any) -> None:
    pointer, parallel, pool = code.function.args
    address = code.get(told.pointer("tasks"), task, I64)
    with code.if_then(code.icmp_unsigned("==", address, I64(0))):
        code.ret(I64(task + 1))
    code.call_pointer(parallel, PARALLEL, [pool, threads, code.inttoptr(address, PTR), pointer, chunks])
