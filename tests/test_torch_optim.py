"""``maskedlinear.torch.freeze_masked``: dormant weights stay bit-identical, whatever the optimizer and the model do."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from maskedlinear import masks
from maskedlinear.torch import MaskedLinear, freeze_masked, prune_model, regrow_model

MASK = masks.random((5, 7), sparsity=0.5, seed=1)
LIVE = torch.asarray(MASK)


@pytest.fixture
def layer() -> MaskedLinear:
    torch.manual_seed(0)
    return MaskedLinear(7, 5, mask=MASK)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 7, generator=torch.Generator().manual_seed(1))


def is_clean(layer: MaskedLinear) -> bool:
    return not layer.weight.detach().view(torch.int32)[~layer.mask].any()


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)


def train(layer: MaskedLinear, optimizer: torch.optim.Optimizer, x: torch.Tensor, steps: int = 4) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()


def lbfgs(parameters: Any) -> torch.optim.Optimizer:
    class Closed(torch.optim.LBFGS):
        """One evaluation a step, of the gradient that is there."""

        def step(self, closure: Any = None) -> Any:
            return super().step(lambda: torch.zeros(()))

    return Closed(parameters, lr=0.1)


OPTIMIZERS: dict[str, Any] = {
    "momentum": momentum,
    "LBFGS": lbfgs,
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1, weight_decay=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0, weight_decay=0.1),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1, weight_decay=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.1, initial_accumulator_value=0.2),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1, amsgrad=True),
    "Adam, fused": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1, fused=True),
    "AdamW": adamw,
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.1, weight_decay=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.1, weight_decay=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.1, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, weight_decay=0.1, momentum=0.9, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["Muon"] = lambda p: torch.optim.Muon([one for one in p if one.dim() == 2], lr=0.1, weight_decay=0.1)


def test_every_optimizer_of_torch_is_tried() -> None:
    shipped = {
        name
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    }
    tried = {name.split(",")[0] for name in OPTIMIZERS} | {"SGD"}
    assert shipped - tried == {"SparseAdam"}, "which takes sparse gradients, that no masked layer has"


@pytest.mark.parametrize(
    "name", [name for name in OPTIMIZERS if name not in ("LBFGS", "Adafactor", "ASGD")]
)  # no state a weight
def test_a_revived_weight_starts_clean(layer: MaskedLinear, x: torch.Tensor, name: str) -> None:
    model = nn.Sequential(layer)
    optimizer = freeze_masked(OPTIMIZERS[name](model.parameters()), model)
    train(layer, optimizer, x)
    kept = {
        key: part
        for key, part in optimizer.state[layer.weight].items()
        if isinstance(part, torch.Tensor) and part.shape == (5, 7)
    }
    clean = {key: {"step_size": 0.1, "sum": 0.2}.get(key, 0.0) for key in kept}
    dirty = [key for key, part in kept.items() if (part != clean[key])[LIVE].any()]
    assert dirty
    layer.set_mask(~LIVE)  # each entry's mask changes
    layer.weight.grad = torch.zeros(5, 7)
    for group in optimizer.param_groups:
        group["lr"] *= 1 if name == "Rprop" else 0
        group["weight_decay"] = 0.0
    optimizer.step()
    for key, part in kept.items():
        assert (part - clean[key]).abs().max() <= 1e-8, (
            f"{key}: a step without a gradient leaves clean what starts clean"
        )


def test_a_state_that_is_loaded_is_that_of_the_masks_loaded_with_it(layer: MaskedLinear, x: torch.Tensor) -> None:
    model = nn.Sequential(layer)
    optimizer = freeze_masked(adamw(model.parameters()), model)
    layer.set_mask(~LIVE)
    train(layer, optimizer, x)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(layer, optimizer, x, steps=1)
    again = nn.Sequential(MaskedLinear(7, 5, mask=MASK))
    resumed = freeze_masked(adamw(again.parameters()), again)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(again[0], resumed, x, steps=1)  # type: ignore[arg-type]
    assert torch.equal(again[0].weight, layer.weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_freeze_masked_keeps_dormant_weights(layer: MaskedLinear, x: torch.Tensor, name: str) -> None:
    make = OPTIMIZERS[name]
    loose = copy.deepcopy(layer)
    start = layer.full_weight
    train(loose, make(loose.parameters()), x)
    model = nn.Sequential(layer)
    optimizer = make(model.parameters())
    assert freeze_masked(optimizer, model) is optimizer
    train(layer, optimizer, x)
    assert is_clean(layer), "for everyone who reads the weight after a step"
    assert torch.equal(layer.full_weight[~LIVE], start[~LIVE])
    assert torch.equal(loose(x), layer(x)), "the layer is right without the guard, too"
    layer.set_mask(~LIVE)
    held = layer.full_weight
    train(layer, optimizer, x)
    assert is_clean(layer), "after a change of mask too"
    assert torch.equal(layer.full_weight[LIVE], held[LIVE])
    assert (layer.weight != held)[~LIVE].all()


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"capturable": True}], ids=str)
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_no_drift_ever_acts(name: str, options: dict[str, bool], guarded: bool) -> None:
    """Masks that move while momentum and decay go on, in layers of both routes: small and large."""
    kind = getattr(torch.optim, name)
    if not set(options) <= set(inspect.signature(kind).parameters) or "capturable" in options:
        options = {}  # capturable is for accelerators; here the plain loop
    arguments: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1, **options}
    if name == "SGD":
        arguments["momentum"] = 0.9
    torch.manual_seed(0)
    model = nn.Sequential(MaskedLinear(150, 120), nn.ReLU(), MaskedLinear(120, 6))
    prune_model(model, 0.5)
    optimizer = kind(model.parameters(), **arguments)
    if guarded:
        freeze_masked(optimizer, model)
    x = torch.randn(8, 150, generator=torch.Generator().manual_seed(0))
    for step in range(6):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        if guarded:
            assert all(is_clean(layer) for layer in model[::2])
        with torch.no_grad():
            plain = copy.deepcopy(model)
            for layer in plain[::2]:
                layer.project()
            want = model[2].to_linear()(torch.relu(model[0].to_linear()(x)))
            assert torch.equal(model(x), want)
        assert all(is_clean(layer) for layer in model[::2])
        if step % 2:
            prune_model(model, 0.5 + 0.08 * step)
        elif step:
            regrow_model(model, 0.3, optimizer=optimizer, seed=step)


def test_dormant_values_of_every_kind_come_back(layer: MaskedLinear, x: torch.Tensor) -> None:
    kinds = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e-42, -1e-42, 3.0]).repeat(5, 1)
    full = torch.where(LIVE, layer.weight.detach(), kinds)
    layer.load_state_dict({"weight": full}, strict=False)
    train(layer, freeze_masked(adamw(layer.parameters()), layer), x)
    dormant = ~LIVE
    layer.set_mask(torch.ones(5, 7))
    assert torch.equal(layer.weight.detach().view(torch.int32)[dormant], full.view(torch.int32)[dormant])


def test_freeze_masked_refuses_a_model_without_masks() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="this model has none"):
        freeze_masked(adamw(model.parameters()), model)


def test_freeze_masked_refuses_what_it_cannot_guard(layer: MaskedLinear) -> None:
    optimizer = adamw(layer.parameters())
    for arguments in ((layer, optimizer), (optimizer, None)):
        with pytest.raises(TypeError, match=r"takes an optimizer and a module, in this order; got"):
            freeze_masked(*arguments)
    pruned = prune.l1_unstructured(MaskedLinear(7, 5, mask=MASK), "weight", 0.3)
    normed = parametrizations.weight_norm(MaskedLinear(7, 5, mask=MASK))
    for model in (pruned, normed):
        with pytest.raises(ValueError, match=r"the weight of a masked layer here is computed .*: remove that first"):
            freeze_masked(adamw(model.parameters()), model)
    freeze_masked(optimizer, layer)
    parametrizations.weight_norm(layer)
    with pytest.raises(ValueError, match=r"is computed"):
        optimizer.step()


class Decay(torch.optim.SGD):
    """Works on the weights after its base class has."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(0.9)
        return loss


