"""Whole models: their weights masked in place and back, pruned, their masks read and set, and a summary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from maskedlinear import pruning
from maskedlinear._progress import Progress
from maskedlinear.models import (
    ModelSummary,
    ModelWeight,
    Of,
    Prunable,
    UnmaskedParameter,
    WeightAxes,
    WeightSummary,
    check_of,
    check_one_mask,
    first_names,
    number_effective,
    prune_weights,
    warn_of_cut,
    warn_of_left_out,
    warn_of_lost,
    warn_of_sparse,
    weights_to_mask,
    zeros_left,
)
from maskedlinear.pattern import SparsityPattern
from maskedlinear.pruning._layers import Include, Scoring, check_known, matches, pattern_of
from maskedlinear_torch._chain import chain_of
from maskedlinear_torch._constraints import check_keeps_fixed, fixed_entries, refuse_fixed_and_cut
from maskedlinear_torch._cut_weight import like_own
from maskedlinear_torch._dtensors import as_dtensor_like, is_sharded, local_part
from maskedlinear_torch._fsdp import type_of
from maskedlinear_torch._functional import checked_mask
from maskedlinear_torch._layer import MaskedLinear
from maskedlinear_torch._masked_weight import KeepDormant, MaskedWeight, check_keep_dormant
from maskedlinear_torch._products import DevicePattern
from maskedlinear_torch._ranks import Group, Ranks, averaged, check_alike, group_of
from maskedlinear_torch._reach import UnknownPathsError, connections_on_paths
from maskedlinear_torch._sparse_layer import SparseLinear
from maskedlinear_torch._sparse_shards import refuse_cut_twice
from maskedlinear_torch._together import count_nodes, cut_like, new_masks, places_of
from maskedlinear_torch._weight_mask import WeightMask
from maskedlinear_torch._weights import (
    axes_of_mask,
    computed_weights,
    masked_weights,
    model_weights,
    module_of,
    release,
    walk_masked,
)

__all__ = [
    "get_masks",
    "mask_model",
    "mask_weight",
    "one_a_weight",
    "prune_model",
    "set_masks",
    "summary",
    "unmask_model",
]

Masks = Mapping[str, Any]

_DORMANT_DIFFER = (
    "dormant values would come back that differ, which DistributedDataParallel does not send: load the state of one process "
    "in all (load_state_dict, or set_model_state_dict with broadcast_from_rank0=True), or seed all processes alike"
)
_WHOLE = "_maskedlinear_whole"  # the attribute of a model all weights of which were masked


def mask_model(
    model: nn.Module, masks: Masks | None = None, *, include: Include = None, keep_dormant: KeepDormant = True
) -> nn.Module:
    """Give weights of a model masks, in place, and return the model.

    Masked are matrices and kernels, wherever they are and whoever reads them: of linear layers, convolutions, attention,
    recurrent cells, experts and routers, ``Conv1D`` of Hugging Face; of module types that are not known, parameters of two
    dimensions called ``weight`` (:func:`register_axes` adds types). Never biases, norms, scales, positions or adapters; nor
    embeddings, and what shares its weight with one. :func:`summary` lists what is left out, and why; if a user would expect
    it to be masked, this warns.

    An ``nn.Linear`` becomes a :class:`MaskedLinear`; every other module stays what it is, gets a child for its mask, and
    computes with a weight that is +0 under it. Modules stay the same objects with the same parameters: shared layers and
    weights, hooks, device, dtype, training state, gradients and an optimizer that holds them are kept, and with full masks
    every output.

    A weight is called by its module, if it is the module's ``weight``; another parameter by its own name
    (``"attention.in_proj_weight"``).

    Args:
        model: any module, a single ``nn.Linear`` too.
        masks: a mask for each weight by name, of its shape, booleans or 0s and 1s; without ``include`` only these weights
            are masked. Weights without one get the full mask.
        include: which weights: a shell pattern of names (``"encoder.*"``), a sequence of them, or a function of name and
            module. A weight that is left out by default is masked if it has a mask in ``masks``, or if ``include`` is or
            has its very name.
        keep_dormant: as in :class:`MaskedLinear`.

    Raises:
        ValueError: if a mask is of a weight that there is not, or that cannot be masked, has another shape, or holds
            anything but 0 and 1; if a pattern means no weight. The model is left as it was.
        TypeError: if ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"mask_model takes a torch.nn.Module; got {type(model).__name__}")
    check_keep_dormant(keep_dormant)
    masks, weights, others = dict(masks or {}), _without_mask(model), bool(masked_weights(model))
    for weight, mask in weights_to_mask(model, weights, masks, include, _checked, _are_equal, others):
        mask_weight(weight, mask, keep_dormant)
    if not masks and include is None:
        vars(model)[_WHOLE] = True
        warn_of_left_out([(weight.name, weight.why) for weight in weights], stacklevel=3)
    return model


