"""Laws 1, 4 and 7 of forward over forward, and of forward mode and second order under vmap and compiled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from maskedlinear_conformance.backend_under_test import FIRST, BackendUnderTest, Results, equal_bits, positive_zero
from maskedlinear_conformance.bounds import expected
from maskedlinear_conformance.cases import OTHER, PROBE, Case, Data, others, poisoned, small
from maskedlinear_conformance.laws import law
from maskedlinear_conformance.laws.derivatives import FULL

__all__ = ["COMPILED", "DERIVATIVES", "Compositions"]

DERIVATIVES = {
    "jvp": (("x", "weight", "mask", "bias", "dx", "dweight", "dbias"), ("y", "ẏ")),
    **dict.fromkeys(("reverse over reverse", "forward over reverse"), (Data._fields, ("Hx", "HW", "Hb", "Hg"))),
}
"""The derivatives that transforms are asked of, each a capability, with its arguments and its results."""

COMPILED = {"vjp": (Data._fields[:5], FIRST), **DERIVATIVES}
"""Those that are compiled."""


class Compositions:
    """Derivatives of derivatives, and transforms of derivatives."""

    @law(1, needs=["forward over forward"], cases=lambda case: small(case) and len(case.batch) != 1)
    def test_forward_over_forward_equals_the_spec(self, subject: BackendUnderTest, case: Case) -> None:
        """The derivative along two directions lies within the bound of the spec's, and nothing under the mask leaks."""
        clean = case.data(subject.dtype)
        # Along (dx, dW, db) and (x, 2 W, b) it is dx · 2 Wᵀ + x · dWᵀ: ẏ of a problem with twice the weight and no bias.
        twice = clean._replace(weight=2 * clean.weight, bias=None, dbias=None)
        want = expected(twice)["ẏ"]
        parts = (expected(twice._replace(**{name: 0 * getattr(twice, name)}))["ẏ"].exact for name in ("dx", "dweight"))
        want = replace(want, rounded=want.rounded + 2 * sum(map(abs, parts)))  # each of which a half type may round
        for name, data in {"nothing": clean, **poisoned(clean)}.items():
            tangent1, tangent2 = (data.dx, data.dweight, data.dbias), (data.x, 2 * data.weight, data.bias)
            with subject.backend.strict_precision():
                sent = [[subject.to_backend(array) for array in arrays] for arrays in (data[:4], tangent1, tangent2)]
                found = subject.to_numpy(subject.backend.jvp_of_jvp(*sent[0], *sent[1:]))
            try:
                subject.assert_matches_spec({"ẏ by jvp": found}, {"ẏ": want})
            except AssertionError as error:
                raise AssertionError(f"{error}, {name} being under the mask") from error

    @law(7, needs=["vmap of derivatives"], enough=FULL, dear=True)
    def test_vmap_of_a_derivative_equals_a_loop(self, subject: BackendUnderTest, derivative: str) -> None:
        """Mapping it over all arguments but the mask, or over the directions alone, equals the problems one by one."""
        names = DERIVATIVES[derivative][0]
        copies = [Case((4,), 7, 5, density).data(subject.dtype) for density in (0.5, 0.3, 0.6)]
        ways = ([name for name in names if name != "mask"], [name for name in names if name.startswith("d")])
        for mapped in ways[:1] if subject.profile == "quick" else ways:
            axes = [0 if name in mapped else None for name in names]
            singles = [_dirty(copies[0]._replace(**{name: getattr(copy, name) for name in mapped})) for copy in copies]
            arrays = [
                np.stack([getattr(one, name) for one in singles]) if name in mapped else getattr(singles[0], name)
                for name in names
            ]
            together = _made(subject, "vmap_derivative", derivative, arrays, axes)
            for single, found in zip(singles, _each(together, len(singles)), strict=True):
                _assert_matches_spec(subject, derivative, single, found)

    @law(7, needs=["compile of derivatives"], enough=FULL, dear=True)
    def test_a_compiled_derivative_equals_the_spec(self, subject: BackendUnderTest, compiled: str) -> None:
        """With one mask, another, other values, and the first again; nothing leaks."""
        data, other = PROBE.data(subject.dtype), OTHER.data(subject.dtype)
        for problem in (data, other._replace(mask=data.mask), data._replace(mask=others(data.mask)[1]), data):
            problem = _dirty(problem)
            arrays = [getattr(problem, name) for name in COMPILED[compiled][0]]
            found = _made(subject, "compile_derivative", compiled, arrays)
            _assert_matches_spec(subject, compiled, problem, dict(zip(COMPILED[compiled][1], found, strict=True)))

    @law(7, needs=["compile of the hessian"], enough=["float32"], since="default")
    def test_a_compiled_hessian_equals_the_spec(self, subject: BackendUnderTest) -> None:
        """Of ⟨g, y⟩: 0 but for x and weight together, where it is g at the live connections, exactly; nothing leaks."""
        data = _dirty(PROBE.data(subject.dtype))
        found = _made(subject, "compile_derivative", "hessian", data[:5])
        batch, (out, in_) = data.x.shape[:-1], data.mask.shape
        # by x[b, i] and weight[o, j] it is g[b, o] where i is j and the connection is live
        mixed = np.einsum("...o,oj,ij->...ioj", data.g, data.mask, np.eye(in_))
        swapped = np.moveaxis(mixed, (-2, -1), (0, 1))
        want = (np.zeros((*batch, in_) * 2), mixed, swapped, np.zeros((out, in_) * 2))
        equal_bits([array + 0.0 for array in found], want, "the Hessian")


def _dirty(data: Data) -> Data:
    """Put NaN under the mask of the weight and of its tangent."""
    return data._replace(**{name: np.where(data.mask, getattr(data, name), np.nan) for name in ("weight", "dweight")})


def _made(subject: BackendUnderTest, method: str, derivative: str, arrays: Sequence[Any], *more: Any) -> list[Any]:
    with subject.backend.strict_precision():
        sent = [subject.to_backend(array) for array in arrays]
        found = [subject.to_numpy(array) for array in getattr(subject.backend, method)(derivative, *more, *sent)]
        equal_bits(map(subject.to_numpy, sent), arrays, "an input was changed")
    return found


def _each(together: Sequence[Any], count: int) -> Iterator[Results]:
    names = ("y", "ẏ") if len(together) == 2 else ("Hx", "HW", "Hb", "Hg")
    for index in range(count):
        yield {name: array[index] for name, array in zip(names, together, strict=True)}


def _assert_matches_spec(subject: BackendUnderTest, derivative: str, data: Data, found: Results) -> None:
    subject.assert_matches_spec({f"{name} by {derivative}": array for name, array in found.items()}, expected(data))
    if "HW" in found:
        positive_zero(found["HW"][~data.mask], "HW under the mask")
    if "dW" in found:
        positive_zero(found["dW"][~data.mask], "dW under the mask")
