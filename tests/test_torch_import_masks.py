"""Models that other libraries have masked become ours: outputs, parameters, hooks and dormant values."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import zuko
from torch import Tensor, nn
from torch.nn.utils import prune

from maskedlinear import checkpoint
from maskedlinear.torch import (
    MaskedLinear,
    check_masks,
    compress,
    freeze_masked,
    get_masks,
    import_masks,
    prune_model,
    set_masks,
    unmask_model,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class _RecipeFunction(torch.autograd.Function):
    """The recipe's product: 2-D only, summed before the bias."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor) -> Tensor:
        weight = weight * mask
        output = input.mm(weight.t())
        if bias is not None:
            output += bias.unsqueeze(0).expand_as(output)
        ctx.save_for_backward(input, weight, mask)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        input, weight, mask = ctx.saved_tensors
        return grad.mm(weight), grad.t().mm(input) * mask, grad.sum(0), None


class CustomizedLinear(nn.Module):
    """As uchida-takumi/CustomizedLinear: a mask (in, out), kept as a parameter (out, in)."""

    def __init__(self, mask: Tensor, bias: bool = True) -> None:
        super().__init__()
        self.input_features, self.output_features = mask.shape
        self.mask: Any = nn.Parameter(mask.float().t(), requires_grad=False)
        self.weight = nn.Parameter(torch.randn(self.output_features, self.input_features))
        if bias:
            self.bias: Any = nn.Parameter(torch.randn(self.output_features))
        else:
            self.register_parameter("bias", None)

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = _RecipeFunction.apply(input, self.weight, self.bias, self.mask)  # type: ignore[no-untyped-call]
        return y


def _pruned() -> nn.Sequential:
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Flatten(), nn.Linear(24, 6), nn.Tanh(), nn.Linear(6, 2))
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.random_unstructured(model[2], "weight", 0.3)
    prune.ln_structured(model[2], "weight", 0.2, n=2, dim=0)  # once more: a container
    prune.random_unstructured(model[2], "bias", 0.5)
    prune.global_unstructured([(model[2], "weight"), (model[4], "weight")], prune.L1Unstructured, amount=0.5)
    return model


def test_pruned_model_keeps_outputs_parameters_and_what_is_dormant() -> None:
    model = _pruned()
    x = torch.randn(5, 3, 8)
    before = model(x)
    originals = dict(model.named_parameters())
    masks = {name: buffer.bool() for name, buffer in model.named_buffers()}
    values = {name: value.detach().clone() for name, value in originals.items()}
    assert import_masks(model) is model
    assert torch.equal(model(x), before)
    assert type(model[0]) is nn.Conv1d
    assert type(model[2]) is MaskedLinear
    for name, parameter in model.named_parameters():
        assert parameter is originals[name if name in originals else f"{name}_orig"]
    assert [n.removesuffix("_orig") for n in originals] == [n for n, _ in model.named_parameters()]
    found = get_masks(model)
    for name in ("0.weight", "2.weight", "2.bias", "4.weight"):
        assert torch.equal(found[name.removesuffix(".weight")], masks[f"{name}_mask"])
    assert torch.equal(model[2].full_weight, values["2.weight_orig"])
    set_masks(model, {name: torch.ones_like(mask) for name, mask in found.items()})
    for name, value in model.state_dict().items():
        if f"{name}_orig" in values:
            assert torch.equal(value, values[f"{name}_orig"])
    assert not any(
        isinstance(hook, prune.BasePruningMethod) for m in model.modules() for hook in m._forward_pre_hooks.values()
    )


def test_training_goes_on_as_with_prune() -> None:
    theirs = _pruned()
    ours = copy.deepcopy(_detached(theirs))
    optimizers = [torch.optim.AdamW(m.parameters(), 0.01, weight_decay=0) for m in (theirs, ours)]
    x = torch.randn(5, 3, 8)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    for model, optimizer in zip((theirs, ours), optimizers, strict=True):
        step(model, optimizer)
    import_masks(ours)  # in the middle: the optimizer goes on with its moments
    freeze_masked(optimizers[1], ours)
    for _ in range(3):
        for model, optimizer in zip((theirs, ours), optimizers, strict=True):
            step(model, optimizer)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    assert check_masks(ours, x).ok


