"""W · x of half types, of which no copy in float32 is kept: kernels on CPUs, cuBLAS and Triton read them as they are.

The kernels on CPUs widen values as they multiply, and x as they pack it. Without any, and under transforms, forward mode,
tracing and the compiler, operands are widened first, which gives the same: products of halves are exact in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maskedlinear_torch import _cpu_kernels, _products
from maskedlinear_torch._compat import is_dispatch_mode_on, is_grads_batched, nothing_looks_on
from maskedlinear_torch._products import DevicePattern

__all__ = ["half_spmm", "is_half_product"]


def is_half_product(x: Tensor, values: Tensor) -> bool:
    """Whether :func:`half_spmm` takes these: tensors of a half type that something reads, and nothing looks on at."""
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and not torch.compiler.is_compiling()
        and (_cpu_kernels.are_for(x, values) if x.device.type == "cpu" else x.device.type != "meta")
        and type(x) in (Tensor, torch.nn.Parameter)
        and type(values) in (Tensor, torch.nn.Parameter)
        and _nothing_looks_on()
    )


def _nothing_looks_on() -> bool:
    return nothing_looks_on() and not is_dispatch_mode_on()


def half_spmm(values: Tensor, right: Tensor, pattern: DevicePattern) -> Tensor:
    """Return W · right in float32, shape (out, batch), for values (nnz,) and right (in, batch) of one half type."""
    return _HalfSpmm.apply(values, right, *pattern)  # type: ignore[no-any-return, no-untyped-call]


class _HalfSpmm(torch.autograd.Function):
    """Its gradients are of half types, and so is the cotangent, since the product is rounded to that right after it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, right: Tensor, *rest: Tensor) -> Tensor:
        of_values, of_right = ctx.needs_input_grad[:2]
        ctx.save_for_backward(values if of_right else None, right if of_values else None, *rest)
        return _products._spmm(values, right, DevicePattern(*rest).csr(False))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        values, right, *rest = ctx.saved_tensors
        pattern, dtype = DevicePattern(*rest), (right if values is None else values).dtype
        dvalues = dright = None
        needs_values, needs_right = ctx.needs_input_grad[:2]
        # Differentiated again, mapped, recorded or compiled, which may have begun after the forward pass.
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or is_grads_batched(g) or not _nothing_looks_on():
            dvalues = _products.sddmm(g, right.float(), pattern).to(dtype) if needs_values else None
            dright = _products.spmm(values.float(), g, pattern, True).to(dtype) if needs_right else None
            return dvalues, dright, *(None,) * 5
        g = _products.laid_out(g.to(dtype), pattern, True)
        if needs_values:
            dvalues = _products._sddmm(g, right, pattern.csr(False)).to(dtype)
        if needs_right:
            dright = _products._spmm(values, g, pattern.csr(True)).to(dtype)
        return dvalues, dright, *(None,) * 5
