"""Sparse weights that are computed of dense parameters, which train, in JAX: as in PyTorch, inside ``jit`` too."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from maskedlinear.flax import mask_model
from maskedlinear.jax import n_of_m_tree, straight_through, top_kast, top_kast_masks
from maskedlinear.torch import StraightThrough, TopKAST


def network() -> tuple[nn.Sequential, dict[str, Any]]:
    """Return a network of PyTorch, many of whose weights are equal, and its weights as Flax has them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-4, 5, parameter.shape) / 4)
    return model, {
        "conv": {"kernel": jnp.asarray(model[0].weight.detach().numpy().transpose(2, 3, 1, 0))},
        "dense": {"kernel": jnp.asarray(model[2].weight.detach().numpy().T)},
    }


def as_flax(arrays: Any) -> list[np.ndarray]:
    convolution, linear = (np.asarray(array) for array in arrays)
    return [convolution.transpose(2, 3, 1, 0), linear.T]


def run(params: Any, x: jax.Array) -> jax.Array:
    x = jax.lax.conv_general_dilated(
        x, params["conv"]["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return (x.reshape(len(x), -1) @ params["dense"]["kernel"]) ** 2


@pytest.mark.parametrize("how", ["n_of_m", "top_kast"])
def test_masks_and_gradients_are_those_of_pytorch(how: str) -> None:
    model, params = network()
    method: Any
    if how == "n_of_m":
        method = StraightThrough(model, n_of_m=(2, 4), decay=0.25)
        masks: Any = jax.jit(lambda params: n_of_m_tree(params, 2, 4))(params)
    else:
        method = TopKAST(model, forward_sparsity=0.8, backward_sparsity=0.5, penalty=0.25)
        masks = jax.jit(lambda params: top_kast_masks(params, 0.8, 0.5))(params)
    live = jax.tree.leaves(masks[0] if how == "top_kast" else masks)
    for own, other in zip(live, as_flax(method.masks.values()), strict=True):
        assert np.array_equal(own, other)
    if how == "top_kast":
        computed = [model[place].parametrizations.weight[0].backward_mask for place in (0, 2)]
        for own, other in zip(jax.tree.leaves(masks[1]), as_flax(computed), strict=True):
            assert np.array_equal(own, other)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        sparse = top_kast(params, *masks, 0.25) if how == "top_kast" else straight_through(params, masks, 0.25)
        return run(sparse, x).sum()

    x = np.random.default_rng(0).integers(-2, 3, (5, 3, 3, 4)).astype(np.float32)
    with torch.no_grad():
        model[0].bias.zero_()
        model[2].bias.zero_()
    (model(torch.from_numpy(x.transpose(0, 3, 1, 2))) ** 2).sum().backward()
    expected = as_flax(model[place].parametrizations.weight.original.grad for place in (0, 2))
    gradients = jax.jit(jax.grad(loss))(params, jnp.asarray(x))
    for own, other in zip(jax.tree.leaves(gradients), expected, strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-5, atol=1e-5)


def test_an_nnx_model_trains_and_is_masked_at_the_end() -> None:
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    x = jax.random.normal(jax.random.key(0), (32, 8))

    @jax.jit
    def step(params: Any) -> tuple[Any, Any, jax.Array]:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            masks = n_of_m_tree(params, 1, 4)
            outputs = nnx.merge(graph, straight_through(params, masks))(x)
            return ((outputs - x[:, :4]) ** 2).mean(), (masks, outputs)

        gradient, (masks, outputs) = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda param, change: param - 0.5 * change, params, gradient), masks, outputs

    _, masks, begun = step(params)
    for _ in range(60):
        before = params
        params, masks, outputs = step(params)
    assert ((outputs - x[:, :4]) ** 2).mean() < 0.7 * ((begun - x[:, :4]) ** 2).mean()
    trained = nnx.merge(graph, before)
    mask_model(trained, {"": masks["kernel"].get_value()})
    np.testing.assert_allclose(trained(x), outputs, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a\.kernel: an N:M mask needs .* multiple of m = 4; got 6; leave it out"):
        n_of_m_tree({"a": {"kernel": jnp.ones((6, 2))}}, 2, 4)
    with pytest.raises(ValueError, match="backward_sparsity is at most forward_sparsity"):
        top_kast_masks(jnp.ones((4, 4)), 0.5, 0.8)
    with pytest.raises(ValueError, match="masks must be a tree like the parameters'"):
        straight_through({"w": jnp.ones((4, 4))}, {"v": None})
    assert np.array_equal(straight_through({"b": jnp.ones(3)}, {"b": None})["b"], jnp.ones(3))
