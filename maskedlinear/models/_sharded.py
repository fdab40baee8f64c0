"""``prune_shards`` and ``regrow_shards``: weights that are cut over processes, pruned and regrown where they are.

The masks are those that one process makes of the whole weights, bit for bit. A framework says which entries of a weight a
process has, and how processes add up whole numbers; nobody puts a weight together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from maskedlinear import pruning
from maskedlinear._arrays import as_numpy
from maskedlinear._progress import Progress
from maskedlinear.masks._threefry import words_at
from maskedlinear.models._axes import WeightAxes
from maskedlinear.models._prune import amount_of, refuse_unknown
from maskedlinear.pruning import _scores
from maskedlinear.pruning._layers import Score, check_score, gradient_error, layer_seed
from maskedlinear.pruning._select import AddUp
from maskedlinear.pruning._together import Matrix, Part, PartAxis, places_of, prune_together, regrow_together

__all__ = ["AddUp", "Shard", "ShardedWeight", "count_live", "prune_shards", "regrow_shards"]

Mask = NDArray[np.bool_]
Scorer = Callable[[int, int], NDArray[Any]]


class Shard(NamedTuple):
    """Some entries of a weight that a process has; arrays have their shape, of any framework.

    Attributes:
        places: for each axis of the weight, which of its own are here, each shape ``(n,)``.
        mask: of these entries, NumPy's.
        weight: their values.
        gradient: theirs, if there is one: for scores that need it, and for growth.
        scores: theirs, where scores are given.
        counts: whether this process counts these entries; of processes that have the same ones, one does.
    """

    places: Sequence[NDArray[np.int64]]
    mask: Mask
    weight: Any = None
    gradient: Any = None
    scores: Any = None
    counts: bool = True


class ShardedWeight(NamedTuple):
    """A masked weight: its axes if they are known, the shape of the whole, and what this process has of it."""

    axes: WeightAxes | None
    shape: tuple[int, ...]
    shards: Sequence[Shard]
    dtype: Any = np.float32  # NumPy's, of the values, or of given scores; the same in all processes


def prune_shards(
    weights: Mapping[str, ShardedWeight],
    sparsity: float,
    *,
    add_up: AddUp,
    score: Score | None = "magnitude",
    scope: pruning.Scope = "global",
    block: tuple[int, int] | None = None,
    seed: int = 0,
    on_empty: pruning.OnEmpty = "raise",
    keep_at_least: Mapping[str, int] | None = None,
    num_zeros: int | None = None,
    progress: Progress = False,
) -> dict[str, list[Mask]]:
    """Return the masks of shards, by the weight's name: of the masks that :func:`prune_weights` returns the same parts.

    Every process calls this, with the same arguments but its own shards. For blocks the scores of one whole matrix after
    the other are put together; and so for ``keep_at_least`` of rows, where some process has parts of rows only.

    Args:
        weights: by name, in the order of the model.
        sparsity: as :func:`prune_weights` takes it, and so the rest.
        add_up: returns the sum of a NumPy array of int64 over all processes, of the same shape.
        score: the name of a score; ``None`` where shards have scores.
        scope: as above.
        block: as above.
        seed: as above.
        on_empty: as above.
        keep_at_least: as above.
        num_zeros: as above.
        progress: as above.

    Raises:
        ValueError: as by :func:`prune_weights`, in all processes.
    """
    if score is not None:
        check_score(score)
    if block is not None or scope in ("erdos_renyi", "row") or "row" in (keep_at_least or {}):
        refuse_unknown([name for name, weight in weights.items() if weight.axes is None])
    if score in ("snip", "taylor"):
        lacking = {name: any(shard.gradient is None for shard in weight.shards) for name, weight in weights.items()}
        for name, number in zip(lacking, add_up(np.array(list(lacking.values()), np.int64)), strict=True):
            if number:
                raise gradient_error(score, name)
    split = {name: _Split(weight) for name, weight in weights.items()}
    matrices: dict[str, Matrix] = {}
    sums: dict[str, int] = {}
    for name, one in split.items():
        by_product = score in ("random", "snip", "taylor")
        for number in range(one.stacked):
            own = layer_seed(seed, len(matrices)) if score == "random" else 0
            key = name if one.stacked == 1 else f"{name}[{number}]"
            if scope == "erdos_renyi" and (axes := weights[name].axes) is not None:
                sums[key] = axes.sum_of_sizes(weights[name].shape)
            matrices[key] = one.matrix(number, partial(_scorer, score, own), np.float64 if by_product else None)
    prune_together(
        matrices,
        **amount_of(sparsity, num_zeros, sum(math.prod(weight.shape) for weight in weights.values()), scope),
        scope=scope,
        block=block,
        on_empty=on_empty,
        keep_at_least=keep_at_least,
        progress=progress,
        add_up=add_up,
        sums_of_sizes=sums or None,
    )
    return {name: one.masks() for name, one in split.items()}


def regrow_shards(
    weight: ShardedWeight,
    fraction: float,
    *,
    add_up: AddUp,
    by_gradient: bool,
    seed: int = 0,
    exclude_dropped: bool = False,
) -> tuple[list[Mask], int]:
    """Return the new masks of a weight's shards, each of whose matrices moves a fraction of its connections, and the number
    of matrices: what :func:`regrow_weight` does with the whole.

    Every process calls this. Growth at random in a weight of which less than a quarter are candidates puts its mask
    together, one bit an entry.

    Args:
        weight: with gradients in its shards, where growth is by them.
        fraction: as :func:`maskedlinear.pruning.regrow` takes it.
        add_up: as in :func:`prune_shards`.
        by_gradient: whether it grows where the gradient is largest; or at random.
        seed: of the random places; matrix i takes ``seed + i``.
        exclude_dropped: as :func:`maskedlinear.pruning.regrow` takes it.

    Raises:
        ValueError: as by :func:`maskedlinear.pruning.regrow`, in all processes.
    """
    split = _Split(weight)
    for number in range(split.stacked):
        matrix = split.matrix(number, partial(_scorer, "magnitude", 0), None)
        gradients = [_magnitudes(one.gradient) for one in split.flat(number)] if by_gradient else None
        options: Any = {"seed": layer_seed(seed, number), "exclude_dropped": exclude_dropped, "add_up": add_up}
        regrow_together(matrix, fraction, gradients, **options)
    return split.masks(), split.stacked


def count_live(weight: ShardedWeight, *, add_up: AddUp) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return how many live connections each output and each input of a weight's matrices has: shapes ``(stacked, out)`` and
    ``(stacked, in)``. Every process calls this."""
    split = _Split(weight)
    matrices = [split.matrix(number, partial(_scorer, "magnitude", 0), None) for number in range(split.stacked)]
    out, in_ = split.shape
    outputs, inputs = np.zeros((split.stacked, out), np.int64), np.zeros((split.stacked, in_), np.int64)
    for number, matrix in enumerate(matrices):
        for part in matrix.counted:
            for start, stop in part.blocks():
                rows, columns = np.divmod(part.places(start + np.flatnonzero(part.mask[start:stop])), max(in_, 1))
                outputs[number] += np.bincount(rows, minlength=out)
                inputs[number] += np.bincount(columns, minlength=in_)
    return add_up(outputs), add_up(inputs)


