"""The dtypes of a file, by safetensors' names, and as what NumPy holds them: bfloat16 and float8 as their bits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskedlinear.checkpoint._errors import CheckpointError

__all__ = ["BITS", "FLOATS", "ITEMSIZE", "ML_DTYPES", "as_numpy", "bits", "name_of", "numbers"]

_NUMPY: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
    "C64": np.dtype("<c8"),
}
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")

#: What NumPy has by ml_dtypes alone, which calls them so.
ML_DTYPES = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}

#: As what each dtype is held: its own, or unsigned integers of its width.
BITS: dict[str, np.dtype[Any]] = _NUMPY | {
    "BF16": np.dtype("<u2"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
}
ITEMSIZE = {name: dtype.itemsize for name, dtype in BITS.items()}

_NAMES = {dtype: name for name, dtype in _NUMPY.items()}
_ML_NAMES = {other: name for name, other in ML_DTYPES.items()}


def name_of(array: NDArray[Any]) -> str:
    """Return safetensors' name of an array's dtype.

    Raises:
        TypeError: if there is none.
    """
    name = _NAMES.get(array.dtype.newbyteorder("<")) or _ML_NAMES.get(array.dtype.name)
    if name is None:
        raise TypeError(f"a checkpoint holds arrays of {', '.join(BITS)}; got dtype {array.dtype}: convert it before")
    return name


def bits(array: NDArray[Any]) -> NDArray[Any]:
    """Return an array as it is held: C-contiguous, little-endian, bfloat16 and float8 as unsigned integers."""
    name = name_of(array)
    if name in ML_DTYPES:
        return np.ascontiguousarray(array).view(BITS[name]).reshape(array.shape)
    return np.ascontiguousarray(array, BITS[name]).reshape(array.shape)  # which would make a scalar a vector


def as_numpy(held: NDArray[Any], name: str) -> NDArray[Any]:
    """Return what :func:`bits` made of an array: bfloat16 and float8 by ``ml_dtypes``.

    Raises:
        CheckpointError: if the dtype needs ``ml_dtypes``, and it is not installed.
    """
    if name not in ML_DTYPES:
        return held
    try:
        import ml_dtypes
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"NumPy has no {ML_DTYPES[name]}: install ml_dtypes (pip install ml_dtypes), which brings it"
        ) from error
    return held.view(np.dtype(getattr(ml_dtypes, ML_DTYPES[name])))


def numbers(held: NDArray[Any], name: str) -> NDArray[Any]:
    """Return what :func:`bits` made of an array as numbers: bfloat16 as float32, which takes no ``ml_dtypes``.

    Raises:
        CheckpointError: of float8, as by :func:`as_numpy`.
    """
    if name == "BF16":
        return (held.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return as_numpy(held, name)
