"""Measure the constants that ``compress`` chooses by: both forms of square layers over widths, batches and densities."""

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
from maskedlinear.costs import Costs

__all__ = ["measure_costs"]

WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096)
BATCHES = (1, 2, 4, 8, 32, 128, 512)
DENSITIES = (0.001, 0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3)
KINDS = ("step", "inference")


def measure_costs(
    framework: str,
    path: Path,
    device: str = "cpu",
    widths: tuple[int, ...] = WIDTHS,
    batches: tuple[int, ...] = BATCHES,
    densities: tuple[float, ...] = DENSITIES,
) -> Costs:
    """Measure on this machine, write a file for :meth:`maskedlinear.costs.Costs.load`, and return what is in it.

    All densities of a width and batch take turns with the dense form, so that a machine that slows down slows all alike.
    """
    layers = importlib.import_module(f"maskedlinear.bench.{framework}_layers")
    dense = np.empty((2, len(widths), len(batches)))
    sparse = np.empty((*dense.shape, len(densities)))
    for i, width in enumerate(widths):
        for j, batch in enumerate(batches):
            calls = _calls(layers, width, batch, densities, device)
            for kind, by_density in enumerate(calls):
                found = ratios(by_density, "dense", block=1)
                dense[kind, i, j] = found["dense"]["ms"] / 1e3
                sparse[kind, i, j] = [dense[kind, i, j] * found[str(density)]["ratio"] for density in densities]
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
    )
    costs.save(path)
    return Costs.load(path)


def _calls(
    layers: Any, width: int, batch: int, densities: tuple[float, ...], device: str
) -> list[dict[str, Callable[[], Any]]]:
    """Return the calls to time for training and for inference, by density; the dense form is the same at all of them."""
    found: list[dict[str, Callable[[], Any]]] = [{}, {}]
    for density in densities:
        case = Case("costs", width, width, batch, max(1, round(density * width * width)))
        first = density == statistics.median_low(densities)
        names = (layers.DENSE, layers.SPARSE) if first else (layers.SPARSE,)
        made = layers.calls(case, device=device, only=names)
        for kind, calls in zip(KINDS, found, strict=True):
            calls[str(density)] = made[kind][layers.SPARSE]
            if first:
                calls["dense"] = made[kind][layers.DENSE]
    return found
