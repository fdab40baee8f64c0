"""Real models, tiny and with random weights: what is masked in them acts masked, whoever reads their weights."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the package, when it is imported
    import transformers
    from transformers.pytorch_utils import prune_linear_layer

from maskedlinear.torch import (
    MaskedLinear,
    check_masks,
    compress,
    freeze_masked,
    get_masks,
    mask_model,
    prune_model,
    set_masks,
    summary,
    unmask_model,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning",
)

Called = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]  # a model, and what it is called with
TOKENS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SOUND = torch.randn(2, 800, generator=torch.Generator().manual_seed(0))
SEQUENCE = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
PADDING = torch.arange(6)[None] >= torch.tensor([[6], [4]])
TEXT = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
IMAGE = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def hugging_face(name: str, config: str, **options: Any) -> nn.Module:
    return getattr(transformers, name)(getattr(transformers, config)(**options))  # type: ignore[no-any-return]


def bert() -> Called:
    return hugging_face("BertModel", "BertConfig", **TEXT), (TOKENS,), {"attention_mask": (TOKENS > 8).long()}


def llama() -> Called:
    model = hugging_face("LlamaForCausalLM", "LlamaConfig", **TEXT, num_key_value_heads=1, tie_word_embeddings=False)
    return model, (), {"input_ids": TOKENS, "labels": TOKENS}


def gpt2() -> Called:
    """Its layers are ``Conv1D``, (in, out); its head shares its weight with the embedding."""
    options = {"n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
    return hugging_face("GPT2LMHeadModel", "GPT2Config", vocab_size=64, **options), (TOKENS,), {}


def mixtral() -> Called:
    """Its experts are stacks of matrices."""
    options = {"num_key_value_heads": 1, "num_local_experts": 4}
    return hugging_face("MixtralForCausalLM", "MixtralConfig", **TEXT, **options), (TOKENS,), {}


def qwen3_moe() -> Called:
    options = {"num_key_value_heads": 1, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    return hugging_face("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **TEXT, **options, head_dim=8), (TOKENS,), {}


def gpt_oss() -> Called:
    """Its experts are stacks of matrices (in, out)."""
    options = {"num_key_value_heads": 1, "num_local_experts": 4, "head_dim": 8}
    return hugging_face("GptOssForCausalLM", "GptOssConfig", **TEXT, **options), (TOKENS,), {}


def whisper() -> Called:
    layers = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 32))}
    heads = {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    sizes = {"vocab_size": 64, "d_model": 16, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20}
    model = hugging_face("WhisperModel", "WhisperConfig", **layers, **heads, **tokens, **sizes)
    return model, (torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(0)),), {"decoder_input_ids": TOKENS}


def convnext() -> Called:
    return (
        hugging_face("ConvNextModel", "ConvNextConfig", hidden_sizes=[8, 8], depths=[1, 1], num_stages=2),
        (PIXELS,),
        {},
    )


def resnet() -> Called:
    options = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    return hugging_face("ResNetModel", "ResNetConfig", **options), (PIXELS,), {}


def t5() -> Called:
    model = hugging_face("T5Model", "T5Config", vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return model, (), {"input_ids": TOKENS, "decoder_input_ids": TOKENS}


def deberta() -> Called:
    options = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8}
    return hugging_face("DebertaModel", "DebertaConfig", **TEXT, **options), (TOKENS,), {}


def bloom() -> Called:
    """Its attention reads ``dense.weight``, a slice at a time."""
    options = {"vocab_size": 64, "hidden_size": 16, "n_layer": 2, "n_head": 2}
    return hugging_face("BloomModel", "BloomConfig", **options, slow_but_exact=True, pretraining_tp=2), (TOKENS,), {}


def mobilebert() -> Called:
    """Its head multiplies with ``dense.weight``."""
    options = {"embedding_size": 8, "intra_bottleneck_size": 8, "num_feedforward_networks": 1}
    model = hugging_face("MobileBertForMaskedLM", "MobileBertConfig", **TEXT, **options)
    return model, (), {"input_ids": TOKENS, "labels": TOKENS}


def vit() -> Called:
    return hugging_face("ViTModel", "ViTConfig", **IMAGE, intermediate_size=32), (PIXELS,), {}


def beit() -> Called:
    options = {"intermediate_size": 32, "use_relative_position_bias": True, "use_mask_token": True}
    return hugging_face("BeitModel", "BeitConfig", **IMAGE, **options), (PIXELS,), {}


def swin() -> Called:
    options = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2]}
    return hugging_face("SwinModel", "SwinConfig", **options, window_size=4), (PIXELS,), {}


def wavlm() -> Called:
    """Its attention hands the weights of its four linear layers to torch's own function."""
    options = {"conv_dim": (8, 8), "conv_stride": (10, 8), "conv_kernel": (10, 8), "num_feat_extract_layers": 2}
    more = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False}
    return hugging_face("WavLMModel", "WavLMConfig", **{**TEXT, **options, **more}), (SOUND,), {}


