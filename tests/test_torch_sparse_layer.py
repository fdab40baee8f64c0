"""The layer in the sparse form: what it is made of, its states, and the conversions between the two forms."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import nn

from maskedlinear import masks
from maskedlinear.pattern import SparsityPattern
from maskedlinear.torch import MaskedLinear, SparseLinear
from maskedlinear_torch._products import DevicePattern
from test_torch_sparse import MASK, PATTERN, layer_and_x, matrix


def test_forms_convert_without_loss() -> None:
    masked = MaskedLinear(5, 6, mask=MASK, init_fan_in="full", dtype=torch.bfloat16).eval()
    masked.bias.requires_grad_(False)
    sparse = SparseLinear.from_masked(masked)
    assert (sparse.training, sparse.weight_values.requires_grad, sparse.bias.requires_grad) == (False, True, False)
    assert sparse.pattern == PATTERN
    assert torch.equal(sparse.weight_values, masked.weight[masked.mask])
    back = sparse.to_masked()
    assert torch.equal(back.mask, masked.mask)
    assert torch.equal(back.weight, masked.masked_weight)
    assert torch.equal(back.bias, masked.bias)
    assert (back.init_fan_in, back.training, back.bias.requires_grad) == ("full", False, False)
    assert SparseLinear.from_masked(MaskedLinear(5, 6, bias=False, mask=MASK)).bias is None
    with pytest.raises(TypeError, match="from_masked takes a MaskedLinear; got Linear: make one with"):
        SparseLinear.from_masked(nn.Linear(5, 6))  # type: ignore[arg-type]


def test_from_edges_and_from_scipy(rng: np.random.Generator) -> None:
    weight = rng.standard_normal((6, 5)) * MASK
    to, of = np.nonzero(MASK)
    shuffle = rng.permutation(len(to))
    values = torch.tensor(weight[to, of][shuffle])
    layer = SparseLinear.from_edges(to[shuffle], of[shuffle], (6, 5), values, torch.arange(6.0).double())
    x = torch.randn(3, 5).double()
    torch.testing.assert_close(layer(x), x @ torch.tensor(weight).T + torch.arange(6.0).double())
    from_scipy = SparseLinear.from_scipy(scipy.sparse.csc_array(weight), bias=np.arange(6.0), dtype=torch.float64)
    assert torch.equal(from_scipy.weight_values, layer.weight_values)
    torch.testing.assert_close(from_scipy(x), layer(x))
    assert SparseLinear.from_scipy(scipy.sparse.csc_array(weight)).weight_values.dtype is torch.float32
    assert torch.equal(SparseLinear.from_scipy(scipy.sparse.eye_array(2)).bias, torch.zeros(2))
    matrix = layer.to_scipy()
    np.testing.assert_array_equal(matrix.toarray(), weight)  # (out, in)
    matrix.data[:] = 0
    assert layer.weight_values.all()
    assert layer.bfloat16().to_scipy().dtype == np.float32
    drawn = SparseLinear.from_edges(to, of, (6, 5), bias=False, dtype=torch.float16)
    assert (drawn.bias, drawn.weight_values.dtype) == (None, torch.float16)
    with pytest.raises(ValueError, match=r"one entry for each of the 15 edges; got \(3,\)"):
        SparseLinear.from_edges(to, of, (6, 5), torch.zeros(3))
    with pytest.raises(ValueError, match=r"bias must have shape \(6,\), one entry an output; got \(5,\)"):
        SparseLinear.from_edges(to, of, (6, 5), values, torch.zeros(5))
    with pytest.raises(ValueError, match="a bias that is given needs values that are given"):
        SparseLinear.from_edges(to, of, (6, 5), bias=torch.zeros(6))


def test_what_the_layer_refuses() -> None:
    with pytest.raises(
        ValueError, match=r"a pattern must have the layer's shape .* = \(6, 5\); got \(5, 6\), which is its transpose"
    ):
        SparseLinear(5, 6, mask=SparsityPattern.from_mask(MASK.T))
    with pytest.raises(ValueError, match="0"):
        SparseLinear(5, 6, mask=0.5 * MASK)
    with pytest.raises(TypeError, match="a mask is passed as mask="):
        SparseLinear(5, 6, MASK)
    with pytest.raises(TypeError, match="must be a real floating-point dtype"):
        SparseLinear(5, 6, dtype=torch.int8)
    with pytest.raises(ValueError, match="must not be negative"):
        SparseLinear(-5, 6)
    with pytest.raises(ValueError, match="init_fan_in must be 'live' or 'full'"):
        SparseLinear(5, 6, init_fan_in="half")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "mask",
    [
        torch.tensor(MASK).bfloat16(),
        torch.tensor(MASK).float().requires_grad_(),
        torch.tensor(MASK).T.contiguous().T,
        MASK.astype(int).tolist(),
    ],
)
def test_masks_of_every_kind_of_tensor(mask: Any) -> None:
    assert SparseLinear(5, 6, mask=mask).pattern == PATTERN


@pytest.mark.parametrize(
    "mask", [MASK.T, 0.5 * MASK, torch.tensor(MASK).float().to_sparse(), torch.ones(6, 5, device="meta")]
)
def test_masks_are_refused_as_the_dense_form_refuses_them(mask: Any) -> None:
    messages = []
    for form in (MaskedLinear, SparseLinear):
        with pytest.raises(ValueError, match="a mask must") as caught:
            form(5, 6, mask=mask)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_edges_take_arrays_and_lists() -> None:
    to, of = MASK.nonzero()
    values, bias = np.arange(15.0), np.arange(6)
    for convert in (np.asarray, np.ndarray.tolist, torch.tensor):
        layer = SparseLinear.from_edges(to, of, (6, 5), convert(values), convert(bias))
        assert layer.weight_values.tolist() == values.tolist()
        assert layer.bias is not None
        assert layer.bias.tolist() == bias.tolist()
        assert layer.weight_values.dtype == (torch.float64 if convert is torch.tensor else torch.float32)
    assert SparseLinear.from_edges(to, of, (6, 5), values.tolist(), False).bias is None
    for wrong in ({"values": 1j * values}, {"values": values, "bias": 1j * bias}):
        with pytest.raises(TypeError, match=r"must be real; got torch\.complex128"):
            SparseLinear.from_edges(to, of, (6, 5), **wrong)
    with pytest.raises(TypeError, match="bias must be real"):
        SparseLinear.from_scipy(scipy.sparse.csr_array(MASK.astype(float)), 1j * bias)


def test_the_draw_is_scaled_to_the_live_inputs_of_each_row() -> None:
    mask = masks.random((400, 400), sparsity=0.9, seed=1)
    mask[0] = False
    torch.manual_seed(0)
    for init_fan_in, count in (("live", mask.sum(1)), ("full", np.full(400, 400))):
        layer = SparseLinear(400, 400, mask=mask, init_fan_in=init_fan_in)
        rows = layer.pattern.rows
        scaled = layer.weight_values.detach().numpy() * np.sqrt(count[rows])
        assert abs(scaled).max() <= 1.0001
        assert scaled.std() == pytest.approx(1 / np.sqrt(3), rel=0.02)
        assert abs(layer.bias[0]) <= 1 / 20


def test_without_a_mask_every_connection_is_there() -> None:
    layer = SparseLinear(5, 6)
    assert layer.weight_values.shape == (30,)
    x = torch.randn(2, 5)
    torch.testing.assert_close(layer(x), x @ layer.weight_values.reshape(6, 5).T + layer.bias)
    assert "connections=30, sparsity=0, bias=True" in repr(layer)


def test_a_state_brings_its_connections_along() -> None:
    layer, x = layer_and_x()
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer)
    assert set(state) == {"weight_values", "bias", "indptr", "indices"}
    other = SparseLinear(5, 6, mask=masks.random((6, 5), sparsity=0.2, seed=2))
    parameter = other.weight_values
    other(x).sum().backward()
    other.load_state_dict(state)
    assert other.weight_values is parameter, "an optimizer that has it still has it"
    assert other.weight_values.grad is None
    assert other.pattern == PATTERN
    assert torch.equal(other(x), layer(x))
    assigned = SparseLinear(5, 6, mask=masks.random((6, 5), sparsity=0.2, seed=2), device="meta")
    assigned.load_state_dict(state, assign=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": torch.zeros(15, dtype=torch.int32)}, "the inputs of a row must ascend"),
        (
            {"weight_values": torch.zeros(3)},
            r"as many values as connections; got 6 outputs, \(3,\) values and 15 connections",
        ),
        ({"indptr": torch.tensor([0, 15])}, "the inputs of a row must ascend|must have 6 outputs"),
        ({"indices": torch.zeros(15)}, "indices must be whole numbers"),
    ],
)
def test_a_state_that_is_no_pattern_is_refused_and_leaves_the_layer_alone(change: Any, message: str) -> None:
    layer, x = layer_and_x()
    before = layer(x)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(layer.state_dict() | change)
    assert torch.equal(layer(x), before)


def test_a_state_of_connections_alone_is_taken_as_a_whole_or_not_at_all() -> None:
    other = SparsityPattern.from_mask(masks.random((6, 5), sparsity=0.5, seed=8))
    state = SparseLinear(5, 6, pattern=other).state_dict()
    connections = {name: state[name] for name in ("indptr", "indices")}
    layer, x = layer_and_x()
    layer.load_state_dict(connections, strict=False)
    assert layer.pattern == other
    dense, x = layer.to_masked(), x.requires_grad_()
    found, wanted = (torch.autograd.grad(form(x).square().sum(), x)[0] for form in (layer, dense))
    torch.testing.assert_close(found, wanted)
    few = SparseLinear(5, 6, mask=masks.random((6, 5), sparsity=0.8, seed=8)).state_dict()
    for wrong, message in (
        ({"indices": state["indices"]}, "both indptr and indices, .* got indptr: NoneType, indices: Tensor"),
        ({"indptr": state["indptr"], "weight_values": state["weight_values"]}, "both indptr and indices"),
        ({name: few[name] for name in ("indptr", "indices")}, r"got 6 outputs, \(15,\) values and 6 connections"),
    ):
        before = copy.deepcopy(layer.state_dict())
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(wrong, strict=False)
        assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_state_with_wide_indices(assign: bool, device: str) -> None:
    layer, x = layer_and_x()
    state = {
        name: tensor.long() if tensor.dtype is torch.int32 else tensor for name, tensor in layer.state_dict().items()
    }
    made = SparseLinear(5, 6, mask=MASK[::-1].copy(), device=device)
    if device == "meta" and not assign:
        made.to_empty(device="cpu")
    made.load_state_dict(state, assign=assign)
    assert {made.indptr.dtype, made.indices.dtype, made.order.dtype} == {torch.int32}
    assert not list(made.buffers()), "so that no average touches them"
    x.requires_grad_()
    found, wanted = (torch.autograd.grad(form(x).square().sum(), x)[0] for form in (made, layer))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("meta", [True, False])
def test_a_layer_whose_tensors_are_emptied_keeps_its_connections(meta: bool) -> None:
    layer = SparseLinear(5, 6, mask=MASK, device="meta" if meta else None)
    layer._apply(lambda tensor: torch.full_like(tensor, 77, device="cpu"))  # what to_empty may find in memory
    assert layer.pattern == PATTERN
    expected = SparseLinear(5, 6, mask=MASK)
    assert all(torch.equal(getattr(layer, name), getattr(expected, name)) for name in DevicePattern._fields)


def test_forms_convert_on_the_meta_device() -> None:
    sparse = SparseLinear(5, 6, mask=MASK, device="meta")
    dense = sparse.to_masked()
    again = SparseLinear.from_masked(dense)
    for layer in (dense, again):
        assert all(parameter.is_meta for parameter in layer.parameters())
        layer.to_empty(device="cpu").reset_parameters()  # type: ignore[operator]
    assert again.pattern == PATTERN
    assert torch.equal(dense.mask, torch.tensor(MASK))


def test_a_conversion_draws_no_random_numbers() -> None:
    layer, _ = layer_and_x()
    before = torch.get_rng_state()
    SparseLinear.from_masked(layer.to_masked())
    assert torch.equal(torch.get_rng_state(), before)


def test_the_layer_moves_and_copies_as_a_module_does() -> None:
    layer, x = layer_and_x()
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    half = copy.deepcopy(layer).half()
    assert (half.indices.dtype, half.weight_values.dtype, half(x.half()).dtype) == (
        torch.int32,
        torch.float16,
        torch.float16,
    )
    typed = copy.deepcopy(layer).type(torch.bfloat16)
    assert typed.pattern == PATTERN
    assert {typed.indptr.dtype, typed.indices.dtype, typed.order.dtype} == {torch.int32}
    there = copy.deepcopy(layer).to("meta")
    assert there.pattern == PATTERN
    back = there.to_empty(device="cpu")
    back.reset_parameters()
    assert back.pattern == PATTERN
    assert back(x).isfinite().all()
    meta = SparseLinear(5, 6, mask=MASK, device="meta")
    meta = meta.to_empty(device="cpu")
    meta.load_state_dict(layer.state_dict())
    assert torch.equal(meta(x), y)
    empty = torch.func.functional_call(layer, {"weight_values": torch.zeros(15)}, (x,))
    assert torch.equal(empty, layer.bias.expand(4, 6))


def test_a_pattern_has_an_argument_of_its_own() -> None:
    for given in ({"pattern": PATTERN}, {"mask": PATTERN}, {"mask": MASK}):
        assert SparseLinear(5, 6, **given).pattern == PATTERN
    with pytest.raises(ValueError, match="takes a mask or a pattern; got both"):
        SparseLinear(5, 6, mask=MASK, pattern=PATTERN)
    with pytest.raises(TypeError, match=r"must be a maskedlinear\.pattern\.SparsityPattern; got ndarray: .* mask="):
        SparseLinear(5, 6, pattern=MASK)
    with pytest.raises(ValueError, match=r"= \(5, 6\); got \(6, 5\), which is its transpose"):
        SparseLinear(6, 5, pattern=PATTERN)


@pytest.mark.parametrize("prefix", ["", "0."])
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_with_the_earlier_name_of_the_weight_values_loads(prefix: str, assign: bool) -> None:
    layer, x = layer_and_x()
    earlier = {
        prefix + ("values" if name == "weight_values" else name): kept for name, kept in layer.state_dict().items()
    }
    names = set(earlier)
    other = SparseLinear(5, 6, mask=masks.random((6, 5), sparsity=0.2, seed=2))
    model = nn.Sequential(other) if prefix else other
    model.load_state_dict(earlier, assign=assign)
    assert set(earlier) == names, "the state is left as it was"
    assert other.pattern == PATTERN
    assert torch.equal(model(x), layer(x))


def test_values_can_be_parametrized_and_the_matrix_read() -> None:
    layer, x = layer_and_x()
    nn.utils.parametrize.register_parametrization(layer, "weight_values", nn.Softplus())
    values = nn.functional.softplus(layer.parametrizations.weight_values.original)  # type: ignore[union-attr]
    torch.testing.assert_close(layer.weight, matrix(values))
    torch.testing.assert_close(layer(x), nn.functional.linear(x, matrix(values), layer.bias))
    layer.weight.square().sum().backward()  # whoever reads the matrix trains the values
    gradient = layer.parametrizations.weight_values.original.grad  # type: ignore[union-attr]
    assert gradient is not None
    assert gradient.all()
    with torch.no_grad():
        torch.testing.assert_close(layer(x[0]), nn.functional.linear(x[0], matrix(values), layer.bias))
