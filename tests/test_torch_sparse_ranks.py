"""The sparse form in several processes: DDP, FSDP2 and tensor parallelism train it as one process with the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import in_processes

NETWORK = '''
import warnings
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from maskedlinear import masks
from maskedlinear.torch import (
    MaskedLinear, SparseColwiseParallel, SparseLinear, SparseRowwiseParallel, compress, dense_gradients, expand, get_masks,
    prune_model, regrow_model, set_masks
)

warnings.simplefilter("ignore")
XS = torch.randn(4, 8, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
mesh = init_device_mesh("cpu", (size,))


def network(seed=0, sparsity=0.5, kind=SparseLinear, width=11):
    torch.manual_seed(seed)
    return nn.Sequential(
        kind(7, width, mask=masks.random((width, 7), sparsity=sparsity, seed=seed)), nn.Tanh(),
        kind(width, 5, mask=masks.random((5, width), sparsity=sparsity + 0.1, seed=seed + 1)),
    ).double()


def train(model, xs, growth="gradient", moves=True):
    """Train; connections move every second step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for step, x in enumerate(xs):
        optimizer.zero_grad()
        with dense_gradients(model) as gradients:
            model(x).square().mean().backward()
        optimizer.step()
        if step % 2 and moves:
            with torch.no_grad():
                model(x)  # FSDP2 leaves gathered parameters behind
            gradients = gradients if growth == "gradient" else None
            regrow_model(model, 0.3, gradients=gradients, optimizer=optimizer, seed=step)
    with torch.no_grad():
        model(xs[0])


