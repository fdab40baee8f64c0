"""Whole models: nnx layers masked in place and back, pruned, summed up; masks read and set, of linen variables too."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax import Array

from maskedlinear import pruning
from maskedlinear._progress import Progress
from maskedlinear.models import (
    UNKNOWN,
    ModelSummary,
    UnmaskedParameter,
    WeightSummary,
    first_names,
    why_left_out,
)
from maskedlinear.pattern import SparsityPattern
from maskedlinear.pruning._layers import Include, Scoring, check_known, matches, score_layers, select_weights
from maskedlinear_jax._compat import is_traced
from maskedlinear_jax._functional import boolean_mask
from maskedlinear_jax._tree import named_leaves
from maskedlinear_jax.flax._kernel import PARAMETER, is_linen, linen_layers, mask_shape, set_linen_masks
from maskedlinear_jax.flax._modules import kernel_gradients, layers_of
from maskedlinear_jax.flax._nnx import MaskedLinear
from maskedlinear_jax.flax._sparse_nnx import SparseLinear

__all__ = ["get_masks", "mask_model", "prune_model", "set_masks", "summary", "unmask_model"]

Masks = Mapping[str, Any]
Model = TypeVar("Model")

_OTHER_MODULE = "of a module that has no masked layer"
_ONE_MASK = "layers that share a kernel share its mask; got different ones: give them the same, or a kernel each"


def mask_model(
    model: Model, masks: Masks | None = None, *, include: Include = None, keep_dormant: bool = True
) -> Model:
    """Turn linear layers of an nnx model into :class:`MaskedLinear`, in place, and return the model.

    The layers stay the same objects with the same parameters: shared layers and kernels and options are kept, and with full
    masks every output. Layers that share a kernel share its mask. Make the ``nnx.Optimizer`` afterwards or before: the
    parameters are the same. Each ``nnx.Linear`` with a kernel of two dimensions is meant, wherever it is nested; subclasses,
    stacks of layers and other modules (attention, convolutions, ``Einsum``) are left out, and named in a warning.

    Args:
        model: any nnx module, or a list, tuple or dict of them; a single ``nnx.Linear`` too.
        masks: a mask for each layer by name (its path, with dots between), of the kernel's shape ``(in, out)``, booleans or
            0s and 1s; without ``include`` only these layers are turned. Layers without one get the full mask.
        include: which layers: a shell pattern of names (``"encoder.*"``), a sequence of them, or a function of name and
            layer.
        keep_dormant: as in :class:`MaskedLinear`.

    Raises:
        ValueError: if a mask is of a layer that there is not, or that cannot be turned, has another shape, or holds anything
            but 0 and 1; if layers that share a kernel are given different masks; if a pattern means no layer. The model is
            left as it was.
        TypeError: if ``model`` is linen's.
    """
    _refuse_linen("mask_model", model)
    masks = dict(masks or {})
    possible = {
        name: layer
        for name, layer in layers_of(model, nnx.Linear).items()
        if type(layer) is nnx.Linear and _is_flat(layer)
    }
    layers = select_weights(model, possible, masks, include)
    checked = {name: _checked(mask, layers[name].kernel, name) for name, mask in masks.items() if name in layers}
    masked = {id(layer.kernel): layer for layer in layers_of(model, MaskedLinear).values()}
    by_kernel = _agreed(checked, layers)
    for key, mask in by_kernel.items():
        if key in masked and not bool((mask == masked[key].mask[...]).all()):
            raise ValueError(_ONE_MASK)
    for layer in layers.values():
        first = masked.setdefault(id(layer.kernel), layer)
        adopted = MaskedLinear.adopt(layer, by_kernel.get(id(layer.kernel)), keep_dormant=keep_dormant)
        adopted.mask, adopted.dormant = first.mask, first.dormant
    left_out = [other.name for other in _unmasked(model) if other.why in (_OTHER_MODULE, UNKNOWN)]
    if left_out and not masks and include is None:
        warnings.warn(
            f"mask_model left out {first_names(left_out)}, which are not the kernels of nnx.Linear layers: summary(model) "
            "lists everything; maskedlinear.jax.prune_tree gives masks for parameters of every module",
            stacklevel=2,
        )
    return model


def unmask_model(model: Model, *, include: Include = None) -> Model:
    """Turn :class:`MaskedLinear` layers back into ``nnx.Linear``, in place, with the same outputs; return the model.

    What is dormant is dropped; everything else is kept, as by :func:`mask_model`. Subclasses stay as they are.

    Args:
        model: any nnx module.
        include: which layers, as in :func:`mask_model`.
    """
    for name, layer in layers_of(model, MaskedLinear).items():
        if type(layer) is MaskedLinear and matches(name, layer, include):
            layer.release()
    return model


def get_masks(model: Any) -> dict[str, Array]:
    """Return the mask of each :class:`MaskedLinear` of a model, or of each :class:`MaskedDense` of linen's variables.

    By the layer's name, its path with dots between, for :func:`set_masks` to bring back.
    """
    if is_linen(model):
        return {".".join(path): mask for path, (_, mask) in linen_layers(model).items()}
    return {name: layer.mask[...] for name, layer in layers_of(model, MaskedLinear).items()}


def set_masks(model: Any, masks: Masks) -> Any:
    """Set the masks of layers, by name, and return the model; weights move, so an earlier mask brings earlier outputs back.

    Args:
        model: any nnx module, whose layers are set in place; or the variables of a linen one, which stay as they are.
        masks: by name, as :func:`get_masks` returns them: shape ``(in, out)``, booleans or 0s and 1s; inside transforms
            booleans. Other layers keep theirs.

    Returns:
        The model; or new linen variables.

    Raises:
        ValueError: if a mask is of a layer that there is not, has another shape, or holds anything but 0 and 1; if layers
            that share a kernel are given different masks. The model is left as it was.
    """
    if is_linen(model):
        named = {".".join(path): (path, kernel, mask) for path, (kernel, mask) in linen_layers(model).items()}
        check_known("masks", masks, list(named))
        new = {}
        for name, mask in masks.items():
            path, kernel, old = named[name]
            new[path] = _checked(mask, kernel, name, old), None
        return set_linen_masks(model, new)
    layers = layers_of(model, MaskedLinear)
    check_known("masks", masks, list(layers))
    checked = {
        name: _checked(mask, layers[name].kernel.get_value(), name, layers[name].mask) for name, mask in masks.items()
    }
    _agreed(checked, layers)
    for name, mask in checked.items():
        layers[name].set_mask(mask)
    return model


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
    on_empty: pruning.OnEmpty = "raise",
    keep_at_least: Mapping[str, int] | None = None,
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
        on_empty: as in :func:`maskedlinear.pruning.prune`, and so ``keep_at_least``.
        keep_at_least: as above.
        progress: as in :func:`maskedlinear.pruning.prune`.

    Returns:
        The masks before, for :func:`set_masks`.

    Raises:
        ValueError: as by :func:`maskedlinear.pruning.prune`; if there is no masked layer; or if a gradient is missing. The
            model is left as it was.
    """
    _refuse_linen("prune_model", model)
    layers = {name: layer for name, layer in layers_of(model, MaskedLinear).items() if matches(name, layer, include)}
    if not layers:
        raise ValueError("prune_model prunes MaskedLinear layers, and there is none: make them with mask_model(model)")
    before = {name: layer.mask[...] for name, layer in layers.items()}
    first: dict[int, str] = {}  # the name of each kernel, whoever shares it
    for name, layer in layers.items():
        first.setdefault(id(layer.kernel), name)
    weights = {name: layers[name].kernel[...].T for name in first.values()}
    found = {} if gradients is None else kernel_gradients(gradients)
    scores = score_layers(score, weights, {name: found[name].T for name in weights if name in found}, seed)
    made = pruning.prune(
        scores,
        sparsity=sparsity,
        masks={name: before[name].T for name in weights},
        scope=scope,
        block=block,
        on_empty=on_empty,
        keep_at_least=keep_at_least,
        progress=progress,
    )
    for layer in layers.values():
        layer.set_mask(made[first[id(layer.kernel)]].T)
    return before


