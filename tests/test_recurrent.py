"""Recurrent cells over graphs: the same outputs and gradients as torch's cells, dense and sparse, in both frameworks."""

from __future__ import annotations

import pickle
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from maskedlinear import flax as mf
from maskedlinear import masks
from maskedlinear.jax import masked_linear
from maskedlinear.pattern import SparsityPattern
from maskedlinear.torch import (
    SparseGRUCell,
    SparseLSTMCell,
    SparseRNNCell,
    expand,
    mask_model,
    regrow_model,
    set_masks,
    summary,
)

CELLS = [(nn.RNNCell, SparseRNNCell, 1), (nn.GRUCell, SparseGRUCell, 3), (nn.LSTMCell, SparseLSTMCell, 4)]
GRAPH = masks.bernoulli((6, 6), sparsity=0.6, seed=1)


def hidden(state: Any) -> torch.Tensor:
    return state[0] if isinstance(state, tuple) else state


@pytest.mark.parametrize(("dense_type", "sparse_type", "gates"), CELLS)
def test_a_sparse_cell_is_the_masked_cell(dense_type: Any, sparse_type: Any, gates: int) -> None:
    torch.manual_seed(0)
    cell = mask_model(dense_type(3, 6, dtype=torch.float64))
    set_masks(cell, {"weight_hh": np.tile(GRAPH, (gates, 1)), "weight_ih": np.ones((6 * gates, 3))})
    sparse = sparse_type.from_cell(cell)
    assert sparse.recurrent_layer.pattern.nnz == gates * GRAPH.sum()
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    state, own = None, None
    for step in x:
        state, own = cell(step, state), sparse(step, own)
    torch.testing.assert_close(own, state, rtol=1e-12, atol=1e-12)
    outputs, last = sparse.over_time(x)
    torch.testing.assert_close(last, own, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(outputs[-1], hidden(own), rtol=1e-12, atol=1e-12)
    hidden(state).sin().sum().backward()
    hidden(last).sin().sum().backward()
    pattern = sparse.recurrent_layer.pattern
    want = cell.weight_hh.grad[pattern.rows.astype(np.int64), pattern.indices.astype(np.int64)]
    torch.testing.assert_close(sparse.recurrent_layer.weight_values.grad, want, rtol=1e-10, atol=1e-12)
    back = sparse.to_cell()
    assert type(back) is dense_type
    torch.testing.assert_close(back(x[0]), sparse(x[0]), rtol=1e-12, atol=1e-12)
    copy = pickle.loads(pickle.dumps(sparse))
    assert torch.equal(hidden(copy(x[0])), hidden(sparse(x[0])))


@pytest.mark.parametrize(("dense_type", "sparse_type", "gates"), CELLS)
def test_a_graph_is_that_of_every_gate(dense_type: Any, sparse_type: Any, gates: int) -> None:
    for given in (GRAPH, SparsityPattern.from_mask(GRAPH), np.tile(GRAPH, (gates, 1))):
        cell = sparse_type(3, 6, False, recurrent=given, inputs=np.eye(6, 3, dtype=bool))
        assert np.array_equal(cell.recurrent_layer.pattern.to_mask(), np.tile(GRAPH, (gates, 1)))
        assert cell.input_layer.pattern.nnz == 3 * gates
        assert cell.to_cell().bias is False
    wide = sparse_type(3, 2, recurrent=[[1, 1], [0, 1]])
    assert hidden(wide(torch.zeros(3))).shape == (2,)
    with pytest.raises(
        ValueError, match=r"recurrent must be a mask or a pattern of shape \(hidden, recurrent\) = \(6, 6\)"
    ):
        sparse_type(3, 6, recurrent=GRAPH[:5])
    with pytest.raises(TypeError, match=f"takes a {dense_type.__name__}; got Linear"):
        sparse_type.from_cell(nn.Linear(3, 6))


def test_an_edge_of_a_graph_goes_from_column_to_row_and_states_leak() -> None:
    mask = np.zeros((3, 3), bool)
    mask[2, 0] = True  # from node 0 to node 2
    cell = SparseRNNCell(1, 3, bias=False, nonlinearity="relu", recurrent=mask, leak=0.25, dtype=torch.float64)
    with torch.no_grad():
        cell.recurrent_layer.weight_values.fill_(2)
        cell.input_layer.weight.zero_()
    new = cell(torch.zeros(1, dtype=torch.float64), torch.tensor([1.0, 0, 0], dtype=torch.float64))
    assert new.tolist() == [0.75, 0, 0.5]
    with pytest.raises(ValueError, match="no leak"):
        cell.to_cell()
    for leak in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"leak is the share of the new state"):
            SparseRNNCell(1, 3, recurrent=mask, leak=leak)
    with pytest.raises(ValueError, match="nonlinearity must be"):
        SparseRNNCell(1, 3, recurrent=mask, nonlinearity="sin")  # type: ignore[arg-type]


