"""The product of a packed matrix with vectors: x's numbers are picked from registers by permutations, none is gathered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from llvmlite import ir

from maskedlinear.kernels._emit import I8, I32, I64, PTR, Emitter, float_type, function
from maskedlinear.kernels._packed import MOST_STEPS
from maskedlinear.kernels._pool import PARALLEL

__all__ = ["PROGRAM", "SLOTS", "WAYS", "Way", "emit_program", "permute_task", "pick"]

# What a packed matrix tells, as numbers of 64 bits.
SLOTS = (
    "rows", "depth", "height", "chunks", "pieces", "steps", "counts", "starts", "columns", "indices", "values",
)  # fmt: skip
_CALL = ("matrix", "right", "bias", "out")  # what a call tells

# a matrix, x, bias or 0, y, most threads, the task, how it is run in parallel, and the pool
PROGRAM = ir.FunctionType(ir.VoidType(), [*[PTR] * 4, I64, *[PTR] * 3])


class Way(NamedTuple):
    """How numbers are picked.

    Attributes:
        instruction: ``"avx512"``, ``"avx2"``, or ``"any"``, lane by lane, which any processor can do, to test by.
        lanes: the rows of a group: 16 with AVX-512, 8 with AVX2.
        block: the columns of a block: those of the registers that one instruction picks from, two with AVX-512.
    """

    instruction: str
    lanes: int
    block: int

    @property
    def kind(self) -> str:
        """What the compiler is asked for."""
        return f"permute_{self.instruction}"


WAYS = {way.kind: way for way in (Way("avx512", 16, 32), Way("avx2", 8, 8), Way("any", 16, 32))}


def emit_program(module: ir.Module, name: str) -> None:
    """Emit what runs a task over the chunks of a matrix: told by arguments, so that callers may share a matrix."""
    with function(module, name, ir.VoidType(), PROGRAM.args) as code:
        *told, threads, task, parallel, pool = code.function.args
        call = code.room(I64, len(_CALL))
        for place, one in enumerate(told):
            code.put(one, call, place, I64)
        chunks = code.get(told[0], SLOTS.index("chunks"), I64)
        code.call_pointer(parallel, PARALLEL, [pool, threads, task, call, chunks])


def permute_task(module: ir.Module, name: str, way: Way, batch: int = 1, *, checked: bool = False) -> None:
    """Emit the task that multiplies a chunk of a float32 matrix' groups of rows with ``batch`` vectors at once.

    x has the shape ``(batch, columns)`` and y ``(batch, rows)``. Each sum is formed in the same order, whatever the batch.
    ``checked``, it reads no memory but that of x and the matrix, whatever the arrays of the layout hold.
    """
    kind = float_type("float32")
    vector = ir.VectorType(kind, way.lanes)
    with function(module, name, ir.VoidType(), [PTR, I64]) as code:
        told, chunk = code.function.args
        matrix, right, bias, out = (code.get(told, place, PTR, I64) for place in range(len(_CALL)))
        at = {slot: code.get(matrix, place, I64) for place, slot in enumerate(SLOTS)}
        counts, starts, columns, indices, values = (code.inttoptr(at[slot], PTR) for slot in SLOTS[6:])
        rows, depth = at["rows"], at["depth"]
        first = code.times(chunk, at["height"])
        last = code.least(code.sum(first, at["height"]), code.over(code.sum(rows, way.lanes - 1), way.lanes))
        room = code.room(kind, way.block)
        zero = ir.Constant(vector, [0.0] * way.lanes)
        with code.loop(first, last) as group:
            step = code.whole(code.get(starts, code.times(group, 2), I32))
            piece = code.whole(code.get(starts, code.sum(code.times(group, 2), 1), I32))
            if checked:
                step, piece = code.least(step, at["steps"]), code.least(piece, at["pieces"])
            sums = [zero] * (2 * batch)  # of even and of odd steps, which do not wait for each other
            for place in range(MOST_STEPS):
                height = MOST_STEPS - place
                count = code.whole(code.get(counts, code.sum(code.times(group, MOST_STEPS), place), I32))
                if checked:
                    count = code.least(count, code.sub(at["pieces"], piece))
                    count = code.least(count, code.over(code.sub(at["steps"], step), height))
                with _pieces(code, [piece, step, *sums], code.sum(piece, count)) as (carried, following):
                    column = code.whole(code.get(columns, carried[0], I32))
                    column = code.least(column, code.sub(depth, I64(way.block))) if checked else column
                    blocks = [
                        [
                            code.get(right, code.sum(code.times(depth, one), column, part), vector, kind)
                            for part in range(0, way.block, way.lanes)
                        ]
                        for one in range(batch)
                    ]
                    sums = list(carried[2:])
                    for k in range(height):
                        here = code.times(code.sum(carried[1], k), way.lanes)
                        index = code.get(indices, here, ir.VectorType(I8, way.lanes), I8)
                        index = code.sext(index, ir.VectorType(I32, way.lanes))
                        is_live = code.icmp_signed(">=", index, ir.Constant(index.type, None))
                        value = code.get(values, here, vector, kind)
                        for one, numbers in enumerate(blocks):
                            sum_ = 2 * one + k % 2
                            picked = pick(code, way, numbers, index, room)
                            picked = code.select(is_live, picked, zero)  # what fills up meets no NaN and no infinity
                            sums[sum_] = code.multiply_add(value, picked, sums[sum_])
                    following += [code.sum(carried[0], 1), code.sum(carried[1], height), *sums]
                piece, step, *sums = carried
            for one in range(batch):
                row = code.times(group, way.lanes)
                target = code.place(out, code.sum(code.times(rows, one), row), kind)
                _put(code, code.fadd(sums[2 * one], sums[2 * one + 1]), target, bias, row, rows, room)


def _pieces(code: Emitter, starts: list[Any], end: Any) -> Any:
    """Return a loop over pieces; the first value says which one it is at."""
    return code.while_loop(starts, lambda carried: code.less(carried[0], end))


def _put(code: Emitter, total: Any, target: Any, bias: Any, row: Any, rows: Any, rest: Any) -> None:
    """Write a group's sums, plus the bias if there is one, as many as there are rows."""
    kind, lanes = total.type.element, total.type.count
    has_bias = code.icmp_unsigned("!=", code.ptrtoint(bias, I64), I64(0))
    left = code.sub(rows, row)
    with code.if_else(code.less(left, lanes)) as (partly, whole):
        with partly:
            code.put(total, rest, 0, kind)
            with code.loop(0, left) as lane:
                code.put(code.get(rest, lane, kind), target, lane)
                with code.if_then(has_bias):
                    shift = code.get(bias, code.sum(row, lane), kind)
                    code.put(code.fadd(code.get(rest, lane, kind), shift), target, lane)
        with whole:
            code.put(total, target, 0, kind)
            with code.if_then(has_bias):
                code.put(code.fadd(total, code.get(bias, row, total.type, kind)), target, 0, kind)


def pick(code: Emitter, way: Way, numbers: Sequence[Any], index: Any, room: Any = None) -> Any:
    """Return for each lane the number of a block that its index says; ``room`` for a block if any processor is to do it."""
    vector = numbers[0].type
    if way.instruction == "avx512":
        return code.intrinsic("llvm.x86.avx512.vpermi2var.ps.512", vector, [numbers[0], index, numbers[1]])
    if way.instruction == "avx2":
        return code.intrinsic("llvm.x86.avx2.permps", vector, [numbers[0], index])
    for place, one in enumerate(numbers):
        code.put(one, room, place * way.lanes, vector.element)
    picked = ir.Constant(vector, ir.Undefined)
    for lane in range(way.lanes):
        place = code.and_(code.extract_element(index, I32(lane)), I32(way.block - 1))
        one = code.get(room, code.whole(place), vector.element)
        picked = code.insert_element(picked, one, I32(lane))
    return picked
