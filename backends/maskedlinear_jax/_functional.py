"""``masked_linear`` as a function, with a reverse rule of its own and a second door to forward mode.

Which is the default, and why: ``jax.custom_vjp``, because its residuals are x, the weight and the mask, where the
derivative that JAX would make of the plain expression keeps a masked copy of the weight as well. But ``custom_vjp``
refuses ``jax.jvp``, ``jax.jacfwd`` and ``jax.linearize`` (https://github.com/jax-ml/jax/issues/16049). With
``forward_mode=True`` the plain expression stands in, which JAX differentiates in every mode. ``jax.grad`` of
``jax.grad``, ``jax.jacrev`` and ``jax.hessian`` (forward over reverse) work through either door.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from maskedlinear.masks import Recipe, as_mask
from maskedlinear.models import WeightAxes
from maskedlinear.spec import check_floating, check_shapes
from maskedlinear_jax._compat import is_traced
from maskedlinear_jax._placement import to_host

__all__ = ["as_array", "boolean_mask", "check_devices", "expression", "masked_linear", "rule"]

Precision = Any  # what jax.lax.dot_general takes: None, a name, a Precision, a pair of these, an algorithm


def masked_linear(
    x: ArrayLike,
    weight: ArrayLike,
    mask: Any,
    bias: ArrayLike | None = None,
    *,
    precision: Precision = None,
    forward_mode: bool = False,
    out_sharding: Any = None,
) -> Array:
    """Return ``y = x · where(mask, weight, 0)ᵀ + bias``, as :func:`maskedlinear.spec.forward` defines it.

    Works under ``jit``, ``vmap`` (over any argument), ``grad`` of any order, ``checkpoint`` and ``scan``. The mask is an
    ordinary array, which can change without a new compilation, and has no gradient; the weight's gradient is exactly +0
    where the mask is ``False``, whatever x, weight and the cotangent hold. Half types accumulate in float32; a gradient
    that is a sum over devices does so on each of them, and with ``forward_mode=True`` between them as well.

    Args:
        x: shape ``(..., in)``.
        weight: shape ``(out, in)``.
        mask: shape ``(out, in)``, booleans or 0s and 1s. Inside a transform it must be boolean, since the values of a
            traced array cannot be checked.
        bias: shape ``(out,)`` or ``None``.
        precision: as in ``jax.numpy.matmul``, for the forward and the backward products.
        forward_mode: whether to use the plain expression, which ``jax.jvp``, ``jax.jacfwd`` and ``jax.linearize`` can
            differentiate, and whose reverse mode keeps a masked copy of the weight. By default a reverse rule is used
            that keeps no such copy, and which these three refuse.
        out_sharding: where y goes on a mesh with explicit axes, as in ``jax.numpy.einsum``: a ``NamedSharding``, or a
            ``PartitionSpec`` of the mesh in use. JAX needs it where the sharding of the arguments does not say, as where
            ``in`` is sharded. Gradients are sharded as the arguments are.

    Returns:
        Shape ``(..., out)``, in the arguments' common dtype.

    Raises:
        ValueError: if shapes or devices do not belong together, or the mask holds anything but 0 and 1.
        TypeError: if an argument is not an array, or its dtype is not real floating-point.
        ShardingTypeError: if explicit axes of a mesh leave open where y goes, and ``out_sharding`` does not say.
    """
    x, weight = as_array("x", x), as_array("weight", weight)
    bias = None if bias is None else as_array("bias", bias)
    check_shapes(x.shape, weight.shape, None if bias is None else bias.shape)
    mask = boolean_mask(mask, weight.shape)
    check_devices(mask, weight)
    named = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, array in named.items():
        check_floating(name, array.dtype, jnp.issubdtype(array.dtype, jnp.floating))
    dtype = jnp.result_type(*named.values())
    x, weight, bias = x.astype(dtype), weight.astype(dtype), None if bias is None else bias.astype(dtype)
    return (expression if forward_mode else rule)(x, weight, mask, bias, 1, precision, out_sharding)


def as_array(name: str, value: Any) -> Array:
    """Return ``value`` as an array, or raise a ``TypeError`` that names it."""
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be an array of numbers; got {type(value).__name__}") from error


def boolean_mask(
    mask: Any, shape: tuple[int, ...], parameter: str = "weight (out, in)", axes: WeightAxes | None = None
) -> Array:
    """Return ``mask`` as a boolean array, checked; that of a recipe, by the weight's axes.

    Raises:
        ValueError: if the mask has another shape, holds anything but 0 and 1, or is traced and not boolean.
    """
    if isinstance(mask, Recipe):
        mask = mask.make(shape, axes)
    if is_traced(mask) and mask.dtype != jnp.bool_:
        raise ValueError(
            f"inside a transform a mask must be boolean, because its values cannot be checked; got {mask.dtype}: "
            "convert it before, with mask.astype(bool)"
        )
    if is_traced(mask) or getattr(mask, "dtype", None) == jnp.bool_:
        return jnp.asarray(as_mask(mask, shape, parameter))
    # By NumPy: inside a transform JAX would not look at the values of its own arrays either.
    return jnp.asarray(as_mask(to_host(mask) if isinstance(mask, jax.Array) else mask, shape, parameter))


def check_devices(mask: Array, weight: Array) -> None:
    """Raise a ``ValueError`` if mask and weight were put on different devices."""
    ours, theirs = _pinned(weight), _pinned(mask)
    if ours is not None and theirs is not None and ours != theirs:
        raise ValueError(
            f"mask and weight must be on the same devices; got the mask on {_names(theirs)} and the weight on "
            f"{_names(ours)}: move the mask with jax.device_put(mask, weight.sharding)"
        )


def _pinned(array: Any) -> set[Any] | None:
    """The devices that an array was put on by choice; ``None`` if JAX may still move it, or if it is traced."""
    if is_traced(array) or not getattr(array, "committed", False):
        return None
    return set(array.devices())


def _names(devices: set[Any]) -> str:
    return ", ".join(sorted(map(str, devices)))


def _apply_mask(mask: Array, array: Array) -> Array:
    return jnp.where(mask, array, jnp.zeros((), array.dtype))


def _dot(
    a: Array, b: Array, axes: tuple[Any, Any], precision: Precision, out_sharding: Any, dtype: Any = None
) -> Array:
    """Contract ``axes`` of a and b; the result is of ``dtype``, or of the arguments'."""
    where = {} if out_sharding is None else {"out_sharding": out_sharding}  # older releases of JAX do not take it
    return lax.dot_general(a, b, (axes, ((), ())), precision=precision, preferred_element_type=dtype, **where)


