"""Models that go from PyTorch to Flax and back: equal outputs, and weights, masks and dormant values bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import maskedlinear.flax
import maskedlinear.torch
from maskedlinear import checkpoint
from maskedlinear.checkpoint import CheckpointError, MaskedArray, PlainArray
from maskedlinear.checkpoint._file import save_arrays
from maskedlinear.checkpoint._layouts import Expected
from maskedlinear.checkpoint._names import translated
from maskedlinear.models import WeightAxes

SLOW = pytest.mark.slow
RNG = np.random.default_rng(0)
ROWS = RNG.standard_normal((3, 6)).astype(np.float32)
IMAGES = RNG.standard_normal((2, 3, 9, 9)).astype(np.float32)
TOKENS = RNG.integers(0, 11, (3, 5))


class TorchMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.LayerNorm(8))
        self.head = nn.Linear(8, 3, bias=False)

    def forward(self, x: Any) -> Any:
        return self.head(self.body(x))


class FlaxMlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        norm = nnx.BatchNorm(8, epsilon=1e-5, use_running_average=True, rngs=rngs)
        last = nnx.LayerNorm(8, epsilon=1e-5, rngs=rngs)
        self.body = nnx.Sequential(nnx.Linear(6, 8, rngs=rngs), norm, nnx.relu, nnx.Linear(8, 8, rngs=rngs), last)
        self.head = nnx.Linear(8, 3, use_bias=False, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.head(self.body(x))


class TorchConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, (3, 2), padding=1, stride=2), nn.GroupNorm(2, 8)
        self.grouped = nn.Conv2d(8, 6, 3, groups=2)
        self.up = nn.ConvTranspose2d(6, 4, (3, 2), stride=2)

    def forward(self, x: Any) -> Any:
        return self.up(torch.relu(self.grouped(self.norm(self.first(x)))))


class FlaxConvNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, *, transpose_kernel: bool = False) -> None:
        self.first = nnx.Conv(3, 8, (3, 2), padding=1, strides=2, rngs=rngs)
        self.norm = nnx.GroupNorm(8, num_groups=2, epsilon=1e-5, rngs=rngs)
        self.grouped = nnx.Conv(8, 6, (3, 3), feature_group_count=2, padding=0, rngs=rngs)
        options: Any = {"strides": 2, "padding": "VALID", "transpose_kernel": transpose_kernel}
        self.up = nnx.ConvTranspose(6, 4, (3, 2), **options, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = nnx.relu(self.grouped(self.norm(self.first(x.transpose(0, 2, 3, 1)))))
        return self.up(x).transpose(0, 3, 1, 2)


class TorchBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layers = nn.ModuleList([nn.Linear(8, 12), nn.Linear(12, 8)])
        self.head = nn.Linear(8, 11)

    def forward(self, tokens: Any) -> Any:
        x = self.embed(tokens)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head(x + self.layers[1](torch.tanh(self.layers[0](x))))


class FlaxBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed, self.norm = nnx.Embed(11, 8, rngs=rngs), nnx.LayerNorm(8, epsilon=1e-5, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 12, rngs=rngs), nnx.Linear(12, 8, rngs=rngs)])
        self.head = nnx.Linear(8, 11, rngs=rngs)

    def __call__(self, tokens: Any) -> Any:
        x = self.embed(tokens)
        x = x + self.attention(self.norm(x))
        return self.head(x + self.layers[1](jnp.tanh(self.layers[0](x))))


class LinenBlock(linen.Module):
    """The block with linen's own names."""

    @linen.compact
    def __call__(self, tokens: Any) -> Any:
        x = linen.Embed(11, 8)(tokens)
        x = x + linen.MultiHeadDotProductAttention(2, name="attention")(linen.LayerNorm(epsilon=1e-5)(x))
        x = x + linen.Dense(8)(jnp.tanh(linen.Dense(12)(x)))
        return linen.Dense(11, name="head")(x)


CASES = {
    "MLP": (TorchMlp, FlaxMlp, ROWS, {}),
    "convolutions": (TorchConvNet, FlaxConvNet, IMAGES, {}),
    "convolutions, turned": (TorchConvNet, FlaxConvNet, IMAGES, {"transpose_kernel": True}),
    "transformer": (TorchBlock, FlaxBlock, TOKENS, {}),
}


def torch_model(kind: type[nn.Module], seed: int, x: Any) -> Any:
    """Return a pruned model with dormant values, whose statistics have moved."""
    torch.manual_seed(seed)
    model = maskedlinear.torch.mask_model(kind())
    maskedlinear.torch.prune_model(model, 0.5, score="random", seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape))
    model.train()
    model(torch.from_numpy(x))
    return model.eval()


