"""A masked model taken apart as Hugging Face's folders have it: the state of a plain model, +0 under the masks, and the
masks by themselves, by the names that weights have in files; and a plain model given its masks again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from maskedlinear.checkpoint._arrays import Form
from maskedlinear.checkpoint._dtypes import BITS
from maskedlinear.models import ModelWeight, ParameterUser, WeightAxes, first_names
from maskedlinear_torch._checkpoint_state import dtype_name, from_host, on_host
from maskedlinear_torch._dtensors import as_dtensor_like, full_tensor
from maskedlinear_torch._hub_names import SavedNames
from maskedlinear_torch._masked_weight import KeepDormant, MaskedWeight
from maskedlinear_torch._models import become_sparse
from maskedlinear_torch._modules import replace_modules
from maskedlinear_torch._packed_layer import PackedLinear
from maskedlinear_torch._sparse_layer import SparseLinear
from maskedlinear_torch._storage import bits_of
from maskedlinear_torch._weight_mask import child_name
from maskedlinear_torch._weights import axes_of_mask, mask_of, model_weights, walk_masked
from maskedlinear_torch._whole import mask_weight, unmask_model

__all__ = [
    "Mask",
    "Masks",
    "as_in_model",
    "as_saved",
    "has_masks",
    "masks_and_plain_state",
    "own_keys",
    "put_on",
    "unmasked_skeleton",
]

Convert = Callable[[Callable[[str], NDArray[Any]]], dict[str, NDArray[Any]]]


def has_masks(model: nn.Module) -> bool:
    """Whether a model has masked weights, of either form.

    Raises:
        ValueError: if it has packed layers, which folders of models do not hold.
    """
    if packed := [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]:
        raise ValueError(
            f"folders of Hugging Face's hold no packed layers; got {len(packed)}, as {packed[0] or 'the model'}: "
            "maskedlinear.torch.unpack(model) before it is saved, and pack it when it is loaded"
        )
    return next(iter(walk_masked(model)), None) is not None


@dataclass(frozen=True)
class _Weight:
    """A masked weight of a model: what its state calls it, under each of its names, and what its mask adds to the state."""

    layer: MaskedWeight | SparseLinear
    names: tuple[str, ...]
    own_keys: tuple[str, ...]


def _masked(model: nn.Module) -> list[_Weight]:
    """Return the masked weights of a model, one that several modules share once.

    Raises:
        ValueError: if a masked weight is computed, by a parametrization, say.
    """
    weights = []
    for weight in model_weights(model):
        layer = weight.sparse or weight.mask
        if layer is not None:
            names = tuple(_plain_name(user) for user in weight.users)
            keys = [key for user in weight.users for key in _keys_of(user)]
            weights.append(_Weight(layer, names, tuple(keys)))
    known = {id(weight.layer._parameters.get("weight", weight.layer)) for weight in weights}
    for name, layer in walk_masked(model):
        if id(layer._parameters.get("weight", layer)) not in known:
            raise ValueError(
                f"the weight of {name or 'the model'} is computed, by a parametrization, say, which from_pretrained does "
                "not make again: remove that, or call unmask_model, before the model is saved"
            )
    return weights


def _plain_name(user: ParameterUser) -> str:
    """Return what a plain model's state calls a parameter."""
    return _prefix_of(user) + ("weight" if user.parameter == "weight_values" else user.parameter)


def _prefix_of(user: ParameterUser) -> str:
    """Return how the keys of a parameter's module begin."""
    return user.full_name.removesuffix(user.parameter)


def _keys_of(user: ParameterUser) -> tuple[str, ...]:
    """Return the keys by which the state of a masked weight exceeds a plain module's."""
    prefix = _prefix_of(user)
    if isinstance(user.module, SparseLinear):
        return tuple(prefix + key for key in ("weight_values", "indptr", "indices"))
    if not isinstance(user.module, MaskedWeight):
        prefix += f"{child_name(user.parameter)}."
    return f"{prefix}mask", f"{prefix}dormant"


def own_keys(names: Iterable[str]) -> set[str]:
    """Return the keys that a state of masked weights of these names has beyond a plain model's, whatever their form."""
    keys: set[str] = set()
    for name in names:
        path, _, parameter = name.rpartition(".")
        prefix = f"{path}." if path else ""
        ends = ("mask", "dormant", "weight_values", "indptr", "indices")
        keys.update(prefix + end for end in ends)
        keys.update(f"{prefix}{child_name(parameter)}.{end}" for end in ends[:2])
    return keys


@dataclass(frozen=True)
class Mask:
    """The mask of a weight, and what belongs to it.

    Attributes:
        live: the mask, of the weight's shape.
        form: ``"dense"`` or ``"sparse"``.
        keep_dormant: as in :class:`MaskedLinear`.
        hidden: what is dormant, of the weight's shape, as NumPy holds it in files; ``None`` if it is not saved.
        dtype: safetensors' name of what is dormant.
        axes: what the weight's axes mean; ``None`` if nobody knows.
    """

    live: NDArray[np.bool_]
    form: Form = "dense"
    keep_dormant: KeepDormant = True
    hidden: NDArray[Any] | None = None
    dtype: str = ""
    axes: WeightAxes | None = None


