"""The CPU kernels by themselves: right for every shape and way of lying, the same bits at any number of threads, safe."""

from __future__ import annotations

import copy
import itertools
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from helpers import needs_x86
from maskedlinear import kernels
from maskedlinear.pattern import SparsityPattern

pytest.importorskip("llvmlite")

from maskedlinear.kernels import _engine, _openmp, _permute, _rows, _vectors
from maskedlinear.kernels._emit import wide

Array = NDArray[Any]
SHAPES = [(33, 17, 0.3), (70, 300, 0.1), (300, 257, 0.6), (1, 1, 1.0), (5, 900, 0.9), (260, 130, 0.01)]


def pattern_of(out: int, in_: int, density: float) -> SparsityPattern:
    mask = np.random.default_rng(0).random((out, in_)) < density
    mask[0, 0] = True
    return SparsityPattern.from_mask(mask)


def matrix(pattern: SparsityPattern, values: Array) -> Array:
    dense = np.zeros(pattern.shape)
    dense[pattern.rows, pattern.indices] = values
    return dense


def lay(columns: Array, by_batch: bool) -> Array:
    return np.ascontiguousarray(columns.T if by_batch else columns)


def address(array: Array | None) -> int:
    return 0 if array is None else array.ctypes.data


def room(features: int, batch: int, by_batch: bool, dtype: str) -> Array | None:
    if kernels.is_direct(batch, by_batch, dtype):
        return None
    return np.full(kernels.panel_numbers(features, batch, dtype), np.nan, wide(dtype))


def spmm(
    pattern: SparsityPattern,
    values: Array,
    right: Array,
    *,
    transposed: bool = False,
    by_batch: bool = False,
    threads: int = 2,
    checked: bool = True,
    bias: Array | None = None,
    panels: Array | None = None,
    packed: int = 0,
) -> Array:
    """Return W · right, or Wᵀ · right, for right (features, batch), which ``panels`` may have already, and a bias."""
    shape, dtype, batch = pattern.shape[:: -1 if transposed else 1], str(right.dtype), right.shape[1]
    starts, across, order = pattern.csc if transposed else (pattern.indptr, pattern.indices, None)
    given = lay(right, by_batch)
    panels = room(len(right), batch, by_batch, dtype) if panels is None else panels
    out = np.full((batch, shape[0]) if by_batch else (shape[0], batch), np.nan, wide(dtype))
    kernels.spmm(
        dtype,
        shape,
        batch,
        len(values),
        starts=address(starts),
        across=address(across),
        values=address(values),
        right=address(given),
        out=address(out),
        order=address(order),
        panels=address(panels),
        packed=packed,
        bias=address(bias),
        right_by_batch=by_batch,
        out_by_batch=by_batch,
        threads=threads,
        checked=checked,
    )
    return out.T if by_batch else out


def sample(
    pattern: SparsityPattern,
    left: Array,
    right: Array,
    *,
    by_batch: bool = False,
    threads: int = 2,
    sums: Array | None = None,
    in_parts: bool = True,
) -> tuple[Array, Array | None, int]:
    """Return left · rightᵀ at the connections, the panels of left, and how wide their tiles are."""
    dtype, batch = str(right.dtype), right.shape[1]
    sides = [lay(side, by_batch) for side in (left, right)]
    panels = [room(len(side), batch, by_batch, dtype) for side in (left, right)]
    out = np.full(pattern.nnz, np.nan, wide(dtype))
    numbers = kernels.sampled_numbers(pattern.shape, batch, pattern.nnz, dtype)
    parts = np.full(numbers, np.nan, wide(dtype)) if in_parts and numbers else None
    packed = kernels.sddmm(
        dtype,
        pattern.shape,
        batch,
        pattern.nnz,
        starts=address(pattern.indptr),
        across=address(pattern.indices),
        left=address(sides[0]),
        right=address(sides[1]),
        out=address(out),
        left_panels=address(panels[0]),
        right_panels=address(panels[1]),
        parts=address(parts),
        left_by_batch=by_batch,
        right_by_batch=by_batch,
        left_sums=address(sums),
        threads=threads,
    )
    return out, panels[0], packed


