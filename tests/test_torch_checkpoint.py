"""Files of PyTorch models: whole models come back bit for bit, in every form, and what does not fit changes nothing."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the package, when it is imported
    import transformers

from maskedlinear import checkpoint
from maskedlinear.checkpoint import CheckpointError, MaskedArray
from maskedlinear.models import WeightAxes
from maskedlinear.torch import MaskedLinear, SparseLinear, expand, mask_model, prune_model
from maskedlinear_torch._checkpoint import arrays_of
from maskedlinear_torch._models import become_sparse

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning",
    "ignore:mask_model left out transformer.wte:UserWarning",  # which its head shares
)

TOKENS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))
TEXT = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 16, bidirectional=True), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])  # type: ignore[no-any-return]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.up, self.head = nn.ConvTranspose2d(8, 4, 2), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.head(self.up(x + self.block(x)).mean((2, 3)))  # type: ignore[no-any-return]


def bert() -> tuple[nn.Module, Any]:
    return transformers.BertModel(transformers.BertConfig(**TEXT)), TOKENS


def gpt2() -> tuple[nn.Module, Any]:
    options = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**options)), TOKENS


def mixtral() -> tuple[nn.Module, Any]:
    options = {"num_key_value_heads": 1, "num_local_experts": 4}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**TEXT, **options)), TOKENS


def convolutions() -> tuple[nn.Module, Any]:
    return Residual(), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def recurrent() -> tuple[nn.Module, Any]:
    return Recurrent(), torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(0))


def encoder() -> tuple[nn.Module, Any]:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2), torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))


MODELS = [bert, gpt2, mixtral, convolutions, recurrent, encoder]


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = model.eval()(x)
    return y if isinstance(y, Tensor) else y[0]  # type: ignore[no-any-return]


def pruned(build: Callable[[], tuple[nn.Module, Any]]) -> nn.Module:
    torch.manual_seed(1)
    model, _ = build()
    with torch.no_grad():
        for value in model.state_dict(
            keep_vars=True
        ).values():  # counters and statistics too are those of no fresh model
            value.add_(1) if not value.is_floating_point() else value.mul_(1.5)
    prune_model(mask_model(model), 0.9, scope="layer", on_empty="keep")
    return model


def held(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Return all that a model's state is, in bits."""
    state = model.state_dict()
    return {
        name: (str(value.dtype), tuple(value.shape), value.contiguous().view(torch.uint8).numpy().tobytes())
        if value.dim()
        else (str(value.dtype), value.item())
        for name, value in state.items()
    }


def all_sparse(model: nn.Module) -> nn.Module:
    return become_sparse(model, {id(module) for module in model.modules()})


@pytest.mark.parametrize("build", MODELS)
def test_a_model_comes_back_bit_for_bit_in_every_form(build: Any, tmp_path: Path) -> None:
    model, x, path = pruned(build), build()[1], tmp_path / "model.safetensors"
    expected, y = held(model), outputs(model, x)
    checkpoint.save(model, path, dormant=True)
    plain, masked = build()[0], mask_model(build()[0])
    parameters = {name: id(value) for name, value in plain.named_parameters()}
    for fresh in (plain, masked, model):
        assert checkpoint.load_into(fresh, path) is fresh
        assert held(fresh) == expected
        assert torch.equal(outputs(fresh, x), y)
    assert {name: id(value) for name, value in plain.named_parameters()} == parameters, "an optimizer holds them"
    compressed = all_sparse(mask_model(build()[0]))
    checkpoint.load_into(compressed, path)
    torch.testing.assert_close(outputs(compressed, x), y)
    kept = {name: value for name, value in expected.items() if not name.endswith("dormant")}
    assert {name: value for name, value in held(expand_all(compressed)).items() if name in kept} == kept


def expand_all(model: nn.Module) -> nn.Module:
    return expand(model) if any(isinstance(module, SparseLinear) for module in model.modules()) else model


@pytest.mark.parametrize("build", [bert, recurrent])
def test_the_sparse_form_comes_back_as_compress_puts_it(build: Any, tmp_path: Path) -> None:
    model, x = all_sparse(pruned(build)), build()[1]
    y, path = outputs(model, x), tmp_path / "model.safetensors"
    checkpoint.save(model, path)
    plain = checkpoint.load_into(build()[0], path)
    assert any(isinstance(module, SparseLinear) for module in plain.modules())
    other = all_sparse(prune(mask_model(build()[0]), 0.5))  # with another number of connections
    weights = {name: id(value) for name, value in other.named_parameters()}
    for fresh in (plain, checkpoint.load_into(other, path), checkpoint.load_into(model, path)):
        assert held(fresh) == held(model)
        assert torch.equal(outputs(fresh, x), y)
    assert {name: id(value) for name, value in other.named_parameters()} == weights
    masked = checkpoint.load_into(mask_model(build()[0]), path)
    assert not any(isinstance(module, SparseLinear) for module in masked.modules()), "which is masked already"
    torch.testing.assert_close(outputs(masked, x), y)


def prune(model: nn.Module, sparsity: float) -> nn.Module:
    prune_model(model, sparsity, scope="layer", on_empty="keep")
    return model


def test_without_dormant_values_none_stay(tmp_path: Path) -> None:
    model, path = pruned(convolutions), tmp_path / "model.safetensors"
    checkpoint.save(model, path)
    other = prune(mask_model(Residual()), 0.5)
    assert other.head.dormant is not None
    checkpoint.load_into(other, path)
    assert other.head.dormant is None
    assert other.stem.masked_weight.dormant is None  # type: ignore[union-attr]
    plain, full = Residual(), tmp_path / "plain.safetensors"
    checkpoint.save(plain, full)
    checkpoint.load_into(other, full)
    assert other.stem.masked_weight.mask.all(), "a plain weight has the full mask"  # type: ignore[operator, union-attr]
    assert torch.equal(other.stem.weight, plain.stem.weight)


