"""The products of a batch of one: a load of x for each connection, or, where a row is full, x by windows, in registers.

A window is some registers of x side by side, from which one instruction of AVX-512 picks from two: several connections of a
row lie in it, whose numbers need no load each. Those that do not are loaded, with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from maskedlinear.kernels._emit import I32, I64, PTR, Emitter, float_type, function
from maskedlinear.kernels._permute import WAYS, pick
from maskedlinear.kernels._rows import Arguments, PatternOf, chunk_rows, sums_of, total_of, until

__all__ = ["sampled_vector_task", "vector_task"]

_CHAINS = 8  # sums that are added to at once, so that none waits for its last addition
_PAIRS = (2, 4)  # of registers that a window has
_FILLED = 10, 16  # of a window, so much should the next connections take on average: most then do lie in it

_WAY, _WAY_KIND = WAYS["permute_avx512"], float_type("float32")

Use = Callable[[Any, Any, list[Any]], list[Any]]


def vector_task(module: ir.Module, name: str, dtype: str, *, checked: bool, ordered: bool, picks: bool) -> None:
    """Emit the task that multiplies some rows of W with one vector; ``ordered`` as in :func:`_rows.spmm_task`.

    ``picks``, for a processor that has AVX-512.
    """
    kind = float_type(dtype)
    with function(module, name, ir.VoidType(), [PTR, I64]) as code:
        told = Arguments(code, code.function.args[0])
        pattern = PatternOf(code, told, dtype, checked=checked, ordered=ordered)
        first, last = chunk_rows(code, told, code.function.args[1])
        right, out = told.pointer("panels"), told.pointer("out")
        windows = _Windows(code, told, checked=checked) if picks and kind == _WAY_KIND and not ordered else None

        def add(place: Any, numbers: Any, totals: list[Any]) -> list[Any]:
            return [code.multiply_add(pattern.values(place, numbers.type.count), numbers, totals[0])]

        zero = ir.Constant(kind, 0.0)
        with code.loop(first, last) as row:
            place, end = pattern.start(row), pattern.start(code.sum(row, 1))
            sums = [zero] * _CHAINS
            if windows:
                place, sums[0] = windows.over(place, end, add, zero)
            for number in (_CHAINS, 1):
                with code.while_loop([place, *sums[:number]], until(code, end, number)) as (carried, following):
                    following.append(code.sum(carried[0], number))
                    for one, total in enumerate(carried[1:]):
                        connection = code.sum(carried[0], one)
                        number_of_x = code.get(right, pattern.column(connection), kind)
                        value = pattern.value(connection)
                        following.append(code.multiply_add(value, number_of_x, total))
                place, sums = carried[0], [total_of(code, carried[1:])]
            code.put(sums[0], out, row)


def sampled_vector_task(module: ir.Module, name: str, dtype: str, *, checked: bool, picks: bool) -> None:
    """Emit the task that multiplies the two numbers at the ends of each connection of some rows; ``picks`` as above."""
    kind = float_type(dtype)
    with function(module, name, ir.VoidType(), [PTR, I64]) as code:
        told = Arguments(code, code.function.args[0])
        pattern = PatternOf(code, told, dtype, checked=checked)
        left, right, out = (told.pointer(name) for name in ("left_panels", "panels", "out"))
        first, last = chunk_rows(code, told, code.function.args[1])
        windows = _Windows(code, told, checked=checked) if picks and kind == _WAY_KIND else None
        with code.loop(first, last) as row:
            side = code.get(left, row, kind)
            place, end = pattern.start(row), pattern.start(code.sum(row, 1))

            def put(place: Any, numbers: Any, _: list[Any], side: Any = side) -> list[Any]:
                code.put(code.fmul(code.spread(side, numbers.type), numbers), out, place, kind)
                return []

            if windows:
                place, _ = windows.over(place, end, put)
            with code.loop(place, end) as connection:
                code.put(code.fmul(side, code.get(right, pattern.column(connection), kind)), out, connection)


class _Windows:
    """A row's connections, as many at a time as a register holds, and the numbers of x for them."""

    def __init__(self, code: Emitter, told: Arguments, *, checked: bool) -> None:
        self._code, self._lanes = code, _WAY.lanes
        self._vector = ir.VectorType(_WAY_KIND, self._lanes)
        self._indices = ir.VectorType(I32, self._lanes)
        self._right, self._across, self._depth = told.pointer("panels"), told.pointer("across"), told.number("depth")
        self._fewest = [self._fewest_in_row(pairs * _WAY.block) for pairs in _PAIRS]
        last = code.trunc(code.sub(self._depth, I64(1)), I32)
        self._last = code.spread(last, self._indices) if checked else None

    def over(self, place: Any, end: Any, use: Use, zero: Any = None) -> tuple[Any, Any]:
        """Emit ``totals = use(place, numbers of x, totals)`` over a row from ``place`` on, where it is full enough.

        Return the place behind what was used, and, if there is a ``zero``, the sum of a total's lanes.
        """
        code, start, before = self._code, place, self._code.block
        count = code.sub(end, place)
        full = [code.icmp_unsigned(">=", count, fewest) for fewest in self._fewest]
        inside, behind = code.append_basic_block(), code.append_basic_block()
        code.cbranch(code.or_(*full), inside, behind)
        code.position_at_end(inside)
        totals = [] if zero is None else [ir.Constant(self._vector, [0.0] * self._lanes)]
        for pairs, is_full in zip(_PAIRS, full, strict=True):
            stop = code.select(is_full, end, I64(0))
            with code.while_loop([place, *totals], until(code, stop, self._lanes)) as (carried, following):
                numbers = self._numbers(carried[0], pairs)
                following += [code.sum(carried[0], self._lanes), *use(carried[0], numbers, carried[1:])]
            place, *totals = carried
        results = [place, *(sums_of(code, [total], self._vector.element) for total in totals)]
        inside = code.block
        code.branch(behind)
        code.position_at_end(behind)
        joined = []
        for result, otherwise in zip(results, [start, zero], strict=False):
            joined.append(code.phi(result.type))
            joined[-1].add_incoming(result, inside)
            joined[-1].add_incoming(otherwise, before)
        return joined[0], joined[-1]

    def _fewest_in_row(self, window: int) -> Any:
        """Return how many connections a row has at least for a window of so many columns, which x has too."""
        code = self._code
        fewest = code.rounded_up(code.times(self._depth, self._lanes * _FILLED[1]), window * _FILLED[0])
        return code.select(code.less(self._depth, window), I64(-1), fewest)

    def _numbers(self, place: Any, pairs: int) -> Any:
        """Return the numbers of x for the connections from ``place`` on, from a window if they all lie in it."""
        code, lanes, window = self._code, self._lanes, pairs * _WAY.block
        columns = code.get(self._across, place, self._indices, I32)
        if self._last is not None:
            columns = code.select(code.icmp_unsigned("<", columns, self._last), columns, self._last)
        first = code.whole(code.extract_element(columns, I32(0)))
        first = code.least(code.and_(first, I64(-lanes)), code.sub(self._depth, I64(window)))
        within = code.sub(columns, code.spread(code.trunc(first, I32), self._indices))
        are_in = code.icmp_unsigned("<", within, ir.Constant(self._indices, [window] * lanes))
        all_lanes = ir.IntType(lanes)
        are_all = code.icmp_unsigned("==", code.bitcast(are_in, all_lanes), all_lanes(-1))
        from_window, one_by_one, behind = (code.append_basic_block() for _ in range(3))
        code.cbranch(are_all, from_window, one_by_one)
        code.position_at_end(from_window)
        picked = self._picked(code.place(self._right, first, self._vector.element), within, pairs)
        code.branch(behind)
        code.position_at_end(one_by_one)
        loaded: Any = ir.Constant(self._vector, ir.Undefined)
        for lane in range(lanes):
            column = code.whole(code.extract_element(columns, I32(lane)))
            loaded = code.insert_element(loaded, code.get(self._right, column, self._vector.element), I32(lane))
        code.branch(behind)
        code.position_at_end(behind)
        numbers = code.phi(self._vector)
        numbers.add_incoming(picked, from_window)
        numbers.add_incoming(loaded, one_by_one)
        return numbers

    def _picked(self, source: Any, within: Any, pairs: int) -> Any:
        """Return the numbers of a window, which lies from ``source`` on, at the places ``within``."""
        code, lanes, picked = self._code, self._lanes, None
        for start in range(0, pairs * _WAY.block, _WAY.block):
            two = [code.get(source, start + part, self._vector, self._vector.element) for part in (0, lanes)]
            of_pair = pick(code, _WAY, two, within)  # by the lower bits of places
            if picked is not None:
                is_here = code.icmp_unsigned(">=", within, ir.Constant(within.type, [start] * lanes))
                of_pair = code.select(is_here, of_pair, picked)
            picked = of_pair
        return picked