Masks = Mapping[str, Mask]  # by the weight's name


@torch.no_grad()
def masks_and_plain_state(
    model: nn.Module, state: Mapping[str, Any] | None = None, *, dormant: bool = False, whole: bool = False
) -> tuple[dict[str, Mask], dict[str, Any]]:
    """Return the masks of a model, and the state of the plain model that it is a masked one of.

    Args:
        model: a model with masked weights.
        state: its state, if it is not as the model has it now: gathered from processes, say, or an average.
        dormant: whether what is dormant is among the masks.
        whole: whether the state keeps what the masked model's own has more than a plain one's.

    Raises:
        ValueError: if a masked weight is computed, or has no values here.
    """
    masks: dict[str, Mask] = {}
    if state is not None and not state:  # of a process that leaves saving to another, which has gathered it
        return masks, {}
    state = dict(model.state_dict() if state is None else state)
    for weight in _masked(model):
        layer, keys = weight.layer, weight.own_keys
        if isinstance(layer, SparseLinear):
            if keys[0] in state:
                state |= dict.fromkeys(weight.names, _dense(layer, state[keys[0]]))
            mask = Mask(layer.pattern.to_mask(), "sparse", layer.keep_dormant, axes=WeightAxes(out_axis=0, in_axis=1))
        else:
            live = full_tensor(state.get(keys[0], layer.known_mask))
            if live.is_meta:
                raise ValueError(
                    f"the mask of {weight.names[0]} has no values here: load the model whole before it is saved"
                )
            hidden = _masked_in(state, weight.names, live, state.get(keys[1], layer.dormant))
            mask = Mask(on_host(live), keep_dormant=layer.keep_dormant, axes=axes_of_mask(layer))
            if dormant and hidden is not None:
                mask = replace(mask, hidden=on_host(hidden), dtype=dtype_name(hidden.dtype))
        masks[weight.names[0]] = mask
        for key in () if whole else keys:
            state.pop(key, None)
    return masks, state


def as_saved(model: nn.Module, masks: Masks, state: Mapping[str, Any]) -> dict[str, Mask]:
    """Return masks by the names that weights have in the files of transformers, and as these are cut there.

    Args:
        model: of transformers.
        masks: by the model's own names.
        state: the plain model's.
    """
    names = SavedNames(model, _shapes(state))
    found = {names.renamed[name]: mask for name, mask in masks.items() if name in names.renamed}
    for block in names.blocks(model=masks.keys()):
        there = {name: masks[name] for name in block.shapes if name in masks}
        found |= _converted(block.to_saved, there, block.shapes)
    return found


def as_in_model(model: nn.Module, saved: Masks, prefix: str) -> tuple[dict[str, Mask], list[str]]:
    """Return what :func:`as_saved` made of masks by the names of a model's weights, and which of them it has not.

    Args:
        model: of transformers, without masks.
        saved: by the names in files.
        prefix: a name before those of weights, which the files or the model may lack: ``"bert"``, of a model with a head of
            which the file has the base, and of a base of which it has a head too.
    """
    shapes = _shapes(model.state_dict(keep_vars=True))
    names = SavedNames(model, shapes)
    own = {other: name for name, other in names.renamed.items()}
    known = own.keys() | names.converted | shapes.keys()
    called: dict[str, str] = {}
    for name in saved:
        possible = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        called |= {other: name for other in [next((other for other in possible if other in known), "")] if other}
    found: dict[str, Mask] = {}
    used: set[str] = set()
    for other, name in called.items():
        target = own.get(other, other)
        if saved[name].live.shape == shapes.get(target):
            found[target] = saved[name]
            used.add(name)
    for block in names.blocks(saved=called.keys() - own.keys()):
        there = {other: saved[called[other]] for other in block.saved if other in called}
        if any(mask.live.shape != block.saved[other].shape for other, mask in there.items()):
            continue
        used.update(called[other] for other in there)
        converted = _converted(block.to_model, there, {other: places.shape for other, places in block.saved.items()})
        partly = len(there) < len(block.saved)  # then a full mask is that of a weight without one
        found |= {name: mask for name, mask in converted.items() if not (partly and mask.live.all())}
    return found, sorted(saved.keys() - used)


