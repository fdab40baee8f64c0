"""The three products of the sparse form: a closed set, in which the derivative of each is made of the other two.

They work on matrices of features by batch, (in, batch) and (out, batch), because that is how sparse rows are walked fastest.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from maskedlinear import kernels
from maskedlinear_torch import _cpu_kernels, _gpu_products
from maskedlinear_torch._compat import (
    in_transform,
    is_any_autocast_on,
    is_dispatch_mode_on,
    is_forward_mode,
    is_grads_batched,
    is_nested,
    is_tracing,
)
from maskedlinear_torch._cpu_kernels import CSR
from maskedlinear_torch._device_pattern import DevicePattern
from maskedlinear_torch._gathered_products import sddmm_gathered, spmm_gathered
from maskedlinear_torch._storage import is_plain

__all__ = [
    "CSR",
    "DevicePattern",
    "Matrix",
    "are_for_kernels",
    "are_ordinary_rows",
    "is_fake",
    "laid_out",
    "may_be_one_row",
    "plain_sddmm",
    "plain_spmm",
    "sddmm",
    "sddmm_expression",
    "spmm",
    "spmm_expression",
]

_LANES = 8  # columns that the sampled product takes at a time


def may_be_one_row(x: Any, in_features: int) -> bool:
    """Whether x is an ordinary tensor of one row, and nothing changes what its product is."""
    return type(x) is Tensor and x.numel() == in_features and are_ordinary_rows(x, in_features)


def are_ordinary_rows(x: Any, in_features: int) -> bool:
    """Whether x is an ordinary tensor of rows, and nothing changes what its product is."""
    return (
        type(x) is Tensor
        and not torch.compiler.is_compiling()
        and not is_tracing()
        and not is_dispatch_mode_on()
        and not in_transform()
        and x.shape[-1:] == (in_features,)
        and not is_any_autocast_on()
    )


class Matrix:
    """W of one layer in compressed rows, made once: it shares the memory of its values, so it is never out of date.

    For a product with one row of x, in inference: making the matrix takes a good part of the time that the product takes.
    """

    def __init__(self) -> None:
        self._made: tuple[tuple[Any, ...], Tensor, Tensor, Tensor] | None = None

    def times(self, x: Tensor, values: Tensor, indptr: Tensor, indices: Tensor, bias: Tensor | None) -> Tensor | None:
        """Return y for x with one row, or ``None`` where that is not the way, or something does not belong together."""
        if type(values) not in (torch.nn.Parameter, Tensor) or is_forward_mode():
            return None
        if _gpu_products.has_triton(x) or (x.is_cpu and kernels.is_forked()):
            return None
        if bias is not None and (bias.dim() != 1 or len(bias) != len(indptr) - 1 or not bias.data_ptr()):
            return None
        try:
            matrix = self._of(x, values, indptr, indices)
            if matrix is None:
                return None
            vector = x if x.dim() == 1 else x.reshape(-1)
            y = torch.mv(matrix, vector) if bias is None else torch.addmv(bias, matrix, vector)
        except RuntimeError:  # torch refuses what does not belong together; the checks say it better
            return None
        return y if x.dim() == 1 else y.view(*x.shape[:-1], len(y)).data  # no view, which could not be written to

    def _of(self, x: Tensor, values: Tensor, indptr: Tensor, indices: Tensor) -> Tensor | None:
        """Return the matrix, made anew if values lie elsewhere or otherwise, or an index was written to."""
        lies = len(values), values.is_contiguous(), values.is_neg(), values.data_ptr()
        seen, made = (lies, indptr._version, indices._version), self._made
        if made is not None and made[0] == seen and made[1] is indptr and made[2] is indices:
            return made[3]
        if lies[:3] != (len(indices), True, False) or not lies[3] or values.itemsize < 4 or not _has_kernels(x):
            return None
        if are_for_kernels(values, x) and kernels.is_row_by_kernel((len(indptr) - 1, x.numel()), len(values)):
            return None
        with torch.inference_mode(False), torch.no_grad():  # it outlives the call
            matrix = _csr(CSR(indptr, indices, None), values.detach(), x.numel())
        self._made = seen, indptr, indices, matrix
        return matrix

    def __deepcopy__(self, _: Any) -> Matrix:
        """A copied layer makes its own."""
        return Matrix()

    def __reduce__(self) -> tuple[type[Matrix], tuple[()]]:
        """So does one that was saved."""
        return Matrix, ()


def spmm(values: Tensor, right: Tensor, pattern: DevicePattern, transposed: bool = False) -> Tensor:
    """Return W · right, shape (out, batch) for right (in, batch); or Wᵀ · right, the other way round.

    W (out, in) has ``values (nnz,)`` where ``pattern`` has a connection. float32 or float64.
    """
    if _is_looked_at(right):
        if _is_past_operators():
            return spmm_expression(values, right, pattern, transposed)
        return torch.ops.maskedlinear.spmm(values, right, *pattern, transposed)  # type: ignore[no-any-return]
    if is_plain(values) and is_plain(right):
        return plain_spmm(values, right, pattern, transposed)
    if is_nested("Jvp"):
        return spmm_expression(values, right, pattern, transposed)
    return _Spmm.apply(values, right, *pattern, transposed)  # type: ignore[no-any-return, no-untyped-call]


def laid_out(matrix: Tensor, pattern: DevicePattern, transposed: bool = False) -> Tensor:
    """Return the right side of :func:`spmm` as the products read it, so that none of them has to copy it twice."""
    if torch.compiler.is_compiling() or is_fake(matrix):
        return matrix.contiguous()
    if _cpu_kernels.are_for(matrix):
        return _cpu_kernels.lies_well(matrix)
    return _gpu_products.lies_well(matrix, pattern.csr(transposed))


def sddmm(left: Tensor, right: Tensor, pattern: DevicePattern) -> Tensor:
    """Return left · rightᵀ at the connections, shape (nnz,), for left (out, batch) and right (in, batch)."""
    if _is_looked_at(right):
        if _is_past_operators():
            return sddmm_expression(left, right, pattern)
        return torch.ops.maskedlinear.sddmm(left, right, *pattern)  # type: ignore[no-any-return]
    if is_plain(left) and is_plain(right):
        return plain_sddmm(left, right, pattern)
    if is_nested("Jvp"):
        return sddmm_expression(left, right, pattern)
    return _Sddmm.apply(left, right, *pattern)  # type: ignore[no-any-return, no-untyped-call]


# Where a rule of ours would lose tangents without a word, torch differentiates an expression: a Function's rule loses those
# of the outer of two forward modes (https://github.com/pytorch/pytorch/issues/197867); a custom operator has none, and its
# reverse mode is none of torch.func's. It gathers all of connections x batch at once.


def spmm_expression(values: Tensor, right: Tensor, pattern: DevicePattern, transposed: bool) -> Tensor:
    rows, across = pattern.ends()
    starts = pattern.indptr
    if transposed:
        rows, across, starts = across, rows, pattern.starts
    gathered = values[:, None] * _rows_of(right, across)
    # Not index_add, nor index_select, whose gradient is one: of its tangent inductor makes a sum with its primal, because
    # it takes the two matrices of zeros for one.
    return right.new_zeros(starts.shape[0] - 1, right.shape[1]).scatter_add(0, _places(rows, gathered), gathered)


def _places(rows: Tensor, gathered: Tensor) -> Tensor:
    return rows.long()[:, None].expand(gathered.shape)


def _rows_of(matrix: Tensor, rows: Tensor) -> Tensor:
    return matrix.gather(0, rows.long()[:, None].expand(-1, matrix.shape[1]))


def sddmm_expression(left: Tensor, right: Tensor, pattern: DevicePattern) -> Tensor:
    rows, columns = pattern.ends()
    return (_rows_of(left, rows) * _rows_of(right, columns)).sum(1)


def _is_looked_at(tensor: Tensor) -> bool:
    """Whether a product becomes part of a program, or something looks at operators: kernels read memory, unseen by these."""
    return torch.compiler.is_compiling() or is_fake(tensor) or is_dispatch_mode_on() or is_tracing()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_past_operators() -> bool:
    """Whether a transform of ``torch.func`` or forward mode was on when a program was traced, or ``torch.jit`` traces it."""
    return is_forward_mode() or in_transform() or is_tracing()


def is_fake(tensor: Tensor) -> bool:
    """Whether ``tensor`` has a shape and no values, though its device has: of these, only operators know what they give."""
    return type(tensor) not in (Tensor, torch.nn.Parameter) and hasattr(tensor, "fake_mode")


# Half types are read by kernels of ours alone, and widened for all others; these products are float32.


def plain_spmm(
    values: Tensor, right: Tensor, pattern: DevicePattern, transposed: bool = False, bias: Tensor | None = None
) -> Tensor:
    """Return what :func:`spmm` does, of ordinary tensors that nothing differentiates; of half types float32.

    A ``bias``, of the dtype of values, is added last to each column.
    """
    return _spmm(values, right, pattern.csr(transposed), bias)


def plain_sddmm(left: Tensor, right: Tensor, pattern: DevicePattern) -> Tensor:
    """Return what :func:`sddmm` does, of ordinary tensors that nothing differentiates; of half types float32."""
    return _sddmm(left, right, pattern.csr(False))


def are_for_kernels(*operands: Tensor) -> bool:
    """Whether our own kernels multiply these: on the CPU, of one dtype, with numbers, and no batch of gradients."""
    return _cpu_kernels.are_for(*operands) and not any(not side.numel() or is_grads_batched(side) for side in operands)


def _spmm(values: Tensor, right: Tensor, csr: CSR, bias: Tensor | None = None, *, as_it_lies: bool = True) -> Tensor:
    if are_for_kernels(values, right):
        return _cpu_kernels.spmm(values, right, csr, bias, as_it_lies=as_it_lies)
    product = _spmm_without_kernels(values, right, csr)
    return product if bias is None else product.add_(bias[:, None])


def _spmm_without_kernels(values: Tensor, right: Tensor, csr: CSR) -> Tensor:
    rows, (depth, batch) = csr.starts.shape[0] - 1, right.shape
    wide = _cpu_kernels.wide(right.dtype)
    if not values.numel() or not batch:
        return right.new_zeros(rows, batch, dtype=wide)
    if _is_on_gpu(right) and (product := _gpu_products.spmm(values, right, csr)) is not None:
        return product
    values, right = values.to(wide), right.to(wide)
    if csr.order is not None:
        values = values.index_select(0, csr.order)
    if not _has_kernels(values, right):
        return spmm_gathered(values, right, csr)
    matrix = _csr(csr, values.contiguous(), depth)
    with _no_autocast(right.device.type):
        if batch == 1:  # a matrix times a vector takes less than half the time
            return torch.mv(matrix, right.reshape(depth))[:, None]
        return matrix @ right.contiguous()


def _sddmm(left: Tensor, right: Tensor, csr: CSR) -> Tensor:
    depth, batch = right.shape
    wide = _cpu_kernels.wide(right.dtype)
    if not csr.across.numel() or not batch:
        return right.new_zeros(csr.across.shape, dtype=wide)
    if are_for_kernels(left, right):
        return _cpu_kernels.sddmm(left, right, csr)
    if _is_on_gpu(right) and (product := _gpu_products.sddmm(left, right, csr)) is not None:
        return product
    left, right = left.to(wide), right.to(wide)
    if not _has_kernels(left, right):
        return sddmm_gathered(left, right, csr)
    if 1 < batch < _LANES and right.device.type == "cpu":  # what is left over takes longer than all the rest
        left, right = (torch.nn.functional.pad(side, (0, _LANES - batch)) for side in (left, right))
    matrix = _csr(csr, right.new_zeros(csr.across.shape), depth)
    with _no_autocast(right.device.type):
        sampled: Tensor = torch.sparse.sampled_addmm(matrix, left.contiguous(), right.contiguous().mT, beta=0)
    return sampled.values()


def _is_on_gpu(tensor: Tensor) -> bool:
    return tensor.device.type not in ("cpu", "meta")


def _has_kernels(*operands: Tensor) -> bool:
    """Whether torch multiplies compressed rows of these: on the CPU by MKL, whose threads no fork has, and no batches."""
    there = operands[0].device.type == "cuda" or (torch.backends.mkl.is_available() and not kernels.is_forked())
    return there and not any(is_grads_batched(operand) for operand in operands)


def _no_autocast(kind: str) -> AbstractContextManager[Any]:
    """Return a context without automatic casts: the arguments have their dtypes already, and there are no narrow kernels."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _csr(csr: CSR, values: Tensor, depth: int) -> Tensor:
    """Return compressed rows of torch's, whose indices it looks at if somebody has written to them: a pattern's are right.

    Raises:
        RuntimeError: if they are not.
    """
    shape, is_edited = (len(csr.starts) - 1, depth), _edits(csr.starts) or _edits(csr.across)
    return torch.sparse_csr_tensor(csr.starts, csr.across, values, shape, check_invariants=bool(is_edited))


