"""LoRA of ``peft`` over masked weights: what trains is what is merged, and the merge is as sparse as the weights."""

from __future__ import annotations

import copy
import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the frameworks' own imports
    import peft
    import transformers
    from peft import LoraConfig, PeftModel, get_peft_model

from maskedlinear import checkpoint
from maskedlinear.checkpoint import CheckpointError
from maskedlinear.peft import mask_adapters
from maskedlinear.torch import (
    SparseLinear,
    check_masks,
    compress,
    expand,
    get_masks,
    mask_model,
    prune_model,
    regrow_model,
    set_masks,
    unmask_model,
)
from maskedlinear_torch._storage import bits_of

# transformers' own, of the way in which PEFT asks it
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

SMALL = {"vocab_size": 40, "num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
MODELS: dict[str, Any] = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_layer=1, n_embd=16, n_head=2, bos_token_id=0, eos_token_id=0)
    ),
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)),
}
TARGETS = {"gpt2": ["c_attn", "c_fc"], "bert": ["query", "dense"], "llama": "all-linear"}
IDS = torch.randint(40, (3, 7), generator=torch.Generator().manual_seed(0))
X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def network(sparsity: float = 0.6, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    model = mask_model(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype))
    prune_model(model, sparsity)
    return model  # type: ignore[return-value]


