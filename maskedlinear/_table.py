"""Text tables: columns as wide as their longest cell."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["lines"]


def lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a line for each row, its cells aligned to the left, two spaces between."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
