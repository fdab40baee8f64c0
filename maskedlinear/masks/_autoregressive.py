"""Masks of whole networks whose outputs may depend on some inputs only: autoregressive ones, and those of any graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from maskedlinear.masks._random import integer

__all__ = ["autoregressive", "from_adjacency"]

Mask = NDArray[np.bool_]


def autoregressive(
    features: int,
    hidden: Sequence[int],
    *,
    multiplier: int = 1,
    order: ArrayLike | None = None,
    context: int = 0,
) -> list[Mask]:
    """Return the masks of a network whose outputs for feature i depend on the features before i only (MADE).

    The degrees of hidden nodes go round 1, 2, ..., features - 1, as in nflows, whose ``MADE`` has these masks too; with
    context round 0, 1, ..., features - 1, since what the first feature depends on is the context alone.
    Source: M. Germain et al., "MADE: Masked Autoencoder for Distribution Estimation", ICML 2015.

    Args:
        features: the number of features, from 1 on.
        hidden: the sizes of the hidden layers, from the input on; none is a single layer.
        multiplier: the outputs for each feature; those of one feature stand together.
        order: shape ``(features,)``: the place of each feature, a permutation of 0, 1, ...; ascending if ``None``.
        context: further inputs, after the features, on which every output may depend, the first one's too, where a hidden
            layer is as wide as there are features.

    Returns:
        A boolean array ``(out, in)`` for each layer: ``len(hidden) + 1`` of them; the last has ``features * multiplier``
        outputs.

    Raises:
        ValueError: if a size is not positive, or ``order`` is not a permutation.
        TypeError: if a size is not an integer.
    """
    count, sizes = _sizes("features", features, hidden)
    if integer("multiplier", multiplier) < 1 or integer("context", context) < 0:
        raise ValueError(f"multiplier must be 1 or more and context 0 or more; got {multiplier} and {context}")
    places = np.arange(count) if order is None else np.asarray(order)
    if places.shape != (count,) or sorted(places.tolist()) != list(range(count)):
        raise ValueError(f"order must be a permutation of 0 to {count - 1}; got {order!r}")
    degrees = np.concatenate([places + 1, np.zeros(context, np.int64)])
    masks = []
    for size in sizes:
        own = np.arange(size) % count if context else np.arange(size) % max(1, count - 1) + min(1, count - 1)
        masks.append(own[:, None] >= degrees)
        degrees = own
    masks.append(np.repeat(places + 1, multiplier)[:, None] > degrees)
    return masks


def from_adjacency(adjacency: Any, hidden: Sequence[int]) -> list[Mask]:
    """Return the masks of a network whose output j depends on input i if and only if ``adjacency[j, i]``.

    A hidden node stands for a set of inputs that some output depends on, and receives what stands for its subsets; the
    nodes of a layer go round the sets. These are the masks of zuko's ``MaskedMLP``. Where a layer is narrower than there
    are sets, some dependencies of ``adjacency`` are lost; none is added.

    Args:
        adjacency: shape ``(out, in)``, booleans or 0s and 1s.
        hidden: the sizes of the hidden layers, from the input on.

    Returns:
        A boolean array ``(out, in)`` for each layer: ``len(hidden) + 1`` of them.

    Raises:
        ValueError: if ``adjacency`` is no matrix of 0s and 1s, or has none; or if a size is not positive.
        TypeError: if a size is not an integer.
    """
    given = np.asarray(adjacency)
    if given.ndim != 2 or not ((given == 0) | (given == 1)).all() or not given.any():
        raise ValueError(f"adjacency must be a matrix (out, in) of 0s and 1s, some of them 1; got shape {given.shape}")
    _, sizes = _sizes("inputs", given.shape[1], hidden)
    sets, of_output = np.unique(given.astype(bool), axis=0, return_inverse=True)
    counts = sets.astype(np.int64)
    within = counts @ counts.T == counts.sum(1)  # [j, i]: the set i is part of the set j
    mask, masks = sets, []
    for size in sizes:
        reachable = np.flatnonzero(mask.any(axis=1))
        chosen = reachable[np.arange(size) % len(reachable)]
        masks.append(mask[chosen])
        mask = within[:, chosen]
    masks.append(mask[of_output.reshape(-1)])
    return masks


def _sizes(name: str, inputs: int, hidden: Sequence[int]) -> tuple[int, list[int]]:
    count, sizes = integer(name, inputs), [integer("a hidden layer's size", size) for size in hidden]
    if min(count, *sizes, 1) < 1:
        raise ValueError(f"{name} and hidden layers must have sizes from 1 on; got {inputs} and {list(hidden)}")
    return count, sizes
