"""The products of the sparse form on CUDA by kernels of our own, in Triton: row by row, and by a bit for each place of W.

``rows_*`` take compressed rows, any batch; ``bits_spmm`` is for the batches of inference, and so many connections that an
index of each would be more to read than W itself: a bit a place says where values are, which stay in the pattern's order.
``unpack`` and ``sample`` go by bits too, from and to panels that cuBLAS multiplies.

Nothing is multiplied by a tensor core: float32 is IEEE's, half types are widened as they are loaded and added up in float32,
and each sum has its order, so that the same call gives the same bits. Imported only where Triton is.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["bits_of", "bits_spmm", "on_device", "places_of", "rows_sddmm", "rows_spmm", "sample", "unpack"]

_TILE = 1024  # numbers that a program multiplies at once
_WIDEST = 128  # columns of a batch that a program takes at once


@triton.jit
def rows_spmm_kernel(
    values, right, starts, across, order, product, batch,
    ORDERED: tl.constexpr, ACC: tl.constexpr, BK: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """One row of the product, BB columns of it: BK connections at a time."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BB + tl.arange(0, BB)
    inside = column < batch
    end = tl.load(starts + row + 1)
    total = tl.zeros((BK, BB), ACC)
    for first in range(tl.load(starts + row), end, BK):
        place = first + tl.arange(0, BK)
        there = place < end
        source = tl.load(across + place, mask=there, other=0).to(tl.int64)
        if ORDERED:
            place = tl.load(order + place, mask=there, other=0)
        value = tl.load(values + place, mask=there, other=0.0).to(ACC)
        numbers = tl.load(
            right + source[:, None] * batch + column[None, :], mask=there[:, None] & inside[None, :], other=0.0
        )
        total += value[:, None] * numbers.to(ACC)  # 0 times 0 where nothing is
    tl.store(product + row.to(tl.int64) * batch + column, tl.sum(total, 0), mask=inside)


@triton.jit
def rows_sddmm_kernel(
    left, right, starts, across, sampled, batch, splits,
    ACC: tl.constexpr, BK: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """The connections of one row, every ``splits``-th BK of them, each a dot product over the whole batch."""
    row = tl.program_id(0)
    end = tl.load(starts + row + 1)
    own = left + row.to(tl.int64) * batch
    for first in range(tl.load(starts + row) + tl.program_id(1) * BK, end, splits * BK):
        place = first + tl.arange(0, BK)
        there = place < end
        other = right + tl.load(across + place, mask=there, other=0).to(tl.int64)[:, None] * batch
        total = tl.zeros((BK, BB), ACC)
        for begin in range(0, batch, BB):
            column = begin + tl.arange(0, BB)
            inside = column < batch
            mine = tl.load(own + column, mask=inside, other=0.0).to(ACC)
            numbers = tl.load(other + column[None, :], mask=there[:, None] & inside[None, :], other=0.0)
            total += mine[None, :] * numbers.to(ACC)
        tl.store(sampled + place, tl.sum(total, 1), mask=there)


@triton.jit
def count_ones(word):
    """How many bits of each int32 are set; LLVM knows the sums by their form, for one instruction."""
    word = word.to(tl.uint32, bitcast=True)
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32, bitcast=True)


@triton.jit
def places_of(bits, firsts, row, word, rows, words):
    """Return of a tile of rows and words which places are live, and which value stands there: (BM, BW, 32)."""
    lane = tl.arange(0, 32)
    there = (row < rows)[:, None] & (word < words)[None, :]
    place = row[:, None].to(tl.int64) * words + word[None, :]
    held = tl.load(bits + place, mask=there, other=0)
    first = tl.load(firsts + place, mask=there, other=0)
    live = ((held[:, :, None] >> lane[None, None, :]) & 1) != 0
    return live, first[:, :, None] + count_ones(held[:, :, None] & ((1 << lane) - 1)[None, None, :])


