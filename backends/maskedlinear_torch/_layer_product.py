"""``y = x · Wᵀ + bias`` of the sparse form in one step, where autograd alone looks on: what a model asks for at most calls.

One Function, which takes rows of x and gives rows of y: by operators each call records five nodes, and takes a third longer
in Python. No copy in float32 is kept of half types: kernels on CPUs, cuBLAS and Triton read them as they are. Under
transforms, forward mode, tracing and the compiler, and to differentiate again, ``spmm`` of ``_products`` says the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maskedlinear_torch._compat import is_dispatch_mode_on, is_grads_batched, nothing_looks_on
from maskedlinear_torch._cpu_kernels import gradients, wide
from maskedlinear_torch._functional import flatten_batch
from maskedlinear_torch._products import DevicePattern, laid_out, plain_sddmm, plain_spmm, sddmm, spmm

__all__ = ["is_layer_product", "layer_product"]

_ORDINARY = (Tensor, torch.nn.Parameter)


def is_layer_product(x: Tensor, values: Tensor, bias: Tensor | None) -> bool:
    """Whether :func:`layer_product` takes these: ordinary tensors that have memory, and nothing but autograd looks on."""
    return (
        type(x) in _ORDINARY
        and type(values) in _ORDINARY
        and (bias is None or type(bias) in _ORDINARY)
        and not x.is_meta
        and _nothing_looks_on()
    )


def _nothing_looks_on() -> bool:
    return nothing_looks_on() and not torch.compiler.is_compiling() and not is_dispatch_mode_on()


def layer_product(x: Tensor, values: Tensor, pattern: DevicePattern, bias: Tensor | None) -> Tensor:
    """Return y (..., out) for x (..., in) and values (nnz,) of one dtype; summed up in float32, if not float64."""
    if not torch.is_grad_enabled():
        return _rows_of_y(x, values, pattern, bias)
    rows = x
    if not (x.is_cpu and x.is_contiguous()) or x.is_neg():
        # Copied here, if at all: once for both passes, and the copy alone is kept.
        rows = laid_out(flatten_batch(x).mT, pattern).mT
    y: Tensor = _LayerProduct.apply(rows, values, bias, *pattern)  # type: ignore[no-untyped-call]
    return y if rows.dim() == x.dim() else y.view(*x.shape[:-1], y.shape[1])


def _rows_of_y(x: Tensor, values: Tensor, pattern: DevicePattern, bias: Tensor | None) -> Tensor:
    """Return y, which is no view: torch refuses to write to one of a Function's memory, or made without gradients."""
    y = plain_spmm(values, laid_out(flatten_batch(x).mT, pattern), pattern, bias=bias).mT.contiguous()
    y = y if y.dtype is x.dtype else y.to(x.dtype)
    return (y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])).data


class _LayerProduct(torch.autograd.Function):
    """Arguments: x, values, bias or ``None``, and the five of ``DevicePattern``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, *rest: Tensor) -> Tensor:
        of_x, of_values = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if of_values else None, values if of_x else None, *rest)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return _rows_of_y(x, values, DevicePattern(*rest), bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, values, *rest = ctx.saved_tensors
        pattern, dtype = DevicePattern(*rest), ctx.dtype
        of_x, of_values, of_bias = ctx.needs_input_grad[:3]
        # Differentiated again, mapped, recorded or compiled, which may have begun after the forward pass.
        is_watched = torch.is_grad_enabled() or is_grads_batched(g) or not _nothing_looks_on()
        product, sampled = (spmm, sddmm) if is_watched else (plain_spmm, plain_sddmm)
        to = wide(dtype) if is_watched else dtype
        rows = flatten_batch(g)
        columns = rows.mT.to(to) if is_watched else laid_out(rows.mT, pattern, True)
        dx = dvalues = dbias = None
        if of_values and of_x and not is_watched:
            both = gradients(values, columns, flatten_batch(x).mT, pattern.csr(False))
            if both is not None:
                dvalues, dx = both[0].to(dtype), both[1].mT.to(dtype).reshape(ctx.shape)
        if of_values and dvalues is None:
            dvalues = sampled(columns, flatten_batch(x).mT.to(to), pattern).to(dtype)
        if of_x and dx is None:
            dx = product(values.to(to), columns, pattern, True).mT.to(dtype).reshape(ctx.shape)
        if of_bias:
            dbias = rows.sum(0, dtype=wide(dtype)).to(dtype)
        return dx, dvalues, dbias, *(None,) * 5
