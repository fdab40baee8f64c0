"""``prune_weights``: weights of any axes pruned together, the same from every framework's arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from maskedlinear import pruning
from maskedlinear._arrays import as_numpy
from maskedlinear._progress import Progress
from maskedlinear.masks._random import checked_zeros
from maskedlinear.models._axes import WeightAxes
from maskedlinear.pruning._layers import Scoring, score_layers

__all__ = ["Of", "Prunable", "keep_masks", "prune_weights"]

Of = Literal["masked", "weights", "model"]
Mask = NDArray[np.bool_]


class Prunable(NamedTuple):
    """A masked weight: its axes, values, gradient if it has one, and mask; all of one shape."""

    axes: WeightAxes
    weight: Any
    gradient: Any
    mask: Mask


def prune_weights(
    weights: Mapping[str, Prunable],
    sparsity: float,
    *,
    score: Scoring = "magnitude",
    scope: pruning.Scope = "global",
    block: tuple[int, int] | None = None,
    seed: int = 0,
    on_empty: pruning.OnEmpty = "raise",
    keep_at_least: Mapping[str, int] | None = None,
    fraction_of: int | None = None,
    progress: Progress = False,
) -> dict[str, Mask]:
    """Return the masks of weights, pruned further to a sparsity, by name.

    A weight counts as its matrices: each expert, each layer of a stack, is pruned as if it stood alone. Entries of equal
    scores go in the order of ``(weight, stack, output, input)``, whatever the order of a weight's axes.

    Args:
        weights: by name, in the order of the model.
        sparsity: the fraction of masked entries afterwards, in [0, 1].
        score: as :func:`maskedlinear.torch.prune_model` takes it; functions and scores are of a weight's own shape.
        scope: as :func:`maskedlinear.pruning.prune` takes it, and so ``block``, ``on_empty``, ``keep_at_least`` and
            ``progress``.
        block: as above.
        seed: of ``"random"``: matrix i takes ``seed + i``.
        on_empty: as above.
        keep_at_least: as above.
        fraction_of: how many numbers the sparsity is a fraction of; those of ``weights`` if ``None``.
        progress: as above.

    Raises:
        ValueError: as by :func:`maskedlinear.pruning.prune`, or if there are fewer entries than are to be masked.
    """
    if callable(score) or isinstance(score, Mapping):
        whole = score_layers(
            score, {n: w.weight for n, w in weights.items()}, {n: w.gradient for n, w in weights.items()}
        )
        scores = _matrices(weights, whole)
    else:
        values = _matrices(weights, {name: as_numpy(w.weight) for name, w in weights.items()})
        gradients = {name: as_numpy(w.gradient) for name, w in weights.items() if w.gradient is not None}
        scores = score_layers(score, values, _matrices(weights, gradients), seed)
    size = sum(w.mask.size for w in weights.values())
    amount: dict[str, Any] = {"sparsity": sparsity}
    if fraction_of is not None and fraction_of != size:
        zeros = checked_zeros(fraction_of, sparsity, None)
        if zeros > size:
            raise ValueError(
                f"{zeros} of {fraction_of} numbers cannot be masked, where {size} are in masked weights: ask for a smaller "
                "fraction, or mask more of the model"
            )
        amount = {"sparsity": zeros / size} if scope == "layer" else {"num_zeros": zeros}
    pruned = pruning.prune(
        scores,
        **amount,
        masks=_matrices(weights, {name: w.mask for name, w in weights.items()}),
        scope=scope,
        block=block,
        on_empty=on_empty,
        keep_at_least=keep_at_least,
        progress=progress,
    )
    return keep_masks(weights, pruned)


def keep_masks(weights: Mapping[str, Prunable], matrices: Mapping[str, Mask]) -> dict[str, Mask]:
    """Return the masks of whole weights, of those of their matrices."""
    masks, rest = {}, iter(matrices.values())
    for name, weight in weights.items():
        stacked = weight.axes.matrix_shape(weight.mask.shape)[0]
        parts = [next(rest) for _ in range(stacked)]
        whole = parts[0] if stacked == 1 else np.stack(parts) if parts else np.ones(weight.mask.shape, bool)
        masks[name] = weight.axes.from_matrices(whole, weight.mask.shape)
    return masks


def _matrices(weights: Mapping[str, Prunable], arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return the matrices of weights by name, and by number where there are several in a weight."""
    matrices = {}
    for name, array in arrays.items():
        parts = weights[name].axes.matrices(array)
        for place, matrix in enumerate(parts):
            matrices[name if len(parts) == 1 else f"{name}[{place}]"] = matrix
    return matrices
