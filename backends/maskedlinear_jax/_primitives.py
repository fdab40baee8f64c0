"""The three products of the sparse form, as JAX primitives: a closed set, each made of the other two when differentiated.

As primitives they have every mode of differentiation, of any order, and vmap, over patterns too; a custom rule would refuse
forward mode, and JAX's own sparse products are differentiated through a dense matrix
(https://github.com/jax-ml/jax/issues/14623). Batches have any number of axes, and so have stacks of patterns, so that
nothing is reshaped that lies on several devices: ``_partition`` says which axes may. A third primitive turns x around, and
for small batches on CPUs the derivative of a product is one, too, and so are both its gradients (``_at_once``).

Of half types the products are float32, and their cotangents are taken for numbers of the half type, which they are: whoever
multiplies half types rounds the product to them, and a cotangent comes by way of that.

On CPUs they are kernels of the core, if these are there (``_kernels``), or those that JAX brings along (``_products``). For
``jax.export`` they are gathered sums on every platform, CPUs too: JAX vouches for none of its sparse kernels in a
program that is kept, and a batch may have a name for a size there. ``_compat.placement`` says so, when they are lowered.
"""

# mypy: disable-error-code="no-untyped-call,no-any-return"

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from maskedlinear_jax import _gpu_products, _kernels, _products
from maskedlinear_jax._at_once import Alone, are_at_once, as_program, derivative
from maskedlinear_jax._compat import (
    Primitive,
    ad,
    automatic_axes,
    batching,
    make_varying,
    mlir,
    on_its_mesh,
    placement,
    sharding_of,
    without_mesh,
)
from maskedlinear_jax._gpu_products import in_precision, precision
from maskedlinear_jax._partition import Axes, partitioned, result_type, wide
from maskedlinear_jax._products import DevicePattern

__all__ = ["multiplied", "pattern_axes", "primitive", "sddmm", "spmm", "turn"]

_LIMIT = (1 << 31) - 1  # of an index


def spmm(values: Array, right: Array, pattern: DevicePattern, transposed: bool = False) -> Array:
    """Return W · right, shape (out, \\*batch) for right (in, \\*batch); or Wᵀ · right, the other way round.

    W (out, in) has ``values (nnz,)`` where ``pattern`` has a connection. Values and right have one dtype; of half types the
    product is float32. They may have axes in front, the same; the pattern has them too, or is one for all.
    """
    values, right, *rest = make_varying([values, right, *pattern.arrays])
    if _spmm_p is None:
        return _spmm(values, right, *rest, transposed=transposed, kernel="any")
    return _spmm_p.bind(values, right, *rest, transposed=transposed, precision=precision())


def sddmm(left: Array, right: Array, pattern: DevicePattern, lead: int = 0) -> Array:
    """Return left · rightᵀ at the connections, shape (nnz,), for left (out, \\*batch) and right (in, \\*batch).

    ``lead`` is how many axes both have in front, and dtypes are as in :func:`spmm`.
    """
    left, right, *rest = make_varying([left, right, *pattern.arrays])
    if _sddmm_p is None:
        return _sddmm(left, right, *rest, lead=lead, kernel="any")
    return _sddmm_p.bind(left, right, *rest, lead=lead, precision=precision())


def turn(array: Array, to_columns: bool = True) -> Array:
    """Return ``array (*batch, features)`` as (features, \\*batch), or the other way round."""
    if _turn_p is None:
        return _turn(array, to_columns=to_columns, kernel="gpu")
    return _turn_p.bind(array, to_columns=to_columns, precision=None)


@partial(jax.jit, inline=True)
def multiplied(values: Array, x: Array, pattern: DevicePattern) -> Array:
    """Return x · Wᵀ, as one program outside of others too: in it nothing has to be turned around."""
    return turn(spmm(values, turn(x), pattern), to_columns=False)


# How they are formed. ``kernel`` is "cpu", "gpu" (all that is not the CPU), or "any": gathered in parts, of a program whose
# arrays lie anywhere, or which any platform may run.


def _spmm(values: Array, right: Array, *rest: Array, transposed: bool, kernel: str) -> Array:
    lead, pattern = values.ndim - 1, DevicePattern(*rest)
    shape, batch = right.shape[: lead + 1], right.shape[lead + 1 :]
    if kernel == "cpu" and _kernels.are_used(values, right, *rest):
        by_kernel = partial(_kernels.spmm, transposed=transposed)
        found = _each(by_kernel, values, _kernels.by_batch(right, lead), pattern, lead, kernel)
        return jnp.moveaxis(found.reshape(*found.shape[:-2], *batch, found.shape[-1]), -1, lead)

    def product(values: Array, right: Array, pattern: DevicePattern) -> Array:
        if kernel == "gpu":
            return _gpu_products.spmm(values, right, pattern, transposed=transposed)
        values, right = _widened(values, right)
        return _products.spmm(values, right, pattern, transposed=transposed, cpu=kernel == "cpu")

    found = _each(product, values, right.reshape(*shape, math.prod(batch)), pattern, lead, kernel)
    return found.reshape(*found.shape[:-1], *batch)