def _edits(indices: Tensor) -> int:
    """Return how many times a tensor was written to since it was made, as far as torch counts that."""
    return 0 if indices.is_inference() else indices._version


def _silence() -> None:
    """Have torch say once, unheard, that its compressed rows are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 1], [0], [1.0], (1, 1), device="cpu")


_silence()


def _tangent(product: Callable[..., Tensor], sides: Any, moved: Any, *rest: Any) -> Tensor:
    """Return the derivative of a product of two along ``moved``, whose entries may be ``None``."""
    (one, other), (done, dother) = sides, moved
    parts = [] if done is None else [product(done, other, *rest)]
    if dother is not None:
        parts.append(product(one, dother, *rest))
    return sum(parts[1:], parts[0])


class _Spmm(torch.autograd.Function):
    """Arguments: values, right, the five of ``DevicePattern``, and whether the product is the transposed one."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        values, right, *pattern, transposed = inputs
        return _spmm(values, right, DevicePattern(*pattern).csr(transposed))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:7])
        ctx.save_for_forward(*inputs[:7])
        ctx.transposed = inputs[7]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        values, right, *rest = ctx.saved_tensors
        pattern = DevicePattern(*rest)
        g = laid_out(g, pattern, not ctx.transposed)  # once for both products
        dvalues = dright = None
        if ctx.needs_input_grad[0]:
            dvalues = sddmm(right, g, pattern) if ctx.transposed else sddmm(g, right, pattern)
        if ctx.needs_input_grad[1]:
            dright = spmm(values, g, pattern, not ctx.transposed)
        return dvalues, dright, *(None,) * 6

    @staticmethod
    def jvp(ctx: Any, dvalues: Tensor | None, dright: Tensor | None, *_: None) -> Tensor:
        values, right, *rest = ctx.saved_tensors
        return _tangent(spmm, (values, right), (dvalues, dright), DevicePattern(*rest), ctx.transposed)

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], values: Tensor, right: Tensor, *rest: Any) -> tuple[Tensor, int]:
        pattern, transposed = DevicePattern(*rest[:5]), rest[5]
        _refuse_mapped(dims[2:7])
        if dims[0] is None:  # one product, of all batches side by side
            right = right.movedim(dims[1] or 0, 0)
            copies, depth, batch = right.shape
            product = spmm(values, right.movedim(1, 0).reshape(depth, copies * batch), pattern, transposed)
            return product.reshape(product.shape[0], copies, batch), 1
        one_by_one = [
            spmm(values.select(dims[0], i), right if dims[1] is None else right.select(dims[1], i), pattern, transposed)
            for i in range(info.batch_size)
        ]
        columns = (right if dims[1] is None else right.movedim(dims[1], 0)).shape[-1]
        return _stacked(one_by_one, right, len(pattern.csr(transposed).starts) - 1, columns), 0