class _Flat(NamedTuple):
    """The entries of one matrix in a shard, flat."""

    mask: Mask
    weight: Any
    gradient: Any
    scores: Any
    axes: Sequence[PartAxis]
    counts: bool


class _Split:
    """A weight's shards as parts of its matrices, with masks of their own."""

    def __init__(self, weight: ShardedWeight) -> None:
        axes = weight.axes or WeightAxes.of_entries(len(weight.shape))
        self._weight, (self._stack, out, in_) = weight, axes.order(len(weight.shape))
        self.stacked, *shape = axes.matrix_shape(weight.shape)
        self.shape = shape[0], shape[1]
        self._strides = _strides(weight.shape, (*out, *in_)) | _strides(weight.shape, self._stack)
        # Stacks first, and in each matrix the entries as they lie.
        rest = [axis for axis in range(len(weight.shape)) if axis not in self._stack]
        self._order = [*self._stack, *rest]
        self._axes = rest
        self._masks = [np.ascontiguousarray(shard.mask.transpose(self._order)).copy() for shard in weight.shards]
        self._flat: dict[int, list[_Flat]] = {}
        for shard, mask in zip(weight.shards, self._masks, strict=True):
            lengths = tuple(len(places) for places in shard.places)
            if shard.mask.shape != lengths:
                raise ValueError(f"a shard has a mask of all its places, shape {lengths}; got shape {shard.mask.shape}")
            self._divide(shard, mask)

    def _divide(self, shard: Shard, mask: Mask) -> None:
        numbers = np.zeros([1] * len(self._stack), np.int64)
        for place, axis in enumerate(self._stack):
            shape = [-1 if other == place else 1 for other in range(len(self._stack))]
            numbers = numbers + (shard.places[axis] * self._strides[axis]).reshape(shape)
        axes = [PartAxis(np.asarray(shard.places[a]), self._strides[a], self._weight.shape[a]) for a in self._axes]
        rows = numbers.size, math.prod(len(axis.places) for axis in axes)
        arrays = [self._rows(array, rows) for array in (shard.weight, shard.gradient, shard.scores)]
        for place, number in enumerate(numbers.reshape(-1).tolist()):
            own = [None if array is None else array[place] for array in arrays]
            flat = _Flat(mask.reshape(rows)[place], own[0], own[1], own[2], axes, shard.counts)
            self._flat.setdefault(number, []).append(flat)

    def _rows(self, array: Any, rows: tuple[int, int]) -> Any:
        if array is None:
            return None
        if self._order != list(range(len(self._order))):
            array = as_numpy(array).transpose(self._order)
        return array.reshape(rows)

    def flat(self, number: int) -> list[_Flat]:
        """Return what this process has of a matrix."""
        return self._flat.get(number, [])

    def matrix(self, number: int, scorer: Callable[[_Flat], Scorer], dtype: Any) -> Matrix:
        """Return what this process has of a matrix, with its scores; of ``dtype``, if not of the weight's."""
        parts = [Part(flat.mask, scorer(flat), flat.axes, flat.counts) for flat in self.flat(number)]
        return Matrix(self.shape, parts, np.dtype(self._weight.dtype if dtype is None else dtype))

    def masks(self) -> list[Mask]:
        """Return the masks of the shards as they stand, of the shards' shapes."""
        return [mask.transpose(np.argsort(self._order)) for mask in self._masks]


def _scorer(score: str | None, seed: int, flat: _Flat) -> Scorer:
    """Return what makes the scores of entries, from one to before another."""
    if score is None:
        return lambda start, stop: as_numpy(flat.scores[start:stop])
    if score == "magnitude":
        return _magnitudes(flat.weight)
    if score == "random":
        axes = flat.axes
        return lambda start, stop: words_at(seed, places_of(axes, np.arange(start, stop))) / np.float64(1 << 32)
    product = _scores.snip if score == "snip" else _scores.taylor
    return lambda start, stop: product(flat.weight[start:stop], flat.gradient[start:stop])


def _magnitudes(array: Any) -> Scorer:
    return lambda start, stop: _scores.magnitude(array[start:stop])


def _strides(shape: Sequence[int], order: Sequence[int]) -> dict[int, int]:
    """Return how far apart neighbours of each axis are, where these axes follow each other in this order."""
    return {axis: math.prod(shape[later] for later in order[place + 1 :]) for place, axis in enumerate(order)}
