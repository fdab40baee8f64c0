"""``sparse_linear``: the masked linear layer with one value a connection, and no matrix of the layer's shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from maskedlinear.pattern import SparsityPattern
from maskedlinear.spec import check_floating, check_shapes
from maskedlinear_jax._functional import as_array
from maskedlinear_jax._packed import PackedWeights, packed_product, without_gradient
from maskedlinear_jax._partition import wide
from maskedlinear_jax._primitives import multiplied
from maskedlinear_jax._products import DevicePattern

__all__ = ["product", "sparse_linear", "stack_patterns"]

_CARRIED = (jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16)  # which products take as they are


def sparse_linear(
    x: ArrayLike,
    values: ArrayLike | PackedWeights,
    pattern: SparsityPattern | None = None,
    bias: ArrayLike | None = None,
) -> Array:
    """Return ``y = x · Wᵀ + bias``, where W has ``values`` at the connections of ``pattern`` and nothing elsewhere.

    Works under ``jit``, ``vmap``, ``checkpoint`` and ``scan``, and in every mode of differentiation, of any order. Time and
    memory grow with the connections and the batch. Half types are computed in float32 and rounded once. NaN or infinity in
    x reaches only what it is connected to; on GPUs, above a few per cent of the connections, all that is summed with it, as
    in a dense product. :func:`stack_patterns` makes of several patterns one to map over.

    On a mesh any axis of the batch may be sharded, and the one that patterns are mapped over: each device forms its part,
    x is not gathered, and a gradient is summed between devices once. Values and pattern are whole on each; with explicit
    axes (``jax.sharding.AxisType.Explicit``) anything else is an error.

    A pattern is a tree of arrays: pass it to a jitted function as an argument. One that the function closes over becomes
    a constant of the program, which XLA takes long to compile. ``jax.device_put(pattern)`` moves it to a device once. For
    a GPU let it keep bits: :func:`with_bits`.

    Args:
        x: shape ``(..., in)``.
        values: shape ``(nnz,)``, in the pattern's order; or what :func:`pack` returns, in place of values and pattern.
        pattern: the connections, of shape ``(out, in)``.
        bias: shape ``(out,)`` or ``None``.

    Returns:
        Shape ``(..., out)``, in the arguments' common dtype.

    Raises:
        ValueError: if shapes, or the number of values, do not belong together.
        TypeError: if ``pattern`` is none, an argument is not an array, or its dtype is not real floating-point.
        ShardingTypeError: if an axis of an explicit mesh is over features or connections.
    """
    if isinstance(values, PackedWeights):
        if pattern is not None:
            raise TypeError(
                f"what is packed has its pattern; got {type(pattern).__name__} as another: "
                "sparse_linear(x, packed, bias=bias)"
            )
        own = values.pattern
        numbers = without_gradient(values.values)
        return product(x, numbers, DevicePattern.of(own), own.shape[1], bias, packed=values)
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
    packed: PackedWeights | None = None,
) -> Array:
    """Return y, for the indices of a pattern; with ``check`` NaN for y or a gradient that wrong indices would be used for.

    What nobody asks for is not checked: to look at the indices by columns takes longer, and only x's gradient uses them.
    """
    x, values = as_array("x", x), as_array("values", values)
    bias = None if bias is None else as_array("bias", bias)
    named = {"x": x, "values": values} | ({} if bias is None else {"bias": bias})
    for name, array in named.items():
        check_floating(name, array.dtype, jnp.issubdtype(array.dtype, jnp.floating))
    if pattern.indices.ndim != 1:
        raise ValueError(
            f"a pattern must be one, not stacked; got indices of shape {pattern.indices.shape}: map over it, as in "
            "jax.vmap(sparse_linear, (None, 0, 0))(x, values, patterns)"
        )
    if values.shape != pattern.indices.shape:
        raise ValueError(
            f"values must have one entry for each of the pattern's {pattern.indices.size} connections; got shape "
            f"{values.shape}"
        )
    out = pattern.indptr.shape[0] - 1
    check_shapes(x.shape, (out, in_features), None if bias is None else bias.shape)
    dtype = jnp.result_type(*named.values())
    carried = dtype if dtype in _CARRIED else wide(dtype)
    x, values = x.astype(dtype).astype(carried), values.astype(dtype).astype(carried)
    offset = None if bias is None else bias.astype(dtype).astype(wide(dtype))
    if check:
        by_rows = pattern.is_valid_by_rows(in_features)
        one = jnp.where(by_rows, 1, jnp.nan).astype(wide(dtype))
        x, values = _poison_tangent(x, by_rows & pattern.is_valid_by_columns()), values * one.astype(carried)
        offset = (jnp.zeros(out, wide(dtype)) if offset is None else offset) * one
    fits = packed is not None and dtype == packed.values.dtype
    y = packed_product(x, packed) if packed is not None and fits else multiplied(values, x, pattern)
    if offset is not None:
        y = y + offset.reshape((1,) * (y.ndim - 1) + (-1,))
    return y.astype(dtype)


def stack_patterns(patterns: Sequence[SparsityPattern]) -> SparsityPattern:
    """Return a pattern whose arrays are those of several, stacked: ``jax.vmap`` maps over it, as over their values.

    Args:
        patterns: at least one, all of one shape and with as many connections.

    Raises:
        ValueError: if there is none, or shapes or numbers of connections differ.
        TypeError: if one is no pattern, or keeps bits where another does not.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from maskedlinear import masks
        >>> from maskedlinear.jax import sparse_linear, stack_patterns
        >>> from maskedlinear.pattern import SparsityPattern
        >>> patterns = [SparsityPattern.from_mask(masks.random((4, 6), sparsity=0.5, seed=i)) for i in range(3)]
        >>> x, values = jnp.ones((2, 6)), jnp.ones((3, 12))  # an ensemble of three, of 12 connections each
        >>> jax.vmap(sparse_linear, (None, 0, 0))(x, values, stack_patterns(patterns)).shape
        (3, 2, 4)
    """
    for pattern in patterns:
        if not isinstance(pattern, SparsityPattern):
            raise TypeError(f"stack_patterns takes patterns; got {type(pattern).__name__}")
    if len({(pattern.shape, pattern.indices.shape) for pattern in patterns}) != 1:
        got = ", ".join(f"{pattern.indices.size} of shape {pattern.shape}" for pattern in patterns) or "no pattern"
        raise ValueError(
            "patterns that are mapped over must have the same shape and number of connections, since arrays are stacked "
            f"that have no other size; got {got}: draw them with as many connections, or call them one after the other"
        )
    if len({type(pattern) for pattern in patterns}) > 1:
        raise TypeError(
            f"either all patterns of a stack keep bits, or none; got {', '.join(map(repr, patterns))}: make all of them "
            "by with_bits, or stack them without, and jax.vmap(with_bits) over the stack"
        )
    stacked: SparsityPattern = jax.tree.map(lambda *arrays: jnp.stack(arrays), *patterns)
    return stacked


@jax.custom_jvp
def _poison_tangent(array: Array, valid: Array) -> Array:
    """Return ``array``, whose tangent and cotangent are NaN unless ``valid``."""
    return array


@_poison_tangent.defjvp
def _poison_tangent_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
    # By a branch: a product would be one with the transposition next to it, which takes several times as long then.
    return primals[0], lax.cond(primals[1], lambda tangent: tangent, lambda tangent: tangent * jnp.nan, tangents[0])
