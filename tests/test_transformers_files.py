"""Folders of Hugging Face's models: masks come back bit for bit with the plugin, and without it the outputs are right."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the package, when it is imported
    import transformers
    from safetensors.torch import load_file, save_file

import maskedlinear.transformers
from helpers import python
from maskedlinear import checkpoint, masks
from maskedlinear.checkpoint import CheckpointError, MaskedArray
from maskedlinear.cli import main
from maskedlinear.torch import (
    MaskedLinear,
    SparseLinear,
    compress,
    get_masks,
    import_masks,
    mask_model,
    prune_model,
    set_masks,
    summary,
)
from test_torch_real_models import IMAGE, MODELS, PIXELS, TEXT, TOKENS, Called, hugging_face

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def bert() -> Called:
    return hugging_face("BertForSequenceClassification", "BertConfig", **TEXT), (TOKENS,), {}


def vit() -> Called:
    """Its weights are renamed when it is saved."""
    return hugging_face("ViTForImageClassification", "ViTConfig", **IMAGE, intermediate_size=32), (PIXELS,), {}


def deberta() -> Called:
    options = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8}
    return hugging_face("DebertaV2Model", "DebertaV2Config", **TEXT, **options), (TOKENS,), {}


FIRST: dict[str, Callable[[], Called]] = {"bert": bert, "vit": vit}
FIRST |= {name: MODELS[name] for name in ("gpt2", "mixtral")}  # of Conv1D; of experts, which are taken apart when saved
REST = {name: MODELS[name] for name in ("llama", "t5", "bloom", "qwen3_moe", "wavlm", "whisper")} | {"deberta": deberta}
EACH = [*FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in REST)]


def plain(name: str) -> Any:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = (FIRST | REST)[name]()[0].eval()
    with torch.no_grad():  # no 0s of an initialisation
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape))
    return model


def inputs(name: str, model: Any) -> dict[str, Tensor]:
    _, given, named = (FIRST | REST)[name]()
    return {**dict(zip([model.main_input_name], given, strict=False)), **named}


def masked(name: str, sparsity: float = 0.9, **options: Any) -> Any:
    model = plain(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is left out: a head that shares its weight with an embedding, say
        mask_model(model, **options)
    prune_model(model, sparsity, scope="layer", on_empty="keep")
    return model


def loaded(model: nn.Module, folder: Path, **options: Any) -> Any:
    return type(model).from_pretrained(folder, **options)  # type: ignore[attr-defined]


@torch.no_grad()
def outputs(model: nn.Module, name: str) -> dict[str, Tensor]:
    output = model(**inputs(name, model))
    return {key: value for key, value in output.items() if isinstance(value, Tensor)}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() != set()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def same_masks(one: nn.Module, other: nn.Module) -> None:
    first, second = (
        {k: m if isinstance(m, Tensor) else torch.from_numpy(m.to_mask()) for k, m in get_masks(x).items()}
        for x in (one, other)
    )
    same(first, second)
    assert not all(mask.all() for mask in first.values())


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().reshape(-1).view(torch.uint8) for name, value in model.named_parameters()}


PLAIN_LOAD = """
import json, sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file
found = {}
for folder in map(Path, FOLDERS):
    told = json.loads((folder / "config.json").read_text())
    model, report = getattr(transformers, told["architectures"][0]).from_pretrained(folder, output_loading_info=True)
    with torch.no_grad():
        output = model.eval()(**load_file(folder / "test" / "inputs"))
    wanted = load_file(folder / "test" / "outputs")
    equal = {name for name, value in wanted.items() if torch.equal(output[name], value)}
    found[folder.name] = {
        "equal": equal == wanted.keys() and len(wanted) > 0,
        "keys": sorted(map(str, [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]])),
    }
