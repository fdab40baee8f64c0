"""Laws 6, 8, 9 and 10: batches, memory layouts, dtypes, and inputs that stay as they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from maskedlinear_conformance.bounds import QUANTITIES, expected
from maskedlinear_conformance.cases import PROBE, Case, Data, draw, poisoned
from maskedlinear_conformance.laws import law
from maskedlinear_conformance.laws.derivatives import FULL, problems
from maskedlinear_conformance.subject import Subject, equal_bits, positive_zero

__all__ = ["Arrays"]

HALF = ("bfloat16", "float16")
LONG = 6144  # ones added up in bfloat16 stop at 256, in float16 at 2048; both hold this number
SEVERAL = Case((2, 3), 17, 13, 0.5)
TILED = Case((33,), 257, 129, 0.1)  # large enough for code that works in tiles, and no multiple of any


class Arrays:
    """Laws 6, 8, 9 and 10."""

    @law(6, enough=FULL)
    def test_any_batch_equals_the_flattened_one(self, subject: Subject) -> None:
        """Batch dimensions are only a shape: exactly, on integers."""

        drawn, solid = problems(subject)

        @subject.holds_for(drawn, **solid)
        def flat(data: Data) -> None:
            rows = math.prod(data.x.shape[:-1])
            flattened = {n: getattr(data, n).reshape(rows, getattr(data, n).shape[-1]) for n in ("x", "g")}
            got, want = subject.plain(data), subject.plain(data._replace(**flattened))
            for name, result in got.items():
                equal_bits([result + 0.0], [want[name].reshape(result.shape) + 0.0], name)

    @law(6, enough=FULL)
    def test_a_batch_equals_its_rows_one_by_one(self, subject: Subject) -> None:
        """Rows do not see each other, and their gradients add up: exactly, on integers."""
        data = PROBE.data(subject.dtype, "integers")
        whole = subject.plain(data)
        rows = [subject.plain(data._replace(x=data.x[i], g=data.g[i])) for i in range(len(data.x))]
        for name in ("y", "dx"):
            equal_bits([whole[name] + 0.0], [np.stack([row[name] for row in rows]) + 0.0], name)
        for name in ("dW", "db"):
            equal_bits([whole[name] + 0.0], [sum((row[name] for row in rows), 0.0 * whole[name])], name)

    @law(8)
    def test_layouts_give_the_same_and_are_not_written_to(self, subject: Subject, layout: str) -> None:
        """However its inputs lie in memory, the layer gives the same, and leaves them as they are."""
        for chosen in (*Data._fields[:5], "all"):
            _laid_out(subject, PROBE, layout, Data._fields if chosen == "all" else (chosen,), ("y", "dx", "dW", "db"))
        for case in (SEVERAL, TILED):
            _laid_out(subject, case, layout, Data._fields, ("y", "dx", "dW", "db"))

    @law(8)
    def test_layouts_in_forward_mode_and_second_order(self, subject: Subject, layout: str) -> None:
        """However inputs and directions lie in memory, every derivative is the same."""
        for case in (PROBE, SEVERAL, TILED):
            _laid_out(subject, case, layout, Data._fields, QUANTITIES)

    @law(9, dtypes=HALF)
    def test_half_types_accumulate_in_a_wider_type(self, subject: Subject) -> None:
        """Sums of thousands of ones come out exactly, in the value and in every gradient."""
        for batch, in_, out in ((1, LONG, 2), (LONG, 2, 2), (1, 2, LONG)):
            mask = np.ones((out, in_), bool)
            data = draw(np.ones, (batch,), mask, True, subject.dtype)
            data = data._replace(bias=np.zeros(out), dbias=np.zeros(out))
            found, want = subject.plain(data), expected(data)
            subject.near(found, want)
            for name in ("y", "dx", "dW", "db"):
                equal_bits([found[name]], [want[name].exact], name)

    @law(9, needs=["autocast"], dtypes=HALF)
    def test_autocast_computes_in_the_narrow_type(self, subject: Subject) -> None:
        """Under automatic casts float32 inputs are rounded first, and nothing leaks; gradients may be wider."""
        data, full = PROBE.data(subject.dtype), PROBE.data("float32")
        for name, dirty in {"nothing": full, **poisoned(full)}.items():
            with subject.backend.strict():
                arrays = [subject.send(a, dtype="float32") for a in (dirty.x, dirty.weight, dirty.mask, dirty.bias)]
                y, *gradients = subject.backend.autocast(subject.dtype, *arrays, subject.send(data.g))
                found = [subject.fetch(array) for array in (y, *gradients)]
                after = [subject.fetch(array) for array in arrays]
            equal_bits(after, dirty[:4], "an input was written to")
            try:
                subject.near({"y": found[0]}, expected(data))
                subject.near(dict(zip(("dx", "dW", "db"), found[1:], strict=True)), expected(data), wide=True)
            except AssertionError as error:
                raise AssertionError(f"{error}, {name} being under the mask") from error
            positive_zero(found[2][~data.mask], "dW under the mask")

    @law(10)
    def test_inputs_are_left_alone_and_the_same_call_gives_the_same_bits(self, subject: Subject) -> None:
        """No result depends on anything but the inputs, no input is changed, and no later call changes a result."""
        for case in (PROBE, TILED):
            data = case.data(subject.dtype)
            other = data._replace(
                **{name: None if a is None else -a for name, a in data._asdict().items() if name != "mask"}
            )
            with subject.backend.strict():
                sent, others = ([subject.send(array) for array in one] for one in (data, other))
                first = subject.made(sent)
                for problem in (sent, others):
                    subject.made(problem)
                late = {name: subject.fetch(array) for name, array in first.items()}
                after = [subject.fetch(array) for array in sent]
            equal_bits(after, data, "an input was changed")
            for name, result in subject.everything(data).items():
                equal_bits([late[name]], [result], f"{name}, fetched after later calls,")


def _laid_out(subject: Subject, case: Case, layout: str, laid: Sequence[str], quantities: Sequence[str]) -> None:
    """Check the results of a case, those of its arrays that ``laid`` names being laid out."""
    data = case.data(subject.dtype)
    if layout == "broadcast":
        data = _alike_rows(data)
    with subject.backend.strict():
        sent = [subject.send(array, layout if name in laid else "contiguous") for name, array in data._asdict().items()]
        made = subject.made(sent, quantities)
        found = {name: subject.fetch(array) for name, array in made.items()}
        after = [subject.fetch(array) for array in sent]
    which = f"{', '.join(laid)} being {layout}"
    equal_bits(after, data, f"an input was written to, {which}")
    try:
        subject.near(found, expected(data), hard=layout == "broadcast")  # rows that are all alike do not cancel
    except AssertionError as error:
        raise AssertionError(f"{error}, {which}") from error


def _alike_rows(data: Data) -> Data:
    def alike(array: Any) -> Any:
        return None if array is None else np.broadcast_to(array[:1], array.shape)

    return Data(*(alike(array) for array in data))
