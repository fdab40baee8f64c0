"""What happens to masked weights of any PyTorch module as a model lives: schedules, sharing, edits, conversions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from maskedlinear.pruning import CubicSchedule
from maskedlinear.torch import (
    ScheduledPruning,
    ScheduledRegrowth,
    check_masks,
    compress,
    freeze_masked,
    get_masks,
    lottery_rounds,
    mask_model,
    prune_model,
    rewind_model,
    summary,
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
