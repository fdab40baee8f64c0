"""Processes that share a model save it into one file: one writes, all return or raise, and the file is as one's alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers import in_processes

PROGRAM = '''
import warnings
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from maskedlinear import checkpoint
from maskedlinear.checkpoint import _container, _file
from maskedlinear.torch import freeze_masked, mask_model, prune_model
from maskedlinear_torch import _checkpoint_ranks

written, write = [], _container.write


def counted(path, tensors, *rest, **more):
    written.append(path)
    write(path, tensors, *rest, **more)


_file.write = counted


def network(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 4))
    mask_model(model)
    prune_model(model, 0.7, scope="layer", group=None)
    return model


def trained(model, steps=2):
    optimizer = freeze_masked(torch.optim.AdamW(model.parameters(), lr=0.1), model)
    for step in range(steps):
        model(torch.ones(2, 2, 6)).square().sum().backward()
        optimizer.step()
    return optimizer


def raises(kind, text, call):
    try:
        call()
    except kind as error:
        assert text in str(error), error
    else:
        raise AssertionError(text)


def check(model, alone, how, wrong):
    """Save a shared model: the file is as that of a model that one process has alone."""
    optimizers = trained(model), trained(alone)
    written.clear()
    options = {"dormant": True, "metadata": {"author": "all"}}
    checkpoint.save(model, folder / how, optimizer=optimizers[0], **options)
    assert (folder / how).is_file()  # whichever process looks
    assert len(written) == (rank == 0), written
    alone_path = folder / f"{how} alone {rank}"
    checkpoint.save(alone, alone_path, optimizer=optimizers[1], **options)
    if how == "ddp":
        assert (folder / how).read_bytes() == alone_path.read_bytes()
    one, other = checkpoint.load(folder / how), checkpoint.load(alone_path)
    assert one.keys() == other.keys()
    for name, array in one.items():
        if array.shape and array.dtype != "U8":
            torch.testing.assert_close(torch.tensor(array.numpy()), torch.tensor(other[name].numpy()))
    assert any(isinstance(array, checkpoint.MaskedArray) and array.sparsity > 0.6 for array in one.values())
    # Errors: of the writer, before and while it writes; of another; of paths that differ.
    raises(FileNotFoundError, "is no folder", lambda: checkpoint.save(model, folder / "nowhere" / how))
    before = (folder / how).read_bytes()
    _file.write = failing
    raises(OSError, "no space left", lambda: checkpoint.save(model, folder / how))
    _file.write = counted
    assert (folder / how).read_bytes() == before
    raises(ValueError, "one file; got", lambda: checkpoint.save(model, folder / f"{how} {rank}"))
    raises(ValueError, "metadata are strings", lambda: checkpoint.save(model, folder / how, metadata={"a": rank}))
    wrong(model)
    raises(TypeError, "more is on the meta device", lambda: checkpoint.save(model, folder / how))
    del (model if how == "fsdp" else model.module).more
    checkpoint.save(model, folder / how)
    checkpoint.load_into(model, folder / how)
    dist.barrier()
    assert not [path for path in folder.iterdir() if path.name.endswith(".tmp")]
    dist.barrier()  # the other may write what comes next only once this one has looked


def failing(path, tensors, *rest, **more):
    for tensor in list(tensors.values())[:2]:
        tensor.data()
    raise OSError(28, "no space left")


def main():
    parallel = DistributedDataParallel(network(seed=rank))
    on_rank_1 = lambda model: model.module.register_buffer("more", torch.ones(1, device="meta" if rank else "cpu"))
    check(parallel, network(), "ddp", on_rank_1)
    if rank == 1:
        checkpoint.save(parallel.module, folder / "one alone")
    # One that waits says so.
    _checkpoint_ranks._PATIENCE = 0.2
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if rank == 1:
            time.sleep(1)
        checkpoint.save(parallel, folder / "late")
    assert [("waits for the other processes" in str(one.message)) for one in told] == [True] * (rank == 0), told
    if not torch.__version__.startswith("2.6."):  # which has no fully_shard on the CPU
        from torch.distributed.fsdp import fully_shard

        sharded = network()
        fully_shard(sharded, mesh=dist.device_mesh.init_device_mesh("cpu", (size,)))
        meta = lambda model: model.register_buffer("more", torch.ones(1, device="meta"))
        check(sharded, network(), "fsdp", meta)
    end()


main()
'''


def test_one_process_writes_and_all_return_or_raise(tmp_path: Path) -> None:
    in_processes(PROGRAM, tmp_path)


MESHES = """
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from maskedlinear import checkpoint
from maskedlinear.checkpoint import _container, _file
from maskedlinear.torch import mask_model, prune_model

written, write = [], _container.write


def counted(path, *rest, **more):
    written.append(path)
    write(path, *rest, **more)


_file.write = counted


def network():
    torch.manual_seed(0)
    model = mask_model(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)))
    prune_model(model, 0.5, group=None)
    return model


mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
checkpoint.save(network(), folder / f"alone {rank}")
# Replicated and cut; cut over a part of all processes, of which each writes a file of its own; cut twice.
twice = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
parallelize_module(twice, mesh["model"], {"0": ColwiseParallel()})
half = rank % 2
for number, (model, own, name) in enumerate(
    ((network(), mesh, "all"), (network(), mesh["data"], f"half {half}"), (twice, mesh["data"], "twice"))
):
    fully_shard(model, mesh=own)
    written.clear()
    checkpoint.save(model, folder / name)
    assert len(written) == (rank == (half if number == 1 else 0)), (number, written)
    if number < 2:
        assert (folder / name).read_bytes() == (folder / f"alone {rank}").read_bytes()
    assert len(checkpoint.load(folder / name)) == 4
end()
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="fully_shard is not on the CPU there")
def test_meshes_of_two_axes_and_parts_of_them(tmp_path: Path) -> None:
    in_processes(MESHES, tmp_path, size=4)
