"""Accuracy against sparsity on scikit-learn's digits, for six ways to choose the connections, in PyTorch and in Flax.

    python examples/digits_sparsity.py --out digits        # a table and digits/sparsity.png; some seven minutes

A network of 64, 128, 64 and 10 nodes trains for the same number of steps whatever the method:

- random: a random mask from the start, denser in small layers (Erdős–Rényi)
- magnitude: train, and prune the smallest weights of each layer step by step (cubic schedule)
- global: the same, comparing the weights of all layers
- snip: prune before training, by the sensitivity of the loss
- set: start random; every few steps the weakest connections go, others come at random
- rigl: the same, but others come where the gradient is largest

The two frameworks draw their first weights differently. Flax's biases start at 0, so that a node that has lost all of its
inputs is 0 and has no gradient for RigL to grow by: at 99 % RigL stays behind PyTorch's there. PyTorch begun as Flax is does
worse, and Flax begun as PyTorch is does better.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from maskedlinear import pruning

METHODS = ("random", "magnitude", "global", "snip", "set", "rigl")
SPARSITIES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
SIZES = (64, 128, 64, 10)
STEPS, BATCH, RATE = 600, 64, 2e-3
SCHEDULE = {"begin": 100, "end": 400, "every": 25}


def data(seed: int) -> tuple[np.ndarray[Any, Any], ...]:
    """Return training and test images and labels; a fifth of them test."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(images))
    images, labels = (images[order] / 16).astype(np.float32), labels[order].astype(np.int32)
    cut = len(images) * 4 // 5
    return images[:cut], labels[:cut], images[cut:], labels[cut:]


class Torch:
    """The network in PyTorch."""

    def __init__(self, seed: int) -> None:
        import torch
        from torch import nn

        from maskedlinear.torch import freeze_masked, mask_model

        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for in_, out in pairwise(SIZES):
            layers += [nn.Linear(in_, out), nn.ReLU()]
        self.model = mask_model(nn.Sequential(*layers[:-1]))
        self.optimizer = freeze_masked(torch.optim.Adam(self.model.parameters(), lr=RATE), self.model)

    def _backward(self, x: Any, y: Any) -> None:
        import torch

        self.optimizer.zero_grad()
        logits = self.model(torch.from_numpy(x))
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(y).long()).backward()

    def step(self, x: Any, y: Any) -> None:
        self._backward(x, y)
        self.optimizer.step()

    def prune(self, sparsity: float, score: str, scope: Any, seed: int, x: Any, y: Any) -> None:
        from maskedlinear.torch import prune_model

        if score == "snip":
            self._backward(x, y)
        prune_model(self.model, sparsity, score=score, scope=scope, seed=seed, on_empty="allow")  # type: ignore[arg-type]

    def regrow(self, fraction: float, by_gradient: bool, seed: int, x: Any, y: Any) -> None:
        from maskedlinear.torch import dense_gradients, regrow_model

        if not by_gradient:
            regrow_model(self.model, fraction, seed=seed)
            return
        with dense_gradients(self.model) as gradients:
            self._backward(x, y)
        regrow_model(self.model, fraction, gradients=gradients)

    def accuracy(self, x: Any, y: Any) -> float:
        import torch

        with torch.no_grad():
            return float((self.model(torch.from_numpy(x)).argmax(1).numpy() == y).mean())


class Flax:
    """The network in Flax, of nnx layers."""

    def __init__(self, seed: int) -> None:
        import optax
        from flax import nnx

        from maskedlinear.flax import mask_model, param_masks
        from maskedlinear.jax import freeze_masked

        rngs = nnx.Rngs(seed)
        layers: list[Any] = []
        for in_, out in pairwise(SIZES):
            layers += [nnx.Linear(in_, out, rngs=rngs), nnx.relu]
        self.model = mask_model(nnx.Sequential(*layers[:-1]))
        self.optimizer = nnx.Optimizer(self.model, freeze_masked(optax.adam(RATE)), wrt=nnx.Param)

        def loss(model: Any, x: Any, y: Any) -> Any:
            return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

        @nnx.jit
        def step(model: Any, optimizer: Any, x: Any, y: Any) -> None:
            optimizer.update(model, nnx.grad(loss)(model, x, y), masks=param_masks(model))

        self.loss, self._step, self._grad = loss, step, nnx.jit(nnx.grad(loss))
        self._predict = nnx.jit(lambda model, x: model(x).argmax(1))

    def step(self, x: Any, y: Any) -> None:
        self._step(self.model, self.optimizer, x, y)

    def prune(self, sparsity: float, score: str, scope: Any, seed: int, x: Any, y: Any) -> None:
        from maskedlinear.flax import prune_model

        gradients = self._grad(self.model, x, y) if score == "snip" else None
        prune_model(self.model, sparsity, score=score, scope=scope, seed=seed, gradients=gradients, on_empty="allow")  # type: ignore[arg-type]

    def regrow(self, fraction: float, by_gradient: bool, seed: int, x: Any, y: Any) -> None:
        from maskedlinear.flax import dense_gradients, regrow_model

        gradients = dense_gradients(self.loss, self.model, x, y) if by_gradient else None
        regrow_model(self.model, fraction, gradients=gradients, seed=seed)

    def accuracy(self, x: Any, y: Any) -> float:
        return float((np.asarray(self._predict(self.model, x)) == y).mean())


