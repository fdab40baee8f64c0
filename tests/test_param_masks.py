"""``param_masks`` and the optax guard on Flax models: shared kernels, containers, stacks, partitions, train states."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict
from flax.nnx import bridge
from flax.training.train_state import TrainState
from jax import Array

from maskedlinear import masks
from maskedlinear.flax import Mask, MaskedDense, MaskedLinear, param_masks
from maskedlinear.jax import apply_masks, freeze_masked, prune_tree, set_optimizer_masks
from test_flax import Network

MASK = masks.random((5, 7), sparsity=0.5, seed=1)  # (out, in)
KERNEL_MASK = MASK.T  # (in, out), as every Flax kernel


@pytest.fixture
def x(rng: np.random.Generator) -> Array:
    return jnp.asarray(rng.standard_normal((3, 7)), jnp.float32)


def guarded_steps(model: Any, wrt: Any = nnx.Param) -> None:
    optimizer = nnx.Optimizer(model, freeze_masked(optax.adamw(0.1, weight_decay=0.1)), wrt=wrt)
    ones = jax.tree.map(jnp.ones_like, nnx.state(model, wrt))
    optimizer.update(model, ones, masks=param_masks(model, wrt))


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_a_shared_kernel_is_masked_where_one_of_its_layers_masks_it(names: tuple[str, str]) -> None:
    other = masks.random((7, 5), sparsity=0.8, seed=3)

    class Shared(nnx.Module):
        def __init__(self, second: nnx.Linear) -> None:
            first = MaskedLinear(7, 5, mask=KERNEL_MASK, rngs=nnx.Rngs(0))
            second.kernel = first.kernel
            for name, layer in zip(names, (first, second), strict=True):
                setattr(self, name, layer)

    for second, live in (
        (MaskedLinear(7, 5, mask=other, rngs=nnx.Rngs(1)), KERNEL_MASK & other),
        (nnx.Linear(7, 5, rngs=nnx.Rngs(1)), KERNEL_MASK),
    ):
        model = Shared(second)
        guarded_steps(model)
        np.testing.assert_array_equal(np.asarray(model.a.kernel[...]) != 0, live)


@pytest.mark.parametrize(
    "hold", [lambda kernel: nnx.List([kernel]), lambda kernel: nnx.Dict(used=kernel), lambda kernel: nnx.data([kernel])]
)
def test_a_kernel_that_something_else_holds_too_has_the_layers_mask(hold: Any) -> None:
    class Holder(nnx.Module):
        def __init__(self) -> None:
            self.layer = MaskedLinear(7, 5, mask=KERNEL_MASK, rngs=nnx.Rngs(0))
            self.more = hold(self.layer.kernel)

    tree = param_masks(Holder())
    (mask,) = (mask for path, mask in nnx.to_flat_state(tree) if "bias" not in path)
    np.testing.assert_array_equal(mask, KERNEL_MASK)


def test_param_masks_of_layers_in_containers() -> None:
    class Holder(nnx.Module):
        def __init__(self) -> None:
            self.layers = nnx.data({"items": [MaskedLinear(7, 5, mask=KERNEL_MASK, rngs=nnx.Rngs(0))]})

    tree = param_masks(Holder())
    np.testing.assert_array_equal(tree["layers"]["items"][0]["kernel"], KERNEL_MASK)


def test_param_masks_of_an_abstract_model_with_a_shared_kernel() -> None:
    class Shared(nnx.Module):
        def __init__(self) -> None:
            self.a, self.b = (MaskedLinear(7, 5, mask=KERNEL_MASK, rngs=nnx.Rngs(0)) for _ in range(2))
            self.b.kernel = self.a.kernel

    tree = param_masks(nnx.eval_shape(Shared))
    assert tree["a"]["kernel"] == jax.ShapeDtypeStruct((7, 5), bool)


def test_a_stack_of_layers_may_share_a_mask(x: Array) -> None:
    axes = nnx.StateAxes({Mask: None, ...: 0})
    keys = jax.random.split(jax.random.key(0), 3)
    layers = nnx.vmap(lambda key: MaskedLinear(7, 5, mask=KERNEL_MASK, rngs=nnx.Rngs(key)), out_axes=axes)(keys)
    assert layers.mask.shape == (7, 5)
    assert layers.sparsity == 17 / 35
    assert nnx.vmap(lambda layer, x: layer(x), in_axes=(axes, None))(layers, x).shape == (3, 3, 5)
    start = np.array(layers.kernel[...])
    guarded_steps(layers)
    moved = np.asarray(layers.kernel[...]) != start
    np.testing.assert_array_equal(moved, np.broadcast_to(KERNEL_MASK, moved.shape))
    layers.set_mask(~KERNEL_MASK)
    assert MaskedLinear.from_linear(layers).mask.shape == (7, 5)

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x: Array, _: None) -> tuple[Array, None]:
            return MaskedDense(7, mask=np.eye(7), name="wired")(x), None

    scanned = nn.scan(
        Layer, variable_axes={"params": 0}, variable_broadcast="masks", split_rngs={"params": True}, length=3
    )
    variables = scanned().init(jax.random.key(0), x, None)
    np.testing.assert_array_equal(param_masks(variables)["wired"]["kernel"], np.broadcast_to(np.eye(7), (3, 7, 7)))


def test_a_mask_of_another_shape_than_its_kernel_guards_nothing_silently(x: Array) -> None:
    variables = MaskedDense(5, mask=KERNEL_MASK).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"kernel \(in, out\) = \(7, 5\); got \(1, 5\)"):
        param_masks({**variables, "masks": {"mask": np.ones((1, 5), bool)}})


def test_param_masks_with_a_filter_and_of_a_bridged_layer(x: Array) -> None:
    model = Network(nnx.Rngs(0))
    kernels = nnx.All(nnx.Param, nnx.PathContains("kernel"))
    before = np.array(model.first.kernel[...])
    guarded_steps(model, kernels)
    np.testing.assert_array_equal(np.asarray(model.first.kernel[...]) != before, KERNEL_MASK)
    bridged = bridge.ToNNX(MaskedDense(5, mask=KERNEL_MASK), rngs=nnx.Rngs(0))
    bridge.lazy_init(bridged, x)
    np.testing.assert_array_equal(param_masks(bridged)["kernel"], KERNEL_MASK)

    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            return nn.Dense(3)(MaskedDense(5, mask=KERNEL_MASK, name="items")(x))

    nested = bridge.ToNNX(Inner(), rngs=nnx.Rngs(0))
    bridge.lazy_init(nested, x)
    start = np.array(nested.items["kernel"][...])
    guarded_steps(nested)
    np.testing.assert_array_equal(np.asarray(nested.items["kernel"][...]) != start, KERNEL_MASK)
    back = bridge.to_linen(MaskedLinear, 7, 5, mask=KERNEL_MASK)
    variables = back.init(jax.random.key(0), x)
    np.testing.assert_array_equal(param_masks(variables)["kernel"], KERNEL_MASK)


def test_linen_partitioned_and_frozen_variables(x: Array) -> None:
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    model = MaskedDense(5, mask=KERNEL_MASK, kernel_init=init)
    variables = model.init(jax.random.key(0), x)
    assert isinstance(variables["masks"]["mask"], nn.Partitioned)
    assert variables["masks"]["mask"].names == ("in", "out")
    plain = MaskedDense(5, mask=KERNEL_MASK).init(jax.random.key(0), x)
    np.testing.assert_array_equal(nn.unbox(variables)["params"]["kernel"], plain["params"]["kernel"])
    np.testing.assert_array_equal(model.apply(variables, x), model.apply(plain, x))
    tx = freeze_masked(optax.adamw(0.1, weight_decay=0.1))
    for these in (variables, FrozenDict(plain)):
        params = these["params"]
        tree = param_masks(these)
        assert type(tree) is type(params)
        assert (isinstance(tree["kernel"], nn.Partitioned), tree["bias"]) == (
            isinstance(params["kernel"], nn.Partitioned),
            None,
        )
        updates, _ = tx.update(params, tx.init(params), params, masks=tree)
        moved = nn.unbox(optax.apply_updates(params, updates))["kernel"] != nn.unbox(params)["kernel"]
        np.testing.assert_array_equal(moved, KERNEL_MASK)


def test_a_train_state_is_guarded_by_masks_given_once(x: Array) -> None:
    model = MaskedDense(5, mask=KERNEL_MASK)
    variables = model.init(jax.random.key(0), x)
    tx = freeze_masked(optax.adamw(0.1, weight_decay=0.1), masks=param_masks(variables))
    state = TrainState.create(apply_fn=model.apply, params=variables["params"], tx=tx)
    new = state.apply_gradients(grads=jax.tree.map(jnp.ones_like, state.params))
    np.testing.assert_array_equal(new.params["kernel"] != state.params["kernel"], KERNEL_MASK)


def test_masks_of_variables_are_matched_by_path() -> None:
    model = nnx.Sequential(MaskedLinear(4, 8, mask=np.tri(4, 8), rngs=nnx.Rngs(0)), nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
    tx, params = freeze_masked(optax.adamw(0.1), masks=param_masks(model)), nnx.state(model, nnx.Param)
    updates, _ = tx.update(params, tx.init(params), params)
    kernel = optax.apply_updates(params, updates)["layers"][0]["kernel"][...]
    np.testing.assert_array_equal(np.asarray(kernel) != 0, np.tri(4, 8) != 0)
    with pytest.raises(ValueError, match="the masks must be a tree like the parameters'"):
        tx.update(params, tx.init(params), params, masks={"layers": {0: {"kernel": True}}})


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: tx,
        lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
        lambda tx: optax.MultiSteps(tx, 1),
        lambda tx: optax.masked(tx, lambda params: jax.tree.map(lambda _: True, params)),
    ],
    ids=["alone", "chain", "accumulated", "masked"],
)
def test_masks_that_change_are_set_in_a_train_state(wrap: Any) -> None:
    model, x = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(2)]), jnp.ones((3, 4))
    params = model.init(jax.random.key(0), x)["params"]
    tx = wrap(freeze_masked(optax.adamw(0.1, weight_decay=0.1)))
    state, live = TrainState.create(apply_fn=model.apply, params=params, tx=tx), prune_tree(params, 0.3)

    @jax.jit
    def step(state: Any) -> Any:
        return state.apply_gradients(grads=jax.grad(lambda p: (model.apply({"params": p}, x) ** 2).sum())(state.params))

    with pytest.raises(ValueError, match="or set them in its state, with set_optimizer_masks"):
        step(state)
    for sparsity in (0.5, 0.8):
        live = prune_tree(state.params, sparsity, masks=live)
        state = state.replace(
            params=apply_masks(state.params, live), opt_state=set_optimizer_masks(state.opt_state, live)
        )
        for _ in range(3):
            before, state = state.params, step(state)
        for name in ("layers_0", "layers_2"):
            kernel, mask = state.params[name]["kernel"], live[name]["kernel"]
            assert not np.asarray(kernel)[~mask].any()
            assert (np.asarray(kernel != before[name]["kernel"]) == np.asarray(mask)).mean() > 0.9
    with pytest.raises(ValueError, match="no freeze_masked in this optimizer's state"):
        set_optimizer_masks(optax.adam(0.1).init(params), live)