def assert_same_state(model: nn.Module, other: nn.Module) -> None:
    state, more = model.state_dict(), other.state_dict()
    assert state.keys() == more.keys()
    for name, value in state.items():
        if not name.endswith("num_batches_tracked"):
            assert value.numpy().tobytes() == more[name].numpy().tobytes(), name


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("case", [*list(CASES)[:2], pytest.param("convolutions, turned", marks=SLOW), "transformer"])
def test_from_torch_to_nnx_and_back(case: str, path: Path) -> None:
    torch_kind, flax_kind, x, options = CASES[case]
    model: Any = torch_model(torch_kind, 0, x)
    checkpoint.save(model, path, dormant=True)
    other = checkpoint.load_into(flax_kind(nnx.Rngs(0), **options), path)
    expected = model(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(other(jnp.asarray(x)), expected, rtol=0, atol=3e-6 * np.abs(expected).max())
    nnz = [row.connections for row in maskedlinear.flax.summary(other).rows]
    assert sum(nnz) == sum(row.connections for row in maskedlinear.torch.summary(model).rows)
    checkpoint.save(other, path, dormant=True)
    for back in (torch_kind(), torch_model(torch_kind, 1, x)):
        checkpoint.load_into(back, path)
        assert_same_state(model, back)
    if case == "convolutions":  # a window that runs the other way, within Flax
        turned = checkpoint.load_into(flax_kind(nnx.Rngs(1), transpose_kernel=True), path)
        kernel = np.asarray(other.up.kernel[...])[::-1, ::-1]
        np.testing.assert_array_equal(turned.up.kernel[...], kernel.swapaxes(2, 3))


def test_from_torch_to_linen_by_names_and_back(path: Path) -> None:
    model = torch_model(TorchBlock, 0, TOKENS)
    checkpoint.save(model, path, dormant=True)
    net = LinenBlock()
    start = net.init(jax.random.key(0), TOKENS)
    names = {"Embed_0.": "embed.", "LayerNorm_0.": "norm.", "Dense_0": "layers.1", "Dense_1": "layers.0"}
    variables = checkpoint.load_into(start, path, names=names)
    expected = model(torch.from_numpy(TOKENS)).detach().numpy()
    np.testing.assert_allclose(net.apply(variables, TOKENS), expected, rtol=0, atol=3e-6 * np.abs(expected).max())
    again = checkpoint.load_into(start, path, names=lambda name: _of_torch(name, names))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), again, variables))
    checkpoint.save(variables, path, dormant=True)
    back = TorchBlock()
    turned = {there.strip("."): f"params.{here}" for here, there in names.items()}
    checkpoint.load_into(back, path, names=turned)
    assert_same_state(model, back)
    flax = checkpoint.load_into(FlaxBlock(nnx.Rngs(0)), path, names=turned)  # within Flax
    np.testing.assert_allclose(flax(TOKENS), net.apply(variables, TOKENS), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"begin with; got 'Dense_7\.'"):
        checkpoint.load_into(start, path, names={"Dense_7.": "a"})


def _of_torch(name: str, names: dict[str, str]) -> str:
    for here, there in names.items():
        name = name.replace(here, there)
    return name


def test_the_sparse_form_goes_over_too(path: Path) -> None:
    model = maskedlinear.torch.compress(torch_model(TorchMlp, 0, ROWS), "sparse")
    checkpoint.save(model, path)
    other = checkpoint.load_into(FlaxMlp(nnx.Rngs(0)), path)
    assert isinstance(other.head, maskedlinear.flax.SparseLinear)
    expected = model(torch.from_numpy(ROWS)).detach().numpy()
    np.testing.assert_allclose(other(ROWS), expected, rtol=0, atol=3e-6 * np.abs(expected).max())
    checkpoint.save(other, path)
    back = checkpoint.load_into(TorchMlp(), path)
    assert isinstance(back.head, maskedlinear.torch.SparseLinear)
    assert_same_state(model, back)


