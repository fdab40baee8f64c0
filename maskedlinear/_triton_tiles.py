"""Triton's kernels that multiply tiles of W, for both frameworks: unpacked in registers, by bits, and multiplied dense.

For batches that are too small for a panel to pay, and too many connections for products by rows. A word of bits says which
of 32 places of a row are live, and a number which value is its first; so a tile needs nothing but its own words. The sampled
product writes what is live of each tile. float32 is multiplied as IEEE says, or by TF32 where the user lets the framework do
so. Imported only where Triton is.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from maskedlinear._gpu_rule import TALL, Multiply, Product, Tiles, tiles_of, words_of
from maskedlinear._triton_rows import Launch, Sizes, quads_of, sample, unpack

__all__ = ["sddmm", "spmm"]


@triton.jit
def _unpacked(
    values, bits, firsts, row, word, rows, words, nnz, CHECKED: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr
):
    """Return a tile of W, of BM rows and BW words: (BM, BW * 32)."""
    quads, where = quads_of(values, bits, firsts, row, word, rows, words, nnz, CHECKED)
    return tl.reshape(unpack(quads, where), (BM, BW * 32))


@triton.jit
def _sample(
    tile, sampled, bits, firsts, row, word, rows, words, nnz,
    CHECKED: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Write what is live of a tile of BM rows and BW words from ``word`` on."""
    quads, where = quads_of(sampled, bits, firsts, row, word + tl.arange(0, BW), rows, words, nnz, CHECKED)
    sample(tl.reshape(tile, (BM, BW, 8, 2, 2)), quads, where)


@triton.jit
def _side(right, source, column, depth, batch):
    """Return some rows and columns of a side (depth, batch), with zeros beyond it."""
    inside = (source < depth)[:, None] & (column < batch)[None, :]
    return tl.load(right + source[:, None].to(tl.int64) * batch + column[None, :], mask=inside, other=0.0)


@triton.jit
def _add(total, tile, other, UP: tl.constexpr, PRECISION: tl.constexpr):
    if UP:
        tile, other = tile.to(tl.float32), other.to(tl.float32)
    return tl.dot(tile, other, total, input_precision=PRECISION)


@triton.jit
def _put(product, total, target, column, count, batch):
    inside = (target < count)[:, None] & (column < batch)[None, :]
    tl.store(product + target[:, None].to(tl.int64) * batch + column[None, :], total, mask=inside)