def _sddmm(left: Array, right: Array, *rest: Array, lead: int, kernel: str) -> Array:
    if kernel == "cpu" and _kernels.are_used(left, right, *rest):
        one, other = (_kernels.by_batch(side, lead) for side in (left, right))
        return _each(_kernels.sddmm, one, other, DevicePattern(*rest), lead, kernel)
    left, right = (side.reshape(*side.shape[: lead + 1], math.prod(side.shape[lead + 1 :])) for side in (left, right))

    def product(left: Array, right: Array, pattern: DevicePattern) -> Array:
        if kernel == "gpu":
            return _gpu_products.sddmm(left, right, pattern)
        left, right = _widened(left, right)
        return _products.sddmm(left, right, pattern, cpu=kernel == "cpu")

    return _each(product, left, right, DevicePattern(*rest), lead, kernel)


def _widened(*sides: Array) -> list[Array]:
    return [side.astype(wide(side.dtype)) for side in sides]


def _turn(array: Array, *, to_columns: bool, kernel: str) -> Array:
    *others, features = array.shape if to_columns else (*array.shape[1:], array.shape[0])
    # By way of blocks it would have to be gathered from all devices; and products by kernels of ours undo a plain one.
    if kernel == "any" or (kernel == "cpu" and _kernels.are_used(array)):
        return jnp.moveaxis(array, -1, 0) if to_columns else jnp.moveaxis(array, 0, -1)
    if to_columns:
        return _products.to_columns(array.reshape(math.prod(others), features)).reshape(features, *others)
    return _products.to_rows(array.reshape(features, math.prod(others))).reshape(*others, features)


