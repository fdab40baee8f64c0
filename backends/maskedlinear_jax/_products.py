"""A pattern as JAX's arrays, and how products are formed on one device without the core's kernels: by JAX's, or gathered.

They work on matrices of features by batch, (in, batch) and (out, batch); ``_primitives`` makes the products of any number of
axes of them, which may lie on several devices.
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
from maskedlinear_jax._bits import PatternWithBits, kept_bits
from maskedlinear_jax._compat import from_the_start

__all__ = ["DevicePattern", "sddmm", "spmm", "taken", "to_columns", "to_rows"]

_CHUNK = 1 << 20  # numbers that a product gathers at once
_SYMBOLIC = 32  # what a batch that has no size yet is taken for there
_BLOCK = 128  # rows that a product in blocks multiplies at once
_LANES = 8  # columns that the product of compressed rows takes at a time
_ROWS = 16  # rows that a transposition moves at a time
_SLICES = 8  # parts of a batch that the sampled product adds up while it gathers
_WIDE = 32  # columns that such a part has at least


class DevicePattern(NamedTuple):
    """A pattern by rows and by columns, as in :class:`maskedlinear.pattern.SparsityPattern`, and the bits that it keeps."""

    indptr: Array
    rows: Array
    indices: Array
    starts: Array
    outputs: Array
    order: Array
    bits: Array | None = None
    firsts: Array | None = None

    def without_bits(self) -> DevicePattern:
        """Return its indices alone."""
        return self._replace(bits=None, firsts=None)

    @classmethod
    def of(cls, pattern: SparsityPattern) -> DevicePattern:
        """Return the indices of ``pattern``, which may be traced."""
        return cls(*(jnp.asarray(array) for array in _flatten(pattern)[0]))

    @property
    def named(self) -> dict[str, Array]:
        """Those that are there, by name."""
        return {name: array for name, array in self._asdict().items() if array is not None}

    @property
    def arrays(self) -> tuple[Array, ...]:
        """Those that are there, from which ``DevicePattern(*arrays)`` makes it again."""
        return tuple(self.named.values())

    def is_valid_by_rows(self, in_features: int) -> Array:
        """Return whether ``indptr``, ``rows`` and ``indices``, and on GPUs the bits, are those of one pattern.

        A state may have brought any. On CPUs nothing reads bits.
        """
        indices = self.indptr, self.rows, self.indices

        def by_rows(indptr: Array, rows: Array, columns: Array, *_: Array) -> Array:
            return _are_of_one(indptr, rows, columns, in_features)

        if self.bits is None or self.firsts is None:
            return by_rows(*indices)
        by_bits = partial(_are_of_bits, in_features=in_features)
        return lax.platform_dependent(*indices, self.bits, self.firsts, cpu=by_rows, default=by_bits)

    def is_valid_by_columns(self) -> Array:
        """Return whether ``starts``, ``outputs`` and ``order`` are those of the connections by rows, which are valid."""
        # In the one loop that gathers. No connection is there twice, so that none is missing.
        rows, columns = taken(self.rows, self.order), taken(self.indices, self.order)
        columns = jnp.where(rows == self.outputs, columns, -1)
        columns = lax.optimization_barrier(columns)
        return _are_of_one(self.starts, columns, self.order, self.order.size)


def _are_of_bits(indptr: Array, rows: Array, columns: Array, bits: Array, firsts: Array, in_features: int) -> Array:
    """Return whether indices and bits are those of one pattern: if each connection is where bits say, all are by rows."""
    place, (out, size) = columns & 31, (indptr.size - 1, columns.size)
    word, first = (of.at[rows, columns >> 5].get(mode="promise_in_bounds") for of in (bits, firsts))
    before = first + lax.population_count(word & ((1 << place) - 1))
    wrong = (word >> place & 1 == 0) | (before != jnp.arange(size, dtype=jnp.int32))
    wrong |= (rows < 0) | (rows >= out) | (columns < 0) | (columns >= in_features)
    counts = lax.population_count(bits)
    ends = indptr[:-1, None] + jnp.cumsum(counts, 1, dtype=jnp.int32)
    wrong_rows = indptr[1:] - indptr[:-1] != counts.sum(1, dtype=jnp.int32)
    starts = (indptr[0] == 0) & (indptr[-1] == size)
    return starts & _none(wrong) & _none(wrong_rows) & _none((firsts != ends - counts).reshape(-1))


def _are_of_one(starts: Array, groups: Array, values: Array, bound: int) -> Array:
    """Return whether group i is ``starts[i]`` to ``starts[i + 1] - 1``, groups do not fall, and the values of each ascend,
    all of them from 0 to below ``bound``."""
    size, group = groups.size, jnp.arange(starts.size - 1, dtype=jnp.int32)
    first, end = starts[:-1], starts[1:]
    wrong = first > end
    if size:
        outer = (taken(groups, first) != group) | (taken(groups, end - 1) != group)
        wrong |= outer & (first < end)
    ends = (starts[0] == 0) & (starts[-1] == size)
    if not size:
        return ends & _none(wrong)
    falls, stays = groups[1:] < groups[:-1], groups[1:] == groups[:-1]
    outside = (values[1:] < 0) | (values[1:] >= bound)
    unordered = falls | (stays & (values[1:] <= values[:-1])) | outside
    ends &= (values[0] >= 0) & (values[0] < bound)
    return ends & _none(jnp.concatenate([wrong, unordered]))  # in one: each sum takes memory when it is compiled


def taken(array: Array, places: Array) -> Array:
    """Return entries or rows of an array; for places that it has not, those at its ends.

    As XLA's gather does by itself: ``array[places]`` adds instructions for places from the end and beyond it, which cost
    time and, in a program of many layers, a good part of the memory that compiling it takes.
    """
    return array.at[places].get(mode="promise_in_bounds", **from_the_start(array))  # type: ignore[arg-type, unused-ignore]


def _none(wrong: Array) -> Array:
    """Return ``~wrong.any()``, as a dot product, which XLA forms on the CPU many numbers at a time."""
    return jnp.dot(wrong.astype(jnp.float32), jnp.ones(wrong.size, jnp.float32)) == 0


def _flatten(pattern: SparsityPattern) -> tuple[tuple[Any, ...], tuple[int, int]]:
    return (pattern.indptr, pattern.rows, pattern.indices, *pattern.csc, *kept_bits(pattern)), pattern.shape


def _register(kind: type[SparsityPattern]) -> None:
    """Make a kind of patterns a tree of arrays, as which ``jax.export`` takes it too."""

    def unflatten(shape: tuple[int, int], leaves: tuple[Any, ...]) -> SparsityPattern:
        pattern = object.__new__(kind)  # leaves may be traced, or no arrays at all
        pattern.indptr, pattern.indices, pattern.shape = leaves[0], leaves[2], shape
        vars(pattern).update(rows=leaves[1], csc=tuple(leaves[3:6]))
        if kind is PatternWithBits:
            vars(pattern).update(bits=tuple(leaves[6:]))
        return pattern

    jax.tree_util.register_pytree_node(kind, _flatten, unflatten)
    export.register_pytree_node_serialization(
        kind,
        serialized_name=f"maskedlinear.{kind.__name__}",
        serialize_auxdata=lambda shape: json.dumps(shape).encode(),
        deserialize_auxdata=lambda shape: tuple(json.loads(shape)),
    )


_register(SparsityPattern)
_register(PatternWithBits)


def spmm(values: Array, right: Array, pattern: DevicePattern, *, transposed: bool, cpu: bool) -> Array:
    """The product, on the CPU by JAX's kernel for compressed rows, elsewhere by gathering."""
    starts, across = (pattern.starts, pattern.outputs) if transposed else (pattern.indptr, pattern.indices)
    depth, batch = right.shape
    count = starts.shape[0] - 1
    if not values.size or not batch or not count:
        return jnp.zeros((count, batch), right.dtype)
    if transposed:
        values = taken(values, pattern.order)
    if cpu:
        matrix = sparse.BCSR((values, across, starts), shape=(count, depth), indices_sorted=True, unique_indices=True)
        padded = jnp.pad(right, ((0, 0), (0, -batch % _LANES)))  # what is left over takes longer than all the rest
        return (matrix @ padded)[:, :batch]
    of = taken(pattern.indices, pattern.order) if transposed else pattern.rows
    return _in_parts(
        lambda total, part: total.at[part[0]].add(part[2][:, None] * taken(right, part[1]), indices_are_sorted=True),
        jnp.zeros((count, batch), right.dtype),
        (of, across, values),
        batch,
    )