class Fails(torch.optim.SGD):
    """Raises after it has moved the weights."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(0.9)
        raise OverflowError("too far")


def test_what_comes_after_super_step_is_guarded(layer: MaskedLinear, x: torch.Tensor) -> None:
    torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)  # puts hooks on the class' own step
    before = layer.full_weight
    train(layer, freeze_masked(Decay(layer.parameters(), lr=0.1), layer), x)
    assert torch.equal(layer.full_weight[~LIVE], before[~LIVE])
    assert is_clean(layer)
    assert (layer.weight != before)[LIVE].all()


def test_a_step_that_raises_is_guarded(layer: MaskedLinear, x: torch.Tensor) -> None:
    before = layer.full_weight
    optimizer = freeze_masked(Fails(layer.parameters(), lr=0.1), layer)
    with pytest.raises(OverflowError, match="too far"):
        train(layer, optimizer, x)
    assert torch.equal(layer.full_weight[~LIVE], before[~LIVE])
    assert is_clean(layer)


def test_only_the_optimizers_own_weights_are_touched(x: torch.Tensor) -> None:
    ours, theirs = MaskedLinear(7, 7), MaskedLinear(7, 5, mask=MASK)
    optimizer = freeze_masked(momentum(ours.parameters()), nn.ModuleList([ours, theirs]))
    loss = theirs(x.clone().requires_grad_()).square().sum()
    ours(x).sum().backward()
    optimizer.step()
    loss.backward()  # would fail if the other layer's weight had been written to


def test_layers_that_share_a_weight_share_its_mask(x: torch.Tensor) -> None:
    one, other = MaskedLinear(7, 5, mask=MASK), MaskedLinear(7, 5)
    other.weight = one.weight
    tied = nn.Embedding(5, 7)
    tied.weight = one.weight
    model = nn.ModuleList([one, other, tied])
    optimizer = freeze_masked(adamw(model.parameters()), model)
    (one(x) + other(x)).square().sum().backward()
    optimizer.step()
    assert is_clean(one)
    other.set_mask(~LIVE)
    assert torch.equal(one.mask, ~LIVE)
    torch.testing.assert_close(one(x) - one.bias, other(x) - other.bias)
    third = MaskedLinear(7, 5, mask=MASK)
    with pytest.raises(ValueError, match=r"a weight has one mask, whoever shares it"):
        third.weight = one.weight


@pytest.mark.parametrize("first", ["schedule", "guard"])
def test_a_schedule_made_before_the_guard_or_after_it(layer: MaskedLinear, x: torch.Tensor, first: str) -> None:
    before = layer.weight.detach().clone()
    optimizer = momentum(layer.parameters())
    if first == "guard":
        freeze_masked(optimizer, layer)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    if first == "schedule":
        freeze_masked(optimizer, layer)
    train(layer, optimizer, x, 1)
    schedule.step()  # which warns, and so fails, if it does not find its mark on the optimizer's step
    assert torch.equal(layer.weight[~LIVE], before[~LIVE])


def test_a_schedule_a_closure_and_a_scaler(layer: MaskedLinear, x: torch.Tensor) -> None:
    before = layer.weight.detach().clone()
    optimizer = freeze_masked(momentum(layer.parameters()), layer)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    train(layer, optimizer, x, 1)
    schedule.step()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(layer(x).square().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    search = freeze_masked(torch.optim.LBFGS(layer.parameters()), layer)

    def closure() -> torch.Tensor:
        search.zero_grad()
        loss = layer(x).square().sum()
        loss.backward()
        return loss

    search.step(closure)
    assert torch.equal(layer.weight[~LIVE], before[~LIVE])
    assert (layer.weight != before)[LIVE].all()
    copied = copy.deepcopy(optimizer)
    assert "step" not in vars(copied), "a copy is not guarded"
