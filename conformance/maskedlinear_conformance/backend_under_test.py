"""``BackendUnderTest``: one backend in one format and dtype on one device; and the checks that the laws are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from maskedlinear.backends import lacking
from maskedlinear_conformance.bounds import FIRST, QUANTITIES, SECOND, Expected, expected
from maskedlinear_conformance.cases import Case, Data, round_to
from maskedlinear_conformance.record import Record
from maskedlinear_conformance.team import SharedLayer, Team

__all__ = [
    "FIRST",
    "INPUTS",
    "MODES",
    "BackendUnderTest",
    "Results",
    "by_name",
    "equal_bits",
    "expectations",
    "positive_zero",
    "quantity",
    "representable",
]

INPUTS = ("x", "weight", "bias")

MODES = ("reverse over reverse", "forward over reverse")
"""The ways to a second derivative, each a capability."""

Float = NDArray[np.float64]
Results = dict[str, Float]
"""Results by name: a quantity, or a quantity and the way it was come by, ``"y by jvp"``."""

_NAMES = dict(zip(INPUTS, FIRST[1:], strict=True))
_FORWARD = ("y by jvp", "ẏ")
_EXAMPLES = {"quick": 2, "default": 4, "full": 100}


@dataclass(frozen=True, eq=False)
class BackendUnderTest:
    """A backend in one dtype on one device, spoken to in NumPy arrays.

    Attributes:
        backend: see :class:`maskedlinear.backends.Backend`.
        label: the backend's name and format.
        dtype: the floating dtype, by name.
        device: ``"cpu"`` or ``"cuda"``.
        profile: one of ``quick``, ``default`` and ``full``.
        record: where the fractions of the bounds are noted.
        seeded: whether Hypothesis draws anew, from ``--hypothesis-seed``, and not the same at every run.
        team: who shares layers, for the laws that distribution can break.
    """

    backend: Any
    label: str
    dtype: str
    device: str = "cpu"
    profile: str = "default"
    record: Record = field(default_factory=Record)
    seeded: bool = False
    team: Team | None = None

    def __str__(self) -> str:
        """Name the subject, for pytest."""
        return f"{self.label} {self.dtype}"

    def has(self, capability: str) -> bool:
        """Whether the backend does not declare that it lacks ``capability``."""
        return capability not in lacking(self.backend, self.device)

    def to_backend(self, values: Any, layout: str = "contiguous", dtype: str | None = None) -> Any:
        """Return ``values`` as the framework's array; ``None`` stays."""
        if values is None:
            return None
        return self.backend.asarray(np.asarray(values), dtype or self.dtype, self.device, layout)

    def to_numpy(self, array: Any) -> Any:
        """Return an array of the framework as NumPy's; ``None`` stays."""
        return None if array is None else self.backend.asnumpy(array)

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method with the framework's arrays made of NumPy's, and return NumPy's."""
        with self.backend.strict_precision():
            sent = [self.to_backend(a) if isinstance(a, np.ndarray) else a for a in arguments]
            found = getattr(self.backend, method)(*sent, **options)
            return [self.to_numpy(a) for a in found] if isinstance(found, tuple | list) else self.to_numpy(found)

    def shared(self, placement: str, data: Data, team: Team | None = None) -> AbstractContextManager[SharedLayer]:
        """Return a layer with the values of ``data`` that a team shares, this subject's if none is given."""
        team = team or self.team
        assert team is not None, "no team was asked for"
        made = (type(self.backend), self.backend.format)
        return team.shared(made, self.dtype, self.device, placement, data.weight, data.mask, data.bias)

    def value(self, data: Data) -> Float:
        """Return y."""
        y: Float = self.call("masked_linear", *data[:4])
        return y

    def gradients(self, data: Data, wrt: Sequence[str] = INPUTS) -> Results:
        """Return dx, dW and db: those of ``wrt`` that exist, by name."""
        asked = [name for name in wrt if getattr(data, name) is not None]
        return by_name([_NAMES[name] for name in asked], self.call("vjp", *data[:5], wrt=asked), data.bias)

    def tangent(self, data: Data) -> Results:
        """Return y and ẏ."""
        return by_name(_FORWARD, self.call("jvp", *data[:4], *data[5:8]), data.bias)

    def curvature(self, data: Data, mode: str) -> Results:
        """Return Hx, HW, Hb and Hg by one of ``MODES``."""
        return by_name(_second(mode), self.call("hvp", *data, mode=mode), data.bias)

    def both(self, data: Data, method: str, *first: Any) -> Results:
        """Return y, dx, dW and db of one of the methods that give all of them."""
        return by_name(FIRST, self.call(method, *first, *data[:5]), data.bias)

    def plain(self, data: Data) -> Results:
        """Return y, dx, dW and db."""
        return {"y": self.value(data), **self.gradients(data)}

    def everything(self, data: Data) -> Results:
        """Return every quantity that the backend has."""
        with self.backend.strict_precision():
            made = self.made([self.to_backend(array) for array in data])
            return {name: self.to_numpy(array) for name, array in made.items()}

    def made(self, sent: Sequence[Any], quantities: Sequence[str] = QUANTITIES) -> dict[str, Any]:
        """Return every quantity as the framework's array, from the framework's arrays of a problem.

        Of forward mode and second order only what ``quantities`` asks for.
        """
        arguments, (g, *directions) = sent[:4], sent[4:]
        wrt = INPUTS if arguments[3] is not None else INPUTS[:2]
        gradients = self.backend.vjp(*arguments, g, wrt=wrt)
        ways: dict[tuple[str, ...], Any] = {FIRST[: 1 + len(wrt)]: (self.backend.masked_linear(*arguments), *gradients)}
        if self.has("jvp") and "ẏ" in quantities:
            ways[_FORWARD] = self.backend.jvp(*arguments, *directions[:3])
        for mode in self.modes() if "Hx" in quantities else ():
            ways[_second(mode)] = self.backend.hvp(*sent, mode=mode)
        return {n: array for names, found in ways.items() for n, array in by_name(names, found, arguments[3]).items()}

    def modes(self) -> list[str]:
        """Return those of ``MODES`` that the backend has."""
        return [mode for mode in MODES if self.has(mode)]

    def on(self, case: Case, kind: str = "signed") -> Results:
        """Return ``everything`` of a case, computed once a run."""
        key = (self.label, self.dtype, case, kind)
        found: Results = self.record.remembered(key, lambda: self.everything(case.data(self.dtype, kind)))
        return found

    def assert_matches_spec(
        self, got: Results, want: Mapping[str, Expected], *, hard: bool = False, wide: bool = False
    ) -> None:
        """Check that each result has its shape and dtype, or a wider one, and lies within its bound of the spec's."""
        for name, result in got.items():
            assert quantity(name) in want, f"{name} must not be there: there is no bias"
            bound = want[quantity(name)]
            assert result.shape == bound.exact.shape, f"the shape of {name}"
            assert wide or representable(result, self.dtype), (
                f"{name} holds values that {self.dtype} does not: another dtype"
            )
            used = bound.used(result, self.dtype, hard=hard)
            self.record.against_spec(self.label, quantity(name), self.dtype, used, hard)
            assert used <= 1, f"{name} is {used:.3g} times its bound away from the spec"

    def assert_agree(self, one: Results, other: Results, want: Mapping[str, Expected]) -> None:
        """Check that two ways to the same results agree within the bound."""
        for name, result in one.items():
            assert result.shape == other[name].shape, f"the shape of {name}"
            used = want[quantity(name)].between(result, other[name], self.dtype)
            assert used <= 1, f"{name} differs by {used:.3g} times its bound"

    def check_property(
        self, *strategies: st.SearchStrategy[Any], examples: Iterable[tuple[Any, ...]] = ()
    ) -> Callable[[Callable[..., None]], None]:
        """Return a decorator that checks a property now: for ``examples``, and for others drawn by Hypothesis."""
        hypothesis_settings = settings(
            max_examples=_EXAMPLES[self.profile],
            derandomize=not self.seeded,
            database=None,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],  # to explain a failure takes many more runs
            suppress_health_check=list(HealthCheck),
        )

        def check(property: Callable[..., None]) -> None:
            for values in examples:
                property(*values)
            hypothesis_settings(given(*strategies)(property))()

        return check


