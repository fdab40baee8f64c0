"""Masks and dormant values of weights that FSDP2, tensor parallelism or both have cut over processes: cut as the weights
are, never gathered, and as in one process that has the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as dcp

from helpers import in_processes, needs_fsdp
from maskedlinear import masks
from maskedlinear.torch import mask_model

pytestmark = needs_fsdp

COMMON = '''
import os, warnings
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from maskedlinear import masks
from maskedlinear.torch import (
    MaskedLinear, freeze_masked, get_masks, mask_model, prune_model, set_masks, summary, unmask_model
)

warnings.simplefilter("ignore")
X = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
SENT = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
NAMES = ("0", "3.masked_weight", "5")


def random(weight, seed, sparsity=0.5):
    shape = weight.shape
    return torch.tensor(masks.random((shape[0], shape[1:].numel()), sparsity=sparsity, seed=seed)).view(shape)


def network(seed=0):
    torch.manual_seed(seed)
    parts = nn.Linear(6, 5), nn.Tanh(), nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 4, 2), nn.Flatten(), nn.Linear(16, 3)
    model = nn.Sequential(*parts).double()
    return mask_model(model, {name: random(model.get_submodule(name).weight, seed) for name in "035"})


def fsdp(model, mesh):
    fully_shard(model[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def weights(model):
    return [model.get_submodule(name) for name in NAMES]


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_equal(one, other, near=False):
    """Masks, live and dormant values of two models are the same; those of a cut one are cut as its weights are."""
    for a, b in zip(weights(one), weights(other)):
        if isinstance(a.weight, DTensor):
            for tensor in (a.mask, a.dormant, a.weight):
                assert type(tensor) is DTensor or tensor is a.weight
                assert tensor.placements == a.weight.placements and tensor.device_mesh == a.weight.device_mesh
                assert tensor.to_local().shape == a.weight.to_local().shape
        assert torch.equal(whole(a.mask), whole(b.mask))
        assert a.sparsity == b.sparsity
        assert not whole(a.weight)[~whole(a.mask)].any()
        for name in ("weight", "full_weight", "dormant"):
            x, y = (whole(getattr(m, name)) for m in (a, b))
            x, y = (torch.zeros(a.mask.shape, dtype=torch.float64) if z is None else z for z in (x, y))
            assert near or torch.equal(x, y), name
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


class Sent(TorchDispatchMode):
    """Writes down what is sent."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "c10d" in str(function):
            self.seen.append(str(function).split(".")[1])
        return function(*args, **(kwargs or {}))
'''

FSDP = (
    COMMON
    + '''

def main():
    mesh, twin, model = init_device_mesh("cpu", (size,)), network(), network()
    model[5].mask[0, 0] ^= True  # an edit in place before it is cut acts after
    twin[5].mask[0, 0] ^= True
    fsdp(model, mesh)
    train(model, twin)
    states(model, mesh)
    files(model, mesh)
    functions(model, mesh)
    gathered(model)
    started_without_values(mesh)
    end()


def train(model, twin):
    """50 steps would show no more than these: masks are set and edited, weights written to, in every state of FSDP2."""
    both = model, twin
    optimizers = [freeze_masked(torch.optim.AdamW(m.parameters(), lr=0.05, weight_decay=0.1), m) for m in both]
    for step in range(8):
        ys = [m(X) for m in both]
        torch.testing.assert_close(*ys)
        for m, y, optimizer in zip(both, ys, optimizers):
            y.square().sum().backward()
            for layer in weights(m):
                assert not whole(layer.weight.grad)[~whole(layer.mask)].any()
            optimizer.step()
            optimizer.zero_grad()
        assert_equal(*both, near=True)
        for m in both:
            first, kernel, last = weights(m)
            if step == 2:  # as a whole; as cut as the weight is
                first.set_mask(random(first.weight, 9, 0.3)), last.set_mask(~last.mask)
                kernel.set_mask(torch.ones(4, 1, 2, dtype=torch.bool))
            if step == 3:  # while a gathered copy of the last is in its place
                m.eval()(X)
                last.set_mask(random(last.mask, 4, 0.25)), kernel.set_mask(random(kernel.mask, 5))
            if step == 4:  # the parts of a mask, in place
                edit(first.mask)
            if step == 5:  # what a merge leaves under the mask does not act
                with torch.no_grad():
                    first.weight.add_(1.0), kernel.weight.add_(1.0), last.weight.add_(1.0)
        if step == 3:
            torch.testing.assert_close(*(m(X) for m in both))
            # Read where it acts, past forward: the copy too.
            assert torch.equal(model[5].weight != 0, whole(model[5].mask))
            torch.testing.assert_close(model[5].weight, twin[5].weight)
            model.train(), twin.train()
            model.reshard()


