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
from maskedlinear.torch import MaskedLinear, masked_linear
from maskedlinear_torch import _functional

MASK = masks.random((5, 7), sparsity=0.5, seed=1)
LIVE = torch.asarray(MASK)


@pytest.fixture(autouse=True, params=["rules", "expression"])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Small layers take the expression; here they take the rules of large ones, too."""
    if request.param == "rules":
        monkeypatch.setattr(_functional, "SMALL", 0)
    return str(request.param)


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
    buffer, weight, before = layer.mask, layer.full_weight, layer(x)
    layer.set_mask(~LIVE)
    assert torch.equal(layer(x), masked_linear(x, weight, ~LIVE, layer.bias))
    layer.mask = MASK  # the same as set_mask
    assert layer.mask is buffer
    assert torch.equal(layer(x), before)
    assert torch.equal(layer.full_weight, weight)
    assert torch.equal(layer.weight, torch.where(LIVE, weight, 0))


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
    with pytest.raises(ValueError, match=r"init_fan_in must be 'live' or 'full'; got 'half'"):
        MaskedLinear(7, 5, init_fan_in="half")  # type: ignore[arg-type]


def test_reset_scales_each_row_to_its_live_inputs() -> None:
    mask = np.zeros((4, 400), bool)
    mask[0, :4], mask[1, :100], mask[2, :] = True, True, True  # row 3 has none
    torch.manual_seed(0)
    dense = nn.Linear(400, 4)
    torch.manual_seed(0)
    layer = MaskedLinear(400, 4, mask=mask)
    scale = torch.tensor([10.0, 2.0, 1.0, 1.0])
    assert torch.equal(layer.full_weight, dense.weight * scale[:, None])
    assert torch.equal(layer.bias, dense.bias * scale)
    torch.manual_seed(0)
    layer.reset_parameters()
    assert torch.equal(layer.full_weight, dense.weight * scale[:, None])
    torch.manual_seed(0)
    assert torch.equal(MaskedLinear(400, 4, mask=mask, init_fan_in="full").full_weight, dense.weight)


def test_state_dict_both_ways(layer: MaskedLinear, x: torch.Tensor) -> None:
    assert list(layer.state_dict()) == ["weight", "bias", "mask", "dormant"]
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer)
    for assign in (False, True):
        other = MaskedLinear(7, 5)
        other.load_state_dict(state, assign=assign)
        assert torch.equal(other(x), layer(x))
        assert torch.equal(other.full_weight, layer.full_weight)  # the dormant weights too


def test_a_plain_linears_state_loads_and_leaves_the_mask(layer: MaskedLinear) -> None:
    dense = nn.Linear(7, 5)
    layer.load_state_dict(dense.state_dict())
    assert torch.equal(layer.full_weight, dense.weight)
    assert not layer.weight[~LIVE].any()
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
    assert torch.equal(layer.full_weight, dense.weight)
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
    own = {"weight": layer.full_weight}
    outputs = torch.func.vmap(lambda mask: torch.func.functional_call(layer, own | {"mask": mask}, (x,)))(stacked)
    # One product of all masks adds up in an order of its own, on some processors.
    weights, bias = torch.where(stacked, layer.full_weight, 0), layer.bias
    wanted = torch.func.vmap(lambda weight: torch.nn.functional.linear(x, weight, bias))(weights)
    assert torch.equal(outputs, wanted)
    near = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(outputs[0], layer(x), **near)
    layer.set_mask(~LIVE)
    torch.testing.assert_close(outputs[1], layer(x), **near)


def test_compile_follows_a_new_mask(layer: MaskedLinear, x: torch.Tensor) -> None:
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    layer.set_mask(~LIVE)
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()
    assert layer.weight.grad is not None
    assert not layer.weight.grad[LIVE].any()


def test_a_mask_set_inside_compiled_code(layer: MaskedLinear, x: torch.Tensor) -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def masked_with(mask: torch.Tensor) -> torch.Tensor:
        layer.set_mask(mask)
        return layer(x)

    torch.compiler.reset()
    y = masked_with(~LIVE)  # without a warning from Dynamo, which would be an error here
    assert torch.equal(layer.mask, ~LIVE)
    torch.testing.assert_close(y, layer(x))


@pytest.mark.parametrize("strict", [False, True])
def test_export(layer: MaskedLinear, x: torch.Tensor, strict: bool) -> None:
    program = torch.export.export(
        layer, (x,), dynamic_shapes={"input": {0: torch.export.Dim("batch", min=2)}}, strict=strict
    )
    more = torch.randn(9, 7)
    torch.testing.assert_close(program.module()(more), layer(more))


def test_masks_with_negative_strides_and_of_the_layer_itself(layer: MaskedLinear, x: torch.Tensor) -> None:
    layer.set_mask(MASK[::-1])
    assert torch.equal(layer.mask, LIVE.flip(0))
    assert torch.equal(masked_linear(x, layer.weight, MASK[:, ::-1]), masked_linear(x, layer.weight, LIVE.flip(1)))
    square = MaskedLinear(5, 5, mask=np.triu(np.ones((5, 5))))
    square.set_mask(square.mask.T)
    assert torch.equal(square.mask, torch.ones(5, 5).tril().bool())


def test_a_default_device_of_meta(layer: MaskedLinear, x: torch.Tensor) -> None:
    with torch.device("meta"):
        made = MaskedLinear(7, 5, mask=MASK)
        listed = MaskedLinear(7, 5, mask=MASK.tolist())
        layer.set_mask(~MASK)
        y = masked_linear(x, layer.weight, MASK)
    assert torch.equal(layer.mask, ~LIVE)
    assert torch.equal(y, masked_linear(x, layer.weight, LIVE))
    twin = MaskedLinear.from_linear(made)
    for one in (made, listed, twin):
        assert one.weight.is_meta
        one.to_empty(device="cpu")
        one.reset_parameters()
        assert torch.equal(one.mask, LIVE)


def test_a_layer_that_moves_to_meta_keeps_its_mask(layer: MaskedLinear) -> None:
    layer.to("meta").to_empty(device="cpu")
    assert torch.equal(layer.mask, LIVE)
    layer.reset_parameters()
    assert torch.equal(layer.mask, LIVE)


@pytest.mark.parametrize("meta", [True, False])
def test_a_layer_whose_tensors_are_emptied_keeps_its_mask(meta: bool) -> None:
    layer = MaskedLinear(7, 5, mask=MASK, device="meta" if meta else None)
    layer._apply(lambda tensor: torch.ones_like(tensor, device="cpu"))  # what to_empty may find in memory
    assert torch.equal(layer.mask, LIVE)


def test_a_mask_without_values_is_refused(layer: MaskedLinear) -> None:
    with pytest.raises(
        ValueError, match=r"must be a dense tensor; got one of layout torch.sparse_coo: pass mask.to_dense"
    ):
        layer.set_mask(LIVE.to_sparse())
    with pytest.raises(ValueError, match=r"must have values; got a tensor on the meta device: pass one on another"):
        layer.set_mask(LIVE.to("meta"))
    with pytest.raises(ValueError, match=r"must have values"):
        MaskedLinear(7, 5, mask=LIVE.to("meta"), device="meta")
    with pytest.raises(ValueError, match=r"0s and 1s; got an array of dtype torch.complex64"):
        layer.set_mask(LIVE.to(torch.complex64))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((7, 5), {"dtype": "float32"}, "dtype must be .*bfloat16 or float16.*; got 'float32'"),
        ((7, 5), {"dtype": np.float32}, "dtype must be a real floating-point dtype of torch"),
        ((7, 5), {"dtype": torch.float8_e4m3fn}, "got torch.float8_e4m3fn"),
        ((7, 5, MASK), {}, "bias must be True or False; got ndarray: a mask is passed as mask="),
        ((7, 5, LIVE), {}, "got Tensor: a mask is passed as mask="),
        ((7, 5, True, "cpu"), {}, "mask must be an array; got 'cpu': a device is passed as device="),
    ],
)
def test_arguments_of_the_wrong_type_are_refused(arguments: Any, options: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        MaskedLinear(*arguments, **options)


def test_from_linear_refuses_what_is_no_linear_layer() -> None:
    for other in (nn.Conv1d(3, 4, 1), nn.Embedding(3, 4), None, nn.LazyLinear(3)):
        with pytest.raises(TypeError, match=r"from_linear takes an nn.Linear that has its weight; got \w+"):
            MaskedLinear.from_linear(other)  # type: ignore[arg-type]


def test_conversions_of_a_parametrized_layer(x: torch.Tensor) -> None:
    dense = nn.utils.parametrizations.weight_norm(nn.Linear(7, 5))
    masked = MaskedLinear.from_linear(dense, MASK)
    assert torch.equal(masked.full_weight, dense.weight)
    normed = nn.utils.parametrizations.weight_norm(MaskedLinear(7, 5, mask=MASK))
    torch.testing.assert_close(normed.to_linear()(x), normed(x))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_traced_by_jit_and_by_fx(layer: MaskedLinear, x: torch.Tensor) -> None:
    model = nn.Sequential(layer, nn.ReLU())
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, x), buffer)
    buffer.seek(0)
    assert torch.equal(torch.jit.load(buffer)(x), model(x))
    graph = torch.fx.symbolic_trace(model)
    assert torch.equal(graph(x), model(x))
    before = model(x)
    layer.set_mask(~LIVE)
    assert torch.equal(graph(x), model(x)), "the graph reads the layer's mask"
    assert not torch.equal(model(x), before)
