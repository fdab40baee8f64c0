"""Whole nnx models: masked in place and back, pruned as PyTorch's are, restored bit for bit, reported."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

import maskedlinear.torch as in_torch
from maskedlinear import masks
from maskedlinear.flax import (
    MaskedLinear,
    SparseLinear,
    dense_gradients,
    get_masks,
    mask_model,
    param_masks,
    prune_model,
    regrow_model,
    set_masks,
    summary,
    unmask_model,
)
from maskedlinear.jax import freeze_masked


class Network(nnx.Module):
    """Layers in a list, one used twice, two that share a kernel."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(8, 16, rngs=rngs)
        self.blocks = nnx.List([nnx.Sequential(nnx.Linear(16, 16, rngs=rngs), nnx.relu) for _ in range(2)])
        self.again = self.blocks[0].layers[0]
        self.tied = nnx.Linear(16, 16, use_bias=False, rngs=rngs)
        self.tied.kernel = self.blocks[1].layers[0].kernel
        self.last = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(self.tied(self.again(x)))


@pytest.fixture
def model() -> Network:
    return Network()


X = jnp.asarray(np.random.default_rng(0).standard_normal((3, 8)), jnp.float32)


def masked(model: Any) -> set[str]:
    return {".".join(map(str, path)) for path, node in nnx.iter_graph(model) if isinstance(node, MaskedLinear)}


def test_every_linear_layer_is_masked_in_place_and_back(model: Network) -> None:
    before, state = model(X), nnx.state(model)
    assert mask_model(model) is model
    assert len(masked(model)) == 5
    assert type(model.first) is MaskedLinear
    assert model.again in (model.blocks[0].layers[0],)
    np.testing.assert_array_equal(nnx.jit(lambda m, x: m(x))(model, X), nnx.jit(lambda m, x: m(x))(model, X))
    np.testing.assert_allclose(model(X), before, rtol=1e-6)
    assert unmask_model(model) is model
    assert masked(model) == set()
    assert type(model.first) is nnx.Linear
    np.testing.assert_allclose(model(X), before, rtol=1e-6)
    assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(state)


def test_masks_and_patterns_choose_the_layers(model: Network) -> None:
    mask = masks.random((16, 8), sparsity=0.5, seed=1).T
    mask_model(model, {"first": mask})
    assert masked(model) == {"first"}
    assert (model.first.mask[...] == mask).all()  # type: ignore[attr-defined]
    mask_model(model, {"last": jnp.ones((16, 4))}, include="blocks.*")
    assert masked(model) >= {"first", "last"}
    y = model(X)
    unmask_model(model, include=lambda name, _: name == "first")
    np.testing.assert_allclose(model(X), y, rtol=1e-6)
    assert not model.first.kernel[...][~mask].any()
    assert isinstance(mask_model(nnx.Linear(3, 2, rngs=nnx.Rngs(0))), MaskedLinear)
    for wrong, message in (
        ({"masks": {"frist": mask}}, "masks must be of layers that there are; got 'frist'"),
        ({"masks": {"first": mask.T}}, "the mask of first: .* which is its transpose"),
        ({"include": "nonesuch"}, "means none of"),
    ):
        with pytest.raises(ValueError, match=message):
            mask_model(model, **wrong)  # type: ignore[arg-type]


