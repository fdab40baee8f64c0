"""Edges between names become a pattern: one place that numbers names, and decides on unknown, repeated and empty ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from maskedlinear.masks._drop_report import DropReport
from maskedlinear.pattern import SparsityPattern

__all__ = [
    "Connections",
    "EdgeList",
    "OnEmpty",
    "RaiseOrDrop",
    "check_choice",
    "check_unique",
    "connect",
    "drop_repeated",
    "number_names",
    "read_edges",
    "read_signs",
    "read_table",
    "read_weights",
    "refuse_strangers",
    "tuple_of_names",
]

RaiseOrDrop = Literal["raise", "drop"]
OnEmpty = Literal["raise", "keep", "drop"]

_SIGNS = {"+": 1, "+1": 1, "1": 1, "-": -1, "-1": -1, "0": 0, "": 0} | {
    word: sign
    for sign, words in {
        1: ("activation", "activates", "stimulation", "positive", "excitatory"),
        -1: ("repression", "inhibition", "inhibits", "negative", "inhibitory"),
        0: ("unknown",),
    }.items()
    for word in words
}


@dataclass
class EdgeList:
    """Edges by name, with a weight and a sign each where the source has them."""

    sources: list[Any]
    targets: list[Any]
    weights: NDArray[np.float64] | None = None
    signs: NDArray[np.int8] | None = None

    def __len__(self) -> int:
        return len(self.sources)

    def pair(self, place: int) -> tuple[Any, Any]:
        """Return the ends of an edge."""
        return self.sources[place], self.targets[place]

    def pairs(self, places: NDArray[np.intp]) -> Iterable[tuple[Any, Any]]:
        """Return the ends of some edges."""
        return (self.pair(int(place)) for place in places)


@dataclass(frozen=True)
class Connections:
    """What a wiring is made of."""

    pattern: SparsityPattern
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    weights: NDArray[np.float64] | None
    signs: NDArray[np.int8] | None
    dropped: DropReport


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Refuse what is none of the choices."""
    if value not in choices:
        listed = " or ".join(map(repr, choices)) if len(choices) < 3 else ", ".join(map(repr, choices))
        raise ValueError(f"{name} must be {listed}; got {value!r}")


def check_unique(what: str, names: Sequence[Any]) -> None:
    """Refuse names that are there twice."""
    if len(set(names)) == len(names):
        return
    seen = set()
    for name in names:
        if name in seen:
            raise ValueError(f"the names of {what} must be there once each; got {name!r} twice")
        seen.add(name)


def tuple_of_names(what: str, given: Any) -> tuple[Any, ...]:
    """Return names given as a sequence, an index of pandas, an array, or an AnnData object, whose ``var_names`` they are."""
    given = getattr(given, "var_names", given)
    if isinstance(given, (str, bytes)):
        raise ValueError(f"{what} must be a sequence of names; got the single name {given!r}: pass [{given!r}]")
    names = tuple(given.tolist() if hasattr(given, "tolist") else given)
    check_unique(what, names)
    return names


def read_edges(edges: Iterable[Any]) -> EdgeList:
    """Return a list of ``(input, output)`` or ``(input, output, weight)``."""
    rows = [(edge,) if isinstance(edge, str) else tuple(edge) for edge in edges]  # "ab" is one name, not two
    width = 3 if rows and len(rows[0]) == 3 else 2
    for place, row in enumerate(rows):
        number = len(row) == 3 and isinstance(row[2], (int, float, np.integer, np.floating)) and row[2] is not True
        if len(row) != width or (width == 3 and not number):
            raise ValueError(
                f"an edge must be (input, output); got {row!r} at place {place}: a third part is a weight, a number, and "
                "all edges must have one or none"
            )
    weights = read_weights([row[2] for row in rows]) if width == 3 else None
    return EdgeList([row[0] for row in rows], [row[1] for row in rows], weights)


def read_table(frame: Any, input: str, output: str, weight: str | None, sign: str | None) -> EdgeList:
    """Return the edges of a table: a ``pandas.DataFrame``."""
    wanted = [name for name in (input, output, weight, sign) if name is not None]
    if any(name not in frame.columns for name in wanted):
        listed = " and ".join(map(repr, wanted)) if len(wanted) < 3 else ", ".join(map(repr, wanted))
        raise ValueError(f"the table must have the columns {listed}; got {list(frame.columns)}")
    if frame[wanted].isna().to_numpy().any():
        listed = " and ".join(map(repr, wanted)) if len(wanted) < 3 else ", ".join(map(repr, wanted))
        raise ValueError(f"the columns {listed} must not have missing values: drop those rows first")
    return EdgeList(
        frame[input].tolist(),
        frame[output].tolist(),
        None if weight is None else read_weights(frame[weight].tolist()),
        None if sign is None else read_signs(frame[sign].tolist()),
    )


