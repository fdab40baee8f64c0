"""Tasks that go between a mask of bytes, or a matrix, and the connections of its rows: count, list, and put back in place.

So a product over few live weights costs what those cost, though the layer is dense: its mask is read once, eight at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from maskedlinear.kernels._emit import I8, I32, I64, PTR, Emitter, float_type, function
from maskedlinear.kernels._rows import Arguments, chunk_rows

__all__ = ["count_task", "list_task", "place_task"]


def count_task(module: ir.Module, name: str) -> None:
    """Emit the task that counts the live entries of each row of ``left``, a mask, to ``starts`` one further on."""
    with function(module, name, ir.VoidType(), [PTR, I64]) as code:
        told = Arguments(code, code.function.args[0])
        mask, starts, depth = told.pointer("left"), told.pointer("starts"), told.number("depth")
        for row, line in _lines(code, told, mask, depth):
            whole = code.times(code.over(depth, 8), 8)
            with code.while_loop([I64(0), I64(0)], _below(code, whole)) as (
                state,
                following,
            ):
                word = code.get(line, state[0], I64, I8)
                following += [code.sum(state[0], 8), code.add(state[1], code.ctpop(word))]
            total = state[1]
            with code.while_loop([whole, total], _below(code, depth)) as (state, following):
                byte = code.whole(code.get(line, state[0], I8))
                following += [code.sum(state[0], 1), code.add(state[1], byte)]
            code.put(code.trunc(state[1], I32), starts, code.sum(row, 1))


def list_task(module: ir.Module, name: str) -> None:
    """Emit the task that lists the columns of the live entries of each row in ``across``, from where the row starts."""
    with function(module, name, ir.VoidType(), [PTR, I64]) as code:
        told = Arguments(code, code.function.args[0])
        mask, starts, across = told.pointer("left"), told.pointer("starts"), told.pointer("across")
        depth = told.number("depth")

        for row, line in _lines(code, told, mask, depth):
            place = code.whole(code.get(starts, row, I32))
            whole = code.times(code.over(depth, 8), 8)
            with code.while_loop([I64(0), place], _below(code, whole)) as (
                state,
                following,
            ):
                column, word = state[0], code.get(line, state[0], I64, I8)
                with code.while_loop(
                    [word, state[1]], _left(code)
                ) as (left, onward):  # fmt: skip
                    byte = code.lshr(code.cttz(left[0], ir.IntType(1)(1)), I64(3))
                    code.put(code.trunc(code.add(column, byte), I32), across, left[1])
                    onward += [code.and_(left[0], code.sub(left[0], I64(1))), code.sum(left[1], 1)]
                following += [code.sum(column, 8), left[1]]
            place = state[1]
            with code.while_loop([whole, place], _below(code, depth)) as (state, following):
                is_live = code.icmp_unsigned("!=", code.get(line, state[0], I8), I8(0))
                with code.if_then(is_live):
                    code.put(code.trunc(state[0], I32), across, state[1])
                following += [code.sum(state[0], 1), code.add(state[1], code.zext(is_live, I64))]


def place_task(module: ir.Module, name: str, dtype: str) -> None:
    """Emit the task that writes rows of a matrix, ``out``: ``values`` at the connections, and 0 elsewhere."""
    kind = float_type(dtype)
    with function(module, name, ir.VoidType(), [PTR, I64]) as code:
        told = Arguments(code, code.function.args[0])
        starts, across, values, out = (told.pointer(slot) for slot in ("starts", "across", "values", "out"))
        depth = told.number("depth")
        size = 4 if dtype == "float32" else 8
        first, last = chunk_rows(code, told, code.function.args[1])
        with code.loop(first, last) as row:
            line = code.place(out, code.times(row, depth), kind)
            code.zero(line, code.times(depth, size))
            end = code.whole(code.get(starts, code.sum(row, 1), I32))
            with code.loop(code.whole(code.get(starts, row, I32)), end) as connection:
                column = code.whole(code.get(across, connection, I32))
                code.put(code.get(values, connection, kind), line, column)


def _lines(code: Emitter, told: Arguments, mask: Any, depth: Any) -> Any:
    """Give each row of a chunk, and where its bytes begin."""
    first, last = chunk_rows(code, told, code.function.args[1])
    with code.loop(first, last) as row:
        yield row, code.place(mask, code.times(row, depth), I8)


def _below(code: Emitter, end: Any) -> Callable[[list[Any]], Any]:
    return lambda carried: code.less(carried[0], end)


def _left(code: Emitter) -> Callable[[list[Any]], Any]:
    return lambda carried: code.icmp_unsigned("!=", carried[0], I64(0))
