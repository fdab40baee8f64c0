"""Calling the kernels with pointers and shapes. No framework is imported here."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from maskedlinear.kernels import _engine, _openmp, _programs
from maskedlinear.kernels._emit import HALF_TYPES, item_bytes, wide
from maskedlinear.kernels._gradients import PARTS
from maskedlinear.kernels._rows import ORDERED_AT_ONCE, SLOTS, widths

__all__ = [
    "are_gradients_at_once",
    "compile_task",
    "count_mask",
    "gradients",
    "is_direct",
    "is_ordered_first",
    "is_row_by_kernel",
    "left_to_mkl",
    "list_mask",
    "order_values",
    "panel_numbers",
    "part_numbers",
    "place_values",
    "prepare",
    "sampled_numbers",
    "sddmm",
    "spmm",
    "table_address",
    "widths_of_parts",
]

_CALL = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
_Told = ctypes.c_int64 * len(SLOTS)
_SLOT = {name: place for place, name in enumerate(SLOTS)}
_tables: dict[tuple[str, str, bool], Any] = {}


@cache
def _sizes(dtype: str) -> tuple[int, ...]:
    return tuple(widths(_engine.host().shape(dtype), dtype))


def is_direct(batch: int, by_batch: bool, dtype: str) -> bool:
    """Whether a product reads a matrix as it is, because it is one panel already, or a vector, and not of a half type."""
    return dtype not in HALF_TYPES and (batch == 1 or (not by_batch and batch in _sizes(dtype)))


def _is_direct(batch: int, by_batch: bool, dtype: str, *panels: int) -> bool:
    direct = is_direct(batch, by_batch, dtype)
    if not direct and not all(panels):
        raise ValueError(
            f"panels must be given for {dtype} and a batch of {batch}, since is_direct({batch}, {by_batch}, {dtype!r}) is "
            "False; got none: pass room for panel_numbers(...) numbers"
        )
    return direct


# Bytes of values, beyond any second cache, and columns of a batch from which on it takes 0.6 to 0.8 of the time to bring the
# values into the order of columns first: found while others are multiplied, each waits for a line of memory, for each tile
# anew. For fewer columns, or fewer values, it takes as long, or longer.
_ORDERED_FIRST, _FEWEST_ORDERED = 10 << 20, 32


def is_ordered_first(nnz: int, batch: int, dtype: str) -> bool:
    """Whether a product takes less time if :func:`order_values` brings its values into order before it."""
    return batch >= _FEWEST_ORDERED and nnz * item_bytes(dtype) >= _ORDERED_FIRST


# Where so much of W is live, most connections of a row lie in windows of x; and so many save more than a call costs, which
# is 12 us above that of MKL: 0.6 to 1.0 of its time.
_ROW_LIVE, _ROW_CONNECTIONS = 0.4, 1 << 19


def is_row_by_kernel(shape: tuple[int, int], nnz: int) -> bool:
    """Whether :func:`spmm` of one float32 or float64 vector takes less time than MKL with a matrix that was made before."""
    return _has_windows() and nnz >= _ROW_CONNECTIONS and nnz >= _ROW_LIVE * shape[0] * shape[1]


def left_to_mkl() -> str:
    """Say for which matrices :func:`is_row_by_kernel` is false; nothing if for all."""
    return f"less than {_ROW_LIVE:.0%} live or {_ROW_CONNECTIONS:,} connections" if _has_windows() else ""


def _has_windows() -> bool:
    return _engine.host().register_bytes == 64


def panel_numbers(features: int, batch: int, dtype: str) -> int:
    """Return how many numbers the panels of a matrix hold."""
    smallest = _sizes(dtype)[-1]
    return features * (-(-batch // smallest) * smallest)


def _table(kind: str, dtype: str, checked: bool) -> Any:
    found = _tables.get((kind, dtype, checked))
    if found is None:  # a table that is known stays, since code holds its address
        made = (ctypes.c_int64 * (_programs.WIDTHS + len(_sizes(dtype))))()
        found = _tables.setdefault((kind, dtype, checked), made)
    return found


def table_address(kind: str, dtype: str, *, checked: bool) -> int:
    """Return where the table of a product's tasks lies: their addresses, or 0 as long as they are not compiled."""
    return ctypes.addressof(_table(kind, dtype, checked))


