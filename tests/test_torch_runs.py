"""What is done around a layer in real runs: resuming, processes, distributed checkpoints, averages, compilers."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers import in_processes
from maskedlinear import masks
from maskedlinear.pruning import CubicSchedule
from maskedlinear.torch import (
    MaskedLinear,
    ScheduledPruning,
    ScheduledRegrowth,
    compress,
    freeze_masked,
    mask_model,
    prune_model,
)

METHODS = [("dense", how) for how in ("fixed", "prune", "gradient", "random")]
METHODS += [("sparse", how) for how in ("fixed", "gradient", "random")]
OPTIMIZERS = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    "Adam": {"lr": 0.01},
    "AdamW": {"lr": 0.01, "fused": True},
    "RMSprop": {"lr": 0.01, "momentum": 0.5},
    "Adagrad": {"lr": 0.1},
    "NAdam": {"lr": 0.01, "weight_decay": 0.01},
}


class Training:
    """A model, its optimizer and what changes its masks; started, saved and gone on with."""

    def __init__(self, form: Any, method: Any, name: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = mask_model(nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4)))
        prune_model(self.model, 0.5, scope="layer", score="random", seed=seed)
        if form == "sparse":
            compress(self.model, "sparse")
        self.optimizer = getattr(torch.optim, name)(self.model.parameters(), **OPTIMIZERS[name])
        if form == "dense":
            freeze_masked(self.optimizer, self.model)
        self.changes: Any = None
        if method == "prune":
            self.changes = ScheduledPruning(self.model, CubicSchedule(0.8, begin=1, end=7, initial=0.5))
        elif method != "fixed":
            self.changes = ScheduledRegrowth(self.model, self.optimizer, every=2, end=8, growth=method)

    def step(self, step: int) -> None:
        x = torch.randn(12, 8, generator=torch.Generator().manual_seed(step))
        self.optimizer.zero_grad()
        if isinstance(self.changes, ScheduledRegrowth):
            with self.changes.recording():
                self.model(x).square().mean().backward()
        else:
            self.model(x).square().mean().backward()
        self.optimizer.step()
        if self.changes is not None:
            self.changes.step()

    def parts(self) -> list[Any]:
        return [part for part in (self.model, self.optimizer, self.changes) if part is not None]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("form", "method"), METHODS)
def test_a_run_that_is_resumed_is_the_run_that_was_not_interrupted(form: str, method: str, name: str) -> None:
    through = Training(form, method, name, seed=0)
    for step in range(4):
        through.step(step)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in through.parts()], file)
    resumed = Training(form, method, name, seed=1)
    file.seek(0)
    for part, state in zip(resumed.parts(), torch.load(file), strict=True):
        part.load_state_dict(state)
    for step in range(4, 9):
        through.step(step)
        resumed.step(step)
    for one, other in zip(through.model.state_dict().items(), resumed.model.state_dict().items(), strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1]), one[0]


HOGWILD = """
import sys
import torch
import torch.multiprocessing as mp
from torch import nn
from maskedlinear import masks
from maskedlinear.torch import MaskedLinear


