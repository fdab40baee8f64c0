"""What a Flax layer shows is what acts: kernels are +0 under the mask, and dormant weights lie apart and come back."""

from __future__ import annotations

from collections.abc import Callable
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
from jax import Array

from maskedlinear import masks
from maskedlinear.flax import (
    Dormant,
    Mask,
    MaskedDense,
    MaskedLinear,
    check_masks,
    compress,
    get_masks,
    load_state,
    mask_model,
    param_masks,
    prune_model,
    regrow_model,
    rewind_model,
    set_masks,
    set_param_masks,
)
from maskedlinear.jax import freeze_masked, scheduled_pruning
from maskedlinear.pruning import CubicSchedule

MASK = masks.random((5, 7), sparsity=0.5, seed=1).T  # (in, out)
ODD = np.resize(np.array([np.nan, -0.0, np.inf, 1e-45, -1e-45, -np.inf, 3.0], np.float32), (7, 5))
X = jnp.asarray(np.random.default_rng(0).standard_normal((3, 7)), jnp.float32)


def bits(array: Any) -> Any:
    return np.asarray(array).view(np.uint32)


def linear(seed: int = 0) -> nnx.Linear:
    """Return a layer whose weights under the mask are what arithmetic loses."""
    layer = nnx.Linear(7, 5, rngs=nnx.Rngs(seed))
    layer.kernel[...] = jnp.where(MASK, layer.kernel[...], ODD)
    return layer


def clean(layer: Any) -> bool:
    """Whether the kernel is +0 under the mask, and what is dormant +0 where it is live."""
    mask = np.broadcast_to(layer.mask[...], layer.kernel[...].shape)
    return not bits(layer.kernel[...])[~mask].any() and not bits(layer.dormant[...])[mask].any()


def square(model: Any, x: Array = X) -> Array:
    return (model(x) ** 2).mean()


@nnx.jit
def guarded_step(model: Any, optimizer: Any) -> None:
    optimizer.update(model, nnx.grad(square)(model), masks=param_masks(model))


def guarded(model: Any) -> nnx.Optimizer[Any]:
    tx = freeze_masked(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.1)))
    return nnx.Optimizer(model, tx, wrt=nnx.Param)


def test_every_bit_of_what_is_dormant_comes_back() -> None:
    plain = linear()
    for layer in (MaskedLinear.from_linear(plain, MASK), MaskedLinear.adopt(linear(), MASK)):
        assert clean(layer)
        assert isinstance(layer.dormant, Dormant)
        np.testing.assert_array_equal(bits(layer.full_kernel), bits(plain.kernel[...]))
        for change in (layer.set_mask, lambda mask, layer=layer: nnx.jit(MaskedLinear.set_mask)(layer, mask)):
            for mask in (~MASK, MASK, np.zeros((7, 5), bool), np.ones((7, 5), bool), MASK):
                change(jnp.asarray(mask))
                assert clean(layer)
                np.testing.assert_array_equal(bits(layer.full_kernel), bits(plain.kernel[...]))
        copy = MaskedLinear.from_linear(layer, ~MASK)
        np.testing.assert_array_equal(bits(copy.full_kernel), bits(plain.kernel[...]))
        assert clean(copy)


def operations() -> dict[str, Callable[[Any], Any]]:
    def train(model: Any) -> None:
        optimizer = guarded(model)
        for _ in range(3):
            guarded_step(model, optimizer)

    def trained_by_a_schedule(model: Any) -> None:
        schedule = CubicSchedule(0.9, begin=0, end=4, every=2, initial=0.6)
        tx = scheduled_pruning(optax.adam(0.1), schedule, masks=param_masks(model))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        def step(model: Any, optimizer: Any) -> None:
            optimizer.update(model, nnx.grad(square)(model))

        for _ in range(5):
            step(model, optimizer)
            set_param_masks(model, optimizer.opt_state.masks, optimizer.opt_state.dormant)

    def saved() -> Any:
        return nnx.state(mask_model(nnx.Sequential(linear(3), nnx.relu, nnx.Linear(5, 4, rngs=nnx.Rngs(0)))))

    return {
        "nothing": lambda _: None,
        "set_mask": lambda model: model.layers[0].set_mask(~MASK),
        "set_masks": lambda model: set_masks(model, {"layers.0": ~MASK}),
        "set_param_masks": lambda model: set_param_masks(model, param_masks(model)),
        "prune": lambda model: prune_model(model, 0.8),
        "regrow": lambda model: regrow_model(model, 0.5),
        "rewind": lambda model: rewind_model(model, saved()),
        "load": lambda model: load_state(model, saved()),
        "train": train,
        "schedule": trained_by_a_schedule,
    }


