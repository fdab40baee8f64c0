"""The products that XLA calls in the kernels of the core: their numbers, what they refuse, and what stays as it was."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from helpers import python
from maskedlinear import kernels, masks
from maskedlinear.jax import sparse_linear, stack_patterns
from maskedlinear.pattern import SparsityPattern
from maskedlinear_jax import _kernels

pytest.importorskip("llvmlite")
pytestmark = pytest.mark.skipif(not kernels.is_available(), reason="the kernels are not for this machine")

OURS = r"maskedlinear_(spmm|spmm_ordered|sddmm)_float\d\d_v3"
SHAPES = {"few": (33, 17, 0.3), "full": (40, 300, 1.0), "one": (1, 1, 1.0)}
BATCHES = ((), (3,), (4, 31))


def problem(
    rng: np.random.Generator, shape: tuple[int, int], live: float
) -> tuple[SparsityPattern, np.ndarray[Any, Any]]:
    pattern = SparsityPattern.from_mask(rng.random(shape) < live)
    return pattern, rng.standard_normal(pattern.nnz)


def step(x: Any, values: Any, pattern: Any, g: Any) -> Any:
    y, pull = jax.vjp(lambda x, values: sparse_linear(x, values, pattern), x, values)
    return y, *pull(g)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", SHAPES)
def test_numbers_are_as_near_as_the_order_of_sums_allows(
    name: str, dtype: str, request: pytest.FixtureRequest, rng: np.random.Generator
) -> None:
    if dtype == "float64":
        request.getfixturevalue("strict_jax")
    *shape, live = SHAPES[name]
    pattern, values = problem(rng, (shape[0], shape[1]), live)
    rows, columns = pattern.rows, pattern.indices
    for batch in BATCHES:
        x, g = (rng.standard_normal((*batch, size)).astype(dtype) for size in (shape[1], shape[0]))
        values = values.astype(dtype)
        matrix = np.zeros(shape)
        matrix[rows, columns] = values
        flat = [one.reshape(-1, one.shape[-1]).astype(np.float64) for one in (x, g)]
        got = jax.jit(step)(x, values, pattern, g)
        sides = ((flat[0], matrix.T), (flat[1], matrix), (flat[1].T, flat[0]))
        for place, (number, (one, other)) in enumerate(zip(got, sides, strict=True)):
            wanted, most = one @ other, np.abs(one) @ np.abs(other)
            if place == 2:
                wanted, most = wanted[rows, columns], most[rows, columns]
            assert number.dtype == dtype
            error = np.abs(np.asarray(number, np.float64).reshape(wanted.shape) - wanted)
            assert (error <= one.shape[1] * np.finfo(dtype).eps * most).all(), (batch, place, error.max())


def test_no_array_is_turned_around() -> None:
    pattern = SparsityPattern.from_mask(masks.random((24, 40), sparsity=0.5, seed=0))
    for batch in ((16,), (2, 8)):
        given = jnp.ones((*batch, 40)), jnp.ones(pattern.nnz), pattern, jnp.ones((*batch, 24))
        text = jax.jit(step).lower(*given).compile().as_text()
        assert sorted(re.findall(rf'target="{OURS}', text)) == ["sddmm", "spmm", "spmm_ordered"]
        assert not re.findall(r" (?:copy|transpose)\(", text)


@pytest.mark.usefixtures("strict_jax")
def test_derivatives_of_second_order_and_stacks_of_patterns(rng: np.random.Generator) -> None:
    patterns = [SparsityPattern.from_mask(masks.random((6, 10), sparsity=0.5, seed=seed)) for seed in range(3)]
    x, values = jnp.asarray(rng.standard_normal((4, 10))), jnp.asarray(rng.standard_normal((3, 30)))

    def dense(x: Any, values: Any, pattern: Any) -> Any:
        return x @ jnp.zeros((6, 10)).at[pattern.rows, pattern.indices].set(values).T

    def curvature(layer: Any) -> Any:
        def of(x: Any, values: Any, pattern: Any) -> Any:
            gradient = jax.grad(lambda *given: jnp.sin(layer(*given, pattern)).sum(), (0, 1))
            return jax.jvp(gradient, (x, values), (x, values))[1]

        return jax.jit(jax.vmap(of, (None, 0, 0)))

    given = x, values, stack_patterns(patterns)
    assert set(re.findall(OURS, curvature(sparse_linear).lower(*given).as_text())) == {"sddmm", "spmm", "spmm_ordered"}
    for got, wanted in zip(curvature(sparse_linear)(*given), curvature(dense)(*given), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.fixture
def fresh() -> Iterator[None]:
    """Let it be decided anew whether kernels are used, before and after."""
    caches = (kernels._reason, _kernels._products_are_registered)
    for cached in caches:
        cached.cache_clear()
    yield
    kernels.refused.clear()
    for cached in caches:
        cached.cache_clear()


def refuse(*_: Any, **__: Any) -> None:
    raise jax.errors.JaxRuntimeError("another version")


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("why", ["no", "another version", "no header", "no interface", "refused"])
def test_without_kernels_the_products_are_xlas(
    why: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rng: np.random.Generator
) -> None:
    if why == "no":
        monkeypatch.setenv("MASKEDLINEAR_KERNELS", "0")
    elif why == "no interface":
        monkeypatch.delattr(jax, "ffi")
    elif why == "refused":
        monkeypatch.setattr(jax.ffi, "register_ffi_target", refuse)
    else:
        place = Path("xla") / "ffi" / "api" / "c_api.h"
        header = (Path(jax.ffi.include_dir()) / place).read_text()
        if why == "another version":
            (tmp_path / place).parent.mkdir(parents=True)
            (tmp_path / place).write_text(header.replace("#define XLA_FFI_API_MAJOR 0", "#define XLA_FFI_API_MAJOR 1"))
        monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
    pattern, values = problem(rng, (30, 20), 0.5)
    x, g = (rng.standard_normal((32, size)).astype(np.float32) for size in (20, 30))
    lowered = jax.jit(lambda *given: step(*given)).lower(x, values.astype(np.float32), pattern, g)
    assert not re.search(OURS, lowered.as_text())
    matrix = np.zeros((30, 20))
    matrix[pattern.rows, pattern.indices] = values
    wanted = x @ matrix.T, g @ matrix, (g.T @ x)[pattern.rows, pattern.indices]
    for number, other in zip(lowered.compile()(x, values.astype(np.float32), pattern, g), wanted, strict=True):
        np.testing.assert_allclose(number, other, atol=1e-4)
    assert ("not used in JAX" in str(kernels.info())) == (why in ("another version", "no header", "refused"))


def test_a_program_that_is_kept_calls_no_kernel() -> None:
    pattern = SparsityPattern.from_mask(masks.random((6, 5), sparsity=0.5, seed=0))
    shapes = export.symbolic_shape("b, 5")
    program = export.export(jax.jit(lambda x, values: sparse_linear(x, values, pattern)))(
        jax.ShapeDtypeStruct(shapes, jnp.float32), jax.ShapeDtypeStruct((pattern.nnz,), jnp.float32)
    )
    assert not re.search(OURS, program.mlir_module())
    lowered = jax.jit(sparse_linear).trace(jnp.ones((4, 5)), jnp.ones(pattern.nnz), pattern)
    assert not re.search(OURS, lowered.lower(lowering_platforms=("cuda",)).as_text())


def products() -> tuple[str, Any]:
    """Return what the bits of some gradients hash to, and all that they were made of."""
    import hashlib

    import jax
    import numpy as np

    from maskedlinear.jax import sparse_linear
    from maskedlinear.pattern import SparsityPattern

    rng, said = np.random.default_rng(0), hashlib.sha256()
    pattern = SparsityPattern.from_mask(rng.random((300, 500)) < 0.2)
    values = rng.standard_normal(pattern.nnz).astype(np.float32)
    step = jax.jit(jax.grad(lambda x, values, pattern: (sparse_linear(x, values, pattern) ** 2).sum(), (0, 1)))
    for batch in (1, 90):
        x = rng.standard_normal((batch, 500)).astype(np.float32)
        for one in step(x, values, pattern):
            said.update(np.asarray(one).tobytes())
    return said.hexdigest(), (step, x, values, pattern)


# A process with as many threads, whose programs are kept in a folder.
PROCESS = """
import os; os.environ["NPROC"] = "{threads}"
from typing import Any
import jax
jax.config.update("jax_compilation_cache_dir", {folder!r})
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
found = []
jax.monitoring.register_event_listener(lambda name, **_: found.append(name))
{products}
said, (step, x, values, pattern) = products()
hits = found.count("/jax/compilation_cache/cache_hits")
"""

WRONG = """
import numpy as np
from maskedlinear.jax import sparse_linear
good = np.asarray(step(x, values, pattern)[1])
wrong = []
for field in range(6):
    leaves, tree = jax.tree.flatten(pattern)
    for value in (-1, -2**31, 2**31 - 1, leaves[field].size):
        for part in (slice(None), slice(None, None, 3), slice(-1, None)):
            broken = leaves[field].copy()
            broken[part] = value
            wrong.append(jax.tree.unflatten(tree, [*leaves[:field], broken, *leaves[field + 1 :]]))
    wrong.append(jax.tree.unflatten(tree, [*leaves[:field], leaves[field][::-1].copy(), *leaves[field + 1 :]]))
