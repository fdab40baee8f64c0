"""The pictures: time against density, with the dense line and where the sparse form crosses it; memory against density."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from maskedlinear.bench.cases import NAMES

__all__ = ["crossover", "draw"]

mpl.use("Agg")

import matplotlib.pyplot as plt

_TITLES = {"torch": "PyTorch", "jax": "JAX"}


def draw(rows: Sequence[dict[str, Any]], out: Path) -> list[str]:
    """Draw what ``rows`` have; return the names of the files."""
    swept = [row for row in rows if row["set"] == "density"]
    if not swept:
        return []
    _times(swept, out / "time.png")
    _memory(swept, out / "memory.png")
    return ["time.png", "memory.png"]


def crossover(densities: Sequence[float], sparse: Sequence[float], dense: Sequence[float]) -> float | None:
    """Return the density at which the sparse form takes as long as the dense one, between points on log axes."""
    above = np.log(np.asarray(sparse) / np.asarray(dense))
    for i in range(len(above) - 1):
        if above[i] < 0 <= above[i + 1]:
            share = -above[i] / (above[i + 1] - above[i])
            first, last = np.log(densities[i]), np.log(densities[i + 1])
            return float(np.exp(first + share * (last - first)))
    return None


def _groups(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, int, int], list[dict[str, Any]]]:
    groups: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["density"]):
        groups.setdefault((row["framework"], row["in"], row["batch"]), []).append(row)
    return dict(sorted(groups.items()))


def _times(rows: Sequence[dict[str, Any]], path: Path) -> None:
    def taken(row: dict[str, Any], name: str) -> float:
        return float(row["times"]["step"][name]["ms"])

    def cross(axis: Any, framework: str, group: Sequence[dict[str, Any]]) -> None:
        names = NAMES[framework]
        sparse, dense = ([taken(row, name) for row in group] for name in (names.sparse, names.base))
        found = crossover([100 * row["density"] for row in group], sparse, dense)
        if found is not None:
            axis.axvline(found, color="gray", linewidth=0.8)
            place = {"xycoords": axis.get_xaxis_transform(), "textcoords": "offset points", "ha": "right"}
            axis.annotate(f"{found:.0f} %", (found, 0), xytext=(-3, 4), **place)

    _panels(_groups(rows), taken, "training step, ms", path, cross)


def _memory(rows: Sequence[dict[str, Any]], path: Path) -> None:
    widest = {key: group for key, group in _groups(rows).items() if key[1] == max(row["in"] for row in rows)}
    _panels(widest, lambda row, name: row["kept_bytes"][name] / 2**20, "kept from step to step, MiB", path)


def _panels(
    groups: dict[tuple[str, int, int], list[dict[str, Any]]],
    height: Callable[[dict[str, Any], str], float],
    label: str,
    path: Path,
    more: Callable[[Any, str, Sequence[dict[str, Any]]], None] = lambda *_: None,
) -> None:
    """Draw a panel for each group: ``height`` of a row and a layer against density, on log axes."""
    figure, axes = plt.subplots(1, len(groups), figsize=(4.4 * len(groups), 4.2), sharey=True, squeeze=False)
    for axis, ((framework, width, batch), group) in zip(axes[0], groups.items(), strict=True):
        for name, style in zip(NAMES[framework], ("k--", "C0s-", "C1o-"), strict=True):
            heights = [height(row, name) for row in group]
            axis.loglog([100 * row["density"] for row in group], heights, style, label=name, markersize=4)
        more(axis, framework, group)
        axis.set_title(f"{_TITLES[framework]}, {width} × {width}, batch {batch}", fontsize=10)
        axis.set_xlabel("connections that are there, %")
        axis.grid(True, which="major", alpha=0.3)
        axis.legend(fontsize=8)
    axes[0][0].set_ylabel(label)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
