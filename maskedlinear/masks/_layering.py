"""Which level each node of a directed acyclic graph is on, in NumPy: longest paths, distances, what reaches what, cycles."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

__all__ = ["Digraph", "find_cycle", "genes_of_nodes", "heights_of", "in_sorted", "reachable_from"]

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Digraph:
    """Edges between numbered nodes, from ``sources`` to ``targets``."""

    count: int
    sources: Ints
    targets: Ints

    @cached_property
    def _by_source(self) -> tuple[Ints, Ints]:
        starts = np.zeros(self.count + 1, np.int64)
        np.cumsum(np.bincount(self.sources, minlength=self.count), out=starts[1:])
        return starts, np.argsort(self.sources, kind="stable")

    def edges_from(self, nodes: Ints) -> tuple[Ints, Ints]:
        """Return the edges that leave the nodes, and for each of them the place of its source among ``nodes``."""
        starts, order = self._by_source
        sizes = starts[nodes + 1] - starts[nodes]
        place = np.repeat(np.arange(len(nodes)), sizes)
        offset = np.arange(len(place)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return order[starts[nodes][place] + offset], place

    def reversed(self) -> Digraph:
        """Return the graph with each edge the other way round."""
        return Digraph(self.count, self.targets, self.sources)


def heights_of(graph: Digraph, least: Ints) -> Ints:
    """Return the length of the longest path to each node, from nodes at ``least``; -1 on and above cycles."""
    heights, waiting = least.copy(), np.bincount(graph.targets, minlength=graph.count)
    done = np.zeros(graph.count, bool)
    wave = np.flatnonzero(waiting == 0)
    while len(wave):
        done[wave] = True
        edges, place = graph.edges_from(wave)
        targets = graph.targets[edges]
        np.maximum.at(heights, targets, heights[wave[place]] + 1)
        np.subtract.at(waiting, targets, 1)
        wave = np.unique(targets[waiting[targets] == 0])
    heights[~done] = -1
    return heights


def find_cycle(graph: Digraph, among: NDArray[np.bool_]) -> list[int]:
    """Return the nodes of a cycle, its first one again at its end; each node ``among`` has a predecessor among them."""
    inside = np.flatnonzero(among[graph.sources] & among[graph.targets])
    before = dict(zip(graph.targets[inside].tolist(), graph.sources[inside].tolist(), strict=True))
    path, seen = [int(np.argmax(among))], set()
    while path[-1] not in seen:
        seen.add(path[-1])
        path.append(before[path[-1]])
    return path[path.index(path[-1]) :][::-1]


def reachable_from(graph: Digraph, nodes: Ints) -> Ints:
    """Return each node's distance from the nearest of ``nodes``; -1 where none leads to it."""
    distances = np.full(graph.count, -1, np.int64)
    wave, distance = np.unique(nodes), 0
    while len(wave):
        distances[wave] = distance
        targets = np.unique(graph.targets[graph.edges_from(wave)[0]])
        wave, distance = targets[distances[targets] < 0], distance + 1
    return distances


def genes_of_nodes(relations: Digraph, genes: Ints, nodes: Ints, strictly: bool = False) -> tuple[Ints, Ints]:
    """Return all ``(gene, node)`` where the gene belongs to the node or to one that leads to it, each once.

    Args:
        relations: from each node to those that it is part of.
        genes: the gene of each annotation.
        nodes: its node.
        strictly: leave out the annotations themselves, unless others imply them.
    """
    size = relations.count
    wave = _sorted_once(genes * size + nodes)
    known = wave[:0] if strictly else wave
    while len(wave):
        owners, members = np.divmod(wave, size)
        edges, place = relations.edges_from(members)
        wave = _sorted_once(owners[place] * size + relations.targets[edges])
        wave = wave[~in_sorted(wave, known)]
        known = np.sort(np.concatenate([known, wave]), kind="stable")  # merges the two, which are sorted
    return known // size, known % size


def _sorted_once(values: Ints) -> Ints:
    ordered = np.sort(values)
    once: Ints = ordered[np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)]]
    return once


def in_sorted(values: Ints, known: Ints) -> NDArray[np.bool_]:
    """Return which values are among those known, which must be sorted."""
    if not len(known):
        return np.zeros(len(values), bool)
    places = np.minimum(np.searchsorted(known, values), len(known) - 1)
    found: NDArray[np.bool_] = known[places] == values
    return found