def edit(mask):
    """Switch off the first row, in place: the first process has it."""
    if not isinstance(mask, DTensor) or rank == 0:
        mask = mask if not isinstance(mask, DTensor) else mask.to_local()
        mask[0] = False
    else:
        mask.to_local().mul_(True)


def states(model, mesh):
    """The state of rank 0, whole, is what all ranks have, dormant values too, in any kind of model."""
    model.reshard()
    full = get_model_state_dict(model, options=FULL)
    assert (rank == 0) == ("5.dormant" in full)
    for other in (fsdp(network(5), mesh), network(6 + rank), DistributedDataParallel(network(7 + rank))):
        set_model_state_dict(other, dict(full), options=SENT)
        assert_equal(other if not hasattr(other, "module") else other.module, model)
    other = fsdp(network(8), mesh)
    set_model_state_dict(other, get_model_state_dict(model))
    assert_equal(other, model)
    assert "dormant" not in dict(model[0].named_buffers()) and len(list(model.buffers())) == 3


def files(model, mesh):
    dcp.save({"model": model.state_dict()}, checkpoint_id=f"{folder}/two")
    into, other = {"model": fsdp(network(5), mesh).state_dict()}, fsdp(network(6), mesh)
    dcp.load(into, checkpoint_id=f"{folder}/two")
    other.load_state_dict(into["model"])
    assert_equal(other, model)
    one = fsdp(network(5), mesh)  # what one process has saved, of other masks
    into = {"model": one.state_dict()}
    dcp.load(into, checkpoint_id=f"{folder}/one")
    one.load_state_dict(into["model"])
    assert_equal(one, network(3))
    # Hugging Face's format has no booleans that torch can put together: https://github.com/pytorch/pytorch/issues/192726
    numbers = lambda state: {name: value.half() if value.dtype is torch.bool else value for name, value in state.items()}
    state = numbers(model.state_dict())
    options = {"save_distributed": True, "fqn_to_index_mapping": dict.fromkeys(state, 1), "enable_consolidation": True}
    dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(f"{folder}/hf", **options))
    into, other = numbers(other.state_dict()), fsdp(network(6), mesh)
    dcp.load(into, storage_reader=dcp.HuggingFaceStorageReader(f"{folder}/hf"))
    other.load_state_dict(into)
    assert_equal(other, model)


def functions(model, mesh):
    """Model functions find weights after the model was cut, whatever class FSDP2 has made of modules."""
    late = network(3)
    unmask_model(late)
    fsdp(late, mesh)(X)
    mask_model(late)
    assert isinstance(late[0], MaskedLinear) and isinstance(late[0], type(late).__mro__[1])
    assert [row.sparsity for row in summary(late).rows] == [0.0] * 3
    fresh = network(3)
    set_masks(late, get_masks(fresh))
    for layer in (late[0], late[5], late[3]):
        assert not whole(layer.weight)[~random(whole(layer.weight), 3)].any()
    late(X).square().sum().backward()
    assert not whole(late[0].weight.grad)[~whole(late[0].mask)].any()
    fresh.load_state_dict({name: whole(value) for name, value in late.state_dict().items()})
    assert_equal(late, fresh)
    before = prune_model(late, 0.8, scope="layer")
    assert all(layer.sparsity >= 0.75 for layer in weights(late))
    linear = late[0].to_linear()
    assert torch.equal(linear.weight, whole(late[0].weight)) and type(linear) is nn.Linear
    set_masks(late, before)
    assert_equal(late, fresh)
    y = late(X)
    unmask_model(late)
    assert type(late[5]) is nn.Linear and not isinstance(late[0], MaskedLinear) and "mask" not in str(late.state_dict())
    assert torch.equal(late(X), y)


