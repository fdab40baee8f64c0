"""Claim: all levels of Reactome, read from files of its formats, become layered wirings in under 2 s on one core.

The files are made up, of Reactome's size: about 2,600 pathways on 12 levels, 11,000 proteins, rows of other species and
repeated rows. Folders with the real files may be named: they must hold ``ReactomePathwaysRelation.txt`` and
``UniProt2Reactome.txt``. Prints the time of each style, and, for comparison, of the same lossless layers made with networkx
and dictionaries, edge by edge.

    python benchmarks/wirings.py [FOLDER]
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from maskedlinear.masks import LayeredWiring

LEVELS, PATHWAYS, PROTEINS, ANNOTATIONS = 12, 2_600, 11_000, 46_000


def write_files(folder: Path) -> None:
    """Write a hierarchy and its annotations as Reactome does, with as much of another species."""
    rng = np.random.default_rng(0)
    share = np.array([0.011, 0.06, 0.18, 0.22, 0.18, 0.13, 0.09, 0.06, 0.03, 0.02, 0.01, 0.009])
    level = np.sort(rng.choice(LEVELS, PATHWAYS, p=share / share.sum()))
    relations = []
    for child in np.flatnonzero(level > 0):
        above = np.flatnonzero(level == level[child] - 1)
        relations.append((int(rng.choice(above)), int(child)))
        if rng.random() < 0.02 and level[child] > 1:  # some are part of two, not on neighbouring levels
            relations.append((int(rng.choice(np.flatnonzero(level < level[child] - 1))), int(child)))
    weights = rng.pareto(1.0, PATHWAYS) + 1
    weights[np.unique([whole for whole, _ in relations])] *= 0.04  # most annotations are to pathways without parts
    pathway = rng.choice(PATHWAYS, ANNOTATIONS, p=weights / weights.sum())
    pathway[:PATHWAYS] = np.arange(PATHWAYS)
    protein = rng.integers(PROTEINS, size=ANNOTATIONS)
    lines = [
        f"{species}-{whole}\t{species}-{part}\n"
        for species in ("R-HSA", "R-MMU")
        for whole, part in dict.fromkeys(relations)
    ]
    (folder / "ReactomePathwaysRelation.txt").write_text("".join(lines))
    lines = [
        f"P{who:05}\t{species}-{what}\thttps://reactome.org/#/{species}-{what}\tPathway {what}\t{evidence}\tname\n"
        for species in ("R-HSA", "R-MMU")
        for who, what in zip(protein.tolist(), pathway.tolist(), strict=True)
        for evidence in (("TAS", "IEA") if who % 10 == 0 else ("TAS",))
    ]
    (folder / "UniProt2Reactome.txt").write_text("".join(lines))


def with_networkx(relations: Path, annotations: Path) -> int:
    """Return the number of connections of the lossless layers, made the way in which it is done by hand."""
    import networkx

    graph = networkx.DiGraph()
    for line in annotations.read_text().splitlines():
        protein, pathway = line.split("\t")[:2]
        if pathway.startswith("R-HSA"):
            graph.add_edge(protein, pathway)
    for line in relations.read_text().splitlines():
        whole, part = line.split("\t")
        if part.startswith("R-HSA"):
            graph.add_edge(part, whole)
    height = {node: level for level, nodes in enumerate(networkx.topological_generations(graph)) for node in nodes}
    top = max(height.values())
    last = {node: max((height[above] - 1 for above in graph.successors(node)), default=top) for node in graph}
    layers: list[list[tuple[str, str]]] = [[] for _ in range(top)]
    for part, whole in graph.edges:
        layers[height[whole] - 1].append((part, whole))
    for node, end in last.items():
        for level in range(height[node], end):
            layers[level].append((node, node))
    return sum(map(len, layers))


def timed(make: Callable[[], Any]) -> tuple[float, Any]:
    """Return the shortest of three times, in seconds of the processor, and the result."""
    times = []
    for _ in range(3):
        start = time.process_time()
        made = make()
        times.append(time.process_time() - start)
    return min(times), made


def main() -> None:
    """Make the layers of each style, and print times and sizes."""
    with tempfile.TemporaryDirectory() as made_up:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(made_up)
        if len(sys.argv) == 1:
            write_files(folder)
        files = folder / "ReactomePathwaysRelation.txt", folder / "UniProt2Reactome.txt"
        for name, options in {
            "lossless": {},
            "shortest path, all levels": {"style": "shortest_path"},
            "shortest path, 4 levels": {"style": "shortest_path", "levels": 4},
        }.items():
            seconds, layers = timed(
                lambda options=options: LayeredWiring.from_reactome(*files, on_empty="drop", **options)
            )
            print(f"{name:28} {seconds:6.2f} s  {len(layers)} wirings: {layers}", flush=True)
        seconds, count = timed(lambda: with_networkx(*files))
        print(f"{'lossless, with networkx':28} {seconds:6.2f} s  {count} connections", flush=True)


if __name__ == "__main__":
    main()