def mask_weight(weight: ModelWeight, mask: Tensor | None, keep_dormant: KeepDormant) -> None:
    """Give a weight its mask, in every module that holds it: plain linear layers become masked, others get a child."""
    for user in weight.users:
        if type_of(user.module) is nn.Linear and user.parameter == "weight":
            made: MaskedWeight = MaskedLinear.adopt(user.module, mask, keep_dormant=keep_dormant)
        else:
            made = WeightMask(user.module, user.parameter, mask, keep_dormant=keep_dormant)
        weight.mask = made if weight.mask is None else weight.mask


def unmask_model(model: nn.Module, *, include: Include = None) -> nn.Module:
    """Take the masks away from weights, in place, with the same outputs; return the model.

    A :class:`MaskedLinear` is an ``nn.Linear`` again. Dormant values are let go; everything else is kept, as by
    :func:`mask_model`. Subclasses, and layers whose weight is computed, stay as they are.

    Args:
        model: any module.
        include: which weights, as in :func:`mask_model`.

    Raises:
        TypeError: if ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unmask_model takes a torch.nn.Module; got {type(model).__name__}")
    for name, mask in masked_weights(model).items():
        if matches(name, module_of(mask), include):
            release(mask)
    vars(model).pop(_WHOLE, None)  # what has no mask from now on has none by choice
    return model


def get_masks(model: nn.Module) -> dict[str, Any]:
    """Return a copy of the mask of each masked weight, by its name, for :func:`set_masks` to bring back.

    Of a layer in the sparse form it is its :class:`maskedlinear.pattern.SparsityPattern`; ``to_mask`` makes an array of it.
    Of whole weights that :class:`StraightThrough` or :class:`TopKAST` computes it is the mask of now, which cannot be set.
    """
    masked_weights(model)  # which projects them
    computed = {
        one.name: one.computed.mask_of(one.dense) for one in computed_weights(model) if not is_sharded(one.dense)
    }
    return computed | {
        name: layer.pattern if isinstance(layer, SparseLinear) else layer.mask.clone()
        for name, layer in walk_masked(model)
    }


def set_masks(model: nn.Module, masks: Masks, *, group: Group = "model") -> None:
    """Set the masks of weights, by name; dormant values come back, so an earlier mask brings the earlier outputs back.

    Args:
        model: any module; an average of a model (``torch.optim.swa_utils.AveragedModel``) takes the masks of the model.
        masks: by name, of the weights' shapes, booleans or 0s and 1s, or patterns; other weights keep theirs. A layer in the
            sparse form takes as many connections as it has; those that it had not start at 0.
        group: as in :func:`prune_model`; what comes back must be the same in all processes too.

    Raises:
        ValueError: if a mask is of a layer that there is not, has another shape, or holds anything but 0 and 1, or if layers
            that share a weight are given different ones, or processes different ones; if a layer in the sparse form is given
            more or fewer connections than it has. The model is left as it was.
    """
    masked_weights(model)  # which projects them
    layers: dict[str, Any] = dict(walk_masked(model))
    if not any(name in layers for name in masks):  # those of the model that an average, DDP or a compiled module holds
        held = {_name_inside(name): name for name in layers}
        masks = {held.get(_name_inside(name), name): mask for name, mask in masks.items()}
    for one in computed_weights(model):
        if one.name in masks:
            raise ValueError(
                f"the mask of {one.name or 'the layer'} cannot be set: {one.computed.method} chooses it, until finish()"
            )
    check_known("masks", masks, list(layers))
    moved = {
        name: pattern_of(name, layers[name].pattern, mask)
        for name, mask in masks.items()
        if isinstance(layers[name], SparseLinear)
    }
    for name, pattern in moved.items():
        if pattern != layers[name].pattern:
            refuse_cut_twice(layers[name])
    masks = {name: mask for name, mask in masks.items() if not isinstance(layers[name], SparseLinear)}
    checked = {
        name: _checked(mask, layers[name].weight, axes_of_mask(layers[name]), name) for name, mask in masks.items()
    }
    check_one_mask(checked, {name: id(layers[name].weight) for name in checked}, _are_equal)
    ranks = group_of(model, group)
    if ranks is not None:
        keys, parts = {}, {name: mask.to(layers[name].weight.device) for name, mask in checked.items()}
        if ranks.is_cut:
            places = places_of({name: layers[name].weight for name in checked}, ranks)
            keys = {name: place.key for name, place in places.items()}
            parts = {name: cut_like(mask, layers[name].weight) for name, mask in parts.items()}
        check_alike("the mask", parts | {name: pattern.places for name, pattern in moved.items()}, ranks, keys)
        full = {name: torch.where(mask, local_part(layers[name].full_weight), 0) for name, mask in parts.items()}
        check_alike("the weight under the new mask", full, ranks, keys, _DORMANT_DIFFER)
    for name, mask in checked.items():
        check_keeps_fixed(layers[name], like_own(mask, layers[name].mask))
    for name, pattern in moved.items():
        check_keeps_fixed(layers[name], pattern.places_in(layers[name].pattern))
    for name, mask in checked.items():
        layers[name].set_mask(mask)
    for name, pattern in moved.items():
        if pattern != layers[name].pattern:
            layers[name].rewire(pattern, pattern.places_in(layers[name].pattern))


def prune_model(
    model: nn.Module,
    sparsity: float,
    *,
    score: Scoring = "magnitude",
    scope: pruning.Scope = "global",
    of: Of = "masked",
    include: Include = None,
    block: tuple[int, int] | None = None,
    seed: int = 0,
    on_empty: pruning.OnEmpty = "raise",
    keep_at_least: Mapping[str, int] | None = None,
    keep_masked: bool = True,
    group: Group = "model",
    progress: Progress = False,
) -> dict[str, Tensor]:
    """Prune the masked weights of a model to a sparsity, beyond what is masked already.

    Weights that FSDP2 or tensor parallelism has cut over processes are pruned where they are, with the masks that one
    process would make of the whole; all of them call this. No weight is put together, but the scores of one after the other
    are for blocks, and for ``keep_at_least`` of rows that are cut.

    Args:
        model: a module with masked weights; :func:`mask_model` makes them.
        sparsity: the fraction of masked connections afterwards, in [0, 1]; see :func:`maskedlinear.pruning.prune`.
        score: ``"magnitude"``, ``"random"``, ``"snip"`` or ``"taylor"`` (these two read ``weight.grad``); a function of
            weight and gradient (DTensors, where they are cut) that returns scores of their shape; or the scores of each
            weight by name, as those that :func:`maskedlinear.pruning.movement` adds up over steps, of more weights too.
        scope: ``"global"``, ``"layer"``, ``"row"``, ``"erdos_renyi"`` or ``"uniform_plus"``, as
            :func:`maskedlinear.pruning.prune` takes it; each matrix of a stack (an expert) is a layer.
        of: what the sparsity is a fraction of: the ``"masked"`` weights that are pruned here, all ``"weights"`` of the
            model, those without a mask included, or all numbers of the ``"model"``.
        include: which weights, as in :func:`mask_model`.
        block: prune whole blocks of ``(outputs, inputs)``.
        seed: for ``"random"``.
        on_empty: ``"raise"`` or ``"allow"`` where a layer would lose its last connection; ``"keep"`` leaves it its best.
        keep_at_least: how many of the best connections stay in each ``"row"`` (output) and each ``"layer"``.
        keep_masked: whether what is masked stays so. If ``False``, all connections are chosen from, and those that come back
            have their dormant values: for scores of masked ones too, as those of :func:`movement_scores`.
        group: the processes that prune one model together, a group of ``torch.distributed``: scores are of the gradients of
            all of them, averaged, and the masks are compared before they are set. By default those of a model in
            ``DistributedDataParallel``, or that FSDP2 or tensor parallelism has cut; ``None`` where one process acts alone
            (``if rank == 0:``).
        progress: as in :func:`maskedlinear.pruning.prune`.

    Returns:
        The masks before, for :func:`set_masks`.

    Raises:
        ValueError: as by :func:`maskedlinear.pruning.prune`; if there is no masked weight; if a gradient is missing; or if
            the masks of processes differ. The model is left as it was.
    """
    check_of(of)
    layers = {name: layer for name, layer in one_a_weight(model).items() if matches(name, module_of(layer), include)}
    if not layers:
        sparse = any(isinstance(layer, SparseLinear) for _, layer in walk_masked(model))
        remedy = (
            "those in the sparse form are pruned after expand(model)" if sparse else "make them with mask_model(model)"
        )
        raise ValueError(f"prune_model prunes masked weights, and there is none: {remedy}")
    frozen = [name for name, layer in layers.items() if not layer.weight.requires_grad and layer.weight.grad is None]
    if frozen and score in ("snip", "taylor"):
        raise ValueError(
            f"score={score!r} needs the gradient of each weight; frozen ones (requires_grad=False) get none: "
            f"{first_names(frozen)}: let them have one for the backward pass, or leave them out with include=..."
        )
    if isinstance(score, Mapping):
        check_known("scores", score, [user.name for weight in model_weights(model) for user in weight.users])
        score = {name: score[name] for name in layers if name in score}
    ranks = group_of(model, group)
    how: dict[str, Any] = {"scope": scope, "block": block, "seed": seed, "on_empty": on_empty}
    how |= {"keep_at_least": keep_at_least, "progress": progress}
    if any(is_sharded(layer.weight) for layer in layers.values()):
        if not keep_masked:
            raise ValueError(
                "keep_masked=False chooses from whole weights; processes have cut these: set_masks sets new masks"
            )
        refuse_fixed_and_cut(layers)
        places = places_of({name: layer.weight for name, layer in layers.items()}, ranks)
        zeros = None if of == "masked" else _zeros_left(model, sparsity, of, layers)
        known = {name: (layer, axes_of_mask(layer)) for name, layer in layers.items()}
        masks: Masks = new_masks(known, places, ranks, sparsity, score=score, num_zeros=zeros, **how)
    else:
        weights = {
            name: Prunable(
                axes_of_mask(layer),
                layer.weight.detach() if keep_masked else layer.full_weight,
                _gradient(layer, ranks, score),
                layer.mask.cpu().numpy() if keep_masked else np.ones(tuple(layer.mask.shape), bool),
                fixed_entries(layer),
            )
            for name, layer in layers.items()
        }
        zeros = None if of == "masked" else _zeros_left(model, sparsity, of, layers)
        masks = prune_weights(weights, sparsity, score=score, num_zeros=zeros, **how)
        if ranks is not None:
            check_alike("the new mask", masks, ranks)
    before = {name: layer.mask.clone() for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.set_mask(masks[name])
    warn_of_cut(chain_of(model))
    if include is None and _WHOLE in vars(model):
        warn_of_lost([weight.name for weight in _without_mask(model) if not weight.why], stacklevel=3)
    if of == "masked" and include is None:
        warn_of_sparse([other.name for other in model_weights(model) if other.sparse is not None], stacklevel=3)
    return before


def _gradient(mask: MaskedWeight, ranks: Ranks | None, score: Scoring) -> Tensor | None:
    """Return a weight's gradient, averaged over the processes that prune together, if a score may read it."""
    gradient: Tensor | None = mask.weight.grad
    if gradient is None or ranks is None or not (callable(score) or score in ("snip", "taylor")):
        return gradient
    return averaged(gradient, ranks)


