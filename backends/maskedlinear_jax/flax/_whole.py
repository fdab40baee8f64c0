"""Whole nnx models: their linear layers masked in place and back, pruned, their masks read and set, and a summary."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from maskedlinear import pruning
from maskedlinear._progress import Progress
from maskedlinear.pattern import SparsityPattern
from maskedlinear.pruning._layers import Include, Scoring, check_known, matches, score_layers, select_weights
from maskedlinear.summaries import ModelSummary, WeightSummary
from maskedlinear_jax._functional import boolean_mask
from maskedlinear_jax.flax._kernel import PARAMETER
from maskedlinear_jax.flax._modules import kernel_gradients, layers_of, parameter_users
from maskedlinear_jax.flax._nnx import MaskedLinear
from maskedlinear_jax.flax._sparse_nnx import SparseLinear

__all__ = ["get_masks", "mask_model", "prune_model", "set_masks", "summary", "unmask_model"]

Masks = Mapping[str, Any]
Model = TypeVar("Model")


def mask_model(model: Model, masks: Masks | None = None, *, include: Include = None) -> Model:
    """Turn linear layers of an nnx model into :class:`MaskedLinear`, in place, and return the model.

    The layers stay the same objects with the same parameters: shared layers and kernels and options are kept, and with full
    masks every output. Make the ``nnx.Optimizer`` afterwards or before: the parameters are the same. Each ``nnx.Linear``
    with a kernel of two dimensions is meant, wherever it is nested; subclasses and stacks of layers are left out.

    Args:
        model: any nnx module, or a list, tuple or dict of them; a single ``nnx.Linear`` too.
        masks: a mask for each layer by name (its path, with dots between), of the kernel's shape ``(in, out)``, booleans or
            0s and 1s; without ``include`` only these layers are turned. Layers without one get the full mask.
        include: which layers: a shell pattern of names (``"encoder.*"``), a sequence of them, or a function of name and
            layer.

    Raises:
        ValueError: if a mask is of a layer that there is not, or that cannot be turned, has another shape, or holds anything
            but 0 and 1; if a pattern means no layer. The model is left as it was.
    """
    masks = dict(masks or {})
    possible = {
        name: layer
        for name, layer in layers_of(model, nnx.Linear).items()
        if type(layer) is nnx.Linear and _is_flat(layer)
    }
    layers = select_weights(model, possible, masks, include)
    made = {name: _checked(masks[name], layer, name) for name, layer in layers.items() if name in masks}
    for name, layer in layers.items():
        MaskedLinear.adopt(layer, made.get(name))
    return model


def unmask_model(model: Model, *, include: Include = None) -> Model:
    """Turn :class:`MaskedLinear` layers back into ``nnx.Linear``, in place, with the same outputs; return the model.

    Their dormant weights become 0; everything else is kept, as by :func:`mask_model`. Subclasses stay as they are.

    Args:
        model: any nnx module.
        include: which layers, as in :func:`mask_model`.

    Raises:
        ValueError: if a kernel is shared with a module that does not mask it alike; the model is left as it was.
    """
    layers = {
        name: layer
        for name, layer in layers_of(model, MaskedLinear).items()
        if type(layer) is MaskedLinear and matches(name, layer, include)
    }
    held = parameter_users(model)
    for name, layer in layers.items():
        if bool(layer.mask[...].all()):
            continue  # no weight becomes 0
        for other in held[id(layer.kernel)]:
            if not isinstance(other, MaskedLinear) or not bool((layer.mask[...] == other.mask[...]).all()):
                raise ValueError(
                    f"{name} shares its kernel with a {type(other).__name__} that does not mask it alike, so that no dense "
                    "kernel gives the outputs of both: give them one mask first, or the full one"
                )
    for layer in layers.values():
        layer.release()
    return model


def get_masks(model: Any) -> dict[str, Array]:
    """Return the mask of each :class:`MaskedLinear`, by the layer's name, for :func:`set_masks` to bring back."""
    return {name: layer.mask[...] for name, layer in layers_of(model, MaskedLinear).items()}


def set_masks(model: Any, masks: Masks) -> None:
    """Set the masks of layers, by name; no weight changes, so an earlier mask brings the earlier outputs back.

    Args:
        model: any nnx module.
        masks: by name, shape ``(in, out)``, booleans or 0s and 1s; other layers keep theirs.

    Raises:
        ValueError: if a mask is of a layer that there is not, has another shape, or holds anything but 0 and 1; the model is
            left as it was.
    """
    layers = layers_of(model, MaskedLinear)
    check_known("masks", masks, list(layers))
    checked = {name: _checked(mask, layers[name], name) for name, mask in masks.items()}
    for name, mask in checked.items():
        layers[name].set_mask(mask)


