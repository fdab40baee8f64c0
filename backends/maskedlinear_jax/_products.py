"""The three products of the sparse form, as JAX primitives: a closed set, each made of the other two when differentiated.

As primitives they have every mode of differentiation, of any order, and vmap; a custom rule would refuse forward mode, and
JAX's own sparse products are differentiated through a dense matrix (https://github.com/jax-ml/jax/issues/14623). They work
on matrices of features by batch, (in, batch) and (out, batch).

For ``jax.export`` they are gathered sums on every platform, CPUs too: JAX vouches for none of its sparse kernels in a
program that is kept, and a batch may have a name for a size there. ``_primitive`` decides it, when they are lowered.
"""

# mypy: disable-error-code="no-untyped-call,no-any-return"

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, export, lax
from jax.experimental import sparse

from maskedlinear.pattern import SparsityPattern
from maskedlinear_jax._compat import Primitive, ad, batching, is_for_export, mlir

__all__ = ["DevicePattern", "sddmm", "spmm"]

_CHUNK = 1 << 20  # numbers that a product gathers at once
_SYMBOLIC = 32  # what a batch that has no size yet is taken for there
_BLOCK = 128  # rows that a product in blocks multiplies at once
_LANES = 8  # columns that the product of compressed rows takes at a time
_SLICES = 8  # parts of a batch that the sampled product adds up while it gathers
_WIDE = 32  # columns that such a part has at least


class DevicePattern(NamedTuple):
    """A pattern by rows and by columns, as in :class:`maskedlinear.pattern.SparsityPattern`."""

    indptr: Array
    rows: Array
    indices: Array
    starts: Array
    outputs: Array
    order: Array

    @classmethod
    def of(cls, pattern: SparsityPattern) -> DevicePattern:
        """Return the indices of ``pattern``, which may be traced."""
        return cls(*(jnp.asarray(array) for array in _flatten(pattern)[0]))

    def is_valid_by_rows(self, in_features: int) -> Array:
        """Return whether ``indptr``, ``rows`` and ``indices`` are those of one pattern: a state may have brought any."""
        return _are_segments(self.indptr, self.rows) & _ascend(self.rows, self.indices, in_features)

    def is_valid_by_columns(self) -> Array:
        """Return whether ``starts``, ``outputs`` and ``order`` are those of the connections by rows, which are valid."""
        # In the one loop that gathers. No connection is there twice, so that none is missing.
        columns = jnp.where(self.rows[self.order] == self.outputs, self.indices[self.order], -1)
        columns = lax.optimization_barrier(columns)
        return _are_segments(self.starts, columns) & _ascend(columns, self.order, self.order.size)


def _are_segments(starts: Array, groups: Array) -> Array:
    """Return whether group i is ``starts[i]`` to ``starts[i + 1] - 1``, for all of them, where groups do not fall."""
    size, group = groups.size, jnp.arange(starts.size - 1, dtype=jnp.int32)
    first, end = starts[:-1], starts[1:]
    wrong = first > end
    if size:
        wrong |= (groups[jnp.clip(first, 0, size - 1)] != group) & (first < end)
        wrong |= (groups[jnp.clip(end - 1, 0, size - 1)] != group) & (first < end)
    return (starts[0] == 0) & (starts[-1] == size) & _none(wrong)


def _ascend(groups: Array, values: Array, bound: int) -> Array:
    """Return whether groups do not fall, and the values of each group ascend, all of them from 0 to below ``bound``."""
    if not values.size:
        return jnp.ones((), bool)
    falls, stays = groups[1:] < groups[:-1], groups[1:] == groups[:-1]
    outside = (values[1:] < 0) | (values[1:] >= bound)
    return _none(falls | (stays & (values[1:] <= values[:-1])) | outside) & (values[0] >= 0) & (values[0] < bound)


def _none(wrong: Array) -> Array:
    """Return ``~wrong.any()``, as a dot product, which XLA forms on the CPU many numbers at a time."""
    return jnp.dot(wrong.astype(jnp.float32), jnp.ones(wrong.size, jnp.float32)) == 0


def _flatten(pattern: SparsityPattern) -> tuple[tuple[Any, ...], tuple[int, int]]:
    return (pattern.indptr, pattern.rows, pattern.indices, *pattern.csc), pattern.shape