class _Sddmm(torch.autograd.Function):
    """Arguments: left, right, and the five of ``DevicePattern``."""

    @staticmethod
    def forward(*inputs: Tensor) -> Tensor:
        left, right, *pattern = inputs
        return _sddmm(left, right, DevicePattern(*pattern).csr(False))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        left, right, *rest = ctx.saved_tensors
        pattern = DevicePattern(*rest)
        dleft = spmm(g, right, pattern) if ctx.needs_input_grad[0] else None
        dright = spmm(g, left, pattern, True) if ctx.needs_input_grad[1] else None
        return dleft, dright, *(None,) * 5

    @staticmethod
    def jvp(ctx: Any, dleft: Tensor | None, dright: Tensor | None, *_: None) -> Tensor:
        left, right, *rest = ctx.saved_tensors
        return _tangent(sddmm, (left, right), (dleft, dright), DevicePattern(*rest))

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], left: Tensor, right: Tensor, *rest: Tensor) -> tuple[Tensor, int]:
        _refuse_mapped(dims[2:])
        one_by_one = [
            sddmm(
                left if dims[0] is None else left.select(dims[0], i),
                right if dims[1] is None else right.select(dims[1], i),
                DevicePattern(*rest),
            )
            for i in range(info.batch_size)
        ]
        return _stacked(one_by_one, right, len(rest[1])), 0


