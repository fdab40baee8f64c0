"""``Subject``: one backend in one format and dtype on one device; and the checks that the laws are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from maskedlinear_conformance.bounds import Expected, expected
from maskedlinear_conformance.cases import Case, Data, round_to
from maskedlinear_conformance.record import Record

__all__ = ["INPUTS", "Results", "Subject", "equal_bits", "expectations", "positive_zero", "representable"]

INPUTS = ("x", "weight", "bias")

Float = NDArray[np.float64]
Results = dict[str, Float]

_NAMES = dict(zip(INPUTS, ("dx", "dW", "db"), strict=True))
_EXAMPLES = {"quick": 3, "default": 6, "full": 100}


@dataclass(frozen=True)
class Subject:
    """A backend in one dtype on one device, spoken to in NumPy arrays.

    Attributes:
        backend: see :class:`maskedlinear.backends.Backend`.
        label: the backend's name and format.
        dtype: the floating dtype, by name.
        device: ``"cpu"`` or ``"cuda"``.
        profile: one of ``quick``, ``default`` and ``full``.
        record: where the fractions of the bounds are noted.
        seeded: whether Hypothesis draws anew, from ``--hypothesis-seed``, and not the same at every run.
    """

    backend: Any
    label: str
    dtype: str
    device: str = "cpu"
    profile: str = "default"
    record: Record = field(default_factory=Record)
    seeded: bool = False

    def __str__(self) -> str:
        """Name the subject, for pytest."""
        return f"{self.label} {self.dtype}"

    def has(self, capability: str) -> bool:
        """Whether the backend does not declare that it lacks ``capability``."""
        return capability not in self.backend.lacks()

    def send(self, values: Any, layout: str = "contiguous", dtype: str | None = None) -> Any:
        """Return ``values`` as the framework's array; ``None`` stays."""
        if values is None:
            return None
        return self.backend.asarray(np.asarray(values), dtype or self.dtype, self.device, layout)

    def fetch(self, array: Any) -> Any:
        """Return an array of the framework as NumPy's; ``None`` stays."""
        return None if array is None else self.backend.asnumpy(array)

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method with the framework's arrays made of NumPy's, and return NumPy's."""
        with self.backend.strict():
            sent = [self.send(a) if isinstance(a, np.ndarray) else a for a in arguments]
            found = getattr(self.backend, method)(*sent, **options)
            return [self.fetch(a) for a in found] if isinstance(found, tuple | list) else self.fetch(found)

    def value(self, data: Data) -> Float:
        """Return y."""
        y: Float = self.call("masked_linear", *data[:4])
        return y

    def gradients(self, data: Data, wrt: Sequence[str] = INPUTS) -> Results:
        """Return dx, dW and db: those of ``wrt`` that exist, by name."""
        asked = [name for name in wrt if getattr(data, name) is not None]
        found = self.call("vjp", *data[:5], wrt=asked)
        assert len(found) == len(asked), f"vjp must return a gradient for each of {asked}; got {len(found)}"
        return {_NAMES[name]: gradient for name, gradient in zip(asked, found, strict=True)}

    def tangent(self, data: Data) -> Results:
        """Return y and ẏ."""
        return dict(zip(("y", "ẏ"), self.call("jvp", *data[:4], *data[5:8]), strict=True))

    def curvature(self, data: Data, mode: str) -> Results:
        """Return Hx, HW, Hb and Hg."""
        found = zip(("Hx", "HW", "Hb", "Hg"), self.call("hvp", *data, mode=mode), strict=True)
        return {name: array for name, array in found if array is not None}

    def both(self, data: Data, method: str, *first: Any) -> Results:
        """Return y, dx, dW and db of one of the methods that give all of them."""
        found = zip(("y", "dx", "dW", "db"), self.call(method, *first, *data[:5]), strict=True)
        return {name: array for name, array in found if array is not None}

    def plain(self, data: Data) -> Results:
        """Return y, dx, dW and db."""
        return {"y": self.value(data), **self.gradients(data)}

    def everything(self, data: Data) -> Results:
        """Return every quantity that the backend has."""
        found = self.plain(data)
        if self.has("jvp"):
            found["ẏ"] = self.tangent(data)["ẏ"]
        for mode in ("reverse over reverse", "forward over reverse"):
            if self.has(mode):
                return found | self.curvature(data, mode)
        return found

    def on(self, case: Case, kind: str = "signed") -> Results:
        """Return ``everything`` of a case, computed once a run."""
        return _remembered(self, case, kind)

    def near(self, got: Results, want: dict[str, Expected], *, hard: bool = False) -> None:
        """Check that each result has its shape and dtype, and lies within its bound of the spec's."""
        for name, result in got.items():
            assert result.shape == want[name].exact.shape, f"the shape of {name}"
            assert representable(result, self.dtype), f"{name} holds values that {self.dtype} does not: another dtype"
            used = want[name].used(result, self.dtype, hard=hard)
            self.record.against_spec(self.label, name, self.dtype, used, hard)
            assert used <= 1, f"{name} is {used:.3g} times its bound away from the spec"

    def alike(self, one: Results, other: Results, want: dict[str, Expected]) -> None:
        """Check that two ways to the same results agree within the bound."""
        for name, result in one.items():
            assert result.shape == other[name].shape, f"the shape of {name}"
            used = want[name].between(result, other[name], self.dtype)
            assert used <= 1, f"{name} differs by {used:.3g} times its bound"

    def holds_for(self, *strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], None]:
        """Return a decorator that checks a property now, for values drawn by Hypothesis."""
        examples = settings(
            max_examples=_EXAMPLES[self.profile],
            derandomize=not self.seeded,
            database=None,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],  # to explain a failure takes many more runs
            suppress_health_check=list(HealthCheck),
        )
        return lambda property: examples(given(*strategies)(property))()


@lru_cache(maxsize=512)
def _remembered(subject: Subject, case: Case, kind: str) -> Results:
    return subject.everything(case.data(subject.dtype, kind))


@lru_cache(maxsize=256)
def expectations(case: Case, dtype: str, kind: str = "signed") -> dict[str, Expected]:
    """Return what every result of a case should be, computed once a run."""
    return expected(case.data(dtype, kind))


def equal_bits(got: Iterable[Any], want: Iterable[Any], what: str) -> None:
    """Check that arrays are equal bit for bit, +0 and -0 apart; all NaN count as one."""
    for one, other in zip(got, want, strict=True):
        if one is None or other is None:
            assert one is other, what
            continue
        assert one.shape == other.shape, f"{what}: the shapes {one.shape} and {other.shape}"
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
