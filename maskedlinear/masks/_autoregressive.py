"""Masks of whole networks whose outputs may depend on some inputs only: autoregressive ones, and those of any graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from maskedlinear.masks._random import checked_seed, integer
from maskedlinear.masks._threefry import words

__all__ = ["autoregressive", "from_adjacency"]

Mask = NDArray[np.bool_]


def autoregressive(
    features: int,
    hidden: Sequence[int],
    *,
    multiplier: int = 1,
    order: ArrayLike | None = None,
    context: int = 0,
    degrees: Literal["cyclic", "random"] = "cyclic",
    seed: int = 0,
) -> list[Mask]:
    """Return the masks of a network whose outputs for feature i depend on the features before i only (MADE).

    The degrees of hidden nodes go round 1, 2, ..., features - 1, as in nflows, whose ``MADE`` has these masks too; with
    context round 0, 1, ..., features - 1, since what the first feature depends on is the context alone. Random degrees
    are the paper's: each is drawn from the smallest degree of the layer before to features - 1.
    Source: M. Germain et al., "MADE: Masked Autoencoder for Distribution Estimation", ICML 2015.

    Args:
        features: the number of features, from 1 on.
        hidden: the sizes of the hidden layers, from the input on; none is a single layer.
        multiplier: the outputs for each feature; those of one feature stand together.
        order: shape ``(features,)``: the place of each feature, a permutation of 0, 1, ...; ascending if ``None``.
        context: further inputs, after the features, on which every output may depend, the first one's too, where a hidden
            layer is as wide as there are features.
        degrees: ``"cyclic"``, or ``"random"``: from this package's own generator, the same in every framework; another
            ``seed`` for each of the paper's many masks.
        seed: of random degrees, an integer in [0, 2⁶⁴).

    Returns:
        A boolean array ``(out, in)`` for each layer: ``len(hidden) + 1`` of them; the last has ``features * multiplier``
        outputs.

    Raises:
        ValueError: if a size is not positive, ``order`` is not a permutation, or ``degrees`` is neither of the two.
        TypeError: if a size is not an integer.
    """
    count, sizes = _sizes("features", features, hidden)
    if integer("multiplier", multiplier) < 1 or integer("context", context) < 0:
        raise ValueError(f"multiplier must be 1 or more and context 0 or more; got {multiplier} and {context}")
    places = np.arange(count) if order is None else np.asarray(order)
    if places.shape != (count,) or sorted(places.tolist()) != list(range(count)):
        raise ValueError(f"order must be a permutation of 0 to {count - 1}; got {order!r}")
    if degrees not in ("cyclic", "random"):
        raise ValueError(f"degrees must be 'cyclic' or 'random'; got {degrees!r}")
    before = np.concatenate([places + 1, np.zeros(context, np.int64)])
    masks, drawn = [], 0
    for size in sizes:
        if degrees == "random":
            least = min(int(before.min()), count - 1)
            own = _below(count - least, size, checked_seed(seed), drawn) + least
            drawn += size
        else:
            own = np.arange(size) % count if context else np.arange(size) % max(1, count - 1) + min(1, count - 1)
        masks.append(own[:, None] >= before)
        before = own
    masks.append(np.repeat(places + 1, multiplier)[:, None] > before)
    return masks


def _below(limit: int, size: int, seed: int, start: int) -> NDArray[np.int64]:
    """Return ``size`` numbers from 0 to ``limit - 1``, each of a word of the generator, from the word ``start`` on."""
    drawn = words(seed, start, start + size).astype(np.uint64)
    return (drawn * np.uint64(limit) >> np.uint64(32)).astype(np.int64)


def from_adjacency(adjacency: Any, hidden: Sequence[int], *, residual: bool = False) -> list[Mask]:
    """Return the masks of a network whose output j depends on input i if and only if ``adjacency[j, i]``.

    A hidden node stands for a set of inputs that some output depends on, and receives what stands for its subsets; the
    nodes of a layer go round the sets. These are the masks of zuko's ``MaskedMLP``. Where a layer is narrower than there
    are sets, some dependencies of ``adjacency`` are lost; none is added.

    Args:
        adjacency: shape ``(out, in)``, booleans or 0s and 1s.
        hidden: the sizes of the hidden layers, from the input on.
        residual: whether a residual block of two layers follows each hidden layer, as in zuko's
            ``MaskedMLP(residual=True)``.

    Returns:
        A boolean array ``(out, in)`` for each layer, in the order in which they act: ``len(hidden) + 1`` of them. With
        ``residual``, each hidden layer's is followed by two of shape ``(size, size)``, of its block; a hidden layer after
        the first that is as wide as the one before it has none of its own, its block alone.

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
    for place, size in enumerate(sizes):
        reachable = np.flatnonzero(mask.any(axis=1))
        chosen = reachable[np.arange(size) % len(reachable)]
        if not (residual and place and sizes[place - 1] == size):
            masks.append(mask[chosen])
        mask = within[:, chosen]
        if residual:
            masks += [mask[chosen], mask[chosen].copy()]
    masks.append(mask[of_output.reshape(-1)])
    return masks


def _sizes(name: str, inputs: int, hidden: Sequence[int]) -> tuple[int, list[int]]:
    count, sizes = integer(name, inputs), [integer("a hidden layer's size", size) for size in hidden]
    if min(count, *sizes, 1) < 1:
        raise ValueError(f"{name} and hidden layers must have sizes from 1 on; got {inputs} and {list(hidden)}")
    return count, sizes
