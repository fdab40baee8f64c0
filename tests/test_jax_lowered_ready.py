"""What a lowered program runs is compiled by then, so that no thread of XLA's waits for Python; and programs without jit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import python
from maskedlinear import kernels, masks
from maskedlinear.jax import pack, sparse_linear
from maskedlinear.pattern import SparsityPattern

# A script that ends while its first step is under way: a thread that asked Python to compile would wait for ever.
ENDS = """
import os, signal
os.environ["NPROC"] = "2"
signal.alarm(100)
import jax, jax.numpy as jnp
from maskedlinear import masks
from maskedlinear.jax import sparse_linear
from maskedlinear.pattern import SparsityPattern
size, live, batch, of = {case}
pattern = jax.device_put(SparsityPattern.from_mask(masks.random((size, size), sparsity=1 - live, seed=0)))
step = jax.jit(jax.grad(lambda values, x, pattern: (sparse_linear(x, values, pattern) ** 2).sum(), of))
g = step(jnp.ones(pattern.nnz), jnp.ones((batch, size)), pattern)
"""


@pytest.mark.parametrize("case", [(512, 0.1, 256, 0), (2048, 0.65, 32, 1), (64, 0.5, 4, (0, 1)), (512, 0.1, 1, (0, 1))])
def test_a_script_ends_while_its_first_step_is_under_way(case: Any) -> None:
    done = python(ENDS.format(case=case))
    assert not done.returncode, done.stderr


@pytest.mark.skipif(not kernels.is_available(), reason="the kernels are not for this machine")
@pytest.mark.parametrize("batch", [1, 2, 8, 33, 128, 256, 512])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("nnz", [100, 30_000])
def test_what_threads_run_is_prepared(
    batch: int, dtype: str, nnz: int, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    from maskedlinear.kernels import _calls

    monkeypatch.setattr(_calls, "_tables", {})
    shape = (300, 400)
    pattern = SparsityPattern.from_mask(masks.random(shape, sparsity=1 - nnz / (300 * 400), seed=0))
    numbers, sums = (jnp.bfloat16, np.float32) if dtype == "bfloat16" else (dtype, dtype)
    left, right = (rng.standard_normal((batch, size)).astype(numbers) for size in shape)
    rooms = [np.empty(kernels.panel_numbers(size, batch, dtype), sums) for size in shape]
    parts = np.empty(kernels.sampled_numbers(shape, batch, pattern.nnz, dtype), sums)
    out = np.empty(pattern.nnz, sums)
    _calls.prepare("sddmm", dtype, shape, batch, pattern.nnz)
    prepared = list(_calls._table("sddmm", dtype, True))
    for threads in (1, 2, 5):
        kernels.sddmm(
            dtype,
            shape,
            batch,
            pattern.nnz,
            starts=pattern.indptr.ctypes.data,
            across=pattern.indices.ctypes.data,
            left=left.ctypes.data,
            right=right.ctypes.data,
            out=out.ctypes.data,
            left_panels=rooms[0].ctypes.data,
            right_panels=rooms[1].ctypes.data,
            parts=parts.ctypes.data if parts.size else 0,
            left_by_batch=True,
            right_by_batch=True,
            threads=threads,
        )
        assert list(_calls._table("sddmm", dtype, True)) == prepared


@pytest.mark.parametrize("batch", [1, 2, 33, 130])
def test_without_jit_the_products_are_what_they_are(batch: int, rng: np.random.Generator) -> None:
    pattern = SparsityPattern.from_mask(masks.random((40, 30), sparsity=0.5, seed=0))
    values, x = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in (pattern.nnz, (batch, 30)))

    def loss(values: Any, x: Any) -> Any:
        return (sparse_linear(x, values, pattern) ** 2).sum()

    def all_of_it() -> Any:
        y, packed = sparse_linear(x, values, pattern), sparse_linear(x, pack(values, pattern))
        each = jax.vmap(lambda row: loss(values, row[None]))(x)
        return y, packed, each, jax.grad(loss, (0, 1))(values, x), jax.jvp(loss, (values, x), (values, x))

    expected = all_of_it()
    with jax.disable_jit():
        made = all_of_it()
        jax.hessian(loss)(values, x[:1])
    for one, other in zip(jax.tree.leaves(made), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-3)
