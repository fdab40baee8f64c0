"""Which parameters of a model are weights, what their axes mean, and why others are left out: the table of module types."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from maskedlinear.models import (
    UNKNOWN,
    ModelWeight,
    ParameterUser,
    WeightAxes,
    checked_axes,
    describe_weight,
    is_norm,
    why_left_out,
)
from maskedlinear_torch._dense_parameter import DenseParameter
from maskedlinear_torch._fsdp import reshard, type_of
from maskedlinear_torch._layer import MaskedLinear
from maskedlinear_torch._masked_weight import MaskedWeight
from maskedlinear_torch._sparse_layer import SparseLinear
from maskedlinear_torch._weight_mask import WeightMask, child_name

__all__ = [
    "ComputedWeight",
    "axes_of_mask",
    "computed_weights",
    "mask_of",
    "masked_weights",
    "model_weights",
    "module_of",
    "register_axes",
    "release",
    "walk_masked",
]

_MATRIX = WeightAxes(out_axis=0, in_axis=1)
_EXPERTS = WeightAxes(batch_axis=0, out_axis=1, in_axis=2)
_RECURRENT = {"weight_ih*": _MATRIX, "weight_hh*": _MATRIX, "weight_hr*": _MATRIX}
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)

Axes = Mapping[str, WeightAxes]

_table: dict[type[nn.Module], Axes] = {
    nn.Linear: {"weight": _MATRIX},
    nn.Bilinear: {"weight": WeightAxes(out_axis=0, in_axis=(1, 2))},
    nn.MultiheadAttention: {"in_proj_weight": _MATRIX, "[qkv]_proj_weight": _MATRIX},
    nn.RNNBase: _RECURRENT,
    nn.RNNCellBase: _RECURRENT,
    # Embeddings are masked when they are asked for by name.
    nn.Embedding: {"weight": WeightAxes(out_axis=1, in_axis=0)},
    nn.EmbeddingBag: {"weight": WeightAxes(out_axis=1, in_axis=0)},
}
for _dimensions, (_plain, _transposed) in enumerate(
    ((nn.Conv1d, nn.ConvTranspose1d), (nn.Conv2d, nn.ConvTranspose2d), (nn.Conv3d, nn.ConvTranspose3d)), start=1
):
    _window = tuple(range(2, 2 + _dimensions))
    _table[_plain] = {"weight": WeightAxes(out_axis=0, in_axis=(1, *_window), window_axis=_window)}
    _table[_transposed] = {"weight": WeightAxes(out_axis=1, in_axis=(0, *_window), window_axis=_window)}

# Of modules that have no entry, by their type's name (no framework is imported for it) or by the parameter's.
_PARALLEL_EXPERTS = {"weight": _EXPERTS}
_HEADS = WeightAxes(out_axis=(1, 2), in_axis=0)
_BY_TYPE_NAME: dict[str, Axes] = {
    "Conv1D": {"weight": WeightAxes(out_axis=1, in_axis=0)},
    "JetMoeParallelExperts": _PARALLEL_EXPERTS,
    # Of earlier releases of transformers.
    "GraniteMoeParallelExperts": _PARALLEL_EXPERTS,
    "GraniteMoeSharedParallelExperts": _PARALLEL_EXPERTS,
    "GraniteMoeHybridParallelExperts": _PARALLEL_EXPERTS,
    "XLNetRelativeAttention": {"[qkvr]": _HEADS, "o": WeightAxes(out_axis=0, in_axis=(1, 2))},
}
_TRANSPOSED_EXPERTS = ("Llama4TextExperts",)
_EXPERT_NAMES = ("gate_up_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def register_axes(kind: type[nn.Module], axes: Axes) -> None:
    """Say which parameters of a module type are weights, and what their axes mean; for its subclasses too::

        register_axes(MyAttention, {"qkv_kernel": WeightAxes(in_axis=0, out_axis=(1, 2))})

    Args:
        kind: the type; what it says goes before what its base classes say.
        axes: by the parameter's name, or a shell pattern of names.

    Raises:
        TypeError: if ``kind`` is no module type, or the axes of a name are no ``WeightAxes``.
    """
    _table[kind] = checked_axes(kind, nn.Module, axes)


def module_axes(module: nn.Module, parameter: str, value: Tensor) -> WeightAxes | None:
    """Return what the axes of a module's parameter mean: by the table, or by its name and rank; ``None`` if neither says."""
    for kind in type(module).__mro__:
        for pattern, axes in (_table.get(kind) or _BY_TYPE_NAME.get(kind.__name__) or {}).items():
            if fnmatchcase(parameter, pattern):
                return axes
        if kind in _table:
            return None
    if value.dim() == 2 and (parameter == "weight" or parameter in _EXPERT_NAMES):
        return _MATRIX
    if value.dim() == 3 and parameter in _EXPERT_NAMES:
        turned = getattr(module, "is_transposed", type(module).__name__ in _TRANSPOSED_EXPERTS)
        return WeightAxes(batch_axis=0, out_axis=2, in_axis=1) if turned else _EXPERTS
    return None


def walk_masked(
    module: nn.Module, path: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, MaskedWeight | SparseLinear]]:
    """Yield the masked weights of both forms, by name, a module's own before those of its children.

    Past ``named_modules``, which projects: they are as they stand.
    """
    seen = set() if seen is None else seen
    if id(module) in seen:
        return
    seen.add(id(module))
    if isinstance(module, MaskedWeight | SparseLinear):
        yield mask_name(path, module), module
    for key, child in sorted(module._modules.items(), key=lambda item: not isinstance(item[1], WeightMask)):
        if child is not None:
            yield from walk_masked(child, f"{path}.{key}" if path else key, seen)