assert not any(name.startswith("maskedlinear") for name in sys.modules)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of models by name, and what is to come out; ``name-sparse`` is compressed, ``name-shards`` sharded."""
    root = tmp_path_factory.mktemp("folders")

    def folder(name: str) -> Path:
        base, _, how = name.partition("-")
        path = root / name
        if not path.exists():
            model = masked(base)
            wanted = {key: value.clone() for key, value in outputs(model, base).items()}
            if how == "sparse":
                compress(model, "sparse")
            model.save_pretrained(path, **({"max_shard_size": "10KB"} if how == "shards" else {}))
            (path / "test").mkdir()
            save_file({key: value.clone() for key, value in inputs(base, model).items()}, path / "test" / "inputs")
            save_file(wanted, path / "test" / "outputs")
        return path

    return folder


@pytest.mark.parametrize("name", EACH)
def test_masks_and_weights_come_back_bit_for_bit(name: str, folders: Callable[[str], Path]) -> None:
    model = masked(name)
    again = loaded(model, folders(name))
    same_masks(model, again)
    same(bits(model), bits(again))
    same(outputs(model, name), outputs(again, name))
    assert not again.is_quantized
    assert getattr(again, "hf_quantizer", None) is None
    again.save_pretrained(folders(name).parent / f"{name}-again")
    third = loaded(model, folders(name).parent / f"{name}-again")
    same_masks(model, third)
    same(bits(model), bits(third))


@pytest.mark.parametrize("which", ["first", pytest.param("rest", marks=pytest.mark.slow)])
def test_a_plain_load_has_the_same_outputs_and_no_keys_too_many(which: str, folders: Callable[[str], Path]) -> None:
    names = [*FIRST, "bert-shards", "bert-sparse", "mixtral-sparse"] if which == "first" else [*REST]
    result = python(PLAIN_LOAD.replace("FOLDERS", repr([str(folders(name)) for name in names])))
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == {name: {"equal": True, "keys": []} for name in names}


def test_files_have_weights_and_masks_by_the_same_names(folders: Callable[[str], Path]) -> None:
    for name in ("bert", "vit", "mixtral"):
        weights, arrays = (
            load_file(folders(name) / "model.safetensors"),
            checkpoint.load(folders(name) / "masks.safetensors"),
        )
        assert {"q_proj", "block_sparse_moe", "query"} & {part for key in arrays for part in key.split(".")}
        for key, array in arrays.items():
            assert isinstance(array, checkpoint.MaskedArray)
            assert array.dtype == "BOOL"
            assert array.shape == weights[key].shape, key
            assert not bits_of(weights[key])[~torch.from_numpy(array.mask())].any(), key
        masked_away = sum(array.size - array.nnz for array in arrays.values())  # type: ignore[union-attr]
        assert masked_away == sum(int((~mask).sum()) for mask in get_masks(masked(name)).values())


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32)


@pytest.mark.parametrize("name", ["bert", "mixtral"])
def test_layers_in_the_sparse_form_come_back_in_it(name: str, folders: Callable[[str], Path]) -> None:
    model = compress(masked(name), "sparse")
    again = loaded(model, folders(f"{name}-sparse"))
    kinds = [[type(part).__name__ for part in each.modules()] for each in (model, again)]
    assert kinds[0] == kinds[1]
    assert "SparseLinear" in kinds[0]
    same(bits(model), bits(again))
    same(outputs(model, name), outputs(again, name))


@pytest.mark.parametrize("name", ["bert", "mixtral"])
def test_what_is_dormant_is_kept_when_it_is_asked_for(name: str, tmp_path: Path) -> None:
    model, original = masked(name, keep_dormant=True), plain(name)
    full = {key: torch.ones_like(mask) for key, mask in get_masks(model).items()}
    for dormant in (False, True):
        model.save_pretrained(tmp_path / str(dormant), dormant=dormant)
        again = loaded(model, tmp_path / str(dormant))
        same_masks(model, again)
        same(bits(model), bits(again))
        set_masks(again, full)
        if dormant:
            same(bits(original), bits(again))
        else:
            assert summary(again).sparsity == 0
            assert sum(int((value == 0).sum()) for value in again.parameters()) > 1000


def test_how_dormant_values_are_kept_is_kept(tmp_path: Path) -> None:
    model = masked("bert", keep_dormant=False)
    model.save_pretrained(tmp_path, dormant=True)
    again = loaded(model, tmp_path)
    assert {mask.keep_dormant for mask in again.modules() if hasattr(mask, "keep_dormant")} == {False}


def test_a_state_that_is_given_is_saved_and_masked(tmp_path: Path) -> None:
    model = masked("bert")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    key = "bert.encoder.layer.0.attention.self.query.weight"
    state[key] += 1  # an average that has drifted
    model.save_pretrained(tmp_path, state_dict=state, dormant=True)
    again = loaded(model, tmp_path)
    same_masks(model, again)
    mask = get_masks(model)[key.removesuffix(".weight")]
    assert torch.equal(again.state_dict()[key], torch.where(mask, state[key], 0))
    set_masks(again, {key.removesuffix(".weight"): torch.ones_like(mask)})
    assert torch.equal(again.state_dict()[key], state[key]), "what stood there is dormant"


@pytest.mark.parametrize(
    "options",
    [{"dtype": torch.bfloat16}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {"low_cpu_mem_usage": True}],
)
def test_ways_of_loading(options: dict[str, Any], folders: Callable[[str], Path]) -> None:
    model = masked("llama").to(options.get("dtype"))
    again = loaded(model, folders("llama"), **options)
    same_masks(model, again)
    same(bits(model), bits(again))
    same(outputs(model, "llama"), outputs(again, "llama"))


def test_shards_and_their_index(folders: Callable[[str], Path]) -> None:
    assert len(list(folders("bert-shards").glob("model-*.safetensors"))) > 2
    again = loaded(masked("bert"), folders("bert-shards"))
    same_masks(masked("bert"), again)
    same(bits(masked("bert")), bits(again))


@pytest.mark.parametrize("name", ["bert", "mixtral", "vit"])
def test_a_base_and_a_model_with_a_head_load_each_others_masks(
    name: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    model = masked(name)
    base = model.base_model
    with pytest.warns(UserWarning, match="masks of 1 weights are left out.*(classifier|lm_head)"):
        again = loaded(base, folders(name))
    same_masks(base, again)
    base.save_pretrained(tmp_path)
    head = loaded(model, tmp_path)
    same_masks(base, head.base_model)


def test_a_weight_that_is_shared_with_the_embedding(tmp_path: Path) -> None:
    model: Any = plain("gpt2")
    mask_model(model, include=["transformer.wte", "transformer.h.*"])
    prune_model(model, 0.9)
    assert model.lm_head.weight is model.transformer.wte.weight
    model.save_pretrained(tmp_path)
    again = loaded(model, tmp_path)
    assert again.lm_head.weight is again.transformer.wte.weight
    same_masks(model, again)
    same(bits(model), bits(again))
    same(outputs(model, "gpt2"), outputs(again, "gpt2"))


class Masked(transformers.PreTrainedModel):  # type: ignore[misc]
    """A model of one's own that is made with masked layers."""

    config_class = transformers.BertConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.dense = MaskedLinear(16, 16, mask=masks.random((16, 16), sparsity=0.5, seed=0))
        self.sparse = SparseLinear(16, 16, mask=masks.random((16, 16), sparsity=0.5, seed=1))
        self.post_init()

    def forward(self, x: Tensor) -> Tensor:
        return self.sparse(self.dense(x))  # type: ignore[no-any-return]


