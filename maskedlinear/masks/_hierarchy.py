"""A hierarchy over inputs, made ready to be layered: what is unknown, repeated, circular, empty or small is settled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskedlinear.masks._drop_report import DropReport
from maskedlinear.masks._layering import (
    Digraph,
    Ints,
    find_cycle,
    genes_of_nodes,
    heights_of,
    in_sorted,
    reachable_from,
)
from maskedlinear.masks._wiring_tables import (
    EdgeList,
    OnEmpty,
    RaiseOrDrop,
    check_choice,
    drop_repeated,
    number_names,
    refuse_strangers,
    tuple_of_names,
)

__all__ = ["Hierarchy", "make_hierarchy", "split_edges"]


@dataclass(frozen=True)
class Hierarchy:
    """A directed acyclic graph of inputs (the first numbers) and nodes, every node on a way to an output.

    ``weights`` and ``signs`` are those of the graph's edges, or ``None``; ``named`` says whether the user chose the outputs.
    """

    names: tuple[Any, ...]
    inputs: int
    graph: Digraph
    weights: NDArray[np.float64] | None
    signs: NDArray[np.int8] | None
    present: NDArray[np.bool_]
    outputs: Ints
    dropped: DropReport
    named: bool = False

    def with_edges(self, kept: NDArray[Any], dropped: DropReport) -> Hierarchy:
        """Return the hierarchy with some of its edges."""
        return replace(
            self,
            graph=Digraph(self.graph.count, self.graph.sources[kept], self.graph.targets[kept]),
            weights=None if self.weights is None else self.weights[kept],
            signs=None if self.signs is None else self.signs[kept],
            dropped=dropped,
        )

    def without(self, gone: NDArray[np.bool_], reason: str) -> Hierarchy:
        """Return the hierarchy without some nodes and their edges."""
        gone = gone & self.present
        report = self.dropped.with_dropped(reason, int(gone.sum()), (self.names[k] for k in np.flatnonzero(gone)))
        kept = ~gone[self.graph.sources] & ~gone[self.graph.targets]
        outputs = self.outputs[~gone[self.outputs]]
        return replace(self.with_edges(kept, report), present=self.present & ~gone, outputs=outputs)

    @property
    def is_annotation(self) -> NDArray[np.bool_]:
        """Which edges come from an input."""
        found: NDArray[np.bool_] = self.graph.sources < self.inputs
        return found

    @property
    def relations(self) -> Digraph:
        """The edges between nodes alone."""
        kept = ~self.is_annotation
        return Digraph(self.graph.count, self.graph.sources[kept], self.graph.targets[kept])

    def genes_of_nodes(self, strictly: bool = False) -> tuple[Ints, Ints]:
        """Return each input and node that it belongs to, directly or through others."""
        direct = self.is_annotation
        return genes_of_nodes(self.relations, self.graph.sources[direct], self.graph.targets[direct], strictly)


def split_edges(edges: EdgeList, inputs: Any) -> tuple[EdgeList, NDArray[np.bool_], tuple[Any, ...]]:
    """Return the edges, which of them come from an input, and the inputs: what no edge leads to, unless they are given."""
    targets = set(edges.targets)
    if inputs is None:
        given = tuple(dict.fromkeys(name for name in edges.sources if name not in targets))
    else:
        given = tuple_of_names("inputs", inputs)
        among = set(given)
        if not among.isdisjoint(targets):
            place = next(k for k, name in enumerate(edges.targets) if name in among)
            source, target = edges.pair(place)
            raise ValueError(
                f"no edge must lead to an input; got the one from {source!r} to {target!r}: the edges go from the inputs on "
                "(reverse those of a graph whose edges go from whole to part); where a node is measured and computed too, "
                "give one of the two another name"
            )
    known = set(given)
    direct = np.fromiter((name in known or name not in targets for name in edges.sources), bool, len(edges))
    return edges, direct, given


def make_hierarchy(
    edges: EdgeList,
    is_annotation: NDArray[np.bool_],
    inputs: Sequence[Any],
    outputs: Any,
    *,
    on_unknown: RaiseOrDrop = "raise",
    on_repeated: RaiseOrDrop = "raise",
    on_empty: OnEmpty = "raise",
    min_genes: int = 0,
    most_specific: bool = False,
    dropped: DropReport | None = None,
) -> Hierarchy:
    """Return the hierarchy of edges by name; the rules are those of ``LayeredWiring.from_edges``.

    Args:
        edges: from input to node and from node to node.
        is_annotation: which of them are the former.
        inputs: the inputs' names.
        outputs: the outputs' names; the nodes that lead to no other if ``None``.
        on_unknown: of annotations whose input is not among ``inputs``.
        on_repeated: of equal edges.
        on_empty: of nodes that no input leads to.
        min_genes: the fewest inputs of a node.
        most_specific: whether to leave out annotations that others imply.
        dropped: what was dropped before.
    """
    check_choice("on_unknown", on_unknown, ("raise", "drop"))
    check_choice("on_repeated", on_repeated, ("raise", "drop"))
    check_choice("on_empty", on_empty, ("raise", "keep", "drop"))
    hierarchy = _number(
        edges, is_annotation, inputs, on_unknown, on_repeated, DropReport() if dropped is None else dropped
    )
    heights = heights_of(hierarchy.graph, np.zeros(hierarchy.graph.count, np.int64))
    if (heights < 0).any():
        cycle = find_cycle(hierarchy.graph, heights < 0)
        raise ValueError(
            "a hierarchy must have no cycle; got "
            + " -> ".join(repr(hierarchy.names[k]) for k in cycle)
            + ": remove one of its edges, or make a recurrent wiring of the graph, with Wiring.from_networkx"
        )
    hierarchy = _with_outputs(hierarchy, outputs)
    hierarchy = _without_empty(hierarchy, on_empty)
    if min_genes > 0:
        hierarchy = _without_small(hierarchy, min_genes, keep_empty=on_empty == "keep")
    if not len(hierarchy.outputs):
        raise ValueError(f"a layered wiring must have an output; none is left. Dropped:\n{hierarchy.dropped}")
    leads = reachable_from(hierarchy.graph.reversed(), hierarchy.outputs) >= 0
    leads[: hierarchy.inputs] = True
    hierarchy = hierarchy.without(~leads, "nodes that lead to no output")
    return _most_specific(hierarchy) if most_specific else hierarchy


def _number(
    edges: EdgeList,
    is_annotation: NDArray[np.bool_],
    inputs: Sequence[Any],
    on_unknown: RaiseOrDrop,
    on_repeated: RaiseOrDrop,
    report: DropReport,
) -> Hierarchy:
    """Return the edges with numbers for names, of known inputs only, each once."""
    if not len(edges):
        raise ValueError("a layered wiring must have edges; got none" + (f". Dropped:\n{report}" if report else ""))
    parts = [name for name, direct in zip(edges.sources, is_annotation.tolist(), strict=True) if not direct]
    nodes = tuple(dict.fromkeys(chain(edges.targets, parts)))
    targets = len(inputs) + number_names(edges.targets, nodes)
    sources = number_names(edges.sources, inputs)
    sources[~is_annotation] = len(inputs) + number_names(parts, nodes)
    known = sources >= 0
    if not known[is_annotation].any():
        refuse_strangers(list(dict.fromkeys(edges.sources[k] for k in np.flatnonzero(is_annotation))), inputs)
    unknown = np.flatnonzero(~known)
    if len(unknown) and on_unknown == "raise":
        raise ValueError(
            f"what no edge leads to must be among the inputs given; got {edges.sources[unknown[0]]!r} in {len(unknown)} "
            "edges that is not: add the names, or drop such edges with on_unknown='drop'"
        )
    report = report.with_dropped("edges of unknown inputs", len(unknown), edges.pairs(unknown))
    names, kept = (*inputs, *nodes), np.flatnonzero(known)
    kept, report = drop_repeated(edges, kept, sources * len(names) + targets, on_repeated, report)
    return Hierarchy(
        names,
        len(inputs),
        Digraph(len(names), sources[kept], targets[kept]),
        None if edges.weights is None else edges.weights[kept],
        None if edges.signs is None else edges.signs[kept],
        np.ones(len(names), bool),
        np.zeros(0, np.int64),
        report,
    )


def _with_outputs(hierarchy: Hierarchy, outputs: Any) -> Hierarchy:
    graph, inputs = hierarchy.graph, hierarchy.inputs
    if outputs is None:
        ends = np.bincount(graph.sources, minlength=graph.count) == 0
        return replace(hierarchy, outputs=np.flatnonzero(ends[inputs:]) + inputs)
    names = tuple_of_names("outputs", outputs)
    places = {name: inputs + place for place, name in enumerate(hierarchy.names[inputs:])}
    missing = [name for name in names if name not in places]
    if missing:
        raise ValueError(
            f"outputs must be nodes to which edges lead; got {missing[0]!r}, which is none ({len(missing)} in all)"
        )
    numbers = np.array([places[name] for name in names], np.int64)
    reached = reachable_from(graph, np.arange(inputs)) >= 0
    if not reached[numbers].any():
        raise ValueError(
            f"edges must go from the inputs to the outputs; none of {len(names)} outputs is reached, the first is "
            f"{names[0]!r}: reverse edges that go from whole to part, as with graph.reverse()"
        )
    return replace(hierarchy, outputs=numbers, named=True)


def _without_empty(hierarchy: Hierarchy, on_empty: OnEmpty) -> Hierarchy:
    empty = reachable_from(hierarchy.graph, np.arange(hierarchy.inputs)) < 0
    if not empty.any() or on_empty == "keep":
        return hierarchy
    if on_empty == "raise":
        raise ValueError(
            f"each node must be reached from an input; {int(empty.sum())} of {len(empty) - hierarchy.inputs} are not, as "
            f"{hierarchy.names[int(np.argmax(empty))]!r}: leave them out with on_empty='drop', or keep them, with a bias "
            "alone, with on_empty='keep'"
        )
    return hierarchy.without(empty, "nodes without inputs")


def _without_small(hierarchy: Hierarchy, min_genes: int, keep_empty: bool) -> Hierarchy:
    """Return the hierarchy without nodes of few inputs; these go to the nearest nodes above that stay."""
    counts = np.bincount(hierarchy.genes_of_nodes()[1], minlength=hierarchy.graph.count)
    small = (counts < min_genes) & hierarchy.present
    small[: hierarchy.inputs] = False
    if keep_empty:
        small &= counts > 0
    if not small.any():
        return hierarchy
    moved = hierarchy.is_annotation & small[hierarchy.graph.targets]
    genes, nodes = genes_of_nodes(
        _edges_of_small(hierarchy.relations, small), hierarchy.graph.sources[moved], hierarchy.graph.targets[moved]
    )
    genes, nodes = genes[~small[nodes]], nodes[~small[nodes]]
    hierarchy = hierarchy.without(small, f"nodes with fewer than {min_genes} inputs, which go to the nodes above")
    graph, size = hierarchy.graph, hierarchy.graph.count
    fresh = ~in_sorted(genes * size + nodes, np.sort(graph.sources * size + graph.targets))
    if fresh.any() and (hierarchy.weights is not None or hierarchy.signs is not None):
        raise ValueError(
            "min_genes moves inputs of small nodes to the nodes above, for which there are no weights or signs: leave the "
            "small nodes out of the edges, or give no weights and signs"
        )
    joined = Digraph(size, np.concatenate([graph.sources, genes[fresh]]), np.concatenate([graph.targets, nodes[fresh]]))
    return replace(hierarchy, graph=joined)


def _edges_of_small(relations: Digraph, small: NDArray[np.bool_]) -> Digraph:
    kept = small[relations.sources]
    return Digraph(relations.count, relations.sources[kept], relations.targets[kept])


def _most_specific(hierarchy: Hierarchy) -> Hierarchy:
    """Return the hierarchy without annotations that follow from an input's annotation to a node below."""
    size, graph = hierarchy.graph.count, hierarchy.graph
    genes, nodes = hierarchy.genes_of_nodes(strictly=True)
    implied = hierarchy.is_annotation & in_sorted(graph.sources * size + graph.targets, genes * size + nodes)
    places = np.flatnonzero(implied)
    pairs = ((hierarchy.names[graph.sources[k]], hierarchy.names[graph.targets[k]]) for k in places)
    return hierarchy.with_edges(
        ~implied, hierarchy.dropped.with_dropped("edges that more specific ones imply", len(places), pairs)
    )
