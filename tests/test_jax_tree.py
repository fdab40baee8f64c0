"""Pruning of parameter trees: the core's masks, in the form that ``freeze_masked`` takes, for linen too."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from maskedlinear import pruning
from maskedlinear.jax import apply_masks, freeze_masked, prune_tree

RNG = np.random.default_rng(0)
PARAMS = {
    "first": {"kernel": jnp.asarray(RNG.standard_normal((8, 16)), jnp.float32), "bias": jnp.ones(16)},
    "last": [jnp.asarray(RNG.standard_normal((4, 16)), jnp.float32), jnp.ones(4)],
}


def test_masks_are_the_cores_and_only_shrink() -> None:
    masks = prune_tree(PARAMS, 0.5)
    weights = [np.asarray(PARAMS["first"]["kernel"]).T, np.asarray(PARAMS["last"][0])]  # type: ignore[call-overload]
    wanted = pruning.prune([pruning.magnitude(weight) for weight in weights], sparsity=0.5)
    np.testing.assert_array_equal(masks["first"]["kernel"], wanted[0].T)
    np.testing.assert_array_equal(masks["last"][0], wanted[1])
    assert masks["first"]["bias"] is masks["last"][1] is True
    later = prune_tree(PARAMS, 0.75, masks=masks, scope="layer")
    assert not (later["first"]["kernel"] & ~masks["first"]["kernel"]).any()
    only = prune_tree(PARAMS, 0.9, masks=later, include="first.*", score="snip", gradients=PARAMS)
    assert only["last"][0] is later["last"][0]
    assert int(only["first"]["kernel"].sum()) == 13


def test_masks_guard_a_plain_training_loop() -> None:
    masks = prune_tree(PARAMS, 0.5)
    tx = freeze_masked(optax.adamw(0.1), masks)
    x = jnp.asarray(RNG.standard_normal((5, 8)), jnp.float32)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            used = apply_masks(params, masks)
            hidden = jnp.tanh(x @ used["first"]["kernel"] + used["first"]["bias"])
            return ((hidden @ used["last"][0].T + used["last"][1]) ** 2).mean()

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        params, state = step(params, state)
    for kernel, mask in (
        (params["first"]["kernel"], masks["first"]["kernel"]),  # type: ignore[call-overload]
        (params["last"][0], masks["last"][0]),  # type: ignore[index]
    ):
        np.testing.assert_array_equal(kernel == 0, ~mask)


def test_linen_parameters() -> None:
    model = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(4)])
    params = model.init(jax.random.key(0), jnp.ones((1, 8)))["params"]
    masks = prune_tree(params, 0.9, scope="erdos_renyi")
    assert jax.tree.structure(masks) == jax.tree.structure(params)
    assert masks["layers_0"]["bias"] is True
    y = model.apply({"params": apply_masks(params, masks)}, jnp.ones((1, 8)))
    assert y.shape == (1, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": "nonesuch"}, r"means none of \['first.bias', 'first.kernel', 'last.0', 'last.1'\]"),
        ({"masks": {"first": True}}, "masks must be a tree like the parameters'"),
        ({"gradients": {"first": True}, "score": "snip"}, "gradients must be a tree like the parameters'"),
        ({"score": "taylor"}, "needs the gradient of each weight; first.kernel has none"),
        ({"sparsity": 2}, r"in \[0, 1\]"),
    ],
)
def test_what_cannot_be_pruned_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prune_tree(PARAMS, **({"sparsity": 0.5} | options))


def test_masks_of_another_tree_are_refused() -> None:
    with pytest.raises(ValueError, match="masks must be a tree like the parameters'"):
        apply_masks(PARAMS, {"first": True})
