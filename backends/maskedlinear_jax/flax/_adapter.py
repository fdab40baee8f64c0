"""What the functions for whole models see of an nnx model, and of the variables of a linen one: the same."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen

from maskedlinear.models import ModelWeight, ParameterUser, WeightAxes, why_left_out
from maskedlinear_jax._compat import is_traced
from maskedlinear_jax._tree import Axes, axes_of
from maskedlinear_jax.flax._kernel import weight_name
from maskedlinear_jax.flax._variables import Path, has_own_mask, is_linen, linen_parameters, linen_weights
from maskedlinear_jax.flax._weights import masked_weights, model_weights

__all__ = ["masked_of", "parameters_of", "refuse_linen", "refuse_linen_module", "refuse_unfit"]


class LinenWeight(NamedTuple):
    """A masked parameter of linen's variables; what it says of one, :class:`MaskedParameter` says of nnx's."""

    full_name: str
    value: Any
    mask: Any
    axes: WeightAxes | None
    is_ours: bool
    key: Path

    @property
    def owner(self) -> Any:
        """What a function ``include`` is given: the parameter."""
        return self.value

    @property
    def nbytes(self) -> int:
        """The bytes of the weight and its mask."""
        return int(self.value.nbytes + self.mask.nbytes)


def parameters_of(model: Any, axes: Axes = None) -> list[ModelWeight]:
    """Return the parameters of a model, each once, in its order; the key of linen's is their path."""
    if not is_linen(model):
        return model_weights(model)
    masked, parameters = linen_weights(model), []
    for path, leaf in linen_parameters(model).items():
        name = ".".join(path)
        fixed = "" if jnp.issubdtype(leaf.dtype, jnp.floating) else "not of a floating dtype"
        why = fixed or ("" if name in (axes or ()) else why_left_out(name, leaf.ndim))
        users, known = [ParameterUser(weight_name(path), name, leaf, path)], axes_of(name, leaf.ndim, axes)
        parameters.append(ModelWeight(leaf, users, masked.get(path), axes=known, why=why, fixed=fixed != ""))
    return parameters


def masked_of(model: Any, axes: Axes = None, *, sparse: bool = False) -> dict[str, Any]:
    """Return the masked weights of a model, by name, in its order; if they are asked for, layers of the sparse form too."""
    if not is_linen(model):
        return masked_weights(model, axes, sparse=sparse)
    weights = {}
    for path, (value, mask) in linen_weights(model).items():
        name, ours = ".".join(path), has_own_mask(model, path)
        weights[weight_name(path)] = LinenWeight(name, value, mask, axes_of(name, value.ndim, axes), ours, path)
    return weights


def refuse_linen_module(function: str, model: Any) -> None:
    """Raise a ``TypeError`` for a module of linen's, which has no parameters of its own."""
    if isinstance(model, linen.Module):
        raise TypeError(
            f"{function} takes an nnx module or the variables of a linen one, {{'params': ...}}; got the linen module "
            f"{type(model).__name__}: pass what its init returned, and go on with what {function} returns"
        )


def refuse_linen(function: str, model: Any) -> None:
    """Raise a ``TypeError`` for what is linen's, where a model is changed in place."""
    if is_linen(model) or isinstance(model, linen.Module):
        raise TypeError(
            f"{function} changes an nnx module in place; linen's variables stay as they are: prune_model, regrow_model and "
            "set_masks return new ones, and maskedlinear.jax has scheduled_pruning and scheduled_regrowth"
        )


def refuse_unfit(function: str, name: str, one: Any) -> None:
    """Raise an error for a masked weight whose mask cannot be chosen here: inside a transform, or shared by a stack."""
    if is_traced(one.value) or is_traced(one.mask):
        raise TypeError(
            f"{function} reads numbers, which are not known inside a transform (jit, grad, vmap): call it outside; in a "
            "jitted step maskedlinear.jax has scheduled_pruning and scheduled_regrowth"
        )
    if one.mask.shape != one.value.shape:
        raise ValueError(
            f"the layers of the stack {name} share one mask: leave it out with include=..., or choose one by set_masks"
        )
