"""What the functions for whole models see of an nnx model, and of the variables of a linen one: the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen

from maskedlinear.models import WeightAxes, why_left_out
from maskedlinear_jax._compat import is_traced
from maskedlinear_jax._tree import Axes, axes_of
from maskedlinear_jax.flax._kernel import weight_name
from maskedlinear_jax.flax._nnx import MaskedLinear
from maskedlinear_jax.flax._sparse_nnx import SparseLinear
from maskedlinear_jax.flax._variables import has_own_mask, is_linen, linen_parameters, linen_weights
from maskedlinear_jax.flax._weights import masked_weights, model_weights, parameter_names

__all__ = ["Masked", "Parameter", "masked_of", "parameters_of", "refuse_linen", "refuse_linen_module", "refuse_unfit"]


class Parameter(NamedTuple):
    """A parameter of a model: its full name, its value, and who has it, by what its mask is called."""

    full_name: str
    value: Any
    owners: Mapping[str, Any]
    why: str  # it is not masked unless it is asked for
    fixed: bool  # it cannot be masked at all
    is_masked: bool
    is_sparse: bool
    weight: Any  # the ModelWeight of nnx, or the path in linen's variables


class Masked(NamedTuple):
    """A masked weight: its full name, value, mask, axes, and who has it; weights that are one have the same ``key``."""

    full_name: str
    value: Any
    mask: Any
    axes: WeightAxes | None
    owner: Any
    is_ours: bool  # whether a layer of ours has it, which selects by its mask
    key: Any
    nbytes: int
    weight: Any  # the MaskedParameter of nnx, or the path in linen's variables


def parameters_of(model: Any, axes: Axes = None) -> list[Parameter]:
    """Return the parameters of a model, each once, in its order."""
    if not is_linen(model):
        return [
            Parameter(
                weight.full_name,
                weight.variable.get_value(),
                {user.name: user.module for user in weight.users},
                weight.why,
                weight.fixed,
                weight.is_masked,
                any(
                    isinstance(user.module, SparseLinear) and user.parameter == "weight_values" for user in weight.users
                ),
                weight,
            )
            for weight in model_weights(model)
        ]
    masked = linen_weights(model)
    parameters = []
    for path, leaf in linen_parameters(model).items():
        name = ".".join(path)
        fixed = "" if jnp.issubdtype(leaf.dtype, jnp.floating) else "not of a floating dtype"
        why = fixed or ("" if name in (axes or ()) else why_left_out(name, leaf.ndim))
        owners = {weight_name(path): leaf}
        parameters.append(Parameter(name, leaf, owners, why, fixed != "", path in masked, False, path))
    return parameters


def masked_of(model: Any, axes: Axes = None, *, sparse: bool = False) -> dict[str, Any]:
    """Return the masked weights of a model, by name, in its order; if they are asked for, layers of the sparse form too."""
    if is_linen(model):
        weights = {}
        for path, (value, mask) in linen_weights(model).items():
            full, name, nbytes = ".".join(path), weight_name(path), value.nbytes + mask.nbytes
            known = axes_of(full, value.ndim, axes)
            weights[name] = Masked(full, value, mask, known, value, has_own_mask(model, path), path, nbytes, path)
        return weights
    names = parameter_names(model)
    found: dict[str, Any] = {}
    for name, weight in masked_weights(model, sparse=sparse).items():
        if isinstance(weight, SparseLinear):
            found[name] = weight
            continue
        full = names[id(weight.kernel)]
        known = (axes or {}).get(full) or weight.axes
        kernel, mask = weight.kernel.get_value(), weight.own_mask
        found[name] = Masked(
            full,
            kernel,
            mask,
            known,
            weight.module,
            isinstance(weight.module, MaskedLinear),
            id(weight.kernel),
            weight.nbytes,
            weight,
        )
    return found


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


def refuse_unfit(function: str, name: str, one: Masked) -> None:
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
