"""Where the arrays of a sparse product may lie among several devices, and how each device forms its part of it.

Batches and stacks of patterns may be sharded over any axes of a mesh; connections and features are whole on each device. A
sum over a batch is formed once, between devices. Automatic axes of a mesh are partitioned by a rule for XLA, which brings
arrays to where the rule allows them to be; explicit ones are types, and what may not be is an error there; and inside
``jax.shard_map`` each device's arrays are whole already.
"""

# mypy: disable-error-code="no-untyped-call,no-any-return"

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from maskedlinear_jax._compat import ShardingTypeError, custom_partitioning

__all__ = ["Axes", "partitioned", "result_type", "wide"]

_FREE = "nbf"  # what the names of axes begin with that may be sharded


class Axes(NamedTuple):
    """The axes of a product's operands and of its result, by name, as in :func:`jax.numpy.einsum`.

    ``code`` tells products from each other whose axes are alike: programs that XLA keeps on disk are told by what they are
    of, which says nothing of what it calls. ``is_sum``, the result of half types is the sum in float32.
    """

    operands: tuple[tuple[str, ...], ...]
    result: tuple[str, ...]
    code: int
    is_sum: bool = True

    @property
    def names(self) -> list[str]:
        """The name of each axis once, in order of appearance."""
        return list(dict.fromkeys(name for axes in self.operands for name in axes))

    @property
    def summed(self) -> list[str]:
        """The axes that may be sharded, and are summed over."""
        return [name for name in self.names if name[0] in _FREE and name not in self.result]

    def rule(self) -> str:
        """Return the rule as XLA's partitioner Shardy takes it, with one operand more, which says the code."""
        *operands, result = (" ".join(axes) for axes in (*self.operands, ("z",), self.result))
        return f"{', '.join(operands)} -> {result}"


def wide(dtype: Any) -> Any:
    """Return the dtype of sums of products of numbers of ``dtype``: float32 for half types."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def result_type(axes: Axes, avals: Sequence[Any]) -> Any:
    """Return the type of a product of arrays of these types.

    Raises:
        ShardingTypeError: if an axis is sharded that must be whole, or two operands' axes are sharded differently.
    """
    sizes = {name: size for names, aval in zip(axes.operands, avals, strict=True) for name, size in _pairs(names, aval)}
    sizes |= {name: sizes[end] - 1 for name, end in (("o", "p"), ("i", "q")) if end in sizes}
    like, shape = avals[min(1, len(avals) - 1)], tuple(sizes[name] for name in axes.result)
    dtype = wide(like.dtype) if axes.is_sum else like.dtype
    mesh = next((mesh for mesh in map(_mesh_of, avals) if mesh is not None), None)
    if mesh is None:
        return like.update(shape=shape, dtype=dtype, weak_type=False)
    where = _sharded_axes(axes, avals)
    spec = PartitionSpec(*(where.get(name) for name in axes.result))
    return like.update(shape=shape, dtype=dtype, weak_type=False, sharding=NamedSharding(mesh, spec))


def _pairs(names: tuple[str, ...], aval: Any) -> Iterator[tuple[str, Any]]:
    return zip(names, aval.shape, strict=True)


def _mesh_of(aval: Any) -> Any:
    mesh = getattr(getattr(aval, "sharding", None), "mesh", None)
    return None if mesh is None or mesh.empty else mesh


def _spec_of(array: Any) -> tuple[Any, ...]:
    spec = tuple(getattr(getattr(array, "sharding", None), "spec", ()))
    return spec + (None,) * (len(array.shape) - len(spec))


def _sharded_axes(axes: Axes, avals: Sequence[Any]) -> dict[str, Any]:
    """Return which explicit axes of the mesh each axis is sharded over; checked."""
    where: dict[str, Any] = {}
    for place, (names, aval) in enumerate(zip(axes.operands, avals, strict=True)):
        for name, axis in zip(names, _spec_of(aval), strict=True):
            if axis is not None and name[0] not in _FREE:
                _refuse(avals, f"an axis of {'weights and features' if place < 2 else 'indices'} is")
            # The two sides, whose gradients are of their types, are sharded alike; indices that are whole are cut.
            known = where.setdefault(name, axis) if place < 2 else where.get(name)
            if axis != known and (place < 2 or axis is not None):
                _refuse(avals, "one of them is not sharded as the others are")
    return where


def _refuse(avals: Sequence[Any], what: str) -> None:
    got = ", ".join(dict.fromkeys(aval.str_short(short_dtypes=True) for aval in avals))
    raise ShardingTypeError(
        "in a sparse product with an explicit mesh only the axes of a batch, and those that stacks of patterns are mapped "
        f"over, may be sharded, and in all arrays that have them alike; {what}: got {got}. Move arrays first, with "
        "jax.sharding.reshard, for one x of shape (batch, in) with jax.sharding.reshard(x, P('data', None)); patterns "
        "are cut by outputs with SparsityPattern.split_rows"
    )


def partitioned(form: Callable[..., Array], axes: Axes) -> Callable[..., Array]:
    """Return a product that is formed by each device for its part of a batch, where XLA may choose where arrays lie.

    Args:
        form: the product, of the arrays of one device.
        axes: their axes.
    """

    def part(mesh: Any, operands: Any, result: Any) -> Any:
        where = _chosen(axes, operands, result)
        to = [
            NamedSharding(mesh, PartitionSpec(*(where.get(name) for name in names)))
            for names in (*axes.operands, ("z",), axes.result)
        ]
        sums = tuple(axis for name in axes.summed for axis in _flat(where.get(name)))

        def on_each(*arrays: Array) -> Array:
            found = form(*arrays[:-1])
            return lax.psum(found, sums) if sums else found

        return mesh, on_each, to[-1], tuple(to[:-1])

    def infer(mesh: Any, operands: Any, result: Any) -> Any:
        return part(mesh, operands, result)[2]

    product = custom_partitioning(lambda *arrays: form(*arrays[:-1]))
    product.def_partition(
        part,
        infer_sharding_from_operands=infer,
        sharding_rule=axes.rule(),
        need_replication_factors=tuple(name for name in (*axes.names, "z") if name[0] not in _FREE),
        reduction_factors=tuple(axes.summed),
    )
    return lambda *arrays: product(*arrays, jnp.zeros(axes.code, jnp.int8))


def _flat(axis: Any) -> tuple[Any, ...]:
    return () if axis is None else axis if isinstance(axis, tuple) else (axis,)


def _chosen(axes: Axes, operands: Sequence[Any], result: Any) -> dict[str, Any]:
    """Return which axes of the mesh each axis is cut over: as an operand is, or the result, where that goes evenly."""
    where: dict[str, Any] = {}
    used: set[Any] = set()
    for names, array in (*zip(axes.operands, operands, strict=False), (axes.result, result)):
        for name, axis, size in zip(names, _spec_of(array), array.shape, strict=True):
            over = _flat(axis)
            if not over or name in where or name[0] not in _FREE or used & set(over):
                continue
            if (
                size % math.prod(array.sharding.mesh.shape[one] for one in over) == 0
            ):  # what is padded must not be summed
                where[name] = axis
                used |= set(over)
    return where
