"""The one place that decides whether what a user handed in is a mask."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from array_api_compat import array_namespace, is_array_api_obj

__all__ = ["as_mask"]


def as_mask(mask: Any, shape: tuple[int, ...], parameter: str = "weight (out, in)") -> Any:
    """Return ``mask`` as a boolean array of ``shape``, in its own namespace and on its own device.

    Args:
        mask: a boolean array, or any numeric array of 0s and 1s, of exactly ``shape``; nested lists are read by NumPy.
            It is never changed; a boolean array is returned as it is. Or a :class:`maskedlinear.masks.Recipe`.
        shape: the shape of the parameter that is masked.
        parameter: the parameter's name and the meaning of its dimensions, for messages.

    Raises:
        ValueError: if the shape differs (the message says where the transpose would fit), or if a value is anything but
            0 and 1, NaN included.
    """
    if not is_array_api_obj(mask):
        from maskedlinear.masks._recipe import Recipe  # which stands among those that need this module

        if isinstance(mask, Recipe):
            return mask.make(tuple(shape))
        try:
            mask = np.asarray(mask)
        except ValueError as error:
            raise ValueError(
                f"a mask must have the shape of the parameter that it masks, {parameter} = {tuple(shape)}; got nested lists "
                "of different lengths: make the rows equally long"
            ) from error
    if isinstance(mask, np.ndarray) and mask.dtype.kind not in "biuf":
        raise ValueError(f"a mask must hold booleans, or 0s and 1s; got an array of dtype {mask.dtype}")
    got, want = tuple(mask.shape), tuple(shape)
    if got != want:
        fits = ", which is its transpose: pass mask.T" if got == want[::-1] else ""
        raise ValueError(
            f"a mask must have the shape of the parameter that it masks, {parameter} = {want}; got {got}{fits}"
        )
    xp = array_namespace(mask)
    if xp.isdtype(mask.dtype, "bool"):
        return mask
    if not xp.isdtype(mask.dtype, ("integral", "real floating")):
        raise ValueError(f"a mask must hold booleans, or 0s and 1s; got an array of dtype {mask.dtype}")
    live = mask == 1
    bad = ~(live | (mask == 0))
    if bool(xp.any(bad)):
        first = int(xp.argmax(xp.astype(xp.reshape(bad, (math.prod(want),)), xp.uint8)))
        where = tuple(int(i) for i in np.unravel_index(first, want))
        raise ValueError(
            f"a mask must hold booleans, or 0s and 1s; got {mask[where].tolist()} at {where}: "
            "choose the connections first, as in `scores > threshold`"
        )
    return live
