"""Scores that need data: activations, products with the Hessian, or squares of gradients; the higher, the later pruned."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskedlinear._arrays import as_numpy

__all__ = ["fisher", "grasp", "obd", "synflow", "wanda"]

Scores = NDArray[np.float64]


def wanda(weight: Any, input_norms: Any) -> Scores:
    """Return ``|w| · ‖x‖₂``: what a weight adds to its output, by the norm of what comes in over the data.

    The paper compares within an output: ``prune(wanda(weight, norms), sparsity=0.5, scope="row")``.
    Source: M. Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024, equation 1.

    Args:
        weight: shape ``(out, in)``.
        input_norms: the norm of each input over all rows of data, shape ``(in,)``, 0 or more; whatever they are all
            multiplied by changes no order.

    Raises:
        ValueError: if the shapes do not fit, or a norm is negative.
        TypeError: if one is not an array of real numbers.

    >>> wanda([[3.0, -1.0]], [1.0, 4.0])
    array([[3., 4.]])
    """
    matrix, norms = as_numpy(weight), as_numpy(input_norms)
    if matrix.ndim != 2 or norms.shape != matrix.shape[1:]:
        raise ValueError(
            f"wanda takes a weight (out, in) and the norms of its inputs, (in,); got {matrix.shape} and {norms.shape}: "
            "convolutions and Conv1D are read as matrices first"
        )
    if (norms < 0).any():
        raise ValueError(f"norms must be 0 or more; got {norms.min()}")
    return np.asarray(np.multiply(np.abs(matrix), norms, dtype=np.float64))


def fisher(weight: Any, squared_gradients: Any) -> Scores:
    """Return ``w² · F / 2``: how much the loss grows if the weight goes, by the diagonal of the Fisher information.

    Source: L. Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018, equation 5.

    Args:
        weight: of any shape and framework.
        squared_gradients: F, the mean over examples of the squared gradient of one example's loss; 0 or more, of the
            weight's shape. The square of a batch's gradient is something else, and far smaller.

    Raises:
        ValueError: if the shapes differ, or a square is negative.
        TypeError: if one is not an array of real numbers.

    >>> fisher([2.0, -1.0], [1.0, 6.0])
    array([2., 3.])
    """
    scores = _half_square(weight, squared_gradients, "squared_gradients")
    if (scores < 0).any():
        raise ValueError(
            "squared gradients must be 0 or more; got a negative one: pass their squares, one example at a time"
        )
    return scores


def obd(weight: Any, hessian_diagonal: Any) -> Scores:
    """Return ``h · w² / 2``: how much the loss of a trained network grows if the weight goes (optimal brain damage).

    Where the curvature is negative, so is the score, and the weight goes first.
    Source: Y. LeCun et al., "Optimal Brain Damage", NeurIPS 1989.

    Args:
        weight: of any shape and framework.
        hessian_diagonal: the second derivatives of the loss, of the weight's shape.

    Raises:
        ValueError: if the shapes differ.
        TypeError: if one is not an array of real numbers.

    >>> obd([2.0, -1.0], [1.0, 6.0])
    array([2., 3.])
    """
    return _half_square(weight, hessian_diagonal, "hessian_diagonal")


def grasp(weight: Any, hessian_gradient: Any) -> Scores:
    """Return ``w · (H g)``, signed: high where the gradient flow ``‖g‖²`` would lose most without the weight.

    The paper's S(-w) = -w · (H g) is how much removing adds to the flow; it removes the largest. This is its negative. The
    paper prunes before training, and divides outputs by a temperature of 200 before the loss.
    Source: C. Wang et al., "Picking Winning Tickets Before Training by Preserving Gradient Flow", ICLR 2020, equation 8.

    Args:
        weight: of any shape and framework.
        hessian_gradient: the product of the loss's Hessian and its gradient, of the weight's shape.

    Raises:
        ValueError: if the shapes differ.
        TypeError: if one is not an array of real numbers.

    >>> grasp([2.0, -1.0], [1.0, 6.0])
    array([ 2., -6.])
    """
    return _product(weight, hessian_gradient, "hessian_gradient")


def synflow(weight: Any, gradient: Any) -> Scores:
    """Return ``|w · ∂R/∂w|``, R being the sum of the outputs of the network of absolute weights on an input of ones.

    Pruned in many rounds, each of which computes R anew, so that no layer loses all it has.
    Source: H. Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic flow",
    NeurIPS 2020, algorithm 1.

    Args:
        weight: of any shape and framework; its sign does not matter.
        gradient: that of R, of the weight's shape.

    Raises:
        ValueError: if the shapes differ.
        TypeError: if one is not an array of real numbers.

    >>> synflow([2.0, -1.0], [1.0, 6.0])
    array([2., 6.])
    """
    return np.abs(_product(weight, gradient, "gradient"))


def _half_square(weight: Any, curvature: Any, what: str) -> Scores:
    return np.asarray(_product(np.square(as_numpy(weight), dtype=np.float64), curvature, what) / 2)


def _product(weight: Any, factor: Any, what: str) -> Scores:
    first, second = as_numpy(weight), as_numpy(factor)
    if first.shape != second.shape:
        raise ValueError(f"{what} must have the weight's shape, {first.shape}; got {second.shape}")
    return np.asarray(np.multiply(first, second, dtype=np.float64))
