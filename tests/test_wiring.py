"""Named connections: every source gives the same wiring, and trained weights are found by their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import networkx
import numpy as np
import pytest
import scipy.sparse
import torch

from maskedlinear.masks import Wiring
from maskedlinear.pattern import SparsityPattern
from maskedlinear.torch import MaskedLinear, SparseLinear

EDGES = [("tp53", "apoptosis"), ("brca1", "repair"), ("tp53", "repair"), ("mdm2", "apoptosis")]
GENES, SETS = ("brca1", "mdm2", "tp53", "unused"), ("apoptosis", "repair")
MASK = np.array([[False, True, True, False], [True, False, True, False]])


class Frame:
    """As much of a ``pandas.DataFrame`` as is asked for."""

    def __init__(self, **columns: list[Any]) -> None:
        self.data = columns
        self.columns = list(columns)

    def __getitem__(self, key: Any) -> Any:
        return Frame(**{name: self.data[name] for name in key}) if isinstance(key, list) else Column(self.data[key])

    def isna(self) -> Frame:
        return Frame(**{name: [value is None for value in column] for name, column in self.data.items()})

    def to_numpy(self) -> Any:
        return np.array(list(self.data.values()))


class Column(list[Any]):
    def tolist(self) -> list[Any]:
        return list(self)


class Graph:
    """As much of a ``networkx.Graph`` as is asked for."""

    def __init__(self, nodes: dict[str, int | None], edges: list[tuple[str, str]], directed: bool = False) -> None:
        self._nodes, self._edges, self._directed = nodes, edges, directed

    @property
    def nodes(self) -> Any:
        sides = self._nodes

        class View(dict[str, Any]):
            def __call__(self, data: str) -> Any:
                assert data == "bipartite"
                return sides.items()

        return View(sides)

    def edges(self) -> Any:
        return self._edges

    def is_directed(self) -> bool:
        return self._directed


def test_every_source_gives_the_same_wiring(tmp_path: Path) -> None:
    gmt = tmp_path / "sets.gmt"
    gmt.write_text("apoptosis\tabout\ttp53\tmdm2\n\nrepair\t\tbrca1\ttp53\t\n", encoding="utf-8")
    frame = Frame(gene=[edge[0] for edge in EDGES], set=[edge[1] for edge in EDGES], weight=[1, 2, 3, 4])
    nodes = dict.fromkeys(GENES, 0) | dict.fromkeys(SETS, 1)
    found = {
        "edges": Wiring.from_edges(EDGES, GENES, SETS),
        "pandas": Wiring.from_pandas(frame, "gene", "set", inputs=GENES, outputs=SETS),
        "scipy": Wiring.from_scipy(scipy.sparse.csr_array(MASK), GENES, SETS),
        "networkx": Wiring.from_networkx(Graph(nodes, [(b, a) for a, b in EDGES])),
        "directed": Wiring.from_networkx(Graph(dict.fromkeys(nodes), EDGES, directed=True), inputs=GENES),
        "gmt": Wiring.from_gmt(gmt, GENES),
    }
    for name, wiring in found.items():
        assert (wiring.inputs, wiring.outputs) == (GENES, SETS), name
        assert (wiring.mask == MASK).all(), name
    assert Wiring.from_edges(EDGES).inputs == ("tp53", "brca1", "mdm2")
    assert set(found["gmt"].edges()) == {(gene, of, 1.0) for gene, of in EDGES}
    known = Wiring.from_gmt(gmt, ("mdm2", "tp53"), on_unknown="drop")
    assert set(known.edges()) == {("tp53", "apoptosis", 1.0), ("mdm2", "apoptosis", 1.0), ("tp53", "repair", 1.0)}


def test_trained_weights_are_found_by_name() -> None:
    wiring = Wiring.from_edges(EDGES, GENES, SETS)
    dense = MaskedLinear(4, 2, mask=wiring.mask)
    sparse = SparseLinear.from_masked(dense)
    assert sparse.pattern == wiring.pattern
    assert SparseLinear(4, 2, pattern=wiring.pattern).weight_values.shape == (4,)
    wanted = dense.weight[1, 2].item()
    kernel = jnp.asarray(dense.weight.detach().numpy()).T
    for values in (dense, sparse, dense.weight, kernel.T, dense.weight.detach().numpy()):
        assert wiring.weight(values, "tp53", "repair") == pytest.approx(wanted)
    assert wiring.weight(dense.weight.bfloat16(), "tp53", "repair") == pytest.approx(wanted, rel=0.01)
    by_name = {(gene, of): weight for gene, of, weight in wiring.edges(sparse)}
    assert by_name[("tp53", "repair")] == pytest.approx(wanted)
    assert set(by_name) == set(EDGES)
    with pytest.raises(KeyError, match="there is no connection from 'mdm2' to 'repair'"):
        wiring.weight(dense.weight, "mdm2", "repair")
    with pytest.raises(KeyError, match="there is no input 'mdm3'"):
        wiring.weight(dense.weight, "mdm3", "repair")
    with pytest.raises(ValueError, match="which is the weight's transpose"):
        wiring.weight(torch.zeros(4, 2), "tp53", "repair")


def line(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "sets.gmt"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda _: Wiring.from_edges([*EDGES, EDGES[0]]), "the one from 'tp53' to 'apoptosis' twice"),
        (
            lambda _: Wiring.from_edges(EDGES, ("tp53", "tp53")),
            "the names of inputs must be there once each; got 'tp53' twice",
        ),
        (lambda _: Wiring.from_edges(EDGES, GENES[:2]), "got the input 'tp53' in 2 edges"),
        (lambda _: Wiring.from_edges(EDGES, GENES, SETS[:1]), "got the output 'repair' in 2 edges"),
        (lambda _: Wiring.from_edges([("a", "b", "c")]), "an edge must be"),  # type: ignore[list-item]
        (lambda _: Wiring.from_edges(["ab"]), r"an edge must be \(input, output\); got \('ab',\) at place 0"),  # type: ignore[list-item]
        (lambda _: Wiring.from_edges(EDGES, on_unknown="ignore"), "on_unknown must be 'raise' or 'drop'"),  # type: ignore[arg-type]
        (
            lambda _: Wiring.from_pandas(Frame(a=["x"], target=["y"])),
            "must have the columns 'source' and 'target'; got",
        ),
        (lambda _: Wiring.from_pandas(Frame(source=[None], target=["y"])), "missing values"),
        (lambda _: Wiring.from_networkx(Graph({"a": 0, "b": None}, [])), "attribute bipartite"),
        (
            lambda _: Wiring.from_networkx(Graph({"a": 0, "b": 0}, [("a", "b")])),
            "from an input to an output; got 'a' to 'b'",
        ),
        (lambda _: Wiring(SparsityPattern.from_mask(MASK), GENES[:2], SETS), "a name for each of the 4 inputs; got 2"),
        (lambda path: Wiring.from_gmt(line(path, "a\tb\tc\nempty\tabout\n")), "line 2, of 'empty', has no genes"),
        (lambda path: Wiring.from_gmt(line(path, "a\tb\tc\na\tb\td\n")), "line 2 brings 'a' again"),
        (lambda path: Wiring.from_gmt(line(path, "a\tb\tc\tc\n")), "from 'c' to 'a' twice"),
        (lambda path: Wiring.from_gmt(line(path, "\n")), "a GMT file must have a line for each set"),
    ],
)
def test_what_is_no_wiring_is_refused(call: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        call(tmp_path)


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    assert Wiring.from_gmt(line(tmp_path, "\ufeffA\td\tg1\r\nB\td\tg2\r\n")).outputs == ("A", "B")


def test_a_real_graph_of_networkx() -> None:
    graph = networkx.davis_southern_women_graph()
    wiring = Wiring.from_networkx(graph)
    assert wiring.pattern.shape == (14, 18)
    assert {frozenset(edge[:2]) for edge in wiring.edges()} == {frozenset(edge) for edge in graph.edges}