def _stacked(products: list[Tensor], like: Tensor, *shape: int) -> Tensor:
    """Return products side by side, also of none."""
    return torch.stack(products) if products else like.new_zeros(0, *shape)


# torch asks for the signature of a forward at every call, which takes longer than the call if it must be found each time.
for _rule in (_Spmm, _Sddmm):
    _rule.forward.__signature__ = inspect.signature(_rule.forward)  # type: ignore[union-attr]


def _refuse_mapped(dims: tuple[int | None, ...]) -> None:
    if any(dim is not None for dim in dims):
        raise ValueError("a pattern cannot be mapped over by torch.vmap: its size is the size of the values")


# Under torch.compile, which refuses a Function with a forward-mode rule, and for fake tensors: the same products, opaque.


@torch.library.custom_op("maskedlinear::spmm", mutates_args=())
def _spmm_op(
    values: Tensor,
    right: Tensor,
    indptr: Tensor,
    indices: Tensor,
    starts: Tensor,
    outputs: Tensor,
    order: Tensor,
    transposed: bool,
) -> Tensor:
    return _spmm(
        values, right, DevicePattern(indptr, indices, starts, outputs, order).csr(transposed), as_it_lies=False
    )


@_spmm_op.register_fake
def _(
    values: Tensor,
    right: Tensor,
    indptr: Tensor,
    indices: Tensor,
    starts: Tensor,
    outputs: Tensor,
    order: Tensor,
    transposed: bool,
) -> Tensor:
    rows = (starts if transposed else indptr).shape[0] - 1
    return right.new_empty(rows, right.shape[1], dtype=_cpu_kernels.wide(right.dtype))


