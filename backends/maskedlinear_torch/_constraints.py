"""What training keeps of live connections in a layer of either form: fixed values, signs, ties and bounds.

A layer has a framework-free :class:`maskedlinear.constraints.Constraints`; the tensors that a step needs are derived of it.
Every step of every optimizer is preceded and followed by what keeps them, as masks are; the guard does the same around
whatever wraps the step.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from maskedlinear.constraints import Constraints
from maskedlinear_torch._dtensors import as_dtensor_like, is_sharded, local_part
from maskedlinear_torch._storage import Version, version_of

__all__ = [
    "KEYS",
    "after_step",
    "before_step",
    "check_keeps_fixed",
    "check_not_tied",
    "constrained",
    "fixed_entries",
    "is_constraint",
    "keep",
    "load_constraints",
    "refuse_fixed_and_cut",
    "save_constraints",
    "set_constraints",
    "set_fixed_to_one",
    "stored",
    "taken_from",
    "watch_constrained",
]

PREFIX = "constraint_"
#: What a state calls the arrays.
KEYS = tuple(PREFIX + name for name in ("fixed", "signs", "ties", "lower", "upper"))

Index = tuple[Tensor, ...]


@dataclass
class Held:
    """The constraints of a weight as tensors, this process' part of them, on its device.

    Attributes:
        key: what they were derived of.
        fixed: where entries are fixed.
        ties: where entries are tied, and the number of the group of each.
        groups: how many groups there are.
        lower: the least values, of a shape that broadcasts; ``None`` if there are none.
        upper: the greatest.
    """

    key: Any
    fixed: Index | None
    ties: tuple[Index, Tensor] | None
    groups: int
    lower: Tensor | None
    upper: Tensor | None


@dataclass
class _Before:
    """What a step is undone to: the values that are fixed; and gradients as they were, if they were changed."""

    fixed: Tensor | None
    gradient: tuple[Tensor, Version | None] | None = None  # as it was left
    entries: tuple[tuple[Index, Tensor], ...] = ()


class _Steps:
    """The steps that a layer is in, by whose they are; a copy is in none."""

    def __init__(self) -> None:
        self.before: dict[int, _Before] = {}

    def __reduce__(self) -> tuple[type[_Steps], tuple[()]]:
        return _Steps, ()


_alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_held: weakref.WeakKeyDictionary[nn.Module, Held] = weakref.WeakKeyDictionary()
_steps: weakref.WeakKeyDictionary[nn.Module, _Steps] = weakref.WeakKeyDictionary()
_hooked: list[Any] = []


def constrained(module: nn.Module) -> bool:
    """Whether a module is a layer that has constraints."""
    return isinstance(getattr(module, "constraints", None), Constraints)


def stored(layer: Any) -> Tensor | None:
    """Return the parameter whose entries are constrained; ``None`` if it is computed."""
    weight: Tensor | None = layer.stored_weight if hasattr(layer, "mask") else layer._parameters.get("weight_values")
    return weight


def _like(layer: Any) -> Any:
    """Return what the constraints of a layer go by: its pattern, or its weight's shape."""
    return tuple(layer.mask.shape) if hasattr(layer, "mask") else layer.pattern


def is_constraint(name: str) -> bool:
    """Whether a name in a state or a file is that of a layer's constraint."""
    return name.rpartition(".")[2] in KEYS


def set_constraints(layer: Any, constraints: Constraints | None) -> None:
    """Give a layer constraints that were checked; or take them from it."""
    layer.__dict__.pop("constraints", None)
    _held.pop(layer, None)
    _steps.pop(layer, None)
    if constraints is not None:
        like = _like(layer)
        layer.constraints = constraints.for_weight(like) if isinstance(like, tuple) else constraints.for_pattern(like)
        watch_constrained(layer)


def watch_constrained(layer: nn.Module) -> None:
    """Look after a layer at each step from now on, if it has constraints."""
    if not constrained(layer):
        return
    _alive.add(layer)
    if not _hooked:
        _hooked.append(register_optimizer_step_pre_hook(_before_any_step))
        _hooked.append(register_optimizer_step_post_hook(_after_any_step))


