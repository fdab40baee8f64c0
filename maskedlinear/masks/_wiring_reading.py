"""What is read of a layer by a wiring's names: weights, edges, a table; and the wiring that a layer has now."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from functools import cached_property
from os import PathLike
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from maskedlinear._arrays import as_numpy
from maskedlinear.masks._connections import find_weight, read
from maskedlinear.pattern import SparsityPattern

__all__ = ["WiringReading"]


class WiringReading:
    """The half of :class:`maskedlinear.masks.Wiring` that reads; the other one makes wirings.

    What is read of: a layer of any framework, in either form, whose connections are those that it has at that moment; or a
    model, with the ``name`` that ``get_masks`` calls the weight by if there are several; the variables of a linen model; an
    array of shape ``(out, in)``. An array must have the wiring's connections, and 0 elsewhere, or come with its ``mask``,
    shape ``(out, in)``, or its ``pattern``; an array of values alone, shape ``(nnz,)``, with its pattern. A Flax kernel,
    ``(in, out)``, must be transposed, if it comes without its layer.
    """

    pattern: SparsityPattern
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def connection(self, input: str, output: str) -> int:
        """Return where the connection between two nodes is in the order of the wiring's own pattern.

        Of a layer that may have other connections now, ask ``wiring.follow(layer).connection(input, output)``.

        Raises:
            KeyError: if a name is unknown, or the two are not connected.
        """
        place = self._place(self.pattern, input, output)
        if place is None:
            raise KeyError(f"there is no connection from {input!r} to {output!r}")
        return place

    def weight(self, layer: Any, input: str, output: str, **which: Any) -> float:
        """Return the weight that a layer has between two nodes now.

        Args:
            layer: a layer, a model or an array: see :class:`WiringReading`.
            input: the input's name.
            output: the output's name.
            which: ``name=`` of the weight in a model; ``mask=`` or ``pattern=`` of an array.

        Raises:
            KeyError: if a name is unknown, or the layer does not connect the two.
            ValueError: if the layer has other nodes, or an array does not say which of its entries are connections.
            TypeError: if ``layer`` is neither a layer nor an array of real numbers.
        """
        pattern, values = read(layer, self.pattern, **which)
        place = self._place(pattern, input, output)
        if place is not None:
            return float(values[place])
        if self._place(self.pattern, input, output) is not None:
            raise KeyError(f"the layer has no connection from {input!r} to {output!r} any more; the wiring has it")
        raise KeyError(f"there is no connection from {input!r} to {output!r}")

    def edges(
        self, layer: Any = None, *, top: int | None = None, keep_fixed: bool | None = None, **which: Any
    ) -> Iterator[tuple[str, str, float]]:
        """Return ``(input, output, weight)`` of each connection that a layer has now, output by output.

        Args:
            layer: a layer, a model or an array: see :class:`WiringReading`. Without one, the wiring's own connections, with
                weight 1.
            top: only so many, the strongest first.
            keep_fixed: whether connections that are fixed, as those of pass-through nodes, are among them. ``None``: all
                are, unless ``top`` is given.
            which: ``name=`` of the weight in a model; ``mask=`` or ``pattern=`` of an array.

        Raises:
            ValueError: as :meth:`weight`; or if ``top`` is negative.
            TypeError: as :meth:`weight`; or if ``top`` is no whole number.

        Example:
            >>> from maskedlinear.masks import Wiring
            >>> wiring = Wiring.from_edges([("tp53", "apoptosis"), ("mdm2", "apoptosis")])
            >>> list(wiring.edges([[0.5, -2.0]], top=1))
            [('mdm2', 'apoptosis', -2.0)]
        """
        columns = self._columns(layer, top, top is not None, keep_fixed, which)
        return zip(columns["input"], columns["output"], columns["weight"].tolist(), strict=True)

    def to_pandas(
        self,
        layer: Any = None,
        *,
        top: int | None = None,
        sort: bool = False,
        keep_fixed: bool | None = None,
        **which: Any,
    ) -> Any:
        """Return a ``pandas.DataFrame`` with a row for each connection that a layer has now.

        Its columns are ``input``, ``output``, ``weight``; ``in_wiring``, whether the wiring has the connection, or the layer
        has grown it since; and, where the wiring has them, ``fixed`` and ``sign``.

        Args:
            layer: as in :meth:`edges`.
            top: only so many, the strongest first.
            sort: all of them, the strongest first: by \\|weight\\|, and those that are not numbers last.
            keep_fixed: as in :meth:`edges`; ``None`` leaves fixed connections out where the strongest come first.
            which: as in :meth:`edges`.

        Raises:
            ValueError: as :meth:`edges`.
            TypeError: as :meth:`edges`.
            ModuleNotFoundError: if pandas is not installed.
        """
        try:
            from pandas import DataFrame
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "to_pandas needs pandas, which is not installed. Install it with: pip install pandas; or read wiring.edges",
                name="pandas",
            ) from error
        return DataFrame(self._columns(layer, top, sort or top is not None, keep_fixed, which))

    def follow(self, layer: Any, **which: Any) -> Self:
        """Return the wiring that a layer has now: its connections, and of a layer that ``shrink`` has made, its nodes.

        What the wiring says of each connection stays with those that it has; of those that have grown since nothing is said.

        Args:
            layer: as in :meth:`edges`.
            which: as in :meth:`edges`.

        Raises:
            ValueError: as :meth:`edges`.
            TypeError: as :meth:`edges`.
        """
        pattern, _ = read(layer, self.pattern, **which)
        now = self._exchanged(pattern, pattern.places_in(self.pattern))
        weight = find_weight(layer, which.get("name"))
        if weight is None or weight.shape == self.pattern.shape or weight.kept is None:
            return now
        return now.restrict(weight.kept.inputs, weight.kept.outputs)

    def restrict(self, inputs: Any = None, outputs: Any = None) -> Self:
        """Return the wiring of some of the nodes, in the same order, with the connections between them.

        Args:
            inputs: which inputs stay: names, or booleans of shape ``(in,)``, such as ``layer.kept_nodes.inputs`` of a layer
                that ``shrink`` has made. ``None``: all.
            outputs: the same for the outputs.

        Raises:
            KeyError: if a name is unknown.
            ValueError: if there is not one boolean a node.
        """
        columns, rows = self._chosen("input", inputs, self.inputs), self._chosen("output", outputs, self.outputs)
        own = self.pattern
        source = np.flatnonzero(rows[own.rows] & columns[own.indices])
        counts = np.bincount(own.rows[source], minlength=own.shape[0])[rows]
        places = np.cumsum(columns) - 1
        pattern = SparsityPattern(
            np.concatenate([[0], np.cumsum(counts)]), places[own.indices[source]], int(columns.sum())
        )
        names = {
            side: tuple(name for name, stays in zip(known, kept.tolist(), strict=True) if stays)
            for side, known, kept in (("inputs", self.inputs, columns), ("outputs", self.outputs, rows))
        }
        return self._exchanged(pattern, source, **names)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the wiring to a JSON file of its own, whole or not at all; :meth:`load` reads it.

        Names are strings or whole numbers. Beside a model's weights, ``checkpoint.save(model, path, wirings={...})`` has it
        in their file.

        Raises:
            TypeError: if a name is neither.
            OSError: if the file cannot be written; what it was stays.
        """
        from maskedlinear.checkpoint._arguments import as_path
        from maskedlinear.checkpoint._container import replacing
        from maskedlinear.masks._wiring_files import to_text

        text = to_text(self)
        with replacing(as_path(path)) as file:
            file.write(text.encode())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Return the wiring of a file that :meth:`save` wrote; nothing in it is believed unchecked, or run.

        Raises:
            ValueError: if the file holds anything else.
            OSError: if it cannot be read.
        """
        from maskedlinear.checkpoint._arguments import as_path
        from maskedlinear.masks._wiring_files import from_text

        place = as_path(path)
        try:
            return from_text(cls, place.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{place} is no file of a wiring, as Wiring.save writes it: {error}") from error

    def plot(self, layer: Any = None, **options: Any) -> Any:
        """Draw the strongest connections of a layer with the names of their nodes; return matplotlib's figure.

        Args:
            layer: as in :meth:`edges`.
            options: those of :func:`maskedlinear.masks.plot_wirings`: ``around``, ``top``, ``path``, ...

        Raises:
            KeyError: if a node is unknown.
            ModuleNotFoundError: if matplotlib is not installed; and as :meth:`edges`.
        """
        from maskedlinear.masks._wiring_picture import plot_wirings

        return plot_wirings([self], None if layer is None else [layer], **options)

    def _columns(
        self, layer: Any, top: int | None, strongest_first: bool, keep_fixed: bool | None, which: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return names, weights and what is known of each connection, in the order asked for."""
        if top is not None and (isinstance(top, bool) or not isinstance(top, int)):
            raise TypeError(f"top must be a whole number; got {top!r}")
        if top is not None and top < 0:
            raise ValueError(f"top must be at least 0; got {top}")
        if layer is None and which:
            raise ValueError(f"{', '.join(which)} are of a layer or an array; got none")
        own = self.pattern
        pattern, values = (own, np.ones(own.nnz)) if layer is None else read(layer, own, **which)
        source = np.arange(own.nnz) if pattern is own else pattern.places_in(own)
        fixed = self.of_connections("fixed", source)
        order = np.arange(pattern.nnz)
        if strongest_first:
            order = np.argsort(-np.abs(np.asarray(values, np.float64)), kind="stable")
        if fixed is not None and not (keep_fixed if keep_fixed is not None else not strongest_first):
            order = order[~fixed[order].astype(bool)]
        order = order[:top]
        columns: dict[str, Any] = {
            "input": [self.inputs[place] for place in pattern.indices[order].tolist()],
            "output": [self.outputs[place] for place in pattern.rows[order].tolist()],
            "weight": np.asarray(values)[order],
            "in_wiring": (source >= 0)[order],
        }
        if fixed is not None:
            columns["fixed"] = fixed[order].astype(bool)
        sign = self.of_connections("signs", source)
        return columns if sign is None else columns | {"sign": sign[order]}

    def of_connections(self, what: str, source: NDArray[np.int64]) -> NDArray[Any] | None:
        """Return what the wiring says of connections that are at ``source`` in it, 0 or ``False`` of those at -1.

        ``None`` if it says nothing of that kind.
        """
        given = getattr(self, what, None)
        return None if given is None else _taken(np.asarray(given), source)

    def _exchanged(self, pattern: SparsityPattern, source: NDArray[Any], **names: tuple[str, ...]) -> Self:
        """Return the wiring with other connections, each at ``source`` in the old one, or -1."""
        changed: dict[str, Any] = {"pattern": pattern, **names}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray) and value.shape == (self.pattern.nnz,):
                changed[field.name] = _taken(value, source)
        return replace(self, **changed)  # type: ignore[type-var]

    def _chosen(self, what: str, given: Any, names: tuple[str, ...]) -> NDArray[np.bool_]:
        """Return which of the nodes of one side are given, by names or booleans."""
        if given is None:
            return np.ones(len(names), bool)
        if hasattr(given, "dtype") and as_numpy(given).dtype == bool:
            flags = as_numpy(given)
            if flags.shape != (len(names),):
                raise ValueError(
                    f"there must be a boolean for each of the {len(names)} {what}s; got shape {flags.shape}"
                )
            return flags
        chosen = {given} if isinstance(given, str) else set(given)
        unknown = [name for name in chosen if name not in self._numbers[0 if what == "output" else 1]]
        if unknown:
            raise KeyError(f"there is no {what} {unknown[0]!r}")
        return np.fromiter((name in chosen for name in names), bool, len(names))

    @cached_property
    def _numbers(self) -> tuple[Mapping[str, int], Mapping[str, int]]:
        return _numbered(self.outputs), _numbered(self.inputs)

    def _place(self, pattern: SparsityPattern, input: str, output: str) -> int | None:
        """Return where a connection is in a pattern between the wiring's nodes, if it is there."""
        rows, columns = self._numbers
        for what, name, known in (("output", output, rows), ("input", input, columns)):
            if name not in known:
                raise KeyError(f"there is no {what} {name!r}")
        start, stop = pattern.indptr[rows[output] : rows[output] + 2].tolist()
        place = start + int(np.searchsorted(pattern.indices[start:stop], columns[input]))
        return place if place < stop and pattern.indices[place] == columns[input] else None


def _numbered(names: Iterable[str]) -> Mapping[str, int]:
    return {name: i for i, name in enumerate(names)}


def _taken(values: NDArray[Any], source: NDArray[Any]) -> NDArray[Any]:
    taken = np.zeros(len(source), values.dtype)
    known = source >= 0
    taken[known] = values[source[known]]
    return taken