def masked_weights(model: nn.Module) -> dict[str, MaskedWeight]:
    """Return the masked weights of a model in the dense form, by name, projected; cut, if FSDP2 has cut the model."""
    reshard(model)
    masks = {name: mask for name, mask in walk_masked(model) if isinstance(mask, MaskedWeight)}
    for mask in masks.values():
        if not torch.compiler.is_compiling() and not mask.is_clean():
            mask.project()
    return masks


def mask_name(path: str, mask: nn.Module) -> str:
    """Return the name of a masked weight, of the path at which its mask is in a model."""
    return _called(path.rpartition(".")[0], mask.owner[1]) if isinstance(mask, WeightMask) else path


def module_of(mask: MaskedWeight) -> nn.Module:
    """Return the module whose weight is masked."""
    return mask.owner[0] if isinstance(mask, WeightMask) else mask


def axes_of_mask(mask: MaskedWeight) -> WeightAxes | None:
    """Return what the axes of a masked weight mean; ``None`` if nobody knows."""
    return mask.weight_axes


def release(mask: MaskedWeight) -> None:
    """Give a masked weight back to its module as it acts, without its dormant values; subclasses, and one that is computed,
    stay as they are."""
    if isinstance(mask, MaskedLinear) and (type_of(mask) is not MaskedLinear or "weight" not in mask._parameters):
        return
    if isinstance(mask, MaskedLinear | WeightMask):
        mask.release()


def model_weights(model: nn.Module) -> list[ModelWeight]:
    """Return the parameters of a model, each once, and what can be said of them."""
    reshard(model)
    weights: dict[int, ModelWeight] = {}
    for path, module in model.named_modules():
        for name, value in module._parameters.items():
            if value is not None and not isinstance(module, WeightMask):
                sparse = module if isinstance(module, SparseLinear) and name == "weight_values" else None
                weight = weights.setdefault(id(value), ModelWeight(value, [], sparse=sparse))
                called, full_name = _called(path, name), f"{path}.{name}" if path else name
                weight.users.append(ParameterUser(path if sparse is not None else called, full_name, module, name))
                weight.mask = mask_of(module, name) if weight.mask is None else weight.mask
    for weight in weights.values():
        if weight.sparse is None:
            describe_weight(weight, _EMBEDDINGS, _why_fixed, _axes_of, _why_left_out)
    return list(weights.values())


class ComputedWeight(NamedTuple):
    """A weight that :class:`StraightThrough` or :class:`TopKAST` computes: its name, its module's, by what and of what."""

    name: str
    module: nn.Module
    parameter: str
    computed: DenseParameter
    dense: Tensor


def computed_weights(model: nn.Module) -> Iterator[ComputedWeight]:
    """Yield the weights that are computed of dense parameters, once for each module that reads one."""
    for path, module in model.named_modules():
        for name, parts in getattr(module, "parametrizations", {}).items():
            computed = next((own for own in parts if isinstance(own, DenseParameter)), None)
            if computed is not None:
                yield ComputedWeight(_called(path, name), module, name, computed, parts.original)


def mask_of(module: nn.Module, parameter: str) -> MaskedWeight | None:
    """Return what has the mask of a module's parameter, if it has one."""
    child = module._modules.get(child_name(parameter))
    if isinstance(child, WeightMask):
        return child
    return module if isinstance(module, MaskedLinear) and parameter == "weight" else None


def _axes_of(user: ParameterUser, value: Tensor) -> tuple[WeightAxes | None, bool]:
    axes = module_axes(user.module, user.parameter, value)
    return axes, axes is not None


def _why_fixed(user: ParameterUser, value: Tensor) -> str:
    module, name = user.module, user.parameter
    if isinstance(value, UninitializedParameter):
        return "without values yet: call the model once before"
    if isinstance(module, nn.utils.parametrize.ParametrizationList):
        method = next((own.method for own in module if isinstance(own, DenseParameter)), None)
        if method is not None:
            return f"the dense parameter of {method}, whose finish() makes a masked weight of it"
        return "computed by a parametrization: remove that before"
    if name.endswith("_orig") and f"{name.removesuffix('_orig')}_mask" in module._buffers:
        return "pruned by torch.nn.utils.prune: call its remove before"
    if (
        name.endswith(("_g", "_v"))
        and f"{name[:-2]}_g" in module._parameters
        and f"{name[:-2]}_v" in module._parameters
    ):
        return "computed by weight_norm: remove that before"
    if isinstance(module, _EMBEDDINGS) and module.sparse:
        return "embedding with sparse gradients"
    return "" if value.is_floating_point() else "not of a floating dtype"


def _why_left_out(user: ParameterUser, weight: ModelWeight, known: bool) -> str:
    value: Tensor = weight.value
    if isinstance(user.module, _EMBEDDINGS):
        return "embedding"
    if is_norm(type(user.module)):
        return "bias" if "bias" in user.parameter else "norm"
    why = why_left_out(user.full_name, value.dim())
    if known:
        return why if why in ("bias", "adapter") else ""
    if why not in ("", UNKNOWN):
        return why
    vector = value.numel() == max(value.shape, default=1)
    return "scale or vector" if vector else f"{UNKNOWN}: tell them by register_axes"


def _called(path: str, name: str) -> str:
    return path if name == "weight" else f"{path}.{name}" if path else name
