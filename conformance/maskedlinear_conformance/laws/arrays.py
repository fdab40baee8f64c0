"""Laws 6, 8, 9 and 10: batches, memory layouts, dtypes, and inputs that stay as they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from maskedlinear_conformance.backend_under_test import (
    FIRST,
    BackendUnderTest,
    by_name,
    equal_bits,
    positive_zero,
    quantity,
)
from maskedlinear_conformance.bounds import QUANTITIES, expected
from maskedlinear_conformance.cases import (
    HEAVY,
    OTHER,
    PROBE,
    SEVERAL,
    TILED,
    WIDE,
    Case,
    Data,
    draw,
    poisoned,
    round_to,
    with_nan,
)
from maskedlinear_conformance.laws import law
from maskedlinear_conformance.laws.derivatives import FULL, problems

__all__ = ["Arrays", "alike_rows"]

HALF = ("bfloat16", "float16")
LONG = 6144  # ones added up in bfloat16 stop at 256, in float16 at 2048; both hold this number


class Arrays:
    """Laws 6, 8, 9 and 10."""

    @law(6, enough=FULL)
    def test_any_batch_equals_the_flattened_one(self, subject: BackendUnderTest) -> None:
        """Batch dimensions are only a shape: exactly, on integers."""

        drawn, solid = problems(subject)

        @subject.check_property(drawn, **solid)
        def flat(data: Data) -> None:
            rows = math.prod(data.x.shape[:-1])
            flattened = {n: getattr(data, n).reshape(rows, getattr(data, n).shape[-1]) for n in ("x", "g")}
            got, want = subject.plain(data), subject.plain(data._replace(**flattened))
            for name, result in got.items():
                equal_bits([result + 0.0], [want[name].reshape(result.shape) + 0.0], name)

    @law(6, enough=FULL)
    def test_a_batch_equals_its_rows_one_by_one(self, subject: BackendUnderTest) -> None:
        """Rows do not see each other, and their gradients add up: exactly, on integers."""
        for case in (PROBE, HEAVY):
            data = case.data(subject.dtype, "integers")
            whole = subject.plain(data)
            rows = [subject.plain(data._replace(x=data.x[i], g=data.g[i])) for i in range(len(data.x))]
            for name in ("y", "dx"):
                equal_bits([whole[name] + 0.0], [np.stack([row[name] for row in rows]) + 0.0], name)
            for name in ("dW", "db"):
                equal_bits([whole[name] + 0.0], [sum((row[name] for row in rows), 0.0 * whole[name])], name)

    @law(8)
    def test_layouts_give_the_same_and_are_not_written_to(self, subject: BackendUnderTest, layout: str) -> None:
        """However its inputs lie in memory, the layer gives the same, and leaves them as they are."""
        for chosen in (*Data._fields[:5], "all"):
            _laid_out(subject, PROBE, layout, Data._fields if chosen == "all" else (chosen,), ("y", "dx", "dW", "db"))
        for case in (SEVERAL, TILED):
            _laid_out(subject, case, layout, Data._fields, ("y", "dx", "dW", "db"))

    @law(8)
    def test_layouts_in_forward_mode_and_second_order(self, subject: BackendUnderTest, layout: str) -> None:
        """However inputs and directions lie in memory, every derivative is the same."""
        for case in (PROBE, SEVERAL, TILED):
            _laid_out(subject, case, layout, Data._fields, QUANTITIES)

    @law(9, dtypes=HALF)
    def test_half_types_accumulate_in_a_wider_type(self, subject: BackendUnderTest) -> None:
        """Sums of thousands of ones come out exactly, in the value and in every derivative; others within the bound."""
        shapes = ((1, LONG, 3), (LONG, 2, 2), (1, 3, LONG), (LONG, HEAVY.in_features, HEAVY.out_features))
        for batch, in_, out in shapes[: 2 if subject.profile == "quick" else 4]:
            mask = np.ones((out, in_), bool)
            data = draw(np.ones, (batch,), mask, True, subject.dtype)
            data = data._replace(bias=np.zeros(out), dbias=np.zeros(out))
            found, want = subject.everything(data), expected(data)
            subject.assert_matches_spec(found, want)
            for name, result in found.items():
                equal_bits([result], [want[quantity(name)].exact], name)
            data = Case((batch,), in_, out, 1.0).data(subject.dtype)
            subject.assert_matches_spec(subject.everything(data), expected(data))

    @law(9, needs=["autocast"], dtypes=HALF)
    def test_autocast_computes_in_the_narrow_type(self, subject: BackendUnderTest) -> None:
        """Under automatic casts float32 inputs are rounded first, and nothing leaks, for NaN too; gradients may be wider."""
        full = PROBE.data("float32")
        for name, dirty in {"nothing": full, **poisoned(full)}.items():
            try:
                _cast(subject, PROBE, dirty)
            except AssertionError as error:
                raise AssertionError(f"{error}, {name} being under the mask") from error
        for case in (PROBE, TILED):
            full, mask = case.data("float32"), case.mask()
            for name in ("x", "g"):
                dweight = subject.call("autocast", subject.dtype, *_sent(subject, with_nan(full, name)))[2]
                positive_zero(dweight[~mask], f"dW under the mask, {name} holding NaN,")

    @law(9, needs=["autocast"], dtypes=HALF)
    def test_autocast_takes_any_shape_and_keeps_nothing(self, subject: BackendUnderTest) -> None:
        """Nor do values, weights and masks of an earlier call come back, nor does a later call change a result."""
        shapes = (PROBE, OTHER, SEVERAL, replace(SEVERAL, bias=False), Case((0,), 4, 6, 0.5), TILED, WIDE)
        kept = [_cast(subject, case, case.data("float32")) for case in shapes]
        for case, (first, at_once) in zip(shapes, kept, strict=True):
            equal_bits(map(subject.to_numpy, first), at_once, f"a result of {case}, after later calls")

    @law(10)
    def test_inputs_are_left_alone_and_the_same_call_gives_the_same_bits(self, subject: BackendUnderTest) -> None:
        """No result depends on anything but the inputs, no input is changed, and no later call changes a result."""
        for case in (PROBE, TILED):
            data = case.data(subject.dtype)
            other = data._replace(
                **{name: None if a is None else -a for name, a in data._asdict().items() if name != "mask"}
            )
            with subject.backend.strict_precision():
                sent, others = ([subject.to_backend(array) for array in one] for one in (data, other))
                first = subject.made(sent)
                for problem in (sent, others):
                    subject.made(problem)
                late = {name: subject.to_numpy(array) for name, array in first.items()}
                after = [subject.to_numpy(array) for array in sent]
            equal_bits(after, data, "an input was changed")
            for name, result in subject.everything(data).items():
                equal_bits([late[name]], [result], f"{name}, fetched after later calls,")


def _cast(subject: BackendUnderTest, case: Case, full: Data) -> tuple[list[Any], list[Any]]:
    """Check the results of a case under autocast, ``full`` being its float32 data; return them as they are, and fetched."""
    clean = case.data("float32")
    data = Data(*(a if a is None or a.dtype == bool else round_to(a, subject.dtype) for a in clean))
    want = expected(data)
    with subject.backend.strict_precision():
        sent = _sent(subject, full)
        found = list(subject.backend.autocast(subject.dtype, *sent))
        at_once = [subject.to_numpy(array) for array in found]
        equal_bits(map(subject.to_numpy, sent), (*full[:4], data.g), "an input was written to")
    results = by_name(FIRST, at_once, data.bias)
    subject.assert_matches_spec({"y": results.pop("y")}, want)
    subject.assert_matches_spec(results, want, wide=True)
    positive_zero(results["dW"][~data.mask], "dW under the mask")
    return found, at_once


def _sent(subject: BackendUnderTest, full: Data) -> list[Any]:
    """Return the arguments of autocast, ``g`` in the narrow type."""
    g = round_to(full.g, subject.dtype)
    return [*(subject.to_backend(array, dtype="float32") for array in full[:4]), subject.to_backend(g)]


def _laid_out(
    subject: BackendUnderTest, case: Case, layout: str, laid: Sequence[str], quantities: Sequence[str]
) -> None:
    """Check the results of a case, those of its arrays that ``laid`` names being laid out."""
    data = case.data(subject.dtype)
    if layout == "broadcast":
        data = alike_rows(data)
    with subject.backend.strict_precision():
        sent = [
            subject.to_backend(array, layout if name in laid else "contiguous")
            for name, array in data._asdict().items()
        ]
        made = subject.made(sent, quantities)
        found = {name: subject.to_numpy(array) for name, array in made.items()}
        after = [subject.to_numpy(array) for array in sent]
    which = f"{', '.join(laid)} being {layout}"
    equal_bits(after, data, f"an input was written to, {which}")
    try:
        # rows that are all alike do not cancel
        subject.assert_matches_spec(found, expected(data), hard=layout == "broadcast")
    except AssertionError as error:
        raise AssertionError(f"{error}, {which}") from error


def alike_rows(data: Data) -> Data:
    """Return ``data`` with the first row of each array as all its rows."""

    def alike(array: Any) -> Any:
        return None if array is None else np.broadcast_to(array[:1], array.shape)

    return Data(*(alike(array) for array in data))
