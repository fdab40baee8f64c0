"""Triton's kernels for the products of the sparse form, for both frameworks: by rows, and by a bit for each place of W.

By rows they take compressed rows, any batch. By bits they are for the batches of inference, and so many connections that an
index of each would be more to read than W itself: a bit a place says where values are, which stay in the pattern's order.
Panels, which a dense product multiplies, are unpacked by bits too, and sampled by rows.

Nothing is multiplied by a tensor core: float32 is IEEE's, half types are widened as they are loaded and added up in float32,
and each sum has its order, so that the same call gives the same bits. Arguments are pointers, then sizes, then pointers of
results. No kernel is compiled anew for another size, but for one by which the numbers of a program are chosen otherwise; and
of strides it is told of which power of two they are multiples, 16 at most. Imported only where Triton is.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from maskedlinear._gpu_rule import AT_ONCE, WIDEST_ROW, unit_of, words_of

__all__ = [
    "Launch",
    "Sizes",
    "bits_spmm",
    "form_bits",
    "in_units",
    "panel",
    "quads_of",
    "quads_of_words",
    "rows_sddmm",
    "rows_spmm",
    "sample",
    "unpack",
    "words_at",
    "write_live",
]

_TILE = 1024  # numbers that a program multiplies at once
PANEL_OPTIONS = {"BM": 4, "BW": 16, "num_warps": 4}  # sizes of a program that unpacks a panel


@triton.jit
def within(index, size, CHECKED: tl.constexpr):
    """Return indices; ``CHECKED``, one beyond the end is taken for the last: below 0 too, which is large without a sign."""
    if CHECKED:
        index = tl.minimum(index.to(tl.uint32, bitcast=True), tl.cast(size - 1, tl.uint32)).to(tl.int32, bitcast=True)
    return index


@triton.jit
def in_units(size, UNIT: tl.constexpr):
    """Return a size that is a multiple of ``UNIT``, so that the compiler knows that it is."""
    if UNIT > 1:
        size = size // UNIT * UNIT
    return size


@triton.jit
def row_ends(starts, row, nnz, CHECKED: tl.constexpr):
    """Return where a row's connections begin and end."""
    return within(tl.load(starts + row), nnz + 1, CHECKED), within(tl.load(starts + row + 1), nnz + 1, CHECKED)


@triton.jit(do_not_specialize=["batch", "depth", "nnz"])
def rows_spmm_kernel(
    values, right, starts, across, order, batch, depth, nnz, product,
    UNIT: tl.constexpr, ORDERED: tl.constexpr, CHECKED: tl.constexpr, ACC: tl.constexpr, BK: tl.constexpr,
    BB: tl.constexpr,
):  # fmt: skip
    """One row of the product, BB columns of it: BK connections at a time."""
    batch = in_units(batch, UNIT)
    row = tl.program_id(0)
    column = tl.program_id(1) * BB + tl.arange(0, BB)
    inside = column < batch
    begin, end = row_ends(starts, row, nnz, CHECKED)
    total = tl.zeros((BK, BB), ACC)
    for first in range(begin, end, BK):
        place = first + tl.arange(0, BK)
        there = place < end
        source = within(tl.load(across + place, mask=there, other=0), depth, CHECKED).to(tl.int64)
        if ORDERED:
            place = within(tl.load(order + place, mask=there, other=0), nnz, CHECKED)
        value = tl.load(values + place, mask=there, other=0.0).to(ACC)
        numbers = tl.load(
            right + source[:, None] * batch + column[None, :], mask=there[:, None] & inside[None, :], other=0.0
        )
        total += value[:, None] * numbers.to(ACC)  # 0 times 0 where nothing is
    tl.store(product + row.to(tl.int64) * batch + column, tl.sum(total, 0), mask=inside)


