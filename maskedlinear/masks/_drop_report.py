"""What a wiring's source held that the wiring does not: counted and shown, so that nothing is left out in silence."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

__all__ = ["DropReport"]

_EXAMPLES = 3
_PLURAL = re.compile(r"\b(edge|row|node|output|input|set|relation|annotation|term|self-loop|gene)s\b")


@dataclass(frozen=True)
class DropReport:
    """What was left out on the way from a file or a table to a wiring, and why; false if nothing was.

    Attributes:
        counts: how many were left out, by reason.
        examples: the first few of them, by reason.

    Example:
        >>> from maskedlinear.masks import Wiring
        >>> wiring = Wiring.from_edges([("a", "x"), ("a", "x"), ("b", "x")], inputs=["a"], on_repeated="drop",
        ...     on_unknown="drop")
        >>> print(wiring.dropped)
        1 edge of unknown inputs, as 'b' -> 'x'
        1 repeated edge, as 'a' -> 'x'
    """

    counts: Mapping[str, int] = field(default_factory=dict)
    examples: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether anything was left out."""
        return bool(self.counts)

    def __str__(self) -> str:
        """Say the counts, a line for each reason, with examples."""
        lines = []
        for reason, count in self.counts.items():
            shown = _PLURAL.sub(r"\1", reason, count=1) if count == 1 else reason
            rest = ", ..." if count > len(self.examples[reason]) else ""
            as_ = f", as {', '.join(self.examples[reason])}{rest}" if self.examples[reason] else ""
            lines.append(f"{count} {shown}{as_}")
        return "\n".join(lines) if lines else "nothing was dropped"

    def with_dropped(self, reason: str, count: int, examples: Iterable[Any] = ()) -> Self:
        """Return the report with ``count`` more of a reason, the first of them as examples; itself if there are none."""
        if not count:
            return self
        shown = [item for _, item in zip(range(_EXAMPLES), map(_show, examples), strict=False)]
        kept = (*self.examples.get(reason, ()), *shown)[:_EXAMPLES]
        return type(self)({**self.counts, reason: self.counts.get(reason, 0) + count}, {**self.examples, reason: kept})

    def __add__(self, other: DropReport) -> DropReport:
        """Return both reports in one."""
        report: DropReport = self
        for reason, count in other.counts.items():
            kept = (*report.examples.get(reason, ()), *other.examples[reason])[:_EXAMPLES]
            report = DropReport(
                {**report.counts, reason: report.counts.get(reason, 0) + count}, {**report.examples, reason: kept}
            )
        return report


def _show(item: Any) -> str:
    return " -> ".join(repr(end) for end in item) if isinstance(item, tuple) else repr(item)
