"""The sparse form in JAX: the products, the function and nnx's ``SparseLinear``."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse
from flax import nnx
from jax import Array
from jax.test_util import check_grads

from maskedlinear import masks
from maskedlinear.flax import MaskedLinear, PatternIndex, SparseLinear, load_state
from maskedlinear.jax import masked_linear, sparse_linear, stack_patterns
from maskedlinear.pattern import SparsityPattern
from maskedlinear_jax import _primitives, _products

MASK = masks.random((6, 5), sparsity=0.5, seed=7)
PATTERN = SparsityPattern.from_mask(MASK)
X64 = pytest.mark.usefixtures("strict_jax")


def arguments(rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """Return x (4, 3, 5), the values and a bias, in float64."""
    return tuple(jnp.asarray(rng.standard_normal(shape)) for shape in ((4, 3, 5), (PATTERN.nnz,), (6,)))  # type: ignore[return-value]


def sparse(x: Array, values: Array, bias: Array) -> Array:
    return sparse_linear(x, values, PATTERN, bias)


def dense(x: Array, values: Array, bias: Array) -> Array:
    weight = jnp.zeros((6, 5), values.dtype).at[PATTERN.rows, PATTERN.indices].set(values)
    return masked_linear(x, weight, MASK, bias, forward_mode=True)


@X64
def test_the_value_and_every_derivative_are_the_dense_forms(rng: np.random.Generator) -> None:
    given = arguments(rng)
    np.testing.assert_allclose(sparse(*given), dense(*given))
    check_grads(sparse, given, order=3)
    for transform in (jax.jacfwd, jax.jacrev, jax.hessian):
        for i in range(3):
            np.testing.assert_allclose(transform(sparse, i)(*given), transform(dense, i)(*given), atol=1e-12)


@X64
def test_maps_over_everything_but_the_pattern(rng: np.random.Generator) -> None:
    many = [jnp.stack(parts) for parts in zip(*(arguments(rng) for _ in range(3)), strict=True)]
    loop = jnp.stack([dense(*(part[i] for part in many)) for i in range(3)])
    np.testing.assert_allclose(jax.vmap(sparse)(*many), loop)
    once = [part[0] for part in many]
    for i in range(3):
        axes = [0 if j == i else None for j in range(3)]
        mixed = [many[j] if j == i else once[j] for j in range(3)]
        np.testing.assert_allclose(jax.vmap(sparse, axes)(*mixed), jax.vmap(dense, axes)(*mixed))
        by = [jax.vmap(jax.grad(lambda *a, f=f: (f(*a) ** 2).sum(), i), axes)(*mixed) for f in (sparse, dense)]
        np.testing.assert_allclose(*by)


@X64
@pytest.mark.parametrize("kernel", ["cpu", "gathered"])
def test_a_stack_of_patterns_is_that_of_layers_side_by_side(kernel: str, rng: np.random.Generator) -> None:
    whole = SparsityPattern.from_mask(masks.constant_fan_in((6, 5), 2, seed=0))
    stack = stack_patterns(whole.split_rows(3))
    left, right, values = (jnp.asarray(rng.standard_normal(shape)) for shape in ((3, 2, 4), (3, 5, 4), (3, 4)))
    matrices = jnp.zeros((6, 5)).at[whole.rows, whole.indices].set(values.reshape(-1)).reshape(3, 2, 5)
    rest = _products.DevicePattern.of(stack).arrays
    got = _primitives._spmm(values, right, *rest, transposed=False, kernel=kernel)
    np.testing.assert_allclose(got, matrices @ right)
    got = _primitives._spmm(values, left, *rest, transposed=True, kernel=kernel)
    np.testing.assert_allclose(got, jnp.swapaxes(matrices, 1, 2) @ left)
    got = _primitives._sddmm(left, right, *rest, lead=1, kernel=kernel)
    full = (left @ jnp.swapaxes(right, 1, 2)).reshape(6, 5)
    np.testing.assert_allclose(got.reshape(-1), full[whole.rows, whole.indices])


def test_patterns_that_cannot_be_stacked_or_split() -> None:
    other = SparsityPattern.from_mask(~MASK[:, ::-1] | MASK)
    with pytest.raises(ValueError, match=r"same shape and number of connections.*; got 15 of shape"):
        stack_patterns([PATTERN, other])
    with pytest.raises(ValueError, match="got no pattern"):
        stack_patterns([])
    with pytest.raises(TypeError, match="takes patterns; got ndarray"):
        stack_patterns([MASK])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="must be one, not stacked"):
        sparse_linear(jnp.ones((2, 5)), jnp.ones((2, 15)), stack_patterns([PATTERN, PATTERN]))
    with pytest.raises(ValueError, match="6 outputs cannot be split into 4 equal parts"):
        PATTERN.split_rows(4)
    assert [part.shape for part in SparsityPattern.full((0, 3)).split_rows(2)] == [(0, 3), (0, 3)]


def test_maps_over_layers_without_inputs() -> None:
    pattern = SparsityPattern.from_mask(np.zeros((4, 0), bool))
    bias = jnp.arange(4.0)
    mapped = jax.vmap(lambda x: sparse_linear(x, jnp.zeros(0), pattern, bias))(jnp.zeros((3, 5, 0)))
    np.testing.assert_array_equal(mapped, jnp.broadcast_to(bias, (3, 5, 4)))


@X64
def test_a_pattern_is_an_argument_of_a_jitted_function(rng: np.random.Generator) -> None:
    x, values, bias = arguments(rng)
    compiled = jax.jit(lambda *given: sparse_linear(*given))  # not that of other tests
    for pattern in (PATTERN, jax.device_put(PATTERN)):
        np.testing.assert_allclose(compiled(x, values, pattern, bias), sparse(x, values, bias))
    assert isinstance(jax.device_put(PATTERN).indices, Array)
    other, _ = SparsityPattern.from_edges(PATTERN.rows, (PATTERN.indices + 1) % 5, (6, 5))
    compiled(x, values, other, bias)
    assert compiled._cache_size() <= 2, "another pattern of the same size is no new program"


@X64
@pytest.mark.parametrize("transform", [jax.checkpoint, partial(jax.jit, static_argnums=())])
def test_transforms(transform: Any, rng: np.random.Generator) -> None:
    given = arguments(rng)
    np.testing.assert_allclose(
        jax.grad(lambda v: (transform(sparse)(given[0], v, given[2]) ** 2).sum())(given[1]),
        jax.grad(lambda v: (dense(given[0], v, given[2]) ** 2).sum())(given[1]),
    )


SKEWED = np.zeros((300, 40), bool)
SKEWED[7], SKEWED[200:202], SKEWED[299, 3] = True, True, True
SHAPES = {
    "even": masks.random((300, 40), sparsity=0.4),
    "skewed": SKEWED,
    "one": SKEWED & (np.arange(300) == 299)[:, None],
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("way", ["gathered", "in parts", "in blocks", "rows"])
def test_each_way_to_a_product_gives_it(
    name: str, way: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "in parts":
        monkeypatch.setattr(_products, "_CHUNK", 1000)
    mask, batch = SHAPES[name], 9
    pattern = SparsityPattern.from_mask(mask)
    device_pattern = _products.DevicePattern.of(pattern)
    values = jnp.asarray(rng.standard_normal(pattern.nnz), jnp.float32)
    left, right = (jnp.asarray(rng.standard_normal((size, batch)), jnp.float32) for size in mask.shape)
    matrix = np.zeros(mask.shape)
    matrix[mask] = values
    for transposed, side in ((False, right), (True, left)):
        got = _products.spmm(values, side, device_pattern, transposed=transposed, cpu=way == "rows")
        np.testing.assert_allclose(got, (matrix.T if transposed else matrix) @ side, atol=1e-4)
    wanted = (left @ right.T)[mask]
    if way == "in blocks":
        got = jax.jit(_products._sddmm_in_blocks)(left, right, device_pattern)
    else:
        got = _products.sddmm(left, right, device_pattern, cpu=way == "in parts")
    np.testing.assert_allclose(got, wanted, atol=1e-4)


@pytest.mark.parametrize("batch", [31, 64, 100, 257])
def test_the_sampled_product_in_slices_of_any_batch(batch: int, rng: np.random.Generator) -> None:
    mask = SHAPES["even"]
    left, right = (jnp.asarray(rng.integers(-4, 5, (size, batch)), jnp.float32) for size in mask.shape)
    got = jax.jit(_products._sddmm_in_slices)(left, right, _products.DevicePattern.of(SparsityPattern.from_mask(mask)))
    np.testing.assert_array_equal(got, (left @ right.T)[mask])


@pytest.mark.parametrize("batch", [16, 36, 17])
def test_a_batch_of_whole_blocks_gives_what_any_other_does(batch: int, rng: np.random.Generator) -> None:
    pattern = SparsityPattern.from_mask(MASK)
    values, x, g = (jnp.asarray(rng.standard_normal(shape)) for shape in ((pattern.nnz,), (batch, 5), (batch, 6)))
    matrix = jnp.zeros(MASK.shape).at[pattern.rows, pattern.indices].set(values)
    y, pull = jax.vjp(lambda values, x: sparse_linear(x, values, pattern), values, x)
    np.testing.assert_allclose(y, x @ matrix.T, rtol=1e-5, atol=1e-5)
    dvalues, dx = pull(g)
    np.testing.assert_allclose(dvalues, (g.T @ x)[MASK], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, g @ matrix, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"pattern": MASK},
            TypeError,
            "pattern must be a maskedlinear.pattern.SparsityPattern; got ndarray: make one with",
        ),
        ({"values": jnp.zeros(3)}, ValueError, r"one entry for each of the pattern's 15 connections; got shape \(3,\)"),
        ({"values": "no"}, TypeError, "values must be an array of numbers; got str"),
        ({"values": jnp.zeros(15, int)}, TypeError, "values"),
        ({"x": jnp.zeros((4, 6))}, ValueError, "x"),
        ({"bias": jnp.zeros(5)}, ValueError, "bias"),
    ],
)
def test_what_does_not_belong_together_is_refused(change: Any, error: type[Exception], message: str) -> None:
    given: Any = {"x": jnp.zeros((4, 5)), "values": jnp.zeros(15), "pattern": PATTERN, "bias": None}
    with pytest.raises(error, match=message):
        sparse_linear(**(given | change))


def test_training_equals_that_of_the_dense_form(rng: np.random.Generator) -> None:
    masked = MaskedLinear(5, 6, mask=MASK.T, rngs=nnx.Rngs(0))
    layers = (masked, SparseLinear.from_masked(masked))
    x, target = (jnp.asarray(rng.standard_normal((32, size)), jnp.float32) for size in (5, 6))

    @nnx.jit
    def step(layer: Any, optimizer: Any) -> None:
        optimizer.update(layer, nnx.grad(lambda layer: ((layer(x) - target) ** 2).mean())(layer))

    for layer in layers:
        optimizer = nnx.Optimizer(layer, optax.adam(0.05), wrt=nnx.Param)
        for _ in range(20):
            step(layer, optimizer)
    np.testing.assert_allclose(layers[1].weight_values[...], masked.kernel[...].T[MASK], rtol=1e-4, atol=1e-5)
    assert set(nnx.to_pure_dict(nnx.state(layers[1], nnx.Param))) == {"weight_values", "bias"}
    assert set(nnx.to_pure_dict(nnx.state(layers[1], PatternIndex))) == set(_products.DevicePattern._fields[:6])


def test_forms_convert_without_loss() -> None:
    masked = MaskedLinear(5, 6, mask=MASK.T, param_dtype=jnp.bfloat16, init_fan_in="full", rngs=nnx.Rngs(0))
    layer = SparseLinear.from_masked(masked)
    assert layer.pattern == PATTERN
    back = layer.to_masked()
    np.testing.assert_array_equal(back.kernel[...], masked.masked_kernel)
    np.testing.assert_array_equal(back.mask[...], masked.mask[...])
    assert (back.init_fan_in, back.kernel[...].dtype) == ("full", jnp.bfloat16)
    assert layer.sparsity == 0.5
    with pytest.raises(TypeError, match="from_masked takes a MaskedLinear; got Linear: make one with"):
        SparseLinear.from_masked(nnx.Linear(5, 6, rngs=nnx.Rngs(0)))  # type: ignore[arg-type]


def test_from_edges_and_from_scipy(rng: np.random.Generator) -> None:
    weight = (rng.standard_normal((6, 5)) * MASK).astype(np.float32)
    to, of = np.nonzero(MASK)
    shuffle = rng.permutation(len(to))
    layer = SparseLinear.from_edges(to[shuffle], of[shuffle], (6, 5), weight[to, of][shuffle], np.arange(6.0))
    x = jnp.asarray(rng.standard_normal((3, 5)), jnp.float32)
    np.testing.assert_allclose(layer(x), x @ weight.T + np.arange(6), rtol=1e-5, atol=1e-6)
    other = SparseLinear.from_scipy(scipy.sparse.csc_array(weight), bias=np.arange(6.0))
    np.testing.assert_array_equal(other(x), layer(x))
    np.testing.assert_array_equal(other.to_scipy().toarray(), weight)  # (out, in)
    half = SparseLinear.from_scipy(scipy.sparse.csr_array(MASK), param_dtype=jnp.bfloat16)
    assert half.to_scipy().dtype == np.float32
    drawn = SparseLinear.from_edges(to, of, (6, 5), bias=False, rngs=nnx.Rngs(0))
    assert drawn.bias is None
    turned = scipy.sparse.csr_array([[1 + 2j]])
    with pytest.raises(TypeError, match="real; got a matrix of dtype complex"):
        SparseLinear.from_scipy(turned)
    for make, name in (
        (lambda: SparseLinear.from_edges([0], [0], (1, 1), [1j], param_dtype=jnp.float32), "values"),
        (lambda: SparseLinear.from_scipy(turned.real, bias=[1j]), "bias"),
    ):
        with pytest.raises(TypeError, match=f"{name} must be real; got complex.*: take the real part"):
            make()
    with pytest.raises(ValueError, match=r"one entry for each of the 15 edges; got \(3,\)"):
        SparseLinear.from_edges(to, of, (6, 5), jnp.zeros(3))
    with pytest.raises(ValueError, match=r"bias must have shape \(6,\), one entry an output; got \(5,\)"):
        SparseLinear.from_edges(to, of, (6, 5), weight[to, of], jnp.zeros(5))
    with pytest.raises(ValueError, match="a bias that is given needs values that are given"):
        SparseLinear.from_edges(to, of, (6, 5), bias=jnp.zeros(6), rngs=nnx.Rngs(0))


def test_what_the_layer_refuses() -> None:
    with pytest.raises(
        ValueError, match=r"the kernel's shape \(in, out\) = \(5, 6\); got \(6, 5\), which is its transpose"
    ):
        SparseLinear(5, 6, mask=MASK, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"the layer's shape \(out, in\) = \(5, 6\); got \(6, 5\), which is its transpose"
    ):
        SparseLinear(6, 5, pattern=PATTERN, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="init_fan_in"):
        SparseLinear(5, 6, init_fan_in="half", rngs=nnx.Rngs(0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must not be negative"):
        SparseLinear(-5, 6, rngs=nnx.Rngs(0))
    for kind in (SparseLinear, MaskedLinear):
        for sizes, name in (((2.9, 6), "in_features"), ((5, 6.0), "out_features"), ((True, 6), "in_features")):
            with pytest.raises(TypeError, match=f"{name} must be a whole number; got"):
                kind(*sizes, rngs=nnx.Rngs(0))  # type: ignore[arg-type]


def test_a_state_that_brings_other_indices_is_refused() -> None:
    def layer() -> SparseLinear:
        return SparseLinear(5, 6, pattern=PATTERN, rngs=nnx.Rngs(0))

    for name in ("indptr", "rows", "indices", "starts", "outputs", "order"):
        short: Any = layer()
        getattr(short, name).set_value(getattr(short, name)[...][:-1])
        for call in (lambda x, short=short: short(x), nnx.jit(lambda x, short=short: short(x))):
            with pytest.raises(ValueError, match=f"{name} must have shape .* in a layer 5 -> 6 with 15 values; got"):
                call(jnp.ones((2, 5)))
        wrong: Any = layer()
        getattr(wrong, name).set_value(getattr(wrong, name)[...] + 1)
        with pytest.raises(ValueError, match=r"must"):
            _ = wrong.pattern
    mixed: Any = layer()
    mixed.order.set_value(mixed.order[...][::-1])
    with pytest.raises(ValueError, match="order must belong to the same connections as indptr and indices"):
        _ = mixed.pattern
    assert layer().pattern == PATTERN


def test_the_draw_is_scaled_to_the_live_inputs_of_each_output() -> None:
    mask = masks.random((400, 400), sparsity=0.9, seed=1)
    for init_fan_in, count in (("live", mask.sum(1)), ("full", np.full(400, 400))):
        layer = SparseLinear(400, 400, mask=mask.T, init_fan_in=init_fan_in, rngs=nnx.Rngs(0))
        scaled = np.asarray(layer.weight_values[...]) * np.sqrt(count[layer.pattern.rows])
        assert scaled.std() == pytest.approx(1, rel=0.02)
    assert SparseLinear(5, 6, rngs=nnx.Rngs(0)).weight_values.shape == (30,)


def test_abstract_and_split_layers() -> None:
    layer = SparseLinear(5, 6, mask=MASK.T, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    x = jnp.ones((2, 5))
    np.testing.assert_array_equal(nnx.merge(graph, state)(x), layer(x))
    half = SparseLinear(5, 6, mask=MASK.T, dtype=jnp.float16, rngs=nnx.Rngs(0))
    assert half(x).dtype == jnp.float16


def test_a_large_layer_costs_what_its_connections_cost(rng: np.random.Generator) -> None:
    size, count = 100_000, 200_000
    flat = np.unique(rng.integers(0, size * size, count))
    layer = SparseLinear.from_edges(flat // size, flat % size, (size, size), rngs=nnx.Rngs(0))
    compiled = jax.jit(
        lambda values, pattern, x: jax.grad(lambda v: (sparse_linear(x, v, pattern) ** 2).sum())(values)
    ).lower(layer.weight_values[...], jax.device_put(layer.pattern), jnp.ones((4, size)))
    memory = compiled.compile().memory_analysis()
    assert memory.temp_size_in_bytes < 64 * 2**20


def test_a_pattern_has_an_argument_of_its_own() -> None:
    for options in ({"pattern": PATTERN}, {"mask": MASK.T}):
        assert SparseLinear(5, 6, **options, rngs=nnx.Rngs(0)).pattern == PATTERN
    given = SparsityPattern.from_mask(MASK)
    with pytest.raises(TypeError, match=r"got a SparsityPattern, .*: pass it as pattern="):
        SparseLinear(5, 6, mask=given, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="takes a mask or a pattern; got both"):
        SparseLinear(5, 6, mask=MASK.T, pattern=PATTERN, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"must be a maskedlinear\.pattern\.SparsityPattern; got ndarray: .* mask="):
        SparseLinear(5, 6, pattern=MASK, rngs=nnx.Rngs(0))


def scrambled() -> dict[str, Any]:
    """Return what a state may bring of each index: none of it belongs to the others."""
    here = {name: np.array(array) for name, array in _products.DevicePattern.of(PATTERN).named.items()}
    ascending, last = np.arange(PATTERN.nnz, dtype=np.int32), PATTERN.nnz - 1
    two = np.flatnonzero(np.diff(PATTERN.rows) == 0)[0]
    wrong: dict[str, Any] = {
        "order": {"order": ascending},
        "order out of range": {"order": np.where(ascending == last, 99, here["order"])},
        "order twice": {"order": np.where(ascending == 1, here["order"][0], here["order"])},
        "outputs": {"outputs": here["outputs"][::-1]},
        "rows": {"rows": here["rows"][::-1]},
        "rows out of range": {"rows": np.where(ascending == last, 99, here["rows"])},
        "starts": {"starts": np.zeros_like(here["starts"])},
        "starts that fall": {"starts": np.array([0, 5, 2, *here["starts"][3:]], np.int32)},
        "indices out of range": {"indices": np.where(ascending == last, 5, here["indices"])},
        "indices below 0": {"indices": np.where(ascending == 0, -1, here["indices"])},
        "an index twice": {"indices": np.where(ascending == two + 1, here["indices"][two], here["indices"])},
        "indptr": {"indptr": np.minimum(here["indptr"], 3)},
        "by columns": dict(
            zip(("starts", "outputs", "order"), SparsityPattern.from_mask(MASK[:, ::-1]).csc, strict=True)
        ),
        "another mask": {
            name: getattr(_products.DevicePattern.of(SparsityPattern.from_mask(MASK[::-1])), name)
            for name in ("indptr", "indices")
        },
    }
    return wrong


@pytest.mark.parametrize("name", scrambled())
def test_indices_that_contradict_each_other_never_give_a_number(name: str) -> None:
    layer = SparseLinear(5, 6, pattern=PATTERN, rngs=nnx.Rngs(0))
    state, x = nnx.state(layer), jnp.ones((3, 5))
    expected, own = layer(x), jnp.asarray(layer.pattern.indices)
    for part, array in scrambled()[name].items():
        state[part].set_value(jnp.asarray(array))
    nnx.update(layer, state)
    with pytest.raises(ValueError, match=r"must|an input"):
        layer(x)
    differentiate = nnx.grad(lambda layer, x: layer(x).sum(), argnums=(0, 1))
    y, gradients = nnx.jit(lambda layer, x: (layer(x), differentiate(layer, x)))(layer, x)
    assert np.isnan(gradients[1]).all()
    if {"indptr", "indices", "rows"} & scrambled()[name].keys():
        assert np.isnan(y).all()
        assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(gradients[0]))
    else:  # by columns, which are used for x's gradient only
        np.testing.assert_array_equal(y, expected)
    if not {"indptr", "indices"} & scrambled()[name].keys():
        load_state(layer, state)
        np.testing.assert_array_equal(layer(x), expected)
        np.testing.assert_array_equal(nnx.jit(lambda layer, x: layer(x))(layer, x), expected)
        np.testing.assert_array_equal(layer.indices[...], own)
    elif name != "another mask":
        with pytest.raises(ValueError, match=r"must|an input"):
            load_state(layer, state)


def test_indptr_and_indices_are_all_of_a_pattern() -> None:
    target, source = (SparseLinear(5, 6, mask=mask.T, rngs=nnx.Rngs(0)) for mask in (MASK, MASK[::-1]))
    state, x = nnx.state(source), jnp.ones((3, 5))
    for part in ("rows", "starts", "outputs", "order"):
        del state[part]
    load_state(target, state)
    np.testing.assert_array_equal(target(x), source(x))
    np.testing.assert_array_equal(nnx.jit(lambda layer, x: layer(x))(target, x), source(x))
    assert target.pattern == source.pattern
    make = nnx.vmap(lambda rngs: SparseLinear(5, 6, pattern=PATTERN, rngs=rngs))
    stack = make(nnx.Rngs(0).split(3))
    state = nnx.state(stack)
    state["order"].set_value(jnp.zeros((3, PATTERN.nnz), jnp.int32))
    load_state(stack, state)
    np.testing.assert_array_equal(stack.order[...], np.broadcast_to(PATTERN.csc[2], (3, PATTERN.nnz)))


def test_indices_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = SparseLinear(5, 6, pattern=PATTERN, rngs=nnx.Rngs(0)), jnp.ones((3, 5))
    layer(x)
    with monkeypatch.context() as patch:
        patch.setattr(SparseLinear, "pattern", property(lambda _: pytest.fail("looked at again")))
        layer(x)
        layer.order.set_value(layer.order[...] + 0)
        with pytest.raises(pytest.fail.Exception):
            layer(x)


@X64
@pytest.mark.parametrize("name", ["_spmm_p", "_sddmm_p"])
def test_without_primitives_the_products_are_jaxs_own(
    name: str, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    monkeypatch.setattr(_primitives, "Primitive", None)
    assert _primitives.primitive("none", *(None,) * 6) is None
    for part in ("_spmm_p", "_sddmm_p", "_turn_p"):
        monkeypatch.setattr(_primitives, part, None)
    given = arguments(rng)
    product = {"_spmm_p": sparse, "_sddmm_p": lambda *given: sampled(*given)}[name]

    def sampled(x: Array, values: Array, bias: Array) -> Array:
        left = jnp.outer(bias, values[:4])
        return _primitives.sddmm(left, x.reshape(-1, 5)[:4].T, _products.DevicePattern.of(PATTERN))

    if name == "_spmm_p":
        np.testing.assert_allclose(product(*given), dense(*given))
        np.testing.assert_allclose(jax.jacrev(product, 1)(*given), jax.jacfwd(dense, 1)(*given), atol=1e-12)
    else:
        full = jnp.outer(given[2], given[1][:4]) @ given[0].reshape(-1, 5)[:4]
        np.testing.assert_allclose(product(*given), full[PATTERN.rows, PATTERN.indices])
