"""What the frameworks say of a model's parameters, and which of them ``mask_model`` masks: the same rule in all of them."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from maskedlinear.models._axes import WeightAxes
from maskedlinear.models._names import SHARED
from maskedlinear.pruning._layers import Include, asked_by_name, select_weights

__all__ = ["ModelWeight", "ParameterUser", "check_one_mask", "describe_weight", "weights_to_mask"]


class ParameterUser(NamedTuple):
    """Who holds a parameter: what its mask and it are called by this road, the module, and the parameter's key there."""

    name: str
    full_name: str
    module: Any
    parameter: Any


@dataclass(eq=False)
class ModelWeight:
    """A parameter of a model.

    Attributes:
        value: the parameter's array.
        users: who holds it, in the model's order.
        mask: what has its mask, if it has one.
        sparse: the layer, if its weight is in the sparse form.
        axes: what its axes mean; ``None`` if nobody knows.
        why: why it is not masked unless it is asked for by name; empty if it is.
        fixed: whether it cannot be masked at all.
    """

    value: Any
    users: list[ParameterUser]
    mask: Any = None
    sparse: Any = None
    axes: WeightAxes | None = None
    why: str = ""
    fixed: bool = False

    @property
    def name(self) -> str:
        """What its mask is called, by its first user."""
        return self.users[0].name

    @property
    def full_name(self) -> str:
        """What it is called in the model's state, by its first user."""
        return self.users[0].full_name


def describe_weight(
    weight: ModelWeight,
    embeddings: type | tuple[type, ...],
    why_fixed: Callable[[ParameterUser, Any], str],
    axes_of: Callable[[ParameterUser, Any], tuple[WeightAxes | None, bool]],
    why_left_out: Callable[[ParameterUser, ModelWeight, bool], str],
) -> None:
    """Find out what a parameter's axes mean (and whether its module tells), and why it is left out, from all its users."""
    weight.why = next(filter(None, (why_fixed(user, weight.value) for user in weight.users)), "")
    weight.fixed = weight.why != ""
    if weight.fixed:
        return
    layers, known = [user for user in weight.users if not isinstance(user.module, embeddings)], False
    for user in layers or weight.users:
        if weight.axes is None:
            weight.axes, known = axes_of(user, weight.value)
    if layers and len(layers) < len(weight.users):
        weight.why = SHARED
    else:
        weight.why = next(filter(None, (why_left_out(user, weight, known) for user in weight.users)), "")


def weights_to_mask(
    model: Any,
    weights: Sequence[ModelWeight],
    masks: Mapping[str, Any],
    include: Include,
    checked: Callable[[Any, Any, WeightAxes | None, str], Any],
    are_equal: Callable[[Any, Any], bool],
    others: bool,
    axes: Container[str] = (),
) -> list[tuple[ModelWeight, Any]]:
    """Return the weights that ``mask_model`` is to mask, each with its mask; ``None`` stands for the full one.

    Args:
        model: which they are of.
        weights: its parameters that have no mask yet.
        masks: by name.
        include: as ``mask_model`` takes it.
        checked: returns a mask as the framework keeps it, of a mask, the weight's value, axes and name, or raises an error.
        are_equal: whether two such masks are the same.
        others: whether the model has masked weights already, so that it is no error if there is nothing left to mask.
        axes: full names of parameters whose axes were told, so that they are masked.

    Raises:
        ValueError: as by ``mask_model``.
    """
    asked = asked_by_name(include)
    named = {user.name: weight for weight in weights for user in weight.users}
    wanted = [(name, named[name]) for name in (*masks, *asked) if name in named]
    for name, weight in (*wanted, *((weight.full_name, weight) for weight in weights if weight.full_name in axes)):
        if weight.fixed:
            raise ValueError(f"{name or 'the weight'} cannot be masked: it is {weight.why}")
    possible = {
        user.name: user.module
        for weight in weights
        for user in weight.users
        if not weight.fixed and (not weight.why or user.name in masks or user.name in asked or weight.full_name in axes)
    }
    if possible or masks or include is not None or not others:
        left_out = {weight.full_name: weight.why for weight in weights if weight.why}
        possible = select_weights(model, possible, masks, include, left_out)
    given = {
        name: checked(masks[name], named[name].value, named[name].axes, name) for name in possible if name in masks
    }
    check_one_mask(given, {name: id(named[name]) for name in given}, are_equal)
    return [
        (weight, next((given[user.name] for user in weight.users if user.name in given), None))
        for weight in weights
        if any(user.name in possible for user in weight.users)
    ]


def check_one_mask(masks: Mapping[str, Any], keys: Mapping[str, Any], are_equal: Callable[[Any, Any], bool]) -> None:
    """Raise a ``ValueError`` if a weight that has several names, but one key, is given different masks."""
    first: dict[Any, str] = {}
    for name, mask in masks.items():
        other = first.setdefault(keys[name], name)
        if other != name and not are_equal(masks[other], mask):
            raise ValueError(
                f"a weight has one mask, whoever shares it; got different ones for {other} and {name}: give them the same, "
                "or a weight each"
            )