def _zeros_left(model: nn.Module, sparsity: float, of: Of, pruned: Mapping[str, MaskedWeight]) -> int:
    """Return how many entries of the weights to prune are masked when a fraction of the weights, or of the model, is."""
    table, own = summary(model), {id(layer.weight) for layer in pruned.values()}
    names = {weight.name for weight in model_weights(model) if id(weight.value) in own}
    masked = sum(row.size - row.connections for row in table.rows if row.name in names)
    return zeros_left(table, sparsity, of, masked)


def summary(model: nn.Module, *inputs: Any, **named: Any) -> ModelSummary:
    """Return a table of a model's parameters: of the masked weights, of both forms, shape, sparsity, dead nodes, bytes and
    FLOPs; of the others, what could be masked, and why the rest is left out.

    How many connections lie on a path from an input to an output is known of a plain ``Sequential``; of another model if it
    is given an example of its inputs, with which it is called once in evaluation, on what the inputs reach in place of
    numbers. Residual sums, products (gates, attention), convolutions and norms are followed: each operand of a product
    brings on what reaches it, and what is divided by a norm reaches all that is normed. Biases and other constants are
    reached by no input. Where a model does something else, the table says what, and no number.

    Of a model that is cut over processes all of them call this, and get the table of the whole.

    Args:
        model: any module.
        inputs: what it is called with, if paths are to be counted: shapes count, and whole numbers as they are.
        named: the same by name.
    """
    rows, unmasked, weights = [], [], model_weights(model)
    masked = {weight.name: weight.value for weight in weights if weight.mask is not None}
    cut = {name: value for name, value in masked.items() if is_sharded(value) and not value.is_meta}
    ranks = group_of(model, "model") if cut else None
    places = places_of(cut, ranks) if cut else {}
    for weight in weights:
        mask = weight.mask
        if weight.sparse is not None:
            tensors = [*weight.sparse.parameters(recurse=False), *weight.sparse.buffers(recurse=False)]
            tensors += [getattr(weight.sparse, name) for name in DevicePattern._fields]
            nbytes = sum(tensor.nbytes for tensor in tensors)
            rows.append(WeightSummary.of_pattern(weight.name, weight.sparse.pattern, nbytes))
        elif mask is not None:
            tensors = (
                [*mask.parameters(recurse=False), mask.mask]
                if isinstance(mask, MaskedLinear)
                else [mask.weight, mask.mask]
            )
            tensors += [] if mask.dormant is None else [mask.dormant]
            nbytes, axes = sum(tensor.nbytes for tensor in tensors), axes_of_mask(mask)
            if weight.name in places:
                counts = count_nodes(mask, axes, places[weight.name], ranks)
                rows.append(WeightSummary.of_counts(weight.name, tuple(mask.weight.shape), *counts, nbytes, axes))
            else:
                live = mask.known_mask.cpu().numpy()
                axes = axes or WeightAxes.of_entries(live.ndim)
                rows.append(WeightSummary.of_mask(weight.name, live, nbytes, axes))
        else:
            uninitialized = isinstance(weight.value, UninitializedParameter)
            shape = () if uninitialized else tuple(weight.value.shape)
            unmasked.append(UnmaskedParameter(weight.full_name, shape, weight.why))
    effective, why = number_effective(chain_of(model)), ""
    if effective is None and rows and (inputs or named):
        try:
            effective = connections_on_paths(model, inputs, named)
        except UnknownPathsError as error:
            why = str(error)
    return ModelSummary(rows, unmasked, effective, why)


