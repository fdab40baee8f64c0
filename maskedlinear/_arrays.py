"""What the core reads of a framework's arrays: plain NumPy, without importing the framework."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["as_numpy"]


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