def _detached(model: nn.Module) -> nn.Module:
    """Let a pruned model be copied: torch's computed weights are no leaves."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                vars(module)[name] = value.detach()
    return model


def test_recurrent_and_attention_parameters() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(6, 8, batch_first=True)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            h = self.lstm(x)[0]
            y: Tensor = self.attention(h, h, h)[0]
            return y

    model = Model()
    prune.l1_unstructured(model.lstm, "weight_hh_l0", 0.5)
    prune.l1_unstructured(model.attention, "in_proj_weight", 0.5)
    x = torch.randn(2, 4, 6)
    before = model(x)
    import_masks(model)
    assert torch.equal(model(x), before)
    assert model.lstm._flat_weights[1] is model.lstm.weight_hh_l0
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
    assert not model.lstm.weight_hh_l0[~get_masks(model)["lstm.weight_hh_l0"]].any()
    assert not torch.equal(model(x), before)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("held", ["parameter", "buffer", "attribute"])
def test_recipe(bias: bool, held: str) -> None:
    mask = torch.rand(5, 4) < 0.6
    layer = CustomizedLinear(mask, bias)
    if held != "parameter":
        kept = layer.mask.data
        del layer.mask
        if held == "buffer":
            layer.register_buffer("mask", kept)
        else:
            layer.mask = kept  # the recipe's first version
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(7, 5)
    before, weight, values = model(x), layer.weight, layer.weight.detach().clone()
    import_masks(model)
    torch.testing.assert_close(model(x), before, rtol=1e-6, atol=1e-6)
    assert model[0] is layer
    ours: Any = layer
    assert type(ours) is MaskedLinear
    assert (ours.in_features, ours.out_features) == (5, 4)
    assert ours.weight is weight
    assert torch.equal(ours.mask, mask.T)
    assert torch.equal(ours.full_weight, values)
    assert model(torch.randn(2, 3, 5)).shape == (2, 3, 2)  # any batch, which the recipe cannot
    compress(model, "sparse")
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)


def test_zuko_flow() -> None:
    flow = zuko.flows.MAF(3, 2, transforms=2, hidden_features=(16, 16))
    x, context = torch.randn(5, 3), torch.randn(5, 2)
    before, state = flow(context).log_prob(x), copy.deepcopy(flow.state_dict())
    parameters = list(flow.parameters())
    import_masks(flow)
    assert torch.equal(flow(context).log_prob(x), before)
    assert all(new is old for new, old in zip(flow.parameters(), parameters, strict=True))
    assert sum(isinstance(m, MaskedLinear) for m in flow.modules()) == 6
    prune_model(flow, 0.8)
    assert not torch.equal(flow(context).log_prob(x), before)
    flow.load_state_dict(state)  # zuko's own
    assert torch.equal(flow(context).log_prob(x), before)


class _Nflows:
    """The layer of nflows 0.14, which was tried itself and needs tensorboard: a name, two buffers, a product."""

    class MaskedLinear(nn.Linear):
        mask: Tensor

        def __init__(self, degrees: Tensor, outputs: Tensor, strict: bool) -> None:
            super().__init__(len(degrees), len(outputs))
            live = outputs[:, None] > degrees if strict else outputs[:, None] >= degrees
            self.register_buffer("mask", live.float())
            self.register_buffer("degrees", outputs)

        def forward(self, input: Tensor) -> Tensor:
            return nn.functional.linear(input, self.weight * self.mask, self.bias)


def test_nflows_made() -> None:
    degrees, hidden = torch.arange(1, 5), torch.arange(16) % 3 + 1
    model = nn.Sequential(
        _Nflows.MaskedLinear(degrees, hidden, strict=False),
        nn.ReLU(),
        _Nflows.MaskedLinear(hidden, degrees.repeat_interleave(2), strict=True),
    )
    x = torch.randn(5, 4)
    before, state = model(x), copy.deepcopy(model.state_dict())
    assert "0.degrees" in state
    import_masks(model)
    assert torch.equal(model(x), before)
    jacobian: Any = torch.autograd.functional.jacobian(lambda x: model(x)[0, ::2], x[:1])  # type: ignore[no-untyped-call]
    assert not jacobian[:, 0].triu().any()
    prune_model(model, 0.5)
    model.load_state_dict(state)
    assert torch.equal(model(x), before)
    arrays = checkpoint.read(model.state_dict())
    assert arrays.mask_sources["0.weight"] == "maskedlinear"


def test_more_types_and_those_left() -> None:
    class Wired(nn.Linear):
        mask: Tensor

        def forward(self, input: Tensor) -> Tensor:
            return nn.functional.linear(input, self.weight * self.mask, self.bias)

    def wired() -> nn.Module:
        layer = Wired(4, 3)
        layer.register_buffer("mask", (torch.rand(3, 4) < 0.5).float())
        return layer

    with pytest.raises(ValueError, match=r"0 \(Wired\) look like such layers: name their types in types="):
        import_masks(nn.Sequential(wired()))
    model = nn.Sequential(wired(), CustomizedLinear(torch.ones(3, 2)))
    with pytest.warns(UserWarning, match=r"0 \(Wired\) stay as they are"):
        import_masks(model)
    x = torch.randn(2, 4)
    before = model(x)
    import_masks(model, types=Wired)
    assert torch.equal(model(x), before)
    assert type(unmask_model(model)[0]) is nn.Linear  # type: ignore[index]


def _state(model: nn.Module) -> dict[str, Any]:
    return {name: (id(value), value.clone()) for name, value in model.state_dict(keep_vars=True).items()}


def _break_soft(model: nn.Sequential) -> str:
    model[2].weight_mask[0, 0] = 0.5
    return r"the mask of 2\.weight: a mask must hold booleans, or 0s and 1s; got 0\.5"


def _break_shape(model: nn.Sequential) -> str:
    model[2]._buffers["weight_mask"] = torch.ones(24, 6)
    return r"2\.weight.*got \(24, 6\), which is its transpose"


def _break_missing(model: nn.Sequential) -> str:
    del model[2]._buffers["bias_mask"]
    return r"2\.bias has a hook .* and no bias_orig and bias_mask"


def _break_shared(model: nn.Sequential) -> str:
    model.add_module("tied", nn.Linear(24, 6))
    model.tied.weight = model[2].weight_orig
    return r"a weight has one mask, whoever shares it; got 2\.weight"


def _break_layer(model: nn.Sequential) -> str:
    layer = CustomizedLinear(torch.rand(2, 3) < 0.5)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    model.add_module("last", layer)
    return r"last\.weight is of a CustomizedLinear whose forward was replaced"


def _break_other(model: nn.Sequential) -> str:
    class MaskedLinear(CustomizedLinear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).relu()

    model.add_module("last", MaskedLinear(torch.rand(2, 3) < 0.5))
    return r"last\.weight is of a MaskedLinear that does not compute x"


def _break_trained(model: nn.Sequential) -> str:
    layer = CustomizedLinear(torch.rand(2, 3) < 0.5)
    layer.mask.requires_grad_(True)
    model.add_module("last", layer)
    return r"the mask of last\.weight is trained"


@pytest.mark.parametrize(
    "damage",
    [_break_soft, _break_shape, _break_missing, _break_shared, _break_layer, _break_other, _break_trained],
    ids=lambda damage: damage.__name__,
)
def test_nothing_is_half_done(damage: Any) -> None:
    model = _pruned()
    message = damage(model)
    before, types = _state(model), [type(module) for module in model.modules()]
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        import_masks(model)
    assert types == [type(module) for module in model.modules()]
    assert hooks == [len(module._forward_pre_hooks) for module in model.modules()]
    after = _state(model)
    assert before.keys() == after.keys()
    for name, (identity, value) in before.items():
        assert after[name][0] == identity
        assert torch.equal(after[name][1], value)


def test_shared_alike() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    for layer in (first, second):
        prune.custom_from_mask(layer, "weight", torch.eye(4))
    model = nn.Sequential(first, second)
    x = torch.randn(3, 4)
    before = model(x)
    import_masks(model)
    assert torch.equal(model(x), before)
    assert model[0].weight is model[1].weight


def test_what_is_no_model_or_has_no_masks() -> None:
    with pytest.raises(TypeError, match=r"checkpoint\.read"):
        import_masks({})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="types are types of modules"):
        import_masks(_pruned(), types=["Wired"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="got a Linear without any"):
        import_masks(nn.Linear(2, 2))
    masked = MaskedLinear(4, 3, mask=torch.ones(3, 4))
    with pytest.raises(ValueError, match="got a MaskedLinear without any"):
        import_masks(masked)


def test_bfloat16_and_hooks_stay() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)).bfloat16()
    prune.l1_unstructured(model[0], "weight", 0.5)
    called: list[int] = []
    model[0].register_forward_pre_hook(lambda *_: called.append(1))
    model.eval()
    x = torch.randn(3, 16).bfloat16()
    before = model(x)
    import_masks(model)
    assert torch.equal(model(x), before)
    assert called == [1, 1]
    assert not model[0].training
