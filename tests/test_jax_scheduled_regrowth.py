"""``scheduled_regrowth``: the masks of ``regrow_tree``, bit for bit, made inside a jitted step; and ``jit`` elsewhere."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState

from maskedlinear.jax import (
    RegrowthState,
    apply_masks,
    freeze_masked,
    prune_tree,
    regrow_tree,
    scheduled_pruning,
    scheduled_regrowth,
    set_optimizer_masks,
)
from maskedlinear.masks._random import checked_fraction
from maskedlinear.models import WeightAxes
from maskedlinear.pruning import CubicSchedule, cosine_decay
from maskedlinear_jax._compat import enable_x64
from maskedlinear_jax._growth import portion, share_words
from maskedlinear_jax._stacks import clear_group

AXES = {"stack": WeightAxes(batch_axis=1, out_axis=0, in_axis=2)}
EVERY, END, INITIAL, SEED = 4, 28, 0.9, 2**64 - 3 - (8 << 20)  # the seeds of step 8 and its layers go over 2⁶⁴
INNER = {
    "adamw": lambda: optax.adamw(0.02, eps=1e-2, weight_decay=0.1),
    "momentum": lambda: optax.sgd(0.02, momentum=0.9),
}


def parameters(dtype: Any = "float32", seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    shapes = {
        "Conv_0": {"kernel": (3, 3, 2, 4), "bias": (4,)},
        "stack": (6, 3, 5),
        "head": (3, 7),
        "attention": {"query": {"kernel": (6, 2, 3)}},
    }
    return jax.tree.map(
        lambda shape: jnp.asarray(np.round(rng.standard_normal(shape), 1), dtype),  # many equal ones
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def masked(dtype: Any = "float32") -> Any:
    """Return parameters, +0 under the masks; and masks: of the head too, in which nothing moves."""
    params = parameters(dtype)
    masks = prune_tree(params, 0.6, axes=AXES)
    return apply_masks(params, masks), masks


def gradients_of(params: Any, goal: Any) -> Any:
    def loss(params: Any) -> Any:
        return sum(((p - g) ** 2).sum() for p, g in zip(jax.tree.leaves(params), jax.tree.leaves(goal), strict=True))

    return jax.grad(loss)(params)


def assert_same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert left.dtype == right.dtype
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


CASES = [("float32", "gradient", "adamw"), ("bfloat16", "random", "momentum")]
LONG = [(d, g, i) for d in ("float32", "bfloat16", "float64") for g in ("gradient", "random") for i in INNER]


@pytest.mark.parametrize(
    ("dtype", "growth", "inner"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in LONG if case not in CASES)],
)
def test_the_jitted_step_makes_the_masks_of_regrow_tree(dtype: str, growth: Any, inner: str) -> None:
    include = ["Conv_0.kernel" if growth == "gradient" else "attention*", "stack"]
    with enable_x64(True) if dtype == "float64" else contextlib.nullcontext():
        params, masks = masked(dtype)
        goals = [parameters(dtype, seed) for seed in range(1, 31)]
        options: Any = {"growth": growth, "seed": SEED, "include": include, "axes": AXES}
        options["exclude_dropped"] = dtype == "float32"
        tx = scheduled_regrowth(INNER[inner](), masks=masks, every=EVERY, end=END, initial=INITIAL, **options)

        def step(carry: Any, goal: Any) -> Any:
            params, state = carry
            grads = gradients_of(params, goal)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), grads

        jitted, first, moves = jax.jit(step), (params, tx.init(params)), 0
        params, state = first
        for number, goal in enumerate(goals):
            (unmoved, _), grads = jitted((params, state._replace(step=jnp.int32(1))), goal)
            before, renewed = state.masks, state.inner.live
            (params, state), _ = jitted((params, state), goal)
            if 0 < number < END and number % EVERY == 0:
                wanted = regrow_tree(
                    *(unmoved, before, cosine_decay(number, END, INITIAL)),
                    gradients=grads if growth == "gradient" else None,
                    include=include,
                    axes=AXES,
                    exclude_dropped=options["exclude_dropped"],
                    seed=(SEED + (number << 20)) % 2**64,
                )
                pairs = zip(*map(jax.tree.leaves, (state.masks, before)), strict=True)
                moves += any(bool((new != old).any()) for new, old in pairs)
            else:
                wanted = unmoved, before
            assert_same((params, state.masks), wanted)
            for mask, param, old in zip(
                *map(jax.tree.leaves, (state.masks, _masked_ones(params), before)), strict=True
            ):
                assert int(mask.sum()) == int(old.sum())
                assert not np.asarray(param)[~np.asarray(mask & old)].tobytes().strip(b"\0"), (
                    "what is new or gone is +0"
                )
            assert state.masks["head"].tolist() == masks["head"].tolist()
            _assert_clean(state, renewed, grads, inner)
        assert moves >= 5
        assert jitted._cache_size() == 1, "a change of masks compiles nothing"
        if (dtype, growth, inner) in CASES[:1]:
            (scanned, last), _ = jax.lax.scan(step, first, jax.tree.map(lambda *parts: jnp.stack(parts), *goals))
            assert_same((scanned, last.masks), (params, state.masks))
            overflowed = goals[0] | {"Conv_0": {**goals[0]["Conv_0"], "bias": jnp.full(4, jnp.inf)}}
            (_, after), _ = jitted((params, state._replace(step=jnp.int32(EVERY))), overflowed)
            assert_same(after.masks, state.masks)


def _masked_ones(tree: Any) -> Any:
    """Return the parameters that have masks."""
    return tree | {"Conv_0": {"kernel": tree["Conv_0"]["kernel"], "bias": None}}


def _assert_clean(state: RegrowthState, live: Any, grads: Any, inner: str) -> None:
    """Assert that entries that are live for the first time have a state of one step, and dormant ones none."""
    kept = state.inner.inner[0]
    kept, share = (kept.mu, 0.1) if inner == "adamw" else (kept.trace, 1)
    now = state.inner.live
    parts = [_masked_ones(grads), _masked_ones(kept), live, now]
    for grad, moment, old, new in zip(*map(jax.tree.leaves, parts), strict=True):
        came = np.asarray(new & ~old)
        np.testing.assert_allclose(
            np.asarray(moment, float)[came], share * np.asarray(grad, float)[came], rtol=1e-2, err_msg="not clean"
        )
        assert not np.asarray(moment)[~np.asarray(new)].any()


def test_a_train_state_needs_no_masks() -> None:
    model, x = nn.Sequential([nn.Dense(6), nn.tanh]), jnp.ones((3, 4))
    params = model.init(jax.random.key(0), x)["params"]
    masks = prune_tree(params, 0.5, scope="layer")
    tx = optax.chain(scheduled_regrowth(optax.adamw(0.1), masks=masks, every=2, end=9), optax.identity())
    state = TrainState.create(apply_fn=model.apply, params=apply_masks(params, masks), tx=tx)

    @jax.jit
    def step(state: Any) -> Any:
        return state.apply_gradients(grads=jax.grad(lambda p: (model.apply({"params": p}, x) ** 2).sum())(state.params))

    for _ in range(5):
        state = step(state)
    found = state.opt_state[0].masks
    kernel, mask = state.params["layers_0"]["kernel"], found["layers_0"]["kernel"]
    assert int(mask.sum()) == int(masks["layers_0"]["kernel"].sum())
    assert (mask != masks["layers_0"]["kernel"]).any()
    assert not np.asarray(kernel)[~np.asarray(mask)].any()
    assert found["layers_0"]["bias"] is None


@pytest.mark.parametrize("sparsity", [0.1, 0.9])  # fewer places to grow at than are to move; many
def test_regrow_tree_inside_jit(sparsity: float) -> None:
    params = {"stack": parameters()["stack"]}
    masks, grads = prune_tree(params, sparsity, axes=AXES, scope="layer"), {"stack": parameters(seed=5)["stack"]}
    for gradients, exclude in ((grads, False), (None, False), (grads, True), (None, True)):
        how: Any = {"axes": AXES, "seed": 2**64 - 2, "exclude_dropped": exclude}

        @jax.jit
        def moved(params: Any, masks: Any, gradients: Any) -> Any:
            return regrow_tree(params, masks, 0.35, gradients=gradients, **how)  # noqa: B023

        wanted = regrow_tree(params, masks, 0.35, gradients=gradients, **how)
        assert_same(moved(params, masks, gradients), wanted)


def test_what_depends_on_numbers_is_left_to_right_inside_jit() -> None:
    params, masks = {"w": jnp.asarray([[jnp.nan, 1.0, 2.0, 0.0]])}, {"w": jnp.asarray([[True, True, True, False]])}
    _, new = jax.jit(lambda *trees: regrow_tree(*trees, 0.34, gradients=params, exclude_dropped=True))(params, masks)
    assert new["w"].tolist() == [[True, False, True, True]]
    with pytest.raises(TypeError, match="fraction and the seed of regrow_tree must be known"):
        jax.jit(lambda fraction: regrow_tree(params, masks, fraction))(0.3)
    with pytest.raises(ValueError, match=r"gradient of all weights, of their shape \(1, 4\); got \(2, 1, 4\)"):
        jax.jit(lambda p: regrow_tree(p, masks, 0.3, gradients=jax.tree.map(lambda w: jnp.stack([w, w]), p)))(params)


def test_shares_are_counted_exactly() -> None:
    rng = np.random.default_rng(0)
    fractions = [cosine_decay(int(step), 7500) for step in rng.integers(0, 7500, 300)] + [0.0, 0.29, 1 / 3, 1e-300, 1.0]
    live = rng.integers(0, 2**31, (len(fractions), 20)) >> rng.integers(0, 31, (len(fractions), 20))
    live[:, :3] = 100, 0, 2**31 - 1
    words = jnp.asarray(np.array([share_words(fraction) for fraction in fractions]))
    found = jax.jit(jax.vmap(jax.vmap(portion, (None, 0))))(words, jnp.asarray(live, jnp.int32))
    wanted = [
        [math.floor(checked_fraction(part) * int(n)) for n in row] for part, row in zip(fractions, live, strict=True)
    ]
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    "scope",
    ["erdos_renyi", pytest.param("layer", marks=pytest.mark.slow), pytest.param("global", marks=pytest.mark.slow)],
)
def test_each_matrix_of_a_stack_is_pruned_as_by_prune_tree(scope: Any) -> None:
    schedule = CubicSchedule(0.8, begin=1, end=7, every=2, initial=0.3)
    params = {"stack": parameters()["stack"], "head": parameters()["head"]}
    masks = prune_tree(params, 0.1, axes=AXES, scope="global")  # the matrices differ in what is masked already
    options: Any = {"axes": AXES, "scope": scope, "on_empty": "allow"}
    tx = scheduled_pruning(optax.set_to_zero(), schedule, masks=masks, **options)
    state, wanted = tx.init(params), masks
    update = jax.jit(tx.update)
    for number in range(8):
        _, state = update(params, state, params)
        if schedule.due(number):
            wanted = prune_tree(params, schedule(number), masks=wanted, **options)
        assert_same(state.masks, wanted)


def test_prune_tree_inside_jit() -> None:
    params = {"stack": parameters()["stack"], "head": parameters()["head"]}
    for scope, sparsity in (("layer", 0.5), ("global", 0.6), ("erdos_renyi", 0.5)):
        options: Any = {"scope": scope, "axes": AXES, "on_empty": "allow"}
        before = prune_tree(params, 0.2, **options)
        wanted = prune_tree(params, sparsity, masks=before, **options)
        assert_same(jax.jit(lambda p: prune_tree(p, sparsity, masks=before, **options))(params), wanted)  # noqa: B023
        if scope == "layer":
            again = jax.jit(lambda p, m: prune_tree(p, 0.1, masks=m, **options))(params, before)  # noqa: B023
            assert_same(again, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "which a compiled step cannot refuse: say on_empty='keep' or 'allow', or scope='layer'"),
        ({"scope": "layer", "sparsity": 1.0}, "a layer must keep a connection; all would be gone of head"),
        (
            {"scope": "layer", "sparsity": 0.1},
            "only removes connections; got 10 masked ones of head, where 2 were asked",
        ),
        ({"score": "random"}, "by their magnitude; got score='random': prune outside"),
        ({"score": lambda w, g: w}, "by their magnitude; got score="),
        ({"block": (1, 1)}, r"by their magnitude; got block=\(1, 1\)"),
        ({"keep_at_least": {"row": 1}}, "got keep_at_least="),
        ({"on_empty": "no"}, "on_empty must be 'raise', 'allow' or 'keep'; got 'no'"),
        ({"scope": "all"}, "scope must be"),
        ({"sparsity": jnp.float32(0.5)}, "sparsity must be known when it is compiled"),
        ({"scope": "erdos_renyi", "on_empty": "allow", "traced": True}, "close over the masks so far"),
    ],
)
def test_what_cannot_be_pruned_inside_jit_is_refused(options: Any, message: str) -> None:
    params = {"head": parameters()["head"]}
    masks = prune_tree(params, 0.5)
    traced = options.get("traced", False) or isinstance(options.get("sparsity"), jax.Array)

    def pruned(params: Any, given: Any, sparsity: Any) -> Any:
        more = {name: value for name, value in options.items() if name not in ("traced", "sparsity")}
        amount = sparsity if isinstance(options.get("sparsity"), jax.Array) else options.get("sparsity", 0.6)
        return prune_tree(params, amount, masks=given if traced else masks, **more)

    with pytest.raises((ValueError, TypeError), match=message):
        jax.jit(pruned)(params, masks, 0.5)


def test_a_stack_is_no_loop_over_its_matrices() -> None:
    def lines(count: int) -> int:
        weights = {"w": jnp.ones((count, 4, 5))}
        options: Any = {"axes": {"w": WeightAxes(1, 2, 0)}}
        masks = prune_tree(weights, 0.5, scope="layer", **options)
        moved = jax.make_jaxpr(lambda w: regrow_tree(w, masks, 0.3, gradients=w, **options))(weights)
        pruned = jax.make_jaxpr(lambda n: clear_group(n, [weights["w"]], [masks["w"]], True, [WeightAxes(1, 2, 0)]))(
            jnp.full(count, 12)
        )
        return sum(text.count(" = ") for text in map(str, (moved, pruned)))  # equations

    assert lines(2) == lines(64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be at least 1 step"),
        ({"end": 0}, "end >= 1"),
        ({"initial": 2}, "initial <= 1 must hold"),
        ({"growth": "none"}, "growth must be 'gradient' or 'random'"),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*64\)"),
        ({"every": 1.5}, "every must be an integer; got 1.5"),
        ({"include": "none"}, "there is none that include='none' means"),
        ({"masks": {"first": True}}, "the masks must be a tree like the parameters'"),
        ({"axes": {"other": WeightAxes()}}, "axes must be of layers that there are; got 'other'"),
    ],
)
def test_what_a_compiled_step_cannot_refuse_is_refused_before(options: Any, message: str) -> None:
    params, masks = masked()
    with pytest.raises((ValueError, TypeError), match=message):
        scheduled_regrowth(optax.sgd(0.1), **({"masks": masks, "every": 2, "end": 8} | options)).init(params)


def test_what_does_not_fit_the_step_is_refused() -> None:
    params, masks = masked()
    tx = scheduled_regrowth(optax.sgd(0.1), masks=masks, every=2, end=8)
    with pytest.raises(ValueError, match=r"needs the parameters of this step: tx.update\(grads, state, params\)"):
        tx.update(params, tx.init(params))
    with pytest.raises(TypeError, match="must be real floating-point"):
        tx.init(jax.tree.map(lambda leaf: leaf.astype(int), params))
    never = scheduled_regrowth(optax.sgd(0.1), masks=masks, every=9, end=8)
    _, state = never.update(params, never.init(params), params)
    assert_same(state.masks, masks)
    assert int(state.step) == 1


def arrays(live: Any) -> list[str]:
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(live)[0]]


def test_the_guard_holds_nothing_of_unmasked_parameters() -> None:
    params, masks = masked()
    of_masks = arrays(masks)
    assert len(of_masks) == 4
    guards = [freeze_masked(optax.sgd(0.1), masks), freeze_masked(optax.sgd(0.1), lambda params: masks)]
    for tx in guards:
        state = tx.init(params)
        assert arrays(state.live) == of_masks
        _, after = tx.update(params, state, params)
        assert jax.tree.structure(after) == jax.tree.structure(state)
    states: list[Any] = [
        scheduled_regrowth(optax.sgd(0.1), masks=masks, every=2, end=8).init(params),
        scheduled_pruning(optax.sgd(0.1), CubicSchedule(0.9, begin=0, end=2), axes=AXES).init(params),
    ]
    assert [arrays(state.inner.live) for state in states] == [of_masks] * 2
    unknown = freeze_masked(optax.sgd(0.1)).init(params)
    assert len(arrays(unknown.live)) == 5
    placeholders = optax.tree.map_params(guards[0], lambda leaf: leaf, guards[0].init(params))
    assert arrays(placeholders.live) == of_masks


def test_a_mask_that_comes_later_renews_what_it_hides() -> None:
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}
    first, later = {"a": jnp.ones((2, 3), bool), "b": None}, {"a": None, "b": jnp.asarray([True, False, True])}
    tx = freeze_masked(optax.trace(0.9), first)
    state = tx.init(params)
    _, state = tx.update(params, state, params)
    for given, kept in (({"masks": later}, state), ({}, set_optimizer_masks(state, later))):
        _, after = tx.update(params, kept, params, **given)
        assert arrays(after.live) == ["['a']", "['b']"]
        np.testing.assert_allclose(after.inner.trace["b"], [1.9, 0.0, 1.9])
        _, again = tx.update(params, after, params, **given)
        assert jax.tree.structure(again) == jax.tree.structure(after)
    assert jax.tree.structure(set_optimizer_masks(state, later)) == jax.tree.structure(after), (
        "the first step is no other"
    )


def test_wrappers_carry_a_guard_that_knows_its_masks() -> None:
    params, grads = {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}, {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}
    mask = jnp.asarray([[True, False, True], [False, True, True]])
    guarded = freeze_masked(optax.adamw(0.1), {"a": mask, "b": None})
    for tx in (
        optax.MultiSteps(guarded, 2),
        optax.masked(guarded, {"a": True, "b": False}),
        optax.partition({"x": guarded, "y": optax.sgd(0.1)}, {"a": "x", "b": "y"}),
        optax.chain(optax.identity(), guarded),
    ):

        def step(carry: Any, _: Any) -> Any:
            params, state = carry
            updates, state = tx.update(grads, state, params)  # noqa: B023
            return (optax.apply_updates(params, updates), state), None

        (after, _), _ = jax.lax.scan(step, (params, tx.init(params)), None, length=4)
        np.testing.assert_array_equal(after["a"] == 0, ~mask)
