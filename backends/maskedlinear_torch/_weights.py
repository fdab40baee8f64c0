"""Which parameters of a model are weights, what their axes mean, and why others are left out: the table of module types."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from maskedlinear.models import SHARED, UNKNOWN, WeightAxes, checked_axes, is_norm, why_left_out
from maskedlinear_torch._layer import MaskedLinear
from maskedlinear_torch._masked_weight import MaskedWeight
from maskedlinear_torch._sparse_layer import SparseLinear
from maskedlinear_torch._weight_mask import WeightMask, child_name

__all__ = [
    "ModelWeight",
    "axes_of_mask",
    "is_releasable",
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
    _table[_plain] = {"weight": WeightAxes(out_axis=0, in_axis=(1, *_window))}
    _table[_transposed] = {"weight": WeightAxes(out_axis=1, in_axis=(0, *_window))}

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


class User(NamedTuple):
    """A module that holds a parameter: its path in the model, and the parameter's name there."""

    path: str
    module: nn.Module
    parameter: str

    @property
    def name(self) -> str:
        """What the parameter's mask is called: of a ``weight`` as the module is, of any other with its own name."""
        return self.path if self.parameter == "weight_values" else _called(self.path, self.parameter)


@dataclass
class ModelWeight:
    """A parameter of a model.

    Attributes:
        value: the parameter.
        users: the modules that hold it, in the model's order.
        axes: what its axes mean; ``None`` if nobody knows.
        why: why it is not masked unless it is asked for by name; empty if it is.
        fixed: whether it cannot be masked at all.
    """

    value: Tensor
    users: list[User]
    axes: WeightAxes | None = None
    why: str = ""
    fixed: bool = False

    @property
    def name(self) -> str:
        """What its first user calls it."""
        return self.users[0].name

    @property
    def full_name(self) -> str:
        """What ``named_parameters`` calls it."""
        path, _, parameter = self.users[0]
        return f"{path}.{parameter}" if path else parameter

    @property
    def sparse(self) -> SparseLinear | None:
        """The layer, if its weight is in the sparse form."""
        module = self.users[0].module
        return module if isinstance(module, SparseLinear) and self.users[0].parameter == "weight_values" else None

    @property
    def mask(self) -> MaskedWeight | None:
        """Its mask, if it has one."""
        for _, module, parameter in self.users:
            child = module._modules.get(child_name(parameter))
            if isinstance(child, WeightMask):
                return child
            if isinstance(module, MaskedLinear) and parameter == "weight":
                return module
        return None


def axes_of(module: nn.Module, parameter: str, value: Tensor) -> WeightAxes | None:
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
    """Return the masked weights of a model in the dense form, by name, projected."""
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
    if not isinstance(mask, WeightMask):
        return _MATRIX
    module, parameter = mask.owner
    return axes_of(module, parameter, mask.weight)


def is_releasable(mask: MaskedWeight) -> bool:
    """Whether a masked weight can be given back to its module as it acts; not of subclasses, nor of one that is computed."""
    return isinstance(mask, WeightMask) or (type(mask) is MaskedLinear and "weight" in mask._parameters)


def release(mask: MaskedWeight) -> None:
    """Give a masked weight back to its module as it acts; its dormant values are let go."""
    if isinstance(mask, WeightMask | MaskedLinear):
        mask.release()


def model_weights(model: nn.Module) -> list[ModelWeight]:
    """Return the parameters of a model, each once, and what can be said of them."""
    weights: dict[int, ModelWeight] = {}
    for path, module in model.named_modules():
        for name, value in module._parameters.items():
            if value is not None and not isinstance(module, WeightMask):
                weights.setdefault(id(value), ModelWeight(value, [])).users.append(User(path, module, name))
    for weight in weights.values():
        _describe(weight)
    return list(weights.values())


def _describe(weight: ModelWeight) -> None:
    """Find out a parameter's axes, and why it is left out."""
    if weight.sparse is not None:
        return
    reasons = [_why_fixed(user, weight.value) for user in weight.users]
    weight.why = next(filter(None, reasons), "")
    weight.fixed = weight.why != ""
    if weight.fixed:
        return
    layers = [user for user in weight.users if not isinstance(user.module, _EMBEDDINGS)]
    for _, module, parameter in layers or weight.users:
        weight.axes = weight.axes or axes_of(module, parameter, weight.value)
    if layers and len(layers) < len(weight.users):
        weight.why = SHARED
    else:
        weight.why = next(filter(None, (_why_left_out(user, weight) for user in weight.users)), "")


def _why_fixed(user: User, value: Tensor) -> str:
    _, module, name = user
    if isinstance(value, UninitializedParameter):
        return "without values yet: call the model once before"
    if isinstance(module, nn.utils.parametrize.ParametrizationList):
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


def _why_left_out(user: User, weight: ModelWeight) -> str:
    _, module, name = user
    value = weight.value
    if isinstance(module, _EMBEDDINGS):
        return "embedding"
    if is_norm(type(module)):
        return "bias" if "bias" in name else "norm"
    why = why_left_out(f"{user.path}.{name}", value.dim())
    if weight.axes is not None:
        return why if why in ("bias", "adapter") else ""
    if why not in ("", UNKNOWN):
        return why
    vector = value.numel() == max(value.shape, default=1)
    return "scale or vector" if vector else f"{UNKNOWN}: tell them by register_axes"


def _called(path: str, name: str) -> str:
    return path if name == "weight" else f"{path}.{name}" if path else name
