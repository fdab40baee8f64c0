"""``maskedlinear.jax.freeze_masked``: dormant weights stay, masks are checked, and may be given once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array

from helpers import problem
from maskedlinear.jax import freeze_masked, masked_linear

pytestmark = pytest.mark.usefixtures("strict_jax")


@pytest.fixture
def p(rng: np.random.Generator, strict_jax: None) -> list[Array]:
    return [jnp.asarray(array) for array in problem(rng)]


TRANSFORMATIONS = {
    "sgd with momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "adam": lambda: optax.adam(0.1),
    "adamw": lambda: optax.adamw(0.1, weight_decay=0.1),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.1)),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_freeze_masked_keeps_dormant_weights_bit_for_bit(p: list[Array], name: str) -> None:
    x, weight, mask, bias, _ = (a.astype(jnp.float32) if a.dtype != bool else a for a in p)
    weight = weight.at[0].set(-0.0)
    start = {"weight": weight, "bias": bias}
    tx = freeze_masked(TRANSFORMATIONS[name]())

    @jax.jit
    def step(params: Any, state: Any, mask: Array) -> Any:
        grads = jax.grad(lambda q: (masked_linear(x, q["weight"], mask, q["bias"]) ** 2).sum())(params)
        updates, state = tx.update(grads, state, params, masks={"weight": mask, "bias": True})
        return optax.apply_updates(params, updates), state

    def bits(params: Any, where: Array) -> Any:
        return np.asarray(params["weight"]).view(np.int32)[np.asarray(where)]

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax relies on both
        params, state = start, tx.init(start)
        for which in (mask, ~mask):  # a change of mask leaves moments behind for what is dormant now
            before = params
            for _ in range(4):
                params, state = step(params, state, which)
            np.testing.assert_array_equal(bits(params, ~which), bits(before, ~which))
            assert (bits(params, which) != bits(before, which)).any()
            assert (np.asarray(params["bias"]) != np.asarray(before["bias"])).all()


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
            r"the mask of parameter \['weight'\] must be an array, or True where there is none; got False",
        ),
        (lambda _: None, r"the mask of parameter \['weight'\] must be an array, or True where there is none; got None"),
        (lambda _: "mask", r"the mask of parameter \['weight'\]: a mask must hold booleans, or 0s and 1s"),
    ],
)
def test_freeze_masked_checks_its_masks(p: list[Array], bad: Any, message: str) -> None:
    params = {"weight": p[1], "bias": p[3]}
    tx = freeze_masked(optax.sgd(0.1))
    with pytest.raises(ValueError, match=message):
        tx.update(params, tx.init(params), params, masks={"weight": bad(p[2]), "bias": True})


def test_freeze_masked_takes_what_is_a_mask(p: list[Array]) -> None:
    params = {"weight": p[1]}
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
        np.testing.assert_array_equal(updates["weight"] != 0, ~mask)
    with pytest.raises(ValueError, match=r"masks is a function of the parameters, which are missing: tx.update\("):
        tx.update(grads, tx.init(params))


def test_freeze_masked_names_the_update_that_is_no_array() -> None:
    tx = freeze_masked(optax.identity())
    updates, _ = tx.update({"a": 1.0, "b": 2.0}, tx.init({}), masks={"a": True, "b": np.array(False)})
    assert updates == {"a": 1.0, "b": 0.0}
    with pytest.raises(TypeError, match=r"the update of parameter \['a'\] must be an array of numbers; got str"):
        tx.update({"a": "1"}, tx.init({}), masks={"a": True})
