"""``prune_weights``: weights of any axes pruned together, the same from every framework's arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from maskedlinear import pruning
from maskedlinear._arrays import as_numpy
from maskedlinear._progress import Progress
from maskedlinear.masks._random import checked_zeros
from maskedlinear.models._axes import WeightAxes
from maskedlinear.models._summary import ModelSummary, first_names
from maskedlinear.pruning._edges import prune_matrices
from maskedlinear.pruning._layers import Scoring, score_layers

__all__ = [
    "Of",
    "Prunable",
    "amount_of",
    "check_of",
    "count_masked",
    "prune_weights",
    "refuse_fixed",
    "refuse_unknown",
    "zeros_left",
]

Of = Literal["masked", "weights", "model"]
Mask = NDArray[np.bool_]


class Prunable(NamedTuple):
    """A masked weight: its axes if they are known, values, gradient if it has one, mask, and what is fixed; of one shape.

    ``sum_of_sizes`` is that of the kernel which a matrix is of, if it is of one.
    """

    axes: WeightAxes | None
    weight: Any
    gradient: Any
    mask: Mask
    fixed: Mask | None = None
    sum_of_sizes: int | None = None


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
    num_zeros: int | None = None,
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
        num_zeros: how many entries are masked afterwards, in all weights together, in place of ``sparsity``.
        progress: as above.

    Raises:
        ValueError: as by :func:`maskedlinear.pruning.prune`; if there are fewer entries than are to be masked; or if
            structure is asked for (blocks, rows, Erdős–Rényi) of a weight whose axes nobody knows; or if so many would go
            that fixed connections, which go last, were among them.
    """
    if block is not None or scope in ("erdos_renyi", "row") or "row" in (keep_at_least or {}):
        refuse_unknown([name for name, weight in weights.items() if weight.axes is None])
    if callable(score) or isinstance(score, Mapping):
        whole = score_layers(
            score, {n: w.weight for n, w in weights.items()}, {n: w.gradient for n, w in weights.items()}
        )
        scores = _matrices(weights, whole)
    else:
        values = _matrices(weights, {name: as_numpy(w.weight) for name, w in weights.items()})
        gradients = {name: as_numpy(w.gradient) for name, w in weights.items() if w.gradient is not None}
        scores = score_layers(score, values, _matrices(weights, gradients), seed)
    fixed = _matrices(weights, {name: w.fixed for name, w in weights.items() if w.fixed is not None})
    for name, places in fixed.items():
        highest = np.inf if scores[name].dtype.kind == "f" else np.iinfo(scores[name].dtype).max
        scores[name] = np.where(places, np.asarray(highest, scores[name].dtype), scores[name])
    pruned = prune_matrices(
        scores,
        **amount_of(sparsity, num_zeros, sum(w.mask.size for w in weights.values()), scope),
        masks=_matrices(weights, {name: w.mask for name, w in weights.items()}),
        scope=scope,
        block=block,
        on_empty=on_empty,
        keep_at_least=keep_at_least,
        progress=progress,
        sums_of_sizes=_sums_of_sizes(weights) if scope == "erdos_renyi" else None,
    )
    rest = iter(pruned.values())
    masks = {}
    for name, weight in weights.items():
        axes, shape = _axes(weight), weight.mask.shape
        parts = [next(rest) for _ in range(axes.matrix_shape(shape)[0])]
        masks[name] = axes.from_matrices(np.stack(parts), shape) if parts else np.ones(shape, bool)
        if weight.fixed is not None:
            refuse_fixed(name, int(np.count_nonzero(weight.fixed & ~masks[name])))
    return masks


def refuse_fixed(name: str, gone: int) -> None:
    """Raise a ``ValueError`` if so many fixed connections of a weight would be gone."""
    if gone:
        raise ValueError(
            f"fixed connections are never pruned or moved, and {gone} of {name or 'the layer'} would be: ask for less, free "
            "them by constrain(model, ...), or leave it out with include=..."
        )


def amount_of(sparsity: float, num_zeros: int | None, size: int, scope: pruning.Scope) -> dict[str, Any]:
    """Return how :func:`maskedlinear.pruning.prune` is told how many of ``size`` entries are masked afterwards.

    Raises:
        ValueError: if there are fewer.
    """
    if num_zeros is None:
        return {"sparsity": sparsity}
    if num_zeros > size:
        raise ValueError(
            f"{num_zeros} numbers cannot be masked, where {size} are in masked weights: ask for a smaller fraction, or "
            "mask more of the model"
        )
    return {"sparsity": num_zeros / size} if scope in ("layer", "row") else {"num_zeros": max(num_zeros, 0)}


def check_of(of: str) -> None:
    """Raise a ``ValueError`` if ``of``, what a sparsity is a fraction of, is none of the three."""
    if of not in get_args(Of):
        raise ValueError(f"of must be 'masked', 'weights' or 'model'; got {of!r}")


def zeros_left(table: ModelSummary, sparsity: float, of: Of, masked_here: int) -> int:
    """Return how many entries of the weights to prune are masked when a fraction of all weights, or of the model, is.

    Args:
        table: of the model.
        sparsity: the fraction, in [0, 1].
        of: what it is a fraction of: ``"weights"`` or ``"model"``.
        masked_here: how many entries of the weights to prune are masked so far.

    Raises:
        ValueError: if the fraction is out of its range.
    """
    size = sum(row.size for row in table.rows)
    size += sum(other.size for other in table.unmasked if of == "model" or other.is_weight)
    masked = sum(row.size - row.connections for row in table.rows)
    return checked_zeros(size, sparsity, None) - (masked - masked_here)


def count_masked(weights: Mapping[str, Prunable]) -> int:
    """Return how many entries of weights are masked."""
    return sum(int(np.count_nonzero(~weight.mask)) for weight in weights.values())


def refuse_unknown(names: Sequence[str]) -> None:
    """Raise a ``ValueError`` that names weights whose axes nobody knows, where structure is asked for."""
    if names:
        raise ValueError(
            "blocks, rows and Erdős–Rényi need to know which axes are inputs and outputs; nobody knows those of "
            f"{first_names(names)}: tell them (register_axes, axes=), or leave it out with include=..."
        )


def _axes(weight: Prunable) -> WeightAxes:
    """Return a weight's axes; of one that nobody knows, that each entry stands for itself."""
    return weight.axes or WeightAxes.of_entries(weight.mask.ndim)


def _sums_of_sizes(weights: Mapping[str, Prunable]) -> dict[str, int]:
    """Return in whose proportion ``"erdos_renyi"`` shares out, of each matrix."""
    sums: dict[str, int] = {}
    for name, weight in weights.items():
        axes, shape = _axes(weight), weight.mask.shape
        sums |= dict.fromkeys(_keys(name, axes.matrix_shape(shape)[0]), weight.sum_of_sizes or axes.sum_of_sizes(shape))
    return sums


def _keys(name: str, stacked: int) -> list[str]:
    """Return what the matrices of a weight are called: as it is, and by number where there are several."""
    return [name] if stacked == 1 else [f"{name}[{place}]" for place in range(stacked)]


def _matrices(weights: Mapping[str, Prunable], arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return the matrices of weights by name, and by number where there are several in a weight."""
    matrices: dict[str, NDArray[Any]] = {}
    for name, array in arrays.items():
        parts = _axes(weights[name]).matrices(array)
        matrices |= zip(_keys(name, len(parts)), parts, strict=True)
    return matrices
