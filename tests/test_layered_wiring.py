"""Layered wirings: no edge of a graph is lost, ways from inputs to outputs are kept, and published layouts come out."""

from __future__ import annotations

import gzip
from itertools import pairwise
from pathlib import Path
from typing import Any

import networkx
import numpy as np
import pytest

from maskedlinear.masks import LayeredWiring, Wiring

EDGES = [("g1", "D"), ("g2", "E"), ("g3", "C")]
PARTS = [("A", "R"), ("B", "R"), ("E", "R"), ("C", "A"), ("D", "C"), ("D", "B")]
GENES = ["g3", "g1", "g2", "unused"]


def random_dag(seed: int) -> tuple[list[tuple[str, str]], list[str]]:
    """Return a graph over genes, with edges that span levels, and its genes."""
    rng = np.random.default_rng(seed)
    size, genes = int(rng.integers(2, 12)), [f"g{k}" for k in range(int(rng.integers(1, 6)))]
    edges = [(f"p{i}", f"p{j}") for i in range(size) for j in range(i + 1, size) if rng.random() < 0.3]
    edges += [(gene, f"p{k}") for gene in genes for k in range(size) if rng.random() < 0.4]
    edges += [(genes[0], f"p{k}") for k in range(size) if (genes[0], f"p{k}") not in edges]
    return [edges[k] for k in rng.permutation(len(edges))], genes


def paths_by_layers(layers: LayeredWiring) -> dict[tuple[str, str], int]:
    product = np.eye(len(layers.inputs), dtype=np.int64)
    for wiring in layers:
        product = wiring.mask.astype(np.int64) @ product
    places = np.argwhere(product)
    return {(layers.inputs[i], layers.outputs[o]): int(product[o, i]) for o, i in places}


@pytest.mark.parametrize("seed", range(25))
def test_no_edge_is_lost_and_paths_are_those_of_the_graph(seed: int) -> None:
    edges, genes = random_dag(seed)
    weights = {edge: float(k) for k, edge in enumerate(edges, 2)}
    layers = LayeredWiring.from_edges([(*edge, weights[edge]) for edge in edges], genes)
    assert layers.inputs == tuple(genes)
    found = []
    for wiring in layers:
        assert wiring.fixed is not None
        assert wiring.weights is not None
        for (source, target, _), fixed, weight in zip(wiring.edges(), wiring.fixed, wiring.weights, strict=True):
            assert fixed == (source == target)
            assert weight == (1 if fixed else weights[source, target])
            if not fixed:
                found.append((source, target))
    assert sorted(found) == sorted(edges)  # each of them, once
    for first, second in pairwise(layers):
        assert first.outputs == second.inputs
    graph = networkx.DiGraph(edges)
    assert set(layers.outputs) == {node for node in graph if graph.out_degree(node) == 0}
    counts = {
        (gene, root): sum(1 for _ in networkx.all_simple_paths(graph, gene, root))
        for gene in genes
        if gene in graph
        for root in layers.outputs
    }
    assert paths_by_layers(layers) == {pair: count for pair, count in counts.items() if count}
    if seed < 5:
        assert LayeredWiring.from_networkx(graph, genes).sizes == layers.sizes


def connections(layers: LayeredWiring) -> list[set[str]]:
    return [{f"{source}>{target}" for source, target, _ in wiring.edges()} for wiring in layers]


def test_shortest_paths_as_binn_has_them() -> None:
    layers = LayeredWiring.from_edges(EDGES + PARTS, GENES, style="shortest_path", levels=3)
    # worked by hand, and equal to what BINN 0.1.1 makes of it; C, on the last level with a part there, is lost
    assert connections(layers) == [{"g1>D", "g2>E"}, {"D>B", "E>E"}, {"A>R", "B>R", "E>R"}]
    assert [wiring.outputs for wiring in layers] == [("D", "E"), ("E", "A", "B"), ("R",)]
    assert [wiring.fixed.tolist() for wiring in layers if wiring.fixed is not None][1] == [True, False]
    report = str(layers.dropped)
    assert "1 node of the last level with parts on others, as 'C'" in report
    assert "1 edge from inputs to nodes that have parts, as 'g3' -> 'C'" in report
    assert "2 edges between levels that are no neighbours, as 'C' -> 'A', 'D' -> 'C'" in report
    two = LayeredWiring.from_edges(EDGES + PARTS, GENES, style="shortest_path", levels=2)
    assert connections(two) == [{"g1>A", "g3>A", "g1>B", "g2>E"}, {"A>R", "B>R", "E>R"}]
    assert LayeredWiring.from_edges(EDGES + PARTS, GENES, style="shortest_path").sizes == layers.sizes