def mamba() -> Called:
    """It multiplies with ``dt_proj.weight``."""
    options = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    return hugging_face("MambaModel", "MambaConfig", **options), (TOKENS,), {"use_cache": False}


def xlnet() -> Called:
    """Its kernels are (in, heads, out of each head), but for the last, which is the other way round."""
    options = {"vocab_size": 64, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32}
    return hugging_face("XLNetModel", "XLNetConfig", **options), (TOKENS,), {}


def jetmoe() -> Called:
    """Experts in one weight, called ``weight``, and experts of attention."""
    options = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_key_value_heads": 2, "kv_channels": 8}
    more = {"intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
    return hugging_face("JetMoeModel", "JetMoeConfig", **options, **more), (TOKENS,), {"use_cache": False}


def encoder() -> Called:
    """In inference it reads ``linear1.weight`` and ``linear2.weight``, in one kernel with the rest of the layer."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    return model, (SEQUENCE,), {"src_key_padding_mask": PADDING}


class WindowAttention(nn.Module):
    """Attention as in torchvision's Swin, which hands the weights of its linear layers to a function."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, -1)
        return F.linear(F.scaled_dot_product_attention(q, k, v), self.proj.weight, self.proj.bias)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(16, 12, 2, batch_first=True, bidirectional=True), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])  # type: ignore[no-any-return]


def lstm() -> Called:
    return Recurrent(), (SEQUENCE,), {}


