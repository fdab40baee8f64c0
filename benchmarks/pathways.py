"""Claims: a network of all of Reactome takes, beside the usual recipe, 0.02 of a step's time in PyTorch and 0.03 in Flax.

And at most 60 MiB of memory above the imports in PyTorch, where the recipe takes gigabytes, and 500 MiB in Flax, most of
which XLA takes when it compiles the step. LLVM and the kernels that it makes at first use, 115 MiB, of which 95 are pages
of its file, count as imports. The recipe is that of
BINN, a dense layer whose weight is multiplied by a mask at each step (``torch.nn.utils.prune``), and the same in Flax. Both
have the lossless wirings of all proteins (12 layers), float32, a batch of 64, Adam. Each runs in a process of its own, on
one thread; times are the processor's, the shortest of a few steps; memory is the process's peak, less what it had after the
imports. Files are made up as in ``benchmarks/wirings.py``, or the real ones of a folder.

    python benchmarks/pathways.py [--reactome FOLDER] [--form NAME] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maskedlinear import kernels
from maskedlinear.masks import LayeredWiring

BATCH = 64
FORMS = ("torch", "torch-recipe", "flax", "flax-recipe")


def memory(key: str) -> float:
    """Return a line of the process's status, in MiB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) / 1024


def least_seconds(step: Callable[[], Any], repeats: int) -> float:
    """Return the shortest processor time of a few calls, after one that compiles and makes what stays."""
    step()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        step()
        times.append(time.process_time() - start)
    return min(times)


def torch_step(layers: LayeredWiring, is_recipe: bool) -> Callable[[], Any]:
    """Return a training step in PyTorch."""
    import torch
    from torch import nn
    from torch.nn.utils import prune

    from maskedlinear.torch import PathwayNetwork

    network: nn.Module
    if is_recipe:
        parts: list[nn.Module] = []
        for wiring in layers:
            linear = nn.Linear(len(wiring.inputs), len(wiring.outputs))
            prune.custom_from_mask(linear, "weight", torch.from_numpy(wiring.mask).float())
            parts += [linear, nn.Tanh()]
        network = nn.Sequential(*parts, nn.Linear(len(layers.outputs), 1))
    else:
        network = PathwayNetwork(layers)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    x, y = torch.randn(BATCH, len(layers.inputs)), torch.ones(BATCH, 1)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(network(x), y).backward()
        optimizer.step()

    return step


def flax_step(layers: LayeredWiring, is_recipe: bool) -> Callable[[], Any]:
    """Return a training step in Flax."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from maskedlinear.flax import PathwayNetwork, param_masks
    from maskedlinear.jax import freeze_masked

    class Masked(nnx.Linear):
        def __init__(self, wiring: Any) -> None:
            super().__init__(len(wiring.inputs), len(wiring.outputs), rngs=rngs)
            self.mask = nnx.Variable(jnp.asarray(wiring.mask.T, jnp.float32))

        def __call__(self, inputs: Any, out_sharding: Any = None) -> Any:
            return inputs @ (self.kernel[...] * self.mask[...]) + self.bias[...]  # type: ignore[index]

    rngs, adam = nnx.Rngs(0), optax.adam(1e-3)
    network: Any
    if is_recipe:
        parts = [part for wiring in layers for part in (Masked(wiring), nnx.tanh)]
        network = nnx.Sequential(*parts, nnx.Linear(len(layers.outputs), 1, rngs=rngs))
        optimizer = nnx.Optimizer(network, adam, wrt=nnx.Param)
    else:
        network = PathwayNetwork(layers, rngs=rngs)
        optimizer = nnx.Optimizer(network, freeze_masked(adam, masks=param_masks(network)), wrt=nnx.Param)
    x, y = jax.random.normal(jax.random.key(0), (BATCH, len(layers.inputs))), jnp.ones((BATCH, 1))

    @nnx.jit
    def train(network: Any, optimizer: Any, x: Any, y: Any) -> Any:
        loss, gradients = nnx.value_and_grad(lambda one: optax.sigmoid_binary_cross_entropy(one(x), y).mean())(network)
        optimizer.update(network, gradients)
        return loss

    return lambda: jax.block_until_ready((train(network, optimizer, x, y), nnx.state(network)))  # type: ignore[no-untyped-call]


def measure(form: str, file: Path) -> dict[str, float]:
    """Return the seconds of a step and the peak of memory of one form, in this process."""
    framework, _, recipe = form.partition("-")
    if framework == "torch":
        import torch

        import maskedlinear.torch

        torch.set_num_threads(1)
        for layer in (torch.nn.Linear(2, 2), maskedlinear.torch.SparseLinear(2, 2)):  # what any first use brings
            layer(torch.ones(BATCH, 2)).sum().backward()
    else:
        import jax.numpy as jnp

        import maskedlinear.flax

        jnp.ones(2).block_until_ready()
    if kernels.is_available():  # LLVM's library, 95 MiB of a file's pages, which is loaded with the first product
        kernels.spmm  # noqa: B018
    before = memory("VmRSS")
    layers = pickle.loads(file.read_bytes())
    step = {"torch": torch_step, "flax": flax_step}[framework](layers, bool(recipe))
    seconds = least_seconds(step, 3 if recipe else 10)
    return {"seconds": seconds, "MiB": memory("VmHWM") - before}


def build(folder: Path) -> tuple[float, LayeredWiring]:
    """Return the shortest processor time of reading Reactome's files into wirings, and these."""
    files = folder / "ReactomePathwaysRelation.txt", folder / "UniProt2Reactome.txt"
    times = []
    for _ in range(2):
        start = time.process_time()
        layers = LayeredWiring.from_reactome(*files, on_empty="drop")
        times.append(time.process_time() - start)
    return min(times), layers


