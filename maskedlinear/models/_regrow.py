"""``regrow_weight``: connections of a weight of any axes moved, the same from every framework's arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskedlinear import pruning
from maskedlinear.models._axes import WeightAxes
from maskedlinear.pruning._layers import layer_seed

__all__ = ["refuse_shared", "regrow_weight"]

Rows = Callable[[int, int], Any]


def regrow_weight(
    axes: WeightAxes | None,
    mask: NDArray[np.bool_],
    weight: NDArray[Any],
    fraction: float,
    rows: Rows | None,
    seed: int,
    exclude_dropped: bool = False,
) -> tuple[NDArray[np.bool_], int]:
    """Return the new mask of a weight, each of whose matrices moves a fraction of its connections; and their number.

    Args:
        axes: of the weight; each entry stands for itself if ``None``.
        mask: of the weight's shape.
        weight: its values.
        fraction: as :func:`maskedlinear.pruning.regrow` takes it.
        rows: returns rows of the gradient, from one to before another; those of its matrices follow each other. ``None``
            grows at random.
        seed: of the random places; matrix i takes ``seed + i``.
        exclude_dropped: as :func:`maskedlinear.pruning.regrow` takes it.

    Raises:
        ValueError: as by :func:`maskedlinear.pruning.regrow`.
    """
    axes = axes or WeightAxes.of_entries(mask.ndim)
    masks, weights = axes.matrices(mask), axes.matrices(weight)
    moved = []
    for place, (live, values) in enumerate(zip(masks, weights, strict=True)):
        by = place * live.shape[0]
        own = None if rows is None else (lambda start, stop, by=by: rows(start + by, stop + by))
        options: Any = {"seed": layer_seed(seed, place), "exclude_dropped": exclude_dropped}
        moved.append(pruning.regrow(live, values, fraction, own, **options))
    return axes.from_matrices(np.stack(moved) if moved else masks, mask.shape), len(moved)


def refuse_shared(name: str, users: int) -> None:
    """Raise a ``ValueError`` if more than one module has the parameter of this name, whose connections are to move."""
    if users > 1:
        raise ValueError(
            f"connections move in a layer that has its {name} to itself; here {users} modules share it: leave it out with "
            "include=..."
        )
