"""The products of the sparse form on CPUs, compiled at run time for the machine that this is: PyTorch and JAX call the same.

The extra ``cpu`` (``pip install maskedlinear[cpu]``) brings LLVM; without it, or with ``MASKEDLINEAR_KERNELS=0`` in the
environment, both frameworks take what they bring along, MKL and XLA, and everything else stays as it is. :func:`info` says
what is used, and why.

The kernels themselves take addresses and shapes, and import no framework.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from maskedlinear.kernels._forked import is_forked

if TYPE_CHECKING:
    from maskedlinear.kernels._calls import (
        are_gradients_at_once,
        count_mask,
        gradients,
        is_direct,
        is_ordered_first,
        is_row_by_kernel,
        list_mask,
        order_values,
        panel_numbers,
        part_numbers,
        place_values,
        sampled_numbers,
        sddmm,
        spmm,
    )
    from maskedlinear.kernels._packing import PackedMatrix

_CALLS = (
    "PackedMatrix",
    "are_gradients_at_once",
    "count_mask",
    "gradients",
    "is_direct",
    "is_ordered_first",
    "is_row_by_kernel",
    "list_mask",
    "order_values",
    "panel_numbers",
    "part_numbers",
    "place_values",
    "sampled_numbers",
    "sddmm",
    "spmm",
)

__all__ = [
    "Info",
    "PackedMatrix",
    "are_gradients_at_once",
    "count_mask",
    "gradients",
    "info",
    "is_available",
    "is_direct",
    "is_forked",
    "is_ordered_first",
    "is_row_by_kernel",
    "list_mask",
    "order_values",
    "panel_numbers",
    "part_numbers",
    "place_values",
    "sampled_numbers",
    "sddmm",
    "spmm",
]

refused: dict[str, str] = {}  # why a framework, by name, does not call the kernels that are there


def __getattr__(name: str) -> Any:
    """Import what needs LLVM when it is asked for, once."""
    if name not in _CALLS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from maskedlinear.kernels import _calls, _packing
    except ImportError as error:
        raise ImportError(f"{name} needs llvmlite; pip install 'maskedlinear[cpu]' brings it") from error
    found = globals()[name] = getattr(_packing if name in _packing.__all__ else _calls, name)
    return found


@cache
def _reason() -> str:
    """Return why the kernels cannot be used; nothing if they can."""
    if os.environ.get("MASKEDLINEAR_KERNELS", "1") == "0":
        return "MASKEDLINEAR_KERNELS is 0"
    try:
        from maskedlinear.kernels import _engine

        _engine.host()
    except ImportError as error:
        return f"{error}" if "processor" in str(error) else "llvmlite is not installed: pip install 'maskedlinear[cpu]'"
    return ""


def is_available() -> bool:
    """Whether the kernels can be used: LLVM is there, the processor has registers wide enough, and nobody said no.

    >>> is_available() in (True, False)
    True
    """
    return not _reason()


@dataclass(frozen=True)
class Info:
    """Which kernels multiply the sparse form on the CPU; printed, it reads as a paragraph.

    Attributes:
        available: whether the kernels of this package are used.
        why_not: the reason if they are not.
        llvm: the versions of llvmlite and of LLVM.
        processor: LLVM's name of the processor.
        register_bytes: the bytes of the registers that are used: 64 with AVX-512, 32 with AVX2, 16 with NEON.
        pool: the file of the OpenMP library whose threads PyTorch's products use; empty if none is loaded.
        left_to_mkl: of which matrices such a row of PyTorch's is MKL's; empty if of all.
        refused: why a framework does not call them, though they are there.
        packed: how numbers are picked for what is packed, "avx512" or "avx2"; empty if nothing is packed on this machine.
        compiled: milliseconds that each kernel of this process took to compile, by kind, dtype and width of its tile.
    """

    available: bool
    why_not: str = ""
    llvm: str = ""
    processor: str = ""
    register_bytes: int = 0
    pool: str = ""
    left_to_mkl: str = ""
    refused: tuple[str, ...] = ()
    packed: str = ""
    compiled: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        if not self.available:
            return f"CPU kernels: those of the frameworks (MKL, XLA), because {self.why_not}"
        pool = self.pool or "no OpenMP library is loaded yet: one thread until torch is imported"
        lines = [
            f"CPU kernels: by rows, in tiles of registers of {self.register_bytes} bytes, for every pattern and batch",
            "but for a float32 or float64 row of x through PyTorch's SparseLinear without gradients: MKL where it is there,"
            + (f" of {self.left_to_mkl}" if self.left_to_mkl else ""),
            f"compiled by: {self.llvm} for {self.processor}",
            f"threads: PyTorch's own ({pool}); in JAX XLA's own",
        ]
        lines += [f"not used in {one}" for one in self.refused]
        picked = f"by {self.packed}, if a step multiplies two connections or more" if self.packed else "as what is not"
        lines.append(f"packed, up to 4 rows of x: {picked}")
        lines += [f"  {kind}: {milliseconds:.0f} ms to compile" for kind, milliseconds in self.compiled]
        return "\n".join(lines)


def info() -> Info:
    """Return which kernels multiply the sparse form on the CPU, and why.

    >>> str(info()).startswith("CPU kernels: ")
    True
    """
    if _reason():
        return Info(available=False, why_not=_reason())
    import llvmlite.binding

    from maskedlinear.kernels import _calls, _engine, _openmp

    llvm = ".".join(str(part) for part in llvmlite.binding.llvm_version_info)
    host = _engine.host()
    return Info(
        available=True,
        llvm=f"LLVM {llvm} (llvmlite {version('llvmlite')})",
        processor=host.processor,
        register_bytes=host.register_bytes,
        pool=_openmp.library()[0],
        left_to_mkl=_calls.left_to_mkl(),
        refused=tuple(f"{name}, because of this: {why}" for name, why in refused.items()),
        packed=getattr(host.way, "instruction", ""),
        compiled=tuple((kind, 1000 * seconds) for kind, seconds in _engine.compiled.items()),
    )
