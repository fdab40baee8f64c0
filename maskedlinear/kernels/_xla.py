"""Products that XLA calls: handlers of its typed foreign-function interface, and its own pool of threads.

The interface is one of C, in ``xla/ffi/api/c_api.h``, a header that JAX brings along: what lies where is read from it, or
stated here as it stands there. A handler is handed a call frame with buffers, whose shapes it checks against each other;
the indices in them are anybody's, so that the tasks are those that check them. Matrices are those of a batch, (batch,
features). What a handler is called by, :func:`target`, says the version of all this, since XLA keeps programs on disk; no
address is in them.
"""

from __future__ import annotations

import ctypes
import platform
import re
import sys
import time
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from llvmlite import ir

from maskedlinear.kernels import _calls, _engine
from maskedlinear.kernels._emit import HALF_TYPES, I8, I32, I64, PTR, Emitter, function, item_bytes, wide
from maskedlinear.kernels._gradients import PARTS
from maskedlinear.kernels._pool import PARALLEL, Job, drive, emit_serial, fill
from maskedlinear.kernels._programs import PROGRAM
from maskedlinear.kernels._rows import ORDERED_AT_ONCE, SLOTS

__all__ = [
    "FAILED_PRECONDITION",
    "INTERNAL",
    "INVALID_ARGUMENT",
    "Api",
    "Frame",
    "answer_version",
    "emit_pool",
    "handlers",
    "read_api",
    "target",
    "threads",
]

# Of products: how many operands are of a product's dtype, how many indices are behind them, and how many results there are.
_KINDS = {"spmm": (2, 2, 2), "spmm_ordered": (2, 3, 2), "sddmm": (2, 2, 4), "gradients": (3, 2, 5)}
_VERSION = 3  # of what a handler is handed: raise it when operands, results or attributes change

# Where things lie, in bytes.
_FRAME_EXTENSION, _FRAME_API, _FRAME_CONTEXT, _FRAME_ARGS, _FRAME_RETS = 8, 16, 24, 40, 80
_LIST_SIZE, _LIST_ENTRIES = 16, 32  # of args and rets
_BUFFER_DTYPE, _BUFFER_DATA, _BUFFER_DIMS = 16, 24, 40
# What the interface calls dtypes.
_CALLED = {"int32": 4, "float16": 10, "float32": 11, "float64": 12, "bfloat16": 16}
_EXTENSION_TYPE, _EXTENSION_METADATA, _METADATA_VERSION = 8, 24, 24
_API_FUNCTIONS = 48
_METADATA = 1  # the type of the extension
INVALID_ARGUMENT, FAILED_PRECONDITION, INTERNAL = 3, 9, 13  # codes of errors

_LARGE = 4 << 20  # bytes of a result from which huge pages are asked for, as NumPy does
_PAGE, _HUGE_PAGES = 4096, 14  # MADV_HUGEPAGE
_SPINS = 2000  # times that a thread looks whether others are done, before it lets others go first


class Api(NamedTuple):
    """The version of XLA's interface, and the places of its functions."""

    minor: int
    functions: tuple[str, ...]

    def offset(self, name: str) -> int:
        """Return where the address of a function lies in the table of functions."""
        return _API_FUNCTIONS + 8 * self.functions.index(f"XLA_FFI_{name}")


def read_api(header: str) -> Api:
    """Return what the text of ``c_api.h`` says.

    Raises:
        ImportError: if it is not of a version that handlers are made for, or the system is none.
    """
    versions = [re.search(rf"#define XLA_FFI_API_{part} (\d+)", header) for part in ("MAJOR", "MINOR")]
    api = Api(
        minor=-1 if versions[1] is None else int(versions[1][1]),
        functions=tuple(re.findall(r"^ *_XLA_FFI_API_STRUCT_FIELD\((\w+)\);", header, re.MULTILINE)),
    )
    needed = {"Error_Create", "Error_Destroy", "ThreadPool_Schedule", "ThreadPool_NumThreads"}
    missing = {f"XLA_FFI_{name}" for name in needed} - set(api.functions)
    if versions[0] is None or versions[0][1] != "0" or api.minor < 0 or missing:
        raise ImportError("XLA's foreign-function interface is not of major version 0: its products are taken")
    if sys.platform == "win32":
        raise ImportError("handlers for XLA are not made for Windows: its products are taken")
    return api


