"""``compress`` and ``expand``: the masked layers of a whole model, exchanged for those of the other form."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parameter import UninitializedParameter

from maskedlinear.costs import Choice, Costs, Format, Layer, choose_forms, table
from maskedlinear_torch._fsdp import type_of
from maskedlinear_torch._layer import MaskedLinear
from maskedlinear_torch._modules import (
    copy_hooks_and_attributes,
    has_gradient_hooks,
    has_state_hooks,
    parameter_users,
    readers_of_weights,
    replace_modules,
)
from maskedlinear_torch._optim import EXCHANGED
from maskedlinear_torch._sharded_forms import (
    become_dense_in_place,
    become_sparse_in_place,
    is_fsdp_managed,
    share_out_alike,
    why_not_shared,
)
from maskedlinear_torch._sparse_layer import SparseLinear
from maskedlinear_torch._sparse_shards import settle
from maskedlinear_torch._trial import measured_seconds

__all__ = ["become_sparse", "compress", "expand"]

_BUFFERS = {"mask"}
_PARAMETERS = {"weight", "weight_values", "bias"}


def compress(
    model: nn.Module,
    format: Format = "auto",
    *,
    batch: int = 128,
    training: bool = True,
    costs: Costs | None = None,
    measure: bool | None = None,
    explain: bool = False,
) -> nn.Module:
    """Give each masked layer of a model the form that is faster, in place, and return the model.

    A layer used in several places is exchanged in all of them. Live weights, device, dtype, ``requires_grad``, training
    state, hooks of calls, attributes of the layer and of its weight are kept, and the bias stays the same parameter. The
    weights are a new parameter, without a gradient: make the optimizer afterwards. Dormant weights are lost where a layer
    becomes sparse.

    Layers that processes share take the other form too: FSDP2 cuts their new weights in the place of the old, and the layers
    stay the same objects; tensor parallelism shares out the rows or columns that it had. All processes call this, with
    ``format="sparse"`` or ``"dense"`` or the same ``costs``. Each gathers one layer at a time: of a dense one what is live,
    where FSDP2 or the column-wise plan has cut it, else the whole weight; of a sparse one its values, and makes the whole
    weight.

    These keep their form, and ``explain`` says why: subclasses, compiled and parametrized layers and those whose
    ``forward`` was replaced, whose state or weight has hooks, or which have parameters, buffers or modules of their own;
    weights shared between layers, cut over processes in several ways, or on the meta device, and layers of modules that
    read weights past ``forward``
    (``nn.MultiheadAttention``, ``nn.TransformerEncoderLayer``).

    Args:
        model: any module; a ``MaskedLinear`` or ``SparseLinear`` itself is not changed, and its new form returned.
        format: ``"auto"`` for the faster form; or ``"sparse"`` or ``"dense"`` for all layers.
        batch: the rows of x in a call, all batch dimensions together.
        training: whether a training step should be fast (forward, backward, Adam), or an inference.
        costs: times measured on your machine, for the layers on the device that they are of; those that the package brings
            for the others and if ``None``, which are one machine's, in float32 on the CPU.
        measure: where the expected times are within a factor of 2 of each other, and where there are none for the device,
            time both forms of the layer here and now: build them, and run each for a tenth of a second or five times,
            whichever takes longer, in the memory that training both takes. Layers that are alike are timed once, those of
            more than 2²⁶ weights not at all. If ``False``, the choice is the same wherever the costs are, as processes need
            it that train one model together: so ``None`` measures unless ``torch.distributed`` is initialized.
        explain: print for each layer what was chosen and why: bytes, FLOPs, times.

    Raises:
        ValueError: if ``format`` or ``batch`` is none of these; if a layer that must keep its form is asked to change it; or
            if there are no costs for its device and nothing is measured. The model is left as it was.
        TypeError: if ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"compress takes a torch.nn.Module; got {type(model).__name__}")
    if measure is None:
        measure = not (distributed.is_available() and distributed.is_initialized())
    layers = _masked_layers(model)
    measured = [partial(measured_seconds, layer, batch, training) for layer, _ in layers.values()] if measure else None
    facts = [facts for _, facts in layers.values()]
    choices = choose_forms(facts, format, batch, training, "torch", costs, measured)
    model = _exchange(model, layers, choices)
    if explain:
        print(table(choices, batch, training))
    return model


def expand(model: nn.Module) -> nn.Module:
    """Turn each ``SparseLinear`` of a model into a ``MaskedLinear`` with the same outputs, in place; return the model.

    The form whose masks can change. As with :func:`compress`, the weights are new parameters.

    Raises:
        ValueError: if a layer must keep its form; the model is left as it was.
        TypeError: if ``model`` is no module.
    """
    return compress(model, "dense")


