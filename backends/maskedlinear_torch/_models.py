"""``compress`` and ``expand``: the masked layers of a whole model, exchanged for those of the other form."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import UninitializedParameter

from maskedlinear.costs import Choice, Costs, Format, Layer, choose_forms, table
from maskedlinear.models import check_patterns
from maskedlinear.pattern import SparsityPattern
from maskedlinear_torch._dtensors import is_sharded
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

__all__ = ["become_sparse", "compress", "expand", "get_forms", "masked_layers"]

_IN_DDP = (
    "DistributedDataParallel sends the gradients of the parameters that it was made with, not of new ones: compress or "
    "expand what it wraps, model.module, and wrap that anew"
)
_BUFFERS = {"mask"}
_PARAMETERS = {"weight", "weight_values", "bias"}
_NO_VALUES = "it has no values yet"


def compress(
    model: nn.Module,
    format: Format = "auto",
    *,
    forms: Mapping[str, Literal["dense", "sparse"]] | None = None,
    patterns: Mapping[str, SparsityPattern] | None = None,
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
    weights shared between layers, cut over processes in several ways, or on the meta device, layers of a model in
    ``DistributedDataParallel`` (compress what it wraps, and wrap that anew), and layers of modules that read weights
    past ``forward`` (``nn.MultiheadAttention``, ``nn.TransformerEncoderLayer``).

    Args:
        model: any module; a ``MaskedLinear`` or ``SparseLinear`` itself is not changed, and its new form returned.
        format: ``"auto"`` for the faster form; or ``"sparse"`` or ``"dense"`` for all layers.
        forms: a choice that was made before, in place of ``format``: ``"dense"`` or ``"sparse"`` by the layers' names, as
            :func:`get_forms` returns it; the layers that it does not name keep their form. Nothing is expected or measured.
            A layer on the meta device takes its form too.
        patterns: the connections of plain ``nn.Linear`` layers by name, which become masked in the form chosen and keep the
            live part of their weight: so a compressed model is made of a fresh one, on the meta device too, where nothing of
            a weight's size is made, and takes the state of the one that was saved. A form is chosen there as it is on the
            CPU, or the device of ``costs``.
        batch: the rows of x in a call, all batch dimensions together.
        training: whether a training step should be fast (forward, backward, Adam), or an inference.
        costs: times measured on your machine, for the layers on the device that they are of; those that the package brings
            for the others and if ``None``, which are one machine's, in float32 on the CPU.
        measure: ``True`` times both forms of a layer here and now where the expected times are within a factor of 2 of each
            other, and where there are none for the device: builds them, and runs each for a tenth of a second or five times,
            whichever takes longer, in the memory that training both takes. Layers that are alike are timed once, those of
            more than 2²⁶ weights not at all. Timed twice, layers that are close may get different forms. ``False`` goes by
            the expected times alone, and ``None`` times only where there are none, unless ``torch.distributed`` is
            initialized: where there are costs, both choose the same in every run and process.
        explain: print for each layer what was chosen and why: bytes, FLOPs, times.

    Raises:
        ValueError: if ``format``, ``forms`` or ``batch`` is none of these; if a pattern is of no plain layer or does not
            fit; if a layer that must keep its form is asked to change it; or if there are no costs for its device and
            nothing is measured. The model is left as it was.
        TypeError: if ``model`` is no module, or a pattern is none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"compress takes a torch.nn.Module; got {type(model).__name__}")
    together = distributed.is_available() and distributed.is_initialized()
    patterns = dict(patterns or {})
    layers = masked_layers(model, patterns, forms or {}, "cpu" if costs is None else costs.device)
    measured = None
    if measure or (measure is None and not together):
        measured = [
            None if own.name in patterns else partial(measured_seconds, cast(MaskedLinear, layer), batch, training)
            for layer, own in layers.values()
        ]
    facts = [facts for _, facts in layers.values()]
    choices = choose_forms(
        facts, format, batch, training, "torch", costs, measured, measure_close=measure is True, forms=forms
    )
    model = _exchange(model, layers, choices, patterns)
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


def get_forms(model: nn.Module) -> dict[str, Literal["dense", "sparse"]]:
    """Return the form of each masked linear layer of a model, by name: what :func:`compress` has chosen, to be given again.

    Plain data, for a file of JSON beside the model's state::

        forms = get_forms(compress(model))
        other = compress(mask_model(make()), forms=forms)  # takes the state of the first, strictly

    Raises:
        TypeError: if ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"get_forms takes a torch.nn.Module; got {type(model).__name__}")
    return {
        name: "sparse" if isinstance(module, SparseLinear) else "dense"
        for name, module in model.named_modules()
        if isinstance(module, MaskedLinear | SparseLinear)
    }