def target(kind: str, dtype: str) -> str:
    """Return the name by which XLA knows the handler of a product."""
    return f"maskedlinear_{kind}_{dtype}_v{_VERSION}"


@cache
def handlers(dtype: str, api: Api) -> dict[str, int]:
    """Return the addresses of the handlers of a dtype, by kind.

    ``spmm`` takes values (nnz,), right (batch, columns), starts (rows + 1,) and across (nnz,), and gives out (batch, rows)
    and room for panels; ``spmm_ordered`` takes order (nnz,) too. ``sddmm`` takes left (batch, rows), right, starts and
    across, and gives out (nnz,) and room for panels of left and of right, and for parts. ``gradients`` takes values, left,
    right, starts and across, and gives (nnz,), (batch, columns), and room for the same. Of half types out and room are
    float32. ``order`` takes values and order, and gives the values in that order.
    """
    start, module = time.perf_counter(), ir.Module()
    emit_pool(module, api)
    for kind in _KINDS:
        _emit_handler(module, api, kind, dtype)
    _emit_order(module, api, dtype)
    engine = _engine.machine_code(module, is_hot=False)
    _engine.compiled[f"handlers for XLA {dtype}"] = time.perf_counter() - start
    return {kind: int(engine.get_function_address(kind)) for kind in (*_KINDS, "order")}


class Frame:
    """The call frame of a handler: its buffers, and the functions of XLA that it leads to."""

    def __init__(self, code: Emitter, api: Api, pointer: Any) -> None:
        self._code, self._api, self.pointer = code, api, pointer
        self._struct = code.room(I64, 5)

    def at(self, pointer: Any, offset: int, kind: Any = PTR) -> Any:
        return self._code.load(self._code.place(pointer, offset, I8), align=4, typ=kind)

    def counts(self) -> tuple[Any, Any]:
        first, second = (start + _LIST_SIZE for start in (_FRAME_ARGS, _FRAME_RETS))
        return self.at(self.pointer, first, I64), self.at(self.pointer, second, I64)

    def buffers(self, start: int, count: int) -> list[Any]:
        entries = self.at(self.pointer, start + _LIST_ENTRIES)
        return [self.at(entries, 8 * place) for place in range(count)]

    def operands(self, count: int) -> list[Any]:
        return self.buffers(_FRAME_ARGS, count)

    def results(self, count: int) -> list[Any]:
        return self.buffers(_FRAME_RETS, count)

    def data(self, buffer: Any) -> Any:
        return self.at(buffer, _BUFFER_DATA)

    def has(self, dtype: str, buffer: Any) -> Any:
        """Return whether a buffer is of a dtype."""
        return self._code.icmp_unsigned("==", self.at(buffer, _BUFFER_DTYPE, I32), I32(_CALLED[dtype]))

    def size(self, buffer: Any, axis: int = 0) -> Any:
        return self.at(self.at(buffer, _BUFFER_DIMS), 8 * axis, I64)

    def call(self, name: str, *entries: Any) -> Any:
        """Call a function of XLA with a struct of ``entries``, which its size and its extensions, none, precede."""
        code = self._code
        for place, entry in enumerate((I64(16 + 8 * len(entries)), I64(0), *entries)):
            code.put(entry, self._struct, place, I64)
        address = self.at(self.at(self.pointer, _FRAME_API), self._api.offset(name))
        return code.call_pointer(address, ir.FunctionType(PTR, [PTR]), [self._struct])

    def fails(self, name: str, *entries: Any) -> Any:
        """Call a function with the context in front, and return whether it failed; what it says of that is let go."""
        code = self._code
        error = self.call(name, self.at(self.pointer, _FRAME_CONTEXT), *entries)
        is_error = code.icmp_unsigned("!=", error, PTR(None))
        with code.if_then(is_error):
            self.call("Error_Destroy", error)
        return is_error

    def refuse(self, text: str, kind: int) -> None:
        """Return an error to XLA."""
        code = self._code
        message = bytearray(text.encode() + b"\0")
        constant = ir.Constant(ir.ArrayType(I8, len(message)), message)
        stored = ir.GlobalVariable(code.module, constant.type, f"message.{len(code.module.globals)}")
        stored.initializer, stored.global_constant = constant, True
        code.ret(self.call("Error_Create", code.bitcast(stored, PTR), I64(kind)))


