"""A picture of a named sub-network: the strongest connections of wirings, one after the other, with their nodes' names."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maskedlinear._extras import missing_framework

__all__ = ["plot_wirings"]

_POSITIVE, _NEGATIVE, _FIXED, _NODE = "#b2182b", "#2166ac", "#9a9a9a", "#333333"
_LONGEST = 34  # characters of a name that are shown


class _Edge(NamedTuple):
    input: Any
    output: Any
    weight: float
    fixed: bool


def plot_wirings(
    wirings: Sequence[Any],
    layers: Sequence[Any] | None = None,
    *,
    around: Any = None,
    top: int = 20,
    title: str | None = None,
    path: Any = None,
) -> Any:
    """Draw the strongest connections of a network of wirings, with the names of the nodes; return matplotlib's figure.

    Nodes stand in columns, inputs on the left. A connection is red if its weight is positive, blue if it is negative, and
    as wide as its weight is large among all of its wiring. Connections that are fixed, as those of pass-through nodes, are
    drawn grey and dashed where they join what is drawn, and are not among the strongest.

    Args:
        wirings: one, or those of layers one after the other: the outputs of each are inputs of the next.
        layers: the layer of each, as :meth:`Wiring.edges` takes it; without layers all weights are 1.
        around: a node's name, or several: what is drawn leads to them or away from them, in each wiring the strongest
            connections of the nodes that are reached in it. ``None``: the strongest of all.
        top: how many connections of each wiring, fixed ones not counted.
        title: above the picture.
        path: also save the picture there; its ending says as what (``.png``, ``.svg``, ``.pdf``).

    Raises:
        KeyError: if a node of ``around`` is in no wiring.
        ValueError: if wirings do not follow on one another, there is not one layer for each, or ``top`` is below 1; and as
            :meth:`Wiring.edges`.
        ModuleNotFoundError: if matplotlib is not installed.

    Example:
        >>> from maskedlinear.masks import Wiring, plot_wirings
        >>> genes = Wiring.from_edges([("tp53", "apoptosis"), ("mdm2", "apoptosis"), ("brca1", "repair")])
        >>> top = Wiring.from_edges([("apoptosis", "fate"), ("repair", "fate")])
        >>> figure = plot_wirings([genes, top], around="tp53")
        >>> sorted(text.get_text() for text in figure.axes[0].texts)
        ['apoptosis', 'fate', 'tp53']
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise missing_framework(error, "a picture of a wiring", "plot", "matplotlib") from error
    wirings = list(wirings)
    if layers is not None and len(layers) != len(wirings):
        raise ValueError(f"there must be a layer for each of the {len(wirings)} wirings; got {len(layers)}")
    if not wirings or isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise ValueError(f"a picture needs a wiring, and top= at least 1; got {len(wirings)} wirings and top={top!r}")
    for number, (before, after) in enumerate(pairwise(wirings)):
        if not set(before.outputs) & set(after.inputs):
            raise ValueError(f"wirings follow on one another; no output of number {number} is an input of the next")
    every = [_edges(wiring, None if layers is None else layers[place]) for place, wiring in enumerate(wirings)]
    chosen = _chosen(every, wirings, around, top)
    columns = _columns(chosen, wirings, around)
    places = _places(columns)
    figure = Figure(figsize=_size(columns), layout="constrained")
    axes = figure.add_subplot()
    axes.set_axis_off()
    for level, edges in enumerate(chosen):
        largest = max(
            (abs(edge.weight) for edge in every[level] if not edge.fixed and np.isfinite(edge.weight)), default=0
        )
        _draw_edges(axes, edges, level, places, largest)
    _draw_nodes(axes, columns, places, () if around is None else _as_names(around))
    axes.set_title(title if title is not None else _title(around, top, layers is not None), fontsize=10)
    _legend(axes, [edge for edges in chosen for edge in edges], layers is not None)
    if path is not None:
        figure.savefig(Path(path), dpi=150)
    return figure


def _edges(wiring: Any, layer: Any) -> list[_Edge]:
    """Return all connections, the strongest first."""
    columns = wiring._columns(layer, None, True, True, {})
    fixed = columns.get("fixed", np.zeros(len(columns["input"]), bool)).tolist()
    weights = np.asarray(columns["weight"], np.float64).tolist()
    return [_Edge(*edge) for edge in zip(columns["input"], columns["output"], weights, fixed, strict=True)]


def _chosen(every: list[list[_Edge]], wirings: Sequence[Any], around: Any, top: int) -> list[list[_Edge]]:
    """Return what is drawn of each wiring."""
    if around is None:
        return [_strongest(edges, top) for edges in every]
    names = _as_names(around)
    known = [set(wirings[0].inputs), *(set(wiring.outputs) for wiring in wirings)]
    for after, wiring in enumerate(wirings[1:], 1):
        known[after] |= set(wiring.inputs)
    for name in names:
        if not any(name in nodes for nodes in known):
            raise KeyError(f"there is no node {name!r} in the wirings")
    chosen: list[dict[tuple[Any, Any], _Edge]] = [{} for _ in every]
    reached = {name for name in names if name in known[0]}
    for level, edges in enumerate(every):  # away from the nodes
        found = _strongest([edge for edge in edges if edge.input in reached], top)
        chosen[level] |= {edge[:2]: edge for edge in found}
        reached = {edge.output for edge in found} | {name for name in names if name in known[level + 1]}
    reached = {name for name in names if name in known[-1]}
    for level, edges in reversed(list(enumerate(every))):  # and to them
        found = _strongest([edge for edge in edges if edge.output in reached], top)
        chosen[level] |= {edge[:2]: edge for edge in found}
        reached = {edge.input for edge in found} | {name for name in names if name in known[level]}
    return [list(edges.values()) for edges in chosen]


