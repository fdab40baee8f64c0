"""``compress`` and ``expand`` on nnx models: what is exchanged wherever it is, and what must stay as it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from forked import JAX
from helpers import python
from maskedlinear import masks
from maskedlinear.costs import Costs
from maskedlinear.flax import MaskedLinear, SparseLinear, compress, expand, load_state, summary
from maskedlinear.pattern import SparsityPattern
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


def noted(name: str, value: Any) -> MaskedLinear:
    layer = wide()
    layer.kernel.set_metadata(name, value)
    return layer


def nested() -> MaskedLinear:
    layer: Any = wide()
    layer.inner = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    found: MaskedLinear = layer
    return found


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
        (lambda: nnx.List([noted("out_sharding", ("a", None))]), "its parameters are sharded"),
        (lambda: nnx.List([noted("on_get_value", lambda _, value: value)]), "its parameters have hooks"),
        (lambda: nnx.List([nested()]), "it has modules of its own"),
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


class DoubledSparse(SparseLinear):
    pass


class Other(nnx.Param[jax.Array]):
    pass


def sparse_stack() -> SparseLinear:
    pattern = SparsityPattern.from_mask(SPARSE.T)
    make = nnx.vmap(lambda rngs: SparseLinear(512, 512, pattern=pattern, rngs=rngs))
    stack: SparseLinear = make(nnx.Rngs(0).split(3))
    return stack


def sparse_of_another_type() -> SparseLinear:
    layer = SparseLinear.from_masked(wide())
    layer.weight_values = Other(layer.weight_values[...])
    return layer


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (sparse_stack, "it is a stack of layers"),
        (sparse_of_another_type, "its parameters are of a type of their own"),
        (lambda: DoubledSparse(512, 512, mask=SPARSE, rngs=nnx.Rngs(0)), "it is a DoubledSparse"),
        (lambda: nnx.eval_shape(lambda: SparseLinear(8, 8, rngs=nnx.Rngs(0))), "it has no values yet"),
    ],
)
def test_a_sparse_layer_that_cannot_change_keeps_its_form(
    make: Any, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nnx.List([make()])
    before = layers(model)
    compress(model, explain=True, measure=False)
    assert layers(model) == before
    assert why in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"0 cannot become dense: .*{why}"):
        expand(model)


def dense_stack() -> MaskedLinear:
    make = nnx.vmap(lambda rngs: MaskedLinear(512, 512, rngs=rngs))
    stack: MaskedLinear = make(nnx.Rngs(0).split(3))
    return stack


@pytest.mark.parametrize(("make", "share"), [(sparse_stack, SPARSE.mean()), (dense_stack, 1.0)])
def test_the_connections_of_a_stack_are_those_of_all_its_layers(
    make: Any, share: float, capsys: pytest.CaptureFixture[str]
) -> None:
    compress(nnx.List([make()]), explain=True, measure=False)
    live = round(3 * 512 * 512 * share)
    assert f"{live} ({100 * share:.3g} %)" in capsys.readouterr().out


def test_a_stack_is_called_one_layer_after_the_other() -> None:
    stack, x = sparse_stack(), jnp.ones((2, 512))
    scanned = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    assert scanned(x, stack).shape == (2, 512)
    with pytest.raises(ValueError, match="a stack of layers has a pattern for each of them; got values of shape"):
        stack(x)


DERIVED = ("rows", "starts", "outputs", "order")


def of_sizes(nnz: int, seed: int, stacked: int) -> Any:
    """Return a model with a layer in the sparse form, or with a stack of such ones, and a bias elsewhere."""
    mask = ~masks.random((6, 9), num_zeros=nnz, seed=seed)
    pattern = SparsityPattern.from_mask(mask)

    def make(rngs: nnx.Rngs) -> SparseLinear:
        return SparseLinear(9, 6, pattern=pattern, rngs=rngs)

    layer = nnx.vmap(make)(nnx.Rngs(seed).split(stacked)) if stacked else make(nnx.Rngs(seed))
    return nnx.List([layer, nnx.Linear(6, 2, rngs=nnx.Rngs(seed))])


@pytest.mark.parametrize(("nnz", "stacked"), [(20, 0), (13, 0), (20, 2)])
def test_a_checkpoint_of_the_sparse_form_may_hold_indptr_and_indices_only(
    tmp_path: Path, nnz: int, stacked: int
) -> None:
    saved, model = of_sizes(nnz, 1, stacked), of_sizes(20, 2, stacked)
    flat = [(path, leaf) for path, leaf in nnx.to_flat_state(nnx.state(saved)) if path[-1] not in DERIVED]
    small = nnx.from_flat_state(flat)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.to_pure_dict(small))
        checkpointer.wait_until_finished()
        like = jax.tree.map(jnp.zeros_like, nnx.to_pure_dict(small))
        nnx.replace_by_pure_dict(small, checkpointer.restore(tmp_path / "state", like))
    load_state(model, small)
    for (path, one), (_, other) in zip(
        nnx.to_flat_state(nnx.state(model)), nnx.to_flat_state(nnx.state(saved)), strict=True
    ):
        np.testing.assert_array_equal(one[...], other[...], err_msg=str(path))  # those that were made anew among them
    if not stacked:
        x = jnp.ones((3, 9))
        for call in (lambda layer: layer(x), nnx.jit(lambda layer: layer(x))):
            np.testing.assert_array_equal(call(model[0]), call(saved[0]))


def test_a_checkpoint_that_lacks_one_of_the_two_is_refused() -> None:
    for missing in ("indptr", "indices"):
        saved, model = of_sizes(20, 1, 0), of_sizes(20, 2, 0)  # as many connections, so that the wrong ones would fit
        flat = [part for part in nnx.to_flat_state(nnx.state(saved)) if part[0][-1] not in (*DERIVED, missing)]
        with pytest.raises(ValueError, match=r"in its indptr and indices; got a state with one of them alone"):
            load_state(model, nnx.from_flat_state(flat))
    model = of_sizes(20, 2, 0)
    pattern, values = model[0].pattern, of_sizes(20, 3, 0)[0].weight_values
    load_state(model, nnx.from_flat_state([((0, "weight_values"), values)]))  # with neither its own connections stay
    assert model[0].pattern == pattern
    np.testing.assert_array_equal(model[0].weight_values[...], values[...])


def test_a_report_has_a_row_for_each_of_a_stack() -> None:
    rows = summary(nnx.Dict(a=sparse_stack(), b=SparseLinear.from_masked(wide()))).rows
    assert [row.name for row in rows] == ["a[0]", "a[1]", "a[2]", "b"]
    assert len({(row.connections, row.nbytes, row.dead_outputs) for row in rows}) == 1
    assert [row.name for row in summary(SparseLinear(0, 3, rngs=nnx.Rngs(0))).rows] == [""]
    assert [row.name for row in summary(MaskedLinear(0, 3, rngs=nnx.Rngs(0))).rows] == [""]


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


def test_a_choice_without_costs_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_models, "_measured_seconds", lambda *_: {"dense": 1.0, "sparse": 2.0})
    monkeypatch.setattr(Costs, "are_shipped", lambda *_: False)  # as on a device without any
    assert isinstance(compress(wide()), MaskedLinear)


def test_what_is_too_close_is_measured_only_where_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_models, "_measured_seconds", lambda *_: {"dense": 1.0, "sparse": 2.0})
    shipped = Costs.shipped("jax", "cpu")
    sparse = shipped.dense[..., None].repeat(len(shipped.densities), -1) / 1.5
    close = replace(shipped, sparse=sparse, uneven=shipped.uneven * 0 + 1)
    assert isinstance(compress(wide(), costs=close), SparseLinear), "which is the same in every run"
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert isinstance(compress(wide(), costs=close), SparseLinear)
    assert isinstance(compress(wide(), costs=close, measure=True), MaskedLinear)


def test_the_costs_are_those_of_where_the_layer_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert isinstance(compress(wide(), measure=False), SparseLinear)


@pytest.mark.parametrize(("format", "batch"), [("nonsense", 1), ("auto", -3)])
def test_what_is_asked_is_checked_whatever_the_model(format: Any, batch: int) -> None:
    with pytest.raises(ValueError, match=r"format must be|batch must be"):
        compress(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), format, batch=batch)


class Scale(nnx.Variable[jax.Array]):
    pass


def test_what_a_user_wrote_on_a_layer_is_kept() -> None:
    layer: Any = wide(kernel_metadata={"rate": 3}, bias_metadata={"rate": 4})
    layer.note, layer._hidden, layer.scale = "mine", 1, Scale(jnp.ones(1))
    layer.several = nnx.data([nnx.Param(jnp.ones(2))])
    scale = layer.scale
    for form in ("sparse", "dense"):
        layer = compress(layer, form)  # type: ignore[arg-type]
        assert (layer.note, layer._hidden) == ("mine", 1)
        assert layer.scale is scale
        weight = layer.kernel if form == "dense" else layer.weight_values
        assert (weight.get_metadata()["rate"], layer.bias.get_metadata()["rate"]) == (3, 4)
        assert {path[0] for path, _ in nnx.to_flat_state(nnx.state(layer))} >= {"scale", "several"}
    assert not hasattr(layer, "weight_values")


DEVICES = """
import jax; jax.config.update("jax_num_cpu_devices", 2)
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P
from maskedlinear import masks
from maskedlinear.flax import MaskedLinear, SparseLinear, compress