def compile_task(kind: str, dtype: str, task: int, checked: bool) -> None:
    """Compile one task of a product, and enter it in the table."""
    if task >= _programs.WIDTHS:
        found = _engine.address(kind, dtype, _sizes(dtype)[task - _programs.WIDTHS], checked=checked)
    elif task in (_programs.PACK_RIGHT, _programs.PACK_LEFT):
        found = _engine.address("pack_right" if task == _programs.PACK_RIGHT else "pack_left", dtype)
    elif task == _programs.ADD_PARTS:
        found = _engine.address(f"{kind}_parts", dtype)
    else:
        found = _engine.address(f"{kind}_vector", dtype, checked=checked)
    _table(kind, dtype, checked)[task] = found


@cache
def _program(kind: str, dtype: str) -> Any:
    return _CALL(_engine.address(program_of(kind), dtype))


def program_of(kind: str) -> str:
    """Return the kind of the program of a product: one with values in another order differs in its tasks alone."""
    return f"{kind.removesuffix('_ordered')}_program"


def _in_slots(told: dict[str, int]) -> Any:
    slots = _Told()  # zeros; at every call, in a third of the time that a number for each slot takes
    for name, number in told.items():
        slots[_SLOT[name]] = number
    return slots


def _call(kind: str, dtype: str, told: dict[str, int], checked: bool, threads: int, *, dry: bool = False) -> Any:
    """Run a product, and return its slots; what it needs and is not compiled yet is, and it begins anew."""
    told["tasks"] = table_address(kind, dtype, checked=checked)
    told["threads"] = max(threads, 1)
    way = (_engine.address("dry"), 0) if dry else _openmp.pool()
    while missing := _program(kind, dtype)(slots := _in_slots(told), *way):
        compile_task(kind, dtype, missing - 1, checked)
    return slots


def prepare(kind: str, dtype: str, shape: tuple[int, int], batch: int, nnz: int) -> None:
    """Compile what a product of matrices by batch runs, with checks: its program is gone through, and nothing multiplied.

    For two threads: more run the same tasks, and one runs none that two do not.
    """
    told = {
        "rows": shape[0], "depth": shape[1], "batch": batch, "nnz": nnz,
        "direct": is_direct(batch, by_batch=True, dtype=dtype), "widest": _width_of_parts(batch, dtype),
        "part_count": _sampled_parts(shape, batch, nnz, dtype),
    }  # fmt: skip
    _call(kind, dtype, told, True, 2, dry=True)


