"""Both gradients of a product at once in JAX, on CPUs: the numbers of two products, by every transform, where it pays."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, export

from forked import JAX
from helpers import python
from maskedlinear import kernels, masks
from maskedlinear.jax import sparse_linear, stack_patterns
from maskedlinear.pattern import SparsityPattern
from maskedlinear_jax import _kernels
from maskedlinear_jax._partition import wide

pytestmark = pytest.mark.skipif(not kernels.is_available(), reason="no kernels on this machine")
OUT, IN = 300, 200
MASK = masks.random((OUT, IN), sparsity=0.5, seed=0)
PATTERN = SparsityPattern.from_mask(MASK)
Function = Callable[[Array, Array], Array]


def product(x: Array, values: Array) -> Array:
    return sparse_linear(x, values, PATTERN)


def dense(x: Array, values: Array) -> Array:
    weight = jnp.zeros(MASK.shape, values.dtype).at[PATTERN.rows, PATTERN.indices].set(values)
    return x @ weight.T


def drawn(*shapes: tuple[int, ...], dtype: Any = jnp.float32) -> list[Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def pull(of: Function) -> Callable[..., Any]:
    return lambda x, values, g: jax.vjp(of, x, values)[1](g)


def said(function: Callable[..., Any], *arguments: Any) -> str:
    """Return the program that JAX would compile, before it is compiled."""
    return jax.jit(function).lower(*arguments).as_text()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("batch", [(4,), (2,), (3,), (8,), (16,), (2, 2), (5,), (1,), (), (300,)], ids=str)
def test_gradients_are_those_of_two_products(
    batch: tuple[int, ...], dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, values, g = drawn((*batch, IN), (PATTERN.nnz,), (*batch, OUT), dtype=dtype)
    found = jax.jit(pull(product))(x, values, g)
    is_once = kernels.are_gradients_at_once(IN, int(np.prod(batch)), PATTERN.nnz, jnp.dtype(dtype).name)
    assert ("@maskedlinear_gradients" in said(pull(product), x, values, g)) is is_once
    assert is_once or batch not in {(2,), (3,), (4,), (2, 2)}
    numbers = [one.astype(jnp.float32) for one in (x, values, g)]
    unit = jnp.finfo(dtype).eps
    for one, other, of in zip(found, pull(dense)(*numbers), (x, values), strict=True):
        assert (one.shape, one.dtype) == (of.shape, of.dtype)
        near = 1e-6 * float(abs(other).max())
        np.testing.assert_allclose(one.astype(jnp.float32), other, rtol=2 * unit, atol=near)
    # One without the other is a product by itself, of the same bits where it is the sampled one.
    alone = jax.jit(lambda values: jax.vjp(lambda values: product(x, values), values)[1](g)[0])
    assert "@maskedlinear_gradients" not in said(alone, values)
    np.testing.assert_array_equal(alone(values), found[1])
    monkeypatch.setattr(_kernels, "are_gradients_at_once", lambda *_: False)
    by_two = jax.jit(pull(lambda x, values: sparse_linear(x, values, PATTERN)))(x, values, g)
    for one, other in zip(found, by_two, strict=True):
        near = 1e-6 * float(abs(other).max())
        np.testing.assert_allclose(one.astype(jnp.float32), other.astype(jnp.float32), rtol=2 * unit, atol=near)


@pytest.mark.parametrize("batch", [2, 3, 4, 8])
def test_float64_has_sums_of_its_own(batch: int) -> None:
    with jax.enable_x64(True):
        x, values, g = drawn((batch, IN), (PATTERN.nnz,), (batch, OUT), dtype=jnp.float64)
        lanes = {64: 8, 32: 4, 16: 2}[kernels.info().register_bytes]
        assert ("@maskedlinear_gradients" in said(pull(product), x, values, g)) is (batch != 3 and batch <= lanes)
        for form in (jax.jit(pull(product)), pull(product)):
            for one, other in zip(form(x, values, g), pull(dense)(x, values, g), strict=True):
                assert one.dtype == jnp.float64
                np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)
        narrow = jax.jit(lambda *of: pull(product)(*of)[1].astype(jnp.float32))
        for _ in range(20):  # of which each would write beyond what it was given
            found = narrow(x, values, g)
        np.testing.assert_allclose(found, pull(dense)(x, values, g)[1], rtol=1e-5, atol=1e-5)


def loss(of: Function) -> Callable[[Array, Array], Array]:
    return lambda x, values: jnp.sum(jnp.sin(of(x, values)))


X, VALUES, DX, DVALUES, G = drawn((4, IN), (PATTERN.nnz,), (4, IN), (PATTERN.nnz,), (4, OUT))
MOVED = (DX, DVALUES)
TRANSFORMS: dict[str, Callable[[Function], Any]] = {
    "forward": lambda of: jax.jvp(of, (X, VALUES), MOVED),
    "forward of values alone": lambda of: jax.jvp(lambda values: of(X, values), (VALUES,), (DVALUES,)),
    "linearized": lambda of: jax.linearize(of, X, VALUES)[1](*MOVED),
    "forward over reverse": lambda of: jax.jvp(jax.grad(loss(of), (0, 1)), (X, VALUES), MOVED),
    "forward over reverse, jitted": lambda of: jax.jit(
        lambda *sides: jax.jvp(jax.grad(loss(of), (0, 1)), sides, MOVED)
    )(X, VALUES),
    "reverse over reverse": lambda of: jax.grad(
        lambda *sides: sum(jnp.sum(jnp.cos(one)) for one in jax.grad(loss(of), (0, 1))(*sides)), (0, 1)
    )(X, VALUES),
    "reverse over forward": lambda of: jax.grad(lambda *sides: jnp.sum(jnp.sin(jax.jvp(of, sides, MOVED)[1])), (0, 1))(
        X, VALUES
    ),
    "forward over forward": lambda of: jax.jvp(lambda *sides: jax.jvp(of, sides, MOVED)[1], (X, VALUES), MOVED),
    "transposed in g": lambda of: jax.linear_transpose(jax.vjp(of, X, VALUES)[1], G)(MOVED),
    "mapped over x": lambda of: jax.vmap(lambda x: jax.grad(loss(of), (0, 1))(x, VALUES))(jnp.stack([X, DX])),
    "mapped over values": lambda of: jax.vmap(lambda values: jax.grad(loss(of), (0, 1))(X, values))(
        jnp.stack([VALUES, DVALUES])
    ),
    "mapped over g": lambda of: jax.vmap(jax.vjp(of, X, VALUES)[1])(jnp.stack([G, 2 * G])),
    "mapped over tangents": lambda of: jax.vmap(lambda *moved: jax.jvp(of, (X, VALUES), moved)[1])(
        jnp.stack([DX, X]), jnp.stack([DVALUES, VALUES])
    ),
    "checkpointed": lambda of: jax.grad(loss(jax.checkpoint(of)), (0, 1))(X, VALUES),
    "in a scan": lambda of: jax.grad(
        lambda *sides: jax.lax.scan(lambda total, _: (total + loss(of)(*sides), None), 0.0, None, length=3)[0], (0, 1)
    )(X, VALUES),
}


@pytest.mark.parametrize("how", TRANSFORMS)
def test_every_transform_gives_what_it_gives_of_a_dense_product(how: str) -> None:
    for one, other in zip(*(jax.tree.leaves(TRANSFORMS[how](of)) for of in (product, dense)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * float(abs(other).max()))


def test_gradients_are_linear_in_each_of_their_sides() -> None:
    """Transposed in values, of which x's gradient is a function, and in x, of which the values' is."""
    of_values = jax.linear_transpose(lambda values: jax.vjp(product, X, values)[1](G), VALUES)(MOVED)[0]
    np.testing.assert_allclose(of_values, (G.T @ DX)[PATTERN.rows, PATTERN.indices], rtol=1e-4, atol=1e-4)
    of_x = jax.linear_transpose(lambda x: jax.vjp(product, x, VALUES)[1](G), X)(MOVED)[0]
    np.testing.assert_allclose(of_x, G @ dense(jnp.eye(IN), DVALUES).T, rtol=1e-4, atol=1e-4)


def test_derivatives_are_linear_in_whatever_jax_transposes_them_in() -> None:
    """Of a derivative, pairs of a tangent and a side, or both sides, as well as both tangents."""
    none = {"x": jnp.zeros_like(X), "values": jnp.zeros_like(VALUES)}
    cases: list[tuple[Callable[[Function], Callable[..., Any]], tuple[Array, ...], Any]] = [
        (lambda of: lambda v: jax.jvp(of, (X, v), (DX, none["values"]))[1], (VALUES,), G),
        (lambda of: lambda dv, v: jax.jvp(of, (X, v), (DX, dv))[1], (VALUES, VALUES), G),
        (lambda of: lambda x: jax.jvp(of, (x, VALUES), (none["x"], DVALUES))[1], (X,), G),
        (lambda of: lambda dx, x: jax.jvp(of, (x, VALUES), (dx, DVALUES))[1], (X, X), G),
        (lambda of: lambda v, x: jax.jvp(of, (x, v), MOVED)[1], (VALUES, X), G),
        (lambda of: lambda dv, dx: jax.jvp(of, (X, VALUES), (dx, dv))[1], (VALUES, X), G),
        (lambda of: lambda v, x: jax.vjp(of, x, v)[1](G), (VALUES, X), MOVED),
    ]
    for form, sides, cotangent in cases:
        found, wanted = (jax.linear_transpose(form(of), *sides)(cotangent) for of in (product, dense))
        for one, other in zip(found, wanted, strict=True):
            assert float(abs(other).max()) > 0
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * float(abs(other).max()))


def test_what_does_not_move_is_not_multiplied() -> None:
    """One side moves alone: two products, of which none has zeros, which infinity would make NaN."""
    infinite = VALUES.at[0].set(jnp.inf)
    second = jax.jvp(lambda x: jax.vjp(product, x, infinite)[1](G), (X,), (DX,))[1]
    assert not jnp.isnan(second[0]).any()
    cases: tuple[tuple[Callable[..., Any], Array, Array, list[str]], ...] = (
        (lambda x: jax.vjp(product, x, VALUES)[1](G), X, DX, ["sddmm"]),
        (lambda values: jax.vjp(product, X, values)[1](G), VALUES, DVALUES, ["spmm_ordered"]),
        (lambda g: jax.vjp(product, X, VALUES)[1](g), G, 2 * G, ["sddmm", "spmm_ordered"]),
    )
    for form, at, along, names in cases:
        program = jax.jit(lambda at, along, form=form: jax.jvp(form, (at,), (along,))[1]).lower(at, along).compile()  # type: ignore[misc]
        assert sorted(calls(program.as_text())) == names


def calls(program: str) -> list[str]:
    """Return the kernels of ours that a compiled program calls."""
    return re.findall(r'custom_call_target="maskedlinear_([a-z_]+)_float32', program)


def test_of_two_gradients_one_that_nothing_uses_is_not_formed() -> None:
    for place, name in enumerate(("spmm_ordered", "sddmm")):
        step = jax.jit(lambda *of, place=place: pull(product)(*of)[place])  # type: ignore[misc]
        assert calls(step.lower(X, VALUES, G).compile().as_text()) == [name]
        np.testing.assert_allclose(step(X, VALUES, G), pull(dense)(X, VALUES, G)[place], rtol=1e-4, atol=1e-4)


def test_patterns_of_a_stack_have_products_of_their_own() -> None:
    patterns = [SparsityPattern.from_mask(masks.random((OUT, IN), sparsity=0.5, seed=seed)) for seed in (1, 2)]
    values = jnp.stack([VALUES, DVALUES])
    found = jax.vmap(
        lambda values, pattern: jax.grad(lambda *of: jnp.sum(sparse_linear(*of, pattern) ** 2), (0, 1))(X, values)
    )(values, stack_patterns(patterns))
    for place, pattern in enumerate(patterns):
        weight = jnp.zeros(MASK.shape).at[pattern.rows, pattern.indices].set(values[place])
        g = 2 * X @ weight.T
        np.testing.assert_allclose(found[0][place], g @ weight, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(found[1][place], (g.T @ X)[pattern.rows, pattern.indices], rtol=1e-3, atol=1e-3)


SEVERAL = f"""
import contextlib, sys
sys.path.insert(0, {os.fspath(Path(__file__).parent)!r})
import jax
jax.config.update("jax_num_cpu_devices", 2)
import jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from test_jax_at_once import VALUES, X, dense, loss, product

