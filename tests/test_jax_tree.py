"""Pruning of parameter trees: the core's masks, in the form that ``freeze_masked`` takes, for linen too."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from maskedlinear import pruning
from maskedlinear.jax import apply_masks, freeze_masked, prune_tree, scheduled_pruning
from maskedlinear.models import WeightAxes
from maskedlinear.pruning import CubicSchedule

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
    assert masks["first"]["bias"] is masks["last"][1] is None
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
    assert masks["layers_0"]["bias"] is None
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


class Block(nn.Module):
    """Of everything that Flax calls its parameters by."""

    @nn.compact
    def __call__(self, tokens: Any, images: Any) -> Any:
        x = nn.Embed(11, 8)(tokens) + self.param("pos_embedding", nn.initializers.ones, (5, 8))
        x = nn.LayerNorm()(x + nn.MultiHeadDotProductAttention(num_heads=2)(x))
        x, _ = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()(x, None)
        return nn.Dense(4)(x), nn.Conv(6, (3, 3))(images)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        return nn.LayerNorm()(nn.Dense(8)(x)), None


def block() -> Any:
    tokens, images = jnp.zeros((2, 5), int), jnp.ones((1, 4, 4, 3))
    return Block(), (tokens, images), Block().init(jax.random.key(0), tokens, images)["params"]


def test_matrices_and_kernels_are_pruned_and_nothing_else() -> None:
    _, _, params = block()
    masks = prune_tree(params, 0.5, scope="layer")
    masked = {".".join(path): mask for path, mask in flatten_dict(masks).items() if mask is not None}
    attention = "MultiHeadDotProductAttention_0"
    assert set(masked) == {
        *(f"{attention}.{part}.kernel" for part in ("query", "key", "value", "out")),
        *("ScanLayer_0.Dense_0.kernel", "Dense_0.kernel", "Conv_0.kernel"),
    }
    assert all(float(mask.mean()) == 0.5 for mask in masked.values())
    named = prune_tree(params, 0.5, include=["Embed_0.embedding", "Dense_0.*"], scope="layer")
    assert {path[0] for path, mask in flatten_dict(named).items() if mask is not None} == {"Embed_0", "Dense_0"}
    with pytest.raises(ValueError, match=r"nobody knows those of ScanLayer_0.Dense_0.kernel: tell them"):
        prune_tree(params, 0.5, scope="erdos_renyi")
    schedule = CubicSchedule(0.5, begin=0, end=1)
    with pytest.raises(ValueError, match=r"nobody knows those of ScanLayer_0.Dense_0.kernel: tell them"):
        scheduled_pruning(optax.sgd(0.1), schedule, scope="erdos_renyi").init(params)
    axes = {"ScanLayer_0.Dense_0.kernel": WeightAxes(batch_axis=0, in_axis=1, out_axis=2)}
    prune_tree(params, 0.5, scope="erdos_renyi", axes=axes)


def test_masks_are_arguments_of_jitted_functions_and_carries_of_scans() -> None:
    model, inputs, params = block()
    masks = prune_tree(params, 0.5)

    @jax.jit
    def loss(params: Any, masks: Any) -> Any:
        return sum((y**2).mean() for y in model.apply({"params": apply_masks(params, masks)}, *inputs))

    grads = jax.jit(jax.grad(loss))(params, masks)
    for path, mask in flatten_dict(masks).items():
        if mask is not None:
            assert not flatten_dict(grads)[path][~mask].any()
    tx = freeze_masked(optax.adamw(0.01, weight_decay=0.1))

    def step(carry: Any, _: Any) -> Any:
        params, state, masks = carry
        updates, state = tx.update(jax.grad(loss)(params, masks), state, params, masks=masks)
        return (optax.apply_updates(params, updates), state, masks), loss(params, masks)

    (params, _, _), losses = jax.lax.scan(step, (params, tx.init(params), masks), None, length=4)
    assert losses[-1] < losses[0]
    for path, mask in flatten_dict(masks).items():
        if mask is not None:
            assert not flatten_dict(params)[path][~mask].any()


def test_unknown_parameters_are_named() -> None:
    params = {"ode": jnp.arange(24.0).reshape(2, 3, 4), "w": jnp.ones((3, 4))}
    with pytest.raises(ValueError, match="axes must be of layers that there are; got 'ody'"):
        prune_tree(params, 0.5, axes={"ody": WeightAxes()})
    with pytest.warns(UserWarning, match="ode are left out, since their names do not say whether they are weights"):
        masks = prune_tree(params, 0.5)
    assert masks["ode"] is None
    assert prune_tree(params, 0.5, axes={"ode": WeightAxes(1, 2, 0)}, include="ode", scope="layer")["ode"].sum(
        (1, 2)
    ).tolist() == [6, 6]


def test_convolutions_of_both_frameworks_get_the_same_masks() -> None:
    kernel = np.random.default_rng(0).integers(-2, 3, (3, 3, 4, 6)).astype(np.float32)  # many of equal magnitude
    mask = prune_tree({"Conv_0": {"kernel": jnp.asarray(kernel)}}, 0.6)["Conv_0"]["kernel"]
    axes = WeightAxes(out_axis=0, in_axis=(1, 2, 3))  # as PyTorch's
    weight = kernel.transpose(3, 2, 0, 1)
    wanted = pruning.prune(np.abs(axes.matrices(weight)[0]), sparsity=0.6)
    np.testing.assert_array_equal(np.asarray(mask).transpose(3, 2, 0, 1), axes.from_matrices(wanted, weight.shape))


@pytest.mark.parametrize("of", ["weights", "model"])
def test_a_fraction_of_everything_counts_what_is_left_out(of: Any) -> None:
    params = {"a": {"kernel": jnp.ones((8, 8))}, "b": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}}
    before = prune_tree(params, 0.5, include="b.kernel", scope="layer")
    masks = prune_tree(params, 0.6, masks=before, include="a.kernel", of=of, scope="layer")
    zeros = sum(int((~mask).sum()) for mask in jax.tree.leaves(masks))
    assert zeros == int(0.6 * (96 if of == "weights" else 100))
    with pytest.raises(ValueError, match="of must be 'masked', 'weights' or 'model'; got 'all'"):
        prune_tree(params, 0.5, of="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="inside a transform the sparsity is of the parameters to prune"):
        jax.jit(lambda params: prune_tree(params, 0.5, of=of, scope="layer"))(params)