@triton.jit(do_not_specialize=["batch", "depth", "nnz", "splits"])
def rows_sddmm_kernel(
    left, right, starts, across, batch, depth, nnz, splits, sampled,
    UNIT: tl.constexpr, CHECKED: tl.constexpr, ACC: tl.constexpr, BK: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """The connections of one row, every ``splits``-th BK of them, each a dot product over the whole batch."""
    batch = in_units(batch, UNIT)
    row = tl.program_id(0)
    start, end = row_ends(starts, row, nnz, CHECKED)
    own = left + row.to(tl.int64) * batch
    for first in range(start + tl.program_id(1) * BK, end, splits * BK):
        place = first + tl.arange(0, BK)
        there = place < end
        source = within(tl.load(across + place, mask=there, other=0), depth, CHECKED).to(tl.int64)
        other = right + source[:, None] * batch
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


@triton.jit(do_not_specialize=["words", "nnz"])
def form_bits_kernel(
    starts, across, words, nnz, bits, firsts, CHECKED: tl.constexpr, BW: tl.constexpr, AT_ONCE: tl.constexpr
):
    """BW words of a row, and where the connections of each begin, which is searched for among those of the row."""
    row = tl.program_id(0)
    word = tl.program_id(1) * BW + tl.arange(0, BW)
    begin, end = row_ends(starts, row, nnz, CHECKED)
    first, among = begin + tl.zeros((BW,), tl.int32), end - begin
    while among > 0:  # of so many from ``first`` on one may be the first of a word
        half = (among + 1) >> 1
        below = tl.load(across + first + (half - 1)) < word * 32
        first = tl.where(below, first + half, first)
        among -= half
    held, source, left, round_ = tl.zeros((BW,), tl.int32), across + first, end - first, 0
    while round_ < 32 // AT_ONCE:  # a word has no more than 32
        for ahead in tl.static_range(AT_ONCE):
            index = tl.load(source + ahead, mask=ahead < left, other=-1)
            mine = (index >> 5) == word
            held |= tl.where(mine, 1 << (index & 31), 0)
        source += AT_ONCE
        left -= AT_ONCE
        round_ = tl.where(tl.max(mine.to(tl.int32), 0) > 0, round_ + 1, 32)  # as long as some word may have more
    place = row.to(tl.int64) * words + word
    tl.store(bits + place, held, mask=word < words)
    tl.store(firsts + place, first, mask=word < words)


@triton.jit
def words_at(bits, firsts, row, word, rows, words, nnz, CHECKED: tl.constexpr):
    """Return the bits of words, and which value is the first of each, of the shape that rows and words make together.

    ``CHECKED``, a word that has more values than lie behind its first one is empty.
    """
    there = (row < rows) & (word < words)
    place = row.to(tl.int64) * words + word
    held = tl.load(bits + place, mask=there, other=0)
    first = tl.load(firsts + place, mask=there)
    if CHECKED:
        held = tl.where((first >= 0) & (first <= nnz - count_ones(held)), held, 0)
    return held, first


@triton.jit
def quads_in(values, held, first, lowest):
    """Return the bits of each four places, of which ``lowest`` is the first of a word, and where their first value lies."""
    return held >> lowest, values + (first + count_ones(held & ((1 << lowest) - 1)))


@triton.jit
def quads_of_words(values, held, first):
    """Return of words (BW, BM) what :func:`quads_in` does: (8, BW, BM).

    Threads side by side take what is side by side in the first dimension, as the compiler deals out addresses of which it
    knows nothing: eight have a word, and what they read, or write, lies together.
    """
    return quads_in(values, held[None, :, :], first[None, :, :], 4 * tl.arange(0, 8)[:, None, None])


@triton.jit
def quads_of(values, bits, firsts, row, word, rows, words, nnz, CHECKED: tl.constexpr):
    """Return of a tile of rows and words the bits of each four places, and where their first value lies: (8, BW, BM)."""
    held, first = words_at(bits, firsts, row[None, :], word[:, None], rows, words, nnz, CHECKED)
    return quads_of_words(values, held, first)


@triton.jit
def take_place(quads, where, PLACE: tl.constexpr):
    """Return of one place of each four whether it is live, its value, 0 if not, and where that of the next one lies."""
    live = (quads & (1 << PLACE)) != 0
    return live, tl.load(where, mask=live, other=0.0), tl.where(live, where + 1, where)


@triton.jit
def unpack(quads, where):
    """Return the values of all places, four after four: (BM, BW, 8, 2, 2)."""
    _, first, where = take_place(quads, where, 0)
    _, second, where = take_place(quads, where, 1)
    _, third, where = take_place(quads, where, 2)
    _, fourth, where = take_place(quads, where, 3)
    return tl.permute(tl.join(tl.join(first, third), tl.join(second, fourth)), (2, 1, 0, 3, 4))


@triton.jit
def put_place(numbers, quads, where, PLACE: tl.constexpr):
    """Write one place of each four, where it is live; return where the value of the next one lies."""
    live = (quads & (1 << PLACE)) != 0
    tl.store(where, numbers, mask=live)
    return tl.where(live, where + 1, where)


@triton.jit
def split_places(numbers):
    """Return (..., 2, 2) in four, place by place."""
    even, odd = tl.split(numbers)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def write_live(numbers, quads, where):
    """Write the live ones of all places (BM, BW, 8, 2, 2) to their values."""
    first, second, third, fourth = split_places(tl.permute(numbers, (2, 1, 0, 3, 4)))
    where = put_place(first, quads, where, 0)
    where = put_place(second, quads, where, 1)
    where = put_place(third, quads, where, 2)
    put_place(fourth, quads, where, 3)


@triton.jit
def add_place(total, quads, where, numbers, ACC: tl.constexpr, PLACE: tl.constexpr):
    """Add one place of each four times numbers of x (BB, BW, 8); return the sums, and where the next value lies."""
    live, value, where = take_place(quads, where, PLACE)
    added = total + value.to(ACC)[None, :, :, :] * numbers.to(ACC)[:, None, :, :]
    return tl.where(live[None, :, :, :], added, total), where  # 0 times NaN must not reach it


@triton.jit(do_not_specialize=["rows", "depth", "words", "nnz", "batch"])
def bits_spmm_kernel(
    values, x, bits, firsts, rows, depth, words, nnz, batch, product,
    UNIT: tl.constexpr, CHECKED: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """BM rows of the product for a whole batch (batch, depth), BW words at a time, whose x is loaded once for all rows."""
    depth = in_units(depth, UNIT)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    one = tl.arange(0, BB)[:, None, None]
    total = tl.zeros((BB, BM, BW, 8), ACC)
    for begin in range(0, words, BW):
        word = begin + tl.arange(0, BW)
        held, mine = words_at(bits, firsts, row[:, None], word[None, :], rows, words, nnz, CHECKED)
        # Threads side by side have rows, which share numbers of x.
        quads, where = quads_in(values, held[:, :, None], mine[:, :, None], 4 * tl.arange(0, 8)[None, None, :])
        source = (word[:, None] * 32 + tl.arange(0, 32)[None, :])[None, :, :]
        numbers = tl.load(x + one.to(tl.int64) * depth + source, mask=(source < depth) & (one < batch), other=0.0)
        first, second, third, fourth = split_places(tl.reshape(numbers, (BB, BW, 8, 2, 2)))
        total, where = add_place(total, quads, where, first, ACC, 0)
        total, where = add_place(total, quads, where, second, ACC, 1)
        total, where = add_place(total, quads, where, third, ACC, 2)
        total, where = add_place(total, quads, where, fourth, ACC, 3)
    target = product + row[None, :].to(tl.int64) * batch + tl.arange(0, BB)[:, None]
    inside = (row < rows)[None, :] & (tl.arange(0, BB) < batch)[:, None]
    tl.store(target, tl.sum(tl.sum(total, 3), 2), mask=inside)


@triton.jit(do_not_specialize=["rows", "depth", "words", "nnz"])
def panel_kernel(
    values, bits, firsts, rows, depth, words, nnz, panel,
    UNIT: tl.constexpr, CHECKED: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """BM rows and BW words of a panel (rows, depth), all of which is written, from values."""
    depth = in_units(depth, UNIT)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    word = tl.program_id(1) * BW + tl.arange(0, BW)
    quads, where = quads_of(values, bits, firsts, row, word, rows, words, nnz, CHECKED)
    column = (word[:, None] * 32 + tl.arange(0, 32)[None, :])[None, :, :]
    place = panel + row[:, None, None].to(tl.int64) * depth + column
    inside = (row < rows)[:, None, None] & (column < depth)
    tl.store(place, tl.reshape(unpack(quads, where), (BM, BW, 32)), mask=inside)


@triton.jit(do_not_specialize=["depth"])
def sample_kernel(panel, starts, across, depth, sampled, BK: tl.constexpr):
    """The connections of one row of a panel (rows, depth), BK at a time: what it has there."""
    row = tl.program_id(0)
    begin, end = row_ends(starts, row, 0, False)
    for first in range(begin, end, BK):
        place = first + tl.arange(0, BK)
        there = place < end
        source = tl.load(across + place, mask=there, other=0)
        tl.store(sampled + place, tl.load(panel + row.to(tl.int64) * depth + source, mask=there), mask=there)


class Sizes(NamedTuple):
    """W (rows, depth) of ``nnz`` connections, and a batch."""

    rows: int
    depth: int
    nnz: int
    batch: int

    def with_words(self) -> dict[str, int]:
        """Return what kernels by bits are given, in their order."""
        return {
            "rows": self.rows,
            "depth": self.depth,
            "words": words_of(self.depth),
            "nnz": self.nnz,
            "batch": self.batch,
        }


class Launch(NamedTuple):
    """A kernel, how many programs of it there are, its sizes, in their order, and the constants that it is compiled for."""

    kernel: Any
    grid: tuple[int, ...]
    sizes: dict[str, int]
    told: dict[str, Any]


def rows_spmm(sizes: Sizes, itemsize: int, *, ordered: bool, checked: bool) -> Launch:
    """Return what runs W · right by rows, for right (depth, batch).

    Pointers: values, right, starts, across, order, or anything unless ``ordered``, and the product (rows, batch).
    ``checked``, no index leads out of memory.
    """
    options = rows_options(sizes, sampled=False)
    given = {"batch": sizes.batch, "depth": sizes.depth, "nnz": sizes.nnz}
    told = {"UNIT": unit_of(sizes.batch), "ORDERED": ordered, "CHECKED": checked, "ACC": _sums(itemsize)}
    return Launch(rows_spmm_kernel, (sizes.rows, triton.cdiv(sizes.batch, options["BB"])), given, told | options)


def rows_sddmm(sizes: Sizes, itemsize: int, *, checked: bool) -> Launch:
    """Return what runs left · rightᵀ at the connections by rows.

    Pointers: left (rows, batch), right (depth, batch), starts, across, and what is sampled (nnz,).
    """
    options = rows_options(sizes, sampled=True)
    splits = min(16, max(1, sizes.nnz // max(1, sizes.rows * options["BK"])))
    given = {"batch": sizes.batch, "depth": sizes.depth, "nnz": sizes.nnz, "splits": splits}
    told = {"UNIT": unit_of(sizes.batch), "CHECKED": checked, "ACC": _sums(itemsize)}
    return Launch(rows_sddmm_kernel, (sizes.rows, splits), given, told | options)


def bits_spmm(sizes: Sizes, itemsize: int, *, checked: bool) -> Launch:
    """Return what runs W · x by bits, for at most :data:`maskedlinear._gpu_rule.LARGEST_BITS_BATCH` rows of x.

    Pointers: values, x (batch, depth), bits, firsts, and the product (rows, batch).
    """
    options = bits_options(sizes.batch, itemsize)
    told = {"UNIT": unit_of(sizes.depth), "CHECKED": checked, "ACC": _sums(itemsize)}
    return Launch(bits_spmm_kernel, (triton.cdiv(sizes.rows, options["BM"]),), sizes.with_words(), told | options)


def form_bits(rows: int, depth: int, nnz: int, *, checked: bool) -> Launch:
    """Return what forms a pattern's bits: where it has connections, a bit each, and which one is the first of each word.

    Pointers: starts, across, and bits and firsts, int32, shape (rows, words of depth).
    """
    words = words_of(depth)
    wide = min(64, max(32, triton.next_power_of_2(words)))  # of one warp, which waits for none of another's
    told = {"CHECKED": checked, "BW": wide, "AT_ONCE": AT_ONCE, "num_warps": 1}
    return Launch(form_bits_kernel, (rows, triton.cdiv(words, wide)), {"words": words, "nnz": nnz}, told)


def panel(rows: int, depth: int, nnz: int) -> Launch:
    """Return what writes a panel (rows, depth) from values.

    Pointers: values, bits and firsts of its rows, and the panel.
    """
    words = words_of(depth)
    grid = (triton.cdiv(rows, PANEL_OPTIONS["BM"]), triton.cdiv(words, PANEL_OPTIONS["BW"]))
    given = {"rows": rows, "depth": depth, "words": words, "nnz": nnz}
    return Launch(panel_kernel, grid, given, {"UNIT": unit_of(depth), "CHECKED": False, **PANEL_OPTIONS})


def sample(rows: int, depth: int, each: int) -> Launch:
    """Return what writes values from a panel (rows, depth), of whose rows one has so many connections on average.

    Pointers: panel, starts of its rows, across, and what is sampled (nnz,).
    """
    wide = min(1024, max(128, triton.next_power_of_2(each)))
    return Launch(sample_kernel, (rows,), {"depth": depth}, {"BK": wide, "num_warps": wide // 128})


def _sums(itemsize: int) -> Any:
    return tl.float64 if itemsize == 8 else tl.float32


def rows_options(sizes: Sizes, *, sampled: bool) -> dict[str, int]:
    """Return the sizes of a program of the products by rows: of those that took the least time on an H200."""
    wide = min(WIDEST_ROW, triton.next_power_of_2(sizes.batch))
    tile = _TILE if sampled or wide < 16 else _TILE // 2
    each = triton.next_power_of_2(max(8, -(-sizes.nnz // max(1, sizes.rows))))
    tall = max(8, min(tile // wide, each))
    return {"BK": tall, "BB": wide, "num_warps": max(1, min(4, tall * wide // 256))}


def bits_options(batch: int, itemsize: int) -> dict[str, int]:
    """Return the sizes of a program of the product by bits."""
    wide = triton.next_power_of_2(batch)  # at most _gpu_rule.LARGEST_BITS_BATCH
    if itemsize == 8:
        tall, words = {8: (8, 4), 16: (8, 2)}.get(wide, (4, 16))
    else:
        tall, words = (16, 4) if wide == 16 else (8, 16)
    return {"BM": tall, "BW": words, "BB": wide, "num_warps": 4}