def _without_mask(model: nn.Module) -> list[ModelWeight]:
    return [weight for weight in model_weights(model) if weight.mask is None and weight.sparse is None]


def _name_inside(name: str) -> str:
    """Return the name of a layer in the model that an average, DDP or a compiled module holds."""
    parts = name.split(".")
    while parts and parts[0] in ("module", "_orig_mod"):
        parts.pop(0)
    return ".".join(parts)


def one_a_weight(model: nn.Module) -> dict[str, MaskedWeight]:
    """Return the masked weights, of those that share one, and with it its mask, the first."""
    layers: dict[int, tuple[str, MaskedWeight]] = {}
    for name, layer in masked_weights(model).items():
        layers.setdefault(id(layer._parameters.get("weight", layer)), (name, layer))
    return dict(layers.values())


def _are_equal(one: Tensor, other: Tensor) -> bool:
    like = one if is_sharded(one) else other  # of two that are cut alike each process compares its parts
    first, second = (local_part(as_dtensor_like(mask, like)) for mask in (one, other))
    return torch.equal(first, second.to(first.device))


def _checked(mask: Any, weight: Tensor, axes: WeightAxes | None, name: str) -> Tensor:
    if isinstance(mask, SparsityPattern):
        mask = mask.to_mask()
    try:
        return checked_mask(mask, weight.shape, axes)
    except ValueError as error:
        raise ValueError(f"the mask of {name or 'the layer'}: {error}") from error
