"""The products of the sparse form off the CPU: by Triton, by panels and the dense product, or by torch's compressed rows.

``maskedlinear._gpu_rule`` says which. A panel is some rows of W, or of the product that is sampled, unpacked to at most
``LARGEST_PANEL`` bytes, beside which are 16 bytes of indices for each of its connections. It is multiplied by ``torch.mm``,
by cuBLAS on CUDA, with the user's precision, as a dense layer is. Operands may be of half types: products are float32 then,
added up in float32.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from maskedlinear import _gpu_rule
from maskedlinear._gpu_rule import Multiply, Product, Way
from maskedlinear_torch._compat import is_grads_batched

if TYPE_CHECKING:
    from maskedlinear_torch._products import CSR

__all__ = ["has_triton", "lies_well", "sddmm", "sddmm_in_panels", "spmm", "spmm_in_panels"]

_HALF = (torch.bfloat16, torch.float16)
_PLACE_BYTES = 36  # that are moved to find the place of a connection in a panel: one row's, twice, and that of it
_WIDEST = 1 << 21  # of a batch or of features, that Triton's programs are launched over
_HAS_OUT_DTYPE = hasattr(torch.ops.aten.mm, "dtype_out")  # CUDA's product of half types as float32


@functools.cache
def _triton() -> Any:
    """Return the module of Triton's kernels; ``None`` where Triton is not installed."""
    try:
        return importlib.import_module("maskedlinear_torch._triton_products")
    except ImportError:
        return None


def has_triton(tensor: Tensor) -> bool:
    """Whether Triton's kernels run on a tensor's device."""
    if not tensor.is_cuda or torch.version.hip is not None or _triton() is None:
        return False
    return torch.cuda.get_device_capability(tensor.device) >= (8, 0)


def spmm(values: Tensor, right: Tensor, csr: CSR) -> Tensor | None:
    """Return W · right, shape (rows, batch), for right (depth, batch); ``None`` if torch's own rows are the way.

    ``values`` are in the pattern's order, which ``csr.order`` turns into that of its rows.
    """
    rows, depth, is_transposed = len(csr.starts) - 1, right.shape[0], csr.order is not None
    way = _way(_product(rows, depth, right, csr), (values, right))
    if way == "rows":
        return _triton().rows_spmm(values.contiguous(), right.contiguous(), csr)  # type: ignore[no-any-return]
    if way == "tiles":
        by_rows, columns = (csr.by_rows, rows) if is_transposed else (csr, depth)
        of = (by_rows, columns, is_transposed, _multiply(right))
        return _triton().tiles_spmm(values.contiguous(), right, *of)  # type: ignore[no-any-return]
    if way == "bits":
        return _triton().bits_spmm(values.contiguous(), right, csr)  # type: ignore[no-any-return]
    if way == "panels":
        return spmm_in_panels(values, right, csr)
    return None


def lies_well(right: Tensor, csr: CSR) -> Tensor:
    """Return right (depth, batch) as W · right reads it.

    As a layer has it, (batch, depth), tiles take it, but in one case, and the dense product of panels, as a dense layer's.
    """
    if not has_triton(right):
        return right.contiguous()
    product = _product(len(csr.starts) - 1, right.shape[0], right, csr)
    way, along = _way(product, (right, right)), _gpu_rule.is_read_along(product.multiply, product.transposed)
    return right if way == "panels" or (way == "tiles" and along) else right.contiguous()


def _product(rows: int, depth: int, right: Tensor, csr: CSR, sampled: bool = False) -> Product:
    nnz, is_transposed = csr.across.numel(), csr.order is not None
    by_kernel = (sampled or _gpu_rule.has_bits(rows, depth, nnz)) and has_triton(right) and max(rows, depth) <= _WIDEST
    place_bytes = 0 if by_kernel else _PLACE_BYTES
    return Product(
        rows, depth, nnz, right.shape[1], right.itemsize, _multiply(right), sampled, is_transposed, place_bytes
    )


def sddmm(left: Tensor, right: Tensor, csr: CSR) -> Tensor | None:
    """Return left · rightᵀ at the connections, shape (nnz,); ``None`` if torch's own rows are the way."""
    way = _way(_product(left.shape[0], right.shape[0], right, csr, sampled=True), (left, right))
    if way == "rows":
        return _triton().rows_sddmm(left.contiguous(), right.contiguous(), csr)  # type: ignore[no-any-return]
    if way == "tiles":
        multiply = _multiply(right)
        return _triton().tiles_sddmm(left.contiguous(), right.contiguous(), csr, multiply)  # type: ignore[no-any-return]
    return sddmm_in_panels(left, right, csr) if way == "panels" else None


