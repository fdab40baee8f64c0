"""The weight of a PyTorch layer that a wiring reads by name, of both forms, as it is now."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from maskedlinear.models import LayerWeight, WeightAxes, choose_weight, matrix_shape, read_matrix
from maskedlinear.pattern import SparsityPattern
from maskedlinear_torch._dtensors import full_tensor
from maskedlinear_torch._masked_weight import MaskedWeight
from maskedlinear_torch._sparse_layer import SparseLinear
from maskedlinear_torch._sparse_shards import live_weights, settle, whole_values
from maskedlinear_torch._weights import axes_of_mask, masked_weights, model_weights, module_of, walk_masked

__all__ = ["find_weight"]


def find_weight(model: Any, name: str | None) -> LayerWeight | None:
    """Return the weight of a layer, or the one that is called ``name`` in a model; ``None`` if it is no module.

    Raises:
        ValueError: if there is no such weight, or several, it is no matrix, or has no values.
    """
    if not isinstance(model, nn.Module):
        return None
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module  # by whose names a checkpoint goes too
    masked: dict[str, Any] = masked_weights(model)
    masked |= {found: layer for found, layer in walk_masked(model) if isinstance(layer, SparseLinear)}
    plain = {weight.name: weight for weight in model_weights(model) if not weight.fixed and weight.sparse is None}
    usual = {found: weight for found, weight in plain.items() if not weight.why and weight.mask is None}
    found = choose_weight(masked, plain if name is not None else usual, name)
    if isinstance(found, SparseLinear):
        return LayerWeight((found.out_features, found.in_features), lambda: _of_sparse(found), _kept(found))
    if isinstance(found, MaskedWeight):
        weight, module = found.weight, module_of(found)
        axes = axes_of_mask(found)
        shape = matrix_shape(tuple(weight.shape), axes)
        return LayerWeight(shape, lambda: _of_masked(found, axes), _kept(module))
    axes, module = found.axes, found.users[0].module
    shape = matrix_shape(tuple(found.value.shape), axes)
    return LayerWeight(shape, lambda: read_matrix(_values(full_tensor(found.value)), None, axes), _kept(module))


def _of_sparse(layer: SparseLinear) -> tuple[SparsityPattern, Any]:
    settle(layer)
    return layer.pattern, _numpy(whole_values(layer.weight_values.detach(), layer._cut))


def _of_masked(masked: MaskedWeight, axes: WeightAxes | None) -> tuple[SparsityPattern | None, Any]:
    if axes == WeightAxes(out_axis=0, in_axis=1):
        with torch.no_grad():
            pattern, values = live_weights(masked)
        return pattern, _numpy(values)
    assert axes is not None, "the shape was found"
    return read_matrix(_values(full_tensor(masked.weight)), full_tensor(masked.known_mask), axes)


def _numpy(values: Tensor) -> Any:
    values = _values(values).cpu()
    return (values.float() if values.itemsize < 4 else values).numpy()


def _values(tensor: Tensor) -> Tensor:
    """Return a tensor without its gradient; of one on the meta device, raise a ``ValueError``."""
    if tensor.is_meta:
        raise ValueError("this layer is on the meta device, and has no weights yet: load its state first")
    return tensor.detach()


def _kept(module: nn.Module) -> Any:
    return vars(module).get("kept_nodes")
