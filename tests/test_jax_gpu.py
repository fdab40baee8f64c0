"""The sparse products of JAX off the CPU: their panels run here, the rest is lowered for CUDA."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskedlinear import _gpu_rule, masks
from maskedlinear.jax import sparse_linear, stack_patterns, with_bits
from maskedlinear.pattern import SparsityPattern
from maskedlinear_jax import _gpu_products
from maskedlinear_jax._compat import enable_x64
from maskedlinear_jax._products import DevicePattern

MASK = masks.random((300, 40), sparsity=0.4)
MASK[20:150] = False
MASK[7] = True


@pytest.mark.parametrize("keeps_bits", [False, True])
@pytest.mark.parametrize("rows", [100, 37])  # three panels in the program, and nine in a loop
def test_panels_give_the_products(
    rows: int, keeps_bits: bool, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = MASK
    pattern = SparsityPattern.from_mask(mask)
    pattern = with_bits(pattern) if keeps_bits else pattern
    numbers = rng.standard_normal(pattern.nnz)
    left, right = (rng.standard_normal((size, 9)) for size in mask.shape)
    matrix = np.zeros(mask.shape)
    matrix[mask] = numbers
    with enable_x64(True):
        indices = DevicePattern.of(pattern)
        numbers, left, right = (jnp.asarray(array) for array in (numbers, left, right))
        for name in ("PANEL_BYTES", "LARGEST_PANEL"):
            monkeypatch.setattr(_gpu_rule, name, rows * 40 * 8)
        monkeypatch.setattr(_gpu_rule, "choose", lambda *_: "panels")
        monkeypatch.setattr(_gpu_rule, "panels_by_bits", lambda product: product._replace(place_bytes=0, by_xla=True))
        products = lambda indices: (  # noqa: E731
            _gpu_products.spmm(numbers, right, indices, transposed=False),
            _gpu_products.spmm(numbers, left, indices, transposed=True),
            _gpu_products.sddmm(left, right, indices),
        )
        wanted = (matrix @ right, matrix.T @ left, (left @ right.T)[mask])
        for got, product in zip(jax.jit(products)(indices), wanted, strict=True):
            np.testing.assert_allclose(got, product, atol=1e-12)


@pytest.mark.parametrize("rows", [300, 37])
def test_of_wrong_bits_panels_are_numbers_of_what_is_there(
    rows: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state may have brought any: where they lead beyond the values one of these is read, and nothing written."""
    monkeypatch.setattr(_gpu_rule, "choose", lambda *_: "panels")
    monkeypatch.setattr(_gpu_rule, "panels_by_bits", lambda product: product._replace(place_bytes=0, by_xla=True))
    for name in ("PANEL_BYTES", "LARGEST_PANEL"):
        monkeypatch.setattr(_gpu_rule, name, rows * 40 * 4)
    pattern = DevicePattern.of(with_bits(SparsityPattern.from_mask(MASK)))
    left, right, numbers = (jnp.asarray(rng.standard_normal(size)) for size in ((300, 9), (40, 9), (MASK.sum(),)))
    for first in (0, -1, MASK.sum() - 3, 1 << 30, -(1 << 31)):
        wrong = pattern._replace(bits=jnp.full((300, 2), -1, jnp.int32), firsts=jnp.full((300, 2), first, jnp.int32))
        of = np.int32(first) + np.tile(np.arange(32, dtype=np.int32), 2)
        products = {}
        for beyond in (0, len(numbers) - 1):  # whichever end XLA takes for what is none
            inside = (of >= 0) & (of < len(numbers))
            dense = np.broadcast_to(np.asarray(numbers)[np.where(inside, of, beyond)][:40], MASK.shape)
            products[beyond] = dense @ right, dense.T @ left
        for place, side in enumerate((right, left)):
            product = jax.jit(lambda p, t=bool(place), s=side: _gpu_products.spmm(numbers, s, p, transposed=t))
            near = [np.allclose(product(wrong), ends[place], rtol=1e-4, atol=1e-3) for ends in products.values()]
            assert any(near), first
        sampled = np.asarray(jax.jit(lambda p: _gpu_products.sddmm(left, right, p))(wrong))
        written = np.flatnonzero(sampled)
        assert np.isfinite(sampled).all()
        assert set(written) <= {first + place for place in range(32)}


