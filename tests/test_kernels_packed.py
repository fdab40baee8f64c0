"""The packed layout and its kernel: every lowering, by what it computes; AVX-512's by the code that LLVM makes of it."""

import re

import numpy as np
import pytest

from helpers import needs_kernels, needs_packing, needs_x86
from maskedlinear import masks
from maskedlinear.kernels._packed import MOST_STEPS, PADDING, Layout
from maskedlinear.pattern import SparsityPattern

pytest.importorskip("llvmlite")

import llvmlite.binding as llvm
from llvmlite import ir

from maskedlinear.kernels import _engine, _packing, _permute, is_available
from maskedlinear.kernels._packing import PackedMatrix

pytestmark = needs_kernels
HERE = ["permute_any"]
if is_available() and (way := _engine.host().way) is not None:
    HERE += ["permute_avx2"] * (way.kind == "permute_avx512")  # which any such processor has too
    HERE.append(way.kind)
SHAPES = [(16, 65), (37, 100), (129, 257)]


def random_pattern(shape, live, seed=0):
    mask = np.random.default_rng(seed).random(shape) < live
    mask[-1, -1] = True
    return SparsityPattern.from_mask(mask)


def packed(pattern, values, kind):
    way = _permute.WAYS[kind]
    return PackedMatrix(Layout.of(pattern, way.lanes, way.window), values, way)


def times(matrix, x, bias=None, threads=1):
    y = np.full((len(x), matrix.shape[0]), np.nan, np.float32)
    where = 0 if bias is None else bias.ctypes.data
    matrix.times(x.ctypes.data, y.ctypes.data, len(x), bias=where, threads=threads)
    return y


@pytest.mark.parametrize("kind", HERE)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_product_is_that_of_the_dense_matrix(kind, shape):
    rng = np.random.default_rng(1)
    for live in (0.02, 0.3, 1.0):
        pattern = random_pattern(shape, live)
        values, bias = rng.standard_normal(pattern.nnz, np.float32), rng.standard_normal(shape[0], np.float32)
        dense = np.zeros(shape)
        dense[pattern.rows, pattern.indices] = values
        matrix = packed(pattern, values, kind)
        for batch in (1, 3) if kind == "permute_any" else range(1, _packing.MOST_VECTORS + 1):
            x = rng.standard_normal((batch, shape[1]), np.float32)
            bound = 1e-6 * (1 + np.abs(x).astype(np.float64) @ np.abs(dense).T) * 4
            y = times(matrix, x)
            assert (np.abs(y - x.astype(np.float64) @ dense.T) <= bound).all()
            assert (times(matrix, x, bias) == y + bias).all()
            assert (times(matrix, x, bias, threads=2) == y + bias).all()  # the same bits
            assert all((times(matrix, x[one : one + 1]) == y[one]).all() for one in range(batch))


@pytest.mark.parametrize("kind", HERE)
def test_nan_and_infinity_reach_only_what_they_are_connected_to(kind):
    pattern = random_pattern((21, 70), 0.3)
    matrix, mask = packed(pattern, np.ones(pattern.nnz, np.float32), kind), pattern.to_mask()
    for number in (np.nan, np.inf, -np.inf):
        for column in range(70):
            x = np.ones((1, 70), np.float32)
            x[0, column] = number
            expected = np.where(mask[:, column], number, mask.sum(1))
            np.testing.assert_array_equal(times(matrix, x)[0], expected)


