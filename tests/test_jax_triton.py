"""Triton's kernels as JAX calls them, without a GPU: interpreted, on memory of the CPU, in place of the call."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: there is none but for Linux"
)

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np, torch
from maskedlinear import _gpu_rule, masks
from maskedlinear.pattern import SparsityPattern
from maskedlinear_jax import _gpu_products, _packed, _triton_products
from maskedlinear_jax._partition import wide
from maskedlinear_jax._primitives import _each, _sddmm, _spmm
from maskedlinear_jax._products import DevicePattern
from maskedlinear.jax import pack, sparse_linear, stack_patterns, with_bits

called = []

def call(launch, made, *pointers):
    "Run the kernel as jax_triton does: pointers, sizes, those of the results, and all else by name."
    def run(*arrays):
        halves = [array.dtype == jnp.bfloat16 for array in arrays]
        tensors = [
            torch.from_numpy(np.array(array.view(np.int16) if half else array)) for array, half in zip(arrays, halves)
        ]
        tensors = [tensor.view(torch.bfloat16) if half else tensor for tensor, half in zip(tensors, halves)]
        # What no program writes stays so.
        results = [
            torch.full(one.shape, torch.nan if one.dtype.kind == "f" else -1, dtype=getattr(torch, str(one.dtype)))
            for one in jax.tree.leaves(made)
        ]
        told = launch.told | ({"UP": True} if "UP" in launch.told else {})
        launch.kernel[launch.grid](*tensors, *launch.sizes.values(), *results, **told)
        return jax.tree.unflatten(jax.tree.structure(made), [result.numpy() for result in results])
    called.append(launch.kernel.__name__)
    return jax.pure_callback(run, made, *pointers)

_triton_products._call = call
_triton_products._capability = lambda: 90
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_cpu_enable_async_dispatch", False)

def choose(wanted):
    _gpu_rule.choose = lambda ways, product: wanted if wanted in ways else "rows"

rng = np.random.default_rng(0)
TYPES = (jnp.float32, 3, 64), (jnp.float64, 1, 70), (jnp.bfloat16, 16, 70), (jnp.float16, 2, 96), (jnp.float32, 20, 70)
for dtype, batch, depth in TYPES:
    mask = masks.random((5, depth), sparsity=0.6)
    mask[1], mask[2] = True, False
    pattern = DevicePattern.of(SparsityPattern.from_mask(mask))
    numbers = [jnp.asarray(rng.standard_normal(s), dtype) for s in ((int(mask.sum()),), (5, batch), (depth, batch))]
    values, left, right = numbers
    matrix = np.zeros((5, depth))
    matrix[mask] = np.asarray(values, np.float64)
    g, x = (np.asarray(side, np.float64) for side in (left, right))
    for wanted in ("rows", "bits", "tiles"):
        if wanted == "tiles" and dtype == jnp.float64 or wanted == "bits" and batch > 16:
            continue
        choose(wanted)
        called.clear()
        product = jax.jit(lambda v, x, p: _gpu_products.spmm(v, x, p, transposed=False))(values, right, pattern)
        turned = jax.jit(lambda v, g, p: _gpu_products.spmm(v, g, p, transposed=True))(values, left, pattern)
        sampled = jax.jit(lambda g, x, p: _gpu_products.sddmm(g, x, p))(left, right, pattern)
        others = "rows" if wanted == "bits" else wanted
        names = [f"{wanted}_spmm_kernel", f"{others}_spmm_kernel", f"{others}_sddmm_kernel"]
        forms = [name for name in called if name == "form_bits_kernel"]
        assert len(forms) == {"rows": 0, "bits": 1, "tiles": 3}[wanted]
        assert [name for name in called if name not in forms] == names, called
        for one, other in ((product, matrix @ x), (turned, matrix.T @ g), (sampled, (g @ x.T)[mask])):
            assert one.dtype == wide(dtype)
            np.testing.assert_allclose(np.asarray(one, np.float64), other, atol=1e-12 if dtype == jnp.float64 else 1e-4)

# Bits and the first of each word, of rows of any length, as NumPy counts them.
for shape, live in (((7, 70), 0.5), ((3, 4000), 0.02), ((2, 33), 1.0), ((4, 64), 0.0), ((1, 9000), 0.9)):
    mask_ = rng.random(shape) < live
    pattern = DevicePattern.of(SparsityPattern.from_mask(mask_))
    bits, firsts = (np.asarray(one) for one in _triton_products.bits_of(pattern))
    words = -(-shape[1] // 32)
    filled = np.zeros((shape[0], words * 32), bool)
    filled[:, : shape[1]] = mask_
    np.testing.assert_array_equal(bits, np.packbits(filled, axis=1, bitorder="little").view(np.int32))
    counts = filled.reshape(-1, 32).sum(1)
    np.testing.assert_array_equal(firsts.ravel(), np.cumsum(counts) - counts)

# Of wrong rows and indices, numbers of values that are there.
for starts, across in (([0, 3, 1 << 30], [-5, 7, 1 << 30, 0, 39, 40]), ([-7, 9, 2], [9] * 6), ([4, 1, 6], [-1] * 6)):
    wrong = pattern._replace(indptr=jnp.asarray(starts, jnp.int32), indices=jnp.asarray(across, jnp.int32))
    firsts = np.asarray(_triton_products.bits_of(wrong._replace(starts=jnp.zeros(71, jnp.int32)))[1])
    assert firsts.shape == (2, 3) and (firsts >= 0).all() and (firsts <= 6).all()

# Patterns that are mapped over: one by one where W is unpacked, else all in one.
masks_ = [masks.random((4, 40), sparsity=0.5, seed=seed) for seed in range(2)]
stacked = DevicePattern.of(stack_patterns([SparsityPattern.from_mask(one) for one in masks_]))
values, right = rng.standard_normal((2, 80)), rng.standard_normal((2, 40, 3))
for wanted in ("rows", "bits"):
    choose(wanted)
    spmm = lambda v, x, p: _gpu_products.spmm(v, x, p, transposed=False)
    found = jax.jit(lambda v, x, p: _each(spmm, v, x, p, 1, "gpu"))(values, right, stacked)
    for one, mask_, numbers, side in zip(found, masks_, values, right):
        dense = np.zeros(mask_.shape)
        dense[mask_] = numbers
        np.testing.assert_allclose(one, dense @ side, atol=1e-12)

# Packed for a GPU: bits are kept, values may be of half types.
assert pack(jnp.ones(int(mask.sum()), jnp.float32), SparsityPattern.from_mask(mask)).kind != "bits"  # they lie on the CPU
_packed._are_on_a_gpu = lambda values: True
sparse = SparsityPattern.from_mask(mask)
for dtype, batch in ((jnp.float32, (2, 3)), (jnp.bfloat16, (16,))):
    values, x = jnp.asarray(rng.standard_normal(sparse.nnz), dtype), jnp.asarray(rng.standard_normal((*batch, 70)), dtype)
    packed = pack(values, sparse)
    assert packed.kind == "bits" and packed.is_packed and not packed.layout
    kept = DevicePattern.of(packed.pattern)
    formed = _triton_products.bits_of(DevicePattern.of(sparse))
    for one, other in zip((kept.bits, kept.firsts), formed, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    for wanted in ("bits", "tiles"):
        choose(wanted)
        called.clear()
        product = lambda v, x, *p: _spmm(v, jnp.moveaxis(x, -1, 0), *p, transposed=False, kernel="gpu")
        y = jnp.moveaxis(jax.jit(product)(values, x, *kept.arrays), 0, -1)
        assert called == [f"{wanted}_spmm_kernel"], called
        dense = np.zeros((5, 70))
        dense[mask] = np.asarray(values, np.float64)
        np.testing.assert_allclose(y, np.asarray(x, np.float64) @ dense.T, atol=1e-4)
    y = sparse_linear(x, packed)  # on the CPU
    assert y.dtype == dtype and y.shape == (*batch, 5)
    np.testing.assert_allclose(np.asarray(y, np.float64), np.asarray(x, np.float64) @ dense.T, atol=0.1)

# A column or two, by bits, without kernels of ours.
choose("reduced")
for dtype, batch in ((jnp.float32, 1), (jnp.float64, 2), (jnp.bfloat16, 1), (jnp.float16, 2)):
    values, x = jnp.asarray(rng.standard_normal(sparse.nnz), dtype), jnp.asarray(rng.standard_normal((70, batch)), dtype)
    x = x.at[3].set(jnp.inf)  # which reaches what is connected to it
    called.clear()
    y = jax.jit(lambda v, x, *p: _spmm(v, x, *p, transposed=False, kernel="gpu"))(values, x, *kept.arrays)
    assert not called
    dense = np.zeros((5, 70))
    dense[mask] = np.asarray(values, np.float64)
    expected = np.stack([row[one] @ np.asarray(x, np.float64)[one] for row, one in zip(dense, mask)])
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=1e-12 if dtype == jnp.float64 else 1e-4, atol=1e-4)

# A pattern that keeps its bits: no product of a step forms them, and each is as without.
values, left, right = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((sparse.nnz,), (5, 20), (70, 20)))
choose("tiles")
for lead in (2,), ():  # mapped over, one after the other, and alone
    of_each = lambda one: jnp.stack([one] * 2) if lead else one
    plain, with_them = (jax.tree.map(of_each, DevicePattern.of(one)) for one in (sparse, with_bits(sparse)))
    sides = [of_each(one) for one in (values, left, right)]
    products = (
        lambda v, g, x, *p: _spmm(v, x, *p, transposed=False, kernel="gpu"),
        lambda v, g, x, *p: _spmm(v, g, *p, transposed=True, kernel="gpu"),
        lambda v, g, x, *p: _sddmm(g, x, *p, lead=len(lead), kernel="gpu"),
    )
    for product in products:
        expected = jax.jit(product)(*sides, *plain.arrays)
        called.clear()
        np.testing.assert_array_equal(jax.jit(product)(*sides, *with_them.arrays), expected)
        assert len(called) == 1 and called[0].startswith("tiles"), called

for wrong in (
    {"bits": kept.bits[1:]},
    {"firsts": kept.firsts[:, 1:]},
    {"bits": kept.bits.astype(jnp.int16)},
    {"firsts": kept.firsts.astype(jnp.float32)},
):
    try:
        jax.jit(products[2])(values, left, right, *kept._replace(**wrong).arrays)
    except ValueError as error:
        assert "do not belong together" in str(error)
    else:
        raise AssertionError
# Of wrong bits, words whose values are all there, and no others.
for first in (0, sparse.nnz - 33, sparse.nnz - 32, sparse.nnz - 31, sparse.nnz, -1, 1 << 30, -(1 << 31), (1 << 31) - 1):
    wrong = kept._replace(bits=jnp.full((5, 3), -1, jnp.int32), firsts=jnp.full((5, 3), first, jnp.int32))
    x, numbers = rng.standard_normal((3, 70)).astype(np.float32), rng.standard_normal(sparse.nnz).astype(np.float32)
    are_there, row = 0 <= first <= sparse.nnz - 32, np.zeros(96)
    if are_there:
        row = np.tile(numbers[first : first + 32], 3).astype(np.float64)
    for wanted in ("bits", "tiles"):
        choose(wanted)
        y = jax.jit(products[0])(jnp.asarray(numbers), left, jnp.asarray(x.T), *wrong.arrays)
        np.testing.assert_allclose(y, np.broadcast_to(row[:70] @ x.T, (5, 3)), atol=1e-4)
    # What is sampled is written to those values, of which each is a product of some row and column; to no others.
    found = np.asarray(jax.jit(products[2])(numbers, left, right, *wrong.arrays))
    written = np.zeros(sparse.nnz, bool)
    written[first : first + 32] = are_there
    np.testing.assert_array_equal(np.isfinite(found), written)
for other in (jnp.float64, jnp.int32, jnp.float8_e5m2):
    try:
        pack(jnp.ones(sparse.nnz, other), sparse)
    except TypeError as error:
        assert "packed values are float32" in str(error)
    else:
        raise AssertionError
assert pack(jnp.ones(1, jnp.float32), SparsityPattern.from_edges([0], [0], (5, 70))[0]).kind == ""  # too few for bits

# Of indices that are none, the ends of memory are read: as of a pattern that has those, in the same places.
values, left, right = (jnp.asarray(rng.standard_normal(s)) for s in ((6,), (2, 3), (40, 3)))
wrong = DevicePattern(*(jnp.asarray(index, jnp.int32) for index in (
    [0, 3, 1 << 30], [0, 0, 0, 1, 1, 1], [-5, 7, 1 << 30, 0, 39, 40],
    [-7] + [1] * 39 + [9], [-1, 1, 5, 0, 9, 1], [9, -9, 2, 3, 4, 5],
)))
ends = jnp.minimum(wrong.indices.astype(jnp.uint32), 39).astype(jnp.int32)  # what is below 0 is large without a sign
near = wrong._replace(indptr=jnp.asarray([0, 3, 6]), indices=ends)
choose("rows")
for transposed, side in ((False, right), (True, left)):
    found = jax.jit(lambda v, x, p: _gpu_products.spmm(v, x, p, transposed=transposed))(values, side, wrong)
    assert np.isfinite(found).all()
    if not transposed:
        dense = np.zeros((2, 40))
        np.add.at(dense, (np.repeat([0, 1], 3), np.asarray(near.indices)), np.asarray(values))
        np.testing.assert_allclose(found, dense @ np.asarray(right), atol=1e-12)
found = jax.jit(lambda g, x, p: _gpu_products.sddmm(g, x, p))(left, right, wrong)
np.testing.assert_allclose(found, (left[near.rows] * right[near.indices]).sum(1), atol=1e-12)
for wanted in ("bits", "tiles"):  # by bits, as many values as there are
    choose(wanted)
    few = [side.astype(jnp.float32) for side in (values, left, right)]
    for transposed, side in ((False, few[2]), (True, few[1])):
        product = lambda v, x, p: _gpu_products.spmm(v, x, p, transposed=transposed)
        assert np.isfinite(jax.jit(product)(few[0], side, wrong)).all()
    assert jax.jit(lambda g, x, p: _gpu_products.sddmm(g, x, p))(*few[1:], wrong).shape == (6,)
"""


def test_interpreted_they_are_the_products(tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "backends")])
    variables = {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=os.environ | variables, check=False
    )
    assert ended.returncode == 0, ended.stderr
