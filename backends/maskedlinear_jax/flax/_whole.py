"""Whole models of Flax: their weights masked and back, pruned, their masks read and set, and a summary.

Modules of nnx change in place; the variables of a linen model stay as they are, and new ones are returned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from maskedlinear import pruning
from maskedlinear._progress import Progress
from maskedlinear.masks import Recipe
from maskedlinear.models import (
    ModelSummary,
    Of,
    Prunable,
    UnmaskedParameter,
    WeightAxes,
    WeightSummary,
    check_of,
    check_one_mask,
    count_masked,
    number_effective,
    warn_of_cut,
    warn_of_drift,
    warn_of_left_out,
    warn_of_sparse,
    weights_to_mask,
    zeros_left,
)
from maskedlinear.pattern import SparsityPattern
from maskedlinear.pruning._layers import Include, Scoring, check_known, matches, pattern_of
from maskedlinear_jax._compat import is_traced
from maskedlinear_jax._concrete import masks_on_host, prune_known
from maskedlinear_jax._functional import boolean_mask
from maskedlinear_jax._placement import to_host
from maskedlinear_jax._tree import Axes, named_leaves
from maskedlinear_jax.flax._adapter import masked_of, parameters_of, refuse_linen, refuse_linen_module, refuse_unfit
from maskedlinear_jax.flax._chain import chain_of
from maskedlinear_jax.flax._constraint_variables import check_keeps_fixed
from maskedlinear_jax.flax._kernel import full_kernel, label, mask_shape, masked_kernel, remember_recipe
from maskedlinear_jax.flax._modules import layers_of, pure
from maskedlinear_jax.flax._param_masks import bring_masks_to, check_guards
from maskedlinear_jax.flax._sparse_nnx import SparseLinear
from maskedlinear_jax.flax._variables import (
    dormant_of,
    is_linen,
    mask_variables,
    set_linen_masks,
    unmask_variables,
)
from maskedlinear_jax.flax._weights import mask_weight, share_mask

__all__ = ["full_value", "get_masks", "mask_model", "prune_model", "set_masks", "summary", "unmask_model"]

Masks = Mapping[str, Any]
Model = TypeVar("Model")


def mask_model(
    model: Model,
    masks: Masks | None = None,
    *,
    include: Include = None,
    axes: Axes = None,
    keep_dormant: bool = True,
) -> Model:
    """Give weights of a model masks: of an nnx module in place; of linen's variables in new ones. Return the model.

    Masked are matrices and kernels, wherever they are and whoever reads them: of linear layers and their stacks, attention,
    ``Einsum``, convolutions, recurrent cells. In nnx :func:`register_axes` adds module types; of types that are not known,
    and in linen's variables, names say what is a weight, as to :func:`maskedlinear.jax.prune_tree`. Never biases, norms,
    scales, positions, adapters or embeddings, nor what shares its weight with an embedding. :func:`summary` lists what is
    left out, and why; if a user would expect it to be masked, this warns.

    In nnx an ``nnx.Linear`` becomes a :class:`MaskedLinear`; every other module stays what it is, and its mask and dormant
    weights are two Variables more, as ``kernel_mask`` and ``kernel_dormant``. Modules stay the same objects with the same
    parameters: sharing, options, and with full masks every output. Make the ``nnx.Optimizer`` afterwards or before. In linen
    masks and dormant weights are collections of these names; ``apply`` takes them, and modules other than
    :class:`MaskedDense` pass them by.

    Where the layers of a stack lie in a parameter, only shapes say: along the first axis without which it has its module's
    shape. A module that knows nothing of masks computes with what stands in its kernel: an optimizer that is not guarded by
    :func:`maskedlinear.jax.freeze_masked` makes masked entries live there.

    A weight is called by its module, if it is the module's ``kernel``; another parameter by its own name (``"moe.up"``).

    Args:
        model: any nnx module, or a list, tuple or dict of them; or the variables of a linen model, ``{"params": ..., ...}``.
        masks: a mask for each weight by name, of its shape (of a kernel ``(in, out)``), booleans or 0s and 1s; without
            ``include`` only these weights are masked. Weights without one get the full mask.
        include: which weights: a shell pattern of names (``"encoder.*"``), a sequence of them, or a function of name and
            module; of linen's variables, of name and parameter. A weight that is left out by default is masked if it has a
            mask in ``masks``, or if ``include`` is or has its very name.
        axes: what the axes of parameters mean, by their full names, as :func:`maskedlinear.jax.prune_tree` takes it; these
            parameters are masked.
        keep_dormant: as in :class:`MaskedLinear`.

    Raises:
        ValueError: if a mask is of a weight that there is not, or that cannot be masked, has another shape, or holds
            anything but 0 and 1; if layers that share a kernel are given different masks; if a pattern means no weight. The
            model is left as it was.
        TypeError: if ``model`` is a linen module, which has no parameters of its own.
    """
    refuse_linen_module("mask_model", model)
    masks, every = dict(masks or {}), parameters_of(model, axes)
    check_known("axes", axes or (), [weight.full_name for weight in every])
    weights = [weight for weight in every if weight.mask is None]
    others = len(weights) < len(every)
    chosen = weights_to_mask(model, weights, masks, include, _checked, _are_equal, others, axes or ())
    if not masks and include is None:
        left_out = [(weight.full_name, weight.why) for weight in weights if weight.full_name not in (axes or ())]
        warn_of_left_out(left_out, stacklevel=3)
    if is_linen(model):
        paths = {weight.users[0].parameter: mask for weight, mask in chosen}
        return cast(Model, mask_variables(cast(Any, model), paths, keep_dormant))
    for weight, mask in chosen:
        given = next((masks[user.name] for user in weight.users if user.name in masks), None)
        mask_weight(weight, mask, keep_dormant, given)
    for weight in every:
        if weight.mask is not None and weight.sparse is None and not weight.fixed:
            share_mask(weight)
    return model


def unmask_model(model: Model, *, include: Include = None) -> Model:
    """Take the masks away from weights, with the same outputs: in place, of linen's variables in new ones; return the model.

    A :class:`MaskedLinear` is an ``nnx.Linear`` again. What is dormant is dropped; everything else is kept, as by
    :func:`mask_model`. Subclasses, and each :class:`MaskedDense`, stay as they are.

    Args:
        model: any nnx module, or linen's variables.
        include: which weights, as in :func:`mask_model`.
    """
    refuse_linen_module("unmask_model", model)
    chosen = {name: one for name, one in masked_of(model).items() if matches(name, one.owner, include)}
    if is_linen(model):
        return cast(Model, unmask_variables(cast(Any, model), [one.key for one in chosen.values()]))
    for one in chosen.values():
        one.release()
    return model


def get_masks(model: Any) -> dict[str, Any]:
    """Return a copy of the mask of each masked weight of an nnx model, or of linen's variables, by its name.

    Of a layer in the sparse form it is its :class:`maskedlinear.pattern.SparsityPattern`, ``(out, in)``, of a stack of them
    a list of these.
    """
    return {
        name: _patterns(one) if isinstance(one, SparseLinear) else jnp.copy(one.mask)
        for name, one in masked_of(model, sparse=True).items()
    }


def set_masks(model: Any, masks: Masks) -> Any:
    """Set the masks of weights, by name, and return the model; weights move, so an earlier mask brings earlier outputs back.

    Args:
        model: any nnx module, whose weights are set in place; or the variables of a linen one, which stay as they are.
        masks: by name, as :func:`get_masks` returns them: of the weights' shapes, booleans or 0s and 1s; inside transforms
            booleans. Other weights keep theirs. A pattern is read as it is, ``(out, in)``.

    Returns:
        The model; or new linen variables.

    Raises:
        ValueError: if a mask is of a weight that has none, has another shape, or holds anything but 0 and 1; if layers
            that share a kernel are given different masks; if a layer in the sparse form is given more or fewer connections
            than it has. The model is left as it was.
    """
    weights = masked_of(model, sparse=True)
    check_known("masks", masks, list(weights))
    moved = {
        name: _given_patterns(name, weights[name], mask)
        for name, mask in masks.items()
        if isinstance(weights[name], SparseLinear)
    }
    masks = {name: mask for name, mask in masks.items() if name not in moved}
    checked = {
        name: _checked(mask, weights[name].value, weights[name].axes, name, weights[name].mask)
        for name, mask in masks.items()
    }
    check_one_mask(checked, {name: weights[name].key for name in checked}, _are_equal)
    for name, mask in checked.items() if not is_linen(model) else ():
        check_keeps_fixed(weights[name].owner, weights[name].parameter, mask, name)
    for name, patterns in moved.items():
        if weights[name].indptr.get_value().ndim == 1:
            check_keeps_fixed(weights[name], "weight_values", patterns[0].places_in(weights[name].pattern), name)
    if is_linen(model):
        return set_linen_masks(model, {weights[name].key: (mask, None) for name, mask in checked.items()})
    for name, mask in checked.items():
        weights[name].set_mask(mask)
        remember_recipe(weights[name].mask_variable, masks[name])
    for name, patterns in moved.items():
        weights[name].take_patterns(patterns)
    return model


def prune_model(
    model: Any,
    sparsity: float,
    *,
    score: Scoring = "magnitude",
    scope: pruning.Scope = "global",
    of: Of = "masked",
    include: Include = None,
    axes: Axes = None,
    block: tuple[int, int] | None = None,
    gradients: Any = None,
    optimizer: nnx.Optimizer[Any] | None = None,
    seed: int = 0,
    on_empty: pruning.OnEmpty = "raise",
    keep_at_least: Mapping[str, int] | None = None,
    keep_masked: bool = True,
    progress: Progress = False,
) -> Any:
    """Prune the masked weights of a model to a sparsity, beyond what is masked already.

    Weights are read as matrices ``(out, in)``, so that PyTorch's layers of the same weights get the same masks, transposed.

    Args:
        model: a module with masked weights, or linen's variables with them; :func:`mask_model` makes them.
        sparsity: the fraction of masked connections afterwards, in [0, 1]; see :func:`maskedlinear.pruning.prune`.
        score: ``"magnitude"``, ``"random"``, ``"snip"`` or ``"taylor"`` (these two need ``gradients``), a function of
            weight and gradient, both ``(out, in)``, that returns scores of their shape; or the scores ``(out, in)`` by name.
            Of a stack of matrices they are ``(stack, out, in)``, of a weight whose axes nobody knows of its own shape.
        scope: ``"global"``, ``"layer"``, ``"row"``, ``"erdos_renyi"`` or ``"uniform_plus"``, as
            :func:`maskedlinear.pruning.prune` takes it; each matrix of a stack is a layer.
        of: what the sparsity is a fraction of: the ``"masked"`` weights that are pruned here, all ``"weights"`` of the
            model, those without a mask included, or all numbers of the ``"model"``.
        include: which weights, as in :func:`mask_model`.
        axes: as in :func:`mask_model`.
        block: prune whole blocks of ``(outputs, inputs)``.
        gradients: what ``nnx.grad`` returned for the model; of linen's variables a tree like ``params``.
        optimizer: of an nnx model, so that masks which :func:`maskedlinear.jax.freeze_masked` was given once are the new
            ones; other guards are given them at each step.
        seed: for ``"random"``.
        on_empty: ``"raise"`` or ``"allow"`` where a layer would lose its last connection; ``"keep"`` leaves it its best.
        keep_at_least: how many of the best connections stay in each ``"row"`` (output) and each ``"layer"``.
        keep_masked: whether what is masked stays so. If ``False``, all connections are chosen from, and those that come back
            have the values that they had; for scores of masked ones too, as of ``movement`` by :func:`dense_gradients`.
        progress: as in :func:`maskedlinear.pruning.prune`.

    Returns:
        Of a module the masks before, for :func:`set_masks`; of linen's variables new ones.

    Raises:
        ValueError: as by :func:`maskedlinear.pruning.prune`; if there is no masked weight; or if a gradient is missing. The
            model is left as it was.
    """
    refuse_linen_module("prune_model", model)
    if optimizer is not None:
        refuse_linen("prune_model(optimizer=...)", model)
    check_guards(optimizer, model)
    check_of(of)
    chosen = {name: one for name, one in masked_of(model, axes).items() if matches(name, one.owner, include)}
    if not chosen:
        raise ValueError("prune_model prunes masked weights, and there is none: make them with mask_model(model)")
    first: dict[Any, str] = {}  # the name of each weight, whoever shares it
    for name, one in chosen.items():
        refuse_unfit("prune_model", name, one)
        first.setdefault(one.key, name)
    by_name = {} if gradients is None else named_leaves(gradients)
    weights = {}
    for name in first.values():
        one = chosen[name]
        gradient = by_name.get(one.full_name)
        fixed = None if is_linen(model) else one.fixed
        weights[name] = Prunable(one.axes, one.value, gradient, one.mask, fixed)
    masked_here = 0 if of == "masked" else count_masked(masks_on_host(weights))
    if not keep_masked:
        every = {name: np.ones(weight.mask.shape, bool) for name, weight in weights.items()}
        full = {name: full_value(model, chosen[name]) for name in weights}
        weights = {name: one._replace(weight=full[name], mask=every[name]) for name, one in weights.items()}
    if isinstance(score, Mapping):  # of more weights too
        check_known("scores", score, list(masked_of(model, axes)))
        score = {name: score[name] for name in weights if name in score}
    pruned = prune_known(
        weights,
        sparsity,
        score=score,
        scope=scope,
        block=block,
        seed=seed,
        on_empty=on_empty,
        keep_at_least=keep_at_least,
        num_zeros=None if of == "masked" else zeros_left(summary(model, axes=axes), sparsity, of, masked_here),
        progress=progress,
    )
    masks = {name: pruned[first[one.key]] for name, one in chosen.items()}
    warn_of_drift([name for name in weights if _has_drifted(chosen[name])], stacklevel=3)
    if of == "masked" and include is None and not is_linen(model):
        warn_of_sparse(list(layers_of(model, SparseLinear)), stacklevel=3)
    before = {name: one.mask for name, one in chosen.items()}
    changed = set_masks(model, masks)
    if not is_linen(model):
        warn_of_cut(chain_of(model))
    if optimizer is not None:
        bring_masks_to(optimizer, model, pure(optimizer.opt_state))
    return changed if is_linen(model) else before


def full_value(model: Any, one: Any) -> Any:
    """Return the live and the dormant values of a masked weight together."""
    if is_linen(model):
        return full_kernel(one.value, one.mask, dormant_of(model, one.key))
    return full_kernel(one.value, one.mask, None if one.dormant is None else one.dormant.get_value())


def summary(model: Any, *, axes: Axes = None) -> ModelSummary:
    """Return a table of a model's parameters: of masked weights shape, sparsity, dead nodes, bytes and FLOPs; of the others,
    what could be masked, and why the rest is left out.

    A stack of linear layers has a row for each of them. Dead nodes are those of weights whose axes are known.

    Args:
        model: an nnx module, or the variables of a linen one.
        axes: as in :func:`mask_model`.
    """
    refuse_linen_module("summary", model)
    rows, seen = [], set()
    for name, one in masked_of(model, axes).items():
        if one.key not in seen:
            seen.add(one.key)
            rows += _dense_rows(name, one)
    if not is_linen(model):
        rows += [row for name, layer in layers_of(model, SparseLinear).items() for row in _sparse_rows(name, layer)]
    unmasked = [
        UnmaskedParameter(one.full_name, tuple(one.value.shape), one.why)
        for one in parameters_of(model)
        if one.mask is None and one.sparse is None
    ]
    return ModelSummary(rows, unmasked, None if is_linen(model) else number_effective(chain_of(model)))


def _has_drifted(one: Any) -> bool:
    """Whether a weight of a module that knows nothing of masks is not 0 everywhere under its mask."""
    return not one.is_ours and bool(jnp.any(masked_kernel(one.value, ~one.mask)))


def _dense_rows(name: str, one: Any) -> list[WeightSummary]:
    """Return the row of a weight in the dense form, or of each layer of a stack of linear ones; those are (out, in)."""
    live = np.broadcast_to(to_host(one.mask), one.value.shape)
    axes = one.axes or WeightAxes.of_entries(live.ndim)
    if not one.is_ours and live.ndim > 2:
        return [WeightSummary.of_mask(name, live, one.nbytes, axes)]
    parts = axes.matrices(live)
    names = [f"{name}[{place}]" for place in range(len(parts))] if live.ndim > 2 else [name]
    nbytes = one.nbytes // max(len(parts), 1)
    return [WeightSummary.of_mask(own, part, nbytes) for own, part in zip(names, parts, strict=True)]


def _sparse_rows(name: str, layer: SparseLinear) -> list[WeightSummary]:
    """Return the row of a layer in the sparse form, or of each of a stack."""
    nbytes = sum(part[...].nbytes for part in vars(layer).values() if isinstance(part, nnx.Variable))
    patterns = _patterns(layer)
    if isinstance(patterns, SparsityPattern):
        return [WeightSummary.of_pattern(name, patterns, nbytes)]
    return [
        WeightSummary.of_pattern(f"{name}[{place}]", pattern, nbytes // len(patterns))
        for place, pattern in enumerate(patterns)
    ]


def _patterns(layer: SparseLinear) -> SparsityPattern | list[SparsityPattern]:
    """Return the connections of a layer in the sparse form, or of each of a stack."""
    return layer.patterns if layer.indptr.get_value().ndim > 1 else layer.patterns[0]


def _given_patterns(name: str, layer: SparseLinear, given: Any) -> list[SparsityPattern]:
    """Return the connections that a layer in the sparse form, or each of a stack, is given."""
    if layer.indptr.get_value().ndim == 1:
        given = [given if isinstance(given, SparsityPattern | Recipe) else to_host(given).T]
    if not isinstance(given, list) or len(given) != len(layer.patterns):
        raise ValueError(
            f"a stack in the sparse form takes a list of {len(layer.patterns)} patterns; got other for {name}"
        )
    return [pattern_of(name, own, new) for own, new in zip(layer.patterns, given, strict=True)]


def _checked(mask: Any, value: Any, axes: WeightAxes | None, name: str, old: Any = None) -> Array:
    """Return a mask of a weight; a stack of layers may share one, as their ``old`` one."""
    if isinstance(mask, SparsityPattern):
        mask = mask.to_mask().T
    shape = value.shape if old is None else mask_shape(value, old)
    try:
        return jnp.array(boolean_mask(mask, shape, label(value), axes))
    except ValueError as error:
        raise ValueError(f"the mask of {name or 'the layer'}: {error}") from error


def _are_equal(one: Array, other: Array) -> bool:
    return is_traced(one) or is_traced(other) or bool((one == other).all())