def _masked_layers(model: nn.Module) -> dict[int, tuple[MaskedLinear | SparseLinear, Layer]]:
    """Return the masked layers of a model, and what a choice needs to know of them."""
    for module in model.modules():
        if isinstance(module, MaskedLinear | SparseLinear):
            settle(module)
    held, readers = parameter_users(model), readers_of_weights(model)
    found: dict[int, tuple[MaskedLinear | SparseLinear, Layer]] = {}
    for name, module in model.named_modules():
        if isinstance(module, MaskedLinear | SparseLinear):
            weight = _weight(module)
            shared = any(len(held[id(own)]) > 1 for own in module._parameters.values() if own is not None)
            fixed = _why_fixed(module, weight, shared, id(module) in readers) or why_not_shared(model, module, weight)
            found[id(module)] = module, _facts(name, module, fixed)
    return found


def _weight(layer: nn.Module) -> Any:
    """Return the parameter of a layer's weights, if they are one."""
    return layer._parameters.get("weight" if isinstance(layer, MaskedLinear) else "weight_values")


def _why_fixed(module: nn.Module, weight: Any, shared: bool, read: bool) -> str:
    if type_of(module) not in (MaskedLinear, SparseLinear) or weight is None:
        return f"it is a {type_of(module).__name__} whose weight or forward is its own"
    if "forward" in vars(module):
        return "its forward was replaced"
    if module._compiled_call_impl is not None:
        return "it is compiled"
    if has_state_hooks(module) or has_gradient_hooks(weight):
        return "its state or its weight has hooks"
    if module._modules or set(module._buffers) - _BUFFERS or set(module._parameters) - _PARAMETERS:
        return "it has parameters, buffers or modules of its own"
    if shared:
        return "it shares parameters with another layer"
    if read:
        return "the module around it reads its weight"
    if weight.is_meta or isinstance(weight, UninitializedParameter):
        return "it has no values yet"
    return ""


def _facts(name: str, layer: MaskedLinear | SparseLinear, fixed: str) -> Layer:
    weight: Tensor
    if isinstance(layer, SparseLinear):
        form, weight, live = "sparse", layer.weight_values, layer.weight_values.numel()
    else:
        form, weight, live = "dense", layer.weight, 0 if layer.mask.is_meta else int(layer.mask.sum())
    return Layer(
        name,
        layer.out_features,
        layer.in_features,
        live,
        weight.itemsize,
        form,
        fixed,
        weight.device.type,
        str(weight.dtype),
        mask_bytes=1 + (weight.itemsize if isinstance(layer, MaskedLinear) and layer.dormant is not None else 0),
    )


@torch.inference_mode(False)  # the new layers may be trained later
def _exchange(
    model: nn.Module, layers: dict[int, tuple[MaskedLinear | SparseLinear, Layer]], choices: list[Choice]
) -> nn.Module:
    made: dict[int, nn.Module] = {}
    for (key, (layer, facts)), choice in zip(layers.items(), choices, strict=True):
        if choice.form != facts.form and is_fsdp_managed(layer):
            _exchange_in_place(model, layer)
        elif choice.form != facts.form:
            made[key] = _in_other_form(layer)
    return replace_modules(model, made)


@torch.inference_mode(False)
def become_sparse(model: nn.Module, keys: Collection[int]) -> nn.Module:
    """Give masked layers, by their identity, the sparse form, but for those that must keep theirs; return the model."""
    layers = _masked_layers(model).items() if keys else ()
    made = {key: _in_other_form(layer) for key, (layer, facts) in layers if key in keys and not facts.fixed}
    return replace_modules(model, made) if made else model


def _exchange_in_place(model: nn.Module, layer: MaskedLinear | SparseLinear) -> None:
    old = _weight(layer)
    if isinstance(layer, SparseLinear):
        become_dense_in_place(model, layer)
    else:
        become_sparse_in_place(model, layer)
    setattr(old, EXCHANGED, True)


def _in_other_form(layer: MaskedLinear | SparseLinear) -> nn.Module:
    new = layer.to_masked() if isinstance(layer, SparseLinear) else SparseLinear.from_masked(layer)
    share_out_alike(new, layer)
    new._parameters["bias"] = layer._parameters["bias"]
    vars(_weight(new)).update(vars(_weight(layer)))  # what a user has written on it
    setattr(_weight(layer), EXCHANGED, True)  # for an optimizer that was made before
    return copy_hooks_and_attributes(new, layer)
