"""What a checkpoint holds: plain arrays, and masked ones as their live values and the places where these belong."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from maskedlinear._check import as_mask
from maskedlinear.checkpoint._dtypes import BITS, as_numpy, bits, name_of
from maskedlinear.masks import Recipe
from maskedlinear.models import WeightAxes
from maskedlinear.pattern import SparsityPattern

__all__ = [
    "OPTIMIZER_ROLE",
    "Form",
    "MaskedArray",
    "PlainArray",
    "are_same",
    "by_name",
    "held",
    "mask_digest",
    "raw",
]

Form = Literal["dense", "sparse"]

#: The role of what an optimizer keeps, which is no part of the model.
OPTIMIZER_ROLE = "optimizer"

_WINDOW = 1 << 16  # entries
_PART = 1 << 18  # places that are hashed at once


@dataclass(frozen=True, eq=False)
class PlainArray:
    """An array without a mask.

    Attributes:
        dtype: safetensors' name of its dtype.
        shape: its shape.
        data: returns its numbers, bfloat16 and float8 as unsigned integers; called when they are needed.
        axes: what its axes mean, if it is a weight of which they are known.
        role: what it is to its module, for other frameworks: ``"linear.weight"``, ``"batch_norm.mean"``; ``"optimizer"``
            of what an optimizer keeps; empty if nobody says.
    """

    dtype: str
    shape: tuple[int, ...]
    data: Callable[[], NDArray[Any]] = field(repr=False)
    axes: WeightAxes | None = None
    role: str = ""

    @classmethod
    def of(cls, array: ArrayLike, axes: WeightAxes | None = None, role: str = "") -> Self:
        """Return an array of NumPy's, or of what NumPy makes one of, as one to be saved."""
        made = np.asarray(array)
        return cls(name_of(made), made.shape, lambda: bits(made), axes, role)

    def numpy(self) -> NDArray[Any]:
        """Return it in its own dtype.

        Raises:
            CheckpointError: of bfloat16 and float8, if ``ml_dtypes`` is not installed.
        """
        return as_numpy(self.data(), self.dtype)


@dataclass(frozen=True, eq=False)
class MaskedArray:
    """An array with a mask: what is live, in the order in which it stands (C order), and where.

    Attributes:
        shape: of the whole array.
        dtype: safetensors' name of its dtype.
        values: the live entries, shape ``(nnz,)``; bfloat16 and float8 as unsigned integers.
        places: where they stand in the flattened array, shape ``(nnz,)``, int64, ascending.
        dormant: the entries under the mask, in order, shape ``(size - nnz,)``, held as ``values`` are; ``None`` if they were
            left out.
        axes: what its axes mean; ``None`` if nobody knows.
        form: whether its layer had it as a whole matrix or as its live values.
        role: as in :class:`PlainArray`.
        recipe: of what its mask was made, as :class:`maskedlinear.masks.Recipe`; ``None`` if it was not, or is another now.
    """

    shape: tuple[int, ...]
    dtype: str
    values: NDArray[Any] = field(repr=False)
    places: NDArray[np.int64] = field(repr=False)
    dormant: NDArray[Any] | None = field(default=None, repr=False)
    axes: WeightAxes | None = None
    form: Form = "dense"
    role: str = ""
    recipe: Recipe | None = None

    @classmethod
    def of(cls, array: ArrayLike, mask: Any, *, dormant: bool = False, **more: Any) -> Self:
        """Return an array and its mask as one to be saved.

        Args:
            array: any shape; what is under the mask is dormant.
            mask: booleans or 0s and 1s, of its shape.
            dormant: whether what is under the mask is saved.
            more: ``axes``, ``form``, ``role`` and ``recipe``.
        """
        made = np.asarray(array)
        held = bits(made).reshape(-1)
        live = as_mask(mask, made.shape).reshape(-1)
        places = np.flatnonzero(live)
        return cls(made.shape, name_of(made), held[places], places, held[~live] if dormant else None, **more)

    @classmethod
    def of_pattern(cls, values: ArrayLike, pattern: SparsityPattern, **more: Any) -> Self:
        """Return the values of a layer in the sparse form, (out, in), as an array to be saved."""
        made = np.asarray(values)
        return cls(pattern.shape, name_of(made), bits(made), pattern.places, form="sparse", **more)

    @property
    def size(self) -> int:
        """The number of all entries."""
        return math.prod(self.shape)

    @property
    def nnz(self) -> int:
        """The number of live ones."""
        return len(self.places)

    @property
    def sparsity(self) -> float:
        """The fraction of entries under the mask, in [0, 1]; 0 for an array of no size."""
        return (self.size - self.nnz) / self.size if self.size else 0.0

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of shape and mask, in hexadecimal: the mask's identity, in every framework."""
        return mask_digest(self.shape, self.places)

    def mask(self) -> NDArray[np.bool_]:
        """Return the mask as an array of its shape."""
        flat = np.zeros(self.size, np.bool_)
        flat[self.places] = True
        return flat.reshape(self.shape)

    def pattern(self) -> SparsityPattern:
        """Return the mask as a pattern.

        Raises:
            ValueError: if this is no matrix (out, in).
        """
        if len(self.shape) != 2:
            raise ValueError(f"a pattern is of a matrix (out, in); got shape {self.shape}")
        rows, columns = np.divmod(self.places, self.shape[1] or 1)
        starts = np.zeros(self.shape[0] + 1, np.int64)
        np.cumsum(np.bincount(rows, minlength=self.shape[0]), out=starts[1:])
        return SparsityPattern(starts, columns, self.shape[1])

    def raw(self, *, dormant: bool = False) -> NDArray[Any]:
        """Return the whole array as ``values`` is held: +0 under the mask, or what is dormant there, if that was saved."""
        flat = np.zeros(self.size, BITS[self.dtype])
        flat[self.places] = self.values
        if dormant and self.dormant is not None:
            flat[~self.mask().reshape(-1)] = self.dormant
        return flat.reshape(self.shape)

    def numpy(self, *, dormant: bool = False) -> NDArray[Any]:
        """Return the whole array in its own dtype, as :meth:`raw` does.

        Raises:
            CheckpointError: of bfloat16 and float8, if ``ml_dtypes`` is not installed.
        """
        return as_numpy(self.raw(dormant=dormant), self.dtype)


