"""What the nnx and the linen layer share: a masked kernel of shape ``(in, out)``, and the Variables of its mask.

A kernel is +0 under its mask; its dormant values lie apart. All that changes masks goes through :func:`exchange`.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from maskedlinear.masks import Recipe
from maskedlinear.models import WeightAxes
from maskedlinear.spec import check_floating, check_shapes
from maskedlinear_jax._compat import is_traced
from maskedlinear_jax._functional import boolean_mask, check_devices, expression, rule

__all__ = [
    "KERNEL",
    "PARAMETER",
    "Dormant",
    "Mask",
    "apply_kernel",
    "checked_mask",
    "exchange",
    "full_kernel",
    "label",
    "live_scale",
    "mask_names",
    "mask_shape",
    "masked_kernel",
    "recipe_of",
    "remember_recipe",
    "set_variables",
    "sharding_of",
    "value_of",
    "weight_name",
]

PARAMETER = "kernel (in, out)"
KERNEL = WeightAxes(out_axis=1, in_axis=0)


# Under this name nnx's bridge finds the collection of linen masks, and the other way round.
@nnx.register_variable_name("masks", overwrite=True)
class Mask(nnx.Variable[Array]):
    """The mask of a layer: in the state and in checkpoints, and no parameter, so out of every optimizer's sight."""


@nnx.register_variable_name("dormant", overwrite=True)
class Dormant(nnx.Variable[Array]):
    """The weights of a layer's masked connections, 0 elsewhere: in the state and in checkpoints, and no parameter."""


_recipes: dict[int, tuple[weakref.ref[Any], Recipe]] = {}  # by the identity of the array that they made


def remember_recipe(variable: nnx.Variable[Array], mask: Any) -> None:
    """Remember what made the array in a Variable, if it was a recipe: a file holds that in the mask's place.

    Beside the Variable, since what is in it is part of the state, and what is on it part of the compiled program.
    """
    array = variable.get_value()
    if isinstance(mask, Recipe) and isinstance(array, jax.Array) and not is_traced(array):  # nobody can write to it
        key = id(array)
        _recipes[key] = weakref.ref(array, lambda _: _recipes.pop(key, None)), mask


def recipe_of(variable: nnx.Variable[Array]) -> Recipe | None:
    """Return the recipe that made the array in a Variable; ``None`` if nobody knows of one."""
    array = variable.get_value()
    known, recipe = _recipes.get(id(array), (None, None))
    return recipe if known is not None and known() is array else None


def value_of(variable: nnx.Variable[Array]) -> Array:
    """Return a Variable's array, or raise a ``ValueError`` if it has none."""
    return _concrete(variable.get_value())


def _concrete(value: Any) -> Array:
    if isinstance(value, jax.ShapeDtypeStruct):
        raise ValueError(
            "this layer is abstract (made by nnx.eval_shape) and has no values: restore its state first, with nnx.update"
        )
    array: Array = value
    return array


def label(kernel: Any) -> str:
    """Return what an error calls a weight whose mask has another shape."""
    return PARAMETER if kernel.ndim == 2 else "parameter"


def mask_shape(kernel: Any, mask: Any) -> tuple[int, ...]:
    """Return the shape that a layer's mask must have: its kernel's, or one layer's, if a stack of layers shares a mask."""
    shape: tuple[int, ...] = kernel.shape
    return shape[-2:] if mask.ndim == 2 else shape


def masked_kernel(kernel: Array, mask: Array) -> Array:
    """Return ``where(mask, kernel, 0)``, shape ``(in, out)``."""
    return jnp.where(mask, kernel, jnp.zeros((), kernel.dtype))


def full_kernel(kernel: Array, mask: Array, dormant: Array | None) -> Array:
    """Return the live and the dormant weights together, bit for bit.

    Where nothing is dormant, what stands in the kernel under the mask is: there earlier versions kept it, and there it is
    if a mask was exchanged by hand. Elsewhere it is what an optimizer has left, and no weight.
    """
    if dormant is None:
        return masked_kernel(kernel, mask)
    bits = lax.bitcast_convert_type(dormant, f"uint{8 * dormant.dtype.itemsize}")  # subnormals are 0 to XLA on the CPU
    return jnp.where(mask | (bits == 0), kernel, dormant)


