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
from maskedlinear.flax import SparseLinear, compress, expand, keep_bits, load_state, regrow_model
from maskedlinear.jax import pack, sparse_linear, stack_patterns, with_bits
from maskedlinear.pattern import SparsityPattern
from maskedlinear_jax import _bits
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


@pytest.mark.parametrize("block", [1, 100, 1 << 24])  # places that are looked at at once
@pytest.mark.parametrize(("shape", "live"), [((6, 70), 0.5), ((1, 32), 1.0), ((9, 33), 0.1), ((5, 1), 0.6)])
def test_bits_say_where_connections_are(
    block: int, shape: tuple[int, int], live: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_bits, "_BLOCK", block)
    mask = np.random.default_rng(3).random(shape) < live
    mask[0, 0] = True
    check(with_bits(SparsityPattern.from_mask(mask)), mask)


def test_a_pattern_with_bits_is_the_pattern() -> None:
    pattern = with_bits(PATTERN)
    assert pattern == PATTERN
    assert pattern == PATTERN
    assert not kept(PATTERN)
    assert len(jax.tree.leaves(PATTERN)) == 6
    assert len(jax.tree.leaves(pattern)) == 8
    function = jax.jit(lambda values, x, pattern: sparse_linear(x, values, pattern))
    np.testing.assert_array_equal(function(VALUES, X, pattern), function(VALUES, X, PATTERN))


def test_bits_go_where_the_pattern_goes(tmp_path: Path) -> None:
    pattern = with_bits(PATTERN)
    for same in (
        copy.copy(pattern),
        copy.deepcopy(pattern),
        pickle.loads(pickle.dumps(pattern)),
        jax.device_put(pattern),
        jax.jit(lambda tree: tree)(pattern),
        jax.tree.map(jnp.asarray, pattern),
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
    many = jnp.stack([VALUES, VALUES])
    found, wanted = (jax.jit(jax.vmap(jax.grad(loss, (0, 1)), (None, 0, 0)))(X, many, stack) for stack in stacks)
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
    with pytest.raises(TypeError, match=r"not traced ones: it is a step of its own, outside of jit"):
        jax.jit(with_bits)(PATTERN)
    with pytest.raises(ValueError, match=r"got a stack of them, indices of shape \(2, \d+\): give bits to each"):
        with_bits(stack_patterns([PATTERN, PATTERN]))
    with pytest.raises(TypeError, match=r"all patterns of a stack keep bits, or none; got \['PatternWithBits', 'Spars"):
        stack_patterns([with_bits(PATTERN), PATTERN])
    wrong = jax.device_put(PATTERN)
    wrong.indices = wrong.indices.at[0].set(99)
    with pytest.raises(ValueError, match="an input must be one of the 70"):
        with_bits(wrong)


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
    checkpoint.save(one, tmp_path / "one.safetensors")
    for into in (layer(), keep_bits(layer())):
        checkpoint.load_into(into, tmp_path / "one.safetensors")
        np.testing.assert_array_equal(jitted(into, X), jitted(one, X))
    check(into.pattern, OTHER.to_mask())
    again = compress(expand(one), "sparse")
    np.testing.assert_array_equal(jitted(again, X), jitted(one, X))


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
    variable = getattr(one, name)
    variable.set_value(wrong(variable.get_value()))
    assert np.isnan(jitted(one, X)).all()
    assert np.isnan(gradient(one, X)["weight_values"][...]).all()
    with pytest.raises(ValueError, match=f"{name} must belong to the same connections as indptr and indices"):
        one(X)
    load_state(one, nnx.state(layer()))
    np.testing.assert_array_equal(jitted(one, X), jitted(layer(), X))


def test_bits_of_another_shape_are_said() -> None:
    one = keep_bits(layer())
    one.bits.set_value(one.bits[...][1:])
    with pytest.raises(ValueError, match=r"bits must have shape \(6, 3\) in a layer 70 -> 6"):
        one(X)
    with pytest.raises(TypeError, match=r"outside of nnx\.jit, on a model that has been filled"):
        keep_bits(nnx.eval_shape(layer))
