"""What the CPU kernels do besides products: list a mask, put values where it is live, and bring values into an order."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from maskedlinear import kernels
from maskedlinear.kernels import _rows
from maskedlinear.pattern import SparsityPattern
from test_kernels import address

pytestmark = pytest.mark.skipif(not kernels.is_available(), reason="no kernels on this machine")


@pytest.mark.parametrize("shape", [(1, 1), (70, 37), (33, 64), (5, 1000)])
def test_a_mask_is_listed_and_values_are_put_back(shape: tuple[int, int]) -> None:
    for density in (0.0, 0.1, 1.0):
        mask = np.random.default_rng(6).random(shape) < density
        starts = np.zeros(shape[0] + 1, np.int32)
        kernels.count_mask(shape, mask=address(mask), starts=address(starts), threads=2)
        np.cumsum(starts, out=starts)
        across = np.full(starts[-1], -1, np.int32)
        kernels.list_mask(shape, mask=address(mask), starts=address(starts), across=address(across), threads=2)
        expected = SparsityPattern.from_mask(mask)
        np.testing.assert_array_equal(starts, expected.indptr)
        np.testing.assert_array_equal(across, expected.indices)
        for dtype in ("float32", "float64"):
            values, out = np.arange(1, 1 + starts[-1], dtype=dtype), np.full(shape, np.nan, dtype)
            kernels.place_values(
                dtype,
                shape,
                starts=address(starts),
                across=address(across),
                values=address(values),
                out=address(out),
                threads=2,
            )
            dense = np.zeros(shape, dtype)
            dense[mask] = values
            np.testing.assert_array_equal(out, dense)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_values_are_brought_into_an_order(dtype: str) -> None:
    rng = np.random.default_rng(0)
    for nnz in (1, _rows.ORDERED_AT_ONCE, 3 * _rows.ORDERED_AT_ONCE + 5):
        values = rng.standard_normal(nnz).astype(getattr(ml_dtypes, dtype, None) or dtype)
        order = rng.permutation(nnz).astype(np.int32)
        order[: nnz // 2 : 7] = rng.choice([-1, nnz, 2**31 - 1, -(2**31)], len(order[: nnz // 2 : 7]))
        inside = np.where((order < 0) | (order >= nnz), nnz - 1, order)  # one beyond the end is taken for the last
        for threads in (1, 3):
            out = np.zeros(nnz + 1, values.dtype)
            given = {"values": address(values), "order": address(order), "out": address(out)}
            kernels.order_values(dtype, nnz, threads=threads, **given)
            assert out[:-1].tobytes() == values[inside].tobytes()
            assert out[-1] == 0


def test_many_values_are_ordered_first_for_a_batch() -> None:
    assert kernels.is_ordered_first(3_000_000, 64, "float32")
    assert not kernels.is_ordered_first(3_000_000, 64, "bfloat16")  # of half the bytes
    assert not kernels.is_ordered_first(3_000_000, 1, "float32")
    assert not kernels.is_ordered_first(100_000, 256, "float64")
