"""``maskedlinear.jax.freeze_masked``: masked weights are +0 and take no part, masks are checked, and may be given once."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax import Array

from helpers import problem
from maskedlinear.jax import freeze_masked, masked_linear, scheduled_pruning
from maskedlinear.pruning import CubicSchedule
from maskedlinear_jax._compat import enable_x64

pytestmark = pytest.mark.usefixtures("strict_jax")


@pytest.fixture
def p(rng: np.random.Generator, strict_jax: None) -> list[Array]:
    return [jnp.asarray(array) for array in problem(rng)]


def shipped() -> dict[str, Any]:
    """Return every optimizer that optax ships, ``optax.contrib`` too: what makes a transformation of a learning rate."""
    found = {}
    for module in (optax, optax.contrib):
        for name, make in vars(module).items():
            if name.startswith(("_", "scale_by_")) or not (inspect.isfunction(make) or isinstance(make, partial)):
                continue
            signature = inspect.signature(make)
            rates = {"learning_rate", "max_learning_rate"} & set(signature.parameters)
            if rates and "GradientTransformation" in str(signature.return_annotation):
                found[name] = make, rates, "weight_decay" in signature.parameters
    return found


OPTIONS: dict[str, Any] = {
    "adafactor": lambda: {"min_dim_size_to_factor": 2},
    "dpsgd": lambda: {"l2_norm_clip": 1.0, "noise_multiplier": 0.1, "seed": 0},
    "galore": lambda: {"rank": 2},
    "noisy_sgd": lambda: {"key": jax.random.key(0)},
    "polyak_sgd": lambda: {"max_learning_rate": 0.1},
    "rmsprop": lambda: {"momentum": 0.9},
    "schedule_free": lambda: {"base_optimizer": optax.adamw(0.1)},
}


def made(name: str) -> Any:
    make, rates, decays = shipped()[name]
    options: dict[str, Any] = {"learning_rate": 0.1} if "learning_rate" in rates else {}
    return make(**options, **({"weight_decay": 0.1} if decays else {}), **OPTIONS.get(name, dict)())


TRANSFORMATIONS: dict[str, Any] = {
    **{name: partial(made, name) for name in shipped()},
    "sgd with momentum": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.1)),
    "masked": lambda: optax.masked(optax.adamw(0.1), {"weight": True, "bias": True}),
    "partition": lambda: optax.partition(
        {"a": optax.adamw(0.1, weight_decay=0.1), "b": optax.sgd(0.1)}, {"weight": "a", "bias": "b"}
    ),
    "accumulated": lambda: optax.MultiSteps(optax.adamw(0.1, weight_decay=0.1), 2),
    "finite": lambda: optax.apply_if_finite(optax.adamw(0.1, weight_decay=0.1), 2),
    "flat": lambda: optax.flatten(optax.adamw(0.1, weight_decay=0.1)),
    "injected": lambda: optax.inject_hyperparams(optax.adamw)(0.1, weight_decay=0.1),
    "mechanized": lambda: optax.contrib.mechanize(optax.adamw(0.1, weight_decay=0.1)),
    "sharpness-aware": lambda: optax.contrib.sam(optax.adamw(0.1), optax.sgd(0.05), sync_period=2),
}


def test_every_optimizer_of_optax_is_tried() -> None:
    assert len(shipped()) >= 40
    assert {"adamw", "lbfgs", "nadam", "signum", "muon", "schedule_free_adamw", "sophia"} <= set(shipped())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # some that optax ships are on their way out
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_masked_weights_are_positive_zeros(p: list[Array], name: str) -> None:
    x, weight, mask, bias, _ = (a.astype(jnp.float32) if a.dtype != bool else a for a in p)
    weight = weight.at[0].set(-0.0).at[1].set(1e-45)
    start = {"weight": weight, "bias": bias}
    tx = freeze_masked(TRANSFORMATIONS[name]())

    @jax.jit
    def step(params: Any, state: Any, mask: Array) -> Any:
        def loss(q: Any) -> Array:
            return (masked_linear(x, q["weight"], mask, q["bias"]) ** 2).sum()

        value, grads = jax.value_and_grad(loss)(params)
        more: dict[str, Any] = {"value": value}  # what some optimizers ask for besides the gradient
        if name == "lbfgs":
            more |= {"grad": grads, "value_fn": loss}
        if name in ("sophia", "sharpness-aware"):
            more = {"obj_fn": loss} if name == "sophia" else {}
        if name == "dpsgd":
            grads = jax.tree.map(lambda grad: grad[None], grads)  # of each example
        updates, state = tx.update(grads, state, params, masks={"weight": mask, "bias": True}, **more)
        return optax.apply_updates(params, updates), state

    def bits(params: Any, where: Array) -> Any:
        return np.asarray(params["weight"]).view(np.int32)[np.asarray(where)]

    with enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax's
        params, state = start, tx.init(start)
        for which in (mask, ~mask):  # a change of mask leaves moments behind for what is dormant now
            params |= {"weight": jnp.where(params["weight"] == 0, weight, params["weight"])}  # too much comes back
            before = params
            for _ in range(4):
                params, state = step(params, state, which)
            assert not bits(params, ~which).any()
            assert (bits(params, which) != bits(before, which)).any()
            assert (np.asarray(params["bias"]) != np.asarray(before["bias"])).any()


def test_freeze_masked_needs_the_masks(p: list[Array]) -> None:
    tx = freeze_masked(optax.sgd(0.1))
    params = {"weight": p[1]}
    with pytest.raises(ValueError, match=r"needs the masks of this step: tx.update\(.*masks=masks\)"):
        tx.update(params, tx.init(params), params)
    with (
        jax.numpy_dtype_promotion("standard"),
        pytest.raises(ValueError, match=r"the masks must be a tree like the parameters.*; got"),
    ):
        tx.update(params, tx.init(params), params, masks={"other": p[2]})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda m: m[:1], r"parameter \['weight'\] = \(6, 5\); got \(1, 5\)"),
        (lambda m: m[:, :1], r"parameter \['weight'\] = \(6, 5\); got \(6, 1\)"),
        (lambda m: m.T, r"which is its transpose: pass mask.T"),
        (lambda m: np.asarray(m) * 0.5, r"the mask of parameter \['weight'\]: .*0s and 1s; got 0.5 at"),
        (lambda m: np.asarray(m) * 3, r"0s and 1s; got 3 at"),
        (
            lambda _: False,
            r"the mask of parameter \['weight'\] must be an array, or None where there is none; got False",
        ),
        (lambda _: "mask", r"the mask of parameter \['weight'\]: a mask must hold booleans, or 0s and 1s"),
    ],
)
def test_freeze_masked_checks_its_masks(p: list[Array], bad: Any, message: str) -> None:
    params = {"weight": p[1], "bias": p[3]}
    tx = freeze_masked(optax.sgd(0.1))
    with pytest.raises(ValueError, match=message):
        tx.update(params, tx.init(params), params, masks={"weight": bad(p[2]), "bias": True})


def test_freeze_masked_takes_what_is_a_mask(p: list[Array]) -> None:
    params = {"weight": jnp.where(p[2], p[1], 0.0)}
    tx = freeze_masked(optax.identity())
    for mask in (p[2], np.asarray(p[2]), p[2].astype(float), p[2].tolist()):
        updates, _ = tx.update(params, tx.init(params), params, masks={"weight": mask})
        np.testing.assert_array_equal(updates["weight"] != 0, p[2])


def test_freeze_masked_with_masks_given_once(p: list[Array]) -> None:
    mask = p[2]
    params, grads = {"weight": jnp.where(mask, 1.0, 0.0)}, {"weight": jnp.ones(mask.shape)}
    for masks in ({"weight": mask}, lambda params: jax.tree.map(lambda weight: weight != 0, params)):
        tx = freeze_masked(optax.sgd(0.1), masks)
        updates, _ = tx.update(grads, tx.init(params), params)
        np.testing.assert_array_equal(updates["weight"] != 0, mask)
        updates, _ = tx.update(grads, tx.init(params), params, masks={"weight": ~mask})
        np.testing.assert_array_equal(optax.apply_updates(params, updates)["weight"] != 0, ~mask)
    with pytest.raises(ValueError, match=r"masks is a function of the parameters, which are missing: tx.update\("):
        tx.update(grads, tx.init(params))


def test_freeze_masked_names_the_update_that_is_no_array() -> None:
    tx = freeze_masked(optax.identity())
    state = tx.init({"a": 1.0, "b": 2.0})
    updates, _ = tx.update({"a": 1.0, "b": 2.0}, state, masks={"a": True, "b": np.array(False)})
    assert updates == {"a": 1.0, "b": 0.0}
    with pytest.raises(TypeError, match=r"the update of parameter \['a'\] must be an array of numbers; got str"):
        tx.update({"a": "1"}, tx.init({"a": 1.0}), masks={"a": True})


@pytest.mark.parametrize(
    "name", ["adam", "partition", "yogi", "adagrad", "sgd with momentum", "adan", "chain", "accumulated"]
)
def test_a_revived_weight_starts_clean(name: str) -> None:
    mask = jnp.asarray([[True, False, True], [False, True, True]])
    params = {"weight": jnp.ones((2, 3)), "bias": jnp.ones(2)}
    tx = freeze_masked(TRANSFORMATIONS[name]())
    generator = np.random.default_rng(0)

    def gradients(live: Any) -> Any:
        drawn = jnp.asarray(generator.standard_normal((2, 3)), jnp.float32)
        return {"weight": jnp.where(live, drawn, 0.0), "bias": jnp.asarray(generator.standard_normal(2), jnp.float32)}

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        state = tx.init(params)
        for live in (mask, mask, mask, mask, ~mask):
            _, state = tx.update(gradients(live), state, params, masks={"weight": live, "bias": True})
        fresh = tx.init(params)
        grads = gradients(mask)
        _, one = tx.update(grads, fresh, params, masks={"weight": mask, "bias": True})
        before = state
        _, state = tx.update(grads, state, params, masks={"weight": mask, "bias": True})
        assert (state.live["weight"] == mask).all()
        # All entries have changed their mask, so that what is kept of the weight is what one step from the start keeps.
        kept, wanted, old = (
            [leaf for leaf in jax.tree.leaves(tree.inner) if jnp.shape(leaf) == (2, 3)] for tree in (state, one, before)
        )
        assert kept
        moved = 0
        for got, want, was in zip(kept, wanted, old, strict=True):
            if name not in ("adan", "accumulated"):  # which look at the step that they are at
                np.testing.assert_array_equal(got, want)
            moved += int((got != was).any())
        assert moved


@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1)),
        lambda: optax.contrib.muon(0.1),
        lambda: optax.lamb(0.1, weight_decay=0.1),
        lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
    ],
    ids=["clip", "muon", "lamb", "adafactor"],
)
def test_gradients_and_weights_under_the_mask_take_no_part(p: list[Array], make: Any) -> None:
    mask = p[2]
    start, rest = jnp.where(mask, p[1], 0.0), jnp.where(mask, 0.0, 10.0)
    tx = freeze_masked(make(), {"weight": mask})
    generator = np.random.default_rng(0)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        ends = []
        gradients = [jnp.asarray(generator.standard_normal(mask.shape), start.dtype) for _ in range(5)]
        for seen, weight in ((False, start), (True, start + rest)):
            params = {"weight": weight}
            state = tx.init(params)
            for gradient in gradients:
                gradient = gradient if seen else jnp.where(mask, gradient, 0.0)
                updates, state = tx.update({"weight": gradient}, state, params)
                params = optax.apply_updates(params, updates)
            ends.append(params["weight"])
        np.testing.assert_array_equal(*ends)
        assert (ends[0] != start)[mask].all()


def test_what_is_not_finite_under_the_mask_stays_until_it_is_moved() -> None:
    params = {"weight": jnp.asarray([[jnp.nan, jnp.inf, -3.0, 1.0]], jnp.float32)}
    tx = freeze_masked(optax.adamw(0.1), {"weight": np.array([[False, False, False, True]])})
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    after = np.asarray(optax.apply_updates(params, updates)["weight"])[0]
    np.testing.assert_array_equal(after[:3], [np.nan, np.inf, 0.0])
    assert np.isfinite(after[3])


@pytest.mark.parametrize("outer", ["partition", "masked"])
def test_the_guard_sees_a_part_of_the_parameters(p: list[Array], outer: str) -> None:
    mask = p[2]
    params, grads = {"weight": p[1], "bias": p[3]}, {"weight": p[1], "bias": p[3]}
    inner = freeze_masked(optax.adamw(0.1, weight_decay=0.1), {"weight": mask, "bias": True})
    tx = {
        "partition": lambda: optax.partition({"a": inner, "b": optax.sgd(0.1)}, {"weight": "a", "bias": "b"}),
        "masked": lambda: optax.masked(inner, {"weight": True, "bias": False}),
    }[outer]()
    with jax.numpy_dtype_promotion("standard"):
        updates, state = tx.update(grads, tx.init(params), params)
        tx.update(grads, state, params)
    np.testing.assert_array_equal(optax.apply_updates(params, updates)["weight"] == 0, ~mask)


@pytest.mark.parametrize("scheduled", [False, True])
def test_parameters_and_state_can_be_donated(p: list[Array], scheduled: bool) -> None:
    mask = jnp.asarray(np.arange(30).reshape(6, 5) % 2 == 0)
    params = {"weight": jnp.where(mask, p[1], 0.0)}
    schedule = CubicSchedule(0.9, begin=0, end=4, initial=0.5)
    tx = (
        scheduled_pruning(optax.adam(0.1), schedule, masks={"weight": mask})
        if scheduled
        else freeze_masked(optax.adam(0.1))
    )

    def step(params: Any, state: Any, masks: Any) -> Any:
        more = {} if scheduled else {"masks": masks}
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params, **more)
        return optax.apply_updates(params, updates), state, masks

    with jax.numpy_dtype_promotion("standard"):
        params, state, masks = step(params, tx.init(params), {"weight": mask})
        donated = jax.jit(step, donate_argnums=(0, 1, 2))
        for _ in range(3):
            params, state, masks = donated(params, state, masks)
    assert jnp.isfinite(params["weight"]).all()
