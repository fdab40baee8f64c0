"""Whole PyTorch models: masked in place and back, pruned, restored bit for bit, reported."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from maskedlinear import masks, pruning
from maskedlinear.torch import (
    MaskedLinear,
    SparseLinear,
    compress,
    freeze_masked,
    get_masks,
    mask_model,
    prune_model,
    set_masks,
    summary,
    unmask_model,
)


class Network(nn.Module):
    """Nested layers, one used twice, two that share a weight, and attention, which reads a weight past ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(2)])
        self.again = self.blocks[0][0]  # type: ignore[index]
        self.tied = nn.Linear(16, 16, bias=False)
        self.tied.weight = self.blocks[1][0].weight  # type: ignore[index, union-attr, assignment]
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        x = self.tied(self.again(x))
        return self.last(self.attention(x, x, x, need_weights=False)[0])  # type: ignore[no-any-return]


NAMES = ["first", "blocks.0.0", "blocks.1.0", "tied", "last"]


@pytest.fixture
def model() -> Network:
    torch.manual_seed(0)
    return Network().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))


def masked(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, MaskedLinear)]


def test_every_linear_layer_is_masked_in_place_and_back(model: Network, x: Tensor) -> None:
    before, layers, parameters = model(x), dict(model.named_modules()), dict(model.named_parameters())
    calls: list[str] = []
    model.first.register_forward_hook(lambda *_: calls.append("hook"))
    assert mask_model(model) is model
    assert masked(model) == NAMES
    children = {"attention.masked_in_proj_weight", "attention.out_proj.masked_weight"}
    assert {name: part for name, part in model.named_modules() if name not in children} == layers
    assert all(one is parameters[name] for name, one in model.named_parameters())
    assert torch.equal(model(x), before)
    assert calls == ["hook"]
    assert model.again is model.blocks[0][0]  # type: ignore[index]
    assert set(model.state_dict()) - set(Network().state_dict()) == {
        f"{name}.{key}" for name in [*NAMES, "again", *children] for key in ("mask", "dormant")
    }
    assert unmask_model(model) is model
    assert masked(model) == []
    assert type(model.first) is nn.Linear
    assert torch.equal(model(x), before)
    assert set(model.state_dict()) == set(Network().state_dict())
    assert "mask" not in repr(model)


def test_masks_and_patterns_choose_the_layers(model: Network, x: Tensor) -> None:
    mask = masks.random((16, 8), sparsity=0.5, seed=1)
    mask_model(model, {"first": mask})
    assert masked(model) == ["first"]
    assert (model.first.mask.numpy() == mask).all()  # type: ignore[union-attr, operator]
    mask_model(model, {"last": torch.ones(4, 16)}, include="blocks.*")
    assert masked(model) == ["first", "blocks.0.0", "blocks.1.0", "tied", "last"], "who shares a weight shares its mask"
    y = model(x)
    unmask_model(model, include=lambda name, _: name == "first")
    assert masked(model) == ["blocks.0.0", "blocks.1.0", "tied", "last"]
    torch.testing.assert_close(model(x), y)
    assert not model.first.weight[~torch.from_numpy(mask)].any()
    single = mask_model(nn.Linear(3, 2), include=["", "x"])
    assert isinstance(single, MaskedLinear)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"masks": {"frist": np.ones((16, 8))}},
            ValueError,
            "masks must be of layers that there are; got 'frist', and there",
        ),
        (
            {"masks": {"attention.in_proj_bias": np.ones((16, 16))}},
            ValueError,
            "the mask of attention.in_proj_bias: .*shape",
        ),
        ({"masks": {"first": np.ones((8, 16))}}, ValueError, "the mask of first: .* which is its transpose"),
        ({"masks": {"last": np.full((4, 16), 0.5), "first": np.ones((16, 8))}}, ValueError, "the mask of last: .* 0.5"),
        ({"include": "nonesuch.*"}, ValueError, "include='nonesuch.*' means none of"),
        ({"model": nn.ReLU()}, ValueError, "no weight to mask in ReLU"),
        ({"model": [1]}, TypeError, "takes a torch.nn.Module; got list"),
    ],
)
def test_what_cannot_be_masked_is_refused(model: Network, change: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mask_model(**({"model": model} | change))
    assert masked(model) == []


def test_an_optimizer_that_was_there_goes_on(model: Network, x: Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
    mask_model(model)
    prune_model(model, 0.5)
    freeze_masked(optimizer, model)
    held = {
        name: layer.weight[~layer.mask].clone() for name, layer in named(model) if name not in ("blocks.1.0", "tied")
    }
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(layer.weight[~layer.mask], held[name]) for name, layer in named(model) if name in held)


def named(model: nn.Module) -> list[tuple[str, MaskedLinear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, MaskedLinear)]


def test_pruning_is_the_cores_and_can_be_taken_back(model: Network, x: Tensor) -> None:
    mask_model(model)
    start, weights = model(x), copy.deepcopy(model.state_dict())
    before = prune_model(model, 0.6)
    parts = {name: layer.full_weight for name, layer in named(model) if name != "tied"} | {
        "attention.in_proj_weight": model.attention.in_proj_weight,
        "attention.out_proj": model.attention.out_proj.weight,
    }
    scores = {name: pruning.magnitude(parts[name].detach()) for name in get_masks(model) if name in parts}
    wanted = pruning.prune(scores, sparsity=0.6)
    assert all((get_masks(model)[name].numpy() == mask).all() for name, mask in wanted.items())
    assert torch.equal(model.tied.mask, model.blocks[1][0].mask)  # type: ignore[union-attr, index, arg-type]
    middle = get_masks(model)
    y = model(x)
    prune_model(model, 0.8, scope="layer")
    assert summary(model).sparsity == pytest.approx(0.8, abs=0.01)
    set_masks(model, middle)
    assert torch.equal(model(x), y)
    set_masks(model, before)
    assert torch.equal(model(x), start)
    assert all(torch.equal(part, weights[name]) for name, part in model.state_dict().items())
    model(x).square().mean().backward()
    prune_model(model, 0.5, score="snip", include="last")
    assert [round(layer.sparsity, 2) for _, layer in named(model)] == [0, 0, 0, 0, 0.5]
    prune_model(model, 0.25, score=lambda weight, gradient: -weight.abs(), scope="erdos_renyi", include="first")
    assert model.first.sparsity == 0.25  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="the mask of first"):
        set_masks(model, {"first": torch.ones(3, 3)})
    with pytest.raises(ValueError, match="must be of layers"):
        set_masks(model, {"nonesuch": torch.ones(3, 3)})