def emit_pool(module: ir.Module, api: Api) -> None:
    """Emit ``parallel``, whose pool is a call frame.

    Who calls takes chunks too, and waits for those only that others have begun: the pool may be busy, or of one thread.
    So a job outlives the product, until the last of those that were asked has looked at it, and found nothing to do.
    """
    emit_serial(module)
    free = ir.FunctionType(ir.VoidType(), [PTR])
    with function(module, "let_go", ir.VoidType(), [PTR]) as code:
        job = code.function.args[0]
        held = code.atomic_rmw("sub", code.place(job, int(Job.HOLDERS), I64), I64(1), "acq_rel")
        with code.if_then(code.icmp_unsigned("==", held, I64(1))):
            code.call_address(_address("free"), free, [job])
    with function(module, "take_part", ir.VoidType(), [PTR]) as code:
        drive(code, code.function.args[0], counted=True)
        code.call(module.globals["let_go"], code.function.args)
    with function(module, "parallel", ir.VoidType(), PARALLEL.args) as code:
        pointer, most, task, told, chunks = code.function.args
        frame, threads = Frame(code, api, pointer), code.least(most, chunks)
        with code.if_then(code.less(threads, 2)):
            code.call(module.globals["serial"], code.function.args)
            code.ret_void()
        job = code.call_address(_address("malloc"), ir.FunctionType(PTR, [I64]), [I64(8 * len(Job))])
        with code.if_then(code.icmp_unsigned("==", job, PTR(None))):
            code.call(module.globals["serial"], code.function.args)
            code.ret_void()
        fill(code, job, task, told, chunks)
        code.put(I64(0), job, int(Job.DONE))
        code.put(threads, job, int(Job.HOLDERS))
        with code.loop(1, threads), code.if_then(frame.fails("ThreadPool_Schedule", code.address("take_part"), job)):
            code.call(module.globals["let_go"], [job])
        drive(code, job, counted=True)
        done = code.place(job, int(Job.DONE), I64)

        def is_left(_: list[Any]) -> Any:
            return code.less(code.load_atomic(done, "acquire", 8, typ=I64), chunks)

        with code.while_loop([I64(0)], is_left) as (spins, following):
            with code.if_else(code.less(spins[0], _SPINS)) as (soon, late):
                with soon:
                    _pause(code)
                with late:
                    code.call_address(_address("sched_yield"), ir.FunctionType(I32, []), [])
            following.append(code.sum(spins[0], 1))
        code.call(module.globals["let_go"], [job])


@cache
def _address(name: str) -> int:
    """Return the address of a function of the C library."""
    return ctypes.cast(getattr(ctypes.CDLL(None), name), ctypes.c_void_p).value or 0


def _pause(code: Emitter) -> None:
    x86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
    name, arguments = ("llvm.x86.sse2.pause", []) if x86 else ("llvm.aarch64.hint", [I32(1)])
    kind = ir.FunctionType(ir.VoidType(), [I32] * len(arguments))
    code.call(code.module.globals.get(name) or ir.Function(code.module, kind, name), arguments)


