"""The products of the sparse form by the kernels of this package, for tensors on the CPU and in PyTorch's pool of threads.

They read a matrix that lies by features or by batch, and leave the product as the matrix lay: nothing is transposed before
or after.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskedlinear import kernels
from maskedlinear_torch._compat import is_zero_tensor
from maskedlinear_torch._storage import new_memory

__all__ = ["CSR", "are_for", "gradients", "lies_well", "masked_gradient", "sddmm", "spmm", "wide"]


class CSR(NamedTuple):
    """The compressed rows of a pattern or of its transpose, and where the values are, if not in its order."""

    starts: Tensor
    across: Tensor
    order: Tensor | None
    by_rows: Any = None  # of the transposed pattern: the CSR that it is the transpose of


# Bytes of scratch memory that are given back to the system: in the heap of glibc such pieces leave holes that no other one
# fits in, so that a process grew by half a gigabyte in ten steps. Getting smaller ones anew costs more than it saves.
_GIVEN_BACK = 24 << 20
_DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def are_for(*operands: Tensor) -> bool:
    """Whether the kernels take these: numbers of one dtype on the CPU, on a machine for which there are kernels."""
    dtype = operands[0].dtype
    for operand in operands:
        if not operand.is_cpu or operand.dtype is not dtype:
            return False
    return dtype in _DTYPES and kernels.is_available()


def lies_well(matrix: Tensor) -> Tensor:
    """Return a matrix that lies by features or by batch: itself, or a copy."""
    matrix = _settled(matrix)
    return matrix if matrix.is_contiguous() or matrix.mT.is_contiguous() else matrix.contiguous()


def _settled(tensor: Tensor) -> Tensor:
    """Return a tensor whose memory holds its numbers: not their negatives, and not nothing, for zeros."""
    return tensor.clone() if is_zero_tensor(tensor) else tensor.resolve_neg()


def _lies_by_batch(matrix: Tensor) -> bool:
    return not matrix.is_contiguous()


def spmm(values: Tensor, right: Tensor, csr: CSR, bias: Tensor | None, *, as_it_lies: bool) -> Tensor:
    """Return the product, and a bias added last, which lies as ``right`` does, or by features; of half types as float32."""
    right, values = lies_well(right), _settled(values).contiguous()
    (depth, batch), rows = right.shape, csr.starts.shape[0] - 1
    dtype, by_batch = _DTYPES[right.dtype], _lies_by_batch(right)
    out_by_batch = by_batch and as_it_lies
    # Not a view of another tensor: forward mode wants a view's tangent to lie as the view does.
    strides = (1, rows) if out_by_batch else (batch, 1)
    out = right.new_empty_strided((rows, batch), strides, dtype=wide(right.dtype))
    starts, across, order = _indices(csr, values.numel())
    if order is not None and kernels.is_ordered_first(values.numel(), batch, dtype):
        values, order = _in_order(values, order), None
    panels = None if kernels.is_direct(batch, by_batch, dtype) else _room(right, dtype)
    if bias is not None:
        bias = _settled(bias).contiguous()
        if bias.shape != (rows,) or bias.dtype is not values.dtype:
            raise ValueError(
                f"bias must have shape {(rows,)} in {values.dtype}; got {tuple(bias.shape)} in {bias.dtype}"
            )
    kernels.spmm(
        dtype,
        (rows, depth),
        batch,
        values.numel(),
        starts=_address(starts),
        across=_address(across),
        order=_address(order),
        values=_address(values),
        right=_address(right),
        panels=_address(panels),
        bias=_address(bias),
        out=_address(out),
        right_by_batch=by_batch,
        out_by_batch=out_by_batch,
        threads=torch.get_num_threads(),
    )
    return out


def _in_order(values: Tensor, order: Tensor) -> Tensor:
    ordered = _scratch(values.numel(), values.dtype, values)
    kernels.order_values(
        _DTYPES[values.dtype],
        values.numel(),
        values=_address(values),
        order=_address(order),
        out=_address(ordered),
        threads=torch.get_num_threads(),
    )
    return ordered


def sddmm(left: Tensor, right: Tensor, csr: CSR) -> Tensor:
    """Return the sampled product; of half types as float32."""
    sides = _Sides.of(left, right, csr, csr.across.numel())
    out = right.new_empty(csr.across.shape, dtype=wide(right.dtype))
    kernels.sddmm(*sides.sizes(), out=_address(out), **sides.told())
    return out


def gradients(values: Tensor, left: Tensor, right: Tensor, csr: CSR) -> tuple[Tensor, Tensor] | None:
    """Return left · rightᵀ at the connections, and Wᵀ · left, which lies as ``right`` does; of half types as float32.

    ``None`` where there are no kernels for these, or two products take less time, as they do but for few columns.
    """
    if not are_for(values, left, right):
        return None
    (depth, batch), dtype = right.shape, _DTYPES[right.dtype]
    if not kernels.are_gradients_at_once(depth, batch, values.numel(), dtype):
        return None
    values = _settled(values).contiguous()
    sides = _Sides.of(left, right, csr, values.numel())
    sampled = right.new_empty(csr.across.shape, dtype=wide(right.dtype))
    strides = (1, depth) if _lies_by_batch(sides.right) else (batch, 1)
    product = right.new_empty_strided((depth, batch), strides, dtype=sampled.dtype)
    parts = _scratch(kernels.part_numbers(depth, batch, dtype), sampled.dtype, right)
    kernels.gradients(
        *sides.sizes(),
        values=_address(values),
        out=_address(sampled),
        out_right=_address(product),
        parts=_address(parts),
        **sides.told(),
    )
    return sampled, product


class _Sides(NamedTuple):
    """Both sides of a sampled product, as the kernels read them, with room for their panels, and the pattern."""

    starts: Tensor
    across: Tensor
    left: Tensor
    right: Tensor
    left_panels: Tensor | None
    right_panels: Tensor | None

    @classmethod
    def of(cls, left: Tensor, right: Tensor, csr: CSR, connections: int) -> _Sides:
        left, right = lies_well(left), lies_well(right)
        batch, dtype = right.shape[1], _DTYPES[right.dtype]
        starts, across, _ = _indices(csr, connections)
        rows = starts.shape[0] - 1
        if left.shape != (rows, batch):
            raise ValueError(
                f"left must have shape {(rows, batch)}, as the pattern and right have; got {tuple(left.shape)}"
            )
        direct = kernels.is_direct(batch, _lies_by_batch(left) or _lies_by_batch(right), dtype)
        panels = (None, None) if direct else (_room(left, dtype), _room(right, dtype))
        return cls(starts, across, left, right, *panels)

    def sizes(self) -> tuple[str, tuple[int, int], int, int]:
        """Return the dtype, the shape of W, the batch, and how many connections there are."""
        depth, batch = self.right.shape
        return _DTYPES[self.right.dtype], (self.starts.shape[0] - 1, depth), batch, self.across.numel()

    def told(self) -> dict[str, Any]:
        """Return where all of it lies, and how, as long as it is there."""
        return {
            **{name: _address(tensor) for name, tensor in self._asdict().items()},
            "left_by_batch": _lies_by_batch(self.left),
            "right_by_batch": _lies_by_batch(self.right),
            "threads": torch.get_num_threads(),
        }


def _indices(csr: CSR, connections: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the indices as the kernels read them; their number is checked here, and what they say by the kernels."""
    starts, across, order, *_ = csr
    for index in (starts, across) if order is None else (starts, across, order):
        if index.dtype is not torch.int32 or (index is not starts and index.shape[0] != connections):
            raise ValueError(
                f"a pattern must have int32 indices, one for each of {connections} values; got {index.dtype} of length "
                f"{index.shape[0]}"
            )
    return starts.contiguous(), across.contiguous(), None if order is None else order.contiguous()


