"""GraSP and SynFlow on trees of parameters, against torch's and the paper's."""

from __future__ import annotations

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx
from jax import Array

from maskedlinear import torch as in_torch
from maskedlinear.constraints import Constraints
from maskedlinear.flax import (
    constrain,
    fisher_scores,
    get_masks,
    mask_model,
    obd_scores,
    prune_model,
    prune_with_updates,
    record_activations,
)
from maskedlinear.flax import grasp_scores as grasp_of_model
from maskedlinear.jax import grasp_scores, prune_tree, synflow_scores
from maskedlinear.pruning import grasp


def tree() -> dict[str, dict[str, Array]]:
    keys = jax.random.split(jax.random.key(0))
    return {
        "a": {"kernel": jax.random.normal(keys[0], (5, 4)), "bias": jnp.zeros(4)},
        "b": {"kernel": jax.random.normal(keys[1], (4, 3)), "bias": jnp.ones(3)},
    }


def forward(params: dict[str, dict[str, Array]], x: Array) -> Array:
    hidden = jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"])
    return hidden @ params["b"]["kernel"] + params["b"]["bias"]


def test_grasp_is_the_hessians_product_with_the_gradient_transposed() -> None:
    kernel, x = tree()["a"]["kernel"], jax.random.normal(jax.random.key(1), (16, 5))
    scores = grasp_scores(lambda p: jnp.square(x @ p["kernel"] - 1).sum() / 2, {"kernel": kernel})
    gram = np.asarray(x.T @ x)
    expected = grasp(kernel, gram @ (gram @ np.asarray(kernel) - np.asarray(x.sum(axis=0))[:, None])).T
    np.testing.assert_allclose(scores["kernel"], expected, rtol=1e-3, atol=1e-3)
    masks = prune_tree({"kernel": kernel}, 0.5, score=scores)
    lowest = np.sort(scores["kernel"], axis=None)[9]
    np.testing.assert_array_equal(masks["kernel"].T, scores["kernel"] > lowest)


def test_synflow_in_rounds_keeps_paths_and_refuses_what_has_none() -> None:
    params, masks = tree(), None
    for step in range(1, 21):
        scores = synflow_scores(lambda p: forward(p, jnp.ones((1, 5))), params, masks=masks)
        masks = prune_tree(params, 1 - 0.1 ** (step / 20), masks=masks, score=scores)
    a, b = (np.asarray(masks[name]["kernel"]) for name in ("a", "b"))
    assert (~a).sum() + (~b).sum() == 28
    assert set(np.flatnonzero(a.any(axis=0))) == set(np.flatnonzero(b.any(axis=1)))  # no connection leads nowhere
    weights = [np.abs(np.asarray(params[name]["kernel"])) for name in ("a", "b")]
    first = synflow_scores(lambda p: forward(p, jnp.ones((1, 5))), params)
    np.testing.assert_allclose(first["a.kernel"], (weights[0] * weights[1].sum(axis=1)).T, rtol=1e-5)
    with pytest.raises(ValueError, match="no signal"):
        synflow_scores(lambda p: jnp.ones(3), params)
    with pytest.raises(ValueError, match="finite"):
        synflow_scores(lambda p: jnp.exp(1000 * forward(p, jnp.ones((1, 5)))), params)


