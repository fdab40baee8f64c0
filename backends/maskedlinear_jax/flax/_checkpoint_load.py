"""A file loaded into an nnx model: all new arrays are made first, and then set, so that an error changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import nnx
from numpy.typing import NDArray

from maskedlinear.checkpoint import MaskedArray
from maskedlinear.checkpoint._dtypes import as_numpy
from maskedlinear.constraints import Constraints
from maskedlinear.models import ModelWeight
from maskedlinear.pattern import SparsityPattern
from maskedlinear_jax._checkpoint import Array, array_of, like
from maskedlinear_jax.flax._checkpoint_nnx import StateArray, state_arrays
from maskedlinear_jax.flax._constrain import constrain
from maskedlinear_jax.flax._kernel import mask_shape, remember_recipe
from maskedlinear_jax.flax._models import become_sparse
from maskedlinear_jax.flax._modules import children_of
from maskedlinear_jax.flax._sparse_nnx import SparseLinear
from maskedlinear_jax.flax._weights import mask_weight, masked_weights, model_weights

__all__ = ["fitted_mask", "load_module"]

Change = Callable[[], None]


def load_module(
    model: Any,
    arrays: Mapping[str, Array],
    differences: list[str],
    before: Change | None = None,
    optimizer: nnx.Optimizer[Any] | None = None,
    constraints: Mapping[str, Constraints] | None = None,
) -> Any:
    """Load arrays of a file into a model, in place, and return it; or add to what differs, and change nothing.

    Variables stay the same objects, but for those of a plain ``nnx.Linear`` that the file has in the sparse form.

    Args:
        model: the model.
        arrays: the file's, by the model's names and in its layouts.
        differences: what differs so far; if anything does, nothing is changed.
        before: what is changed first, and may refuse.
        optimizer: what that changes. Where something refuses, a hook of a Variable for one, both are as they were.
        constraints: of weights by the names of their arrays, which they have afterwards.
    """
    weights = {
        id(children_of(weight.users[0].module)[weight.users[0].parameter]): weight for weight in model_weights(model)
    }
    seen: set[int] = set()
    changes: list[Change] = []
    to_sparse: list[nnx.Module] = []
    for name, one in state_arrays(model).items():
        array = arrays.get(name)
        if array is None or (isinstance(one.value, nnx.Variable) and id(one.value) in seen):
            continue
        seen.add(id(one.value))
        try:
            changes.append(_change(name, one, array, weights.get(id(one.value))))
        except ValueError as error:
            differences.append(str(error))
            continue
        if isinstance(array, MaskedArray) and array.form == "sparse" and not one.masked and one.sparse is None:
            to_sparse += [user.module for user in weights[id(one.value)].users if user.parameter == "kernel"]
    if differences:
        return model
    put_back = _kept([model, optimizer])
    try:
        for change in (*([] if before is None else [before]), *changes):
            change()
        model = become_sparse(model, to_sparse)
        if constraints:
            constrain(model, _by_weights(model, constraints))
        return model
    except BaseException:
        put_back()
        raise


def _by_weights(model: Any, constraints: Mapping[str, Constraints]) -> dict[str, Constraints]:
    """Return constraints by what :func:`get_masks` calls the weights."""
    names: dict[str, str] = {}
    for name, one in masked_weights(model, sparse=True).items():
        full = f"{name}.kernel".lstrip(".") if isinstance(one, SparseLinear) else one.full_name
        names.setdefault(full, name)
    return {names[full]: made for full, made in constraints.items()}


def _kept(models: list[Any]) -> Change:
    """Return what makes models as they are now: their modules' kinds and attributes, and what is in their Variables."""
    nodes = list({id(node): node for _, node in nnx.iter_graph(models)}.values())
    values = [(node, node.get_raw_value()) for node in nodes if isinstance(node, nnx.Variable)]
    held: list[tuple[Any, Any, dict[str, Any]]] = []
    parts: list[tuple[Any, Any]] = []
    for node in nodes:
        if isinstance(node, list | dict):
            parts.append((node, node.copy()))
        elif isinstance(node, nnx.Pytree) and not isinstance(node, nnx.Variable):
            own = {name: part.copy() if type(part) is dict else part for name, part in vars(node).items()}
            held.append((node, type(node), own))

    def put_back() -> None:
        for node, kind, attributes in held:
            node.__class__ = kind
            vars(node).clear()
            vars(node).update(attributes)
        for node, own in parts:
            node.clear()
            node.extend(own) if isinstance(node, list) else node.update(own)
        for variable, value in values:
            variable.set_raw_value(value)  # past its hooks

    return put_back


