"""What a run found: the fraction of each bound used, and the outcome of each law for each backend."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

from maskedlinear._table import lines

__all__ = ["Outcome", "Record", "pivot", "table"]

Pair = tuple[str, str]

# The rows of the tables: the four second derivatives are one row.
_ROWS = {"y": "y", "dx": "dx", "dW": "dW", "db": "db", "ẏ": "jvp", **dict.fromkeys(("Hx", "HW", "Hb", "Hg"), "hvp")}
_ORDER = list(dict.fromkeys(_ROWS.values()))


class Outcome(NamedTuple):
    """How one test ended.

    Attributes:
        law: the law that it is of, a key of ``LAWS``.
        labels: the backends (with their formats) that it ran on.
        test: its name with its parameters.
        status: ``"passed"``, ``"failed"``, ``"declared"``, ``"expected failure"`` or ``"caught"``.
        message: why, unless it passed.
    """

    law: str
    labels: tuple[str, ...]
    test: str
    status: str
    message: str


class Record:
    """Largest fractions of the bounds, against the spec and between backends, and the outcomes."""

    def __init__(self) -> None:
        self.tight: dict[tuple[str, str, str], float] = {}
        self.hard: dict[tuple[str, str, str], float] = {}
        self.pairs: dict[tuple[str, str, str], float] = {}
        self.outcomes: list[Outcome] = []
        self.caught: set[tuple[str, str]] = set()  # label and law of each fault that a law has caught
        self._results: dict[Hashable, Any] = {}

    def remembered(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return what ``make`` gave when it was first called with this key, of the last 512."""
        if key not in self._results:
            if len(self._results) >= 512:
                del self._results[next(iter(self._results))]
            self._results[key] = make()
        return self._results[key]

    def against_spec(self, label: str, quantity: str, dtype: str, used: float, hard: bool) -> None:
        """Note that a backend used this fraction of a bound around the spec."""
        _raise_to(self.hard if hard else self.tight, (_ROWS[quantity], dtype, label), used)

    def between(self, pair: Pair, quantity: str, dtype: str, used: float) -> None:
        """Note that the two backends of ``pair`` differ by this fraction of the tight bound."""
        _raise_to(self.pairs, (_ROWS[quantity], dtype, " - ".join(pair)), used)

    def ended(self, outcome: Outcome) -> None:
        """Note how a test ended."""
        self.outcomes.append(outcome)
        if outcome.status == "caught":
            self.caught.add((outcome.labels[0], outcome.law))

    def law_table(self, laws: Iterable[str], labels: Iterable[str]) -> dict[str, dict[str, dict[str, int]]]:
        """Return how many tests ended in which way, by law and label; nothing for what did not run."""
        counts: dict[str, dict[str, dict[str, int]]] = {law: {label: {} for label in labels} for law in laws}
        for outcome in self.outcomes:
            for label in outcome.labels:
                cell = counts.setdefault(outcome.law, {}).setdefault(label, {})
                cell[outcome.status] = cell.get(outcome.status, 0) + 1
        return counts


def pivot(cells: dict[tuple[str, str, str], float]) -> list[str]:
    """Return a table of fractions: a row a quantity and dtype, a column a backend or a pair."""
    rows = list(dict.fromkeys((quantity, dtype) for quantity, dtype, _ in cells))
    columns = list(dict.fromkeys(column for _, _, column in cells))
    body = [
        [quantity, dtype, *(_cell(cells.get((quantity, dtype, column))) for column in columns)]
        for quantity, dtype in sorted(rows, key=lambda row: _ORDER.index(row[0]))
    ]
    return table(["result", "dtype", *columns], body)


def table(head: list[str], body: list[list[str]]) -> list[str]:
    """Lay out rows of text under a head, columns aligned."""
    first, *rest = lines([head, *body])
    return [first, "-" * max(len(line) for line in (first, *rest)), *rest]


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _raise_to(largest: dict[Any, float], key: Any, value: float) -> None:
    largest[key] = max(largest.get(key, 0.0), value)
