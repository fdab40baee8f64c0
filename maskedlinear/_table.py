"""Text tables: columns as wide as their longest cell, or, where all of them are too wide, the first and the last broken."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

__all__ = ["lines"]

_GAP = 2


def lines(rows: Sequence[Sequence[str]], *, right: Collection[int] = (), width: int | None = None) -> list[str]:
    """Return a line for each row, its cells aligned to the left, two spaces between.

    Args:
        rows: the cells; each row has the same number of them.
        right: the columns that are aligned to the right.
        width: of the whole table. If it is wider, cells of the first column go on in further lines, which leaves them a
            quarter of it, and then those of the last one.
    """
    if not rows:
        return []
    columns = range(len(rows[0]))
    widths = [max(len(row[i]) for row in rows) for i in columns]
    if width is not None:
        for i in (0, columns[-1]):
            over = sum(widths) + _GAP * columns[-1] - width
            widths[i] = min(widths[i], max(width // 4, widths[i] - over)) if over > 0 else widths[i]
    found = []
    for row in rows:
        cells = [_broken(cell, size) for cell, size in zip(row, widths, strict=True)]
        for k in range(max(map(len, cells))):
            parts = [cell[k] if k < len(cell) else "" for cell in cells]
            aligned = (
                part.rjust(size) if i in right else part.ljust(size)
                for i, (part, size) in enumerate(zip(parts, widths, strict=True))
            )
            found.append((" " * _GAP).join(aligned).rstrip())
    return found


def _broken(cell: str, size: int) -> list[str]:
    """Return the lines of a cell, broken behind dots, slashes and spaces where they are not far."""
    parts = []
    while len(cell) > size:
        head = re.match(rf".{{{size // 2},{size - 1}}}[./ ]", cell)
        end = head.end() if head else size
        parts.append(cell[:end])
        cell = cell[end:]
    return [*parts, cell]
