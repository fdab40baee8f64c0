"""How long calls take, side by side: in turns, so that what else the machine does slows all of them down."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["least_seconds"]

BLOCK, BUDGET = 0.005, 0.1  # seconds: of a block of calls at least, and of all blocks of one call about
_ROUNDS = 3


def least_seconds(calls: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Return the seconds of each call in the fastest of its blocks; what is more than that, other programs took."""
    repeats = {}
    for name, call in calls.items():
        call()  # compiles
        start = time.perf_counter()
        call()
        repeats[name] = max(1, round(BLOCK / max(time.perf_counter() - start, 1e-7)))
    least = dict.fromkeys(calls, float("inf"))
    end, rounds = time.perf_counter() + BUDGET * len(calls), 0
    while rounds < _ROUNDS or time.perf_counter() < end:
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            least[name] = min(least[name], (time.perf_counter() - start) / repeats[name])
        rounds += 1
    return least
