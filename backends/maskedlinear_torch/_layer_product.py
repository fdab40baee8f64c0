"""``y = x · Wᵀ + bias`` of the sparse form in one step, where autograd alone looks on: what a model asks for at most calls.

One Function: by operators each call records five nodes, and takes a third longer in Python. No copy in float32 is kept of
half types: kernels on CPUs, cuBLAS and Triton read them as they are. Under transforms, forward mode, tracing and the
compiler, and to differentiate again, ``spmm`` of ``_products`` says the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maskedlinear_torch import _cpu_kernels
from maskedlinear_torch._compat import is_any_autocast_on, is_dispatch_mode_on, is_grads_batched, nothing_looks_on
from maskedlinear_torch._cpu_kernels import wide
from maskedlinear_torch._functional import FLOATING, flatten_batch
from maskedlinear_torch._products import DevicePattern, are_for_kernels, laid_out, plain_sddmm, plain_spmm, sddmm, spmm

__all__ = ["belong_together", "is_layer_product", "layer_product"]

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


def belong_together(x: Tensor, values: Tensor, pattern: DevicePattern, in_features: int, bias: Tensor | None) -> bool:
    """Whether what :func:`is_layer_product` is true of may be multiplied as it is.

    Asked at every call, in a third of the time of the checks that say what does not belong, which are for all others.
    """
    dtype, device, shape = values.dtype, values.device, x.shape
    return (
        x.dtype is dtype
        and x.device == device
        and dtype in FLOATING
        and len(shape) > 0
        and shape[-1] == in_features
        and values.shape == pattern.indices.shape
        and (
            bias is None
            or (bias.dtype is dtype and bias.device == device and bias.shape == (pattern.indptr.shape[0] - 1,))
        )
        and not is_any_autocast_on()
    )


def _nothing_looks_on() -> bool:
    return not torch.compiler.is_compiling() and nothing_looks_on() and not is_dispatch_mode_on()


def layer_product(x: Tensor, values: Tensor, pattern: DevicePattern, bias: Tensor | None) -> Tensor:
    """Return y (..., out) for x (..., in) and values (nnz,) of one dtype; summed up in float32, if not float64."""
    if not torch.is_grad_enabled():
        return _y(x, values, pattern, bias)
    if not (x.is_cpu and x.is_contiguous()) or x.is_neg():
        # Copied here, if at all: once for both passes, and the copy alone is kept.
        x = laid_out(flatten_batch(x).mT, pattern).mT.view(x.shape)
    return _LayerProduct.apply(x, values, bias, pattern)  # type: ignore[no-any-return, no-untyped-call]


def _y(x: Tensor, values: Tensor, pattern: DevicePattern, bias: Tensor | None) -> Tensor:
    """Return y, which is no view: torch refuses to write to one of a Function's memory, or made without gradients."""
    if are_for_kernels(values, x):
        y = _cpu_kernels.linear(x, values, pattern.csr(False), bias)
    else:
        y = plain_spmm(values, laid_out(flatten_batch(x).mT, pattern), pattern, bias=bias).mT.contiguous()
        y = y.view(*x.shape[:-1], y.shape[1]).data
    return y if y.dtype is x.dtype else y.to(x.dtype)


class _LayerProduct(torch.autograd.Function):
    """Arguments: x, values, bias or ``None``, and the pattern, whole: of indices one by one autograd would keep books."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, pattern: DevicePattern) -> Tensor:
        of_x, of_values = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if of_values else None, values if of_x else None, *pattern)
        ctx.shape = x.shape
        return _y(x, values, pattern, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, values, *rest = ctx.saved_tensors
        dtype = g.dtype
        # Differentiated again, mapped, recorded or compiled, which may have begun after the forward pass.
        is_watched = torch.is_grad_enabled() or is_grads_batched(g) or not _nothing_looks_on()
        form = _watched_gradients if is_watched else _gradients
        dx, *others = form(g, x, values, DevicePattern(*rest), ctx.needs_input_grad[2])
        if dx is not None and dx.shape != ctx.shape:
            dx = dx.reshape(ctx.shape)
        return *(side if side is None or side.dtype is dtype else side.to(dtype) for side in (dx, *others)), None


# Gradients of rows of x, if there are values, of values, if there is x, and of a bias, if there is one; of half types
# as float32.
_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def _gradients(g: Tensor, x: Tensor | None, values: Tensor | None, pattern: DevicePattern, of_bias: bool) -> _Gradients:
    if pattern.indices.numel() and are_for_kernels(g, *(side for side in (x, values) if side is not None)):
        return _cpu_kernels.gradients(g, x, values, pattern.csr(False), pattern.csr(True), of_bias=of_bias)
    g = flatten_batch(g)
    columns = laid_out(g.mT, pattern, True)
    dx = None if values is None else plain_spmm(values, columns, pattern, True).mT
    dvalues = None if x is None else plain_sddmm(columns, flatten_batch(x).mT, pattern)
    return dx, dvalues, g.sum(0, dtype=wide(g.dtype)) if of_bias else None


def _watched_gradients(
    g: Tensor, x: Tensor | None, values: Tensor | None, pattern: DevicePattern, of_bias: bool
) -> _Gradients:
    """Return the same by products that say what they are to whoever looks on."""
    to, g = wide(g.dtype), flatten_batch(g)
    columns = g.mT.to(to)
    dx = None if values is None else spmm(values.to(to), columns, pattern, True).mT
    dvalues = None if x is None else sddmm(columns, flatten_batch(x).mT.to(to), pattern)
    return dx, dvalues, g.sum(0, dtype=to) if of_bias else None
