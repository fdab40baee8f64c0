"""The Flax layers: nnx's ``MaskedLinear`` and linen's ``MaskedDense``, their masks, options, checkpoints and optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from jax import Array

from maskedlinear import masks, spec
from maskedlinear.flax import Mask, MaskedDense, MaskedLinear, param_masks
from maskedlinear.jax import freeze_masked

MASK = masks.random((5, 7), sparsity=0.5, seed=1)  # (out, in)
KERNEL_MASK = MASK.T  # (in, out), as every Flax kernel


@pytest.fixture
def x(rng: np.random.Generator) -> Array:
    return jnp.asarray(rng.standard_normal((3, 7)), jnp.float32)


@pytest.fixture
def layer() -> MaskedLinear:
    return MaskedLinear(7, 5, mask=KERNEL_MASK, rngs=nnx.Rngs(0))


def test_nnx_computes_the_spec(layer: MaskedLinear, x: Array) -> None:
    arrays = [np.asarray(a, np.float64) for a in (x, layer.kernel[...].T)]
    assert layer.bias is not None
    want = spec.forward(arrays[0], arrays[1], MASK, np.asarray(layer.bias[...], np.float64))
    np.testing.assert_allclose(layer(x), want, rtol=1e-5, atol=1e-6)
    assert isinstance(layer, nnx.Linear)
    assert layer.sparsity == 17 / 35
    np.testing.assert_array_equal(layer.masked_kernel, np.where(KERNEL_MASK, layer.kernel[...], 0))


def test_without_a_mask_they_are_flaxs_own(x: Array) -> None:
    ours, dense = MaskedLinear(7, 5, rngs=nnx.Rngs(3)), nnx.Linear(7, 5, rngs=nnx.Rngs(3))
    np.testing.assert_array_equal(ours.kernel[...], dense.kernel[...])
    np.testing.assert_allclose(ours(x), dense(x), rtol=1e-6, atol=1e-6)
    key = jax.random.key(0)
    variables, plain = MaskedDense(5).init(key, x), nn.Dense(5).init(key, x)
    np.testing.assert_array_equal(variables["params"]["kernel"], plain["params"]["kernel"])
    np.testing.assert_allclose(MaskedDense(5).apply(variables, x), nn.Dense(5).apply(plain, x), rtol=1e-6, atol=1e-6)
    assert variables["masks"]["mask"].all()


def test_the_kernels_columns_are_scaled_to_their_live_inputs(x: Array) -> None:
    mask = np.zeros((400, 3), bool)
    mask[:4, 0], mask[:100, 1] = True, True  # column 2 has none
    scale = np.array([10.0, 2.0, 1.0], np.float32)
    dense = nnx.Linear(400, 3, rngs=nnx.Rngs(0)).kernel[...]
    np.testing.assert_allclose(MaskedLinear(400, 3, mask=mask, rngs=nnx.Rngs(0)).full_kernel, dense * scale, rtol=1e-6)
    full = MaskedLinear(400, 3, mask=mask, init_fan_in="full", rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(full.full_kernel, dense)
    wide, key = jnp.ones((1, 400)), jax.random.key(0)
    plain = nn.Dense(3).init(key, wide)["params"]["kernel"]
    for options, expected in (({}, plain * scale), ({"init_fan_in": "full"}, plain)):
        variables = MaskedDense(3, mask=mask, **options).init(key, wide)  # type: ignore[arg-type]
        np.testing.assert_allclose(variables["params"]["kernel"], np.where(mask, expected, 0), rtol=1e-6)
        np.testing.assert_allclose(variables["dormant"]["dormant"], np.where(mask, 0, expected), rtol=1e-6)


def test_nnx_set_mask(layer: MaskedLinear, x: Array) -> None:
    calls = []

    @nnx.jit
    def apply(layer: MaskedLinear, x: Array) -> Array:
        calls.append(None)
        return layer(x)

    before, kernel, full = apply(layer, x), layer.kernel[...], layer.full_kernel
    layer.set_mask(~KERNEL_MASK)
    assert (apply(layer, x) != before).any()
    np.testing.assert_array_equal(layer.kernel[...], np.where(KERNEL_MASK, 0, full))
    np.testing.assert_array_equal(layer.full_kernel, full)
    layer.mask = KERNEL_MASK  # the same as set_mask
    assert isinstance(layer.mask, Mask)
    np.testing.assert_array_equal(apply(layer, x), before)
    np.testing.assert_array_equal(layer.kernel[...], kernel)
    assert len(calls) == 1, "a new mask needs no new compilation"
    nnx.jit(lambda layer, mask: layer.set_mask(mask))(layer, jnp.ones((7, 5), bool))
    assert layer.sparsity == 0


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_nothing_under_the_mask_leaks(layer: MaskedLinear, x: Array, poison: float) -> None:
    def both(layer: MaskedLinear) -> Any:
        return layer(x), nnx.grad(lambda layer: (layer(x) ** 2).sum())(layer)

    clean = both(layer)
    layer.kernel[...] = jnp.where(KERNEL_MASK, layer.kernel[...], poison)
    for a, b in zip(jax.tree.leaves(both(layer)), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(a, b)


def test_refusals(layer: MaskedLinear, x: Array) -> None:
    for bad, message in [
        (MASK, r"kernel \(in, out\) = \(7, 5\); got \(5, 7\), which is its transpose: pass mask.T"),
        (KERNEL_MASK * 0.5, r"got 0.5 at"),
        (np.full((7, 5), np.nan), r"got nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            layer.set_mask(bad)
        with pytest.raises(ValueError, match=message):
            MaskedLinear(7, 5, mask=bad, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=message):
            MaskedDense(5, mask=bad).init(jax.random.key(0), x)
    np.testing.assert_array_equal(layer.mask[...], KERNEL_MASK)
    with pytest.raises(ValueError, match=r"number of inputs, 7; got x of shape \(3, 4\)"):
        layer(x[:, :4])
    with pytest.raises(ValueError, match="init_fan_in must be 'live' or 'full'; got 'half'"):
        MaskedLinear(7, 5, init_fan_in="half", rngs=nnx.Rngs(0))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="param_dtype must be a real floating-point dtype"):
        MaskedLinear(7, 5, param_dtype=jnp.int32, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="must not be negative"):
        MaskedLinear(-7, 5, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="param_masks takes an nnx module"):
        param_masks([1])


def test_nnx_options(x: Array) -> None:
    calls = []

    def product(*arguments: Any, **options: Any) -> Array:
        calls.append(arguments)
        return jax.lax.dot_general(*arguments, **options)

    own = MaskedLinear(7, 5, mask=KERNEL_MASK, dot_general=product, rngs=nnx.Rngs(0))
    plain = MaskedLinear(7, 5, mask=KERNEL_MASK, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(own(x), plain(x), rtol=1e-6, atol=1e-6)
    assert calls
    half = MaskedLinear(7, 5, mask=KERNEL_MASK, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert half(x).dtype == jnp.bfloat16
    assert half.kernel[...].dtype == jnp.float32
    assert half(x[0]).shape == (5,)
    wide = MaskedLinear(7, 5, dtype=jnp.bfloat16, preferred_element_type=jnp.float32, rngs=nnx.Rngs(0))
    assert wide(x).dtype == jnp.float32
    ones = MaskedLinear(
        7,
        5,
        use_bias=False,
        param_dtype=jnp.float16,
        kernel_init=nnx.initializers.ones,
        precision="highest",
        forward_mode=True,
        rngs=nnx.Rngs(0),
    )
    assert ones.bias is None
    np.testing.assert_array_equal(ones(jnp.ones((2, 7), jnp.float16)), np.full((2, 5), 7))
    jax.jvp(ones, (x,), (x,))


def test_linen_options(x: Array) -> None:
    model = MaskedDense(
        5,
        use_bias=False,
        dtype=jnp.bfloat16,
        mask=lambda shape: np.ones(shape),
        kernel_init=nn.initializers.ones,
        dot_general=jax.lax.dot_general,
        precision="highest",
        forward_mode=True,
    )
    variables = model.init(jax.random.key(0), x)
    assert set(variables["params"]) == {"kernel"}
    assert model.apply(variables, x).dtype == jnp.bfloat16
    jax.jvp(lambda x: model.apply(variables, x), (x,), (x,))
    jax.jit(model.init)(jax.random.key(0), x)


def test_linen_masks_are_a_collection(x: Array) -> None:
    model = MaskedDense(5, mask=KERNEL_MASK)
    variables = model.init(jax.random.key(0), x)
    params = variables["params"]
    assert set(variables) == {"params", "masks", "dormant"}
    want = x @ jnp.where(KERNEL_MASK, params["kernel"], 0) + params["bias"]
    np.testing.assert_allclose(model.apply(variables, x), want, rtol=1e-5, atol=1e-6)
    other = {"params": params, "masks": {"mask": ~KERNEL_MASK}}
    assert (model.apply(other, x) != model.apply(variables, x)).any()
    with pytest.raises(ValueError, match="MaskedDense needs its mask: pass the collection 'masks'"):
        model.apply({"params": params}, x)
    with pytest.raises(ValueError, match=r"got \(5, 7\), which is its transpose"):
        model.apply({"params": params, "masks": {"mask": MASK}}, x)


def test_nnx_conversions(x: Array) -> None:
    dense = nnx.Linear(7, 5, dtype=jnp.float32, precision="highest", rngs=nnx.Rngs(2))
    layer = MaskedLinear.from_linear(dense, KERNEL_MASK)
    np.testing.assert_array_equal(layer.full_kernel, dense.kernel[...])
    assert layer.kernel is not dense.kernel
    assert (layer.precision, layer.dtype) == ("highest", jnp.float32)
    back = layer.to_linear()
    assert type(back) is nnx.Linear
    np.testing.assert_array_equal(back(x), layer.to_linear()(x))
    np.testing.assert_allclose(back(x), layer(x), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(MaskedLinear.from_linear(layer).mask[...], KERNEL_MASK)
    assert MaskedLinear.from_linear(nnx.Linear(7, 5, use_bias=False, rngs=nnx.Rngs(0))).bias is None


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = MaskedLinear(7, 5, mask=KERNEL_MASK, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.rest = nnx.List([MaskedLinear(5, 4, mask=np.eye(5, 4), rngs=rngs), nnx.Linear(4, 2, rngs=rngs)])

    def __call__(self, x: Array) -> Array:
        return self.rest[1](self.rest[0](self.norm(self.first(x))))


def test_nnx_mask_is_in_checkpoints_and_not_a_parameter(tmp_path: Path, x: Array) -> None:
    model = Network(nnx.Rngs(0))
    assert not any("mask" in path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(model))
        checkpointer.wait_until_finished()
        graph, other = nnx.split(Network(nnx.Rngs(1)))
        restored = nnx.merge(graph, checkpointer.restore(tmp_path / "state", other))
    assert isinstance(restored.first.mask, Mask)
    for a, b in zip(jax.tree.leaves(nnx.state(restored)), jax.tree.leaves(nnx.state(model)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_linen_mask_is_in_checkpoints(tmp_path: Path, x: Array) -> None:
    variables = MaskedDense(5, mask=KERNEL_MASK).init(jax.random.key(0), x)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", variables)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", MaskedDense(5).init(jax.random.key(1), x))
    np.testing.assert_array_equal(restored["masks"]["mask"], KERNEL_MASK)
    np.testing.assert_array_equal(restored["params"]["kernel"], variables["params"]["kernel"])


def test_freeze_masked_on_an_nnx_model(x: Array) -> None:
    model = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, freeze_masked(optax.adamw(0.1, weight_decay=0.1)), wrt=nnx.Param)
    start = [np.asarray(model.first.kernel[...]), np.asarray(model.rest[0].kernel[...])]

    @nnx.jit
    def step(model: Network, optimizer: nnx.Optimizer[Network], x: Array) -> None:
        grads = nnx.grad(lambda model: (model(x) ** 2).sum())(model)
        optimizer.update(model, grads, masks=param_masks(model))

    for _ in range(3):
        step(model, optimizer, x)
    for module, before in zip((model.first, model.rest[0]), start, strict=True):
        live = np.asarray(module.mask[...])
        same = np.asarray(module.kernel[...]) == before
        assert same[~live].all()
        assert not same[live].any()


def test_param_masks_of_a_linen_model(x: Array) -> None:
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            x = nn.Dense(3)(MaskedDense(5, mask=KERNEL_MASK, name="wired")(x))
            return nn.BatchNorm(use_running_average=True)(x)

    variables = Two().init(jax.random.key(0), x)
    tree = param_masks(variables)
    np.testing.assert_array_equal(tree["wired"]["kernel"], KERNEL_MASK)
    assert tree["wired"]["bias"] is tree["Dense_0"]["kernel"] is tree["BatchNorm_0"]["scale"] is None
    assert len(jax.tree.leaves(tree)) == 1, "what has no mask is no leaf: jitted functions take the tree"


def test_nnx_vmap_over_layers(x: Array) -> None:
    @nnx.vmap
    def make(key: Array) -> MaskedLinear:
        return MaskedLinear(7, 5, mask=KERNEL_MASK, rngs=nnx.Rngs(key))

    layers = make(jax.random.split(jax.random.key(0), 4))
    assert layers.mask[...].shape == (4, 7, 5)
    assert nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(layers, x).shape == (4, 3, 5)


def test_a_mask_that_a_state_brought_is_checked(layer: MaskedLinear, x: Array) -> None:
    for bad, message in (
        (KERNEL_MASK * 0.5 + 0.25, r"got 0.75 at|got 0.25 at"),
        (np.ones((1, 5), bool), r"got \(1, 5\)"),
    ):
        layer.mask.set_value(jnp.asarray(bad))
        with pytest.raises(ValueError, match=message):
            layer(x)
        for use in (lambda: layer.sparsity, lambda: layer.masked_kernel, layer.to_linear, lambda: param_masks(layer)):
            with pytest.raises(ValueError, match=message):
                use()
        layer.set_mask(KERNEL_MASK)
        np.testing.assert_array_equal(layer.mask[...], KERNEL_MASK)
    layer.mask = Mask(jnp.full((7, 5), 0.5))
    with pytest.raises(ValueError, match=r"got 0.5 at"):
        layer(x)
    for numbers in (jnp.asarray(KERNEL_MASK, jnp.float32), np.asarray(KERNEL_MASK)):
        layer.mask.set_value(numbers)
        assert layer(x).shape == (3, 5)
        layer.set_mask(~KERNEL_MASK)
        assert layer.mask[...].dtype == bool


def test_masks_of_zeros_and_ones_inside_transforms(layer: MaskedLinear, x: Array) -> None:
    ones = jnp.asarray(KERNEL_MASK, jnp.int32)
    abstract = nnx.eval_shape(lambda: MaskedLinear(7, 5, mask=ones, rngs=nnx.Rngs(0)))
    assert abstract.kernel.shape == (7, 5)
    variables = jax.jit(MaskedDense(5, mask=ones).init)(jax.random.key(0), x)
    np.testing.assert_array_equal(variables["masks"]["mask"], KERNEL_MASK)


def test_an_abstract_layer_says_so() -> None:
    abstract = nnx.eval_shape(lambda: MaskedLinear(7, 5, mask=KERNEL_MASK, rngs=nnx.Rngs(0)))
    for use in (
        lambda: abstract.set_mask(KERNEL_MASK),
        lambda: abstract.sparsity,
        lambda: abstract.masked_kernel,
        abstract.to_linear,
        lambda: MaskedLinear.from_linear(abstract),
    ):
        with pytest.raises(ValueError, match=r"abstract .* restore its state first"):
            use()
    assert param_masks(abstract)["kernel"].shape == (7, 5)
    with pytest.raises(TypeError, match=r"from_linear takes an nnx.Linear; got NoneType"):
        MaskedLinear.from_linear(None)  # type: ignore[arg-type]


def test_stacks_of_layers_convert(x: Array) -> None:
    @nnx.vmap
    def make(key: Array) -> MaskedLinear:
        return MaskedLinear(7, 5, mask=KERNEL_MASK, rngs=nnx.Rngs(key))

    layers = make(jax.random.split(jax.random.key(0), 3))
    call = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))
    copy, dense = MaskedLinear.from_linear(layers), layers.to_linear()
    for one in (copy, dense, MaskedLinear.from_linear(dense)):
        np.testing.assert_allclose(call(one, x), call(layers, x), rtol=1e-6, atol=1e-6)
    assert copy.mask[...].shape == (3, 7, 5)


def test_without_inputs_or_outputs() -> None:
    for in_, out in ((0, 4), (4, 0)):
        layer = MaskedLinear(in_, out, rngs=nnx.Rngs(0))
        model = MaskedDense(out)
        variables = model.init(jax.random.key(0), jnp.ones((2, in_)))
        for y in (layer(jnp.ones((2, in_))), model.apply(variables, jnp.ones((2, in_)))):
            np.testing.assert_array_equal(y, np.zeros((2, out)))


def test_refusals_name_the_inputs(layer: MaskedLinear, x: Array) -> None:
    model = MaskedDense(5, mask=KERNEL_MASK)
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"number of inputs, 7; got x of shape \(3, 6\)"):
        model.apply(variables, x[:, :6])
    for call in (layer, lambda inputs: model.apply(variables, inputs)):
        with pytest.raises(ValueError, match=r"got a scalar"):
            call(jnp.float32(1))
        for wrong in (None, "text"):
            with pytest.raises(TypeError, match=r"inputs must be an array of numbers; got (NoneType|str)"):
                call(wrong)
    with pytest.raises(ValueError, match=r"got a scalar"):
        model.init(jax.random.key(0), jnp.float32(1))