def _wide(dtype: Any) -> Any:
    """The dtype that sums are formed in."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def _row(bias: Array, y: Array) -> Array:
    """``bias (out,)`` with as many dimensions as ``y``."""
    return jnp.reshape(bias, (1,) * (y.ndim - 1) + (-1,))


def expression(
    x: Array,
    weight: Array,
    mask: Array,
    bias: Array | None,
    in_axis: int,
    precision: Precision = None,
    out_sharding: Any = None,
) -> Array:
    """The forward pass, for trusted arguments of one dtype; ``in_axis`` is the weight's axis of inputs.

    ``in_axis`` is 1 for a weight ``(out, in)`` and 0 for a Flax kernel ``(in, out)``; a mask has its weight's shape.
    """
    # Accumulated in at least float32, and not yet rounded to the arguments' dtype.
    y = _dot(x, _apply_mask(mask, weight), ((x.ndim - 1,), (in_axis,)), precision, out_sharding, _wide(x.dtype))
    if bias is not None:
        y = y + _row(bias, y).astype(y.dtype)
    return y.astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def rule(
    x: Array,
    weight: Array,
    mask: Array,
    bias: Array | None,
    in_axis: int,
    precision: Precision = None,
    out_sharding: Any = None,
) -> Array:
    """:func:`expression`, with the backward pass of the spec as its reverse rule."""
    return expression(x, weight, mask, bias, in_axis, precision, out_sharding)


Residuals = tuple[Array, Array, Array, Array | None]


def _forward(
    x: Array,
    weight: Array,
    mask: Array,
    bias: Array | None,
    in_axis: int,
    precision: Precision,
    out_sharding: Any,
) -> tuple[Array, Residuals]:
    # The bias is kept for its presence alone; it is as small as a residual can be.
    return expression(x, weight, mask, bias, in_axis, precision, out_sharding), (x, weight, mask, bias)


def _backward(
    in_axis: int, precision: Precision, out_sharding: Any, residuals: Residuals, g: Array
) -> tuple[Array, Array, None, Array | None]:
    x, weight, mask, bias = residuals
    wide = _wide(x.dtype)

    # JAX transposes the two products itself: it knows where operands are sharded, and where a sum over devices belongs
    # (jax.linear_transpose forgets both). The product that vjp forms on the way is dead code under jit.
    # They are formed in x's dtype, so that their transposes take g in it too: a half-type product is the fast one. A device
    # adds it up in float32; a sum over devices is in x's dtype, as in every layer of Flax.
    # Not so where a matrix is a single row or column: on a GPU XLA multiplies and adds those up in x's dtype, and no fast
    # product is lost.
    alone = 1 in (math.prod(x.shape[:-1]), *weight.shape)

    def layer(x: Array, weight: Array, bias: Array | None) -> Array:
        axes, kind = ((x.ndim - 1,), (in_axis,)), wide if alone else None
        y = _dot(x, _apply_mask(mask, weight), axes, precision, out_sharding, kind).astype(wide)
        return y if bias is None else y + _row(bias, y).astype(wide)

    _, pull = jax.vjp(layer, x, weight, bias)
    dx, dweight, dbias = pull(g.astype(wide))
    return dx, dweight, None, dbias


rule.defvjp(_forward, _backward)
