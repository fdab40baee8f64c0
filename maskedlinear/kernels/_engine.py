"""Compiling for the machine that this runs on: each kernel once in a process, when it is first needed.

LLVM comes with ``llvmlite`` (extra ``cpu``). What it makes is code in memory, for the widest registers of this machine; a
child that was forked has it too.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from functools import cache
from typing import Any, NamedTuple

import llvmlite.binding as llvm
from llvmlite import ir

from maskedlinear.kernels import _gradients, _mask, _panels, _permute, _pool, _programs, _rows, _sampled, _vectors
from maskedlinear.kernels._emit import HALF_TYPES, wide

__all__ = ["Host", "address", "compiled", "host", "machine_code"]

_lock = threading.RLock()
if hasattr(os, "register_at_fork"):  # a child has no thread that would finish what another one is compiling
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
_made: dict[tuple[Any, ...], int] = {}
_engines: list[Any] = []  # what holds the code
compiled: dict[str, float] = {}  # seconds that each kernel took


class Host(NamedTuple):
    """What the kernels are compiled for: the processor, and the bytes of its widest registers."""

    processor: str
    features: str
    register_bytes: int

    @property
    def way(self) -> _permute.Way | None:
        """How numbers are picked from registers; ``None`` if there is no instruction for that."""
        if self.register_bytes == 64:
            return _permute.WAYS["permute_avx512"] if "+avx512f" in self.features.split(",") else None
        return _permute.WAYS["permute_avx2"] if self.register_bytes == 32 else None

    def shape(self, dtype: str) -> _rows.Shape:
        """Return the lanes of a register of ``dtype``, and how many registers a tile has."""
        return _rows.Shape(self.register_bytes // (8 if dtype == "float64" else 4))


@cache
def host() -> Host:
    """Return what this process compiles for."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    if features.get("avx512f") and features.get("avx512vl"):
        bytes_ = 64
    elif features.get("avx2") and features.get("fma") and features.get("f16c"):
        bytes_ = 32
    elif platform.machine().lower() in ("aarch64", "arm64"):
        bytes_ = 16
    else:
        raise ImportError(
            "the kernels need AVX2 with FMA and F16C, AVX-512 or NEON; "
            f"this processor, {llvm.get_host_cpu_name()}, has none: everything works without them"
        )
    return Host(llvm.get_host_cpu_name(), features.flatten(), bytes_)


def address(kind: str, dtype: str = "", width: int = 0, *, checked: bool = False) -> int:
    """Return where a function begins, compiled if it was not yet.

    ``kind`` is "serial", "openmp" or "dry", "read_panel" or "write_panel", "pack_right" or "pack_left",
    "spmm", "spmm_ordered" or "sddmm" (a task of one width), the same with "_vector" behind, one of ``_permute.WAYS``
    (a task of as many vectors as ``width``), "gradients" (a task of one width), "sddmm_parts" or "gradients_parts", or
    "spmm_program", "sddmm_program", "gradients_program" or "permute_program"; "count", "list" and "place" are of masks, and
    "order" is of values.
    """
    key = (kind, dtype, width, checked)
    found = _made.get(key)
    if found is None:
        with _lock:
            found = _made.get(key)
            if found is None:
                start = time.perf_counter()
                _compile(*key)
                found = _made[key]
                compiled[" ".join(str(part) for part in key if part)] = time.perf_counter() - start
    return found


def _compile(kind: str, dtype: str, width: int, checked: bool) -> None:
    module = ir.Module()
    module.triple = llvm.get_default_triple()
    shape = host().shape(dtype)
    names = [kind]
    key = (dtype, width, checked)
    if kind in ("serial", "openmp", "dry"):
        names = ["serial", "openmp", "dry"]
        _pool.emit_parallel(module)
    elif kind in ("read_panel", "write_panel"):
        names = ["read_panel"] if dtype in HALF_TYPES else ["read_panel", "write_panel"]
        _panels.emit_panels(module, shape.lanes, dtype)
    elif kind in ("pack_right", "pack_left"):
        _rows.pack_task(module, kind, shape, dtype, kind.removeprefix("pack_"), address("read_panel", dtype))
    elif kind in ("spmm_vector", "spmm_ordered_vector"):
        ordered = kind == "spmm_ordered_vector"
        _vectors.vector_task(module, kind, shape, dtype, checked=checked, ordered=ordered, way=host().way)
    elif kind == "sddmm_vector":
        _vectors.sampled_vector_task(module, kind, shape, dtype, checked=checked, way=host().way)
    elif kind in ("count", "list"):
        {"count": _mask.count_task, "list": _mask.list_task}[kind](module, kind)
    elif kind == "order":
        _rows.order_task(module, kind, dtype)
    elif kind == "place":
        _mask.place_task(module, kind, dtype)
    elif kind in ("spmm", "spmm_ordered"):
        write = address("write_panel", wide(dtype))
        _rows.spmm_task(module, kind, shape, dtype, width, write, checked=checked, ordered=kind == "spmm_ordered")
    elif kind == "sddmm":
        _sampled.sddmm_task(module, kind, shape, dtype, width, checked=checked)
    elif kind == "gradients":
        _gradients.gradients_task(module, kind, shape, dtype, width, checked=checked)
    elif kind == "sddmm_parts":
        _sampled.add_parts_task(module, kind, dtype, shape.lanes)
    elif kind == "gradients_parts":
        smallest, write = _rows.widths(shape, dtype)[-1], address("write_panel", wide(dtype))
        _gradients.add_parts_task(module, kind, dtype, smallest, shape.lanes, write)
    elif kind == "gradients_program":
        _gradients.emit_program(module, kind, _rows.widths(shape, dtype))
    elif kind in _permute.WAYS:
        _permute.permute_task(module, kind, _permute.WAYS[kind], width, checked=checked)
    elif kind == "permute_program":
        _permute.emit_program(module, kind)
    else:
        _programs.emit_program(module, kind, dtype, _rows.widths(shape, dtype), sampled=kind == "sddmm_program")
    runs_little = kind in ("serial", "openmp", "dry") or kind.startswith("pack_") or kind.endswith("_program")
    engine = machine_code(module, is_hot=not runs_little)
    for name in names:
        _made[(name, *key)] = engine.get_function_address(name)


def machine_code(module: ir.Module, *, is_hot: bool = True) -> Any:
    """Compile a module as it is: kernels are written as they should run, and passes over them cost more than they win.

    What runs a few times a product, not ``is_hot``, is compiled in a quarter of the time.
    """
    parsed = llvm.parse_assembly(str(module))
    target = llvm.Target.from_default_triple()
    machine = target.create_target_machine(
        opt=2 if is_hot else 0, cpu=host().processor, features=host().features, jit=True
    )
    with _lock:  # which a fork waits for
        engine = llvm.create_mcjit_compiler(parsed, machine)
        engine.finalize_object()
        _engines.append(engine)
    return engine