def _way(product: Product, operands: tuple[Tensor, Tensor]) -> Way:
    """Return how a product is formed on the operands' device."""
    if any(is_grads_batched(operand) for operand in operands):
        return "gathered"
    ways: list[Way]
    if max(product.batch, product.depth) <= _WIDEST and has_triton(operands[0]):
        ways = ["rows", "tiles"] if product.transposed else ["rows", "bits", "tiles"]  # in a fixed order, and faster
    else:
        ways = ["cusparse" if operands[0].is_cuda else "gathered"]
    # A graph that is captured cannot ask the device where panels begin.
    asks = product.place_bytes and _gpu_rule.panels(product) > 1
    if not (asks and operands[0].is_cuda and torch.cuda.is_current_stream_capturing()):
        ways += ["panels"]
    return _gpu_rule.choose(ways, product)


def spmm_in_panels(values: Tensor, right: Tensor, csr: CSR) -> Tensor:
    """Return W · right, a panel after the other in one piece of memory; of a transpose each adds to the whole product.

    So values are read as they lie: to find those of a column takes several times as long.
    """
    rows, (depth, batch), is_transposed = len(csr.starts) - 1, right.shape, csr.order is not None
    product = right.new_empty((rows, batch), dtype=torch.promote_types(right.dtype, torch.float32))
    by_rows, columns = (csr.by_rows, rows) if is_transposed else (csr, depth)
    values, panel, added = values.contiguous(), None, None
    for first, last, connections in _panels(by_rows, columns, _product(rows, depth, right, csr)):
        panel = right.new_empty(last - first, columns) if panel is None else panel
        dense = panel[: last - first]
        if connections is None:
            _triton().unpack(values, by_rows, first, dense)
        else:
            part, places = connections
            dense.zero_().view(-1).index_copy_(0, places, values[part])
        if not is_transposed:
            _multiply_into(product[first:last], dense, right)
        elif not first:
            _multiply_into(product, dense.mT, right[:last])
        elif right.dtype is product.dtype:
            product.addmm_(dense.mT, right[first:last])
        else:
            added = torch.empty_like(product) if added is None else added
            _multiply_into(added, dense.mT, right[first:last])
            product += added
    return product


def sddmm_in_panels(left: Tensor, right: Tensor, csr: CSR) -> Tensor:
    """Return left · rightᵀ at the connections: a panel after the other is formed in full, and sampled."""
    rows, depth = left.shape[0], right.shape[0]
    sampled = right.new_empty(csr.across.shape, dtype=torch.promote_types(right.dtype, torch.float32))
    panel = None
    for first, last, connections in _panels(csr, depth, _product(rows, depth, right, csr, sampled=True)):
        panel = sampled.new_empty(last - first, depth) if panel is None else panel
        dense = panel[: last - first]
        _multiply_into(dense, left[first:last], right.mT)
        if connections is None:
            _triton().sample(dense, csr, first, sampled)
        else:
            part, places = connections
            torch.index_select(dense.view(-1), 0, places, out=sampled[part])
    return sampled


def _panels(csr: CSR, columns: int, product: Product) -> Iterator[tuple[int, int, tuple[slice, Tensor] | None]]:
    """Yield for each panel its first row, and the one past its last, and its connections with their places in it.

    ``None`` in place of these where a kernel in Triton finds them.
    """
    rows = len(csr.starts) - 1
    height = -(-rows // max(1, _gpu_rule.panels(product)))
    firsts = range(0, rows, height)
    if not product.place_bytes:
        yield from ((first, min(first + height, rows), None) for first in firsts)
        return
    if len(firsts) == 1:  # nothing to ask the device for
        ends = [0, csr.across.numel()]
    else:
        ends = [*csr.starts[::height][: len(firsts)].tolist(), csr.across.numel()]
    for i, first in enumerate(firsts):
        last, part = min(first + height, rows), slice(ends[i], ends[i + 1])
        row = torch.repeat_interleave(csr.starts[first : last + 1].diff().long(), output_size=part.stop - part.start)
        yield first, last, (part, torch.add(csr.across[part], row, alpha=columns, out=row))


def _multiply_into(product: Tensor, one: Tensor, other: Tensor) -> None:
    """Write one · other into ``product``, which is float32 where these are of a half type."""
    if one.dtype is product.dtype:  # what writes elsewhere is not cast by autocast
        torch.mm(one, other, out=product)
    elif one.is_cuda and _HAS_OUT_DTYPE:
        torch.mm(one, other, out_dtype=product.dtype, out=product)  # type: ignore[call-overload, unused-ignore]
    elif one.is_cuda:  # added up in float32, and rounded once more
        product.copy_(torch.mm(one, other))
    else:
        torch.mm(one.to(product.dtype), other.to(product.dtype), out=product)


def _multiply(tensor: Tensor) -> Multiply:
    """How the dense product multiplies on this device, by the user's settings."""
    if tensor.dtype in _HALF:
        return "half"
    if tensor.dtype is torch.float64:
        return "float64"
    try:
        return "float32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    except RuntimeError:  # set in torch's new way, which it says nothing of in its old one
        return "float32" if torch.backends.cuda.matmul.fp32_precision == "ieee" else "tf32"
