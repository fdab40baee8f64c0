"""What is refused where Hugging Face's folders are saved and loaded, model cards, the Hub, and models of one's own on it."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor, nn
from torch.nn.utils import parametrizations

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the package, when it is imported
    import transformers
    from safetensors.torch import save_file

import maskedlinear_torch._hub_pretrained
from helpers import ROOT
from maskedlinear import checkpoint
from maskedlinear.hub import MaskedModelHubMixin
from maskedlinear.torch import SparseLinear, compress, get_masks, mask_model, prune_model, summary, unmask_model
from maskedlinear.transformers import model_card
from test_torch_real_models import TEXT

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

Model = transformers.BertForSequenceClassification
NAME = "bert.encoder.layer.0.attention.self.query"


def masked() -> Any:
    torch.manual_seed(0)
    model = mask_model(Model(transformers.BertConfig(**TEXT)).eval())
    prune_model(model, 0.9)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    masked().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder: Path, **changes: Any) -> None:
    told = json.loads((folder / "config.json").read_text())
    told["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(told))


def same_masks(one: nn.Module, other: nn.Module) -> None:
    first, second = get_masks(one), get_masks(other)
    assert first.keys() == second.keys() != set()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_masks_that_are_missing_damaged_or_of_another_save_are_refused(folder: Path, tmp_path: Path) -> None:
    path = folder / "masks.safetensors"
    kept = path.read_bytes()
    path.write_bytes(kept[:-1])
    with pytest.raises(checkpoint.CheckpointError, match=r"masks\.safetensors: .*cut off"):
        Model.from_pretrained(folder)
    checkpoint.save({"weight": torch.ones(3).numpy()}, path)
    with pytest.raises(checkpoint.CheckpointError, match="weight is no mask, and nothing that is dormant under one"):
        Model.from_pretrained(folder)
    huge = checkpoint.MaskedArray((1 << 20, 1 << 19), "BOOL", np.ones(1, np.bool_), np.array([1 << 38]))
    checkpoint.save({"weight": huge}, path)
    with pytest.raises(checkpoint.CheckpointError, match="'weight' would be dense"):
        Model.from_pretrained(folder)
    other = masked()
    prune_model(other, 0.95)
    other.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / path.name, path)
    with pytest.raises(ValueError, match=r"has masks of another save than the weights in .*: save the model again"):
        Model.from_pretrained(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"there is no masks.safetensors in {folder}: give")):
        Model.from_pretrained(folder)


def test_a_later_version_is_refused(folder: Path) -> None:
    edit_config(folder, version=2)
    with pytest.raises(ValueError, match="masks in version 2; this reads version 1: update maskedlinear"):
        Model.from_pretrained(folder)


def test_weights_that_were_trained_without_masks_are_refused(folder: Path) -> None:
    state = {key: value + 1 for key, value in unmask_model(masked()).state_dict().items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=f"0 under their masks; got others in {NAME[:20]}.* and 10 more: they were saved"
    ):
        Model.from_pretrained(folder)


def test_masks_of_weights_of_other_shapes_are_left_out_and_named(folder: Path) -> None:
    with pytest.warns(UserWarning, match="masks of 1 weights are left out.*shapes: classifier.weight"):
        model = Model.from_pretrained(folder, num_labels=5, ignore_mismatched_sizes=True)
    assert "classifier" not in get_masks(model)
    assert len(get_masks(model)) == len(get_masks(masked())) - 1


def test_weights_that_are_offloaded_cannot_be_masked(folder: Path, tmp_path: Path) -> None:
    places = {"bert": "cpu", "classifier": "disk"}
    with pytest.raises(
        ValueError, match=r"offloaded to the CPU or the disk cannot be masked: classifier.weight: choose"
    ):
        Model.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "offload")


def test_what_cannot_be_saved_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    model = masked()
    parametrizations.orthogonal(model.get_submodule(NAME))
    with pytest.raises(ValueError, match=f"the weight of {NAME} is computed"):
        model.save_pretrained(tmp_path / "model")
    model = masked()
    with pytest.raises(ValueError, match="a distributed checkpoint has no file of masks"):
        model.save_pretrained(tmp_path / "model", distributed_checkpoint=True)
    model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="hqq"))
    with pytest.raises(
        ValueError, match=r"one quantization_config; got a model with masks that is quantized by hqq: call"
    ):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_model_is_what_it_was_after_it_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = masked()
    before = set(vars(model)), list(model.state_dict()), model.config.to_dict()
    model.save_pretrained(tmp_path)
    assert (set(vars(model)), list(model.state_dict())) == before[:2]
    assert model.config.to_dict().keys() - {"quantization_config"} == before[2].keys()

    def full(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path)
    assert not hasattr(model, "hf_quantizer")
    same_masks(Model.from_pretrained(tmp_path, config=model.config), model)


def test_a_model_without_masks_says_nothing_of_any(folder: Path, tmp_path: Path) -> None:
    model = unmask_model(Model.from_pretrained(folder))
    assert model.config.quantization_config is not None
    model.save_pretrained(tmp_path / "plain")
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == ["config.json", "model.safetensors"]
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert not get_masks(Model.from_pretrained(tmp_path / "plain"))


def test_the_card_says_how_sparse_the_model_is(tmp_path: Path) -> None:
    model = masked()
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: transformers\n")
    assert model_card(model).splitlines()[-2] in text
    query = [row for row in summary(model).rows if row.name.endswith("query")]
    live = sum(row.connections for row in query)
    told = f"| `bert.encoder.layer.*.attention.self.query` | 16 x 16 | dense | 2 | {live} | {1 - live / 512:.2%} |"
    assert told in text.splitlines()
    (tmp_path / "README.md").write_text(f"Mine.\n{text}\nMine too.\n")
    prune_model(model, 0.95)
    model.save_pretrained(tmp_path)
    again = (tmp_path / "README.md").read_text()
    assert again.startswith("Mine.\n---")
    assert again.endswith("\nMine too.\n")
    assert told not in again
    assert f"{summary(model).sparsity:.2%} of the masked weights" in again
    (tmp_path / "README.md").write_text("All mine.")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "All mine."


def test_masks_and_the_card_are_uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, str] = {}
    there: list[str] = []  # the card on the Hub, if there is one

    def commit(*_: Any, operations: Any, **__: Any) -> None:
        sent.clear()
        for operation in operations:
            is_text = operation.path_in_repo.endswith(".md")
            sent[operation.path_in_repo] = Path(operation.path_or_fileobj).read_text() if is_text else ""

    def load(*_: Any, **__: Any) -> Any:
        if not there:
            raise EntryNotFoundError.__new__(EntryNotFoundError)
        return ModelCard(there[0])

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: SimpleNamespace(repo_id="me/sparse"))
    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", commit)
    monkeypatch.setattr("huggingface_hub.ModelCard.load", load)
    model = masked()
    section = model_card(model)
    numbers = section.splitlines()[3]  # how sparse it is
    pushes = (
        lambda model: model.save_pretrained(tmp_path / "one", push_to_hub=True, repo_id="me/sparse"),
        lambda model: model.push_to_hub("me/sparse", tags=["small"]),
    )
    for push in pushes:
        there.clear()
        push(model)
        assert sorted(sent) == ["README.md", "config.json", "masks.safetensors", "model.safetensors"]
        card = ModelCard(sent["README.md"])
        assert numbers in card.text
        assert "automatically generated" in card.text  # what transformers says stays
        assert {"maskedlinear", "sparse"} <= set(card.data.tags)
        there[:] = [sent["README.md"] + "\nMine.\n"]
        push(pruned := prune_model_to(masked(), 0.95))
        assert sent["README.md"].count("## Sparsity") == 1
        assert f"{summary(pruned).sparsity:.2%} of the masked weights" in sent["README.md"]
        assert sent["README.md"].endswith("Mine.\n")
        there[:] = ["---\ntags: []\n---\nAll mine."]
        push(model)
        assert "Sparsity" not in sent["README.md"]
        there.clear()
        push(Model(model.config))  # one without masks
        assert "Sparsity" not in sent["README.md"]
    ModelCard("Mine.").save(tmp_path / "card.md")
    assert "Sparsity" not in (tmp_path / "card.md").read_text()


def prune_model_to(model: Any, sparsity: float) -> Any:
    prune_model(model, sparsity)
    return model


def test_masks_are_found_beside_what_was_downloaded(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    commit, root = "0" * 40, tmp_path / "cache" / "models--me--sparse"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    shutil.copytree(folder, root / "snapshots" / commit)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    same_masks(Model.from_pretrained("me/sparse", cache_dir=tmp_path / "cache", local_files_only=True), masked())
    (root / "snapshots" / commit / "masks.safetensors").unlink()  # as it is when only the weights have been asked for
    asked: list[Any] = []

    def download(*arguments: Any, **options: Any) -> str:
        asked.append((arguments, options))
        return str(folder / "masks.safetensors")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    same_masks(Model.from_pretrained("me/sparse", cache_dir=tmp_path / "cache", local_files_only=True), masked())
    found = {"subfolder": None, "revision": commit, "cache_dir": str(tmp_path / "cache")}
    assert asked == [(("me/sparse", "masks.safetensors"), found)]


class Network(nn.Module, MaskedModelHubMixin):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_a_model_of_ones_own(form: Any, tmp_path: Path) -> None:
    model: Any = mask_model(Network(width=32))
    prune_model(model, 0.9)
    x = torch.randn(4, 32)
    compress(model, form)
    y = model(x)
    model.save_pretrained(tmp_path)
    assert (
        "90.00% |" in (tmp_path / "README.md").read_text() or "% of the masked" in (tmp_path / "README.md").read_text()
    )
    again = Network.from_pretrained(tmp_path)
    assert again.first.in_features == 32
    assert isinstance(again.first, SparseLinear) == (form == "sparse")
    assert not again.training
    assert torch.equal(again(x), y)
    assert summary(again).sparsity == summary(model).sparsity
    assert (tmp_path / "model.safetensors").stat().st_size < 32 * 32 * 4
    with pytest.raises(checkpoint.CheckpointError, match="does not fit the Network"):
        Network.from_pretrained(tmp_path, width=16)
    with pytest.raises(ValueError, match="got strict=False: leave it out"):
        Network.from_pretrained(tmp_path, strict=False)


def test_a_file_of_the_plain_mixin_loads_too(tmp_path: Path) -> None:
    model = Network(width=8)
    super(MaskedModelHubMixin, model)._save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"width": 8}')
    again = Network.from_pretrained(tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))


def test_the_mixin_goes_with_a_module(tmp_path: Path) -> None:
    class Thing(MaskedModelHubMixin):
        pass

    with pytest.raises(TypeError, match=r"goes with a torch.nn.Module; got Thing: derive the class from both"):
        Thing().save_pretrained(tmp_path)


def test_an_old_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("transformers.quantizers.auto.register_quantizer")
    with pytest.raises(ImportError, match=r"needs transformers >= 4\.50, which keeps a registry"):
        importlib.reload(maskedlinear_torch._hub_pretrained)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "hugging-face.md").read_text()
    snippets = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    assert len(snippets) == 4
    exec("\n".join(snippets), {"__name__": "page"})
