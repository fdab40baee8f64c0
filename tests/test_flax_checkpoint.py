"""Files of nnx modules, linen's variables and trees: what comes back is what was saved, bit for bit, or an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze

from maskedlinear import checkpoint
from maskedlinear.checkpoint import CheckpointError, MaskedArray
from maskedlinear.flax import (
    MaskedDense,
    MaskedLinear,
    SparseLinear,
    get_masks,
    mask_model,
    param_masks,
    set_masks,
)
from maskedlinear.jax import apply_masks, freeze_masked, prune_tree


class Mlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)])
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.scale = jnp.asarray(rngs.params.normal((8,)))

    def __call__(self, x: Any) -> Any:
        for layer in self.layers:
            x = self.dropout(nnx.relu(self.norm(layer(x)))) * self.scale
        return x


class ConvNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.up = nnx.ConvTranspose(4, 3, (2, 2), rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.up(nnx.relu(self.conv(x.reshape(-1, 1, 3, 2))))


class Attention(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)
        self.head = nnx.Sequential(nnx.LayerNorm(6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs))

    def __call__(self, x: Any) -> Any:
        return self.head(self.attention(x[None]))


class Recurrent(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.rnn = nnx.RNN(nnx.LSTMCell(6, 5, rngs=rngs), rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.rnn(x[None])


class Stack(nnx.Module):
    """Layers by vmap, called by scan; and two that share a kernel."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs: nnx.Rngs) -> nnx.Linear:
            return nnx.Linear(6, 6, rngs=rngs, param_dtype=jnp.bfloat16)

        self.stack = make(rngs)
        self.first, self.second = nnx.Linear(6, 6, rngs=rngs), nnx.Linear(6, 6, rngs=rngs)
        self.second.kernel = self.first.kernel

    def __call__(self, x: Any) -> Any:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def step(x: Any, layer: nnx.Linear) -> Any:
            return layer(x).astype(x.dtype)

        return self.second(self.first(step(x, self.stack)))


MODELS = [Mlp, ConvNet, Attention, Recurrent, Stack]
X = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)


def made(kind: Callable[[nnx.Rngs], Any], seed: int, sparsity: float | None = None) -> Any:
    model = kind(nnx.Rngs(seed))
    if sparsity is not None:
        shapes = {name: mask.shape for name, mask in get_masks(mask_model(kind(nnx.Rngs(seed)))).items()}
        mask_model(model, {name: random_mask(shape, seed, sparsity) for name, shape in shapes.items()})
    model.eval()
    return model


def random_mask(shape: tuple[int, ...], seed: int, sparsity: float) -> Any:
    return np.random.default_rng(seed).random(shape) >= sparsity


def same(tree: Any, other: Any) -> bool:
    """Whether two trees are the same, bit for bit."""
    leaves, others = jax.tree.leaves(tree), jax.tree.leaves(other)
    keys = [jnp.issubdtype(getattr(leaf, "dtype", float), jax.dtypes.prng_key) for leaf in leaves]
    pairs = zip(keys, leaves, others, strict=True)
    arrays = [[np.asarray(jax.random.key_data(one) if key else one) for one in pair] for key, *pair in pairs]
    return jax.tree.structure(tree) == jax.tree.structure(other) and all(
        (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()) for a, b in arrays
    )


