"""``compress`` and ``expand`` on nnx models: what is exchanged wherever it is, and what must stay as it is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from maskedlinear import masks
from maskedlinear.flax import MaskedLinear, SparseLinear, compress, expand
from maskedlinear_jax.flax import _models

SPARSE = masks.random((512, 512), sparsity=0.99, seed=0).T


def wide(seed: int = 0, **options: Any) -> MaskedLinear:
    return MaskedLinear(512, 512, mask=SPARSE, rngs=nnx.Rngs(seed), **options)


class Network(nnx.Module):
    """Layers as attributes, in lists, dicts and tuples, and one in two places."""

    def __init__(self) -> None:
        dense = masks.random((512, 64), sparsity=0.2, seed=0).T
        self.first = MaskedLinear(64, 512, mask=dense, rngs=nnx.Rngs(0))
        self.blocks = nnx.List([nnx.Sequential(wide(1), nnx.relu)])
        self.named = nnx.Dict(a=wide(2))
        self.pair = nnx.data((wide(3), "static"))
        self.listed = nnx.data([wide(4)])
        self.again = self.named["a"]
        self.last = nnx.Linear(512, 8, rngs=nnx.Rngs(5))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.blocks[0](self.first(x))
        return self.last(self.again(self.listed[0](self.pair[0](self.named["a"](x)))))


def layers(model: Any) -> dict[str, str]:
    return {
        ".".join(map(str, path)): type(node).__name__
        for path, node in nnx.iter_graph(model)
        if isinstance(node, MaskedLinear | SparseLinear)
    }


def test_each_layer_gets_the_faster_form_wherever_it_is() -> None:
    model, x = Network(), jnp.ones((4, 64))
    before = model(x)
    assert compress(model, measure=False) is model
    found = layers(model)
    assert found.pop("first") == "MaskedLinear"
    assert set(found.values()) == {"SparseLinear"}
    assert len(found) == 4
    assert model.again is model.named["a"]
    np.testing.assert_allclose(model(x), before, rtol=1e-4, atol=1e-6)
    assert expand(model) is model
    assert set(layers(model).values()) == {"MaskedLinear"}
    assert (model.named["a"].mask[...] == jnp.asarray(SPARSE)).all()
    np.testing.assert_allclose(model(x), before, rtol=1e-4, atol=1e-6)


def test_a_compressed_model_trains() -> None:
    model = compress(nnx.Sequential(wide(0), nnx.relu, wide(1)), measure=False)
    assert set(layers(model).values()) == {"SparseLinear"}
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 512)), jnp.float32)

    @nnx.jit
    def step(model: nnx.Sequential, optimizer: nnx.Optimizer[nnx.Sequential]) -> jax.Array:
        loss, gradients = nnx.value_and_grad(lambda model: (model(x) ** 2).mean())(model)
        optimizer.update(model, gradients)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(5)]
    assert losses[-1] < losses[0]


def test_explain_and_a_layer_or_a_list_itself(capsys: pytest.CaptureFixture[str]) -> None:
    layer = wide()
    assert isinstance(compress(layer, explain=True, measure=False), SparseLinear)
    assert "(the model)" in capsys.readouterr().out
    found = compress([layer, {"a": layer}], "sparse", explain=True)
    assert isinstance(found[0], SparseLinear)
    assert found[1]["a"] is found[0]  # type: ignore[index]
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[0] == "0"
    assert lines[2].endswith("asked for")


class Doubled(MaskedLinear):
    pass


def tied() -> Any:
    one, other = wide(0), wide(1)
    other.kernel = one.kernel
    return nnx.List([one, other])


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: nnx.List([Doubled(512, 512, mask=SPARSE, rngs=nnx.Rngs(0))]), "it is a Doubled"),
        (lambda: nnx.List([wide(precision="highest")]), "the sparse form has no precision"),
        (tied, "it shares parameters with another layer"),
        (lambda: nnx.List([wide(forward_mode=True)]), "it has forward_mode"),
        (
            lambda: nnx.List([nnx.vmap(lambda rngs: MaskedLinear(8, 8, rngs=rngs))(nnx.Rngs(0).split(3))]),
            "a stack",
        ),
        (lambda: nnx.List([nnx.eval_shape(wide)]), "it has no values yet"),
    ],
)
def test_a_layer_that_cannot_change_keeps_its_form(make: Any, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = make()
    before = layers(model)
    compress(model, explain=True, measure=False)
    assert layers(model) == before
    assert why in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"0 cannot become sparse: .*{why}"):
        compress(model, "sparse")
    assert layers(model) == before


@pytest.mark.parametrize("form", ["dense", "sparse"])
@pytest.mark.parametrize("training", [True, False])
def test_both_forms_are_measured_and_the_layer_is_left_alone(form: str, training: bool) -> None:
    mask = masks.random((8, 6), sparsity=0.5, seed=0)
    layer = MaskedLinear(8, 6, mask=mask, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    layer = SparseLinear.from_masked(layer) if form == "sparse" else layer
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(layer)))
    found = _models._measured_seconds(layer, 3, training)
    assert set(found) == {"dense", "sparse"}
    assert all(seconds > 0 for seconds in found.values())
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(layer)))


def test_a_choice_that_is_too_close_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_models, "_measured_seconds", lambda *_: {"dense": 1.0, "sparse": 2.0})
    monkeypatch.setattr(_models, "costs_for", lambda *_: None)  # as on a device without any
    assert isinstance(compress(wide()), MaskedLinear)
    with pytest.raises(ValueError, match="needs costs"):
        compress(wide(), measure=False)
