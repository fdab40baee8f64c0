"""``shrink`` for nnx: smaller models with the same outputs; what cannot be followed is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maskedlinear.flax import MaskedLinear, get_masks, mask_model, prune_model, set_masks, shrink
from maskedlinear.masks import Wiring
from maskedlinear.pattern import SparsityPattern
from maskedlinear.pruning import _shrink

X = jax.random.normal(jax.random.key(0), (7, 6))


def without(model: Any, outputs: dict[str, list[int]], inputs: dict[str, list[int]] | None = None) -> Any:
    """Mask all linear layers, take out some of their outputs and inputs, and give every parameter a value of its own."""
    mask_model(model)
    masks = {name: np.array(mask) for name, mask in get_masks(model).items()}
    for name, places in outputs.items():
        masks[name][:, places] = False
    for name, places in (inputs or {}).items():
        masks[name][places] = False
    set_masks(model, masks)
    generator = np.random.default_rng(1)
    for _, node in nnx.iter_graph(model):
        for own in vars(node).values() if isinstance(node, nnx.Module) else ():
            if isinstance(own, nnx.Variable) and hasattr(own.get_value(), "dtype") and own[...].dtype == jnp.float32:
                own.set_value(jnp.asarray(generator.uniform(0.1, 1.1, own[...].shape), jnp.float32))
    return model


def same(model: Any, small: Any, x: Any = X) -> None:
    model.eval()
    small.eval()
    np.testing.assert_allclose(small(x), model(x), rtol=1e-5, atol=1e-5)


def sizes(model: Any) -> list[tuple[int, int]]:
    found = [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Linear)]
    assert all(node.kernel[...].shape == (node.in_features, node.out_features) for node in found)
    return sorted((node.in_features, node.out_features) for node in found)


class Network(nnx.Module):
    def __init__(self, between: Callable[[Any], Any] = nnx.relu) -> None:
        rngs = nnx.Rngs(0)
        self.enter = nnx.Linear(6, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(8, 16, use_bias=False, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)])
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.leave = nnx.Linear(8, 2, rngs=rngs)
        self.between = between

    def __call__(self, x: Any, scale: float = 2.0) -> Any:
        h = self.between(self.norm(self.enter(x)))
        h = h + jnp.tanh(self.blocks[1](self.drop(nnx.sigmoid(self.blocks[0](h)) * scale - 1)))
        return {"y": self.leave(jnp.where(h > 1, h, 0.5 * h))}["y"]


BETWEEN = [nnx.relu, nnx.gelu, nnx.silu, nnx.leaky_relu, nnx.elu, jax.jit(jnp.sin)]


@pytest.mark.parametrize(
    ("between", "shape"),
    [
        (nnx.relu, (2, 3, 6)),
        *(pytest.param(between, (7, 6), marks=pytest.mark.slow) for between in BETWEEN),
        *(pytest.param(between, (2, 3, 6), marks=pytest.mark.slow) for between in BETWEEN[1:]),
    ],
)
def test_nodes_are_followed_through_a_module(between: Any, shape: tuple[int, ...]) -> None:
    model = without(Network(between), {"enter": [0, 1], "blocks.1": [1, 2], "blocks.0": [3]}, {"leave": [7]})
    x = jax.random.normal(jax.random.key(1), shape)
    small = shrink(model, x)
    assert type(small) is Network
    assert sizes(small) == sorted([(6, 7), (7, 15), (15, 7), (7, 2)])
    assert small.norm.num_features == 7
    same(model, small, x)
    assert sizes(model) == sorted([(6, 8), (8, 16), (16, 8), (8, 2)])


def test_a_sequential_gives_its_constants_to_the_next_bias_and_trains_on() -> None:
    rngs = nnx.Rngs(0)
    model = without(
        nnx.Sequential(nnx.Linear(6, 8, rngs=rngs), nnx.gelu, nnx.Linear(8, 3, use_bias=False, rngs=rngs)),
        {"layers.0": [1]},
    )
    small = shrink(model, X, explain=True)
    assert sizes(small) == [(6, 7), (7, 3)]
    assert type(small.layers[0]) is nnx.Linear
    assert small.layers[2].bias is not None
    same(model, small)
    nnx.grad(lambda one: one(X).sum())(small)


def test_a_pruned_model_becomes_smaller_and_keeps_the_masks_that_are_left() -> None:
    rngs = nnx.Rngs(0)
    layers = [
        nnx.Linear(6, 50, rngs=rngs),
        nnx.relu,
        nnx.Linear(50, 50, rngs=rngs),
        nnx.tanh,
        nnx.Linear(50, 4, rngs=rngs),
    ]
    model = without(nnx.Sequential(*layers), {})
    prune_model(model, 0.95, score="random", seed=2, on_empty="allow")
    small = shrink(model, X)
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(small, nnx.Param))) < 1000
    assert isinstance(small.layers[2], MaskedLinear)
    same(model, small)
    mask = np.asarray(model.layers[2].mask[...]).T
    wiring = Wiring(SparsityPattern.from_mask(mask), tuple(range(50)), tuple(range(50)))  # type: ignore[arg-type]
    names = wiring.follow(small.layers[2])
    assert names.pattern.shape == (small.layers[2].out_features, small.layers[2].in_features)
    assert 0 < names.pattern.nnz < wiring.pattern.nnz
    assert {
        edge for edge in wiring.edges(model.layers[2]) if edge[1] in names.outputs and edge[0] in names.inputs
    } == set(wiring.edges(small.layers[2])), "names follow"
    assert sizes(shrink(small, X)) == sizes(small)


def test_a_single_layer_and_full_masks_stay_as_they_are() -> None:
    for model in (nnx.Linear(6, 4, rngs=nnx.Rngs(0)), MaskedLinear(6, 4, rngs=nnx.Rngs(0)), without(Network(), {})):
        assert sizes(shrink(model, X)) == sizes(model)


UNFOLLOWED = {
    "softmax": (nnx.softmax, "features that go into"),
    "flip": (lambda x: x[..., ::-1], "features that go into rev"),
    "cumsum": (lambda x: jnp.cumsum(x, -1), "features that go into cumsum"),
    "its own factors": (lambda x: x * jnp.arange(8.0), "features that go into mul"),
    "a layer norm": (nnx.LayerNorm(8, rngs=nnx.Rngs(0)), "features that go into"),
}


@pytest.mark.parametrize("case", UNFOLLOWED)
def test_what_is_not_followed_is_refused_or_kept(case: str) -> None:
    between, message = UNFOLLOWED[case]
    model = without(Network(between), {"enter": [2]})
    with pytest.raises(ValueError, match=message):
        shrink(model, X)
    small = shrink(model, X, on_unfollowed="keep")
    assert (6, 8) in sizes(small)
    same(model, small)


def test_a_layer_that_is_used_twice_keeps_its_nodes() -> None:
    middle = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    first = nnx.Linear(6, 8, rngs=nnx.Rngs(1))
    model = without(nnx.Sequential(first, middle, middle, nnx.Linear(8, 2, rngs=nnx.Rngs(2))), {}, {"layers.3": [1]})
    with pytest.raises(ValueError, match=r"come out of layers\.1 \(MaskedLinear, used in two places"):
        shrink(model, X)
    small = shrink(model, X, on_unfollowed="keep")
    assert sizes(small) == sizes(model)
    same(model, small)


def test_bad_input_is_refused_and_a_wrong_model_never_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    rngs = nnx.Rngs(0)
    layers = [nnx.Linear(6, 8, rngs=rngs), nnx.gelu, nnx.Linear(8, 3, rngs=rngs)]
    model = without(nnx.Sequential(*layers), {"layers.0": [1]})
    with pytest.raises(TypeError, match=r"shrink takes an nnx\.Module that can be called; got int"):
        shrink(3, X)
    with pytest.raises(ValueError, match="on_unfollowed must be 'raise' or 'keep'; got 'skip'"):
        shrink(model, X, on_unfollowed="skip")
    with pytest.raises(ValueError, match="this Network cannot be traced"):
        shrink(Network(lambda x: x if x.sum() > 0 else -x), X)
    right = _shrink._times
    monkeypatch.setattr(_shrink, "_times", lambda *arguments: right(*arguments) * (1 + 1e-8))
    with pytest.raises(RuntimeError, match="shrink would change an output by more than rounding can"):
        shrink(model, X)
