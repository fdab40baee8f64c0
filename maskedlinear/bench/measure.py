"""Time the layers of one framework, in turns; the process that ``maskedlinear bench`` starts for each."""

from __future__ import annotations

import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from maskedlinear.bench.cases import cases

__all__ = ["main", "ratios"]

ROUNDS, BLOCK = 5, 5
SHORTEST = 0.02  # seconds that a block takes at least


def ratios(calls: dict[str, Callable[[], Any]], base: str) -> dict[str, dict[str, float]]:
    """Return for each call its median time in ms, and its ratio to ``base`` in the same round: median, lowest, highest."""
    repeats = {}
    for name, call in calls.items():
        call()  # compiles
        start = time.perf_counter()
        call()
        repeats[name] = max(BLOCK, round(SHORTEST / max(time.perf_counter() - start, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - start) / repeats[name])
    found = {}
    for name, taken in times.items():
        ratio = [one / other for one, other in zip(taken, times[base], strict=True)]
        found[name] = {
            "ms": statistics.median(taken) * 1e3,
            "ratio": statistics.median(ratio),
            "lowest": min(ratio),
            "highest": max(ratio),
        }
    return found


def main(argv: Sequence[str]) -> None:
    """Write a line of JSON for the framework, and one for each case; ``argv`` is the framework and the sets of cases."""
    framework, *chosen = argv
    layers = importlib.import_module(f"maskedlinear.bench.{framework}_layers")
    print(json.dumps({"description": layers.description()}), flush=True)
    for case in cases(tuple(chosen)):
        found = {what: ratios(by_layer, layers.BASE) for what, by_layer in layers.calls(case).items()}
        row = {
            "framework": framework,
            "set": case.of,
            "in": case.in_features,
            "out": case.out_features,
            "batch": case.batch,
            "connections": case.connections,
            "density": case.density,
            "times": found,
            "kept_bytes": layers.kept(case),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