def sddmm(left: Array, right: Array, pattern: DevicePattern, *, cpu: bool) -> Array:
    """The sampled product, by gathering, or on the CPU block by block where that takes less time."""
    size, batch = pattern.indices.size, right.shape[1]
    if not size or not batch:
        return jnp.zeros(size, right.dtype)
    if not cpu:
        return _gathered(lambda of, across: (taken(left, of) * taken(right, across)).sum(1), pattern, batch)
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
        products = [taken(left[:, part], of) * taken(right[:, part], across) for part in parts]
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


# x.T and back, by way of blocks: XLA takes a plain transpose for a matter of layout, and copies once for each reader.


def to_columns(rows: Array) -> Array:
    """Return the transpose of a matrix of batch by features."""
    batch, features = rows.shape
    lanes = math.gcd(batch, _ROWS) if isinstance(batch, int) else 1
    if lanes < 2 or not rows.size:
        return rows.T
    return rows.reshape(batch // lanes, lanes, features).transpose(2, 0, 1).reshape(features, batch)


def to_rows(columns: Array) -> Array:
    """Return the transpose of a matrix of features by batch."""
    features, batch = columns.shape
    lanes = math.gcd(batch, _ROWS) if isinstance(batch, int) else 1
    if lanes < 2 or not columns.size:
        return columns.T
    return columns.reshape(features, batch // lanes, lanes).transpose(1, 2, 0).reshape(batch, features)
