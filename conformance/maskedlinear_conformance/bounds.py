"""How far a correct result may lie from the exact one: computed from the data, never a fixed tolerance.

A sum of K products, formed in any order in arithmetic of unit roundoff u, lies within K·u·S of the exact sum, where S is
the same sum over absolute values (N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., section 3.1).
On signed data the errors cancel too, and correct results stay far below c·u·S with c = 8, which is tight enough that
flipping one bit of a mask shows at any K in use. A result in a narrower dtype is rounded once more.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from maskedlinear import spec

__all__ = ["Bounds", "C", "accumulation_unit", "bounds", "output_rounding", "output_unit", "pair_ratio", "ratio"]

C = 8.0

Float = NDArray[np.float64]

_BITS = {"float64": 53, "float32": 24, "bfloat16": 8, "float16": 11}
_SMALLEST = {"float64": 2.0**-1074, "float32": 2.0**-149, "bfloat16": 2.0**-133, "float16": 2.0**-24}


class Bounds(NamedTuple):
    """The absolute sums S of every result, each of its result's shape."""

    y: Float
    dx: Float
    dweight: Float
    dbias: Float | None
    dy: Float


def output_unit(dtype: str) -> float:
    """Return the unit roundoff of ``dtype``: half the distance from 1 to the next larger number."""
    return 2.0 ** -_BITS[dtype]


def accumulation_unit(dtype: str) -> float:
    """Return the unit roundoff of the type that sums are formed in: float32 for half types, else ``dtype`` itself."""
    return output_unit("float64" if dtype == "float64" else "float32")


def bounds(x: Float, weight: Float, mask: Any, bias: Float | None, g: Float, tangents: Any) -> Bounds:
    """Return S of every result of a masked linear layer: the spec, on absolute values.

    Args:
        x: shape ``(..., in)``, float64, as are the others.
        weight: shape ``(out, in)``.
        mask: shape ``(out, in)``, boolean.
        bias: shape ``(out,)`` or ``None``.
        g: shape ``(..., out)``, the cotangent.
        tangents: those of x, weight and bias.
    """
    x, weight, g = abs(x), abs(weight), abs(g)
    bias = None if bias is None else abs(bias)
    tangents = [None if tangent is None else abs(tangent) for tangent in tangents]
    y, dy = spec.jvp(x, weight, mask, bias, *tangents)
    return Bounds(y, *spec.vjp(x, weight, mask, bias, g), dy)


def output_rounding(value: Float, dtype: str) -> Float:
    """Return the largest error of rounding to ``dtype`` what became ``value``, where the sum was formed in a wider type."""
    if output_unit(dtype) == accumulation_unit(dtype):
        return np.zeros_like(value)
    rounding: Float = np.maximum(output_unit(dtype) * abs(value), _SMALLEST[dtype] / 2)
    return rounding


def ratio(got: Float, exact: Float, absolute_sum: Float, dtype: str) -> float:
    """Return the largest |got - exact| in units of c·u·S plus one rounding; infinity where a bound of 0 is missed."""
    return _largest(got - exact, C * accumulation_unit(dtype) * absolute_sum + output_rounding(exact, dtype))


def pair_ratio(one: Float, other: Float, absolute_sum: Float, dtype: str) -> float:
    """Return the largest |one - other| in units of c·u·S plus one rounding of each."""
    rounding = output_rounding(one, dtype) + output_rounding(other, dtype)
    return _largest(one - other, C * accumulation_unit(dtype) * absolute_sum + rounding)


def _largest(difference: Float, bound: Float) -> float:
    if not difference.size:
        return 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        fraction = np.where(difference == 0, 0.0, abs(difference) / bound)
    return float(np.where(np.isnan(fraction), np.inf, fraction).max())