def test_gathered_at_once_they_are_the_products(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gpu_rule, "choose", lambda *_: "gathered")
    mask = MASK
    pattern = DevicePattern.of(SparsityPattern.from_mask(mask))
    left, right = (jnp.asarray(rng.integers(-4, 5, (size, 9)), jnp.float32) for size in mask.shape)
    numbers = jnp.asarray(rng.integers(-4, 5, int(mask.sum())), jnp.float32)
    matrix = np.zeros(mask.shape, np.float32)
    matrix[mask] = numbers
    products = lambda: (  # noqa: E731
        _gpu_products.spmm(numbers, right, pattern, transposed=False),
        _gpu_products.spmm(numbers, left, pattern, transposed=True),
        _gpu_products.sddmm(left, right, pattern),
    )
    for got, wanted in zip(jax.jit(products)(), (matrix @ right, matrix.T @ left, (left @ right.T)[mask]), strict=True):
        np.testing.assert_array_equal(got, wanted)


def lowered(function: Any, *like: Any) -> str:
    return jax.jit(function).trace(*like).lower(lowering_platforms=("cuda",)).as_text()


def like(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize("precision", ["highest", "default"])
def test_on_a_gpu_nothing_is_in_parts(precision: str) -> None:
    """By gathers or, where TF32 multiplies, in two panels: parts would be 656 steps at this size."""
    rng = np.random.default_rng(0)
    edges = np.unique(rng.integers(0, 1 << 24, 170_000))
    pattern, _ = SparsityPattern.from_edges(edges >> 12, edges & 4095, (4096, 4096))
    square = lambda x, values: (sparse_linear(x, values, pattern) ** 2).sum()  # noqa: E731
    with jax.default_matmul_precision(precision):
        for function in (square, jax.grad(square, (0, 1)), jax.grad(lambda *a: jax.grad(square)(*a).sum(), 1)):
            program = lowered(function, like(4096, 4096), like(pattern.nnz))
            assert "stablehlo.while" not in program
            assert ("stablehlo.dot_general" in program) == (precision == "default")


def test_a_stack_of_patterns_goes_panel_by_panel_each() -> None:
    patterns = stack_patterns(
        [SparsityPattern.from_mask(masks.random((512, 512), sparsity=0.5, seed=s)) for s in (1, 2)]
    )
    nnz = patterns.indices.shape[-1]
    stacked = jax.vmap(sparse_linear, (None, 0, 0))
    program = lowered(lambda x, values: stacked(x, values, patterns), like(1024, 512), like(2, nnz))
    assert "stablehlo.dot_general" in program
    assert "1024x1024xf32" not in program, "the corners of one matrix for both"


def test_a_panel_is_all_that_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PANEL_BYTES", "LARGEST_PANEL"):
        monkeypatch.setattr(_gpu_rule, name, 1 << 18)
    monkeypatch.setattr(_gpu_rule, "choose", lambda *_: "panels")
    pattern = SparsityPattern.from_mask(masks.random((2048, 2048), sparsity=0.98))
    indices = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), DevicePattern.of(pattern))
    products = {
        "spmm": (lambda v, x, p: _gpu_products.spmm(v, x, p, transposed=False), like(pattern.nnz), like(2048, 4)),
        "sddmm": (_gpu_products.sddmm, like(2048, 4), like(2048, 4)),
    }
    for name, (function, *arrays) in products.items():
        found = jax.jit(function).lower(*arrays, indices).compile().memory_analysis().temp_size_in_bytes
        assert found < 2 * (1 << 18) + 16 * pattern.nnz, (name, found)  # the whole is 16 MiB