def _unflatten(shape: tuple[int, int], leaves: tuple[Any, ...]) -> SparsityPattern:
    pattern = object.__new__(SparsityPattern)  # leaves may be traced, or no arrays at all
    pattern.indptr, pattern.indices, pattern.shape = leaves[0], leaves[2], shape
    vars(pattern).update(rows=leaves[1], csc=tuple(leaves[3:]))
    return pattern


jax.tree_util.register_pytree_node(SparsityPattern, _flatten, _unflatten)
export.register_pytree_node_serialization(
    SparsityPattern,
    serialized_name="maskedlinear.SparsityPattern",
    serialize_auxdata=lambda shape: json.dumps(shape).encode(),
    deserialize_auxdata=lambda shape: tuple(json.loads(shape)),
)


def spmm(values: Array, right: Array, pattern: DevicePattern, transposed: bool = False) -> Array:
    """Return W · right, shape (out, batch) for right (in, batch); or Wᵀ · right, the other way round.

    W (out, in) has ``values (nnz,)`` where ``pattern`` has a connection. float32 or float64.
    """
    if _spmm_p is None:
        return _spmm(values, right, *pattern, transposed=transposed, cpu=False)
    return _spmm_p.bind(values, right, *pattern, transposed=transposed)


def sddmm(left: Array, right: Array, pattern: DevicePattern) -> Array:
    """Return left · rightᵀ at the connections, shape (nnz,), for left (out, batch) and right (in, batch)."""
    if _sddmm_p is None:
        return _sddmm(left, right, *pattern, cpu=False)
    return _sddmm_p.bind(left, right, *pattern)


def _spmm(values: Array, right: Array, *rest: Array, transposed: bool, cpu: bool) -> Array:
    """The product, on the CPU by JAX's kernel for compressed rows, elsewhere by gathering."""
    pattern = DevicePattern(*rest)
    starts, across = (pattern.starts, pattern.outputs) if transposed else (pattern.indptr, pattern.indices)
    depth, batch = right.shape
    count = starts.shape[0] - 1
    if not values.size or not batch or not count:
        return jnp.zeros((count, batch), right.dtype)
    if transposed:
        values = values[pattern.order]
    if cpu:
        matrix = sparse.BCSR((values, across, starts), shape=(count, depth), indices_sorted=True, unique_indices=True)
        padded = jnp.pad(right, ((0, 0), (0, -batch % _LANES)))  # what is left over takes longer than all the rest
        return (matrix @ padded)[:, :batch]
    of = pattern.indices[pattern.order] if transposed else pattern.rows
    return _in_parts(
        lambda total, part: total.at[part[0]].add(part[2][:, None] * right[part[1]], indices_are_sorted=True),
        jnp.zeros((count, batch), right.dtype),
        (of, across, values),
        batch,
    )


def _sddmm(left: Array, right: Array, *rest: Array, cpu: bool) -> Array:
    """The sampled product, by gathering, or on the CPU block by block where that takes less time."""
    pattern = DevicePattern(*rest)
    size, batch = pattern.indices.size, right.shape[1]
    if not size or not batch:
        return jnp.zeros(size, right.dtype)
    if not cpu:
        return _gathered(lambda of, across: (left[of] * right[across]).sum(1), pattern, batch)
    # Nanoseconds, measured on two cores with AVX-512.
    gathering, in_blocks = size * (0.035 * batch + 3), left.shape[0] * (0.0055 * right.size + 200) + 3 * size
    return _sddmm_in_blocks(left, right, pattern) if gathering > in_blocks else _sddmm_in_slices(left, right, pattern)