@triton.jit
def tiles_spmm_kernel(
    values, right, bits, firsts, product, rows, depth, words, nnz, batch, part,
    TRANSPOSED: tl.constexpr, CHECKED: tl.constexpr, UP: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """A tile (BM, BN) of W · right, BW words of W's rows at a time; or, transposed, (BW * 32, BN) of Wᵀ · right, BM rows.

    Over ``part`` words, or rows: other programs have the tile's others. A tile has TAIL more columns, so that its width need
    be no power of two.
    """
    start = tl.program_id(2) * part
    first = tl.program_id(1) * (BN + TAIL)
    column = first + tl.arange(0, BN)
    HEIGHT: tl.constexpr = BW * 32 if TRANSPOSED else BM
    total = tl.zeros((HEIGHT, BN), tl.float32)
    if TAIL > 0:
        last = first + BN + tl.arange(0, TAIL)
        rest = tl.zeros((HEIGHT, TAIL), tl.float32)
    if TRANSPOSED:
        word = tl.program_id(0) * BW + tl.arange(0, BW)
        for begin in range(start, tl.minimum(start + part, rows), BM):
            row = begin + tl.arange(0, BM)
            tile = tl.trans(_unpacked(values, bits, firsts, row, word, rows, words, nnz, CHECKED, BM, BW))
            total = _add(total, tile, _side(right, row, column, rows, batch), UP, PRECISION)
            if TAIL > 0:
                rest = _add(rest, tile, _side(right, row, last, rows, batch), UP, PRECISION)
        target, count = tl.program_id(0) * BW * 32 + tl.arange(0, BW * 32), depth
    else:
        row = tl.program_id(0) * BM + tl.arange(0, BM)
        for begin in range(start, tl.minimum(start + part, words), BW):
            word = begin + tl.arange(0, BW)
            tile = _unpacked(values, bits, firsts, row, word, rows, words, nnz, CHECKED, BM, BW)
            source = begin * 32 + tl.arange(0, BW * 32)
            total = _add(total, tile, _side(right, source, column, depth, batch), UP, PRECISION)
            if TAIL > 0:
                rest = _add(rest, tile, _side(right, source, last, depth, batch), UP, PRECISION)
        target, count = row, rows
    product += tl.program_id(2).to(tl.int64) * count * batch
    _put(product, total, target, column, count, batch)
    if TAIL > 0:
        _put(product, rest, target, last, count, batch)


@triton.jit
def tiles_sddmm_kernel(
    left, right, bits, firsts, sampled, rows, depth, words, nnz, batch,
    CHECKED: tl.constexpr, UP: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BW: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile (BM, BW * 32) of left · rightᵀ, BK of the batch at a time, of which what is live is written."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BW * 32 + tl.arange(0, BW * 32)
    total = tl.zeros((BM, BW * 32), tl.float32)
    for begin in range(0, batch, BK):
        step = begin + tl.arange(0, BK)
        inside = (row < rows)[:, None] & (step < batch)[None, :]
        one = tl.load(left + row[:, None].to(tl.int64) * batch + step[None, :], mask=inside, other=0.0)
        inside = (column < depth)[:, None] & (step < batch)[None, :]
        other = tl.load(right + column[:, None].to(tl.int64) * batch + step[None, :], mask=inside, other=0.0)
        if UP:
            one, other = one.to(tl.float32), other.to(tl.float32)
        total = tl.dot(one, tl.trans(other), total, input_precision=PRECISION)
    # One half after the other takes as few registers as leave room for another program, which multiplies meanwhile.
    near, far = tl.split(tl.permute(tl.reshape(total, (BM, 2, BW * 16)), (0, 2, 1)))
    first = tl.program_id(1) * BW
    _sample(near, sampled, bits, firsts, row, first, rows, words, nnz, CHECKED, BM, BW // 2)
    _sample(far, sampled, bits, firsts, row, first + BW // 2, rows, words, nnz, CHECKED, BM, BW // 2)


def spmm(
    sizes: Sizes, itemsize: int, multiply: Multiply, *, transposed: bool, checked: bool, up: bool = False
) -> Launch:
    """Return what runs W · right by tiles, for W (rows, depth); or, transposed, Wᵀ · right.

    Pointers: values, right, bits, firsts, and products, float32, shape ``(grid[2], rows, batch)``, which are to be added up:
    where there are few tiles, several programs share each. ``checked``, bits lead to no values that are not there; ``up``
    widens before the product, which the interpreter needs.
    """
    count, length = (sizes.depth, sizes.rows) if transposed else (sizes.rows, sizes.depth)
    cut = tiles_of(Product(count, length, sizes.nnz, sizes.batch, itemsize, multiply, transposed=transposed))
    options = spmm_options(cut, multiply == "float32", transposed)
    part = cut.steps * options["BM" if transposed else "BW"]
    told = {"part": part, "TRANSPOSED": transposed, "CHECKED": checked, "UP": up, **_told(sizes, multiply)}
    grid = (triton.cdiv(count, TALL), triton.cdiv(sizes.batch, cut.wide + cut.tail), cut.programs)
    return Launch(tiles_spmm_kernel, grid, told | options)


def sddmm(sizes: Sizes, itemsize: int, multiply: Multiply, *, checked: bool, up: bool = False) -> Launch:
    """Return what runs left · rightᵀ at the connections by tiles.

    Pointers: left (rows, batch), right (depth, batch), bits, firsts, and what is sampled (nnz,), float32.
    """
    options = sddmm_options(itemsize, multiply == "float32")
    grid = (triton.cdiv(sizes.rows, options["BM"]), triton.cdiv(sizes.depth, options["BW"] * 32))
    told = {"CHECKED": checked, "UP": up, **_told(sizes, multiply)}
    return Launch(tiles_sddmm_kernel, grid, told | options)


def _told(sizes: Sizes, multiply: Multiply) -> dict[str, Any]:
    precision = "tf32" if multiply == "tf32" else "ieee"
    return {**sizes._asdict(), "words": words_of(sizes.depth), "PRECISION": precision}


def spmm_options(cut: Tiles, ieee: bool, transposed: bool) -> dict[str, int]:
    """Return the sizes of a program of the product by tiles; ``ieee``: without tensor cores, in registers."""
    # Small programs hide what each of them waits for; of the transpose in IEEE, as all others, tiles on their way.
    stages = 1 if cut.warps == 4 and not (ieee and transposed) else 3
    tall, words = (cut.deep, TALL // 32) if transposed else (TALL, cut.deep // 32)
    sizes = {"BM": tall, "BN": cut.wide, "BW": words, "TAIL": cut.tail}
    return {**sizes, "num_warps": cut.warps, "num_stages": stages}


def sddmm_options(itemsize: int, ieee: bool) -> dict[str, int]:
    """Return the sizes of a program of the sampled product by tiles."""
    if ieee:
        return {"BM": 64, "BW": 4, "BK": 16, "num_warps": 4, "num_stages": 2}
    return {"BM": 128, "BW": 4, "BK": 64 // itemsize, "num_warps": 8, "num_stages": 3}
