"""States of PyTorch as arrays of a checkpoint, and back: of dictionaries and of files, which are never unpickled."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from maskedlinear.checkpoint import CheckpointError, MaskedArray, PlainArray
from maskedlinear.checkpoint._arrays import raw
from maskedlinear.checkpoint._foreign_masks import from_entries
from maskedlinear_torch._checkpoint_state import DTYPES, dtype_name, from_host, on_host
from maskedlinear_torch._dtensors import full_tensor

__all__ = ["arrays_of_state", "read_state_file", "write_state"]

Array = PlainArray | MaskedArray


def read_state_file(path: Path, key: str | None, max_bytes: int) -> tuple[dict[str, Array], dict[str, str]]:
    """Return the arrays of a file of ``torch.save``, and what else is in it.

    Raises:
        CheckpointError: if it holds anything that would have to be unpickled, is damaged, has several states, or tensors
            that take more than ``max_bytes``.
    """
    try:
        # Not mapped: someone who writes the file anew would end the process that then reads an array.
        with warnings.catch_warnings(action="ignore"):  # of pickles, which are refused below
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: it holds more than tensors, which is not unpickled, since that may run any code: save the model's "
            f"state_dict() where the file is from ({str(error).splitlines()[0][:200]})"
        ) from error
    except OSError:
        raise
    except Exception as error:  # whatever torch meets in what is no file of its own
        raise CheckpointError(f"{path}: no file of PyTorch that is whole: {str(error)[:300]}") from error
    if key is not None and isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
        held = held[key]
    elif key is not None or not isinstance(held, Mapping) or not any(isinstance(v, Tensor) for v in held.values()):
        states = [repr(k) for k, v in held.items() if isinstance(v, Mapping)] if isinstance(held, Mapping) else []
        choice = f"give key={' or key='.join(states[:5])}" if states else "save a state_dict()"
        raise CheckpointError(f"{path}: arrays by name were due{'' if key is None else f' under {key!r}'}: {choice}")
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _strided(held)}
    claimed = sum(tensor.nbytes for tensor in _strided(held))
    if claimed > max(max_bytes, sum(storages.values())):
        raise CheckpointError(
            f"{path}: its tensors take {claimed} bytes, of {sum(storages.values())} stored; at most {max_bytes} are made: "
            f"if that is right, give max_bytes={claimed}"
        )
    try:
        return arrays_of_state(held)
    except TypeError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _strided(state: Mapping[str, Any]) -> list[Tensor]:
    return [value for value in state.values() if isinstance(value, Tensor) and value.layout is torch.strided]


def arrays_of_state(state: Mapping[str, Any]) -> tuple[dict[str, Array], dict[str, str]]:
    """Return the tensors of a state as arrays, and of entries that are none, by name, what they are.

    A tensor under two names, or two that share their memory as a whole, is one array.

    Raises:
        TypeError: if a tensor is of a kind that a file cannot hold.
        CheckpointError: if the indices of a sparse tensor are none of it.
    """
    arrays: dict[str, Array] = {}
    left_out: dict[str, str] = {}
    made: dict[Any, Array] = {}
    for name, value in state.items():
        if isinstance(value, PlainArray | MaskedArray):
            arrays[str(name)] = value
        elif isinstance(value, np.ndarray | np.generic):
            arrays[str(name)] = PlainArray.of(value)
        elif isinstance(value, Tensor):
            known = _identity(value)
            if known not in made:
                made[known] = _as_array(str(name), value.detach())
            arrays[str(name)] = made[known]
        else:
            left_out[str(name)] = type(value).__name__
    return arrays, left_out


def _identity(tensor: Tensor) -> Any:
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided or not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _as_array(name: str, tensor: Tensor) -> Array:
    tensor = full_tensor(tensor)
    if tensor.dtype not in DTYPES.values() or tensor.is_quantized or type(tensor) not in (Tensor, nn.Parameter):
        raise TypeError(
            f"a checkpoint holds tensors of {', '.join(DTYPES)}; got {name}, a "
            f"{type(tensor).__name__} of {tensor.dtype}: convert it before"
        )
    if tensor.is_meta:
        raise TypeError(f"a checkpoint holds tensors that have values; got {name}, on the meta device")
    if tensor.layout is torch.strided:
        return PlainArray(dtype_name(tensor.dtype), tuple(tensor.shape), lambda: on_host(tensor))
    try:
        return _sparse(tensor)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"the sparse tensor {name}: {error}") from error


def _sparse(tensor: Tensor) -> MaskedArray:
    if tensor.layout is torch.sparse_csr or tensor.layout is torch.sparse_csc:
        rows, columns = (
            (tensor.crow_indices(), tensor.col_indices())
            if tensor.layout is torch.sparse_csr
            else (tensor.ccol_indices(), tensor.row_indices())
        )
        starts, other, values = rows.cpu().numpy(), columns.cpu().numpy(), tensor.values()
        compressed = tensor.shape[0 if tensor.layout is torch.sparse_csr else 1]
        if len(tensor.shape) != 2 or values.dim() != 1 or starts.shape != (compressed + 1,):
            raise ValueError(f"of compressed layouts matrices are read; got shape {tuple(tensor.shape)}")
        if starts[0] != 0 or starts[-1] != len(values) or (np.diff(starts) < 0).any():
            raise ValueError("its compressed indices do not go up from 0 to the number of entries")
        first = np.repeat(np.arange(compressed), np.diff(starts))
        indices = np.stack([first, other] if tensor.layout is torch.sparse_csr else [other, first])
    elif tensor.layout is torch.sparse_coo:
        if tensor.dense_dim():
            raise ValueError("it has dense dimensions: call to_dense() before")
        if not tensor.is_coalesced():
            raise ValueError("it is not coalesced: call coalesce() before")
        indices, values = tensor.indices().cpu().numpy(), tensor.values()
    else:
        raise ValueError(f"layouts that are read are sparse_csr, sparse_csc and sparse_coo; got {tensor.layout}")
    array = from_entries(tuple(tensor.shape), on_host(values), indices)
    return replace(array, dtype=dtype_name(tensor.dtype))


def write_state(arrays: Mapping[str, Array], file: BinaryIO) -> None:
    """Write a state of dense tensors, +0 under each mask, that plain modules load; tied ones are one tensor."""
    made: dict[int, Tensor] = {}
    for array in arrays.values():
        if id(array) not in made:
            made[id(array)] = from_host(raw(array).copy(), array.dtype)
    torch.save({name: made[id(array)] for name, array in arrays.items()}, file)
