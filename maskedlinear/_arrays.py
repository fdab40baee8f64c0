"""What the core reads of a framework's arrays: plain NumPy, without importing the framework."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["Scores", "as_numpy", "named", "unnamed"]

Scores = Any  # an array, a mapping of names to arrays, or a sequence of arrays

T = TypeVar("T")


def as_numpy(array: Any) -> NDArray[Any]:
    """Return the array as NumPy's, without a copy where it is on the CPU already.

    bfloat16 and float16 become float32, which holds each of their values.

    Raises:
        TypeError: if it is not an array of real numbers.
    """
    if hasattr(array, "detach"):  # PyTorch
        array = array.detach().cpu()
        if str(array.dtype) in ("torch.bfloat16", "torch.float16"):
            array = array.float()
        array = array.numpy()
    found = np.asarray(array)
    if found.dtype.name in ("bfloat16", "float16"):
        found = found.astype(np.float32)
    if found.dtype.kind not in "fiub":
        raise TypeError(
            f"weights and scores must be arrays of real numbers; got {type(array).__name__} of {found.dtype}"
        )
    return found


def named(arrays: Scores, convert: Callable[[Any], T]) -> dict[Any, T]:
    """Return a single array, a mapping or a sequence of arrays as a dictionary, whose order is the order of layers."""
    if isinstance(arrays, Mapping):
        return {name: convert(array) for name, array in arrays.items()}
    if isinstance(arrays, Sequence) and not hasattr(arrays, "dtype"):
        return {place: convert(array) for place, array in enumerate(arrays)}
    return {0: convert(arrays)}


def unnamed(found: dict[Any, T], like: Scores) -> Any:
    """Return ``found`` in the form that ``like`` has."""
    if isinstance(like, Mapping):
        return found
    if isinstance(like, Sequence) and not hasattr(like, "dtype"):
        return list(found.values())
    return found[0]