def _room(matrix: Tensor, dtype: str) -> Tensor:
    return _scratch(kernels.panel_numbers(matrix.shape[0], matrix.shape[1], dtype), wide(matrix.dtype), matrix)


def _scratch(numbers: int, dtype: torch.dtype, like: Tensor) -> Tensor:
    """Return room for what a product needs meanwhile, on the device of ``like``."""
    if numbers * dtype.itemsize <= _GIVEN_BACK:
        return like.new_empty(numbers, dtype=dtype)
    return new_memory((numbers,), dtype, _GIVEN_BACK)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of products of numbers of ``dtype``: float32 for half types."""
    return torch.promote_types(dtype, torch.float32)


def _address(tensor: Tensor | None) -> int:
    if tensor is None:
        return 0
    place = tensor.data_ptr()
    if not place and tensor.numel():
        raise RuntimeError(
            f"the kernels read memory, and a tensor of shape {tuple(tensor.shape)} has none: its storage was freed "
            "(by FSDP, or to offload it); bring it back before the call"
        )
    return place


# Up to which fraction of live weights, and from which batch on, their gradients take less time by themselves than with all
# others; measured on two cores with AVX2.
_FEW = 0.15
_FEWEST_ROWS = 64


def masked_gradient(g: Tensor, x: Tensor, mask: Tensor, out: Tensor) -> bool:
    """Write ``where(mask, gᵀ · x, 0)`` to ``out``, of which only the live ones are formed; or return that it is not the way.

    The mask is read at each call, eight entries at a time, so that nothing has to be kept, and nothing can be out of date.
    """
    is_wide = wide(out.dtype) is out.dtype  # half types' values would have to be placed
    if not (
        is_wide and are_for(g, x, out) and mask.is_contiguous() and mask.dtype is torch.bool and len(g) >= _FEWEST_ROWS
    ):
        return False
    shape, threads = (out.shape[0], out.shape[1]), torch.get_num_threads()
    starts = torch.zeros(shape[0] + 1, dtype=torch.int32)
    kernels.count_mask(shape, mask=_address(mask), starts=starts.data_ptr(), threads=threads)
    live = int(starts.sum())
    if live > _FEW * mask.numel() or not live:
        return False
    torch.cumsum(starts, 0, dtype=torch.int32, out=starts)
    across = torch.empty(live, dtype=torch.int32)
    where = {"starts": starts.data_ptr(), "across": across.data_ptr()}
    kernels.list_mask(shape, mask=_address(mask), threads=threads, **where)
    values = sddmm(g.mT, x.mT, CSR(starts, across, None))
    kernels.place_values(
        _DTYPES[out.dtype], shape, values=values.data_ptr(), out=out.data_ptr(), threads=threads, **where
    )
    return True