def test_one_of_three_projections_is_masked(path: Path) -> None:
    model = FlaxBlock(nnx.Rngs(0))
    mask = RNG.random((8, 2, 4)) < 0.5
    maskedlinear.flax.mask_model(model, {"attention.key": mask})
    checkpoint.save(model, path, dormant=True)
    other: Any = checkpoint.load_into(TorchBlock(), path)
    expected = np.ones((24, 8), bool)
    expected[8:16] = mask.reshape(8, 8).T
    assert (maskedlinear.torch.get_masks(other)["attention.in_proj_weight"].numpy() == expected).all()
    checkpoint.save(other, path, dormant=True)
    back = checkpoint.load_into(FlaxBlock(nnx.Rngs(1)), path)
    attention = back.attention
    assert (attention.key.kernel_mask[...] == mask).all()
    assert attention.query.kernel_mask[...].all()
    assert (attention.key.kernel_dormant[...] == model.attention.key.kernel_dormant[...]).all()
    assert attention.key.kernel_dormant[...].any()


def test_an_output_layer_that_is_an_embedding(path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(8, 8), nn.Linear(8, 8, bias=False)
            self.head.weight = self.embed.weight

    class Untied(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.embed, self.head = nnx.Embed(8, 8, rngs=rngs), nnx.Linear(8, 8, use_bias=False, rngs=rngs)

    tied = Tied()
    checkpoint.save(tied, path)
    model = checkpoint.load_into(Untied(nnx.Rngs(0)), path)
    table = tied.embed.weight.detach().numpy()
    np.testing.assert_array_equal(model.embed.embedding[...], table)
    np.testing.assert_array_equal(model.head.kernel[...], table.T)
    checkpoint.save(model, path)
    checkpoint.load_into(Tied(), path)
    model.head.kernel.set_value(model.head.kernel[...] + 1)
    checkpoint.save(model, path)
    with pytest.raises(CheckpointError, match=r"embed\.weight and head\.weight are one array here"):
        checkpoint.load_into(Tied(), path)


def test_all_that_differs_is_named_and_nothing_changes(path: Path) -> None:
    checkpoint.save(torch_model(TorchMlp, 0, ROWS), path)
    model = FlaxMlp(nnx.Rngs(0))
    model.head = nnx.Linear(8, 4, use_bias=True, rngs=nnx.Rngs(0))
    model.body.layers[3] = nnx.Conv(8, 8, (), rngs=nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.state(model))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_into(model, path)
    told = str(caught.value)
    for part in (
        "head.kernel is head.weight (3, 8) in the file, and (8, 4) here",
        "not in the file: head.bias",
        "body.layers.3.kernel is of linear in the file, and of conv here",
    ):
        assert part in told
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), nnx.state(model), before))
    checkpoint.save(FlaxMlp(nnx.Rngs(0)), path)
    back = TorchMlp()
    back.head = nn.Linear(8, 4)
    state = {name: value.clone() for name, value in back.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"not in the file: head\.bias"):
        checkpoint.load_into(back, path)
    assert all(torch.equal(value, state[name]) for name, value in back.state_dict().items())


def differences(arrays: Any, expected: dict[str, Expected], path: Path, framework: str, target: str) -> list[str]:
    save_arrays(arrays, path, framework=framework)
    with checkpoint.open(path) as file:
        return translated(file, expected, target)[1]


def test_what_may_be_two_things_is_refused(path: Path) -> None:
    matrix = PlainArray.of(np.ones((2, 2), np.float32), WeightAxes(), "linear.weight")
    unknown = PlainArray.of(np.ones((2, 2), np.float32))
    wanted = Expected((2, 2), "F32", WeightAxes(1, 0), "linear.weight")
    two = {"net.0.weight": matrix, "net.layers.0.weight": PlainArray.of(np.zeros((2, 2), np.float32), WeightAxes())}
    assert (
        "net.layers.0.kernel may be any of net.0.weight, net.layers.0.weight"
        in (differences(two, {"net.layers.0.kernel": wanted}, path, "torch", "nnx")[0])
    )
    both = {"net.0.kernel": wanted, "net.layers.0.kernel": Expected((2, 2), "F32", WeightAxes(1, 0))}
    [told] = differences({"net.0.weight": matrix}, both, path, "torch", "nnx")
    assert told.startswith("net.0.weight is both net.0.kernel and net.layers.0.kernel here")
    for framework in ("torch", "numpy", ""):  # a square matrix whose orientation nobody says
        [told] = differences({"a.weight": unknown}, {"a.kernel": wanted}, path, framework, "nnx")
        assert "does not say what its axes mean" in told
    assert not differences({"a.kernel": unknown}, {"a.kernel": wanted}, path, "numpy", "nnx")  # by its very name
    turned = PlainArray.of(np.ones((2, 2, 2), np.float32), WeightAxes(1, (0, 2)), "conv_transpose.weight")
    [told] = differences({"a.weight": turned}, {"a.kernel": Expected((2, 2, 2), "F32")}, path, "torch", "linen")
    assert "does not say which way its window runs" in told
    wide = PlainArray.of(np.ones((2, 3), np.float32))  # a parameter of a user's own
    assert not differences({"a.place": wide}, {"a.place": Expected((2, 3), "F32", WeightAxes())}, path, "torch", "nnx")
    whole = PlainArray.of(np.ones((2, 2), np.int32), WeightAxes(), "linear.weight")
    assert differences({"a.weight": whole}, {"a.kernel": wanted}, path, "torch", "nnx") == [
        "a.kernel is I32 in the file, and F32 here"
    ]
    taller = PlainArray.of(np.ones((4, 1), np.float32), WeightAxes(), "linear.weight")
    assert (
        "(4, 1) in the file, and (2, 2) here"
        in (differences({"a.weight": taller}, {"a.kernel": wanted}, path, "torch", "nnx")[0])
    )