@pytest.mark.parametrize("name", operations())
def test_kernels_are_zero_under_their_masks_after(name: str) -> None:
    rngs = nnx.Rngs(0)
    model = mask_model(nnx.Sequential(nnx.Linear(7, 5, rngs=rngs), nnx.relu, nnx.Linear(5, 4, rngs=rngs)))
    prune_model(model, 0.6, scope="layer")
    operations()[name](model)
    assert clean(model.layers[0])
    assert clean(model.layers[2])
    assert check_masks(model, X).ok
    plain = nnx.Sequential(nnx.Linear(7, 5, rngs=rngs), nnx.relu, nnx.Linear(5, 4, rngs=rngs))
    for ours, theirs in zip(model.layers[::2], plain.layers[::2], strict=True):
        theirs.kernel[...], theirs.bias[...] = ours.kernel[...], ours.bias[...]
    np.testing.assert_allclose(plain(X), model(X), rtol=1e-6, atol=1e-6)
    dense = compress(nnx.clone(model), "sparse").layers[0].to_masked()
    np.testing.assert_array_equal(dense.kernel[...], model.layers[0].kernel[...])


def test_new_connections_start_at_zero_and_those_that_went_are_dormant() -> None:
    model = nnx.List([MaskedLinear.from_linear(nnx.Linear(7, 5, rngs=nnx.Rngs(0)), MASK)])
    before, full = MASK, np.asarray(model[0].full_kernel)
    regrow_model(model, 0.5, seed=1)
    after = np.asarray(model[0].mask[...])
    came, went = after & ~before, before & ~after
    assert came.any()
    assert not bits(model[0].full_kernel)[came].any()
    np.testing.assert_array_equal(model[0].full_kernel[went], full[went])
    np.testing.assert_array_equal(model[0].full_kernel[~came], full[~came])


def test_what_an_optimizer_leaves_is_no_weight() -> None:
    layer = MaskedLinear.from_linear(nnx.Linear(7, 5, rngs=nnx.Rngs(0)), MASK)
    full, y = layer.full_kernel, layer(X)
    layer.kernel[...] = jnp.where(MASK, layer.kernel[...], 7.0)
    np.testing.assert_array_equal(layer(X), y)
    np.testing.assert_array_equal(layer.masked_kernel, layer.to_linear().kernel[...])
    layer.set_mask(np.ones((7, 5), bool))
    np.testing.assert_array_equal(layer.kernel[...], full)


@pytest.mark.parametrize("make", ["init", "from_linear", "adopt", "mask_model"])
def test_without_dormant_weights_connections_come_back_at_zero(make: str) -> None:
    layer: MaskedLinear = {
        "init": lambda: MaskedLinear(7, 5, mask=MASK, keep_dormant=False, rngs=nnx.Rngs(0)),
        "from_linear": lambda: MaskedLinear.from_linear(linear(), MASK, keep_dormant=False),
        "adopt": lambda: MaskedLinear.adopt(linear(), MASK, keep_dormant=False),
        "mask_model": lambda: mask_model(linear(), {"": MASK}, keep_dormant=False),
    }[make]()  # type: ignore[no-untyped-call]
    assert layer.dormant is None
    assert MaskedLinear.from_linear(layer).dormant is None
    assert "dormant" not in nnx.state(layer)
    live = np.asarray(layer.kernel[...])
    layer.kernel[...] = jnp.where(MASK, live, 7.0)
    layer.set_mask(np.ones((7, 5), bool))
    np.testing.assert_array_equal(layer.kernel[...], np.where(MASK, live, 0))
    load_state(layer, nnx.state(MaskedLinear(7, 5, mask=MASK, keep_dormant=False, rngs=nnx.Rngs(0))))
    assert layer.release().kernel[...].shape == (7, 5)


