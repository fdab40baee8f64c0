"""A file loaded into a torch module: all of it is checked first, then array after array is copied in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from maskedlinear.checkpoint import CheckpointError, CheckpointFile, MaskedArray, PlainArray
from maskedlinear.checkpoint._arrays import are_same, raw
from maskedlinear.checkpoint._names import OPTIMIZER, ArraysFile, Expected, Names, refuse, translated
from maskedlinear.constraints import Constraints
from maskedlinear.models import ModelWeight, first_names
from maskedlinear_torch._checkpoint_optimizer import OptimizerState
from maskedlinear_torch._checkpoint_roles import axes_and_role
from maskedlinear_torch._checkpoint_state import DTYPES, StateArray, dtype_name, from_host, on_host, state_arrays
from maskedlinear_torch._constraints import is_constraint, load_constraints
from maskedlinear_torch._dtensors import as_dtensor_like, is_sharded
from maskedlinear_torch._masked_weight import MaskedWeight
from maskedlinear_torch._models import become_sparse
from maskedlinear_torch._packed_layer import PackedLinear
from maskedlinear_torch._sparse_layer import SparseLinear
from maskedlinear_torch._weight_mask import WeightMask, child_name
from maskedlinear_torch._weights import mask_of, model_weights
from maskedlinear_torch._whole import mask_weight

__all__ = ["load_into"]

Array = PlainArray | MaskedArray
_PART = 1 << 24  # bytes
Tied = dict[str, StateArray]  # one array of the model, under all its names


def load_into(
    model: nn.Module, file: CheckpointFile, *, names: Names = None, optimizer: torch.optim.Optimizer | None = None
) -> nn.Module:
    """Load a file into a model, in place, an array at a time, and return the model: its masks are the file's afterwards.

    What another framework wrote is translated, all of it before anything is changed.

    Parameters stay the same objects, but for those of a plain ``nn.Linear`` that the file has in the sparse form, and of a
    model on the meta device.

    Raises:
        CheckpointError: if the file is damaged or does not fit; all names and shapes that differ are named, and nothing was
            changed.
    """
    constraints: dict[str, Constraints] = {}
    state, weights = state_arrays(model), {id(weight.value): weight for weight in model_weights(model)}
    source: CheckpointFile | ArraysFile = file
    is_foreign = file.framework not in ("torch", "numpy", "") or (
        file.framework == "numpy" and _lies_otherwise(state, file)
    )
    if names is not None or is_foreign:
        file.verify()
        source = _translated(
            {name: array for name, array in state.items() if not is_constraint(name)}, file, names, constraints
        )
    state = {name: array for name, array in state.items() if not is_constraint(name)}
    groups: dict[int, Tied] = {}
    for name, array in state.items():
        groups.setdefault(id(array.value), {})[name] = array
    refuse(_misfits(state, groups, weights, source), type(model).__name__)
    if source is file:
        file.verify()
    training = None
    if optimizer is not None:
        if renewed := [name for name, array in state.items() if _is_renewed(name, array, source)]:
            raise CheckpointError(
                f"loading gives {first_names(renewed)} new parameters, which the optimizer would not hold (of layers that "
                "become sparse, or are on the meta device): load the model first, make the optimizer, and load both then"
            )
        training = OptimizerState(optimizer, state, file)
    found = [next((array, name) for name, array in tied.items() if name in source) for tied in groups.values()]
    _load_refusable([(array, source.array(name)) for array, name in found if array.module is None], training)
    sparse: set[int] = set()
    for array, name in found:
        if array.module is None:
            continue
        saved = source.array(name)
        if isinstance(saved, MaskedArray) and not array.holds_mask and isinstance(array.value, nn.Parameter):
            mask_weight(weights[id(array.value)], torch.from_numpy(saved.mask()), True)
            if saved.form == "sparse":
                sparse.update(id(module) for module, _ in array.users)
        _copy(array, saved)
    model = become_sparse(model, sparse)
    _load_constraints(model, source)
    for name, made in constraints.items():
        _constrain(model, name, made)
    return model


def _load_constraints(model: nn.Module, source: CheckpointFile | ArraysFile) -> None:
    """Give layers the constraints that a file has for them, when they have their connections."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name in source:
        if is_constraint(name):
            path, _, key = name.rpartition(".")
            layers.setdefault(path, {})[key] = from_host(source.array(name).data(), source.told(name).dtype)  # type: ignore[union-attr]
    for path, arrays in layers.items():
        model.get_submodule(path).load_state_dict(arrays, strict=False)