def test_pruning_that_cannot_be_done_leaves_the_model_alone(model: Network) -> None:
    with pytest.raises(ValueError, match="there is none: make them with mask_model"):
        prune_model(model, 0.5)
    mask_model(model)
    before = get_masks(model)
    for options, message in (
        ({"sparsity": 1.0}, "must keep a connection"),
        ({"sparsity": 1.5}, r"in \[0, 1\]"),
        ({"sparsity": 0.5, "score": "snip"}, "needs the gradient of each weight; first has none"),
        (
            {"sparsity": 0.5, "score": "size"},
            "score must be one of 'magnitude', 'random', 'snip', 'taylor', a function, or scores by name",
        ),
        ({"sparsity": 0.5, "score": lambda w, g: w * float("nan")}, "got NaN"),
        ({"sparsity": 0.5, "include": "x"}, "there is none"),
        (
            {"sparsity": 0.5, "score": lambda w, g: w[:1]},
            r"scores must have their weight's shape .* got \(1, 8\) of first",
        ),
        (
            {"sparsity": 0.5, "score": {"first": torch.ones(16, 8)}},
            "scores, which each layer must have, must be of layers",
        ),
        ({"sparsity": 0.5, "score": {"nonesuch": torch.ones(16, 8)}}, "scores must be of layers that there are"),
    ):
        with pytest.raises(ValueError, match=message):
            prune_model(model, **options)  # type: ignore[arg-type]
    assert all(torch.equal(mask, before[name]) for name, mask in get_masks(model).items())


def test_scores_by_gradient_say_what_to_do_about_frozen_weights(model: Network, x: Tensor) -> None:
    mask_model(model)
    for name in ("first", "last"):
        model.get_submodule(name).requires_grad_(False)
    model(x).square().mean().backward()
    before = get_masks(model)
    for score in ("snip", "taylor"):
        with pytest.raises(
            ValueError, match=r"frozen ones \(requires_grad=False\) get none: first, last: .*include=\.\.\."
        ):
            prune_model(model, 0.5, score=score)  # type: ignore[arg-type]
    assert all(torch.equal(mask, before[name]) for name, mask in get_masks(model).items())
    prune_model(
        model, 0.5, score="snip", include=["blocks.*", "attention.*", "tied"]
    )  # the first remedy, and the other:
    for name in ("first", "last"):
        model.get_submodule(name).requires_grad_(True)
    model.zero_grad()
    model(x).square().mean().backward()
    prune_model(model, 0.6, score="taylor")
    assert summary(model).sparsity == pytest.approx(0.6, abs=0.01)