def _emit_handler(module: ir.Module, api: Api, kind: str, dtype: str) -> None:
    with function(module, kind, PTR, [PTR]) as code:
        frame = Frame(code, api, code.function.args[0])
        told = code.room(I64, len(SLOTS))
        answer_version(code, frame, api.minor)
        numbers, indices, results = _KINDS[kind]
        given, asked = frame.counts()
        is_wrong = code.or_(
            code.icmp_unsigned("!=", given, I64(numbers + indices)), code.icmp_unsigned("!=", asked, I64(results))
        )
        with code.if_then(is_wrong):
            frame.refuse("a sparse product of another version of maskedlinear", FAILED_PRECONDITION)
        made = frame.results(results)
        operands = frame.operands(numbers + indices)
        dtypes = [dtype] * numbers + ["int32"] * indices + [wide(dtype)] * results
        are_of = [frame.has(*pair) for pair in zip(dtypes, (*operands, *made), strict=True)]
        told_of = {"sddmm": _sddmm, "gradients": _gradients}.get(kind, _spmm)
        arguments, is_right = told_of(code, frame, operands, made, dtype)
        is_right = _all(code, [is_right, *are_of])
        with code.if_then(code.not_(is_right)):
            frame.refuse("the arrays of a sparse product do not belong together", INVALID_ARGUMENT)
        for place, result in enumerate(made):
            is_matrix = place == {"sddmm": -1, "gradients": 1}.get(kind, 0)
            count = code.times(frame.size(result), frame.size(result, 1) if is_matrix else 1)
            _ask_for_huge_pages(code, frame.data(result), code.times(count, item_bytes(wide(dtype))))
        arguments["threads"] = threads(code, frame)
        arguments["tasks"] = I64(_calls.table_address(kind, dtype, checked=True))
        to_compile = ctypes.cast(_compile_missing, ctypes.c_void_p).value or 0
        with code.while_loop([I64(-1)], lambda state: code.icmp_unsigned("!=", state[0], I64(0))) as (state, following):
            with code.if_then(code.icmp_unsigned("!=", state[0], I64(-1))):
                of = [I64(_products.index((kind, dtype))), code.sum(state[0], -1)]
                failed = code.call_address(to_compile, ir.FunctionType(I64, [I64, I64]), of)
                with code.if_then(code.icmp_unsigned("!=", failed, I64(0))):
                    frame.refuse("a kernel of a sparse product could not be compiled", INTERNAL)
            for place, slot in enumerate(SLOTS):
                code.put(arguments.get(slot, I64(0)), told, place, I64)
            way = [told, code.address("parallel"), frame.pointer]
            following.append(code.call_address(_engine.address(_calls.program_of(kind), dtype), PROGRAM, way))
        code.ret(PTR(None))


def _emit_order(module: ir.Module, api: Api, dtype: str) -> None:
    with function(module, "order", PTR, [PTR]) as code:
        frame = Frame(code, api, code.function.args[0])
        told = code.room(I64, len(SLOTS))
        answer_version(code, frame, api.minor)
        given, asked = frame.counts()
        is_wrong = code.or_(code.icmp_unsigned("!=", given, I64(2)), code.icmp_unsigned("!=", asked, I64(1)))
        with code.if_then(is_wrong):
            frame.refuse("an order of values of another version of maskedlinear", FAILED_PRECONDITION)
        (values, order), (out,) = frame.operands(2), frame.results(1)
        nnz = frame.size(values)
        are_of = [frame.has(dtype, values), frame.has("int32", order), frame.has(dtype, out)]
        is_right = _all(code, [*are_of, *(_equal(code, frame.size(one), nnz) for one in (order, out))])
        with code.if_then(code.not_(is_right)):
            frame.refuse("the arrays of an order of values do not belong together", INVALID_ARGUMENT)
        _ask_for_huge_pages(code, frame.data(out), code.times(nnz, item_bytes(dtype)))
        buffers = {"values": values, "order": order, "out": out}
        arguments = {name: frame.data(buffer) for name, buffer in buffers.items()}
        arguments |= {"nnz": nnz, "height": I64(ORDERED_AT_ONCE)}
        for place, slot in enumerate(SLOTS):
            code.put(arguments.get(slot, I64(0)), told, place, I64)
        entry = code.place(code.inttoptr(I64(ctypes.addressof(_orders)), PTR), _DTYPES.index(dtype), I64)
        to_compile = ctypes.cast(_compile_order, ctypes.c_void_p).value or 0
        with code.if_then(_equal(code, code.load(entry, typ=I64), 0)):
            code.call_address(to_compile, ir.FunctionType(I64, [I64]), [I64(_DTYPES.index(dtype))])
            with code.if_then(_equal(code, code.load(entry, typ=I64), 0)):
                frame.refuse("what brings values into order could not be compiled", INTERNAL)
        task, chunks = code.load(entry, typ=PTR), code.rounded_up(nnz, ORDERED_AT_ONCE)
        code.call(module.globals["parallel"], [frame.pointer, threads(code, frame), task, told, chunks])
        code.ret(PTR(None))


