"""The problems that the laws are checked on: shapes, densities and data, from fixed seeds."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from maskedlinear import masks

__all__ = [
    "CASES",
    "HEAVY",
    "OTHER",
    "PROBE",
    "PROFILES",
    "SEVERAL",
    "TILED",
    "WIDE",
    "Case",
    "Data",
    "among",
    "draw",
    "odd",
    "others",
    "poisoned",
    "round_to",
    "small",
    "small_or_heavy",
    "with_nan",
]

PROFILES = ("quick", "default", "full")

Float = NDArray[np.float64]
Mask = NDArray[np.bool_]


def round_to(values: Float, dtype: str) -> Float:
    """Return ``values`` rounded to the nearest that ``dtype`` holds, still in float64. bfloat16 rounds through float32."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return np.asarray(values, dtype).astype(np.float64)
    bits = np.asarray(values, np.float32).view(np.uint32)
    bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = (bits & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)
    return np.where(np.isnan(values), np.nan, rounded)


class Data(NamedTuple):
    """One problem in float64, every value of which the dtype asked for holds exactly. Shapes as in the spec.

    A mask is boolean; ``bias`` and ``dbias`` may be ``None``. ``x`` to ``g`` are the arguments and the cotangent; ``dx`` to
    ``dg`` a direction in which they move.
    """

    x: Any
    weight: Any
    mask: Any
    bias: Any
    g: Any
    dx: Any
    dweight: Any
    dbias: Any
    dg: Any


def draw(
    entries: Callable[[tuple[int, ...]], Float],
    batch: tuple[int, ...],
    mask: Mask,
    bias: bool,
    dtype: str,
    scale: float = 1.0,
) -> Data:
    """Return a problem whose arrays are made by ``entries(shape)``, the weight's times ``scale``, rounded to ``dtype``."""
    out, in_ = mask.shape

    def made(*shape: int, by: float = 1.0) -> Float:
        return round_to(entries(shape) * by, dtype)

    return Data(
        x=made(*batch, in_),
        weight=made(out, in_, by=scale),
        mask=mask,
        bias=made(out) if bias else None,
        g=made(*batch, out),
        dx=made(*batch, in_),
        dweight=made(out, in_, by=scale),
        dbias=made(out) if bias else None,
        dg=made(*batch, out),
    )


@dataclass(frozen=True)
class Case:
    """A shape of the problem and how many connections are live.

    Attributes:
        batch: the batch dimensions, none included.
        in_features: the number of inputs.
        out_features: the number of outputs.
        density: the fraction of live connections, or ``"one"`` of them, or ``"all but one"``.
        bias: whether there is a bias.
        since: the smallest of ``PROFILES`` that the case belongs to.
    """

    batch: tuple[int, ...]
    in_features: int
    out_features: int
    density: float | str
    bias: bool = True
    since: str = field(default="quick", compare=False)

    def __str__(self) -> str:
        """Name the case, for pytest."""
        batch = "x".join(map(str, self.batch)) or "none"
        density = self.density if isinstance(self.density, str) else f"{self.density:.0%}"
        return f"batch {batch}, {self.in_features}->{self.out_features}, {density}{'' if self.bias else ', no bias'}"

    @property
    def size(self) -> int:
        """The number of products of one forward pass, were no connection masked."""
        return math.prod(self.batch) * self.in_features * self.out_features

    def mask(self) -> Mask:
        """Return the case's mask, shape ``(out, in)``."""
        size = self.out_features * self.in_features
        counts = {"one": 1, "all but one": size - 1}
        live = counts[self.density] if isinstance(self.density, str) else math.floor(self.density * size)
        return masks.random((self.out_features, self.in_features), num_zeros=size - live, seed=size)

    def data(self, dtype: str, kind: str = "signed") -> Data:
        """Draw the case's data, always the same.

        ``"signed"`` values lie in ±[0.5, 1.5], so that no connection is too weak to be missed; ``"positive"`` ones lie in
        [0.5, 1.5], where rounding errors do not cancel; ``"integers"`` are -4 to 4, whose sums float32 holds exactly.
        Weights of the first two are scaled by 1/√in, so that half types do not overflow.
        """
        return _data(self, dtype, kind)


@lru_cache(maxsize=256)
def _data(case: Case, dtype: str, kind: str) -> Data:
    generator = np.random.default_rng(zlib.crc32(str(case).encode()))

    def entries(shape: tuple[int, ...]) -> Float:
        if kind == "integers":
            return generator.integers(-4, 5, shape).astype(np.float64)
        size = generator.uniform(0.5, 1.5, shape)
        return size if kind == "positive" else size * generator.choice([-1.0, 1.0], shape)

    scale = 1.0 if kind == "integers" else 1 / math.sqrt(max(1, case.in_features))
    data = draw(entries, case.batch, case.mask(), case.bias, dtype, scale)
    for array in data:
        if array is not None:
            array.flags.writeable = False
    return data