def _each(
    product: Callable[[Array, Array, DevicePattern], Array],
    one: Array,
    other: Array,
    pattern: DevicePattern,
    lead: int,
    kernel: str,
) -> Array:
    """Return the product of each of a stack: one after the other on the CPU, and where W is unpacked; else all in one."""
    if not lead:
        return product(one, other, pattern)
    stack = one.shape[:lead]
    one, other = (side.reshape(math.prod(stack), *side.shape[lead:]) for side in (one, other))
    shared = pattern.indices.ndim == 1
    if not shared:
        pattern = jax.tree.map(lambda index: index.reshape(math.prod(stack), *index.shape[lead:]), pattern)
    count, largest = one.shape[0], max(index.shape[-1] for index in pattern.without_bits().arrays)
    one_by_one = kernel == "cpu" or not isinstance(count, int) or count * largest > _LIMIT
    if one_by_one or (kernel == "gpu" and _gpu_products.is_stack_one_by_one(one, other, pattern)):
        parts = (one, other) if shared else (one, other, pattern)
        found = lax.map(lambda part: product(part[0], part[1], pattern if shared else part[2]), parts)
    else:
        joined = product(_joined(one), _joined(other), _side_by_side(pattern, count))
        found = joined.reshape(count, joined.shape[0] // max(count, 1), *joined.shape[1:])
    return found.reshape(*stack, *found.shape[1:])


def _joined(stacked: Array) -> Array:
    return stacked.reshape(stacked.shape[0] * stacked.shape[1], *stacked.shape[2:])


def _side_by_side(pattern: DevicePattern, count: int) -> DevicePattern:
    """Return the pattern of a stack as one, each layer's connections between inputs and outputs of its own."""
    pattern = jax.tree.map(lambda index: jnp.broadcast_to(index, (count, index.shape[-1])), pattern.without_bits())
    size, out, in_ = (array.shape[1] for array in (pattern.indices, pattern.indptr[:, 1:], pattern.starts[:, 1:]))
    place = jnp.arange(count, dtype=jnp.int32)[:, None]
    end = jnp.full(1, count * size, jnp.int32)
    return DevicePattern(
        indptr=jnp.concatenate([_joined(pattern.indptr[:, :-1] + size * place), end]),
        rows=_joined(pattern.rows + out * place),
        indices=_joined(pattern.indices + in_ * place),
        starts=jnp.concatenate([_joined(pattern.starts[:, :-1] + size * place), end]),
        outputs=_joined(pattern.outputs + out * place),
        order=_joined(pattern.order + size * place),
    )


# What their axes are: "n0", "n1" of a stack, "b0", "b1" of a batch, "k" the connections, "o" and "i" the layer's sizes.


def pattern_axes(pattern: DevicePattern, stack: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    front = stack if pattern.indices.ndim > 1 else ()
    names = (("p",), ("k",), ("k",), ("q",), ("k",), ("k",), ("o", "w"), ("o", "w"))
    return tuple((*front, *of) for of in names[: len(pattern.arrays)])


def _spmm_axes(values: Any, right: Any, *rest: Any, transposed: bool) -> Axes:
    stack = tuple(f"n{place}" for place in range(values.ndim - 1))
    batch = tuple(f"b{place}" for place in range(right.ndim - len(stack) - 1))
    source, target = "oi" if transposed else "io"
    pattern = pattern_axes(DevicePattern(*rest), stack)
    return Axes(((*stack, "k"), (*stack, source, *batch), *pattern), (*stack, target, *batch), 2 + transposed)


def _sddmm_axes(left: Any, right: Any, *rest: Any, lead: int) -> Axes:
    stack = tuple(f"n{place}" for place in range(lead))
    batch = tuple(f"b{place}" for place in range(right.ndim - lead - 1))
    pattern = pattern_axes(DevicePattern(*rest), stack)
    return Axes(((*stack, "o", *batch), (*stack, "i", *batch), *pattern), (*stack, "k"), 1)


def _turn_axes(array: Any, *, to_columns: bool) -> Axes:
    batch = tuple(f"b{place}" for place in range(array.ndim - 1))
    rows, columns = (*batch, "f"), ("f", *batch)
    return Axes((rows,), columns, 4, is_sum=False) if to_columns else Axes((columns,), rows, 5, is_sum=False)


# How they are differentiated.


def _spmm_jvp(primals: Any, tangents: Any, *, transposed: bool) -> tuple[Array, Any]:
    values, right, *rest = primals
    are_both = not any(isinstance(tangent, ad.Zero) for tangent in tangents[:2])
    if are_both and not transposed and _derivative_p and are_at_once(values, right, DevicePattern(*rest).indices):
        moved = _derivative_p.bind(*tangents[:2], *primals, precision=precision())
        return spmm(values, right, DevicePattern(*rest)), moved
    return _bilinear_jvp(
        lambda one, other: spmm(one, other, DevicePattern(*primals[2:]), transposed), primals[:2], tangents[:2]
    )


def _sddmm_jvp(primals: Any, tangents: Any, *, lead: int) -> tuple[Array, Any]:
    return _bilinear_jvp(
        lambda one, other: sddmm(one, other, DevicePattern(*primals[2:]), lead), primals[:2], tangents[:2]
    )


def _bilinear_jvp(product: Any, sides: Any, tangents: Any) -> tuple[Array, Any]:
    """Return a product of two and its derivative along ``tangents``, one of which may be zero."""
    moved = [
        product(*(tangent if i == k else side for k, side in enumerate(sides)))
        for i, tangent in enumerate(tangents)
        if not isinstance(tangent, ad.Zero)
    ]
    return product(*sides), sum(moved[1:], moved[0])


def _turn_jvp(primals: Any, tangents: Any, *, to_columns: bool) -> tuple[Array, Any]:
    return turn(primals[0], to_columns), turn(tangents[0], to_columns)


def _spmm_transpose(g: Any, values: Any, right: Any, *rest: Any, transposed: bool) -> list[Any]:
    pattern = DevicePattern(*rest)
    if ad.is_undefined_primal(values):
        if isinstance(g, ad.Zero):
            return [ad.Zero(values.aval), None, *(None,) * len(rest)]
        g = g.astype(right.dtype)
        left, right = (right, g) if transposed else (g, right)
        found = sddmm(left, right, pattern, values.aval.ndim - 1)
        return [found.astype(values.aval.dtype), None, *(None,) * len(rest)]
    if isinstance(g, ad.Zero):
        return [None, ad.Zero(right.aval), *(None,) * len(rest)]
    found = spmm(values, g.astype(values.dtype), pattern, not transposed)
    return [None, found.astype(right.aval.dtype), *(None,) * len(rest)]


def _sddmm_transpose(g: Any, left: Any, right: Any, *rest: Any, lead: int) -> list[Any]:
    pattern = DevicePattern(*rest)
    is_left = ad.is_undefined_primal(left)
    of, other = (left.aval, right) if is_left else (right.aval, left)
    if isinstance(g, ad.Zero):
        found = ad.Zero(of)
    else:
        found = spmm(g.astype(other.dtype), other, pattern, not is_left).astype(of.dtype)
    return [found, None, *(None,) * len(rest)] if is_left else [None, found, *(None,) * len(rest)]


def _turn_transpose(g: Any, array: Any, *, to_columns: bool) -> list[Any]:
    return [ad.Zero(array.aval) if isinstance(g, ad.Zero) else turn(g, not to_columns)]


# How they are mapped over. Batches get an axis more; where values or patterns differ, all have one more in front.


def _spmm_batch(arguments: Any, dims: Any, *, transposed: bool) -> tuple[Array, int]:
    if all(dim is None for dim in (dims[0], *dims[2:])):
        values, right, *rest = arguments
        return spmm(values, jnp.moveaxis(right, dims[1], values.ndim), DevicePattern(*rest), transposed), values.ndim
    values, right, *rest = _in_front(arguments, dims)
    return spmm(values, right, DevicePattern(*rest), transposed), 0


def _sddmm_batch(arguments: Any, dims: Any, *, lead: int) -> tuple[Array, int]:
    left, right, *rest = _in_front(arguments, dims)
    return sddmm(left, right, DevicePattern(*rest), lead + 1), 0


def _turn_batch(arguments: Any, dims: Any, *, to_columns: bool) -> tuple[Array, int]:
    place = 0 if to_columns else 1
    return turn(jnp.moveaxis(arguments[0], dims[0], place), to_columns), 1 - place


def _in_front(arguments: Any, dims: Any) -> list[Array]:
    """Return arrays that have the mapped axis in front; of one pattern for all the indices as they are."""
    size, mesh_axis = next(
        (array.shape[dim], _mesh_axis(array, dim))
        for array, dim in zip(arguments, dims, strict=True)
        if dim is not None
    )
    indices = DevicePattern(*arguments[2:]).indices
    shared = all(dim is None for dim in dims[2:]) and indices.ndim == 1

    def moved(array: Array, dim: int | None) -> Array:
        if dim is not None:
            return jnp.moveaxis(array, dim, 0)
        where = {}
        if mesh_axis is not None:
            sharding = sharding_of(array)
            spec = jax.sharding.PartitionSpec(mesh_axis, *sharding.spec)
            where = {"out_sharding": jax.sharding.NamedSharding(sharding.mesh, spec)}
        return lax.broadcast_in_dim(array, (size, *array.shape), tuple(range(1, array.ndim + 1)), **where)

    sides = [moved(*pair) for pair in zip(arguments[:2], dims[:2], strict=True)]
    rest = arguments[2:] if shared else [moved(*pair) for pair in zip(arguments[2:], dims[2:], strict=True)]
    return [*sides, *rest]


def _mesh_axis(array: Array, dim: int) -> Any:
    """Return the explicit mesh axis that an array is sharded over along ``dim``."""
    spec = () if sharding_of(array) is None else sharding_of(array).spec
    return spec[dim] if dim < len(spec) else None


def primitive(name: str, body: Any, axes_of: Any, jvp: Any, transpose: Any, batch: Any, static: tuple[str, ...]) -> Any:
    """Return a primitive whose ``body`` is compiled for the CPU or for the rest; ``None`` if JAX has no such interface."""
    try:
        made = Primitive(name)
        made.def_abstract_eval(lambda *avals, precision, **options: result_type(axes_of(*avals, **options), avals))
        made.def_impl(as_program(made, (*static, "precision")))
        ad.primitive_jvps[made] = in_precision(jvp)
        ad.primitive_transposes[made] = in_precision(transpose)
        batching.primitive_batchers[made] = in_precision(batch)

        def lowering(local: str) -> Any:
            def lower(ctx: Any, *arguments: Any, precision: Any, **options: Any) -> Any:
                where = placement(ctx)
                kernel = "any" if where == "anywhere" else local

                def form(*arrays: Array) -> Array:
                    with automatic_axes():
                        return in_precision(body)(*arrays, precision=precision, **options, kernel=kernel)

                if where == "sharded":
                    product = partitioned(form, axes_of(*ctx.avals_in, **options))
                    return mlir.lower_fun(product, multiple_results=False)(on_its_mesh(ctx), *arguments)
                return mlir.lower_fun(form, multiple_results=False)(without_mesh(ctx), *arguments)

            return lower

        mlir.register_lowering(made, lowering("gpu"))
        mlir.register_lowering(made, lowering("cpu"), platform="cpu")
    except (AttributeError, TypeError):
        return None
    return made


_spmm_p = primitive("masked_spmm", _spmm, _spmm_axes, _spmm_jvp, _spmm_transpose, _spmm_batch, ("transposed",))
_sddmm_p = primitive("masked_sddmm", _sddmm, _sddmm_axes, _sddmm_jvp, _sddmm_transpose, _sddmm_batch, ("lead",))
_turn_p = primitive("masked_turn", _turn, _turn_axes, _turn_jvp, _turn_transpose, _turn_batch, ("to_columns",))
_derivative_p = derivative(
    spmm,
    sddmm,
    lambda *avals, transposed: result_type(_spmm_axes(*avals, transposed=transposed), avals),
    lambda *avals: result_type(_sddmm_axes(*avals, lead=0), avals),
    (Alone(_sddmm_p, {"lead": 0}), Alone(_spmm_p, {"transposed": True})),
)
