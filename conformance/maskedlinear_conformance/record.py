"""What a run measured, for the tables at its end: the largest fraction of the bound used, by quantity and dtype."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

__all__ = ["Record", "table"]

Pair = tuple[str, str]
K = TypeVar("K")

_ORDER = ("y", "dx", "dW", "db", "ẏ")


class Record:
    """Largest fractions of the bound, against the spec by backend and between backends by pair."""

    def __init__(self) -> None:
        self.spec: dict[tuple[str, str, str], float] = {}
        self.pairs: dict[tuple[Pair, str, str], float] = {}

    def against_spec(self, backend: str, quantity: str, dtype: str, used: float) -> None:
        """Note that ``backend`` used this fraction of the bound around the spec."""
        _raise_to(self.spec, (backend, quantity, dtype), used)

    def between(self, pair: Pair, quantity: str, dtype: str, used: float) -> None:
        """Note that the two backends of ``pair`` differ by this fraction of the bound."""
        _raise_to(self.pairs, (pair, quantity, dtype), used)

    def spec_table(self) -> list[str]:
        """Return a table: a row a quantity and dtype, a column a backend."""
        return _pivot(((quantity, dtype, backend), used) for (backend, quantity, dtype), used in self.spec.items())

    def pair_table(self) -> list[str]:
        """Return a table: a row a quantity and dtype, a column a pair of backends."""
        return _pivot(
            ((quantity, dtype, " - ".join(pair)), used) for (pair, quantity, dtype), used in self.pairs.items()
        )


def _raise_to(largest: dict[K, float], key: K, value: float) -> None:
    largest[key] = max(largest.get(key, 0.0), value)


def _pivot(entries: Iterable[tuple[tuple[str, str, str], float]]) -> list[str]:
    cells = dict(entries)
    rows = list(dict.fromkeys((quantity, dtype) for quantity, dtype, _ in cells))
    columns = list(dict.fromkeys(column for _, _, column in cells))
    body = [
        [
            quantity,
            dtype,
            *(f"{cells[quantity, dtype, c]:.3f}" if (quantity, dtype, c) in cells else "-" for c in columns),
        ]
        for quantity, dtype in sorted(rows, key=lambda row: _ORDER.index(row[0]))
    ]
    return table(["result", "dtype", *columns], body)


def table(head: list[str], body: list[list[str]]) -> list[str]:
    """Lay out rows of text under a head, columns aligned."""
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *body]
    ]
    return [lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]]
