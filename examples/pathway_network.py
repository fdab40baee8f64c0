"""A whole pathway network from one hierarchy, in PyTorch and in Flax: the same losses, and attributions by name.

    python examples/pathway_network.py
    python examples/pathway_network.py --reactome FOLDER --data proteins.csv --groups samples.tsv

Without arguments: scikit-learn's breast cancer data, whose 30 features are measurements of cell nuclei. Each belongs to what
was measured (radius, texture, ...), which belongs to the size, the shape or the surface of the nucleus; and to a statistic.

With Reactome: the folder holds ``ReactomePathwaysRelation.txt`` and ``UniProt2Reactome.txt`` (from
https://reactome.org/download-data); the data has a row for each protein, by its UniProt identifier, and a column for each
sample; the groups a line ``sample<TAB>group`` for each sample, of two groups. ``sample_datamatrix.csv`` and
``sample_design_matrix.tsv`` of https://github.com/InfectionMedicineProteomics/BINN are such files.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from numpy.typing import NDArray

from maskedlinear import checkpoint
from maskedlinear import flax as masked_flax
from maskedlinear import torch as masked_torch
from maskedlinear.jax import freeze_masked
from maskedlinear.masks import LayeredWiring, plot_wirings

EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 40, 64, 0.005, 0.02
RESULTS = Path(__file__).parent / "results"
KINDS = {
    "size": ("radius", "perimeter", "area"),
    "shape": ("compactness", "concavity", "concave points", "symmetry", "fractal dimension"),
    "surface": ("texture", "smoothness"),
}

Floats = NDArray[np.float64]


class Data(NamedTuple):
    """Samples, standardised by those to train on.

    Attributes:
        x: shape ``(samples, features)``, in the order of the wiring's inputs; what is missing is 0, the mean.
        y: shape ``(samples, 1)``: 0 or 1.
        train: how many come first, to train on.
    """

    x: Floats
    y: Floats
    train: int


def breast_cancer() -> tuple[LayeredWiring, Floats, NDArray[np.bool_]]:
    """Return the hierarchy of scikit-learn's breast cancer features, and their values and which are malignant."""
    from sklearn.datasets import load_breast_cancer

    found = load_breast_cancer()
    features = [str(name) for name in found.feature_names]
    edges = [(kind, "nucleus") for kind in KINDS] + [(part, kind) for kind, parts in KINDS.items() for part in parts]
    for feature in features:
        statistic = next(name for name in ("mean", "error", "worst") if name in feature)
        edges += [(feature, feature.replace(statistic, "").strip()), (feature, statistic)]
    edges += [(statistic, "nucleus") for statistic in ("mean", "error", "worst")]
    return LayeredWiring.from_edges(edges, inputs=features), found.data, found.target == 0


def reactome(folder: Path, data: Path, groups: Path) -> tuple[LayeredWiring, Floats, NDArray[np.bool_]]:
    """Return Reactome's hierarchy over the proteins of a table, its values, and which samples are of the second group."""
    group_of = dict(line.split("\t")[:2] for line in groups.read_text(encoding="utf-8").splitlines()[1:])
    names = sorted(set(group_of.values()))
    if len(names) != 2:
        raise SystemExit(f"{groups} must tell two groups; it tells {names}")
    with data.open(encoding="utf-8", newline="") as file:
        (_, *samples), *rows = csv.reader(file)
    values = np.array([[float(value or "nan") for value in row[1:]] for row in rows])
    files = folder / "ReactomePathwaysRelation.txt", folder / "UniProt2Reactome.txt"
    proteins = [row[0] for row in rows]
    layers = LayeredWiring.from_reactome(*files, inputs=proteins, on_unknown="drop", on_empty="drop")
    known = [sample in group_of for sample in samples]
    groups_of_samples = [group_of[sample] for sample in samples if sample in group_of]
    return layers, values.T[known], np.array(groups_of_samples) == names[1]