@torch.library.custom_op("maskedlinear::sddmm", mutates_args=())
def _sddmm_op(
    left: Tensor, right: Tensor, indptr: Tensor, indices: Tensor, starts: Tensor, outputs: Tensor, order: Tensor
) -> Tensor:
    return _sddmm(left, right, CSR(indptr, indices, None))


@_sddmm_op.register_fake
def _(
    left: Tensor, right: Tensor, indptr: Tensor, indices: Tensor, starts: Tensor, outputs: Tensor, order: Tensor
) -> Tensor:
    return right.new_empty(indices.shape, dtype=_cpu_kernels.wide(right.dtype))


def _spmm_saved(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.transposed = inputs[7]


def _spmm_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    values, right, *rest = ctx.saved_tensors
    sides = (right, g) if ctx.transposed else (g, right)
    dvalues = torch.ops.maskedlinear.sddmm(*sides, *rest) if ctx.needs_input_grad[0] else None
    dright = torch.ops.maskedlinear.spmm(values, g, *rest, not ctx.transposed) if ctx.needs_input_grad[1] else None
    return dvalues, dright, *(None,) * 6


def _sddmm_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    left, right, *rest = ctx.saved_tensors
    dleft = torch.ops.maskedlinear.spmm(g, right, *rest, False) if ctx.needs_input_grad[0] else None
    dright = torch.ops.maskedlinear.spmm(g, left, *rest, True) if ctx.needs_input_grad[1] else None
    return dleft, dright, *(None,) * 5


_spmm_op.register_autograd(_spmm_backward, setup_context=_spmm_saved)
_sddmm_op.register_autograd(_sddmm_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