def main() -> int:
    """Measure each form in a process of its own, print the ratios, and say whether the claims hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reactome", type=Path, help="a folder with Reactome's two files")
    parser.add_argument("--form", choices=FORMS, help="only this one, of the wirings pickled in --wirings")
    parser.add_argument("--wirings", type=Path)
    parser.add_argument("--out", type=Path, help="also write what was found there, as JSON")
    given = parser.parse_args()
    if given.form:
        print(json.dumps(measure(given.form, given.wirings)))
        return 0
    with tempfile.TemporaryDirectory() as made_up:
        folder = given.reactome or Path(made_up)
        if given.reactome is None:
            from wirings import write_files  # type: ignore[import-not-found]

            write_files(folder)
        seconds, layers = build(folder)
        print(f"{layers}\nwirings from the files in {seconds:.2f} s", flush=True)
        file = Path(made_up) / "wirings.pickle"
        file.write_bytes(pickle.dumps(layers))
        threads = {"OMP_NUM_THREADS": "1", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
        found: dict[str, Any] = {}
        for form in FORMS:
            command = [sys.executable, __file__, "--form", form, "--wirings", str(file)]
            ran = subprocess.run(command, env={**os.environ, **threads}, stdout=subprocess.PIPE, text=True, check=True)
            found[form] = json.loads(ran.stdout)
            print(
                f"{form:13} step {1e3 * found[form]['seconds']:8.1f} ms   peak {found[form]['MiB']:7.0f} MiB",
                flush=True,
            )
    ratios = {name: found[name]["seconds"] / found[f"{name}-recipe"]["seconds"] for name in ("torch", "flax")}
    for name, ratio in ratios.items():
        share = found[name]["MiB"] / found[f"{name}-recipe"]["MiB"]
        print(f"{name}: {ratio:.4f} of the recipe's time, {share:.3f} of its memory")
    if given.out is not None:
        what = {"wirings": str(layers), "files": "Reactome's" if given.reactome else "made up", "batch": BATCH}
        given.out.write_text(json.dumps({**what, "build": seconds, "forms": found, "ratios": ratios}, indent=1) + "\n")
    holds = ratios["torch"] <= 0.02 and ratios["flax"] <= 0.03 and seconds <= 2
    return 0 if holds and found["torch"]["MiB"] <= 60 and found["flax"]["MiB"] <= 500 else 1


if __name__ == "__main__":
    raise SystemExit(main())