def variables_of(model: Any) -> list[Any]:
    return [part for _, part in nnx.iter_graph(model) if isinstance(part, nnx.Variable)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("kind", MODELS)
def test_a_module_comes_back_bit_for_bit_into_the_same_variables(kind: Any, path: Path) -> None:
    model, other, plain = made(kind, 0, 0.6), made(kind, 1, 0.3), made(kind, 2)
    checkpoint.save(model, path, dormant=True)
    variables = variables_of(other)
    assert checkpoint.load_into(other, path) is other
    assert same(nnx.state(other), nnx.state(model))
    assert all(new is old for new, old in zip(variables_of(other), variables, strict=True))
    checkpoint.load_into(plain, path)  # becomes masked
    assert same(nnx.state(plain), nnx.state(model))
    assert get_masks(plain).keys() == get_masks(model).keys()


@pytest.mark.parametrize("kind", [*MODELS[:1], *(pytest.param(kind, marks=pytest.mark.slow) for kind in MODELS[1:])])
def test_whoever_reads_plain_arrays_has_the_outputs(kind: Any, path: Path) -> None:
    model, plain = made(kind, 0, 0.6), made(kind, 1)
    checkpoint.save(model, path)
    with checkpoint.open(path) as file:
        for keys, variable in nnx.to_flat_state(nnx.state(plain)):
            name = ".".join(map(str, keys))
            if isinstance(variable, nnx.Param | nnx.BatchStat):
                variable.set_value(jnp.asarray(file[name]))
    if hasattr(model, "scale"):
        plain.scale = model.scale
    np.testing.assert_array_equal(plain(X), model(X))


def test_without_dormant_values_they_start_at_zero(path: Path) -> None:
    model, other = made(Mlp, 0, 0.5), made(Mlp, 1, 0.5)
    checkpoint.save(model, path)
    small = path.stat().st_size
    checkpoint.load_into(other, path)
    assert not other.layers[0].dormant[...].any()
    assert same(other.layers[0].kernel[...], model.layers[0].kernel[...])
    checkpoint.save(model, path, dormant=True)
    assert path.stat().st_size > small
    checkpoint.load_into(other, path)
    full = model.layers[0].full_kernel
    set_masks(other, {"layers.0": np.ones((6, 8), bool)})
    assert same(other.layers[0].kernel[...], full)


def test_bits_survive(path: Path) -> None:
    kernel = np.array([[0.0, -0.0, np.nan, np.inf], [1e-41, -1e-41, 3.0, -0.0]], np.float32)
    mask = np.array([[1, 1, 1, 0], [1, 0, 1, 0]], bool)
    model = MaskedLinear(2, 4, use_bias=False, rngs=nnx.Rngs(0))
    model.kernel.set_value(jnp.asarray(kernel))
    model.set_mask(mask)
    checkpoint.save(model, path, dormant=True)
    other = MaskedLinear(2, 4, use_bias=False, rngs=nnx.Rngs(1))
    checkpoint.load_into(other, path)
    assert same(nnx.state(other), nnx.state(model))
    array = checkpoint.load(path)["kernel"]
    assert isinstance(array, MaskedArray)
    assert array.numpy(dormant=True).tobytes() == kernel.tobytes()
    assert (array.mask() == mask).all()


def test_what_is_shared_is_stored_once_and_stays_shared(path: Path) -> None:
    model, other = made(Stack, 0, 0.5), made(Stack, 1)
    checkpoint.save(model, path)
    arrays = checkpoint.load(path)
    assert arrays["first.kernel"].shape == arrays["second.kernel"].shape == (6, 6)
    with checkpoint.open(path) as file:
        assert {file.told(name).stored_as for name in ("first.kernel", "second.kernel")} == {"first.kernel"}
    checkpoint.load_into(other, path)
    assert other.first.kernel is other.second.kernel
    assert other.first.mask is other.second.mask
    apart = made(Stack, 2)
    apart.second.kernel = nnx.Param(apart.second.kernel[...] * 2)
    checkpoint.save(apart, path)
    before = nnx.state(other)
    with pytest.raises(CheckpointError, match=r"first\.kernel and second\.kernel are one array here"):
        checkpoint.load_into(other, path)
    assert same(nnx.state(other), before)


def test_random_numbers_go_on_where_the_file_has_them(path: Path) -> None:
    model, other = made(Mlp, 0), made(Mlp, 1)
    model.train()
    other.train()
    model(X)
    checkpoint.save(model, path)
    checkpoint.load_into(other, path)
    assert same(other(X), model(X))
    still = made(Mlp, 2)
    still.dropout = nnx.Dropout(0.0)  # no random numbers: those of the file are passed by
    checkpoint.load_into(still, path)
    checkpoint.save(still, path)
    count = other.dropout.rngs.count[...]
    checkpoint.load_into(other, path)  # and where the file has none they stay
    assert other.dropout.rngs.count[...] == count


def test_an_abstract_model_is_loaded(path: Path) -> None:
    model = made(Attention, 0, 0.5)
    checkpoint.save(model, path)
    abstract = nnx.eval_shape(lambda: mask_model(Attention(nnx.Rngs(1))))
    with pytest.raises(ValueError, match="is abstract, without values"):
        checkpoint.save(abstract, path.with_name("other"))
    checkpoint.load_into(abstract, path)
    abstract.eval()
    assert same(abstract(X), model(X))


def test_forms_and_masks_follow_the_file(path: Path) -> None:
    mask = np.arange(48).reshape(6, 8) % 3 == 0
    sparse = nnx.Sequential(SparseLinear(6, 8, mask=mask, rngs=nnx.Rngs(0)), nnx.relu)
    checkpoint.save(sparse, path)
    plain = nnx.Sequential(nnx.Linear(6, 8, rngs=nnx.Rngs(1)), nnx.relu)
    shared, option = nnx.Linear(6, 8, rngs=nnx.Rngs(1)), nnx.Linear(6, 8, precision="highest", rngs=nnx.Rngs(1))
    masked = nnx.Sequential(MaskedLinear(6, 8, rngs=nnx.Rngs(2)), nnx.relu)
    more = nnx.Sequential(SparseLinear(6, 8, mask=~mask, rngs=nnx.Rngs(2)), nnx.relu)
    values = more.layers[0].weight_values
    for model, kind in ((plain, SparseLinear), (masked, MaskedLinear), (more, SparseLinear)):
        assert checkpoint.load_into(model, path) is model
        assert type(model.layers[0]) is kind
        np.testing.assert_allclose(model(X), sparse(X), rtol=1e-6, atol=1e-6)
    assert more.layers[0].weight_values is values
    assert values.shape == sparse.layers[0].weight_values.shape
    assert isinstance(
        checkpoint.load_into(nnx.Sequential(option), path).layers[0], MaskedLinear
    )  # which keeps its option
    checkpoint.save(nnx.Sequential(shared), path)  # plain in the file: all is live
    for model in (masked, more):
        checkpoint.load_into(model, path)
        np.testing.assert_allclose(model(X), nnx.relu(shared(X)), rtol=1e-5)
        assert model.layers[0].sparsity == 0


def test_stacks_in_the_sparse_form(path: Path) -> None:
    masks = np.random.default_rng(0).permuted(np.repeat([True, False], 15)[None].repeat(3, 0), axis=1).reshape(3, 6, 5)

    def stack(masks: Any, seed: int) -> Any:
        layers = [SparseLinear(6, 5, mask=mask, rngs=nnx.Rngs(seed + n)) for n, mask in enumerate(masks)]
        graph, *_ = nnx.split(layers[0])
        return nnx.merge(graph, jax.tree.map(lambda *parts: jnp.stack(parts), *(nnx.state(layer) for layer in layers)))

    model, other = stack(masks, 0), stack(~masks, 7)
    checkpoint.save(model, path)
    array = checkpoint.load(path)["kernel"]
    assert isinstance(array, MaskedArray)
    assert (array.mask() == masks).all()
    checkpoint.load_into(other, path)
    assert same(nnx.state(other), nnx.state(model))
    dense = nnx.vmap(lambda key: nnx.Linear(6, 5, rngs=nnx.Rngs(key)))(jax.random.split(jax.random.key(0), 3))
    checkpoint.load_into(dense, path)  # stays a stack of the dense form
    assert (dense.mask[...] == masks).all()
    assert same(np.asarray(dense.kernel[...]), array.numpy())
    masks[0, 0] = True
    dense.set_mask(masks)
    checkpoint.save(dense, path)
    before = nnx.state(other)
    with pytest.raises(CheckpointError, match="connections in the file"):
        checkpoint.load_into(other, path)
    assert same(nnx.state(other), before)


def test_all_that_differs_is_named_and_nothing_changes(path: Path) -> None:
    model = made(Mlp, 0, 0.5)
    other = made(Mlp, 1, 0.2)
    other.norm = nnx.BatchNorm(7, rngs=nnx.Rngs(0))
    other.more = nnx.Param(jnp.ones(2))
    other.scale = jnp.ones(8, int)
    del other.layers[1].bias
    checkpoint.save(model, path)
    before = nnx.state(other)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_into(other, path, optimizer=optax.adam(0.1).init(nnx.state(other, nnx.Param)))
    told = str(caught.value)
    for part in (
        "norm.mean is (8,) in the file, and (7,) here",
        "not in the file: more",
        "scale is F32 in the file, and I32 here",
        "not in the model: layers.1.bias",
        "no state of an optimizer",
    ):
        assert part in told
    assert same(nnx.state(other), before)


def test_a_mask_that_the_model_cannot_have_is_refused(path: Path) -> None:
    model = nnx.Dict(table=nnx.Param(jnp.ones((2, 3))))
    checkpoint.save({"table": MaskedArray.of(np.ones((2, 3), np.float32), np.eye(2, 3))}, path)
    with pytest.raises(CheckpointError, match="table is masked in the file, and in a container"):
        checkpoint.load_into(model, path)
    assert (model["table"][...] == 1).all()


def test_a_stack_that_shares_one_mask(path: Path) -> None:
    layers = nnx.vmap(lambda key: MaskedLinear(3, 4, rngs=nnx.Rngs(key)))(jax.random.split(jax.random.key(0), 2))
    mask = np.arange(12).reshape(3, 4) % 2 == 0
    shared = nnx.clone(layers)
    shared.mask.set_value(jnp.asarray(mask))
    checkpoint.save(shared, path)
    array = checkpoint.load(path)["kernel"]
    assert isinstance(array, MaskedArray)
    assert (array.mask() == mask).all()
    shared.mask.set_value(~shared.mask[...])
    checkpoint.load_into(shared, path)
    assert (shared.mask[...] == mask).all()
    layers.set_mask(np.stack([mask, ~mask]))
    checkpoint.save(layers, path)
    with pytest.raises(CheckpointError, match="kernel share a mask here"):
        checkpoint.load_into(shared, path)


OPTIMIZERS = {
    "adam": lambda: optax.adam(1e-2),
    "adamw": lambda: optax.adamw(1e-2),
    "momentum": lambda: optax.sgd(1e-2, momentum=0.9),
}


@pytest.mark.parametrize(("kind", "own"), [("adam", True), ("adamw", False), ("momentum", True)])
def test_training_goes_on_bit_for_bit(kind: str, own: bool, path: Path) -> None:
    tx = freeze_masked(OPTIMIZERS[kind]())
    mask = np.arange(48).reshape(6, 8) % 3 == 0

    def begun(seed: int) -> tuple[Any, Any]:
        model = nnx.Sequential(nnx.Linear(6, 8, rngs=nnx.Rngs(seed)), nnx.tanh)
        mask_model(model, {"layers.0": mask if seed == 0 else ~mask})
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param) if own else tx.init(nnx.state(model, nnx.Param))

    @nnx.jit
    def gradient(model: Any) -> Any:
        return nnx.grad(lambda model: ((model(X) - 0.3) ** 2).sum())(model)

    def step(model: Any, optimizer: Any) -> Any:
        if own:
            optimizer.update(model, gradient(model), masks=param_masks(model))
            return optimizer
        params = nnx.state(model, nnx.Param)
        updates, optimizer = tx.update(nnx.state(gradient(model)), optimizer, params, masks=param_masks(model))
        nnx.update(model, optax.apply_updates(params, updates))
        return optimizer

    model, optimizer = begun(0)
    for _ in range(3):
        optimizer = step(model, optimizer)
    checkpoint.save(model, path, dormant=True, optimizer=optimizer)
    other, other_optimizer = begun(1)
    loaded = checkpoint.load_into(other, path, optimizer=other_optimizer)
    if not own:
        loaded, other_optimizer = loaded
    assert loaded is other
    for _ in range(3):
        optimizer, other_optimizer = step(model, optimizer), step(other, other_optimizer)
    assert same(nnx.state(other), nnx.state(model))
    assert same(*(nnx.state(one) if own else one for one in (other_optimizer, optimizer)))
    arrays = checkpoint.load(path)
    moments = [array for name, array in arrays.items() if name.endswith("kernel") and name.startswith("optimizer/")]
    live = int(mask.sum())
    assert moments
    assert all(isinstance(array, MaskedArray) and array.nnz == live for array in moments)  # live places only
    checkpoint.load_into(begun(2)[0], path)  # without it
    with pytest.raises(CheckpointError, match="not in the optimizer: optimizer/"):
        checkpoint.load_into(other, path, optimizer=optax.sgd(0.1).init(nnx.state(other, nnx.Param)))


