"""How far a correct result may lie from the exact one: computed from the data, never a fixed tolerance.

A sum of K products, formed in any order in arithmetic of unit roundoff u, lies within K·u·S of the exact sum, where S is
the same sum over absolute values (N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., section 3.1).
That is the *hard* bound, for any data. On signed data the errors cancel too, and correct results stay far below the
*tight* bound c·u·S with c = 8, so tight that flipping one bit of a mask shows at any K in use. A result in a narrower
dtype is rounded once more; a second derivative there is a sum of terms that are each rounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskedlinear import spec
from maskedlinear_conformance.cases import Data

__all__ = [
    "DTYPES",
    "FIRST",
    "QUANTITIES",
    "SECOND",
    "C",
    "Expected",
    "accumulation_unit",
    "expected",
    "output_unit",
    "smallest",
]

C = 8.0

DTYPES = ("float64", "float32", "bfloat16", "float16")

FIRST = ("y", "dx", "dW", "db")
"""The results that every way to value and gradients gives."""
SECOND = ("Hx", "HW", "Hb", "Hg")
"""The second derivatives."""
_ORDERS = (FIRST, ("ẏ",), SECOND)

QUANTITIES = tuple(name for order in _ORDERS for name in order)

Float = NDArray[np.float64]

_BITS = {"float64": 53, "float32": 24, "bfloat16": 8, "float16": 11}
_SMALLEST = {"float64": 2.0**-1074, "float32": 2.0**-149, "bfloat16": 2.0**-133, "float16": 2.0**-24}


@dataclass(frozen=True)
class Expected:
    """One result as it should be.

    Attributes:
        exact: the result by the spec, in float64.
        absolute: S, the same over absolute values.
        length: K, how many terms an entry is the sum of.
        rounded: the sum of the magnitudes of what a narrow dtype rounds on the way, the result included.
    """

    exact: Float
    absolute: Float
    length: int
    rounded: Float

    def used(self, got: Float, dtype: str, *, hard: bool = False) -> float:
        """Return the largest |got - exact| in units of the bound; infinity where a bound of 0 is missed, or for NaN."""
        return _largest(got - self.exact, self._sum_error(dtype, hard) + self._rounding(dtype))

    def between(self, one: Float, other: Float, dtype: str) -> float:
        """Return the largest |one - other| in units of the tight bound and a rounding of each."""
        return _largest(one - other, self._sum_error(dtype, False) + 2 * self._rounding(dtype))

    def _sum_error(self, dtype: str, hard: bool) -> Float:
        unit = accumulation_unit(dtype)
        factor = self.length / (1 - self.length * unit) if hard else C  # to all orders in u
        # What is taken for exact is a sum of the same length in float64.
        own = self.length * 2.0**-53 if hard else 0.0
        error: Float = (factor * unit + own) * self.absolute
        return error

    def _rounding(self, dtype: str) -> Float:
        if output_unit(dtype) == accumulation_unit(dtype):
            return np.zeros_like(self.exact)
        rounding: Float = np.maximum(output_unit(dtype) * self.rounded, _SMALLEST[dtype] / 2)
        return rounding


def output_unit(dtype: str) -> float:
    """Return the unit roundoff of ``dtype``: half the distance from 1 to the next larger number."""
    return 2.0 ** -_BITS[dtype]


def smallest(dtype: str) -> float:
    """Return the smallest positive number of ``dtype``, a subnormal one."""
    return _SMALLEST[dtype]


def accumulation_unit(dtype: str) -> float:
    """Return the unit roundoff of the type that sums are formed in: float32 for half types, else ``dtype`` itself."""
    return output_unit("float64" if dtype == "float64" else "float32")


class _Expectations(Mapping[str, Expected]):
    """What every result of a problem should be, computed when it is first asked for: most laws ask for few."""

    def __init__(self, data: Data) -> None:
        self._data, self._found = data, dict[str, Expected]()
        without = ("db", "Hb") if data.bias is None else ()
        self._names = [name for name in QUANTITIES if name not in without]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Expected:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._found:
            self._found |= _expected(self._data, next(order for order in _ORDERS if name in order))
        return self._found[name]


def expected(data: Data) -> Mapping[str, Expected]:
    """Return what every result of ``data`` should be, by its name in ``QUANTITIES``; without bias, without its gradients."""
    return _Expectations(data)


def _expected(data: Data, names: tuple[str, ...]) -> dict[str, Expected]:
    arrays = _results(data, names)
    absolute = {n: abs(a) for n, a in data._asdict().items() if n != "mask" and a is not None}
    sums = _results(data._replace(**absolute), names)
    batch, (out, in_) = math.prod(data.x.shape[:-1]), data.mask.shape
    lengths = {
        **dict(zip(("y", "dx", "dW", "db", "ẏ"), (in_ + 1, out, batch, batch, 2 * in_ + 1), strict=True)),
        **dict(zip(("Hx", "HW", "Hb", "Hg"), (2 * out, 2 * batch, batch, 2 * in_ + 1), strict=True)),
    }
    rounded = {name: abs(exact) for name, exact in arrays.items()}
    if names == SECOND:
        # They are sums over the directions; a narrow dtype rounds each part, and the sums of some.
        still = {name: None if a is None else np.zeros_like(a) for name, a in data._asdict().items() if name[0] == "d"}
        parts = [_results(data._replace(**{**still, name: getattr(data, name)}), names) for name in still]
        for name in ("Hx", "HW", "Hg"):
            rounded[name] = rounded[name] + 2 * sum(abs(part[name]) for part in parts)
    return {name: Expected(exact, sums[name], max(lengths[name], 1), rounded[name]) for name, exact in arrays.items()}


def _results(data: Data, names: tuple[str, ...]) -> dict[str, Float]:
    arguments = data[:4]
    found: tuple[Any, ...]
    if names == FIRST:
        found = spec.forward(*arguments), *spec.vjp(*arguments, data.g)
    elif names == SECOND:
        found = spec.hvp(*data)
    else:
        found = spec.jvp(*arguments, data.dx, data.dweight, data.dbias)[1:]
    return {name: array for name, array in zip(names, found, strict=True) if array is not None}


def _largest(difference: Float, bound: Float) -> float:
    if not difference.size:
        return 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        fraction = np.where(difference == 0, 0.0, abs(difference) / bound)
    return float(np.where(np.isnan(fraction), np.inf, fraction).max())