def gathered(model):
    """Nothing is sent but what FSDP2 sends of a dense model."""
    dense = fsdp(nn.Sequential(*(unmask_model(network()))), model[0].weight.device_mesh)
    sent = {}
    for m in (dense, model):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
        m(X).sum().backward()
        with Sent() as passes:
            m(X).sum().backward()
            optimizer.step()
            m(X)
        sent[m] = passes.seen
    assert sent[model] == sent[dense] and sent[dense], sent
    model.reshard()
    mask = random(model[5].mask, 11)
    optimizer = freeze_masked(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model)
    with Sent() as edits:
        model[5].set_mask(mask), model[3].masked_weight.set_mask(~model[3].masked_weight.mask)
        model.train(), model.eval(), model.state_dict(), get_masks(model)
        model[5].full_weight, model[5].masked_weight, optimizer.step()
    assert not edits.seen, edits.seen


def started_without_values(mesh):
    mask = torch.tensor(masks.random((4, 6), sparsity=0.5))
    empty = nn.Sequential(MaskedLinear(6, 4, mask=mask, device="meta"), nn.Linear(4, 4, device="meta"))
    fsdp(empty, mesh).to_empty(device="cpu")
    empty[0].reset_parameters(), empty[1].reset_parameters()
    assert torch.equal(whole(empty[0].mask), mask)
    empty(torch.ones(2, 6)).sum().backward()


main()
'''
)

PARALLEL = (
    COMMON
    + '''

def main():
    mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=("data", "parts"))
    for data in (None, mesh["data"]):  # with FSDP2 too, whose gathered copies are cut as well
        twin, model = network(), network(0)
        parallelize_module(model, mesh["parts"], {"0": ColwiseParallel(output_layouts=Replicate()), "5": RowwiseParallel(
            input_layouts=Replicate())})
        if data is not None:
            fsdp(model, data)
        train(model, twin)
    differently_seeded(mesh["parts"])
    end()


def train(model, twin):
    optimizers = [freeze_masked(torch.optim.AdamW(m.parameters(), lr=0.05, weight_decay=0.1), m) for m in (model, twin)]
    for step in range(4):
        ys = [m(X) for m in (model, twin)]
        torch.testing.assert_close(whole(ys[0]), ys[1])
        for m, y, optimizer in zip((model, twin), ys, optimizers):
            whole(y).square().sum().backward()
            for layer in (m[0], m[5]):
                assert not whole(layer.weight.grad)[~whole(layer.mask)].any()
            optimizer.step()
            optimizer.zero_grad()
        if hasattr(model, "reshard"):
            model.reshard()
        for a, b in ((model[0], twin[0]), (model[5], twin[5])):
            assert a.mask.placements == a.weight.placements == a.dormant.placements
            assert torch.equal(whole(a.mask), b.mask) and a.sparsity == b.sparsity
            for name in ("full_weight", "weight"):
                torch.testing.assert_close(whole(getattr(a, name)), getattr(b, name), rtol=1e-9, atol=1e-9)
        for m in (model, twin):
            m[0].set_mask(random(m[0].mask, step + 1)), m[5].set_mask(~m[5].mask)
    torch.testing.assert_close(model[5].to_linear().weight, twin[5].weight)


def differently_seeded(mesh):
    """Tensor parallelism sends what the first process has: weights, masks and dormant values."""
    first, own = network(0)[5], network(rank)[5]
    if rank:
        own.set_mask(torch.ones(3, 16, dtype=torch.bool))
    parallelize_module(own, mesh, RowwiseParallel())
    for name in ("weight", "mask", "dormant", "full_weight"):
        assert torch.equal(whole(getattr(own, name)), getattr(first, name)), name


main()
'''
)


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    parts = nn.Linear(6, 5), nn.Tanh(), nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 4, 2), nn.Flatten(), nn.Linear(16, 3)
    model = nn.Sequential(*parts).double()
    shapes = {name: model.get_parameter(f"{name}.weight").shape for name in "035"}
    given = {
        name: masks.random((s[0], s[1:].numel()), sparsity=0.5, seed=seed).reshape(s) for name, s in shapes.items()
    }
    mask_model(model, given)
    return model


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_fully_sharded(tmp_path: Path) -> None:
    dcp.save({"model": network(3).state_dict()}, checkpoint_id=tmp_path / "one", no_dist=True)
    in_processes(FSDP, tmp_path)
    alone = network(4)
    into = {"model": alone.state_dict()}
    dcp.load(into, checkpoint_id=tmp_path / "two", no_dist=True)
    alone.load_state_dict(into["model"])
    weight, mask = alone.get_parameter("5.weight"), alone.get_buffer("5.mask")
    assert not weight[~mask].any()
    assert into["model"]["5.dormant"][~mask].any()


def test_tensor_parallel(tmp_path: Path) -> None:
    in_processes(PARALLEL, tmp_path)