def test_a_kernel_of_linen_takes_its_layout_from_the_other_side(path: Path) -> None:
    weight = RNG.standard_normal((4, 3, 5)).astype(np.float32)
    mask = RNG.random(weight.shape) < 0.5
    array = MaskedArray.of(weight, mask, dormant=True, axes=WeightAxes(0, (1, 2)), role="conv.weight")
    save_arrays({"stem.weight": array}, path, framework="torch")
    with checkpoint.open(path) as file:
        found, told = translated(file, {"params.stem.kernel": Expected((5, 3, 4), "F32")}, "linen")
    assert told == []
    moved: Any = found["params.stem.kernel"]
    np.testing.assert_array_equal(moved.numpy(dormant=True), weight.transpose(2, 1, 0))
    np.testing.assert_array_equal(moved.mask(), mask.transpose(2, 1, 0))
    vector = PlainArray.of(np.ones(3, np.float32))
    norm = {"norm.running_mean": vector, "norm.weight": vector, "norm.num_batches_tracked": PlainArray.of(np.int64(3))}
    of_linen = {name: Expected((3,), "F32") for name in ("batch_stats.norm.mean", "params.norm.scale")}
    assert not differences(norm, of_linen, path, "torch", "linen")


def test_a_tree_of_a_part_of_a_model_is_that_part(path: Path) -> None:
    stack = PlainArray.of(np.ones((2, 3, 3), np.float32))
    in_model = Expected((2, 3, 3), "F32", WeightAxes(2, 1, 0), "linear.weight")
    assert not differences({"stack.kernel": stack}, {"stack.kernel": in_model}, path, "tree", "nnx")
    known = PlainArray.of(np.ones((2, 3, 3), np.float32), WeightAxes(2, 1, 0), "linear.weight")
    assert not differences({"stack.kernel": known}, {"stack.kernel": Expected((2, 3, 3), "F32")}, path, "nnx", "tree")
    assert differences({"stack.kernel": known}, {"stack.kernel": Expected((2, 3, 3), "F32")}, path, "torch", "tree")


def test_floats_take_the_dtype_of_the_model(path: Path) -> None:
    layer = nn.Linear(3, 2).double()
    checkpoint.save(layer, path)
    half = nnx.Linear(3, 2, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    checkpoint.load_into(half, path)
    assert half.kernel[...].dtype == jnp.bfloat16
    np.testing.assert_array_equal(half.kernel[...], jnp.asarray(layer.weight.detach().numpy().T, jnp.bfloat16))
    back = checkpoint.load_into(nn.Linear(3, 2), path)
    assert torch.equal(back.weight, layer.weight.float())
    with pytest.raises(ValueError, match="masks= is for trees"):
        checkpoint.save(layer, path, masks={"weight": None})


def test_empty_weights_and_masks(path: Path) -> None:
    arrays = {
        "a.weight": MaskedArray.of(np.ones((0, 3), np.float32), np.ones((0, 3)), dormant=True, axes=WeightAxes()),
        "b.weight": MaskedArray.of(np.ones((2, 3), np.float32), np.zeros((2, 3)), dormant=True, axes=WeightAxes()),
    }
    expected = {
        "a.kernel": Expected((3, 0), "F32", WeightAxes(1, 0)),
        "b.kernel": Expected((3, 2), "F32", WeightAxes(1, 0)),
    }
    save_arrays(arrays, path, framework="torch")
    with checkpoint.open(path) as file:
        found, told = translated(file, expected, "nnx")
    assert told == []
    assert {name: array.shape for name, array in found.items()} == {"a.kernel": (3, 0), "b.kernel": (3, 2)}
    assert found["b.kernel"].numpy(dormant=True).all()  # type: ignore[call-arg]
