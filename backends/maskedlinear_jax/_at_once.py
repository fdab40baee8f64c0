"""Both gradients of a product at once, on CPUs, for batches of which that takes less time than two products.

JAX transposes the derivative of a product for one side after the other. Here it is one primitive, linear in the tangents of
both sides together, whose transpose is asked for both gradients, which are a primitive too. Where no kernel of ours forms
these, and for whatever else is asked of the two, they are what they are made of: products.
"""

# mypy: disable-error-code="no-untyped-call,no-any-return"

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from maskedlinear_jax import _kernels
from maskedlinear_jax._compat import Primitive, ad, automatic_axes, batching, mlir, placement, sharding_of, without_mesh
from maskedlinear_jax._gpu_products import in_precision, precision
from maskedlinear_jax._products import DevicePattern

__all__ = ["are_at_once", "derivative"]


def are_at_once(values: Array, right: Array, indices: Array) -> bool:
    """Whether a CPU like this one forms both gradients of W · right at once: of one pattern, on no explicit mesh."""
    if values.ndim != 1 or indices.ndim != 1 or sharding_of(right) is not None:
        return False
    depth, *batch = right.shape
    known = all(isinstance(size, int) for size in (depth, *batch, *values.shape))
    return known and _kernels.are_gradients_at_once(values, math.prod(batch), depth)


def derivative(
    spmm: Callable[..., Array],
    sddmm: Callable[..., Array],
    type_of_spmm: Callable[..., Any],
    type_of_sddmm: Callable[..., Any],
) -> Any:
    """Return the primitive of the derivative of W · right, of dvalues, dright, values, right and the pattern's arrays.

    Args:
        spmm: the product, of values, right, a pattern, and whether W is transposed.
        sddmm: the sampled product, of left, right and a pattern.
        type_of_spmm: the type of the product, of those of values, right and the pattern's arrays.
        type_of_sddmm: the type of the sampled product, of those of left, right and the pattern's arrays.

    Returns:
        ``None`` if JAX has no such interface.
    """

    def moved(dvalues: Array, dright: Array, values: Array, right: Array, *rest: Array) -> Array:
        pattern = DevicePattern(*rest)
        return spmm(dvalues, right, pattern) + spmm(values, dright, pattern)

    def gradients(g: Array, values: Array, right: Array, *rest: Array) -> tuple[Array, Array]:
        pattern = DevicePattern(*rest)
        return sddmm(g, right, pattern), spmm(values, g, pattern, True)

    def by_kernel(g: Array, values: Array, right: Array, *rest: Array) -> tuple[Array, Array]:
        if not _kernels.are_used(g, values, right, *rest):
            return gradients(g, values, right, *rest)
        depth, *batch = right.shape
        left, side = (_kernels.by_batch(one, 0) for one in (g, right))
        sampled, product = _kernels.gradients(values, left, side, DevicePattern(*rest))
        return sampled, jnp.moveaxis(product.reshape(*batch, depth), -1, 0)

    def transposed_moved(g: Any, dvalues: Any, dright: Any, values: Any, right: Any, *rest: Any) -> list[Any]:
        pattern, sides = DevicePattern(*rest), (dvalues, dright)
        of_values, of_right = map(ad.is_undefined_primal, sides)
        found: tuple[Any, ...] = (ad.Zero, ad.Zero)
        if not isinstance(g, ad.Zero):
            g = g.astype(right.dtype)
            if of_values and of_right:
                found = both.bind(g, values, right, *rest, precision=precision())
            else:
                found = (
                    sddmm(g, right, pattern) if of_values else None,
                    spmm(values, g, pattern, True) if of_right else None,
                )
        return [*map(_cotangent, found, sides), *(None,) * (2 + len(rest))]

    def transposed_gradients(moved: Any, g: Any, values: Any, right: Any, *rest: Any) -> list[Any]:
        """Of g the derivative of W · right along ``moved``; each gradient depends on one of the other two."""
        pattern, sides = DevicePattern(*rest), (g, values, right)
        place = next(place for place, side in enumerate(sides) if ad.is_undefined_primal(side))
        dvalues, dright = (
            None if isinstance(one, ad.Zero) else one.astype(values.aval.dtype if place == 1 else values.dtype)
            for one in moved
        )
        terms = []
        if dvalues is not None and place != 1:
            terms.append(spmm(dvalues, right, pattern) if place == 0 else spmm(dvalues, g, pattern, True))
        if dright is not None and place != 2:
            terms.append(spmm(values, dright, pattern) if place == 0 else sddmm(g, dright, pattern))
        found: list[Any] = [None] * 3
        found[place] = sum(terms[1:], terms[0]) if terms else ad.Zero
        return [*map(_cotangent, found, sides), *(None,) * len(rest)]

    def type_of_both(g: Any, values: Any, right: Any, *rest: Any) -> tuple[Any, Any]:
        return type_of_sddmm(g, right, *rest), type_of_spmm(values, g, *rest, transposed=True)

    def type_of_moved(dvalues: Any, dright: Any, *of: Any) -> Any:
        return type_of_spmm(*of, transposed=False)

    both = _primitive("masked_gradients", gradients, 3, type_of_both, transposed_gradients, by_kernel, is_pair=True)
    return both and _primitive("masked_derivative", moved, 4, type_of_moved, transposed_moved, moved)


