"""Graphs and adjacency matrices become edges from a source to a target, whichever way round they are written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from maskedlinear.masks._drop_report import DropReport
from maskedlinear.masks._wiring_tables import (
    Connections,
    EdgeList,
    check_choice,
    connect,
    read_signs,
    read_weights,
    tuple_of_names,
)
from maskedlinear.pattern import Orientation, SparsityPattern

__all__ = ["OnSelfLoop", "connect_adjacency", "connect_graph", "connect_matrix", "edges_of_graph"]

OnSelfLoop = Literal["keep", "drop", "raise"]

_BOTH = (
    "orientation='out_in' if entry [i, j] is the connection from node j to node i, as in a layer's weight, or "
    "orientation='in_out' if it is the one from i to j, as networkx's to_scipy_sparse_array and to_numpy_array have it"
)


def connect_graph(
    graph: Any,
    inputs: Iterable[Any] | None,
    weight: str | None,
    sign: str | None,
    on_self_loop: OnSelfLoop,
    **options: Any,
) -> Connections:
    """Return the connections of a bipartite graph, or of any other between its nodes; see ``Wiring.from_networkx``."""
    check_choice("on_self_loop", on_self_loop, ("keep", "drop", "raise"))
    sides = None if inputs is not None else dict(graph.nodes(data="bipartite"))
    if sides is not None and all(side is None for side in sides.values()):
        return _connect_square(graph, weight, sign, on_self_loop, **options)
    if sides is not None:
        if any(side not in (0, 1) for side in sides.values()):
            raise ValueError(
                "each node must have the attribute bipartite, 0 for inputs and 1 for outputs; got one without: set it, "
                "or pass inputs=[...], or, for a graph whose nodes are inputs and outputs alike, remove it from all"
            )
        of = [node for node, side in sides.items() if side == 0]
    else:
        of = list(tuple_of_names("inputs", inputs))
    among = set(of)
    to = [node for node in graph.nodes if node not in among]
    edges = edges_of_graph(graph, weight, sign)
    for place, (one, other) in enumerate(zip(edges.sources, edges.targets, strict=True)):
        source, target = (one, other) if one in among or graph.is_directed() else (other, one)
        if (source in among) is (target in among) or source not in among:
            raise ValueError(f"each edge must go from an input to an output; got {one!r} to {other!r}")
        edges.sources[place], edges.targets[place] = source, target
    return connect(edges, of, to, **options)


def _connect_square(
    graph: Any, weight: str | None, sign: str | None, on_self_loop: OnSelfLoop, **options: Any
) -> Connections:
    edges = edges_of_graph(graph, weight, sign)
    loops = np.fromiter(
        (one == other for one, other in zip(edges.sources, edges.targets, strict=True)), bool, len(edges)
    )
    report, places = DropReport(), np.arange(len(edges))
    if loops.any() and on_self_loop != "keep":
        nodes = [edges.sources[place] for place in np.flatnonzero(loops)]
        if on_self_loop == "raise":
            raise ValueError(f"no node must reach itself; got {len(nodes)} self-loops, as of {nodes[0]!r}")
        report, places = report.with_dropped("self-loops", len(nodes), nodes), np.flatnonzero(~loops)
    if not graph.is_directed():  # each edge both ways, a loop once
        back = places[~loops[places]]
        sources = [*(edges.sources[k] for k in places), *(edges.targets[k] for k in back)]
        targets = [*(edges.targets[k] for k in places), *(edges.sources[k] for k in back)]
        places = np.concatenate([places, back])
    else:
        sources, targets = [edges.sources[k] for k in places], [edges.targets[k] for k in places]
    edges = EdgeList(
        sources,
        targets,
        None if edges.weights is None else edges.weights[places],
        None if edges.signs is None else edges.signs[places],
    )
    nodes = list(graph.nodes)
    return connect(edges, nodes, nodes, **{"on_empty": "keep", **options}, dropped=report)


def edges_of_graph(graph: Any, weight: str | None = None, sign: str | None = None) -> EdgeList:
    """Return a graph's edges with the attributes that are named."""
    pairs = list(graph.edges())
    edges = EdgeList([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    if weight is not None:
        edges.weights = read_weights(_attributes(graph, weight))
    if sign is not None:
        edges.signs = read_signs(_attributes(graph, sign))
    return edges


def _attributes(graph: Any, name: str) -> list[Any]:
    values = []
    for source, target, value in graph.edges(data=name):
        if value is None:
            raise ValueError(
                f"each edge must have the attribute {name!r}; the one from {source!r} to {target!r} has none"
            )
        values.append(value)
    return values


def connect_matrix(
    matrix: Any,
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    orientation: Orientation | None,
    weights: bool,
) -> Connections:
    """Return the connections of a sparse matrix, whose orientation must be told where it cannot be seen."""
    of, to = tuple_of_names("inputs", inputs), tuple_of_names("outputs", outputs)
    if orientation is None:
        shape = getattr(matrix, "shape", (0, 1))
        if len(of) == len(to) and shape == (len(to), len(of)):
            raise ValueError(f"a square matrix does not tell which way its connections go: pass {_BOTH}")
        if shape == (len(of), len(to)):
            raise ValueError(
                f"the matrix must have shape (out, in) = {(len(to), len(of))}; got {shape}, which is the transpose: pass "
                "orientation='in_out'"
            )
        orientation = "out_in"
    pattern, values = SparsityPattern.from_scipy(matrix, orientation=orientation)
    return Connections(pattern, of, to, read_weights(values.tolist()) if weights else None, None, DropReport())


def connect_adjacency(
    adjacency: Any, nodes: Sequence[Any] | None, orientation: Orientation | None, weights: bool
) -> Connections:
    """Return the connections of a square matrix, sparse or dense, between the same nodes."""
    if orientation is None:
        raise ValueError(f"an adjacency matrix does not tell which way its connections go: pass {_BOTH}")
    check_choice("orientation", orientation, ("out_in", "in_out"))
    shape = getattr(adjacency, "shape", None) or np.shape(adjacency)
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"an adjacency matrix must be square, a row and a column a node; got shape {shape}")
    names = tuple(range(shape[0])) if nodes is None else tuple_of_names("nodes", nodes)
    if hasattr(adjacency, "tocoo"):
        pattern, values = SparsityPattern.from_scipy(adjacency, orientation=orientation)
    else:
        dense = np.asarray(adjacency) if orientation == "out_in" else np.asarray(adjacency).T
        pattern = SparsityPattern.from_mask(dense != 0)
        values = dense[pattern.rows, pattern.indices]
    return Connections(pattern, names, names, read_weights(values.tolist()) if weights else None, None, DropReport())
