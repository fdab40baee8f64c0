"""``scheduled_pruning``: the core's masks, bit for bit, made inside a jitted step; in plain loops, nnx and linen."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from maskedlinear import masks, pruning
from maskedlinear.flax import MaskedDense, get_masks, mask_model, param_masks, set_param_masks
from maskedlinear.jax import apply_masks, prune_tree, scheduled_pruning
from maskedlinear.pruning import CubicSchedule
from maskedlinear_jax._select import clear_smallest

SCHEDULE = CubicSchedule(0.9, begin=1, end=9, every=3)


def parameters(dtype: Any = jnp.float32) -> Any:
    rng = np.random.default_rng(0)
    return {
        "first": {"kernel": jnp.asarray(rng.standard_normal((8, 16)), dtype), "bias": jnp.zeros(16, dtype)},
        "last": jnp.asarray(np.round(rng.standard_normal((4, 16)), 1), dtype),  # many equal ones
    }


def loss(params: Any, x: Any) -> Any:
    hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
    return ((hidden @ params["last"].T) ** 2).mean()


@pytest.mark.parametrize(
    ("dtype", "scope"),
    [
        ("float32", "global"),
        ("bfloat16", "layer"),
        *(
            pytest.param(dtype, scope, marks=pytest.mark.slow)
            for dtype in ("float32", "bfloat16", "float16")
            for scope in ("layer", "erdos_renyi", "global")
            if (dtype, scope) not in (("float32", "global"), ("bfloat16", "layer"))
        ),
    ],
)
def test_the_jitted_step_makes_the_masks_of_prune_tree(dtype: str, scope: Any) -> None:
    params, x = parameters(dtype), jnp.ones((5, 8), dtype)
    tx = scheduled_pruning(optax.adamw(0.02, eps=1e-2, weight_decay=0.1), SCHEDULE, scope=scope, on_empty="allow")

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        grads = jax.grad(lambda params: loss(apply_masks(params, state.masks), x))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def unpruned_step(params: Any, state: Any) -> Any:
        grads = jax.grad(lambda params: loss(apply_masks(params, state.masks), x))(params)
        never = state._replace(step=jnp.int32(99))  # a step at which nothing is pruned
        return optax.apply_updates(params, tx.update(grads, never, params)[0])

    state, made = tx.init(params), None
    for number in range(12):
        before, live, dormant = params, state.masks, state.dormant
        unpruned = unpruned_step(params, state)
        params, state = step(params, state)
        if SCHEDULE.due(number):
            whole = jax.tree.map(
                lambda p, mask, dormant: p if mask is None else jnp.where(mask, p, dormant),  # with what is 0 now
                *(params, state.masks, state.dormant),
            )
            made = prune_tree(whole, SCHEDULE(number), masks=made, scope=scope, on_empty="allow")
        for name in ("first", "last"):
            new, old, mask = (
                tree[name]["kernel"] if name == "first" else tree[name] for tree in (params, before, live)
            )
            np.testing.assert_array_equal(new[~mask], old[~mask])
            after, kept, was, full = (
                tree[name]["kernel"] if name == "first" else tree[name]
                for tree in (state.masks, state.dormant, dormant, unpruned)
            )
            assert not np.asarray(new)[~after].tobytes().strip(b"\0"), "what is pruned is +0"
            np.testing.assert_array_equal(kept[~mask | after], was[~mask | after])
            for one, where in ((new, after), (kept, mask & ~after)):
                np.testing.assert_allclose(one[where].astype(float), full[where].astype(float), rtol=0.02, atol=1e-6)
            if made is not None:
                wanted, got = (tree[name]["kernel"] if name == "first" else tree[name] for tree in (made, state.masks))
                np.testing.assert_array_equal(wanted, got, err_msg=f"{name} at {number}")
    assert int(state.step) == 12
    assert step._cache_size() == 1, "a change of masks compiles nothing"  # type: ignore[attr-defined]


def test_every_float_is_ordered_as_numpy_orders_it() -> None:
    rng = np.random.default_rng(0)
    halves = rng.permutation(np.arange(1 << 16, dtype=np.uint16)).view(np.float16)
    tops = (rng.permutation(np.arange(1 << 16, dtype=np.uint32)) << np.uint32(16)).view(np.float32)
    wide = rng.integers(0, 1 << 32, 4096, np.uint64).astype(np.uint32).view(np.float32)
    tiny = np.float32(1e-45) * rng.integers(-4, 5, 64).astype(np.float32)  # subnormal, many of them equal
    for array, dtype in ((halves, "float16"), (tops, "bfloat16"), (wide, "float32"), (tiny, "float32")):
        array = array[~np.isnan(array)]
        weight = (
            jax.lax.bitcast_convert_type(jnp.asarray(array.view(np.uint16)), jnp.float16)
            if dtype == "float16"
            else jnp.asarray(array)
        )
        if dtype == "bfloat16":
            bits = jnp.asarray((array.view(np.uint32) >> np.uint32(16)).astype(np.uint16))
            weight = jax.lax.bitcast_convert_type(bits, jnp.bfloat16)
        for zeros in (0, 1, array.size // 2, array.size - 1, array.size):
            wanted = pruning.prune(np.abs(array.astype(np.float32))[None], num_zeros=zeros, on_empty="allow")
            found = jax.jit(lambda w, n: clear_smallest([w], [jnp.ones(w.shape, bool)], n))(
                weight[None], jnp.int32(zeros)
            )[0]
            np.testing.assert_array_equal(found, wanted, err_msg=f"{dtype} {zeros}")


def test_nnx_and_linen_layers_take_the_masks_from_the_state() -> None:
    rngs = nnx.Rngs(0)
    model = mask_model(nnx.Sequential(nnx.Linear(8, 16, rngs=rngs), nnx.tanh, nnx.Linear(16, 4, rngs=rngs)))
    model.layers[0].set_mask(masks.random((8, 16), sparsity=0.2, seed=0))

    @nnx.jit
    def step(model: Any, optimizer: Any, x: Any) -> None:
        optimizer.update(model, nnx.grad(lambda model: (model(x) ** 2).mean())(model))
        set_param_masks(model, optimizer.opt_state.masks)

    first = np.asarray(model.layers[0].mask[...])
    refusing = scheduled_pruning(optax.adam(0.01), SCHEDULE, masks=param_masks(model), on_empty="raise")
    with pytest.raises(
        ValueError, match=r"got 25 masked ones of layers\.0\.kernel, where the schedule asks for 0 at step 1"
    ):
        nnx.Optimizer(model, refusing, wrt=nnx.Param)
    schedule = CubicSchedule(0.9, begin=1, end=9, every=3, initial=0.2)
    tx = scheduled_pruning(optax.adam(0.01), schedule, masks=param_masks(model))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(10):
        step(model, optimizer, jnp.ones((3, 8)))
    for mask, size in zip(get_masks(model).values(), (128, 64), strict=True):
        assert int((~mask).sum()) == int(0.9 * size)
    assert not (np.asarray(model.layers[0].mask[...]) & ~first).any(), "what was masked stays so"

    wired = MaskedDense(4, mask=masks.random((8, 4), sparsity=0.2, seed=0))
    variables = wired.init(jax.random.key(0), jnp.ones((1, 8)))
    tx = scheduled_pruning(optax.sgd(0.1), schedule, masks=param_masks(variables))
    state, params = tx.init(variables["params"]), variables["params"]
    for _ in range(10):
        variables = set_param_masks({**variables, "params": params}, state.masks)
        grads = jax.grad(lambda params: wired.apply({**variables, "params": params}, jnp.ones((1, 8))).sum())(params)  # noqa: B023
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert int(set_param_masks(variables, state.masks)["masks"]["mask"].sum()) == 32 - int(0.9 * 32)


def test_a_partitioned_kernel_is_read_as_what_it_is() -> None:
    plain = nn.Dense(5).init(jax.random.key(0), jnp.ones((1, 7)))["params"]
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    boxed = nn.Dense(5, kernel_init=init).init(jax.random.key(0), jnp.ones((1, 7)))["params"]
    plain, boxed = (jax.tree.map(jnp.sign, tree) for tree in (plain, boxed))  # ties, so that the order of places counts
    one, other = prune_tree(plain, 0.5), prune_tree(boxed, 0.5, include="kernel")
    np.testing.assert_array_equal(other["kernel"].value, one["kernel"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "all"}, "scope must be"),
        ({"on_empty": "no"}, "on_empty must be"),
        ({"scope": "global", "on_empty": "raise"}, "cannot refuse: say on_empty='keep' or 'allow', or scope='layer'"),
        ({"include": "none"}, "there is no matrix or kernel to prune"),
        ({"schedule": CubicSchedule(1.0, begin=0, end=2), "on_empty": "raise"}, "all would be gone of first.kernel"),
        ({"masks": {"first": True}}, "masks must be a tree like the parameters'"),
        ({"masks": prune_tree(parameters(), 0.5), "on_empty": "raise"}, "pruning only removes connections; got"),
    ],
)
def test_what_a_compiled_step_cannot_refuse_is_refused_before(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scheduled_pruning(**({"inner": optax.sgd(0.1), "schedule": SCHEDULE} | options)).init(parameters())


@pytest.mark.parametrize("scope", ["layer", "global", "erdos_renyi"])
def test_a_compiled_step_does_what_it_can(scope: Any) -> None:
    params = {"small": jnp.asarray([[1e-3, -1e-3, 2e-4]]), "large": jnp.arange(40.0).reshape(8, 5) + 1}
    masks = prune_tree(params, 0.6, scope="layer")
    tx = scheduled_pruning(optax.sgd(0.0), CubicSchedule(0.99, begin=0, end=6, every=2), masks=masks, scope=scope)
    state, step = tx.init(params), jax.jit(tx.update)
    params = apply_masks(params, masks)
    for number in range(7):
        before = state.masks
        updates, state = step(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
        if number % 2 == 0:
            asked = CubicSchedule(0.99, begin=0, end=6, every=2)(number)
            wanted = prune_tree(params, asked, masks=before, scope=scope, on_empty="keep")
            jax.tree.map(np.testing.assert_array_equal, state.masks, wanted)
    assert {name: int(mask.sum()) for name, mask in state.masks.items()} == {"small": 1, "large": 1}


def test_what_cannot_be_compared_is_refused() -> None:
    tx = scheduled_pruning(optax.sgd(0.1), SCHEDULE)
    params = parameters()
    with pytest.raises(ValueError, match=r"needs the parameters of this step: tx.update\(grads, state, params\)"):
        tx.update(params, tx.init(params))
    with pytest.raises(TypeError, match="must be real floating-point, all of them float64 or none; got int32"):
        tx.init({"table": jnp.ones((3, 4), jnp.int32)})