@pytest.mark.parametrize("load", [load_state, rewind_model])
def test_states_of_earlier_versions_load(load: Any) -> None:
    source = linear(5)
    state = nnx.state(MaskedLinear.from_linear(source, MASK))
    del state["dormant"]
    state["kernel"].set_value(source.kernel[...])  # all weights were in the kernel
    layer = MaskedLinear(7, 5, mask=~MASK if load is load_state else MASK, rngs=nnx.Rngs(0))
    load(layer, state)
    np.testing.assert_array_equal(layer.mask[...], MASK)
    np.testing.assert_array_equal(bits(layer.full_kernel), bits(source.kernel[...]))
    assert clean(layer)
    full = mask_model(nnx.Linear(7, 5, rngs=nnx.Rngs(0)))  # what nnx.update brings acts masked, and comes back
    nnx.update(full, state)
    np.testing.assert_array_equal(full(X), layer(X))
    full.set_mask(np.ones((7, 5), bool))  # type: ignore[attr-defined]
    np.testing.assert_array_equal(bits(full.kernel[...]), bits(source.kernel[...]))


def test_a_plain_state_loads_under_the_mask_of_now() -> None:
    layer = MaskedLinear(7, 5, mask=MASK, rngs=nnx.Rngs(0))
    load_state(layer, nnx.state(linear()))
    np.testing.assert_array_equal(layer.mask[...], MASK)
    np.testing.assert_array_equal(bits(layer.full_kernel), bits(linear().kernel[...]))
    assert clean(layer)


def test_a_layer_without_values_acts_with_the_full_mask_once_it_has_a_kernel() -> None:
    source = nnx.Linear(7, 5, rngs=nnx.Rngs(0))

    def filled(**options: Any) -> Any:
        layer = nnx.eval_shape(lambda: MaskedLinear(7, 5, rngs=nnx.Rngs(0), **options))
        layer.kernel.set_value(source.kernel[...])
        layer.bias.set_value(source.bias[...])  # type: ignore[union-attr]
        return layer

    layer = filled()
    np.testing.assert_array_equal(layer(X), source(X))
    np.testing.assert_array_equal(layer.to_linear()(X), source(X))
    assert layer.sparsity == 0
    layer.set_mask(MASK)
    np.testing.assert_array_equal(layer.full_kernel, source.kernel[...])
    assert clean(layer)
    with pytest.raises(ValueError, match="abstract"):
        filled(mask=MASK)(X)
    abstract = nnx.eval_shape(lambda: MaskedLinear(7, 5, rngs=nnx.Rngs(0)))
    load_state(abstract, nnx.state(source))
    np.testing.assert_array_equal(abstract(X), source(X))


def test_linen_variables_move_their_weights() -> None:
    model = MaskedDense(5, mask=MASK)
    variables = model.init(jax.random.key(0), X)
    params, dormant = variables["params"], variables["dormant"]["dormant"]
    assert not bits(params["kernel"])[~MASK].any()
    assert not bits(dormant)[MASK].any()
    np.testing.assert_array_equal(model.apply(variables, X), nn.Dense(5).apply({"params": params}, X))
    odd = {**variables, "dormant": {"dormant": jnp.where(MASK, 0, ODD)}}
    for change in (set_masks, jax.jit(set_masks)):
        for start in (odd, FrozenDict(odd)):
            moved = change(start, {"": jnp.asarray(~MASK)})
            assert jax.tree.structure(dict(moved)) == jax.tree.structure(dict(start))
            np.testing.assert_array_equal(bits(moved["params"]["kernel"]), bits(np.where(MASK, 0, ODD)))
            back = set_masks(moved, get_masks(odd))
            jax.tree.map(lambda a, b: np.testing.assert_equal(a.tobytes(), b.tobytes()), dict(back), dict(start))
    with pytest.raises(ValueError, match="masks must be of layers that there are; got 'other'"):
        set_masks(variables, {"other": MASK})
    with pytest.raises(ValueError, match=r"the mask of the layer: .* which is its transpose"):
        set_masks(variables, {"": MASK.T})
    by_hand = {**variables, "masks": {"mask": np.ones((7, 5), bool)}}  # only selects
    np.testing.assert_array_equal(model.apply(by_hand, X), model.apply(variables, X))