def test_pruning_is_pytorchs_and_can_be_taken_back() -> None:
    rng = np.random.default_rng(0)
    kernels = [rng.standard_normal((8, 16)).astype(np.float32), rng.standard_normal((16, 4)).astype(np.float32)]
    ours = nnx.List([nnx.Linear(8, 16, rngs=nnx.Rngs(0)), nnx.Linear(16, 4, rngs=nnx.Rngs(1))])
    theirs = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
    gradients = [rng.standard_normal(kernel.shape).astype(np.float32) for kernel in kernels]
    for i, kernel in enumerate(kernels):
        ours[i].kernel[...] = jnp.asarray(kernel)
        theirs[i].weight.data = torch.from_numpy(kernel.T.copy())  # type: ignore[union-attr, assignment]
        theirs[i].weight.grad = torch.from_numpy(gradients[i].T.copy())  # type: ignore[union-attr, assignment]
    mask_model(ours)
    in_torch.mask_model(theirs)
    full = get_masks(ours)
    state = nnx.state(ours, nnx.Param)
    grads = jax.tree.map(lambda leaf: leaf, state)
    for i in range(2):
        grads[i]["kernel"].set_value(jnp.asarray(gradients[i]))
    for sparsity, options in (
        (0.3, {}),
        (0.5, {"scope": "layer", "score": "random", "seed": 3}),
        (0.7, {"score": "snip"}),
        (0.9, {"scope": "erdos_renyi", "score": "taylor"}),
    ):
        more = {"gradients": grads} if options.get("score") in ("snip", "taylor") else {}
        prune_model(ours, sparsity, **options, **more)  # type: ignore[arg-type]
        in_torch.prune_model(theirs, sparsity, **options)  # type: ignore[arg-type]
        for i in range(2):
            np.testing.assert_array_equal(np.asarray(ours[i].mask[...]).T, theirs[i].mask.numpy())  # type: ignore[union-attr, operator]
    with pytest.raises(ValueError, match="needs the gradient of each weight; 0 has none"):
        prune_model(ours, 0.9, score="snip")
    with pytest.raises(ValueError, match="there is none: make them with mask_model"):
        prune_model(nnx.List([]), 0.5)
    for layer in ours:
        np.testing.assert_array_equal(layer.kernel[...] == 0, ~layer.mask[...])
    assert set_masks(ours, full) is ours
    assert summary(ours).sparsity == 0
    for i, kernel in enumerate(kernels):
        np.testing.assert_array_equal(ours[i].kernel[...], kernel)
    with pytest.raises(ValueError, match="must be of layers"):
        set_masks(ours, {"7": full["0"]})
    with pytest.raises(ValueError, match="the mask of 0"):
        set_masks(ours, {"0": full["1"]})


def test_a_model_that_was_masked_trains(model: Network) -> None:
    mask_model(model, include=["first", "last"])
    prune_model(model, 0.5)
    optimizer = nnx.Optimizer(model, freeze_masked(optax.adamw(0.01)), wrt=nnx.Param)
    held = model.first.kernel[...][~np.asarray(model.first.mask[...])]  # type: ignore[attr-defined]

    @nnx.jit
    def step(model: Network, optimizer: Any) -> jax.Array:
        loss, grads = nnx.value_and_grad(lambda model: (model(X) ** 2).mean())(model)
        optimizer.update(model, grads, masks=param_masks(model))
        return loss

    losses = [float(step(model, optimizer)) for _ in range(5)]
    assert losses[-1] < losses[0]
    np.testing.assert_array_equal(model.first.kernel[...][~np.asarray(model.first.mask[...])], held)  # type: ignore[attr-defined]