def test_cells_are_models_of_sparse_layers() -> None:
    cell = SparseGRUCell(3, 6, recurrent=GRAPH)
    names = [row.name for row in summary(cell).rows]
    assert "recurrent_layer" in names
    hidden(cell(torch.randn(4, 3))).sum().backward()
    before = cell.recurrent_layer.pattern
    regrow_model(cell, 0.3, seed=1)
    assert cell.recurrent_layer.pattern.nnz == before.nnz
    assert cell.recurrent_layer.pattern != before
    dense = expand(cell)
    x = torch.randn(4, 3)
    torch.testing.assert_close(dense(x), cell(x))


def test_flax_cells_take_a_sparse_layer_in_their_place() -> None:
    pattern = SparsityPattern.from_mask(GRAPH)
    cell = nnx.SimpleCell(3, 6, rngs=nnx.Rngs(0))
    sparse = nnx.SimpleCell(3, 6, rngs=nnx.Rngs(0))
    sparse.dense_h = mf.SparseLinear(6, 6, pattern=pattern, use_bias=False, rngs=nnx.Rngs(1))
    kernel = np.zeros((6, 6), np.float32)
    kernel[pattern.indices, pattern.rows] = sparse.dense_h.weight_values[...]
    cell.dense_h.kernel[...] = jnp.asarray(kernel)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 3)), jnp.float32)
    np.testing.assert_allclose(nnx.RNN(sparse)(x), nnx.RNN(cell)(x), rtol=1e-5, atol=1e-6)
    gradient = nnx.grad(lambda model: (nnx.RNN(model)(x) ** 2).sum())(sparse)["dense_h"]["weight_values"][...]
    want = nnx.grad(lambda model: (nnx.RNN(model)(x) ** 2).sum())(cell)["dense_h"]["kernel"][...]
    np.testing.assert_allclose(gradient, np.asarray(want)[pattern.indices, pattern.rows], rtol=1e-4, atol=1e-5)


def test_a_weight_is_masked_once_before_a_scan_and_not_at_each_step() -> None:
    def states(weight: jax.Array, inputs: jax.Array) -> jax.Array:
        return jax.lax.scan(
            lambda h, x: (jnp.tanh(x + masked_linear(h, weight, GRAPH)), None), jnp.zeros((5, 6)), inputs
        )[0]

    program = jax.jit(states).lower(jnp.ones((6, 6)), jnp.ones((4, 5, 6))).compile().as_text()
    (name,) = re.findall(r"body=%([\w.]+)", program)
    body = program.split(f"%{name} ")[1].split("\n}")[0]
    made = [line for line in body.splitlines() if " = f32[6,6]" in line and "get-tuple-element(" not in line]
    assert "f32[5,6]" in body
    assert made == [], "a matrix is made in the loop"
    assert " select(" in program, "and it is masked before"