@pytest.mark.parametrize("of", ["programs", "rule"])
@pytest.mark.parametrize(
    ("precision", "wanted", "by_tensor_cores"),
    [(None, "DEFAULT", True), ("highest", "HIGHEST", False), ("float32", "HIGHEST", False), ("high", "HIGH", True)],
)
def test_products_have_the_precision_that_was_set_when_they_were_traced(
    of: str, precision: Any, wanted: str, by_tensor_cores: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As dense ones: what is set around the lowering, or where a gradient is asked for, is not theirs."""
    monkeypatch.setattr(_gpu_rule, "choose", lambda *_: "panels")
    pattern = SparsityPattern.from_mask(masks.random((16, 32), sparsity=0.5))
    given = (jnp.ones((4, 32)), jnp.ones(pattern.nnz))

    def step(x: Any, values: Any) -> Any:
        with jax.default_matmul_precision(precision):
            y, pull = jax.vjp(lambda x, values: sparse_linear(x, values, pattern), x, values)
        return pull(y)

    if of == "programs":
        program = lowered(step, *given)
        assert program.count("stablehlo.dot_general") == 3
        assert program.count(f"precision = [{wanted}, {wanted}]") == 3
        return
    seen = []
    multiply = _gpu_products._multiply
    monkeypatch.setattr(_gpu_products, "_multiply", lambda dtype: seen.append(multiply(dtype)) or seen[-1])
    with jax.default_matmul_precision("default" if precision == "highest" else "highest"):
        lowered(lambda *sides: step(*sides), *given)
    assert set(seen) == {"tf32" if by_tensor_cores else "float32"}


@pytest.mark.parametrize("name", ["F32_F32_F32", "TF32_TF32_F32_X3", "BF16_BF16_F32_X9"])
def test_algorithms_of_more_bits_are_not_multiplied_by_tf32(name: str) -> None:
    with jax.default_matmul_precision(name):
        assert _gpu_products._multiply(jnp.float32) == "float32"
    with jax.default_matmul_precision("TF32_TF32_F32"):
        assert _gpu_products._multiply(jnp.float32) == "tf32"


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_panel_of_a_large_batch_stays_a_panel(dtype: Any) -> None:
    """Where each adds to a product that is larger than W, too: so its places are numbers of 32 bits."""
    for out, in_, batch in ((65536, 32768, 32768), (131072, 16384, 65536), (8192, 8192, 16384)):
        shapes = ((out * in_ // 10,), (out, batch))
        sizes = (out + 1, shapes[0][0], shapes[0][0], in_ + 1, shapes[0][0], shapes[0][0])
        pattern = DevicePattern(*(jax.ShapeDtypeStruct((size,), jnp.int32) for size in sizes))
        product = _gpu_products._product(in_, out, pattern, batch, dtype, transposed=True)
        panels = _gpu_rule.panels(product)
        assert -(-out // panels) * in_ * jnp.dtype(dtype).itemsize <= _gpu_rule.LARGEST_PANEL
        given = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
        made = jax.eval_shape(lambda v, g, p: _gpu_products.spmm_in_panels(v, g, p, transposed=True), *given, pattern)
        assert made.shape == (in_, batch)


def test_where_triton_is_products_are_by_its_kernels_or_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of small layers, too: what is gathered adds up in no fixed order."""
    for is_used in (True, False):
        monkeypatch.setattr(_gpu_products._triton_products, "are_used", lambda *_, is_used=is_used: is_used)
        found = set()
        for shape, live, batch in itertools.product(((5, 7), (129, 257), (784, 256)), (0.01, 0.3), (1, 4, 33, 300)):
            pattern = DevicePattern.of(SparsityPattern.from_mask(masks.random(shape, sparsity=1 - live, seed=0)))
            for of in ({}, {"sampled": True}, {"transposed": True}):
                sizes = shape[::-1] if "transposed" in of else shape
                found.add(_gpu_products._way(*sizes, pattern, batch, jnp.float32, **of))
        assert ("gathered" not in found) if is_used else (found <= {"gathered", "panels"})