def _constrain(model: nn.Module, weight: str, made: Constraints) -> None:
    """Give a masked weight the constraints that a file of another framework, or with other names, has for it."""
    path, _, parameter = weight.rpartition(".")
    module = model.get_submodule(path)
    layer: Any = (
        module if isinstance(module, SparseLinear | MaskedWeight) else module.get_submodule(child_name(parameter))
    )
    own = (
        made.for_pattern(layer.pattern) if isinstance(layer, SparseLinear) else made.for_weight(tuple(layer.mask.shape))
    )
    errors: list[str] = []
    load_constraints(layer, own.arrays(), f"{path}.", errors)
    if errors:
        raise CheckpointError("; ".join(errors))


def _load_refusable(extra: Sequence[tuple[StateArray, Array]], training: OptimizerState | None) -> None:
    """Load what code of the user's takes, and may refuse: then it has what it had before, and the rest has not changed."""
    before = [(array, array.value.detach().clone()) for array, _ in extra]
    try:
        for array, saved in extra:
            _set_extra(array, from_host(raw(saved), saved.dtype).to(array.value.dtype))
        if training is not None:
            training.apply()
    except BaseException:
        for array, value in before:
            _set_extra(array, value)
        raise


def _set_extra(array: StateArray, value: Tensor) -> None:
    """Give a module what its state has made, which is no parameter or buffer."""
    assert array.parent is not None
    array.parent.load_state_dict({array.key.rpartition(".")[2]: value}, strict=False)


def _lies_otherwise(state: Mapping[str, StateArray], file: CheckpointFile) -> bool:
    """Whether a file of arrays by name has one whose axes are others than here, as of another framework's model."""
    there = {name: file.entry(name).axes for name in state if name in file}
    return any(
        axes is not None and (own := axes_and_role(state[name])[0]) is not None and own != axes
        for name, axes in there.items()
    )


def _is_renewed(name: str, array: StateArray, file: CheckpointFile | ArraysFile) -> bool:
    """Whether loading puts another parameter in the place of this one."""
    becomes_sparse = name in file and file.told(name).form == "sparse" and type(array.module) is nn.Linear
    return array.value.is_meta or (becomes_sparse and not array.holds_mask)


def _translated(
    state: Mapping[str, StateArray], file: CheckpointFile, names: Names, constraints: dict[str, Constraints]
) -> ArraysFile:
    """Return what stands in for a file, with its arrays under the names and in the layouts of a model."""
    expected: dict[int, Expected] = {}
    for array in state.values():
        axes, role = axes_and_role(array)
        dtype = dtype_name(array.value.dtype)
        expected.setdefault(id(array.value), Expected(array.shape, dtype, axes, role))
    arrays, differences = translated(
        file,
        {name: expected[id(array.value)] for name, array in state.items()},
        "torch",
        names,
        constraints=constraints,
    )
    refuse(differences)
    for name, array in state.items():
        if name not in arrays:  # what may be missing: a counter of batches stays
            arrays[name] = PlainArray(dtype_name(array.value.dtype), array.shape, lambda a=array: on_host(a.value))  # type: ignore[misc]
    return ArraysFile(arrays)


def _misfits(
    state: Mapping[str, StateArray],
    groups: Mapping[int, Tied],
    weights: Mapping[int, ModelWeight],
    file: CheckpointFile | ArraysFile,
) -> list[str]:
    """Return what keeps a file from being loaded, a line a name."""
    missing = [name for tied in groups.values() if not any(name in file for name in tied) for name in tied]
    found = [f"not in the file: {name}" for name in missing]
    found += [f"not in the model: {name}" for name in file if _is_unknown(name, state, file)]
    for tied in groups.values():
        names = [name for name in tied if name in file]
        for name in names:
            if why := _why_not_loaded(name, tied[name], weights.get(id(tied[name].value)), file):
                found.append(f"{name}: {why}")
        stored = [] if found else list({file.told(name).stored_as for name in names})
        if any(not are_same(file.array(stored[0]), file.array(other)) for other in stored[1:]):
            found.append(f"one array in the model, different ones in the file: {', '.join(names)}")
    return found


def _is_unknown(name: str, state: Mapping[str, StateArray], file: CheckpointFile | ArraysFile) -> bool:
    """Whether a file has something by a name that belongs nowhere in a model: no constraint of what has a mask."""
    if name in state or name.startswith(OPTIMIZER):
        return False
    path, (parent, _, child) = name.rpartition(".")[0], name.rpartition(".")[0].rpartition(".")
    own = f"{path}.weight" if path else "weight"
    of_child = f"{parent}.{child.removeprefix(child_name(''))}".lstrip(".")
    weight = own if own in state else of_child
    return not is_constraint(name) or weight not in state or weight not in file or file.told(weight).form is None