for one in wrong:
    for side in (x, x[:1], x[:7]):
        jax.block_until_ready(step(side, values, one))
np.testing.assert_array_equal(step(x, values, pattern)[1], good)
# what XLA kept from another process finds its kernels, though nothing was lowered here
from maskedlinear.kernels import _calls
table = _calls._table("spmm", "float32", True)
kept = list(table)
for place in range(len(table)):
    table[place] = 0
y = jax.jit(sparse_linear).lower(x, values, pattern).compile()
for place in range(len(table)):
    table[place] = 0
matrix = np.zeros((300, 500))
matrix[pattern.rows, pattern.indices] = values
np.testing.assert_allclose(y(x, values, pattern), x @ matrix.T, rtol=1e-3, atol=1e-3)
assert list(table) != kept and any(table)
# arrays that do not belong together
def call(name, shapes, *arrays):
    results = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
    try:
        jax.block_until_ready(jax.jit(jax.ffi.ffi_call(name, results))(*arrays))
    except (ValueError, RuntimeError) as error:
        return str(error)
    raise AssertionError("taken")
name, given = "maskedlinear_spmm_float32_v3", (values, x, pattern.indptr, pattern.indices)
for shapes, arrays in (
    (((90, 300), (5,)), given),
    (((90, 299), (500 * 92,)), given),
    (((89, 300), (500 * 92,)), given),
    (((90, 300), (500 * 92,)), (values[1:], *given[1:])),
    (((90, 300), (500 * 92,)), (*given[:2], pattern.indptr[1:], pattern.indices)),
):
    assert "do not belong together" in call(name, shapes, *arrays)
