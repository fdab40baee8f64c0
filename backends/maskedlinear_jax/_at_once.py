"""Both gradients of a product at once, on CPUs, for batches of which that takes less time than two products.

JAX transposes the derivative of a product for one side after the other. Here it is one primitive, linear in the tangents of
both sides together, whose transpose is asked for both gradients, which are a primitive too. Where no kernel of ours forms
these, and for whatever else is asked of the two, they are what they are made of: products.
"""

# mypy: disable-error-code="no-untyped-call,no-any-return"

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from maskedlinear_jax import _kernels
from maskedlinear_jax._compat import (
    Primitive,
    ad,
    automatic_axes,
    batching,
    dce_rules,
    mlir,
    placement,
    sharding_of,
    type_of,
    without_mesh,
)
from maskedlinear_jax._gpu_products import in_precision, precision
from maskedlinear_jax._products import DevicePattern

__all__ = ["Alone", "are_at_once", "as_program", "derivative"]


def are_at_once(values: Array, right: Array, indices: Array) -> bool:
    """Whether this machine forms both gradients of W · right at once: of one pattern, on no explicit mesh, on a CPU."""
    if jax.default_backend() != "cpu" or values.ndim != 1 or indices.ndim != 1 or sharding_of(right) is not None:
        return False
    depth, *batch = right.shape
    known = all(isinstance(size, int) for size in (depth, *batch, *values.shape))
    return known and _kernels.are_gradients_at_once(values, math.prod(batch), depth)


class Alone(NamedTuple):
    """A primitive by itself, and its options."""

    primitive: Any
    options: dict[str, Any]


def derivative(
    spmm: Callable[..., Array],
    sddmm: Callable[..., Array],
    type_of_spmm: Callable[..., Any],
    type_of_sddmm: Callable[..., Any],
    alone: tuple[Alone, Alone],
) -> Any:
    """Return the primitive of the derivative of W · right, of dvalues, dright, values, right and the pattern's arrays.

    Args:
        spmm: the product, of values, right, a pattern, and whether W is transposed.
        sddmm: the sampled product, of left, right and a pattern.
        type_of_spmm: the type of the product, of those of values, right and the pattern's arrays.
        type_of_sddmm: the type of the sampled product, of those of left, right and the pattern's arrays.
        alone: what forms the gradient of values, and of right, where the other one is not used.

    Returns:
        ``None`` if JAX has no such interface.
    """

    def moved(dvalues: Array, dright: Array, values: Array, right: Array, *rest: Array) -> Array:
        pattern = DevicePattern(*rest)
        return spmm(dvalues, right, pattern) + spmm(values, dright, pattern)

    def moved_jvp(primals: Any, tangents: Any) -> Any:
        pattern = DevicePattern(*primals[4:])
        found = (_moved(lambda *of: spmm(*of, pattern), primals, tangents, *pair) for pair in ((0, 3), (2, 1)))
        terms = [term for term in found if term is not None]
        return moved(*primals), sum(terms[1:], terms[0])

    def moved_transpose(g: Any, *given: Any) -> list[Any]:
        _, _, values, right, *rest = given
        if _is_zero(g) or [*map(ad.is_undefined_primal, given[:4])] != [True, True, False, False]:
            return _transposed(moved, g, given, 4)
        found = both.bind(g.astype(right.dtype), values, right, *rest, precision=precision())
        of_sides = [one.astype(side.aval.dtype) for one, side in zip(found, given[:2], strict=True)]
        return [*of_sides, *(None,) * (2 + len(rest))]

    def gradients(g: Array, values: Array, right: Array, *rest: Array) -> tuple[Array, Array]:
        pattern = DevicePattern(*rest)
        return sddmm(g, right, pattern), spmm(values, g, pattern, True)

    def gradients_jvp(primals: Any, tangents: Any) -> Any:
        pattern, found = DevicePattern(*primals[3:]), both.bind(*primals, precision=precision())
        of_values = _moved(lambda *of: sddmm(*of, pattern), primals, tangents, 0, 2)
        of_right = _moved(lambda *of: spmm(*of, pattern, True), primals, tangents, 1, 0)
        return found, [
            ad.Zero(type_of(one)) if term is None else term
            for one, term in zip(found, (of_values, of_right), strict=True)
        ]

    def gradients_dce(used: list[bool], equation: Any) -> tuple[list[bool], Any]:
        g, values, right, *rest = equation.invars
        if all(used) or not any(used):
            return [any(used)] * len(equation.invars), equation if any(used) else None
        place = used.index(True)
        sides = [values, g] if place else [g, right]
        form, options = alone[place]
        one = equation.replace(
            invars=[*sides, *rest],
            outvars=[equation.outvars[place]],
            primitive=form,
            params=options | {"precision": equation.params["precision"]},
        )
        return [True, place == 1, place == 0, *(True,) * len(rest)], one

    def by_kernel(g: Array, values: Array, right: Array, *rest: Array) -> tuple[Array, Array]:
        if not _kernels.are_used(g, values, right, *rest):
            return gradients(g, values, right, *rest)
        depth, *batch = right.shape
        left, side = (_kernels.by_batch(one, 0) for one in (g, right))
        sampled, product = _kernels.gradients(values, left, side, DevicePattern(*rest))
        return sampled, jnp.moveaxis(product.reshape(*batch, depth), -1, 0)

    def type_of_both(g: Any, values: Any, right: Any, *rest: Any) -> tuple[Any, Any]:
        return type_of_sddmm(g, right, *rest), type_of_spmm(values, g, *rest, transposed=True)

    def type_of_moved(dvalues: Any, dright: Any, *of: Any) -> Any:
        return type_of_spmm(*of, transposed=False)

    def gradients_transpose(cotangents: Any, *given: Any) -> list[Any]:
        return _transposed(gradients, tuple(cotangents), given, 3)

    both = _primitive(
        "masked_gradients", gradients, type_of_both, gradients_jvp, gradients_transpose, by_kernel, is_pair=True
    )
    if both is not None and dce_rules is not None:
        dce_rules[both] = gradients_dce
    return both and _primitive("masked_derivative", moved, type_of_moved, moved_jvp, moved_transpose, moved)