def masked_layers(
    model: nn.Module,
    patterns: Mapping[str, SparsityPattern] | None = None,
    forms: Collection[str] = (),
    meta_device: str = "cpu",
) -> dict[int, tuple[nn.Linear | SparseLinear, Layer]]:
    """Return the masked layers of a model, and those that become masked, and what a choice needs to know of them."""
    patterns = patterns or {}
    for module in model.modules():
        if isinstance(module, MaskedLinear | SparseLinear):
            settle(module)
    held, readers = parameter_users(model), readers_of_weights(model)
    wrapped = any(isinstance(module, DistributedDataParallel) for module in model.modules())
    found: dict[int, tuple[nn.Linear | SparseLinear, Layer]] = {}
    plain: dict[str, tuple[int, int]] = {}
    others: dict[str, str] = {}
    for name, module in model.named_modules():
        is_masked = isinstance(module, MaskedLinear | SparseLinear)
        if not is_masked and type_of(module) is not nn.Linear:
            continue
        weight = _weight(module)
        shared = any(len(held[id(own)]) > 1 for own in module._parameters.values() if own is not None)
        fixed = _why_fixed(module, weight, shared, id(module) in readers) or why_not_shared(model, module, weight)
        if fixed == _NO_VALUES and name in (patterns if not is_masked else forms):
            fixed = ""
        fixed = fixed or (_IN_DDP if wrapped else "")
        if is_masked:
            found[id(module)] = module, _facts(name, module, fixed, meta_device)
            others[name] = "it is masked: its connections are its own"
        elif fixed or is_sharded(weight):
            others[name] = fixed or "processes share it: compress before it is cut"
        else:
            plain[name] = module.out_features, module.in_features
            if isinstance(pattern := patterns.get(name), SparsityPattern):
                found[id(module)] = module, _facts(name, module, fixed, meta_device, pattern)
    check_patterns(patterns, plain, others)
    return found


def _weight(layer: nn.Module) -> Any:
    """Return the parameter of a layer's weights, if they are one."""
    return layer._parameters.get("weight_values" if isinstance(layer, SparseLinear) else "weight")


def _why_fixed(module: nn.Module, weight: Any, shared: bool, read: bool) -> str:
    if type_of(module) not in (MaskedLinear, SparseLinear, nn.Linear) or weight is None:
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
        return _NO_VALUES
    return ""


def _facts(
    name: str,
    layer: nn.Linear | SparseLinear,
    fixed: str,
    meta_device: str,
    pattern: SparsityPattern | None = None,
) -> Layer:
    weight: Tensor
    if isinstance(layer, SparseLinear):
        form, weight, live = "sparse", layer.weight_values, layer.weight_values.numel()
    elif not isinstance(layer, MaskedLinear):
        assert pattern is not None
        form, weight, live = "plain", layer.weight, pattern.nnz
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
        meta_device if weight.is_meta else weight.device.type,
        str(weight.dtype),
        mask_bytes=1 + (weight.itemsize if isinstance(layer, MaskedLinear) and layer.dormant is not None else 0),
    )


@torch.inference_mode(False)  # the new layers may be trained later
def _exchange(
    model: nn.Module,
    layers: dict[int, tuple[nn.Linear | SparseLinear, Layer]],
    choices: list[Choice],
    patterns: Mapping[str, SparsityPattern],
) -> nn.Module:
    made: dict[int, nn.Module] = {}
    for (key, (layer, facts)), choice in zip(layers.items(), choices, strict=True):
        if not isinstance(layer, MaskedLinear | SparseLinear):
            if choice.form == "sparse":
                made[key] = _of_plain(layer, patterns[facts.name])
            else:
                MaskedLinear.adopt(layer, patterns[facts.name].to_mask())
        elif choice.form != facts.form and is_fsdp_managed(layer):
            _exchange_in_place(model, layer)
        elif choice.form != facts.form:
            made[key] = _in_other_form(layer)
    return replace_modules(model, made)


@torch.inference_mode(False)
def become_sparse(model: nn.Module, keys: Collection[int]) -> nn.Module:
    """Give masked layers, by their identity, the sparse form, but for those that must keep theirs; return the model."""
    layers = masked_layers(model).items() if keys else ()
    made = {
        key: _in_other_form(layer)
        for key, (layer, facts) in layers
        if isinstance(layer, MaskedLinear | SparseLinear) and key in keys and not facts.fixed
    }
    return replace_modules(model, made) if made else model


@torch.no_grad()
def _of_plain(layer: nn.Linear, pattern: SparsityPattern) -> nn.Module:
    """Return a sparse layer with some of a plain one's connections; on the meta device one there."""
    weight = layer.weight
    rows, columns = (torch.from_numpy(ends.astype("int64")) for ends in (pattern.rows, pattern.indices))
    values = (
        weight.new_empty(pattern.nnz) if weight.is_meta else weight[rows.to(weight.device), columns.to(weight.device)]
    )
    new = SparseLinear._made(pattern, values, layer.bias).train(layer.training)
    new.weight_values.requires_grad_(weight.requires_grad)
    new._parameters["bias"] = layer._parameters["bias"]
    vars(new.weight_values).update(vars(weight))
    setattr(weight, EXCHANGED, True)
    return copy_hooks_and_attributes(new, layer)


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
