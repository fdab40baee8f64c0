"""The products of the sparse form by the kernels of this package, for tensors on the CPU and in PyTorch's pool of threads.

They read a matrix that lies by features or by batch, and leave the product as the matrix lay: nothing is transposed before
or after.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskedlinear import kernels
from maskedlinear_torch._compat import is_zero_tensor
from maskedlinear_torch._storage import new_memory

__all__ = ["CSR", "are_for", "gradients", "lies_well", "linear", "masked_gradient", "sddmm", "spmm", "wide"]


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


class _Side(NamedTuple):
    """A matrix of some features and a batch, and how it lies in memory: that of a tensor that is kept here."""

    matrix: Tensor
    features: int
    batch: int
    by_batch: bool

    @classmethod
    def of(cls, matrix: Tensor) -> _Side:
        """Return that of a tensor (features, batch)."""
        matrix = lies_well(matrix)
        return cls(matrix, matrix.shape[0], matrix.shape[1], not matrix.is_contiguous())

    @classmethod
    def of_rows(cls, rows: Tensor) -> _Side:
        """Return that of a tensor (..., features), which has numbers."""
        rows, features = _settled(rows), rows.shape[-1]
        if rows.is_contiguous():
            return cls(rows, features, rows.numel() // features, True)
        return cls.of(rows.reshape(-1, features).mT)

    def room(self, dtype: str) -> Tensor:
        """Return room for its panels."""
        return _scratch(kernels.panel_numbers(self.features, self.batch, dtype), wide(self.matrix.dtype), self.matrix)


class _Panels(NamedTuple):
    """Room for the panels of a matrix, ``None`` where it is read as it is, and how wide they are if it is packed there."""

    room: Tensor | None
    width: int


def spmm(values: Tensor, right: Tensor, csr: CSR, bias: Tensor | None, *, as_it_lies: bool) -> Tensor:
    """Return the product, and a bias added last, which lies as ``right`` does, or by features; of half types as float32."""
    side, rows = _Side.of(right), csr.starts.shape[0] - 1
    out_by_batch = side.by_batch and as_it_lies
    # Not a view of another tensor: forward mode wants a view's tangent to lie as the view does.
    strides = (1, rows) if out_by_batch else (side.batch, 1)
    out = right.new_empty_strided((rows, side.batch), strides, dtype=wide(right.dtype))
    _multiply(values, side, csr, bias, out, out_by_batch)
    return out


def linear(x: Tensor, values: Tensor, csr: CSR, bias: Tensor | None) -> Tensor:
    """Return y (..., out), no view, for x (..., in); of half types as float32."""
    out = x.new_empty((*x.shape[:-1], csr.starts.shape[0] - 1), dtype=wide(x.dtype))
    _multiply(values, _Side.of_rows(x), csr, bias, out, True)
    return out


def _multiply(
    values: Tensor,
    right: _Side,
    csr: CSR,
    bias: Tensor | None,
    out: Tensor,
    out_by_batch: bool,
    panels: _Panels | None = None,
) -> None:
    """Write W times the matrix of ``right``, which ``panels`` may have already, and a bias, to ``out``."""
    values = _settled(values).contiguous()
    dtype, connections, rows = _DTYPES[values.dtype], values.numel(), csr.starts.shape[0] - 1
    starts, across, order = _indices(csr, connections)
    if order is not None and kernels.is_ordered_first(connections, right.batch, dtype):
        values, order = _in_order(values, order), None
    panels = panels or _Panels(None if kernels.is_direct(right.batch, right.by_batch, dtype) else right.room(dtype), 0)
    if bias is not None:
        bias = _settled(bias).contiguous()
        if bias.shape != (rows,) or bias.dtype is not values.dtype:
            raise ValueError(
                f"bias must have shape {(rows,)} in {values.dtype}; got {tuple(bias.shape)} in {bias.dtype}"
            )
    kernels.spmm(
        dtype,
        (rows, right.features),
        right.batch,
        connections,
        starts=_address(starts),
        across=_address(across),
        order=_address(order),
        values=_address(values),
        right=_address(right.matrix),
        panels=_address(panels.room),
        packed=panels.width,
        bias=_address(bias),
        out=_address(out),
        right_by_batch=right.by_batch,
        out_by_batch=out_by_batch,
        threads=torch.get_num_threads(),
    )


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
    return _sample(_Side.of(left), _Side.of(right), csr)[0]


# Rows of g up to which they are added up tile by tile, one after the other; torch adds up in pairs, nearer to what many are.
_MOST_SUMMED = 4096


def gradients(
    g: Tensor, x: Tensor | None, values: Tensor | None, csr: CSR, transposed: CSR, *, of_bias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of rows of x, if there are values, of values, if there is x, and of a bias; wide, of half types.

    Args:
        g: the gradient of y, (..., out), which has numbers.
        x: (..., in).
        values: (nnz,).
        csr: the pattern by rows.
        transposed: the pattern by columns.
        of_bias: whether there is one.
    """
    left, right = _Side.of_rows(g), None if x is None else _Side.of_rows(x)
    dx = dvalues = dbias = sums = panels = None
    if of_bias and right is not None and 1 < left.batch <= _MOST_SUMMED:  # formed by the way where rows of g are read
        dbias = sums = g.new_empty(left.features, dtype=wide(g.dtype))
    elif of_bias:
        dbias = g.reshape(-1, left.features).sum(0, dtype=wide(g.dtype))
    if right is not None and values is not None and _takes_less_time(right, values):
        return *_at_once(left, right, values, csr, sums), dbias
    if right is not None:
        dvalues, panels = _sample(left, right, csr, sums)
    if values is not None:
        dx = g.new_empty((left.batch, transposed.starts.shape[0] - 1), dtype=wide(g.dtype))
        _multiply(values, left, transposed, None, dx, True, panels)
    return dx, dvalues, dbias


