"""Axes read off the program: every layer of linen and nnx, plain functions, and what cannot be told."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax import ShapeDtypeStruct, lax

from maskedlinear.flax import MaskedDense, MaskedLinear
from maskedlinear.jax import masked_linear, prune_tree, regrow_tree, scheduled_pruning, trace_axes
from maskedlinear.models import WeightAxes
from maskedlinear.pruning import CubicSchedule
from maskedlinear_jax import _trace_axes

IO, OI = WeightAxes(1, 0), WeightAxes(0, 1)
X = ShapeDtypeStruct((2, 5, 8), jnp.float32)
IMAGES = ShapeDtypeStruct((2, 6, 6, 4), jnp.float32)
STACK = ShapeDtypeStruct((2, 3, 5, 4), jnp.float32)
TOKENS = ShapeDtypeStruct((2, 5), jnp.int32)


def traced_linen(model: Any, *inputs: Any) -> dict[str, WeightAxes]:
    variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    rest = {name: tree for name, tree in variables.items() if name != "params"}
    constants = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), rest)
    return trace_axes(lambda params, *x: model.apply({"params": params, **constants}, *x), variables["params"], *inputs)


class Model(nn.Module):
    """A linen module that is one function of its inputs."""

    function: Any

    @nn.compact
    def __call__(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        return nn.LayerNorm()(nn.Dense(8, name="dense")(x)), None


def scanned(module: Any, x: Any) -> Any:
    stack = nn.scan(Layer, variable_axes={"params": 1}, split_rngs={"params": True}, length=3)
    return stack(name="stack")(x, None)


def ensemble(kind: Any, *sizes: Any, shared: bool = False, **of: Any) -> Any:
    options: Any = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "axis_size": 2}
    return nn.vmap(kind, in_axes=None if shared else 0, **options)(*sizes, **of)


def vit(module: Any, images: Any) -> Any:
    x = nn.Conv(8, (2, 2), (2, 2), name="patches")(images).reshape(2, -1, 8)
    token = module.param("token", nn.initializers.ones, (1, 1, 8))
    x = jnp.concatenate([jnp.tile(token, (2, 1, 1)), x], 1) + module.param("where", nn.initializers.ones, (1, 10, 8))
    x = x * module.param("gamma", nn.initializers.ones, (1, 1, 8))
    return nn.remat(nn.Dense)(3, name="head")(nn.LayerNorm()(x))


def tied(module: Any, tokens: Any) -> Any:
    embed = nn.Embed(11, 8)
    x = embed(tokens) + module.param("pos", nn.initializers.ones, (5, 8))
    return embed.attend(nn.Dense(8, name="d")(x))


HEADS, JOINED = WeightAxes((1, 2), 0), WeightAxes(2, (0, 1))
QKV = {"query.kernel": HEADS, "key.kernel": HEADS, "value.kernel": HEADS, "out.kernel": JOINED}
LSTM = {f"cell.{gate}.kernel": IO for gate in ("hf", "hg", "hi", "ho", "if", "ig", "ii", "io")}
GRU = {f"cell.{gate}.kernel": IO for gate in ("hn", "hr", "hz", "in", "ir", "iz")}
TWO = {"feature_group_count": 2}
LINEN = {
    "dense": (nn.Dense(3), X, {"kernel": IO}),
    "general": (nn.DenseGeneral((2, 3), axis=(1, 2)), X, {"kernel": WeightAxes((2, 3), (0, 1))}),
    "general_batch": (nn.DenseGeneral(3, axis=2, batch_dims=(0,)), X, {"kernel": WeightAxes(2, 1, 0)}),
    "attention": (nn.MultiHeadDotProductAttention(2), X, QKV),
    "conv1": (nn.Conv(6, (3,)), X, {"kernel": WeightAxes(2, (1, 0))}),
    "conv2": (nn.Conv(6, (3, 3)), IMAGES, {"kernel": WeightAxes(3, (2, 0, 1))}),
    "grouped": (nn.Conv(6, (3, 3), **TWO), IMAGES, {"kernel": WeightAxes(3, (2, 0, 1))}),
    "depthwise": (nn.Conv(8, (3, 3), feature_group_count=4), IMAGES, {"kernel": WeightAxes(3, (2, 0, 1))}),
    "up": (nn.ConvTranspose(6, (3, 3), (2, 2)), IMAGES, {"kernel": WeightAxes(3, (2, 0, 1))}),
    "up_transposed": (nn.ConvTranspose(6, (3, 3), transpose_kernel=True), IMAGES, {"kernel": WeightAxes(2, (3, 0, 1))}),
    "lstm": (nn.RNN(nn.LSTMCell(7)), X, LSTM),
    "gru": (nn.RNN(nn.GRUCell(7)), X, GRU),
    "scanned": (Model(scanned), X, {"stack.dense.kernel": WeightAxes(2, 0, 1)}),
    "ensemble": (ensemble(nn.Dense, 3), X, {"kernel": WeightAxes(2, 1, 0)}),
    "ensemble_shared": (ensemble(nn.Dense, 3, shared=True), X, {"kernel": WeightAxes((0, 2), 1)}),
    "ensemble_conv": (ensemble(nn.Conv, 6, (3,)), STACK, {"kernel": WeightAxes(3, (2, 1), 0)}),
    "ensemble_grouped": (ensemble(nn.Conv, 6, (3,), **TWO), STACK, {"kernel": WeightAxes(3, (2, 1), 0)}),
    "ensemble_all_shared": (ensemble(nn.Conv, 6, (3,), shared=True, **TWO), X, {"kernel": WeightAxes((3, 0), (2, 1))}),
    "vit": (Model(vit), IMAGES, {"patches.kernel": WeightAxes(3, (2, 0, 1)), "head.kernel": IO}),
    "tied": (Model(tied), TOKENS, {"d.kernel": IO}),
    "masked": (MaskedDense(3), X, {"kernel": IO}),
}


@pytest.mark.parametrize("case", LINEN)
def test_linen(case: str) -> None:
    model, x, wanted = LINEN[case]
    assert traced_linen(model, x) == wanted


class Scanned(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stack = nnx.vmap(lambda rngs: nnx.Linear(8, 8, rngs=rngs))(rngs.split(3))

    def __call__(self, x: Any) -> Any:
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.stack)


NNX_LSTM = {"cell.dense_h.kernel": IO, "cell.dense_i.kernel": IO}
LORA, SECOND = {"base_module.kernel": IO}, {"layers.1.kernel": IO}
NNX: dict[str, Any] = {
    "linear": (lambda rngs: nnx.Linear(8, 3, rngs=rngs), X, {"kernel": IO}),
    "general": (lambda rngs: nnx.LinearGeneral(8, (2, 3), rngs=rngs), X, {"kernel": WeightAxes((1, 2), 0)}),
    "attention": (lambda rngs: nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs), X, QKV),
    "einsum": (lambda rngs: nnx.Einsum("btd,hdk->bthk", (2, 8, 3), rngs=rngs), X, {"kernel": WeightAxes((0, 2), 1)}),
    "experts": (lambda rngs: nnx.Einsum("btd,bdk->btk", (2, 8, 3), rngs=rngs), X, {"kernel": WeightAxes(2, 1, 0)}),
    "conv": (lambda rngs: nnx.Conv(4, 6, (3, 3), rngs=rngs), IMAGES, {"kernel": WeightAxes(3, (2, 0, 1))}),
    "lora": (lambda rngs: nnx.LoRA(8, 2, 3, base_module=nnx.Linear(8, 3, rngs=rngs), rngs=rngs), X, LORA),
    "embed": (lambda rngs: nnx.Sequential(nnx.Embed(11, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)), TOKENS, SECOND),
    "lstm": (lambda rngs: nnx.RNN(nnx.OptimizedLSTMCell(8, 7, rngs=rngs)), X, NNX_LSTM),
    "norm": (lambda rngs: nnx.Sequential(nnx.BatchNorm(8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)), X, SECOND),
    "scanned": (Scanned, X, {"stack.kernel": WeightAxes(2, 1, 0)}),
}


@pytest.mark.parametrize("case", NNX)
def test_nnx(case: str) -> None:
    build, x, wanted = NNX[case]
    graph, params, rest = nnx.split(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))), nnx.Param, ...)
    assert trace_axes(lambda params, x, rest: nnx.merge(graph, params, rest)(x), params, x, rest) == wanted


def test_nnx_with_a_closure_over_what_stays() -> None:
    graph, params, rest = nnx.split(MaskedLinear(8, 3, mask=np.eye(8, 3), rngs=nnx.Rngs(0)), nnx.Param, ...)
    assert trace_axes(lambda params, x: nnx.merge(graph, params, rest)(x), params, X) == {"kernel": IO}


def two_heads(w: Any, x: Any) -> Any:
    return jnp.einsum("btd,dhk->bhtk", x, w.reshape(8, 2, 4))


def swapped(w: Any, x: Any) -> Any:
    parts = jnp.concatenate([w.T, jnp.zeros((1, 8))]).astype(jnp.bfloat16)
    return lax.cond(True, lambda w: w[:-1], lambda w: w[1:], parts) @ x.mT


def standardized(w: Any, x: Any) -> Any:
    return x @ ((w - w.mean(0)) / w.std(0) * jnp.ones((1, w.shape[1])))


def small(carry: Any) -> Any:
    return jax.tree.leaves(carry)[0].sum() < 9


def drop_connect(w: Any, x: Any) -> Any:
    keep = jax.random.bernoulli(jax.random.key(0), 0.5, w.shape)
    return x @ (w * keep + 0.1 * jax.random.normal(jax.random.key(1), w.shape))


PLAIN: dict[str, Any] = {
    "tiled": ((8, 3), lambda w, x: jnp.einsum("btd,def->btef", x, jnp.tile(w, (1, 2)).reshape(8, 2, 3)), IO),
    "left": ((3, 8), lambda w, x: jnp.einsum("oi,bti->bto", w, x), OI),
    "swapped": ((8, 3), swapped, IO),
    "one_by_one": ((1, 8, 3), lambda w, x: (x @ w[0], jnp.einsum("btd,adf->btaf", x, w)), WeightAxes(2, 1, 0)),
    "split": ((8, 8), two_heads, IO),
    "merged": ((8, 2, 3), lambda w, x: x @ w.reshape(8, 6), WeightAxes((1, 2), 0)),
    "experts": ((2, 8, 3), lambda w, x: jnp.einsum("etd,edf->etf", x, w), WeightAxes(2, 1, 0)),
    "all_experts": ((6, 8, 3), lambda w, x: jnp.einsum("btd,edf->btef", x, w), WeightAxes((0, 2), 1)),
    "ragged": ((2, 8, 3), lambda w, x: lax.ragged_dot(x[0], w, jnp.array([2, 3])), WeightAxes(2, 1, 0)),
    "unrolled": ((2, 8, 8), lambda w, x: x @ w[0] @ w[1], WeightAxes(2, 1, 0)),
    "loop": ((3, 8, 8), lambda w, x: lax.fori_loop(0, 3, lambda i, x: x @ w[i], x), WeightAxes(2, 1, 0)),
    "while": ((8, 8), lambda w, x: lax.while_loop(small, lambda x: x @ w, x), IO),
    "carried": ((8, 8), lambda w, x: lax.while_loop(small, lambda c: (c[0] @ c[1], c[1]), (x, w)), IO),
    "stacked": ((8, 3), lambda w, x: jnp.einsum("btd,edf->btef", x, jnp.stack([w, w + 1])), IO),
    "twice": ((8, 8), lambda w, x: jax.checkpoint(lambda x: x @ w)(x) @ w, IO),
    "standardized": ((8, 3), standardized, IO),
    "drop_connect": ((8, 3), drop_connect, IO),
    "regularized": ((8, 3), lambda w, x: (x @ w, (w.T @ w).sum(), jnp.ones(3) @ w.T), IO),
    "per_example": ((8, 3), lambda w, x: jax.vmap(lambda x: x @ jnp.where(x.sum() > 0, w, 0))(x), IO),
    "parts": ((8, 6), lambda w, x: [x @ part for part in jnp.split(w, 3, 1)], IO),
    "masked_linear": ((3, 8), lambda w, x: masked_linear(x, w, np.eye(3, 8)), OI),
    "forward_mode": ((3, 8), lambda w, x: masked_linear(x, w, np.eye(3, 8), forward_mode=True), OI),
}


@pytest.mark.parametrize("case", PLAIN)
def test_plain_functions(case: str) -> None:
    shape, function, wanted = PLAIN[case]
    params = {"a": [ShapeDtypeStruct(shape, jnp.float32)]}
    assert trace_axes(lambda params, x: function(params["a"][0], x), params, X) == {"a.0": wanted}


def test_the_matrices_are_what_acts() -> None:
    """An output of the matrices, zeroed, takes as many numbers of the result with it as are its own; an input, others."""
    rng = np.random.default_rng(0)
    for case in ("left", "split", "all_experts"):
        shape, function, _ = PLAIN[case]
        w, x = (rng.standard_normal(size).astype(np.float32) for size in (shape, X.shape))
        axes = trace_axes(function, w, x)[""]
        function = jax.jit(function)
        y, (_, out, in_) = function(w, x), axes.matrix_shape(shape)
        assert in_ == 8
        for row in range(out):
            matrices = axes.matrices(w).copy()
            matrices[0, row] = 0
            changed = function(axes.from_matrices(matrices, shape), x)
            assert int((changed == 0).sum()) == y.size // out
            assert int((changed == y).sum()) == y.size - y.size // out
        matrices = axes.matrices(w).copy()
        matrices[:, :, 3] = 0
        np.testing.assert_array_equal(
            function(axes.from_matrices(matrices, shape), x), function(w, np.where(np.arange(8) == 3, 0, x))
        )


def test_masks_of_inputs_pass() -> None:
    params, mask = {"w": jnp.ones((8, 3))}, jnp.ones((8, 3), bool)
    for function in (lambda p, m, x: x @ jnp.where(m, p["w"], 0), lambda p, m, x: x @ (p["w"] * m)):
        assert trace_axes(function, params, mask, X) == {"w": IO}


UNREAD, DISAGREE = "in no product that can be read", "its products disagree about them"
WARNED: dict[str, Any] = {
    "unused": (lambda w, x: x, UNREAD),
    "scale": (lambda w, x: jnp.einsum("btd,dij->btij", x, jnp.broadcast_to(w, (8, 8, 8))), UNREAD),
    "sorted": (lambda w, x: x @ jnp.sort(w), UNREAD),
    "power": (lambda w, x: x @ (w @ w), UNREAD),
    "modulated": (lambda w, x: x @ (w * x[0, :1].T), UNREAD),
    "changed": (lambda w, x: lax.scan(lambda w, x: (w + 1, x @ w), w, x)[1], UNREAD),
    "mixed_reshape": (lambda w, x: x[..., :4] @ w[:, :3].reshape(6, 4).T, UNREAD),
    "both_ways": (lambda w, x: x @ w @ w.T, DISAGREE),
    "outer": (lambda w, x: jnp.einsum("btd,ij->btdij", x, w), UNREAD),
    "split_axis": (lambda w, x: jnp.einsum("bti,oij->btoj", x[:, :, :4], w.reshape(8, 4, 2)), DISAGREE),
}


@pytest.mark.parametrize("case", WARNED)
def test_what_is_not_known_is_named_once(case: str) -> None:
    function, why = WARNED[case]
    params = {"odd": jnp.ones((8, 8)), "known": jnp.ones((8, 3)), "vector": jnp.ones(8)}
    with pytest.warns(UserWarning, match="does not know the axes of odd") as caught:
        found = trace_axes(lambda p, x: (x @ p["known"], function(p["odd"], x)), params, X)
    assert found == {"known": IO}
    assert [why in str(one.message) and one.filename == __file__ for one in caught] == [True]


def test_rows_of_tables_and_positions_are_silently_no_weights() -> None:
    def function(p: Any, token: Any, x: Any) -> Any:
        def over_time(x: Any, row: Any) -> Any:
            return (x + row) @ p["w"], None

        x = jnp.where(x[..., :1] > 0, x, p["blank"])[0] + p["table"][token] + p["unbatched"]
        return jnp.concatenate([p["token"], lax.scan(over_time, x, p["steps"])[0]]) @ p["table"].T

    shapes = {"table": (11, 8), "w": (8, 8), "steps": (4, 8), "blank": (1, 8), "token": (1, 8), "unbatched": (5, 8)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    assert trace_axes(function, params, 3, X) == {"w": IO}


def test_pruning_with_traced_axes_is_pruning_with_axes_by_hand() -> None:
    params = {"stack": {"dense": {"kernel": np.random.default_rng(0).standard_normal((8, 3, 8)).astype(np.float32)}}}

    def scanned(params: Any, x: Any) -> Any:
        kernels = jnp.moveaxis(params["stack"]["dense"]["kernel"], 1, 0)
        return lax.scan(lambda x, kernel: (x @ kernel, None), x, kernels)

    axes = trace_axes(scanned, params, X)
    by_hand = {"stack.dense.kernel": WeightAxes(out_axis=2, in_axis=0, batch_axis=1)}
    for options in ({}, {"scope": "erdos_renyi"}, {"block": (2, 4)}):
        masks, wanted = (prune_tree(params, 0.5, axes=given, **options) for given in (axes, by_hand))  # type: ignore[arg-type]
        jax.tree.map(np.testing.assert_array_equal, masks, wanted)
    for options in ({"scope": "erdos_renyi"}, {"block": (2, 4)}):
        with pytest.raises(ValueError, match=r"nobody knows those of stack\.dense\.kernel"):
            prune_tree(params, 0.5, **options)  # type: ignore[arg-type]
    schedule = CubicSchedule(0.5, begin=0, end=1)
    general = {"general": jnp.ones((8, 2, 3))}
    known = trace_axes(lambda params, x: jnp.einsum("btd,dhk->bthk", x, params["general"]), general, X)
    scheduled_pruning(optax.sgd(0.1), schedule, scope="erdos_renyi", axes=known).init(general)
    _, moved = regrow_tree(params, masks, 0.3, axes=axes)
    assert int(moved["stack"]["dense"]["kernel"].sum()) == int(masks["stack"]["dense"]["kernel"].sum())


def test_what_cannot_be_traced_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="got none: pass what fn closes over"):
        trace_axes(lambda p: p, {"w": jnp.ones((2, 2))})
    monkeypatch.setattr(_trace_axes, "Literal", None)
    with pytest.raises(RuntimeError, match="trace_axes reads JAX's traces"):
        trace_axes(lambda p, x: x, {"w": jnp.ones((2, 2))}, X)