def sddmm(pattern: SparsityPattern, left: Array, right: Array, **how: Any) -> Array:
    return sample(pattern, left, right, **how)[0]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_in_float64(shape: tuple[int, int, float], dtype: str) -> None:
    rng, pattern = np.random.default_rng(1), pattern_of(*shape)
    values = rng.standard_normal(pattern.nnz).astype(dtype)
    W = matrix(pattern, values.astype(float))
    for batch in (1, 2, 3, 4, 5, 8, 9, 31, 64, 65, 200):
        x, g = (rng.standard_normal((size, batch)).astype(dtype) for size in reversed(pattern.shape))
        unit = 8 * np.finfo(dtype).eps
        for by_batch in (False, True):
            bound = unit * (np.abs(W) @ np.abs(x) + 1e-30)
            assert (np.abs(spmm(pattern, values, x, by_batch=by_batch) - W @ x.astype(float)) <= bound).all()
            bound = unit * (np.abs(W.T) @ np.abs(g) + 1e-30)
            found = spmm(pattern, values, g, transposed=True, by_batch=by_batch)
            assert (np.abs(found - W.T @ g.astype(float)) <= bound).all()
            exact = (g.astype(float) @ x.astype(float).T)[pattern.rows, pattern.indices]
            bound = unit * (np.abs(g) @ np.abs(x).T)[pattern.rows, pattern.indices]
            assert (np.abs(sddmm(pattern, g, x, by_batch=by_batch) - exact) <= bound).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_half_types_are_read_as_float32(shape: tuple[int, int, float], dtype: str) -> None:
    """To the last bit what is computed of the same numbers in float32, and of infinities, NaN and the smallest ones too."""
    rng, pattern = np.random.default_rng(9), pattern_of(*shape)
    half = np.dtype(getattr(ml_dtypes, dtype, dtype))
    values = rng.standard_normal(pattern.nnz).astype(half)
    values[:4] = [np.inf, -np.inf, np.nan, np.finfo(np.float16).smallest_subnormal][: len(values)]
    for batch in (1, 2, 3, 7, 16, 33, 130):
        x, g = (rng.standard_normal((size, batch)).astype(half) for size in reversed(pattern.shape))
        for by_batch in (False, True):
            for transposed, side in ((False, x), (True, g)):
                found, same = (
                    spmm(pattern, *both, transposed=transposed, by_batch=by_batch)
                    for both in ((values, side), (values.astype(np.float32), side.astype(np.float32)))
                )
                assert found.dtype == np.float32
                np.testing.assert_array_equal(found, same)
            same = sddmm(pattern, g.astype(np.float32), x.astype(np.float32), by_batch=by_batch)
            np.testing.assert_array_equal(sddmm(pattern, g, x, by_batch=by_batch), same)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_bias_is_added_last(shape: tuple[int, int, float], dtype: str) -> None:
    """To the last bit what is added to the product, infinities and NaN too, whose row alone they reach."""
    rng, pattern, kind = np.random.default_rng(11), pattern_of(*shape), np.dtype(getattr(ml_dtypes, dtype, dtype))
    values = rng.standard_normal(pattern.nnz).astype(kind)
    for batch in (1, 2, 7, 16, 33, 130):
        for transposed in (False, True):
            rows, depth = pattern.shape[:: -1 if transposed else 1]
            x, bias = (rng.standard_normal(size).astype(kind) for size in ((depth, batch), rows))
            bias[:3] = [np.inf, -0.0, np.nan][:rows]
            for by_batch in (False, True):
                without = spmm(pattern, values, x, transposed=transposed, by_batch=by_batch)
                found = spmm(pattern, values, x, transposed=transposed, by_batch=by_batch, bias=bias)
                np.testing.assert_array_equal(found, without + bias.astype(without.dtype)[:, None])