def summary(model: Any) -> ModelSummary:
    """Return a table of a model's parameters: of masked layers, of both forms, shape, sparsity, dead nodes, bytes and FLOPs;
    of the others, what could be masked, and why the rest is left out.

    A stack of layers has a row for each of them. ``model`` is an nnx module, or the variables of a linen one.
    """
    rows = []
    if is_linen(model):
        for path, (kernel, mask) in linen_layers(model).items():
            rows.append(WeightSummary.of_mask(".".join(path), np.asarray(mask).T, kernel.nbytes + mask.nbytes))
        return ModelSummary(rows, _unmasked(model))
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
    return ModelSummary(rows, _unmasked(model))


def _unmasked(model: Any) -> list[UnmaskedParameter]:
    """Return the parameters that no masked layer has, and why they are left out."""
    could: set[str] = set()
    if is_linen(model):
        masked = {".".join((*path, "kernel")) for path in linen_layers(model)}
        leaves = named_leaves(model["params"])
    else:
        masked = {f"{name}.kernel" if name else "kernel" for name in layers_of(model, MaskedLinear)}
        masked |= {f"{name}.weight_values" if name else "weight_values" for name in layers_of(model, SparseLinear)}
        linear = layers_of(model, nnx.Linear).items()
        could = {
            f"{name}.kernel" if name else "kernel"
            for name, layer in linear
            if type(layer) is nnx.Linear and _is_flat(layer)
        }
        leaves = named_leaves(nnx.state(model, nnx.Param))
    unmasked = []
    for name, leaf in leaves.items():
        shape = tuple(leaf.shape)
        why = why_left_out(name, len(shape)) or ("" if name in could else _OTHER_MODULE)
        if name not in masked:
            unmasked.append(UnmaskedParameter(name, shape, why))
    return unmasked