@triton.jit
def bits_spmm_kernel(
    values, x, bits, firsts, product, rows, depth, words, batch,
    ACC: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """BM rows of the product for a whole batch (batch, depth), BW words at a time, whose x is loaded once for all rows."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    one = tl.arange(0, BB)
    total = tl.zeros((BB, BM, BW, 32), ACC)
    for begin in range(0, words, BW):
        word = begin + tl.arange(0, BW)
        live, which = places_of(bits, firsts, row, word, rows, words)
        value = tl.load(values + which, mask=live, other=0.0).to(ACC)
        source = word[:, None] * 32 + tl.arange(0, 32)[None, :]
        numbers = tl.load(
            x + one[:, None, None].to(tl.int64) * depth + source[None, :, :],
            mask=(source < depth)[None, :, :] & (one < batch)[:, None, None],
            other=0.0,
        )
        added = total + value[None, :, :, :] * numbers.to(ACC)[:, None, :, :]
        total = tl.where(live[None, :, :, :], added, total)  # 0 times NaN must not reach it
    target = product + row[None, :].to(tl.int64) * batch + one[:, None]
    tl.store(target, tl.sum(tl.sum(total, 3), 2), mask=(row < rows)[None, :] & (one < batch)[:, None])


@triton.jit
def panel_kernel(
    values, panel, bits, firsts, rows, depth, words,
    SAMPLED: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """BM rows and BW words of a panel (rows, depth): all of it is written from values; or, sampled, values from it."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    word = tl.program_id(1) * BW + tl.arange(0, BW)
    live, which = places_of(bits, firsts, row, word, rows, words)
    column = word[:, None] * 32 + tl.arange(0, 32)[None, :]
    place = panel + row[:, None, None].to(tl.int64) * depth + column[None, :, :]
    if SAMPLED:
        tl.store(values + which, tl.load(place, mask=live, other=0.0), mask=live)
    else:
        inside = (row < rows)[:, None, None] & (column < depth)[None, :, :]
        tl.store(place, tl.load(values + which, mask=live, other=0.0), mask=inside)


def rows_options(connections: int, rows: int, batch: int) -> dict[str, int]:
    """Return the sizes of a program of the products by rows, for so many connections in so many rows."""
    wide = min(_WIDEST, triton.next_power_of_2(batch))
    each = triton.next_power_of_2(max(8, -(-connections // max(1, rows))))
    tall = max(8, min(_TILE // wide, each))
    return {"BK": tall, "BB": wide, "num_warps": max(1, min(4, tall * wide // 256))}


def bits_options(batch: int, itemsize: int) -> dict[str, int]:
    """Return the sizes of a program of the product by bits."""
    wide = triton.next_power_of_2(batch)  # at most _gpu_rule.LARGEST_BITS_BATCH
    tall, words = {1: (8, 16), 2: (8, 16), 4: (8, 8), 8: (8, 4), 16: (4, 4)}[wide]
    return {"BM": tall if itemsize < 8 else tall // 2, "BW": words, "BB": wide, "num_warps": 4}


def rows_spmm(values: Tensor, right: Tensor, csr: Any) -> Tensor:
    """Return W · right, shape (rows, batch), for right (depth, batch): float32, or float64 of float64."""
    rows, batch = len(csr.starts) - 1, right.shape[1]
    product = right.new_empty((rows, batch), dtype=_wide(right.dtype))
    options = rows_options(csr.across.numel(), rows, batch)
    with on_device(right):
        rows_spmm_kernel[(rows, triton.cdiv(batch, options["BB"]))](
            values, right, csr.starts, csr.across, csr.across if csr.order is None else csr.order, product, batch,
            ORDERED=csr.order is not None, ACC=_type(right.dtype), **options,
        )  # fmt: skip
    return product


def rows_sddmm(left: Tensor, right: Tensor, csr: Any) -> Tensor:
    """Return left · rightᵀ at the connections, shape (nnz,), of left (rows, batch): float32, or float64 of float64."""
    rows, batch = left.shape
    sampled = right.new_empty(csr.across.shape, dtype=_wide(right.dtype))
    options = rows_options(csr.across.numel(), rows, batch)
    splits = min(16, max(1, csr.across.numel() // max(1, rows * options["BK"])))
    with on_device(right):
        rows_sddmm_kernel[(rows, splits)](
            left, right, csr.starts, csr.across, sampled, batch, splits, ACC=_type(right.dtype), **options
        )
    return sampled


def bits_spmm(values: Tensor, right: Tensor, csr: Any) -> Tensor:
    """Return W · right, shape (rows, batch), for right (depth, batch) of at most 16 columns; not transposed."""
    rows, (depth, batch) = len(csr.starts) - 1, right.shape
    bits, firsts = bits_of(csr, depth)
    product = right.new_empty((rows, batch), dtype=_wide(right.dtype))
    options = bits_options(batch, right.itemsize)
    with on_device(right):
        bits_spmm_kernel[(triton.cdiv(rows, options["BM"]),)](
            values, right.mT.contiguous(), bits, firsts, product, rows, depth, bits.shape[1], batch,
            ACC=_type(right.dtype), **options,
        )  # fmt: skip
    return product


PANEL_OPTIONS = {"BM": 4, "BW": 8, "num_warps": 4}


def unpack(values: Tensor, csr: Any, first: int, panel: Tensor) -> None:
    """Write rows of W, from ``first`` on, to a panel (rows, depth)."""
    _run_panel(values, csr, first, panel, sampled=False)


def sample(panel: Tensor, csr: Any, first: int, sampled: Tensor) -> None:
    """Write what a panel (rows, depth) has at the connections of rows from ``first`` on to their places in ``sampled``."""
    _run_panel(sampled, csr, first, panel, sampled=True)


def _run_panel(values: Tensor, csr: Any, first: int, panel: Tensor, sampled: bool) -> None:
    rows, depth = panel.shape
    bits, starts = (of[first : first + rows] for of in bits_of(csr, depth))
    grid = (triton.cdiv(rows, PANEL_OPTIONS["BM"]), triton.cdiv(bits.shape[1], PANEL_OPTIONS["BW"]))
    with on_device(panel):
        panel_kernel[grid](values, panel, bits, starts, rows, depth, bits.shape[1], SAMPLED=sampled, **PANEL_OPTIONS)


def bits_of(csr: Any, depth: int) -> tuple[Tensor, Tensor]:
    """Return where a pattern has connections, a bit each, and the first one of each word: int32, shape (rows, depth / 32).

    Made once, and kept with the pattern.
    """
    kept = getattr(csr.across, "_masked_bits", None)
    version = None if csr.across.is_inference() else csr.across._version
    if kept is not None and version is not None and kept[0] == version and kept[1] is csr.starts:
        return kept[2]  # type: ignore[no-any-return]
    rows, words = len(csr.starts) - 1, -(-depth // 32)
    with torch.inference_mode(False), torch.no_grad():  # they outlive the call
        row = torch.repeat_interleave(csr.starts.diff().long(), output_size=csr.across.numel())
        bit = torch.bitwise_left_shift(torch.ones_like(csr.across), csr.across & 31)
        word, empty = row * words + (csr.across >> 5), csr.across.new_zeros(rows * words)
        counts = empty.index_add(0, word, torch.ones_like(csr.across))
        firsts = (counts.cumsum(0, dtype=torch.int32) - counts).view(rows, words)
        made = empty.index_add(0, word, bit).view(rows, words), firsts
    csr.across._masked_bits = (version, csr.starts, made)
    return made


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _type(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype is torch.float64 else tl.float32


def on_device(tensor: Tensor) -> Any:
    """Return a context in which Triton launches on the tensor's device; interpreted, on the CPU, it does nothing."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
