"""Wirings as text: JSON with names, and arrays as base64; for a file of their own and for a checkpoint's metadata."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from maskedlinear.checkpoint._json import dumps, loads, shown
from maskedlinear.pattern import SparsityPattern

__all__ = ["from_text", "to_text"]

Wiring = TypeVar("Wiring")

_VERSION = 1
_OWN = ("pattern", "inputs", "outputs")
_DTYPES = ("<i4", "<i8", "<f4", "<f8", "|i1", "|b1")


def to_text(wiring: Any) -> str:
    """Return a wiring as text.

    Raises:
        TypeError: if a name is neither a string nor a whole number.
    """
    for name in (*wiring.inputs, *wiring.outputs):
        if isinstance(name, bool) or not isinstance(name, str | int):
            raise TypeError(f"names in a file are strings or whole numbers; got {name!r}: give the nodes such names")
    arrays = {"indptr": wiring.pattern.indptr, "indices": wiring.pattern.indices}
    for field in fields(wiring):
        value = getattr(wiring, field.name)
        if field.name not in _OWN and isinstance(value, np.ndarray):
            arrays[field.name] = value
    told = {"inputs": list(wiring.inputs), "outputs": list(wiring.outputs)}
    return dumps({"maskedlinear.wiring": _VERSION, **told, "arrays": {name: _packed(arrays[name]) for name in arrays}})


def from_text(kind: Callable[..., Wiring], text: str) -> Wiring:
    """Return the wiring, of the class ``kind``, that a text of :func:`to_text` is.

    Raises:
        ValueError: if it is anything else.
    """
    told = loads(text)
    if not isinstance(told, dict) or told.get("maskedlinear.wiring") != _VERSION:
        version = told.get("maskedlinear.wiring") if isinstance(told, dict) else None
        raise ValueError(f"it must say version {_VERSION} of maskedlinear.wiring; it says {shown(version)}")
    names = []
    for side in ("inputs", "outputs"):
        given = told.get(side)
        if not isinstance(given, list) or any(isinstance(n, bool) or not isinstance(n, str | int) for n in given):
            raise ValueError(f"its {side} must be a list of names, strings or whole numbers")
        names.append(tuple(given))
    packed = told.get("arrays")
    if not isinstance(packed, dict):
        raise ValueError("it has no arrays")
    arrays = {name: _unpacked(name, value) for name, value in packed.items()}
    indptr, indices = (arrays.pop(name, None) for name in ("indptr", "indices"))
    if indptr is None or indices is None or indptr.dtype.kind != "i" or indices.dtype.kind != "i":
        raise ValueError("its indptr and indices must be whole numbers")
    known = {field.name for field in fields(kind)} - set(_OWN)  # type: ignore[arg-type]
    if not arrays.keys() <= known:
        raise ValueError(
            f"it has {shown(min(arrays.keys() - known))}, which this version does not know: update maskedlinear"
        )
    pattern = SparsityPattern(indptr, indices, len(names[0]))
    for name, array in arrays.items():
        if array.shape != (pattern.nnz,):
            raise ValueError(
                f"its {name} must have one entry for each of the {pattern.nnz} connections; got {len(array)}"
            )
    return kind(pattern, *names, **arrays)


def _packed(array: NDArray[Any]) -> dict[str, str]:
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    if little.dtype.str not in _DTYPES:
        raise TypeError(f"a file of a wiring has arrays of {', '.join(_DTYPES)}; got {little.dtype.str}")
    return {"dtype": little.dtype.str, "data": base64.b64encode(little.tobytes()).decode()}


def _unpacked(name: str, value: Any) -> NDArray[Any]:
    dtype, data = (value.get(key) if isinstance(value, dict) else None for key in ("dtype", "data"))
    if dtype not in _DTYPES or not isinstance(data, str):
        raise ValueError(f"{shown(name)} must have a dtype and data; got the dtype {shown(dtype)}")
    try:
        raw = base64.b64decode(data, validate=True)
        if dtype == "|b1" and raw.strip(b"\0\1"):
            raise ValueError("booleans are 0 or 1")
        return np.frombuffer(raw, dtype)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{shown(name)} cannot be read: {error}") from error
