"""The product of a packed matrix with vectors: x's numbers are picked from registers by permutations, none is gathered."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from llvmlite import ir

from maskedlinear.kernels._emit import I8, I32, I64, PTR, Emitter, float_type, function
from maskedlinear.kernels._packed import MOST_STEPS
from maskedlinear.kernels._pool import PARALLEL

__all__ = ["PROGRAM", "SLOTS", "WAYS", "Way", "emit_program", "permute_task", "pick"]

# What a packed matrix tells, as numbers of 64 bits.
SLOTS = (
    "rows", "depth", "height", "chunks", "pieces", "steps", "groups", "columns", "indices", "values",
)  # fmt: skip
_CALL = ("matrix", "right", "bias", "out")  # what a call tells

# a matrix, x, bias or 0, y, most threads, the task, how it is run in parallel, and the pool
PROGRAM = ir.FunctionType(ir.VoidType(), [*[PTR] * 4, I64, *[PTR] * 3])


class Way(NamedTuple):
    """How numbers are picked.

    Attributes:
        instruction: ``"avx512"``, ``"avx2"``, or ``"any"``, lane by lane, which any processor can do, to test by.
        lanes: the rows of a group: 16 with AVX-512, 8 with AVX2.
        window: the columns of the window, two registers: with AVX-512 one instruction picks from both.
    """

    instruction: str
    lanes: int
    window: int

    @property
    def kind(self) -> str:
        """What the compiler is asked for."""
        return f"permute_{self.instruction}"

    @property
    def picks_from_pairs(self) -> bool:
        """Whether one instruction picks from two registers."""
        return self.instruction != "avx2"


WAYS = {way.kind: way for way in (Way("avx512", 16, 32), Way("avx2", 8, 16), Way("any", 16, 32))}


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
    ``checked``, it reads no memory but that of x and the matrix, and writes none but that of y, whatever the arrays of the
    layout hold; their dtypes and sizes are for its caller to check. Which rows of y it writes, the matrix says.
    """
    kind = float_type("float32")
    vector = ir.VectorType(kind, way.lanes)
    with function(module, name, ir.VoidType(), [PTR, I64]) as code:
        told, chunk = code.function.args
        matrix, right, bias, out = (code.get(told, place, PTR, I64) for place in range(len(_CALL)))
        at = {slot: code.get(matrix, place, I64) for place, slot in enumerate(SLOTS)}
        groups, columns, indices, values = (code.inttoptr(at[slot], PTR) for slot in SLOTS[6:])
        rows, depth = at["rows"], at["depth"]
        first = code.times(chunk, at["height"])
        last = code.least(code.sum(first, at["height"]), code.over(code.sum(rows, way.lanes - 1), way.lanes))
        room, furthest = code.room(kind, way.window), code.sub(depth, I64(way.window))
        zero = ir.Constant(vector, [0.0] * way.lanes)
        with code.loop(first, last) as group:
            own = code.place(groups, code.times(group, MOST_STEPS + 2 + way.lanes), I32)
            step, piece = (code.whole(code.get(own, MOST_STEPS + place, I32)) for place in range(2))
            if checked:
                step, piece = code.least(step, at["steps"]), code.least(piece, at["pieces"])
            sums = [zero] * (2 * batch)  # of even and of odd steps, which do not wait for each other
            for place in range(MOST_STEPS):
                height = MOST_STEPS - place
                count = code.whole(code.get(own, place, I32))
                if checked:
                    count = code.least(count, code.sub(at["pieces"], piece))
                    count = code.least(count, code.over(code.sub(at["steps"], step), height))
                at_step = code.times(step, way.lanes)
                places = (
                    code.place(columns, piece, I32),
                    code.place(indices, at_step, I8),
                    code.place(values, at_step, kind),
                )
                step, piece = code.sum(step, code.times(count, height)), code.sum(piece, count)
                end = code.place(columns, piece, I32)
                with code.while_loop([*places, *sums], partial(_is_before, code, end)) as (carried, following):
                    column = code.whole(code.get(carried[0], 0, I32))
                    column = code.least(column, furthest) if checked else column
                    numbers = [
                        [
                            code.get(right, code.sum(code.times(depth, one), column, part), vector, kind)
                            for part in range(0, way.window, way.lanes)
                        ]
                        for one in range(batch)
                    ]
                    sums = list(carried[3:])
                    for k in range(height):
                        index = code.get(carried[1], k * way.lanes, ir.VectorType(I8, way.lanes), I8)
                        is_live = code.icmp_signed(">=", index, ir.Constant(index.type, None))
                        value = code.get(carried[2], k * way.lanes, vector, kind)
                        for one, of_window in enumerate(numbers):
                            sum_ = 2 * one + k % 2
                            picked = pick(code, way, of_window, index, room)
                            picked = code.select(is_live, picked, zero)  # what fills up meets no NaN and no infinity
                            sums[sum_] = code.multiply_add(value, picked, sums[sum_])
                    following.append(code.place(carried[0], 1, I32))
                    following += [
                        code.place(one, height * way.lanes, of)
                        for one, of in zip(carried[1:3], (I8, kind), strict=True)
                    ]
                    following += sums
                sums = carried[3:]
            for one in range(batch):
                code.put(code.fadd(sums[2 * one], sums[2 * one + 1]), room, 0, kind)
                target = code.place(out, code.times(rows, one), kind)
                _put(code, room, target, bias, code.place(own, MOST_STEPS + 2, I32), way.lanes, rows)