def read_weights(values: Sequence[Any]) -> NDArray[np.float64]:
    """Return the weights of edges, which must be finite numbers."""
    try:
        weights = np.array(values, np.float64).reshape(len(values))
    except (TypeError, ValueError):
        wrong = next(value for value in values if not isinstance(value, (int, float, np.number)))
        raise ValueError(f"weights must be numbers; got {wrong!r}") from None
    if not np.isfinite(weights).all():
        raise ValueError(f"weights must be finite; got {weights[~np.isfinite(weights)][0]}: drop those edges first")
    return weights


def read_signs(values: Sequence[Any]) -> NDArray[np.int8]:
    """Return the signs of edges, 1, -1 or 0 (free): of numbers, or of words as '+', 'activation', 'Repression'."""
    signs = np.empty(len(values), np.int8)
    for place, value in enumerate(values):
        if isinstance(value, str):
            sign = _SIGNS.get(value.strip().lower())
        else:
            sign = None if value != value else int(value > 0) - int(value < 0)
        if sign is None:
            raise ValueError(
                f"signs must be numbers, or one of {sorted(word for word in _SIGNS if word)}; got {value!r}: turn them into "
                "1, -1 and 0 first"
            )
        signs[place] = sign
    return signs


def connect(
    edges: EdgeList,
    inputs: Any = None,
    outputs: Any = None,
    *,
    on_unknown: RaiseOrDrop = "raise",
    on_repeated: RaiseOrDrop = "raise",
    on_empty: OnEmpty = "raise",
    min_genes: int = 0,
    dropped: DropReport | None = None,
) -> Connections:
    """Return the pattern, names and values of edges by name; the rules are those of ``Wiring.from_edges``."""
    check_choice("on_unknown", on_unknown, ("raise", "drop"))
    check_choice("on_repeated", on_repeated, ("raise", "drop"))
    check_choice("on_empty", on_empty, ("raise", "keep", "drop"))
    of = tuple(dict.fromkeys(edges.sources)) if inputs is None else tuple_of_names("inputs", inputs)
    to = tuple(dict.fromkeys(edges.targets)) if outputs is None else tuple_of_names("outputs", outputs)
    columns = number_names(edges.sources, of)
    rows = number_names(edges.targets, to)
    report = DropReport() if dropped is None else dropped
    known, report = _drop_unknown(edges, columns >= 0, rows >= 0, of, to, on_unknown, report)
    keys = rows * max(1, len(of)) + columns
    kept, report = drop_repeated(edges, known, keys, on_repeated, report)
    to, kept, rows, report = _drop_small(to, kept, rows, on_empty, min_genes, report)
    pattern, order = SparsityPattern.from_edges(rows, columns[kept], (len(to), len(of)))
    order = kept[order]
    return Connections(
        pattern,
        of,
        to,
        None if edges.weights is None else edges.weights[order],
        None if edges.signs is None else edges.signs[order],
        report,
    )


def drop_repeated(
    edges: EdgeList, known: NDArray[np.intp], keys: NDArray[np.int64], on_repeated: RaiseOrDrop, report: DropReport
) -> tuple[NDArray[np.intp], DropReport]:
    """Return the first of each edge among ``known``, where equal edges have equal keys, in the list's order."""
    _, first, which = np.unique(keys[known], return_index=True, return_inverse=True)
    if len(first) == len(known):
        return known, report
    repeated = np.ones(len(known), bool)
    repeated[first] = False
    again, before = known[repeated], known[first[which[repeated]]]
    source, target = edges.pair(again[0])
    if on_repeated == "raise":
        raise ValueError(
            f"each edge must be there once; got the one from {source!r} to {target!r} twice, and {len(again)} repeats in "
            "all: drop those that say the same with on_repeated='drop'"
        )
    for what, values in (("weights", edges.weights), ("signs", edges.signs)):
        if values is not None and (values[again] != values[before]).any():
            place = int(np.argmax(values[again] != values[before]))
            source, target = edges.pair(again[place])
            raise ValueError(
                f"repeats of an edge must agree; the one from {source!r} to {target!r} has the {what} "
                f"{values[before[place]]:g} and {values[again[place]]:g}, and so do "
                f"{int((values[again] != values[before]).sum())} repeats in all: take their sum or mean first"
            )
    return known[~repeated], report.with_dropped("repeated edges", len(again), edges.pairs(again))


def refuse_strangers(found: Sequence[Any], given: Sequence[Any], what: str = "inputs") -> NoReturn:
    """Raise an error that shows both kinds of names, for names of which not one is among those given."""
    raise ValueError(
        f"the file or table and the {what} given must have names in common; got none: the former has "
        f"{_some(found)}, the latter {_some(given)}{_remedy(found, given)}"
    )


def number_names(names: Sequence[Any], known: Sequence[Any]) -> NDArray[np.int64]:
    """Return the place of each name among those known, -1 where it is not."""
    places = {name: place for place, name in enumerate(known)}
    return np.fromiter(map(places.get, names, repeat(-1)), np.int64, len(names))