def test_linen_variables_without_dormant_weights() -> None:
    for variables in (
        MaskedDense(5, mask=MASK, keep_dormant=False).init(jax.random.key(0), X),
        {
            name: tree
            for name, tree in MaskedDense(5, mask=MASK).init(jax.random.key(0), X).items()
            if name != "dormant"
        },
    ):
        assert set(variables) == {"params", "masks"}
        moved = set_masks(variables, {"": np.ones((7, 5), bool)})
        assert set(moved) == {"params", "masks"}
        np.testing.assert_array_equal(moved["params"]["kernel"], variables["params"]["kernel"])


@pytest.mark.parametrize("kept", [True, False])
def test_linen_layers_in_a_scan(kept: bool) -> None:
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x: Array, _: None) -> tuple[Array, None]:
            return MaskedDense(7, mask=np.eye(7), name="wired")(x), None

    axes = {"params": 0} | ({"dormant": 0} if kept else {})
    scanned = nn.scan(Layer, variable_axes=axes, variable_broadcast="masks", split_rngs={"params": True}, length=3)()
    variables = scanned.init(jax.random.key(0), X, None)
    assert ("dormant" in variables) == kept
    kernel = variables["params"]["wired"]["kernel"]
    np.testing.assert_array_equal(kernel != 0, np.broadcast_to(np.eye(7), (3, 7, 7)))
    moved = set_masks(variables, {"wired": np.ones((7, 7), bool)})
    assert ((moved["params"]["wired"]["kernel"] == 0).any()) != kept
    assert scanned.apply(moved, X, None)[0].shape == X.shape


def test_partitioned_and_bridged_layers() -> None:
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    variables = MaskedDense(5, mask=MASK, kernel_init=init).init(jax.random.key(0), X)
    assert variables["dormant"]["dormant"].names == ("in", "out")
    moved = set_masks(variables, {"": ~MASK})
    assert moved["params"]["kernel"].names == ("in", "out")
    np.testing.assert_array_equal(moved["params"]["kernel"].value, variables["dormant"]["dormant"].value)
    bridged = bridge.ToNNX(MaskedDense(5, mask=MASK), rngs=nnx.Rngs(0))
    bridge.lazy_init(bridged, X)
    assert isinstance(bridged.dormant, Dormant)
    kernel, dormant = bridged.kernel[...], bridged.dormant[...]
    tree = jax.tree.map(lambda mask: ~mask if mask is not True else mask, param_masks(bridged))
    set_param_masks(bridged, tree)
    np.testing.assert_array_equal(bridged.kernel[...], dormant)
    np.testing.assert_array_equal(bridged.dormant[...], kernel)
    back = bridge.to_linen(MaskedLinear, 7, 5, mask=MASK).init(jax.random.key(0), X)
    assert back["dormant"]["dormant"].shape == (7, 5)


def test_stacks_of_layers_keep_their_dormant_weights() -> None:
    axes = nnx.StateAxes({Mask: None, ...: 0})
    keys = jax.random.split(jax.random.key(0), 3)
    stack = nnx.vmap(lambda key: MaskedLinear(7, 5, mask=MASK, rngs=nnx.Rngs(key)), out_axes=axes)(keys)
    assert stack.dormant.shape == (3, 7, 5)
    full = stack.full_kernel
    assert clean(stack)
    stack.set_mask(~MASK)
    assert clean(stack)
    np.testing.assert_array_equal(stack.full_kernel, full)
    assert nnx.vmap(lambda layer, x: layer(x), in_axes=(axes, None))(stack, X).shape == (3, 3, 5)
    graph, params, rest = nnx.split(stack, nnx.Param, ...)
    assert set(params) == {"kernel", "bias"}
    assert isinstance(nnx.merge(graph, params, rest), MaskedLinear)


