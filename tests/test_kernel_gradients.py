"""Both gradients of a product: at once, for small batches, or by two products that read the same panels."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from maskedlinear import kernels, masks
from maskedlinear.kernels import _calls
from maskedlinear.pattern import SparsityPattern
from maskedlinear.torch import SparseLinear
from maskedlinear_torch import _cpu_kernels
from maskedlinear_torch._products import DevicePattern
from test_kernels import Array, address, lay, matrix, pattern_of, room, sample, sddmm, spmm, wide

pytestmark = pytest.mark.skipif(not kernels.is_available(), reason="no kernels on this machine")
BATCHES = (2, 3, 4, 8, 16)


def gradients(
    pattern: Any,
    values: Array,
    left: Array,
    right: Array,
    *,
    by_batch: bool = False,
    threads: int = 2,
    checked: bool = True,
    sums: Array | None = None,
) -> tuple[Array, Array]:
    """Return left · rightᵀ at the connections, and Wᵀ · left, shape (columns, batch)."""
    dtype, batch = str(right.dtype), right.shape[1]
    sides = [lay(side, by_batch) for side in (left, right)]
    panels = [room(len(side), batch, by_batch, dtype) for side in (left, right)]
    depth = pattern.shape[1]
    out = np.full(len(values) + 8, np.nan, wide(dtype))
    product = np.full((batch, depth) if by_batch else (depth, batch), np.nan, wide(dtype))
    parts = np.full(kernels.part_numbers(depth, batch, dtype) + 8, np.nan, wide(dtype))
    kernels.gradients(
        dtype,
        pattern.shape,
        batch,
        len(values),
        starts=address(pattern.indptr),
        across=address(pattern.indices),
        values=address(values),
        left=address(sides[0]),
        right=address(sides[1]),
        out=address(out),
        out_right=address(product),
        parts=address(parts),
        left_sums=address(sums),
        left_panels=address(panels[0]),
        right_panels=address(panels[1]),
        left_by_batch=by_batch,
        right_by_batch=by_batch,
        threads=threads,
        checked=checked,
    )
    assert np.isnan(out[-8:]).all(), "numbers of others"
    assert np.isnan(parts[-8:]).all(), "numbers of others"
    return out[:-8], product.T if by_batch else product


def by_two(
    pattern: SparsityPattern,
    values: Array,
    left: Array,
    right: Array,
    *,
    by_batch: bool = False,
    threads: int = 2,
    sums: Array | None = None,
) -> tuple[Array, Array]:
    """Return the same by two products, of which the second reads the panels of left that the first has packed."""
    how: dict[str, Any] = {"by_batch": by_batch, "threads": threads}
    out, panels, packed = sample(pattern, left, right, sums=sums, **how)
    assert (packed == 0) is kernels.is_direct(right.shape[1], by_batch, str(right.dtype))
    return out, spmm(pattern, values, left, transposed=True, panels=panels, packed=packed, **how)


def batches(dtype: str) -> list[int]:
    """Return the batches that are taken on this machine."""
    return [batch for batch in BATCHES if kernels.are_gradients_at_once(1, batch, 128, dtype)]


def sides(pattern: SparsityPattern, batch: int, dtype: Any) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(batch)
    sizes = (pattern.nnz, *((size, batch) for size in pattern.shape))
    return tuple(rng.standard_normal(size).astype(dtype) for size in sizes)  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(700, 300, 0.3), (1, 40, 1.0), (40, 1, 0.5), (131, 129, 0.02), (3, 5, 0.6)], ids=str)
def test_gradients_are_those_in_float64(shape: tuple[int, int, float], dtype: str) -> None:
    pattern, kind = pattern_of(*shape), np.dtype(getattr(ml_dtypes, dtype, dtype))
    assert {2, 4} <= set(batches(dtype))
    for batch, by_batch in itertools.product(batches(dtype), (False, True)):
        values, left, right = sides(pattern, batch, kind)
        sampled, product = gradients(pattern, values, left, right, by_batch=by_batch)
        one, other, W = left.astype(float), right.astype(float), matrix(pattern, values.astype(float))
        unit = 8 * np.finfo(wide(dtype)).eps
        exact, scale = ((a @ b.T)[pattern.rows, pattern.indices] for a, b in ((one, other), (abs(one), abs(other))))
        assert (abs(sampled - exact) <= unit * scale).all()
        assert (abs(product - W.T @ one) <= unit * (abs(W).T @ abs(one) + 1e-30)).all()
        # To the last bit what is sampled alone.
        np.testing.assert_array_equal(sampled, sddmm(pattern, left, right, by_batch=by_batch))


# Shapes of which both products have panels of the same tiles, or of others, so that one has to be packed anew.
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "shape", [(300, 2000, 0.01), (2000, 300, 0.01), (70, 90, 0.5), (1, 40, 1.0), (40, 1, 0.5)], ids=str
)
def test_two_products_share_panels(shape: tuple[int, int, float], dtype: str) -> None:
    """To the last bit what they are by themselves, at any number of threads."""
    pattern, kind = pattern_of(*shape), np.dtype(getattr(ml_dtypes, dtype, dtype))
    for batch, by_batch in itertools.product((1, 3, 16, 33, 128, 200), (False, True)):
        values, left, right = sides(pattern, batch, kind)
        wanted = spmm(pattern, values, left, transposed=True, by_batch=by_batch)
        for threads in (1, 2, 3):
            sampled, product = by_two(pattern, values, left, right, by_batch=by_batch, threads=threads)
            np.testing.assert_array_equal(sampled, sddmm(pattern, left, right, by_batch=by_batch))
            np.testing.assert_array_equal(product, wanted)


def test_panels_are_packed_once_where_tiles_are_as_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen by what is told: the width of the tiles that the first product has packed."""
    told, real = [], _calls._call

    def call(kind: str, dtype: str, what: dict[str, int], *rest: Any) -> Any:
        slots = real(kind, dtype, what, *rest)
        told.append((kind, what.get("packed", 0), slots[_calls._SLOT["widest"]]))
        return slots

    monkeypatch.setattr(_calls, "_call", call)
    for shape, is_same in (((600, 600, 0.5), True), ((300, 2000, 0.01), False)):
        told.clear()
        pattern = pattern_of(*shape)
        by_two(pattern, *sides(pattern, 200, np.float32), by_batch=True)
        (first, none, width), (second, packed, own) = told
        assert (first, second, none) == ("sddmm", "spmm_ordered", 0)
        assert packed == width
        assert (packed == own) is is_same


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("form", [by_two, gradients])
def test_sums_of_the_left_side_are_formed_by_the_way(form: Any, dtype: str) -> None:
    """For the gradient of a bias: of all columns of the batch, and of no row that there is not."""
    pattern, kind = pattern_of(131, 300, 0.1), np.dtype(getattr(ml_dtypes, dtype, dtype))
    for batch, by_batch in itertools.product((2, 3, 7, 33, 200) if form is by_two else batches(dtype), (False, True)):
        given = sides(pattern, batch, kind)
        bits = []
        for threads in (1, 2, 3):
            sums = np.full(131 + 8, np.nan, wide(dtype))
            found = form(pattern, *given, by_batch=by_batch, threads=threads, sums=sums)
            exact = given[1].astype(float)
            bound = 8 * np.finfo(wide(dtype)).eps * abs(exact).sum(1)
            assert (abs(sums[:131] - exact.sum(1)) <= bound).all()
            assert np.isnan(sums[131:]).all(), "numbers of others"
            for one, other in zip(found, form(pattern, *given, by_batch=by_batch), strict=True):
                np.testing.assert_array_equal(one, other)
            bits.append(sums[:131].tobytes())
        assert len(set(bits)) == 1


