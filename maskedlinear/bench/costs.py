"""Measure the constants that ``compress`` chooses by: both forms over widths, batches and densities.

Of square layers; and of two that are not, of one size and density, to see what long rows of x or y cost.
"""

from __future__ import annotations

import importlib
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from maskedlinear.bench.cases import Case
from maskedlinear.bench.command import machine
from maskedlinear.bench.measure import ratios
from maskedlinear.costs import UNEVEN, Costs

__all__ = ["measure_costs"]

WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096)
BATCHES = (1, 2, 4, 8, 32, 128, 512)
DENSITIES = (0.001, 0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3)
PASSES = 3
KINDS = ("step", "inference")
_FORMS, _WAYS = ("dense", "sparse"), ("more inputs", "more outputs")  # in the order of Costs.uneven


def measure_costs(
    framework: str,
    path: Path,
    device: str = "cpu",
    widths: tuple[int, ...] = WIDTHS,
    batches: tuple[int, ...] = BATCHES,
    densities: tuple[float, ...] = DENSITIES,
    passes: int = PASSES,
) -> Costs:
    """Measure on this machine, write a file for :meth:`maskedlinear.costs.Costs.load`, and return what is in it.

    Of each time the least is kept, of rounds in ``passes`` over all layers, minutes apart: what is more than the least,
    other programs took.
    """
    layers = importlib.import_module(f"maskedlinear.bench.{framework}_layers")
    dense = np.full((2, len(widths), len(batches)), np.inf)
    sparse = np.full((*dense.shape, len(densities)), np.inf)
    uneven = np.full((2, 2, 2, len(batches)), np.inf)
    for i, width in enumerate(widths * passes):
        i %= len(widths)
        for j, batch in enumerate(batches):
            middle = i == len(widths) // 2
            for kind, calls in enumerate(_calls(layers, width, batch, densities, device, middle)):
                found = {name: times["least"] / 1e3 for name, times in ratios(calls, "dense", block=1).items()}
                dense[kind, i, j] = min(dense[kind, i, j], found["dense"])
                by_density = [found[str(density)] for density in densities]
                sparse[kind, i, j] = np.minimum(sparse[kind, i, j], by_density)
                if middle:
                    by_way = [[found[f"{form} {way}"] for way in _WAYS] for form in _FORMS]
                    uneven[kind, ..., j] = np.minimum(uneven[kind, ..., j], by_way)
            print(f"{width} x {width}, batch {batch}: {dense[0, i, j] * 1e3:.3g} ms a dense step", file=sys.stderr)
    about = machine()
    versions = ", ".join(f"{name} {version}" for name, version in layers.description().items())
    costs = Costs(
        framework,
        layers.device_of(device),
        f"{about['cores']} cores of {about['cpu']}, {versions}",
        widths,
        batches,
        densities,
        dense,
        sparse,
        uneven,
    )
    costs.save(path)
    return Costs.load(path)


def _calls(
    layers: Any, width: int, batch: int, densities: tuple[float, ...], device: str, uneven: bool
) -> list[dict[str, Callable[[], Any]]]:
    """Return the calls to time for training and for inference, by density; the dense form is the same at all of them."""
    found: list[dict[str, Callable[[], Any]]] = [{}, {}]

    def add(shape: tuple[int, int], density: float, names: dict[str, str]) -> None:
        case = Case("costs", *shape, batch, max(1, round(density * shape[0] * shape[1])))
        made = layers.calls(case, device=device, only=tuple(names))
        for kind, calls in zip(KINDS, found, strict=True):
            calls.update({called: made[kind][name] for name, called in names.items()})

    for density in densities:
        first = density == statistics.median_low(densities)
        add((width, width), density, {layers.SPARSE: str(density)} | ({layers.DENSE: "dense"} if first else {}))
    if uneven:
        wide = (width * UNEVEN, width // UNEVEN)
        for way, shape in zip(_WAYS, (wide, wide[::-1]), strict=True):
            names = zip((layers.DENSE, layers.SPARSE), _FORMS, strict=True)
            add(shape, densities[1], {name: f"{form} {way}" for name, form in names})
    return found