class Net(linen.Module):
    @linen.compact
    def __call__(self, x: Any) -> Any:
        x = linen.BatchNorm(use_running_average=True)(MaskedDense(8)(x))
        x = linen.Conv(4, (3,), name="conv")(x[None])
        return linen.Dense(3, kernel_init=linen.with_partitioning(linen.initializers.ones, (None, None)))(x)


def test_linen_variables(path: Path) -> None:
    net = Net()
    start = net.init(jax.random.key(0), X)
    variables = mask_model(start, {"conv": random_mask((3, 8, 4), 0, 0.5), "Dense_0": random_mask((4, 3), 0, 0.5)})
    variables = set_masks(variables, {"MaskedDense_0": random_mask((6, 8), 0, 0.5)})
    checkpoint.save(variables, path, dormant=True)
    with checkpoint.open(path) as file:
        assert file.framework == "linen"
        assert {"params.MaskedDense_0.kernel", "batch_stats.BatchNorm_0.mean", "params.Dense_0.kernel"} < set(file)
    before = net.init(jax.random.key(1), X)
    for other in (before, mask_model(before)):
        kept = jax.tree.map(lambda leaf: leaf, other)
        loaded = checkpoint.load_into(other, path)
        assert same(other, kept)
        assert same(loaded, variables)
        assert same(net.apply(loaded, X), net.apply(variables, X))
    frozen = checkpoint.load_into(freeze(before), path)
    assert same(frozen, freeze(variables))
    checkpoint.save(start, path)  # plain but for the layer that has a mask
    loaded = checkpoint.load_into(variables, path)
    assert same(loaded["params"], start["params"])
    assert all(mask.all() for mask in jax.tree.leaves(loaded["masks"]))
    tx = freeze_masked(optax.adam(0.1))
    state = tx.init(variables["params"])
    _, state = tx.update(variables["params"], state, variables["params"], masks=param_masks(variables))
    checkpoint.save(variables, path, optimizer=state)
    loaded, resumed = checkpoint.load_into(before, path, optimizer=tx.init(before["params"]))
    assert same(resumed, state)
    del before["params"]["conv"]
    with pytest.raises(CheckpointError, match=r"not in the model: params\.conv\.bias"):
        checkpoint.load_into(before, path)
    with pytest.raises(TypeError, match="takes an nnx module or the variables of a linen one"):
        checkpoint.save(net, path)


