"""Directed acyclic graphs become a chain of wirings, a layer each: pathways of genes, ontologies, any hierarchy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Literal, Self, overload

import numpy as np
from numpy.typing import NDArray

from maskedlinear.masks._drop_report import DropReport
from maskedlinear.masks._gene_sets import read_gmt
from maskedlinear.masks._hierarchy import Hierarchy, make_hierarchy, split_edges
from maskedlinear.masks._layering import Ints, heights_of, reachable_from
from maskedlinear.masks._ontology_files import read_go, read_reactome
from maskedlinear.masks._wiring import Wiring
from maskedlinear.masks._wiring_graphs import edges_of_graph
from maskedlinear.masks._wiring_tables import EdgeList, check_choice, read_edges, read_table, tuple_of_names
from maskedlinear.pattern import SparsityPattern

__all__ = ["LayeredWiring"]

Style = Literal["lossless", "shortest_path"]


@dataclass(frozen=True)
class LayeredWiring(Sequence[Wiring]):
    """A chain of wirings, from named inputs through the levels of a hierarchy to its outputs: ``for wiring in layers: ...``.

    The outputs of each wiring are the inputs of the next. A node that is needed beyond its own level is passed on, under its
    own name; such connections are marked in ``wiring.fixed``, have the weight 1, and should stay so.

    In the style ``"lossless"`` a node's level is the length of the longest path to it, inputs are on level 0, and each edge
    of the graph is one connection of one wiring: the number of ways from an input to an output is that of the graph. Inputs
    may lead to nodes of any level. (Longest-path layering: K. Sugiyama et al., IEEE Trans. SMC 11, 1981.)

    In the style ``"shortest_path"``, of P-NET (H. Elmarakeby et al., Nature 598, 2021) and BINN (E. Hartman et al., Nature
    Communications 14, 2023), a node's level is its distance from the outputs, ``levels`` of them are kept, nodes that end
    above the last are passed on to it, and inputs reach the last level alone: each of its nodes, all inputs that belong to
    it or to what is below it. Edges within a level or between others than neighbours are lost, and so are nodes that are
    part of nothing and have no parts, unless ``outputs`` names them; ``dropped`` counts them.

    Attributes:
        layers: the wirings, from the inputs on.
        style: the style.
        labels: what nodes are called in words, where the source says so.
        dropped: what the source held that the wirings do not, and why; ``print`` it.

    Raises:
        ValueError: if there is no wiring, or the outputs of one are not the inputs of the next.

    Example:
        >>> edges = [("g1", "A"), ("g2", "A"), ("g3", "B"), ("A", "root"), ("B", "root"), ("A", "B")]
        >>> layers = LayeredWiring.from_edges(edges)
        >>> print(layers)
        LayeredWiring: 3 -> 2 -> 2 -> 1, 8 connections, of them 2 fixed
        >>> [list(wiring.inputs) for wiring in layers]
        [['g1', 'g2', 'g3'], ['g3', 'A'], ['A', 'B']]
    """

    layers: tuple[Wiring, ...]
    style: Style = "lossless"
    labels: Mapping[Any, str] = field(default_factory=dict, compare=False)
    dropped: DropReport = field(default_factory=DropReport, compare=False)

    def __post_init__(self) -> None:
        """Check that the wirings follow on each other."""
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers:
            raise ValueError("a layered wiring must have a wiring at least; got none")
        for place, (first, second) in enumerate(zip(self.layers, self.layers[1:], strict=False)):
            if first.outputs != second.inputs:
                raise ValueError(
                    f"the outputs of wiring {place} must be the inputs of wiring {place + 1}, in their order"
                )

    def __len__(self) -> int:
        """Return the number of wirings."""
        return len(self.layers)

    @overload
    def __getitem__(self, place: int) -> Wiring: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Wiring, ...]: ...
    def __getitem__(self, place: int | slice) -> Wiring | tuple[Wiring, ...]:
        """Return one wiring, or several."""
        return self.layers[place]

    def __iter__(self) -> Iterator[Wiring]:
        """Go from the inputs on."""
        return iter(self.layers)

    @property
    def inputs(self) -> tuple[Any, ...]:
        """The names of the first wiring's inputs."""
        return self.layers[0].inputs

    @property
    def outputs(self) -> tuple[Any, ...]:
        """The names of the last wiring's outputs."""
        return self.layers[-1].outputs

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of inputs, and of each wiring's outputs."""
        return (len(self.inputs), *(len(wiring.outputs) for wiring in self.layers))

    @property
    def nnz(self) -> int:
        """The number of connections of all wirings, fixed ones included."""
        return sum(wiring.pattern.nnz for wiring in self.layers)

    def __str__(self) -> str:
        """Say the sizes."""
        fixed = sum(int(wiring.fixed.sum()) for wiring in self.layers if wiring.fixed is not None)
        return f"LayeredWiring: {' -> '.join(map(str, self.sizes))}, {self.nnz} connections, of them {fixed} fixed"

    __repr__ = __str__

    @classmethod
    def from_edges(
        cls,
        edges: Iterable[tuple[Any, Any] | tuple[Any, Any, float]],
        inputs: Any = None,
        outputs: Any = None,
        *,
        style: Style = "lossless",
        levels: int | None = None,
        **options: Any,
    ) -> Self:
        """Return the layered wiring of a list of edges: from inputs to nodes, and from nodes to those that they are part of.

        Args:
            edges: ``(from, to)`` or ``(from, to, weight)`` for each edge, in the direction in which the network computes.
            inputs: the inputs in the order of the data's columns (names, an index of pandas, an ``AnnData`` object); what no
                edge leads to, in the order in which it comes first, if ``None``. May hold some without an edge.
            outputs: the roots, of whatever level, in the order of the last layer; what leads to no other node if ``None``.
            style: ``"lossless"`` or ``"shortest_path"``; see the class.
            levels: for ``"shortest_path"``, how many levels of nodes; all of them if ``None``.
            options: ``on_unknown`` (``"raise"``, ``"drop"``): edges from what no edge leads to and is not among ``inputs``;
                ``on_repeated`` (the same): edges that are there again;
                ``on_empty`` (``"raise"``, ``"drop"``, ``"keep"``): nodes that no input leads to;
                ``min_genes``: the fewest inputs that must lead to a node; those of smaller nodes go to the nodes above;
                ``most_specific``: leave out an input's edges to nodes that it reaches through another of its edges, as in
                tables of "all levels", whose annotations are repeated for each level.

        Raises:
            ValueError: if there is a cycle, which is named; an edge leads to an input or is there twice; no output is
                reached; an input is unknown or a node empty; weights are given for ``"shortest_path"``, which has none for
                what it joins.
        """
        return cls._of_edges(read_edges(edges), inputs, outputs, style, levels, options)

    @classmethod
    def from_pandas(
        cls,
        frame: Any,
        input: str = "source",
        output: str = "target",
        *,
        inputs: Any = None,
        outputs: Any = None,
        weight: str | None = None,
        sign: str | None = None,
        style: Style = "lossless",
        levels: int | None = None,
        **options: Any,
    ) -> Self:
        """Return the layered wiring of a table of edges.

        Columns are named as in :meth:`Wiring.from_pandas`; the rest is that of :meth:`from_edges`.
        """
        return cls._of_edges(read_table(frame, input, output, weight, sign), inputs, outputs, style, levels, options)

    @classmethod
    def from_networkx(
        cls,
        graph: Any,
        inputs: Any = None,
        outputs: Any = None,
        *,
        weight: str | None = None,
        sign: str | None = None,
        style: Style = "lossless",
        levels: int | None = None,
        **options: Any,
    ) -> Self:
        """Return the layered wiring of a directed ``networkx`` graph whose edges go the way in which the network computes.

        Args:
            graph: the graph; one whose edges go from whole to part is turned by ``graph.reverse()``.
            inputs: as in :meth:`from_edges`, as all below.
            outputs: the roots.
            weight: the attribute with the edges' weights, if any.
            sign: the attribute with their signs, if any.
            style: the style.
            levels: how many levels.
            options: those of :meth:`from_edges`.

        Raises:
            ValueError: if the graph is not directed, and as :meth:`from_edges`.
        """
        if not graph.is_directed():
            raise ValueError(
                "a layered wiring must come from a directed graph; got an undirected one: make an nx.DiGraph of it"
            )
        return cls._of_edges(edges_of_graph(graph, weight, sign), inputs, outputs, style, levels, options)

    @classmethod
    def from_gmt(
        cls,
        file: str | PathLike[str],
        relations: Iterable[tuple[str, str]],
        inputs: Any = None,
        outputs: Any = None,
        *,
        key: Literal["name", "description"] = "name",
        weighted: bool | None = None,
        style: Style = "lossless",
        levels: int | None = None,
        **options: Any,
    ) -> Self:
        """Return the layered wiring of gene sets, of which relations say what is part of what.

        Args:
            file: a GMT file, as in :meth:`Wiring.from_gmt`.
            relations: ``(part, whole)`` for each relation between sets.
            inputs: the genes in the order of the data's columns; those of the file if ``None``.
            outputs: the roots; the sets that are part of no other if ``None``.
            key: the column of the file by which relations name the sets; the other becomes ``labels``.
            weighted: as in :meth:`Wiring.from_gmt`.
            style: the style.
            levels: how many levels.
            options: those of :meth:`from_edges`.

        Raises:
            ValueError: as :meth:`Wiring.from_gmt` and :meth:`from_edges`.
        """
        check_choice("key", key, ("name", "description"))
        on_empty = options.get("on_empty", "raise")
        sets = read_gmt(file, weighted=weighted, on_repeated=options.get("on_repeated", "raise"), on_empty=on_empty)
        labels = dict(sets.descriptions)
        if key == "description":
            sets.edges.targets = [labels[name] for name in sets.edges.targets]
            labels = {description: name for name, description in labels.items()}
        weighted_relations = [(*pair, 1.0) if sets.edges.weights is not None else pair for pair in relations]
        edges = read_edges(weighted_relations)
        joined = {*sets.edges.targets, *edges.sources, *edges.targets}
        bare = [name for name in labels if name not in joined]
        dropped = sets.dropped.with_dropped("sets without genes and relations", len(bare), bare)
        return cls._of_parts(sets.edges, edges, inputs, outputs, style, levels, options, labels, dropped)

    @classmethod
    def from_reactome(
        cls,
        relations: str | PathLike[str],
        annotations: str | PathLike[str],
        inputs: Any = None,
        outputs: Any = None,
        *,
        species: str = "R-HSA",
        style: Style = "lossless",
        levels: int | None = None,
        **options: Any,
    ) -> Self:
        """Return the layered wiring of Reactome's own files, as they are offered for download.

        Args:
            relations: ``ReactomePathwaysRelation.txt``.
            annotations: ``UniProt2Reactome.txt``, ``Ensembl2Reactome.txt`` or another table of that form, their
                ``_All_Levels`` variants too (with ``most_specific=True``), or ``ReactomePathways.gmt``.
            inputs: the genes or proteins in the order of the data's columns; those of the file if ``None``.
            outputs: the roots, by their identifiers as ``"R-HSA-162582"``; what is part of no other if ``None``.
            species: the beginning of the identifiers: R-HSA for man, R-MMU for the mouse. Others are left out.
            style: the style.
            levels: how many levels.
            options: those of :meth:`from_edges`. The same annotation in several rows, by other evidence, is one.

        Raises:
            ValueError: if a line has not the form of its file, no line is of the species, and as :meth:`from_edges`.
        """
        found = read_reactome(relations, annotations, species)
        return cls._of_parts(
            found.annotations, found.relations, inputs, outputs, style, levels, options, found.labels, found.dropped
        )

    @classmethod
    def from_go(
        cls,
        ontology: str | PathLike[str],
        annotations: str | PathLike[str],
        inputs: Any = None,
        outputs: Any = None,
        *,
        namespace: str | None = None,
        relations: Sequence[str] = ("is_a", "part_of"),
        gene: Literal["symbol", "id"] = "symbol",
        style: Style = "lossless",
        levels: int | None = None,
        **options: Any,
    ) -> Self:
        """Return the layered wiring of the Gene Ontology, from an OBO file and a GAF file, plain or ``.gz``.

        Args:
            ontology: ``go-basic.obo``, the one without cycles.
            annotations: a GAF file, as ``goa_human.gaf.gz``. Rows that say ``NOT`` are left out and counted.
            inputs: the genes in the order of the data's columns; those of the file if ``None``.
            outputs: the roots, as ``"GO:0008150"``; the terms that are part of no other if ``None``.
            namespace: ``"biological_process"``, ``"molecular_function"`` or ``"cellular_component"``; all if ``None``.
            relations: which relations lead from a term to one above.
            gene: the column with the genes: symbols, or identifiers (UniProt's in most files).
            style: the style.
            levels: how many levels.
            options: those of :meth:`from_edges`. The same annotation in several rows, by other evidence, is one.

        Raises:
            ValueError: if a line has not the form of its file, a term is unknown, and as :meth:`from_edges`.
        """
        found = read_go(ontology, annotations, namespace, relations, gene)
        return cls._of_parts(
            found.annotations, found.relations, inputs, outputs, style, levels, options, found.labels, found.dropped
        )

    @classmethod
    def _of_edges(
        cls, edges: EdgeList, inputs: Any, outputs: Any, style: Style, levels: int | None, options: dict[str, Any]
    ) -> Self:
        edges, is_annotation, names = split_edges(edges, inputs)
        hierarchy = make_hierarchy(edges, is_annotation, names, outputs, **options)
        return cls._of_hierarchy(hierarchy, style, levels, {})

    @classmethod
    def _of_parts(
        cls,
        annotations: EdgeList,
        relations: EdgeList,
        inputs: Any,
        outputs: Any,
        style: Style,
        levels: int | None,
        options: dict[str, Any],
        labels: Mapping[Any, str],
        dropped: DropReport,
    ) -> Self:
        names = tuple(dict.fromkeys(annotations.sources)) if inputs is None else tuple_of_names("inputs", inputs)
        edges = EdgeList(
            annotations.sources + relations.sources,
            annotations.targets + relations.targets,
            None
            if annotations.weights is None or relations.weights is None
            else np.concatenate([annotations.weights, relations.weights]),
        )
        is_annotation = np.arange(len(edges)) < len(annotations)
        hierarchy = make_hierarchy(edges, is_annotation, names, outputs, **options, dropped=dropped)
        return cls._of_hierarchy(hierarchy, style, levels, labels)

    @classmethod
    def _of_hierarchy(cls, hierarchy: Hierarchy, style: Style, levels: int | None, labels: Mapping[Any, str]) -> Self:
        check_choice("style", style, ("lossless", "shortest_path"))
        if style == "lossless":
            if levels is not None:
                raise ValueError(
                    "the lossless style keeps every level: levels goes with style='shortest_path'; to keep less, name "
                    "outputs"
                )
            return cls(tuple(_lossless(hierarchy)), style, labels, hierarchy.dropped)
        if hierarchy.weights is not None or hierarchy.signs is not None:
            raise ValueError(
                "the style 'shortest_path' joins edges, for which there are no weights or signs: give none, or take "
                "'lossless'"
            )
        wirings, dropped = _by_shortest_path(hierarchy, levels)
        return cls(tuple(wirings), style, labels, dropped)


