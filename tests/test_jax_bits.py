"""Patterns that keep their bits: right when made, wherever they go, and never those of another pattern."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

from forked import JAX
from helpers import python
from maskedlinear import checkpoint, masks
from maskedlinear.flax import (
    MaskedLinear,
    SparseLinear,
    compress,
    expand,
    keep_bits,
    load_state,
    prune_model,
    regrow_model,
)
from maskedlinear.jax import pack, sparse_linear, stack_patterns, with_bits
from maskedlinear.pattern import SparsityPattern
from maskedlinear_jax import _bits, _products
from maskedlinear_jax.flax import _models
from test_jax_sharded import PROGRAMS, SETUP

MASK = masks.random((6, 70), sparsity=0.6, seed=0)
MASK[2] = False
MASK[4] = True
PATTERN = SparsityPattern.from_mask(MASK)
OTHER = SparsityPattern.from_mask(MASK[:, ::-1])
X = jnp.asarray(np.random.default_rng(0).standard_normal((3, 70)), jnp.float32)
VALUES = jnp.asarray(np.random.default_rng(1).standard_normal(PATTERN.nnz), jnp.float32)


def kept(pattern: Any) -> bool:
    return isinstance(pattern, _bits.PatternWithBits)


def check(pattern: Any, mask: Any = MASK) -> None:
    """Compare the bits that a pattern keeps with a mask, place by place."""
    assert kept(pattern)
    bits, firsts = (np.asarray(one) for one in pattern.bits)
    assert bits.dtype == firsts.dtype == np.int32
    assert bits.shape == firsts.shape == (len(mask), -(-mask.shape[1] // 32))
    place = np.arange(bits.shape[1] * 32)
    live = bits[:, place // 32] >> place % 32 & 1
    np.testing.assert_array_equal(live[:, : mask.shape[1]], mask)
    assert not live[:, mask.shape[1] :].any()
    before = np.cumsum(live) - live.ravel()
    np.testing.assert_array_equal(firsts.ravel(), before[::32])


@pytest.mark.parametrize(("shape", "live"), [((6, 70), 0.5), ((1, 32), 1.0), ((9, 33), 0.1), ((5, 1), 0.6)])
def test_bits_say_where_connections_are(shape: tuple[int, int], live: float) -> None:
    mask = np.random.default_rng(3).random(shape) < live
    mask[0, 0] = True
    pattern = SparsityPattern.from_mask(mask)
    check(with_bits(pattern), mask)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(with_bits(pattern)))
    moved = with_bits(jax.device_put(pattern))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(moved)), "what lay on a device was brought back"
    check(moved, mask)
    check(jax.jit(with_bits)(pattern), mask)
    later = with_bits(jax.device_put(pattern))
    x, values = jnp.ones((2, shape[1])), jnp.ones(pattern.nnz)
    jax.jit(lambda x: sparse_linear(x, values, later))(x)  # the first to ask for bits is a program
    check(later, mask)


def test_a_pattern_with_bits_is_the_pattern() -> None:
    pattern = with_bits(PATTERN)
    assert pattern == PATTERN
    assert pattern == PATTERN
    assert not kept(PATTERN)
    assert len(jax.tree.leaves(PATTERN)) == 6
    assert len(jax.tree.leaves(pattern)) == 8
    function = jax.jit(lambda values, x, pattern: sparse_linear(x, values, pattern))
    np.testing.assert_array_equal(function(VALUES, X, pattern), function(VALUES, X, PATTERN))


def test_bits_go_where_the_pattern_goes() -> None:
    pattern = with_bits(PATTERN)
    for same in (
        copy.copy(pattern),
        copy.deepcopy(pattern),
        pickle.loads(pickle.dumps(pattern)),
        jax.device_put(pattern),
        jax.jit(lambda tree: tree)(pattern),
        jax.tree.map(jnp.asarray, pattern),
        with_bits(pattern),
        with_bits(jax.device_put(pattern)),
        with_bits(jax.device_put(PATTERN)),
    ):
        check(same)
    for part, mask in zip(pattern.split_rows(2), np.split(MASK, 2), strict=True):
        check(part, mask)
    check(type(pattern).from_mask(MASK[::-1]), MASK[::-1])
    assert pattern.places_in(OTHER).shape == (PATTERN.nnz,)


def test_every_transform_takes_them() -> None:
    def loss(x: Any, values: Any, pattern: Any) -> Any:
        return (sparse_linear(x, values, pattern) ** 2).sum()

    def scanned(x: Any, values: Any, pattern: Any) -> Any:
        step = jax.checkpoint(lambda values, _: (values - 0.1 * jax.grad(loss, 1)(x, values, pattern), None))
        return jax.lax.scan(step, values, None, length=3)[0]

    functions = [
        jax.jit(jax.value_and_grad(loss, (0, 1))),
        jax.jit(jax.hessian(loss)),
        jax.jacfwd(jax.grad(loss, 1)),
        jax.jit(scanned),
        jax.vmap(loss, (0, None, None)),
        jax.vmap(jax.grad(loss, 1), (None, 0, None)),
    ]
    for place, function in enumerate(functions):
        values = jnp.stack([VALUES, -VALUES]) if place == 5 else VALUES
        found, wanted = (function(X, values, pattern) for pattern in (with_bits(PATTERN), PATTERN))
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
    stacks = [stack_patterns([of(PATTERN), of(OTHER)]) for of in (with_bits, lambda pattern: pattern)]
    assert kept(stacks[0])
    stacks.append(jax.vmap(with_bits)(stacks[1]))
    jax.tree.map(np.testing.assert_array_equal, stacks[2], stacks[0])
    many = jnp.stack([VALUES, VALUES])
    found, wanted = (jax.jit(jax.vmap(jax.grad(loss, (0, 1)), (None, 0, 0)))(X, many, stack) for stack in stacks[:2])
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize("name", ["explicit", "shard_map", "rows"])
def test_on_eight_devices_they_are_whole_on_each(name: str) -> None:
    program = SETUP + PROGRAMS[name]
    for one in (
        "SparsityPattern.from_mask(mask)",
        "SparsityPattern.from_mask(masks.constant_fan_in((OUT, IN), 4, seed=1))",
    ):
        program = program.replace(f"= {one}\n", f"= with_bits({one})\n")
    program = program.replace("sparse_linear, stack_patterns\n", "sparse_linear, stack_patterns, with_bits\n")
    assert program.count("with_bits(") == (2 if name == "rows" else 1)
    result = python(program + "assert len(jax.tree.leaves(pattern)) == 8\nprint('done')", imported=JAX)
    assert result.stdout.strip() == "done", result.stderr


LAYERS = """
from flax import nnx
from maskedlinear.flax import SparseLinear, keep_bits
for kind in (AxisType.Auto, AxisType.Explicit):
    put = putter(mesh_of(kind, d=8))
    for axes in ((), ("d",)):  # indices may lie anywhere; bits are whole on each device
        if axes and kind == AxisType.Explicit:
            continue
        layer = SparseLinear(IN, OUT, pattern=pattern, rngs=nnx.Rngs(0))
        wanted = layer(x)
        graph, state = nnx.split(layer)
        state = jax.tree.map(lambda leaf: put(leaf, *axes if leaf.size % 8 == 0 else ()), state)
        layer = keep_bits(nnx.merge(graph, state))
        assert layer.bits[...].sharding.is_fully_replicated, layer.bits[...].sharding
        assert len(layer.bits[...].sharding.device_set) == 8
        np.testing.assert_allclose(nnx.jit(lambda layer, x: layer(x))(layer, put(x, "d")), wanted, rtol=1e-5, atol=1e-5)
    make = nnx.vmap(lambda key: SparseLinear(IN, OUT, pattern=pattern, rngs=nnx.Rngs(key)))
    graph, state = nnx.split(make(jax.random.split(jax.random.key(0), 8)))
    if kind == AxisType.Auto:
        stack = keep_bits(nnx.merge(graph, put(state, "d")))
        assert tuple(stack.bits[...].sharding.spec)[0] == "d"
        assert stack.bits[...].shape == (8, OUT, 1)
