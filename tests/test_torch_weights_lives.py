"""What happens to masked weights of any PyTorch module as a model lives: schedules, sharing, edits, conversions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.utils import prune as torch_prune

from maskedlinear.pattern import SparsityPattern
from maskedlinear.pruning import CubicSchedule
from maskedlinear.torch import (
    ScheduledPruning,
    ScheduledRegrowth,
    SparseLinear,
    check_masks,
    compress,
    freeze_masked,
    get_masks,
    lottery_rounds,
    mask_model,
    prune_model,
    regrow_model,
    rewind_model,
    set_masks,
    summary,
    unmask_model,
)
from test_torch_weights import X, is_clean, network


def test_schedules_live_through_a_second_training_and_a_skipped_step(caplog: pytest.LogCaptureFixture) -> None:
    model = network(0.6)
    schedule = CubicSchedule(0.9, begin=0, end=6, every=2)
    for _ in range(2):  # the second begins with a model that has more masked than its schedule asks for
        pruner = ScheduledPruning(model, schedule)
        with caplog.at_level("INFO", "maskedlinear"):
            for _ in range(8):
                pruner.step()
        assert summary(model).sparsity == pytest.approx(0.9, abs=0.01)
    assert "were asked for: none more is" in caplog.text
    pruner = ScheduledPruning(model, CubicSchedule(0.9999, begin=0, end=1))
    with caplog.at_level("WARNING", "maskedlinear"):
        pruner.step(), pruner.step()
    assert "the others are kept" in caplog.text
    assert all(mask.any() for mask in get_masks(model).values())
    with pytest.raises(ValueError, match="a layer must keep a connection"):
        ScheduledPruning(model, CubicSchedule(0.9999, begin=0, end=1), on_empty="raise").step_at(1)


def test_gradients_that_overflow_move_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = network(0.8)
    optimizer = freeze_masked(torch.optim.SGD(model.parameters(), lr=0.1), model)
    regrowth, before = ScheduledRegrowth(model, optimizer, every=1, end=10), get_masks(model)
    regrowth.step()
    with regrowth.recording():
        (model(X).sum() * torch.inf).backward()
    optimizer.zero_grad()  # which a GradScaler's skipped step leaves to do
    with caplog.at_level("WARNING", "maskedlinear"):
        assert regrowth.step() == 0
    assert "not finite" in caplog.text
    assert all(torch.equal(mask, before[name]) for name, mask in get_masks(model).items())
    with regrowth.recording():
        model(X).square().mean().backward()
    assert regrowth.step() > 0


def tied() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.Conv1d(4, 4, 3, padding=1))
    model[1].weight = model[0].weight  # type: ignore[assignment]
    return model


def test_every_module_that_shares_a_weight_has_its_mask() -> None:
    plain, model = copy.deepcopy(tied().state_dict()), mask_model(tied())
    prune_model(model, 0.5)
    mask = get_masks(model)["0"]
    for load in (lambda: model.load_state_dict(plain), lambda: rewind_model(model, plain)):
        load()
        assert not model[0].weight[~mask].any()  # type: ignore[index]
        assert model[0].weight[mask].all()  # type: ignore[index]
    alone = copy.deepcopy(model[1])  # type: ignore[index]
    assert torch.equal(get_masks(alone)[""], mask)
    optimizer = torch.optim.AdamW(alone.parameters(), lr=0.1)
    alone(torch.ones(1, 4, 5)).sum().backward()
    optimizer.step()
    assert not alone.weight[~mask].any()
    assert len(summary(model).rows) == 1
    for sparsity in lottery_rounds(model, 0.8, rounds=2):
        assert int((model[0].weight != 0).sum()) <= round((1 - sparsity) * 48) + 24  # type: ignore[index]
        assert is_clean(model)


EDITS: dict[str, Callable[[nn.Module], Any]] = {
    "init": lambda model: model.apply(lambda m: nn.init.ones_(m.weight) if isinstance(m, nn.Conv1d) else None),
    "add": lambda model: model[0].weight.requires_grad_(False).add_(1),  # type: ignore[index]
    "own step": lambda model: [p.requires_grad_(False).sub_(0.1) for p in model.parameters()],
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_in_place_does_not_act_under_the_mask(edit: str) -> None:
    model = prune(nn.Sequential(nn.Conv1d(4, 6, 3), nn.Linear(3, 3)))
    x = torch.randn(2, 4, 5)
    EDITS[edit](model)
    y = model(x)
    assert is_clean(model)
    model.state_dict()
    assert torch.equal(model(x), y)


def prune(model: nn.Sequential) -> nn.Sequential:
    mask_model(model)
    prune_model(model, 0.5, scope="layer")
    return model


@pytest.mark.parametrize("swap", [False, True])
def test_gradients_are_masked_of_what_was_frozen_or_converted(swap: bool) -> None:
    model = nn.Sequential(nn.Conv1d(4, 6, 3))
    model[0].requires_grad_(False)
    prune(model)
    model[0].requires_grad_(True)
    x = torch.randn(2, 4, 5)
    model(x).sum().backward()
    assert is_clean(model)
    torch.__future__.set_swap_module_params_on_conversion(swap)
    torch.__future__.set_overwrite_module_params_on_conversion(not swap)
    try:
        model.zero_grad()
        model.double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    optimizer = torch.optim.Adam([model[0].weight], lr=0.1)
    for _ in range(3):
        model(x).sum().backward()
        optimizer.step()
    assert is_clean(model)
    model[0].weight = nn.Parameter(torch.ones_like(model[0].weight))  # type: ignore[arg-type]
    optimizer = torch.optim.Adam([model[0].weight], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
    assert is_clean(model)


def test_a_weight_that_is_computed_after_it_was_masked_is_refused() -> None:
    for compute in (
        nn.utils.parametrizations.weight_norm,
        lambda module: torch_prune.l1_unstructured(module, "weight", 0.3),
    ):
        model = prune(nn.Sequential(nn.Conv1d(4, 6, 3)))
        compute(model[0])  # type: ignore[operator]
        with pytest.raises(ValueError, match=r"'weight' of a .*Conv1d is computed now .*: call unmask_model before"):
            model(torch.ones(1, 4, 5))
        plain = nn.Linear(2, 2)
        plain(torch.ones(2)).sum().backward()
        torch.optim.SGD(plain.parameters(), lr=0.1).step()  # other models train on
        with pytest.raises(ValueError, match="is computed now"):
            check_masks(model, torch.ones(1, 4, 5))


def test_a_fraction_of_everything_counts_what_is_masked_elsewhere() -> None:
    model = prune(nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20), nn.Embedding(50, 8), nn.Linear(20, 20)))
    mask_model(model, include="2")
    compress(model[3:], "sparse")
    model[3] = compress(model[3], "sparse")
    for of in ("weights", "model"):
        for sparsity in (0.4, 0.45):
            prune_model(model, sparsity + 0.1 * (of == "model"), of=of, include=["1", "2"], on_empty="keep")  # type: ignore[arg-type]
            found = summary(model).weight_sparsity if of == "weights" else summary(model).model_sparsity
            assert found == pytest.approx(sparsity + 0.1 * (of == "model"), abs=0.01)


def test_other_corners() -> None:
    long = nn.ParameterDict({"scale": torch.ones(5000)})
    mask_model(long, {"scale": torch.arange(5000) % 2})
    assert int((long["scale"] != 0).sum()) == 2500
    model = network(0.5)
    groups = [{"params": list(module.parameters(recurse=False))} for module in model.modules()]
    torch.optim.SGD([group for group in groups if group["params"]], lr=0.1)  # each parameter in one group
    named = mask_model(nn.ModuleDict({"flora_encoder": nn.Linear(3, 3), "posterior": nn.Linear(3, 3)}))
    assert list(get_masks(named)) == ["flora_encoder", "posterior"]
    with pytest.raises(ValueError, match="embedding with sparse gradients"):
        mask_model(nn.ModuleDict({"table": nn.Embedding(5, 4, sparse=True)}), include="table")
    other = nn.Module()
    other.kern = nn.Parameter(torch.randn(5, 4, 6))
    mask_model(other, include="kern")
    for structure in ({"block": (1, 8)}, {"scope": "erdos_renyi"}, {"keep_at_least": {"row": 1}}):
        with pytest.raises(ValueError, match="nobody knows those of kern"):
            prune_model(other, 0.5, **structure)  # type: ignore[arg-type]
    kib = sum(row.nbytes for row in summary(network()).rows)
    assert kib == sum(5 * mask.numel() for mask in get_masks(network()).values()) + 4 * 4  # and the bias of the head


@pytest.mark.parametrize("score", ["snip", "taylor", lambda weight, gradient: (weight * gradient).abs()])
def test_scores_of_gradients_that_overflow_wait_for_the_next_step(score: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = mask_model(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
    optimizer = freeze_masked(torch.optim.SGD(model.parameters(), lr=0.1), model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)  # type: ignore[attr-defined, unused-ignore]
    pruner = ScheduledPruning(model, CubicSchedule(0.8, begin=0, end=4, every=2), score=score, scope="layer")
    reached = []
    for step in range(7):
        optimizer.zero_grad()
        loss = model(torch.randn(6, 8)).square().mean() * (1e38 if step in (2, 3) else 1.0)
        scaler.scale(loss).backward()
        with caplog.at_level("WARNING", "maskedlinear"):
            pruner.step()
        if step == 2:
            state = pruner.state_dict()
            pruner = ScheduledPruning(model, pruner.schedule, score=score, scope="layer")
            pruner.load_state_dict(state)
        scaler.step(optimizer)
        scaler.update()
        reached.append(summary(model).sparsity)
    assert reached[1] == reached[2] == reached[3] < reached[4] == pytest.approx(0.8, abs=0.01)
    assert caplog.text.count("its gradients are not finite") == 2


def test_a_module_that_was_replaced_is_named() -> None:
    model = mask_model(nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.Linear(8, 4)}))
    prune_model(model, 0.3)
    model["head"] = nn.Linear(8, 6)  # as resize_token_embeddings does
    with pytest.warns(
        UserWarning, match=r"^head have no mask .* as by resize_token_embeddings\? mask_model\(model\) masks"
    ):
        prune_model(model, 0.5)
    prune_model(copy.deepcopy(mask_model(model)), 0.6)
    part = nn.ModuleDict({"body": mask_model(nn.Sequential(nn.Linear(8, 8))), "head": nn.Linear(8, 4)})
    prune_model(part, 0.5)  # whose body alone was masked
    unmask_model(model, include="head")
    prune_model(model, 0.6)  # by choice
    chosen = mask_model(nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.Linear(8, 4)}), include="body")
    prune_model(chosen, 0.5)


def test_masks_of_layers_in_the_sparse_form_are_their_patterns() -> None:
    model = mask_model(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
    prune_model(model, 0.5, scope="layer")
    dense = get_masks(model)
    half = copy.deepcopy(model)
    half[0] = SparseLinear.from_masked(half[0])
    masks = get_masks(half)
    assert isinstance(masks["0"], SparsityPattern)
    torch.testing.assert_close(torch.as_tensor(masks["0"].to_mask()), dense["0"])
    set_masks(half, masks)
    set_masks(half, dense)
    for other in (torch.ones(16, 8), SparsityPattern.full((16, 8))):
        with pytest.raises(ValueError, match=r"keeps the number of its connections, 64 of shape .*; got 128 .* for 0"):
            set_masks(half, {"0": other})
    with pytest.raises(ValueError, match="the mask of 0: "):
        set_masks(half, {"0": dense["0"].float() * 2})
    average = copy.deepcopy(half)
    regrow_model(half, 0.5, seed=1)
    values = average[0].to_masked().weight
    set_masks(average, get_masks(half))  # as many connections, others: what an average of the model needs
    assert get_masks(average)["0"] == get_masks(half)["0"]
    both = dense["0"] & torch.as_tensor(get_masks(half)["0"].to_mask())
    torch.testing.assert_close(average[0].to_masked().weight, torch.where(both, values, 0))
    prune_model(model, 0.9, scope="layer")
    set_masks(model, masks)  # of dense layers they are masks like others
    assert all(torch.equal(mask, dense[name]) for name, mask in get_masks(model).items())


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimisation as it is written everywhere: two steps of an optimizer that it makes, at one batch."""

    def __init__(self, params: Any, base: type[torch.optim.Optimizer], rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = torch.enable_grad()(closure)()
        weights = [weight for group in self.param_groups for weight in group["params"]]
        moves = [0.05 * weight.grad.sign() + 0.01 for weight in weights]  # not masked
        torch._foreach_add_(weights, moves)
        torch.enable_grad()(closure)()
        torch._foreach_sub_(weights, moves)
        self.base_optimizer.step()
        return loss


class Lookahead(torch.optim.Optimizer):
    """Slow weights that fast ones come back to: a wrapper that has parameter groups of the optimizer in it."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.param_groups, self.state = optimizer, optimizer.param_groups, optimizer.state
        self.defaults = optimizer.defaults
        self.slow = [weight.detach() + 1 for group in self.param_groups for weight in group["params"]]

    def step(self, closure: Any = None) -> Any:
        self.optimizer.step()
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for slow, weight in zip(self.slow, weights, strict=True):
            slow.lerp_(weight.detach(), 0.5)
            weight.data.copy_(slow)


@pytest.mark.parametrize("wrap", ["sam", "lookahead", "accelerate"])
def test_wrapped_optimizers_are_guarded(wrap: str) -> None:
    model = network(0.7)
    options = {"lr": 0.01, "weight_decay": 0.1}
    plain = torch.optim.AdamW(model.parameters(), **options)
    if wrap == "sam":
        optimizer: Any = Sam(model.parameters(), torch.optim.AdamW, **options)
    elif wrap == "lookahead":
        optimizer = Lookahead(plain)
    else:
        optimizer = Accelerator(cpu=True).prepare_optimizer(plain)
    freeze_masked(optimizer, model)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = model(X).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        closure()
        optimizer.step(closure)
        assert is_clean(model)
    assert check_masks(model, X).ok


def test_an_optimizer_that_holds_none_of_the_weights_is_refused() -> None:
    model = network(0.7)
    masters = [weight.detach().clone().requires_grad_() for weight in model.parameters()]
    before = torch.optim.Adam(model.parameters())
    for optimizer in (torch.optim.Adam(masters), torch.optim.Adam(copy.deepcopy(model).parameters())):
        with pytest.raises(ValueError, match=r"this one holds none of the model's: .* a copy \(fp32 masters, say\)"):
            freeze_masked(optimizer, model)
    layers = mask_model(nn.Sequential(nn.Linear(8, 4)))
    before = torch.optim.Adam(layers.parameters())
    prune_model(layers, 0.9)
    with pytest.raises(
        ValueError, match="layers in the sparse form need no guard, but an optimizer made after compress"
    ):
        freeze_masked(before, compress(layers, "sparse"))
    with pytest.raises(TypeError, match=r"a wrapper that is no torch\.optim\.Optimizer, guard the optimizer in it"):
        freeze_masked(object(), model)  # type: ignore[arg-type]


def test_dormant_values_of_a_whole_model_can_be_let_go() -> None:
    model = mask_model(nn.ModuleList([nn.Linear(8, 8), nn.Conv2d(3, 4, 3)]), keep_dormant=False)
    full = prune_model(model, 0.5)
    masks = get_masks(model)
    set_masks(model, full)
    for name, module in zip(("0", "1"), model, strict=True):
        assert not module.weight[~masks[name]].any()  # type: ignore[union-attr, index]
    with pytest.raises(ValueError, match="keep_dormant must be True, False or 'host'; got 'disk'"):
        mask_model(nn.Linear(2, 2), keep_dormant="disk")  # type: ignore[arg-type]


def test_gradients_of_what_is_not_meant_may_overflow() -> None:
    model = mask_model(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
    model(torch.randn(6, 8)).square().mean().backward()
    model[0].weight.grad.fill_(torch.inf)  # type: ignore[union-attr, operator]
    pruner = ScheduledPruning(model, CubicSchedule(0.8, begin=0, end=1), score="snip", include=["2"])
    assert pruner.step_at(1)
    assert summary(model[2]).sparsity == pytest.approx(0.8, abs=0.02)


def test_adapters_of_other_kinds_and_names_with_norm() -> None:
    class NormalizedLinear(nn.Linear):
        """A layer of a user's own, no normalisation."""

    model = nn.ModuleDict({"linear": NormalizedLinear(4, 4), "norm": nn.LayerNorm((4, 4))})
    model["oft_R"] = nn.ParameterDict({"default": nn.Parameter(torch.ones(2, 3, 3))})  # type: ignore[assignment]
    assert set(get_masks(mask_model(model))) == {"linear"}
    assert {other.why for other in summary(model).unmasked} == {"bias", "norm", "adapter"}