def run(kind: Any, method: str, sparsity: float, seed: int) -> float:
    """Train one network, and return its accuracy on the test images."""
    x, y, *test = data(seed)
    network = kind(seed)
    batches = np.random.default_rng(seed).integers(0, len(x), (STEPS, BATCH))
    schedule = pruning.CubicSchedule(sparsity, **SCHEDULE)
    if method in ("random", "set", "rigl"):
        network.prune(sparsity, "random", "erdos_renyi", 7 * seed, None, None)
    if method == "snip":
        network.prune(sparsity, "snip", "global", 0, x[:512], y[:512])
    for number, chosen in enumerate(batches):
        batch = x[chosen], y[chosen]
        if method in ("magnitude", "global") and schedule.due(number):
            network.prune(schedule(number), "magnitude", "layer" if method == "magnitude" else "global", 0, *batch)
        if method in ("set", "rigl") and sparsity and number and number % SCHEDULE["every"] == 0:
            network.regrow(pruning.cosine_decay(number, SCHEDULE["end"]), method == "rigl", 100 * number + seed, *batch)
        network.step(*batch)
    return network.accuracy(*test)


def draw(found: dict[str, dict[str, list[list[float]]]], path: Path) -> None:
    """Draw the mean over seeds, and the range, against sparsity: a panel for each framework."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(5.6 * len(found), 4.2), sharey=True, squeeze=False)
    places = np.arange(len(SPARSITIES))
    for axis, (framework, by_method) in zip(axes[0], found.items(), strict=True):
        for method, rows in by_method.items():
            accuracy = 100 * np.array(rows)
            (line,) = axis.plot(places, accuracy.mean(1), marker="o", markersize=4, label=method)
            axis.fill_between(places, accuracy.min(1), accuracy.max(1), alpha=0.12, color=line.get_color())
        axis.set_xticks(places, [f"{100 * sparsity:g}" for sparsity in SPARSITIES])
        axis.set_xlabel("masked connections, %")
        axis.set_title(f"Digits, {framework}")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("test accuracy, %")
    axes[0][0].legend(loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    """Run all, print a table, and say whether the papers' order holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=("torch", "flax"), action="append")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("digits"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    kinds = {"torch": Torch, "flax": Flax}
    found: dict[str, dict[str, list[list[float]]]] = {}
    sound = True
    for framework in options.framework or kinds:
        print(f"{framework}: test accuracy in %, mean of {options.seeds} seeds")
        print("method     " + "".join(f"{100 * sparsity:7g} %" for sparsity in SPARSITIES))
        found[framework] = {}
        for method in METHODS:
            rows = [[run(kinds[framework], method, s, seed) for seed in range(options.seeds)] for s in SPARSITIES]
            found[framework][method] = rows
            print(f"{method:10}" + "".join(f"{100 * float(np.mean(row)):9.2f}" for row in rows), flush=True)
        high = {method: float(np.mean(rows[-3:])) for method, rows in found[framework].items()}
        for better in ("magnitude", "rigl"):
            holds = high[better] >= high["random"]
            sound &= holds
            print(f"{better} {'is at least' if holds else 'FALLS SHORT OF'} static random at 95 % and more")
    (options.out / "sparsity.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(found, options.out / "sparsity.png")
    print(f"Written to {options.out}: sparsity.json, sparsity.png")
    return 0 if sound else 1


if __name__ == "__main__":
    raise SystemExit(main())