@pytest.mark.parametrize("prepare", [lambda model: model, mask_model, lambda model: all_sparse(mask_model(model))])
def test_models_on_the_meta_device_get_their_tensors(prepare: Any, tmp_path: Path) -> None:
    for build in (convolutions, recurrent):
        model, path = pruned(build), tmp_path / "model.safetensors"
        checkpoint.save(model, path, dormant=True)
        with torch.device("meta"):
            fresh = build()[0]
        fresh = checkpoint.load_into(prepare(fresh), path)
        torch.testing.assert_close(outputs(fresh, build()[1]), outputs(model, build()[1]))
        if all_sparse(fresh) is fresh and not any(isinstance(module, SparseLinear) for module in fresh.modules()):
            assert held(fresh) == held(model)


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    model, path = pruned(gpt2), tmp_path / "model.safetensors"
    arrays = arrays_of(model)
    assert arrays["lm_head.weight"] is arrays["transformer.wte.weight"]
    checkpoint.save(model, path)
    with torch.device("meta"):
        fresh: Any = gpt2()[0]
    checkpoint.load_into(fresh, path)
    assert fresh.lm_head.weight is fresh.transformer.wte.weight
    assert not fresh.lm_head.weight.is_meta
    first: Any = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    checkpoint.save(first, path)
    first[1].weight = first[0].weight
    with pytest.raises(
        CheckpointError, match=r"one array in the model, different ones in the file: 0.weight, 1.weight"
    ):
        checkpoint.load_into(first, path)
    checkpoint.save(mask_model(first), path)
    apart: Any = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    checkpoint.load_into(apart, path)
    assert apart[1].weight is not apart[0].weight
    assert torch.equal(apart[1].weight, first[1].weight)


def test_roles_and_axes_say_what_each_array_is() -> None:
    arrays = {name: (array.role, array.axes) for name, array in arrays_of(mask_model(Residual())).items()}
    arrays |= {f"e.{name}": (array.role, array.axes) for name, array in arrays_of(encoder()[0]).items()}
    arrays |= {
        f"r.{name}": (array.role, array.axes) for name, array in arrays_of(all_sparse(pruned(recurrent))).items()
    }
    arrays |= {f"g.{name}": (array.role, array.axes) for name, array in arrays_of(gpt2()[0]).items()}
    arrays |= {f"m.{name}": (array.role, array.axes) for name, array in arrays_of(mixtral()[0]).items()}
    matrix = WeightAxes(out_axis=0, in_axis=1)
    assert arrays["stem.weight"] == ("conv.weight", WeightAxes(out_axis=0, in_axis=(1, 2, 3)))
    assert arrays["up.weight"] == ("conv_transpose.weight", WeightAxes(out_axis=1, in_axis=(0, 2, 3)))
    assert [arrays[f"norm.{name}"][0] for name in ("weight", "running_mean", "running_var", "num_batches_tracked")] == [
        f"batch_norm.{name}" for name in ("weight", "mean", "var", "count")
    ]
    assert arrays["head.bias"] == ("linear.bias", None)
    assert arrays["e.layers.0.self_attn.in_proj_weight"] == ("attention.in.weight", matrix)
    assert arrays["e.layers.0.self_attn.out_proj.weight"] == ("attention.out.weight", matrix)
    assert arrays["e.layers.0.norm1.weight"][0] == "layer_norm.weight"
    assert arrays["r.lstm.weight_hh_l0_reverse"] == ("lstm.weight_hh", matrix)
    assert arrays["r.head.weight"] == ("linear.weight", matrix)
    assert arrays["g.transformer.wte.weight"] == ("embedding.weight", WeightAxes(out_axis=1, in_axis=0))
    assert arrays["g.transformer.h.0.attn.c_attn.weight"] == ("linear.weight", WeightAxes(out_axis=1, in_axis=0))
    assert arrays["m.model.norm.weight"][0] == "rms_norm.weight"
    experts = next(axes for name, (_, axes) in arrays.items() if name.endswith("experts.down_proj"))
    assert experts == WeightAxes(batch_axis=0, out_axis=1, in_axis=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_kept_in_bits_and_converted_as_torch_does(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    model, path = prune(mask_model(Residual()), 0.5).to(dtype), tmp_path / "model.safetensors"
    with torch.no_grad():
        special = torch.tensor([float("nan"), -0.0, float("inf"), 1e-30, -1.0], dtype=dtype)
        model.head.bias.copy_(special)
    checkpoint.save(model, path, dormant=True)
    same, other = Residual().to(dtype), Residual()
    checkpoint.load_into(same, path)
    assert held(same) == held(model)
    checkpoint.load_into(other, path)
    assert held(other) == held(model.float())


def test_live_zeros_and_minus_zeros_stay_live(tmp_path: Path) -> None:
    layer, path = MaskedLinear(4, 4, mask=torch.eye(4)), tmp_path / "layer.safetensors"
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([0.0, -0.0, float("nan"), 1.0])))
    checkpoint.save(layer, path, dormant=True)
    fresh = nn.Linear(4, 4)
    assert checkpoint.load_into(fresh, path) is fresh
    assert held(fresh) == held(layer)
    assert isinstance(checkpoint.load(path)["weight"], MaskedArray)


def test_nothing_is_made_for_what_is_not_dormant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mask_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    assert "0.dormant" in model.state_dict()
    monkeypatch.setattr(torch, "zeros", None)  # by which a state has what is not kept, of all layers at once
    checkpoint.save(model, tmp_path / "model", dormant=True)
    assert "0.weight" in checkpoint.load(tmp_path / "model")