def train(model, seed):
    torch.set_num_threads(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for x in torch.randn(40, 16, 200, generator=torch.Generator().manual_seed(seed)):
        optimizer.zero_grad()
        (model(x) - x[:, :3]).square().mean().backward()
        optimizer.step()


if __name__ == "__main__":
    torch.manual_seed(0)
    model = nn.Sequential(
        MaskedLinear(200, 100, mask=masks.random((100, 200), sparsity=0.5)), nn.Tanh(), MaskedLinear(100, 3)
    ).share_memory()
    x = torch.randn(64, 200)
    before = (model(x) - x[:, :3]).square().mean().item()
    start = model[0].weight.detach().clone()
    processes = [mp.get_context("fork").Process(target=train, args=(model, seed)) for seed in (1, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    after = (model(x) - x[:, :3]).square().mean().item()
    assert after < before, (before, after)
    assert torch.equal(model[0].weight != start, model[0].mask), "the live weights have moved, and they alone"
    assert torch.equal(model[0].full_weight[~model[0].mask] != 0, torch.ones(100 * 100, dtype=torch.bool))
"""


def test_processes_train_a_model_in_shared_memory(tmp_path: Path) -> None:
    (tmp_path / "hogwild.py").write_text(HOGWILD)
    done = subprocess.run([sys.executable, "hogwild.py"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


PARALLEL = """
import warnings
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from maskedlinear import masks
from maskedlinear.torch import MaskedLinear, compress, prune_model

warnings.simplefilter("ignore")


def network(seed, sparsity=0.5):
    torch.manual_seed(seed)
    return nn.Sequential(
        MaskedLinear(200, 100, mask=masks.random((100, 200), sparsity=sparsity, seed=seed)), nn.Tanh(), MaskedLinear(100, 3)
    )


def train(model, xs):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for step, x in enumerate(xs):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if step == 2:
            prune_model(model, 0.7)


def main():
    xs = torch.randn(6, 16, 200, generator=torch.Generator().manual_seed(0))
    # Two processes with half of each batch train as one with all of it does; what the first begins with holds.
    begun = network(seed=0)
    with torch.no_grad():
        begun[0].weight.add_(rank), begun[0].bias.add_(rank)
    model = DistributedDataParallel(begun)
    train(model, xs[:, rank::2])
    alone = network(seed=0)
    train(alone, xs)
    first = model.module[0]
    assert torch.equal(first.mask, alone[0].mask)
    torch.testing.assert_close(model(xs[0]), alone(xs[0]))
    assert not first.weight[~first.mask].any()
    # A distributed checkpoint holds what is dormant, too, and goes into a model that has other masks.
    for form in ("dense", "sparse"):
        if form == "sparse":
            compress(model.module, "sparse")
        state = {"model": model.module.state_dict()}
        dcp.save(state, checkpoint_id=f"{folder}/{form}")
        other = network(seed=5, sparsity=0.5 if form == "dense" else 0.7)
        if form == "sparse":
            prune_model(other, 0.7)
            other[0].set_mask(first.mask.roll(1, 0)), other[2].set_mask(model.module[2].pattern.to_mask())
            compress(other, "sparse")
        into = {"model": other.state_dict()}
        dcp.load(into, checkpoint_id=f"{folder}/{form}")
        other.load_state_dict(into["model"])
        assert torch.equal(other(xs[0]), model.module(xs[0]))
        if form == "dense":
            for layer, twin in ((other[0], model.module[0]), (other[2], model.module[2])):
                assert torch.equal(layer.mask, twin.mask)
                assert (layer.dormant is None) == (twin.dormant is None)
                assert torch.equal(layer.full_weight, twin.full_weight)
    end()


main()
"""


SHARDED = """
import copy, warnings
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from maskedlinear import masks
from maskedlinear.torch import MaskedLinear, freeze_masked

warnings.simplefilter("ignore")


def main():
    mask, mesh = masks.random((4, 6), sparsity=0.5), init_device_mesh("cpu", (2,))
    if not torch.__version__.startswith("2.6."):  # which has no fully_shard on the CPU
        fully_sharded(mesh, mask)
    parallel(mesh, mask, ColwiseParallel())
    parallel(mesh, mask, RowwiseParallel(input_layouts=Replicate()))
    end()


def fully_sharded(mesh, mask):
    torch.manual_seed(0)
    model = nn.Sequential(MaskedLinear(6, 4, mask=mask))
    start = model[0].weight.detach().clone()
    fully_shard(model, mesh=mesh)
    optimizer = freeze_masked(torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1), model)
    for _ in range(3):
        model(torch.ones(5, 6)).square().sum().backward()
        optimizer.step()
    moved = model[0].weight.full_tensor() != start
    assert torch.equal(moved, torch.tensor(mask)), "the live weights move, and they alone"
    assert torch.equal(model[0].masked_weight.full_tensor() != 0, torch.tensor(mask))
    assert torch.equal(model[0].to_linear().weight != 0, torch.tensor(mask))
    last = MaskedLinear(4, 3, mask=masks.random((3, 4), sparsity=0.5))
    loose = nn.Sequential(MaskedLinear(6, 4, mask=mask), nn.Tanh(), last)
    twin = copy.deepcopy(loose)
    fully_shard(loose, mesh=mesh)
    steps = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1) for m in (loose, twin)]
    for step in range(5):  # without a guard, masks moving, momentum drifting: nothing of it acts
        xs = [torch.ones(5, 6, requires_grad=True) for _ in range(2)]
        ys = [m(x) for m, x in zip((loose, twin), xs)]
        for y, optimizer in zip(ys, steps):
            y.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(ys[0], ys[1])
        torch.testing.assert_close(xs[0].grad, xs[1].grad)
        for m in (loose, twin):
            m[0].set_mask(m[0].mask.roll(1, 0))
    state, mask_now = loose.state_dict(), loose[0].mask.full_tensor()
    assert not state["0.weight"].full_tensor()[~mask_now].any(), "a state holds what acts"
    empty = nn.Sequential(MaskedLinear(6, 4, mask=mask, device="meta"))
    fully_shard(empty, mesh=mesh)
    empty.to_empty(device="cpu")
    empty[0].reset_parameters()
    assert torch.equal(empty[0].mask.full_tensor(), torch.tensor(mask))
    model[0].set_mask(model[0].masked_weight != 0)  # a mask cut as the weight is
    assert torch.equal(model[0].mask.full_tensor(), torch.tensor(mask))


