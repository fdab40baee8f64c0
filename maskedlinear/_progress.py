"""What long work says while it goes on: to a function of the user's, or as a line on the standard error stream."""

from __future__ import annotations

import sys
from collections.abc import Callable

__all__ = ["Progress", "progress_callback"]

Progress = bool | Callable[[float], object]  # True for a line; or a function of the fraction that is done, from 0 to 1


def progress_callback(progress: Progress, what: str) -> Callable[[float], object]:
    """Return what is called with the fraction that is done: the user's function, a line that renews itself, or nothing.

    Raises:
        TypeError: if ``progress`` is neither a function nor a truth value.
    """
    if callable(progress):
        return progress
    if not isinstance(progress, bool):
        raise TypeError(f"progress must be True, False or a function of a fraction; got {progress!r}")
    if not progress:
        return lambda done: None
    shown = -1

    def line(done: float) -> None:
        nonlocal shown
        percent = int(100 * done)
        if percent != shown:
            shown = percent
            print(f"\r{what}: {percent:3} %", end="\n" if percent >= 100 else "", file=sys.stderr, flush=True)

    return line
