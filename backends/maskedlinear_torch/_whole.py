"""Whole models: their linear layers masked in place and back, pruned, their masks read and set, and a summary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from maskedlinear import pruning
from maskedlinear._progress import Progress
from maskedlinear.masks import as_mask
from maskedlinear.pruning._layers import Include, Scoring, check_known, matches, score_layers, select_weights
from maskedlinear.summaries import ModelSummary, WeightSummary
from maskedlinear_torch._dtensors import full_tensor
from maskedlinear_torch._functional import as_tensor, check_dense
from maskedlinear_torch._layer import MaskedLinear
from maskedlinear_torch._products import DevicePattern
from maskedlinear_torch._sparse_layer import SparseLinear

__all__ = ["get_masks", "mask_model", "prune_model", "set_masks", "summary", "unmask_model"]

Masks = Mapping[str, Any]


def mask_model(model: nn.Module, masks: Masks | None = None, *, include: Include = None) -> nn.Module:
    """Turn linear layers of a model into :class:`MaskedLinear`, in place, and return the model.

    The layers stay the same objects with the same parameters: shared layers and weights, hooks, device, dtype, training
    state, gradients and an optimizer that holds them are kept, and with full masks every output. Each ``nn.Linear`` is
    meant, wherever it is nested, and whoever reads its weight; subclasses of it (``out_proj`` of
    ``nn.MultiheadAttention`` is one) are left out.

    Args:
        model: any module, a single ``nn.Linear`` too.
        masks: a mask for each layer by name, shape ``(out, in)``, booleans or 0s and 1s; without ``include`` only these
            layers are turned. Layers without one get the full mask.
        include: which layers: a shell pattern of names (``"encoder.*"``), a sequence of them, or a function of name and
            layer.

    Raises:
        ValueError: if a mask is of a layer that there is not, or that cannot be turned, has another shape, or holds anything
            but 0 and 1; if a pattern means no layer. The model is left as it was.
        TypeError: if ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"mask_model takes a torch.nn.Module; got {type(model).__name__}")
    masks = dict(masks or {})
    possible = {
        name: layer
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear and "weight" in layer._parameters
    }
    layers = select_weights(model, possible, masks, include)
    made = {name: _checked(masks[name], layer.weight, name) for name, layer in layers.items() if name in masks}
    _check_one_a_weight(made, layers)
    for name, layer in layers.items():
        MaskedLinear.adopt(layer, made.get(name))
    return model


def unmask_model(model: nn.Module, *, include: Include = None) -> nn.Module:
    """Turn :class:`MaskedLinear` layers back into ``nn.Linear``, in place, with the same outputs; return the model.

    Their dormant values are let go; everything else is kept, as by :func:`mask_model`. Subclasses, and layers whose weight
    is computed, stay as they are.

    Args:
        model: any module.
        include: which layers, as in :func:`mask_model`.

    Raises:
        TypeError: if ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unmask_model takes a torch.nn.Module; got {type(model).__name__}")
    layers = {
        name: layer
        for name, layer in _masked(model).items()
        if type(layer) is MaskedLinear and "weight" in layer._parameters and matches(name, layer, include)
    }
    for layer in layers.values():
        layer.release()
    return model


def get_masks(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the mask of each :class:`MaskedLinear`, by the layer's name, for :func:`set_masks` to bring back."""
    return {name: layer.mask.clone() for name, layer in _masked(model).items()}


def set_masks(model: nn.Module, masks: Masks) -> None:
    """Set the masks of layers, by name; dormant values come back, so an earlier mask brings the earlier outputs back.

    Args:
        model: any module; an average of a model (``torch.optim.swa_utils.AveragedModel``) takes the masks of the model.
        masks: by name, shape ``(out, in)``, booleans or 0s and 1s; other layers keep theirs.

    Raises:
        ValueError: if a mask is of a layer that there is not, has another shape, or holds anything but 0 and 1, or if layers
            that share a weight are given different ones; the model is left as it was.
    """
    layers = _masked(model)
    if not any(name in layers for name in masks):  # those of the model that an average, DDP or a compiled module holds
        held = {_name_inside(name): name for name in layers}
        masks = {held.get(_name_inside(name), name): mask for name, mask in masks.items()}
    check_known("masks", masks, list(layers))
    checked = {name: _checked(mask, layers[name].weight, name) for name, mask in masks.items()}
    _check_one_a_weight(checked, layers)
    for name, mask in checked.items():
        layers[name].set_mask(mask)