@pytest.mark.parametrize("library", [np, jnp])
def test_trees_and_their_masks(library: Any, path: Path) -> None:
    params = {"layers": [{"w": library.asarray(X), "b": library.ones(6)}, (library.asarray(X.T), 3)], "rate": 0.5}
    masks = jax.tree.map(lambda leaf: None, params)
    masks["layers"][0]["w"] = X > 0
    other = jax.tree.map(lambda leaf: type(leaf)(0) if isinstance(leaf, int | float) else leaf * 0, params)
    checkpoint.save(params, path, masks=masks, dormant=True)
    loaded, loaded_masks = checkpoint.load_into(other, path)
    assert same(loaded, params)
    assert [type(leaf) for leaf in jax.tree.leaves(loaded)] == [type(leaf) for leaf in jax.tree.leaves(params)]
    assert same(loaded_masks, jax.tree.map(library.asarray, masks))
    with pytest.warns(UserWarning, match=r"under the masks of layers\.0\.w are not in the file"):
        checkpoint.save(params, path, masks=masks)
    loaded, loaded_masks = checkpoint.load_into(other, path)
    assert same(jax.tree.map(np.asarray, loaded), jax.tree.map(np.asarray, apply_masks(params, masks)))
    assert loaded_masks["rate"] is None
    with pytest.raises(CheckpointError, match=r"not in the file: more"):
        checkpoint.load_into({**other, "more": library.ones(2)}, path)


