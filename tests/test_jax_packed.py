"""Packed weights of JAX: right wherever they are lowered, safe whatever their arrays hold, and never trained in silence."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from helpers import needs_packing
from maskedlinear import kernels, masks
from maskedlinear.jax import PackedWeights, pack, sparse_linear
from maskedlinear.pattern import SparsityPattern
from maskedlinear_jax import _kernels

IN, OUT = 45, 70


def problem(live=0.3):
    pattern = SparsityPattern.from_mask(masks.random((OUT, IN), sparsity=1 - live, seed=0))
    return np.random.default_rng(0).standard_normal(pattern.nnz, np.float32), pattern


def numbers(*shape):
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def apply(x, packed, bias=None):
    return sparse_linear(x, packed, bias=bias)


def is_called(*arguments):
    return "maskedlinear_permute" in jax.jit(apply).lower(*arguments).as_text()


def test_the_product_is_that_of_values_and_pattern():
    for live in (0.0004, 0.02, 0.3, 1.0):  # one connection, which does not pay; at 0.02 it does with AVX-512
        values, pattern = problem(live)
        packed, bias = pack(values, pattern), numbers(OUT)
        if live != 0.02:
            assert packed.is_packed == (kernels.is_available() and live > 0.02)
        for shape in ((IN,), (1, IN), (2, 2, IN), (5, IN), (0, IN)):
            x = numbers(*shape)
            expected = sparse_linear(x, values, pattern, bias)
            for run in (apply, jax.jit(apply)):
                np.testing.assert_allclose(run(x, packed, bias), expected, rtol=1e-5, atol=1e-5)
        few = packed.is_packed and _kernels.multiplies_packed(packed.kind, 4)
        assert is_called(numbers(4, IN), packed) == few
        assert not is_called(numbers(5, IN), packed)


def test_transforms():
    values, pattern = problem()
    packed, x = pack(values, pattern), numbers(3, IN)

    def loss(x, *weights):
        return (sparse_linear(x, *weights) ** 2).sum()

    for transform in (jax.grad, jax.hessian, jax.jacfwd):
        np.testing.assert_allclose(
            transform(loss)(x, packed), transform(loss)(x, values, pattern), rtol=1e-4, atol=1e-4
        )
    by_row = jax.vmap(apply, (0, None))(x, packed)
    np.testing.assert_allclose(by_row, apply(x, packed), rtol=1e-5, atol=1e-5)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), packed, pack(2 * values, pattern))
    mapped = jax.vmap(apply, (None, 0))(x, stacked)
    np.testing.assert_allclose(mapped[1], 2 * by_row, rtol=1e-4, atol=1e-4)
    exported = export.deserialize(export.export(jax.jit(apply))(x, packed).serialize())
    np.testing.assert_allclose(exported.call(x, packed), by_row, rtol=1e-5, atol=1e-5)


def test_values_have_no_gradient_in_silence():
    packed = pack(*problem())
    with pytest.raises(TypeError, match="have no gradient: differentiate in x alone"):
        jax.grad(lambda packed: apply(numbers(2, IN), packed).sum(), allow_int=True)(packed)
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(pack)(*problem())


@needs_packing
def test_whatever_the_arrays_hold_no_other_memory_is_touched():
    packed, x = pack(*problem()), numbers(3, IN)
    run, whole = jax.jit(apply), apply(x, packed)
    for place, number in itertools.product(range(4), (2**31 - 1, -1, -(2**31), 77)):
        wrong = [jnp.asarray(leaf) for leaf in packed.layout]
        wrong[place] = jnp.full_like(wrong[place], np.int64(number).astype(wrong[place].dtype))
        assert run(x, dataclasses.replace(packed, layout=tuple(wrong))).shape == (3, OUT)
    with pytest.raises(Exception, match="do not belong together"):
        jax.block_until_ready(run(x, dataclasses.replace(packed, layout=tuple(leaf[:1] for leaf in packed.layout))))
    np.testing.assert_array_equal(run(x, packed), whole)


@needs_packing
def test_rows_that_no_group_names_are_zero():
    packed, x = pack(*problem()), numbers(3, IN)
    none = jnp.full_like(packed.layout[0], -1)
    y = jax.jit(apply)(x, dataclasses.replace(packed, layout=(none, *packed.layout[1:])))
    np.testing.assert_array_equal(y, np.zeros((3, OUT)))


@pytest.mark.usefixtures("strict_jax")
def test_a_tree_that_was_cast_goes_by_rows():
    values, pattern = problem()
    packed = pack(values, pattern)
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float64):
        cast = jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.dtype == jnp.float32 else leaf, packed)  # noqa: B023
        x = numbers(2, IN).astype(dtype)
        assert not is_called(x, cast)
        found = jax.jit(apply)(x, cast)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, sparse_linear(x, cast.values, pattern))
    x = numbers(2, IN)
    for place, dtype in enumerate((jnp.int8, jnp.int64, jnp.int32, jnp.bfloat16)[: len(packed.layout)]):
        layout = list(packed.layout)
        layout[place] = layout[place].astype(dtype)
        other = dataclasses.replace(packed, layout=tuple(layout))
        assert not is_called(x, other)
        np.testing.assert_allclose(jax.jit(apply)(x, other), apply(x, packed), rtol=1e-5, atol=1e-5)


@needs_packing
def test_what_another_version_packed_is_an_error():
    packed = pack(*problem())
    with pytest.raises(
        ValueError, match=r"4 arrays in their layout; got 5, of another version.*pack values and pattern again"
    ):
        apply(numbers(1, IN), dataclasses.replace(packed, layout=(*packed.layout, packed.layout[0])))


def test_other_dtypes_go_by_rows():
    half = apply(numbers(1, IN).astype(jnp.bfloat16), pack(*problem()))
    assert half.dtype == jnp.float32


@needs_packing
def test_what_another_machine_packed_goes_by_rows():
    packed = pack(*problem())
    other = PackedWeights(packed.values, packed.pattern, packed.layout, "permute_avx512x")  # of another machine
    assert not is_called(numbers(1, IN), other)
    np.testing.assert_allclose(apply(numbers(1, IN), other), apply(numbers(1, IN), packed), rtol=1e-5, atol=1e-5)


def test_what_is_wrong_is_named():
    values, pattern = problem()
    with pytest.raises(TypeError, match=r"float32; got float64: convert"):
        pack(values.astype(np.float64), pattern)
    with pytest.raises(ValueError, match="one entry for each"):
        pack(values[1:], pattern)
    with pytest.raises(TypeError, match="SparsityPattern"):
        pack(values, np.ones((OUT, IN)))
    with pytest.raises(TypeError, match=r"has its pattern; got .* bias=bias"):
        sparse_linear(numbers(1, IN), pack(values, pattern), numbers(OUT))
    with pytest.raises(ValueError, match="x"):
        apply(numbers(1, IN + 1), pack(values, pattern))
