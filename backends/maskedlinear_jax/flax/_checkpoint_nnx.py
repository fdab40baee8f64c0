"""What the state of an nnx model is made of, for files: each array by its names, with its mask, and never masks alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from numpy.typing import NDArray

from maskedlinear.checkpoint import MaskedArray
from maskedlinear.checkpoint._constraints import name_in_file
from maskedlinear.checkpoint._dtypes import bits
from maskedlinear.checkpoint._names import Expected
from maskedlinear.models import ParameterUser, WeightAxes
from maskedlinear_jax._checkpoint import (
    Array,
    expected_of,
    for_writer,
    masked_array,
    on_host,
    plain_array,
    warn_of_acting,
)
from maskedlinear_jax._compat import children
from maskedlinear_jax.flax._constraint_variables import Constraint, constraint_variables
from maskedlinear_jax.flax._kernel import full_kernel, recipe_of
from maskedlinear_jax.flax._modules import at
from maskedlinear_jax.flax._nnx import MaskedLinear
from maskedlinear_jax.flax._sparse_nnx import PatternIndex, SparseLinear
from maskedlinear_jax.flax._weights import MaskedParameter, masked_weights, module_axes, parameter_names

__all__ = ["StateArray", "is_nnx", "live_of", "module_arrays", "module_expected", "state_arrays"]

_NORMS = {
    nnx.BatchNorm: "batch_norm",
    nnx.GroupNorm: "group_norm",
    nnx.LayerNorm: "layer_norm",
    nnx.RMSNorm: "rms_norm",
}
_PARTS = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


class StateArray(NamedTuple):
    """An array of a model's state.

    Attributes:
        path: the keys on the way to it.
        value: the Variable; or the array, where a module holds one by itself.
        holder: the module or container that has it.
        parent: what has that.
        masked: its masks, one a module that masks it.
        sparse: the layer, if these are the values of one in the sparse form.
    """

    path: tuple[Any, ...]
    value: Any
    holder: Any
    parent: Any
    masked: list[MaskedParameter]
    sparse: SparseLinear | None

    @property
    def name(self) -> str:
        """What a file calls it: values in the sparse form as the kernel that they are."""
        keys = self.path if self.sparse is None else (*self.path[:-1], "kernel")
        return ".".join(map(str, keys))

    @property
    def array(self) -> Any:
        """The array itself, or an abstract one."""
        return self.value.get_value() if isinstance(self.value, nnx.Variable) else self.value

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in a file: of values in the sparse form that of the kernel, or of the kernels of a stack."""
        if self.sparse is None:
            return tuple(np.shape(self.array))
        return (*self.array.shape[:-1], self.sparse.in_features, self.sparse.out_features)

    @property
    def axes(self) -> WeightAxes | None:
        """What its axes mean, ``None`` if nobody knows."""
        if self.sparse is not None:
            stack = range(len(self.shape) - 2)
            return WeightAxes(out_axis=len(stack) + 1, in_axis=len(stack), batch_axis=tuple(stack))
        if not isinstance(self.value, nnx.Param) or len(self.shape) < 2:
            return None
        user = ParameterUser(self.name, self.name, self.holder, str(self.path[-1]))
        return module_axes(user, self.array)[0]

    @property
    def role(self) -> str:
        """What it is to its module; empty if nobody knows."""
        own = str(self.path[-1])
        part = _PARTS.get(own, own)
        if isinstance(self.value, nnx.RngState):
            return "rng.count"  # of keys the kind is added
        if self.sparse is not None:
            return "linear.weight"
        for kind, name in _NORMS.items():
            if isinstance(self.holder, kind):
                return f"{name}.{part}"
        if isinstance(self.parent, nnx.MultiHeadAttention) and self.path[-2] in ("query", "key", "value", "out"):
            return f"attention.{self.path[-2]}.{part}"
        if isinstance(self.holder, nnx.Linear | nnx.LinearGeneral):
            return f"linear.{part}" if part in ("weight", "bias") else ""
        if isinstance(self.holder, nnx.Conv):
            return f"conv.{part}"
        if isinstance(self.holder, nnx.ConvTranspose):
            is_flipped = part == "weight" and not self.holder.transpose_kernel
            return f"conv_transpose{'_flipped' if is_flipped else ''}.{part}"
        return f"embedding.{part}" if isinstance(self.holder, nnx.Embed) else ""


def is_nnx(model: Any) -> bool:
    """Whether this is an nnx module, or a list, tuple or dict that holds some."""
    if isinstance(model, nnx.Module):
        return True
    parts = model.values() if isinstance(model, Mapping) else model if isinstance(model, list | tuple) else ()
    return any(map(is_nnx, parts))


def state_arrays(model: Any) -> dict[str, StateArray]:
    """Return what a model's state is made of, by the names that files have; a Variable under each of its names."""
    paths = {path for path, _ in nnx.to_flat_state(nnx.state(model))}
    held = {id(value) for path in paths if isinstance(value := at(model, path), nnx.Variable)}
    masks: dict[int, list[MaskedParameter]] = {}
    sparse: dict[int, SparseLinear] = {}
    for weight in masked_weights(model, sparse=True).values():
        if isinstance(weight, SparseLinear):
            sparse[id(weight.weight_values)] = weight
        else:
            masks.setdefault(id(weight.kernel), []).append(weight)
    hidden = {id(part) for weights in masks.values() for one in weights for part in (one.mask_variable, one.dormant)}
    found = {}
    for path, value, holder, parent in _walk(model, (), ()):
        is_held = id(value) in held if isinstance(value, nnx.Variable) else path in paths
        if is_held and id(value) not in hidden and not isinstance(value, PatternIndex | Constraint):
            array = StateArray(path, value, holder, parent, masks.get(id(value), []), sparse.get(id(value)))
            if array.name in found:
                raise ValueError(
                    f"a file has one array of each name; the model has two called {array.name}: rename one"
                )
            found[array.name] = array
    return found