def test_what_gradients_need_is_said() -> None:
    sizes: dict[str, int] = dict.fromkeys(
        ("starts", "across", "values", "left", "right", "out", "out_right", "parts"), 64
    )
    for batch in (1, 5, 32):
        with pytest.raises(ValueError, match=rf"2 to 4, 8 or 16 columns .* got {batch}: form them by sddmm and spmm"):
            kernels.gradients("float32", (4, 4), batch, 4, **sizes, left_panels=64, right_panels=64)
    with pytest.raises(ValueError, match="panels must be given"):
        kernels.gradients("float32", (4, 4), 4, 4, **sizes, left_by_batch=True)


def test_bits_do_not_depend_on_threads_nor_on_checks() -> None:
    pattern = pattern_of(700, 500, 0.3)
    for batch in batches("float32"):
        given = sides(pattern, batch, np.float32)
        one = gradients(pattern, *given, threads=1)
        for other in ({"threads": 2}, {"threads": 3}, {"threads": 8}, {"checked": False}):
            for found, wanted in zip(gradients(pattern, *given, **other), one, strict=True):  # type: ignore[arg-type]
                np.testing.assert_array_equal(found, wanted)


def test_what_is_not_a_number_reaches_only_what_it_is_connected_to() -> None:
    pattern = pattern_of(60, 50, 0.4)
    values, left, right = sides(pattern, 4, np.float32)
    left[7] = np.nan
    sampled, product = gradients(pattern, values, left, right)
    np.testing.assert_array_equal(np.isnan(sampled), pattern.rows == 7)
    connected = np.isin(np.arange(50), pattern.indices[pattern.rows == 7])
    np.testing.assert_array_equal(np.isnan(product), np.repeat(connected[:, None], 4, 1))


