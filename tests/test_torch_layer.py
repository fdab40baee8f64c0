"""``maskedlinear.torch.MaskedLinear``: a drop-in nn.Linear, its mask, its states, its conversions."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from maskedlinear import masks
from maskedlinear.torch import MaskedLinear, freeze_masked, masked_linear

MASK = masks.random((5, 7), sparsity=0.5, seed=1)
LIVE = torch.asarray(MASK)


@pytest.fixture
def layer() -> MaskedLinear:
    torch.manual_seed(0)
    return MaskedLinear(7, 5, mask=MASK)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 7, generator=torch.Generator().manual_seed(1))


def test_without_a_mask_it_is_linear_bit_for_bit(x: torch.Tensor) -> None:
    torch.manual_seed(0)
    dense, state = nn.Linear(7, 5), torch.get_rng_state()
    torch.manual_seed(0)
    layer = MaskedLinear(7, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(layer.weight, dense.weight)
    assert torch.equal(layer(x), dense(x))
    assert isinstance(layer, nn.Linear)
    assert layer.sparsity == 0


def test_forward_is_the_function(layer: MaskedLinear, x: torch.Tensor) -> None:
    assert torch.equal(layer(x), masked_linear(x, layer.weight, LIVE, layer.bias))
    assert torch.equal(layer.masked_weight, torch.where(LIVE, layer.weight, 0.0))
    assert layer.sparsity == 17 / 35
    assert "sparsity=0.4857" in repr(layer)


def test_empty_and_full_masks(layer: MaskedLinear, x: torch.Tensor) -> None:
    layer.set_mask(torch.zeros(5, 7))
    assert torch.equal(layer(x), layer.bias.expand(3, 5))
    layer.set_mask(torch.ones(5, 7))
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    with pytest.warns(UserWarning, match="zero-element tensors"):  # nn.Linear says so as well
        assert MaskedLinear(0, 0).sparsity == 0


def test_set_mask_holds_at_once_and_restores_bit_for_bit(layer: MaskedLinear, x: torch.Tensor) -> None:
    buffer, weight, before = layer.mask, layer.weight.clone(), layer(x)
    layer.set_mask(~LIVE)
    assert torch.equal(layer(x), masked_linear(x, weight, ~LIVE, layer.bias))
    layer.mask = MASK  # the same as set_mask
    assert layer.mask is buffer
    assert torch.equal(layer(x), before)
    assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize("mask", [MASK, MASK.astype(float), MASK.tolist(), LIVE.int(), jnp.asarray(MASK)])
def test_masks_from_anywhere(mask: Any) -> None:
    assert torch.equal(MaskedLinear(7, 5, mask=mask).mask, LIVE)


def test_the_users_mask_is_copied(layer: MaskedLinear) -> None:
    mine = LIVE.clone()
    layer.set_mask(mine)
    other = MaskedLinear(7, 5, mask=mine)
    mine.zero_()
    assert torch.equal(layer.mask, LIVE)
    assert torch.equal(other.mask, LIVE)


def test_a_refused_mask_leaves_the_layer_as_it_was(layer: MaskedLinear) -> None:
    for bad in (MASK.T, MASK * 0.5, np.full((5, 7), np.nan)):
        with pytest.raises(ValueError, match="a mask must"):
            layer.set_mask(bad)
        with pytest.raises(ValueError, match="a mask must"):
            MaskedLinear(7, 5, mask=bad)
    assert torch.equal(layer.mask, LIVE)


def test_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must not be negative; got in=-1, out=5"):
        MaskedLinear(-1, 5)
    with pytest.raises(TypeError, match=r"real floating-point dtype.*got torch.int32"):
        MaskedLinear(7, 5, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"fan_in must be 'live' or 'full'; got 'half'"):
        MaskedLinear(7, 5, fan_in="half")  # type: ignore[arg-type]


def test_reset_scales_each_row_to_its_live_inputs() -> None:
    mask = np.zeros((4, 400), bool)
    mask[0, :4], mask[1, :100], mask[2, :] = True, True, True  # row 3 has none
    torch.manual_seed(0)
    dense = nn.Linear(400, 4)
    torch.manual_seed(0)
    layer = MaskedLinear(400, 4, mask=mask)
    scale = torch.tensor([10.0, 2.0, 1.0, 1.0])
    assert torch.equal(layer.weight, dense.weight * scale[:, None])
    assert torch.equal(layer.bias, dense.bias * scale)
    torch.manual_seed(0)
    layer.reset_parameters()
    assert torch.equal(layer.weight, dense.weight * scale[:, None])
    torch.manual_seed(0)
    assert torch.equal(MaskedLinear(400, 4, mask=mask, fan_in="full").weight, dense.weight)


def test_state_dict_both_ways(layer: MaskedLinear, x: torch.Tensor) -> None:
    assert list(layer.state_dict()) == ["weight", "bias", "mask"]
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer)
    for assign in (False, True):
        other = MaskedLinear(7, 5)
        other.load_state_dict(state, assign=assign)
        assert torch.equal(other(x), layer(x))
        assert torch.equal(other.weight, layer.weight)  # the dormant weights too


def test_a_plain_linears_state_loads_and_leaves_the_mask(layer: MaskedLinear) -> None:
    dense = nn.Linear(7, 5)
    layer.load_state_dict(dense.state_dict())
    assert torch.equal(layer.weight, dense.weight)
    assert torch.equal(layer.mask, LIVE)
    nested = nn.Sequential(layer)
    nested.load_state_dict({f"0.{key}": value for key, value in dense.state_dict().items()})


def test_our_own_state_without_its_mask_is_refused(layer: MaskedLinear) -> None:
    state = layer.state_dict()
    del state["mask"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"mask"'):
        layer.load_state_dict(state)


@pytest.mark.parametrize("assign", [False, True])
def test_a_states_mask_is_checked(layer: MaskedLinear, assign: bool) -> None:
    state = layer.state_dict()
    layer.load_state_dict({**state, "mask": (~LIVE).float()}, assign=assign)
    assert layer.mask.dtype is torch.bool
    assert torch.equal(layer.mask, ~LIVE)
    with pytest.raises(RuntimeError, match=r"got 0\.5 at"):
        layer.load_state_dict({**state, "mask": LIVE * 0.5}, assign=assign)
    assert torch.equal(layer.mask, ~LIVE)


def test_copies(layer: MaskedLinear, x: torch.Tensor) -> None:
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        twin.set_mask(~LIVE)
        assert torch.equal(layer.mask, LIVE)


@pytest.mark.parametrize(
    "convert", [lambda m: m.half(), lambda m: m.type(torch.float16), lambda m: m.to(torch.float16)]
)
def test_conversions_leave_the_mask_boolean(layer: MaskedLinear, convert: Any) -> None:
    convert(layer)
    assert layer.weight.dtype is torch.float16
    assert layer.mask.dtype is torch.bool
    assert torch.equal(layer.mask, LIVE)


def test_meta_device_keeps_the_mask_for_reset() -> None:
    layer = MaskedLinear(7, 5, mask=MASK, device="meta")
    assert layer.mask.is_meta
    assert layer(torch.empty(3, 7, device="meta")).shape == (3, 5)
    assert "sparsity" not in repr(layer)
    layer.to_empty(device="cpu")
    torch.manual_seed(0)
    layer.reset_parameters()
    torch.manual_seed(0)
    twin = MaskedLinear(7, 5, mask=MASK)
    assert torch.equal(layer.mask, LIVE)
    assert torch.equal(layer.weight, twin.weight)
    layer.set_mask(~LIVE)
    layer.reset_parameters()
    assert torch.equal(layer.mask, ~LIVE)  # a later mask is not undone


def test_meta_device_then_a_state(layer: MaskedLinear, x: torch.Tensor) -> None:
    for assign in (True, False):
        empty = MaskedLinear(7, 5, device="meta")
        if not assign:
            empty.to_empty(device="cpu")
        empty.load_state_dict(layer.state_dict(), assign=assign)
        assert torch.equal(empty(x), layer(x))


def test_from_and_to_linear(x: torch.Tensor) -> None:
    dense = nn.Linear(7, 5, dtype=torch.float64).eval()
    dense.bias.requires_grad_(False)
    state = torch.get_rng_state()
    layer = MaskedLinear.from_linear(dense, MASK)
    back = layer.to_linear()
    assert torch.equal(torch.get_rng_state(), state), "a conversion draws nothing"
    assert torch.equal(layer.weight, dense.weight)
    assert layer.weight is not dense.weight
    assert not layer.training
    assert not layer.bias.requires_grad
    assert layer.weight.requires_grad
    assert type(back) is nn.Linear
    assert torch.equal(back(x.double()), layer(x.double()))
    assert torch.equal(back.weight, torch.where(LIVE, dense.weight, 0.0))
    layer.reset_parameters()  # not pending: the mask stays
    assert torch.equal(layer.mask, LIVE)
    again = MaskedLinear.from_linear(layer)
    assert torch.equal(again.mask, LIVE)
    assert MaskedLinear.from_linear(nn.Linear(7, 5, bias=False)).bias is None


def test_functional_call_and_vmap_over_masks(layer: MaskedLinear, x: torch.Tensor) -> None:
    stacked = torch.stack([LIVE, ~LIVE])
    outputs = torch.func.vmap(lambda mask: torch.func.functional_call(layer, {"mask": mask}, (x,)))(stacked)
    assert torch.equal(outputs[0], layer(x))
    layer.set_mask(~LIVE)
    assert torch.equal(outputs[1], layer(x))


def test_compile_follows_a_new_mask(layer: MaskedLinear, x: torch.Tensor) -> None:
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    layer.set_mask(~LIVE)
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()
    assert layer.weight.grad is not None
    assert not layer.weight.grad[LIVE].any()


@pytest.mark.parametrize("strict", [False, True])
def test_export(layer: MaskedLinear, x: torch.Tensor, strict: bool) -> None:
    program = torch.export.export(
        layer, (x,), dynamic_shapes={"input": {0: torch.export.Dim("batch", min=2)}}, strict=strict
    )
    more = torch.randn(9, 7)
    torch.testing.assert_close(program.module()(more), layer(more))


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)


def train(layer: MaskedLinear, optimizer: torch.optim.Optimizer, x: torch.Tensor, steps: int = 4) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("make", [momentum, adamw])
def test_freeze_masked_keeps_dormant_weights(layer: MaskedLinear, x: torch.Tensor, make: Any) -> None:
    loose = copy.deepcopy(layer)
    start = layer.weight.detach().clone()
    train(loose, make(loose.parameters()), x)
    assert (loose.weight != start)[~LIVE].all(), "without the guard they move"
    model = nn.Sequential(layer)
    optimizer = make(model.parameters())
    assert freeze_masked(optimizer, model) is optimizer
    train(layer, optimizer, x)
    assert torch.equal(layer.weight[~LIVE], start[~LIVE])
    assert torch.equal(layer.weight[LIVE], loose.weight[LIVE]), "the live ones train as ever"
    layer.set_mask(~LIVE)
    held = layer.weight.detach().clone()
    train(layer, optimizer, x)
    assert torch.equal(layer.weight[LIVE], held[LIVE]), "after a change of mask too"
    assert (layer.weight != held)[~LIVE].all()


def test_freeze_masked_keeps_nan_and_negative_zero(layer: MaskedLinear, x: torch.Tensor) -> None:
    with torch.no_grad():
        layer.weight[~LIVE] = -0.0
        layer.weight[0][~LIVE[0]] = torch.nan
    before = layer.weight.detach().clone()
    train(layer, freeze_masked(adamw(layer.parameters()), layer), x)
    same = layer.weight.detach().view(torch.int32) == before.view(torch.int32)
    assert same[~LIVE].all()


def test_freeze_masked_refuses_a_model_without_masks() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="this model has none"):
        freeze_masked(adamw(model.parameters()), model)