def _walk(node: Any, path: tuple[Any, ...], above: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any, Any, Any]]:
    """Yield all that nodes hold and that is no node: its path, itself, its holder, and what holds that."""
    if isinstance(node, Mapping):
        held: Any = node.items()
    elif isinstance(node, list | tuple | nnx.List):
        held = enumerate(node)
    else:
        held = children(node).items()
    for key, child in held:
        if isinstance(child, nnx.Pytree | Mapping | list | tuple) and not isinstance(child, nnx.Variable):
            if all(child is not one for one in (node, *above)):
                yield from _walk(child, (*path, key), (node, *above))
        else:
            yield (*path, key), child, node, above[0] if above else None


def live_of(model: Any) -> dict[str, NDArray[np.bool_]]:
    """Return the masks of a model's masked parameters, by their names in ``nnx.state(model, nnx.Param)``."""
    names = parameter_names(model)
    return {names[id(weight.kernel)]: on_host("a mask", weight.live) for weight in masked_weights(model).values()}


def module_expected(model: Any) -> dict[str, Expected]:
    """Return what a file must have for a model; one object for what is shared."""
    made: dict[int, Expected] = {}
    found = {}
    for name, one in state_arrays(model).items():
        if id(one.value) not in made:
            told = expected_of(name, one.array, one.axes, one.role)
            made[id(one.value)] = Expected(one.shape if one.sparse else told.shape, told.dtype, told.axes, told.role)
        found[name] = made[id(one.value)]
    return found


def module_arrays(model: Any, dormant: bool) -> dict[str, Array]:
    """Return what a file holds of a model; one object for what is shared.

    Raises:
        ValueError: if modules that share a parameter mask it differently, or one is abstract.
        TypeError: if something is no array, traced, or of a dtype that no file holds.
    """
    made: dict[int, Array] = {}
    found: dict[str, Array] = {}
    acting = []
    for name, one in state_arrays(model).items():
        if id(one.value) not in made:
            made[id(one.value)] = _array_of(name, one, dormant)
            if _acts_under_mask(one):
                acting.append(name)
            found |= _constraint_arrays(name, one)
        found[name] = made[id(one.value)]
    warn_of_acting(acting)
    return found


def _constraint_arrays(name: str, one: StateArray) -> dict[str, Array]:
    """Return what a file holds of a weight's constraints."""
    is_layer = one.sparse is not None or any(weight.is_ours for weight in one.masked)
    if one.sparse is not None:
        variables = constraint_variables(one.sparse, "weight_values")
    else:
        owner = next(iter(one.masked), None)
        variables = {} if owner is None else constraint_variables(owner.owner, owner.parameter)
    held = {name_in_file(name, kind, is_layer=is_layer): variable for kind, variable in variables.items()}
    return {own: plain_array(own, variable.get_value()) for own, variable in held.items()}


def _acts_under_mask(one: StateArray) -> bool:
    """Whether a masked parameter is not +0 under its mask, though a module reads it that does not select by it."""
    users = [weight for weight in one.masked if not isinstance(weight.owner, MaskedLinear)]
    return bool(users) and any(bool(((one.array != 0) & ~weight.live).any()) for weight in users)


def _array_of(name: str, one: StateArray, dormant: bool) -> Array:
    if one.sparse is not None:
        return _sparse_array(name, one)
    if not one.masked:
        return plain_array(name, one.array, one.axes, one.role)
    plain_array(name, one.array)  # or an error
    lives = [on_host(f"the mask of {name}", weight.live) for weight in one.masked]
    if any(not np.array_equal(live, lives[0]) for live in lives):
        raise ValueError(f"a weight has one mask, whoever shares it; {name} has different ones: set them by set_masks")
    told = {"axes": one.axes, "role": one.role, "recipe": recipe_of(one.masked[0].mask_variable)}
    kept = next((weight.dormant for weight in one.masked if weight.dormant is not None), None)
    if dormant and kept is not None:
        full = full_kernel(one.array, one.masked[0].live, kept.get_value())
        return masked_array(name, full, lives[0], dormant=True, **told)
    return masked_array(name, one.array, lives[0], **told)


def _sparse_array(name: str, one: StateArray) -> MaskedArray:
    """Return the values of a layer in the sparse form, or of a stack, in the order of the kernel, (in, out)."""
    layer: Any = one.sparse
    held = bits(on_host(name, one.array)).reshape(-1)
    size = layer.in_features * layer.out_features
    places = np.concatenate(
        [
            pattern.indices.astype(np.int64) * layer.out_features + pattern.rows + number * size
            for number, pattern in enumerate(layer.patterns)
        ]
        or [np.zeros(0, np.int64)]
    )
    order = np.argsort(places)
    recipe = recipe_of(layer.indices)
    told = expected_of(name, one.array)
    made = MaskedArray(one.shape, told.dtype, held[order], places[order], None, one.axes, "sparse", one.role, recipe)
    return for_writer(made, one.array)
