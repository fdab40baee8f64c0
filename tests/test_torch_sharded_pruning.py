"""Weights that FSDP2 or tensor parallelism has cut are pruned and regrown where they are, as one process does the whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import in_processes

COMMON = '''
import warnings
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from maskedlinear.pruning import CubicSchedule
from maskedlinear.torch import (
    ScheduledPruning, ScheduledRegrowth, freeze_masked, get_masks, lottery_rounds, mask_model, prune_model, set_masks,
    summary,
)

warnings.simplefilter("ignore")
STEPS = 50
XS = torch.randn(STEPS, 8, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(0)
    parts = nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(96, 20), nn.Tanh(), nn.Linear(20, 7), nn.Linear(7, 3)
    return mask_model(nn.Sequential(*parts).double())


def fsdp(model, mesh):
    fully_shard(model[3], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def tensor_parallel(model, mesh):
    parallelize_module(model, mesh, {"3": ColwiseParallel(), "5": RowwiseParallel()})
    return model


def train(model, xs, how):
    optimizer = freeze_masked(torch.optim.AdamW(model.parameters(), lr=0.01), model)
    score = how if how in ("snip", "magnitude") else None
    pruner = ScheduledPruning(model, CubicSchedule(0.8, begin=5, end=30, every=5), score=score)
    regrowth = ScheduledRegrowth(model, optimizer, every=8, end=45, growth="gradient" if how == "rigl" else "random")
    if score is None:
        prune_model(model, 0.7, scope="layer")
    moved = []
    for x in xs:
        optimizer.zero_grad()
        with regrowth.recording():
            model(x).square().mean().backward()
        optimizer.step()
        pruner.step() if score else moved.append(regrowth.step())
    return moved


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def state(model):
    return [whole(p.detach()).clone() for p in model.parameters()], {n: whole(m) for n, m in get_masks(model).items()}


def train_alone(*hows):
    """Train in one process with the whole batch; each process has some of the trainings."""
    own = {}
    for how in hows[rank::size]:
        alone = network()
        own[how] = train(alone, XS, how), *state(alone)
    every = [None] * size
    dist.all_gather_object(every, own)
    return {how: found for part in every for how, found in part.items()}


def check(alone, model, how, batch=slice(None)):
    """Masks as in one process, weights within 1e-9, and the same bits in all processes that have the same entries."""
    moved = train(model, XS[:, batch], how)
    expected, weights, masks = alone[how]
    assert moved == expected and (not moved or sum(moved) > 50), (how, moved, expected)
    found, own = state(model)
    for name, mask in masks.items():
        assert torch.equal(own[name], mask) and not mask.all(), (how, name)
    for one, other in zip(found, weights):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    every = [None] * size
    parts = [(str(getattr(p, "placements", "")), p.detach()) for p in model.parameters()]
    dist.all_gather_object(every, [(where, p.to_local() if where else p) for where, p in parts])
    for other in every:
        for (where, one), (_, part) in zip(every[0], other):
            assert "Shard" in where or torch.equal(one, part), (how, where)


def raises(what, act, *arguments, **options):
    try:
        act(*arguments, **options)
    except ValueError as error:
        assert what in str(error), error
    else:
        raise AssertionError(what)
'''

PAIR = (
    COMMON
    + '''
def functions(mesh):
    """Prune, set and rewind as one process does, by every kind of score and scope."""
    one, cut = network(), fsdp(network(), mesh)
    for model, batch in ((one, XS[0]), (cut, XS[0][rank::size])):
        model(batch).square().mean().backward()
    before = get_masks(one)
    named = {name: torch.arange(mask.numel()).view(mask.shape) % 7 for name, mask in before.items()}
    for how in (
        {},
        {"score": "random", "seed": 3, "scope": "layer"},
        {"score": "taylor", "keep_at_least": {"row": 1}},
        {"score": "magnitude", "of": "model", "keep_at_least": {"layer": 2}},
        {"score": named, "on_empty": "keep", "scope": "erdos_renyi"},
        {"score": lambda w, g: w.abs() / w.norm()},
        {"include": "3", "block": (2, 4)},
    ):
        prune_model(one, 0.6, **how)
        prune_model(cut, 0.6, **how)
        masks = get_masks(one)
        assert all(torch.equal(whole(mask), masks[name]) for name, mask in get_masks(cut).items()), how
        tables = [[(r.name, r.connections, r.dead_outputs, r.dead_inputs) for r in summary(m).rows] for m in (one, cut)]
        assert tables[0] == tables[1], how
        for model in (one, cut):
            set_masks(model, before)  # whole masks: each process takes its part
        assert all(torch.equal(a, b) for a, b in zip(state(cut)[0], state(network())[0]))
    masks = prune_model(cut, 0.5)
    set_masks(cut, masks)  # masks that are cut
    for model in (one, cut):
        for sparsity in lottery_rounds(model, 0.75, 2, seed=1, score="random"):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.5)
    for a, b in zip(state(one)[0], state(cut)[0]):
        assert torch.equal(a, b)
    what = "weights are cut over processes, which act together, ranks [0, 1]; got group=None"
    raises(what, prune_model, cut, 0.9, group=None)
    raises("a layer must keep a connection", prune_model, cut, 1.0)
    raises("needs the gradient of each weight; 0 has none", prune_model, fsdp(network(), mesh), 0.5, score="snip")
    prune_model(cut, 0.9, group=dist.group.WORLD)


def replicas():
    """What replicas would have as other masks is an error that names the weight and the ranks."""
    mesh = init_device_mesh("cpu", (size, 1), mesh_dim_names=("replicate", "shard"))
    model = fsdp(network(), mesh)
    prune_model(model, 0.3)
    before = {name: whole(mask) for name, mask in get_masks(model).items()}
    with torch.no_grad():
        model[3].weight.to_local().mul_(1 + rank * torch.rand(20, 96, dtype=torch.float64))
    what = " of 3 must be the same in all processes; got others on rank 1 than on rank 0"
    raises("the new mask" + what, prune_model, model, 0.6)
    assert all(torch.equal(whole(mask), before[name]) for name, mask in get_masks(model).items())
    raises("the weight under the new mask" + what, set_masks, model, before)


mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("data",))
alone = train_alone("rigl", "set", "snip", "magnitude")
for how in alone:
    check(alone, fsdp(network(), mesh), how, slice(rank, None, size))
for how in ("rigl", "snip"):
    check(alone, tensor_parallel(network(), mesh), how)
functions(mesh)
replicas()
end()
'''
)


def test_two_processes_that_cut_weights_prune_and_regrow_as_one_does(tmp_path: Path) -> None:
    in_processes(PAIR, tmp_path)


FOUR = (
    COMMON
    + """
mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("data",))
alone = train_alone("rigl", "set", "snip", "magnitude")
for how in alone:
    check(alone, fsdp(network(), mesh), how, slice(rank, None, size))
end()
"""
)

GRIDS = (
    COMMON
    + """
alone = train_alone("rigl", "snip")
grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
for how in alone:
    model = fsdp(tensor_parallel(network(), grid["tensor"]), grid["data"])
    check(alone, model, how, slice(rank // 2, None, 2))
hybrid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
check(alone, fsdp(network(), hybrid), "rigl", slice(rank, None, size))
end()
"""
)


@pytest.mark.slow
@pytest.mark.parametrize("program", [FOUR, GRIDS], ids=["fsdp", "grids"])
def test_four_processes(program: str, tmp_path: Path) -> None:
    in_processes(program, tmp_path, 4)