def _is_before(code: Emitter, end: Any, carried: list[Any]) -> Any:
    return code.icmp_unsigned("<", carried[0], end)


def _put(code: Emitter, sums: Any, target: Any, bias: Any, of_lane: Any, lanes: int, rows: Any) -> None:
    """Write a group's sums, plus the bias if there is one, to their rows, where they are rows."""
    kind = float_type("float32")
    has_bias = code.icmp_unsigned("!=", code.ptrtoint(bias, I64), I64(0))
    with code.loop(0, I64(lanes)) as lane:
        row = code.whole(code.get(of_lane, lane, I32))
        with code.if_then(code.icmp_unsigned("<", row, rows)):
            total = code.get(sums, lane, kind)
            with code.if_else(has_bias) as (shifted, plain):
                with shifted:
                    code.put(code.fadd(total, code.get(bias, row, kind)), target, row)
                with plain:
                    code.put(total, target, row)


def pick(code: Emitter, way: Way, numbers: Sequence[Any], index: Any, room: Any = None) -> Any:
    """Return for each lane the number, of those that registers hold one after the other, that its index says.

    ``room`` for as many numbers, if any processor is to do it. What an index beyond them picks is not defined.
    """
    vector = numbers[0].type
    whole = index if index.type.element == I32 else code.sext(index, ir.VectorType(I32, way.lanes))
    if way.instruction == "any":
        for place, one in enumerate(numbers):
            code.put(one, room, place * way.lanes, vector.element)
        picked = ir.Constant(vector, ir.Undefined)
        for lane in range(way.lanes):
            place = code.and_(code.extract_element(whole, I32(lane)), I32(len(numbers) * way.lanes - 1))
            one = code.get(room, code.whole(place), vector.element)
            picked = code.insert_element(picked, one, I32(lane))
        return picked
    at_once, picked = 2 if way.instruction == "avx512" else 1, None  # registers, by the lower bits of indices
    for start in range(0, len(numbers), at_once):
        if way.instruction == "avx512":
            operands = [numbers[start], whole, numbers[start + 1]]
            some = code.intrinsic("llvm.x86.avx512.vpermi2var.ps.512", vector, operands)
        else:
            some = code.intrinsic("llvm.x86.avx2.permps", vector, [numbers[start], whole])
        if picked is not None:
            is_here = code.icmp_signed(">=", index, ir.Constant(index.type, [start * way.lanes] * way.lanes))
            some = code.select(is_here, some, picked)
        picked = some
    return picked
