"""``pack``: a sparse matrix for inference, which ``sparse_linear`` takes in place of values and pattern.

Packed for CPUs the product is a primitive of its own, so that where it is lowered decides how it is formed: of a few rows of
x by the packed kernel, which XLA calls on the CPUs that it was packed for; or by the products of ``sparse_linear``. For
GPUs the pattern keeps bits, which these products read.
"""

# mypy: disable-error-code="no-untyped-call,no-any-return"

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, export
from jax.typing import ArrayLike

from maskedlinear import kernels
from maskedlinear.pattern import SparsityPattern
from maskedlinear_jax import _kernels
from maskedlinear_jax._bits import PatternWithBits, with_bits
from maskedlinear_jax._compat import ad, is_traced
from maskedlinear_jax._gpu_products import precision
from maskedlinear_jax._partition import Axes
from maskedlinear_jax._primitives import multiplied, pattern_axes, primitive
from maskedlinear_jax._products import DevicePattern

__all__ = ["PackedWeights", "pack", "packed_product", "without_gradient"]

_BITS = "bits"  # the way of packing for GPUs: the pattern keeps a bit for each place of W
_HALF_TYPES = ("bfloat16", "float16")
_DTYPES = ("int32", "int32", "uint8", "float32")  # of a layout's arrays


@dataclass(frozen=True)
class PackedWeights:
    """A sparse matrix for inference, made by :func:`pack`: a tree of arrays.

    Attributes:
        values: shape ``(nnz,)``, in the pattern's order.
        pattern: the connections, of shape ``(out, in)``; packed for a GPU it keeps bits.
        layout: the arrays of the packed copy, if there is one.
        kind: the way of packing, empty if nothing is packed.
    """

    values: Any
    pattern: SparsityPattern
    layout: tuple[Any, ...] = ()
    kind: str = ""

    @property
    def is_packed(self) -> bool:
        """Whether few rows of x go through a packed copy, or, on a GPU, there are bits for the products that go by them;
        not where that would not pay, nor on CPUs without the extra ``cpu``."""
        return bool(self.kind)

    def __repr__(self) -> str:
        """Say the pattern, and the way of packing."""
        return f"PackedWeights({self.pattern!r}, packed={self.kind or 'not'})"


def pack(values: ArrayLike, pattern: SparsityPattern) -> PackedWeights:
    """Pack a sparse matrix for inference at batch 1 to 4 on the CPU, or on a GPU: ``sparse_linear(x, packed, bias=bias)``.

    The values are copied, and once more into the order in which few rows of x are multiplied fastest, where that pays: they
    do not follow the old ones. More rows, other platforms and dtypes, ``jax.export`` and derivatives along x take the
    products of :func:`sparse_linear`. The values have no gradient. It is a tree of arrays: pass it to a jitted function as
    an argument. Packing takes some thousand times as long as a product.

    Where values lie on a GPU, or, of NumPy's, JAX's default device is one, the pattern keeps bits, as of
    :func:`with_bits`: a quarter of a byte for each place of W, for any number of rows of x, in half types too.

    Args:
        values: float32, shape ``(nnz,)``, in the pattern's order; on a GPU also of a half type.
        pattern: the connections, of shape ``(out, in)``.

    Raises:
        TypeError: if ``pattern`` is none, values are not float32, or either is traced: packing is a step outside of ``jit``.
        ValueError: if there is not one value a connection.

    Example:
        >>> import jax.numpy as jnp
        >>> from maskedlinear.pattern import SparsityPattern
        >>> packed = pack(jnp.ones(512), SparsityPattern.full((16, 32)))
        >>> float(sparse_linear(jnp.ones((1, 32)), packed)[0, 0])
        32.0
    """
    if not isinstance(pattern, SparsityPattern):
        raise TypeError(f"pattern must be a maskedlinear.pattern.SparsityPattern; got {type(pattern).__name__}")
    if any(is_traced(leaf) for leaf in jax.tree.leaves((values, pattern))):
        raise TypeError(
            "pack takes arrays with values, not traced ones: it is a step of its own, outside of jit and grad"
        )
    numbers = np.asarray(values)
    by_bits = _are_on_a_gpu(values)
    if numbers.dtype != np.float32 and not (by_bits and numbers.dtype.name in _HALF_TYPES):
        raise TypeError(f"packed values are float32; got {numbers.dtype}: convert them with .astype(jnp.float32)")
    if pattern.indices.ndim != 1 or numbers.shape != (pattern.nnz,):
        raise ValueError(
            f"values must have one entry for each of one pattern's {pattern.indices.shape} connections; got shape "
            f"{numbers.shape}: pack stacked patterns one by one"
        )
    # Made anew, and so checked: its indices may come from anywhere.
    own = SparsityPattern(np.asarray(pattern.indptr), np.asarray(pattern.indices), pattern.shape[1])
    layout: tuple[Any, ...] = ()
    kind = ""
    if by_bits:
        own = with_bits(own)
        kind = _BITS if isinstance(own, PatternWithBits) else ""
    elif kernels.is_available():
        from maskedlinear.kernels import _engine, _packing

        way, made = _engine.host().way, _packing.layout_of(own)
        if way is not None and made is not None:
            kind = way.kind
            layout = made.groups, made.columns, made.indices, made.values(numbers)
    return jax.tree.map(jnp.array, PackedWeights(numbers, own, layout, kind))


