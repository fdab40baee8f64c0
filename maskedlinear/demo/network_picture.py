"""A network drawn as nodes and edges, so that one sees what a mask takes away."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize
from numpy.typing import NDArray

from maskedlinear.demo.problem import Float32, Mask
from maskedlinear.demo.settings import SIZES

__all__ = ["draw_network"]

_NODE = "#333333"
# The sign is the colour and the magnitude the opacity. Even a weight of zero stays visible, as its connection is there.
_NEGATIVE, _POSITIVE = "#0072b2", "#d55e00"
_COLOURS = LinearSegmentedColormap.from_list(
    "signed",
    [
        (0, _NEGATIVE),
        (0.25, _NEGATIVE + "40"),
        (0.5, _NEGATIVE + "18"),
        (0.5, _POSITIVE + "18"),
        (0.75, _POSITIVE + "40"),
        (1, _POSITIVE),
    ],
)


def draw_network(axes: Axes, masks: Sequence[Mask], weights: Sequence[Float32] | None = None) -> ScalarMappable:
    """Draw the live connections of a network, inputs on the left.

    Args:
        axes: where to draw.
        masks: each layer's mask, shape ``(out, in)``.
        weights: each layer's weight, shape ``(out, in)``, for the colour and opacity of a connection; ``None`` draws all
            alike.

    Returns:
        The colours' scale, for a colour bar.
    """
    live = np.concatenate([np.abs(w[m]) for w, m in zip(weights, masks, strict=True)]) if weights else np.ones(1)
    # A few large weights would leave the rest pale: the scale ends where 98 % of the weights do.
    limit = float(np.quantile(live, 0.98)) if live.size else 1.0
    scale = ScalarMappable(Normalize(-limit or -1, limit or 1), _COLOURS)
    heights = [_heights(size) for size in SIZES]
    for layer, mask in enumerate(masks):
        row, column = np.nonzero(mask)
        left = np.stack([np.full(column.size, float(layer)), heights[layer][column]], axis=1)
        right = np.stack([np.full(row.size, layer + 1.0), heights[layer + 1][row]], axis=1)
        lines = np.stack([left, right], axis=1)
        if weights is None:
            axes.add_collection(LineCollection(list(lines), colors=[(0.2, 0.2, 0.2, 0.2)], linewidths=0.6))
        else:
            weight = weights[layer][mask]
            strong = np.argsort(np.abs(weight))  # the strongest are drawn last, on top
            colors = scale.to_rgba(weight[strong])
            axes.add_collection(LineCollection(list(lines[strong]), colors=colors, linewidths=0.9))
        masked = f"{float(np.mean(~mask)):.0%} masked" if not mask.all() else "none masked"
        axes.text(layer + 0.5, -0.06, f"layer {layer + 1}\n{mask.sum()} connections\n{masked}", ha="center", va="top")
    for layer, y in enumerate(heights):
        axes.plot(np.full(y.size, float(layer)), y, "o", markersize=180 / (y.size + 22), color=_NODE, zorder=3)
        axes.text(layer, 1.03, ["64 pixels", "32 nodes", "16 nodes", "10 digits"][layer], ha="center", va="bottom")
    for digit, y in enumerate(heights[-1]):
        axes.text(3.07, y, str(digit), ha="left", va="center", fontsize=11)
    axes.set(xlim=(-0.15, 3.25), ylim=(-0.17, 1.08))
    axes.set_axis_off()
    return scale


def _heights(size: int) -> NDArray[np.float64]:
    """Where the nodes of one column stand, from top to bottom: the more there are, the wider they spread."""
    half = 0.5 * (0.62 + 0.38 * (size - SIZES[-1]) / (SIZES[0] - SIZES[-1]))
    return np.linspace(0.5 + half, 0.5 - half, size)