@pytest.mark.parametrize("by", ["gradient", "chance"])
def test_connections_move_as_pytorchs_do(by: str) -> None:
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((8, 16)).astype(np.float32)
    mask = masks.random((16, 8), sparsity=0.7, seed=0)
    ours = nnx.List([MaskedLinear(8, 16, mask=mask.T, rngs=nnx.Rngs(0))])
    theirs = torch.nn.Sequential(in_torch.MaskedLinear(8, 16, mask=mask))
    ours[0].kernel[...] = jnp.asarray(kernel)
    theirs[0].weight.data = torch.from_numpy(kernel.T.copy())  # type: ignore[union-attr, assignment]
    theirs[0].bias.data.zero_()  # type: ignore[union-attr, operator]

    def loss(model: Any, x: jax.Array) -> jax.Array:
        return (model[0](x) ** 2).sum()

    gradients = dense_gradients(loss, ours, X)
    full = X.T @ (2 * ours[0](X))
    np.testing.assert_allclose(gradients["0"], full, rtol=1e-5, atol=1e-5)
    with in_torch.dense_gradients(theirs) as recorded:
        theirs(torch.from_numpy(np.array(X))).square().sum().backward()
    chosen = by == "gradient"
    for how, most in (({"seed": 3}, 15), ({"seed": 4, "exclude_dropped": True}, 15)):
        moved = regrow_model(ours, 0.4, gradients=gradients if chosen else None, **how)  # type: ignore[arg-type]
        assert moved == in_torch.regrow_model(theirs, 0.4, gradients=recorded if chosen else None, **how)  # type: ignore[arg-type]
        assert moved == most if "exclude_dropped" in how else 0 < moved <= most
    np.testing.assert_array_equal(np.asarray(ours[0].mask[...]).T, theirs[0].mask.numpy())  # type: ignore[union-attr, operator]
    np.testing.assert_array_equal(ours[0].kernel[...].T, theirs[0].to_linear().weight.detach().numpy())  # type: ignore[union-attr, operator]
    with pytest.raises(ValueError, match="needs that of each layer; 0 has none"):
        regrow_model(ours, 0.4, gradients={})


def test_layers_that_share_a_kernel_share_its_mask(model: Network) -> None:
    mask, tied = masks.random((16, 16), sparsity=0.5, seed=0), model.blocks[1].layers[0]
    mask_model(model, {"tied": mask}, include="blocks.1.*")
    assert model.tied.mask is tied.mask  # type: ignore[attr-defined]
    assert model.tied.dormant is tied.dormant  # type: ignore[attr-defined]
    before = nnx.grad(lambda model: (model(X) ** 2).sum())(model)
    prune_model(model, 0.75)
    assert int(tied.mask[...].sum()) == 64
    np.testing.assert_array_equal(tied.kernel[...] == 0, ~tied.mask[...])
    prune_model(model, 0.8, score="snip", gradients=before)
    set_masks(model, {"tied": mask})
    np.testing.assert_array_equal(get_masks(model)["blocks.1.layers.0"], mask)
    for call in (
        lambda: set_masks(model, {"tied": mask, "blocks.1.layers.0": ~mask}),
        lambda: mask_model(Network(), {"tied": mask, "blocks.1.layers.0": ~mask}),
        lambda: mask_model(mask_model(Network(), {"tied": mask}), {"blocks.1.layers.0": ~mask}),
    ):
        with pytest.raises(ValueError, match=r"different ones|masks must be of layers that there are"):
            call()
    y = model(X)
    unmask_model(model)
    assert masked(model) == set()
    np.testing.assert_allclose(model(X), y, rtol=1e-6)


def test_a_kernel_that_others_use_does_not_move(model: Network) -> None:
    mask_model(model, include=["tied", "blocks.1.*"])
    for call in (lambda: regrow_model(model, 0.5), lambda: dense_gradients(lambda m: m(X).sum(), model)):
        with pytest.raises(ValueError, match="has its kernel to itself; here 2 modules share it"):
            call()


def test_a_stack_of_layers_is_reported_one_by_one() -> None:
    stack = nnx.vmap(lambda rngs: MaskedLinear(3, 2, rngs=rngs))(nnx.Rngs(0).split(4))
    found = summary(nnx.List([stack]))
    assert [row.name for row in found.rows] == ["0[0]", "0[1]", "0[2]", "0[3]"]
    assert found.sparsity == 0


def test_the_report_counts_what_is_live_and_dead() -> None:
    mask = np.array([[True, False, True], [False, False, False]])
    model = nnx.List(
        [MaskedLinear(3, 2, mask=mask.T, rngs=nnx.Rngs(0)), SparseLinear(3, 2, mask=mask.T, rngs=nnx.Rngs(0))]
    )
    found = summary(model)
    for row, form in zip(found.rows, ("dense", "sparse"), strict=True):
        assert (row.form, row.shape, row.connections, row.dead_outputs, row.dead_inputs) == (form, (2, 3), 2, 1, 1)
    assert "0.6667" in str(found)
