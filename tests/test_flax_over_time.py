"""nnx models whose masks and connections change while they train, on both forms, with the optimizer's state."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from maskedlinear import masks
from maskedlinear.flax import (
    MaskedLinear,
    ScheduledPruning,
    ScheduledRegrowth,
    SparseLinear,
    compress,
    dense_gradients,
    get_masks,
    lottery_rounds,
    mask_model,
    param_masks,
    prune_model,
    regrow_model,
    rewind_model,
    summary,
)
from maskedlinear.jax import freeze_masked
from maskedlinear.pruning import CubicSchedule, GeometricSchedule, cosine_decay

X = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 12)), jnp.float32)


def network() -> nnx.Sequential:
    rngs = nnx.Rngs(0)
    return mask_model(nnx.Sequential(nnx.Linear(12, 20, rngs=rngs), nnx.tanh, nnx.Linear(20, 5, rngs=rngs)))


def loss(model: Any, x: jax.Array) -> jax.Array:
    return (model(x) ** 2).mean()


@nnx.jit
def step(model: Any, optimizer: Any, x: jax.Array) -> None:
    optimizer.update(model, nnx.grad(loss)(model, x), masks=param_masks(model))


def adam(model: Any) -> Any:
    return nnx.Optimizer(model, freeze_masked(optax.adam(0.01)), wrt=nnx.Param)


def both() -> tuple[Any, Any]:
    dense = network()
    prune_model(dense, 0.7, scope="layer")
    sparse = nnx.Sequential(*(SparseLinear.from_masked(p) if isinstance(p, MaskedLinear) else p for p in dense.layers))
    return dense, sparse


SLOW_WAYS = [("gradient", False), ("chance", True)]


def weights(model: Any) -> list[Any]:
    layers = [layer if isinstance(layer, MaskedLinear) else layer.to_masked() for layer in model.layers[::2]]
    return [np.asarray(layer.masked_kernel) for layer in layers]


@pytest.mark.parametrize(
    ("by", "jitted"), [("gradient", True), *(pytest.param(*how, marks=pytest.mark.slow) for how in SLOW_WAYS)]
)
def test_both_forms_move_alike_and_train_on_alike(by: str, jitted: bool) -> None:
    models = both()
    optimizers = [adam(model) for model in models]
    called = nnx.jit(loss) if jitted else loss
    for number in range(2):
        for model, optimizer in zip(models, optimizers, strict=True):
            step(model, optimizer, X)
            grown = dense_gradients(called, model, X) if by == "gradient" else None
            how: Any = {"optimizer": optimizer, "seed": number, "exclude_dropped": number == 0}
            moved = regrow_model(model, 0.4, gradients=grown, **how)
            assert moved == 28 + 12 if number == 0 else 0 < moved <= 28 + 12
        for one, other in zip(*map(weights, models), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
            np.testing.assert_array_equal(one != 0, other != 0)
    assert summary(models[0]).sparsity == summary(models[1]).sparsity == 0.7


def test_growth_is_by_the_gradient_of_all_weights_in_blocks() -> None:
    dense, sparse = both()
    whole, rows = dense_gradients(loss, dense, X), dense_gradients(loss, sparse, X)
    for name, gradient in whole.items():
        size = gradient.shape[1]
        parts = jnp.concatenate([rows[name](0, 3), rows[name](3, size)])  # type: ignore[operator]
        np.testing.assert_allclose(parts.T, gradient, rtol=1e-5, atol=1e-7)
    assert not vars(sparse.layers[0]).keys() & {"seen", "added"}
    assert type(sparse.layers[0]) is SparseLinear


def test_growth_through_a_layer_that_is_called_twice_and_beside_a_dense_one() -> None:
    class Twice(nnx.Module):
        def __init__(self, inner: Any, last: Any) -> None:
            self.inner, self.last = inner, last

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.last(self.inner(self.inner(x)))

    kernel = MaskedLinear(12, 12, mask=masks.random((12, 12), sparsity=0.5, seed=1), rngs=nnx.Rngs(0))
    last = MaskedLinear(12, 2, mask=masks.random((12, 2), sparsity=0.5, seed=1), rngs=nnx.Rngs(1))
    one = dense_gradients(loss, Twice(kernel, last), X)
    other = dense_gradients(loss, Twice(SparseLinear.from_masked(kernel), last), X)
    np.testing.assert_allclose(other["inner"](0, 12).T, one["inner"], rtol=1e-5, atol=1e-7)  # type: ignore[operator]
    np.testing.assert_allclose(other["last"], one["last"], rtol=1e-5, atol=1e-7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the loss does not call inner"):
        dense_gradients(lambda model, x: model.last(x).sum(), Twice(SparseLinear.from_masked(kernel), last), X)


def test_a_moved_connections_state_starts_clean_and_the_others_keep_theirs() -> None:
    for model in both():
        optimizer = adam(model)
        for _ in range(3):
            step(model, optimizer, X)

        def moments(model: Any = model, optimizer: Any = optimizer) -> dict[tuple[int, int], float]:
            layer = model.layers[0]
            if isinstance(layer, MaskedLinear):
                moment = optimizer.opt_state.inner[0].mu["layers"][0]["kernel"][...]
                return {
                    (i, o): float(moment[i, o]) for i, o in zip(*np.nonzero(np.asarray(layer.mask[...])), strict=True)
                }
            moment = optimizer.opt_state.inner[0].mu["layers"][0]["weight_values"][...]
            pattern = layer.pattern
            return {(i, o): float(m) for i, o, m in zip(pattern.indices, pattern.rows, np.asarray(moment), strict=True)}

        before = moments()
        regrow_model(model, 0.4, optimizer=optimizer, include="layers.0", seed=1)
        after = moments()
        assert 0 < len(after.keys() - before.keys()) <= 28  # what is back at once is among those before
        assert any(before.values())
        assert after == {edge: before.get(edge, 0.0) for edge in after}


def test_no_gradient_of_the_sparse_layers_shape_is_made() -> None:
    size = 300_000  # a weight of 300,000 x 300,000 would take 360 GB
    edges = np.arange(200)
    layer = SparseLinear.from_edges(edges * 1499, edges * 7, (size, size), rngs=nnx.Rngs(0))
    x = jnp.zeros((1, size)).at[0, 5].set(1.0)
    gradients = dense_gradients(lambda layer, x: layer(x)[0, 250_000], layer, x)
    rows = gradients[""]
    assert not jnp.any(rows(0, 4))  # type: ignore[operator]
    block = rows(249_999, 250_003)  # type: ignore[operator]
    assert block.shape == (4, size)
    assert [int(part[0]) for part in jnp.nonzero(block)] == [1, 5]


def test_a_schedule_prunes_at_its_steps_and_goes_on_from_a_state() -> None:
    model, schedule = network(), CubicSchedule(0.8, begin=2, end=9, every=3)
    optimizer = adam(model)
    pruner = ScheduledPruning(model, schedule, scope="layer")
    done = []
    for number in range(12):
        step(model, optimizer, X)
        done.append(pruner.step())
        assert float(get_masks(model)["layers.0"].mean()) == pytest.approx(1 - schedule(number), abs=1 / 200)
        if number == 5:
            saved = pruner.state_dict()
            pruner = ScheduledPruning(model, schedule, scope="layer")
            pruner.load_state_dict(saved)
    assert [number for number, pruned in enumerate(done) if pruned] == schedule.steps()
    by_gradient = ScheduledPruning(
        model, CubicSchedule(0.9, begin=0, end=1, initial=0.85), score="snip", on_empty="allow"
    )
    assert by_gradient.step(gradients=nnx.grad(loss)(model, X))


def test_masks_that_a_guard_was_given_once_follow_pruning() -> None:
    model = mask_model(nnx.Sequential(nnx.LinearGeneral(12, (4, 5), rngs=nnx.Rngs(0))))

    @nnx.jit
    def train(model: Any, optimizer: Any) -> None:
        optimizer.update(model, nnx.grad(loss)(model, X))  # and nothing of masks, as TrainState's loop

    def drifts() -> bool:
        for _ in range(2):
            train(model, optimizer)
        return bool((model.layers[0].kernel[...] != 0)[~get_masks(model)["layers.0"]].any())

    def guarded() -> Any:
        return nnx.Optimizer(model, freeze_masked(optax.adamw(0.01), masks=param_masks(model)), wrt=nnx.Param)

    optimizer = guarded()
    assert not drifts()
    before = prune_model(model, 0.4, optimizer=optimizer)
    assert before["layers.0"].all()
    assert not drifts()
    pruner = ScheduledPruning(model, CubicSchedule(0.8, begin=0, end=1, initial=0.6), optimizer=optimizer)
    assert pruner.step()
    assert not drifts()
    prune_model(model, 0.9)
    assert drifts()
    with pytest.raises(TypeError, match=r"prune_model\(optimizer=\.\.\.\) changes an nnx module in place"):
        prune_model({"params": {}}, 0.5, optimizer=optimizer)


def test_rewinding_keeps_the_masks_and_brings_everything_else_back() -> None:
    model = network()
    saved = jax.tree.map(jnp.copy, nnx.state(model))
    start = np.asarray(model.layers[0].full_kernel)
    step(model, adam(model), X)
    prune_model(model, 0.5)
    kept = {name: np.asarray(mask) for name, mask in get_masks(model).items()}
    assert (model.layers[0].full_kernel != start).any()
    rewind_model(model, saved)
    np.testing.assert_array_equal(model.layers[0].full_kernel, start)
    np.testing.assert_array_equal(model.layers[0].kernel[...], np.where(kept["layers.0"], start, 0))
    for name, mask in get_masks(model).items():
        np.testing.assert_array_equal(mask, kept[name])
    plain = nnx.Sequential(nnx.Linear(12, 20, rngs=nnx.Rngs(1)), nnx.tanh, nnx.Linear(20, 5, rngs=nnx.Rngs(1)))
    rewind_model(model, nnx.state(plain))  # of a model that was not masked yet
    np.testing.assert_array_equal(model.layers[0].full_kernel, plain.layers[0].kernel[...])
    np.testing.assert_array_equal(model.layers[0].mask[...], kept["layers.0"])


def test_rounds_of_a_lottery_start_from_the_same_weights() -> None:
    model = network()
    start = np.asarray(model.layers[0].full_kernel)
    seen: list[float] = []
    told: list[float] = []
    before: dict[str, Any] = {}
    for sparsity in lottery_rounds(model, 0.8, rounds=3, scope="layer", progress=told.append):
        np.testing.assert_array_equal(model.layers[0].full_kernel, start)
        assert summary(model).sparsity == pytest.approx(sparsity, abs=0.01)
        now = get_masks(model)
        assert all((before[name] | ~mask).all() for name, mask in now.items() if before)  # what is gone stays gone
        before, seen = now, [*seen, sparsity]
        optimizer = adam(model)
        for _ in range(3):
            step(model, optimizer, X)
    assert seen == [GeometricSchedule(0.8, 3)(round) for round in range(4)]
    assert told == [0.25, 0.5, 0.75, 1]
    assert (model.layers[0].full_kernel != start).any()
    with pytest.raises(ValueError, match="rounds >= 1"):
        lottery_rounds(model, 0.8, rounds=0)


@pytest.mark.parametrize(
    ("form", "growth"),
    [
        ("dense", "gradient"),
        ("sparse", "random"),
        pytest.param("dense", "random", marks=pytest.mark.slow),
        pytest.param("sparse", "gradient", marks=pytest.mark.slow),
    ],
)
def test_connections_move_at_their_steps(growth: Any, form: Any) -> None:
    model = network()
    prune_model(model, 0.5, scope="layer")
    model = compress(model, form)
    optimizer = adam(model)
    regrowth = ScheduledRegrowth(model, optimizer, every=3, end=10, growth=growth, exclude_dropped=True)
    moved, asked = [], []

    def gradients() -> Any:
        asked.append(regrowth.steps)
        return dense_gradients(loss, model, X)

    for _ in range(12):
        step(model, optimizer, X)
        moved.append(regrowth.step(gradients))
    assert [number for number, count in enumerate(moved) if count] == [3, 6]
    assert asked == ([3, 6, 9] if growth == "gradient" else [])
    assert moved[3] == sum(int(cosine_decay(3, 10) * live) for live in (120, 50))
    assert summary(model).sparsity == 0.5


def test_what_cannot_be_moved_is_refused() -> None:
    _, sparse = both()
    layer = sparse.layers[0]
    before = layer.pattern
    with pytest.raises(ValueError, match=r"a source of shape \(1,\)"):
        layer.rewire(before, [0])
    with pytest.raises(ValueError, match="where each of the 72 connections was"):
        layer.rewire(before, np.full(72, 72))
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        regrow_model(sparse, 1.5)
    with pytest.raises(ValueError, match="connections move in masked weights, and there is none"):
        regrow_model(sparse, 0.5, include="nonesuch")
    with pytest.raises(ValueError, match=r"layers\.2 has none"):
        regrow_model(sparse, 0.5, gradients={"layers.0": dense_gradients(loss, sparse, X)["layers.0"]})
    sparse.layers[2].weight_values[...] = sparse.layers[2].weight_values[...].at[0].set(jnp.nan)
    with pytest.raises(ValueError, match="a live weight must be a number; got NaN"):
        regrow_model(sparse, 0.5)
    assert layer.pattern == before, "nothing moves if not all can"
    one, other = SparseLinear(4, 4, rngs=nnx.Rngs(0)), SparseLinear(4, 4, rngs=nnx.Rngs(0))
    other.weight_values = one.weight_values
    with pytest.raises(ValueError, match="has its weight_values to itself; here 2 modules share it"):
        regrow_model(nnx.List([one, other]), 0.5)
    with pytest.raises(ValueError, match="growth by gradient needs gradients"):
        ScheduledRegrowth(sparse, every=1, end=5).step()


@pytest.mark.parametrize("form", [0, 1], ids=["dense", "sparse"])
def test_averages_get_the_masks_and_the_connections_that_have_changed(form: int) -> None:
    model = both()[form]
    average = nnx.clone(model)

    def masks() -> list[np.ndarray]:
        layers = (model.layers[0], model.layers[2])
        return [np.asarray(layer.pattern.to_mask() if form else layer.mask[...].T) for layer in layers]

    def weights(layers: Any) -> list[np.ndarray]:
        dense = (layer.to_masked() if form else layer for layer in (layers[0], layers[2]))
        return [np.asarray(layer.kernel[...]).T * live for layer, live in zip(dense, masks(), strict=True)]

    expected = weights(average.layers)
    regrowth = ScheduledRegrowth(model, every=2, end=20, growth="random", averages=[average])
    moved = 0
    for _ in range(10):
        now = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda value: value * 0.9, now))
        moved += regrowth.step()
        expected = [
            0.5 * old * live + 0.5 * new
            for old, new, live in zip(expected, weights(model.layers), masks(), strict=True)
        ]
        mean = jax.tree.map(
            lambda old, new: 0.5 * old + 0.5 * new, *(nnx.state(one, nnx.Param) for one in (average, model))
        )
        nnx.update(average, mean)
    assert moved > 0
    for one, other in zip(weights(average.layers), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)
    if not form:
        pruner = ScheduledPruning(model, CubicSchedule(0.8, begin=0, end=1), averages=[average], scope="layer")
        assert pruner.step_at(1)
        for name, mask in get_masks(model).items():
            assert (get_masks(average)[name] == mask).all()
        assert summary(average).sparsity == pytest.approx(0.8, abs=0.02)
    other = both()[1 - form]
    with pytest.raises(ValueError, match="an average has the layers of its model"):
        ScheduledRegrowth(model, every=1, end=3, growth="random", averages=[other]).step_at(1)
