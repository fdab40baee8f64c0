"""Half types of the sparse form in JAX, in whatever mode: as of the same numbers in float32, rounded once."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, export

from maskedlinear import _gpu_rule, kernels, masks
from maskedlinear.jax import pack, sparse_linear, stack_patterns
from maskedlinear.pattern import SparsityPattern
from maskedlinear_jax import _gpu_products, _kernels
from maskedlinear_jax._products import DevicePattern

OUT, IN, BATCH = 30, 50, 4
MASK = masks.random((OUT, IN), sparsity=0.7, seed=0)
PATTERN = SparsityPattern.from_mask(MASK)
HALF = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])


def problem(dtype: Any, batch: tuple[int, ...] = (BATCH,)) -> list[Array]:
    """Return x, values, bias, and a cotangent."""
    rng = np.random.default_rng(0)
    shapes = ((*batch, IN), (PATTERN.nnz,), (OUT,), (*batch, OUT))
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def step(x: Any, values: Any, bias: Any, g: Any) -> tuple[Array, ...]:
    y, pull = jax.vjp(lambda x, values, bias: sparse_linear(x, values, PATTERN, bias), x, values, bias)
    return y, *pull(g)


def exact(x: Any, values: Any, bias: Any, g: Any) -> tuple[np.ndarray[Any, Any], ...]:
    """Return y and the gradients in float64, by a dense matrix."""
    x, values, bias, g = (np.asarray(side, np.float64) for side in (x, values, bias, g))
    matrix = np.zeros((OUT, IN))
    matrix[MASK] = values
    rows = [side.reshape(-1, side.shape[-1]) for side in (g, x)]
    return x @ matrix.T + bias, g @ matrix, (rows[0].T @ rows[1])[MASK], rows[0].sum(0)


def check(found: Any, wanted: Any, dtype: Any) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == dtype
        bound = np.abs(other) * float(jnp.finfo(dtype).eps) + 1e-4
        assert (np.abs(np.asarray(one, np.float64) - other) <= bound).all()


@HALF
@pytest.mark.parametrize("batch", [(), (1,), (BATCH,), (3, 70)])
@pytest.mark.parametrize("way", ["kernels", "XLA"])
def test_they_are_rounded_once(way: str, batch: tuple[int, ...], dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "XLA":
        monkeypatch.setattr(_kernels, "are_used", lambda *_: False)
    given = problem(dtype, batch)
    *found, dbias = jax.jit(step)(*given)
    *wanted, _ = exact(*given)
    check(found, wanted, dtype)
    assert dbias.dtype == dtype


@HALF
def test_bits_are_those_of_widening_first(dtype: Any) -> None:
    given = problem(dtype, (70,))
    wide = [side.astype(jnp.float32) for side in given]
    for one, other in zip(jax.jit(step)(*given), jax.jit(step)(*wide), strict=True):
        assert jnp.array_equal(one, other.astype(dtype))


@HALF
def test_derivatives_of_any_order_and_direction(dtype: Any) -> None:
    x, values, bias, _ = problem(dtype)
    sides = (x, values)
    product = lambda x, values: sparse_linear(x, values, PATTERN, bias)  # noqa: E731
    moved = jax.jvp(product, sides, sides)[1]  # bilinear: twice the product, without the bias
    plain = np.asarray(sparse_linear(x, values, PATTERN), np.float64)
    assert moved.dtype == dtype
    np.testing.assert_allclose(np.asarray(moved, np.float64), 2 * plain, rtol=2 ** (-6), atol=1e-2)

    def loss(x: Any, values: Any) -> Any:
        return (product(x, values).astype(jnp.float32) ** 2).sum() / 2

    def of(function: Any, *sides: Any) -> Any:
        return jax.jvp(jax.grad(function, (0, 1)), sides, sides)[1]

    matrix = lambda values: jnp.zeros((OUT, IN)).at[PATTERN.rows, PATTERN.indices].set(values)  # noqa: E731
    dense = lambda x, values: ((x @ matrix(values).T + bias.astype(jnp.float32)) ** 2).sum() / 2  # noqa: E731
    wide = [side.astype(jnp.float32) for side in sides]
    for one, other in zip(jax.jit(of, static_argnums=0)(loss, *sides), of(dense, *wide), strict=True):
        assert one.dtype == dtype
        scale = float(jnp.abs(other).max())
        np.testing.assert_allclose(np.asarray(one, np.float32), other, atol=2**-6 * scale)
    back = jax.grad(lambda values: (jax.grad(loss)(x, values).astype(jnp.float32) ** 2).sum())(values)  # reverse twice
    wanted = jax.grad(lambda values: (jax.grad(dense)(wide[0], values) ** 2).sum())(wide[1])
    assert back.dtype == dtype
    np.testing.assert_allclose(np.asarray(back, np.float32), wanted, atol=2**-5 * float(jnp.abs(wanted).max()))


@HALF
def test_mapped_over_rows_values_and_patterns(dtype: Any) -> None:
    x, values, bias, g = problem(dtype)
    y, dx = jax.vmap(lambda x, g: step(x, values, bias, g)[:2])(x, g)
    check((y, dx), exact(x, values, bias, g)[:2], dtype)
    patterns = [SparsityPattern.from_mask(masks.random((OUT, IN), sparsity=0.7, seed=seed)) for seed in range(3)]
    stacked = jnp.stack([values, values + 1, values * 2])
    got = jax.vmap(sparse_linear, (None, 0, 0))(x, stacked, stack_patterns(patterns))
    for one, numbers, pattern in zip(got, stacked, patterns, strict=True):
        assert jnp.array_equal(one, sparse_linear(x, numbers, pattern))


@pytest.mark.usefixtures("strict_jax")
def test_what_is_packed_has_no_gradient_where_it_is_widened() -> None:
    x, values = (side.astype(jnp.float32) for side in problem(jnp.bfloat16)[:2])
    with pytest.raises(TypeError, match="packed weights are for inference"):
        jax.grad(lambda packed: sparse_linear(x.astype(jnp.float64), packed).sum(), allow_int=True)(
            pack(values, PATTERN)
        )


@HALF
def test_exported(dtype: Any) -> None:
    given = problem(dtype)
    program = export.deserialize(export.export(jax.jit(step))(*given).serialize())
    *found, _ = program.call(*given)
    check(found, exact(*given)[:3], dtype)


@HALF
@pytest.mark.parametrize("way", ["gathered", "panels"])
@pytest.mark.parametrize("panels", [1, 3, 8])  # three in the program, eight in a loop
def test_off_the_cpu(way: str, panels: int, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gpu_rule, "choose", lambda *_: way)
    monkeypatch.setattr(_gpu_rule, "panels", lambda _: panels)
    x, values, _, g = problem(dtype)
    pattern = DevicePattern.of(PATTERN)

    def products(values: Any, right: Any, left: Any) -> tuple[Array, ...]:
        return (
            _gpu_products.spmm(values, right, pattern, transposed=False),
            _gpu_products.spmm(values, left, pattern, transposed=True),
            _gpu_products.sddmm(left, right, pattern),
        )

    y, dx, dvalues, _ = exact(x, values, np.zeros(OUT), g)
    # Turned outside of the program: of a transpose in it XLA makes a product that it has not on CPUs with bfloat16.
    found = jax.jit(products)(values, jnp.asarray(x.T), jnp.asarray(g.T))
    for one, other in zip(found, (y.T, dx.T, dvalues), strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.skipif(not kernels.is_available(), reason="the kernels are not for this machine")
@HALF
def test_nothing_is_kept_in_float32(dtype: Any) -> None:
    given = problem(dtype, (64,))
    text = jax.jit(lambda x, values: sparse_linear(x, values, PATTERN)).lower(*given[:2]).compile().as_text()
    name = jnp.dtype(dtype).name
    assert re.findall(r'target="(maskedlinear_\w+)"', text) == [f"maskedlinear_spmm_{name}_v3"]
    for shape in (f"{PATTERN.nnz}", f"64,{IN}", f"{IN},64"):
        assert f"f32[{shape}]" not in text
    text = jax.jit(step).lower(*given).compile().as_text()
    assert sorted(re.findall(r'target="maskedlinear_(\w+)_\w+_v3"', text)) == ["sddmm", "spmm", "spmm_ordered"]
    assert not re.findall(r" transpose\(", text)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float8_e3m4"])
def test_narrower_types_are_widened_first(name: str) -> None:
    """No product takes them as they are: nor do kernels in Triton, nor every GPU."""
    like = [jax.ShapeDtypeStruct(shape, getattr(jnp, name)) for shape in ((BATCH, IN), (PATTERN.nnz,))]
    made = jax.make_jaxpr(lambda x, values: sparse_linear(x, values, PATTERN))(*like)
    assert made.out_avals[0].dtype == getattr(jnp, name)
    products = str(made)[: str(made).index("masked_spmm")]
    assert f"f32[{PATTERN.nnz}] = convert_element_type" in products