def _takes_less_time(right: _Side, values: Tensor) -> bool:
    return kernels.are_gradients_at_once(right.features, right.batch, values.numel(), _DTYPES[values.dtype])


def _at_once(left: _Side, right: _Side, values: Tensor, csr: CSR, sums: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the rows of leftᵀ · W, which lie as ``right`` does, and what :func:`_sample` does."""
    values = _settled(values).contiguous()
    size = (right.batch, right.features) if right.by_batch else (right.features, right.batch)
    product = values.new_empty(size, dtype=wide(values.dtype))
    numbers = kernels.part_numbers(right.features, right.batch, _DTYPES[values.dtype])
    parts = _scratch(numbers, product.dtype, product)
    places = {"values": _address(values), "out_right": _address(product), "parts": _address(parts)}
    sampled, _ = _sample(left, right, csr, sums, kernels.gradients, values.numel(), **places)
    return product if right.by_batch else product.mT, sampled


def _sample(
    left: _Side,
    right: _Side,
    csr: CSR,
    sums: Tensor | None = None,
    kernel: Callable[..., int | None] | None = None,
    connections: int | None = None,
    **places: int,
) -> tuple[Tensor, _Panels]:
    """Return left · rightᵀ at the connections, by a kernel that does more, with ``places``, or not, and the panels of left.

    The sums of the rows of left are written to ``sums``.
    """
    dtype = _DTYPES[right.matrix.dtype]
    connections = csr.across.numel() if connections is None else connections
    starts, across, _ = _indices(csr, connections)
    rows = starts.shape[0] - 1
    if (rows, right.batch) != (left.features, left.batch):
        raise ValueError(
            f"left must have shape {(rows, right.batch)}, as the pattern and right have; got "
            f"{(left.features, left.batch)}"
        )
    is_direct = kernels.is_direct(left.batch, left.by_batch or right.by_batch, dtype)
    left_panels, right_panels = (None, None) if is_direct else (left.room(dtype), right.room(dtype))
    out = right.matrix.new_empty(connections, dtype=wide(right.matrix.dtype))
    form: Callable[..., int | None] = kernel or kernels.sddmm
    if kernel is None:
        numbers = kernels.sampled_numbers((rows, right.features), right.batch, connections, dtype)
        parts = _scratch(numbers, out.dtype, out)  # which the name keeps
        places = {"parts": _address(parts)}
    width = form(
        dtype,
        (rows, right.features),
        right.batch,
        connections,
        starts=_address(starts),
        across=_address(across),
        left=_address(left.matrix),
        left_panels=_address(left_panels),
        right=_address(right.matrix),
        right_panels=_address(right_panels),
        left_by_batch=left.by_batch,
        right_by_batch=right.by_batch,
        out=_address(out),
        left_sums=_address(sums),
        threads=torch.get_num_threads(),
        **places,
    )
    return out, _Panels(left_panels, width or 0)


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
