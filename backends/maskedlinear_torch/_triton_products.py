"""The products of the sparse form on CUDA by the core's kernels in Triton, of PyTorch's tensors. Imported where Triton is.

By rows, and by a bit for each place of W: with those, a few rows of x at once, tiles for any batch, and panels, which are
unpacked for cuBLAS, or sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from maskedlinear import _triton_rows, _triton_tiles
from maskedlinear._gpu_rule import Multiply, words_of
from maskedlinear._triton_rows import Launch, Sizes

__all__ = ["bits_of", "bits_spmm", "rows_sddmm", "rows_spmm", "sample", "tiles_sddmm", "tiles_spmm", "unpack"]


def rows_spmm(values: Tensor, right: Tensor, csr: Any) -> Tensor:
    """Return W · right, shape (rows, batch), for right (depth, batch): float32, or float64 of float64."""
    rows, (depth, batch), ordered = len(csr.starts) - 1, right.shape, csr.order is not None
    product = right.new_empty((rows, batch), dtype=_wide(right.dtype))
    sizes = Sizes(rows, depth, csr.across.numel(), batch)
    launch = _triton_rows.rows_spmm(sizes, right.itemsize, ordered=ordered, checked=False)
    _run(launch, values, right, csr.starts, csr.across, csr.order if ordered else csr.across, into=[product])
    return product


def rows_sddmm(left: Tensor, right: Tensor, csr: Any) -> Tensor:
    """Return left · rightᵀ at the connections, shape (nnz,), of left (rows, batch): float32, or float64 of float64."""
    sampled = right.new_empty(csr.across.shape, dtype=_wide(right.dtype))
    sizes = Sizes(len(left), len(right), sampled.numel(), right.shape[1])
    _run(
        _triton_rows.rows_sddmm(sizes, right.itemsize, checked=False),
        left,
        right,
        csr.starts,
        csr.across,
        into=[sampled],
    )
    return sampled


def bits_spmm(values: Tensor, right: Tensor, csr: Any) -> Tensor:
    """Return W · right, shape (rows, batch), for right (depth, batch) of at most 16 columns; not transposed."""
    rows, (depth, batch) = len(csr.starts) - 1, right.shape
    product = right.new_empty((rows, batch), dtype=_wide(right.dtype))
    launch = _triton_rows.bits_spmm(Sizes(rows, depth, values.numel(), batch), right.itemsize, checked=False)
    _run(launch, values, right.mT.contiguous(), *bits_of(csr, depth), into=[product])
    return product


def tiles_spmm(
    values: Tensor, right: Tensor, csr: Any, depth: int, transposed: bool, multiply: Multiply, up: bool = False
) -> Tensor:
    """Return W · right, shape (rows, batch), for right (depth, batch), or, transposed, Wᵀ · right, as float32.

    ``csr`` is W by rows both times, ``depth`` its columns; ``up`` widens before the product, which the interpreter needs.
    """
    sizes = Sizes(len(csr.starts) - 1, depth, values.numel(), right.shape[1])
    launch = _triton_tiles.spmm(sizes, right.itemsize, multiply, transposed=transposed, checked=False, up=up)
    shape = launch.grid[2], depth if transposed else sizes.rows, sizes.batch
    products = right.new_empty(shape, dtype=torch.float32)
    right = (right.mT if launch.told["ALONG"] else right).contiguous()
    _run(launch, values, right, *bits_of(csr, depth), into=[products])
    return products[0] if len(products) == 1 else products.sum(0)


def tiles_sddmm(left: Tensor, right: Tensor, csr: Any, multiply: Multiply, up: bool = False) -> Tensor:
    """Return left · rightᵀ at the connections, shape (nnz,), as float32."""
    sampled = right.new_empty(csr.across.shape, dtype=torch.float32)
    sizes = Sizes(len(left), len(right), sampled.numel(), right.shape[1])
    launch = _triton_tiles.sddmm(sizes, right.itemsize, multiply, checked=False, up=up)
    _run(launch, left, right, *bits_of(csr, sizes.depth), into=[sampled])
    return sampled


def unpack(values: Tensor, csr: Any, first: int, panel: Tensor) -> None:
    """Write rows of W, from ``first`` on, to a panel (rows, depth)."""
    rows, depth = panel.shape
    bits, firsts = (of[first : first + rows] for of in bits_of(csr, depth))
    _run(_triton_rows.panel(rows, depth, values.numel()), values, bits, firsts, into=[panel])


def sample(panel: Tensor, csr: Any, first: int, sampled: Tensor) -> None:
    """Write what a panel (rows, depth) has at the connections of rows from ``first`` on to their places in ``sampled``."""
    rows, depth = panel.shape
    launch = _triton_rows.sample(rows, depth, sampled.numel() // max(1, len(csr.starts) - 1))
    _run(launch, panel, csr.starts[first:], csr.across, into=[sampled])


def _run(launch: Launch, *pointers: Tensor, into: Sequence[Tensor]) -> None:
    """Run a kernel that writes to some tensors, on their device; interpreted, on the CPU."""
    with torch.cuda.device(into[0].device) if into[0].is_cuda else nullcontext():
        launch.kernel[launch.grid](*pointers, *launch.sizes.values(), *into, **launch.told)


def bits_of(csr: Any, depth: int) -> tuple[Tensor, Tensor]:
    """Return where a pattern has connections, a bit each, and the first one of each word: int32, shape (rows, depth / 32).

    Made once, and kept with the pattern; but not in a graph that is captured, whose memory is the graph's.
    """
    kept = getattr(csr.across, "_masked_bits", None)
    version = None if csr.across.is_inference() else csr.across._version
    if kept is not None and version is not None and kept[0] == version and kept[1] is csr.starts:
        return kept[2]  # type: ignore[no-any-return]
    rows = len(csr.starts) - 1
    with torch.inference_mode(False), torch.no_grad():  # they outlive the call
        made = csr.across.new_empty(rows, words_of(depth)), csr.across.new_empty(rows, words_of(depth))
        _run(_triton_rows.form_bits(rows, depth, csr.across.numel(), checked=False), csr.starts, csr.across, into=made)
    # Captured, they are not there before a replay.
    if not (csr.across.is_cuda and torch.cuda.is_current_stream_capturing()):
        csr.across._masked_bits = (version, csr.starts, made)
    return made


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