@pytest.mark.parametrize(("lanes", "window"), [(8, 16), (16, 32)])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_layout_has_each_connection_once_and_stays_within_x(lanes, window, shape):
    for live in (0.05, 0.3, 1.0):
        pattern = random_pattern(shape, live, seed=2)
        layout = Layout.of(pattern, lanes, window)
        groups = -(-shape[0] // lanes)
        counts, starts, rows = np.split(layout.groups, [MOST_STEPS, MOST_STEPS + 2], 1)
        assert (layout.columns >= 0).all()
        assert (layout.columns <= shape[1] - window).all()
        assert layout.indices[layout.indices != PADDING].max() < window
        assert (np.flatnonzero(layout.indices != PADDING) == np.sort(layout.places)).all()
        assert sorted(rows.ravel()[: shape[0]]) == list(range(shape[0]))
        assert (rows.ravel()[shape[0] :] == shape[0]).all()
        assert (np.diff(pattern.to_mask().sum(1)[rows.ravel()[: shape[0]]]) <= 0).all()
        taken = np.stack([counts @ np.arange(MOST_STEPS, 0, -1), counts.sum(1)], 1)
        assert (starts == np.cumsum(taken, 0) - taken).all()
        assert tuple(taken.sum(0)) == (len(layout.indices), len(layout.columns))
        heights = np.repeat(np.tile(np.arange(MOST_STEPS, 0, -1), groups), counts.ravel())
        piece = np.repeat(np.arange(len(heights)), heights)  # of each step
        group = np.repeat(np.repeat(np.arange(groups), MOST_STEPS), counts.ravel())
        step, lane = np.nonzero(layout.indices != PADDING)
        found = np.zeros(shape, int)
        column = layout.columns[piece[step]] + layout.indices[step, lane]
        np.add.at(found, (rows[group[piece[step]], lane], column), 1)
        assert (found == pattern.to_mask()).all()
        where = rows.ravel().argsort()[pattern.rows]  # a connection's lane, of all
        own = piece[layout.places // lanes]
        assert (group[own] * lanes + layout.places % lanes == where).all()
        assert (layout.columns[own] + layout.indices.ravel()[layout.places] == pattern.indices).all()


def test_rows_that_are_done_go_on_within_the_window():
    """So few lanes idle, whether rows have as many connections or not: those with as many are together."""
    for live, fill in ((0.5, 0.9), (0.2, 0.75), (0.1, 0.6), (0.05, 0.46)):
        layout = Layout.of(random_pattern((768, 768), live), 16, 32)
        assert layout.fill > fill
    often = np.random.default_rng(0).lognormal(-1.4, 0.6, (768, 1))
    uneven = SparsityPattern.from_mask(np.random.default_rng(1).random((768, 768)) < often)
    assert Layout.of(uneven, 16, 32).fill > 0.75
    pattern = random_pattern((768, 768), 0.1)
    steps = len(Layout.of(pattern, 16, 32).indices)
    assert Layout.of(pattern, 16, 32, steps) is not None
    assert Layout.of(pattern, 16, 32, steps - 1) is None


@needs_packing
def test_what_is_thin_or_small_is_not_packed():
    for pattern in (SparsityPattern.full((4, 64)), SparsityPattern.full((64, 4)), random_pattern((999, 999), 0.001)):
        assert PackedMatrix.of(pattern, np.ones(pattern.nnz, np.float32)) is None
    pattern = SparsityPattern.from_mask(masks.random((256, 256), sparsity=0.9, seed=0))
    assert PackedMatrix.of(pattern, np.ones(pattern.nnz, np.float32)).fill > 0.3


def assembly(machine, batch):
    module = ir.Module()
    module.triple = llvm.get_default_triple()
    _permute.permute_task(module, "task", _permute.WAYS["permute_avx512"], batch)
    return machine.emit_assembly(llvm.parse_assembly(str(module)))


def on_stack(code):
    """Return the moves of registers to and from the stack."""
    return re.findall(r"zmm\d+, -?\d*\(%r[sb]p|\(%r[sb]p[^\n]*zmm", code)


@needs_x86
@pytest.mark.parametrize("processor", ["znver4", "skylake-avx512"])
def test_with_avx512_numbers_are_picked_by_one_instruction_and_stay_in_registers(processor):
    target = llvm.Target.from_default_triple()
    machine = target.create_target_machine(opt=2, cpu=processor, features="")
    for batch in (1, _packing.MOST_VECTORS):
        code = assembly(machine, batch)
        steps = MOST_STEPS * (MOST_STEPS + 1) // 2
        assert len(re.findall(r"vperm[it]2ps\s.*zmm", code)) == steps * batch
        assert len(re.findall(r"vfmadd\w+ps\s.*zmm", code)) == steps * batch
        assert len(on_stack(code)) == batch  # a group's sums, and nothing else
    assert len(on_stack(assembly(machine, 16))) > 16  # too many for the registers: this would be seen
