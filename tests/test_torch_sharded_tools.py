"""What is done with a model that processes share, besides training it: checked, printed, saved, exchanged, and what is
refused since it would come out wrong, or wait for ever."""

from __future__ import annotations

from pathlib import Path

from helpers import in_processes, needs_fsdp

pytestmark = needs_fsdp

PROGRAM = '''
import warnings
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from maskedlinear import checkpoint, masks
from maskedlinear.torch import (
    MaskedLinear, SparseColwiseParallel, SparseLinear, SparseRowwiseParallel, check_masks, compress, get_masks, mask_model,
    prune_model, regrow_model, set_masks, shrink
)
from maskedlinear_torch import _checkpoint

warnings.simplefilter("ignore")
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def network(seed=0):
    torch.manual_seed(seed)
    return mask_model(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))


def sparse(seed=0):
    torch.manual_seed(seed)
    pair = [SparseLinear(i, o, mask=masks.random((o, i), sparsity=0.5, seed=seed)) for i, o in ((6, 5), (5, 3))]
    return nn.Sequential(pair[0], nn.Tanh(), pair[1])


def shared_out(model, mesh):
    plan = {"0": SparseColwiseParallel(output_layouts=Replicate()), "2": SparseRowwiseParallel(input_layouts=Replicate())}
    return parallelize_module(model, mesh, plan)


def refused(act, said):
    try:
        act()
    except ValueError as error:
        assert said in str(error), error
    else:
        raise AssertionError(said)


class Leaky(MaskedLinear):
    """What is dormant acts."""

    def forward(self, x):
        y = super().forward(x)
        return y if self.dormant is None else y + self.dormant.to_local().sum()


def checked(mesh):
    for cut in (fully, parallel):
        model = cut(network(), mesh)
        prune_model(model, 0.5)
        x = X[rank::size] if cut is fully else X
        model(x).sum().backward()
        before = [parameter.grad for parameter in model.parameters()]
        values = [parameter.grad.clone() for parameter in model.parameters()]
        x.requires_grad_()
        assert check_masks(model, x).failures == {}
        for parameter, gradient, value in zip(model.parameters(), before, values):
            assert parameter.grad is gradient and torch.equal(gradient.to_local(), value.to_local())
        if rank == 1:  # one process alone has left something there, and all are told
            part, mask = (tensor.to_local() for tensor in (model[0].stored_weight, model[0].mask))
            part.data[~mask] = 2.0
        found = check_masks(model, x)
        assert list(found.failures) == ["0"] and "masked places, but up to 2" in str(found), found
        assert check_masks(model, x).failures == {}
        model[2].weight.register_post_accumulate_grad_hook(lambda _: None)
        refused(lambda: check_masks(model, x), "a parameter with hooks of others, 2.weight")
    model = network()
    model[0] = Leaky.from_linear(model[0])
    fully(model, mesh)
    prune_model(model, 0.5)
    found = check_masks(model, X[rank::size]).failures
    assert "NaN in place of its dormant values acts" in str(found["0"]) and list(found) == ["0"], found


def fully(model, mesh):
    fully_shard(model[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def parallel(model, mesh):
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def printed_by_one(mesh):
    """Nobody waits for the others who prints a model, or writes under its mask."""
    model = fully(network(), mesh)
    prune_model(model, 0.5)
    if rank == 1:
        assert "of this process' part" in str(model)
        model[0].weight.to_local().data[:] = 1.0
        model[0].project()
    assert "of this process' part" not in str(network())


def exchanged(mesh):
    wrapped = DistributedDataParallel(prune_on_all(network()))
    refused(lambda: compress(wrapped, "sparse"), "wrap that anew")
    assert isinstance(compress(wrapped), DistributedDataParallel)
    for model in (wrapped, fully(network(), mesh)):
        refused(lambda: shrink(model, X), "shrink makes a smaller copy of a whole model")
    wrapped.module[0].dormant.add_(rank)
    full = {name: torch.ones_like(mask) for name, mask in get_masks(wrapped).items()}
    refused(lambda: set_masks(wrapped, full), "load the state of one process")


def prune_on_all(model):
    prune_model(model, 0.5, group=dist.group.WORLD)
    return model


def files(mesh):
    """What tensor parallelism has shared out is in files as in those of one process, with what optimizers keep."""
    whole, shared = sparse(), shared_out(sparse(), mesh)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1) for model in (whole, shared)]
    for model, optimizer, name in ((whole, optimizers[0], "whole"), (shared, optimizers[1], "shared")):
        model(X).square().sum().backward()
        optimizer.step()
        checkpoint.save(model, folder / (name if model is shared else f"{name} {rank}"), optimizer=optimizer)
    ours, theirs = checkpoint.load(folder / "shared"), checkpoint.load(folder / f"whole {rank}")
    assert list(ours) == list(theirs)
    for name in ours:
        if not name.endswith("structure"):
            torch.testing.assert_close(*(torch.tensor(arrays[name].numpy()) for arrays in (ours, theirs)), msg=name)
    other = shared_out(sparse(5), mesh)
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.3)
    checkpoint.load_into(other, folder / "shared", optimizer=optimizer)
    for model, own in ((other, optimizer), (shared, optimizers[1]), (whole, optimizers[0])):
        own.zero_grad()
        model(X).square().sum().backward()
        own.step()
    assert other[0].pattern == shared[0].pattern and torch.equal(other(X), shared(X))
    torch.testing.assert_close(other(X), whole(X))


def gathered_once(mesh):
    """What is gathered of a masked weight is so twice, for a look and for the file."""
    model, read = fully(network(), mesh), []
    prune_model(model, 0.5)
    own = _checkpoint.on_host
    _checkpoint.on_host = lambda tensor, *cut: read.append(tuple(tensor.shape)) or own(tensor, *cut)
    checkpoint.save(model, folder / "sent", dormant=True)
    _checkpoint.on_host = own
    assert read.count((8, 6)) <= 8, read  # mask, values, what is dormant, by its mask; and again


def cut_twice():
    """Connections of what both have cut do not move, before anything has changed."""
    mesh = init_device_mesh("cpu", (size, 1), mesh_dim_names=("data", "parts"))
    whole, model = sparse(), shared_out(sparse(), mesh["parts"])
    fully_shard(model, mesh=mesh["data"])
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (whole, model)]
    for one, optimizer, x in ((whole, optimizers[0], X), (model, optimizers[1], X[rank::size])):
        one(x).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(model(X), whole(X))
    other = sparse(4)
    for act in (lambda: regrow_model(model, 0.5), lambda: set_masks(model, get_masks(other))):
        refused(act, "got one that is cut by both")
    try:
        model.load_state_dict(other.state_dict())
    except RuntimeError as error:
        assert "cut by both" in str(error), error
    else:
        raise AssertionError
    torch.testing.assert_close(model(X), whole(X))


mesh = init_device_mesh("cpu", (size,))
for test in (checked, printed_by_one, exchanged, files, gathered_once):
    test(mesh)
cut_twice()
end()
'''


def test_tools_of_models_that_processes_share(tmp_path: Path) -> None:
    in_processes(PROGRAM, tmp_path)
