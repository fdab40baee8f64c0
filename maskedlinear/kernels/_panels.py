"""Panels: a matrix cut into tiles of a few columns of the batch, so that what a product reads at once lies side by side.

A panel of width w holds, feature by feature, w numbers of the batch. The panels of a matrix follow each other; the last is
filled up with zeros. Matrices come by features, (features, batch), or by batch, (batch, features), and leave so, so that
nobody has to transpose them first: that is done here, a square of registers at a time.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from maskedlinear.kernels._emit import HALF_TYPES, I64, PTR, Emitter, float_type, function

__all__ = ["COPY", "STRIP", "emit_panels", "transposed"]

STRIP = 256  # features that are packed at a time

# matrix, by batch?, features, batch, column, width of a panel, panel, from feature, to feature
COPY = ir.FunctionType(ir.VoidType(), [PTR, I64, I64, I64, I64, I64, PTR, I64, I64])


def transposed(code: Emitter, rows: list[Any]) -> list[Any]:
    """Return the columns of a square of vectors."""
    lanes = len(rows)
    step = lanes // 2
    while step:
        low = [lane if not lane & step else lane - step + lanes for lane in range(lanes)]
        high = [lane + step if not lane & step else lane + lanes for lane in range(lanes)]
        mixed = list(rows)
        for one in range(lanes):
            if not one & step:
                mixed[one] = code.lanes(rows[one], rows[one + step], low)
                mixed[one + step] = code.lanes(rows[one], rows[one + step], high)
        rows = mixed
        step //= 2
    return rows


def emit_panels(module: ir.Module, lanes: int, dtype: str) -> None:
    """Emit ``read_panel`` and ``write_panel``: some features of a matrix from and to a panel, which starts with the first.

    What a batch has not is 0 in a panel, and is not written to a matrix. Panels are of :func:`wide` numbers; of half types
    nothing is written.
    """
    arguments = [PTR, I64, PTR, I64]
    with function(module, "turn", ir.VoidType(), arguments) as code:  # once for both: it takes long to compile
        source, source_step, target, target_step = code.function.args
        rows = [code.read(source, code.times(source_step, one), dtype, lanes) for one in range(lanes)]
        for one, row in enumerate(transposed(code, rows)):
            code.put(row, target, code.times(target_step, one), float_type(dtype))
    for name in ("read_panel",) if dtype in HALF_TYPES else ("read_panel", "write_panel"):
        with function(module, name, ir.VoidType(), COPY.args) as code:
            _emit_copy(code, lanes, dtype, to_panel=name == "read_panel")


def _emit_copy(code: Emitter, lanes: int, dtype: str, *, to_panel: bool) -> None:
    matrix, by_batch, features, batch, column, width, panel, first, last = code.function.args
    kind = float_type(dtype)
    vector = ir.VectorType(kind, lanes)
    live = code.least(code.sub(batch, code.least(column, batch)), width)

    def in_panel(feature: Any, lane: Any) -> Any:
        return code.sum(code.times(code.sub(feature, first), width), lane)

    def entry(feature: Any, lane: Any) -> None:
        """Copy one number, which may not be there."""
        of_batch = code.sum(code.times(code.add(column, lane), features), feature)
        of_features = code.sum(code.times(feature, batch), column, lane)
        place = code.select(code.icmp_unsigned("!=", by_batch, I64(0)), of_batch, of_features)
        is_there = code.less(lane, live)
        with code.if_else(is_there) as (there, missing):
            with there:
                if to_panel:
                    code.put(code.read(matrix, place, dtype), panel, in_panel(feature, lane))
                else:
                    code.put(code.get(panel, in_panel(feature, lane), kind), matrix, place)
            with missing:
                if to_panel:
                    code.put(ir.Constant(kind, 0.0), panel, in_panel(feature, lane))

    with code.if_else(code.icmp_unsigned("!=", by_batch, I64(0))) as (turned, straight):
        with turned:
            squares = code.times(code.over(live, lanes), lanes)
            whole = code.sub(last, code.urem(code.sub(last, first), I64(lanes)))
            with code.loop(first, whole, lanes) as feature, code.loop(0, squares, lanes) as lane:
                of_batch = code.sum(code.times(code.sum(column, lane), features), feature)
                if not to_panel:  # lines far from each other, written to when the next features are
                    for one in range(lanes):
                        code.fetch(
                            code.at(matrix, code.sum(of_batch, code.times(features, one)), dtype), 64, to_write=True
                        )
                sides = [(code.at(matrix, of_batch, dtype), features)]
                sides.insert(1 if to_panel else 0, (code.place(panel, in_panel(feature, lane), kind), width))
                code.call(code.module.globals["turn"], [part for side in sides for part in side])
            with code.loop(first, last) as feature:
                start = code.select(code.less(feature, whole), squares, I64(0))
                with code.loop(start, width) as lane:
                    entry(feature, lane)
        with straight, code.loop(first, last) as feature:
            whole = code.times(code.over(live, lanes), lanes)
            with code.loop(0, whole, lanes) as lane:
                place, here = code.sum(code.times(feature, batch), column, lane), in_panel(feature, lane)
                if to_panel:
                    code.put(code.read(matrix, place, dtype, lanes), panel, here, kind)
                else:
                    code.put(code.get(panel, here, vector, kind), matrix, place, kind)
            with code.loop(whole, width) as lane:
                entry(feature, lane)