CASES = (
    Case((), 5, 3, 0.5),
    Case((4,), 7, 5, 0.0),
    Case((4,), 7, 5, "one"),
    Case((4,), 7, 5, "all but one"),
    Case((2, 3), 17, 13, 0.5, bias=False),
    Case((12,), 12, 12, 0.5),
    Case((0,), 4, 6, 0.5),
    Case((5,), 0, 4, 1.0),
    Case((33,), 257, 129, 0.1),
    Case((2, 3), 136, 128, 0.5),
    Case((), 136, 128, 0.5, bias=False, since="default"),
    Case((0,), 136, 128, 0.5, since="default"),
    Case((5,), 4096, 61, 0.5, since="default"),
    Case((1,), 1, 1, 1.0, since="default"),
    Case((4,), 7, 5, 1.0, since="default"),
    Case((2, 0, 3), 17, 13, 0.5, since="default"),
    Case((5,), 4, 0, 1.0, since="default"),
    Case((3,), 1, 9, 0.5, since="default"),
    Case((3, 5, 7), 65, 33, 0.5, since="default"),
    Case((61,), 1031, 1033, 0.01, bias=False, since="default"),  # a mask of more than 2²⁰ entries
    Case((2051,), 63, 65, 0.5, since="default"),  # more than 2²² products of live connections
    Case((1,), 769, 1021, 0.1, since="default"),
    *(Case((33,), 257, 129, density, since="default") for density in (0.0, "one", "all but one", 1.0)),
    Case((), 5, 3, 0.5, bias=False, since="default"),
    Case((12,), 12, 12, 0.5, bias=False, since="default"),
    Case((3,), 9, 1, 0.5, since="full"),
    Case((3,), 16384, 17, 0.5, since="full"),
    Case((3,), 17, 16383, 0.5, since="full"),
    Case((4097, 3), 31, 33, 0.9, since="full"),
    Case((257,), 2047, 511, "one", since="full"),
)


PROBE = Case((4,), 7, 5, 0.5)
"""The one for laws that are not about shapes; its shape is that of others, so that little is compiled anew."""

OTHER = Case((4,), 7, 5, 0.7)
"""The same shape with other values."""

SEVERAL = Case((2, 3), 17, 13, 0.5)
TILED = Case((33,), 257, 129, 0.1)
"""Large enough for code that works in tiles, and no multiple of any."""
HEAVY = Case((2, 3), 136, 128, 0.5)
"""Of more than 2¹⁴ weights, for which a backend may take another way than for few, and little to compute."""
WIDE = Case((5,), 4096, 61, 0.5)
"""So large that one connection is a small part of a sum."""


def small(case: Case) -> bool:
    """Whether a case is cheap enough for the laws that are dear to check."""
    return case.size <= 2000


def small_or_heavy(case: Case) -> bool:
    """Whether a case is cheap enough for the laws that are dear to check, or stands for all that have many weights."""
    return small(case) or case == HEAVY


def odd(case: Case) -> bool:
    """Whether a small case has a shape that is easily forgotten: no batch, two, an empty one, no bias, no nodes."""
    return small(case) and (len(case.batch) != 1 or case.size == 0 or not case.bias)


def others(mask: Mask) -> list[Mask]:
    """Return masks unlike ``mask`` in the same shape: some with as many connections, in all, in each row, in each column.

    Two differ from it in the middle only: in one connection, and in two.
    """
    one, two = _nearby(mask)
    another = OTHER.mask() if mask.shape == OTHER.mask().shape else ~mask
    return [another, mask[:, ::-1].copy(), mask[::-1].copy(), one, two]


def _nearby(mask: Mask) -> list[Mask]:
    outwards = np.argsort(abs(np.arange(mask.size) - mask.size // 2))
    live, dead = (outwards[mask.flat[outwards] == kind][0] for kind in (True, False))
    one, two = mask.copy(), mask.copy()
    one.flat[live] = two.flat[live] = False
    two.flat[dead] = True
    return [one, two]


def poisoned(data: Data) -> dict[str, Data]:
    """Return ``data`` with what must not leak under the mask of the weight and of its tangent, by what it is."""
    kinds: dict[str, Any] = {"NaN": np.nan, "inf": np.inf, "-inf": -np.inf}
    if data.weight.size > 1000:
        kinds = {"NaN and infinities": np.resize(list(kinds.values()), data.weight.shape)}
    return {
        name: data._replace(
            weight=np.where(data.mask, data.weight, poison), dweight=np.where(data.mask, data.dweight, poison)
        )
        for name, poison in kinds.items()
    }


def with_nan(data: Data, name: str) -> Data:
    """Return ``data`` with NaN in the first row of ``name``."""
    values = getattr(data, name).copy()
    values[0] = np.nan
    return data._replace(**{name: values})


def among(since: str, profile: str) -> bool:
    """Whether what belongs to the profile ``since`` runs in ``profile``: each runs what the smaller ones do."""
    return PROFILES.index(since) <= PROFILES.index(profile)