def _lossless(hierarchy: Hierarchy) -> Iterator[Wiring]:
    """Yield the wirings in which each edge is once, and nodes are passed on from their level to the last that needs them."""
    graph, count, inputs = hierarchy.graph, hierarchy.graph.count, hierarchy.inputs
    least = np.ones(count, np.int64)
    least[:inputs] = 0
    heights = heights_of(graph, least)
    top = int(heights[hierarchy.outputs].max())
    last = heights.copy()
    np.maximum.at(last, graph.sources, heights[graph.targets] - 1)
    last[hierarchy.outputs] = top
    last[~hierarchy.present] = -1
    below = np.arange(inputs)
    for level in range(1, top + 1):
        here = np.flatnonzero((heights <= level) & (last >= level))
        if level == top:
            here = hierarchy.outputs
        passed = here[heights[here] < level]
        yield _wiring(hierarchy, below, here, np.flatnonzero(heights[graph.targets] == level), passed)
        below = here


def _by_shortest_path(hierarchy: Hierarchy, levels: int | None) -> tuple[list[Wiring], DropReport]:
    """Return the wirings between nodes at neighbouring distances from the outputs, and what was dropped."""
    relations, count = hierarchy.relations, hierarchy.graph.count
    if len(relations.sources) and not hierarchy.named:
        alone = np.ones(count, bool)
        alone[relations.sources] = alone[relations.targets] = alone[: hierarchy.inputs] = False
        hierarchy = hierarchy.without(alone, "nodes that no edge joins to others")
    report = hierarchy.dropped
    distances = reachable_from(relations.reversed(), hierarchy.outputs) + 1  # 0 for inputs and what was dropped
    deepest = int(distances.max())
    if levels is None:
        levels = deepest
    if isinstance(levels, bool) or not isinstance(levels, (int, np.integer)) or not 1 <= levels <= deepest:
        raise ValueError(
            f"levels must be a whole number from 1 to the {deepest} that the hierarchy has; got {levels!r}"
        )
    near = (distances > 0) & (distances <= levels)
    inner = near[relations.sources] & near[relations.targets]
    ends = near.copy()
    ends[relations.targets[inner]] = False  # the nodes without parts among the nearest
    here, wirings = np.flatnonzero(ends), []
    genes, nodes = hierarchy.genes_of_nodes()
    at_end = ends[nodes]
    pairs = (genes[at_end], nodes[at_end])
    wirings.append(_wiring(hierarchy, np.arange(hierarchy.inputs), here, None, here[:0], pairs))
    used = np.zeros(len(relations.sources), bool)
    for level in range(levels - 1, 0, -1):
        above = np.flatnonzero((distances == level) | (ends & (distances < level) & near))
        if level == 1:
            above = hierarchy.outputs
        lies_below = np.zeros(count, bool)
        lies_below[here] = True
        chosen = lies_below[relations.sources] & (distances[relations.targets] == level) & near[relations.targets]
        used |= chosen
        passed = above[ends[above]]
        sources, targets = relations.sources[chosen], relations.targets[chosen]
        wirings.append(_wiring(hierarchy, here, above, None, passed, (sources, targets)))
        here = above
    edges = np.flatnonzero(inner & ~used)
    names = hierarchy.names
    report = report.with_dropped(
        "edges between levels that are no neighbours",
        len(edges),
        ((names[relations.sources[k]], names[relations.targets[k]]) for k in edges),
    )
    cut = np.flatnonzero((distances == levels) & ~ends)
    report = report.with_dropped("nodes of the last level with parts on others", len(cut), (names[k] for k in cut))
    far = np.flatnonzero(distances > levels)
    report = report.with_dropped(
        "nodes beyond the last level, whose inputs go to those above", len(far), (names[k] for k in far)
    )
    direct = hierarchy.graph.targets[hierarchy.is_annotation]
    sources = hierarchy.graph.sources[hierarchy.is_annotation]
    lost = np.flatnonzero(near[direct] & ~ends[direct])
    return wirings, report.with_dropped(
        "edges from inputs to nodes that have parts", len(lost), ((names[sources[k]], names[direct[k]]) for k in lost)
    )


def _wiring(
    hierarchy: Hierarchy,
    below: Ints,
    here: Ints,
    edges: NDArray[np.intp] | None,
    passed: Ints,
    pairs: tuple[Ints, Ints] | None = None,
) -> Wiring:
    """Return the wiring of edges of the graph, or of pairs, and of nodes that are passed on."""
    if pairs is None:
        pairs = (hierarchy.graph.sources[edges], hierarchy.graph.targets[edges])
    column, row = np.full(hierarchy.graph.count, -1), np.full(hierarchy.graph.count, -1)
    column[below], row[here] = np.arange(len(below)), np.arange(len(here))
    sources, targets = np.concatenate([pairs[0], passed]), np.concatenate([pairs[1], passed])
    pattern, order = SparsityPattern.from_edges(row[targets], column[sources], (len(here), len(below)))
    weights, signs = (
        None if values is None else np.concatenate([values[edges], np.ones(len(passed), values.dtype)])[order]
        for values in (hierarchy.weights, hierarchy.signs)
    )
    fixed = order >= len(pairs[0])
    names = hierarchy.names
    return Wiring(pattern, tuple(names[k] for k in below), tuple(names[k] for k in here), weights, signs, fixed)
