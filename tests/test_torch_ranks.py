"""Two processes that train one model change its masks alike, and as one process with the whole batch does."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import in_processes

PROGRAM = '''
import warnings
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from maskedlinear.pruning import CubicSchedule
from maskedlinear.torch import (
    ScheduledPruning, ScheduledRegrowth, compress, freeze_masked, get_masks, mask_model, prune_model, set_masks
)

warnings.simplefilter("ignore")
STEPS = 50
XS = torch.randn(STEPS, 8, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def network(seed=0):
    torch.manual_seed(seed)
    parts = nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(96, 20), nn.Tanh(), nn.Linear(20, 4)
    return mask_model(nn.Sequential(*parts).double())


def train(model, xs, how):
    """Train a model, alone or wrapped; its masks change as ``how`` says."""
    optimizer = freeze_masked(torch.optim.AdamW(model.parameters(), lr=0.01), model)
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    pruner = ScheduledPruning(model, CubicSchedule(0.8, begin=5, end=30, every=5), score="snip")
    growth = "gradient" if how == "rigl" else "random"
    regrowth = ScheduledRegrowth(inner if how == "rigl" else model, optimizer, every=4, end=45, growth=growth)
    if how != "snip":
        prune_model(inner, 0.7, scope="layer")
    for x in xs:
        optimizer.zero_grad()
        with regrowth.recording():
            loss = model(x).square().mean()
            loss.backward()
        optimizer.step()
        pruner.step() if how == "snip" else regrowth.step()


def main():
    for how in ("rigl", "set", "snip"):
        begun = network()
        with torch.no_grad():
            for parameter in begun.parameters():
                parameter.add_(rank)  # what the first begins with holds
        model = DistributedDataParallel(begun)
        train(model, XS[:, rank::2], how)
        alone = network()
        train(alone, XS, how)
        state = {name: value for name, value in model.module.state_dict().items()}
        every = [None, None]
        dist.all_gather_object(every, state)
        for name, value in every[0].items():
            assert torch.equal(value, every[1][name]), (how, name)
        masks = get_masks(alone)
        assert any(not mask.all() for mask in masks.values())
        assert all(torch.equal(mask, masks[name]) for name, mask in get_masks(model.module).items()), how
        for one, other in zip(model.module.parameters(), alone.parameters()):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    disagree(rank)
    end()


def disagree(rank):
    """What would be different masks is an error that names the weight and the rank; and nobody waits who acts alone."""
    other = network(seed=rank)
    for act in (
        lambda: prune_model(other, 0.5, group=dist.group.WORLD),
        lambda: set_masks(other, {"5": torch.full((4, 20), bool(rank))}, group=dist.group.WORLD),
    ):
        before = get_masks(other)
        try:
            act()
        except ValueError as error:
            assert "must be the same in all processes; got others on rank 1 than on rank 0" in str(error), error
        else:
            raise AssertionError
        assert all(torch.equal(mask, before[name]) for name, mask in get_masks(other).items())
    dormant_values_differ(rank)
    if rank == 0:
        prune_model(other, 0.5)
        prune_model(other, 0.6, group=None)
    # Before it is wrapped: the gradients of all batches decide.
    early = network()
    early(XS[0, rank::2]).square().mean().backward()
    prune_model(early, 0.6, score="snip", group=dist.group.WORLD)
    whole = network()
    whole(XS[0]).square().mean().backward()
    prune_model(whole, 0.6, score="snip", group=None)
    assert all(torch.equal(mask, get_masks(whole)[name]) for name, mask in get_masks(early).items())


def dormant_values_differ(rank):
    """Nobody sends what is dormant: where it is not the same, it is an error that it comes back, and only that."""
    alike = network()
    before = prune_model(alike, 0.5, scope="layer", group=dist.group.WORLD)
    now, wrapped = get_masks(alike), DistributedDataParallel(alike)
    for name, layer in (("0", alike[0].masked_weight), ("5", alike[5])):
        kept = layer.dormant.clone()
        layer.dormant.add_(rank * (kept != 0))
        for model, group in ((alike, dist.group.WORLD), (wrapped, "model")):
            try:
                set_masks(model, {name: before[name]}, group=group)
            except ValueError as error:
                said = str(error).replace("module.", "")
                assert f"of {name} must be the same in all processes; got others on rank 1 than on rank 0" in said, said
            else:
                raise AssertionError(name)
            assert all(torch.equal(mask, now[own]) for own, mask in get_masks(alike).items())
        set_masks(alike, {name: now[name]}, group=dist.group.WORLD)  # which brings nothing back
        layer.dormant.copy_(kept)
    set_masks(alike, before, group=dist.group.WORLD)
    for one, other in zip(alike.parameters(), network().parameters()):
        assert torch.equal(one, other)


main()
'''


def test_masks_change_alike_and_as_in_one_process(tmp_path: Path) -> None:
    in_processes(PROGRAM, tmp_path)


def test_a_group_is_a_group() -> None:
    from torch import nn

    from maskedlinear.torch import mask_model, prune_model

    with pytest.raises(ValueError, match="group must be a process group, None, or 'model'; got 'world'"):
        prune_model(mask_model(nn.Linear(3, 2)), 0.5, group="world")