mask, there = masks.random((64, 64), sparsity=0.9, seed=0).T, jax.devices()[1]

def made(place):
    layer = MaskedLinear(64, 64, mask=mask, rngs=nnx.Rngs(0))
    nnx.update(layer, jax.device_put(nnx.state(layer), place))
    return layer

layer = made(there)
for form in ("sparse", "dense"):
    assert compress(layer, measure=True, batch=2) is not None
    layer = compress(layer, form)
    assert {d for leaf in jax.tree.leaves(nnx.state(layer)) for d in leaf.devices()} == {there}, form

mesh = jax.make_mesh((2,), ("d",))
assert isinstance(compress(made(NamedSharding(mesh, P())), "sparse"), SparseLinear)
stack = nnx.List([SparseLinear.from_masked(made(there)) for _ in range(2)])
stack[1].weight_values.set_value(jax.device_put(stack[1].weight_values[...][:408], NamedSharding(mesh, P("d"))))
for layer, form in ((stack[1], "dense"),):
    try:
        compress(layer, form)
    except ValueError as error:
        assert "its parameters are sharded" in str(error), error
    else:
        raise AssertionError(form)
layer = made(there)
layer.kernel.set_value(jax.device_put(layer.kernel[...], NamedSharding(mesh, P("d"))))
try:
    compress(layer, "sparse")
except ValueError as error:
    assert "its parameters are sharded" in str(error), error
else:
    raise AssertionError
"""


@pytest.mark.slow
def test_new_forms_lie_where_the_old_ones_did_and_sharded_ones_stay() -> None:
    result = python(DEVICES, imported=JAX)
    assert not result.returncode, result.stderr
