"""What others take: dense arrays by name, files of them, and matrices of scipy."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskedlinear._extras import missing_framework
from maskedlinear.checkpoint._arguments import as_metadata, as_path, check_arrays
from maskedlinear.checkpoint._arrays import OPTIMIZER_ROLE, MaskedArray, PlainArray, raw
from maskedlinear.checkpoint._container import Tensor, replacing, write
from maskedlinear.checkpoint._dtypes import ML_DTYPES, as_numpy

__all__ = ["dense_state", "to_scipy", "write_dense"]

Arrays = Mapping[str, PlainArray | MaskedArray]


def dense_state(arrays: Arrays) -> dict[str, NDArray[Any]]:
    """Return dense arrays of NumPy by name, +0 under each mask, that a plain model loads strictly::

        state = checkpoint.dense_state(checkpoint.load("model.safetensors"))
        model.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})

    Masks, dormant values and the state of an optimizer are left out. What has two names is the same object under both.

    Raises:
        CheckpointError: of bfloat16 and float8, if ``ml_dtypes`` is not installed; :func:`write_dense` needs none.
        TypeError: if these are no arrays by name.
    """
    check_arrays(arrays, "dense_state")
    arrays = _of_model(arrays)
    made: dict[int, NDArray[Any]] = {}
    for array in arrays.values():
        if id(array) not in made:
            made[id(array)] = as_numpy(raw(array), array.dtype)
    return {name: made[id(array)] for name, array in arrays.items()}


def write_dense(arrays: Arrays, path: str | os.PathLike[str], *, metadata: Mapping[str, str] | None = None) -> None:
    """Write dense arrays, +0 under each mask, into a file that others read; whole or not at all.

    The state of an optimizer is left out, so that plain models load the file strictly.

    Args:
        arrays: by name, as :func:`read` and :func:`load` return them.
        path: its end says what is written: ``.safetensors`` (what has two names is written twice, and nothing of ours is
            left in the metadata), ``.npz``, or ``.pt``, ``.pth`` or ``.bin``, a state of PyTorch.
        metadata: of a ``.safetensors`` file, strings by name; beside them it says ``"format": "pt"``, without which Hugging
            Face's readers take none.

    Raises:
        ValueError: if the end is another, a ``.npz`` is to hold a dtype that NumPy has not, or metadata are no strings, or
            given for another file than ``.safetensors``.
        TypeError: if these are no arrays by name, or no path.
        OSError: if the file cannot be written; what it was stays.
    """
    check_arrays(arrays, "write_dense")
    path, arrays, metadata = as_path(path), _of_model(arrays), as_metadata(metadata)
    end = path.suffix.lower()
    if metadata and end in (".npz", ".pt", ".pth", ".bin"):
        raise ValueError(f"metadata are for .safetensors files; {path.name} has no place for them: leave them out")
    if end == ".safetensors":
        tensors = {name: Tensor(array.dtype, array.shape, partial(raw, array)) for name, array in arrays.items()}
        write(path, tensors, {"format": "pt", **metadata}, summed=False)
    elif end == ".npz":
        for name, array in arrays.items():
            if array.dtype in ML_DTYPES:
                raise ValueError(f"a .npz has no {array.dtype}, which {name} is of: write .safetensors, or convert it")
        with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:  # numpy.savez cannot take every name
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, raw(array), allow_pickle=False)
    elif end in (".pt", ".pth", ".bin"):
        try:
            backend = import_module("maskedlinear_torch._state_files")
        except ModuleNotFoundError as error:
            raise missing_framework(error, "writing a file of PyTorch", "torch", "torch") from error
        with replacing(path) as file:
            backend.write_state(arrays, file)
    else:
        raise ValueError(f"write_dense writes .safetensors, .npz, .pt, .pth or .bin; got {path.name!r}")


def to_scipy(array: MaskedArray) -> Any:
    """Return the live values of a matrix as a ``scipy.sparse.csr_array`` of its shape; live zeros are stored.

    Raises:
        ValueError: if it has not two dimensions, or its dtype is none of scipy's.
        TypeError: if it is no array with a mask.
        ModuleNotFoundError: if scipy is not installed.
    """
    if not isinstance(array, MaskedArray):
        raise TypeError(
            f"to_scipy takes an array with a mask; got {type(array).__name__}: of a plain one, "
            "scipy.sparse.csr_array(array.numpy())"
        )
    if array.dtype in ("F16", *ML_DTYPES):
        raise ValueError(f"scipy.sparse has no {array.dtype}: convert the values to float32 before")
    return array.pattern().to_scipy(array.values)


def _of_model(arrays: Arrays) -> dict[str, PlainArray | MaskedArray]:
    return {name: array for name, array in arrays.items() if array.role != OPTIMIZER_ROLE}
