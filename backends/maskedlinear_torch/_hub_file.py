"""The file in which a folder of Hugging Face's has masks alone: a checkpoint of ours, whose live values are all true."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from maskedlinear import checkpoint
from maskedlinear.checkpoint import CheckpointError, MaskedArray, PlainArray
from maskedlinear.checkpoint._dtypes import BITS
from maskedlinear.checkpoint._file import read_arrays, save_arrays
from maskedlinear.checkpoint._foreign_masks import DORMANT
from maskedlinear_torch._hub_masks import Mask, Masks

__all__ = ["digest_of", "read_masks", "write_masks"]

_KEEP = "keep_dormant"


def write_masks(masks: Masks, path: Path) -> None:
    """Write masks into a file, whole or not at all.

    Raises:
        OSError: if it cannot be written; what it was stays.
    """
    arrays: dict[str, MaskedArray | PlainArray] = {}
    for name, mask in masks.items():
        true = np.ones(mask.live.shape, np.bool_)
        arrays[name] = MaskedArray.of(true, mask.live, axes=mask.axes, form=mask.form)
        if mask.hidden is not None:
            hidden = mask.hidden[~mask.live]
            arrays[name + DORMANT] = PlainArray(mask.dtype, hidden.shape, lambda hidden=hidden: hidden)  # type: ignore[misc]
    kept = {name: mask.keep_dormant for name, mask in masks.items() if mask.keep_dormant is not True}
    save_arrays(arrays, path, framework="torch", metadata={_KEEP: json.dumps(kept)} if kept else None)


def read_masks(path: Path) -> dict[str, Mask]:
    """Return the masks that a file holds.

    Raises:
        CheckpointError: if the file is damaged, or holds anything else.
        OSError: if it cannot be read.
    """
    with checkpoint.open(path) as file:
        for name in file:
            file.check_whole(name)
        told, arrays = file.metadata.get(_KEEP, "{}"), read_arrays(file)
    try:
        kept = json.loads(told)
    except (ValueError, RecursionError):
        kept = None
    if not isinstance(kept, dict) or not all(how in (False, "host") for how in kept.values()):
        raise CheckpointError(f"{path}: it does not say what happens to what is dormant")
    masks: dict[str, Mask] = {}
    for name, array in arrays.items():
        if isinstance(array, MaskedArray) and array.dtype == "BOOL" and array.values.all():
            hidden, dtype = _hidden(arrays.get(name + DORMANT), array)
            masks[name] = Mask(array.mask(), array.form, kept.get(name, True), hidden, dtype, array.axes)
    if others := arrays.keys() - masks.keys() - {name + DORMANT for name, mask in masks.items() if mask.dtype}:
        raise CheckpointError(f"{path}: {min(others)} is no mask, and nothing that is dormant under one")
    return masks


def _hidden(array: Any, mask: MaskedArray) -> tuple[Any, str]:
    """Return what is dormant, of the weight's shape, and its dtype; nothing if that is not in the file."""
    if not isinstance(array, PlainArray) or array.shape != (mask.size - mask.nnz,) or array.dtype[0] not in "FB":
        return None, ""
    hidden = np.zeros(mask.shape, BITS[array.dtype])
    hidden[~mask.mask()] = array.data()
    return hidden, array.dtype


def digest_of(masks: Masks) -> str:
    """Return a SHA-256 of all masks and forms, by which weights say which masks are theirs."""
    found = hashlib.sha256()
    for name, mask in sorted(masks.items()):
        found.update(json.dumps([name, mask.live.shape, mask.form]).encode())
        found.update(np.packbits(mask.live).tobytes())
    return found.hexdigest()