def test_flax_layers_are_recorded_in_both_apis_and_are_as_they_were() -> None:
    x = jax.random.normal(jax.random.key(2), (7, 5))
    model = mask_model(nnx.Sequential(nnx.Linear(5, 4, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(4, 3, rngs=nnx.Rngs(1))))
    kinds = [type(layer) for layer in model.layers]
    with record_activations(model, hessian=True) as activations:
        y = model(x)
    hidden = np.maximum(np.asarray(x @ model.layers[0].kernel[...] + model.layers[0].bias[...]), 0)
    np.testing.assert_allclose(activations.hessian("layers.2"), 2 / 7 * hidden.T @ hidden, rtol=1e-5, atol=1e-6)
    assert [type(layer) for layer in model.layers] == kinds
    kernel = np.asarray(model.layers[2].kernel[...])
    prune_model(model, 0.5, score=activations.wanda(), scope="row")
    order = np.argsort((np.abs(kernel) * np.linalg.norm(hidden, axis=0)[:, None]), axis=0)
    assert not np.take_along_axis(np.asarray(model.layers[2].mask[...]), order[:2], axis=0).any()
    with pytest.raises(ValueError, match="outside of transforms"), record_activations(model):
        nnx.jit(lambda model: model(x))(model)
    assert [type(layer) for layer in model.layers] == kinds

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: Array) -> Array:
            return linen.Dense(3, name="last")(linen.relu(linen.Dense(4, name="first")(x)))

    params = {}
    for place, name in ((0, "first"), (2, "last")):
        layer = model.layers[place]
        params[name] = {"kernel": jnp.asarray(layer.full_kernel), "bias": layer.bias[...]}
    variables = mask_model({"params": params})
    with record_activations(variables) as recorded:
        np.testing.assert_allclose(Net().apply(variables, x), y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(recorded.input_norms("last"), activations.input_norms("layers.2"), rtol=1e-5)
    with pytest.raises(ValueError, match="nothing has gone into"), record_activations(variables) as recorded:
        recorded.wanda()


class Hidden(linen.Module):
    @linen.compact
    def __call__(self, x: Array) -> Array:
        return linen.Dense(6, name="hidden")(x)


def test_flax_models_are_updated_and_scored_as_pytorch_ones() -> None:
    rngs = nnx.Rngs(0)
    layers = nnx.Linear(6, 6, rngs=rngs), nnx.tanh, nnx.Linear(6, 6, rngs=rngs)
    model, x = (
        mask_model(nnx.Sequential(*layers)),
        jnp.asarray(np.random.default_rng(0).normal(size=(24, 6)), jnp.float32),
    )
    theirs = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh(), torch.nn.Linear(6, 6))
    for place in (0, 2):
        theirs[place].weight.data = torch.from_numpy(np.array(model.layers[place].kernel[...]).T.copy())
        theirs[place].bias.data = torch.from_numpy(np.array(model.layers[place].bias[...]))
    in_torch.mask_model(theirs)
    rows = torch.from_numpy(np.array(x))
    examples = list(np.asarray(x)[:, None])
    for own, other in (
        (
            fisher_scores(model, lambda model, one: model(one).sum(), examples),
            in_torch.fisher_scores(theirs, lambda one: theirs(one).sum(), rows[:, None]),
        ),
        (
            grasp_of_model(model, lambda model, batch: (model(batch) ** 2).sum(), [x]),
            in_torch.grasp_scores(theirs, lambda batch: theirs(batch).square().sum(), [rows]),
        ),
    ):
        assert set(own) == {"layers.0", "layers.2"}
        for name, scores in own.items():
            np.testing.assert_allclose(scores, other[name.removeprefix("layers.")], rtol=1e-3, atol=1e-5)
    single = mask_model(nnx.Linear(6, 6, use_bias=False, rngs=rngs))
    diagonal = obd_scores(single, lambda model, rows: (model(rows) ** 2).sum() / 2, [jnp.eye(6)], draws=2)[""]
    np.testing.assert_allclose(diagonal, np.asarray(single.kernel[...]).T ** 2 / 2, rtol=1e-6)  # H is the identity
    for method in ("sparsegpt", "obs"):
        own, other = nnx.clone(model), copy.deepcopy(theirs)
        with record_activations(own, hessian=True) as activations:
            own(x)
        with in_torch.record_activations(other, hessian=True, dtype=torch.float64) as recorded, torch.no_grad():
            other(rows)
        before = prune_with_updates(own, 0.5, activations, method=method)
        in_torch.prune_with_updates(other, 0.5, recorded, method=method)
        for place in (0, 2):
            layer = own.layers[place]
            np.testing.assert_array_equal(np.asarray(layer.mask[...]).T, other[place].mask.numpy())
            np.testing.assert_allclose(np.asarray(layer.kernel[...]).T, other[place].weight.detach(), atol=1e-4)
            pruned = ~np.asarray(layer.mask[...])
            np.testing.assert_array_equal(layer.full_kernel[pruned], model.layers[place].kernel[...][pruned])
            assert before[f"layers.{place}"].all()
    params = {"hidden": {"kernel": model.layers[0].kernel[...], "bias": jnp.zeros(6)}}
    with record_activations(variables := mask_model({"params": params}), hessian=True) as activations:
        Hidden().apply(variables, x)
    new = prune_with_updates(variables, 0.5, activations, method="obs")
    np.testing.assert_array_equal(new["params"]["hidden"]["kernel"], own.layers[0].kernel[...])
    np.testing.assert_array_equal(get_masks(new)["hidden"], own.layers[0].mask[...])
    with record_activations(own, hessian=True) as activations:
        own(x)
    constrain(own, {"layers.0": Constraints(lower=-1.0, upper=1.0)})
    with pytest.raises(ValueError, match=r"layers.0 has constraints, .* free it"):
        prune_with_updates(own, 0.7, activations)
    with pytest.raises(ValueError, match="at least one batch"):
        fisher_scores(model, lambda model, one: model(one).sum(), [])
    with pytest.raises(TypeError, match="takes an nnx module; of linen's parameters"):
        fisher_scores({"params": {}}, lambda model, one: model(one).sum(), examples)