def threads(code: Emitter, frame: Frame) -> Any:
    """Return how many threads XLA's pool has, 1 if it does not say."""
    found = code.room(I64, 1)
    code.put(I64(1), found, 0)
    unknown = frame.fails("ThreadPool_NumThreads", found)
    return code.select(unknown, I64(1), code.most(code.get(found, 0, I64), 1))


def _ask_for_huge_pages(code: Emitter, pointer: Any, size: Any) -> None:
    """Have Linux map a large result, which XLA gets anew for each call, in pages of 2 MiB: it is not touched yet."""
    if not sys.platform.startswith("linux"):
        return
    with code.if_then(code.less(_LARGE - 1, size)):
        start = code.ptrtoint(pointer, I64)
        first = code.times(code.rounded_up(start, _PAGE), _PAGE)
        whole = code.sub(code.times(code.over(code.sum(start, size), _PAGE), _PAGE), first)
        kind = ir.FunctionType(I32, [I64, I64, I32])
        code.call_address(_address("madvise"), kind, [first, whole, I32(_HUGE_PAGES)])


def answer_version(code: Emitter, frame: Frame, minor: int) -> None:
    """When a handler is registered XLA asks for its version, by an extension of the frame."""
    extension = frame.at(frame.pointer, _FRAME_EXTENSION)
    with code.if_then(code.icmp_unsigned("!=", extension, PTR(None))):
        is_asked = code.icmp_unsigned("==", frame.at(extension, _EXTENSION_TYPE, I32), I32(_METADATA))
        with code.if_then(is_asked):
            version = code.place(frame.at(extension, _EXTENSION_METADATA), _METADATA_VERSION, I8)
            code.put(I32(0), version, 0)
            code.put(I32(minor), version, 1)
            code.ret(PTR(None))


def _spmm(
    code: Emitter, frame: Frame, operands: Sequence[Any], results: Sequence[Any], dtype: str
) -> tuple[dict[str, Any], Any]:
    """Return what a product is told, and whether its arrays belong together."""
    values, right, starts, across, *order = operands
    out, panels = results
    nnz, batch, depth, rows = frame.size(values), frame.size(right), frame.size(right, 1), frame.size(out, 1)
    direct = _is_direct(code, batch, dtype)
    right_panels, has_room = _panels(code, frame, right, panels, batch, depth, dtype)
    told = {
        "rows": rows, "depth": depth, "batch": batch, "nnz": nnz, "starts": frame.data(starts),
        "across": frame.data(across), "values": frame.data(values), "right": frame.data(right), "right_by_batch": I64(1),
        "panels": right_panels, "direct": direct, "out": frame.data(out),
        "out_by_batch": I64(1),
    }  # fmt: skip
    conditions = [
        has_room,
        *(code.less(0, size) for size in (nnz, batch, depth)),
        _equal(code, frame.size(starts), code.sum(rows, 1)),
        _equal(code, frame.size(across), nnz),
        _equal(code, frame.size(out), batch),
    ]
    if order:
        told["order"] = frame.data(order[0])
        conditions.append(_equal(code, frame.size(order[0]), nnz))
    return told, _all(code, conditions)


def _sddmm(
    code: Emitter, frame: Frame, operands: Sequence[Any], results: Sequence[Any], dtype: str
) -> tuple[dict[str, Any], Any]:
    left, right, starts, across = operands
    out, *panels, parts = results
    nnz, batch, depth, rows = frame.size(across), frame.size(right), frame.size(right, 1), frame.size(left, 1)
    left_panels, left_has = _panels(code, frame, left, panels[0], batch, rows, dtype)
    right_panels, right_has = _panels(code, frame, right, panels[1], batch, depth, dtype)
    told = {
        "rows": rows, "depth": depth, "batch": batch, "nnz": nnz, "starts": frame.data(starts),
        "across": frame.data(across), "left": frame.data(left), "left_by_batch": I64(1), "left_panels": left_panels,
        "right": frame.data(right), "right_by_batch": I64(1), "panels": right_panels,
        "direct": _is_direct(code, batch, dtype), "out": frame.data(out), "parts": frame.data(parts),
        "part_count": code.sum(code.over(frame.size(parts), code.most(code.sum(nnz, rows), 1)), 1),
    }  # fmt: skip
    conditions = [
        left_has,
        right_has,
        *(code.less(0, size) for size in (nnz, batch, depth)),
        _equal(code, frame.size(starts), code.sum(rows, 1)),
        _equal(code, frame.size(left), batch),
        _equal(code, frame.size(out), nnz),
    ]
    return told, _all(code, conditions)