def test_outputs_small_and_empty_nodes() -> None:
    named = LayeredWiring.from_edges(EDGES + PARTS, GENES, ["R", "C"])
    assert named.outputs == ("R", "C")
    assert paths_by_layers(named) == {("g1", "R"): 2, ("g2", "R"): 1, ("g3", "R"): 1, ("g3", "C"): 1, ("g1", "C"): 1}
    only = LayeredWiring.from_edges(EDGES + PARTS, GENES, ["A"])
    assert connections(only) == [{"g1>D", "g3>g3"}, {"g3>C", "D>C"}, {"C>A"}]
    assert "nodes that lead to no output, as 'E', 'R', 'B'" in str(only.dropped)
    small = LayeredWiring.from_edges(EDGES + PARTS, GENES, min_genes=2)  # D, B and E have one; g1 and g2 go up
    assert connections(small) == [
        {"g3>C", "g1>C", "g1>g1", "g2>g2"},
        {"C>A", "g1>g1", "g2>g2"},
        {"A>R", "g1>R", "g2>R"},
    ]
    assert "3 nodes with fewer than 2 inputs" in str(small.dropped)
    implied = LayeredWiring.from_edges([*EDGES, *PARTS, ("g1", "R"), ("g2", "R")], GENES, most_specific=True)
    assert connections(implied) == connections(LayeredWiring.from_edges(EDGES + PARTS, GENES))
    assert "2 edges that more specific ones imply" in str(implied.dropped)


REACTOME = "R-HSA-1\tR-HSA-2\nR-HSA-1\tR-HSA-3\nR-MMU-1\tR-MMU-2\nR-HSA-2\tR-HSA-4\n"
TABLE = (
    "P1\tR-HSA-2\thttps://reactome.org/#/R-HSA-2\tDeath\tTAS\tHomo sapiens\n"
    "P1\tR-HSA-2\thttps://reactome.org/#/R-HSA-2\tDeath\tIEA\tHomo sapiens\n"
    "P2\tR-HSA-1\thttps://reactome.org/#/R-HSA-1\tLife\tTAS\tHomo sapiens\n"
    "P3\tR-MMU-2\thttps://reactome.org/#/R-MMU-2\tDeath\tTAS\tMus musculus\n"
)
OBO = """format-version: 1.2

[Term]
id: GO:1
name: root
namespace: biological_process

[Term]
id: GO:2
name: middle ! no comment
namespace: biological_process
alt_id: GO:22
is_a: GO:1 ! root

[Term]
id: GO:3
name: leaf
namespace: biological_process
relationship: part_of GO:2 ! middle
relationship: regulates GO:1 ! root
is_a: GO:9 ! elsewhere

[Term]
id: GO:9
name: elsewhere
namespace: molecular_function

[Term]
id: GO:4
name: gone
namespace: biological_process
is_obsolete: true

[Typedef]
id: part_of
name: part of
"""


def gaf(gene: str, qualifier: str, term: str) -> str:
    return (
        f"UniProtKB\tid{gene}\t{gene}\t{qualifier}\t{term}\tPMID:1\tIDA\t\tP\tn\ts\tprotein\ttaxon:9606\t2020\tX\t\t\n"
    )


def test_reactomes_own_files(tmp_path: Path) -> None:
    relations, table, sets = tmp_path / "rel.txt", tmp_path / "UniProt2Reactome.txt", tmp_path / "ReactomePathways.gmt"
    relations.write_text(REACTOME)
    table.write_text(TABLE)
    sets.write_text("Death\tR-HSA-2\tP1\nLife\tR-HSA-1\tP2\n")
    with pytest.raises(ValueError, match="2 of 4 are not, as 'R-HSA-3'"):
        LayeredWiring.from_reactome(relations, table)
    for file in (table, sets):
        layers = LayeredWiring.from_reactome(relations, file, on_empty="drop")
        assert connections(layers) == [{"P1>R-HSA-2", "P2>P2"}, {"R-HSA-2>R-HSA-1", "P2>R-HSA-1"}]
        assert layers.labels["R-HSA-2"] == "Death"
        assert "1 relation of other species" in str(layers.dropped)
        assert ("1 annotation repeated for other evidence" in str(layers.dropped)) == (file == table)
    kept = LayeredWiring.from_reactome(relations, table, ["P2", "P1"], on_empty="keep")
    assert kept.inputs == ("P2", "P1")
    assert {"R-HSA-3>R-HSA-3", "R-HSA-4>R-HSA-2"} <= set().union(*connections(kept))
    with pytest.raises(ValueError, match="must have lines of the species 'R-XYZ'"):
        LayeredWiring.from_reactome(relations, table, species="R-XYZ")
    with pytest.raises(ValueError, match=r"two identifiers, .* in line 1"):
        LayeredWiring.from_reactome(table, table)
    by_gmt = LayeredWiring.from_gmt(sets, [("R-HSA-2", "R-HSA-1")], key="description")
    assert connections(by_gmt) == connections(layers)
    assert by_gmt.labels == {"R-HSA-2": "Death", "R-HSA-1": "Life"}


