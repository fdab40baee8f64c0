"""One weight pruned by SparseGPT or OBS, which change the weights that stay: the same for every framework."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from maskedlinear.models._axes import WeightAxes
from maskedlinear.pruning import obs, obs_update, sparsegpt

__all__ = ["UpdatesMethod", "check_updates_method", "update_weight"]

UpdatesMethod = Literal["sparsegpt", "obs"]


def check_updates_method(
    method: str, n_of_m: tuple[int, int] | None, block_size: int, damping: float
) -> dict[str, Any]:
    """Return what a method takes besides weights, Hessian and mask.

    Raises:
        ValueError: if there is no such method, or it has no ``n_of_m``.
    """
    if method not in ("sparsegpt", "obs"):
        raise ValueError(f"method must be 'sparsegpt' or 'obs'; got {method!r}")
    if method == "obs" and n_of_m is not None:
        raise ValueError(
            "n_of_m is for method='sparsegpt'; pass it, or take masks of n_of_m and sparsity=None with 'obs'"
        )
    how: dict[str, Any] = {"damping": damping}
    return how | ({"n_of_m": n_of_m, "block_size": block_size} if method == "sparsegpt" else {})


def update_weight(
    value: Any, mask: Any, axes: WeightAxes, hessians: Any, method: str, sparsity: Any, how: Mapping[str, Any]
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Return the new mask and values of a weight, of its own shape.

    Args:
        value: the weight, on the host; with its dormant values if ``sparsity`` is ``None`` and the method ``"obs"``.
        mask: its mask, of its shape.
        axes: what its axes mean; it is one matrix.
        hessians: of each group of its outputs, which have inputs of their own: shape ``(groups, in, in)``.
        method: ``"sparsegpt"`` or ``"obs"``.
        sparsity: the fraction to prune, or ``None``.
        how: what :func:`check_updates_method` returned.
    """
    arrays = [axes.matrices(np.asarray(array, np.float64))[0] for array in (value, mask)]
    parts = [array.reshape(len(hessians), -1, hessians.shape[2]) for array in arrays]
    masks, weights = [], []
    for values, live, hessian in zip(*parts, hessians, strict=True):
        if method == "sparsegpt":
            live, values = sparsegpt(values, hessian, sparsity, mask=live, **how)
        elif sparsity is None:
            values = obs_update(values, hessian, live, **how)
        else:
            live, values = obs(values, hessian, sparsity, mask=live, **how)
        masks.append(live.astype(bool))
        weights.append(values)
    new, weight = (np.ascontiguousarray(axes.from_matrices(np.stack(rows), value.shape)) for rows in (masks, weights))
    return new, weight