def by_name(names: Sequence[str], found: Sequence[Any], bias: Any) -> dict[str, Any]:
    """Return results by name; only the gradients of a bias that is not there may be ``None``, and are left out."""
    assert len(found) == len(names), f"there must be {len(names)} results, {', '.join(names)}; got {len(found)}"
    named = dict(zip(names, found, strict=True))
    for name, array in named.items():
        assert array is not None or (bias is None and quantity(name) in ("db", "Hb")), f"{name} must not be None"
    return {name: array for name, array in named.items() if array is not None}


def _second(mode: str) -> tuple[str, ...]:
    return tuple(f"{name} by {mode}" for name in SECOND)


def quantity(name: str) -> str:
    """Return which of ``QUANTITIES`` a result is: ``"y"`` of ``"y by jvp"``."""
    return name.partition(" by ")[0]


@lru_cache(maxsize=256)
def expectations(case: Case, dtype: str, kind: str = "signed") -> Mapping[str, Expected]:
    """Return what every result of a case should be, computed once a run."""
    return expected(case.data(dtype, kind))


def equal_bits(got: Iterable[Any], want: Iterable[Any], what: str) -> None:
    """Check that arrays are equal bit for bit, +0 and -0 apart; all NaN count as one."""
    for one, other in zip(got, want, strict=True):
        if one is None or other is None:
            assert one is other, what
            continue
        assert one.shape == other.shape, f"{what}: the shapes {one.shape} and {other.shape}"
        assert (one.dtype == bool) == (other.dtype == bool), f"{what}: the dtypes {one.dtype} and {other.dtype}"
        same = (one == other) | (np.isnan(one) & np.isnan(other))
        if one.dtype != bool:
            same &= (np.signbit(one) == np.signbit(other)) | np.isnan(one)
        assert same.all(), f"{what}: {np.count_nonzero(~same)} of {same.size} values differ"


def positive_zero(values: Float, what: str) -> None:
    """Check that all values are exactly +0."""
    assert (values == 0).all(), f"{what} must be 0"
    assert not np.signbit(values).any(), f"{what} must be +0, not -0"


def representable(values: Float, dtype: str) -> bool:
    """Whether ``dtype`` holds every one of ``values``."""
    return bool(((round_to(values, dtype) == values) | np.isnan(values)).all())
