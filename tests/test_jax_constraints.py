"""Constraints in ``maskedlinear.jax.freeze_masked``: under every optimizer, of both forms, inside ``jit`` and in Flax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx

from maskedlinear.constraints import Constraints, dale
from maskedlinear.flax import MaskedLinear, param_masks
from maskedlinear.jax import apply_constraints, freeze_masked, masked_linear, prune_tree, regrow_tree, sparse_linear
from maskedlinear.pattern import SparsityPattern
from maskedlinear_jax._compat import enable_x64
from test_torch_constraints import ALL, FIXED, IN, MASK, OUT, SIGNS, TIES, UPPER

X = np.random.default_rng(5).standard_normal((9, IN)).astype(np.float32)
T = np.random.default_rng(6).standard_normal((9, OUT)).astype(np.float32)
PATTERN = SparsityPattern.from_mask(MASK)

OPTIMIZERS: dict[str, Any] = {
    "momentum": lambda: optax.sgd(0.005, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(0.1),
    "adamw": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.1)),
    "lion": lambda: optax.lion(0.03, weight_decay=0.1),
    "accumulated": lambda: optax.MultiSteps(optax.rmsprop(0.1, momentum=0.9), 2),
    "muon": lambda: optax.contrib.muon(0.1),
}


def begun(dtype: Any = np.float32) -> np.ndarray:
    weight = np.random.default_rng(7).standard_normal((OUT, IN)).astype(dtype) * 0.3
    return np.where(MASK, weight, np.zeros((), dtype))


def train(tx: Any, params: Any, steps: int) -> Any:
    masks = {name: jnp.asarray(MASK) if name == "weight" else None for name in params}

    def loss(params: Any) -> Any:
        x, t = jnp.asarray(X, params["weight"].dtype), jnp.asarray(T, params["weight"].dtype)
        y = masked_linear(x, params["weight"], masks["weight"]) - t
        return (y**2).sum() + (
            ((sparse_linear(x, params["values"], PATTERN) - t) ** 2).sum() if "values" in params else 0
        )

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(jax.grad(loss)(params), state, params, masks=masks)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params


def bits(weight: Any) -> Any:
    return np.ascontiguousarray(weight).view(np.uint32)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_kept_in_both_forms_under_every_optimizer(name: str) -> None:
    given = {"weight": ALL, "values": ALL.for_pattern(PATTERN)}
    weight = begun()
    params = apply_constraints({"weight": jnp.asarray(weight), "values": jnp.asarray(weight[MASK])}, given)
    got = train(freeze_masked(OPTIMIZERS[name](), constraints=given), params, 6)
    for form in given:
        start, end = (np.asarray(one[form]) for one in (params, got))
        if form == "values":
            start, end = (PATTERN.to_scipy(values).toarray() for values in (start, end))
        assert np.array_equal(bits(end)[FIXED], bits(start)[FIXED])
        for group in (0, 5):
            assert len(set(bits(end)[group == TIES].tolist())) == 1
        assert (end[SIGNS > 0] >= 0).all()
        assert (end[SIGNS < 0] <= 0).all()
        assert (end <= UPPER.astype(np.float32)).all()
        assert not bits(end)[end == 0].any()
        assert (end != start)[MASK & ~FIXED].mean() > 0.5


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_tied_connections_train_as_one_parameter(name: str) -> None:
    with enable_x64(True):
        ties = np.where(MASK, np.arange(OUT * IN).reshape(OUT, IN) % 7, -1)
        groups, shared = np.where(ties < 0, 0, ties), np.random.default_rng(8).standard_normal(7)
        tx = freeze_masked(OPTIMIZERS[name](), constraints={"weight": Constraints(ties=ties)})
        got = train(tx, {"weight": jnp.asarray(np.where(MASK, shared[groups], 0.0))}, 15)

        def loss(shared: Any) -> Any:
            full = jnp.where(MASK, shared[groups], 0.0)
            return ((jnp.asarray(X, float) @ full.T - jnp.asarray(T, float)) ** 2).sum()

        plain, one = OPTIMIZERS[name](), jnp.asarray(shared)
        state = plain.init(one)
        for _ in range(15):
            updates, state = plain.update(jax.grad(loss)(one), state, one)
            one = optax.apply_updates(one, updates)
        want = np.where(MASK, np.asarray(one)[groups], 0.0)
        assert np.abs(np.asarray(got["weight"]) - want).max() <= 1e-12
        assert np.abs(want - np.where(MASK, shared[groups], 0.0)).max() > 0.1


def test_bounds_that_are_no_powers_of_two_are_kept_to_the_bit() -> None:
    rng = np.random.default_rng(0)
    lower, upper = (np.float32(sign * 0.3) for sign in (-1, 1))
    tx = freeze_masked(optax.sgd(1.0), constraints={"w": Constraints(lower=lower, upper=upper)})
    params = {"w": jnp.asarray(rng.uniform(-0.3, 0.3, 4096).astype(np.float32))}
    state = tx.init(params)
    for scale in (1e-3, 1.0, 1e4):
        grads = {"w": jnp.asarray(scale * rng.standard_normal(4096).astype(np.float32))}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        assert float(params["w"].max()) <= upper
        assert float(params["w"].min()) >= lower


def test_flax_layers_and_masks_that_change() -> None:
    model = MaskedLinear(IN, OUT, mask=MASK.T, rngs=nnx.Rngs(0))
    signs = np.array([1, -1] * 4)
    given = {"kernel": Constraints(ties=np.where(TIES.T == 0, 0, -1), signs=np.where(TIES.T == 0, 0, signs[:, None]))}
    state = nnx.state(model, nnx.Param)
    nnx.update(model, apply_constraints(state, given, param_masks(model)))
    optimizer = nnx.Optimizer(
        model, freeze_masked(optax.adamw(0.05, weight_decay=0.1), constraints=given), wrt=nnx.Param
    )

    @nnx.jit
    def step(model: Any, optimizer: Any) -> None:
        grads = nnx.grad(lambda model: ((model(X) - T) ** 2).sum())(model)
        optimizer.update(model, grads, masks=param_masks(model))

    member = tuple(np.argwhere(TIES.T == 0)[0])
    without = MASK.T.copy()
    without[member] = False
    for mask in (MASK.T, without, MASK.T):
        model.set_mask(jnp.asarray(mask))
        for _ in range(2):
            step(model, optimizer)
        kernel = np.asarray(model.kernel.get_value())
        assert len(set(kernel[(TIES.T == 0) & mask].tolist())) == 1
        assert not kernel[~mask].any()
        assert (np.where(TIES.T == 0, 0, kernel) * signs[:, None] >= 0).all()


def test_what_does_not_fit_is_refused() -> None:
    params = {"w": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match="apply_constraints"):
        freeze_masked(optax.sgd(0.1), constraints={"w": dale([1, -1, 1])}).init(params)
    with pytest.raises(ValueError, match=r"the constraints of w.*transpose"):
        freeze_masked(optax.sgd(0.1), constraints={"w": dale([1, -1, 1], in_axis=0)}).init(params)
    with pytest.raises(ValueError, match="constraints must be of layers"):
        freeze_masked(optax.sgd(0.1), constraints={"v": dale([1, -1, 1])}).init(params)
    with pytest.raises(TypeError, match="Constraints"):
        freeze_masked(optax.sgd(0.1), constraints={"w": jnp.ones(3)})
    tx = freeze_masked(optax.sgd(0.1), constraints={"w": dale([1, 0, 1])})
    with pytest.raises(ValueError, match="parameters, which are missing"):
        tx.update(params, tx.init(params))


def test_what_is_fixed_is_not_pruned_or_moved() -> None:
    params, given = {"weight": jnp.asarray(begun())}, {"weight": Constraints(fixed=FIXED)}
    masks = prune_tree(params, 1 - FIXED.mean(), constraints=given)
    assert np.array_equal(masks["weight"], FIXED)
    with pytest.raises(ValueError, match="fixed connections are never pruned or moved"):
        regrow_tree(params, masks, 0.5, constraints=given)
    moved, new = regrow_tree(params, {"weight": jnp.asarray(MASK)}, 0.5, constraints=given)
    assert np.asarray(new["weight"])[FIXED].all()
    assert np.array_equal(np.asarray(moved["weight"])[FIXED], np.asarray(params["weight"])[FIXED])
    assert (np.asarray(new["weight"]) != MASK).any()
