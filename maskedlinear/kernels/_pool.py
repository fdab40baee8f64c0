"""How a task is divided among threads: chunk by chunk, each taken by whoever is free; nobody waits for a thread to begin.

Every other thread begins at the last chunk, so that of two that run a task after another each finds what it has written.

``parallel(pool, threads, task, told, chunks)`` has one form for each pool. None of them starts threads of its own where
there is a pool already: PyTorch's is OpenMP's, JAX's is XLA's.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

from llvmlite import ir

from maskedlinear.kernels._emit import I32, I64, PTR, Emitter, function

__all__ = ["PARALLEL", "TASK", "Job", "drive", "emit_parallel", "emit_serial", "fill"]

TASK = ir.FunctionType(ir.VoidType(), [PTR, I64])  # what it is told, a chunk
PARALLEL = ir.FunctionType(
    ir.VoidType(), [PTR, I64, PTR, PTR, I64]
)  # pool, most threads, task, what it is told, chunks


class Job(IntEnum):
    """The entries of a job, numbers of 64 bits that its threads share; the last two only in XLA's pool."""

    TAKEN = 0  # chunks, from the first one on, and, 32 bits higher, from the last one on
    CHUNKS = 1
    TASK = 2
    TOLD = 3
    COME = 4  # threads that have begun
    DONE = 5  # chunks that are finished
    HOLDERS = 6  # threads that will look at it yet


def emit_parallel(module: ir.Module) -> None:
    """Emit ``serial``, ``openmp``, whose pool is ``GOMP_parallel`` itself, and ``dry``, which runs nothing."""
    emit_serial(module)
    with function(module, "dry", ir.VoidType(), PARALLEL.args):
        pass
    with function(module, "drive", ir.VoidType(), [PTR]) as code:
        drive(code, code.function.args[0])
    with function(module, "openmp", ir.VoidType(), PARALLEL.args) as code:
        pool, most, task, told, chunks = code.function.args
        threads = code.least(most, chunks)
        with code.if_else(code.less(threads, 2)) as (alone, together):
            with alone:
                code.call(module.globals["serial"], code.function.args)
            with together:
                job = code.room(I64, len(Job))
                fill(code, job, task, told, chunks)
                kind = ir.FunctionType(ir.VoidType(), [PTR, PTR, I32, I32])
                arguments = [code.address("drive"), job, code.trunc(threads, I32), I32(0)]
                code.call_pointer(pool, kind, arguments)


def emit_serial(module: ir.Module) -> None:
    """Emit ``serial``, which runs the chunks one after the other."""
    with function(module, "serial", ir.VoidType(), PARALLEL.args) as code:
        _, _, task, told, chunks = code.function.args
        with code.loop(0, chunks) as chunk:
            code.call_pointer(task, TASK, [told, chunk])


def fill(code: Emitter, job: Any, task: Any, told: Any, chunks: Any) -> None:
    """Emit the beginning of a job."""
    for place, entry in ((Job.CHUNKS, chunks), (Job.TASK, task), (Job.TOLD, told)):
        code.put(entry, job, int(place), I64)
    for place in (Job.TAKEN, Job.COME):
        code.put(I64(0), job, int(place), I64)


def drive(code: Emitter, job: Any, *, counted: bool = False) -> None:
    """Emit a loop that takes chunks of a job until none is left, ``counted`` when they are done."""
    chunks, task = code.get(job, int(Job.CHUNKS), I64), code.get(job, int(Job.TASK), PTR, I64)
    told = code.get(job, int(Job.TOLD), PTR, I64)

    come = code.atomic_rmw("add", code.place(job, int(Job.COME), I64), I64(1), "monotonic")
    is_last_first = code.icmp_unsigned("!=", code.and_(come, I64(1)), I64(0))

    def take() -> Any:
        one = code.select(is_last_first, I64(1 << 32), I64(1))
        return code.atomic_rmw("add", code.place(job, int(Job.TAKEN), I64), one, "monotonic")

    def sides(taken: Any) -> tuple[Any, Any]:
        return code.and_(taken, I64((1 << 32) - 1)), code.lshr(taken, I64(32))

    with code.while_loop([take()], lambda taken: code.less(code.sum(*sides(taken[0])), chunks)) as (taken, following):
        lower, upper = sides(taken[0])
        chunk = code.select(is_last_first, code.sub(code.sub(chunks, I64(1)), upper), lower)
        code.call_pointer(task, TASK, [told, chunk])
        if counted:
            code.atomic_rmw("add", code.place(job, int(Job.DONE), I64), I64(1), "release")
        following.append(take())
