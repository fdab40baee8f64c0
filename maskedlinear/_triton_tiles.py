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

from maskedlinear._gpu_rule import Multiply, Product, Tiles, is_read_along, sampled_width, tiles_of, words_of
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
def _halves(tile, BM: tl.constexpr, WIDE: tl.constexpr):
    """Return the left and the right half of a tile (BM, WIDE)."""
    return tl.split(tl.permute(tl.reshape(tile, (BM, 2, WIDE // 2)), (0, 2, 1)))


@triton.jit
def _sample(
    tile, sampled, bits, firsts, row, word, rows, words, nnz,
    CHECKED: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Write what is live of some rows, BM of them, and BW words from ``word`` on."""
    quads, where = quads_of(sampled, bits, firsts, row, word + tl.arange(0, BW), rows, words, nnz, CHECKED)
    sample(tl.reshape(tile, (BM, BW, 8, 2, 2)), quads, where)


@triton.jit
def _sample_word(tile, sampled, bits, firsts, row, word, rows, words, nnz, CHECKED: tl.constexpr, BM: tl.constexpr):
    """Write what is live of BM rows and a word, half of the rows after the other.

    Of 16 rows a warp multiplies, and of those a thread has two that are eight apart, so that nothing moves.
    """
    upper, lower = tl.split(tl.permute(tl.reshape(tile, (BM // 16, 2, 8, 32)), (0, 2, 3, 1)))
    above = row + tl.reshape(16 * tl.arange(0, BM // 16)[:, None] + tl.arange(0, 8)[None, :], (BM // 2,))
    _sample(upper, sampled, bits, firsts, above, word, rows, words, nnz, CHECKED, BM // 2, 1)
    _sample(lower, sampled, bits, firsts, above + 8, word, rows, words, nnz, CHECKED, BM // 2, 1)


@triton.jit
def _sample_two(
    tile, sampled, bits, firsts, row, word, rows, words, nnz,
    HALVED: tl.constexpr, CHECKED: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Write what is live of BM rows from ``row`` on, and two words.

    At once; or, ``HALVED``, in four parts, which takes as few registers as leave room for another program, that multiplies
    meanwhile.
    """
    if HALVED:
        near, far = _halves(tile, BM, 64)
        _sample_word(near, sampled, bits, firsts, row, word, rows, words, nnz, CHECKED, BM)
        _sample_word(far, sampled, bits, firsts, row, word + 1, rows, words, nnz, CHECKED, BM)
    else:
        _sample(tile, sampled, bits, firsts, row + tl.arange(0, BM), word, rows, words, nnz, CHECKED, BM, 2)


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
def _put(product, total, target, column, count, batch, FLIPPED: tl.constexpr):
    inside = (target < count)[:, None] & (column < batch)[None, :]
    if FLIPPED:
        total = tl.trans(total)
    tl.store(product + target[:, None].to(tl.int64) * batch + column[None, :], total, mask=inside)


@triton.jit
def tiles_spmm_kernel(
    values, right, bits, firsts, product, rows, depth, words, nnz, batch, part,
    TRANSPOSED: tl.constexpr, ALONG: tl.constexpr, IEEE: tl.constexpr, CHECKED: tl.constexpr, UP: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """A tile (BM, BN) of W · right, BW words of W's rows at a time; or, transposed, (BW * 32, BN) of Wᵀ · right, BM rows.

    Over ``part`` words, or rows: other programs have the tile's others. A tile has TAIL more columns, so that its width need
    be no power of two, and that the product of one goes on while the next step is unpacked.
    """
    start = tl.program_id(2) * part
    first = tl.program_id(1) * (BN + TAIL)
    column = first + tl.arange(0, BN)
    HEIGHT: tl.constexpr = BW * 32 if TRANSPOSED else BM
    FLIPPED: tl.constexpr = TRANSPOSED and IEEE  # in shared memory a tile stays as it was unpacked
    total = tl.zeros((BN, HEIGHT) if FLIPPED else (HEIGHT, BN), tl.float32)
    if TAIL > 0:
        last = first + BN + tl.arange(0, TAIL)
        rest = tl.zeros((TAIL, HEIGHT) if FLIPPED else (HEIGHT, TAIL), tl.float32)
    end = tl.minimum(start + part, rows if TRANSPOSED else words)
    if not IEEE:
        # Each program has a step. Where the compiler has to think of none, totals are set on a way around the loop, and
        # it lets no product of the tensor cores go on while the next step is unpacked.
        tl.assume(start < end)
    if TRANSPOSED:
        word = tl.program_id(0) * BW + tl.arange(0, BW)
        for begin in range(start, end, BM):
            row = begin + tl.arange(0, BM)
            tile = _unpacked(values, bits, firsts, row, word, rows, words, nnz, CHECKED, BM, BW)
            if not FLIPPED:
                tile = tl.trans(tile)
            total = _add(total, tile, _side(right, row, column, rows, batch, ALONG), UP, PRECISION, FLIPPED)
            if TAIL > 0:
                rest = _add(rest, tile, _side(right, row, last, rows, batch, ALONG), UP, PRECISION, FLIPPED)
        target, count = tl.program_id(0) * BW * 32 + tl.arange(0, BW * 32), depth
    else:
        row = tl.program_id(0) * BM + tl.arange(0, BM)
        for begin in range(start, end, BW):
            word = begin + tl.arange(0, BW)
            tile = _unpacked(values, bits, firsts, row, word, rows, words, nnz, CHECKED, BM, BW)
            source = begin * 32 + tl.arange(0, BW * 32)
            total = _add(total, tile, _side(right, source, column, depth, batch, ALONG), UP, PRECISION, FLIPPED)
            if TAIL > 0:
                rest = _add(rest, tile, _side(right, source, last, depth, batch, ALONG), UP, PRECISION, FLIPPED)
        target, count = row, rows
    product += tl.program_id(2).to(tl.int64) * count * batch
    _put(product, total, target, column, count, batch, FLIPPED)
    if TAIL > 0:
        _put(product, rest, target, last, count, batch, FLIPPED)


@triton.jit
def _rows_of(side, row, step, rows, batch, UP: tl.constexpr):
    """Return some rows and columns of a side (rows, batch), with zeros beyond it."""
    inside = (row < rows)[:, None] & (step < batch)[None, :]
    found = tl.load(side + row[:, None].to(tl.int64) * batch + step[None, :], mask=inside, other=0.0)
    return found.to(tl.float32) if UP else found


@triton.jit
def tiles_sddmm_kernel(
    left, right, bits, firsts, sampled, rows, depth, words, nnz, batch,
    MORE: tl.constexpr, HALVED: tl.constexpr, CHECKED: tl.constexpr, UP: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile (BM, 128) of left · rightᵀ, or ``MORE``, (BM, 192), BK of the batch at a time; what is live is written."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    first = tl.program_id(1) * (6 if MORE else 4)  # of its words
    column = first * 32 + tl.arange(0, 128)
    total = tl.zeros((BM, 128), tl.float32)
    if MORE:
        last = first * 32 + 128 + tl.arange(0, 64)
        rest = tl.zeros((BM, 64), tl.float32)
    for begin in range(0, batch, BK):
        step = begin + tl.arange(0, BK)
        one = _rows_of(left, row, step, rows, batch, UP)
        other = _rows_of(right, column, step, depth, batch, UP)
        total = tl.dot(one, tl.trans(other), total, input_precision=PRECISION)
        if MORE:
            other = _rows_of(right, last, step, depth, batch, UP)
            rest = tl.dot(one, tl.trans(other), rest, input_precision=PRECISION)
    row = tl.program_id(0) * BM
    near, far = _halves(total, BM, 128)
    _sample_two(near, sampled, bits, firsts, row, first, rows, words, nnz, HALVED, CHECKED, BM)
    _sample_two(far, sampled, bits, firsts, row, first + 2, rows, words, nnz, HALVED, CHECKED, BM)
    if MORE:
        _sample_two(rest, sampled, bits, firsts, row, first + 4, rows, words, nnz, HALVED, CHECKED, BM)


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
    told = {"part": part, "TRANSPOSED": transposed, "CHECKED": checked, "UP": up, **_told(sizes, multiply)}
    grid = (triton.cdiv(count, cut.tall), triton.cdiv(sizes.batch, cut.wide + cut.tail), cut.programs)
    return Launch(tiles_spmm_kernel, grid, told | options)


def sddmm(sizes: Sizes, itemsize: int, multiply: Multiply, *, checked: bool, up: bool = False) -> Launch:
    """Return what runs left · rightᵀ at the connections by tiles.

    Pointers: left (rows, batch), right (depth, batch), bits, firsts, and what is sampled (nnz,), float32.
    """
    width = sampled_width(Product(sizes.rows, sizes.depth, sizes.nnz, sizes.batch, itemsize, multiply, sampled=True))
    options = sddmm_options(itemsize, multiply, width)
    grid = (triton.cdiv(sizes.rows, options["BM"]), triton.cdiv(sizes.depth, width))
    told = {"CHECKED": checked, "UP": up, **_told(sizes, multiply)}
    return Launch(tiles_sddmm_kernel, grid, told | options)


def _told(sizes: Sizes, multiply: Multiply) -> dict[str, Any]:
    precision = "tf32" if multiply == "tf32" else "ieee"
    return {**sizes._asdict(), "words": words_of(sizes.depth), "PRECISION": precision}


def spmm_options(cut: Tiles, multiply: Multiply, transposed: bool) -> dict[str, Any]:
    """Return the sizes of a program of the product by tiles, and how it goes about it.

    Sides are read ``ALONG`` the length where :func:`maskedlinear._gpu_rule.is_read_along` says so.
    """
    ieee = multiply == "float32"
    # Small programs hide what each of them waits for; of large ones, one to a multiprocessor, sides are on their way.
    stages = 1 if cut.warps == 4 or (ieee and transposed) else 3 if cut.deep <= 64 else 2
    tall, words = (cut.deep, cut.tall // 32) if transposed else (cut.tall, cut.deep // 32)
    sizes = {"BM": tall, "BN": cut.wide, "BW": words, "TAIL": cut.tail, "num_warps": cut.warps, "num_stages": stages}
    return {"ALONG": is_read_along(multiply, transposed), "IEEE": ieee, **sizes}


def sddmm_options(itemsize: int, multiply: Multiply, width: int) -> dict[str, Any]:
    """Return the sizes of a program of the sampled product by tiles, of so many columns of W."""
    more = {"MORE": width == 192}
    if multiply == "float32":
        return {**more, "HALVED": False, "BM": 64, "BK": 16, "num_warps": 4, "num_stages": 2}
    return {**more, "HALVED": True, "BM": 128, "BK": 64 // itemsize, "num_warps": 8, "num_stages": 3}