def parallel(mesh, mask, style):  # which cuts the weight, and the mask with it
    torch.manual_seed(0)
    layer = MaskedLinear(6, 4, mask=mask)
    start, x = layer.weight.detach().clone(), torch.ones(5, 6)
    y = layer(x).detach()
    parallelize_module(layer, mesh, style)
    optimizer = freeze_masked(torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1), layer)
    torch.testing.assert_close(layer.to_linear()(x), y)
    layer(x).square().sum().backward()
    optimizer.step()
    assert torch.equal(layer.weight.full_tensor() != start, torch.tensor(mask))
    layer.set_mask(~mask)
    assert torch.equal(layer.masked_weight.full_tensor() != 0, torch.tensor(~mask))
    assert layer.sparsity == 0.5
    layer.reset_parameters()
    assert torch.equal(MaskedLinear.from_linear(layer).mask, torch.tensor(~mask))
    layer.to("meta").to_empty(device="cpu").reset_parameters()
    assert torch.equal(layer.mask.full_tensor(), torch.tensor(~mask))
    layer.to("meta").set_mask(mask)
    layer.to_empty(device="cpu").reset_parameters()
    assert torch.equal(layer.mask.full_tensor(), torch.tensor(mask))


main()
"""


def test_parallel_training_and_distributed_checkpoints(tmp_path: Path) -> None:
    in_processes(PARALLEL, tmp_path)


@pytest.mark.slow  # test_torch_sharded.py has more of it
def test_sharded_and_parallel(tmp_path: Path) -> None:
    in_processes(SHARDED, tmp_path)


def test_compiled_code_is_not_compiled_again_for_masks_that_move() -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    model = nn.Sequential(MaskedLinear(200, 100, mask=masks.random((100, 200), sparsity=0.5)), MaskedLinear(100, 3))
    optimizer = freeze_masked(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model)
    compiled, x = torch.compile(model, backend="aot_eager", fullgraph=True), torch.randn(16, 200)
    seen = [compiled(x).detach()]
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(5):
            optimizer.zero_grad()
            y = compiled(x)
            torch.testing.assert_close(y, model(x))
            y.square().mean().backward()
            optimizer.step()
            seen.append(y.detach())
            if step % 2:
                prune_model(model, 0.5 + 0.1 * step)
    assert not torch.equal(seen[0], seen[-1])
