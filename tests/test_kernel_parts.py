"""Sampled products in parts of the batch: right, the same bits at any number of threads, in the room that is asked for."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from maskedlinear import kernels
from maskedlinear.kernels._emit import wide
from test_kernels import pattern_of, sample

pytestmark = pytest.mark.skipif(not kernels.is_available(), reason="no kernels on this machine")

SHAPES = [(300, 257, 0.02), (70, 1300, 0.01), (901, 130, 0.03), (2, 40, 0.1)]
BATCHES = (33, 64, 70, 128, 200, 256, 300, 520, 1100)


def widths(dtype: str) -> list[int]:
    from maskedlinear.kernels import _engine, _rows  # which need LLVM

    return _rows.widths(_engine.host().shape(dtype), dtype)


def sides_of(shape: tuple[int, int], batch: int, dtype: str) -> list[NDArray[np.generic]]:
    rng = np.random.default_rng(batch)
    return [rng.standard_normal((size, batch)).astype(getattr(ml_dtypes, dtype, dtype)) for size in shape]


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_parts_of_a_batch_are_added_up(shape: tuple[int, int, float], dtype: str) -> None:
    """All of it, with the sums of rows, in float64; and to the last bit at any number of threads."""
    pattern, had_parts = pattern_of(*shape), False
    for batch in BATCHES:
        g, x = sides_of(pattern.shape, batch, dtype)
        had_parts |= kernels.sampled_numbers(pattern.shape, batch, pattern.nnz, dtype) > 0
        exact = (g.astype(float) @ x.astype(float).T)[pattern.rows, pattern.indices]
        sizes = (np.abs(g).astype(float) @ np.abs(x).astype(float).T)[pattern.rows, pattern.indices]
        unit = 8 * np.finfo(wide(dtype)).eps
        for by_batch in (False, True):
            found = []
            for threads in (1, 2, 3, 8):
                sums = np.full(pattern.shape[0], np.nan, wide(dtype))
                out, _, _ = sample(pattern, g, x, by_batch=by_batch, threads=threads, sums=sums)
                found.append((out, sums))
            assert (np.abs(found[0][0] - exact) <= unit * sizes).all()
            bound = 4 * unit * np.abs(g).astype(float).sum(1)
            assert (np.abs(found[0][1] - g.astype(float).sum(1)) <= bound).all()
            for others in found[1:]:
                for one, other in zip(found[0], others, strict=True):
                    np.testing.assert_array_equal(one, other)
    assert had_parts


def test_as_many_parts_as_tiles_give_the_bits_of_one() -> None:
    pattern = pattern_of(300, 257, 0.02)
    for batch in (widths("float32")[0], 2 * widths("float32")[0]):  # two whole tiles, or more
        g, x = sides_of(pattern.shape, batch, "float32")
        assert kernels.sampled_numbers(pattern.shape, batch, pattern.nnz, "float32")
        sums = [np.full(300, np.nan, np.float32) for _ in range(2)]
        in_parts, in_one = (
            sample(pattern, g, x, by_batch=True, sums=sums[parts], in_parts=bool(parts))[0] for parts in (1, 0)
        )
        np.testing.assert_array_equal(in_parts, in_one)
        np.testing.assert_array_equal(*sums)


def test_parts_keep_to_their_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written around it, and less room than what it takes is not asked for."""
    pattern, form = pattern_of(901, 130, 0.03), kernels.sddmm
    for batch in (70, 256, 520):
        numbers = kernels.sampled_numbers(pattern.shape, batch, pattern.nnz, "float32")
        guarded = np.full(numbers + 128, -7.0, np.float32)
        monkeypatch.setattr(
            kernels,
            "sddmm",
            lambda *of, parts, at=guarded, **how: form(*of, parts=at.ctypes.data + 4 * 64, **how),
        )
        g, x = sides_of(pattern.shape, batch, "float32")
        sums = np.full(901, np.nan, np.float32)
        sample(pattern, g, x, by_batch=True, sums=sums)
        assert (guarded[:64] == -7).all()
        assert (guarded[64 + numbers :] == -7).all()
        assert (guarded[64 : 64 + pattern.nnz] != -7).all()  # the first of them is used


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_their_room_is_half_of_the_panels_at_most(dtype: str) -> None:
    for out, in_ in ((1, 1), (300, 257), (2048, 2048), (100_000, 100_000)):
        for batch in (1, 2, 8, 64, 128, 256, 4096):
            for nnz in {1, out, 10 * out, out * in_ // 10 + 1, out * in_}:
                numbers = kernels.sampled_numbers((out, in_), batch, nnz, dtype)
                assert 0 <= numbers <= (out + in_) * batch // 2
                assert numbers % (nnz + out) == 0
                assert numbers == 0 or batch > widths(dtype)[2]
    assert not kernels.sampled_numbers((2048, 2048), 256, 2048 * 2048 // 2, dtype)  # as many values as that: none