def spmm(
    dtype: str,
    shape: tuple[int, int],
    batch: int,
    nnz: int,
    *,
    starts: int,
    across: int,
    values: int,
    right: int,
    out: int,
    order: int = 0,
    panels: int = 0,
    packed: int = 0,
    bias: int = 0,
    right_by_batch: bool = False,
    out_by_batch: bool = False,
    threads: int = 1,
    checked: bool = True,
) -> None:
    """Write W · right + bias to ``out``; all matrices are given as the addresses of their first numbers.

    The bits of the result depend on nothing but the arguments' values and the machine: not on ``threads``.

    Args:
        dtype: ``"float32"`` or ``"float64"``, of values, right, out and panels; or ``"bfloat16"`` or ``"float16"``, of
            values and right, which are widened as they are read: out and panels are float32.
        shape: the rows and the columns of W.
        batch: the columns of right; from 1 on.
        nnz: the number of connections; from 1 on.
        starts: int32, shape ``(rows + 1,)``, where each row of W starts.
        across: int32, shape ``(nnz,)``, the column of each connection.
        values: shape ``(nnz,)``.
        right: shape ``(columns, batch)``, or, by batch, ``(batch, columns)``.
        out: shape ``(rows, batch)``, or, by batch, ``(batch, rows)``.
        order: int32, shape ``(nnz,)``: connection k has the value ``values[order[k]]``; 0 if values are in order.
        panels: room for :func:`panel_numbers` numbers; neither needed nor used if :func:`is_direct`.
        packed: what :func:`sddmm` returned, if ``panels`` are those in which it has packed this matrix; 0 if nothing is.
        bias: shape ``(rows,)``, of the dtype of values, added last to each column; 0 for none.
        right_by_batch: which way right lies.
        out_by_batch: which way out lies.
        threads: the most threads that take part.
        checked: whether indices beyond their ends are taken for the last; pass ``False`` only for valid patterns.

    Raises:
        ValueError: if panels are needed, and there are none.
    """
    direct = _is_direct(batch, right_by_batch, dtype, panels)
    told = {
        "rows": shape[0], "depth": shape[1], "batch": batch, "nnz": nnz, "starts": starts, "across": across,
        "order": order, "values": values, "right": right, "right_by_batch": right_by_batch,
        "panels": right if direct else panels, "packed": packed, "direct": direct, "out": out,
        "out_by_batch": out_by_batch, "bias": bias,
    }  # fmt: skip
    _call("spmm_ordered" if order else "spmm", dtype, told, checked, threads)


def sddmm(
    dtype: str,
    shape: tuple[int, int],
    batch: int,
    nnz: int,
    *,
    starts: int,
    across: int,
    left: int,
    right: int,
    out: int,
    left_sums: int = 0,
    left_panels: int = 0,
    right_panels: int = 0,
    parts: int = 0,
    left_by_batch: bool = False,
    right_by_batch: bool = False,
    threads: int = 1,
    checked: bool = True,
) -> int:
    """Write left · rightᵀ at the connections to ``out``, shape ``(nnz,)``; for the rest see :func:`spmm`.

    Args:
        dtype: of left, right, out and panels; of half types as in :func:`spmm`.
        shape: the rows and the columns of W.
        batch: the columns of left and right.
        nnz: the number of connections.
        starts: as in :func:`spmm`.
        across: as in :func:`spmm`.
        left: shape ``(rows, batch)``, or, by batch, ``(batch, rows)``.
        right: shape ``(columns, batch)``, or, by batch, ``(batch, columns)``.
        out: shape ``(nnz,)``.
        left_sums: shape ``(rows,)``, of the dtype of out: the sum of each row of left is written there, too; 0 for none.
            Not of a vector, which is its own sum.
        left_panels: room for the panels of left; not needed if both are direct.
        right_panels: room for the panels of right; not needed if both are direct.
        parts: room for :func:`sampled_numbers` numbers, the sums of parts of the batch, by which two threads and more take
            less time; 0 to form all in one, of which other bits may come.
        left_by_batch: which way left lies.
        right_by_batch: which way right lies.
        threads: as in :func:`spmm`.
        checked: as in :func:`spmm`.

    Returns:
        How wide the tiles are in which both sides are packed, in their panels; 0 if they are not packed.
    """
    direct = _is_direct(batch, left_by_batch or right_by_batch, dtype, left_panels, right_panels)
    told = {
        "rows": shape[0], "depth": shape[1], "batch": batch, "nnz": nnz, "starts": starts, "across": across,
        "left": left, "left_by_batch": left_by_batch, "left_panels": left if direct else left_panels,
        "right": right, "right_by_batch": right_by_batch, "panels": right if direct else right_panels,
        "direct": direct, "out": out, "sums": left_sums, "parts": parts,
        "part_count": _sampled_parts(shape, batch, nnz, dtype) if parts else 1,
    }  # fmt: skip
    slots = _call("sddmm", dtype, told, checked, threads)
    return 0 if direct else int(slots[_SLOT["widest"]])


# Parts of the batch whose sampled products are added up in the end, so that a thread reads what it has packed: with two
# threads 0.68 to 1.0 of the time. Their sums take half as much room as the panels, at most.
_MOST_PARTS = 4


