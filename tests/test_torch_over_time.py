"""Masks that change while a model trains: schedules in a loop, rewinding, connections that move."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskedlinear.pruning import CubicSchedule, GeometricSchedule, cosine_decay
from maskedlinear.torch import (
    MaskedLinear,
    ScheduledPruning,
    ScheduledRegrowth,
    compress,
    freeze_masked,
    get_masks,
    lottery_rounds,
    mask_model,
    prune_model,
    rewind_model,
    summary,
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return mask_model(nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)))  # type: ignore[return-value]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, recording: Any = None) -> None:
    optimizer.zero_grad()
    if recording is None:
        model(torch.randn(12, 8)).square().mean().backward()
    else:
        with recording:
            model(torch.randn(12, 8)).square().mean().backward()
    optimizer.step()


def test_a_schedule_prunes_at_its_steps_and_goes_on_from_a_state() -> None:
    model, schedule = network(), CubicSchedule(0.8, begin=2, end=9, every=3)
    optimizer = freeze_masked(torch.optim.AdamW(model.parameters(), weight_decay=0.1), model)
    pruner = ScheduledPruning(model, schedule, scope="layer")
    done = []
    for step in range(12):
        train(model, optimizer)
        done.append(pruner.step())
        live = get_masks(model)["0"].float().mean().item()
        assert live == pytest.approx(1 - schedule(step), abs=1 / 128)
        if step == 5:
            saved = pruner.state_dict()
            pruner = ScheduledPruning(model, schedule, scope="layer")
            pruner.load_state_dict(saved)
    assert [step for step, pruned in enumerate(done) if pruned] == schedule.steps() == [2, 5, 8, 9]
    assert summary(model).sparsity == pytest.approx(0.8, abs=0.02)


def test_rewinding_keeps_the_masks_and_brings_everything_else_back() -> None:
    model = network()
    saved = copy.deepcopy(model.state_dict())
    train(model, torch.optim.SGD(model.parameters(), 0.1))
    prune_model(model, 0.5)
    masks = get_masks(model)
    assert not torch.equal(model[0].weight, saved["0.weight"])
    rewind_model(model, saved)
    for name, tensor in model.state_dict().items():
        if name.endswith("mask"):
            assert torch.equal(tensor, masks[name.removesuffix(".mask")]), name
        elif name.endswith("bias"):
            assert torch.equal(tensor, saved[name]), name
    assert all(
        torch.equal(model[place].full_weight, saved[f"{place}.weight"])
        for place in range(len(model))
        if isinstance(model[place], MaskedLinear)
    )
    plain = {name: tensor for name, tensor in saved.items() if not name.endswith("mask")}
    rewind_model(model, plain)  # of a model that was not masked yet
    with pytest.raises(RuntimeError, match="Missing key"):
        rewind_model(model, {"0.weight": saved["0.weight"]})


def test_rounds_of_a_lottery_start_from_the_same_weights() -> None:
    model = network()
    start = copy.deepcopy(model.state_dict())
    seen: list[float] = []
    told: list[float] = []
    masks: dict[str, Tensor] = {}
    for sparsity in lottery_rounds(model, 0.8, rounds=3, scope="layer", progress=told.append):
        assert torch.equal(model[0].full_weight, start["0.weight"])
        assert summary(model).sparsity == pytest.approx(sparsity, abs=0.01)
        now = get_masks(model)
        assert all((masks[name] | ~mask).all() for name, mask in now.items() if masks)  # what is gone stays gone
        masks, seen = now, [*seen, sparsity]
        optimizer = freeze_masked(torch.optim.SGD(model.parameters(), 0.5), model)
        for _ in range(3):
            train(model, optimizer)
    assert seen == [GeometricSchedule(0.8, 3)(round) for round in range(4)]
    assert told == [0.25, 0.5, 0.75, 1]
    assert not torch.equal(model[0].weight, start["0.weight"])  # the last round's training stays
    with pytest.raises(ValueError, match="rounds >= 1"):
        lottery_rounds(model, 0.8, rounds=0)


@pytest.mark.parametrize("growth", ["gradient", "random"])
@pytest.mark.parametrize("sparse", [False, True])
def test_connections_move_at_their_steps(growth: Any, sparse: bool) -> None:
    model = network()
    prune_model(model, 0.5, scope="layer")
    if sparse:
        compress(model, "sparse")
    optimizer = torch.optim.Adam(model.parameters())
    if not sparse:
        freeze_masked(optimizer, model)
    how: Any = {"every": 3, "end": 10, "growth": growth, "exclude_dropped": True}
    regrowth = ScheduledRegrowth(model, optimizer, **how)
    moved = []
    for step in range(12):
        if step == 8:
            state = regrowth.state_dict()
            regrowth = ScheduledRegrowth(model, optimizer, **how)
            regrowth.load_state_dict(state)
        train(model, optimizer, regrowth.recording())
        moved.append(regrowth.step())
    assert [step for step, count in enumerate(moved) if count] == [3, 6, 9][: sum(count > 0 for count in moved)]
    assert moved[3] == sum(int(cosine_decay(3, 10) * live) for live in (64, 32))
    assert moved[3] > moved[6] > 0
    assert summary(model).sparsity == 0.5


def test_what_is_out_of_range_or_not_recorded_is_refused() -> None:
    model = network()
    with pytest.raises(ValueError, match="every must be at least 1 step; got 0"):
        ScheduledRegrowth(model, every=0, end=5)
    with pytest.raises(ValueError, match="growth must be 'gradient' or 'random'; got 'weight'"):
        ScheduledRegrowth(model, every=1, end=5, growth="weight")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 <= initial <= 1"):
        ScheduledRegrowth(model, every=1, end=5, initial=2.0)
    regrowth = ScheduledRegrowth(model, every=1, end=5)
    regrowth.step()
    with pytest.raises(ValueError, match="inside `with regrowth"):
        regrowth.step()
    with pytest.raises(ValueError, match="there is none"):
        ScheduledPruning(nn.Linear(2, 2), CubicSchedule(0.5, begin=0, end=1)).step()
    assert isinstance(model[0], MaskedLinear)
