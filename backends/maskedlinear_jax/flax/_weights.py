"""Which parameters of an nnx model are weights, what their axes mean, which have masks, and why others are left out.

A mask lies where its weight is: a ``MaskedLinear`` has its own, every other module gets a Variable that holds it, as
``kernel_mask``, and computes as before, with a kernel that is +0 under it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from maskedlinear.models import SHARED, WeightAxes, axes_by_name, checked_axes, is_norm, why_left_out
from maskedlinear_jax._compat import is_traced
from maskedlinear_jax.flax._kernel import (
    Dormant,
    Mask,
    checked_mask,
    mask_names,
    masked_kernel,
    set_variables,
    sharding_of,
    weight_name,
)
from maskedlinear_jax.flax._modules import at, children_of
from maskedlinear_jax.flax._nnx import MaskedLinear
from maskedlinear_jax.flax._sparse_nnx import SparseLinear

__all__ = [
    "MaskedParameter",
    "ModelWeight",
    "mask_weight",
    "masked_weights",
    "model_weights",
    "parameter_names",
    "register_axes",
]

Axes = Mapping[str, WeightAxes]


class MaskedParameter(NamedTuple):
    """A masked weight of an nnx model.

    Attributes:
        module: the module that has it; or a mapping, as a bridged linen model holds its variables.
        parameter: its name there.
        axes: what its axes mean; ``None`` if nobody knows.
    """

    module: Any
    parameter: str
    axes: WeightAxes | None

    @property
    def kernel(self) -> nnx.Variable[Array]:
        """The parameter."""
        variable: nnx.Variable[Array] = children_of(self.module)[self.parameter]
        return variable

    @property
    def mask(self) -> Mask:
        """The Variable of its mask."""
        variable: Mask = children_of(self.module)[self._names[0]]
        return variable

    @property
    def dormant(self) -> Dormant | None:
        """The Variable of what is dormant, if that is kept."""
        variable = children_of(self.module).get(self._names[1])
        return variable if isinstance(variable, Dormant) else None

    @property
    def own_mask(self) -> Any:
        """The mask as it is; full, of a layer made by ``nnx.eval_shape`` that was never given one."""
        return self.module._own_mask() if isinstance(self.module, MaskedLinear) else self.mask.get_value()

    @property
    def live(self) -> Array:
        """The mask, of the weight's shape: a stack of layers may share one."""
        return jnp.broadcast_to(checked_mask(self.kernel.get_value(), self.own_mask), self.kernel.get_value().shape)

    @property
    def nbytes(self) -> int:
        """The bytes of the weight, its mask and what is dormant; of a layer of ours all that it has."""
        held: Any = [self.kernel, self.mask, self.dormant]
        if isinstance(self.module, MaskedLinear):
            held = [part for part in vars(self.module).values() if isinstance(part, nnx.Variable)]
        return sum(
            math.prod(part.get_value().shape) * part.get_value().dtype.itemsize for part in held if part is not None
        )

    def set_mask(self, new: Array, pruned: Array | None = None) -> None:
        """Give the weight another mask, checked and its own; weights move."""
        old = self.mask.get_value()
        if isinstance(old, jax.Array) and not is_traced(old) and not is_traced(new) and old.shape == new.shape:
            new = jax.device_put(new, old.sharding)
        set_variables(self.kernel, self.mask, self.dormant, new, pruned)

    def release(self) -> None:
        """Give the weight back to its module as it acts; what is dormant is dropped. Subclasses of ours stay masked."""
        if type(self.module) is MaskedLinear:
            self.module.release()
        elif isinstance(self.module, nnx.Module) and not isinstance(self.module, MaskedLinear):
            self.kernel.set_value(masked_kernel(self.kernel.get_value(), self.own_mask))
            for name in self._names:
                if hasattr(self.module, name):
                    delattr(self.module, name)

    @property
    def _names(self) -> tuple[str, str]:
        return mask_names(children_of(self.module), self.parameter)


class User(NamedTuple):
    """A module that holds a parameter: its path in the model, and the parameter's name there."""

    path: str
    module: Any
    parameter: str

    @property
    def name(self) -> str:
        """What the parameter's mask is called: of a ``kernel`` as the module is, of any other with its own name."""
        return weight_name((*filter(None, [self.path]), self.parameter))


