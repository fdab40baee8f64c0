"""Laws 6, 8, 9 and 10: batches, memory layouts, dtypes, and inputs that stay as they are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from maskedlinear_conformance.bounds import Expected, expected
from maskedlinear_conformance.cases import PROBE, Case, Data, draw
from maskedlinear_conformance.laws import law
from maskedlinear_conformance.laws.derivatives import EXACT, PROBLEMS
from maskedlinear_conformance.subject import Subject, equal_bits

__all__ = ["Arrays"]

HALF = ("bfloat16", "float16")
LONG = 6144  # ones added up in bfloat16 stop at 256, in float16 at 2048; both hold this number


class Arrays:
    """Laws 6, 8, 9 and 10."""

    @law(6, dtypes=EXACT)
    def test_any_batch_equals_the_flattened_one(self, subject: Subject) -> None:
        """Batch dimensions are only a shape: exactly, on integers."""

        @subject.holds_for(PROBLEMS)
        def flat(data: Data) -> None:
            rows = math.prod(data.x.shape[:-1])
            flattened = {n: getattr(data, n).reshape(rows, getattr(data, n).shape[-1]) for n in ("x", "g")}
            got, want = subject.plain(data), subject.plain(data._replace(**flattened))
            for name, result in got.items():
                equal_bits([result + 0.0], [want[name].reshape(result.shape) + 0.0], name)

    @law(6, dtypes=EXACT)
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
        """However its inputs lie in memory, the layer gives the same: exactly, on integers."""
        plain = PROBE.data(subject.dtype, "integers")
        for chosen in (*plain._fields[:5], "all"):
            data = _alike_rows(plain) if layout == "broadcast" else plain
            names = data._fields[:5] if chosen == "all" else (chosen,)
            with subject.backend.strict():
                x, weight, mask, bias, g = (
                    subject.send(array, layout if name in names else "contiguous")
                    for name, array in zip(data._fields[:5], data[:5], strict=True)
                )
                y = subject.backend.masked_linear(x, weight, mask, bias)
                gradients = subject.backend.vjp(x, weight, mask, bias, g, wrt=("x", "weight", "bias"))
                found = [subject.fetch(array) for array in (y, *gradients)]
                after = [subject.fetch(array) for array in (x, weight, mask, bias, g)]
            equal_bits(after, data[:5], f"an input was written to, {chosen} being {layout}")
            want = _exact(expected(data), subject.dtype)
            equal_bits([a + 0.0 for a in found], want, f"y, dx, dW or db, {chosen} being {layout}")

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
        """Under automatic casts float32 inputs are rounded first; gradients come back in float32."""
        data, want = PROBE.data(subject.dtype), expected(PROBE.data(subject.dtype))
        full = PROBE.data("float32")
        with subject.backend.strict():
            arrays = [subject.send(a, dtype="float32") for a in (full.x, full.weight, full.mask, full.bias)]
            y, *gradients = subject.backend.autocast(subject.dtype, *arrays, subject.send(data.g))
            found = [subject.fetch(array) for array in (y, *gradients)]
        subject.near(dict(zip(("y", "dx", "dW", "db"), found, strict=True)), want)

    @law(10)
    def test_inputs_are_left_alone_and_the_same_call_gives_the_same_bits(self, subject: Subject) -> None:
        """No result depends on anything but the inputs, and no input is changed."""
        for case in (PROBE, Case((33,), 257, 129, 0.1)):
            data = case.data(subject.dtype)
            with subject.backend.strict():
                sent = [subject.send(array) for array in data]
                for _ in range(2):
                    subject.backend.masked_linear(*sent[:4])
                    subject.backend.vjp(*sent[:5], wrt=("x", "weight", "bias"))
                    if subject.has("jvp"):
                        subject.backend.jvp(*sent[:4], *sent[5:8])
                    for mode in ("reverse over reverse", "forward over reverse"):
                        if subject.has(mode):
                            subject.backend.hvp(*sent, mode=mode)
                after = [subject.fetch(array) for array in sent]
            equal_bits(after, data, "an input was changed")
            one, other = subject.everything(data), subject.everything(data)
            for name, result in one.items():
                equal_bits([result], [other[name]], name)


def _alike_rows(data: Data) -> Data:
    def alike(array: Any) -> Any:
        return None if array is None else np.broadcast_to(array[:1], array.shape)

    return Data(*(alike(array) for array in data))


def _exact(want: dict[str, Expected], dtype: str) -> list[Any]:
    """The integers themselves, which every dtype holds at these sizes."""
    results = [want[name].exact + 0.0 for name in ("y", "dx", "dW", "db")]
    assert all(abs(result).max() <= 256 for result in results), "too large for bfloat16 to be exact"
    return results