def _refuse_linen(function: str, model: Any) -> None:
    """Raise a ``TypeError`` for what is linen's, whose modules have no parameters of their own."""
    if is_linen(model) or isinstance(model, linen.Module):
        raise TypeError(
            f"{function} takes an nnx module; of linen, MaskedDense is the masked layer, set_masks(variables, masks) sets "
            "its masks, and maskedlinear.jax.prune_tree(variables['params'], sparsity) prunes parameters of every module"
        )


def _each(variable: Any, ndim: int) -> Any:
    """Return the arrays of a stack of layers one after the other, or that of one layer."""
    array = np.asarray(variable[...])
    own = array.shape[-ndim:]
    return array.reshape(math.prod(array.shape[:-ndim]), *own)


def _is_flat(layer: nnx.Linear) -> bool:
    return len(layer.kernel.get_value().shape) == 2


def _checked(mask: Any, kernel: Any, name: str, old: Any = None) -> Array:
    """Return a mask of a layer; a stack of layers may share one, as their ``old`` one."""
    shape = kernel.shape if old is None else mask_shape(kernel, old)
    try:
        return jnp.array(boolean_mask(mask, shape, PARAMETER))
    except ValueError as error:
        raise ValueError(f"the mask of {name or 'the layer'}: {error}") from error


def _agreed(masks: Mapping[str, Array], layers: Mapping[str, Any]) -> dict[int, Array]:
    """Return the mask of each kernel, by its identity: layers that share a kernel must be given the same one."""
    found: dict[int, Array] = {}
    for name, mask in masks.items():
        first = found.setdefault(id(layers[name].kernel), mask)
        if first is not mask and not is_traced(first) and not is_traced(mask) and bool((first != mask).any()):
            raise ValueError(_ONE_MASK)
    return found
