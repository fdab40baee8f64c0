"""How long calls take, side by side: in turns, so that what else the machine does slows all of them down."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["median_seconds"]

BLOCK, BUDGET = 0.005, 0.1  # seconds: of a block of calls at least, and of all blocks of one call about
_ROUNDS = 3


def median_seconds(calls: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Return the seconds of each call in the median of its blocks.

    Not in the fastest: a call that hands work to threads takes one of several times, which its fastest block hides.
    """
    repeats = {}
    for name, call in calls.items():
        call()  # compiles
        start = time.perf_counter()
        call()
        repeats[name] = max(1, round(BLOCK / max(time.perf_counter() - start, 1e-7)))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    end, rounds = time.perf_counter() + BUDGET * len(calls), 0
    while rounds < _ROUNDS or time.perf_counter() < end:
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            taken[name].append((time.perf_counter() - start) / repeats[name])
        rounds += 1
    return {name: statistics.median(seconds) for name, seconds in taken.items()}
