"""The sampled product: dot products of rows with what they are connected to, in parts of the batch that are added up last.

A thread reads what it has packed itself, and writes sums that no other does.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from maskedlinear.kernels._emit import I64, PTR, Emitter, float_type, function
from maskedlinear.kernels._rows import (
    AHEAD,
    CHAINS,
    MOST_ROWS,
    Arguments,
    Connections,
    Pattern,
    Shape,
    chunk_rows,
    dots_of,
    line_of,
    panel_of,
    rows_by_blocks,
    sums_of,
    total_of,
    until,
)

__all__ = ["ADDED_AT_ONCE", "add_parts_task", "sddmm_task"]

ADDED_AT_ONCE = 1 << 13  # numbers of parts that a thread adds up at a time


def sddmm_task(module: ir.Module, name: str, shape: Shape, dtype: str, width: int, *, checked: bool) -> None:
    """Emit the task that forms the dot products of some rows with what they are connected to, over some tiles.

    And, where that is asked for, the sums of these rows. Tiles ``part_count`` apart belong to one part of the results:
    chunk = tile · chunks + rows, of the first ``apart`` tiles, from which it goes on to those as many further on.
    """
    kind = float_type(dtype)
    vector = ir.VectorType(kind, min(shape.lanes, width))
    count = width // vector.count
    with function(module, name, ir.VoidType(), [PTR, I64]) as code:
        cursors = code.room(I64, MOST_ROWS + AHEAD)
        told = Arguments(code, code.function.args[0])
        pattern = Pattern(code, told, dtype, checked=checked)
        chunk, chunks = code.function.args[1], told.number("chunks")
        first, last = chunk_rows(code, told, code.urem(chunk, chunks))
        for ahead in range(AHEAD):
            code.put(I64(0), cursors, MOST_ROWS + ahead)
        begin, part_count = told.number("column"), told.number("part_count")
        end = code.sum(begin, code.times(told.number("tiles"), width))
        start = code.sum(begin, code.times(code.udiv(chunk, chunks), width))
        with code.loop(start, end, code.times(told.number("apart"), width)) as column:
            tile = code.udiv(column, told.number("widest"))
            out, sums = (_part_of(code, told, slot, code.urem(tile, part_count), kind) for slot in ("out", "sums"))
            is_first = code.icmp_unsigned("==", column, code.times(tile, told.number("widest")))
            is_first = code.and_(is_first, code.less(tile, part_count))
            right, right_stride = panel_of(code, told, kind, width, column)
            left, left_stride = panel_of(code, told, kind, width, column, "left")
            with code.loop(first, last) as row:
                code.put(pattern.start(row), cursors, code.sub(row, first))
            with code.if_then(told.flag("sums")), code.loop(first, last) as row:
                line = code.place(left, code.times(row, left_stride), kind)
                parts = [code.get(line, k * vector.count, vector, kind) for k in range(count)]
                before = code.select(is_first, ir.Constant(kind, 0.0), code.get(sums, row, kind))
                code.put(code.fadd(before, sums_of(code, [total_of(code, parts)], kind)), sums, row, kind)
            for row, bound in rows_by_blocks(code, told, first, last):
                at, line = code.sub(row, first), code.place(left, code.times(row, left_stride), kind)
                place, end = code.get(cursors, at, I64), pattern.start(code.sum(row, 1))
                pattern.fetch(code.get(cursors, code.sum(at, AHEAD), I64), out)
                for together in (CHAINS, 1):
                    loop = Connections(code, pattern, together, end, bound)
                    with loop.over([place]) as (carried, following):
                        following.append(code.sum(carried[0], together))
                        columns = loop.columns(carried[0])
                        sources = [line_of(code, right, across, right_stride, kind, count) for across in columns]
                        dots = dots_of(code, line, sources, vector, count)
                        found = sums_of(code, dots, kind)
                        before = code.get(out, carried[0], found.type, kind)
                        before = code.select(is_first, ir.Constant(found.type, None), before)
                        code.put(code.fadd(before, found), out, carried[0], kind)
                    place = carried[0]
                code.put(place, cursors, at)


def _part_of(code: Emitter, told: Arguments, slot: str, part: Any, kind: Any) -> Any:
    """Return where a part of a sampled product lies, "out", or of the "sums" of rows: the first where all of it will be."""
    nnz = told.number("nnz")
    start = code.times(code.sub(part, I64(1)), code.sum(nnz, told.number("rows")))
    further = code.place(told.pointer("parts"), code.sum(start, nnz if slot == "sums" else 0), kind)
    return code.select(code.icmp_unsigned("==", part, I64(0)), told.pointer(slot), further)


def add_parts_task(module: ir.Module, name: str, dtype: str, lanes: int) -> None:
    """Emit the task that adds further parts of a sampled product, and of the sums of rows, to the first: a chunk of them."""
    kind = float_type(dtype)
    with function(module, name, ir.VoidType(), [PTR, I64]) as code:
        told = Arguments(code, code.function.args[0])
        begin = code.times(code.function.args[1], ADDED_AT_ONCE)
        end, nnz = code.sum(begin, ADDED_AT_ONCE), told.number("nnz")
        of_sums = code.select(told.flag("sums"), told.number("rows"), I64(0))
        for slot, count, before in (("out", nnz, 0), ("sums", of_sums, nnz)):
            behind = code.sum(count, before)
            start, stop = (
                code.sub(code.most(code.least(at, behind), before), code.number(before)) for at in (begin, end)
            )
            whole = code.sub(stop, code.urem(code.sub(stop, start), I64(lanes)))
            for first, last, together in ((start, whole, lanes), (whole, stop, 1)):
                taken = ir.VectorType(kind, lanes) if together > 1 else kind
                with code.loop(first, last, together) as at:
                    total = code.get(told.pointer(slot), at, taken, kind)
                    with code.while_loop([I64(1), total], until(code, told.number("part_count"), 1)) as (
                        state,
                        following,
                    ):
                        further = _part_of(code, told, slot, state[0], kind)
                        following += [code.sum(state[0], 1), code.fadd(state[1], code.get(further, at, taken, kind))]
                    code.put(state[1], told.pointer(slot), at, kind)
