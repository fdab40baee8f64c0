"""The masks of a file as pictures: a panel for each, large ones as the density of their tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import BoundaryNorm, Colormap, ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from maskedlinear.files.nodes import Panel
from maskedlinear.files.text import escaped, fraction, shape_text

__all__ = ["MOST", "check_kind", "draw"]

MOST = 100  # panels of a figure
_KINDS = (".png", ".svg", ".pdf")
_BLUE, _WHITE = "#0b3c6f", "#f4f4f2"


def check_kind(path: Path) -> None:
    """Check that a picture can be of the kind that its name says.

    Raises:
        ValueError: if it cannot.
    """
    if path.suffix not in _KINDS:
        raise ValueError(f"--plot draws {', '.join(_KINDS)}; got {path}")


def draw(panels: Sequence[Panel], title: str, out: Path, kind: str) -> None:
    """Draw all masks, the first ``MOST`` if there are more, with one colour bar, into a file."""
    shown = panels[:MOST]
    columns = min(len(shown), max(2, math.ceil(math.sqrt(len(shown)))))
    rows = math.ceil(len(shown) / columns)
    side = 3.6 if len(shown) <= 6 else 2.9 if len(shown) <= 20 else 2.5
    small = 9 if len(shown) <= 6 else 7.5 if len(shown) <= 20 else 6.5
    figure = Figure(figsize=(max(columns * side, 5.2) + 0.9, rows * (side + 0.35) + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    colours, scale = _colours(shown)
    for axes, one in zip(grid, shown, strict=False):
        image = _panel(axes, one, colours, scale, small)
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    bar = figure.colorbar(
        image,
        ax=list(grid),
        shrink=0.5 if isinstance(scale, BoundaryNorm) else min(1.0, 3.2 / (rows * side) + 0.25),
        pad=0.02,
        aspect=28,
    )
    if isinstance(scale, BoundaryNorm):
        bar.set_ticks([0.25, 0.75], labels=["masked", "live"])
    else:
        bar.set_label("share of live connections")
    bar.ax.tick_params(labelsize=small)
    left_out = f", the first {len(shown)} of {len(panels)} masks" if len(panels) > len(shown) else ""
    figure.suptitle(f"{_short(escaped(title), 60)}{left_out}", fontsize=11)
    figure.savefig(out, format=kind[1:], dpi=150)


def _colours(shown: Sequence[Panel]) -> tuple[Colormap, Normalize]:
    """Return the colours: two if all tiles are single connections, else those of a density, on a log scale if it is low."""
    if all(((one.tiles == 0) | (one.tiles == 1)).all() for one in shown):
        return ListedColormap([_WHITE, _BLUE]), BoundaryNorm([0, 0.5, 1], 2)
    least = min(float(one.tiles[one.tiles > 0].min(initial=1.0)) for one in shown)
    ramp = np.linspace(0, 1, 256)[:, None]
    # from pale to dark through one hue, so that it reads in print and for colour-blind eyes too
    pale, middle, dark = (np.array(colour) for colour in ((0.80, 0.88, 0.94), (0.25, 0.57, 0.78), (0.02, 0.13, 0.30)))
    table = np.where(ramp < 0.5, pale + 2 * ramp * (middle - pale), middle + (2 * ramp - 1) * (dark - middle))
    colours = ListedColormap(table).with_extremes(bad=_WHITE, under=_WHITE)
    return colours, LogNorm(max(least, 1e-6), 1) if least < 0.1 else Normalize(0, 1)


def _panel(axes: Axes, one: Panel, colours: Colormap, scale: Normalize, small: float) -> Any:
    height, width = one.shape
    # Without tiles that are empty in a log scale's way: log 0 is masked, and drawn as nothing.
    tiles = np.ma.masked_equal(one.tiles, 0) if not isinstance(scale, BoundaryNorm) else one.tiles
    elongated = max(height, width) > 3 * max(min(height, width), 1)
    image = axes.imshow(
        tiles,
        cmap=colours,
        norm=scale,
        extent=(0, max(width, 1), max(height, 1), 0),
        aspect="auto" if elongated else "equal",
        interpolation="nearest",
    )
    axes.set_facecolor(_WHITE)
    axes.set_title(
        f"{_short(escaped(one.name))}\n{shape_text(one.of)}, sparsity {fraction(one.sparsity)}", fontsize=small
    )
    axes.set_ylabel(one.labels[0], fontsize=small)
    axes.set_xlabel(one.labels[1], fontsize=small)
    axes.tick_params(labelsize=small - 1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4, integer=True))
    return image


def _short(name: str, most: int = 44) -> str:
    """Return a name, its middle left out if it is long; a dollar sign is one, and no formula's."""
    if len(name) > most:
        name = f"{name[: most // 2 - 1]}…{name[-(most // 2) :]}"
    return name.replace("$", r"\$")