@pytest.mark.parametrize("shape", [(60, 6500, 0.05), (40, 6500, 0.01), (3000, 2100, 0.004), (2100, 300, 0.2)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_tiles_that_are_packed_some_at_a_time(shape: tuple[int, int, float], dtype: str) -> None:
    """More of them than a second cache holds, panels that are larger than one, which are read often or not: right, at any
    number of threads."""
    import torch  # noqa: F401 - it brings the pool

    rng, pattern, batch = np.random.default_rng(5), pattern_of(*shape), 611
    values = rng.standard_normal(pattern.nnz).astype(dtype)
    W, unit = matrix(pattern, values.astype(float)), 16 * np.finfo(dtype).eps
    x, g = (rng.standard_normal((size, batch)).astype(dtype) for size in reversed(pattern.shape))
    wanted = [(W, x), (W.T, g), (g, x.T), (g, np.ones((batch, 1)))]
    exact = [one.astype(float) @ other.astype(float) for one, other in wanted]
    bounds = [unit * (np.abs(one) @ np.abs(other)) for one, other in wanted]
    sampled = pattern.rows, pattern.indices
    for by_batch in (False, True):
        of_threads = []
        for threads in (1, 2, 3):
            sums = np.full(shape[0], np.nan, dtype)
            how: dict[str, Any] = {"by_batch": by_batch, "threads": threads}
            found = [spmm(pattern, values, x, **how), spmm(pattern, values, g, transposed=True, **how)]
            found += [sddmm(pattern, g, x, sums=sums, **how), sums]
            of_threads.append(found)
        for place, products in enumerate(zip(*of_threads, strict=True)):
            entry = sampled if place == 2 else (slice(None), 0) if place == 3 else slice(None)
            assert (np.abs(products[0] - exact[place][entry]) <= bounds[place][entry]).all()
            for product in products[1:]:
                np.testing.assert_array_equal(product, products[0])


def test_bits_do_not_depend_on_threads_nor_on_checks() -> None:
    import torch  # noqa: F401 - it brings the pool

    rng, pattern = np.random.default_rng(2), pattern_of(700, 500, 0.3)
    values = rng.standard_normal(pattern.nnz).astype(np.float32)
    for batch in (1, 24, 100):
        x, g = (rng.standard_normal((size, batch)).astype(np.float32) for size in reversed(pattern.shape))
        one = [spmm(pattern, values, x, threads=1), sddmm(pattern, g, x, threads=1)]
        for threads in (2, 3, 8):
            np.testing.assert_array_equal(spmm(pattern, values, x, threads=threads), one[0])
            np.testing.assert_array_equal(sddmm(pattern, g, x, threads=threads), one[1])
        np.testing.assert_array_equal(spmm(pattern, values, x, checked=False), one[0])


@pytest.mark.parametrize("depth", [40, 64, 128, 200, 768])
@pytest.mark.parametrize("scattered", [False, True], ids=["even", "in two heaps"])
def test_one_vector_by_windows_or_number_by_number(depth: int, scattered: bool) -> None:
    """Rows of all densities, whose next connections lie within a window of x, or now and then far from each other."""
    rng = np.random.default_rng(8)
    mask = rng.random((60, depth)) < np.linspace(0, 1, 60)[:, None]
    mask[:, depth // 8 : -(depth // 8)] &= not scattered
    pattern = SparsityPattern.from_mask(mask)
    values = rng.standard_normal(pattern.nnz).astype(np.float32)
    x, g = (rng.standard_normal((size, 1)).astype(np.float32) for size in (depth, 60))
    W, live = matrix(pattern, values), rng.integers(depth)
    y = spmm(pattern, values, x)
    assert (np.abs(y - W @ x.astype(float)) <= 8 * np.finfo(np.float32).eps * (np.abs(W) @ np.abs(x))).all()
    np.testing.assert_array_equal(spmm(pattern, values, x, checked=False), y)
    np.testing.assert_array_equal(sddmm(pattern, g, x), (g * x.T)[mask])
    x[live] = np.nan  # which reaches the rows that it is connected to, and no other
    np.testing.assert_array_equal(np.isnan(spmm(pattern, values, x))[:, 0], mask[:, live])


def test_what_is_not_a_number_reaches_only_what_it_is_connected_to() -> None:
    pattern = SparsityPattern.from_mask([[1, 0, 1], [0, 1, 0]])
    x = np.array([[1.0], [np.nan], [2.0]], np.float32)
    for batch in (1, 3, 40):
        y = spmm(pattern, np.ones(3, np.float32), np.tile(x, (1, batch)), by_batch=batch == 40)
        assert (y[0] == 3).all()
        assert np.isnan(y[1]).all()


@pytest.mark.parametrize("batch", [1, 3, 7, 16, 64, 130])
@pytest.mark.parametrize("which", [slice(1, None, 3), slice(5, 6), slice(-1, None)], ids=["a third", "one", "the last"])
def test_indices_beyond_the_end_touch_no_memory_of_others(batch: int, which: slice) -> None:
    pattern = pattern_of(40, 30, 0.5)
    rng = np.random.default_rng(3)
    values = rng.standard_normal(pattern.nnz).astype(np.float32)
    x = rng.standard_normal((30, batch)).astype(np.float32)
    before = spmm(pattern, values, x)
    halves, half_x = values.astype(np.float16), x.astype(np.float16)
    for name, wrong in itertools.product(("indices", "indptr"), (-1, 2**31 - 1)):
        bad: Any = object.__new__(SparsityPattern)
        bad.indptr, bad.indices, bad.shape = pattern.indptr.copy(), pattern.indices.copy(), pattern.shape
        getattr(bad, name)[which] = wrong
        assert spmm(bad, values, x, by_batch=True).shape == (40, batch)
        assert sddmm(bad, np.ones((40, batch), np.float32), x).shape == values.shape
        assert spmm(bad, halves, half_x).shape == (40, batch)
        bad_columns: Any = copy.copy(pattern)
        starts, outputs, order = (index.copy() for index in pattern.csc)
        order[which] = wrong
        vars(bad_columns)["csc"] = starts, outputs, order
        for some in (values, halves):
            g = np.ones((40, batch), some.dtype)
            assert spmm(bad_columns, some, g, transposed=True).shape == (30, batch)
        assert sddmm(bad, np.ones((40, batch), np.float16), half_x).shape == values.shape
    np.testing.assert_array_equal(spmm(pattern, values, x), before)


@pytest.mark.parametrize("batch", [3, 16, 64, 130])
def test_an_index_beyond_the_end_is_taken_for_the_last(batch: int) -> None:
    """Each on its own, and none of those that are looked at with it."""
    pattern, rng = pattern_of(40, 30, 0.9), np.random.default_rng(12)
    values, g = (rng.standard_normal(size).astype(np.float32) for size in (pattern.nnz, (40, batch)))
    for side, x in (("indices", rng.standard_normal((30, batch)).astype(np.float32)), ("order", g)):
        bad: Any = copy.copy(pattern)
        wrong, right = (
            index.copy() for index in ((pattern.indices,) * 2 if side == "indices" else (pattern.csc[2],) * 2)
        )
        wrong[7::20], right[7::20] = 2**31 - 1, (29 if side == "indices" else pattern.nnz - 1)
        found = []
        for index in (wrong, right):
            if side == "indices":
                bad = object.__new__(SparsityPattern)
                bad.indptr, bad.indices, bad.shape = pattern.indptr, index, pattern.shape
            else:
                vars(bad)["csc"] = (*pattern.csc[:2], index)
            found.append(spmm(bad, values, x, transposed=side == "order"))
            if side == "indices":
                found[-1] = np.concatenate([found[-1].ravel(), sddmm(bad, g, x)])
        np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-5)


def test_threads_of_python_may_call_at_once() -> None:
    rng, pattern = np.random.default_rng(4), pattern_of(300, 200, 0.3)
    values, x = rng.standard_normal(pattern.nnz), rng.standard_normal((200, 33))
    expected, wrong = spmm(pattern, values, x, threads=1), []

    def work() -> None:
        for _ in range(20):
            if not np.array_equal(spmm(pattern, values, x), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


FORKED = """
import os, sys
import torch
from maskedlinear.torch import SparseLinear
layer = SparseLinear(400, 300, mask=torch.rand(300, 400) < 0.3)
x = torch.randn(64, 400)
before = layer(x)
child = os.fork()
if not child:
    os._exit(0 if torch.equal(layer(x), before) else 7)  # a pool's threads stay in the parent
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_computes_alone_and_the_same() -> None:
    code = "import warnings; warnings.simplefilter('ignore')\n" + FORKED
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


def test_without_llvm_everything_works_as_before() -> None:
    code = """
import sys
sys.modules["llvmlite"] = None
import torch
from maskedlinear import kernels
from maskedlinear.torch import SparseLinear
assert not kernels.is_available()
assert "pip install 'maskedlinear[cpu]'" in str(kernels.info()), kernels.info()
layer = SparseLinear(20, 10, mask=torch.rand(10, 20) < 0.5)
x = torch.randn(3, 20)
torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
try:
    kernels.spmm
except ImportError as error:
    assert "maskedlinear[cpu]" in str(error)
else:
    raise SystemExit(1)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


def test_info_says_what_is_used_and_what_was_compiled() -> None:
    pattern = pattern_of(8, 8, 0.5)
    spmm(pattern, np.ones(pattern.nnz), np.ones((8, 4)))
    info = kernels.info()
    assert info.available
    assert f"registers of {info.register_bytes} bytes" in str(info)
    assert any(kind.startswith("spmm float64") for kind, _ in info.compiled)


@pytest.mark.parametrize("register_bytes", [16, 64])
def test_other_widths_of_registers_give_the_same_numbers(register_bytes: int) -> None:
    """NEON's and AVX-512's kernels on this machine: LLVM makes such vectors of the registers that there are."""
    code = f"""
import sys
sys.path.insert(0, {os.fspath(Path(__file__).parent)!r})
import numpy as np
from maskedlinear.kernels import _engine, _permute
here = _engine.host()
if {register_bytes} == 64:  # windows of x as well, lane by lane
    _engine.Host.way = _permute.WAYS["permute_any"]
_engine.host = lambda: here._replace(register_bytes={register_bytes})
from test_kernels import matrix, pattern_of, sddmm, spmm
rng, pattern = np.random.default_rng(5), pattern_of(70, 90, 0.4)
for dtype, tolerance in (("float32", 1e-4), ("float64", 1e-12)):
    values = rng.standard_normal(pattern.nnz).astype(dtype)
    W = matrix(pattern, values)
    for batch in (1, 5, 31, 150):
        x, g = (rng.standard_normal((size, batch)).astype(dtype) for size in (90, 70))
        for by_batch in (False, True):
            np.testing.assert_allclose(spmm(pattern, values, x, by_batch=by_batch), W @ x, atol=tolerance)
            exact = (g @ x.T)[pattern.rows, pattern.indices]
            np.testing.assert_allclose(sddmm(pattern, g, x, by_batch=by_batch), exact, atol=tolerance)
"""
    subprocess.run([sys.executable, "-c", code], timeout=300, check=True)


@needs_x86
@pytest.mark.parametrize("processor", ["skylake-avx512", "znver4"])
def test_avx512_keeps_a_whole_tile_in_registers(processor: str) -> None:
    """Compiled for processors that this may not be: no sum leaves its register in the loop over connections.

    Nor is x read at the sum of two registers, which Intel's processors make two instructions of.
    """
    llvm = _engine.llvm
    module = _engine.ir.Module()
    module.triple = llvm.get_default_triple()
    _engine.host()
    _rows.spmm_task(module, "task", _rows.Shape(16), "float32", 128, 0, checked=True, ordered=False)
    parsed = llvm.parse_assembly(str(module))
    machine = llvm.Target.from_default_triple().create_target_machine(cpu=processor, opt=2, features="-prefer-256-bit")
    assembly = machine.emit_assembly(parsed)
    assert len(re.findall(r"vfmadd231ps\s.*\(.*zmm", assembly)) == 8
    assert len(re.findall(r"vfmadd231ps\s+\d*\(%\w+\), %zmm", assembly)) == 8


@needs_x86
def test_a_window_is_picked_from_registers() -> None:
    """Two pairs of registers and four, compiled for a processor that this may not be."""
    llvm, module = _engine.llvm, _engine.ir.Module()
    module.triple = llvm.get_default_triple()
    _engine.host()
    way = _permute.WAYS["permute_avx512"]
    _vectors.vector_task(module, "task", _rows.Shape(16), "float32", checked=True, ordered=False, way=way)
    machine = llvm.Target.from_default_triple().create_target_machine(cpu="znver4", opt=2, features="-prefer-256-bit")
    assembly = machine.emit_assembly(llvm.parse_assembly(str(module)))
    assert len(re.findall(r"vperm[it]2ps", assembly)) == 6


def test_panels_are_asked_for_where_they_are_needed_and_nowhere_else() -> None:
    pattern = pattern_of(5, 6, 0.5)
    x, values = np.arange(6, dtype=np.float32), np.ones(pattern.nnz, np.float32)
    y, room_that_is_not_read = np.empty(5, np.float32), np.full(64, np.nan, np.float32)
    given = {"starts": address(pattern.indptr), "across": address(pattern.indices), "values": address(values)}
    sides = {"right": address(x), "out": address(y)}
    kernels.spmm("float32", (5, 6), 1, pattern.nnz, **given, **sides, panels=address(room_that_is_not_read))
    np.testing.assert_array_equal(y, matrix(pattern, values) @ x)
    with pytest.raises(ValueError, match="panels must be given for float16 and a batch of 1"):
        kernels.spmm("float16", (5, 6), 1, pattern.nnz, **given, **sides)
    with pytest.raises(ValueError, match="panels must be given for float32 and a batch of 3"):
        kernels.spmm("float32", (5, 6), 3, pattern.nnz, **given, **sides, right_by_batch=True)


def test_a_pool_is_looked_for_again_only_when_modules_were_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    monkeypatch.setattr(_openmp, "_found", {})
    monkeypatch.setattr(_openmp, "_looked", -1)
    monkeypatch.setattr(_openmp, "_loaded", lambda: looks.append(1) or [])
    assert _openmp.library() == _openmp.library() == ("", 0)
    assert len(looks) == 1
    monkeypatch.setitem(sys.modules, "a_module_that_brings_a_pool", sys)
    assert _openmp.library() == ("", 0)
    assert len(looks) == 2
