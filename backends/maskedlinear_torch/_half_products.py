"""W · x of half types without copies in float32: the kernels on CPUs, cuBLAS and Triton read halves, and add up in float32.

Without kernels on the CPU, and under transforms, forward mode and the compiler, operands are widened first, which gives the
same: products of halves are exact in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maskedlinear_torch import _cpu_kernels, _gpu_products, _products
from maskedlinear_torch._compat import is_grads_batched, nothing_looks_on
from maskedlinear_torch._products import CSR, DevicePattern

__all__ = ["half_spmm", "is_half_product"]


def is_half_product(x: Tensor, values: Tensor) -> bool:
    """Whether :func:`half_spmm` takes these: tensors of a half type that something reads, and nothing looks on at."""
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and (_cpu_kernels.are_for(x, values) if x.device.type == "cpu" else x.device.type != "meta")
        and not torch.compiler.is_compiling()
        and type(x) in (Tensor, torch.nn.Parameter)
        and type(values) in (Tensor, torch.nn.Parameter)
        and nothing_looks_on()
    )


def half_spmm(values: Tensor, right: Tensor, pattern: DevicePattern) -> Tensor:
    """Return W · right in float32, shape (out, batch), for values (nnz,) and right (in, batch) of one half type."""
    return _HalfSpmm.apply(values, right, *pattern)  # type: ignore[no-any-return, no-untyped-call]


def _spmm(values: Tensor, right: Tensor, csr: CSR) -> Tensor:
    if not values.numel() or not right.numel():
        product = None
    elif right.device.type == "cpu":
        product = _cpu_kernels.spmm(values, right, csr, as_it_lies=True)
    else:
        product = _gpu_products.spmm(values, right, csr)
    return _products._spmm(values.float(), right.float(), csr) if product is None else product


def _sddmm(left: Tensor, right: Tensor, csr: CSR) -> Tensor:
    if not csr.across.numel() or not right.numel():
        product = None
    elif right.device.type == "cpu":
        product = _cpu_kernels.sddmm(left, right, csr)
    else:
        product = _gpu_products.sddmm(left, right, csr)
    return _products._sddmm(left.float(), right.float(), csr) if product is None else product


class _HalfSpmm(torch.autograd.Function):
    """Its gradients are of half types, and so is the cotangent, since the product is rounded to that right after it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, right: Tensor, *rest: Tensor) -> Tensor:
        ctx.save_for_backward(values, right, *rest)
        return _spmm(values, right, DevicePattern(*rest).csr(False))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        values, right, *rest = ctx.saved_tensors
        pattern = DevicePattern(*rest)
        dvalues = dright = None
        needs_values, needs_right = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled() or is_grads_batched(g):  # differentiated again
            dvalues = _products.sddmm(g, right.float(), pattern).to(values.dtype) if needs_values else None
            dright = _products.spmm(values.float(), g, pattern, True).to(right.dtype) if needs_right else None
            return dvalues, dright, *(None,) * 5
        g = _products.laid_out(g.to(right.dtype))
        if needs_values:
            dvalues = _sddmm(g, right, pattern.csr(False)).to(values.dtype)
        if needs_right:
            dright = _spmm(values, g, pattern.csr(True)).to(right.dtype)
        return dvalues, dright, *(None,) * 5
