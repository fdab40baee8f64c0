"""A pruned network that begins in PyTorch, goes on in Flax, and ends in PyTorch, on scikit-learn's digits.

    python examples/torch_to_flax.py

The file has the live weights, the masks and what is dormant; names and layouts are translated as it is loaded.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from sklearn.datasets import load_digits
from torch import nn

import maskedlinear.flax
import maskedlinear.torch
from maskedlinear import checkpoint
from maskedlinear.jax import freeze_masked

STEPS = 150
SPARSITY = 0.9


def torch_network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10))


def flax_network() -> nnx.Sequential:
    rngs = nnx.Rngs(0)
    norm = nnx.BatchNorm(128, momentum=0.9, epsilon=1e-5, rngs=rngs)  # as PyTorch's
    return nnx.Sequential(nnx.Linear(64, 128, rngs=rngs), norm, nnx.relu, nnx.Linear(128, 10, rngs=rngs))


def train_in_torch(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    """Fit by Adam; the masks hold."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model.train()
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.eval()


def train_in_flax(model: nnx.Module, x: jnp.ndarray, y: jnp.ndarray) -> None:
    """The same, by optax, whose steps are guarded."""
    optimizer = nnx.Optimizer(model, freeze_masked(optax.adam(0.01)), wrt=nnx.Param)

    @nnx.jit
    def step(model: nnx.Module, optimizer: nnx.Optimizer) -> None:
        def loss(model: nnx.Module) -> jnp.ndarray:
            return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

        optimizer.update(model, nnx.grad(loss)(model), masks=maskedlinear.flax.param_masks(model))

    model.train()
    for _ in range(STEPS):
        step(model, optimizer)
    model.eval()


def main() -> int:
    """Train, hand over, train on, hand back; print what each step has."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.data))
    x, y = (digits.data[order] / 16).astype(np.float32), digits.target[order]
    cut = len(x) * 3 // 4
    rows = []

    def add(what: str, outputs: np.ndarray, live: int) -> np.ndarray:
        rows.append((what, 100 * float((outputs.argmax(1) == y[cut:]).mean()), live))
        return outputs

    def of_torch(what: str, model: nn.Module) -> np.ndarray:
        with torch.no_grad():
            outputs = model(torch.from_numpy(x[cut:])).numpy()
        return add(what, outputs, sum(row.connections for row in maskedlinear.torch.summary(model).rows))

    def of_flax(what: str, model: nnx.Module) -> np.ndarray:
        live = sum(row.connections for row in maskedlinear.flax.summary(model).rows)
        return add(what, np.asarray(model(jnp.asarray(x[cut:]))), live)

    torch.manual_seed(0)
    first = maskedlinear.torch.mask_model(torch_network())
    train_in_torch(first, torch.from_numpy(x[:cut]), torch.from_numpy(y[:cut]))
    maskedlinear.torch.prune_model(first, SPARSITY)
    differences = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits.safetensors"
        outputs = of_torch("PyTorch, trained, then pruned", first)
        checkpoint.save(first, path, dormant=True)
        second = checkpoint.load_into(flax_network(), path)
        second.eval()
        differences.append(float(np.abs(of_flax("Flax, from the file", second) - outputs).max()))
        train_in_flax(second, jnp.asarray(x[:cut]), jnp.asarray(y[:cut]))
        outputs = of_flax("Flax, trained on", second)
        checkpoint.save(second, path, dormant=True)
        size = path.stat().st_size
        third = checkpoint.load_into(torch_network(), path).eval()
        differences.append(float(np.abs(of_torch("PyTorch, from that file", third) - outputs).max()))
    print(f"{'':32}{'accuracy':>10}{'live weights':>14}")
    for what, accuracy, live in rows:
        print(f"{what:32}{accuracy:8.1f} %{live:14}")
    print(f"Outputs differ by at most {max(differences):.1g} where they are handed over; the file has {size} bytes.")
    return 0 if max(differences) < 1e-4 else 1


if __name__ == "__main__":
    raise SystemExit(main())