def fixed_entries(layer: Any) -> NDArray[np.bool_] | None:
    """Return which entries of a layer's weight, or of its connections, are fixed; ``None`` if none are."""
    return layer.constraints.entries(_like(layer)).fixed if constrained(layer) else None


def check_keeps_fixed(layer: Any, new: Any) -> None:
    """Raise a ``ValueError`` if fixed connections, which are live by what they are, would be gone.

    Args:
        layer: of either form.
        new: the mask of one in the dense form, cut as it has its own; of the other, which connections are still there.
    """
    fixed = fixed_entries(layer)
    if fixed is None:
        return
    if isinstance(new, Tensor):
        whole = torch.from_numpy(np.array(fixed)).to(new.device)
        gone = (local_part(as_dtensor_like(whole, new)) & ~local_part(new)).nonzero().cpu().numpy()
    else:
        gone = np.setdiff1d(np.flatnonzero(fixed), new)[:, None]
    if len(gone):
        raise ValueError(
            f"a fixed connection stays live; {len(gone)} would be gone, the one at {tuple(map(int, gone[0]))} first: free "
            "them before, by constrain(model, ...), or leave them where they are"
        )


def refuse_fixed_and_cut(layers: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` that names a layer with fixed connections, where weights are cut over processes."""
    for name, layer in layers.items():
        if fixed_entries(layer) is not None:
            raise ValueError(
                f"{name or 'the layer'} has fixed connections, which are not known where weights are cut over processes: "
                "prune and regrow before they are, or leave it out with include=..."
            )


def held(layer: Any, weight: Tensor) -> Held:
    """Return the constraints of a layer as tensors for its weight, derived anew if one of them has changed.

    Raises:
        ValueError: if entries are tied that lie in several processes.
    """
    constraints, like = layer.constraints, _like(layer)
    cut = (weight.device_mesh, weight.placements) if is_sharded(weight) else None  # type: ignore[attr-defined]
    key = (constraints, like if isinstance(like, tuple) else id(like), local_part(weight).device, weight.dtype, cut)
    found = _held.get(layer)
    if found is not None and found.key == key:
        return found
    if cut is not None:
        check_not_tied(constraints)
    if getattr(layer, "_cut", None) is not None:
        raise ValueError(
            "the sparse form keeps no constraints under tensor parallelism, which has cut this layer: free it before, by "
            "constrain(model, ...), or use the dense form"
        )
    entries = constraints.entries(like)

    def tensor(array: Any, dtype: torch.dtype | None = None) -> Tensor | None:
        if array is None:
            return None
        whole = torch.from_numpy(np.array(array)).to(device=weight.device, dtype=dtype)
        if cut is None:
            return whole
        return local_part(as_dtensor_like(whole.expand(weight.shape).contiguous(), weight.detach()))

    fixed, groups = tensor(entries.fixed), entries.groups()
    lower, upper = (tensor(bound, weight.dtype) for bound in entries.bounds())
    ties = None
    if groups is not None and len(groups[0]):
        places = np.unravel_index(groups[0], tuple(weight.shape))
        index = tuple(torch.from_numpy(axis).to(weight.device) for axis in places)
        ties = index, torch.from_numpy(groups[1]).to(weight.device)
    number = 0 if ties is None else int(ties[1].max()) + 1
    where = None if fixed is None or not bool(fixed.any()) else fixed.nonzero(as_tuple=True)
    _held[layer] = Held(key, where, ties, number, lower, upper)
    return _held[layer]


def check_not_tied(constraints: Constraints) -> None:
    """Raise a ``ValueError`` if entries are tied of a weight that is cut over processes."""
    if constraints.ties is not None:
        raise ValueError(
            "ties are kept where one process has the whole weight; this one is cut over processes (FSDP2, tensor "
            "parallelism): leave its module out of them, or have no ties"
        )


def _live(layer: Any, index: Index) -> Tensor | None:
    """Return which of the entries at these places are live; ``None`` if all are."""
    return layer.mask[index] if hasattr(layer, "mask") else None


def _tied(values: Tensor, numbers: Tensor, groups: int, live: Tensor | None, trusted: Tensor | None) -> Tensor:
    """Return the mean of each group for each of its live members: bit for bit their value if they are equal.

    Those ``trusted`` alone make the mean, where a group has some.
    """
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    counts = torch.ones_like(wide) if live is None else live.to(wide.dtype)
    if trusted is not None:
        own = counts * trusted.to(wide.dtype)
        has = wide.new_zeros(groups).index_add_(0, numbers, own)[numbers] > 0
        counts = torch.where(has, own, counts)
    order = torch.arange(len(values), 0, -1, device=values.device)  # of the first that counts
    rank = torch.where(counts > 0, order, 0)
    best = rank.new_zeros(groups).scatter_reduce_(0, numbers, rank, "amax")
    first = wide[(len(values) - best.clamp(min=1))][numbers]
    spread = torch.where(counts > 0, wide - first, 0)
    total = wide.new_zeros(groups).index_add_(0, numbers, spread)
    differ = wide.new_zeros(groups).index_add_(0, numbers, spread.abs())
    number = wide.new_zeros(groups).index_add_(0, numbers, counts).clamp(min=1)
    mean = torch.where(differ[numbers] == 0, first, first + (total / number)[numbers]).to(values.dtype)
    return mean if live is None else torch.where(live, mean, values)


@torch.no_grad()
def keep(layer: Any, trusted: Tensor | None = None) -> None:
    """Make a layer's values keep ties and bounds, in place; of its weight what is live.

    Args:
        layer: of either form, with constraints.
        trusted: where, of a weight's shape, values are that those come to which are tied to them; others may be new.
    """
    weight = stored(layer)
    if weight is None or weight.is_meta or not constrained(layer) or (hasattr(layer, "mask") and layer.mask.is_meta):
        return
    own = held(layer, weight)
    values = local_part(weight).data  # past the version, as all that is projected
    if own.ties is not None:
        index, numbers = own.ties
        live = _live(layer, index)
        values[index] = _tied(values[index], numbers, own.groups, live, None if trusted is None else trusted[index])
    mask = local_part(as_dtensor_like(layer.mask, weight)) if hasattr(layer, "mask") else None
    for bound, outside in ((own.lower, torch.lt), (own.upper, torch.gt)):
        if bound is not None:
            wrong = outside(values, bound)
            wrong = wrong if mask is None else wrong & mask
            if bool(wrong.any()):
                values.copy_(torch.where(wrong, bound + 0.0, values))  # + 0.0, so that what ends at 0 is +0


@torch.no_grad()
def set_fixed_to_one(layer: Any) -> None:
    """Set the fixed connections of a layer to 1, as those that pass a node of a wiring on."""
    weight = stored(layer)
    if weight is not None and (fixed := held(layer, weight).fixed) is not None:
        local_part(weight).data[fixed] = 1.0


@torch.no_grad()
def before_step(layer: Any, optimizer: torch.optim.Optimizer, key: int, *, gradients: bool = True) -> None:
    """Note what is fixed; let the gradients of tied entries be their sum, and those of fixed ones 0, for a step.

    Args:
        layer: with constraints.
        optimizer: that steps: what it keeps of tied entries is made equal.
        key: whose step it is: there may be one in another.
        gradients: whether gradients are there; a closure makes them if not.
    """
    weight = stored(layer)
    if weight is None:
        return
    steps = _steps.setdefault(layer, _Steps()).before
    if key in steps:  # of a step that an error has ended: what was fixed and the gradients are as they were before
        after_step(layer, key)
    own = held(layer, weight)
    steps[key] = _Before(None if own.fixed is None else local_part(weight.detach())[own.fixed])
    if own.ties is not None:
        index, numbers = own.ties
        for kept in optimizer.state.get(weight, {}).values():
            if isinstance(kept, Tensor) and kept.shape == weight.shape and kept.is_floating_point():
                kept[index] = _tied(kept[index], numbers, own.groups, _live(layer, index), None)
    if gradients:
        _see_to_gradient(layer, weight, key)


@torch.no_grad()
def _see_to_gradient(layer: Any, weight: Tensor, key: int) -> None:
    """Sum and zero the entries of a gradient, once: not where a step around this one has."""
    gradient, own, steps = weight.grad, held(layer, weight), _steps[layer].before
    if gradient is None or gradient.layout is not torch.strided:
        return
    seen = version_of(gradient)
    for other in steps.values():
        if other.gradient is not None and other.gradient[0] is gradient and other.gradient[1] == seen is not None:
            return
    part, entries = local_part(gradient), []
    if own.ties is not None:
        index, numbers = own.ties
        values, live = part[index], _live(layer, index)
        entries.append((index, values))
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        wide = wide if live is None else torch.where(live, wide, 0)
        total = wide.new_zeros(own.groups).index_add_(0, numbers, wide)[numbers].to(values.dtype)
        part[index] = total if live is None else torch.where(live, total, values)
    if own.fixed is not None:
        entries.append((own.fixed, part[own.fixed]))
        part[own.fixed] = 0.0
    steps[key].gradient, steps[key].entries = (gradient, version_of(gradient)), tuple(entries)


@torch.no_grad()
def after_step(layer: Any, key: int) -> None:
    """Let a layer keep its constraints after a step, and give gradients back as they were."""
    weight = stored(layer)
    steps = _steps.get(layer)
    before = None if steps is None else steps.before.pop(key, None)
    if weight is None:
        return
    keep(layer)
    own = held(layer, weight)
    if before is None:
        return
    if own.fixed is not None and before.fixed is not None and len(before.fixed) == len(own.fixed[0]):
        local_part(weight).data[own.fixed] = before.fixed
    if before.gradient is not None:
        gradient, version = before.gradient
        if weight.grad is gradient and version_of(gradient) == version:
            for index, values in reversed(before.entries):
                local_part(gradient)[index] = values


def _layers_of(optimizer: torch.optim.Optimizer) -> list[Any]:
    if not _alive:
        return []
    params = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [layer for layer in list(_alive) if constrained(layer) and id(stored(layer)) in params]


def _before_any_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    layers = _layers_of(optimizer)
    if not layers:
        return None
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    for layer in layers:
        before_step(layer, optimizer, id(optimizer), gradients=closure is None)
    if closure is None:
        return None

    def constrained_closure(*arguments: Any, **options: Any) -> Any:
        loss = closure(*arguments, **options)
        for layer in layers:
            weight = stored(layer)
            if weight is not None:
                _see_to_gradient(layer, weight, id(optimizer))
        return loss

    if len(args) > 1:
        return (args[0], constrained_closure, *args[2:]), kwargs
    return args, {**kwargs, "closure": constrained_closure}


def _after_any_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for layer in _layers_of(optimizer):
        after_step(layer, id(optimizer))


def save_constraints(layer: Any, destination: Any, prefix: str) -> None:
    """Add a layer's constraints to a state."""
    if constrained(layer):
        weight = stored(layer)
        device = torch.device("cpu") if weight is None else weight.device
        for name, array in layer.constraints.arrays().items():
            destination[prefix + PREFIX + name] = torch.from_numpy(array.copy()).to(device)


def taken_from(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Take a layer's constraints out of a state, which is changed."""
    arrays = {key.removeprefix(PREFIX): state.pop(prefix + key) for key in KEYS if prefix + key in state}
    return {name: array.detach().cpu().numpy() for name, array in arrays.items() if not array.is_meta}


def load_constraints(layer: Any, arrays: Mapping[str, Any], prefix: str, error_msgs: list[str]) -> None:
    """Let a layer have the constraints of a state that it has loaded; those that it had, if the state has none."""
    weight = stored(layer)
    try:
        if arrays:
            made = Constraints(**arrays)
            made.entries(_like(layer))
            set_constraints(layer, made)
        elif constrained(layer):
            set_constraints(layer, layer.constraints)  # which follow connections that others took the places of
        if weight is not None and constrained(layer) and not weight.is_meta:
            if hasattr(layer, "mask"):
                check_keeps_fixed(layer, layer.mask)
            keep(layer)
    except (ValueError, TypeError) as error:
        error_msgs.append(f"{prefix}constraints: {error}")