@pytest.mark.parametrize("batch", [3, 8])
@pytest.mark.parametrize("which", [slice(1, None, 3), slice(5, 6), slice(-1, None)], ids=["a third", "one", "the last"])
def test_indices_beyond_the_end_touch_no_memory_of_others(batch: int, which: slice) -> None:
    pattern = pattern_of(40, 30, 0.9)
    given = sides(pattern, batch, np.float32)
    for name, wrong in itertools.product(("indices", "indptr"), (-1, 2**31 - 1)):
        bad: Any = object.__new__(SparsityPattern)
        bad.indptr, bad.indices, bad.shape = pattern.indptr.copy(), pattern.indices.copy(), pattern.shape
        getattr(bad, name)[which] = wrong
        assert gradients(bad, *given)[1].shape == (30, batch)
    bad.indptr, bad.indices = pattern.indptr, pattern.indices.copy()
    bad.indices[which] = 2**31 - 1
    found = gradients(bad, *given)
    bad.indices[which] = 29  # the last
    for one, other in zip(found, gradients(bad, *given), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("register_bytes", [16, 32, 64])
def test_other_widths_of_registers_give_the_same_numbers(register_bytes: int) -> None:
    code = f"""
import sys
sys.path.insert(0, {os.fspath(Path(__file__).parent)!r})
import numpy as np
from maskedlinear.kernels import _engine
here = _engine.host()
_engine.host = lambda: here._replace(register_bytes={register_bytes})
from test_kernel_gradients import batches, gradients, matrix, pattern_of, sides
pattern = pattern_of(70, 90, 0.4)
for dtype, tolerance in (("float32", 1e-4), ("float64", 1e-12)):
    assert max(batches(dtype)) == {register_bytes} // np.dtype(dtype).itemsize
    for batch in batches(dtype):
        values, left, right = sides(pattern, batch, dtype)
        sampled, product = gradients(pattern, values, left, right, by_batch=batch == 4)
        np.testing.assert_allclose(product, matrix(pattern, values).T @ left, atol=tolerance)
        np.testing.assert_allclose(sampled, (left @ right.T)[pattern.rows, pattern.indices], atol=tolerance)
"""
    subprocess.run([sys.executable, "-c", code], timeout=300, check=True)


def test_it_is_for_few_columns_and_many_connections_of_each() -> None:
    lanes = {64: 16, 32: 8, 16: 4}[kernels.info().register_bytes]
    for batch in range(1, 40):
        is_one_register = 1 < batch <= 4 or batch in (8, 16)
        assert kernels.are_gradients_at_once(100, batch, 12800, "float32") == (is_one_register and batch <= lanes)
    assert not kernels.are_gradients_at_once(100, 4, 12799, "float32")
    assert not kernels.are_gradients_at_once(1 << 20, 4, 1 << 29, "float32"), "sums that no cache holds"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("batch", [2, 4, 5])
def test_a_layer_asks_for_both_gradients_at_once(
    batch: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    both: list[int] = []
    alone: list[int] = []
    reused: list[int] = []
    for name, called in (("gradients", both), ("sddmm", alone), ("spmm", reused)):
        real = getattr(kernels, name)

        def call(*of: Any, real: Any = real, called: list[int] = called, **more: Any) -> Any:
            called.append(more.get("packed", 1))
            return real(*of, **more)

        monkeypatch.setattr(_cpu_kernels.kernels, name, call)
    mask = masks.random((300, 200), sparsity=0.5, seed=0)
    layer = SparseLinear(200, 300, pattern=SparsityPattern.from_mask(mask), dtype=dtype)
    dense = nn.Linear(200, 300, dtype=torch.float64)
    rows, columns = (torch.tensor(index) for index in mask.nonzero())
    with torch.no_grad():
        dense.weight.zero_()[rows, columns] = layer.weight_values.double()
        dense.bias.copy_(layer.bias)
    for shape, of_x, of_values in (
        ((batch, 200), True, True),
        ((1, batch, 200), True, True),
        ((batch, 200), False, True),
        ((batch, 200), True, False),
    ):
        layer.weight_values.requires_grad_(of_values)
        x = torch.randn(shape).to(dtype).requires_grad_(of_x)
        layer.zero_grad()
        dense.zero_grad()
        twin = x.detach().double().requires_grad_()
        g = torch.randn(*shape[:-1], 300).to(dtype)
        y = layer(x.mT.contiguous().mT if of_x else x)
        reused.clear()
        y.backward(g)
        dense(twin).backward(g.double())
        near: dict[str, float] = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 256 * torch.finfo(wide_of(dtype)).eps}
        near["atol"] = max(near["atol"], 4e-2 if dtype.itemsize == 2 else 0)
        torch.testing.assert_close(layer.bias.grad.double(), dense.bias.grad, **near)
        if of_values:
            torch.testing.assert_close(layer.weight_values.grad.double(), dense.weight.grad[rows, columns], **near)
        if of_x:
            torch.testing.assert_close(x.grad.double(), twin.grad, **near)
        assert len(both) == (of_x and of_values and batch < 5)
        assert len(alone) == (of_values and not both)
        assert [packed > 0 for packed in reused] == [of_values] * (of_x and not both)
        both.clear()
        alone.clear()


def wide_of(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("batch", [(2, 2), (2, 30), (3, 1)], ids=str)
def test_x_may_have_any_dimensions_and_lie_anyhow(batch: tuple[int, int]) -> None:
    """Those that cannot be merged without a copy, too: its gradient is that of its rows, in their order."""
    mask = masks.random((40, 300), sparsity=0.5, seed=0)
    layer = SparseLinear(300, 40, mask=mask)
    values, indices = layer.weight_values.detach(), DevicePattern.of(layer.pattern, torch.device("cpu"))
    for x in (torch.randn(*batch[::-1], 300).transpose(0, 1), torch.randn(batch[0], 300, batch[1]).mT):
        g = torch.randn(*batch, 40)
        dx, dvalues, dbias = _cpu_kernels.gradients(g, x, values, indices.csr(False), indices.csr(True), of_bias=True)
        assert dx is not None
        assert dvalues is not None
        assert dbias is not None
        assert dx.shape == (x.shape[0] * x.shape[1], 300)
        torch.testing.assert_close(dx.reshape(x.shape), g @ layer.weight.detach(), rtol=1e-4, atol=1e-4)
        dweight = g.reshape(-1, 40).mT @ x.reshape(-1, 300)
        torch.testing.assert_close(dvalues, dweight[torch.from_numpy(mask)], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(dbias, g.sum((0, 1)), rtol=1e-4, atol=1e-4)