def test_the_gene_ontologys_own_files(tmp_path: Path) -> None:
    obo, file = tmp_path / "go.obo", tmp_path / "go.gaf.gz"
    obo.write_text(OBO)
    rows = [("a", "", "GO:3"), ("a", "involved_in", "GO:3"), ("b", "NOT|involved_in", "GO:3"), ("b", "", "GO:22")]
    with gzip.open(file, "wt") as text:
        text.write("!gaf-version: 2.2\n" + "".join(gaf(*row) for row in [*rows, ("c", "", "GO:4"), ("c", "", "GO:9")]))
    layers = LayeredWiring.from_go(obo, file, namespace="biological_process")
    assert connections(layers) == [{"a>GO:3", "b>b"}, {"GO:3>GO:2", "b>GO:2"}, {"GO:2>GO:1"}]
    assert layers.labels["GO:2"] == "middle"
    report = str(layers.dropped)
    for line in (
        "1 annotation with NOT, as 'b' -> 'GO:3'",
        "1 annotation with terms that the ontology has not, or no more, as 'c' -> 'GO:4'",
        "1 annotation of other namespaces",
        "1 annotation repeated for other evidence",
        "1 obsolete term, as 'GO:4'",
    ):
        assert line in report
    every = LayeredWiring.from_go(obo, file, gene="id")
    assert set(every.outputs) == {"GO:1", "GO:9"}
    assert every.inputs == ("ida", "idb", "idc")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: [*EDGES, *PARTS, ("R", "C")], r"no cycle; got ('[ARC]' -> ){3}'[ARC]': remove"),
        (lambda: [*EDGES, *PARTS, ("R", "g1")], "no edge must lead to an input; got the one from 'R' to 'g1'"),
        (lambda: [*EDGES, *PARTS, ("x", "R")], "must be among the inputs given; got 'x' in 1 edges"),
        (lambda: [*EDGES, *PARTS, PARTS[0]], "each edge must be there once; got the one from 'A' to 'R' twice"),
        (lambda: [("TP53", "R")], r"names in common; got none: the former has 'TP53'"),
        (list, "must have edges; got none"),
    ],
)
def test_what_is_no_hierarchy_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayeredWiring.from_edges(call(), GENES)


def test_mistakes_have_remedies() -> None:
    edges = EDGES + PARTS
    for arguments, message in (
        ({"outputs": ["Z"]}, "outputs must be nodes to which edges lead; got 'Z'"),
        ({"levels": 2}, "levels goes with style='shortest_path'"),
        ({"style": "shortest_path", "levels": 9}, "from 1 to the 3 that the hierarchy has; got 9"),
        ({"style": "longest"}, "style must be 'lossless' or 'shortest_path'"),
    ):
        with pytest.raises(ValueError, match=message):
            LayeredWiring.from_edges(edges, GENES, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no weights or signs"):
        LayeredWiring.from_edges([(*edge, 1.0) for edge in edges], GENES, style="shortest_path")
    with pytest.raises(ValueError, match="no edge must lead to an input"):
        LayeredWiring.from_networkx(networkx.DiGraph(edges).reverse(), GENES)
    with pytest.raises(ValueError, match="directed graph"):
        LayeredWiring.from_networkx(networkx.Graph(edges), GENES)
    with pytest.raises(ValueError, match="outputs of wiring 0 must be the inputs of wiring 1"):
        LayeredWiring((Wiring.from_edges(EDGES), Wiring.from_edges(PARTS)))