def _moved(product: Callable[..., Array], sides: Any, tangents: Any, one: int, other: int) -> Any:
    """Return the derivative of a product of two of the sides along those tangents that are not zero; ``None`` if all are."""
    terms = []
    if not _is_zero(tangents[one]):
        terms.append(product(tangents[one], sides[other]))
    if not _is_zero(tangents[other]):
        terms.append(product(sides[one], tangents[other]))
    return sum(terms[1:], terms[0]) if terms else None


def _is_zero(of: Any) -> bool:
    """Whether a tangent or a cotangent is zero, without being formed."""
    return isinstance(of, ad.Zero)


def _transposed(form: Callable[..., Any], cotangents: Any, given: Any, sides: int) -> list[Any]:
    """Return cotangents of those of the first ``sides`` that are unknown, in which ``form`` is linear, as JAX finds them."""
    unknown = [place for place, side in enumerate(given[:sides]) if ad.is_undefined_primal(side)]

    def of(*found: Array) -> Any:
        filled = list(given)
        for place, one in zip(unknown, found, strict=True):
            filled[place] = one
        return form(*filled)

    types = [jax.ShapeDtypeStruct(given[place].aval.shape, given[place].aval.dtype) for place in unknown]
    cotangents = jax.tree.map(ad.instantiate_zeros, cotangents, is_leaf=_is_zero)
    made: list[Any] = [None] * len(given)
    for place, one in zip(unknown, jax.linear_transpose(of, *types)(cotangents), strict=True):
        made[place] = one
    return made


def as_program(primitive: Any, static: tuple[str, ...]) -> Callable[..., Any]:
    """Return what runs a primitive outside of transforms: compiled on its own, under ``jax.disable_jit`` too.

    What JAX does there for want of a program is to ask the primitive, without end.
    """
    program = jax.jit(primitive.bind, static_argnames=static)

    def run(*arrays: Any, **options: Any) -> Any:
        with jax.disable_jit(False):
            return program(*arrays, **options)

    return run


def _primitive(
    name: str, form: Any, type_of: Any, jvp: Any, transpose: Any, by_kernel: Any, *, is_pair: bool = False
) -> Any:
    """Return a primitive that is ``form``, but on a CPU ``by_kernel``; ``None`` if JAX has no such interface."""
    try:
        made = Primitive(name)
        made.multiple_results = is_pair
        made.def_abstract_eval(lambda *avals, precision: type_of(*avals))
        made.def_impl(as_program(made, ("precision",)))

        def batch(arguments: Any, dims: Any) -> Any:
            return jax.vmap(form, in_axes=tuple(dims))(*arguments), ((0, 0) if is_pair else 0)

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
