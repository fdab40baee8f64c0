"""Whole nodes: how much each output or input of a layer matters, and masks without some of them."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from maskedlinear._arrays import as_numpy
from maskedlinear.masks._random import Sparsity, checked_zeros
from maskedlinear.pruning._select import clear_smallest, first_nan

__all__ = ["Side", "node_mask", "node_norm", "node_taylor", "prune_nodes"]

Side = Literal["outputs", "inputs"]


def node_norm(weight: Any, side: Side = "outputs", order: Literal[1, 2] = 1) -> NDArray[np.float64]:
    """Return the norm of each output's row of a weight, or of each input's column.

    Source: H. Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017 (order 1).

    Args:
        weight: shape ``(out, in)``, of any framework.
        side: whose scores, shape ``(out,)`` or ``(in,)``.
        order: 1 for the sum of absolute values, 2 for the root of the sum of squares.

    Raises:
        ValueError: if the weight is no matrix, or an option is none of these.
    """
    matrix, axis = _matrix(weight), _axis(side)
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2; got {order!r}")
    if order == 1:
        return np.asarray(np.abs(matrix).sum(axis=axis, dtype=np.float64))
    return np.asarray(np.sqrt(np.square(matrix, dtype=np.float64).sum(axis=axis)))


def node_taylor(weight: Any, gradient: Any, side: Side = "outputs") -> NDArray[np.float64]:
    """Return ``(Σ w · dL/dw)²`` over each output's row, or each input's column: what its removal costs to first order.

    Source: P. Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, equation 8.

    Args:
        weight: shape ``(out, in)``, of any framework.
        gradient: the loss's gradient, of the same shape.
        side: whose scores, shape ``(out,)`` or ``(in,)``.

    Raises:
        ValueError: if a shape does not fit, or ``side`` is neither.
    """
    one, other, axis = _matrix(weight), _matrix(gradient), _axis(side)
    if one.shape != other.shape:
        raise ValueError(f"a gradient must have its weight's shape, {one.shape}; got {other.shape}")
    return np.asarray(np.square(np.multiply(one, other, dtype=np.float64).sum(axis=axis)))


def prune_nodes(scores: Any, *, sparsity: Sparsity | None = None, num_zeros: int | None = None) -> NDArray[np.bool_]:
    """Return which nodes stay: all but those of the lowest scores, of equal ones the later.

    The scale of a batch normalisation after the layer, ``abs(norm.weight)``, is a score too: Z. Liu et al., "Learning
    Efficient Convolutional Networks through Network Slimming", ICCV 2017.

    Args:
        scores: shape ``(nodes,)``, of any framework.
        sparsity: the fraction of nodes that go, in [0, 1], rounded down.
        num_zeros: the number of nodes that go instead. Give exactly one of the two.

    Returns:
        Booleans, shape ``(nodes,)``.

    Raises:
        ValueError: if a value is out of its range, scores hold NaN or are no vector, or no node would stay.
    """
    array = as_numpy(scores)
    if array.ndim != 1:
        raise ValueError(f"scores of nodes must have shape (nodes,); got {array.shape}")
    values = np.ascontiguousarray(array, np.result_type(np.float32, array.dtype))
    place = first_nan(values)
    if place is not None:
        raise ValueError(f"scores must be numbers; got NaN for node {place}")
    count = checked_zeros(array.size, sparsity, num_zeros)
    if count == array.size:
        raise ValueError(f"a layer must keep a node; of {array.size}, {count} would be gone: prune fewer")
    kept = np.ones(array.size, bool)
    clear_smallest([values], [kept], count)
    return kept


def node_mask(shape: tuple[int, int], outputs: Any = None, inputs: Any = None) -> NDArray[np.bool_]:
    """Return the mask of a layer some of whose nodes are gone.

    Args:
        shape: ``(out, in)``.
        outputs: booleans, shape ``(out,)``: which outputs stay; all if ``None``.
        inputs: booleans, shape ``(in,)``: which inputs stay.

    Raises:
        ValueError: if one has another shape, or is not boolean.
    """
    kept = []
    for what, given, size in zip(("outputs", "inputs"), (outputs, inputs), shape, strict=True):
        side = np.ones(size, bool) if given is None else as_numpy(given)
        if side.shape != (size,) or side.dtype != bool:
            raise ValueError(f"{what} must be booleans of shape ({size},); got {side.dtype} of shape {side.shape}")
        kept.append(side)
    return np.asarray(kept[0][:, None] & kept[1][None, :])


def _matrix(weight: Any) -> NDArray[Any]:
    array = as_numpy(weight)
    if array.ndim != 2:
        raise ValueError(f"a weight must have shape (out, in); got {array.shape}")
    return array


def _axis(side: Side) -> int:
    if side not in ("outputs", "inputs"):
        raise ValueError(f"side must be 'outputs' or 'inputs'; got {side!r}")
    return 1 if side == "outputs" else 0
