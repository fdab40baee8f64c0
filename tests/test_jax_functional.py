"""``maskedlinear.jax``: derivatives through both doors, transforms, dtypes and refusals."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.test_util import check_grads

from forked import JAX
from helpers import problem, python
from maskedlinear import spec
from maskedlinear.jax import masked_linear

pytestmark = pytest.mark.usefixtures("strict_jax")


@pytest.fixture
def p(rng: np.random.Generator, strict_jax: None) -> list[Array]:
    return [jnp.asarray(array) for array in problem(rng)]


@pytest.mark.parametrize("forward_mode", [False, True])
def test_value_and_gradients_equal_the_spec(p: list[Array], forward_mode: bool) -> None:
    x, weight, mask, bias, g = p
    y, pullback = jax.vjp(lambda x, w, b: masked_linear(x, w, mask, b, forward_mode=forward_mode), x, weight, bias)
    arrays = [np.asarray(array) for array in p]
    np.testing.assert_allclose(y, spec.forward(*arrays[:4]), rtol=1e-13)
    for gradient, want in zip(pullback(g), spec.vjp(*arrays), strict=True):
        np.testing.assert_allclose(gradient, want, rtol=1e-12, atol=1e-13)


def test_every_order_and_mode_against_differences(p: list[Array]) -> None:
    x, weight, mask, bias, _ = p
    check_grads(lambda x, w, b: masked_linear(x, w, mask, b), (x, weight, bias), order=2, modes=["rev"])
    check_grads(
        lambda x, w, b: masked_linear(x, w, mask, b, forward_mode=True),
        (x, weight, bias),
        order=2,
        modes=["fwd", "rev"],
    )


def test_the_default_door_refuses_forward_mode_and_the_other_does_not(p: list[Array]) -> None:
    x, weight, mask, bias, _ = p
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: masked_linear(x, weight, mask, bias), (x,), (x,))
    _, dy = jax.jvp(lambda x: masked_linear(x, weight, mask, bias, forward_mode=True), (x,), (x,))
    np.testing.assert_allclose(dy, spec.forward(x, weight, mask), rtol=1e-13)


def test_hessians_through_both_doors(p: list[Array]) -> None:
    x, weight, mask, bias, _ = p

    def loss(weight: Array, forward_mode: bool) -> Array:
        return (masked_linear(x, weight, mask, bias, forward_mode=forward_mode) ** 3).sum()

    want = jax.jacrev(jax.jacrev(loss))(weight, False)
    for forward_mode in (False, True):
        np.testing.assert_allclose(jax.hessian(loss)(weight, forward_mode), want, rtol=1e-11, atol=1e-11)


def test_rule_keeps_no_masked_copy_of_the_weight(p: list[Array]) -> None:
    x, weight, mask, bias, _ = p
    _, pullback = jax.vjp(lambda w: masked_linear(x, w, mask, bias), weight)
    arrays = [leaf for leaf in jax.tree.leaves(pullback) if isinstance(leaf, jax.Array)]
    kept = [array for array in arrays if (array.shape, array.dtype) == (weight.shape, weight.dtype)]
    masked = np.asarray(jnp.where(mask, weight, 0.0))
    assert any(np.array_equal(leaf, np.asarray(weight)) for leaf in kept)
    assert not any(np.array_equal(leaf, masked) for leaf in kept)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("forward_mode", [False, True])
def test_nothing_under_the_mask_leaks(p: list[Array], poison: float, forward_mode: bool) -> None:
    x, weight, mask, bias, g = p

    def both(weight: Array) -> Any:
        y, pullback = jax.vjp(lambda x, w, b: masked_linear(x, w, mask, b, forward_mode=forward_mode), x, weight, bias)
        return y, *pullback(g)

    for a, b in zip(both(jnp.where(mask, weight, poison)), both(weight), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("forward_mode", [False, True])
@pytest.mark.parametrize("where", [0, 4])
def test_masked_gradient_is_positive_zero(p: list[Array], forward_mode: bool, where: int) -> None:
    p[where] = jnp.full_like(p[where], jnp.nan)
    x, weight, mask, bias, g = p
    _, pullback = jax.vjp(lambda w: masked_linear(x, w, mask, bias, forward_mode=forward_mode), weight)
    dw = np.asarray(pullback(g)[0])
    dormant = dw[~np.asarray(mask)]
    assert (dormant == 0).all()
    assert not np.signbit(dormant).any()
    assert np.isnan(dw[np.asarray(mask)]).all()


@pytest.mark.parametrize("forward_mode", [False, True])
@pytest.mark.parametrize(
    "dims", [(0, None, None, None), (None, 0, None, None), (None, None, 0, None), (None, None, None, 0), (1, 2, 0, 1)]
)
def test_vmap_over_every_argument(
    p: list[Array], dims: tuple[int | None, ...], forward_mode: bool, rng: np.random.Generator
) -> None:
    singles = []
    for array, dim in zip(p[:4], dims, strict=True):
        if dim is None:
            singles.append([array] * 3)
        elif array.dtype == bool:
            singles.append([array, ~array, jnp.roll(array, 1, 0)])
        else:
            singles.append([jnp.asarray(rng.standard_normal(array.shape)) for _ in range(3)])
    batched = [copies[0] if dim is None else jnp.stack(copies, dim) for copies, dim in zip(singles, dims, strict=True)]

    def both(x: Array, weight: Array, mask: Array, bias: Array) -> Any:
        y, pullback = jax.vjp(lambda x, w, b: masked_linear(x, w, mask, b, forward_mode=forward_mode), x, weight, bias)
        return y, *pullback(jnp.sin(y))

    together = jax.vmap(both, dims)(*batched)
    for i in range(3):
        for a, b in zip(together, both(*(copies[i] for copies in singles)), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-12, atol=1e-12)


def test_jit_checkpoint_and_scan_equal_eager(p: list[Array]) -> None:
    x, weight, mask, bias, g = p
    traces = []

    def gradients(mask: Array, layer: Any = masked_linear) -> Any:
        traces.append(None)
        return jax.vjp(lambda x, w, b: layer(x, w, mask, b), x, weight, bias)[1](g)

    jitted = jax.jit(gradients)
    for which in (mask, ~mask):
        for a, b in zip(jitted(which), gradients(which), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    assert len(traces) == 3, "a new mask needs no new compilation"
    for a, b in zip(gradients(mask, jax.checkpoint(masked_linear)), gradients(mask), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    _, rows = jax.lax.scan(lambda carry, row: (carry, masked_linear(row, weight, mask, bias)), None, x)
    np.testing.assert_allclose(rows, masked_linear(x, weight, mask, bias), rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("forward_mode", [False, True])
def test_dtypes_are_kept_and_half_types_round_once(rng: np.random.Generator, dtype: Any, forward_mode: bool) -> None:
    shapes = ((512, 512), (16, 512), (16,), (512, 16))  # long sums for y, dW and db
    x, weight, bias, g = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    mask = jnp.asarray(rng.random((16, 512)) > 0.5)
    y, pullback = jax.vjp(lambda x, w, b: masked_linear(x, w, mask, b, forward_mode=forward_mode), x, weight, bias)
    gradients = pullback(g)
    assert [array.dtype for array in (y, *gradients)] == [dtype] * 4
    if dtype == jnp.float32:
        return
    exact = [np.asarray(a, np.float64) for a in (x, weight)] + [np.asarray(mask)]
    exact += [np.asarray(a, np.float64) for a in (bias, g)]
    for got, want in zip((y, *gradients), (spec.forward(*exact[:4]), *spec.vjp(*exact)), strict=True):
        assert (np.asarray(got) == want.astype(np.float32).astype(dtype)).mean() > 0.99


def test_mixed_dtypes_promote_and_gradients_keep_their_own() -> None:
    x, weight, mask = jnp.ones((3, 5), jnp.bfloat16), jnp.ones((6, 5), jnp.float32), jnp.ones((6, 5), bool)
    with jax.numpy_dtype_promotion("standard"):
        y, pullback = jax.vjp(lambda x, w: masked_linear(x, w, mask), x, weight)
    assert y.dtype == jnp.float32
    assert [c.dtype for c in pullback(y)] == [jnp.bfloat16, jnp.float32]
    with pytest.raises(Exception, match="promotion"):
        masked_linear(x, weight, mask)


@pytest.mark.parametrize(
    ("batch", "n_in", "n_out"), [((), 5, 3), ((0,), 5, 3), ((2, 0), 5, 3), ((4,), 0, 3), ((4,), 5, 0)]
)
def test_edge_shapes(batch: tuple[int, ...], n_in: int, n_out: int) -> None:
    x, weight, bias = jnp.ones((*batch, n_in)), jnp.ones((n_out, n_in)), jnp.full(n_out, 2.0)
    mask = jnp.ones((n_out, n_in), bool)
    y, pullback = jax.vjp(lambda x, w, b: masked_linear(x, w, mask, b), x, weight, bias)
    np.testing.assert_array_equal(y, np.full((*batch, n_out), n_in + 2.0))
    assert [c.shape for c in pullback(y)] == [x.shape, weight.shape, bias.shape]


def test_numpy_arguments_and_masks_of_zeros_and_ones(p: list[Array]) -> None:
    want = masked_linear(*p[:4])
    arrays = [np.asarray(array) for array in p[:4]]
    for mask in (arrays[2], arrays[2].astype(float), arrays[2].tolist()):
        np.testing.assert_array_equal(masked_linear(arrays[0], arrays[1], mask, arrays[3]), want)


def test_refusals(p: list[Array]) -> None:
    x, weight, mask, bias, _ = p
    cases: list[tuple[Any, type[Exception], str]] = [
        ((x[..., :4], weight, mask, bias), ValueError, r"inputs, 5; got x of shape \(4, 3, 4\)"),
        ((x, weight, mask.T, bias), ValueError, r"= \(6, 5\); got \(5, 6\), which is its transpose: pass mask.T"),
        ((x, weight, mask[:1], bias), ValueError, r"got \(1, 5\)"),
        ((x, weight, np.asarray(mask) * 0.5, bias), ValueError, r"got 0.5 at"),
        ((x, weight, jnp.full((6, 5), jnp.nan), bias), ValueError, r"got nan at \(0, 0\)"),
        ((x, weight.astype(int), mask, bias), TypeError, r"weight must have a real floating-point dtype .*got int64"),
        ((x.astype(int), weight, mask, bias), TypeError, r"x must have a real floating-point dtype"),
        ((x, weight, mask, bias[:5]), ValueError, r"bias must have shape \(out,\) = \(6,\); got \(5,\)"),
        ((x, weight[0], mask, bias), ValueError, r"weight must have 2 dimensions"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            masked_linear(*arguments)
    with pytest.raises(ValueError, match=r"must be boolean.*mask.astype\(bool\)"):
        jax.jit(masked_linear)(x, weight, mask.astype(float), bias)


def test_a_mask_on_another_device_is_refused() -> None:
    code = """