for kind in ("automatic", "a mesh in use", "explicit", "shard_map"):
    axis = AxisType.Explicit if kind == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((2,), ("data",), axis_types=(axis,))
    x, values = (jax.device_put(of, NamedSharding(mesh, to)) for of, to in ((X, P("data", None)), (VALUES, P())))
    gradients = jax.grad(loss(product), (0, 1))
    if kind == "shard_map":
        specs = (P("data", None), P())
        gradients = jax.shard_map(gradients, mesh=mesh, in_specs=specs, out_specs=specs)
    with jax.set_mesh(mesh) if kind in ("a mesh in use", "explicit") else contextlib.nullcontext():
        found, program = jax.jit(gradients)(x, values), jax.jit(gradients).lower(x, values).compile().as_text()
    # Of x as it lies on each device: no device has all of it.
    assert "all-gather" not in program and program.count("all-reduce(") == 1, kind
    assert "maskedlinear_sddmm" in program or "maskedlinear_gradients" in program
    wanted = jax.grad(loss(dense), (0, 1))(*(jax.device_put(np.asarray(of), jax.devices()[0]) for of in (X, VALUES)))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-3, atol=1e-3)
"""


def test_on_several_devices_each_has_its_part_of_the_batch() -> None:
    done = python(SEVERAL, imported=JAX)
    assert not done.returncode, done.stderr


def test_a_program_that_is_kept_or_of_another_platform_calls_no_kernel() -> None:
    step = jax.jit(pull(product))
    kept = export.export(step)(X, VALUES, G)
    for one, other in zip(kept.call(X, VALUES, G), step(X, VALUES, G), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    others = step.trace(X, VALUES, G).lower(lowering_platforms=("cuda",)).as_text()
    assert all("@maskedlinear_" not in text for text in (kept.mlir_module(), others))


def test_wrong_indices_reach_no_memory_of_others_and_wrong_arrays_are_refused() -> None:
    flat = PATTERN.indices.size
    for wrong in (-1, 2**31 - 1):
        indices = jnp.asarray(PATTERN.indices).at[5].set(wrong)
        leaves, tree = jax.tree.flatten(PATTERN)
        of = jax.tree.unflatten(tree, [*leaves[:2], indices, *leaves[3:]])
        found = jax.jit(
            lambda x, values, g, of: jax.vjp(lambda x, values: sparse_linear(x, values, of), x, values)[1](g)
        )(X, VALUES, G, of)
        assert [one.shape for one in found] == [X.shape, VALUES.shape]
    right = [(flat,), (4, IN), (OUT * 4,), (IN * 4,), (8 * IN * 4,)]
    given = [VALUES, G, X, jnp.asarray(PATTERN.indptr), jnp.asarray(PATTERN.indices)]
    changes: list[tuple[int, Any]] = [
        (0, (flat - 1,)), (1, (4, IN - 1)), (1, (3, IN)), (2, (OUT * 4 - 1,)), (3, (IN * 4 - 1,)), (4, (8 * IN * 4 - 1,)),
    ]  # fmt: skip

    def call(shapes: list[Any], arrays: list[Array]) -> Any:
        results = [jax.ShapeDtypeStruct(shape, wide(jnp.float32)) for shape in shapes]
        return jax.block_until_ready(jax.ffi.ffi_call("maskedlinear_gradients_float32_v3", results)(*arrays))

    call(right, given)
    for place, shape in changes:
        with pytest.raises(jax.errors.JaxRuntimeError, match="do not belong together"):
            call([shape if one == place else other for one, other in enumerate(right)], given)
    for place in range(5):
        with pytest.raises(jax.errors.JaxRuntimeError, match="do not belong together"):
            call(right, [one[1:] if one is given[place] else one for one in given])
    for place, one in enumerate(given):  # of as many numbers, of another size each
        with pytest.raises(jax.errors.JaxRuntimeError, match="do not belong together"):
            call(right, [one.astype(jnp.int16) if place == other else array for other, array in enumerate(given)])
    for place in range(5):
        results = [
            jax.ShapeDtypeStruct(shape, jnp.int16 if place == one else jnp.float32) for one, shape in enumerate(right)
        ]
        with pytest.raises(jax.errors.JaxRuntimeError, match="do not belong together"):
            jax.block_until_ready(jax.ffi.ffi_call("maskedlinear_gradients_float32_v3", results)(*given))
    for batch in (1, 5, 32):  # of no width of a register
        shapes = [(flat,), (batch, IN), (OUT * 32,), (IN * 32,), (8 * IN * 32,)]
        sides = drawn((batch, OUT), (batch, IN))
        with pytest.raises(jax.errors.JaxRuntimeError, match="do not belong together"):
            call(shapes, [VALUES, *sides, *given[3:]])
    with pytest.raises(jax.errors.JaxRuntimeError, match="another version"):
        call(right[:4], given)


def test_of_few_connections_a_column_there_are_two_products() -> None:
    few = SparsityPattern.from_mask(masks.random((OUT, IN), sparsity=0.9, seed=0))
    values = VALUES[: few.nnz]
    for at_once, pattern, numbers in ((True, PATTERN, VALUES), (False, few, values)):
        text = said(pull(lambda x, values, pattern=pattern: sparse_linear(x, values, pattern)), X, numbers, G)  # type: ignore[misc]
        assert ("@maskedlinear_gradients" in text) is at_once
        assert ("@maskedlinear_sddmm" in text) is not at_once


def test_bits_do_not_depend_on_the_batchs_axes() -> None:
    step = jax.jit(pull(product))
    flat = step(X, VALUES, G)
    for shape in itertools.chain([(2, 2), (4, 1)], [(1, 4)]):
        other = step(X.reshape(*shape, IN), VALUES, G.reshape(*shape, OUT))
        np.testing.assert_array_equal(other[0].reshape(4, IN), flat[0])
        np.testing.assert_array_equal(other[1], flat[1])
