"""How much each connection matters: the higher the score, the later it is pruned."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskedlinear._arrays import as_numpy
from maskedlinear.masks._random import checked_seed
from maskedlinear.masks._threefry import words

__all__ = ["magnitude", "movement", "random_scores", "snip", "taylor"]


def magnitude(weight: Any) -> NDArray[Any]:
    """Return ``|w|``, of the weight's shape.

    Source: S. Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015.

    Args:
        weight: an array of any shape and framework.

    Raises:
        TypeError: if it is not an array of real numbers.
    """
    return np.asarray(np.abs(as_numpy(weight)))


def taylor(weight: Any, gradient: Any) -> NDArray[np.float64]:
    """Return ``(w · dL/dw)²``, the square of how much the loss changes, to first order, if the connection goes.

    Source: P. Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, equation 8.

    Args:
        weight: an array of any shape and framework.
        gradient: the loss's gradient, of the same shape.

    Raises:
        ValueError: if the shapes differ.
        TypeError: if one is not an array of real numbers.
    """
    return np.asarray(np.square(_product(weight, gradient)))


def snip(weight: Any, gradient: Any) -> NDArray[np.float64]:
    """Return ``|w · dL/dw|``, the sensitivity of the loss to the connection, before training.

    The paper divides by the sum over the whole network, which changes no order and is left out. The gradient must be that of
    the unpruned network: it is 0 where a mask is.
    Source: N. Lee et al., "SNIP: Single-shot Network Pruning based on Connection Sensitivity", ICLR 2019.

    Args:
        weight: an array of any shape and framework.
        gradient: the loss's gradient, of the same shape.

    Raises:
        ValueError: if the shapes differ.
        TypeError: if one is not an array of real numbers.
    """
    return np.abs(_product(weight, gradient))


def movement(weight: Any, gradient: Any, before: Any = None) -> NDArray[np.float64]:
    """Return ``before - w · dL/dw``: high where training moves the weight away from 0; signed.

    Source: V. Sanh et al., "Movement Pruning: Adaptive Sparsity by Fine-Tuning", NeurIPS 2020, equation 5, without the
    learning rate.

    Args:
        weight: an array of any shape and framework.
        gradient: the loss's gradient at this step, of the same shape.
        before: the scores of the step before; none at the first.

    Raises:
        ValueError: if the shapes differ.
        TypeError: if one is not an array of real numbers.
    """
    moved = -_product(weight, gradient)
    if before is None:
        return moved
    earlier = as_numpy(before)
    if earlier.shape != moved.shape:
        raise ValueError(f"the scores before must have the weight's shape, {moved.shape}; got {earlier.shape}")
    return np.asarray(earlier, np.float64) + moved


def random_scores(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.float64]:
    """Return scores in [0, 1) that are the words of ``mask_v1``: pruning by them is :func:`maskedlinear.masks.random`.

    Args:
        shape: any shape.
        seed: an integer in [0, 2⁶⁴).
    """
    drawn = words(checked_seed(seed), 0, int(np.prod(shape, dtype=np.int64)))
    scores: NDArray[np.float64] = drawn / np.float64(1 << 32)
    return scores.reshape(shape)


def _product(weight: Any, gradient: Any) -> NDArray[np.float64]:
    one, other = as_numpy(weight), as_numpy(gradient)
    if one.shape != other.shape:
        raise ValueError(f"a gradient must have its weight's shape, {one.shape}; got {other.shape}")
    return np.asarray(np.multiply(one, other, dtype=np.float64))
