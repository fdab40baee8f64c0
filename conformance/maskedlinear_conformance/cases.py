"""The problems that the laws are checked on: shapes, densities and data, from fixed seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from maskedlinear import masks

__all__ = ["CASES", "Case", "Data", "round_to"]

Float = NDArray[np.float64]


def round_to(values: Float, dtype: str) -> Float:
    """Return ``values`` rounded to the nearest that ``dtype`` holds, still in float64. bfloat16 rounds through float32."""
    if dtype != "bfloat16":
        return np.asarray(values, dtype).astype(np.float64)
    bits = np.asarray(values, np.float32).view(np.uint32)
    bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (bits & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)


@dataclass(frozen=True)
class Data:
    """One problem in float64, every value of which the dtype asked for holds exactly. Shapes as in the spec."""

    x: Float
    weight: Float
    mask: NDArray[np.bool_]
    bias: Float | None
    g: Float
    dx: Float
    dweight: Float
    dbias: Float | None

    @cached_property
    def arguments(self) -> tuple[Float, Float, NDArray[np.bool_], Float | None]:
        """x, weight, mask and bias."""
        return self.x, self.weight, self.mask, self.bias

    @cached_property
    def tangents(self) -> tuple[Float, Float, Float | None]:
        """The tangents of x, weight and bias."""
        return self.dx, self.dweight, self.dbias


@dataclass(frozen=True)
class Case:
    """A shape of the problem and how many connections are live.

    ``density`` is a fraction, ``"one"`` for a single live connection or ``"all but one"``.
    """

    batch: tuple[int, ...]
    in_features: int
    out_features: int
    density: float | str
    bias: bool = True

    def __str__(self) -> str:
        """Name the case, for pytest."""
        batch = "x".join(map(str, self.batch)) or "none"
        density = self.density if isinstance(self.density, str) else f"{self.density:.0%}"
        return f"batch {batch}, {self.in_features}->{self.out_features}, {density}{'' if self.bias else ', no bias'}"

    def mask(self) -> NDArray[np.bool_]:
        """Return the case's mask, shape ``(out, in)``."""
        size = self.out_features * self.in_features
        counts = {"one": 1, "all but one": size - 1}
        live = counts[self.density] if isinstance(self.density, str) else math.floor(self.density * size)
        return masks.random((self.out_features, self.in_features), num_zeros=size - live, seed=size)

    def data(self, dtype: str) -> Data:
        """Draw the case's data: signed, standard normal, weights scaled by 1/√in so that half types do not overflow."""
        generator = np.random.default_rng([*self.batch, self.in_features, self.out_features, len(str(self))])

        def draw(*shape: int, scale: float = 1.0) -> Float:
            return round_to(generator.standard_normal(shape) * scale, dtype)

        scale = 1 / math.sqrt(max(1, self.in_features))
        weight_shape = self.out_features, self.in_features
        return Data(
            x=draw(*self.batch, self.in_features),
            weight=draw(*weight_shape, scale=scale),
            mask=self.mask(),
            bias=draw(self.out_features) if self.bias else None,
            g=draw(*self.batch, self.out_features),
            dx=draw(*self.batch, self.in_features),
            dweight=draw(*weight_shape, scale=scale),
            dbias=draw(self.out_features) if self.bias else None,
        )


CASES = (
    Case((), 5, 3, 0.5),
    Case((1,), 1, 1, 1.0),
    Case((4,), 7, 5, 0.0),
    Case((4,), 7, 5, 1.0),
    Case((4,), 7, 5, "one"),
    Case((4,), 7, 5, "all but one"),
    Case((2, 3), 17, 13, 0.5, bias=False),
    Case((2, 0, 3), 17, 13, 0.5),
    Case((5,), 0, 4, 1.0),
    Case((5,), 4, 0, 1.0),
    Case((33,), 257, 129, 0.1),
    Case((3, 5, 7), 65, 33, 0.5),
    Case((31,), 4096, 61, 0.5),
    Case((61,), 1023, 1025, 0.01),
    Case((2049,), 63, 65, 0.5),
)
