"""The packed product that XLA calls: its handler checks the sizes of arrays, and its tasks check what is in them."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from llvmlite import ir

from maskedlinear.kernels import _engine, _xla
from maskedlinear.kernels._emit import I64, PTR, function, item_bytes
from maskedlinear.kernels._packed import MOST_STEPS
from maskedlinear.kernels._packing import CHUNKS, GRAIN, MOST_VECTORS
from maskedlinear.kernels._permute import PROGRAM, SLOTS

__all__ = ["compile_task", "handler", "target"]

_VERSION = 2  # of what the handler is handed: raise it when operands, results or the layout change
_OPERANDS, _RESULTS = 5, 1
_tasks = (ctypes.c_int64 * (MOST_VECTORS + 1))()  # by how many vectors they multiply; 0 if not compiled yet


def target() -> str:
    """Return the name by which XLA knows the handler, which says the way of packing."""
    way = _engine.host().way
    return f"maskedlinear_{way.kind if way else 'none'}_v{_VERSION}"


def compile_task(batch: int) -> int:
    """Have the task for some vectors compiled."""
    way = _engine.host().way
    assert way is not None
    _tasks[batch] = _engine.address(way.kind, "float32", batch, checked=True)
    return _tasks[batch]


def _compile_missing(batch: int) -> int:
    """Compile a task for a program that XLA kept from another process; return 0 if that failed."""
    try:
        return compile_task(batch)
    except Exception:  # there is nobody here to raise it to: the handler tells XLA
        return 0


_called_back = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(_compile_missing)


@cache
def handler(api: _xla.Api) -> int:
    """Return the address of the handler. It takes x (batch, columns), and groups, columns, indices and values as in
    :class:`maskedlinear.kernels._packed.Layout`, and gives y (batch, rows).
    """
    way = _engine.host().way
    assert way is not None
    module = ir.Module()
    _xla.emit_pool(module, api)
    with function(module, "packed", PTR, [PTR]) as code:
        frame = _xla.Frame(code, api, code.function.args[0])
        matrix = code.room(I64, len(SLOTS))
        _xla.answer_version(code, frame, api.minor)
        given, asked = frame.counts()
        is_wrong = code.or_(
            code.icmp_unsigned("!=", given, I64(_OPERANDS)), code.icmp_unsigned("!=", asked, I64(_RESULTS))
        )
        with code.if_then(is_wrong):
            frame.refuse("a packed product of another version of maskedlinear", _xla.FAILED_PRECONDITION)
        x, groups, columns, indices, values = frame.operands(_OPERANDS)
        (y,) = frame.results(_RESULTS)
        batch, depth, rows, count = frame.size(x), frame.size(x, 1), frame.size(y, 1), frame.size(groups)
        steps, pieces = frame.size(indices), frame.size(columns)

        def equal(one: Any, other: Any) -> Any:
            return code.icmp_unsigned("==", one, code.number(other))

        conditions = [
            code.less(0, batch), code.less(batch, MOST_VECTORS + 1), code.less(way.window - 1, depth), code.less(0, rows),
            equal(frame.size(y), batch), equal(count, code.over(code.sum(rows, way.lanes - 1), way.lanes)),
            equal(frame.size(groups, 1), MOST_STEPS + 2 + way.lanes), equal(frame.size(indices, 1), way.lanes),
            equal(frame.size(values), steps), equal(frame.size(values, 1), way.lanes),
        ]  # fmt: skip
        is_right = conditions[0]
        for condition in conditions[1:]:
            is_right = code.and_(is_right, condition)
        with code.if_then(code.not_(is_right)):
            frame.refuse("the arrays of a packed product do not belong together", _xla.INVALID_ARGUMENT)
        # Wrong groups do not name all rows, of which none may be left as it was.
        code.zero(code.inttoptr(frame.data(y), PTR), code.times(batch, rows, item_bytes("float32")))
        most = _xla.threads(code, frame)
        height = code.over(code.sum(count, CHUNKS - 1), CHUNKS)
        told = {
            "rows": rows, "depth": depth, "height": height, "chunks": code.over(code.sum(count, height, -1), height),
            "pieces": pieces, "steps": steps, "groups": frame.data(groups),
            "columns": frame.data(columns), "indices": frame.data(indices), "values": frame.data(values),
        }  # fmt: skip
        for place, slot in enumerate(SLOTS):
            code.put(told[slot], matrix, place, I64)
        entry = code.place(code.inttoptr(I64(ctypes.addressof(_tasks)), PTR), batch, I64)
        to_compile = ctypes.cast(_called_back, ctypes.c_void_p).value or 0
        with code.if_then(equal(code.load(entry, typ=I64), 0)):
            made = code.call_address(to_compile, ir.FunctionType(I64, [I64]), [batch])
            with code.if_then(equal(made, 0)):
                frame.refuse("the kernel of a packed product could not be compiled", _xla.INTERNAL)
        task = code.load(entry, typ=PTR)
        most = code.least(most, code.sum(code.over(steps, GRAIN), 1))
        way_of_it = [most, task, code.address("parallel"), frame.pointer]
        arguments = [matrix, frame.data(x), PTR(None), frame.data(y), *way_of_it]
        code.call_address(_engine.address("permute_program", "float32"), PROGRAM, arguments)
        code.ret(PTR(None))
    engine = _engine.machine_code(module, is_hot=False)
    return int(engine.get_function_address("packed"))