def prune_model(
    model: Any,
    sparsity: float,
    *,
    score: Scoring = "magnitude",
    scope: pruning.Scope = "global",
    include: Include = None,
    block: tuple[int, int] | None = None,
    gradients: Any = None,
    seed: int = 0,
    on_empty: Any = "raise",
    progress: Progress = False,
) -> dict[str, Array]:
    """Prune the masked layers of an nnx model to a sparsity, beyond what is masked already.

    Kernels are read as ``(out, in)``, so that PyTorch's layers of the same weights get the same masks, transposed.

    Args:
        model: a module with :class:`MaskedLinear` layers; :func:`mask_model` makes them.
        sparsity: the fraction of masked connections afterwards, in [0, 1]; see :func:`maskedlinear.pruning.prune`.
        score: ``"magnitude"``, ``"random"``, ``"snip"`` or ``"taylor"`` (these two need ``gradients``), a function of
            weight and gradient, both ``(out, in)``, that returns scores of their shape; or the scores ``(out, in)`` by name.
        scope: ``"global"``, ``"layer"`` or ``"erdos_renyi"``.
        include: which layers, as in :func:`mask_model`.
        block: prune whole blocks of ``(outputs, inputs)``.
        gradients: what ``nnx.grad`` returned for the model.
        seed: for ``"random"``.
        on_empty: ``"raise"`` or ``"allow"`` where a layer would lose its last connection.
        progress: as in :func:`maskedlinear.pruning.prune`.

    Returns:
        The masks before, for :func:`set_masks`.

    Raises:
        ValueError: as by :func:`maskedlinear.pruning.prune`; if there is no masked layer; or if a gradient is missing. The
            model is left as it was.
    """
    layers = {name: layer for name, layer in layers_of(model, MaskedLinear).items() if matches(name, layer, include)}
    if not layers:
        raise ValueError("prune_model prunes MaskedLinear layers, and there is none: make them with mask_model(model)")
    weights = {name: layer.kernel[...].T for name, layer in layers.items()}
    found = {} if gradients is None else kernel_gradients(gradients)
    scores = score_layers(score, weights, {name: found[name].T for name in layers if name in found}, seed)
    before = {name: layer.mask[...] for name, layer in layers.items()}
    made = pruning.prune(
        scores,
        sparsity=sparsity,
        masks={name: mask.T for name, mask in before.items()},
        scope=scope,
        block=block,
        on_empty=on_empty,
        progress=progress,
    )
    for name, layer in layers.items():
        layer.set_mask(made[name].T)
    return before


def summary(model: Any) -> ModelSummary:
    """Return a table of a model's masked layers, of both forms: shape, sparsity, dead nodes, bytes, FLOPs.

    A stack of layers has a row for each of them.
    """
    rows = []
    for name, layer in layers_of(model, (MaskedLinear, SparseLinear)).items():
        nbytes = sum(part[...].nbytes for part in vars(layer).values() if isinstance(part, nnx.Variable))
        of: Any
        if isinstance(layer, SparseLinear):
            of, stacked = WeightSummary.of_pattern, layer.indptr[...].ndim > 1
            ends = zip(_each(layer.indptr, 1), _each(layer.indices, 1), strict=True)
            parts = [SparsityPattern(starts, inputs, layer.in_features) for starts, inputs in ends]
        else:
            of, stacked = WeightSummary.of_mask, layer.mask[...].ndim > 2
            parts = [mask.T for mask in _each(layer.mask, 2)]
        for place, part in enumerate(parts):
            rows.append(of(f"{name}[{place}]" if stacked else name, part, nbytes // len(parts)))
    return ModelSummary(rows)


def _each(variable: Any, ndim: int) -> Any:
    """Return the arrays of a stack of layers one after the other, or that of one layer."""
    array = np.asarray(variable[...])
    own = array.shape[-ndim:]
    return array.reshape(math.prod(array.shape[:-ndim]), *own)


def _is_flat(layer: nnx.Linear) -> bool:
    return len(layer.kernel.get_value().shape) == 2


def _checked(mask: Any, layer: nnx.Linear, name: str) -> Array:
    try:
        return jnp.array(boolean_mask(mask, layer.kernel.get_value().shape, PARAMETER))
    except ValueError as error:
        raise ValueError(f"the mask of {name or 'the layer'}: {error}") from error
