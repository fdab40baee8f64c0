"""Connections between named nodes: from edge lists, tables, graphs and gene sets to a layer, and back to the names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from maskedlinear._arrays import as_numpy
from maskedlinear.pattern import SparsityPattern

__all__ = ["Wiring"]


@dataclass(frozen=True)
class Wiring:
    """Which named inputs reach which named outputs, and where each connection is in a layer.

    A layer is made of it with ``MaskedLinear(len(wiring.inputs), len(wiring.outputs), mask=wiring.mask)`` or, with no dense
    matrix, ``SparseLinear(..., pattern=wiring.pattern)``; :meth:`weight` and :meth:`edges` read the trained weights by
    name.

    Attributes:
        pattern: the connections, of shape ``(out, in)``.
        inputs: the name of each input, in the order of the layer's features.
        outputs: the name of each output.

    Raises:
        ValueError: if there is not one name for each input and output, or a name is there twice.
    """

    pattern: SparsityPattern
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check that the names fit."""
        for what, names, size in zip(
            ("outputs", "inputs"), (self.outputs, self.inputs), self.pattern.shape, strict=True
        ):
            _check_unique(what, names)
            if len(names) != size:
                raise ValueError(f"there must be a name for each of the {size} {what}; got {len(names)}")

    @property
    def mask(self) -> NDArray[np.bool_]:
        """The mask, shape ``(out, in)``: a dense matrix, a byte an entry."""
        return self.pattern.to_mask()

    def connection(self, input: str, output: str) -> int:
        """Return where the connection between two nodes is in the pattern's order, and so in a sparse layer's values.

        Raises:
            KeyError: if a name is unknown, or the two are not connected.
        """
        row, column = self._places(input, output)
        start, stop = self.pattern.indptr[row : row + 2]
        place = int(start + np.searchsorted(self.pattern.indices[start:stop], column))
        if place == stop or self.pattern.indices[place] != column:
            raise KeyError(f"there is no connection from {input!r} to {output!r}")
        return place

    def weight(self, values: Any, input: str, output: str) -> float:
        """Return the weight between two nodes.

        Args:
            values: a layer's weight, shape ``(out, in)``, or the values of a sparse layer, shape ``(nnz,)``; of any
                framework. A Flax kernel is ``(in, out)``: pass its transpose.
            input: the input's name.
            output: the output's name.

        Raises:
            KeyError: if a name is unknown, or the two are not connected.
            ValueError: if ``values`` has another shape.
        """
        place = self.connection(input, output)
        return float(self._live(values)[place])

    def edges(self, values: Any = None) -> Iterator[tuple[str, str, float]]:
        """Yield ``(input, output, weight)`` of each connection, output by output; the weight is 1 without ``values``.

        Raises:
            ValueError: if ``values`` has another shape; see :meth:`weight`.
        """
        live = np.ones(self.pattern.nnz) if values is None else self._live(values)
        places = zip(self.pattern.indices.tolist(), self.pattern.rows.tolist(), live.tolist(), strict=True)
        return ((self.inputs[column], self.outputs[row], weight) for column, row, weight in places)

    @classmethod
    def from_edges(
        cls,
        edges: Iterable[tuple[str, str]],
        inputs: Sequence[str] | None = None,
        outputs: Sequence[str] | None = None,
        *,
        on_unknown: Literal["raise", "drop"] = "raise",
    ) -> Self:
        """Return the wiring of a list of edges.

        Args:
            edges: ``(input, output)`` for each edge.
            inputs: the inputs in the order of the layer's features, as the columns of the data; those of the edges, in the
                order in which they come first, if ``None``. May hold some without an edge.
            outputs: the same for the outputs.
            on_unknown: what happens to an edge whose end is not among ``inputs`` or ``outputs``.

        Raises:
            ValueError: if an edge is there twice or is not a pair, a name is there twice in ``inputs`` or ``outputs``, or an
                end is unknown.
        """
        pairs = [(edge,) if isinstance(edge, str) else tuple(edge) for edge in edges]  # "ab" is one name, not two
        for place, pair in enumerate(pairs):
            if len(pair) != 2:
                raise ValueError(f"an edge must be (input, output); got {pair!r} at place {place}")
        if on_unknown not in ("raise", "drop"):
            raise ValueError(f"on_unknown must be 'raise' or 'drop'; got {on_unknown!r}")
        ends = []
        for side, (what, given) in enumerate((("inputs", inputs), ("outputs", outputs))):
            names = tuple(dict.fromkeys(pair[side] for pair in pairs)) if given is None else tuple(given)
            _check_unique(what, names)
            ends.append(names)
        of, to = ({name: i for i, name in enumerate(names)} for names in ends)
        known = [(input, output) for input, output in pairs if input in of and output in to]
        if on_unknown == "raise" and len(known) < len(pairs):
            input, output = next(pair for pair in pairs if pair[0] not in of or pair[1] not in to)
            what = f"input {input!r}" if input not in of else f"output {output!r}"
            raise ValueError(
                f"the ends of each edge must be among the names given; got the {what} in {len(pairs) - len(known)} edges "
                "that are not: add the names, or drop such edges with on_unknown='drop'"
            )
        twice = _first_twice(known)
        if twice is not None:
            raise ValueError(f"each edge must be there once; got the one from {twice[0]!r} to {twice[1]!r} twice")
        shape = (len(to), len(of))
        pattern, _ = SparsityPattern.from_edges(
            np.array([to[output] for _, output in known], np.int64),
            np.array([of[input] for input, _ in known], np.int64),
            shape,
        )
        return cls(pattern, *ends)

    @classmethod
    def from_pandas(cls, frame: Any, input: str = "source", output: str = "target", **options: Any) -> Self:
        """Return the wiring of a table of edges: a ``pandas.DataFrame`` with a column for each end.

        Args:
            frame: the table; other columns are left alone.
            input: the column with the edges' inputs.
            output: the column with their outputs.
            options: those of :meth:`from_edges`.

        Raises:
            ValueError: if a column is missing or has missing values, and as :meth:`from_edges`.
        """
        missing = [name for name in (input, output) if name not in frame.columns]
        if missing:
            raise ValueError(f"the table must have the columns {input!r} and {output!r}; got {list(frame.columns)}")
        if frame[[input, output]].isna().to_numpy().any():
            raise ValueError(
                f"the columns {input!r} and {output!r} must not have missing values: drop those rows first"
            )
        return cls.from_edges(zip(frame[input].tolist(), frame[output].tolist(), strict=True), **options)

    @classmethod
    def from_scipy(cls, matrix: Any, inputs: Sequence[str], outputs: Sequence[str]) -> Self:
        """Return the wiring of a ``scipy.sparse`` matrix of shape ``(out, in)``; each stored entry is a connection.

        Raises:
            ValueError: if an entry is stored twice, or the names do not fit.
            TypeError: if ``matrix`` is not sparse.
        """
        return cls(SparsityPattern.from_scipy(matrix)[0], tuple(inputs), tuple(outputs))

    @classmethod
    def from_networkx(cls, graph: Any, inputs: Iterable[str] | None = None) -> Self:
        """Return the wiring of a bipartite ``networkx`` graph.

        Args:
            graph: a graph without parallel edges; of a directed one, edges go from inputs to outputs.
            inputs: the nodes that are inputs, in the order of the layer's features; the others are outputs. If ``None``,
                those whose attribute ``bipartite`` is 0, networkx's convention.

        Raises:
            ValueError: if a node is on neither side, or an edge does not go from one side to the other.
        """
        if inputs is None:
            sides = dict(graph.nodes(data="bipartite"))
            if any(side not in (0, 1) for side in sides.values()):
                raise ValueError(
                    "each node must have the attribute bipartite, 0 for inputs and 1 for outputs; got one without: set it, "
                    "or pass inputs=[...]"
                )
            of = [node for node, side in sides.items() if side == 0]
        else:
            of = list(inputs)
        among = set(of)
        to = [node for node in graph.nodes if node not in among]
        edges = []
        for one, other in graph.edges():
            pair = (one, other) if one in among or graph.is_directed() else (other, one)
            if (pair[0] in among) is (pair[1] in among) or pair[0] not in among:
                raise ValueError(f"each edge must go from an input to an output; got {one!r} to {other!r}")
            edges.append(pair)
        return cls.from_edges(edges, of, to)

    @classmethod
    def from_gmt(
        cls,
        file: str | PathLike[str],
        inputs: Sequence[str] | None = None,
        *,
        on_unknown: Literal["raise", "drop"] = "raise",
    ) -> Self:
        """Return the wiring of a gene-set file: genes are inputs, sets are outputs.

        Args:
            file: a GMT file: a line for each set, ``name <tab> description <tab> gene <tab> gene ...``.
            inputs: the genes in the order of the data's columns; those of the file, in its order, if ``None``.
            on_unknown: what happens to genes that are not among ``inputs``.

        Raises:
            ValueError: if there is no line, a line has no genes, a set is there twice, a gene is there twice in a set, or is
                unknown.
        """
        sets: dict[str, list[str]] = {}
        for number, line in enumerate(Path(file).read_text(encoding="utf-8-sig").splitlines(), 1):
            if not line.strip():
                continue
            name, *rest = (part.strip() for part in line.split("\t"))
            genes = [gene for gene in rest[1:] if gene]
            if not genes:
                raise ValueError(
                    f"a line of a GMT file must have a name, a description and genes, with tabs between; line {number}, of "
                    f"{name!r}, has no genes: remove it"
                )
            if name in sets:
                raise ValueError(f"each set must be there once; line {number} brings {name!r} again")
            sets[name] = genes
        if not sets:
            raise ValueError(f"a GMT file must have a line for each set; {file} has none")
        edges = [(gene, name) for name, genes in sets.items() for gene in genes]
        return cls.from_edges(edges, inputs, tuple(sets), on_unknown=on_unknown)

    @cached_property
    def _numbers(self) -> tuple[Mapping[str, int], Mapping[str, int]]:
        return tuple({name: i for i, name in enumerate(names)} for names in (self.outputs, self.inputs))  # type: ignore[return-value]

    def _places(self, input: str, output: str) -> tuple[int, int]:
        rows, columns = self._numbers
        for what, name, known in (("output", output, rows), ("input", input, columns)):
            if name not in known:
                raise KeyError(f"there is no {what} {name!r}")
        return rows[output], columns[input]

    def _live(self, values: Any) -> NDArray[Any]:
        """Return the values of the connections, in the pattern's order."""
        array = as_numpy(values)
        if array.shape == self.pattern.shape:
            return array[self.pattern.rows, self.pattern.indices]
        if array.shape == (self.pattern.nnz,):
            return array
        raise ValueError(
            f"values must have the weight's shape (out, in) = {self.pattern.shape}, or ({self.pattern.nnz},), one "
            f"for each connection; got {array.shape}"
            + (", which is the weight's transpose: pass its .T" if array.shape == self.pattern.shape[::-1] else "")
        )


def _check_unique(what: str, names: Sequence[Any]) -> None:
    twice = _first_twice(names)
    if twice is not None:
        raise ValueError(f"the names of {what} must be there once each; got {twice!r} twice")


def _first_twice(items: Iterable[Any]) -> Any:
    seen = set()
    for item in items:
        if item in seen:
            return item
        seen.add(item)
    return None
