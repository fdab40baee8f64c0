"""Both gradients of a product with W at once, for the few columns of a small batch: one pass over W's own rows.

By two products each connection is read twice, the second time in the order of columns, in which its value must be looked up.
Here a row adds to what belongs to its columns, in parts: each part has some rows and sums of its own, which are added up in
their order, so that the bits depend on no number of threads.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from maskedlinear.kernels._emit import I64, PTR, float_type, function, item_bytes, wide
from maskedlinear.kernels._panels import COPY, STRIP
from maskedlinear.kernels._programs import ADD_PARTS, GRAIN, PACK_LEFT, PACK_RIGHT, PROGRAM, WIDTHS, run_task
from maskedlinear.kernels._rows import (
    CHAINS,
    MOST_ROWS,
    Arguments,
    Connections,
    Pattern,
    Shape,
    chunk_rows,
    dots_of,
    panel_of,
    sums_of,
)

__all__ = ["PARTS", "add_parts_task", "emit_program", "gradients_task"]

PARTS = 8  # of the rows of W, each with sums of its own


def gradients_task(module: ir.Module, name: str, shape: Shape, dtype: str, width: int, *, checked: bool) -> None:
    """Emit the task of one part, a chunk, and of one register of ``width`` columns: dot products, and sums for columns."""
    kind = float_type(dtype)
    vector = ir.VectorType(kind, width)
    with function(module, name, ir.VoidType(), [PTR, I64]) as code:
        told, part = Arguments(code, code.function.args[0]), code.function.args[1]
        pattern = Pattern(code, told, dtype, checked=checked)
        depth, out = told.number("depth"), told.pointer("out")
        right, right_stride = panel_of(code, told, kind, width, I64(0))
        left, left_stride = panel_of(code, told, kind, width, I64(0), "left")
        sums = code.place(told.pointer("parts"), code.times(part, depth, width), kind)
        code.zero(sums, code.times(depth, width * item_bytes(wide(dtype))))
        first, last = chunk_rows(code, told, part)
        with code.loop(first, last) as row:
            line = code.place(left, code.times(row, left_stride), kind)
            mine = code.get(line, 0, vector, kind)
            with code.if_then(told.flag("sums")):
                total = code.fadd(ir.Constant(kind, 0.0), sums_of(code, [mine], kind))
                code.put(total, told.pointer("sums"), row, kind)
            place, end = pattern.start(row), pattern.start(code.sum(row, 1))
            for together in (CHAINS, 1):
                loop = Connections(code, pattern, together, end, depth)
                with loop.over([place]) as (carried, following):
                    following.append(code.sum(carried[0], together))
                    columns = loop.columns(carried[0])
                    sources = [code.place(right, code.times(across, right_stride), kind) for across in columns]
                    dots = sums_of(code, dots_of(code, line, sources, vector, 1), kind)
                    dots = code.fadd(ir.Constant(dots.type, None), dots)  # no zero is negative, as by sddmm
                    code.put(dots, out, carried[0], kind)
                    for one, across in enumerate(columns):
                        value = code.spread(pattern.value(code.sum(carried[0], one)), vector)
                        target = code.place(sums, code.times(across, width), kind)
                        code.put(code.multiply_add(value, mine, code.get(target, 0, vector, kind)), target, 0, kind)
                place = carried[0]


def add_parts_task(module: ir.Module, name: str, dtype: str, smallest: int, widest: int, write_panel: int) -> None:
    """Emit the task that adds up the sums of all parts, for as many columns of W as a tile has: a chunk of them.

    ``smallest`` and ``widest`` are widths of panels, ``write_panel`` is the address of what writes one to a matrix.
    """
    kind = float_type(dtype)
    vector = ir.VectorType(kind, smallest)
    with function(module, name, ir.VoidType(), [PTR, I64]) as code:
        tile = code.room(kind, MOST_ROWS * widest)
        told = Arguments(code, code.function.args[0])
        depth, width, parts = told.number("depth"), told.number("widest"), told.pointer("parts")
        first = code.times(code.function.args[1], MOST_ROWS)
        last = code.least(code.sum(first, MOST_ROWS), depth)
        start = code.times(first, width)
        with code.loop(0, code.times(code.sub(last, first), width), smallest) as at:
            total: Any = None
            for part in range(PARTS):
                here = code.sum(code.times(depth, width, part), start, at)
                mine = code.get(parts, here, vector, kind)
                total = mine if total is None else code.fadd(total, mine)
            code.put(total, tile, at, kind)
        target = (told.pointer("out_right"), told.number("right_by_batch"))
        code.call_address(write_panel, COPY, [*target, depth, told.number("batch"), I64(0), width, tile, first, last])


def emit_program(module: ir.Module, name: str, sizes: list[int]) -> None:
    """Emit ``name(told, parallel, pool)``: it returns what the other programs do. ``widest`` is the width of the panels."""
    with function(module, name, I64, PROGRAM.args) as code:
        told = Arguments(code, code.function.args[0])
        rows, depth = told.number("rows"), told.number("depth")
        work = code.over(code.sum(code.times(told.number("nnz"), 2), code.times(depth, 2 * PARTS)), GRAIN)
        threads = code.least(told.number("threads"), code.sum(work, 1))
        told.put("height", code.rounded_up(rows, PARTS))
        with code.if_then(code.icmp_unsigned("==", told.number("direct"), I64(0))):
            run_task(code, told, PACK_RIGHT, code.rounded_up(depth, STRIP), threads)
            run_task(code, told, PACK_LEFT, code.rounded_up(rows, STRIP), threads)
        for place, width in enumerate(sizes):
            with code.if_then(code.icmp_unsigned("==", told.number("widest"), I64(width))):
                run_task(code, told, WIDTHS + place, I64(PARTS), threads)
        run_task(code, told, ADD_PARTS, code.rounded_up(depth, MOST_ROWS), threads)
        code.ret(I64(0))
