"""One wired network, trained by one process, by two processes, and by eight devices: the same losses.

    python examples/many_processes.py

PyTorch trains it alone, and in two processes of gloo with half of each batch (``DistributedDataParallel``); JAX on a mesh of
eight devices (of one CPU, here) with an eighth of it each. All begin with the same weights; what a step does not have are
the connections that the wiring leaves out: the network is in the sparse form throughout.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from maskedlinear import masks

STEPS, BATCH, DEVICES, PROCESSES = 60, 64, 8, 2
RATE, MOMENTUM = 0.1, 0.9
WIRING = masks.receptive_field((8, 8), 3, channels=(1, 4))  # 4 units a window, which see its 3 x 3 pixels

Array = NDArray[np.float64]


def start() -> dict[str, Array]:
    """Return the weights and biases that all begin with, in float64."""
    rng = np.random.default_rng(0)
    first = rng.standard_normal(WIRING.shape) / 3 * WIRING
    return {
        "wired": first,
        "wired bias": np.zeros(len(first)),
        "last": rng.standard_normal((10, len(first))) / 16,
        "last bias": np.zeros(10),
    }


def batches() -> tuple[Array, NDArray[np.int64]]:
    """Return the images and digits of all steps, shapes ``(steps, batch, 64)`` and ``(steps, batch)``."""
    digits = load_digits()
    chosen = np.random.default_rng(1).integers(len(digits.data), size=(STEPS, BATCH))
    return digits.data[chosen] / 16, digits.target[chosen]


def in_torch(rank: int = 0, size: int = 1) -> list[float]:
    """Train in PyTorch, one process of a group; return the losses of whole batches."""
    import torch
    from torch import distributed, nn

    from maskedlinear.torch import SparseLinear

    weights = {name: torch.from_numpy(value) for name, value in start().items()}
    wired = SparseLinear(WIRING.shape[1], WIRING.shape[0], mask=WIRING, dtype=torch.float64)
    last = nn.Linear(WIRING.shape[0], 10, dtype=torch.float64)
    with torch.no_grad():
        wired.weight_values.copy_(
            weights["wired"][torch.from_numpy(WIRING)]
        )  # in the order in which they stand, row by row
        for parameter, name in ((wired.bias, "wired bias"), (last.weight, "last"), (last.bias, "last bias")):
            parameter.copy_(weights[name])
    model: nn.Module = nn.Sequential(wired, nn.ReLU(), last)
    if size > 1:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    losses = []
    for x, y in zip(*map(torch.from_numpy, batches()), strict=True):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[rank::size]), y[rank::size])
        loss.backward()  # which averages the gradients of all processes
        optimizer.step()
        whole = loss.detach()
        if size > 1:
            distributed.all_reduce(whole, op=distributed.ReduceOp.SUM)
        losses.append(float(whole) / size)
    return losses


def one_of_many(rank: int, folder: Path) -> None:
    """Be one process of the group; the first writes down the losses."""
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    losses = in_torch(rank, PROCESSES)
    (folder / f"losses {rank}.json").write_text(json.dumps(losses), encoding="utf-8")
    while not all((folder / f"losses {other}.json").exists() for other in range(PROCESSES)):
        time.sleep(0.01)
    os._exit(0)  # gloo's threads may abort while the interpreter is taken down: pytorch/pytorch#190489


def in_processes() -> list[float]:
    """Train in two processes that this one starts."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--folder", folder, "--rank"]
        environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
        group = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(PROCESSES)]
        codes = [process.wait() for process in group]
        if any(codes):
            raise RuntimeError("a process has failed; what it said is above")
        losses: list[float] = json.loads((Path(folder) / "losses 0.json").read_text(encoding="utf-8"))
        return losses


def in_jax() -> tuple[list[float], int]:
    """Train on a mesh; return the losses, and how often the compiled step gathers anything on all devices."""
    import jax

    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_enable_x64", True)
    import jax.numpy as jnp
    import optax
    from jax.sharding import NamedSharding, PartitionSpec

    from maskedlinear.jax import sparse_linear
    from maskedlinear.pattern import SparsityPattern

    mesh = jax.make_mesh((DEVICES,), ("batch",))
    everywhere, divided = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("batch",)))
    pattern = jax.device_put(SparsityPattern.from_mask(WIRING), everywhere)
    params = start() | {"wired": start()["wired"][WIRING]}
    params = jax.device_put(params, everywhere)
    optimizer = optax.sgd(RATE, MOMENTUM)
    state = jax.device_put(optimizer.init(params), everywhere)

    def loss_of(params, pattern, x, y):
        hidden = jax.nn.relu(sparse_linear(x, params["wired"], pattern, params["wired bias"]))
        logits = hidden @ params["last"].T + params["last bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(params, state, pattern, x, y):
        loss, gradient = jax.value_and_grad(loss_of)(params, pattern, x, y)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses, gathered = [], 0
    for x, y in zip(*batches(), strict=True):
        x, y = jax.device_put((jnp.asarray(x), jnp.asarray(y)), divided)
        if not losses:
            gathered = step.lower(params, state, pattern, x, y).compile().as_text().count(" all-gather(")
        params, state, loss = step(params, state, pattern, x, y)
        losses.append(float(loss))
    return losses, gathered


def main() -> int:
    """Train thrice and compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        one_of_many(arguments.rank, arguments.folder)
    alone, together = in_torch(), in_processes()
    devices, gathered = in_jax()
    print(f"{WIRING.size} possible connections, {int(WIRING.sum())} wired\n")
    print(f"{'step':>4}{'PyTorch, 1 process':>22}{f'{PROCESSES} processes':>22}{f'JAX, {DEVICES} devices':>22}")
    for step in sorted({0, STEPS // 4, STEPS // 2, STEPS - 1}):
        print(f"{step:4}" + "".join(f"{losses[step]:22.15f}" for losses in (alone, together, devices)))
    most = max(float(np.abs(np.subtract(alone, losses)).max()) for losses in (together, devices))
    print(f"\nThe losses of {STEPS} steps differ by at most {most:.1g}; the step of JAX gathers {gathered} arrays.")
    return 0 if most < 1e-9 and not gathered else 1


if __name__ == "__main__":
    raise SystemExit(main())