def _change(name: str, one: StateArray, array: Array, weight: ModelWeight | None) -> Change:
    """Return what sets an array, for which all that it sets is made already.

    Raises:
        ValueError: if the model cannot have the file's mask.
    """
    if one.sparse is not None:
        return _sparse_change(name, one, array)
    if isinstance(array, MaskedArray) and not one.masked and (weight is None or weight.fixed):
        raise ValueError(f"{name} is masked in the file, and {'no parameter' if weight is None else weight.why} here")
    full = array_of(array, one.array)
    if not one.masked:
        value = like(full, one.array)
        if not isinstance(array, MaskedArray) or weight is None:
            return lambda: _set(one, value)
        mask = like(array.mask(), one.array, bool)

        def begin() -> None:
            one.value.set_value(value)
            mask_weight(weight, mask, True, array.recipe)

        return begin
    live = array.mask() if isinstance(array, MaskedArray) else np.ones(one.shape, bool)
    recipe = array.recipe if isinstance(array, MaskedArray) else None
    masks = [like(fitted_mask(name, live, part.mask), part.mask, bool) for part in one.masked]
    zero = np.zeros((), full.dtype)
    value, dormant = (like(np.where(which, full, zero), one.array) for which in (live, ~live))

    def change() -> None:
        one.value.set_value(value)
        for part, mask in zip(one.masked, masks, strict=True):
            part.mask_variable.set_value(mask)
            remember_recipe(part.mask_variable, recipe)
            if part.dormant is not None:
                part.dormant.set_value(dormant)

    return change


def _set(one: StateArray, value: Any) -> None:
    if isinstance(one.value, nnx.Variable):
        one.value.set_value(value)
    elif isinstance(one.holder, nnx.Module):
        setattr(one.holder, one.path[-1], nnx.data(value))
    else:
        one.holder[one.path[-1]] = value


def fitted_mask(name: str, live: NDArray[np.bool_], own: Any) -> NDArray[np.bool_]:
    """Return the mask of a weight in the shape that it has in the model: a stack of layers may share one.

    Raises:
        ValueError: if they do, and have different ones in the file.
    """
    shape = mask_shape(live, own)
    if shape == live.shape:
        return live
    every = live.reshape(-1, *shape)
    if (every != every[:1]).any():
        raise ValueError(f"the layers of the stack {name} share a mask here, and have different ones in the file")
    return every[0] if len(every) else np.ones(shape, bool)


def _sparse_change(name: str, one: StateArray, array: Array) -> Change:
    """Return what gives a layer in the sparse form, or a stack of them, the connections of a file and their values."""
    layer: Any = one.sparse
    stack, out = one.shape[:-2], layer.out_features
    if isinstance(array, MaskedArray):
        values, places = as_numpy(array.values, array.dtype), array.places
    else:
        values = array.numpy().reshape(-1)
        places = np.arange(len(values))
    numbers, inside = np.divmod(places, max(layer.in_features * out, 1))
    counts = np.bincount(numbers, minlength=math.prod(stack))
    if (counts != counts[:1]).any():
        raise ValueError(
            f"the layers of the stack {name} have {', '.join(map(str, counts))} connections in the file, and as many "
            "each here: make the model with masked layers"
        )
    patterns, parts = [], []
    for number in range(len(counts)):
        part = slice(number * counts[0], (number + 1) * counts[0])
        inputs, outputs = np.divmod(inside[part], max(out, 1))
        pattern, order = SparsityPattern.from_edges(outputs, inputs, (out, layer.in_features))
        patterns.append(pattern)
        parts.append(values[part][order])
    made = np.concatenate(parts).reshape(*stack, -1).astype(np.dtype(one.array.dtype))
    value = like(made, one.array)

    def change() -> None:
        one.value.set_value(value)
        layer._set_arrays(patterns, stack)
        remember_recipe(layer.indices, array.recipe if isinstance(array, MaskedArray) else None)

    return change