def prepare(values: Floats, labels: NDArray[np.bool_], seed: int) -> Data:
    """Shuffle, take a fourth of each group to test on, and standardise by the rest."""
    order = np.random.default_rng(seed).permutation(len(values))
    parts = [order[labels[order] == group] for group in (False, True)]
    cuts = [len(part) * 3 // 4 for part in parts]
    train, test = (
        np.concatenate([part[:cut] if first else part[cut:] for part, cut in zip(parts, cuts, strict=True)])
        for first in (True, False)
    )
    seen = values[train]
    deviation = np.nanstd(seen, 0)
    x = (values - np.nanmean(seen, 0)) / np.where(deviation > 0, deviation, 1)
    order = np.concatenate([train, test])
    return Data(np.nan_to_num(x)[order], labels[order].astype(float)[:, None], len(train))


def batches(data: Data, epochs: int) -> Iterator[tuple[Floats, Floats]]:
    """Yield the batches of all epochs, whole ones only, in an order that both frameworks share."""
    rng = np.random.default_rng(0)
    for _ in range(epochs):
        order = rng.permutation(data.train)
        for start in range(0, data.train - BATCH + 1, BATCH):
            rows = order[start : start + BATCH]
            yield data.x[rows], data.y[rows]


def train_torch(network: torch.nn.Module, data: Data, epochs: int) -> list[float]:
    """Train, and return the losses. What passes nodes on stays 1: the network sees to it after each step."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    losses = []
    for x, y in batches(data, epochs):
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(network(torch.from_numpy(x)), torch.from_numpy(y))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_flax(network: Any, data: Data, epochs: int) -> list[float]:
    """Train in the same way, and return the losses. What passes nodes on stays 1: the guard keeps the constraints."""
    adam = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    optimizer = nnx.Optimizer(network, freeze_masked(adam, masks=masked_flax.param_masks(network)), wrt=nnx.Param)

    @nnx.jit
    def step(network: Any, optimizer: Any, x: Any, y: Any) -> Any:
        def loss_of(network: Any) -> Any:
            return optax.sigmoid_binary_cross_entropy(network(x), y).mean()

        loss, gradients = nnx.value_and_grad(loss_of)(network)
        optimizer.update(network, gradients)
        return loss

    return [float(step(network, optimizer, jnp.asarray(x), jnp.asarray(y))) for x, y in batches(data, epochs)]


def attributions_torch(layers: LayeredWiring, network: Any, x: Floats) -> dict[Any, float]:
    """Return gradient x value of each node, absolute, the mean over samples; by name, at the level that it is new on."""
    nodes = network.levels(torch.from_numpy(x).requires_grad_())
    gradients = torch.autograd.grad(network.heads[-1](nodes[-1]).sum(), nodes)
    products = [(one * level).detach().abs().mean(0).numpy() for one, level in zip(gradients, nodes, strict=True)]
    return by_name(layers, products)


def attributions_flax(layers: LayeredWiring, network: Any, x: Floats) -> dict[Any, float]:
    """Return the same of the other network."""

    @nnx.jit
    def products_of(network: Any, x: Any) -> list[Any]:
        products = []
        for level, nodes in enumerate(network.levels(x)):

            def output(nodes: Any, level: int = level) -> Any:
                for block in list(network.blocks)[level:]:
                    nodes = block(nodes)
                return network.heads[-1](nodes).sum()

            products.append(jnp.abs(jax.grad(output)(nodes) * nodes).mean(0))
        return products

    products = [np.asarray(level) for level in products_of(network, jnp.asarray(x))]
    return by_name(layers, products)


def by_name(layers: LayeredWiring, products: list[Floats]) -> dict[Any, float]:
    """Return values by the names of nodes; of those that are passed on the first."""
    names = [layers.inputs, *(wiring.outputs for wiring in layers)]
    found: dict[Any, float] = {}
    for level, values in zip(names, products, strict=True):
        for name, value in zip(level, values.tolist(), strict=True):
            found.setdefault(name, value)
    return found


def accuracy(outputs: Any, y: Floats) -> float:
    """Return how many of the outputs have the right sign."""
    return float(((np.asarray(outputs) > 0) == (y > 0.5)).mean())


def main(arguments: list[str] | None = None) -> int:
    """Train the network in both frameworks, compare them, and show what it has learnt by name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reactome", type=Path, help="the folder with Reactome's two files")
    parser.add_argument("--data", type=Path, help="a table (CSV) with a row a protein and a column a sample")
    parser.add_argument("--groups", type=Path, help="a table (TSV) with a sample and its group in each line")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the picture goes")
    given = parser.parse_args(arguments)
    real = [given.reactome, given.data, given.groups]
    if any(real) and not all(real):
        parser.error("--reactome, --data and --groups go together")
    layers, values, labels = reactome(*real) if all(real) else breast_cancer()
    data = prepare(values, labels, given.seed)
    print(layers)
    print(layers.dropped)

    torch.manual_seed(given.seed)
    options: dict[str, Any] = {"batch_norm": True}
    network = masked_torch.PathwayNetwork(layers, **options, dtype=torch.float64)
    twin = masked_flax.PathwayNetwork(layers, **options, param_dtype=jnp.float64, rngs=nnx.Rngs(given.seed))
    with tempfile.TemporaryDirectory() as folder:  # both start from the same weights
        checkpoint.save(network, f"{folder}/first.safetensors")
        checkpoint.load_into(twin, f"{folder}/first.safetensors")
    losses = [train_torch(network, data, given.epochs), train_flax(twin, data, given.epochs)]
    farthest = max(abs(one - other) for one, other in zip(*losses, strict=True))
    print(f"{len(losses[0])} steps in each framework, loss {losses[0][0]:.3f} to {losses[0][-1]:.3f}")
    print(f"The losses of PyTorch and Flax differ by at most {farthest:.1e}")

    network.eval(), twin.eval()  # type: ignore[no-untyped-call]
    x, y = data.x[data.train :], data.y[data.train :]
    with torch.no_grad():
        correct = (
            accuracy(network(torch.from_numpy(x)), y),
            accuracy(nnx.jit(type(twin).__call__)(twin, jnp.asarray(x)), y),
        )
    usual = max(y.mean(), 1 - y.mean())
    print(
        f"Of {len(y)} test samples right: PyTorch {correct[0]:.1%}, Flax {correct[1]:.1%}; the larger group is {usual:.1%}"
    )
    found, other = attributions_torch(layers, network, x), attributions_flax(layers, twin, x)
    apart = max(abs(found[name] - other[name]) for name in found)
    print(f"Attributions differ by at most {apart:.1e} (Flax keeps biased running variances, PyTorch unbiased ones)")
    ends = {*layers.inputs, *layers.outputs}
    strongest = sorted((name for name in found if name not in ends), key=found.get, reverse=True)[:10]  # type: ignore[arg-type]
    print("The ten nodes between inputs and outputs with the largest mean |gradient x value|:")
    for name in strongest:
        print(f"  {found[name]:8.4f}  {name}  {layers.labels.get(name, '')}")
    linears = [block.linear for block in network.blocks]
    assert all(weight == 1 for wiring, one in zip(layers, linears, strict=True) for weight in passed_on(wiring, one))
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "pathway_network.png"
    plot_wirings(layers, linears, around=strongest[0], top=8, path=path)
    print(f"The strongest connections around {strongest[0]}: {path}")
    return 0 if farthest < 1e-4 and correct[0] >= usual else 1


def passed_on(wiring: Any, layer: Any) -> list[float]:
    """Return the weights of the connections that pass a node on."""
    return [weight for node, to, weight in wiring.edges(layer) if node == to]


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)  # type: ignore[no-untyped-call]  # so that the two frameworks can be compared to the last digits
    raise SystemExit(main())
