"""Weights that are cut over processes are pruned and regrown as whole ones are: processes are threads here."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from maskedlinear.models import (
    Prunable,
    Shard,
    ShardedWeight,
    WeightAxes,
    prune_shards,
    prune_weights,
    regrow_shards,
    regrow_weight,
)
from maskedlinear.pruning import _together

MATRIX, TURNED = WeightAxes(), WeightAxes(out_axis=1, in_axis=0)
EXPERTS, LAST_STACK = WeightAxes(batch_axis=0, out_axis=1, in_axis=2), WeightAxes(batch_axis=2, out_axis=1, in_axis=0)
CONVOLUTION = WeightAxes(out_axis=0, in_axis=(1, 2), window_axis=2)
SHAPES = {
    "a": (MATRIX, (12, 10)),
    "b": (TURNED, (8, 6)),
    "c": (EXPERTS, (3, 4, 6)),
    "d": (LAST_STACK, (6, 4, 2)),
    "e": (CONVOLUTION, (6, 2, 4)),
    "f": (MATRIX, (1, 3)),
}
Together = Callable[[Callable[[int, Any], Any]], list[Any]]


def together(size: int, act: Callable[[int, Any], Any]) -> list[Any]:
    """Run ``act(rank, add_up)`` in threads that stand for processes; they must ask for as many sums, of the same shapes."""
    barrier, given = threading.Barrier(size, timeout=20), [np.zeros(0, np.int64)] * size

    def add_up_as(rank: int) -> Any:
        def add_up(numbers: Any) -> Any:
            assert numbers.dtype == np.int64
            given[rank] = numbers
            barrier.wait()
            assert len({one.shape for one in given}) == 1
            total = np.sum(given, axis=0)
            barrier.wait()
            return total

        return add_up

    def run(rank: int) -> Any:
        try:
            return act(rank, add_up_as(rank))
        except BaseException as error:
            if not isinstance(error, ValueError):
                barrier.abort()
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


def cuts(rng: np.random.Generator, shape: tuple[int, ...], size: int) -> list[tuple[list[Any], bool]]:
    """Return for each process the places that it has of each axis, and whether it counts them: cut along up to two axes, by
    parts that interleave too, or the same ones for two processes."""
    every = [np.arange(n) for n in shape]
    axis = int(rng.integers(len(shape)))
    if rng.random() < 0.3 and size % 2 == 0:  # replicas
        halves = np.array_split(rng.permutation(shape[axis]), size // 2)
        return [
            ([np.sort(halves[r // 2]) if a == axis else e for a, e in enumerate(every)], r % 2 == 0)
            for r in range(size)
        ]
    if rng.random() < 0.5 and size == 4 and len(shape) > 1:
        other = (axis + 1) % len(shape)
        one, two = np.array_split(every[axis], 2), np.array_split(every[other], 2)
        return [
            ([one[r % 2] if a == axis else two[r // 2] if a == other else e for a, e in enumerate(every)], True)
            for r in range(size)
        ]
    parts = np.array_split(rng.permutation(shape[axis]) if rng.random() < 0.5 else every[axis], size)
    return [([np.sort(parts[r]) if a == axis else e for a, e in enumerate(every)], True) for r in range(size)]


def problem(seed: int, size: int, *, ties: bool) -> tuple[dict[str, Prunable], dict[str, Any], list[Any]]:
    """Return whole weights, their scores, and for each process its shards of them."""
    rng = np.random.default_rng(seed)
    wholes, scores = {}, {}
    shards: list[dict[str, ShardedWeight]] = [{} for _ in range(size)]
    for name, (axes, shape) in SHAPES.items():
        dtype = rng.choice([np.float32, np.float64])
        values = [rng.standard_normal(shape) for _ in range(3)]
        if ties:
            values = [np.round(array) for array in values]
        weight, gradient, score = (array.astype(dtype) for array in values)
        mask = rng.random(shape) < 0.8
        wholes[name], scores[name] = Prunable(axes, weight, gradient, mask), score
        for rank, (index, counts) in enumerate(cuts(rng, shape, size)):
            box = np.ix_(*index)
            own = Shard(index, mask[box], weight[box], gradient[box], score[box], counts)
            shards[rank][name] = ShardedWeight(axes, shape, [own], dtype)
    return wholes, scores, shards


def check(found: list[Any], shards: list[Any], masks: dict[str, Any]) -> None:
    for own, weights in zip(found, shards, strict=True):
        assert isinstance(own, dict), own
        for name, weight in weights.items():
            for mask, shard in zip(own[name], weight.shards, strict=True):
                np.testing.assert_array_equal(mask, masks[name][np.ix_(*shard.places)])


HOW: list[dict[str, Any]] = [
    {"score": "magnitude"},
    {"score": "random", "seed": 3},
    {"score": "snip"},
    {"score": "taylor", "scope": "layer", "on_empty": "keep"},
    {"score": None},
    {"score": "magnitude", "scope": "erdos_renyi", "on_empty": "allow"},
    {"score": "magnitude", "on_empty": "keep"},
    {"score": "magnitude", "keep_at_least": {"layer": 3}},
    {"score": "snip", "keep_at_least": {"row": 1, "layer": 2}},
    {"score": "magnitude", "num_zeros": 200, "on_empty": "allow"},
]


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("size", [4])
def test_weights_in_parts_are_pruned_as_whole_ones(how: Any, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_together, "_BLOCK", 17)
    for seed in range(2):
        wholes, scores, shards = problem(seed, size, ties=seed > 0)
        score = scores if how["score"] is None else how["score"]
        how = {"on_empty": "allow", **how}
        masks = prune_weights(wholes, 0.55, **{**how, "score": score})
        check(together(size, lambda r, add_up: prune_shards(shards[r], 0.55, add_up=add_up, **how)), shards, masks)  # noqa: B023


def test_blocks_of_weights_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_together, "_BLOCK", 17)
    wholes, _, shards = problem(0, 4, ties=False)
    for name in ("c", "d", "e", "f"):
        wholes.pop(name)
    for name, whole in wholes.items():
        whole.mask[...] = True
        for rank in range(4):
            weight = shards[rank][name]
            for shard in weight.shards:
                shard.mask[...] = True
    shards = [{name: own[name] for name in wholes} for own in shards]
    masks = prune_weights(wholes, 0.5, block=(2, 2))
    found = together(4, lambda r, add_up: prune_shards(shards[r], 0.5, block=(2, 2), add_up=add_up))
    check(found, shards, masks)
    assert not masks["a"].all()


@pytest.mark.parametrize("by_gradient", [True, False])
@pytest.mark.parametrize("size", [4])
@pytest.mark.parametrize("sparsity", [0.1, 0.7])
def test_weights_in_parts_move_their_connections_as_whole_ones(
    by_gradient: bool, size: int, sparsity: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_together, "_BLOCK", 17)
    rng = np.random.default_rng(0)
    for seed in range(2):
        wholes, _, shards = problem(seed, size, ties=seed > 0)
        for name, whole in wholes.items():
            mask = rng.random(whole.mask.shape) >= sparsity
            whole.mask[...] = mask
            for rank in range(size):
                for shard in shards[rank][name].shards:
                    shard.mask[...] = mask[np.ix_(*shard.places)]
        masks, exclude = {}, seed > 0
        for name, whole in wholes.items():
            gradient = np.concatenate([*whole.axes.matrices(whole.gradient)])
            rows = (lambda start, stop, g=gradient: g[start:stop]) if by_gradient else None
            masks[name], number = regrow_weight(whole.axes, whole.mask, whole.weight, 0.4, rows, 5, exclude)
            assert number == whole.axes.matrix_shape(whole.mask.shape)[0]

        def act(rank: int, add_up: Any) -> Any:
            moved = {
                name: regrow_shards(
                    weight,
                    0.4,
                    add_up=add_up,
                    by_gradient=by_gradient,
                    seed=5,
                    exclude_dropped=exclude,  # noqa: B023
                )
                for name, weight in shards[rank].items()  # noqa: B023
            }
            return {name: found for name, (found, _) in moved.items()}

        check(together(size, act), shards, masks)


def test_errors_are_those_of_the_whole_in_every_process() -> None:
    wholes, _, shards = problem(0, 4, ties=False)
    for what, how in (
        ("pruning only removes connections", {"sparsity": 0.01}),
        ("a layer must keep a connection; all would be gone of a, b", {"sparsity": 1.0}),
        ("keep_at_least=", {"sparsity": 0.9, "keep_at_least": {"layer": 20}}),
        ("score must be one of", {"sparsity": 0.5, "score": "best"}),
    ):
        errors = together(4, lambda r, add_up: prune_shards(shards[r], add_up=add_up, **how))  # noqa: B023
        with pytest.raises(ValueError, match=what) as info:
            prune_weights(wholes, **how)
        assert [str(error) for error in errors] == [str(info.value)] * 4
    wholes["b"].weight[5, 1] = np.nan
    wholes["b"].gradient[2, 2] = np.nan
    wholes["b"].mask[5, 1] = True
    for rank in range(4):
        for shard in shards[rank]["b"].shards:
            box = np.ix_(*shard.places)
            shard.weight[...], shard.gradient[...], shard.mask[...] = (
                wholes["b"].weight[box],
                wholes["b"].gradient[box],
                wholes["b"].mask[box],
            )
    errors = together(4, lambda r, add_up: prune_shards(shards[r], 0.5, add_up=add_up))
    assert [str(error) for error in errors] == ["scores must be numbers; got NaN at (1, 5) of b"] * 4
    errors = together(4, lambda r, add_up: regrow_shards(shards[r]["b"], 0.5, add_up=add_up, by_gradient=True))
    assert [str(error) for error in errors] == ["a live weight must be a number; got NaN at (1, 5)"] * 4