@dataclass
class ModelWeight:
    """A parameter of an nnx model.

    Attributes:
        variable: the parameter.
        users: the modules that hold it, in the model's order.
        full_name: what it is called in ``nnx.state(model)``.
        axes: what its axes mean; ``None`` if nobody knows.
        why: why it is not masked unless it is asked for by name; empty if it is.
        fixed: whether it cannot be masked at all.
    """

    variable: nnx.Variable[Array]
    users: list[User]
    full_name: str
    axes: WeightAxes | None = None
    why: str = ""
    fixed: bool = False

    @property
    def is_masked(self) -> bool:
        """Whether it has a mask in one of its modules."""
        return any(
            isinstance(children.get(mask_names(children, name)[0]), Mask)
            for _, module, name in self.users
            for children in [children_of(module)]
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape."""
        return tuple(self.variable.get_value().shape)


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
    return _Own(
        shape, WeightAxes(out_axis=out, in_axis=(in_, *range(last - 1)))
    )  # channels before the window, as PyTorch


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


def axes_of(module: Any, parameter: str, name: str, shape: tuple[int, ...]) -> tuple[WeightAxes | None, bool]:
    """Return what the axes of a module's parameter mean, ``None`` if nobody knows; and whether its module's type says so."""
    for kind in type(module).__mro__:
        for pattern, entry in _table.get(kind, {}).items():
            if fnmatchcase(parameter, pattern):
                own = _Own(shape, entry) if isinstance(entry, WeightAxes) else entry(module)
                return (None, False) if own is None else (_stacked(own, shape), True)
    return axes_by_name(name, len(shape)), False


def _stacked(own: _Own, shape: tuple[int, ...]) -> WeightAxes | None:
    """Return the axes of a parameter of a stack of modules, as ``nnx.vmap`` makes it: its own, and those of the stack.

    Nothing but the shapes says which these are: those without which the parameter has its module's shape, the first of them.
    """
    every = range(len(shape))
    for stack in itertools.combinations(every, max(len(shape) - len(own.shape), 0)):
        places = [axis for axis in every if axis not in stack]
        if tuple(shape[axis] for axis in places) == own.shape:
            batch, out, in_ = (tuple(places[axis] for axis in axes) for axes in own.axes.order(len(places)))
            return WeightAxes(out_axis=out, in_axis=in_, batch_axis=(*stack, *batch))
    return None


def model_weights(model: Any) -> list[ModelWeight]:
    """Return the parameters of a model, each once, and what can be said of them."""
    names = parameter_names(model)
    weights: dict[int, ModelWeight] = {}
    for path, module in nnx.iter_graph(model):
        for name, variable in children_of(module).items():
            if isinstance(variable, nnx.Param) and id(variable) in names:
                weight = weights.setdefault(id(variable), ModelWeight(variable, [], names[id(variable)]))
                weight.users.append(User(".".join(map(str, path)), module, str(name)))
    for weight in weights.values():
        _describe(weight)
    return list(weights.values())


def _describe(weight: ModelWeight) -> None:
    """Find out a parameter's axes, and why it is left out."""
    weight.why = next(filter(None, (_why_fixed(user, weight.variable) for user in weight.users)), "")
    weight.fixed = weight.why != ""
    if weight.fixed:
        return
    layers = [user for user in weight.users if not isinstance(user.module, nnx.Embed)]
    known = False
    for _, module, parameter in layers or weight.users:
        if weight.axes is None:
            weight.axes, known = axes_of(module, parameter, weight.full_name, weight.shape)
    if layers and len(layers) < len(weight.users):
        weight.why = SHARED
    else:
        weight.why = next(filter(None, (_why_left_out(user, weight, known) for user in weight.users)), "")


def _why_fixed(user: User, variable: Any) -> str:
    if not isinstance(user.module, nnx.Module) or isinstance(user.module, nnx.List | nnx.Dict):
        return "in a container, which is no module: hold it as an attribute of one, or mask it by prune_tree"
    children = children_of(user.module)
    own, *_ = names = mask_names(children, user.parameter)
    if any(name in children for name in names) and not isinstance(children.get(own), Mask):
        return f"in a module that calls something else {own}"
    return "" if jnp.issubdtype(variable.get_value().dtype, jnp.floating) else "not of a floating dtype"


def _why_left_out(user: User, weight: ModelWeight, known: bool) -> str:
    _, module, _ = user
    if isinstance(weight.variable, nnx.LoRAParam):
        return "adapter"
    if isinstance(module, nnx.Embed):
        return "embedding"
    why = why_left_out(weight.full_name, len(weight.shape))
    if known:
        return why if why in ("bias", "adapter") else ""
    return "norm" if is_norm(type(module)) and why != "bias" else why


def masked_weights(model: Any, *, sparse: bool = False) -> dict[str, Any]:
    """Return the masked weights of a model, by name, in its order: a :class:`MaskedParameter` each.

    If they are asked for, layers of the sparse form too, each a ``SparseLinear``.
    """
    found: dict[str, Any] = {}
    for path, module in nnx.iter_graph(model):
        if sparse and isinstance(module, SparseLinear):
            found[".".join(map(str, path))] = module
        children = children_of(module)
        for key, variable in children.items():
            if isinstance(variable, nnx.Variable) and isinstance(children.get(mask_names(children, str(key))[0]), Mask):
                keys = (*map(str, path), str(key))
                axes, _ = axes_of(module, str(key), ".".join(keys), tuple(variable.get_value().shape))
                found[weight_name(keys)] = MaskedParameter(module, str(key), axes)
    return found


def parameter_names(model: Any) -> dict[int, str]:
    """Return what the parameters of a model are called in ``nnx.state(model)``, by the identity of the Variable."""
    return {id(at(model, path)): ".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def mask_weight(weight: ModelWeight, mask: Array | None, keep_dormant: bool) -> None:
    """Give a weight its mask, in every module that holds it: plain linear layers become ours, others get two Variables."""
    variable, sharding = weight.variable, sharding_of(weight.variable)
    kernel = variable.get_value()
    live = Mask(jnp.ones(kernel.shape, bool) if mask is None else mask, **sharding)
    pruned = jnp.zeros_like(kernel) if mask is None else masked_kernel(kernel, ~mask)
    dormant = Dormant(pruned, **sharding) if keep_dormant else None
    for _, module, parameter in weight.users:
        if type(module) is nnx.Linear and parameter == "kernel":
            MaskedLinear.adopt(module, mask, keep_dormant=keep_dormant)
        for name, held in zip(mask_names(children_of(module), parameter), (live, dormant), strict=True):
            if held is not None or isinstance(module, MaskedLinear):
                setattr(module, name, held)
    if mask is not None:
        variable.set_value(masked_kernel(kernel, mask))
