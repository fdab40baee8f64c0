"""The products of a batch of one: as many connections of a row at a time as a register holds, and their numbers of x.

Where a row is full, they lie in a window of x, some registers side by side, from which an instruction of AVX-512 picks from
two. Those that do not are loaded, one by one. What an index that x has not leaves of a row is for loops that take the last.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import ir

from maskedlinear.kernels._emit import I32, I64, PTR, Emitter, float_type, function
from maskedlinear.kernels._permute import Way, pick
from maskedlinear.kernels._rows import CHAINS, Arguments, Pattern, Shape, chunk_rows, sums_of, total_of, until

__all__ = ["sampled_vector_task", "vector_task"]

_PAIRS = (2, 4)  # of registers that a window has
_FILLED = 10, 16  # of a window, so much should the next connections take on average: most then do lie in it

Use = Callable[[Any, Any, list[Any]], list[Any]]


def vector_task(
    module: ir.Module, name: str, shape: Shape, dtype: str, *, checked: bool, ordered: bool, way: Way | None
) -> None:
    """Emit the task that multiplies some rows of W with one vector; ``ordered`` as in :func:`_rows.spmm_task`.

    ``way`` is how the processor picks numbers from registers, if it does: windows need two registers at a time.
    """
    kind = float_type(dtype)
    with function(module, name, ir.VoidType(), [PTR, I64]) as code:
        told = Arguments(code, code.function.args[0])
        pattern = Pattern(code, told, dtype, checked=checked, ordered=ordered)
        first, last = chunk_rows(code, told, code.function.args[1])
        right, out = told.pointer("panels"), told.pointer("out")
        zero = ir.Constant(kind, 0.0)
        groups = _Groups(code, told, ir.VectorType(kind, shape.lanes), checked=checked, way=way)

        def add(place: Any, numbers: Any, totals: list[Any]) -> list[Any]:
            return [code.multiply_add(pattern.values(place, shape.lanes), numbers, totals[0])]

        with code.loop(first, last) as row:
            place, end = pattern.start(row), pattern.start(code.sum(row, 1))
            sums = [zero] * CHAINS
            if not ordered:
                place, sums[0] = groups.over(place, end, add, zero)
            for number in (CHAINS, 1):
                with code.while_loop([place, *sums[:number]], until(code, end, number)) as (carried, following):
                    following.append(code.sum(carried[0], number))
                    for one, total in enumerate(carried[1:]):
                        connection = code.sum(carried[0], one)
                        number_of_x = code.get(right, pattern.column(connection), kind)
                        following.append(code.multiply_add(pattern.value(connection), number_of_x, total))
                place, sums = carried[0], [total_of(code, carried[1:])]
            code.put(sums[0], out, row)
        with code.if_then(told.flag("bias")), code.loop(first, last) as row:
            number = code.read(told.pointer("bias"), row, dtype)
            code.put(code.fadd(code.get(out, row, kind), number), out, row)


def sampled_vector_task(
    module: ir.Module, name: str, shape: Shape, dtype: str, *, checked: bool, way: Way | None
) -> None:
    """Emit the task that multiplies the two numbers at the ends of each connection of some rows; ``way`` as above."""
    kind = float_type(dtype)
    vector = ir.VectorType(kind, shape.lanes)
    with function(module, name, ir.VoidType(), [PTR, I64]) as code:
        told = Arguments(code, code.function.args[0])
        pattern = Pattern(code, told, dtype, checked=checked)
        left, right, out = (told.pointer(name) for name in ("left_panels", "panels", "out"))
        first, last = chunk_rows(code, told, code.function.args[1])
        groups = _Groups(code, told, vector, checked=checked, way=way)
        with code.loop(first, last) as row:
            side = code.get(left, row, kind)
            place, end = pattern.start(row), pattern.start(code.sum(row, 1))

            def put(place: Any, numbers: Any, _: list[Any], side: Any = side) -> list[Any]:
                code.put(code.fmul(code.spread(side, vector), numbers), out, place, kind)
                return []

            place, _ = groups.over(place, end, put)
            with code.loop(place, end) as connection:
                code.put(code.fmul(side, code.get(right, pattern.column(connection), kind)), out, connection)


class _Groups:
    """A row's connections, as many at a time as a register holds, and the numbers of x for them."""

    def __init__(self, code: Emitter, told: Arguments, vector: Any, *, checked: bool, way: Way | None) -> None:
        self._code, self._vector, self._lanes, self._checked = code, vector, vector.count, checked
        self._right, self._across, self._depth = told.pointer("panels"), told.pointer("across"), told.number("depth")
        self._indices = ir.VectorType(I32, self._lanes)
        picks = (
            way is not None and vector.element == ir.FloatType() and way.picks_from_pairs and way.lanes == self._lanes
        )
        self._way: Any = way
        self._room = code.room(vector.element, max(_PAIRS) * 2 * self._lanes) if picks else None
        self._windows = [pairs * 2 * self._lanes for pairs in _PAIRS] if picks else []
        self._fewest = [self._fewest_in_row(window) for window in self._windows]
        self._within: Any = None

    def over(self, place: Any, end: Any, use: Use, zero: Any = None) -> tuple[Any, Any]:
        """Emit ``totals = use(place, numbers of x, totals)`` over a row from ``place`` on, up to an index that x has not.

        Return the place behind what was used, and, if there is a ``zero``, the sum of a total's lanes.
        """
        code, start, before = self._code, place, self._code.block
        inside, behind = code.append_basic_block(), code.append_basic_block()
        code.cbranch(until(code, end, self._lanes)([place]), inside, behind)
        code.position_at_end(inside)
        count = code.sub(end, place)
        totals = [] if zero is None else [ir.Constant(self._vector, [0.0] * self._lanes)]
        for window, fewest in zip(self._windows, self._fewest, strict=True):
            stop = code.select(code.icmp_unsigned(">=", count, fewest), end, I64(0))
            conditions = [until(code, stop, self._lanes), self._lie_in_window(window)]
            place, totals = self._each(place, totals, conditions, partial(self._picked, window), use)
        conditions = [until(code, end, self._lanes), *([self._are_of_x] if self._checked else [])]
        place, totals = self._each(place, totals, conditions, self._loaded, use)
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

    def _each(
        self, place: Any, totals: list[Any], conditions: list[Any], numbers: Callable[[Any], Any], use: Use
    ) -> tuple[Any, list[Any]]:
        """Emit the loop over groups from ``place`` on, as long as all conditions hold."""
        with self._code.while_loop([place, *totals], *conditions) as (carried, following):
            following += [self._code.sum(carried[0], self._lanes), *use(carried[0], numbers(carried[0]), carried[1:])]
        return carried[0], carried[1:]

    def _fewest_in_row(self, window: int) -> Any:
        """Return how many connections a row has at least for a window of so many columns, which x has too."""
        code = self._code
        fewest = code.rounded_up(code.times(self._depth, self._lanes * _FILLED[1]), window * _FILLED[0])
        return code.select(code.less(self._depth, window), I64(-1), fewest)

    def _lie_in_window(self, window: int) -> Callable[[list[Any]], Any]:
        """Return the condition that all of a group lie in a window of x, which starts in front of the first of them."""
        code = self._code

        def condition(carried: list[Any]) -> Any:
            columns = code.get(self._across, carried[0], self._indices, I32)
            first = code.whole(code.extract_element(columns, I32(0)))
            first = code.least(code.and_(first, I64(-self._lanes)), code.sub(self._depth, I64(window)))
            places = code.sub(columns, code.spread(code.trunc(first, I32), self._indices))
            self._within = first, places
            return code.are_all_below(places, I64(window))

        return condition

    def _are_of_x(self, carried: list[Any]) -> Any:
        """Whether x has all columns of a group."""
        columns = self._code.get(self._across, carried[0], self._indices, I32)
        return self._code.are_all_below(columns, self._depth)

    def _picked(self, window: int, _: Any) -> Any:
        """Return the numbers of the group that was found to lie in a window."""
        code, (first, places) = self._code, self._within
        source = code.place(self._right, first, self._vector.element)
        numbers = [code.get(source, part, self._vector, self._vector.element) for part in range(0, window, self._lanes)]
        return pick(code, self._way, numbers, places, self._room)

    def _loaded(self, place: Any) -> Any:
        """Return the numbers of x for the connections from ``place`` on, of which two indices are loaded at once."""
        code, numbers = self._code, ir.Constant(self._vector, ir.Undefined)
        for lane in range(0, self._lanes, 2):
            two = code.get(self._across, code.sum(place, lane), I64, I32)
            halves = code.and_(two, I64(0xFFFFFFFF)), code.lshr(two, I64(32))
            for part, column in enumerate(halves if sys.byteorder == "little" else halves[::-1]):
                number = code.get(self._right, column, self._vector.element)
                numbers = code.insert_element(numbers, number, I32(lane + part))
        return numbers
