"""Distributed checkpoints of both forms: from any number of processes to any other, and with processes killed in a save."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from helpers import in_processes, needs_fsdp
from maskedlinear.torch import load_patterns

NETWORK = """
import warnings
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from maskedlinear import masks
from maskedlinear.torch import (
    MaskedLinear, SparseColwiseParallel, SparseLinear, SparseRowwiseParallel, atomic_writer, load_patterns
)

warnings.simplefilter("ignore")
X = torch.randn(8, 7, generator=torch.Generator().manual_seed(0))


def network(seed, kind=SparseLinear, sparsity=0.5):
    torch.manual_seed(seed)
    return nn.Sequential(
        kind(7, 11, mask=masks.random((11, 7), sparsity=sparsity, seed=seed)), nn.Tanh(),
        kind(11, 5, mask=masks.random((5, 11), sparsity=sparsity + 0.1, seed=seed + 1)),
    )


def load(model, name):
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=f"{folder}/{name}")
    model.load_state_dict(state["model"])


def refused(act, text):
    try:
        act()
    except (ValueError, RuntimeError, dcp.api.CheckpointException) as error:
        assert text in str(error), error
    else:
        raise AssertionError(text)
"""

PROCESSES = (
    NETWORK
    + """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

mesh = init_device_mesh("cpu", (size,))


def shared_out(model, how):
    if how == "fsdp":
        return fully_shard(model, mesh=mesh)
    return parallelize_module(model, mesh, {"0": SparseColwiseParallel(), "2": SparseRowwiseParallel()})


def main():
    for how in ("fsdp", "parallel"):
        # from one process, with other connections and another number of them
        model = shared_out(load_patterns(network(5, sparsity=0.7), f"{folder}/sparse"), how)
        load(model, "sparse")
        torch.testing.assert_close(model(X), network(0)(X))
        # to one process, which loads it afterwards
        model = shared_out(network(3, sparsity=0.6), how)
        dcp.save({"model": model.state_dict()}, storage_writer=atomic_writer(f"{folder}/{how}"))
        # after sharing out
        model = shared_out(network(5, sparsity=0.6), how)
        load(load_patterns(model, f"{folder}/{how}"), how)
        torch.testing.assert_close(model(X), network(3, sparsity=0.6)(X))
        other = shared_out(network(3, sparsity=0.7), how)
        if how == "fsdp":
            refused(lambda: load(other, how), "Size mismatch")
            refused(lambda: load_patterns(other, f"{folder}/{how}"), "before fully_shard")
        else:
            load(load_patterns(other, f"{folder}/{how}"), how)
            torch.testing.assert_close(other(X), network(3, sparsity=0.6)(X))
    dense = fully_shard(network(5, MaskedLinear, sparsity=0.7), mesh=mesh)
    load(dense, "dense")
    torch.testing.assert_close(dense(X), network(0, MaskedLinear)(X))
    dense = fully_shard(network(4, MaskedLinear), mesh=mesh)
    dcp.save({"model": dense.state_dict()}, storage_writer=atomic_writer(f"{folder}/dense"))
    end()


main()
"""
)


def from_to(path: Path, size: int) -> None:
    """Save in one process, load and save in several, and load in one."""
    here: dict[str, object] = {"folder": path}
    exec(NETWORK, here)
    network, dense, x = here["network"], here["MaskedLinear"], here["X"]
    for name, model in (("sparse", network(0)), ("dense", network(0, dense))):  # type: ignore[operator]
        dcp.save({"model": model.state_dict()}, checkpoint_id=path / name)
    in_processes(PROCESSES, path, size)
    for how in ("fsdp", "parallel"):
        model = network(5)  # type: ignore[operator]
        with pytest.raises(CheckpointException, match="Size mismatch"):
            here["load"](model, how)  # type: ignore[operator]
        here["load"](load_patterns(model, path / how), how)  # type: ignore[operator]
        torch.testing.assert_close(model(x), network(3, sparsity=0.6)(x))  # type: ignore[operator]
    model = network(5, dense, sparsity=0.7)  # type: ignore[operator]
    here["load"](model, "dense")  # type: ignore[operator]
    expected = network(4, dense)  # type: ignore[operator]
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), expected.parameters(), strict=True))
    assert torch.equal(model[0].full_weight, expected[0].full_weight)


KILLED = """
import os, pathlib, signal, sys, warnings
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from maskedlinear import masks
from maskedlinear.torch import SparseLinear, atomic_writer, load_patterns
import maskedlinear_torch._dcp_writer  # before processes part

warnings.simplefilter("ignore")
torch.set_num_threads(1)
folder = pathlib.Path(sys.argv[1])
CALLS = (os, "fsync"), (os, "replace"), (pathlib.Path, "unlink"), (torch, "save")


def layer(seed):
    torch.manual_seed(seed)
    return SparseLinear(64, 32, mask=masks.random((32, 64), sparsity=0.5 + 0.1 * seed, seed=seed))


def save(seed, rank, killed, instant):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting {seed}", rank=rank, world_size=2)
    count = 0

    def counted(call):
        def at_this_call(*args, **named):
            nonlocal count
            count += 1
            if rank == killed and count == instant:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **named)

        return at_this_call

    for owner, name in CALLS:
        setattr(owner, name, counted(getattr(owner, name)))
    state = {"layer": layer(seed).state_dict(), "ranks": {str(rank): torch.full((100,), seed)}}
    dcp.save(state, storage_writer=atomic_writer(folder / "saved"))
    (folder / f"done {seed} {rank}").touch()
    while not all((folder / f"done {seed} {other}").exists() for other in range(2)):
        pass


def attempt(seed, killed, instant):
    children = []
    for rank in range(2):
        if not (child := os.fork()):
            status = 1
            try:
                save(seed, rank, killed, instant)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    status = os.waitpid(children[killed], 0)[1]
    if status:
        os.kill(children[1 - killed], signal.SIGKILL)
    os.waitpid(children[1 - killed], 0)
    return status == 0


def loaded():
    seen = load_patterns(layer(0), folder / "saved", prefix="layer.")
    state = {"layer": seen.state_dict(), "ranks": {str(rank): torch.empty(100, dtype=torch.int64) for rank in range(2)}}
    dcp.load(state, checkpoint_id=folder / "saved")
    seen.load_state_dict(state["layer"])
    (seed,) = {int(part) for ranks in state["ranks"].values() for part in ranks.unique()}
    expected = layer(seed)
    assert seen.pattern == expected.pattern and torch.equal(seen.weight_values, expected.weight_values), seed
    return seed


assert attempt(1, 0, 0)
for killed in (0, 1):
    before, instant, seen = loaded(), -1, []
    while True:
        instant += 3 - killed
        other = before % 4 + 1
        (folder / f"meeting {other}").unlink(missing_ok=True)
        for rank in range(2):
            (folder / f"done {other} {rank}").unlink(missing_ok=True)
        ended, old, before = attempt(other, killed, instant), before, loaded()
        assert before in (old, other)
        seen.append(before == other)
        if ended:
            break
    assert seen[-1] and not seen[0] and len(seen) > 2, seen
assert len(list((folder / "saved").glob("*.distcp"))) == 2, "what was of saves that were killed is gone"
os._exit(0)
"""


def test_processes_are_killed_in_a_save(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr


pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
]


@needs_fsdp
def test_from_one_process_to_two_and_back(tmp_path: Path) -> None:
    from_to(tmp_path, 2)


@needs_fsdp
@pytest.mark.slow
def test_from_one_process_to_four_and_back(tmp_path: Path) -> None:
    from_to(tmp_path, 4)
