"""Claim: global pruning of a model that FSDP2 has cut over 4 processes takes in each no more memory than 1.5 times its share
of weights and masks plus 64 MiB.

The model has 400 MB of weights. Each process prints by how much its peak memory rose above what it had before, and how much
that is of its share; the program ends with an error if the claim does not hold.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PROCESSES, LAYERS, SIZE = 4, 25, 2000  # 25 x 2000 x 2000 x 4 bytes
MOST = 1.5
MIB = 1 << 20


def memory(what: str) -> int:
    """Return what Linux says of this process' memory, in bytes: ``"VmRSS"`` now, or ``"VmHWM"`` at most."""
    found = re.search(rf"{what}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def work(rank: int, meeting: str) -> bool:
    """Prune a model together with the other processes, and return whether the claim holds in this one."""
    import torch
    from torch import distributed, nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from maskedlinear.torch import mask_model, prune_model

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=PROCESSES)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    layers = []
    for number in range(LAYERS):
        torch.manual_seed(number)
        layers.append(mask_model(nn.Linear(SIZE, SIZE, bias=False)))
        fully_shard(layers[-1], mesh=mesh)
    model = nn.Sequential(*layers)
    fully_shard(model, mesh=mesh)
    prune_model(model, 0.1, seed=1)  # what is loaded at the first call is not of the weights
    share = LAYERS * SIZE * SIZE * 5 // PROCESSES
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the most so far is now what there is
    prune_model(model, 0.9)
    rise = memory("VmHWM") - before
    whole = [weight.full_tensor() if hasattr(weight, "full_tensor") else weight for weight in model.parameters()]
    zeros = sum(int((weight == 0).sum()) for weight in whole) / (LAYERS * SIZE * SIZE)
    print(
        f"rank {rank}: share {share / MIB:.0f} MiB, peak {rise / MIB:.0f} MiB above the {before / MIB:.0f} MiB before, "
        f"{rise / share:.2f} times the share; {zeros:.4f} pruned",
        flush=True,
    )
    distributed.barrier()
    os._exit(int(rise > MOST * share + 64 * MIB))  # gloo's threads may abort where they are taken down


def main() -> None:
    """Start the processes, and end with an error if one of them takes more memory."""
    if len(sys.argv) > 1:
        work(int(sys.argv[1]), sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__]
        processes = [subprocess.Popen([*command, str(rank), f"{folder}/meeting"]) for rank in range(PROCESSES)]
        failed = [rank for rank, process in enumerate(processes) if process.wait()]
    print(f"more than {MOST} times the share and 64 MiB on ranks {failed}" if failed else "the claim holds")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