def _cotangent(found: Any, side: Any) -> Any:
    """Return a cotangent as JAX takes it, of the dtype of what it is of; ``None`` of what is known."""
    if not ad.is_undefined_primal(side):
        return None
    return ad.Zero(side.aval) if found is ad.Zero else found.astype(side.aval.dtype)


def _primitive(
    name: str, form: Any, sides: int, type_of: Any, transpose: Any, by_kernel: Any, *, is_pair: bool = False
) -> Any:
    """Return a primitive that is ``form``, but on a CPU ``by_kernel``; ``None`` if JAX has no such interface.

    Its derivative and its maps are those of ``form``, whose first arguments, so many ``sides``, are numbers.
    """
    try:
        made = Primitive(name)
        made.multiple_results = is_pair
        made.def_abstract_eval(lambda *avals, precision: type_of(*avals))
        made.def_impl(jax.jit(made.bind, static_argnames=("precision",)))

        def jvp(primals: Any, tangents: Any) -> Any:
            moved = [ad.instantiate_zeros(tangent) for tangent in tangents[:sides]]
            return jax.jvp(lambda *of: form(*of, *primals[sides:]), tuple(primals[:sides]), tuple(moved))

        def batch(arguments: Any, dims: Any) -> Any:
            found = jax.vmap(form, in_axes=tuple(dims))(*arguments)
            return found, ((0, 0) if is_pair else 0)

        ad.primitive_jvps[made] = in_precision(jvp)
        ad.primitive_transposes[made] = in_precision(transpose)
        batching.primitive_batchers[made] = in_precision(batch)

        def lower(ctx: Any, *arguments: Any, precision: Any) -> Any:
            return mlir.lower_fun(_with(form, precision), multiple_results=is_pair)(ctx, *arguments)

        def lower_on_cpu(ctx: Any, *arguments: Any, precision: Any) -> Any:
            if placement(ctx) != "here":
                return lower(ctx, *arguments, precision=precision)

            def formed(*arrays: Array) -> Any:
                with automatic_axes():
                    return _with(by_kernel, precision)(*arrays)

            return mlir.lower_fun(formed, multiple_results=is_pair)(without_mesh(ctx), *arguments)

        mlir.register_lowering(made, lower)
        mlir.register_lowering(made, lower_on_cpu, platform="cpu")
    except (AttributeError, TypeError):
        return None
    return made


def _with(form: Any, precision: Any) -> Any:
    return lambda *arrays: in_precision(form)(*arrays, precision=precision)
