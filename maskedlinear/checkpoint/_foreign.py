"""``read``: arrays and masks out of files and states that others have written, recognised by what is in them.

A file is told by its first bytes and its entries, never by its name; a mask by keys that one known convention has, never by
a likeness. Nothing here unpickles.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np

from maskedlinear._extras import missing_framework
from maskedlinear.checkpoint._arguments import as_path, check_count
from maskedlinear.checkpoint._arrays import MaskedArray, PlainArray, by_name, held
from maskedlinear.checkpoint._dtypes import bits, name_of
from maskedlinear.checkpoint._errors import CheckpointError
from maskedlinear.checkpoint._file import CheckpointFile, read_arrays
from maskedlinear.checkpoint._foreign_masks import (
    DORMANT,
    MASKS_FILE,
    from_entries,
    infer_masks,
    mask_from_beside,
    stored_masks,
)
from maskedlinear.checkpoint._foreign_zip import Zip, array_of_scipy
from maskedlinear.models import first_names

__all__ = ["ReadArrays", "read"]

Array = PlainArray | MaskedArray
_ZIP, _PICKLE, _NPY = b"PK\x03\x04", b"\x80", b"\x93NUMPY"
_WHOLE = ("model.safetensors", "pytorch_model.bin")


class ReadArrays(dict[str, Array]):
    """Arrays by name, as :func:`read` returns them; goes wherever a dictionary of arrays does.

    Attributes:
        container: what they were in: ``"maskedlinear"`` (a checkpoint of ours), ``"safetensors"``, ``"npz"``, ``"scipy"``,
            ``"torch"``, ``"folder"`` or ``"state"``.
        mask_sources: by the name of each masked array, where its mask is from: ``"maskedlinear"``,
            ``"torch.nn.utils.prune"``, ``"mask beside weight"``, ``"sparse-bitmask"``, ``"sparse layout"`` or ``"zeros"``.
        left_out: entries of the source that are no arrays, by name: what they are.
    """

    def __init__(self, arrays: Mapping[str, Array], container: str) -> None:
        super().__init__(arrays)
        self.container = container
        given = "maskedlinear" if container == "maskedlinear" else "sparse layout"
        self.mask_sources: dict[str, str] = {n: given for n, a in arrays.items() if isinstance(a, MaskedArray)}
        self.left_out: dict[str, str] = {}


def read(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    masks: Literal["stored", "zeros", "none"] = "stored",
    min_sparsity: float = 0.1,
    key: str | None = None,
    max_bytes: int | None = None,
) -> ReadArrays:
    """Read the arrays and masks of a file, a folder or a state that another library, or this one, has written::

        arrays = checkpoint.read("pruned.pt")
        checkpoint.save(arrays, "pruned.safetensors")

    Files: checkpoints of ours, safetensors, ``.npz`` of arrays by name or of ``scipy.sparse.save_npz`` (its one array is
    called as the file is, without ``.npz``), PyTorch's (``weights_only``), and folders of Hugging Face, sharded or not.

    Masks that are read: those of our own files and of our layers' states; of ``torch.nn.utils.prune`` (``weight_orig``,
    ``weight_mask``); of layers that have a ``mask`` beside their ``weight``, as those of zuko, nflows and the
    CustomizedLinear recipe; of compressed-tensors' ``sparse-bitmask`` and ``sparse-24-bitmask``; of PyTorch's sparse tensors
    and scipy's matrices, each stored entry of which is live. What a source has under a mask is kept as dormant.

    Args:
        source: a path, or arrays by name: a ``state_dict``, or arrays of NumPy, JAX or scipy.
        masks: ``"stored"`` reads the masks that the source has; ``"zeros"`` moreover gives matrices and kernels without
            one the mask of their zeros, +0 and -0 alike, since products with a mask leave -0: what names and dimensions
            tell to be such, as in ``prune_tree``, so no biases, scales or adapters, nor what is itself called an embedding;
            ``"none"`` gives all arrays as they stand in the source.
        min_sparsity: for ``"zeros"``, the fraction of zeros, in [0, 1], from which an array gets a mask; one that is all
            zeros gets none, as it was never trained.
        key: of a PyTorch file that holds more than one state, which, as ``"state_dict"``.
        max_bytes: how much arrays may take that a file holds compressed or repeated; by default 1 GiB, or 200 times the
            file where that is more.

    Raises:
        CheckpointError: if the source is of no known kind or damaged, or its masks contradict its arrays.
        TypeError: if ``source`` is no path and no mapping, or an entry of it no array.
        ModuleNotFoundError: if it needs a framework that is not installed.
        OSError: if it cannot be read.
    """
    if masks not in ("stored", "zeros", "none"):
        raise ValueError(f"masks must be 'stored', 'zeros' or 'none'; got {masks!r}")
    if not isinstance(min_sparsity, int | float) or not 0 <= min_sparsity <= 1:
        raise ValueError(f"min_sparsity is a fraction of zeros, in [0, 1]; got {min_sparsity!r}")
    check_count("max_bytes", max_bytes)
    if key is not None and not isinstance(key, str):
        raise TypeError(f"key is the name of a state in a file of several, a string; got {key!r}")
    if isinstance(source, Mapping):
        arrays, where = _read_state(source, key), "the state"
    elif isinstance(source, str | os.PathLike):
        path = as_path(source)
        arrays, where = (_read_folder if path.is_dir() else _read_file)(path, key, max_bytes), str(path)
    else:
        raise TypeError(
            f"read takes a path or arrays by name; got {type(source).__name__}: of a model give its state_dict(), or turn "
            "it into one of ours with maskedlinear.torch.import_masks(model)"
        )
    if masks == "none":
        return arrays
    if deltas := [name for name in arrays if name.endswith("shira_indices") and f"{name[:-7]}weight" in arrays]:
        raise CheckpointError(
            f"{where}: {first_names(deltas)} says where PEFT's SHiRA changes a weight, and an adapter does not say of what "
            "shape: merge it, PeftModel.from_pretrained(base, folder).merge_and_unload(), and save the model, or "
            "read(model.state_dict(), masks='zeros'); masks='none' reads all arrays as they stand"
        )
    try:
        found, sources = stored_masks(arrays)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{where}: {error}; masks='none' reads all arrays as they stand") from error
    result = ReadArrays(found, arrays.container)
    result.mask_sources = arrays.mask_sources | sources
    result.left_out = arrays.left_out
    if masks == "zeros":
        for name, array in infer_masks(found, min_sparsity).items():
            result[name], result.mask_sources[name] = array, "zeros"
    return result


def _read_file(path: Path, key: str | None, max_bytes: int | None) -> ReadArrays:
    with path.open("rb") as file:
        start = file.read(9)
        size = os.fstat(file.fileno()).st_size
    limit = unpacked_limit(size, max_bytes)
    if is_safetensors(start, size):
        with CheckpointFile(path) as ours:
            return ReadArrays(read_arrays(ours), "maskedlinear" if ours.framework else "safetensors")
    if start.startswith(_ZIP):
        with Zip(path, limit) as archive:
            if archive.is_torch:
                archive.check_stored()
            elif archive.is_scipy:
                return ReadArrays({path.stem: array_of_scipy(archive)}, "scipy")
            else:
                result = npz_arrays(archive)
                result.update({name: held(array) for name, array in result.items()})
                return result
        return _torch_result(lambda torch: torch.read_state_file(path, key, limit), "torch")
    if start.startswith(_PICKLE):
        return _torch_result(lambda torch: torch.read_state_file(path, key, limit), "torch")
    if start.startswith(_NPY):
        raise CheckpointError(
            f"{path}: a .npy file has one array and no name for it: numpy.savez('arrays.npz', **{{'layer.weight': array}}) "
            "gives it one"
        )
    raise CheckpointError(
        f"{path}: no file of a known kind; it begins with {start!r}: read takes checkpoints of ours, safetensors, .npz, "
        "states of PyTorch, and folders of Hugging Face"
    )


def unpacked_limit(size: int, max_bytes: int | None) -> int:
    """Return how many bytes a file of ``size`` bytes may take unpacked."""
    return max(1 << 30, 200 * size) if max_bytes is None else max_bytes


def is_safetensors(start: bytes, size: int) -> bool:
    """Whether a file of ``size`` bytes is one of safetensors, by its first nine; the first of them may be any."""
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= size - 8


def npz_arrays(archive: Zip) -> ReadArrays:
    """Return the arrays of a ``.npz``, each of which is read when its data are asked for, while the file is open."""
    result = ReadArrays({}, "npz")
    for name in archive.names():
        shape, dtype = archive.kind(name)
        own = name.removesuffix(".npy")
        if dtype.kind in "SU":
            result.left_out[own] = f"text, {dtype}"
            continue
        try:
            kind = name_of(np.empty(0, dtype))
        except TypeError as error:
            raise CheckpointError(f"{archive.path}: {own}: {error}") from error
        result[own] = PlainArray(kind, shape, lambda name=name: bits(archive.array(name)))  # type: ignore[misc]
    return result


def files_of(folder: Path) -> list[str]:
    """Return the names of the files of the one model that is in a folder: one file, or the shards of its index.

    Raises:
        CheckpointError: if there is none, or more than one.
    """
    for name in _WHOLE:
        indexed = folder / f"{name}.index.json"
        whole = (folder / name).is_file()
        if whole and indexed.is_file():
            raise CheckpointError(
                f"{folder}: it has {name} and {indexed.name}, two models: read the one file that is meant"
            )
        if whole:
            return [name]
        if indexed.is_file():
            return _shards(indexed)
    files = sorted(path.name for path in folder.glob("*.safetensors") if path.name != MASKS_FILE)
    if len(files) != 1:
        raise CheckpointError(
            f"{folder}: a folder has {' or '.join(_WHOLE)}, an index of shards, or one file of safetensors; got "
            f"{first_names(files) or 'none of them'}: read the file that is meant"
        )
    return files


def _read_folder(folder: Path, key: str | None, max_bytes: int | None) -> ReadArrays:
    """Read the one model that is in a folder: one file, or shards and their index."""
    result = ReadArrays({}, "folder")
    for name in files_of(folder):
        part = _read_file(folder / name, key, max_bytes)
        if twice := part.keys() & result.keys():
            raise CheckpointError(f"{folder}: {sorted(twice)[0]} is in {name} and in another shard")
        result.update(part)
        result.mask_sources |= part.mask_sources
        result.left_out |= part.left_out
    if (folder / MASKS_FILE).is_file():
        _take_masks_beside(folder / MASKS_FILE, result)
    return result


def _take_masks_beside(path: Path, result: ReadArrays) -> None:
    """Give the weights of a folder the masks of the file beside them; a mask without its weight is named, and left out."""
    made: dict[int, Array] = {}
    with CheckpointFile(path) as masks:
        for name in masks:
            if name.endswith(DORMANT) and name.removesuffix(DORMANT) in masks:
                continue
            if name not in result:
                result.left_out[name] = "a mask without its weight"
                continue
            weight = result[name]
            if id(weight) not in made:
                made[id(weight)] = mask_from_beside(name, weight, masks)
            result[name], result.mask_sources[name] = made[id(weight)], "maskedlinear"


def _shards(index: Path) -> list[str]:
    """Return the names of the files that an index names, each in its own folder."""
    try:
        told = json.loads(index.read_bytes())["weight_map"]
        names = sorted(set(told.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: an index has a weight_map, files by array; got {str(error)[:200]}") from error
    for name in names:
        if not isinstance(name, str) or not name or Path(name).name != name or name in (".", ".."):
            raise CheckpointError(f"{index}: shards lie beside the index; it names {name!r}")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index}: the shard {name} is missing")
    return names


def _read_state(state: Mapping[str, Any], key: str | None) -> ReadArrays:
    if key is not None:
        if not isinstance(state.get(key), Mapping):
            raise CheckpointError(
                f"the state has no arrays by name under {key!r}; it has {first_names(list(map(repr, state)))}"
            )
        state = state[key]
    state = by_name(
        state
    )  # which keeps all values, so that none is taken for another: of some mappings each is made anew
    if any(_is_torch(value) for value in state.values()):
        return _torch_result(lambda torch: torch.arrays_of_state(state), "state")
    arrays: dict[str, Array] = {}
    made: dict[int, Array] = {}
    for name, value in state.items():
        if id(value) not in made:
            made[id(value)] = _as_array(name, value)
        arrays[name] = made[id(value)]
    return ReadArrays(arrays, "state")


def _as_array(name: str, value: Any) -> Array:
    if isinstance(value, PlainArray | MaskedArray):
        return value
    if hasattr(value, "tocoo"):
        entries = value.tocoo()
        try:
            return from_entries(entries.shape, entries.data, np.stack([entries.row, entries.col]))
        except ValueError as error:
            raise CheckpointError(f"the sparse matrix {name}: {error}") from error
    if isinstance(value, Mapping) or value is None:
        raise TypeError(
            f"read takes arrays by name; got {type(value).__name__} under {name!r}: give key={name!r}, or flatten the tree"
        )
    made = np.asarray(value)
    if made.dtype.kind in "OSU":
        raise TypeError(f"read takes arrays by name; got {type(value).__name__} under {name!r}: leave it out")
    return PlainArray.of(made)


def _is_torch(value: Any) -> bool:
    return any(kind.__module__.partition(".")[0] == "torch" for kind in type(value).__mro__)


def _torch_result(call: Callable[[Any], tuple[dict[str, Array], dict[str, str]]], container: str) -> ReadArrays:
    try:
        backend = import_module("maskedlinear_torch._state_files")
    except ModuleNotFoundError as error:
        raise missing_framework(error, "reading a file of PyTorch", "torch", "torch") from error
    arrays, left_out = call(backend)
    result = ReadArrays(arrays, container)
    result.left_out = left_out
    return result
