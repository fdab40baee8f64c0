"""``SparsityPattern``: from masks, edges and scipy matrices, and what is refused."""

from __future__ import annotations

import pickle
import sys
import tracemalloc
from typing import Any

import numpy as np
import pytest
import scipy.sparse

from maskedlinear import masks
from maskedlinear.pattern import SparsityPattern


@pytest.mark.parametrize("shape", [(6, 5), (1, 1), (0, 4), (4, 0), (129, 257)], ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
def test_a_mask_goes_there_and_back(shape: tuple[int, int], sparsity: float) -> None:
    mask = masks.random(shape, sparsity=sparsity, seed=3)
    pattern = SparsityPattern.from_mask(mask)
    np.testing.assert_array_equal(pattern.to_mask(), mask)
    assert pattern.shape == shape
    assert pattern.nnz == mask.sum()
    assert pattern.sparsity == (1 - mask.mean() if mask.size else 0)
    expected = scipy.sparse.csr_array(mask)
    np.testing.assert_array_equal(pattern.indptr, expected.indptr)
    np.testing.assert_array_equal(pattern.indices, expected.indices)
    starts, outputs, order = pattern.csc
    transposed = scipy.sparse.csr_array(mask.T)
    np.testing.assert_array_equal(starts, transposed.indptr)
    np.testing.assert_array_equal(outputs, transposed.indices)
    np.testing.assert_array_equal(pattern.indices[order], np.sort(pattern.indices, kind="stable"))
    arrays = (pattern.indptr, pattern.indices, *pattern.csc, pattern.rows)
    assert all(array.dtype == np.int32 and not array.flags.writeable for array in arrays)
    assert pattern.nbytes == sum(array.nbytes for array in arrays[:-1])


def test_the_full_pattern_has_every_connection() -> None:
    for shape in ((3, 4), (0, 4), (3, 0)):
        assert SparsityPattern.full(shape) == SparsityPattern.from_mask(np.ones(shape))
    with pytest.raises(ValueError, match="connections"):
        SparsityPattern.full((2**16, 2**16))


def test_edges_in_any_order(rng: np.random.Generator) -> None:
    mask = masks.random((7, 9), sparsity=0.6, seed=1)
    to, of = np.nonzero(mask)
    shuffle = rng.permutation(len(to))
    pattern, order = SparsityPattern.from_edges(to[shuffle], of[shuffle], mask.shape)
    assert pattern == SparsityPattern.from_mask(mask)
    np.testing.assert_array_equal(to[shuffle][order], to)
    np.testing.assert_array_equal(of[shuffle][order], of)
    nothing, order = SparsityPattern.from_edges([], [], (3, 2))
    assert (nothing.nnz, order.shape) == (0, (0,))


def test_a_scipy_matrix_of_any_kind_keeps_its_explicit_zeros(rng: np.random.Generator) -> None:
    dense = rng.standard_normal((5, 4)) * masks.random((5, 4), sparsity=0.5)
    for kind in (scipy.sparse.csr_array, scipy.sparse.csc_matrix, scipy.sparse.coo_array, scipy.sparse.lil_matrix):
        pattern, values = SparsityPattern.from_scipy(kind(dense))
        assert pattern == SparsityPattern.from_mask(dense != 0)
        np.testing.assert_array_equal(values, dense[dense != 0])
    pattern, values = SparsityPattern.from_scipy(scipy.sparse.coo_array(([0.0, 2.0], ([1, 0], [1, 2])), shape=(2, 3)))
    np.testing.assert_array_equal(values, [2, 0])
    assert pattern.nnz == 2


def test_to_scipy_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = masks.random((5, 4), sparsity=0.5)
    pattern = SparsityPattern.from_mask(mask)
    values = np.arange(pattern.nnz, dtype=np.float32)  # the first of them 0
    matrix = pattern.to_scipy(values)
    assert (matrix.shape, matrix.dtype, matrix.nnz) == ((5, 4), np.float32, pattern.nnz)
    np.testing.assert_array_equal(matrix.toarray()[mask], values)
    back, kept = SparsityPattern.from_scipy(matrix)
    assert back == pattern
    np.testing.assert_array_equal(kept, values)
    matrix.data[:] = 7  # a copy
    assert values[0] == 0
    np.testing.assert_array_equal(pattern.to_scipy().toarray(), mask)
    assert pattern.to_scipy(values.astype(np.float16)).dtype == np.float32
    with pytest.raises(ValueError, match=r"one entry for each of the pattern's 10 connections; got shape \(3,\)"):
        pattern.to_scipy([1, 2, 3])
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    with pytest.raises(ModuleNotFoundError, match=r"to_scipy needs scipy, .* pip install scipy"):
        pattern.to_scipy()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: SparsityPattern([0, 2], [1, 1], 3),
            ValueError,
            "row 0 has 1 after 1: SparsityPattern.from_edges sorts",
        ),
        (
            lambda: SparsityPattern([0, 2, 3], [0, 2, 1], 2),
            ValueError,
            "an input must be one of the 2, from 0 to 1; got 2",
        ),
        (lambda: SparsityPattern([0, 1, 3], [0, 2, 1], 3), ValueError, "row 1 has 1 after 2"),
        (lambda: SparsityPattern([0, 2, 1], [0], 3), ValueError, "which falls"),
        (
            lambda: SparsityPattern([0, 2], [0], 3),
            ValueError,
            r"from 0 to the number of connections, 1; got one from 0 to 2",
        ),
        (lambda: SparsityPattern([], [], 3), ValueError, "one entry more than there are outputs|0 to 2"),
        (
            lambda: SparsityPattern([0, 1], [0.5], 3),
            TypeError,
            "indices must be whole numbers; got an array of dtype float64",
        ),
        (
            lambda: SparsityPattern([0], [], 2**31),
            ValueError,
            "has 0 to 2.*31 - 1 inputs, because its indices are int32",
        ),
        (lambda: SparsityPattern([0, 1], [2**40], 3), ValueError, r"indices must be below 2\*\*31"),
        (lambda: SparsityPattern.from_mask(np.ones(3)), ValueError, r"a mask must have shape \(out, in\); got \(3,\)"),
        (lambda: SparsityPattern.from_mask([[0.5]]), ValueError, "0"),
        (
            lambda: SparsityPattern.from_edges([0, 0], [1, 1], (1, 2)),
            ValueError,
            "input 1 to output 0 more than once, and 1 dup",
        ),
        (lambda: SparsityPattern.from_edges([0], [-1], (1, 2)), ValueError, "an input must be one of the 2, .* got -1"),
        (lambda: SparsityPattern.from_edges([1], [0], (1, 2)), ValueError, "an output must be one of the 1, .* got 1"),
        (
            lambda: SparsityPattern.from_edges([0, 1], [0], (2, 2)),
            ValueError,
            "equally long, .* 2 outputs and 1 inputs",
        ),
        (lambda: SparsityPattern.from_edges([[0]], [[0]], (2, 2)), ValueError, "must have one dimension"),
        (lambda: SparsityPattern.from_edges([True], [False], (2, 2)), TypeError, "must be whole numbers; got .* bool"),
        (lambda: SparsityPattern.from_edges([0], [0], (2.9, 2)), TypeError, "outputs must be a whole number; got 2.9"),  # type: ignore[arg-type]
        (lambda: SparsityPattern([0, 1], [0], 1.9), TypeError, "inputs must be a whole number; got 1.9"),  # type: ignore[arg-type]
        (lambda: SparsityPattern.full((2, 2.0)), TypeError, "inputs must be a whole number; got 2.0"),  # type: ignore[arg-type]
        (
            lambda: SparsityPattern.from_scipy(scipy.sparse.csr_array(np.array([[1 + 2j]]))),
            TypeError,
            "values are real; got a matrix of dtype complex128",
        ),
        (lambda: SparsityPattern.from_scipy(np.eye(2)), TypeError, "takes a scipy.sparse matrix or array; got ndarray"),
        (
            lambda: SparsityPattern.from_scipy(scipy.sparse.coo_array(([1.0, 1.0], ([0, 0], [0, 0])), shape=(1, 1))),
            ValueError,
            "more than once",
        ),
    ],
)
def test_what_is_no_pattern_is_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_more_connections_than_int32_counts_are_refused_before_any_is_looked_at() -> None:
    many = np.broadcast_to(np.int64(0), (2**31,))  # takes no memory
    with pytest.raises(ValueError, match=r"0 to 2\*\*31 - 1 connections"):
        SparsityPattern.from_edges(many, many, (1, 1))