def _gradients(
    code: Emitter, frame: Frame, operands: Sequence[Any], results: Sequence[Any], dtype: str
) -> tuple[dict[str, Any], Any]:
    values, *sides = operands
    out, product, *panels, parts = results
    told, is_right = _sddmm(code, frame, sides, (out, *panels, parts), dtype)
    batch, depth = told["batch"], told["depth"]
    widest = code.most(batch, _calls.panel_numbers(1, 1, dtype))
    is_one_register: Any = ir.Constant(ir.IntType(1), 0)
    for width in _calls.widths_of_parts(dtype):
        is_one_register = code.or_(is_one_register, _equal(code, widest, width))
    told |= {
        "values": frame.data(values),
        "out_right": frame.data(product),
        "widest": widest,
    }
    conditions = [
        is_right,
        is_one_register,
        code.less(1, batch),
        _equal(code, frame.size(values), told["nnz"]),
        _equal(code, frame.size(product), batch),
        _equal(code, frame.size(product, 1), depth),
        code.not_(code.less(frame.size(parts), code.times(depth, widest, PARTS))),
    ]
    return told, _all(code, conditions)


def _panels(
    code: Emitter, frame: Frame, matrix: Any, room: Any, batch: Any, features: Any, dtype: str
) -> tuple[Any, Any]:
    """Return where the panels of a matrix lie, which may be the matrix, and whether there is room for them."""
    smallest = _calls.panel_numbers(1, 1, dtype)
    needed = code.times(features, code.over(code.sum(batch, smallest - 1), smallest), smallest)
    is_direct = _equal(code, _is_direct(code, batch, dtype), 1)
    has_room = code.or_(is_direct, code.not_(code.less(frame.size(room), needed)))
    return code.select(is_direct, frame.data(matrix), frame.data(room)), has_room


def _is_direct(code: Emitter, batch: Any, dtype: str) -> Any:
    """Return 1 if matrices by batch are read as they are, as :func:`maskedlinear.kernels.is_direct` says, and else 0."""
    return I64(0) if dtype in HALF_TYPES else code.zext(_equal(code, batch, 1), I64)


def _equal(code: Emitter, one: Any, other: Any) -> Any:
    return code.icmp_unsigned("==", code.number(one), code.number(other))


def _all(code: Emitter, conditions: Sequence[Any]) -> Any:
    every = conditions[0]
    for condition in conditions[1:]:
        every = code.and_(every, condition)
    return every


_DTYPES = ("float32", "float64", *HALF_TYPES)
_products = [(kind, dtype) for kind in _KINDS for dtype in _DTYPES]
_orders = (ctypes.c_int64 * len(_DTYPES))()  # the tasks that bring values into order; 0 if not compiled yet


def _compile(product: int, task: int) -> int:
    """Compile a task of a program that XLA kept from another process; return whether that failed."""
    try:
        _calls.compile_task(*_products[product], task, checked=True)
    except Exception:  # there is nobody here to raise it to: the handler tells XLA
        return 1
    return 0


_compile_missing = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(_compile)


def compile_order(dtype: str) -> None:
    """Compile what brings values of a dtype into order, and enter it where its handler looks."""
    _orders[_DTYPES.index(dtype)] = _engine.address("order", dtype)


def _compile_order_of(place: int) -> int:
    """Compile what brings values of a dtype into order; return whether that failed."""
    try:
        compile_order(_DTYPES[place])
    except Exception:  # there is nobody here to raise it to: the handler tells XLA
        return 1
    return 0


_compile_order = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(_compile_order_of)