def raw(array: PlainArray | MaskedArray) -> NDArray[Any]:
    """Return the whole array of either kind as files hold it, +0 under a mask."""
    return array.raw() if isinstance(array, MaskedArray) else array.data()


def are_same(one: PlainArray | MaskedArray, other: PlainArray | MaskedArray) -> bool:
    """Whether two arrays are the same bit for bit, masks and what is dormant included."""
    if one is other:
        return True
    (own, parts), (others, more) = (
        ((a.dtype, a.shape), (a.values, a.places, a.dormant) if isinstance(a, MaskedArray) else (a.data(),))
        for a in (one, other)
    )
    return own == others and [_bytes(part) for part in parts] == [_bytes(part) for part in more]


def _bytes(array: NDArray[Any] | None) -> bytes | None:
    return None if array is None else array.tobytes()


def by_name(arrays: Mapping[Any, Any]) -> dict[str, Any]:
    """Return what is in a mapping by strings; two keys that are one string are a ``ValueError``."""
    found = {str(key): value for key, value in arrays.items()}
    if len(found) != len(arrays):
        twice = next(name for name, count in Counter(map(str, arrays)).items() if count > 1)
        raise ValueError(f"arrays have a name each, a string; got two keys that are {twice!r}: rename one")
    return found


def held(array: PlainArray | MaskedArray) -> PlainArray | MaskedArray:
    """Return an array that is read now, and not when it is asked for."""
    if isinstance(array, MaskedArray):
        return array
    data = array.data()
    return replace(array, data=lambda: data)


def mask_digest(shape: tuple[int, ...], places: NDArray[np.int64]) -> str:
    """Return the SHA-256 of a mask: of its shape, and of where it is live.

    Of the shape as ``4096,4096``; then of the number of each window of 2¹⁶ entries of the flattened mask in which some are
    live, and of how many (both uint64); then of the lower 16 bits of all places (uint16); little-endian. That is a
    quarter of what whole places would be, and none of it needs the mask itself.
    """
    windows = -(-math.prod(shape) // _WINDOW)
    if windows <= len(places):
        starts = np.searchsorted(places, np.arange(windows) * _WINDOW)
        numbers = np.flatnonzero(np.diff(starts, append=len(places)))
        starts = starts[numbers]
    else:
        numbers, starts = np.unique(places // _WINDOW, return_index=True)
    table = np.stack([numbers, np.diff(starts, append=len(places))], axis=1)
    found = hashlib.sha256(",".join(str(int(n)) for n in shape).encode())
    found.update(np.ascontiguousarray(table, "<u8").data)
    for start in range(0, len(places), _PART):
        found.update(places[start : start + _PART].astype("<u2").data)
    return found.hexdigest()