def test_patterns_compare_and_pickle_without_what_is_derived_of_them() -> None:
    pattern = SparsityPattern.from_mask(masks.random((6, 5), sparsity=0.5))
    made = [pattern.derive(("framework", 1), lambda _, one, more=more: one + more) for more in (0, 1)]
    assert all(made)
    assert pattern.derived(("framework", 1)) == 1  # made the first time
    copy = pickle.loads(pickle.dumps(pattern))
    assert copy == pattern
    assert copy.derive(("framework", 1), lambda _, one: one + 2)
    assert copy.derived(("framework", 1)) == 3
    assert pattern != SparsityPattern.from_mask(masks.random((6, 5), sparsity=0.5, seed=1))
    assert pattern != "pattern"
    assert repr(pattern) == "SparsityPattern(5 -> 6, 15 connections, sparsity=0.5)"


def test_a_large_pattern_costs_what_its_connections_cost(rng: np.random.Generator) -> None:
    size, count = 100_000, 200_000
    flat = np.unique(rng.integers(0, size * size, count))
    tracemalloc.start()
    pattern, _ = SparsityPattern.from_edges(flat // size, flat % size, (size, size))
    pattern.csc  # noqa: B018
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 * count
    assert pattern.nnz == len(flat)


def test_the_places_of_connections_in_another_pattern(rng: np.random.Generator) -> None:
    one, other = (SparsityPattern.from_mask(rng.random((6, 9)) < 0.5) for _ in range(2))
    places = one.places_in(other)
    for place, row, column in zip(places, one.rows, one.indices, strict=True):
        if other.to_mask()[row, column]:
            assert (other.rows[place], other.indices[place]) == (row, column)
        else:
            assert place == -1
    assert (one.places_in(one) == np.arange(one.nnz)).all()
    none = SparsityPattern.from_mask(np.zeros((6, 9), bool))
    assert (one.places_in(none) == -1).all()
    assert none.places_in(one).shape == (0,)


def test_the_transposed_pattern_keeps_no_rows() -> None:
    pattern = SparsityPattern.from_mask(masks.random((6, 5), sparsity=0.5, seed=0))
    before = pattern.csc
    assert "rows" not in vars(pattern)  # four bytes a connection, of which a layer would keep 40
    again = SparsityPattern.from_mask(pattern.to_mask())
    assert len(again.rows) == 15
    for one, other in zip(before, again.csc, strict=True):
        np.testing.assert_array_equal(one, other)
