"""Law 7: function transforms give what the plain call gives, for every argument and for a mask that changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from maskedlinear_conformance.bounds import Expected, expected
from maskedlinear_conformance.cases import PROBE, Case, Data
from maskedlinear_conformance.laws import law
from maskedlinear_conformance.subject import Results, Subject

__all__ = ["Transforms"]

AXES: tuple[tuple[int | None, ...], ...] = (
    (0, None, None, None, None),
    (None, 0, None, None, None),
    (None, None, 0, None, None),
    (None, None, None, 0, None),
    (None, None, None, None, 0),
    (0, 0, 0, 0, 0),
    (1, 2, 1, 1, 0),
    (None, None, -1, None, 1),
)


class Transforms:
    """Law 7."""

    @law(7, needs=["vmap"], dear=True)
    def test_vmap_over_each_argument_equals_a_loop(self, subject: Subject) -> None:
        """Mapping over any of x, weight, mask, bias and g equals the problems one by one."""
        copies = [Case((4,), 7, 5, density).data(subject.dtype) for density in (0.5, 0.3, 0.9)]
        wants = [expected(copy) for copy in copies]
        for axes in AXES:
            mapped = [name for name, axis in zip(Data._fields, axes, strict=False) if axis is not None]
            singles = [copies[0]._replace(**{name: getattr(copy, name) for name in mapped}) for copy in copies]
            stacked = [
                a if axis is None else np.stack([one[i] for one in singles], axis)
                for i, (a, axis) in enumerate(zip(copies[0][:5], axes, strict=True))
            ]
            together = subject.call("vmap", axes, *stacked)
            for i, single in enumerate(singles):
                found = {name: a[i] for name, a in zip(("y", "dx", "dW", "db"), together, strict=True)}
                want = wants[i] if axes == (0, 0, 0, 0, 0) else expected(single)
                try:
                    subject.near(found, want)
                except AssertionError as error:
                    raise AssertionError(f"vmap over axes {axes}: {error}") from error

    @law(7, dear=True)
    def test_transforms_equal_the_plain_call(self, subject: Subject, transform: str) -> None:
        """With one mask, another, other weights, without bias, in another shape, and with the first mask again."""
        data = PROBE.data(subject.dtype)
        other = Case((4,), 7, 5, 0.3).data(subject.dtype)
        problems = (
            data,
            data._replace(mask=other.mask),
            data._replace(weight=other.weight),
            data._replace(bias=None, dbias=None),
            Case((2, 3), 17, 13, 0.5).data(subject.dtype),
            data,
        )
        for problem in problems:
            want = _wanted(problem, transform)
            subject.alike(_through(subject, transform, problem, want), subject.plain(problem), want)

    @law(7, dear=True)
    def test_nothing_leaks_through_a_transform(self, subject: Subject, transform: str) -> None:
        """NaN under the mask changes nothing, and the gradient there is +0."""
        data = PROBE.data(subject.dtype)
        dirty = data._replace(weight=np.where(data.mask, data.weight, np.nan))
        want = _wanted(data, transform)
        found = _through(subject, transform, dirty, want)
        subject.alike(found, _through(subject, transform, data, want), want)
        assert not found["dW"][~data.mask].any(), "dW under the mask must be 0"


def _wanted(data: Data, transform: str) -> dict[str, Expected]:
    """Return what ``data`` should give; a scan rounds weight and bias gradients, and their sum so far, at each step."""
    want = expected(data)
    if transform == "scan":
        for name in ("dW", "db"):
            if name in want:
                steps = len(data.x)
                want[name] = replace(want[name], rounded=want[name].rounded + 2 * steps * want[name].absolute)
    return want


def _through(subject: Subject, transform: str, data: Data, want: dict[str, Expected]) -> Results:
    found = subject.both(data, "transformed", transform)
    subject.near(found, want)
    return found