"""


def test_layers_on_eight_devices_keep_them_whole() -> None:
    result = python(SETUP + LAYERS + "print('done')", imported=JAX)
    assert result.stdout.strip() == "done", result.stderr


def test_they_leave_by_export() -> None:
    pattern = with_bits(PATTERN)
    program = export.export(jax.jit(sparse_linear), platforms=["cpu", "cuda"])(X, VALUES, pattern)
    again = export.deserialize(program.serialize())
    np.testing.assert_allclose(again.call(X, VALUES, pattern), sparse_linear(X, VALUES, PATTERN), rtol=1e-5, atol=1e-5)
    assert "custom_call" not in program.mlir_module()


def test_pack_takes_them() -> None:
    packed = pack(VALUES, with_bits(PATTERN))
    assert not kept(packed.pattern)  # on a CPU nothing reads them
    np.testing.assert_allclose(sparse_linear(X, packed), sparse_linear(X, VALUES, PATTERN), rtol=1e-5, atol=1e-5)


def test_what_cannot_have_bits_is_said() -> None:
    few, _ = SparsityPattern.from_edges([0], [0], (64, 64))
    assert with_bits(few) is few
    with pytest.raises(TypeError, match=r"must be a maskedlinear\.pattern\.SparsityPattern; got ndarray"):
        with_bits(MASK)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"got a stack of them, indices of shape \(2, \d+\): map over it, with jax.vmap"
    ):
        with_bits(stack_patterns([PATTERN, PATTERN]))
    with pytest.raises(TypeError, match=r"keep bits, or none; got .*sparsity=0.5714, with bits\), SparsityPattern\(70"):
        stack_patterns([with_bits(PATTERN), PATTERN])
    one, two = (SparsityPattern.from_edges([0] * size, range(size), (1, 129))[0] for size in (1, 2))
    with pytest.raises(ValueError, match="the same shape and number of connections"):
        stack_patterns([with_bits(one), with_bits(two)])  # of which one has too few for bits


def test_their_bytes_are_told() -> None:
    pattern = with_bits(PATTERN)
    leaves = jax.tree.leaves(pattern)
    indices = [leaf for place, leaf in enumerate(leaves) if place != 1]  # rows follow from indptr, and are not counted
    assert pattern.nbytes == sum(leaf.nbytes for leaf in indices)
    assert repr(pattern).endswith(", with bits)")


# Layers of nnx.


def layer(pattern: SparsityPattern = PATTERN, seed: int = 0) -> SparseLinear:
    return SparseLinear(70, 6, pattern=pattern, rngs=nnx.Rngs(seed))


@nnx.jit
def jitted(layer: SparseLinear, x: Any) -> Any:
    return layer(x)


@nnx.jit
def gradient(layer: SparseLinear, x: Any) -> Any:
    return nnx.grad(lambda layer: (layer(x) ** 2).sum())(layer)


def test_a_layer_keeps_bits_of_its_pattern() -> None:
    plain, by_pattern, later = layer(), layer(with_bits(PATTERN)), keep_bits(layer())
    assert plain.bits is None
    for one in (by_pattern, later):
        check(one.pattern)
        assert "bits" in nnx.to_pure_dict(nnx.state(one))
        for call in (lambda layer, x: layer(x), jitted):
            np.testing.assert_array_equal(call(one, X), call(plain, X))
        found, wanted = (gradient(of, X)["weight_values"][...] for of in (one, plain))
        np.testing.assert_array_equal(found, wanted)
    assert keep_bits(later).bits is later.bits
    model = nnx.Sequential(
        nnx.Linear(3, 70, rngs=nnx.Rngs(0)), layer(), layer(SparsityPattern.from_edges([0], [0], (6, 70))[0])
    )
    assert keep_bits(model) is model
    assert model.layers[1].bits is not None
    assert model.layers[2].bits is None, "bits would take more than what they are of"


def test_a_layer_s_bits_follow_its_connections(tmp_path: Path) -> None:
    one = keep_bits(layer())
    before = np.asarray(one.bits[...])
    regrow_model(one, fraction=0.5, seed=1)
    assert (np.asarray(one.bits[...]) != before).any()
    check(one.pattern, one.pattern.to_mask())
    assert np.isfinite(jitted(one, X)).all()
    load_state(one, nnx.state(layer(OTHER)))  # a state that has none
    check(one.pattern, OTHER.to_mask())
    other = layer()
    load_state(other, nnx.state(one))  # a model that has none
    np.testing.assert_array_equal(jitted(other, X), jitted(one, X))
    half = nnx.state(one)
    del half["firsts"]
    another = layer()
    load_state(another, half)
    check(another.pattern, OTHER.to_mask())
    checkpoint.save(one, tmp_path / "one.safetensors")
    for into in (layer(), keep_bits(layer())):
        checkpoint.load_into(into, tmp_path / "one.safetensors")
        np.testing.assert_array_equal(jitted(into, X), jitted(one, X))
    check(into.pattern, OTHER.to_mask())


def test_a_layer_that_becomes_dense_has_none_and_gets_its_own_later() -> None:
    model = nnx.Sequential(keep_bits(layer()))
    state = nnx.state(nnx.Sequential(MaskedLinear(70, 6, mask=MASK.T, rngs=nnx.Rngs(0))))
    expand(model)
    assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(state)
    prune_model(model, 0.8)
    wanted = model(X)
    compress(model, "sparse")
    assert model.layers[0].bits is None
    for _ in range(2):
        np.testing.assert_allclose(model(X), wanted, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(jitted(model, X), wanted, rtol=1e-5, atol=1e-5)
        keep_bits(model)
    check(model.layers[0].pattern, model.layers[0].pattern.to_mask())


def test_an_abstract_model_takes_a_state_with_bits() -> None:
    full = keep_bits(layer())
    for abstract in (nnx.eval_shape(lambda: keep_bits(layer(OTHER))), keep_bits(nnx.eval_shape(lambda: layer(OTHER)))):
        graph, state = nnx.split(abstract)
        assert jax.tree.map(lambda one: (one.shape, one.dtype), state) == jax.tree.map(
            lambda one: (one.shape, one.dtype), nnx.state(full)
        )
        check(nnx.merge(graph, nnx.state(full)).pattern)
    made = nnx.jit(lambda: keep_bits(layer()))()
    check(made.pattern)


def test_what_cannot_be_formed_leaves_a_layer_as_it_was() -> None:
    one = layer()
    indices = one.indices[...]
    one.indices.set_value(indices.at[0].set(99))
    keep_bits(one)
    with pytest.raises(ValueError, match="an input must be one of the 70"):
        one(X)
    one.indices.set_value(indices)
    load_state(one, nnx.state(one))
    check(one.pattern)


def test_compress_times_and_counts_bits_that_a_layer_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_models, "inference", lambda call, params, fixed, x: lambda: len(jax.tree.leaves(fixed)))
    monkeypatch.setattr(_models, "median_seconds", lambda calls: {form: call() for form, call in calls.items()})
    times = [_models._measured_seconds(one, 4, training=False)["sparse"] for one in (layer(), keep_bits(layer()))]
    assert times == [6, 8]
    assert _models._facts("", layer(), False).index_bytes == 16
    assert _models._facts("", keep_bits(layer()), False).index_bytes == 16 + round(8 * 6 * 3 / PATTERN.nnz)


def test_layers_of_a_stack_have_bits_each() -> None:
    make = nnx.vmap(lambda key: SparseLinear(70, 6, pattern=PATTERN, rngs=nnx.Rngs(key)))
    stack = make(jax.random.split(jax.random.key(0), 2))
    apply = nnx.jit(nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None)))
    wanted = apply(stack, X)
    keep_bits(stack)
    assert stack.bits[...].shape == (2, 6, 3)
    np.testing.assert_array_equal(apply(stack, X), wanted)


@pytest.mark.parametrize(
    ("name", "wrong"),
    {
        "a bit less": ("bits", lambda bits: bits.at[4, 0].set(bits[4, 0] ^ 4)),
        "a bit more": ("bits", lambda bits: bits.at[2, 1].set(1)),
        "a bit elsewhere": ("bits", lambda bits: bits.at[4, 2].set(bits[4, 2] ^ (1 << 5) ^ (1 << 20))),
        "another first": ("firsts", lambda firsts: firsts.at[4, 1].add(1)),
        "of another pattern": ("bits", lambda _: jnp.asarray(with_bits(OTHER).bits[0])),
        "none": ("bits", jnp.zeros_like),
    }.values(),
)
def test_wrong_bits_never_give_a_number(name: str, wrong: Any) -> None:
    one = keep_bits(layer())
    one(X)  # its indices are known to be right
    variable = getattr(one, name)
    variable.set_value(wrong(variable.get_value()))
    with pytest.raises(ValueError, match=f"{name} must belong to the same connections as indptr and indices"):
        one(X)
    # In programs those for GPUs, which read them, look at them; on a CPU nothing does.
    pattern = one._device_pattern()
    indices = pattern.indptr, pattern.rows, pattern.indices
    assert not _products._are_of_bits(*indices, pattern.bits, pattern.firsts, 70)
    np.testing.assert_array_equal(jitted(one, X), jitted(layer(), X))
    load_state(one, nnx.state(layer()))
    check(one.pattern)


def test_by_bits_indices_are_as_right_as_by_rows() -> None:
    right = _products.DevicePattern.of(with_bits(PATTERN))

    def are_right(pattern: Any) -> bool:
        indices = pattern.indptr, pattern.rows, pattern.indices
        assert pattern.bits is not None
        found = _products._are_of_bits(*indices, pattern.bits, pattern.firsts, 70)
        assert bool(found) <= bool(_products._are_of_one(*indices, 70)), "right by bits, and wrong by rows"
        return bool(found)

    assert are_right(right)
    # Words in another order, each of which is right for itself.
    swapped = np.arange(PATTERN.nnz)
    counts = np.bincount(PATTERN.rows * 3 + PATTERN.indices // 32, minlength=18)
    first = np.cumsum(counts) - counts
    swapped[: counts[0] + counts[1]] = [*range(first[1], first[2]), *range(counts[0])]
    starts = np.asarray(right.firsts).copy()
    starts[0, :2] = counts[1], 0
    moved = right._replace(rows=right.rows[swapped], indices=right.indices[swapped], firsts=jnp.asarray(starts))
    assert not are_right(moved)
    rng = np.random.default_rng(0)
    for name, array in right.named.items():
        for _ in range(20):
            place = tuple(rng.integers(size) for size in array.shape)
            number = int(array[place])
            for other in (number + 1, number - 1, number ^ 1 << int(rng.integers(32)), 1 << 30, -(1 << 31)):
                other = (other + (1 << 31)) % (1 << 32) - (1 << 31)
                wrong = right._replace(**{name: array.at[place].set(other)})
                if name in ("starts", "outputs", "order"):
                    assert are_right(wrong)  # by columns they are looked at elsewhere
                elif other != number:
                    assert not are_right(wrong), (name, place, other)


def test_programs_for_gpus_look_at_bits() -> None:
    counted = [
        jax.jit(lambda layer, x: nnx.merge(*layer)(x))
        .trace(nnx.split(one), X)
        .lower(lowering_platforms=(platform,))
        .as_text()
        .count("stablehlo.popcnt")
        for platform in ("cpu", "cuda")
        for one in (layer(), keep_bits(layer()))
    ]
    assert counted[:3] == [0, 0, 0]
    assert counted[3] >= 2


def test_bits_of_another_shape_are_said() -> None:
    one = keep_bits(layer())
    one.bits.set_value(one.bits[...][1:])
    with pytest.raises(ValueError, match=r"bits must have shape \(6, 3\) in a layer 70 -> 6"):
        one(X)
    one = layer()
    one.bits = type(one.indices)(jnp.zeros((6, 3), jnp.int32))
    with pytest.raises(ValueError, match="bits and firsts belong together; got a state with one of them alone"):
        one(X)
