"""Which parameters of an nnx model are weights, what their axes mean, which have masks, and why others are left out.

A mask lies where its weight is: a ``MaskedLinear`` has its own, every other module gets a Variable that holds it, as
``kernel_mask``, and computes as before, with a kernel that is +0 under it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array

from maskedlinear.models import (
    ModelWeight,
    ParameterUser,
    WeightAxes,
    axes_by_name,
    checked_axes,
    describe_weight,
    is_norm,
    why_left_out,
)
from maskedlinear_jax._placement import full_like, to_like
from maskedlinear_jax.flax._constraint_variables import (
    check_keeps_fixed,
    constraint_variables,
    fixed_entries,
    hold_constraints,
    keep_own,
    trusted_by,
)
from maskedlinear_jax.flax._kernel import (
    Dormant,
    Mask,
    checked_mask,
    mask_names,
    masked_kernel,
    remember_recipe,
    set_variables,
    sharding_of,
    weight_name,
)
from maskedlinear_jax.flax._modules import at, children_of
from maskedlinear_jax.flax._nnx import MaskedLinear
from maskedlinear_jax.flax._sparse_nnx import SparseLinear

__all__ = [
    "MaskedParameter",
    "mask_weight",
    "masked_weights",
    "model_weights",
    "parameter_names",
    "register_axes",
    "share_mask",
]

Axes = Mapping[str, WeightAxes]


class MaskedParameter(NamedTuple):
    """A masked weight of an nnx model.

    Attributes:
        owner: the module that has it; or a mapping, as a bridged linen model holds its variables.
        parameter: its name there.
        full_name: what it is called in ``nnx.state(model)``.
        axes: what its axes mean; ``None`` if nobody knows.
    """

    owner: Any
    parameter: str
    full_name: str
    axes: WeightAxes | None

    @property
    def kernel(self) -> nnx.Variable[Array]:
        """The parameter."""
        variable: nnx.Variable[Array] = children_of(self.owner)[self.parameter]
        return variable

    @property
    def value(self) -> Any:
        """The parameter's array."""
        return self.kernel.get_value()

    @property
    def key(self) -> int:
        """What is the same for weights that are one."""
        return id(self.kernel)

    @property
    def is_ours(self) -> bool:
        """Whether a layer of ours has it, which selects by its mask."""
        return isinstance(self.owner, MaskedLinear)

    @property
    def mask_variable(self) -> Mask:
        """The Variable of its mask."""
        variable: Mask = children_of(self.owner)[self._names[0]]
        return variable

    @property
    def dormant(self) -> Dormant | None:
        """The Variable of what is dormant, if that is kept."""
        variable = children_of(self.owner).get(self._names[1])
        return variable if isinstance(variable, Dormant) else None

    @property
    def mask(self) -> Any:
        """The mask as it is; full, of a layer made by ``nnx.eval_shape`` that was never given one."""
        return self.owner._own_mask() if self.is_ours else self.mask_variable.get_value()

    @property
    def live(self) -> Array:
        """The mask, of the weight's shape: a stack of layers may share one."""
        return jnp.broadcast_to(checked_mask(self.value, self.mask), self.value.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of the weight, its mask and what is dormant; of a layer of ours all that it has."""
        held: Any = [self.kernel, self.mask_variable, self.dormant]
        if self.is_ours:
            held = [part for part in vars(self.owner).values() if isinstance(part, nnx.Variable)]
        return sum(
            math.prod(part.get_value().shape) * part.get_value().dtype.itemsize for part in held if part is not None
        )

    def set_mask(self, new: Array, pruned: Array | None = None) -> None:
        """Give the weight another mask, checked and its own; weights move."""
        old = self.mask_variable.get_value()
        new = to_like(new, self.value if new.shape == self.value.shape else old, f"the mask of {self.full_name}")
        new = check_keeps_fixed(self.owner, self.parameter, new, self.full_name)
        set_variables(self.kernel, self.mask_variable, self.dormant, new, pruned)
        keep_own(self.owner, self.parameter, new, trusted_by(new, old))

    @property
    def fixed(self) -> Any:
        """Which entries are fixed, of the weight's shape; ``None`` if none is."""
        return fixed_entries(self.owner, self.parameter)

    def release(self) -> None:
        """Give the weight back to its module as it acts; what is dormant is dropped. Subclasses of ours stay masked."""
        if type(self.owner) is MaskedLinear:
            self.owner.release()
        elif isinstance(self.owner, nnx.Module) and not self.is_ours:
            self.kernel.set_value(masked_kernel(self.value, self.mask))
            hold_constraints(self.owner, self.parameter, {})
            for name in self._names:
                if hasattr(self.owner, name):
                    delattr(self.owner, name)

    @property
    def _names(self) -> tuple[str, str]:
        return mask_names(children_of(self.owner), self.parameter)


class _Own(NamedTuple):
    """The shape that a module gives a parameter, and what its axes mean; one more axis is that of a stack of modules."""

    shape: tuple[int, ...]
    axes: WeightAxes


def _linear(layer: Any) -> _Own:
    return _Own((layer.in_features, layer.out_features), WeightAxes(out_axis=1, in_axis=0))


def _general(layer: Any) -> _Own:
    parts = tuple(layer.batch_axis.values()), layer.in_features, layer.out_features
    counts = iter(range(sum(map(len, parts))))
    batch, in_, out = (tuple(itertools.islice(counts, len(part))) for part in parts)
    return _Own(parts[0] + parts[1] + parts[2], WeightAxes(batch_axis=batch, in_axis=in_, out_axis=out))


def _einsum(layer: Any) -> _Own | None:
    if not layer.einsum_str:
        return None
    inputs, result = layer.einsum_str.replace(" ", "").split("->")
    x, kernel = inputs.split(",")
    if not kernel.isalpha():
        return None
    axes: dict[str, list[int]] = {"batch_axis": [], "in_axis": [], "out_axis": []}
    for place, letter in enumerate(kernel):
        kind = "in_axis" if letter not in result else "batch_axis" if letter in x else "out_axis"
        axes[kind].append(place)
    return _Own(tuple(layer.kernel_shape), WeightAxes(**{kind: tuple(places) for kind, places in axes.items()}))


def _convolution(layer: Any) -> _Own:
    shape = tuple(layer.kernel_shape)
    last, turned = len(shape) - 1, getattr(layer, "transpose_kernel", False)
    out, in_ = (last - 1, last) if turned else (last, last - 1)
    window = tuple(range(last - 1))  # after the channels, as PyTorch has it
    return _Own(shape, WeightAxes(out_axis=out, in_axis=(in_, *window), window_axis=window))


def _embedding(layer: Any) -> _Own:
    return _Own((layer.num_embeddings, layer.features), WeightAxes(out_axis=1, in_axis=0))


_table: dict[type, Mapping[str, Callable[[Any], _Own | None] | WeightAxes]] = {
    nnx.Linear: {"kernel": _linear},
    nnx.LinearGeneral: {"kernel": _general},
    nnx.Einsum: {"kernel": _einsum},
    nnx.Conv: {"kernel": _convolution},
    nnx.ConvTranspose: {"kernel": _convolution},
    nnx.Embed: {"embedding": _embedding},  # masked when it is asked for by name
    nnx.LoRA: {"lora_[ab]": WeightAxes(out_axis=1, in_axis=0)},  # the same
}


def register_axes(kind: type[nnx.Module], axes: Axes) -> None:
    """Say which parameters of an nnx module type are weights, and what their axes mean; for its subclasses too::

        register_axes(Experts, {"up": WeightAxes(batch_axis=0, in_axis=1, out_axis=2)})

    Args:
        kind: the type; what it says goes before what its base classes say.
        axes: by the parameter's name, or a shell pattern of names.

    Raises:
        TypeError: if ``kind`` is no module type, or the axes of a name are no ``WeightAxes``.
    """
    _table[kind] = checked_axes(kind, nnx.Module, axes)


def module_axes(user: ParameterUser, value: Any) -> tuple[WeightAxes | None, bool]:
    """Return what the axes of a module's parameter mean, ``None`` if nobody knows; and whether its module's type says so."""
    shape = tuple(value.shape)
    for kind in type(user.module).__mro__:
        for pattern, entry in _table.get(kind, {}).items():
            if fnmatchcase(user.parameter, pattern):
                own = _Own(shape, entry) if isinstance(entry, WeightAxes) else entry(user.module)
                return (None, False) if own is None else (_stacked(own, shape), True)
    return axes_by_name(user.full_name, len(shape)), False


def _stacked(own: _Own, shape: tuple[int, ...]) -> WeightAxes | None:
    """Return the axes of a parameter of a stack of modules, as ``nnx.vmap`` makes it: its own, and those of the stack.

    Nothing but the shapes says which these are: those without which the parameter has its module's shape, the first of them.
    """
    every = range(len(shape))
    for stack in itertools.combinations(every, max(len(shape) - len(own.shape), 0)):
        places = [axis for axis in every if axis not in stack]
        if tuple(shape[axis] for axis in places) == own.shape:
            batch, out, in_ = (tuple(places[axis] for axis in axes) for axes in own.axes.order(len(places)))
            window = own.axes.window_axis if isinstance(own.axes.window_axis, tuple) else (own.axes.window_axis,)
            window = tuple(places[axis] for axis in window)
            return WeightAxes(out_axis=out, in_axis=in_, batch_axis=(*stack, *batch), window_axis=window)
    return None


def model_weights(model: Any) -> list[ModelWeight]:
    """Return the parameters of a model, each once, and what can be said of them."""
    names = parameter_names(model)
    weights: dict[int, ModelWeight] = {}
    for path, module in nnx.iter_graph(model):
        children = children_of(module)
        for key, variable in children.items():
            if isinstance(variable, nnx.Param) and id(variable) in names:
                weight = weights.setdefault(id(variable), ModelWeight(variable.get_value(), []))
                name = weight_name((*filter(None, [".".join(map(str, path))]), str(key)))
                weight.users.append(ParameterUser(name, names[id(variable)], module, str(key)))
                if isinstance(module, SparseLinear) and key == "weight_values":
                    weight.sparse = module
                mask = children.get(mask_names(children, str(key))[0])
                weight.mask = mask if isinstance(mask, Mask) else weight.mask
    for weight in weights.values():
        describe_weight(weight, nnx.Embed, _why_fixed, module_axes, _why_left_out)
    return list(weights.values())


def _why_fixed(user: ParameterUser, value: Any) -> str:
    if not isinstance(user.module, nnx.Module) or isinstance(user.module, nnx.List | nnx.Dict):
        return "in a container, which is no module: hold it as an attribute of one, or mask it by prune_tree"
    children = children_of(user.module)
    own, *_ = names = mask_names(children, user.parameter)
    if any(name in children for name in names) and not isinstance(children.get(own), Mask):
        return f"in a module that calls something else {own}"
    return "" if jnp.issubdtype(value.dtype, jnp.floating) else "not of a floating dtype"


def _why_left_out(user: ParameterUser, weight: ModelWeight, known: bool) -> str:
    if isinstance(children_of(user.module)[user.parameter], nnx.LoRAParam):
        return "adapter"
    if isinstance(user.module, nnx.Embed):
        return "embedding"
    why = why_left_out(user.full_name, weight.value.ndim)
    if known:
        return why if why in ("bias", "adapter") else ""
    return "norm" if is_norm(type(user.module)) and why != "bias" else why


def masked_weights(model: Any, axes: Axes | None = None, *, sparse: bool = False) -> dict[str, Any]:
    """Return the masked weights of a model, by name, in its order: a :class:`MaskedParameter` each.

    If they are asked for, layers of the sparse form too, each a ``SparseLinear``. What ``axes`` say by full names goes
    before what is known.
    """
    names = parameter_names(model)
    found: dict[str, Any] = {}
    for path, module in nnx.iter_graph(model):
        if sparse and isinstance(module, SparseLinear):
            found[".".join(map(str, path))] = module
        children = children_of(module)
        for key, variable in children.items():
            if isinstance(variable, nnx.Variable) and isinstance(children.get(mask_names(children, str(key))[0]), Mask):
                keys = (*map(str, path), str(key))
                user = ParameterUser(weight_name(keys), ".".join(keys), module, str(key))
                full_name = names.get(id(variable), user.full_name)
                known = (axes or {}).get(full_name) or module_axes(user, variable.get_value())[0]
                found[user.name] = MaskedParameter(module, user.parameter, full_name, known)
    return found


def parameter_names(model: Any) -> dict[int, str]:
    """Return what the parameters of a model are called in ``nnx.state(model)``, by the identity of the Variable."""
    return {id(at(model, path)): ".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def mask_weight(weight: ModelWeight, mask: Array | None, keep_dormant: bool, given: Any = None) -> None:
    """Give a weight its mask, in every module that holds it: plain linear layers become ours, others get two Variables.

    ``given`` is what the mask was made of.
    """
    variable = children_of(weight.users[0].module)[weight.users[0].parameter]
    kernel, sharding = variable.get_value(), sharding_of(variable)
    if mask is not None:
        mask = to_like(mask, kernel, f"the mask of {weight.full_name}")
    live = Mask(full_like(kernel, True, bool) if mask is None else mask, **sharding)
    pruned = full_like(kernel, 0) if mask is None else masked_kernel(kernel, ~mask)
    remember_recipe(live, given)
    dormant = Dormant(pruned, **sharding) if keep_dormant else None
    for user in weight.users:
        _hold_mask(user, live, dormant)
    if mask is not None:
        variable.set_value(masked_kernel(kernel, mask))


def share_mask(weight: ModelWeight) -> None:
    """Give the mask of a weight to those of its modules that have none, as they came to hold it later."""
    held = {user: mask_names(children_of(user.module), user.parameter) for user in weight.users}
    masked = {user: children_of(user.module) for user, (own, _) in held.items() if own in children_of(user.module)}
    dormant = next((children.get(held[user][1]) for user, children in masked.items()), None)
    constraints = next((constraint_variables(user.module, user.parameter) for user in masked), {})
    for user in weight.users:
        if user not in masked:
            _hold_mask(user, weight.mask, dormant)
            hold_constraints(user.module, user.parameter, constraints)


def _hold_mask(user: ParameterUser, live: Mask, dormant: Dormant | None) -> None:
    module = user.module
    if type(module) is nnx.Linear and user.parameter == "kernel":
        MaskedLinear.adopt(module, live.get_value(), keep_dormant=dormant is not None)
    for name, held in zip(mask_names(children_of(module), user.parameter), (live, dormant), strict=True):
        if held is not None or isinstance(module, MaskedLinear):
            setattr(module, name, held)