def drawn(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, its adapters far from the zeros that they start with."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return model.eval()


def adapted(model: nn.Module | None = None, **options: Any) -> Any:
    config = LoraConfig(**{"target_modules": ["0", "2"], "r": 3} | options)
    return drawn(mask_adapters(get_peft_model(network() if model is None else model, config)))


def plain_name(name: str) -> str:
    """What a module of a PEFT model is called when its adapters are merged."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def check_weights(model: nn.Module, masks: dict[str, Tensor]) -> None:
    now = get_masks(model)
    assert [torch.equal(now[name], mask) for name, mask in masks.items()] == [True] * len(now)
    for name, mask in now.items():
        module = model.get_submodule(name)
        assert not bits_of(module.weight.detach())[~mask].any(), f"{name} is not +0 under its mask"


@pytest.mark.parametrize("masked_first", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_what_trains_is_what_is_merged(kind: str, masked_first: bool) -> None:
    torch.manual_seed(0)
    model = MODELS[kind]().double()
    config = LoraConfig(target_modules=TARGETS[kind], r=4, lora_dropout=0.1, fan_in_fan_out=kind == "gpt2")
    names = {name for name, _ in model.named_modules()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="mask_model left out")  # the head that is the embedding
        adapt, mask = lambda model: get_peft_model(model, config), mask_model
        model = adapt(mask(model)) if masked_first else mask(adapt(model))
    assert not any("lora_" in name for name in get_masks(model)), "adapters have no masks"
    prune_model(model, 0.7)
    assert mask_adapters(model) is model
    masks, base = get_masks(model), {name: p.clone() for name, p in model.named_parameters() if "lora_" not in name}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.05)
    for _ in range(3):
        model(IDS).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)
    expected = model.eval()(IDS).logits
    with model.disable_adapter():
        assert (model(IDS).logits - expected).abs().max() > 1e-3, "the adapters have learned something"
    assert check_masks(model, IDS).ok
    merged = model.merge_and_unload(safe_merge=masked_first)
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-9, atol=1e-9)
    assert {name for name, _ in merged.named_modules() if not name.endswith("masked_weight")} == names
    assert check_masks(merged, IDS).ok
    check_weights(merged, {plain_name(name): mask for name, mask in masks.items()})


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "lora_bias": True}, {"lora_dropout": 0.5}])
@pytest.mark.parametrize("transposed", [False, True])
def test_outputs_and_gradients_are_those_of_the_masked_product(transposed: bool, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = transformers.pytorch_utils.Conv1D(5, 8) if transposed else nn.Linear(8, 5)
    model = mask_model(nn.Sequential(layer).double())
    prune_model(model, 0.6)
    model = adapted(model, target_modules=["0"], lora_alpha=7, fan_in_fan_out=transposed, **options).train()
    tuned = model.base_model.model[0]
    a, b, mask = tuned.lora_A["default"].weight, tuned.lora_B["default"], get_masks(model).popitem()[1]
    scale = 7 / 3 ** (0.5 if "use_rslora" in options else 1)
    x = X.clone().requires_grad_()

    def by_hand() -> Tensor:
        delta = torch.where(mask.T if transposed else mask, scale * b.weight @ a, 0)
        y = x @ (layer.weight if transposed else layer.weight.T) + layer.bias
        y = y + nn.functional.dropout(x, options.get("lora_dropout", 0)) @ delta.T
        return y if b.bias is None else y + scale * b.bias

    results = []
    for call in (by_hand, lambda: model(x)):
        torch.manual_seed(1)
        y = call()
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, a, *b.parameters()])])
    for expected, result in zip(*results, strict=True):
        torch.testing.assert_close(result, expected)


def test_several_adapters_act_merge_and_come_off_one_by_one() -> None:
    model = adapted(lora_bias=True)
    masks = get_masks(model)
    model.add_adapter("other", LoraConfig(target_modules=["0", "2"], r=2, lora_alpha=5))  # masked without another call
    drawn(model)
    with model.disable_adapter():
        plain = model(X)
    first = model(X)
    model.set_adapter("other")
    second = model(X)
    model.base_model.set_adapter(["default", "other"])
    both = model(X)
    assert all((one - other).abs().max() > 1e-3 for one, other in ((plain, first), (first, second), (second, both)))
    for names, expected in (["default"], first), (["other"], second), (["default", "other"], both):
        for safe in (False, True):
            model.base_model.set_adapter(names)
            model.merge_adapter(safe_merge=safe)
            torch.testing.assert_close(model(X), expected)
            assert check_masks(model, X).ok
            check_weights(model, masks)
            model.unmerge_adapter()
            torch.testing.assert_close(model(X), expected)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(model(X), plain)
    torch.testing.assert_close(model(X), both)  # PEFT unmerges while they are disabled
    model.delete_adapter("other")
    torch.testing.assert_close(model(X), first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wide", [False, True])
def test_half_types_are_kept(dtype: torch.dtype, wide: bool) -> None:
    model = get_peft_model(network(dtype=dtype), LoraConfig(target_modules=["0", "2"]), autocast_adapter_dtype=wide)
    model, x, masks = drawn(mask_adapters(model)), X.to(dtype), get_masks(model)
    assert model.base_model.model[0].lora_A["default"].weight.dtype == (torch.float32 if wide else dtype)
    y = model(x)
    y.float().sum().backward()
    merged = model.merge_and_unload()
    assert merged(x).dtype == y.dtype == merged[0].weight.dtype == dtype
    torch.testing.assert_close(merged(x), y, rtol=0.05, atol=0.1)
    check_weights(merged, {plain_name(name): mask for name, mask in masks.items()})


def test_files_are_those_of_peft(tmp_path: Path) -> None:
    masked, plain = adapted(), get_peft_model(network(), LoraConfig(target_modules=["0", "2"], r=3))
    assert masked.state_dict().keys() == plain.state_dict().keys()
    masked.save_pretrained(tmp_path)
    keys = peft.get_peft_model_state_dict(plain).keys()
    assert peft.utils.load_peft_weights(str(tmp_path)).keys() == keys
    loaded = PeftModel.from_pretrained(network(), str(tmp_path))
    assert not torch.allclose(loaded(X), masked(X)), "what is not told of the masks acts past them"
    assert mask_adapters(mask_adapters(loaded)) is loaded
    assert torch.equal(loaded(X), masked(X))
    loaded.load_adapter(str(tmp_path), "again")
    loaded.set_adapter("again")
    assert torch.equal(loaded(X), masked(X))
    buffer = io.BytesIO()
    torch.save(masked, buffer)
    buffer.seek(0)
    for copied in (copy.deepcopy(masked), torch.load(buffer, weights_only=False)):
        assert torch.equal(copied(X), masked(X))
        assert check_masks(copied.merge_and_unload(), X).ok


def test_an_adapter_follows_the_mask() -> None:
    model = adapted()
    before, y = get_masks(model), model(X)
    prune_model(model, 0.8)
    pruned = model(X)
    assert not torch.allclose(pruned, y)
    assert check_masks(model, X).ok
    set_masks(model, before)
    assert torch.equal(model(X), y)
    assert torch.equal(torch.compile(model, backend="eager")(X), y)
    unmask_model(model)
    assert torch.equal(model.to(torch.float64)(X), y), "taking masks away keeps outputs"
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(X), y)
    assert type(merged[0]) is nn.Linear
    assert torch.equal(merged[0].weight != 0, before["base_model.model.0.base_layer"])


def test_in_the_sparse_form_an_adapter_has_its_connections_alone() -> None:
    model = adapted(lora_bias=True)
    y = model(X)
    parameters = [p for name, p in model.named_parameters() if "lora_" in name]
    gradients = torch.autograd.grad(y.square().sum(), parameters)
    compress(model, "sparse", batch=6)
    layer = model.base_model.model[0]
    assert isinstance(layer.base_layer, SparseLinear)
    torch.testing.assert_close(model(X), y)
    torch.testing.assert_close(torch.autograd.grad(model(X).square().sum(), parameters), gradients)
    assert layer.get_delta_weight("default").shape == layer.base_layer.weight_values.shape
    assert layer.adapter_mask is None, "no array of the weight's shape is left"
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        assert layer.merged
        torch.testing.assert_close(model(X), y)
        model.unmerge_adapter()
        torch.testing.assert_close(model(X), y)
    assert mask_adapters(model) is model
    torch.testing.assert_close(expand(copy.deepcopy(model))(X), y)
    broken, values = copy.deepcopy(model), layer.base_layer.weight_values.clone()
    broken.base_model.model[0].lora_A["default"].weight.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="finite with safe_merge=True; got others of adapter 'default'"):
        broken.merge_adapter(safe_merge=True)
    assert torch.equal(broken.base_model.model[0].base_layer.weight_values, values)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(X), y)
    assert [type(part) for part in merged] == [SparseLinear, nn.Tanh, SparseLinear]


def test_a_merge_that_is_not_masked_is_reported() -> None:
    config = LoraConfig(target_modules=["0", "2"])
    model, again = (drawn(get_peft_model(network(), config)).merge_and_unload() for _ in range(2))
    assert "weight is not +0" in str(check_masks(again, X))
    with pytest.warns(UserWarning, match=r"must be masked, as by maskedlinear.peft.mask_adapters"):
        model.train()


@pytest.mark.parametrize(
    ("config", "error", "match"),
    [
        (LoraConfig(target_modules=["0"]), TypeError, r"lora.layer.Embedding at 'base_model.model.0'.*target_modules"),
        (LoraConfig(target_modules=["1", "2"]), TypeError, r"lora.layer.Conv1d at 'base_model.model.1'.*unmask_model"),
        (
            LoraConfig(target_modules=["2"], use_dora=True),
            ValueError,
            r"plain LoRA; got DoraLinearVariant of .*default",
        ),
        (peft.LoHaConfig(target_modules=["2"]), TypeError, r"loha.layer.Linear at"),
    ],
)
def test_what_cannot_be_masked_is_refused(config: Any, error: type[Exception], match: str) -> None:
    model = nn.Sequential(nn.Embedding(5, 8), nn.Conv1d(3, 3, 3), nn.Linear(6, 6))
    model = get_peft_model(mask_model(model, include=["0", "1", "2"]), config)
    before = [type(module) for module in model.modules()]
    with pytest.raises(error, match=match):
        mask_adapters(model)
    assert [type(module) for module in model.modules()] == before, "the model is left as it was"


def test_what_comes_later_is_refused_at_its_call() -> None:
    with pytest.raises(ValueError, match="adapter_names: call the model once for each adapter"):
        adapted()(X, adapter_names=["default"] * 6)
    model = adapted()
    model.add_adapter("dora", LoraConfig(target_modules=["0"], use_dora=True))
    model.set_adapter("dora")
    for call in (lambda: model(X), model.merge_adapter):
        with pytest.raises(ValueError, match="DoraLinearVariant of adapter 'dora'"):
            call()
    with pytest.raises(TypeError, match=r"takes a torch.nn.Module; got dict"):
        mask_adapters({})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"with 2 adapted layers, none of them masked: call mask_model"):
        mask_adapters(get_peft_model(unmask_model(network()), LoraConfig(target_modules=["0", "2"])))


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_masks_stay_while_adapters_are_merged(form: str) -> None:
    model = adapted(network())
    if form == "sparse":
        compress(model, "sparse")
    y = model(X)
    model.merge_adapter()
    before = get_masks(model)
    if form == "dense":
        prune_model(model, 0.8, scope="layer")
    else:
        regrow_model(model, 0.5)
    with pytest.raises(
        ValueError, match="under the mask that it was merged under, and this weight has another one now"
    ):
        model.unmerge_adapter()
    if form == "dense":
        set_masks(model, before)
        model.unmerge_adapter()
        torch.testing.assert_close(model(X), y)


def test_a_way_to_begin_that_edits_the_weight_leaves_it_masked() -> None:
    config = LoraConfig(target_modules=["0", "2"], r=3, init_lora_weights="olora")
    model, x = mask_adapters(get_peft_model(network(dtype=torch.float32), config)).eval(), X.float()
    torch.testing.assert_close(model(x), network(dtype=torch.float32)(x))
    model.add_adapter("more", LoraConfig(target_modules=["0"], r=2, init_lora_weights="olora"))
    y, merged = model(x), model.merge_and_unload()
    torch.testing.assert_close(merged(x), y)
    for layer in (merged[0], merged[2]):
        assert not bits_of(layer.weight.detach())[~layer.mask].any()
    torch.testing.assert_close(unmask_model(adapted()).type(torch.float64)(X), adapted()(X))


def test_a_sparse_adapter_has_no_shapes_and_its_merged_model_is_read(tmp_path: Path) -> None:
    masks = get_masks(network(dtype=torch.float32))
    base = unmask_model(network(dtype=torch.float32))
    config = peft.ShiraConfig(r=1, target_modules=["0"], mask_type="live", init_weights=False, inference_mode=True)

    def first_live(layer: nn.Linear, r: int, **_: Any) -> Tensor:
        chosen = torch.zeros_like(layer.weight)
        chosen[tuple(masks["0"].nonzero()[: r * sum(layer.weight.shape)].T)] = 1
        return chosen

    config.mask_fn = first_live
    adapter = get_peft_model(base, config)
    y = adapter(X.float())
    adapter.save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        CheckpointError, match=r"0\.shira_indices says where .* merge it, .*masks='zeros'.*masks='none' reads"
    ):
        checkpoint.read(tmp_path / "adapter")
    as_they_stand = checkpoint.read(tmp_path / "adapter", masks="none")
    assert sorted(name.rpartition(".")[2] for name in as_they_stand) == ["shira_indices", "shira_weight"]
    merged = adapter.merge_and_unload()
    arrays = checkpoint.read(merged.state_dict(), masks="zeros")
    for name, mask in masks.items():
        assert torch.equal(torch.from_numpy(arrays[f"{name}.weight"].mask()), mask)  # type: ignore[union-attr]
    checkpoint.save(arrays, tmp_path / "merged.safetensors")
    again = checkpoint.load_into(unmask_model(network(dtype=torch.float32)), tmp_path / "merged.safetensors")
    torch.testing.assert_close(again(X.float()), y)
    assert not torch.equal(network(dtype=torch.float32)(X.float()), y)
