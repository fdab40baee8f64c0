"""Golden vectors: problems of integers whose results are exact, kept as a file with a version and a hash.

The inputs are integers from the frozen stream ``mask_v1`` and the results come from the spec, so the file can be made
again, to the same bytes, on any machine: ``python -m maskedlinear_conformance.golden FILE``. It guards the spec as well: a
change of the spec's meaning would no longer give these results.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from maskedlinear import masks
from maskedlinear_conformance.bounds import QUANTITIES, expected
from maskedlinear_conformance.cases import Case, Data, draw, round_to

__all__ = ["FILE", "SHA256", "VERSION", "Golden", "goldens", "make"]

VERSION = 1
FILE = Path(__file__).with_name(f"v{VERSION}.safetensors")
SHA256 = "d36338a6db8e389b45bb9103db5721bba5c3d6ebcc2eab3c51132ae3a4315856"

Float = NDArray[np.float64]

# Each problem and the largest magnitude of its integers.
_PROBLEMS = {
    "no batch": (Case((), 5, 3, 0.5), 4),
    "empty batch": (Case((0,), 4, 6, 0.5), 4),
    "empty mask": (Case((4,), 7, 5, 0.0), 4),
    "one connection": (Case((4,), 7, 5, "one"), 4),
    "all but one": (Case((4,), 7, 5, "all but one"), 4),
    "full mask": (Case((4,), 7, 5, 1.0), 4),
    "no bias": (Case((2, 3), 17, 13, 0.5, bias=False), 2),
    "square": (Case((12,), 12, 12, 0.5), 2),
    "wide": (Case((9,), 257, 33, 0.5), 4),
    "tall": (Case((9,), 33, 257, 0.1), 4),
    "long": (Case((2,), 4096, 3, 0.5), 4),
    "one row": (Case((1,), 65, 33, 0.5), 1),
    "many rows": (Case((21, 3), 9, 7, 0.5), 1),
}


_SINCE = {
    **dict.fromkeys(("no batch", "no bias", "wide", "long", "many rows"), "default"),
    **dict.fromkeys(("tall", "one row"), "full"),
}


@dataclass(frozen=True)
class Golden:
    """One problem and its results, all integers, in float64."""

    name: str
    data: Data
    results: dict[str, Float]

    def __str__(self) -> str:
        """Name the problem, for pytest."""
        return self.name

    @property
    def since(self) -> str:
        """The smallest profile that the problem belongs to."""
        return _SINCE.get(self.name, "quick")

    def exact_in(self, dtype: str) -> bool:
        """Whether ``dtype`` holds every sum on the way to every result, in whatever order it is formed."""
        largest = max((float(want.absolute.max(initial=0)) for want in expected(self.data).values()), default=0.0)
        return largest <= {"float64": 2.0**53, "float32": 2.0**24, "float16": 2.0**11, "bfloat16": 2.0**8}[dtype]

    def rounded(self, name: str, dtype: str) -> Float:
        """Return the result ``name`` in ``dtype``."""
        return round_to(self.results[name], dtype)


def make() -> bytes:
    """Return the file's bytes, made from the spec."""
    tensors: dict[str, NDArray[Any]] = {}
    for seed, (name, (case, limit)) in enumerate(_PROBLEMS.items()):
        drawn = 0

        def entries(shape: tuple[int, ...], seed: int = seed, limit: int = limit) -> Float:
            nonlocal drawn
            start, drawn = drawn, drawn + int(np.prod(shape))
            words = masks.words(seed, start, drawn)
            return (words % np.uint32(2 * limit + 1)).astype(np.float64).reshape(shape) - limit

        data = draw(entries, case.batch, case.mask(), case.bias, "float64")
        for field, array in data._asdict().items():
            if array is not None:
                tensors[f"{name}/{field}"] = array if field == "mask" else array.astype(np.int8)
        for quantity, want in expected(data).items():
            tensors[f"{name}/{_ascii(quantity)}"] = want.exact.astype(np.int32)
    return save(tensors, {"format": f"maskedlinear golden vectors, version {VERSION}"})


@cache
def goldens() -> tuple[Golden, ...]:
    """Return the stored problems.

    Raises:
        ValueError: if the file is not the one that this version was published with.
    """
    content = FILE.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise ValueError(
            f"the golden vectors must have the hash {SHA256}; {FILE.name} has {found}: install the package anew"
        )
    tensors = load(content)

    def read(name: str, key: str) -> Any:
        array = tensors.get(f"{name}/{key}")
        return array if array is None or array.dtype == bool else array.astype(np.float64)

    return tuple(
        Golden(
            name,
            Data(*(read(name, field) for field in Data._fields)),
            {q: array for q in QUANTITIES if (array := read(name, _ascii(q))) is not None},
        )
        for name in _PROBLEMS
    )


def _ascii(quantity: str) -> str:
    return {"ẏ": "jvp", "dx": "grad x"}.get(quantity, quantity)