def whole(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def states_close(one, other):
    other = other.state_dict()
    assert list(one) == list(other)
    for name, value in other.items():
        close(whole(one[name]), value)


def change_forms(alone, model, take):
    """Masked layers become sparse and dense again where they are cut, and train on."""
    for change in (lambda one: compress(one, "sparse"), expand, lambda one: compress(one, "sparse")):
        for one, xs in ((alone, XS[:1]), (model, take(XS[:1]))):
            layers = list(one)
            change(one)
            hooked = []
            handle = one[0].register_forward_hook(lambda *_: hooked.append(1))
            train(one, xs, moves=False)
            handle.remove()
            assert len(hooked) == 2
        close(model(XS[0]), alone(XS[0]))
        states = [{key: kept for key, kept in one.state_dict().items() if "dormant" not in key} for one in (model, alone)]
        for name, value in states[1].items():
            close(whole(states[0][name]), value)
        assert get_masks(model)["0"].shape == get_masks(alone)["0"].shape


def refused(act, text):
    try:
        act()
    except (ValueError, TypeError, RuntimeError) as error:
        assert text in str(error), error
    else:
        raise AssertionError(text)
'''

DATA_PARALLEL = '''
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel


def main():
    for how, growth in (("ddp", "gradient"), ("fsdp", "gradient"), ("units", "random")):
        alone, model = network(), network()
        train(alone, XS, growth)
        if how == "ddp":
            wrapped = DistributedDataParallel(model)
        else:
            if how == "units":
                fully_shard(model[0], mesh=mesh)
            wrapped = fully_shard(model, mesh=mesh)
        train(wrapped, XS[:, rank::size], growth)
        states_close(model.state_dict(), alone)
        with torch.no_grad():
            wrapped(XS[0])
        set_masks(alone, get_masks(network(7)))
        set_masks(model, get_masks(network(7)), group=None if how == "ddp" else "model")
        close(wrapped(XS[0]), alone(XS[0]))
        differ = {next(iter(get_masks(wrapped))): network(rank)[0].pattern}
        refused(lambda: set_masks(wrapped, differ), "must be the same in all processes")
        if how != "ddp":
            sharded(model)
            refused(lambda: prune_model(model, 0.9), "expand(model)")
            alone, model = (network(kind=MaskedLinear, width=12) for _ in range(2))
            if how == "units":
                fully_shard(model[0], mesh=mesh), fully_shard(model[2], mesh=mesh)
                train(alone, XS[:1], moves=False)
            fully_shard(model, mesh=mesh)
            if how == "units":
                train(model, XS[:1, rank::size], moves=False)
            change_forms(alone, model, lambda xs: xs[:, rank::size])


def sharded(model):
    """States go in and out, and everything of a layer is of the whole of it."""
    model(XS[0])
    model.load_state_dict(network(9).state_dict())
    close(model(XS[0]), network(9)(XS[0]))
    close(model[0].weight, network(9)[0].weight)
    assert (model[0].to_scipy() != network(9)[0].to_scipy()).nnz == 0
    model[0].reset_parameters()
    bound = model[0].pattern.shape[1] ** -0.5
    drawn = model[0].weight_values.full_tensor()
    assert len(drawn) == model[0].pattern.nnz and drawn.unique().numel() > 10 and drawn.abs().max() < 1
    fewer = network(0, sparsity=0.7).state_dict()
    refused(lambda: model.load_state_dict(fewer), "before fully_shard")


if not torch.__version__.startswith("2.6."):  # which has no fully_shard on the CPU
    main()
'''

TENSOR_PARALLEL = '''
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

COLUMNS, ROWS = SparseColwiseParallel, SparseRowwiseParallel
PLANS = (
    {"0": COLUMNS(), "2": ROWS()},
    {"0": ROWS(input_layouts=Replicate()), "2": COLUMNS(output_layouts=Replicate())},
    {
        "0": ROWS(input_layouts=Replicate(), output_layouts=Shard(0)),
        "2": COLUMNS(input_layouts=Shard(0), output_layouts=Replicate()),
    },
)


def main():
    for plan in PLANS:
        alone, model = network(), network()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(rank)  # what the first begins with holds
        parallelize_module(model, mesh, plan)
        for layer in (model[0], model[2]):
            has_whole_ends(layer)
        x, y = (XS[0].clone().requires_grad_() for _ in range(2))
        alone(x).square().sum().backward(), model(y).square().sum().backward()
        close(y.grad, x.grad)
        growth = "random" if plan is PLANS[0] else "gradient"
        train(alone, XS, growth), train(model, XS, growth)
        states_close(model.state_dict(), alone)
        close(model[0].weight, alone[0].weight)
        one_process = network(3)
        one_process.load_state_dict({name: whole(value) for name, value in model.state_dict().items()})
        close(one_process(XS[0]), alone(XS[0]))
        fewer = network(5, sparsity=0.7)
        model.load_state_dict(fewer.state_dict())
        close(model(XS[0]), fewer(XS[0]))
        train(model, XS[:2]), train(fewer, XS[:2])
        states_close(model.state_dict(), fewer)
        model[0].reset_parameters()
        assert model[0].weight_values.full_tensor().count_nonzero() == model[0].pattern.nnz
    rows_first = RowwiseParallel(input_layouts=Replicate()), ColwiseParallel(output_layouts=Replicate())
    for plan in ((ColwiseParallel(), RowwiseParallel()), rows_first):
        alone, dense = (network(kind=MaskedLinear, width=12) for _ in range(2))
        parallelize_module(dense, mesh, {"0": plan[0], "2": plan[1]})
        change_forms(alone, dense, lambda xs: xs)
    refused(lambda: parallelize_module(nn.Linear(3, 2), mesh, COLUMNS()), "there is torch's ColwiseParallel")
    refused(lambda: parallelize_module(model[0], mesh, COLUMNS()), "tensor parallelism comes before")
    refused(lambda: parallelize_module(network(rank), mesh, {"0": ROWS()}), "must be the same in all processes")
    differ = network(rank, sparsity=0.7)[0].pattern  # as many connections as the layer has
    refused(lambda: model[0].rewire(differ, differ.places * 0), "must be the same in all processes")
    end()


def has_whole_ends(layer):
    """Each process has the connections of its outputs, or of its inputs, and nobody's else."""
    cut, mine = layer._cut, layer.weight_values.to_local().flatten()
    mask = torch.tensor(layer.pattern.to_mask())
    whole = network()[0 if layer.in_features == 7 else 2].weight.detach()
    chunks = [part.chunk(size, cut.dim) for part in (whole, mask)]  # fewer than processes, if there are not as many ends
    parts = [part[rank] if rank < len(part) else part[0].narrow(cut.dim, 0, 0) for part in chunks]
    assert torch.equal(mine[: int(parts[1].sum())], parts[0][parts[1]])
    assert not mine[int(parts[1].sum()) :].any()


main()
'''


def test_in_two_processes(tmp_path: Path) -> None:
    in_processes(NETWORK + DATA_PARALLEL + TENSOR_PARALLEL, tmp_path)


@pytest.mark.slow
def test_in_four_processes(tmp_path: Path) -> None:
    in_processes(NETWORK + DATA_PARALLEL + TENSOR_PARALLEL, tmp_path, size=4)
