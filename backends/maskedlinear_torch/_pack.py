"""``pack`` and ``unpack``: the sparse layers of a model, exchanged for packed ones without parameters, and back."""

from __future__ import annotations

import torch
from torch import nn

from maskedlinear_torch._dtensors import is_sharded
from maskedlinear_torch._models import masked_layers
from maskedlinear_torch._modules import copy_hooks_and_attributes, replace_modules
from maskedlinear_torch._optim import EXCHANGED
from maskedlinear_torch._packed_layer import PackedLinear
from maskedlinear_torch._sparse_layer import SparseLinear

__all__ = ["pack", "unpack"]


@torch.inference_mode(False)
def pack(model: nn.Module) -> nn.Module:
    """Pack the sparse layers of a model for inference at batch 1 to 4 on the CPU, in place, and return the model.

    Each :class:`SparseLinear` becomes a :class:`PackedLinear`: its values are copied into buffers, and once more into the
    order in which few rows of x are multiplied fastest, where that pays. The layers have no parameters then, do not train,
    and do not follow what is done to the old ones. A state, a file of ``checkpoint.save`` and ``torch.save`` have the same
    weights as before. :func:`unpack` turns them back. Hooks and attributes of the layers are kept.

    Layers in the dense form stay as they are: ``pack(compress(model, "sparse"))`` packs them too, without what is dormant.
    Packing takes some thousand times as long as a product.

    Args:
        model: any module; a ``SparseLinear`` itself is not changed, and its packed form returned.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if it has no sparse layer, or one that cannot be packed: its values are not float32 on the CPU, processes
            share it, it shares parameters with another, or its state or weight has hooks. All are named, and the model is
            left as it was.

    Example:
        >>> layer = SparseLinear(64, 32, mask=torch.rand(32, 64) < 0.2)
        >>> packed = pack(layer)
        >>> len(list(packed.parameters())), packed.pattern == layer.pattern
        (0, True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"pack takes a torch.nn.Module; got {type(model).__name__}")
    layers = {
        key: (layer, facts) for key, (layer, facts) in masked_layers(model).items() if isinstance(layer, SparseLinear)
    }
    if not layers:
        raise ValueError(
            "pack found no SparseLinear in the model: give its masked layers the sparse form first, by "
            'compress(model, "sparse")'
        )
    refused = {
        facts.name or "the layer": why for layer, facts in layers.values() if (why := facts.fixed or _why(layer))
    }
    if refused:
        told = "; ".join(f"{name}: {why}" for name, why in list(refused.items())[:10])
        raise ValueError(f"{len(refused)} of the model's {len(layers)} sparse layers cannot be packed: {told}")
    made: dict[int, nn.Module] = {}
    for key, (layer, _) in layers.items():
        made[key] = copy_hooks_and_attributes(PackedLinear(layer), layer)
        setattr(layer.weight_values, EXCHANGED, True)  # for an optimizer that was made before
    return replace_modules(model, made)


@torch.inference_mode(False)
def unpack(model: nn.Module) -> nn.Module:
    """Turn each ``PackedLinear`` of a model into the ``SparseLinear`` that it was, in place; return the model.

    The parameters are new ones with the same values and ``requires_grad``: make the optimizer afterwards.

    Raises:
        TypeError: if ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unpack takes a torch.nn.Module; got {type(model).__name__}")
    made = {
        id(layer): copy_hooks_and_attributes(layer.to_sparse(), layer)
        for layer in model.modules()
        if isinstance(layer, PackedLinear)
    }
    return replace_modules(model, made)


def _why(layer: SparseLinear) -> str:
    values = layer.weight_values
    if layer._cut is not None or is_sharded(values):
        return "processes share it; pack a whole copy"
    if values.device.type != "cpu":
        return f"it is on {values.device}; packing is for the CPU: move it there before"
    if values.dtype is not torch.float32:
        return f"its values are {values.dtype}, where packed ones are float32: call model.float() before"
    return ""