def _why_not_loaded(name: str, array: StateArray, weight: ModelWeight | None, file: CheckpointFile | ArraysFile) -> str:
    told, value = file.told(name), array.value
    if isinstance(value, UninitializedParameter):
        return "without values in the model yet: call it once before"
    if array.module is None and array.parent is None:
        return "renamed in the model, by hooks on its state"
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_quantized:
        return "no ordinary tensor in the model"
    if (value.is_inference() and not torch.is_inference_mode_enabled()) or _overlaps(value):
        return (
            "of inference mode, or expanded, in the model, so that nothing is written into it: put a clone in its place"
        )
    if told.shape != array.shape:
        return f"{told.shape} in the file, {array.shape} in the model"
    if not _converts(DTYPES[told.dtype], value.dtype):
        return f"{str(DTYPES[told.dtype])[6:]} in the file, {str(value.dtype)[6:]} in the model"
    if told.form is not None and not array.holds_mask and told.dtype != "BOOL":
        if weight is None:
            return "masked in the file, and no parameter in the model"
        if weight.fixed:
            return f"masked in the file, and {weight.why} in the model"
    return ""


def _overlaps(value: Tensor) -> bool:
    """Whether entries of a tensor are one in memory."""
    return not value.is_meta and any(n > 1 and not step for n, step in zip(value.shape, value.stride(), strict=True))


def _converts(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether numbers are loaded as another dtype: floats as any floats, whole ones as those that hold them all."""
    if source == target or (source.is_floating_point and target.is_floating_point):
        return True
    if any(dtype.is_floating_point or dtype.is_complex or dtype is torch.bool for dtype in (source, target)):
        return False
    try:
        return torch.promote_types(source, target) == target
    except RuntimeError:  # of unsigned ones
        return False


@torch.no_grad()
def _copy(array: StateArray, source: PlainArray | MaskedArray) -> None:
    """Copy an array of a file to where it belongs in the model, with its mask."""
    masks = [mask_of(module, name) for module, name in array.users]
    recipe = source.recipe if isinstance(source, MaskedArray) else None
    for layer in (array.sparse, *masks):
        if layer is not None and layer.recipe != recipe:
            layer.recipe = recipe
    if array.sparse is not None:
        _copy_sparse(array.sparse, source)
        return
    held = source.raw(dormant=True) if isinstance(source, MaskedArray) else source.data()
    is_plain = array.mask_of is None and not any(masks) and not array.value.is_meta and not is_sharded(array.value)
    if is_plain and held.ndim and not held.flags.writeable:  # of a mapped file: no more than some rows are copied twice
        step = max(1, _PART * len(held) // max(held.nbytes, 1))
        for start in range(0, len(held), step):
            array.value[start : start + step].copy_(from_host(held[start : start + step], source.dtype))
        return
    full = from_host(held, source.dtype)
    if array.mask_of is not None:
        array.mask_of.set_mask(full)
        return
    full = full.to(array.value.dtype)
    live = torch.from_numpy(source.mask()) if isinstance(source, MaskedArray) else torch.ones(full.shape).bool()
    mask = next((mask for mask in masks if mask is not None), None)
    if array.value.is_meta:
        _assign(array, full, live, masks)
    elif mask is None:
        array.value.copy_(as_dtensor_like(full, array.value))
    else:
        mask.mask.copy_(as_dtensor_like(live, mask.mask))
        mask._split(as_dtensor_like(full.to(array.value.device), array.value))


def _copy_sparse(layer: SparseLinear | PackedLinear, source: PlainArray | MaskedArray) -> None:
    """Give a layer in the sparse form the connections of a file, and their values."""
    if isinstance(source, PlainArray):
        held = source.data()
        source = MaskedArray(source.shape, source.dtype, held.reshape(-1), np.arange(held.size))
    pattern = source.pattern()
    state = {
        "weight_values": from_host(source.values, source.dtype).to(layer.weight_values.dtype),
        "indptr": torch.tensor(pattern.indptr),
        "indices": torch.tensor(pattern.indices),
    }
    layer.load_state_dict(state, strict=False, assign=layer.weight_values.is_meta)


def _assign(array: StateArray, full: Tensor, live: Tensor, masks: list[MaskedWeight | None]) -> None:
    """Put a tensor in the place of one on the meta device, in all modules that hold it."""
    value: Tensor = torch.where(live, full, 0) if any(masks) else full
    if isinstance(array.value, nn.Parameter):
        value = nn.Parameter(value, requires_grad=array.value.requires_grad)
    for (module, name), mask in zip(array.users, masks, strict=True):
        if mask is None:
            setattr(module, name, value)
            continue
        path = f"{child_name(name)}." if isinstance(mask, WeightMask) else ""
        state = {name: value, f"{path}mask": live, f"{path}dormant": torch.where(live, 0, full)}
        module.load_state_dict(state, strict=False, assign=True)