def _drop_unknown(
    edges: EdgeList,
    of_known: NDArray[np.bool_],
    to_known: NDArray[np.bool_],
    of: Sequence[Any],
    to: Sequence[Any],
    on_unknown: RaiseOrDrop,
    report: DropReport,
) -> tuple[NDArray[np.intp], DropReport]:
    known = of_known & to_known
    if len(edges) and not known.any():
        for what, found, given, side in (
            ("inputs", edges.sources, of, of_known),
            ("outputs", edges.targets, to, to_known),
        ):
            if not side.any():
                refuse_strangers(list(dict.fromkeys(found)), given, what)
        if on_unknown == "drop":
            raise ValueError(f"an edge must have both ends among the names given; none of {len(edges)} edges has")
    if on_unknown == "raise" and not known.all():
        source, target = edges.pair(int(np.argmin(known)))
        what = f"input {source!r}" if not of_known[np.argmin(known)] else f"output {target!r}"
        raise ValueError(
            f"the ends of each edge must be among the names given; got the {what} in {int((~known).sum())} edges "
            "that are not: add the names, or drop such edges with on_unknown='drop'"
        )
    for what, missing in (("inputs", ~of_known), ("outputs", of_known & ~to_known)):
        places = np.flatnonzero(missing)
        report = report.with_dropped(f"edges of unknown {what}", len(places), edges.pairs(places))
    return np.flatnonzero(known), report


def _drop_small(
    to: tuple[Any, ...],
    kept: NDArray[np.intp],
    rows: NDArray[np.int64],
    on_empty: OnEmpty,
    min_genes: int,
    report: DropReport,
) -> tuple[tuple[Any, ...], NDArray[np.intp], NDArray[np.int64], DropReport]:
    """Return outputs, edges and their rows without the outputs that have too few inputs."""
    counts = np.bincount(rows[kept], minlength=len(to))
    empty = counts == 0
    if empty.any() and on_empty == "raise" and min_genes <= 0:
        names = list(_pick(to, empty))
        raise ValueError(
            f"each output must have an input; got none for {len(names)} of {len(to)}, as {_some(names)}: leave such out "
            "with on_empty='drop', or those with few inputs too with min_genes=..., or keep them with on_empty='keep'"
        )
    small = counts < min_genes
    if on_empty == "keep":
        small &= ~empty
    elif on_empty == "drop":
        small |= empty
    if not small.any():
        return to, kept, rows[kept], report
    report = report.with_dropped("outputs without inputs", int((small & empty).sum()), _pick(to, small & empty))
    report = report.with_dropped(
        f"outputs with fewer than {min_genes} inputs", int((small & ~empty).sum()), _pick(to, small & ~empty)
    )
    numbers = np.cumsum(~small) - 1
    kept = kept[~small[rows[kept]]]
    left = tuple(name for name, gone in zip(to, small.tolist(), strict=True) if not gone)
    if not left:
        raise ValueError(f"a wiring must have an output; none of {len(to)} has min_genes={min_genes} inputs: lower it")
    return left, kept, numbers[rows[kept]], report


def _pick(names: Sequence[Any], which: NDArray[np.bool_]) -> Iterable[Any]:
    return (names[int(place)] for place in np.flatnonzero(which))


def _some(names: Sequence[Any]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "") if names else "none"


_KINDS = {
    "Ensembl identifiers": r"ENS[A-Z]*[GTP]\d{11}(\.\d+)?",
    "UniProt accessions": r"[OPQ]\d[A-Z0-9]{3}\d(-\d+)?|[A-NR-Z]\d([A-Z][A-Z0-9]{2}\d){1,2}(-\d+)?",
    "Entrez numbers": r"\d+",
}


def _kind(names: Sequence[Any]) -> str:
    for kind, form in _KINDS.items():
        if names and all(re.fullmatch(form, str(name)) for name in names[:20]):
            return kind
    return "symbols or other names"


def _remedy(found: Sequence[Any], given: Sequence[Any]) -> str:
    """Return what would make the two meet."""
    ours, theirs = ([str(name) for name in names] for names in (found, given))
    if not {name.casefold() for name in ours}.isdisjoint(name.casefold() for name in theirs):
        return ". They differ in case alone: bring both to one, as with name.upper()"
    if not {name.split(".")[0] for name in ours}.isdisjoint(name.split(".")[0] for name in theirs):
        return ". They differ in the versions alone: cut them off, as with name.split('.')[0]"
    if (one := _kind(found)) != (other := _kind(given)):
        return (
            f". The former look like {one}, the latter like {other}: translate one side first, by a table of identifiers or "
            "a column of your data (in AnnData often adata.var['gene_ids'] or ['gene_symbols'])"
        )
    return ": check that both are of one species and one kind of identifier"