def exchange(
    kernel: Array, mask: Array, dormant: Array | None, new: Array, pruned: Array | None = None
) -> tuple[Array, Array | None]:
    """Return what is in the kernel and what is dormant under a ``new`` mask; of ``pruned`` what the new one takes."""
    full = full_kernel(kernel, mask, dormant)
    if pruned is not None:
        full = jnp.where(mask & ~new, pruned, full)
    return masked_kernel(full, new), None if dormant is None else masked_kernel(full, ~new)


def set_variables(
    kernel: nnx.Variable[Array], mask: Mask, dormant: Dormant | None, new: Array, pruned: Array | None = None
) -> None:
    """Give a weight, of which these are the Variables, another mask, checked and its own; weights move."""
    value, kept = value_of(kernel), None if dormant is None else dormant.get_value()
    if isinstance(kept, jax.ShapeDtypeStruct):
        kept = jnp.zeros(kept.shape, kept.dtype)
    try:
        old = checked_mask(value, mask.get_value())
    except ValueError:  # a state brought it, or none at all: what is dormant is known without it
        old = jnp.zeros(new.shape, bool)
    value, kept = exchange(value, old, kept, new, pruned)
    kernel.set_value(value)
    mask.set_value(new)
    if dormant is not None and kept is not None:
        dormant.set_value(kept)


def mask_names(children: Mapping[Any, Any], parameter: str) -> tuple[str, str]:
    """Return what a parameter's mask, and what is dormant of it, are called where these are."""
    if parameter == "kernel" and isinstance(children.get("mask"), Mask):
        return "mask", "dormant"
    return f"{parameter}_mask", f"{parameter}_dormant"


def weight_name(path: tuple[str, ...]) -> str:
    """Return what a masked parameter is called: a ``kernel`` as its module is, any other with its own name."""
    return ".".join(path[:-1] if path[-1] == "kernel" else path)


def checked_mask(kernel: Array, mask: Any) -> Array:
    """Return a layer's mask; a state may have brought any."""
    return boolean_mask(_concrete(mask), mask_shape(kernel, mask), label(kernel))


def live_scale(mask: Array, dtype: Any) -> Array:
    """Return √(in / live inputs) for every output, shape ``(out,)``; 1 for an output without live inputs."""
    live = jnp.sum(mask, axis=0)
    ratio = mask.shape[0] / jnp.maximum(live, 1).astype(jnp.float32)
    return jnp.where(live > 0, jnp.sqrt(ratio), jnp.ones((), jnp.float32)).astype(dtype)


def apply_kernel(
    inputs: Array,
    kernel: Array,
    mask: Array,
    bias: Array | None,
    *,
    precision: Any,
    forward_mode: bool,
    dot_general: Any = lax.dot_general,
    dot_options: Mapping[str, Any],
) -> Array:
    """Apply a layer to arguments of one dtype.

    The default product goes through the JAX backend's rule. A product of the user's own (quantized, with another output
    type) is called as Flax's dense layers call it, on the masked kernel.
    """
    check_floating("inputs", inputs.dtype, jnp.issubdtype(inputs.dtype, jnp.floating))
    check_shapes(inputs.shape, kernel.shape[::-1])
    check_devices(mask, kernel)
    if dot_general is lax.dot_general and not dot_options.keys() - {"out_sharding"}:
        layer = expression if forward_mode else rule
        return layer(inputs, kernel, mask, bias, 0, precision, dot_options.get("out_sharding"))
    contract = (((inputs.ndim - 1,), (0,)), ((), ()))
    y: Array = dot_general(inputs, masked_kernel(kernel, mask), contract, precision=precision, **dot_options)
    return y if bias is None else y + jnp.reshape(bias, (1,) * (y.ndim - 1) + (-1,))


def sharding_of(kernel: nnx.Variable[Array]) -> dict[str, Any]:
    """Return the metadata of ``kernel`` that says how it is sharded."""
    return {name: value for name, value in kernel.get_metadata().items() if "sharding" in name or "mesh" in name}