def _sddmm_in_slices(left: Array, right: Array, pattern: DevicePattern) -> Array:
    """Gather both sides in slices of the batch, which are added up while they are gathered: less is written, and read again.

    What is left of each dot product is added up by a product with ones: XLA adds up a row one number at a time, and a
    product many.
    """
    batch = right.shape[1]
    slices = min(_SLICES, max(1, batch // _WIDE))
    width = batch if slices == 1 else -(-batch // (4 * slices)) * 4
    left, right = (jnp.pad(side, ((0, 0), (0, slices * width - batch))) for side in (left, right))
    parts = [slice(start, start + width) for start in range(0, slices * width, width)]

    def dot(of: Array, across: Array) -> Array:
        products = [left[:, part][of] * right[:, part][across] for part in parts]
        return sum(products[1:], products[0]) @ jnp.ones(width, right.dtype)

    # In two steps at least: out of a loop XLA would gather from the sides as they were before they were transposed, number
    # by number from all over the memory. It heeds no optimization_barrier here.
    return _gathered(dot, pattern, width, steps=2)


def _gathered(dot: Callable[[Array, Array], Array], pattern: DevicePattern, width: int, steps: int = 1) -> Array:
    """Return ``dot`` of the two ends of all connections, as many at a time as make ``_CHUNK`` numbers, or in ``steps``."""
    size = pattern.indices.size
    step = max(1, min(_at_once(width), -(-size // steps)))
    ends = (pattern.rows, pattern.indices)
    if size <= step:
        return dot(*ends)
    parts = tuple(jnp.pad(end, (0, -size % step)).reshape(-1, step) for end in ends)
    return lax.map(lambda part: dot(*part), parts).reshape(-1)[:size]


def _sddmm_in_blocks(left: Array, right: Array, pattern: DevicePattern) -> Array:
    """Multiply some rows at a time in full, and take from each block what the pattern asks for: no more is ever there.

    A step takes the rows from that of the next connection on, and as many connections as are in them, up to a number
    that suits the average; what it writes too much, later steps overwrite. So it is right for any pattern.
    """
    size, out = pattern.indices.size, left.shape[0]
    height = min(_BLOCK, out)
    most = min(size, max(1, 3 * size * height // (2 * out)))
    padded = jnp.pad(left, ((0, height), (0, 0)))
    rows = jnp.pad(pattern.rows, (0, most), constant_values=out + height)
    across = jnp.pad(pattern.indices, (0, most))

    def step(state: tuple[Array, Array]) -> tuple[Array, Array]:
        start, total = state
        first = rows[start]
        block = lax.dynamic_slice_in_dim(padded, first, height) @ right.T
        of = lax.dynamic_slice_in_dim(rows, start, most) - first
        there = block[jnp.minimum(of, height - 1), lax.dynamic_slice_in_dim(across, start, most)]
        return start + (of < height).sum(dtype=jnp.int32), lax.dynamic_update_slice_in_dim(total, there, start, 0)

    first = (jnp.int32(0), jnp.zeros(size + most, right.dtype))
    return lax.while_loop(lambda state: state[0] < size, step, first)[1][:size]


def _in_parts(add: Any, total: Array, entries: tuple[Array, ...], batch: int) -> Array:
    """Add up entries part by part, so that no more than ``_CHUNK`` numbers are gathered at once."""
    size = entries[0].size
    step = _at_once(batch)
    whole = size // step * step
    if not whole:
        return add(total, entries)
    parts = [entry[:whole].reshape(-1, step) for entry in entries]
    total = lax.scan(lambda total, part: (add(total, part), None), total, parts)[0]
    return add(total, [entry[whole:] for entry in entries]) if whole < size else total


def _at_once(width: Any) -> int:
    """Return how many connections are gathered at once, of which each has ``width`` numbers."""
    return max(1, _CHUNK // (width if isinstance(width, int) else _SYMBOLIC))


def _spmm_shape(values: Any, right: Any, *rest: Any, transposed: bool) -> Any:
    starts = DevicePattern(*rest).starts if transposed else DevicePattern(*rest).indptr
    return right.update(shape=(starts.shape[0] - 1, right.shape[1]), weak_type=False)


def _sddmm_shape(left: Any, right: Any, *rest: Any) -> Any:
    return right.update(shape=DevicePattern(*rest).indices.shape, weak_type=False)


def _spmm_jvp(primals: Any, tangents: Any, *, transposed: bool) -> tuple[Array, Any]:
    return _bilinear_jvp(
        lambda one, other: spmm(one, other, DevicePattern(*primals[2:]), transposed), primals[:2], tangents[:2]
    )


def _sddmm_jvp(primals: Any, tangents: Any) -> tuple[Array, Any]:
    return _bilinear_jvp(lambda one, other: sddmm(one, other, DevicePattern(*primals[2:])), primals[:2], tangents[:2])


def _bilinear_jvp(product: Any, sides: Any, tangents: Any) -> tuple[Array, Any]:
    """Return a product of two and its derivative along ``tangents``, one of which may be zero."""
    moved = [
        product(*(tangent if i == k else side for k, side in enumerate(sides)))
        for i, tangent in enumerate(tangents)
        if not isinstance(tangent, ad.Zero)
    ]
    return product(*sides), sum(moved[1:], moved[0])


def _spmm_transpose(g: Any, values: Any, right: Any, *rest: Any, transposed: bool) -> list[Any]:
    pattern = DevicePattern(*rest)
    if ad.is_undefined_primal(values):
        if isinstance(g, ad.Zero):
            return [ad.Zero(values.aval), None, *(None,) * 6]
        return [sddmm(right, g, pattern) if transposed else sddmm(g, right, pattern), None, *(None,) * 6]
    if isinstance(g, ad.Zero):
        return [None, ad.Zero(right.aval), *(None,) * 6]
    return [None, spmm(values, g, pattern, not transposed), *(None,) * 6]


def _sddmm_transpose(g: Any, left: Any, right: Any, *rest: Any) -> list[Any]:
    pattern = DevicePattern(*rest)
    if ad.is_undefined_primal(left):
        return [ad.Zero(left.aval) if isinstance(g, ad.Zero) else spmm(g, right, pattern), None, *(None,) * 6]
    return [None, ad.Zero(right.aval) if isinstance(g, ad.Zero) else spmm(g, left, pattern, True), *(None,) * 6]


def _spmm_batch(arguments: Any, dims: Any, *, transposed: bool) -> tuple[Array, int]:
    values, right, *rest = arguments
    _refuse_mapped(dims[2:])
    pattern = DevicePattern(*rest)
    if dims[0] is None:  # one product, of all batches side by side
        right = jnp.moveaxis(right, dims[1], 1)
        side_by_side = right.reshape(right.shape[0], math.prod(right.shape[1:]))
        product = spmm(values, side_by_side, pattern, transposed)
        return product.reshape(product.shape[0], *right.shape[1:]), 1
    return _one_by_one(lambda one, other: spmm(one, other, pattern, transposed), arguments[:2], dims[:2])


def _sddmm_batch(arguments: Any, dims: Any) -> tuple[Array, int]:
    _refuse_mapped(dims[2:])
    return _one_by_one(lambda one, other: sddmm(one, other, DevicePattern(*arguments[2:])), arguments[:2], dims[:2])


def _one_by_one(function: Any, arguments: Any, dims: Any) -> tuple[Array, int]:
    mapped = {i: jnp.moveaxis(arguments[i], dim, 0) for i, dim in enumerate(dims) if dim is not None}
    return lax.map(lambda parts: function(*(parts.get(i, arguments[i]) for i in range(2))), mapped), 0


def _refuse_mapped(dims: Any) -> None:
    if any(dim is not None for dim in dims):
        raise ValueError("a pattern cannot be mapped over by jax.vmap: its size is the size of the values")


def _primitive(
    name: str, body: Any, shape: Any, jvp: Any, transpose: Any, batch: Any, static: tuple[str, ...] = ()
) -> Any:
    """Return a primitive whose ``body`` is compiled for the CPU or for the rest; ``None`` if JAX has no such interface.

    A program that is exported has the body for the rest on the CPU too.
    """
    try:
        primitive = Primitive(name)
        primitive.def_abstract_eval(shape)
        primitive.def_impl(
            jax.jit(primitive.bind, static_argnames=static)
        )  # outside of transforms: compiled on its own
        ad.primitive_jvps[primitive] = jvp
        ad.primitive_transposes[primitive] = transpose
        batching.primitive_batchers[primitive] = batch
        on_cpu, elsewhere = (mlir.lower_fun(partial(body, cpu=cpu), multiple_results=False) for cpu in (True, False))

        def lower_on_cpu(ctx: Any, *arguments: Any, **options: Any) -> Any:
            return (elsewhere if is_for_export(ctx) else on_cpu)(ctx, *arguments, **options)

        mlir.register_lowering(primitive, elsewhere)
        mlir.register_lowering(primitive, lower_on_cpu, platform="cpu")
    except (AttributeError, TypeError):
        return None
    return primitive


_spmm_p = _primitive("masked_spmm", _spmm, _spmm_shape, _spmm_jvp, _spmm_transpose, _spmm_batch, ("transposed",))
_sddmm_p = _primitive("masked_sddmm", _sddmm, _sddmm_shape, _sddmm_jvp, _sddmm_transpose, _sddmm_batch)