def test_the_values_that_a_schedule_pruned_become_dormant_in_the_layer() -> None:
    model = mask_model(nnx.Sequential(nnx.Linear(7, 5, rngs=nnx.Rngs(0))))
    before = np.asarray(model.layers[0].kernel[...])
    tx = scheduled_pruning(optax.sgd(0.0), CubicSchedule(0.5, begin=0, end=1), masks=param_masks(model))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> None:
        optimizer.update(model, nnx.grad(square)(model))
        set_param_masks(model, optimizer.opt_state.masks, optimizer.opt_state.dormant)

    for _ in range(3):
        step(model, optimizer)
    assert clean(model.layers[0])
    assert model.layers[0].sparsity == 17 / 35
    np.testing.assert_array_equal(model.layers[0].full_kernel, before)


def test_buffers_can_be_donated() -> None:
    for scheduled in (False, True):
        model = mask_model(nnx.Sequential(nnx.Linear(7, 5, rngs=nnx.Rngs(0))))
        prune_model(model, 0.5)
        schedule = CubicSchedule(0.8, begin=0, end=4, initial=0.5)
        masked = param_masks(model)
        tx = scheduled_pruning(optax.adam(0.1), schedule, masks=masked) if scheduled else freeze_masked(optax.adam(0.1))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        def update(model: Any, optimizer: Any, scheduled: bool = scheduled) -> None:
            more = {} if scheduled else {"masks": param_masks(model)}
            optimizer.update(model, nnx.grad(square)(model), **more)
            if scheduled:
                set_param_masks(model, optimizer.opt_state.masks, optimizer.opt_state.dormant)

        update(model, optimizer)
        step = nnx.jit(update, donate_argnums=(0, 1))
        for _ in range(3):
            step(model, optimizer)
        assert clean(model.layers[0])
        assert np.isfinite(square(model))


class Reader(nnx.Module):
    """A model that reads the kernel of its layer past the layer's call."""

    def __init__(self) -> None:
        self.layer = MaskedLinear(7, 5, mask=MASK, rngs=nnx.Rngs(0))

    def __call__(self, x: Array) -> Array:
        return x @ self.layer.kernel[...]


class Leaking(MaskedLinear):
    def __call__(self, x: Array, out_sharding: Any = None) -> Array:
        return x @ self.full_kernel


def test_check_masks_says_what_does_not_act_masked() -> None:
    model: Any = nnx.Sequential(MaskedLinear(7, 5, mask=MASK, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    state = jax.tree.map(np.asarray, nnx.state(model, nnx.Not(nnx.RngState)))
    found = check_masks(model, X)
    assert found.ok
    assert (found.checked, found.failures) == (["layers.0"], {})
    jax.tree.map(
        np.testing.assert_array_equal, state, jax.tree.map(np.asarray, nnx.state(model, nnx.Not(nnx.RngState)))
    )
    model.layers[0].kernel[...] = jnp.where(MASK, model.layers[0].kernel[...], -0.0)
    assert check_masks(model, X).failures == {"layers.0": ["its kernel is not +0 under the mask"]}
    reader = Reader()
    assert check_masks(reader, X).failures == {"layer": ["the gradient of its kernel is not +0 under the mask"]}
    reader.layer.kernel[...] = jnp.ones((7, 5))
    found = check_masks(reader, X)
    assert not found.ok
    assert set(found.failures["layer"]) == {
        "its kernel is not +0 under the mask",
        "the gradient of its kernel is not +0 under the mask",
        "a plain layer with the masked kernel has other outputs",
    }
    two = nnx.Sequential(
        MaskedLinear(7, 5, mask=MASK, rngs=nnx.Rngs(0)), Leaking(5, 2, mask=np.eye(5, 2), rngs=nnx.Rngs(0))
    )
    assert check_masks(two, X).failures == {"layers.1": ["what is dormant acts on an output or a gradient"]}