def prune_model(
    model: nn.Module,
    sparsity: float,
    *,
    score: Scoring = "magnitude",
    scope: pruning.Scope = "global",
    include: Include = None,
    block: tuple[int, int] | None = None,
    seed: int = 0,
    on_empty: Any = "raise",
    progress: Progress = False,
) -> dict[str, Tensor]:
    """Prune the masked layers of a model to a sparsity, beyond what is masked already.

    Args:
        model: a module with :class:`MaskedLinear` layers; :func:`mask_model` makes them.
        sparsity: the fraction of masked connections afterwards, in [0, 1]; see :func:`maskedlinear.pruning.prune`.
        score: ``"magnitude"``, ``"random"``, ``"snip"`` or ``"taylor"`` (these two read ``weight.grad``); a function of
            weight and gradient that returns scores of their shape; or the scores of each layer by name, as those that
            :func:`maskedlinear.pruning.movement` adds up over steps.
        scope: ``"global"``, ``"layer"`` or ``"erdos_renyi"``.
        include: which layers, as in :func:`mask_model`.
        block: prune whole blocks of ``(outputs, inputs)``.
        seed: for ``"random"``.
        on_empty: ``"raise"`` or ``"allow"`` where a layer would lose its last connection.
        progress: as in :func:`maskedlinear.pruning.prune`.

    Returns:
        The masks before, for :func:`set_masks`.

    Raises:
        ValueError: as by :func:`maskedlinear.pruning.prune`; if there is no masked layer; or if a gradient is missing. The
            model is left as it was.
    """
    layers = {name: layer for name, layer in _one_a_weight(model).items() if matches(name, layer, include)}
    if not layers:
        raise ValueError("prune_model prunes MaskedLinear layers, and there is none: make them with mask_model(model)")
    weights = {name: full_tensor(layer.weight.detach()) for name, layer in layers.items()}
    gradients = {
        name: None if layer.weight.grad is None else full_tensor(layer.weight.grad) for name, layer in layers.items()
    }
    scores = score_layers(score, weights, gradients, seed)
    before = {name: layer.mask.clone() for name, layer in layers.items()}
    made = pruning.prune(
        scores,
        sparsity=sparsity,
        masks={k: full_tensor(m) for k, m in before.items()},
        scope=scope,
        block=block,
        on_empty=on_empty,
        progress=progress,
    )
    for name, layer in layers.items():
        layer.set_mask(made[name])
    return before


def summary(model: nn.Module) -> ModelSummary:
    """Return a table of a model's masked layers, of both forms: shape, sparsity, dead nodes, bytes, FLOPs."""
    rows = []
    for name, layer in model.named_modules():
        if isinstance(layer, MaskedLinear | SparseLinear):
            tensors = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
            if isinstance(layer, SparseLinear):
                tensors += [getattr(layer, name) for name in DevicePattern._fields]
            nbytes = sum(tensor.nbytes for tensor in tensors)
            if isinstance(layer, SparseLinear):
                rows.append(WeightSummary.of_pattern(name, layer.pattern, nbytes))
            else:
                rows.append(WeightSummary.of_mask(name, full_tensor(layer.mask).cpu().numpy(), nbytes))
    return ModelSummary(rows)


def _name_inside(name: str) -> str:
    """Return the name of a layer in the model that an average, DDP or a compiled module holds."""
    parts = name.split(".")
    while parts and parts[0] in ("module", "_orig_mod"):
        parts.pop(0)
    return ".".join(parts)


def _masked(model: nn.Module) -> dict[str, MaskedLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, MaskedLinear)}


def _one_a_weight(model: nn.Module) -> dict[str, MaskedLinear]:
    """Return the masked layers, of those that share a weight, and with it its mask, the first."""
    layers: dict[int, tuple[str, MaskedLinear]] = {}
    for name, layer in _masked(model).items():
        layers.setdefault(id(layer._parameters.get("weight", layer)), (name, layer))
    return dict(layers.values())


def _check_one_a_weight(masks: Masks, layers: Mapping[str, nn.Linear]) -> None:
    """Raise a ``ValueError`` if layers that share a weight are given different masks."""
    first: dict[int, str] = {}
    for name, mask in masks.items():
        other = first.setdefault(id(layers[name].weight), name)
        if other != name and not torch.equal(mask, masks[other].to(mask.device)):
            raise ValueError(f"a weight has one mask, whoever shares it; got different ones for {other} and {name}")


def _checked(mask: Any, weight: Tensor, name: str) -> Tensor:
    if isinstance(mask, Tensor):
        check_dense(mask)
    try:
        return as_tensor(as_mask(full_tensor(mask) if isinstance(mask, Tensor) else mask, weight.shape))
    except ValueError as error:
        raise ValueError(f"the mask of {name or 'the layer'}: {error}") from error
