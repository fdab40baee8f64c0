"""The report on the screen: what both frameworks came to, side by side, in ASCII for any terminal and any log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from maskedlinear.demo.settings import FRAMEWORKS

__all__ = ["print_report"]

_NOTES = """\
[1] Not a benchmark: steps this small measure overhead. In Flax the first step
    includes compiling it.
[2] Each from the float64 spec; in the last column from each other. The largest
    over the weights and biases of all masked layers.
[3] S adds the magnitudes of all the terms that a gradient is made of, also in
    the layers around it; u = 2^-24. At most 1 is promised.
[4] S of the layer's own terms only. Leaves out the rounding errors with which
    g and x arrive, so it may be far above 1: no promise.
"""


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Print the table of ``report``, as made by :func:`maskedlinear.demo.report.make_report`, and its notes."""
    runs: dict[str, dict[str, Any]] = report["frameworks"]
    both: dict[str, Any] = report["comparison"] or {}
    table = Table("")
    for name in runs:
        table.add_column(FRAMEWORKS[name], justify="right")
    if both:
        table.add_column("difference", justify="right")

    def row(label: str, shape: str, *keys: str | int, apart: str = "", apart_shape: str = "") -> None:
        """Add what lies under ``keys`` for each framework, and under them or ``apart`` for the difference."""
        cells = [_cell(numbers, shape, keys) for numbers in runs.values()]
        if both:
            cells.append(_cell(both, apart_shape or shape, (apart,) if apart else keys))
        if any(cells):
            table.add_row(label, *cells)

    row("test accuracy", "{:.2%}", "test_accuracy", apart="accuracy_points", apart_shape="{:.2f} points")
    row("loss, mean of the last epoch", "{:.4f}", "last_epoch_loss")
    row("loss, largest difference at a step", "{:.1e}", "largest_loss_difference")
    row("training time in seconds [1]", "{:.1f}", "seconds")
    row("  until the first step is done [1]", "{:.1f}", "first_step_seconds")
    for index, layer in enumerate(report["layers"]):
        row(f"sparsity of layer {index + 1}, {layer['in']} -> {layer['out']}", "{:.1%}", "sparsity", index)
    row("dormant weights", "{}", "dormant")
    row("  changed by AdamW", "{}", "dormant_changed")
    row("first gradients, largest error [2]", "{:.1e}", "first_gradients", "absolute")
    row("  in units of 8 u S [3]", "{:.3f}", "first_gradients", "bound_ratio")
    row("  in units of 8 u |g|^T |x| [4]", "{:.3g}", "first_gradients", "own_ratio")
    console.print("One masked network, the same in each framework, trained on scikit-learn's digits", highlight=False)
    console.print(table)
    console.print(_NOTES, end="", markup=False, highlight=False)


def _cell(numbers: Mapping[str, Any], shape: str, keys: Sequence[str | int]) -> str:
    value: Any = numbers
    for key in keys:
        if isinstance(value, Mapping) and key not in value:
            return ""
        value = value[key]
    return "not finite" if value is None else shape.format(value)