def _are_on_a_gpu(values: ArrayLike) -> bool:
    """Whether values lie on a GPU, or, of NumPy's, JAX would put them on one."""
    return any(device.platform == "gpu" for device in jnp.asarray(values).devices())


def packed_product(x: Array, packed: PackedWeights) -> Array:
    """Return x · Wᵀ, shape ``(*batch, out)`` for x ``(*batch, in)`` of the values' dtype."""
    pattern = DevicePattern.of(packed.pattern)
    if packed.kind in ("", _BITS):
        return multiplied(without_gradient(packed.values), x, pattern)
    dtypes = tuple(array.dtype.name for array in packed.layout)
    if len(dtypes) != len(_DTYPES):
        raise ValueError(
            f"packed weights have {len(_DTYPES)} arrays in their layout; got {len(dtypes)}, of another version of "
            "maskedlinear: pack values and pattern again"
        )
    fits = dtypes == _DTYPES and x.dtype == jnp.float32  # a tree may have been cast
    if _packed_p is None or not fits:
        return multiplied(without_gradient(packed.values), x, pattern)
    return _bound(packed.kind, packed.values, x, *pattern.without_bits().arrays, *packed.layout)


@partial(jax.jit, static_argnums=0, inline=True)
def _bound(kind: str, *arrays: Array) -> Array:
    return _packed_p.bind(*arrays, kind=kind, precision=precision())


def _product(values: Array, x: Array, *rest: Array, kind: str, kernel: str) -> Array:
    pattern, layout = DevicePattern(*rest[:6]), rest[6:]
    batch, rows = math.prod(x.shape[:-1]), pattern.indptr.shape[0] - 1
    if kernel == "cpu" and _kernels.multiplies_packed(kind, batch):
        return _kernels.multiply_packed(x.reshape(batch, x.shape[-1]), layout, rows).reshape(*x.shape[:-1], rows)
    return multiplied(values, x, pattern)


def _axes(values: Any, x: Any, *rest: Any, kind: str) -> Axes:
    batch = tuple(f"b{place}" for place in range(x.ndim - 1))
    layout = ("g", "s"), ("c",), ("m", "l"), ("m", "l")
    return Axes((("k",), (*batch, "i"), *pattern_axes(DevicePattern(*rest[:6]), ()), *layout), (*batch, "o"), 6)


_NO_GRADIENT = (
    "packed weights are for inference, and have no gradient: differentiate in x alone, or take values and pattern"
)


@jax.custom_jvp
def without_gradient(values: Array) -> Array:
    """Return values that must not be differentiated."""
    return values


def _refuse(primals: Any, tangents: Any) -> tuple[Array, Any]:
    if not isinstance(tangents[0], jax.custom_derivatives.SymbolicZero):
        raise TypeError(_NO_GRADIENT)
    return primals[0], tangents[0]


without_gradient.defjvp(_refuse, symbolic_zeros=True)


def _jvp(primals: Any, tangents: Any, *, kind: str) -> tuple[Array, Any]:
    if any(not isinstance(tangents[place], ad.Zero) for place in (0, len(tangents) - 1)):
        raise TypeError(_NO_GRADIENT)
    return _packed_p.bind(*primals, kind=kind, precision=precision()), multiplied(
        primals[0], tangents[1], DevicePattern(*primals[2:8])
    )


def _transpose(g: Any, *_: Any, kind: str) -> Any:
    raise NotImplementedError("packed products are linearised by rows")  # so that none of them is transposed


def _batch(arguments: Any, dims: Any, *, kind: str) -> tuple[Array, int]:
    if all(dim is None for place, dim in enumerate(dims) if place != 1):
        x = jnp.moveaxis(arguments[1], dims[1], 0)
        return _packed_p.bind(arguments[0], x, *arguments[2:], kind=kind, precision=precision()), 0

    def by_rows(values: Array, x: Array, *pattern: Array) -> Array:
        return multiplied(values, x, DevicePattern(*pattern))

    return jax.vmap(by_rows, dims[:8])(*arguments[:8]), 0


_packed_p = primitive("masked_packed", _product, _axes, _jvp, _transpose, _batch, ("kind",))


def _flatten(packed: PackedWeights) -> tuple[tuple[Any, ...], str]:
    return (packed.values, packed.pattern, packed.layout), packed.kind


def _unflatten(kind: str, leaves: tuple[Any, ...]) -> PackedWeights:
    values, pattern, layout = leaves
    return PackedWeights(values, pattern, layout, kind)


jax.tree_util.register_pytree_node(PackedWeights, _flatten, _unflatten)
export.register_pytree_node_serialization(
    PackedWeights,
    serialized_name="maskedlinear.PackedWeights",
    serialize_auxdata=lambda kind: json.dumps(kind).encode(),
    deserialize_auxdata=lambda kind: str(json.loads(kind)),
)