def _strongest(edges: Sequence[_Edge], top: int) -> list[_Edge]:
    """Return the strongest, and what is fixed and joins a node of theirs; of fixed ones alone, as many."""
    free = [edge for edge in edges if not edge.fixed][:top]
    ends = {edge.output for edge in free} | {edge.input for edge in free}
    joined = [edge for edge in edges if edge.fixed and (not free or edge.output in ends or edge.input in ends)]
    return free + joined[:top]


def _columns(chosen: list[list[_Edge]], wirings: Sequence[Any], around: Any) -> list[list[Any]]:
    """Return the nodes of each column, in an order with few crossings: each at the mean place of those it is joined to."""
    columns: list[dict[Any, None]] = [{} for _ in range(len(chosen) + 1)]
    for level, edges in enumerate(chosen):
        columns[level] |= dict.fromkeys(edge.input for edge in edges)
        columns[level + 1] |= dict.fromkeys(edge.output for edge in edges)
    ordered = [list(nodes) for nodes in columns]
    if around is not None and not any(ordered):  # nodes without a connection
        names = _as_names(around)
        ordered[0] = [name for name in names if name in wirings[0].inputs]
        ordered[-1] = [name for name in names if name in wirings[-1].outputs]
    for _ in range(4):
        for level in range(1, len(ordered)):
            _order(ordered[level], ordered[level - 1], [(edge.output, edge.input) for edge in chosen[level - 1]])
        for level in range(len(ordered) - 2, -1, -1):
            _order(ordered[level], ordered[level + 1], [(edge.input, edge.output) for edge in chosen[level]])
    return ordered


def _order(nodes: list[Any], others: list[Any], pairs: list[tuple[Any, Any]]) -> None:
    places = {node: (place + 0.5) / len(others) for place, node in enumerate(others)}
    own = {node: (place + 0.5) / len(nodes) for place, node in enumerate(nodes)}
    joined: dict[Any, list[float]] = {}
    for node, other in pairs:
        joined.setdefault(node, []).append(places[other])
    nodes.sort(key=lambda node: sum(joined[node]) / len(joined[node]) if node in joined else own[node])


def _places(columns: list[list[Any]]) -> list[dict[Any, float]]:
    """Return the height of each node, by column: evenly spread, with the same room above and below."""
    most = max(map(len, columns), default=1)
    return [
        {node: -(place + 0.5) * most / len(nodes) for place, node in enumerate(nodes)} if nodes else {}
        for nodes in columns
    ]


def _size(columns: list[list[Any]]) -> tuple[float, float]:
    most = max(map(len, columns), default=1)
    return 2.2 + 2.9 * (len(columns) - 1) + 1.2, min(max(1.6 + 0.24 * most, 2.6), 60.0)


def _draw_edges(axes: Any, edges: list[_Edge], level: int, places: list[dict[Any, float]], largest: float) -> None:
    along = np.linspace(0, 1, 24)
    bend = along * along * (3 - 2 * along)  # level where it starts and ends, so that names are not crossed
    for edge in reversed(edges):  # the strongest on top
        start, end = places[level][edge.input], places[level + 1][edge.output]
        share = min(abs(edge.weight) / largest, 1.0) if largest and np.isfinite(edge.weight) else 0.0
        colour = _FIXED if edge.fixed else _POSITIVE if edge.weight >= 0 else _NEGATIVE
        axes.plot(
            level + along,
            start + (end - start) * bend,
            color=colour,
            linewidth=0.9 if edge.fixed else 0.6 + 3.4 * share,
            linestyle=(0, (3, 2)) if edge.fixed else "-",
            alpha=0.85,
            solid_capstyle="round",
            zorder=1,
        )


def _draw_nodes(axes: Any, columns: list[list[Any]], places: list[dict[Any, float]], around: Sequence[Any]) -> None:
    last = len(columns) - 1
    for level, nodes in enumerate(columns):
        for node in nodes:
            height = places[level][node]
            axes.plot([level], [height], "o", markersize=4, color=_NODE, zorder=3)
            first = level == 0 and last > 0
            axes.annotate(
                _short(str(node)),
                (level, height),
                xytext=(-6 if first else 6 if level == last else 0, 0 if first or level == last else 5),
                textcoords="offset points",
                ha="right" if first else "left" if level == last else "center",
                va="center" if first or level == last else "bottom",
                fontsize=7.5,
                fontweight="bold" if node in around else "normal",
                parse_math=False,
                bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
                zorder=4,
            )
    axes.margins(0.04)


def _legend(axes: Any, edges: Sequence[_Edge], weighted: bool) -> None:
    from matplotlib.lines import Line2D

    kinds: list[tuple[str, Any, str, bool]] = [
        (_POSITIVE, "-", "weight above 0", any(not edge.fixed and edge.weight >= 0 for edge in edges)),
        (_NEGATIVE, "-", "weight below 0", any(not edge.fixed and edge.weight < 0 for edge in edges)),
        (_FIXED, (0, (3, 2)), "fixed", any(edge.fixed for edge in edges)),
    ]
    shown = [
        Line2D([], [], color=colour, linestyle=style, label=label) for colour, style, label, there in kinds if there
    ]
    if shown and weighted:
        axes.legend(handles=shown, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=3, fontsize=7, frameon=False)


def _title(around: Any, top: int, weighted: bool) -> str:
    what = f"the {top} strongest connections of each layer" if weighted else "connections"
    return what[0].upper() + what[1:] + ("" if around is None else f" around {', '.join(map(str, _as_names(around)))}")


def _as_names(around: Any) -> tuple[Any, ...]:
    return (around,) if isinstance(around, str | int) else tuple(around)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1].rstrip() + "…"