assert "another version" in call(name, ((90, 300),), *given)
"""


def test_bits_do_not_depend_on_threads_programs_are_kept_and_no_index_leads_astray(tmp_path: Path) -> None:
    for threads in (1, 4):
        program = PROCESS.format(threads=threads, folder=str(tmp_path), products=inspect.getsource(products))
        done = python(program + (WRONG if threads == 4 else "") + "\nprint(said, hits > 0)")
        assert not done.returncode, done.stderr
        assert done.stdout.split() == [products()[0], str(threads == 4)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_that_are_ordered_first_give_the_same_bits(
    dtype: Any, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    pattern, values = problem(rng, (70, 300), 0.2)
    x, g = (jnp.asarray(rng.standard_normal((40, size)), dtype) for size in (300, 70))
    values = jnp.asarray(values, dtype)
    apart = jax.jit(lambda *given: step(*given))(x, values, pattern, g)
    monkeypatch.setattr(kernels, "is_ordered_first", lambda *_: True)
    lowered = jax.jit(lambda *given: step(*given)).lower(x, values, pattern, g)
    assert len(re.findall("@maskedlinear_order_", lowered.as_text())) == 1
    first = lowered.compile()(x, values, pattern, g)
    for one, other in zip(first, apart, strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_order_of_other_sizes_is_refused() -> None:
    assert _kernels._are_registered("float32")
    for nnz, count, made in ((5, 4, 5), (5, 5, 4)):
        like = jax.ShapeDtypeStruct((made,), jnp.float32)
        wrong = jax.ffi.ffi_call("maskedlinear_order_float32_v3", like)
        with pytest.raises(jax.errors.JaxRuntimeError, match="do not belong together"):
            jax.block_until_ready(wrong(jnp.ones(nnz, jnp.float32), jnp.zeros(count, jnp.int32)))
