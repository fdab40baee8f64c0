"""Connections between named nodes: from edge lists, tables, graphs and gene sets to a layer, and back to the names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from maskedlinear._arrays import as_numpy
from maskedlinear.masks._drop_report import DropReport
from maskedlinear.masks._gene_sets import read_gmt
from maskedlinear.masks._wiring_graphs import OnSelfLoop, connect_adjacency, connect_graph, connect_matrix
from maskedlinear.masks._wiring_reading import WiringReading
from maskedlinear.masks._wiring_tables import (
    Connections,
    OnEmpty,
    RaiseOrDrop,
    check_unique,
    connect,
    read_edges,
    read_table,
)
from maskedlinear.pattern import Orientation, SparsityPattern

__all__ = ["Wiring"]


@dataclass(frozen=True, eq=False)
class Wiring(WiringReading):
    """Which named inputs reach which named outputs, and where each connection is in a layer.

    A layer is made of it with ``MaskedLinear(len(wiring.inputs), len(wiring.outputs), mask=wiring.mask)`` or, with no dense
    matrix, ``SparseLinear(..., pattern=wiring.pattern)``; :meth:`weight`, :meth:`edges` and :meth:`to_pandas` read the
    weights of a layer by name, whatever its connections have become since; :meth:`plot` draws them.

    Attributes:
        pattern: the connections, of shape ``(out, in)``.
        inputs: the name of each input, in the order of the layer's features.
        outputs: the name of each output.
        weights: shape ``(nnz,)`` in the pattern's order: the weights that the connections should start from, or ``None``.
        signs: shape ``(nnz,)``, int8: 1 or -1 for connections that are to have this sign, 0 for free ones; or ``None``.
        fixed: shape ``(nnz,)``, booleans: the connections that only pass a node on to the next layer, which are 1 and should
            stay so; or ``None``.
        dropped: what the source held that the wiring does not, and why; ``print`` it.

    Raises:
        ValueError: if there is not one name for each input and output, or a name is there twice; or weights, signs and fixed
            are not one for each connection.
    """

    pattern: SparsityPattern
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: NDArray[np.float64] | None = None
    signs: NDArray[np.int8] | None = None
    fixed: NDArray[np.bool_] | None = None
    dropped: DropReport = field(default_factory=DropReport)

    def __post_init__(self) -> None:
        """Check that the names fit, and what is said of each connection."""
        for name, dtype in (("weights", np.float64), ("signs", np.int8), ("fixed", np.bool_)):
            values = getattr(self, name)
            if values is None:
                continue
            if np.shape(values) != (self.pattern.nnz,):
                raise ValueError(
                    f"{name} must be one for each of the {self.pattern.nnz} connections, in the pattern's order; got shape "
                    f"{np.shape(values)}"
                )
            array = np.array(values).astype(dtype)
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        for what, names, size in zip(
            ("outputs", "inputs"), (self.outputs, self.inputs), self.pattern.shape, strict=True
        ):
            check_unique(what, names)
            if len(names) != size:
                raise ValueError(f"there must be a name for each of the {size} {what}; got {len(names)}")

    def __eq__(self, other: object) -> bool:
        """Whether the other one has the same names and connections, and says the same of each of them."""
        if not isinstance(other, Wiring):
            return NotImplemented
        return (
            (self.inputs, self.outputs) == (other.inputs, other.outputs)
            and all(
                (one is None) is (two is None) and (one is None or np.array_equal(one, two))
                for one, two in ((getattr(self, name), getattr(other, name)) for name in ("weights", "signs", "fixed"))
            )
            and self.pattern == other.pattern
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def mask(self) -> NDArray[np.bool_]:
        """The mask, shape ``(out, in)``: a dense matrix, a byte an entry."""
        return self.pattern.to_mask()

    @property
    def passed_on(self) -> NDArray[np.bool_]:
        """Which outputs only pass a node on, shape ``(out,)``: those that have connections, all of them fixed."""
        connections = np.diff(self.pattern.indptr)
        if self.fixed is None:
            return np.zeros(len(connections), bool)
        passed: NDArray[np.bool_] = (
            np.bincount(self.pattern.rows[self.fixed], minlength=len(connections)) == connections
        )
        return passed & (connections > 0)

    def initial_values(self, values: Any) -> NDArray[Any]:
        """Return a layer's first values with what the wiring says of them: weights, signs, and 1 where it is fixed.

        Args:
            values: the layer's own first values, shape ``(nnz,)`` or ``(out, in)``; of any framework. They stay where the
                wiring has no weights, with the sign that the wiring gives, if any.

        Returns:
            A new NumPy array of the shape and dtype of ``values``.

        Raises:
            ValueError: if ``values`` has another shape.

        Example:
            >>> wiring = Wiring.from_edges([("tp53", "apoptosis", 2.0), ("mdm2", "apoptosis", -1.0)])
            >>> wiring.initial_values(np.zeros((1, 2)))
            array([[ 2., -1.]])
        """
        whole = np.array(as_numpy(values))
        if whole.shape not in (self.pattern.shape, (self.pattern.nnz,)):
            raise ValueError(
                f"values must have the weight's shape (out, in) = {self.pattern.shape}, or ({self.pattern.nnz},), one for "
                f"each connection; got {whole.shape}"
                + (", which is the transpose: pass its .T" if whole.shape == self.pattern.shape[::-1] else "")
            )
        live = whole[self.pattern.rows, self.pattern.indices] if whole.ndim == 2 else whole
        if self.weights is not None:
            live = self.weights.astype(live.dtype)
        elif self.signs is not None:
            live = np.where(self.signs == 0, live, np.abs(live) * self.signs.astype(live.dtype))
        if self.fixed is not None:
            live = np.where(self.fixed, np.ones((), live.dtype), live)
        if whole.shape == live.shape:
            return live
        whole[self.pattern.rows, self.pattern.indices] = live
        return whole

    @classmethod
    def from_edges(
        cls,
        edges: Iterable[tuple[Any, Any] | tuple[Any, Any, float]],
        inputs: Any = None,
        outputs: Any = None,
        *,
        on_unknown: RaiseOrDrop = "raise",
        on_repeated: RaiseOrDrop = "raise",
        on_empty: OnEmpty = "raise",
        min_genes: int = 0,
    ) -> Self:
        """Return the wiring of a list of edges.

        Args:
            edges: ``(input, output)`` or ``(input, output, weight)`` for each edge, as :meth:`edges` yields them.
            inputs: the inputs in the order of the layer's features, as the columns of the data: a sequence, an index of
                pandas, or an ``AnnData`` object, whose ``var_names`` they are; those of the edges, in the order in which
                they come first, if ``None``. May hold some without an edge.
            outputs: the same for the outputs.
            on_unknown: what happens to an edge whose end is not among ``inputs`` or ``outputs``. If no edge is left, that is
                an error in any case.
            on_repeated: what happens to an edge that is there again. Repeats that differ in weight or sign are an error in
                any case.
            on_empty: what happens to outputs that no edge reaches.
            min_genes: outputs with fewer inputs than that are left out; empty ones too, unless ``on_empty="keep"``.

        Returns:
            The wiring; its ``dropped`` says what was left out.

        Raises:
            ValueError: if an edge is there twice or is not of two or three parts, a name is there twice in ``inputs`` or
                ``outputs``, an end is unknown, or an output has no input.

        Example:
            >>> edges = [("tp53", "apoptosis"), ("mdm2", "apoptosis"), ("brca1", "repair")]
            >>> wiring = Wiring.from_edges(edges, inputs=["brca1", "mdm2", "tp53"], min_genes=2)
            >>> wiring.outputs
            ('apoptosis',)
            >>> print(wiring.dropped)
            1 output with fewer than 2 inputs, as 'repair'
        """
        options: dict[str, Any] = {"on_unknown": on_unknown, "on_repeated": on_repeated, "on_empty": on_empty}
        return cls._of(connect(read_edges(edges), inputs, outputs, **options, min_genes=min_genes))

    @classmethod
    def from_pandas(
        cls,
        frame: Any,
        input: str = "source",
        output: str = "target",
        *,
        weight: str | None = None,
        sign: str | None = None,
        **options: Any,
    ) -> Self:
        """Return the wiring of a table of edges: a ``pandas.DataFrame`` with a column for each end.

        Args:
            frame: the table; columns that are not named are left alone.
            input: the column with the edges' inputs.
            output: the column with their outputs.
            weight: the column with their weights, which become the wiring's ``weights``.
            sign: the column with their signs, the wiring's ``signs``: numbers, of which the sign is taken, or words
                (``"+"``, ``"-"``, ``"Activation"``, ``"Repression"``, ``"Unknown"``, ...).
            options: those of :meth:`from_edges`.

        Raises:
            ValueError: if a column is missing or has missing values, a sign is no known word, and as :meth:`from_edges`.
        """
        inputs, outputs = options.pop("inputs", None), options.pop("outputs", None)
        return cls._of(connect(read_table(frame, input, output, weight, sign), inputs, outputs, **options))

    @classmethod
    def from_scipy(
        cls,
        matrix: Any,
        inputs: Sequence[Any],
        outputs: Sequence[Any],
        *,
        orientation: Orientation | None = None,
        weights: bool = False,
    ) -> Self:
        """Return the wiring of a ``scipy.sparse`` matrix; each stored entry is a connection.

        Args:
            matrix: the matrix.
            inputs: the name of each input.
            outputs: the name of each output.
            orientation: ``"out_in"`` for a matrix of shape ``(out, in)``, ``"in_out"`` for ``(in, out)``, whose rows are the
                sources, as networkx writes them. ``None`` is ``"out_in"``, but must not be where there are as many inputs
                as outputs, since the matrix does not show which it is.
            weights: whether the matrix's values become the wiring's weights.

        Raises:
            ValueError: if an entry is stored twice, the names do not fit, or the orientation is needed.
            TypeError: if ``matrix`` is not sparse.
        """
        return cls._of(connect_matrix(matrix, inputs, outputs, orientation, weights))

    @classmethod
    def from_adjacency(
        cls,
        adjacency: Any,
        nodes: Sequence[Any] | None = None,
        *,
        orientation: Orientation | None = None,
        weights: bool = False,
    ) -> Self:
        """Return the square wiring of an adjacency matrix: its nodes are inputs and outputs, as in a recurrent layer.

        Args:
            adjacency: shape ``(nodes, nodes)``, sparse (each stored entry is a connection) or dense (each that is not 0).
            nodes: the name of each node; 0, 1, ... if ``None``.
            orientation: ``"in_out"`` where entry [i, j] is the connection from i to j (networkx; connectomes as a rule),
                ``"out_in"`` where it is the one from j to i (a layer's weight). Must be given.
            weights: whether the matrix's values become the wiring's weights.

        Raises:
            ValueError: if no orientation is given, the matrix is not square, or the names do not fit.

        Example:
            >>> wiring = Wiring.from_adjacency([[0, 1], [0, 0]], ["eye", "hand"], orientation="in_out")
            >>> list(wiring.edges())
            [('eye', 'hand', 1.0)]
        """
        return cls._of(connect_adjacency(adjacency, nodes, orientation, weights))

    @classmethod
    def from_networkx(
        cls,
        graph: Any,
        inputs: Iterable[Any] | None = None,
        *,
        weight: str | None = None,
        sign: str | None = None,
        on_self_loop: OnSelfLoop = "keep",
        **options: Any,
    ) -> Self:
        """Return the wiring of a ``networkx`` graph: of a bipartite one from side to side, of any other from node to node.

        A graph without sides (no node has the attribute ``bipartite``, networkx's convention, and ``inputs`` is ``None``)
        gives a square wiring, as for the recurrent weight of a cell: its nodes, in their order, are inputs and outputs.
        The edge from u to v is the connection from u to v, ``mask[v, u]``; an undirected edge is one each way.

        Args:
            graph: the graph; of a directed bipartite one, edges go from inputs to outputs.
            inputs: the nodes that are inputs, in the order of the layer's features; the others are outputs. If ``None``,
                those whose attribute ``bipartite`` is 0.
            weight: the attribute with the edges' weights, which become the wiring's ``weights``.
            sign: the attribute with their signs.
            on_self_loop: what happens, in a graph without sides, to edges from a node to itself.
            options: ``on_repeated``, ``on_empty`` (a graph without sides keeps nodes that no edge reaches) and
                ``min_genes``, as in :meth:`from_edges`. Parallel edges of a multigraph are repeats.

        Raises:
            ValueError: if a node is on neither side, an edge does not go from one side to the other, an edge is there twice,
                or lacks an attribute.

        Example:
            >>> import networkx
            >>> ring = networkx.watts_strogatz_graph(8, 2, 0.1, seed=0)
            >>> Wiring.from_networkx(ring).pattern
            SparsityPattern(8 -> 8, 16 connections, sparsity=0.75)
        """
        return cls._of(connect_graph(graph, inputs, weight, sign, on_self_loop, **options))

    @classmethod
    def from_gmt(
        cls,
        file: str | PathLike[str],
        inputs: Any = None,
        *,
        weighted: bool | None = None,
        on_unknown: RaiseOrDrop = "raise",
        on_repeated: RaiseOrDrop = "raise",
        on_empty: OnEmpty = "raise",
        min_genes: int = 0,
    ) -> Self:
        """Return the wiring of a gene-set file: genes are inputs, sets are outputs.

        Args:
            file: a GMT file, plain or ``.gz``: a line for each set, ``name <tab> description <tab> gene <tab> gene ...``.
            inputs: the genes in the order of the data's columns, as in :meth:`from_edges`; those of the file, in its order,
                if ``None``.
            weighted: whether genes are written with a weight, ``GENE,1.0``, as in Enrichr's files: these become the wiring's
                ``weights``. ``None`` looks whether all of them are.
            on_unknown: what happens to genes that are not among ``inputs``. If no gene is, that is an error in any case.
            on_repeated: what happens to a gene that is in a set again, and to a set that is there again with the same genes.
            on_empty: what happens to sets none of whose genes is among ``inputs``.
            min_genes: sets with fewer of these genes are left out.

        Raises:
            ValueError: if there is no line, a line has no genes, a set is there twice, a gene is there twice in a set, or is
                unknown, or a set is empty.
        """
        sets = read_gmt(file, weighted=weighted, on_repeated=on_repeated, on_empty=on_empty)
        options: dict[str, Any] = {"on_unknown": on_unknown, "on_repeated": on_repeated, "on_empty": on_empty}
        names = tuple(sets.descriptions)
        return cls._of(connect(sets.edges, inputs, names, **options, min_genes=min_genes, dropped=sets.dropped))

    @classmethod
    def _of(cls, made: Connections) -> Self:
        return cls(made.pattern, made.inputs, made.outputs, made.weights, made.signs, dropped=made.dropped)