def test_a_model_that_is_made_with_masked_layers(tmp_path: Path) -> None:
    model = Masked(transformers.BertConfig(**TEXT)).eval()
    model.dense.set_mask(masks.random((16, 16), sparsity=0.9, seed=2))
    model.save_pretrained(tmp_path)
    again = Masked.from_pretrained(tmp_path)
    same_masks(model, again)
    same(bits(model), bits(again))
    assert isinstance(again.sparse, SparseLinear)


class Data(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": TOKENS[index % 2], "labels": torch.tensor(index % 2)}


def trained(model: Any, where: Path, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        str(where), per_device_train_batch_size=2, num_train_epochs=1, learning_rate=0.01, use_cpu=True, report_to=[],
        disable_tqdm=True, save_strategy="steps", save_steps=2, max_grad_norm=0.0, seed=0,
    )  # fmt: skip
    callback = maskedlinear.transformers.MaskedTraining()
    trainer = transformers.Trainer(model, arguments, train_dataset=Data(), callbacks=[callback])
    trainer.train(**options)
    return trainer


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_a_model_that_was_loaded_trains_and_goes_on_from_a_checkpoint(
    form: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    start = masked("bert")
    whole, resumed = (loaded(start, folders("bert" if form == "dense" else "bert-sparse")) for _ in range(2))
    before = get_masks(whole)
    if form == "dense":
        set_masks(whole, {name: ~mask for name, mask in before.items()})  # so that something is dormant
    trained(whole, tmp_path / "one")
    trainer = trained(resumed, tmp_path / "two", resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2"))
    same_masks(whole, resumed)
    same(whole.state_dict(), resumed.state_dict())
    assert not torch.equal(*(model.classifier.bias for model in (start, whole)))
    checkpointed = loaded(start, tmp_path / "one" / "checkpoint-4")
    same(whole.state_dict(), checkpointed.state_dict())
    trainer.save_model(tmp_path / "out")
    assert not any(
        key.endswith(("mask", "dormant", "indices")) for key in load_file(tmp_path / "out" / "model.safetensors")
    )
    same(bits(loaded(start, tmp_path / "out")), bits(whole))


def test_adapters_on_top(folders: Callable[[str], Path], tmp_path: Path) -> None:
    import peft

    model = loaded(masked("llama"), folders("llama"))
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        y = adapted(TOKENS).logits
    adapted.save_pretrained(tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    again = peft.PeftModel.from_pretrained(loaded(masked("llama"), folders("llama")), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, y)
    base = adapted.unload()
    base.save_pretrained(tmp_path / "base")
    same_masks(loaded(base, tmp_path / "base"), masked("llama"))


def test_pruning_of_torch_is_told_when_a_model_is_saved(tmp_path: Path) -> None:
    model = plain("bert")
    prune.l1_unstructured(model.classifier, "weight", 0.5)
    with pytest.warns(UserWarning, match=r"masks classifier\.weight, .*import_masks\(model\)") as told:
        model.save_pretrained(tmp_path)
    assert [one.filename for one in told] == [__file__]
    import_masks(model).save_pretrained(tmp_path)  # no warning
    same_masks(loaded(model, tmp_path), model)


def test_our_own_tools_read_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = mask_model(plain("bert"))
    prune_model(model, 0.7)
    for name, size in (("whole", "1GB"), ("shards", "5KB")):
        model.save_pretrained(tmp_path / name, max_shard_size=size)
        arrays = checkpoint.read(tmp_path / name)
        masked = {name: torch.from_numpy(a.mask()) for name, a in arrays.items() if isinstance(a, MaskedArray)}
        theirs = get_masks(model)
        assert len(masked) == len(theirs)
        assert all(torch.equal(masked[f"{name}.weight"], theirs[name]) for name in theirs)
        assert main(["inspect", str(tmp_path / name), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["masked"]["sparsity"] == summary(model).sparsity
    with pytest.raises(CheckpointError, match=r"masks in a file beside it: load the folder by from_pretrained"):
        checkpoint.load_into(again := mask_model(plain("bert")), tmp_path / "whole" / "model.safetensors")
    with pytest.raises(IsADirectoryError, match=r"checkpoint\.read reads those of Hugging Face"):
        checkpoint.load_into(again, tmp_path / "whole")
    checkpoint.save(arrays, tmp_path / "a.safetensors")
    again = checkpoint.load_into(plain("bert"), tmp_path / "a.safetensors")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
