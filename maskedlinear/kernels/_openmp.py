"""The pool of threads that is there already: that of the OpenMP library which a framework has loaded into this process."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from maskedlinear.kernels import _engine
from maskedlinear.kernels._forked import is_forked

__all__ = ["library", "pool"]

_found: dict[str, tuple[str, int]] = {}  # "torch", PyTorch's, or "other"
_looked = -1  # how many modules there were when the library was looked for


def library() -> tuple[str, int]:
    """Return the OpenMP library of this process, PyTorch's before others, and where its ``GOMP_parallel`` is.

    ("", 0) as long as none is loaded: threads of our own would be a second pool. Another look, which takes longer than a
    small product, is taken only when modules have been imported since, and PyTorch's is not found yet.
    """
    global _looked
    if "torch" not in _found and _looked != len(sys.modules):
        _looked = len(sys.modules)
        for path in _loaded():
            try:
                mode = getattr(os, "RTLD_NOLOAD", 0) | getattr(os, "RTLD_NOW", 0)
                parallel = ctypes.CDLL(path, mode=mode).GOMP_parallel
            except (AttributeError, OSError):
                continue
            whose = "torch" if "torch" in Path(path).parts else "other"
            _found[whose] = path, ctypes.cast(parallel, ctypes.c_void_p).value or 0
            break
    return _found.get("torch") or _found.get("other", ("", 0))


def _loaded() -> list[str]:
    """Return the files of OpenMP libraries that this process has loaded; PyTorch's first."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    files = {line.split(maxsplit=5)[5] for line in maps.read_text().splitlines() if len(line.split(maxsplit=5)) == 6}
    pools = [file for file in files if Path(file).name.startswith(("libgomp", "libomp", "libiomp5"))]
    return sorted(pools, key=lambda file: ("torch" not in Path(file).parts, file))


def pool() -> tuple[int, int]:
    """Return what runs a task in parallel, and the pool that it is told."""
    parallel = 0 if is_forked() else library()[1]
    return _engine.address("openmp" if parallel else "serial"), parallel
