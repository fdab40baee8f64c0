"""Layers that processes share, given the other form where they are: under FSDP2 and tensor parallelism."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from maskedlinear_torch._compat import exchange_fsdp_parameter, fsdp_parameter
from maskedlinear_torch._constraints import set_constraints
from maskedlinear_torch._dtensors import as_dtensor_like, is_sharded
from maskedlinear_torch._fsdp import become
from maskedlinear_torch._layer import MaskedLinear
from maskedlinear_torch._modules import LAYERS_OWN
from maskedlinear_torch._sparse_layer import SparseLinear
from maskedlinear_torch._sparse_shards import Cut

__all__ = [
    "become_dense_in_place",
    "become_sparse_in_place",
    "is_fsdp_managed",
    "share_out_alike",
    "why_not_shared",
]


def is_fsdp_managed(module: nn.Module) -> bool:
    """Whether FSDP2 cuts the parameters of a module."""
    return bool(getattr(module, "_is_fsdp_managed_module", False))


def why_not_shared(model: nn.Module, layer: nn.Module, weight: Any) -> str:
    """Return why a layer that processes share must keep its form, or nothing; nothing of any other layer too."""
    name = "weight" if isinstance(layer, MaskedLinear) else "weight_values"
    if is_fsdp_managed(layer):
        found = fsdp_parameter(model, layer, name)
        return "" if found else "FSDP2 cuts its weight, and not as it does alone: compress before fully_shard"
    if not is_sharded(weight) or isinstance(layer, SparseLinear):
        return ""
    if weight.device_mesh.ndim == 1 and any(weight.placements[0].is_shard(dim) for dim in (0, 1)):
        return ""
    return f"its weight is cut as {weight.placements}: compress before parallelize_module"


def share_out_alike(new: MaskedLinear | SparseLinear, old: MaskedLinear | SparseLinear) -> None:
    """Share out a layer that is whole on every process as another form of it is, by tensor parallelism."""
    if isinstance(new, SparseLinear):
        weight: Any = old.weight
        if is_sharded(weight):
            new._cut = Cut(new.pattern, 0 if weight.placements[0].is_shard(0) else 1, weight.device_mesh)
            shared: Tensor = new._cut.shared_out(new.weight_values.detach())
            new.weight_values = nn.Parameter(shared, new.weight_values.requires_grad)
            new._place()
    elif isinstance(old, SparseLinear) and old._cut is not None:
        like = _empty_weight(old)
        mask, requires_grad = new.mask, new.weight.requires_grad
        new.weight = nn.Parameter(as_dtensor_like(new.weight.detach(), like), requires_grad)
        new._buffers["mask"] = as_dtensor_like(mask, like)


def _empty_weight(layer: SparseLinear) -> Tensor:
    """Return a DTensor of a layer's shape, without values, cut as its connections are."""
    from torch.distributed.tensor import Shard, distribute_tensor

    assert layer._cut is not None
    whole = torch.empty(layer.out_features, layer.in_features, device=layer.weight_values.device)
    return distribute_tensor(whole, layer._cut.mesh, [Shard(layer._cut.dim)])


def become_sparse_in_place(model: nn.Module, layer: MaskedLinear) -> None:
    """Give a layer whose parameters FSDP2 cuts the sparse form: the same object, with its hooks and bias.

    What is live is whole on every process until FSDP2 has cut it, in the place of the weight.
    """
    found, kind, bias = fsdp_parameter(model, layer, "weight"), type(layer), layer._parameters["bias"]
    assert found is not None, "asked before"
    new, old = SparseLinear.from_masked(layer), layer._parameters["weight"]
    layer.__class__ = MaskedLinear
    own = vars(layer.release())
    contents = {key: value for key, value in vars(new).items() if key not in own or key in _CONTENTS}
    own.update(contents)
    layer._parameters["bias"] = bias
    _cut_in_place(found, layer, kind, SparseLinear, "weight_values", old)


def become_dense_in_place(model: nn.Module, layer: SparseLinear) -> None:
    """Give a layer whose parameters FSDP2 cuts the dense form: the same object, with its hooks and bias.

    The weight is whole on every process until FSDP2 has cut it, in the place of the values.
    """
    found, kind, old = fsdp_parameter(model, layer, "weight_values"), type(layer), layer.weight_values
    assert found is not None, "asked before"
    weight = nn.Parameter(layer.weight.detach(), requires_grad=old.requires_grad)
    pattern, recipe, init_fan_in, keep_dormant = layer.pattern, layer.recipe, layer.init_fan_in, layer.keep_dormant
    constraints = layer.constraints
    own: Any = vars(layer)
    for name in LAYERS_OWN | {"recipe"}:
        own.pop(name, None)
    own["_parameters"] = {"weight": weight, "bias": layer._parameters["bias"]}
    linear: Any = layer
    linear.__class__ = nn.Linear
    made = MaskedLinear.adopt(linear, torch.from_numpy(pattern.to_mask()), keep_dormant=keep_dormant)
    made.init_fan_in = init_fan_in
    if recipe is not None:
        made.recipe = recipe
    set_constraints(made, constraints)
    _cut_in_place(found, made, kind, MaskedLinear, "weight", old)


def _cut_in_place(
    found: tuple[Any, int], layer: Any, own: type, kind: type[nn.Module], name: str, old: Tensor | None
) -> None:
    vars(layer._parameters[name]).update(vars(old))  # what a user has written on it
    layer.__class__ = own
    become(layer, kind)
    exchange_fsdp_parameter(*found, layer, name)
    vars(layer._parameters[name]).update(vars(old))


_CONTENTS = ("_parameters", "_buffers", "_modules")