def _sampled_parts(shape: tuple[int, int], batch: int, nnz: int, dtype: str) -> int:
    tiles = -(-batch // _sizes(dtype)[2])  # at most, as the program chooses widths
    room = sum(shape) * batch // 2
    return max(1, min(tiles, _MOST_PARTS, 1 + room // (nnz + shape[0])))


def sampled_numbers(shape: tuple[int, int], batch: int, nnz: int, dtype: str) -> int:
    """Return how many numbers the parts of a sampled product have beyond the first, which is where the product will be."""
    return (_sampled_parts(shape, batch, nnz, dtype) - 1) * (nnz + shape[0])


# Connections of a column, on average, from which on all of it is worth the sums of the parts; and most of their bytes.
_FEWEST_IN_COLUMN, _PART_BYTES = 128, 4 << 20


def are_gradients_at_once(depth: int, batch: int, nnz: int, dtype: str) -> bool:
    """Return whether :func:`gradients` takes less time by one pass than by two products: for 2 to 4, 8 or 16 columns."""
    return (
        _is_one_register(batch, dtype)
        and nnz >= _FEWEST_IN_COLUMN * depth
        and part_numbers(depth, batch, dtype) * item_bytes(wide(dtype)) <= _PART_BYTES
    )


def _is_one_register(batch: int, dtype: str) -> bool:
    """Return whether a batch, more than a vector, fills one register of a width that there is."""
    return batch > 1 and _width_of_parts(batch, dtype) in widths_of_parts(dtype)


def widths_of_parts(dtype: str) -> tuple[int, ...]:
    """Return the widths of panels of which gradients are made at once: those of one register."""
    return tuple(width for width in _sizes(dtype) if width <= _engine.host().shape(dtype).lanes)


def _width_of_parts(batch: int, dtype: str) -> int:
    return max(batch, _sizes(dtype)[-1])


def part_numbers(depth: int, batch: int, dtype: str) -> int:
    """Return how many numbers the sums of all parts have."""
    return PARTS * depth * _width_of_parts(batch, dtype)


def gradients(
    dtype: str,
    shape: tuple[int, int],
    batch: int,
    nnz: int,
    *,
    starts: int,
    across: int,
    values: int,
    left: int,
    right: int,
    out: int,
    out_right: int,
    parts: int,
    left_sums: int = 0,
    left_panels: int = 0,
    right_panels: int = 0,
    left_by_batch: bool = False,
    right_by_batch: bool = False,
    threads: int = 1,
    checked: bool = True,
) -> None:
    """Write left · rightᵀ at the connections to ``out``, and Wᵀ · left to ``out_right``, which lies as right does.

    By one pass over W's rows, which takes less time than two products where :func:`are_gradients_at_once`. For the rest see
    :func:`sddmm`.

    Args:
        dtype: as in :func:`spmm`.
        shape: the rows and the columns of W.
        batch: the columns of left and right.
        nnz: the number of connections.
        starts: as in :func:`spmm`.
        across: as in :func:`spmm`.
        values: as in :func:`spmm`.
        left: as in :func:`sddmm`.
        right: as in :func:`sddmm`.
        out: shape ``(nnz,)``.
        out_right: shape ``(columns, batch)``, or, by batch, ``(batch, columns)``.
        parts: room for :func:`part_numbers` numbers.
        left_sums: as in :func:`sddmm`.
        left_panels: as in :func:`sddmm`.
        right_panels: as in :func:`sddmm`.
        left_by_batch: as in :func:`sddmm`.
        right_by_batch: as in :func:`sddmm`.
        threads: as in :func:`spmm`.
        checked: as in :func:`spmm`.

    Raises:
        ValueError: if the batch is none of 2 to 4, 8 or 16 columns that fit a register, or panels are needed, and there are
            none.
    """
    if not _is_one_register(batch, dtype):
        raise ValueError(
            f"gradients are made at once of 2 to 4, 8 or 16 columns that fit a register of {dtype}; got {batch}: form them "
            "by sddmm and spmm"
        )
    direct = _is_direct(batch, left_by_batch or right_by_batch, dtype, left_panels, right_panels)
    told = {
        "rows": shape[0], "depth": shape[1], "batch": batch, "nnz": nnz, "starts": starts, "across": across,
        "left": left, "left_by_batch": left_by_batch, "left_panels": left if direct else left_panels,
        "right": right, "right_by_batch": right_by_batch, "panels": right if direct else right_panels,
        "direct": direct, "out": out, "sums": left_sums, "values": values, "out_right": out_right, "parts": parts,
        "widest": _width_of_parts(batch, dtype),
    }  # fmt: skip
    _call("gradients", dtype, told, checked, threads)


def order_values(dtype: str, nnz: int, *, values: int, order: int, out: int, threads: int = 1) -> None:
    """Write values in an order to ``out``, as the product of a transpose reads them.

    Args:
        dtype: of values and out.
        nnz: the number of connections.
        values: shape ``(nnz,)``.
        order: int32, shape ``(nnz,)``; one beyond the end is taken for the last.
        out: shape ``(nnz,)``.
        threads: the most threads that take part.
    """
    told = {"nnz": nnz, "values": values, "order": order, "out": out, "height": ORDERED_AT_ONCE}
    _run(_engine.address("order", dtype), told, threads, -(-nnz // ORDERED_AT_ONCE))


_PARALLEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
_ROWS = 32  # of a mask or a matrix that a thread takes at a time


@cache
def _parallel(address: int) -> Any:
    return _PARALLEL(address)


def _run_rows(task: int, told: dict[str, int], threads: int) -> None:
    """Run one task over chunks of rows."""
    chunks = -(-told["rows"] // _ROWS)
    _run(task, told | {"height": _ROWS, "chunks": chunks}, threads, chunks)


def _run(task: int, told: dict[str, int], threads: int, chunks: int) -> None:
    parallel, pool = _openmp.pool()
    arguments = _in_slots(told)
    _parallel(parallel)(pool, threads, task, ctypes.addressof(arguments), chunks)


def count_mask(shape: tuple[int, int], *, mask: int, starts: int, threads: int = 1) -> None:
    """Write how many entries of row i of a mask are live to ``starts[i + 1]``; ``starts[0]`` stays.

    Args:
        shape: that of the mask.
        mask: bytes of 0 and 1, row by row.
        starts: int32, shape ``(rows + 1,)``. Their running sums are what :func:`list_mask` reads.
        threads: the most threads that take part.
    """
    told = {"rows": shape[0], "depth": shape[1], "left": mask, "starts": starts}
    _run_rows(_engine.address("count"), told, threads)


def list_mask(shape: tuple[int, int], *, mask: int, starts: int, across: int, threads: int = 1) -> None:
    """Write the columns of the live entries of a mask, row by row, to ``across``.

    Args:
        shape: that of the mask.
        mask: as in :func:`count_mask`.
        starts: int32, shape ``(rows + 1,)``, where each row starts.
        across: int32, room for all of them.
        threads: the most threads that take part.
    """
    told = {"rows": shape[0], "depth": shape[1], "left": mask, "starts": starts, "across": across}
    _run_rows(_engine.address("list"), told, threads)


def place_values(
    dtype: str, shape: tuple[int, int], *, starts: int, across: int, values: int, out: int, threads: int = 1
) -> None:
    """Write a matrix that has values at the connections, and 0 elsewhere.

    Args:
        dtype: ``"float32"`` or ``"float64"``, of values and out.
        shape: that of the matrix.
        starts: as in :func:`spmm`; valid.
        across: as in :func:`spmm`; valid.
        values: shape ``(nnz,)``.
        out: shape ``(rows, columns)``.
        threads: the most threads that take part.
    """
    told = {"rows": shape[0], "depth": shape[1], "starts": starts, "across": across, "values": values, "out": out}
    _run_rows(_engine.address("place", dtype), told, threads)
