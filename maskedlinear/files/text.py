"""What the commands print: names that cannot upset a terminal, sizes, tables, and how far a long one has come."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TextIO

from maskedlinear._progress import progress_callback
from maskedlinear.models import first_names

__all__ = [
    "WIDTH",
    "counted",
    "escaped",
    "fraction",
    "is_watched",
    "listed",
    "printable",
    "progress",
    "say",
    "shape_text",
    "size_text",
]

WIDTH = 120  # columns of the widest table
_SHAPE = 30  # columns
_LONG = 64_000_000  # bytes; what is smaller takes no time to speak of


def escaped(name: str) -> str:
    r"""Return a name as it is shown: control characters and the like as ``\x1b`` or ``\u202e``, a backslash twice."""
    return printable(name.replace("\\", "\\\\"))


def printable(text: str) -> str:
    """Return a line of text without anything that a terminal would obey."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode("ascii")
        for character in text
    )


def say(lines: Iterable[str], stream: TextIO | None) -> None:
    """Print lines, also where the stream's encoding lacks some of their characters, and have them leave at once."""
    if stream is None:  # as Python has one that was closed before it began
        return
    encoding = stream.encoding or "utf-8"
    for line in lines:
        stream.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    stream.flush()


def shape_text(shape: Sequence[int]) -> str:
    """Return a shape as ``4096 x 1024``; of a number ``()``, and of very many axes how many these are."""
    text = " x ".join(map(str, shape)) or "()"
    return text if len(text) <= _SHAPE else f"{len(shape)} axes"


def size_text(nbytes: int | None) -> str:
    """Return a count of bytes in decimal units: ``412 B``, ``8.41 kB``, ``1.50 GB``; a dash if nobody knows it."""
    if nbytes is None:
        return "-"
    if nbytes < 1000:
        return f"{nbytes} B"
    size = float(nbytes)
    for unit in ("kB", "MB", "GB", "TB", "PB"):
        size /= 1000
        if size < 999.5 or unit == "PB":
            return (
                f"{size:.2f} {unit}" if size < 9.995 else f"{size:.1f} {unit}" if size < 99.95 else f"{size:.0f} {unit}"
            )
    raise AssertionError


def fraction(value: float) -> str:
    """Return a fraction in [0, 1]; what is neither 0 nor 1 is not shown as such."""
    text = f"{value:.4g}"
    if text == "1" and value < 1:
        return "<1"
    return text


def counted(number: int, noun: str) -> str:
    """Return ``1 array`` or ``2 arrays``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listed(names: Sequence[str]) -> str:
    """Return the first few of many names, as they are shown, and how many there are."""
    return first_names([escaped(name) or '""' for name in names])


def is_watched() -> bool:
    """Whether somebody sees the standard error stream as it is written."""
    return sys.stderr is not None and sys.stderr.isatty()


def progress(total: int, what: str) -> Callable[[int], None]:
    """Return what is told of bytes that are done; where all of them are many, and somebody watches, a line shows it."""
    told = progress_callback(total >= _LONG and is_watched(), what)
    done = 0

    def add(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        told(done / total if total else 1.0)

    return add