def convolutions() -> Called:
    parts = (
        nn.Conv2d(3, 8, 5, 2),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 3, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return nn.Sequential(*parts, nn.Linear(6, 4)), (PIXELS,), {}


def windows() -> Called:
    return WindowAttention(), (SEQUENCE,), {}


MODELS: dict[str, Callable[[], Called]] = {
    made.__name__: made
    for made in (
        *(bert, llama, t5, deberta, bloom, mobilebert, vit, beit, swin, wavlm, mamba),
        *(gpt2, mixtral, qwen3_moe, gpt_oss, whisper, convnext, resnet, xlnet, jetmoe),
        *(encoder, windows, lstm, convolutions),
    )
}


@functools.cache
def original(name: str) -> Called:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MODELS[name]()


def called(name: str, masked: bool = True) -> Called:
    model, inputs, named = original(name)
    model = copy.deepcopy(model)
    if masked:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is left out: a head that shares its weight with an embedding, say
            mask_model(model)
        prune_model(model, 0.9, scope="layer", on_empty="keep")
    return model, inputs, named


def weights(model: nn.Module) -> list[Tensor]:
    """The matrices and kernels by hand: two dimensions or more, of no embedding, of none of some names."""
    embeddings = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    names = ("bias", "pos", "token", "A_log", "original", "emb")
    return [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1
        and id(parameter) not in embeddings
        and not any(word in name.rpartition(".")[2] for word in names)
    ]


def outputs(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else ()
    return [tensor for part in parts for tensor in outputs(part)]


def infer(model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        return outputs(model.eval()(*inputs, **named))


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) > 0 and all(map(torch.equal, one, other))


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view(torch.int32)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_masked_acts_masked(name: str) -> None:
    model, inputs, named = called(name)
    assert len(get_masks(model)) == len(weights(original(name)[0])) > 0
    table, every = summary(model), sum(parameter.numel() for parameter in model.parameters())
    assert table.sparsity == pytest.approx(0.9, abs=0.02)
    assert [other for other in table.unmasked if not other.why] == [], "nothing is left out unnamed"
    assert sum(part.size for part in (*table.rows, *table.unmasked)) == every
    zeros = sum(int((~mask).sum()) for mask in get_masks(model).values())
    assert table.model_sparsity == pytest.approx(zeros / every)
    check = check_masks(model, *inputs, **named)
    assert check.ok, str(check)
    assert check.checked == list(get_masks(model))


@pytest.mark.parametrize("name", MODELS)
def test_training_leaves_no_weight_and_no_gradient_under_the_masks(name: str) -> None:
    model, inputs, named = called(name)
    optimizer = freeze_masked(torch.optim.AdamW(model.parameters(), lr=0.01), model)
    with_gradient = set()
    first, live = dict(original(name)[0].named_parameters()), get_masks(model)
    for _ in range(5):
        optimizer.zero_grad()
        sum(y.square().mean() for y in outputs(model.train()(*inputs, **named)) if y.requires_grad).backward()
        parameters = dict(model.named_parameters())
        for place, mask in get_masks(model).items():
            weight = parameters[place if place in parameters else f"{place}.weight"]
            if weight.grad is not None:
                with_gradient.add(place)
                assert not bits(weight.grad)[~mask].any(), place
        optimizer.step()
        for place, mask in get_masks(model).items():
            weight = parameters[place if place in parameters else f"{place}.weight"]
            assert not bits(weight)[~mask].any(), place
    assert len(with_gradient) > 0.7 * len(get_masks(model))
    assert check_masks(model, *inputs, **named).ok
    set_masks(model, {place: torch.ones_like(mask) for place, mask in live.items()})
    for place, mask in live.items():
        full = place if place in first else f"{place}.weight"
        assert torch.equal(bits(parameters[full])[~mask], bits(first[full])[~mask]), f"{place} is restored, bit for bit"


@pytest.mark.parametrize("name", MODELS)
def test_a_model_without_its_masks_has_the_same_outputs(name: str) -> None:
    model, inputs, named = called(name)
    masked = infer(model, inputs, named)
    assert not same(masked, infer(original(name)[0], inputs, named))
    assert not get_masks(unmask_model(model))
    assert same(infer(model, inputs, named), masked)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_the_sparse_form_has_the_same_outputs(name: str) -> None:
    model, inputs, named = called(name)
    masked = infer(model, inputs, named)
    if name == "encoder":  # its kernel takes parameters only
        with pytest.raises(ValueError, match="the module around it reads its weight"):
            compress(model, "sparse")
        return
    layers = {place for place, module in model.named_modules() if isinstance(module, MaskedLinear)}
    others = [place for place in get_masks(model) if place not in layers]
    compress(model, "sparse")
    assert [place for place, mask in get_masks(model).items() if isinstance(mask, Tensor)] == others
    for one, other in zip(infer(model, inputs, named), masked, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_an_encoder_infers_what_it_trains() -> None:
    model, inputs, named = called("encoder")
    assert len(get_masks(model)) == 8
    fast, slow = infer(model, inputs, named)[0], model(*inputs, **named)
    assert slow.requires_grad
    assert not fast[PADDING].any()  # the way of nested tensors, in which padding has no place
    torch.testing.assert_close(fast[~PADDING], slow[~PADDING])


def test_attention_reads_the_masked_weight_of_its_last_layer() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    attention.out_proj.bias.data.uniform_(-1, 1)
    attention.out_proj = MaskedLinear.from_linear(attention.out_proj, torch.zeros(16, 16))  # type: ignore[assignment]
    attention.train()
    y, _ = attention(SEQUENCE, SEQUENCE, SEQUENCE)
    assert torch.equal(y, attention.out_proj.bias.expand_as(y))
    y.sum().backward()
    assert not bits(attention.out_proj.weight.grad).any()  # type: ignore[arg-type]
    assert torch.equal(infer(attention, (SEQUENCE,) * 3, {})[0], attention.out_proj.bias.expand_as(y))
    attention.out_proj.set_mask(torch.rand(16, 16) < 0.5)  # type: ignore[operator]
    assert check_masks(attention, SEQUENCE, SEQUENCE, SEQUENCE).ok


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_plain_model_loads_what_a_masked_one_has_saved(name: str, tmp_path: Path) -> None:
    model, inputs, named = called(name)
    masked = infer(model, inputs, named)
    inspect.unwrap(type(model).save_pretrained)(model, tmp_path)  # type: ignore[attr-defined]  # as transformers has it
    plain = type(model).from_pretrained(tmp_path)  # type: ignore[attr-defined]
    assert not get_masks(plain)
    assert same(infer(plain, inputs, named), masked)
    restored = mask_model(type(model).from_pretrained(tmp_path))  # type: ignore[attr-defined]
    from safetensors.torch import load_file

    restored.load_state_dict(load_file(tmp_path / "model.safetensors"))
    for one, other in zip(restored.modules(), model.modules(), strict=True):
        if isinstance(one, MaskedLinear):
            assert torch.equal(one.mask, other.mask)  # type: ignore[arg-type]
            assert torch.equal(one.full_weight, other.full_weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("dim", [0, 1])
def test_a_layer_that_transformers_cuts_is_the_masked_one_without_some_nodes(dim: int) -> None:
    torch.manual_seed(0)
    masked = MaskedLinear(8, 6, mask=torch.rand(6, 8) < 0.5)
    kept = torch.tensor([0, 2, 5])
    cut = prune_linear_layer(masked, kept, dim)
    x = torch.randn(4, 8 if dim == 0 else 3)
    if dim == 0:
        torch.testing.assert_close(cut(x), masked(x)[:, kept])
    else:
        torch.testing.assert_close(cut(x), masked(torch.zeros(4, 8).index_copy(1, kept, x)))
    assert torch.equal(cut.weight, masked.weight.index_select(dim, kept))


class Merged:
    """A layer into whose weight an adapter has been merged, as PEFT does, past autograd."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.layer = MaskedLinear(32, 24, mask=torch.rand(24, 32) < 0.2)
        self.x = torch.randn(5, 32)
        delta = torch.randn(24, 3) @ torch.randn(3, 32)
        with torch.no_grad():
            self.masked, self.adapted = self.layer(self.x), self.layer(self.x) + self.x @ delta.T
        self.layer.weight.data += delta


def test_a_merge_acts_until_it_is_reported() -> None:
    merged = Merged()
    torch.testing.assert_close(merged.layer(merged.x), merged.adapted)
    layer = merged.layer
    check = check_masks(layer, merged.x)
    assert not check.ok
    assert list(check.failures) == [""]
    (failure,) = check.failures[""]
    assert f"weight is not +0 in {int((~layer.mask).sum())} masked places" in failure
    assert "(the model)" in str(check)
    assert check_masks(layer, merged.x).ok


TOUCHES: dict[str, Callable[[nn.Module], Any]] = {
    "eval": lambda layer: layer.eval(),
    "train": lambda layer: layer.train(),
    "state_dict": lambda layer: layer.state_dict(),
    "copy": copy.deepcopy,
}


@pytest.mark.parametrize("touch", TOUCHES)
def test_a_merge_is_not_lost_in_silence(touch: str) -> None:
    merged = Merged()
    torch.testing.assert_close(merged.layer(merged.x), merged.adapted)
    with pytest.warns(UserWarning, match="values under the mask of MaskedLinear.* are set back to 0"):
        TOUCHES[touch](merged.layer)
    assert not bits(merged.layer.weight)[~merged.layer.mask].any()


def test_a_model_that_was_masked_in_inference_mode_trains() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(5, 8)
    with torch.inference_mode():
        prune_model(mask_model(model), 0.5)
        model(x)
    layers = [layer for layer in model if isinstance(layer, MaskedLinear)]
    assert not any(tensor.is_inference() for layer in layers for tensor in (layer.mask, layer.dormant))  # type: ignore[union-attr]
    before = [(layer.weight.detach().clone(), layer.dormant.clone()) for layer in layers]  # type: ignore[union-attr]
    optimizer = freeze_masked(torch.optim.AdamW(model.parameters(), lr=0.1), model)
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
    for layer, (weight, dormant) in zip(layers, before, strict=True):
        assert not bits(layer.weight)[~layer.mask].any()
        assert (layer.weight != weight)[layer.mask].any()
        assert torch.equal(layer.dormant, dormant)  # type: ignore[arg-type]
        layer.set_mask(torch.ones_like(layer.mask))
        assert torch.equal(layer.weight[dormant != 0], dormant[dormant != 0])


def test_a_model_of_inference_tensors_infers_masked_and_is_refused_in_training() -> None:
    torch.manual_seed(0)
    with torch.inference_mode():
        model = prune_and_return(mask_model(nn.Sequential(nn.Linear(8, 4))))
    x = torch.randn(5, 8)
    assert torch.equal(infer(model, (x,), {})[0], F.linear(x, model[0].masked_weight, model[0].bias))
    optimizer = freeze_masked(torch.optim.SGD(model.parameters(), lr=0.1), model)
    model(x).sum().backward()
    with pytest.raises(RuntimeError, match=r"[Ii]nference tensor"):
        optimizer.step()


def prune_and_return(model: nn.Sequential) -> nn.Sequential:
    prune_model(model, 0.5)
    return model
