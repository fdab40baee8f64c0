"""Time the layers of one framework, in turns; the process that ``maskedlinear bench`` starts for each."""

from __future__ import annotations

import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from maskedlinear.bench.cases import Case, cases
from maskedlinear.bench.peak import peak
from maskedlinear.costs import LARGEST

__all__ = ["main", "ratios"]

ROUNDS, BLOCK = 5, 5
SHORTEST = 0.02  # seconds that a block takes at least


def ratios(calls: dict[str, Callable[[], Any]], base: str, block: int = BLOCK) -> dict[str, dict[str, float]]:
    """Return for each call its time in ms (median, least), and its ratio to ``base`` in the same round (median and range).

    A round calls each of them ``block`` times, or more often if that takes less than ``SHORTEST``.
    """
    repeats = {}
    for name, call in calls.items():
        call()  # compiles
        start = time.perf_counter()
        call()
        repeats[name] = max(block, round(SHORTEST / max(time.perf_counter() - start, 1e-7)))
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
            "least": min(taken) * 1e3,
            "ratio": statistics.median(ratio),
            "lowest": min(ratio),
            "highest": max(ratio),
        }
    return found


def main(argv: Sequence[str]) -> None:
    """Write a line of JSON for the framework, and one for each case; ``argv``: framework, device, and the sets of cases."""
    framework, device, *chosen = argv
    layers = importlib.import_module(f"maskedlinear.bench.{framework}_layers")
    description = layers.description() | {f"{framework} device": layers.device_of(device)}
    print(json.dumps({"description": description}), flush=True)
    for case in cases(tuple(chosen)):
        row = {
            "framework": framework,
            "set": case.of,
            "in": case.in_features,
            "out": case.out_features,
            "batch": case.batch,
            "connections": case.connections,
            "density": case.density,
        }
        print(json.dumps(row | _measured(layers, framework, device, case)), flush=True)


def _measured(layers: Any, framework: str, device: str, case: Case) -> dict[str, Any]:
    if case.of == "peak":
        large = case.in_features * case.out_features > LARGEST
        names = (layers.SPARSE,) if large else (layers.BASE, layers.DENSE, layers.SPARSE)
        return {"peak_bytes": {name: peak(framework, device, name, case) for name in names}}
    if case.of == "choice":
        chosen = {what: layers.chosen(case, device, what == "step") for what in ("step", "inference")}
        return {"times": _times(layers, device, case, layers.DENSE, (layers.DENSE, layers.SPARSE)), "chosen": chosen}
    return {"times": _times(layers, device, case, layers.BASE, ()), "kept_bytes": layers.kept(case, device)}


def _times(layers: Any, device: str, case: Case, base: str, only: tuple[str, ...]) -> dict[str, Any]:
    return {what: ratios(by_layer, base) for what, by_layer in layers.calls(case, device, only).items()}


if __name__ == "__main__":
    main(sys.argv[1:])