import jax; jax.config.update("jax_num_cpu_devices", 2)
import jax.numpy as jnp, numpy as np
from maskedlinear.jax import masked_linear
from maskedlinear.flax import MaskedLinear
from flax import nnx
one, two = jax.devices()
weight = jax.device_put(jnp.ones((3, 4)), one)
masked_linear(jnp.ones(4), weight, jnp.ones((3, 4), bool))
masked_linear(jnp.ones(4), weight, np.ones((3, 4), bool))
layer = MaskedLinear(4, 3, rngs=nnx.Rngs(0))
layer.kernel[...] = jax.device_put(layer.kernel[...], one)
layer.mask.set_value(jax.device_put(layer.mask[...], two))
for call in (lambda: masked_linear(jnp.ones(4), weight, jax.device_put(jnp.ones((3, 4), bool), two)),
             lambda: layer(jnp.ones(4))):
    try:
        call()
    except ValueError as error:
        print(error)
"""
    result = python(code, imported=JAX)
    message = (
        "mask and weight must be on the same devices; got the mask on cpu:1 and the weight on cpu:0: move the mask"
    )
    assert result.stdout.count(message) == 2, result.stdout + result.stderr


def test_masks_of_zeros_and_ones_inside_transforms(p: list[Array]) -> None:
    x, weight, mask, bias, _ = p
    for kind in (jnp.float64, jnp.int32):
        given = mask.astype(kind)
        got = jax.jit(lambda x, given=given: masked_linear(x, weight, given, bias))(x)
        np.testing.assert_allclose(got, masked_linear(x, weight, mask, bias), rtol=1e-12)


def test_arguments_that_are_no_arrays_are_refused(p: list[Array]) -> None:
    x, weight, mask, bias, _ = p
    for arguments, name in (
        ((None, weight, mask, bias), "x must be an array of numbers; got NoneType"),
        ((x, "weight", mask, bias), "weight must be an array of numbers; got str"),
        ((x, weight, mask, [[1], [1, 2]]), "bias must be an array of numbers; got list"),
    ):
        with pytest.raises(TypeError, match=name):
            masked_linear(*arguments)
