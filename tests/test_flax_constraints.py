"""``constrain`` in nnx: as torch's, in both forms, through jitted guarded steps, states, pruning and regrowth."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from maskedlinear.constraints import Constraints, dale
from maskedlinear.flax import (
    Constraint,
    MaskedLinear,
    ScheduledPruning,
    SparseLinear,
    compress,
    constrain,
    expand,
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
from test_torch_constraints import ALL, FIXED, IN, MASK, OUT, SIGNS, TIES, UPPER

X = np.random.default_rng(5).standard_normal((9, IN)).astype(np.float32)
T = np.random.default_rng(6).standard_normal((9, OUT)).astype(np.float32)


def model(sparse: bool = False, given: Any = None) -> Any:
    layer: Any = MaskedLinear(IN, OUT, mask=MASK.T, rngs=nnx.Rngs(0))
    layer.kernel[...] = jnp.where(MASK.T, jnp.abs(layer.kernel[...]) * jnp.array([1, -1] * 4)[:, None], 0)
    network = nnx.Sequential(SparseLinear.from_masked(layer) if sparse else layer)
    return constrain(network, {"layers.0": ALL.T if given is None else given})


def weight(network: Any) -> np.ndarray:
    layer = network.layers[0]
    return np.asarray((layer.to_masked() if isinstance(layer, SparseLinear) else layer).kernel[...]).T


@nnx.jit
def step(network: Any, optimizer: Any) -> None:
    gradients = nnx.grad(lambda network: ((network(X) - T) ** 2).sum())(network)
    if optimizer.opt_state.masks is None:
        optimizer.update(network, gradients, masks=param_masks(network))
    else:
        optimizer.update(network, gradients)


def trained(network: Any, steps: int = 4, once: bool = False) -> Any:
    tx = freeze_masked(optax.adamw(0.1, weight_decay=0.1), param_masks(network) if once else None)
    optimizer = nnx.Optimizer(network, tx, wrt=nnx.Param)
    for _ in range(steps):
        step(network, optimizer)
    return optimizer


def is_kept(got: np.ndarray, start: np.ndarray, mask: Any = MASK) -> None:
    assert np.array_equal(got[FIXED], start[FIXED]), "fixed"
    for group in (0, 5):
        assert len(set(got[(group == TIES) & mask].tolist())) <= 1, "tied"
    assert (got[SIGNS > 0] >= 0).all()
    assert (got[SIGNS < 0] <= 0).all()
    assert (got <= UPPER.astype(np.float32)).all()
    assert not np.signbit(got[got == 0]).any()


@pytest.mark.parametrize(("sparse", "once"), [(False, True), (True, False)])
def test_kept_by_a_guard_and_carried_by_states_and_both_forms(sparse: bool, once: bool) -> None:
    network = model(sparse)
    start = weight(network)
    is_kept(start, start)
    trained(network, once=once)
    got = weight(network)
    is_kept(got, start)
    assert (got != start)[MASK & ~FIXED].mean() > 0.5
    graph, state = nnx.split(network)
    fresh = model(sparse, Constraints(upper=9.0))
    load_state(fresh, state)
    copies = {
        "merged": nnx.merge(graph, jax.tree.map(jnp.copy, state)),
        "cloned": nnx.clone(network),
        "other form": expand(nnx.clone(network)) if sparse else compress(nnx.clone(network), "sparse"),
        "loaded": fresh,
    }
    trained(copies["loaded"], 1)
    is_kept(weight(copies.pop("loaded")), start)
    for name, one in copies.items():
        is_kept(weight(one), start)
        assert np.array_equal(weight(one), got)
        assert len(jax.tree.leaves(nnx.state(one, Constraint))) == 4, name


def test_the_guard_trains_as_torchs_rule_says_and_sums_gradients_of_ties() -> None:
    """Connections that are tied as one parameter: the same as with one parameter, to a rounding."""
    groups = np.where(MASK, np.arange(OUT * IN).reshape(OUT, IN) % 5, -1)
    network = model(given=Constraints(ties=groups.T))
    shared = jnp.asarray([weight(network)[groups == group][0] for group in range(5)])
    bias = jnp.copy(network.layers[0].bias[...])
    trained(network, 10)
    tx = optax.adamw(0.1, weight_decay=0.1)
    params = {"shared": shared, "bias": bias}
    state = tx.init(params)

    def loss(params: Any) -> Any:
        return ((X @ jnp.where(MASK, params["shared"][groups], 0).T + params["bias"] - T) ** 2).sum()

    for _ in range(10):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(weight(network), np.where(MASK, params["shared"][groups], 0), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("sparse", [False, True])
def test_pruning_and_regrowth_leave_what_is_fixed(sparse: bool) -> None:
    signs = np.array([1, -1] * 4)
    network = model(sparse, Constraints(fixed=FIXED.T, signs=signs[:, None]))
    start = weight(network)
    optimizer = nnx.Optimizer(network, freeze_masked(optax.adam(0.1), param_masks(network)), wrt=nnx.Param)
    for seed in range(3):
        assert regrow_model(network, 0.4, optimizer=optimizer, seed=seed)
        step(network, optimizer)
        got = weight(network)
        assert np.array_equal(got[FIXED], start[FIXED])
        assert (got * signs >= 0).all()
    if sparse:
        constrain(network, {"layers.0": Constraints(fixed=True)})
        with pytest.raises(ValueError, match="fixed connections are never pruned or moved"):
            regrow_model(network, 0.5)
        return
    with pytest.raises(TypeError, match="linen's variables hold no constraints: give them to apply_constraints"):
        constrain({"params": {"kernel": jnp.ones((IN, OUT))}}, Constraints(lower=0.0))
    before = jax.tree.map(np.asarray, nnx.state(network))
    with pytest.raises(ValueError, match="fixed connections are never pruned or moved"):
        prune_model(network, 1.0, on_empty="allow")
    masks = {"layers.0": np.zeros((IN, OUT), bool)}
    for refused in (set_masks, lambda model, masks: model.layers[0].set_mask(masks["layers.0"])):
        with pytest.raises(ValueError, match="a fixed connection stays live"):
            refused(network, masks)
    tree = param_masks(network)
    with pytest.raises(ValueError, match="knows no constraints"):
        scheduled_pruning(optax.sgd(0.1), CubicSchedule(0.9, begin=0, end=4, every=1), masks=tree).init(
            nnx.state(network, nnx.Param)
        )
    set_param_masks(network, tree)
    after = jax.tree.map(np.asarray, nnx.state(network))
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after)), "left as it was"
    pruner = ScheduledPruning(
        network, CubicSchedule(1 - FIXED.mean() - 0.01, begin=0, end=4, every=1), optimizer=optimizer
    )
    for _ in range(6):
        step(network, optimizer)
        pruner.step()
    assert np.asarray(network.layers[0].mask[...]).T[FIXED].all()
    assert np.array_equal(weight(network)[FIXED], start[FIXED])


def test_a_member_of_a_tie_sleeps_and_comes_back_with_its_value_and_rewinding_keeps() -> None:
    network = model(given=Constraints(ties=TIES.T))
    first = jax.tree.map(jnp.copy, nnx.state(network))
    start, members, away = weight(network), np.argwhere(TIES == 0), MASK.copy()
    away[tuple(members[0])] = False
    network.layers[0].set_mask(away.T)
    trained(network, 2)
    value = weight(network)[tuple(members[1])]
    assert weight(network)[tuple(members[0])] == 0
    nnx.jit(lambda network, mask: network.layers[0].set_mask(mask))(network, jnp.asarray(MASK.T))
    assert set(weight(network)[TIES == 0].tolist()) == {float(value)}
    network.layers[0].set_mask(away.T)
    rewind_model(network, first)
    assert np.array_equal(weight(network), np.where(away, start, 0))


def test_other_modules_shared_weights_and_refusals() -> None:
    network = nnx.Dict(a=nnx.Conv(2, 3, (3, 3), rngs=nnx.Rngs(0)), b=nnx.Linear(4, 4, rngs=nnx.Rngs(1)))
    network.c = nnx.Linear(4, 4, rngs=nnx.Rngs(1))
    network.c.kernel = network.b.kernel
    mask_model(network)
    constrain(
        network, {"a": Constraints(signs=np.array([1, -1])[None, None, :, None]), "b": dale([1, -1, 1, -1], in_axis=0)}
    )
    tx = freeze_masked(optax.adamw(0.1))
    optimizer = nnx.Optimizer(network, tx, wrt=nnx.Param)
    x = jnp.ones((2, 5, 5, 2))

    def loss(network: Any) -> Any:
        return (network.a(x) ** 2).sum() + (network.c(network.b(jnp.ones((2, 4)))) ** 2).sum()

    for _ in range(3):
        optimizer.update(network, nnx.grad(loss)(network), masks=param_masks(network))
    assert (network.a.kernel[:, :, 0] >= 0).all()
    assert (network.a.kernel[:, :, 1] <= 0).all()
    assert (network.c.kernel[...] * jnp.array([[1], [-1], [1], [-1]]) >= 0).all()
    assert (network.a.kernel[...] != 0).any()
    wrong = {
        "share a weight": {"b": Constraints(upper=1.0), "c": Constraints(upper=2.0)},
        "constraints must be of": {"d": Constraints(upper=1.0)},
        "must have the weight's shape": {"b": Constraints(signs=np.ones((3, 4)))},
        "must leave a value": {"b": Constraints(signs=1, upper=-1.0)},
    }
    before = jax.tree.map(np.asarray, nnx.state(network))
    for text, given in wrong.items():
        with pytest.raises(ValueError, match=text):
            constrain(network, given)
    with pytest.raises(TypeError, match="linen"):
        constrain({"params": {}}, Constraints(upper=1.0))
    assert jax.tree.all(jax.tree.map(np.array_equal, before, jax.tree.map(np.asarray, nnx.state(network))))
    early = nnx.Optimizer(network, freeze_masked(optax.sgd(0.1), param_masks(network)), wrt=nnx.Param)
    constrain(network, {"b": None})
    with pytest.raises(ValueError, match="make the optimizer anew"):
        prune_model(network, 0.5, optimizer=early)
    assert not hasattr(network.c, "constraint_signs")


def test_stacks_are_constrained_along_the_transforms_that_map_them() -> None:
    @nnx.vmap(in_axes=0, out_axes=0)
    def made(key: Any) -> Any:
        return MaskedLinear(3, 4, rngs=nnx.Rngs(key))

    stack = constrain(made(jax.random.split(jax.random.key(0), 2)), Constraints(signs=[[[1], [1], [-1]]], upper=0.1))
    x = jnp.ones((2, 5, 3))
    assert nnx.vmap(lambda layer, x: layer(x))(stack, x).shape == (2, 5, 4)
    assert (stack.kernel[...] * jnp.array([1, 1, -1])[:, None] >= 0).all()
    assert stack.kernel[...].max() <= jnp.float32(0.1)
