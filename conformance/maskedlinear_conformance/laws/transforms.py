"""Law 7: function transforms give what the plain call gives, for every argument, any shape and a mask that changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from maskedlinear_conformance.backend_under_test import (
    FIRST,
    BackendUnderTest,
    Results,
    by_name,
    equal_bits,
    positive_zero,
)
from maskedlinear_conformance.bounds import Expected, expected
from maskedlinear_conformance.cases import (
    HEAVY,
    OTHER,
    PROBE,
    SEVERAL,
    TILED,
    WIDE,
    Case,
    Data,
    odd,
    others,
    poisoned,
    with_nan,
)
from maskedlinear_conformance.laws import law
from maskedlinear_conformance.laws.derivatives import FULL

__all__ = ["Transforms"]

Axes = tuple[int | None, ...]

AXES: tuple[Axes, ...] = (
    (0, None, None, None, None),
    (None, 0, None, None, None),
    (None, None, 0, None, None),
    (None, None, None, 0, None),
    (None, None, None, None, 0),
    (0, 0, 0, 0, 0),
    (1, 2, 1, 1, 0),
    (None, None, -1, None, 1),
)
FEW = (AXES[1], AXES[2], AXES[5], AXES[6])


class Transforms:
    """Law 7."""

    @law(7, needs=["vmap"], dear=True)
    def test_vmap_over_each_argument_equals_a_loop(self, subject: BackendUnderTest) -> None:
        """Mapping over any of x, weight, mask, bias and g equals the problems one by one, and nothing leaks."""
        for axes in FEW if subject.profile == "quick" else AXES:
            if axes[2] is not None and not subject.has("vmap over the mask"):
                axes = (*axes[:2], None, *axes[3:])
            if axes == (None,) * 5:
                continue
            _mapped(subject, axes, [Case((4,), 7, 5, density).data(subject.dtype) for density in (0.5, 0.3, 0.6)])

    @law(7, needs=["vmap"], enough=FULL, dear=True, since="default")
    def test_vmap_takes_any_batch(self, subject: BackendUnderTest) -> None:
        """The problems that are mapped over may have no batch dimension, several, or an empty one, no bias, or be large."""
        over = 0 if subject.has("vmap over the mask") else None
        plain, empty, no_inputs = Case((), 5, 3, 0.5), Case((0,), 4, 6, 0.5), Case((5,), 0, 4, 0.5)
        for case in (plain, SEVERAL, empty, no_inputs, TILED, replace(PROBE, bias=False)):
            copies = [replace(case, density=density).data(subject.dtype) for density in (0.5, 0.3)]
            _mapped(subject, (0, 0, over, 0, 0), copies)

    @law(7, dear=True)
    def test_transforms_equal_the_plain_call(self, subject: BackendUnderTest, transform: str) -> None:
        """With one mask, others, full and empty ones, other values, without bias, in another shape, the first again."""
        data, other = PROBE.data(subject.dtype), OTHER.data(subject.dtype)
        problems = (
            data,
            *(data._replace(mask=mask) for mask in (*others(data.mask), data.mask | True, data.mask & False)),
            *(data._replace(**{name: getattr(other, name)}) for name in ("x", "weight", "bias", "g")),
            data._replace(bias=None, dbias=None),
            *(() if subject.profile == "quick" else (SEVERAL.data(subject.dtype),)),
            HEAVY.data(subject.dtype),
            data,
        )
        for problem in problems:
            want = _wanted(problem, transform)
            subject.assert_agree(_through(subject, transform, problem, want), subject.plain(problem), want)

    @law(
        7,
        enough=FULL,
        dear=True,
        since="default",
        cases=lambda case: (odd(case) and case.bias) or case in (TILED, WIDE),
    )
    def test_transforms_take_any_shape(self, subject: BackendUnderTest, case: Case, transform: str) -> None:
        """No batch dimension or several, an empty batch, no inputs, no outputs, or many, of which nothing leaks."""
        if transform == "scan" and not case.batch:
            case = replace(case, batch=(1,))  # a scan goes through a batch, step by step
        data = case.data(subject.dtype)
        want = _wanted(data, transform)
        for dirty in (data,) if odd(case) else poisoned(data).values():
            positive_zero(_through(subject, transform, dirty, want)["dW"][~case.mask()], "dW under the mask")
        for name in () if odd(case) else ("x", "g"):
            found = subject.both(with_nan(data, name), "transformed", transform)
            positive_zero(found["dW"][~case.mask()], f"dW under the mask, {name} holding NaN,")

    @law(8, needs=["transposed"], enough=FULL, dear=True, since="default")
    def test_layouts_through_transforms(self, subject: BackendUnderTest, transform: str) -> None:
        """What was compiled for contiguous arrays takes others as they lie."""
        data = PROBE.data(subject.dtype)
        want = _wanted(data, transform)
        _through(subject, transform, data, want)
        with subject.backend.strict_precision():
            sent = [subject.to_backend(array, "transposed") for array in data[:5]]
            found = [subject.to_numpy(array) for array in subject.backend.transformed(transform, *sent)]
            equal_bits([subject.to_numpy(array) for array in sent], data[:5], "an input was changed")
        subject.assert_matches_spec(by_name(FIRST, found, data.bias), want)

    @law(7, dear=True)
    def test_nothing_leaks_through_a_transform(self, subject: BackendUnderTest, transform: str) -> None:
        """NaN and infinities under the mask change nothing, and the gradient there is +0, for NaN in x or g too."""
        data = PROBE.data(subject.dtype)
        want = _wanted(data, transform)
        for name, dirty in poisoned(data).items():
            try:
                found = _through(subject, transform, dirty, want)
            except AssertionError as error:
                raise AssertionError(f"{error}, {name} being under the mask") from error
            positive_zero(found["dW"][~data.mask], "dW under the mask")
        for name in ("x", "g"):
            found = subject.both(with_nan(data, name), "transformed", transform)
            positive_zero(found["dW"][~data.mask], f"dW under the mask, {name} holding NaN,")

    @law(10, dear=True)
    def test_a_transform_leaves_its_inputs_alone(self, subject: BackendUnderTest, transform: str) -> None:
        """Nor does it write to them, nor does a later call change what it gave; the same call gives the same bits."""
        data = PROBE.data(subject.dtype)
        other = data._replace(x=-data.x, weight=-data.weight, g=data.g + data.g)
        with subject.backend.strict_precision():
            sent, others = ([subject.to_backend(array) for array in problem[:5]] for problem in (data, other))
            first = subject.backend.transformed(transform, *sent)
            at_once = [subject.to_numpy(array) for array in first]
            subject.backend.transformed(transform, *others)
            equal_bits([subject.to_numpy(array) for array in first], at_once, "a result, after a later call")
            again = subject.backend.transformed(transform, *sent)
            equal_bits([subject.to_numpy(array) for array in again], at_once, "the same call again")
            equal_bits([subject.to_numpy(array) for array in sent], data[:5], "an input was changed")


def _mapped(subject: BackendUnderTest, axes: Axes, copies: Sequence[Data]) -> None:
    """Check vmap over ``copies``, which have the first one's values of what is not mapped, and that nothing leaks."""
    if copies[0].bias is None:
        axes = (*axes[:3], None, axes[4])
    mapped = [name for name, axis in zip(Data._fields, axes, strict=False) if axis is not None]
    singles = [copies[0]._replace(**{name: getattr(copy, name) for name in mapped}) for copy in copies]
    live = np.any([single.mask for single in singles], axis=0)
    stacked: list[Any] = []
    for name, axis in zip(Data._fields[:5], axes, strict=True):
        arrays = [getattr(single, name) for single in singles]
        if name == "weight":  # one that is shared is dead only where no mask has it live
            poison = np.resize([np.nan, np.inf, -np.inf], live.shape)
            dead = [~live if axis is None else ~single.mask for single in singles]
            arrays = [np.where(under, poison, array) for under, array in zip(dead, arrays, strict=True)]
        stacked.append(arrays[0] if axis is None else np.stack(arrays, axis))
    # The same problems backwards, as they may lie in memory, must find nothing of the first call.
    backwards = [
        array if axis is None else np.flip(array, axis).copy() for array, axis in zip(stacked, axes, strict=True)
    ]
    with subject.backend.strict_precision():
        sent = [subject.to_backend(array) for array in stacked]
        layout = "transposed" if subject.has("transposed") else "contiguous"
        later = [subject.to_backend(array, layout) for array in backwards]
        first, second = (subject.backend.vmap(axes, *arrays) for arrays in (sent, later))
        together, reverse = ([subject.to_numpy(array) for array in found] for found in (first, second))
        equal_bits(map(subject.to_numpy, sent), stacked, "an input was changed")
        equal_bits(map(subject.to_numpy, later), backwards, "an input was changed")
        for place, name in ((0, "x"), (4, "g")):
            nan = subject.to_backend(np.full_like(stacked[place], np.nan))
            found = subject.backend.vmap(axes, *sent[:place], nan, *sent[place + 1 :])
            for single, spoilt in zip(singles, _each(map(subject.to_numpy, found), singles[0]), strict=True):
                positive_zero(
                    spoilt["dW"][~single.mask], f"vmap over axes {axes}: dW under the mask, {name} being NaN,"
                )
    for single, *both in zip(
        singles, _each(together, singles[0]), reversed(list(_each(reverse, singles[0]))), strict=True
    ):
        try:
            for found in both:
                subject.assert_matches_spec(found, expected(single))
                positive_zero(found["dW"][~single.mask], "dW under the mask")
        except AssertionError as error:
            raise AssertionError(f"vmap over axes {axes} of batches {single.x.shape[:-1]}: {error}") from error


def _each(together: Iterable[Any], data: Data) -> Iterator[Results]:
    named = by_name(FIRST, list(together), data.bias)
    for parts in zip(*named.values(), strict=True):
        yield dict(zip(named, parts, strict=True))


def _wanted(data: Data, transform: str) -> Mapping[str, Expected]:
    """Return what ``data`` should give; a scan rounds weight and bias gradients, and their sum so far, at each step."""
    want = expected(data)
    if transform != "scan":
        return want
    found, steps = {name: want[name] for name in FIRST if name in want}, len(data.x)
    for name in {"dW", "db"} & set(found):
        found[name] = replace(found[name], rounded=found[name].rounded + 2 * steps * found[name].absolute)
    return found


def _through(subject: BackendUnderTest, transform: str, data: Data, want: Mapping[str, Expected]) -> Results:
    found = subject.both(data, "transformed", transform)
    subject.assert_matches_spec(found, want)
    return found