def _converted(convert: Convert, there: Masks, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Mask]:
    """Return the masks on the other side of a block: full where there are none on this side, and nothing dormant."""
    first = next(iter(there.values()))
    form: Form = "sparse" if all(mask.form == "sparse" for mask in there.values()) else "dense"
    live = convert(lambda name: there[name].live if name in there else np.ones(shapes[name], np.bool_))
    dtype = next((mask.dtype for mask in there.values() if mask.hidden is not None), "")
    if not dtype:
        return {name: Mask(array, form, first.keep_dormant) for name, array in live.items()}

    def hidden_of(name: str) -> NDArray[Any]:
        mask = there.get(name)
        return np.zeros(shapes[name], BITS[dtype]) if mask is None or mask.hidden is None else mask.hidden

    hidden = convert(hidden_of)
    return {name: Mask(array, form, first.keep_dormant, hidden[name], dtype) for name, array in live.items()}


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}


@torch.no_grad()
def put_on(model: nn.Module, masks: Masks) -> None:
    """Mask a plain model that has its weights, in place.

    Args:
        model: any module, without masks.
        masks: by the names of its weights; those of other weights are left out.

    Raises:
        ValueError: if weights are not 0 under their masks, or have no values here; the model is as it was.
    """
    weights = {_plain_name(user): weight for weight in model_weights(model) for user in weight.users}
    _check({name: weights[name] for name in masks}, masks)
    sparse: set[int] = set()
    for name, mask in masks.items():
        weight = weights[name]
        mask_weight(weight, torch.from_numpy(mask.live), mask.keep_dormant)
        layer = mask_of(weight.users[0].module, weight.users[0].parameter)
        if mask.hidden is not None and layer is not None:
            layer._set_dormant(from_host(mask.hidden, mask.dtype).to(layer.weight))
        if mask.form == "sparse":
            sparse.update(id(user.module) for user in weight.users)
    become_sparse(model, sparse)
    if left := [name for name, layer in walk_masked(model) if id(layer) in sparse]:
        warnings.warn(
            f"layers that were saved in the sparse form have the dense one: {first_names(left)}", stacklevel=2
        )


def _check(weights: Mapping[str, ModelWeight], masks: Masks) -> None:
    """Raise a ``ValueError`` if weights cannot have these masks."""
    plain = 'delete "quantization_config" from config.json to load them as plain ones'
    if absent := [name for name, weight in weights.items() if weight.value.is_meta]:
        raise ValueError(
            f"weights that are offloaded to the CPU or the disk cannot be masked: {first_names(absent)}: choose a "
            f"device_map that offloads nothing, or {plain}, whose outputs are the same"
        )
    if fixed := [f"{name} ({weight.why})" for name, weight in weights.items() if weight.fixed]:
        raise ValueError(f"weights cannot be masked: {first_names(fixed)}: {plain}")
    drifted = []
    for name, weight in weights.items():
        beneath = torch.from_numpy(~masks[name].live).to(weight.value.device)
        if bool((full_tensor(weight.value)[beneath] != 0).any()):
            drifted.append(name)
    if drifted:
        raise ValueError(
            f"weights are 0 under their masks; got others in {first_names(drifted)}: they were saved without maskedlinear, "
            f"which has left them masks that are not theirs: {plain}"
        )


def _dense(layer: SparseLinear, values: Tensor) -> Tensor:
    """Return the weight of a sparse layer as a whole matrix, with the values that a state has."""
    flat = values.new_zeros(layer.out_features * layer.in_features)
    return flat.index_copy(0, torch.from_numpy(layer.pattern.places).to(values.device), values.detach()).view(
        layer.out_features, layer.in_features
    )


def _masked_in(state: dict[str, Any], names: tuple[str, ...], mask: Tensor, hidden: Tensor | None) -> Tensor | None:
    """Set a weight of a state to +0 under its mask, if it is not; return what is dormant, what stood there included."""
    weight = next((state[name] for name in names if name in state), None)
    if weight is None or weight.is_meta:
        return hidden
    live = as_dtensor_like(mask.to(weight.device), weight)
    beneath = torch.where(live, 0, weight.detach())
    if not bool((bits_of(full_tensor(beneath)) != 0).any()):
        return hidden
    masked = torch.where(live, weight.detach(), 0)
    state |= {name: masked for name in names if name in state}
    beneath = full_tensor(beneath)
    return beneath if hidden is None else torch.where(bits_of(beneath) != 0, beneath, full_tensor(hidden).to(beneath))


def unmasked_skeleton(model: nn.Module) -> None:
    """Turn a model that has no values yet, and is masked by its own constructor, into the plain one that a folder has.

    Raises:
        ValueError: if a masked layer is of a type of one's own.
    """
    if not has_masks(model):
        return
    unmask_model(model)
    made = {id(module): _linear_like(module) for module in model.modules() if isinstance(module, SparseLinear)}
    replace_modules(model, made)
    if left := [name for name, _ in walk_masked(model)]:
        raise ValueError(f"masked layers of types of one's own are not loaded by from_pretrained: {first_names(left)}")


def _linear_like(layer: SparseLinear) -> nn.Module:
    values = layer.weight_values
    return nn.Linear(
        layer.in_features, layer.out_features, layer.bias is not None, device=values.device, dtype=values.dtype
    )
