"""Connections that move in parameter trees: the places of the core, for plain JAX and linen."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskedlinear import pruning
from maskedlinear.jax import apply_masks, prune_tree, regrow_tree

RNG = np.random.default_rng(0)
PARAMS = {
    "first": {"kernel": jnp.asarray(RNG.standard_normal((8, 16)), jnp.float32), "bias": jnp.ones(16)},
    "last": jnp.asarray(RNG.standard_normal((4, 16)), jnp.float32),
}
MASKS = prune_tree(PARAMS, 0.6, scope="layer")
X = jnp.asarray(RNG.standard_normal((5, 8)), jnp.float32)


def loss(params: Any) -> Any:
    return ((jnp.tanh(X @ params["first"]["kernel"] + params["first"]["bias"]) @ params["last"].T) ** 2).mean()


@pytest.mark.parametrize("by", ["gradient", "chance"])
def test_connections_move_as_the_core_says(by: str) -> None:
    gradients = jax.grad(loss)(apply_masks(PARAMS, MASKS)) if by == "gradient" else None
    params, masks = regrow_tree(PARAMS, MASKS, 0.3, gradients=gradients, seed=4)
    weights: dict[str, Any] = {"first": PARAMS["first"]["kernel"].T, "last": PARAMS["last"]}  # type: ignore[index, call-overload, union-attr]
    for number, (name, weight) in enumerate(weights.items()):
        first = name == "first"
        old, new, made = (tree[name]["kernel"].T if first else tree[name] for tree in (MASKS, masks, params))
        gradient = None if gradients is None else gradients[name]["kernel"].T if first else gradients[name]
        np.testing.assert_array_equal(new, pruning.regrow(old, weight, 0.3, gradient, seed=4 + number))
        np.testing.assert_array_equal(made, np.where(new & old, weight, 0))
    assert masks["first"]["bias"] is None


def test_what_cannot_move_is_refused() -> None:
    full = {"first": {"kernel": True, "bias": True}, "last": True}
    with pytest.raises(ValueError, match="parameters with masks, and there is none"):
        regrow_tree(PARAMS, full, 0.3)
    with pytest.raises(ValueError, match="masks must be a tree like"):
        regrow_tree(PARAMS, {"first": True}, 0.3)
    with pytest.raises(ValueError, match="gradients must be a tree like"):
        regrow_tree(PARAMS, MASKS, 0.3, gradients={})
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        regrow_tree(PARAMS, MASKS, 2)