def test_masks_of_prune_tree_and_an_optax_state(path: Path) -> None:
    params = {"a": {"kernel": jnp.asarray(X)}, "b": jnp.ones(3)}
    masks = prune_tree(params, 0.5)
    tx = freeze_masked(optax.adam(0.1), masks)
    state = tx.init(params)
    _, state = tx.update(params, state, params)
    checkpoint.save(apply_masks(params, masks), path, masks=masks, optimizer=state)
    _, loaded_masks, loaded_state = checkpoint.load_into(params, path, optimizer=tx.init(params))
    assert same((loaded_masks, loaded_state), (masks, state))


def test_where_arrays_lie(path: Path) -> None:
    mesh = jax.make_mesh((1,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", None))
    model = MaskedLinear(6, 8, rngs=nnx.Rngs(0))
    checkpoint.save(model, path)
    for part in (model.kernel, model.mask, model.dormant):
        part.set_value(jax.device_put(part.get_value(), sharding))
    checkpoint.load_into(model, path)
    assert all(part.get_value().sharding == sharding for part in (model.kernel, model.mask, model.dormant))


def test_inside_a_transform_is_refused(path: Path) -> None:
    model = MaskedLinear(6, 8, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="is traced, without numbers: save and load outside of jit"):
        nnx.jit(lambda model: checkpoint.save(model, path))(model)
    with pytest.raises(TypeError, match=r"a\.b is traced"):
        jax.jit(lambda tree: checkpoint.save(tree, path))({"a": {"b": X}})
    assert not path.exists()
    checkpoint.save(model, path)
    with pytest.raises(TypeError, match="is traced, without numbers: save and load outside of jit"):
        nnx.jit(lambda model: checkpoint.load_into(model, path))(model)


def test_what_no_file_holds(path: Path) -> None:
    with pytest.raises(TypeError, match=r"a\.b is str: leave it out"):
        checkpoint.save({"a": {"b": "text"}}, path)
    with pytest.raises(ValueError, match="masks= is for trees"):
        checkpoint.save(MaskedLinear(6, 8, rngs=nnx.Rngs(0)), path, masks={"kernel": None})
    with pytest.raises(ValueError, match="several of one"):
        checkpoint.save({"a.b": X, "a": {"b": X}}, path)
    assert not path.exists()
