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

from maskedlinear._gpu_rule import Multiply, Product, Tiles, is_read_along, tiles_of, unit_of
from maskedlinear._triton_rows import (
    Launch,
    Sizes,
    in_units,
    quads_of,
    quads_of_words,
    unpack,
    words_at,
    write_live,
)

__all__ = ["sddmm", "spmm"]


@triton.jit
def _unpacked(values, held, first, BM: tl.constexpr, BW: tl.constexpr):
    """Return a tile of W, of words (BW, BM): (BM, BW * 32)."""
    quads, where = quads_of_words(values, held, first)
    return tl.reshape(unpack(quads, where), (BM, BW * 32))


@triton.jit
def _halves(tile, BM: tl.constexpr):
    """Return the left and the right half of a tile (BM, 128)."""
    return tl.split(tl.permute(tl.reshape(tile, (BM, 2, 64)), (0, 2, 1)))


@triton.jit
def _sample(
    tile, sampled, bits, firsts, row, word, rows, words, nnz, CHECKED: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    """Write what is live of some rows, BM of them, and of the two words from ``word`` on."""
    quads, where = quads_of(sampled, bits, firsts, row, word + tl.arange(0, 2), rows, words, nnz, CHECKED)
    write_live(tl.reshape(tile, (BM, 2, 8, 2, 2)), quads, where)


@triton.jit
def _side(right, source, column, length, batch, ALONG: tl.constexpr):
    """Return some rows and columns of a side (length, batch), with zeros beyond; it lies as (batch, length) if ``ALONG``."""
    if ALONG:
        inside = (column < batch)[:, None] & (source < length)[None, :]
        across = tl.load(right + column[:, None].to(tl.int64) * length + source[None, :], mask=inside, other=0.0)
        side = tl.trans(across)
    else:
        inside = (source < length)[:, None] & (column < batch)[None, :]
        side = tl.load(right + source[:, None].to(tl.int64) * batch + column[None, :], mask=inside, other=0.0)
    return side


@triton.jit
def _add(total, tile, other, UP: tl.constexpr, PRECISION: tl.constexpr, FLIPPED: tl.constexpr):
    """Return total + tile · other; ``FLIPPED``, total is the transpose, and so is tile."""
    if UP:
        tile, other = tile.to(tl.float32), other.to(tl.float32)
    if FLIPPED:
        tile, other = tl.trans(other), tile
    return tl.dot(tile, other, total, input_precision=PRECISION)


@triton.jit
def _next(row, word, rows, words, end, TRANSPOSED: tl.constexpr, STEP: tl.constexpr):
    """Return rows and words of the next step; from ``end`` on, which is another program's, beyond W, where nothing is."""
    if TRANSPOSED:
        return tl.where(row + STEP < end, row + STEP, rows), word
    return row, tl.where(word + STEP < end, word + STEP, words)


@triton.jit(do_not_specialize=["rows", "depth", "words", "nnz", "batch", "part"])
def tiles_spmm_kernel(
    values, right, bits, firsts, rows, depth, words, nnz, batch, part, product,
    UNIT: tl.constexpr, ALONG_UNIT: tl.constexpr, TRANSPOSED: tl.constexpr, ALONG: tl.constexpr, IEEE: tl.constexpr,
    CHECKED: tl.constexpr, UP: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """A tile (BM, BN) of W · right, BW words of W's rows at a time; or, transposed, (BW * 32, BN) of Wᵀ · right, BM rows.

    Over ``part`` words, or rows: other programs have the tile's others. Words are loaded a step ahead, so that they are
    there when they are needed. But in IEEE, which would take too many registers, a step is unpacked right after the product
    of the one before, too: its values are on their way while its x is loaded.
    """
    start = tl.program_id(2) * part
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    HEIGHT: tl.constexpr = BW * 32 if TRANSPOSED else BM
    FLIPPED: tl.constexpr = TRANSPOSED and IEEE  # in shared memory a tile stays as it was unpacked
    total = tl.zeros((BN, HEIGHT) if FLIPPED else (HEIGHT, BN), tl.float32)
    batch, length = in_units(batch, UNIT), in_units(rows if TRANSPOSED else depth, ALONG_UNIT)
    end = tl.minimum(start + part, rows if TRANSPOSED else words)
    STEP: tl.constexpr = BM if TRANSPOSED else BW
    row = (start if TRANSPOSED else tl.program_id(0) * BM) + tl.arange(0, BM)
    word = (tl.program_id(0) * BW if TRANSPOSED else start) + tl.arange(0, BW)
    held, first = words_at(bits, firsts, row[None, :], word[:, None], rows, words, nnz, CHECKED)
    if not IEEE:
        tile = _unpacked(values, held, first, BM, BW)
        row, word = _next(row, word, rows, words, end, TRANSPOSED, STEP)
        held, first = words_at(bits, firsts, row[None, :], word[:, None], rows, words, nnz, CHECKED)
    for begin in range(start, end, STEP):
        if IEEE:
            tile = _unpacked(values, held, first, BM, BW)
            row, word = (row + STEP, word) if TRANSPOSED else (row, word + STEP)
            held, first = words_at(bits, firsts, row[None, :], word[:, None], rows, words, nnz, CHECKED)
        source = begin + tl.arange(0, BM) if TRANSPOSED else begin * 32 + tl.arange(0, BW * 32)
        side = _side(right, source, column, length, batch, ALONG)
        one = tl.trans(tile) if TRANSPOSED and not FLIPPED else tile
        total = _add(total, one, side, UP, PRECISION, FLIPPED)
        if not IEEE:
            tile = _unpacked(values, held, first, BM, BW)
            row, word = _next(row, word, rows, words, end, TRANSPOSED, STEP)
            held, first = words_at(bits, firsts, row[None, :], word[:, None], rows, words, nnz, CHECKED)
    count = depth if TRANSPOSED else rows
    target = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    if FLIPPED:
        total = tl.trans(total)
    inside = (target < count)[:, None] & (column < batch)[None, :]
    product += tl.program_id(2).to(tl.int64) * count * batch
    tl.store(product + target[:, None].to(tl.int64) * batch + column[None, :], total, mask=inside)


@triton.jit
def _rows_of(side, row, step, rows, batch, UP: tl.constexpr):
    """Return some rows and columns of a side (rows, batch), with zeros beyond it."""
    inside = (row < rows)[:, None] & (step < batch)[None, :]
    found = tl.load(side + row[:, None].to(tl.int64) * batch + step[None, :], mask=inside, other=0.0)
    return found.to(tl.float32) if UP else found


@triton.jit(do_not_specialize=["rows", "depth", "words", "nnz", "batch"])
def tiles_sddmm_kernel(
    left, right, bits, firsts, rows, depth, words, nnz, batch, sampled,
    UNIT: tl.constexpr, CHECKED: tl.constexpr, UP: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """A tile (BM, 128) of left · rightᵀ, BK of the batch at a time; what is live of it is written."""
    batch = in_units(batch, UNIT)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    first = tl.program_id(1) * 4  # of its words
    column = first * 32 + tl.arange(0, 128)
    total = tl.zeros((BM, 128), tl.float32)
    for begin in range(0, batch, BK):
        step = begin + tl.arange(0, BK)
        one = _rows_of(left, row, step, rows, batch, UP)
        other = _rows_of(right, column, step, depth, batch, UP)
        total = tl.dot(one, tl.trans(other), total, input_precision=PRECISION)
    near, far = _halves(total, BM)
    _sample(near, sampled, bits, firsts, row, first, rows, words, nnz, CHECKED, BM)
    _sample(far, sampled, bits, firsts, row, first + 2, rows, words, nnz, CHECKED, BM)


def spmm(
    sizes: Sizes, itemsize: int, multiply: Multiply, *, transposed: bool, checked: bool, up: bool = False
) -> Launch:
    """Return what runs W · right by tiles, for W (rows, depth); or, transposed, Wᵀ · right.

    Pointers: values, right, which lies as a layer has it, (batch, depth) or (batch, rows), where it is told to be ``ALONG``,
    bits, firsts, and products, float32, shape ``(grid[2], rows, batch)``, which are to be added up: where there are few
    tiles, several programs share each. W has a row and a column, at least. ``checked``, bits lead to no values that are not
    there; ``up`` widens before the product, which the interpreter needs.
    """
    count, length = (sizes.depth, sizes.rows) if transposed else (sizes.rows, sizes.depth)
    cut = tiles_of(Product(count, length, sizes.nnz, sizes.batch, itemsize, multiply, transposed=transposed))
    options = spmm_options(cut, multiply, transposed)
    part = cut.steps * options["BM" if transposed else "BW"]
    told = {"TRANSPOSED": transposed, "CHECKED": checked, "UP": up, "PRECISION": _precision(multiply)}
    told |= {"UNIT": unit_of(sizes.batch), "ALONG_UNIT": unit_of(length)}
    grid = (triton.cdiv(count, cut.tall), triton.cdiv(sizes.batch, cut.wide), cut.programs)
    return Launch(tiles_spmm_kernel, grid, sizes.with_words() | {"part": part}, told | options)


def sddmm(sizes: Sizes, itemsize: int, multiply: Multiply, *, checked: bool, up: bool = False) -> Launch:
    """Return what runs left · rightᵀ at the connections by tiles.

    Pointers: left (rows, batch), right (depth, batch), bits, firsts, and what is sampled (nnz,), float32.
    """
    options = sddmm_options(itemsize, multiply)
    grid = (triton.cdiv(sizes.rows, options["BM"]), triton.cdiv(sizes.depth, 128))
    told = {"UNIT": unit_of(sizes.batch), "CHECKED": checked, "UP": up, "PRECISION": _precision(multiply)}
    return Launch(tiles_sddmm_kernel, grid, sizes.with_words(), told | options)


def _precision(multiply: Multiply) -> str:
    return "tf32" if multiply == "tf32" else "ieee"


def spmm_options(cut: Tiles, multiply: Multiply, transposed: bool) -> dict[str, Any]:
    """Return the sizes of a program of the product by tiles, and how it goes about it.

    Sides are read ``ALONG`` the length where :func:`maskedlinear._gpu_rule.is_read_along` says so. They are not on their way
    in steps before, but where registers would not do: then of most tiles what is in shared memory is fenced after the
    barrier only.
    """
    tall, words = (cut.deep, cut.tall // 32) if transposed else (cut.tall, cut.deep // 32)
    stages = 2 if transposed and multiply == "tf32" and cut.wide == 256 else 1
    sizes = {"BM": tall, "BN": cut.wide, "BW": words, "num_warps": cut.warps, "num_stages": stages}
    return {"ALONG": is_read_along(multiply, transposed), "IEEE": multiply == "float32", **sizes}


def sddmm_options(itemsize: int, multiply: Multiply) -> dict[str, Any]:
    """Return the sizes of a program of the sampled product by tiles."""
    if multiply == "float32":
        return {"BM": 64, "BK": 16, "num_warps": 4, "num_stages": 1}
    return {"BM": 128, "BK": 64 // itemsize, "num_warps": 8, "num_stages": 3}