def test_layers_that_share_a_weight_share_its_mask(model: Network, x: Tensor) -> None:
    half = masks.random((16, 16), sparsity=0.5, seed=0)
    mask_model(model, {"tied": half}, include="blocks.1.*")
    assert torch.equal(get_masks(model)["blocks.1.0"], torch.tensor(half))
    with pytest.raises(ValueError, match=r"one mask, whoever shares it; got different ones for tied and blocks.1.0"):
        set_masks(model, {"tied": half, "blocks.1.0": ~half})
    y = model(x)
    unmask_model(model)
    assert torch.equal(model(x), y)
    with pytest.raises(ValueError, match=r"one mask, whoever shares it"):
        mask_model(model, {"tied": half, "blocks.1.0": ~half})


def test_a_weight_that_an_embedding_uses_too_acts_masked_there() -> None:
    head, embedding = nn.Linear(4, 6), nn.Embedding(6, 4)
    head.weight = embedding.weight  # type: ignore[assignment]
    before = embedding.weight.detach().clone()
    model = mask_model(nn.ModuleDict({"head": head, "embedding": embedding}), {"head": np.eye(6, 4)})
    assert torch.equal(embedding.weight, before * torch.eye(6, 4))
    unmask_model(model)
    assert torch.equal(embedding.weight, before * torch.eye(6, 4)), "the outputs stay"


def test_layers_whose_weight_is_computed_stay_masked() -> None:
    model = nn.Sequential(MaskedLinear(4, 4), MaskedLinear(4, 4))
    for layer in model:
        nn.utils.parametrizations.weight_norm(layer)
    unmask_model(model)
    assert all(isinstance(layer, MaskedLinear) for layer in model)


def test_the_report_counts_what_is_live_and_dead() -> None:
    mask = np.array([[True, False, True], [False, False, False]])
    model = nn.Sequential(MaskedLinear(3, 2, mask=mask), SparseLinear(3, 2, mask=mask, bias=False))
    found = summary(model)
    for row, form, nbytes in zip(
        found.rows, ("dense", "sparse"), (6 * 4 + 2 * 4 + 6 + 6 * 4, 4 * (2 + 3 + 2 + 4 + 2 + 2)), strict=True
    ):
        assert (row.form, row.shape, row.connections) == (form, (2, 3), 2)
        assert (row.dead_outputs, row.dead_inputs, row.nbytes) == (1, 1, nbytes)
    assert [row.flops for row in found.rows] == [12, 4]
    assert found.sparsity == pytest.approx(8 / 12)
    lines = str(found).splitlines()
    assert " ".join(lines[0].split()) == "weight form shape live sparsity dead outputs dead inputs KiB kFLOP a row"
    assert lines[1].split()[:6] == ["0", "dense", "2", "x", "3", "2"]
    assert lines[3].split()[:3] == ["all", "4", "0.6667"]
    assert lines[4:] == [
        "Of all weights 0.6667, of the whole model 0.5714 is masked.",
        "not masked  numbers  parameters",
        "bias        2        0.bias",
    ]
    assert str(summary(nn.ReLU())).splitlines()[-1].startswith("all")


def test_a_masked_model_can_be_compressed(model: Network, x: Tensor) -> None:
    mask_model(model, include=["first", "last"])
    prune_model(model, 0.9, scope="layer")
    y = model(x)
    compress(model, "sparse")
    torch.testing.assert_close(model(x), y)
    assert {row.form for row in summary(model).rows} == {"sparse"}


def test_meta_layers_are_masked_before_they_have_values() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(5, 6))
    mask = masks.random((6, 5), sparsity=0.5, seed=7)
    mask_model(model, {"0": mask})
    model.to_empty(device="cpu")
    model[0].reset_parameters()  # type: ignore[operator]
    assert (model[0].mask.numpy() == mask).all()  # type: ignore[union-attr, operator]


def test_movement_adds_up_over_steps_and_prunes_by_name() -> None:
    torch.manual_seed(0)
    model = mask_model(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)))
    scores: dict[str, Any] = {}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 8)).square().mean().backward()
        for name in get_masks(model):
            layer: Any = model.get_submodule(name)
            scores[name] = pruning.movement(layer.weight, layer.weight.grad, scores.get(name))
        optimizer.step()
    prune_model(model, 0.5, score=scores)
    wanted = pruning.prune(scores, sparsity=0.5)
    for name, mask in get_masks(model).items():
        assert (mask.numpy() == wanted[name]).all()
