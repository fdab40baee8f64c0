"""``compress`` and ``expand`` on PyTorch models: what is exchanged, what is kept, and what must stay as it is."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskedlinear import masks
from maskedlinear.costs import Costs
from maskedlinear.torch import MaskedLinear, SparseLinear, compress, expand, freeze_masked
from maskedlinear_torch import _models, _trial

SPARSE = masks.random((512, 512), sparsity=0.99, seed=0)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        MaskedLinear(64, 512, mask=masks.random((512, 64), sparsity=0.2, seed=0)),
        nn.ReLU(),
        nn.Sequential(MaskedLinear(512, 512, mask=SPARSE), nn.ReLU()),
        nn.Linear(512, 8),
    )


def forms(model: nn.Module) -> list[str]:
    return [type(module).__name__ for module in model.modules() if hasattr(module, "in_features")]


def test_each_layer_gets_the_faster_form_and_the_outputs_stay() -> None:
    model, x = network(), torch.randn(4, 64)
    before = model(x)
    assert compress(model, measure=False) is model
    assert forms(model) == ["MaskedLinear", "SparseLinear", "Linear"]
    torch.testing.assert_close(model(x), before)
    assert compress(model, "sparse") is model
    assert forms(model) == ["SparseLinear", "SparseLinear", "Linear"]
    torch.testing.assert_close(model(x), before)
    assert compress(model, measure=False) is model, "which brings the first one back to the dense form"
    assert forms(model) == ["MaskedLinear", "SparseLinear", "Linear"]
    assert expand(model) is model
    assert forms(model) == ["MaskedLinear", "MaskedLinear", "Linear"]
    torch.testing.assert_close(model(x), before)
    assert torch.equal(model[2][0].mask, torch.tensor(SPARSE))  # type: ignore[index, union-attr]


def test_explain_says_for_each_layer_what_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    compress(network(), batch=32, training=False, explain=True, measure=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "An inference on 32 rows of x; dense / sparse"
    assert [line.split()[0] for line in lines[1:]] == ["layer", "0", "2.0"]
    assert "64 -> 512" in lines[2]
    assert "dense" in lines[2]
    assert "times as long" in lines[3]


def test_a_layer_itself_is_returned_in_its_new_form() -> None:
    layer = MaskedLinear(512, 512, mask=SPARSE)
    made = compress(layer, measure=False)
    assert isinstance(made, SparseLinear)
    assert isinstance(expand(made), MaskedLinear)
    assert compress(nn.ReLU(), explain=False, measure=False).__class__ is nn.ReLU


def test_what_a_layer_carries_is_kept() -> None:
    layer = MaskedLinear(512, 512, mask=SPARSE, dtype=torch.float64)
    layer.eval()
    layer.bias.requires_grad_(False)
    calls: list[str] = []
    handle = layer.register_forward_hook(lambda *_: calls.append("hook"))
    layer.note = "mine"  # type: ignore[assignment]
    model = nn.ModuleDict({"one": layer, "again": layer})
    compress(model, "sparse")
    made: Any = model["one"]
    assert made is model["again"]
    assert (made.training, made.note, made.weight_values.dtype) == (False, "mine", torch.float64)
    assert made.weight_values.requires_grad
    assert not made.bias.requires_grad
    made(torch.zeros(2, 512, dtype=torch.float64))
    assert calls == ["hook"]
    handle.remove()
    made(torch.zeros(2, 512, dtype=torch.float64))
    assert calls == ["hook"]


def test_parameters_keep_what_was_written_on_them_and_the_bias_stays_the_same() -> None:
    layer = MaskedLinear(512, 512, mask=SPARSE)
    layer._is_initialized = layer.weight.scale = layer.bias.scale = 2  # type: ignore[attr-defined, assignment]
    bias, calls = layer.bias, []
    bias.register_hook(lambda _: calls.append("hook"))
    made: Any = layer
    for weight in ("weight_values", "weight"):
        made = compress(made, "sparse") if weight == "weight_values" else expand(made)
        assert made._is_initialized == getattr(made, weight).scale == 2
        assert made.bias is bias
        assert set(vars(made)) == {*vars(type(made)(2, 2)), "_is_initialized"}
        made(torch.zeros(2, 512)).sum().backward()
    assert calls == ["hook", "hook"]


def test_layers_that_were_made_in_inference_mode_can_be_trained() -> None:
    costs = Costs.shipped("torch", "cpu")
    close = replace(costs, sparse=costs.dense[..., None].repeat(len(costs.densities), -1), uneven=costs.uneven * 0 + 1)
    model = nn.Sequential(MaskedLinear(32, 32, mask=masks.random((32, 32), sparsity=0.9, seed=0)))
    with torch.inference_mode():
        compress(model, costs=close, training=True)
        compress(model, "sparse")
    model(torch.randn(2, 32)).sum().backward()
    assert model[0].weight_values.grad is not None
    with torch.inference_mode():
        expand(model)
    model(torch.randn(2, 32)).sum().backward()
    assert model[0].weight.grad is not None


def test_a_full_backward_hook_goes_on() -> None:
    layer = MaskedLinear(512, 512, mask=SPARSE)
    calls: list[str] = []
    layer.register_full_backward_hook(lambda *_: calls.append("hook"))
    made = compress(layer, "sparse")
    made(torch.randn(2, 512, requires_grad=True)).sum().backward()
    assert calls == ["hook"]


def replaced() -> nn.Module:
    layer = MaskedLinear(512, 512, mask=SPARSE)
    forward = layer.forward
    layer.forward = lambda x: forward(x)  # type: ignore[method-assign]
    return nn.Sequential(layer)


def changed(change: Any) -> nn.Module:
    layer = MaskedLinear(512, 512, mask=SPARSE)
    change(layer)
    return nn.Sequential(layer)


class Doubled(MaskedLinear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def tied() -> nn.Module:
    one, other = MaskedLinear(512, 512, mask=SPARSE), MaskedLinear(512, 512, mask=SPARSE)
    other.weight = one.weight
    return nn.Sequential(one, other)


def parametrized() -> nn.Module:
    layer = MaskedLinear(512, 512, mask=SPARSE)
    torch.nn.utils.parametrizations.weight_norm(layer)
    return nn.Sequential(layer)


def read() -> nn.Module:
    encoder = nn.TransformerEncoderLayer(512, 2, 512)
    encoder.linear1 = MaskedLinear(512, 512, mask=SPARSE)
    return encoder


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: nn.Sequential(Doubled(512, 512, mask=SPARSE)), "it is a Doubled whose weight or forward is its own"),
        (tied, "it shares parameters with another layer"),
        (replaced, "its forward was replaced"),
        *(
            (partial(changed, change), "its state or its weight has hooks")
            for change in (
                lambda layer: layer.register_state_dict_post_hook(lambda *_: None),
                lambda layer: layer.register_state_dict_pre_hook(lambda *_: None),
                lambda layer: layer.register_load_state_dict_pre_hook(lambda *_: None),
                lambda layer: layer.register_load_state_dict_post_hook(lambda *_: None),
                lambda layer: layer.weight.register_hook(lambda g: g),
                lambda layer: layer.weight.register_post_accumulate_grad_hook(lambda _: None),
            )
        ),
        *(
            (partial(changed, change), "it has parameters, buffers or modules of its own")
            for change in (
                lambda layer: layer.register_buffer("scale", torch.ones(3)),
                lambda layer: layer.register_parameter("scale", nn.Parameter(torch.ones(3))),
                lambda layer: layer.add_module("more", nn.ReLU()),
            )
        ),
        (partial(changed, lambda layer: layer.compile(backend="eager")), "it is compiled"),
        (parametrized, "whose weight or forward is its own"),
        (read, "the module around it reads its weight"),
        (lambda: nn.Sequential(MaskedLinear(512, 512, mask=SPARSE, device="meta")), "it has no values yet"),
    ],
)
def test_a_layer_that_cannot_change_keeps_its_form(make: Any, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = make()
    layers = [module for module in model.modules() if isinstance(module, MaskedLinear)]
    compress(model, explain=True, measure=False)
    assert [module for module in model.modules() if isinstance(module, MaskedLinear)] == layers
    assert why in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"cannot become sparse: .*{why}"):
        compress(model, "sparse")


def test_a_refusal_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(MaskedLinear(512, 512, mask=SPARSE), Doubled(512, 512, mask=SPARSE))
    with pytest.raises(ValueError, match="1 cannot become sparse"):
        compress(model, "sparse")
    assert forms(model) == ["MaskedLinear", "Doubled"]
    with pytest.raises(ValueError, match="format must be one of"):
        compress(model, "csr")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"compress takes a torch\.nn\.Module; got list"):
        compress([model])  # type: ignore[arg-type]


def test_costs_of_ones_own_decide() -> None:
    costs = Costs.shipped("torch", "cpu")
    slow = replace(costs, sparse=costs.sparse * 1e6)
    assert forms(compress(network(), costs=slow, measure=False)) == ["MaskedLinear", "MaskedLinear", "Linear"]
    with pytest.raises(ValueError, match="costs must be of torch on 'cpu', where the layer is; got those of jax"):
        compress(network(), costs=Costs.shipped("jax", "cpu"))


def test_a_compressed_model_trains_as_before() -> None:
    x, one, other = torch.randn(16, 64), network(), compress(network(), "sparse")
    for model in (one, other):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(one(x), other(x))


def test_an_optimizer_made_before_some_layers_were_exchanged_is_refused() -> None:
    """It holds weights of the model, but steps the old ones of the exchanged layer, and would never move the new."""
    model = network()
    optimizer, first = torch.optim.AdamW(model.parameters()), torch.optim.AdamW(model[0].parameters())
    guarded = freeze_masked(torch.optim.AdamW(model.parameters()), model)
    guarded.step()
    compress(model, measure=False)
    assert forms(model) == ["MaskedLinear", "SparseLinear", "Linear"]
    for act in (lambda: freeze_masked(optimizer, model), guarded.step):
        with pytest.raises(ValueError, match=r"lacks the new weights of 2\.0: make it, and its guard, afterwards"):
            act()
    freeze_masked(torch.optim.AdamW(model.parameters()), model).step()
    freeze_masked(first, model).step()  # who trains what was not exchanged
    optimizer.add_param_group({"params": [model.get_submodule("2.0").weight_values]})
    freeze_masked(optimizer, model).step()
    expand(model)
    with pytest.raises(ValueError, match=r"lacks the new weights of 2\.0"):
        optimizer.step()


@pytest.mark.parametrize("form", ["dense", "sparse"])
@pytest.mark.parametrize("training", [True, False])
def test_both_forms_are_measured_and_nothing_is_left_behind(form: str, training: bool) -> None:
    layer = MaskedLinear(8, 6, mask=masks.random((6, 8), sparsity=0.5, seed=0))
    layer = SparseLinear.from_masked(layer) if form == "sparse" else layer
    calls: list[int] = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    state = torch.get_rng_state()
    with torch.no_grad():
        found = _trial.measured_seconds(layer, 3, training)
    assert set(found) == {"dense", "sparse"}
    assert all(seconds > 0 for seconds in found.values())
    assert torch.equal(torch.get_rng_state(), state)
    assert not calls
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_a_choice_may_be_made_by_costs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_models, "measured_seconds", lambda *_: {"dense": 1.0, "sparse": 2.0})
    shipped = Costs.shipped("torch", "cpu")
    sparse = shipped.dense[..., None].repeat(len(shipped.densities), -1) / 1.5
    close = replace(shipped, sparse=sparse, uneven=shipped.uneven * 0 + 1)
    layer = MaskedLinear(64, 64, mask=masks.random((64, 64), sparsity=0.5, seed=0))
    assert isinstance(compress(layer, costs=close), SparseLinear), "which is the same in every run"
    assert isinstance(compress(layer, costs=close, measure=True), MaskedLinear)
    assert isinstance(compress(layer, costs=close, measure=False), SparseLinear)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert isinstance(compress(layer, costs=close), SparseLinear), "as the other processes choose"
    assert isinstance(compress(layer, costs=close, measure=True), MaskedLinear)


def test_what_is_asked_is_checked_whatever_the_model() -> None:
    with pytest.raises(ValueError, match="format must be one of"):
        compress(nn.Linear(2, 2), "nonsense", batch=-3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch must be"):
        compress(nn.Linear(2, 2), batch=-3)


def test_costs_are_for_the_layers_on_their_device() -> None:
    costs = Costs.shipped("torch", "cpu")
    model = nn.Sequential(MaskedLinear(512, 512, mask=SPARSE), MaskedLinear(512, 512, device="meta"))
    assert forms(compress(model, costs=costs, measure=False)) == ["SparseLinear", "MaskedLinear"]
    assert forms(compress(network(), "dense", costs=Costs.shipped("jax", "cpu")))[1] == "MaskedLinear"


def test_explain_counts_what_the_dense_form_keeps_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(MaskedLinear(512, 512, mask=SPARSE), MaskedLinear(64, 64))
    compress(model, "dense", training=False, explain=True)
    wide, small = capsys.readouterr().out.splitlines()[2:]
    assert f" {9 * 512 * 512 / 2**20:.3g} / " in wide, "weight, mask and masked weight"
    assert f" {5 * 64 * 64 / 2**20:.3g} / " in small, "whose masked weight is not kept"
