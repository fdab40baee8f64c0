"""``Entry``: what a checkpoint's header says of one array, and what of it is believed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from maskedlinear.checkpoint._arrays import Form
from maskedlinear.checkpoint._dtypes import ITEMSIZE
from maskedlinear.checkpoint._json import shown
from maskedlinear.checkpoint._masks import LARGEST, Mask
from maskedlinear.checkpoint._values import RAW, Values
from maskedlinear.models import WeightAxes

__all__ = ["LARGEST_DENSE", "LARGEST_MADE", "LARGEST_UNBACKED", "Entry", "Tensors"]

LARGEST_UNBACKED = 1 << 26  # live entries in a file that it has no bit each for: 512 MiB of places
LARGEST_MADE = 1 << 28  # entries of masks of recipes in a file, beyond 64 for each byte of their arrays: some seconds
LARGEST_DENSE = 1 << 30  # bytes of a dense array that any file may have; or 4096 for each byte that it takes there

Tensors = Mapping[str, tuple[str, tuple[int, ...], int, int]]

_PLAIN = {"axes", "role"}
_MASKED = {"shape", "dtype", "nnz", "form", "mask", "values", "dormant", *_PLAIN}


@dataclass(frozen=True)
class Entry:
    """What the header says of an array, checked against the tensors that there are.

    Attributes:
        dtype: safetensors' name.
        shape: of the whole array.
        axes: what its axes mean; ``None`` if the file does not say.
        role: what it is to its module.
        form: whether its layer had it as a whole matrix or as its live values.
        mask: how its mask stands; ``None`` for a plain array.
        values: how its live values stand.
        dormant: how its dormant ones do; ``None`` if they were left out.
        parts: the names of the tensors that hold it.
        nbytes: their bytes together.
    """

    dtype: str
    shape: tuple[int, ...]
    axes: WeightAxes | None
    role: str
    form: Form = "dense"
    mask: Mask | None = None
    values: Values = RAW
    dormant: Values | None = None
    parts: tuple[str, ...] = ()
    nbytes: int = 0

    @classmethod
    def from_json(cls, name: str, told: Any, tensors: Tensors) -> Entry:
        """Return what is said of the array of this name.

        Raises:
            ValueError: if it contradicts itself or the tensors, or says what no file of version 1 does.
        """
        if not isinstance(told, dict):
            raise ValueError(f"an object was due; got {shown(told)}")
        role = told.get("role", "")
        if not isinstance(role, str):
            raise ValueError(f"its role is a string; got {shown(role)}")
        if "mask" not in told:
            _refuse_others(told, _PLAIN)
            dtype, shape, start, stop = _tensor(name, tensors)
            axes = _axes_from(told.get("axes"), len(shape))
            return cls(dtype, shape, axes, role, parts=(name,), nbytes=stop - start)
        _refuse_others(told, _MASKED)
        shape, nnz = _shape(told.get("shape")), told.get("nnz")
        form: Any = told.get("form")
        dtype, size = told.get("dtype", ""), math.prod(shape)
        if not isinstance(dtype, str) or dtype not in ITEMSIZE or form not in ("dense", "sparse"):
            raise ValueError(f"its dtype and form are {shown((dtype, form))}")
        if type(nnz) is not int or not 0 <= nnz <= size:
            raise ValueError(f"0 to {size} of its entries are live; got {shown(nnz)}")
        axes = _axes_from(told.get("axes"), len(shape))
        mask = Mask.from_json(told["mask"], shape, nnz, axes)
        values = Values.from_json(told.get("values"), dtype)
        dormant = Values.from_json(told["dormant"], dtype) if "dormant" in told else None
        if dormant is not None and dormant.codec == "true":
            raise ValueError("dormant values are raw or through pcodec")
        parts, nbytes = [], 0
        held: list[tuple[str, str | None, int | None]] = [("mask", "U8" if mask.is_coded else None, None)]
        for end, codec, count in (("values", values, nnz), ("dormant", dormant, size - nnz)):
            is_raw = codec is not None and codec.codec == "raw"
            is_there = codec is not None and codec.codec != "true"
            held.append((end, (dtype if is_raw else "U8") if is_there else None, count if is_raw else None))
        for end, kind, length in held:
            if kind is None:
                continue
            found, dims, start, stop = _tensor(f"{name}/{end}", tensors)
            if found != kind or len(dims) != 1 or length not in (None, dims[0]):
                raise ValueError(
                    f"its {end} are {kind}, ({'' if length is None else length},); got {found}, {shown(dims)}"
                )
            count = size - nnz if end == "dormant" else nnz
            if length is None and end != "mask" and count > 8 * dims[0]:
                raise ValueError(f"pcodec makes a bit or more of each value; got {count} in {dims[0]} bytes")
            parts.append(f"{name}/{end}")
            nbytes += stop - start
        return cls(dtype, shape, axes, role, form, mask, values, dormant, tuple(parts), nbytes)

    @property
    def unbacked(self) -> int:
        """How many live entries it claims, if it does not have at least a bit for each in the file."""
        return self.mask.nnz if self.mask is not None and self.mask.nnz > 8 * self.nbytes else 0

    @property
    def made(self) -> int:
        """How many entries its recipe has to make, if these are more than 64 for each of its bytes in the file."""
        size = math.prod(self.shape)
        is_made = self.mask is not None and self.mask.recipe is not None
        return size if is_made and size > 64 * self.nbytes else 0

    def to_json(self) -> dict[str, Any]:
        """Return what :meth:`from_json` reads."""
        told: dict[str, Any] = {"role": self.role} if self.role else {}
        if self.axes is not None:
            batch, out, in_ = self.axes.order(len(self.shape))
            told["axes"] = {"out": list(out), "in": list(in_), "batch": list(batch)}
        if self.mask is None:
            return told
        told |= {"shape": [int(n) for n in self.shape], "dtype": self.dtype, "nnz": self.mask.nnz, "form": self.form}
        told |= {"mask": self.mask.to_json(), "values": self.values.to_json()}
        if self.dormant is not None:
            told["dormant"] = self.dormant.to_json()
        return told


def _refuse_others(told: Mapping[str, Any], known: set[str]) -> None:
    if others := told.keys() - known:
        raise ValueError(f"no file of version 1 says {shown(sorted(others))} of an array")


def _tensor(name: str, tensors: Tensors) -> tuple[str, tuple[int, ...], int, int]:
    if name not in tensors:
        raise ValueError(f"there is no tensor {shown(name)}")
    return tensors[name]


def _shape(told: Any) -> tuple[int, ...]:
    if not isinstance(told, list) or len(told) > 32 or not all(type(n) is int and 0 <= n <= LARGEST for n in told):
        raise ValueError(f"its shape is a list of counts; got {shown(told)}")
    if math.prod(n for n in told if n) > LARGEST:
        raise ValueError(f"an array with a mask has at most {LARGEST} entries; got the shape {shown(told)}")
    return tuple(told)


def _axes_from(told: Any, ndim: int) -> WeightAxes | None:
    if told is None:
        return None
    if not isinstance(told, dict) or told.keys() != {"out", "in", "batch"}:
        raise ValueError(f"axes are those of out, in and batch; got {shown(told)}")
    for numbers in told.values():
        if (
            not isinstance(numbers, list)
            or len(numbers) > ndim
            or not all(type(n) is int and 0 <= n < ndim for n in numbers)
        ):
            raise ValueError(f"axes are counted from 0 to {ndim - 1}; got {shown(told)}")
    out, in_, batch = (told[key][0] if len(told[key]) == 1 else tuple(told[key]) for key in ("out", "in", "batch"))
    axes = WeightAxes(out, in_, batch)
    axes.order(ndim)  # raises if an axis is missing, or there twice
    return axes
