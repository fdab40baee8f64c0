"""The pictures of the report folder: the network, its masks, its training and its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, MultipleLocator, PercentFormatter

from maskedlinear.demo.network_picture import draw_network
from maskedlinear.demo.problem import Mask, Problem
from maskedlinear.demo.settings import FRAMEWORKS, SIZES
from maskedlinear.demo.training import Run

__all__ = ["draw_pictures"]

# Colours that stay apart for colour-blind eyes, from M. Okabe and K. Ito, "Color Universal Design", 2008.
_BLUE, _VERMILION, _GREY = "#0072b2", "#d55e00", "#c8c8c8"
# Where the curves coincide, the thin dashed one lies on the thick pale one and both are seen.
_STYLE: dict[str, dict[str, Any]] = {
    "torch": {"color": _VERMILION, "linewidth": 4.5, "alpha": 0.45},
    "flax": {"color": _BLUE, "linewidth": 1.4, "linestyle": (0, (4, 2))},
}


def draw_pictures(problem: Problem, runs: Mapping[str, Run], out: Path) -> list[str]:
    """Draw the pictures of a run into the folder ``out``; return their file names."""
    pictures: dict[str, Callable[[], Figure]] = {
        "network.png": lambda: _network(problem, runs),
        "masks.png": lambda: _masks(problem),
        "training.png": lambda: _training(runs),
        "weights.png": lambda: _weights(problem, runs),
    }
    for name, draw in pictures.items():
        figure = draw()
        FigureCanvasAgg(figure)
        figure.savefig(out / name, dpi=130)
    return list(pictures)


def _network(problem: Problem, runs: Mapping[str, Run]) -> Figure:
    name, run = next(iter(runs.items()))
    figure = Figure(figsize=(15, 8.2), layout="constrained")
    before, after = figure.subplots(1, 2)
    draw_network(before, [np.ones_like(mask) for mask in problem.masks])
    edges = draw_network(after, problem.masks, run.final)
    before.set_title(f"Before masking: all {sum(mask.size for mask in problem.masks)} connections", fontsize=13)
    after.set_title(
        f"After masking and training in {FRAMEWORKS[name]}: {sum(int(mask.sum()) for mask in problem.masks)} connections",
        fontsize=13,
    )
    bar = figure.colorbar(edges, ax=[before, after], location="bottom", shrink=0.35, aspect=45, pad=0.02, extend="both")
    bar.set_label("trained weight of a live connection (right)")
    return figure


def _heatmap_row(figure: Figure, rows: int) -> list[list[Axes]]:
    widths = [max(n_in, 24) for n_in in SIZES[:-1]]
    axes = figure.subplots(rows, len(widths), squeeze=False, width_ratios=widths)
    return [list(row) for row in axes]


def _label_heatmap(axes: Axes, layer: int, mask: Mask) -> None:
    n_out, n_in = mask.shape
    axes.set_xlabel("input node")
    axes.set_ylabel("output node")
    axes.xaxis.set_major_locator(MultipleLocator(8 if n_in > 16 else 4))
    axes.yaxis.set_major_locator(MultipleLocator(4 if n_out > 16 else 2))
    axes.set_title(f"Layer {layer}: {n_out} × {n_in}\nsparsity {_percent(mask)}")


def _percent(mask: Mask) -> str:
    return f"{float(np.mean(~mask)):.1%}"


def _masks(problem: Problem) -> Figure:
    figure = Figure(figsize=(13.5, 4.8), layout="constrained")
    figure.suptitle("Masks: which input node each output node is connected to", fontsize=13)
    for layer, (axes, mask) in enumerate(zip(_heatmap_row(figure, 1)[0], problem.masks, strict=True), start=1):
        axes.imshow(mask, cmap=ListedColormap([_GREY, _BLUE]), vmin=0, vmax=1, interpolation="nearest")
        _label_heatmap(axes, layer, mask)
    handles = [Patch(color=_BLUE, label="live connection"), Patch(color=_GREY, label="masked connection")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _weights(problem: Problem, runs: Mapping[str, Run]) -> Figure:
    figure = Figure(figsize=(13.5, 0.8 + 3.5 * len(runs)), layout="constrained")
    figure.suptitle("Trained weights of the live connections; masked ones are grey", fontsize=13)
    rows = _heatmap_row(figure, len(runs))
    live = np.concatenate(
        [np.abs(w[m]) for run in runs.values() for w, m in zip(run.final, problem.masks, strict=True)]
    )
    limit = (float(np.quantile(live, 0.995)) if live.size else 0) or 1.0
    for row, (name, run) in zip(rows, runs.items(), strict=True):
        for layer, (axes, weight, mask) in enumerate(zip(row, run.final, problem.masks, strict=True), start=1):
            axes.set_facecolor(_GREY)
            image = axes.imshow(
                np.ma.masked_array(weight, ~mask), cmap="RdBu_r", norm=Normalize(-limit, limit), interpolation="nearest"
            )
            _label_heatmap(axes, layer, mask)
            axes.set_title(f"{FRAMEWORKS[name]}, layer {layer}")
    figure.colorbar(image, ax=[axes for row in rows for axes in row], shrink=0.8, label="weight", extend="both")
    return figure


def _training(runs: Mapping[str, Run]) -> Figure:
    both = len(runs) == 2
    figure = Figure(figsize=(15 if both else 10.5, 4.6), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, 3 if both else 2)
    for name, run in runs.items():
        epochs = np.arange(1, len(run.accuracies) + 1)
        style = _STYLE[name] | ({"marker": "o"} if len(epochs) == 1 else {})
        label = f"{FRAMEWORKS[name]}, at the end {run.accuracies[-1]:.2%}"
        panels[0].plot(epochs, run.losses.mean(axis=1), label=FRAMEWORKS[name], **style)
        panels[1].plot(epochs, run.accuracies, label=label, **style)
    panels[0].set(title="Training loss", xlabel="epoch", ylabel="cross entropy, mean of the epoch", yscale="log")
    panels[1].set(title="Test accuracy", xlabel="epoch", ylabel="test images classified correctly")
    panels[1].yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    panels[1].yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))  # whole percents
    if both:
        one, other = runs.values()
        difference = np.abs(one.losses - other.losses).ravel()
        steps = np.arange(1, difference.size + 1)
        panels[2].plot(steps[difference > 0], difference[difference > 0], ".", markersize=3, color="black")
        panels[2].set(title="Difference between the two losses", xlabel="step", yscale="log")
        panels[2].set_ylabel(f"|{' − '.join(FRAMEWORKS[name] for name in runs)}|")
    for axes in panels:
        axes.grid(color="#e6e6e6")
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[:2]:
        axes.legend(frameon=False)
        if len(epochs) == 1:
            axes.set_xticks([1])
    # At least this much of the axes, so that differences which are nothing do not look large.
    losses = [run.losses.mean(axis=1) for run in runs.values()]
    panels[0].set_ylim(np.min(losses) / 1.5, np.max(losses) * 1.5)
    panels[1].set_ylim(min(0.8, np.min([run.accuracies for run in runs.values()]) - 0.02), 1)
    return figure
