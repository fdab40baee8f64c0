"""``sparse_linear``: the masked linear layer with one value a connection, and no matrix of the layer's shape."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from maskedlinear.pattern import SparsityPattern
from maskedlinear.spec import check_floating, check_shapes
from maskedlinear_jax._functional import as_array
from maskedlinear_jax._products import DevicePattern, spmm

__all__ = ["product", "sparse_linear"]

_LANES = 16


def sparse_linear(x: ArrayLike, values: ArrayLike, pattern: SparsityPattern, bias: ArrayLike | None = None) -> Array:
    """Return ``y = x · Wᵀ + bias``, where W has ``values`` at the connections of ``pattern`` and nothing elsewhere.

    Works under ``jit``, ``vmap`` (but not over the pattern), ``checkpoint`` and ``scan``, and in every mode of
    differentiation, of any order. Time and memory grow with the connections and the batch. Half types are computed in
    float32 and rounded once. NaN or infinity in x reaches only what it is connected to.

    A pattern is a tree of arrays: pass it to a jitted function as an argument. One that the function closes over becomes
    a constant of the program, which XLA takes long to compile. ``jax.device_put(pattern)`` moves it to a device once.

    Args:
        x: shape ``(..., in)``.
        values: shape ``(nnz,)``, in the pattern's order.
        pattern: the connections, of shape ``(out, in)``.
        bias: shape ``(out,)`` or ``None``.

    Returns:
        Shape ``(..., out)``, in the arguments' common dtype.

    Raises:
        ValueError: if shapes, or the number of values, do not belong together.
        TypeError: if ``pattern`` is none, an argument is not an array, or its dtype is not real floating-point.
    """
    if not isinstance(pattern, SparsityPattern):
        raise TypeError(
            f"pattern must be a maskedlinear.pattern.SparsityPattern; got {type(pattern).__name__}: make one with "
            "SparsityPattern.from_mask(mask), SparsityPattern.from_edges(...) or SparsityPattern.from_scipy(matrix)"
        )
    return product(x, values, DevicePattern.of(pattern), pattern.shape[1], bias)


def product(
    x: ArrayLike,
    values: ArrayLike,
    pattern: DevicePattern,
    in_features: int,
    bias: ArrayLike | None,
    *,
    check: bool = False,
) -> Array:
    """Return y, for the indices of a pattern; with ``check`` NaN for y or a gradient that wrong indices would be used for.

    What nobody asks for is not checked: to look at the indices by columns takes longer, and only x's gradient uses them.
    """
    x, values = as_array("x", x), as_array("values", values)
    bias = None if bias is None else as_array("bias", bias)
    named = {"x": x, "values": values} | ({} if bias is None else {"bias": bias})
    for name, array in named.items():
        check_floating(name, array.dtype, jnp.issubdtype(array.dtype, jnp.floating))
    if values.shape != pattern.indices.shape:
        raise ValueError(
            f"values must have one entry for each of the pattern's {pattern.indices.size} connections; got shape "
            f"{values.shape}"
        )
    out = pattern.indptr.shape[0] - 1
    check_shapes(x.shape, (out, in_features), None if bias is None else bias.shape)
    dtype = jnp.result_type(*named.values())
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    rows = x.reshape(math.prod(x.shape[:-1]), in_features).astype(dtype).astype(wide)
    columns, values = _to_columns(rows), values.astype(dtype).astype(wide)
    offset = None if bias is None else bias.astype(dtype).astype(wide)
    if check:
        by_rows = pattern.is_valid_by_rows(in_features)
        one = jnp.where(by_rows, 1, jnp.nan).astype(wide)
        columns, values = _poison_tangent(columns, by_rows & pattern.is_valid_by_columns()), values * one
        offset = (jnp.zeros(out, wide) if offset is None else offset) * one
    y = _from_columns(spmm(values, columns, pattern))
    if offset is not None:
        y = y + offset[None]
    return y.astype(dtype).reshape(*x.shape[:-1], out)


@jax.custom_jvp
def _poison_tangent(array: Array, valid: Array) -> Array:
    """Return ``array``, whose tangent and cotangent are NaN unless ``valid``."""
    return array


@_poison_tangent.defjvp
def _poison_tangent_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
    # By a branch: a product would be one with the transposition next to it, which takes several times as long then.
    return primals[0], lax.cond(primals[1], lambda tangent: tangent, lambda tangent: tangent * jnp.nan, tangents[0])


# x.T and back, by way of blocks: XLA takes a plain transpose for a matter of layout, and copies once for each reader.


def _to_columns(rows: Array) -> Array:
    batch, features = rows.shape
    lanes = math.gcd(batch, _LANES) if isinstance(batch, int) else 1
    if lanes < 2 or not rows.size:
        return rows.T
    return rows.reshape(batch // lanes, lanes, features).transpose(2, 0, 1).reshape(features, batch)


def _from_columns(columns: Array) -> Array:
    features, batch = columns.shape
    lanes = math.gcd(batch, _LANES) if isinstance(batch, int) else 1
    if lanes < 2 or not columns.size:
        return columns.T
    return columns.reshape(features, batch // lanes, lanes).transpose(1, 2, 0).reshape(batch, features)
