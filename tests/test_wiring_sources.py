"""Where wirings come from: weights and signs, graphs and their orientation, and reports of what was dropped."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import networkx
import numpy as np
import pytest
import scipy.sparse

from maskedlinear.masks import DropReport, Wiring
from maskedlinear.pattern import SparsityPattern

EDGES = [("tp53", "apoptosis"), ("brca1", "repair"), ("tp53", "repair"), ("mdm2", "apoptosis")]


class Table(dict[str, Any]):
    """As much of a ``pandas.DataFrame`` as is asked for."""

    @property
    def columns(self) -> list[str]:
        return list(self)

    def __getitem__(self, key: Any) -> Any:
        return (
            Table({name: self[name] for name in key}) if isinstance(key, list) else np.array(super().__getitem__(key))
        )

    def isna(self) -> Table:
        return Table({name: [value is None for value in column] for name, column in self.items()})

    def to_numpy(self) -> Any:
        return np.array(list(self.values()))


class Annotated:
    """As much of an ``AnnData`` as is asked for."""

    var_names = np.array(["unused", "tp53", "mdm2", "brca1"])


def by_name(wiring: Wiring, values: Any) -> dict[tuple[str, str], float]:
    return {edge[:2]: value for edge, value in zip(wiring.edges(), values.tolist(), strict=True)}


def test_weights_and_signs_of_a_table_lie_at_their_connections() -> None:
    weights, signs = [0.5, -2.0, 3.0, 0.25], ["Activation", "-", 0, "Repression"]
    frame = Table(tf=[e[0] for e in EDGES], gene=[e[1] for e in EDGES], w=weights, mor=signs)
    frame["mor"] = np.array(signs, object)
    wiring = Wiring.from_pandas(frame, "tf", "gene", weight="w", sign="mor", inputs=Annotated())
    assert wiring.inputs == ("unused", "tp53", "mdm2", "brca1")
    assert by_name(wiring, wiring.weights) == dict(zip(EDGES, weights, strict=True))
    assert by_name(wiring, wiring.signs) == dict(zip(EDGES, [1, -1, 0, -1], strict=True))
    assert wiring != Wiring.from_edges(EDGES, Annotated.var_names)
    assert Wiring.from_edges(wiring.edges(), wiring.inputs, wiring.outputs).weights.tolist() == [1.0] * 4  # type: ignore[union-attr]
    first = np.full((2, 4), -0.125, np.float32)
    first[~wiring.mask] = 9
    named = wiring.initial_values(first)
    assert (named[~wiring.mask] == 9).all()
    assert named.dtype == np.float32
    assert by_name(wiring, named[wiring.pattern.rows, wiring.pattern.indices]) == dict(zip(EDGES, weights, strict=True))
    signed = Wiring.from_pandas(frame, "tf", "gene", sign="mor")
    assert by_name(signed, signed.initial_values(np.full(4, -0.5))) == dict(
        zip(EDGES, [0.5, -0.5, -0.5, -0.5], strict=True)
    )
    assert not wiring.dropped


def test_what_is_dropped_is_counted() -> None:
    edges = [*EDGES, EDGES[1], ("x", "repair"), ("tp53", "cycle")]
    wiring = Wiring.from_edges(edges, ["tp53", "brca1", "mdm2"], on_unknown="drop", on_repeated="drop", min_genes=2)
    assert wiring.outputs == ("apoptosis", "repair")
    assert wiring == Wiring.from_edges(EDGES, ["tp53", "brca1", "mdm2"])
    assert str(wiring.dropped) == (
        "1 edge of unknown inputs, as 'x' -> 'repair'\n"
        "1 repeated edge, as 'brca1' -> 'repair'\n"
        "1 output with fewer than 2 inputs, as 'cycle'"
    )
    assert str(DropReport()) == "nothing was dropped"
    outputs = ["repair", "nothing", "apoptosis"]
    assert Wiring.from_edges(EDGES, None, outputs, on_empty="keep").outputs == tuple(outputs)
    left = Wiring.from_edges(EDGES, None, outputs, on_empty="drop")
    assert left.outputs == ("repair", "apoptosis")
    assert set(left.edges()) == {(*edge, 1.0) for edge in EDGES}
    assert left.dropped.counts == {"outputs without inputs": 1}


def gmt(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "sets.gmt.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


def test_gene_sets_with_weights_repeats_and_few_genes(tmp_path: Path) -> None:
    path = gmt(tmp_path, "A\t\tTP53,1.0\tMDM2,-2.5e-1\nB\t\tTP53,0.5\nA\t\tTP53,1.0\tMDM2,-2.5e-1\n")
    with pytest.raises(ValueError, match="brings 'A' again: on_repeated='drop' leaves it out"):
        Wiring.from_gmt(path)
    wiring = Wiring.from_gmt(path, ["MDM2", "TP53"], on_repeated="drop")
    assert by_name(wiring, wiring.weights) == {("TP53", "A"): 1.0, ("MDM2", "A"): -0.25, ("TP53", "B"): 0.5}
    assert wiring.dropped.counts == {"repeated sets": 1}
    assert Wiring.from_gmt(path, on_repeated="drop", weighted=False).inputs[0] == "TP53,1.0"
    path = gmt(tmp_path, "A\t\tTP53\tMDM2\nB\t\tTP53\tX\nC\t\tX\tY\tX\n")
    for options, outputs in (
        ({"min_genes": 2}, ("A",)),
        ({"on_empty": "drop"}, ("A", "B")),
        ({"on_empty": "keep"}, ("A", "B", "C")),
    ):
        kept: dict[str, Any] = {"on_unknown": "drop", "on_repeated": "drop", **options}
        assert Wiring.from_gmt(path, ["TP53", "MDM2"], **kept).outputs == outputs
    with pytest.raises(ValueError, match=r"got none for 1 of 3, as 'C': .*min_genes"):
        Wiring.from_gmt(path, ["TP53", "MDM2"], on_unknown="drop")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            ["ENSG00000141510", "ENSG00000135679"],
            "former look like symbols or other names, the latter like Ensembl ident",
        ),
        (["tp53", "mdm2"], "differ in case alone"),
        (["P04637", "Q00987"], "the latter like UniProt accessions"),
        (["7157", "4193"], "'TP53', 'MDM2', the latter '7157', '4193'. The former .* the latter like Entrez"),
        (["TP53.1", "MDM2.2"], "differ in the versions alone"),
        (["FOO", "BAR"], "check that both are of one species"),
    ],
)
def test_identifiers_of_another_kind_are_named(inputs: list[str], message: str, tmp_path: Path) -> None:
    for on_unknown in ("raise", "drop"):
        with pytest.raises(ValueError, match=message):
            Wiring.from_gmt(gmt(tmp_path, "A\t\tTP53\tMDM2\n"), inputs, on_unknown=on_unknown)  # type: ignore[arg-type]


def test_a_directed_graph_is_square_and_its_edges_keep_their_direction() -> None:
    graph = networkx.DiGraph()
    graph.add_edge("u", "v", weight=2.0, sign=-1)
    graph.add_edge("v", "w", weight=3.0, sign=1)
    graph.add_edge("w", "w", weight=0.5, sign=1)
    wiring = Wiring.from_networkx(graph, weight="weight", sign="sign")
    assert wiring.inputs == wiring.outputs == ("u", "v", "w")
    dense = np.zeros((3, 3))
    dense[wiring.pattern.rows, wiring.pattern.indices] = wiring.weights
    assert (dense == networkx.to_numpy_array(graph).T).all()  # row: target
    assert dense[1, 0] == 2
    assert by_name(wiring, wiring.signs) == {("u", "v"): -1, ("v", "w"): 1, ("w", "w"): 1}
    array = networkx.to_scipy_sparse_array(graph)
    for same in (
        Wiring.from_adjacency(array, graph.nodes, orientation="in_out", weights=True),
        Wiring.from_adjacency(networkx.to_numpy_array(graph), ["u", "v", "w"], orientation="in_out", weights=True),
        Wiring.from_scipy(array.T, ["u", "v", "w"], ["u", "v", "w"], orientation="out_in", weights=True),
    ):
        assert same.pattern == wiring.pattern
        assert (same.weights == wiring.weights).all()
        assert same.inputs == ("u", "v", "w")
    with pytest.raises(ValueError, match="does not tell which way its connections go: pass orientation='out_in'"):
        SparsityPattern.from_scipy(array)
    both_ways = networkx.to_scipy_sparse_array(graph.to_undirected())
    assert SparsityPattern.from_scipy(both_ways)[0] == Wiring.from_networkx(graph.to_undirected()).pattern
    pattern, values = SparsityPattern.from_scipy(array, orientation="in_out")
    assert pattern == wiring.pattern
    assert (values == wiring.weights).all()
    alone = Wiring.from_networkx(graph, on_self_loop="drop")
    assert set(alone.edges()) == {("u", "v", 1.0), ("v", "w", 1.0)}
    assert alone.dropped.counts == {"self-loops": 1}


def test_published_random_graphs() -> None:
    ring = networkx.watts_strogatz_graph(20, 4, 0.2, seed=1)
    wiring = Wiring.from_networkx(ring)
    assert wiring.pattern.nnz == 2 * ring.number_of_edges()
    assert (wiring.mask == (networkx.to_numpy_array(ring) != 0)).all()
    free = networkx.scale_free_graph(30, seed=1)
    with pytest.raises(ValueError, match="on_repeated='drop'"):
        Wiring.from_networkx(free)
    merged = Wiring.from_networkx(free, on_repeated="drop")
    assert (merged.mask == (networkx.to_numpy_array(free).T != 0)).all()
    assert merged.dropped.counts["repeated edges"] == free.number_of_edges() - merged.pattern.nnz


SQUARE = scipy.sparse.csr_array(np.array([[0.0, 1.0], [0.0, 0.0]]))
LONG = scipy.sparse.csr_array(np.array([[0.0, 1.0, 1.0], [0.0, 1.0, 0.0]]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Wiring.from_scipy(SQUARE, "ab", "cd"), "must be a sequence of names; got the single name 'ab'"),
        (
            lambda: Wiring.from_scipy(SQUARE, ["a", "b"], ["c", "d"]),
            "orientation='out_in' if .* orientation='in_out' if",
        ),
        (lambda: Wiring.from_scipy(LONG, ["a", "b"], ["c", "d", "e"]), "transpose: pass orientation='in_out'"),
        (lambda: Wiring.from_adjacency(SQUARE), "does not tell which way its connections go"),
        (lambda: Wiring.from_adjacency(LONG, orientation="in_out"), "must be square"),
        (lambda: SparsityPattern.from_scipy(SQUARE, orientation="rows"), "orientation must be 'out_in' or 'in_out'"),  # type: ignore[arg-type]
        (
            lambda: Wiring.from_edges([("a", "x", 1.0), ("a", "x", 2.0)], on_repeated="drop"),
            "weights 1 and 2, and so do 1",
        ),
        (lambda: Wiring.from_edges([("a", "x", 1.0), ("b", "x", np.nan)]), "weights must be finite"),
        (lambda: Wiring.from_edges([("a", "x", 1.0), ("b", "x")]), r"got \('b', 'x'\) at place 1"),
        (lambda: Wiring.from_edges(EDGES, None, ["repair", "apoptosis", "z"]), "got none for 1 of 3, as 'z'"),
        (lambda: Wiring.from_edges(EDGES, min_genes=3), "none of 2 has min_genes=3"),
        (
            lambda: Wiring.from_pandas(Table(source=["a"], target=["b"], mor=["up"]), sign="mor"),
            "signs must be numbers, or one of .* got 'up'",
        ),
        (
            lambda: Wiring.from_networkx(networkx.DiGraph([(0, 1)]), weight="weight"),
            "must have the attribute 'weight'; the one from 0 to 1 has none",
        ),
        (lambda: Wiring.from_networkx(networkx.DiGraph([(1, 1)]), on_self_loop="raise"), "1 self-loops, as of 1"),
        (
            lambda: Wiring(SparsityPattern.full((1, 2)), ("a", "b"), ("c",), weights=np.ones(3)),
            "weights must be one for each of the 2 connections",
        ),
    ],
)
def test_what_would_be_wrong_in_silence_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
