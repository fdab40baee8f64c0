"""How others keep a mask beside its weight: each convention by its own keys, and the zeros of a dense weight on request."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from maskedlinear._check import as_mask
from maskedlinear.checkpoint._arrays import MaskedArray, PlainArray
from maskedlinear.checkpoint._dtypes import FLOATS, bits, name_of, numbers
from maskedlinear.checkpoint._errors import CheckpointError
from maskedlinear.checkpoint._file import CheckpointFile
from maskedlinear.models import WeightAxes, axes_by_name, why_left_out

__all__ = ["DORMANT", "MASKS_FILE", "from_entries", "infer_masks", "mask_from_beside", "stored_masks"]

Arrays = Mapping[str, PlainArray | MaskedArray]

#: What a folder of Hugging Face's has beside a masked model's weights; and behind a weight's name there, of what is dormant.
MASKS_FILE, DORMANT = "masks.safetensors", ".dormant"

_BITMASK = (".compressed", ".bitmask", ".shape", ".row_offsets")


def from_entries(shape: tuple[int, ...], values: ArrayLike, indices: NDArray[Any], **more: Any) -> MaskedArray:
    """Return an array whose stored entries are its live ones.

    Args:
        shape: of the whole array.
        values: the entries, shape ``(nnz,)``.
        indices: where each stands, shape ``(dimensions, nnz)``, in any order.
        more: ``axes``, ``form`` and ``role`` of :class:`MaskedArray`.

    Raises:
        ValueError: if an index is out of bounds, an entry is there twice, or their numbers differ.
    """
    made = np.asarray(values)
    if min(shape, default=0) < 0 or math.prod(shape) >= 1 << 62:
        raise ValueError(f"the sizes of an array are not negative, and their product is below 2**62; got {shape}")
    if made.ndim != 1 or indices.shape != (len(shape), len(made)):
        raise ValueError(
            f"each entry has an index for each of {len(shape)} dimensions; got values {made.shape} and indices "
            f"{indices.shape}"
        )
    for axis, (index, size) in enumerate(zip(indices, shape, strict=True)):
        if index.size and (index.min() < 0 or index.max() >= size):
            wrong = index[(index < 0) | (index >= size)][0]
            raise ValueError(f"indices along axis {axis} are from 0 to {size - 1}; got {wrong}")
    places = np.zeros(len(made), np.int64)
    for index, size in zip(indices, shape, strict=True):
        places = places * size + index
    order = np.argsort(places, kind="stable")
    places = places[order]
    if (np.diff(places) == 0).any():
        twice = np.unravel_index(int(places[:-1][np.diff(places) == 0][0]), shape)
        raise ValueError(f"each entry is stored once; got {tuple(map(int, twice))} twice: sum the duplicates before")
    return MaskedArray(shape, name_of(made), bits(made)[order], places, **more)


def stored_masks(arrays: Arrays) -> tuple[dict[str, PlainArray | MaskedArray], dict[str, str]]:
    """Return the arrays, weights with their masks; and by the names of these where the masks are from.

    Raises:
        ValueError: if a mask does not fit its weight, or it is not clear whose it is.
    """
    result: dict[str, PlainArray | MaskedArray] = dict(arrays)
    sources: dict[str, str] = {}
    made: dict[tuple[int, ...], MaskedArray] = {}

    def put(name: str, weight: str, mask: str, dormant: str | None, source: str) -> None:
        keys = [weight, mask] if dormant is None else [weight, mask, dormant]
        parts = [_plain(arrays, key) for key in keys]
        known = tuple(map(id, parts))
        if known not in made:
            made[known] = _with_mask(name, *parts)
        for key in keys:
            result.pop(key, None)
        if name in result:
            raise ValueError(f"{name} is there beside {weight} and {mask}, of which it is made: drop one of them")
        result[name], sources[name] = made[known], source

    for key in arrays:
        name, is_original, _ = key.rpartition("_orig")
        if is_original and key == f"{name}_orig" and f"{name}_mask" in arrays:
            put(name, key, f"{name}_mask", None, "torch.nn.utils.prune")
        elif key.rpartition(".")[2] == "weight_values" and f"{key.removesuffix('weight_values')}indptr" in arrays:
            raise ValueError(
                f"{key} is of a layer in the sparse form, whose state does not say how many inputs it has: load it into its "
                "model, and save that with maskedlinear.checkpoint.save"
            )
        elif key.rpartition(".")[2] == "mask" or key.endswith("kernel_mask"):
            weight, dormant = _masked_by(arrays, key)
            if weight:
                beside = "maskedlinear" if dormant or ".masked_" in f".{key}" else "mask beside weight"
                put(weight, weight, key, dormant, beside)
    _take_bitmasks(arrays, result, sources)
    return {name: result[name] for name in sorted(result, key=_order(arrays))}, sources


def _masked_by(arrays: Arrays, key: str) -> tuple[str, str | None]:
    """Return the name of the weight whose mask ``key`` is, empty if there is none; and of what is dormant there."""
    module, _, own = key.rpartition(".")
    prefix = f"{module}." if module else ""
    if own == "mask":
        outer, _, child = module.rpartition(".")
        weight = f"{outer}." if outer else ""
        if child.startswith("masked_") and (weight + child.removeprefix("masked_")) in arrays:
            candidates = [weight + child.removeprefix("masked_")]
        else:
            candidates = [prefix + name for name in ("weight", "kernel") if prefix + name in arrays]
        dormant = f"{prefix}dormant"
    else:
        candidates = [name for name in (key.removesuffix("_mask"),) if name in arrays]
        dormant = f"{key.removesuffix('_mask')}_dormant"
    if len(candidates) > 1:
        raise ValueError(
            f"{key} could be of {' or of '.join(candidates)}: name it <parameter>_mask beside <parameter>_orig"
        )
    return (candidates[0] if candidates else ""), (dormant if dormant in arrays else None)


def _plain(arrays: Arrays, name: str) -> PlainArray:
    array = arrays[name]
    if not isinstance(array, PlainArray):
        raise ValueError(f"{name} has a mask of its own, beside another: drop one of them")
    return array


def _with_mask(name: str, weight: PlainArray, mask: PlainArray, dormant: PlainArray | None = None) -> MaskedArray:
    try:
        live = as_mask(numbers(mask.data(), mask.dtype), weight.shape, name)
    except ValueError as error:
        raise ValueError(f"the mask of {name}: {error}") from error
    flat, hidden = live.reshape(-1), None
    if dormant is not None:
        if dormant.shape != weight.shape or dormant.dtype != weight.dtype:
            raise ValueError(
                f"what is dormant of {name} is as its weight is, {weight.dtype} {weight.shape}; got {dormant.dtype} "
                f"{dormant.shape}"
            )
        hidden = dormant.data().reshape(-1)[~flat]
    return _masked(weight, flat, hidden, axes_by_name(name, len(weight.shape)))


def _masked(
    weight: PlainArray, live: NDArray[np.bool_], hidden: NDArray[Any] | None, axes: WeightAxes | None, **more: Any
) -> MaskedArray:
    """Return a weight with its mask, flat; what is ``hidden`` stands under it, or else what the weight has there."""
    held = weight.data().reshape(-1)
    hidden = held[~live] if hidden is None else hidden
    # What is +0 everywhere is what a weight has that keeps nothing.
    kept = hidden if hidden.view(np.uint8).any() else None
    axes = weight.axes or axes
    return MaskedArray(
        weight.shape, weight.dtype, held[live], np.flatnonzero(live), kept, axes, role=weight.role, **more
    )


def mask_from_beside(name: str, weight: Any, masks: CheckpointFile) -> MaskedArray:
    """Return a plain weight with the mask, and what is dormant, that a file beside it has, as folders of Hugging Face do.

    Args:
        name: of the weight, in both files.
        weight: the weight, whole.
        masks: the file, of masked arrays whose own values are of no account.

    Raises:
        CheckpointError: if they do not belong together.
    """
    mask, hidden = masks.array(name), None
    if not isinstance(weight, PlainArray) or not isinstance(mask, MaskedArray) or mask.shape != weight.shape:
        raise CheckpointError(
            f"{MASKS_FILE}: a mask beside its weight has its shape, and is the only one; got {mask.shape} for {name}, a "
            f"{type(weight).__name__} {weight.shape}: take the file of masks away"
        )
    if name + DORMANT in masks:
        dormant, due = masks.array(name + DORMANT), (mask.size - mask.nnz,)
        if not isinstance(dormant, PlainArray) or (dormant.dtype, dormant.shape) != (weight.dtype, due):
            raise CheckpointError(
                f"{MASKS_FILE}: what is dormant of {name} is {weight.dtype} {due}; got {dormant.dtype} {dormant.shape}"
            )
        hidden = dormant.data()
    return _masked(weight, mask.mask().reshape(-1), hidden, mask.axes, form=mask.form, recipe=mask.recipe)


def _take_bitmasks(arrays: Arrays, result: dict[str, PlainArray | MaskedArray], sources: dict[str, str]) -> None:
    """Decode the arrays of compressed-tensors' sparse-bitmask and sparse-24-bitmask.

    Layout: vllm-project/compressed-tensors, ``compressors/sparse_compressors/sparse_bitmask.py``: the values that are not 0,
    the mask's bits row by row, each row padded to bytes, the first entry in the lowest bit.
    """
    prefixes = [key.removesuffix(".bitmask") for key in arrays if key.endswith(".bitmask")]
    prefixes = [prefix for prefix in prefixes if f"{prefix}.compressed" in arrays]
    # Of the first releases, which compressed every array, the prefix is its whole name; later it is its module's.
    whole = any(prefix.rpartition(".")[2] == "weight" for prefix in prefixes)
    for prefix in prefixes:
        name = prefix if whole else f"{prefix}.weight"
        parts = {end: _plain(arrays, prefix + end) for end in _BITMASK if prefix + end in arrays}
        try:
            if ".shape" not in parts:
                raise ValueError("its .shape is missing, and is not guessed")
            array = _decode_bitmask(parts)
        except ValueError as error:
            raise ValueError(f"the sparse bitmask of {name}: {error}") from error
        for end in parts:
            result.pop(prefix + end, None)
        if name in result:
            raise ValueError(f"{name} is there beside {prefix}.compressed: drop one of them")
        if array.nnz == array.size or why_left_out(name, len(array.shape)):
            data = array.raw()
            result[name] = PlainArray(array.dtype, array.shape, lambda data=data: data)  # type: ignore[misc]
            continue
        axes = axes_by_name(name, len(array.shape))
        result[name] = MaskedArray(array.shape, array.dtype, array.values, array.places, axes=axes)
        sources[name] = "sparse-bitmask"


def _decode_bitmask(parts: Mapping[str, PlainArray]) -> MaskedArray:
    told = parts[".shape"].data()
    if told.dtype.kind not in "iu" or told.size > 32 or (told < 0).any():
        raise ValueError(f"its shape holds a few counts; got {told.dtype} {told.reshape(-1)[:8]}")
    shape = tuple(int(n) for n in told.reshape(-1))
    if not shape:
        raise ValueError("it is a scalar, which has no rows")
    values, packed = parts[".compressed"], parts[".bitmask"]
    due = (*shape[:-1], -(-shape[-1] // 8))
    if packed.dtype != "U8" or packed.shape != due:
        raise ValueError(f"an array {shape} has a bitmask U8 {due}; got {packed.dtype} {packed.shape}")
    every = np.unpackbits(packed.data(), axis=-1, bitorder="little")
    live = every[..., : shape[-1]]
    if every[..., shape[-1] :].any():
        raise ValueError("bits past the end of a row are 0; got others")
    counts = live.sum(axis=-1, dtype=np.int64)
    nnz = int(counts.sum())
    rows = (shape[0], nnz // max(1, shape[0]))
    if values.shape != (nnz,) and not (".row_offsets" not in parts and len(shape) == 2 and values.shape == rows):
        raise ValueError(f"its bitmask has {nnz} live entries; got values of shape {values.shape}")
    if ".row_offsets" in parts:
        offsets = parts[".row_offsets"].data()
        want = np.cumsum(counts, axis=0) - counts if counts.ndim else np.zeros((), np.int64)
        if offsets.dtype.kind not in "iu" or offsets.shape != want.shape or not np.array_equal(offsets, want):
            raise ValueError("its row_offsets are not the sums of its bitmask")
    flat = np.flatnonzero(live.reshape(-1))
    return MaskedArray(shape, values.dtype, values.data().reshape(-1), flat)


def infer_masks(arrays: Arrays, min_sparsity: float) -> dict[str, MaskedArray]:
    """Return, by name, the matrices and kernels without a mask of which at least ``min_sparsity`` is 0, with that mask."""
    result: dict[str, MaskedArray] = {}
    made: dict[int, MaskedArray] = {}
    for name, array in arrays.items():
        if not isinstance(array, PlainArray) or array.dtype not in FLOATS or why_left_out(name, len(array.shape)):
            continue
        if id(array) in made:
            result[name] = made[id(array)]
            continue
        held = array.data()
        # +0 and -0; of bfloat16 and float8 all bits but the sign's.
        live = (held << 1 if held.dtype.kind == "u" else held) != 0
        zeros = live.size - int(np.count_nonzero(live))
        if 0 < zeros < live.size and zeros >= min_sparsity * live.size:
            places = np.flatnonzero(live)
            axes = array.axes or axes_by_name(name, len(array.shape))
            made[id(array)] = result[name] = MaskedArray(
                array.shape, array.dtype, held.reshape(-1)[places], places, axes=axes, role=array.role
            )
    return result


def _order(arrays: Arrays) -> Any:
    """Return the key that sorts names as the source had them; a new name stands where its values did."""
    places = {name: place for place, name in enumerate(arrays)}

    def place(name: str) -> int:
        for key in (name, f"{name}_orig", f"{name}.compressed", f"{name.removesuffix('.weight')}.compressed"):
            if key in places:
                return places[key]
        return len(places)

    return place
