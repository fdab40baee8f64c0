"""The spec, executable: what a masked linear layer computes, in any array-API namespace.

Every backend is tested against these functions, run in float64. They are written to be read and to be right, not to be
fast. Arrays may come from any namespace that array-api-compat knows (NumPy, PyTorch, JAX, array-api-strict, ...); all
arrays of one call come from the same one.

Shapes, everywhere: ``x (..., in)``, ``weight (out, in)``, ``mask (out, in)`` boolean, ``bias (out,)`` or ``None``,
``y (..., out)``, with any number of leading batch dimensions, none included. Rows of a mask are output nodes::

    Wm  = where(mask, weight, 0)          a select, not a product: 0 * NaN must not leak
    y   = x · Wmᵀ + bias
    dx  = g · Wm
    dW  = where(mask, gᵀ · x, 0)          summed over all batch dimensions
    db  = sum of g over all batch dimensions
    ẏ   = ẋ · Wmᵀ + x · where(mask, Ẇ, 0)ᵀ + ḃ

The mask itself has no gradient.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from array_api_compat import array_namespace

from maskedlinear.masks import as_mask

__all__ = ["Cotangents", "Curvature", "check_floating", "check_shapes", "forward", "hvp", "jvp", "masked_weight", "vjp"]

Array = Any
Shape = tuple[int, ...]


class Cotangents(NamedTuple):
    """The gradients of a masked linear layer: ``x (..., in)``, ``weight (out, in)``, ``bias (out,)`` or ``None``."""

    x: Array
    weight: Array
    bias: Array | None


class Curvature(NamedTuple):
    """A Hessian-vector product: ``x (..., in)``, ``weight (out, in)``, ``bias (out,)`` or ``None``, ``g (..., out)``."""

    x: Array
    weight: Array
    bias: Array | None
    g: Array


def check_shapes(x: Shape, weight: Shape, bias: Shape | None = None) -> None:
    """Check that the shapes of an input, a weight and a bias belong together.

    Args:
        x: the input's shape, ``(..., in)``.
        weight: the weight's shape, ``(out, in)``.
        bias: the bias' shape, ``(out,)``, or ``None``.

    Raises:
        ValueError: naming the rule that is broken, what was received and the remedy.
    """
    if len(weight) != 2:
        raise ValueError(f"weight must have 2 dimensions, (out, in); got shape {tuple(weight)}")
    if len(x) == 0:
        raise ValueError(f"x must have shape (..., in) = (..., {weight[1]}); got a scalar: reshape it to (1,)")
    if x[-1] != weight[1]:
        hint = ", which is the number of outputs: is the weight transposed?" if x[-1] == weight[0] else ""
        raise ValueError(
            f"the last dimension of x must be the layer's number of inputs, {weight[1]}; "
            f"got x of shape {tuple(x)} for a weight of shape (out, in) = {tuple(weight)}{hint}"
        )
    if bias is not None and tuple(bias) != (weight[0],):
        raise ValueError(f"bias must have shape (out,) = ({weight[0]},); got {tuple(bias)}")


def check_floating(name: str, dtype: Any, is_floating: bool) -> None:
    """Raise a ``TypeError`` that names ``name`` and ``dtype`` unless ``is_floating``."""
    if not is_floating:
        raise TypeError(
            f"{name} must have a real floating-point dtype (float64, float32, bfloat16 or float16), so that it has a "
            f"gradient; got {dtype}: convert it first"
        )


def _checked(x: Array, weight: Array, mask: Array, bias: Array | None) -> tuple[Any, Array]:
    """Validate the four arguments of a call; return their namespace and the mask as booleans."""
    named = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    xp = array_namespace(*named.values())
    for name, array in named.items():
        check_floating(name, array.dtype, xp.isdtype(array.dtype, "real floating"))
    check_shapes(x.shape, weight.shape, None if bias is None else bias.shape)
    return xp, xp.asarray(as_mask(mask, weight.shape), dtype=xp.bool)


def _flat(xp: Any, array: Array) -> Array:
    """Merge all batch dimensions into one: ``(..., n)`` to ``(batch, n)``."""
    return xp.reshape(array, (math.prod(array.shape[:-1]), array.shape[-1]))


def _apply_mask(xp: Any, mask: Array, array: Array) -> Array:
    return xp.where(mask, array, xp.zeros_like(array))


def masked_weight(weight: Array, mask: Array) -> Array:
    """Return ``Wm = where(mask, weight, 0)``, shape ``(out, in)``.

    Args:
        weight: shape ``(out, in)``.
        mask: shape ``(out, in)``, booleans or 0s and 1s.

    Raises:
        ValueError: if the mask does not fit the weight or holds anything but 0 and 1.
    """
    xp = array_namespace(weight)
    return _apply_mask(xp, xp.asarray(as_mask(mask, weight.shape), dtype=xp.bool), weight)


def forward(x: Array, weight: Array, mask: Array, bias: Array | None = None) -> Array:
    """Return ``y = x · Wmᵀ + bias``, shape ``(..., out)``.

    Args:
        x: shape ``(..., in)``.
        weight: shape ``(out, in)``.
        mask: shape ``(out, in)``, booleans or 0s and 1s.
        bias: shape ``(out,)`` or ``None``.

    Raises:
        ValueError: if the shapes do not belong together, or the mask holds anything but 0 and 1.
        TypeError: if an argument other than the mask is not real floating-point.
    """
    xp, mask = _checked(x, weight, mask, bias)
    y = _flat(xp, x) @ _apply_mask(xp, mask, weight).T
    if bias is not None:
        y = y + bias[None, :]
    return xp.reshape(y, (*x.shape[:-1], weight.shape[0]))


def vjp(x: Array, weight: Array, mask: Array, bias: Array | None, g: Array) -> Cotangents:
    """Return the gradients ``(dx, dW, db)`` for the output's cotangent ``g``.

    Args:
        x: shape ``(..., in)``.
        weight: shape ``(out, in)``.
        mask: shape ``(out, in)``, booleans or 0s and 1s.
        bias: shape ``(out,)`` or ``None``; then ``db`` is ``None``.
        g: shape ``(..., out)``, the cotangent of ``y``.

    Raises:
        ValueError, TypeError: as :func:`forward`, and a ``ValueError`` if ``g`` does not have the output's shape.
    """
    xp, mask = _checked(x, weight, mask, bias)
    _check_like("g", g, (*x.shape[:-1], weight.shape[0]))
    x2, g2 = _flat(xp, x), _flat(xp, g)
    return Cotangents(
        x=xp.reshape(g2 @ _apply_mask(xp, mask, weight), x.shape),
        weight=_apply_mask(xp, mask, g2.T @ x2),
        bias=None if bias is None else xp.sum(g2, axis=0),
    )


def jvp(
    x: Array,
    weight: Array,
    mask: Array,
    bias: Array | None,
    dx: Array | None = None,
    dweight: Array | None = None,
    dbias: Array | None = None,
) -> tuple[Array, Array]:
    """Return ``(y, ẏ)`` for the tangents ``ẋ, Ẇ, ḃ`` of the inputs; a tangent of ``None`` is zero.

    Args:
        x: shape ``(..., in)``; ``dx`` its tangent.
        weight: shape ``(out, in)``; ``dweight`` its tangent.
        mask: shape ``(out, in)``, booleans or 0s and 1s.
        bias: shape ``(out,)`` or ``None``; ``dbias`` its tangent.
        dx: shape ``(..., in)`` or ``None``.
        dweight: shape ``(out, in)`` or ``None``.
        dbias: shape ``(out,)`` or ``None``.

    Raises:
        ValueError, TypeError: as :func:`forward`, and a ``ValueError`` if a tangent does not have its input's shape.
    """
    y = forward(x, weight, mask, bias)
    dy = array_namespace(y).zeros_like(y)
    if dx is not None:
        _check_like("dx", dx, x.shape)
        dy = dy + forward(dx, weight, mask)
    if dweight is not None:
        _check_like("dweight", dweight, weight.shape)
        dy = dy + forward(x, dweight, mask)
    if dbias is not None:
        if bias is None:
            raise ValueError("dbias was given for a layer without bias: pass the bias, or leave dbias out")
        _check_like("dbias", dbias, bias.shape)
        dy = dy + array_namespace(y).broadcast_to(dbias, y.shape)
    return y, dy


def hvp(
    x: Array,
    weight: Array,
    mask: Array,
    bias: Array | None,
    g: Array,
    dx: Array,
    dweight: Array,
    dbias: Array | None,
    dg: Array,
) -> Curvature:
    """Return the second derivatives: the Hessian of ``ψ = ⟨g, y⟩`` in x, weight, bias and g, times a direction.

    The gradient of ψ is ``(dx, dW, db, y)`` of :func:`vjp` and :func:`forward`, so this is what differentiating them once
    more gives, in any order of modes. With the direction ``(ẋ, Ẇ, ḃ, ġ)``::

        Hx = g · where(mask, Ẇ, 0) + ġ · Wm
        HW = where(mask, gᵀ · ẋ + ġᵀ · x, 0)
        Hb = sum of ġ over all batch dimensions
        Hg = ẏ

    Args:
        x: shape ``(..., in)``; ``dx`` its direction.
        weight: shape ``(out, in)``; ``dweight`` its direction.
        mask: shape ``(out, in)``, booleans or 0s and 1s.
        bias: shape ``(out,)`` or ``None``; ``dbias`` its direction.
        g: shape ``(..., out)``; ``dg`` its direction.
        dx: shape ``(..., in)``.
        dweight: shape ``(out, in)``.
        dbias: shape ``(out,)`` or ``None``.
        dg: shape ``(..., out)``.

    Raises:
        ValueError, TypeError: as :func:`vjp` and :func:`jvp`.
    """
    _, along_g = jvp(x, weight, mask, bias, dx, dweight, dbias)
    moved_weight = vjp(x, dweight, mask, bias, g)
    moved_x = vjp(dx, weight, mask, bias, g)
    moved_g = vjp(x, weight, mask, bias, dg)
    return Curvature(moved_weight.x + moved_g.x, moved_x.weight + moved_g.weight, moved_g.bias, along_g)


def _check_like(name: str, array: Array, shape: Shape) -> None:
    if tuple(array.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}; got {tuple(array.shape)}")
