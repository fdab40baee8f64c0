"""A network wired by what is known: scikit-learn's breast cancer data, and the learnt connections read back by name.

    python examples/breast_cancer_wiring.py

The 30 features are ten measurements of cell nuclei (radius, texture, ...) times three statistics (mean, error, worst). Each
measurement and each statistic becomes a node that sees its own features only; a plain layer reads the 13 nodes.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer
from torch import nn

from maskedlinear.masks import Wiring
from maskedlinear.torch import SparseLinear, summary

STATISTICS = ("mean", "error", "worst")


def edges(features: list[str]) -> list[tuple[str, str]]:
    """Return each feature's edges: to its measurement and to its statistic."""
    found = []
    for feature in features:
        statistic = next(name for name in STATISTICS if name in feature)
        measurement = feature.replace(statistic, "").strip()
        found += [(feature, measurement), (feature, statistic)]
    return found


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    """Fit by Adam with weight decay."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(model(x)[:, 0], y).backward()
        optimizer.step()


def main() -> int:
    """Train the wired network and a dense one, compare them, and print the strongest connections."""
    frame = load_breast_cancer()
    features = [str(name) for name in frame.feature_names]
    wiring = Wiring.from_edges(edges(features), inputs=features)
    order = np.random.default_rng(0).permutation(len(frame.data))
    x = torch.from_numpy(((frame.data - frame.data.mean(0)) / frame.data.std(0))[order]).float()
    y = torch.from_numpy(frame.target[order]).float()
    cut = len(x) * 3 // 4
    accuracy = {}
    torch.manual_seed(0)
    wired = SparseLinear(len(wiring.inputs), len(wiring.outputs), pattern=wiring.pattern)
    for name, first in {"wired": wired, "dense": nn.Linear(30, 13)}.items():
        model = nn.Sequential(first, nn.Tanh(), nn.Linear(13, 1))
        train(model, x[:cut], y[:cut])
        with torch.no_grad():
            accuracy[name] = float(((model(x[cut:])[:, 0] > 0) == (y[cut:] > 0.5)).float().mean())
        print(
            f"{name}: {sum(p.numel() for p in first.parameters())} parameters, test accuracy {100 * accuracy[name]:.1f} %"
        )
    print(summary(wired))
    print("The ten strongest connections:")
    strongest = list(wiring.edges(wired, top=10))
    for feature, node, weight in strongest:
        print(f"  {feature:24} -> {node:20} {weight:+.3f}")
    feature, node, weight = strongest[0]
    assert wiring.weight(wired, feature, node) == weight
    return 0 if accuracy["wired"] >= accuracy["dense"] - 0.03 else 1


if __name__ == "__main__":
    raise SystemExit(main())
