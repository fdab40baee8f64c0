"""Edits at odd moments: between a backward pass and its step, past everything that counts, before an export, in copies."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import maskedlinear_torch
from maskedlinear import masks
from maskedlinear.torch import MaskedLinear, freeze_masked, mask_model, prune_model
from maskedlinear_torch._storage import GradientMask, zero_masked

PRIVATE = re.compile(
    r"(?<!\w)torch\._(?!dynamo\b)[a-zC]|_functorch|_(forward|backward|state_dict|load_state_dict)\w*_hooks|_current_level|_get_active"
)
SIZES = [(12, 10), (160, 130)]  # for which a layer takes different ways


@pytest.fixture(params=SIZES, ids=["small", "large"])
def layer(request: pytest.FixtureRequest) -> MaskedLinear:
    torch.manual_seed(0)
    in_, out = request.param
    return MaskedLinear(in_, out, mask=masks.random((out, in_), sparsity=0.5, seed=0))


def test_private_names_of_torch_stand_in_one_file() -> None:
    root = Path(maskedlinear_torch.__file__).parent
    public = re.compile(r"\.(register|remove)_\w+|_foreach_\w+")
    files = {
        file.name for file in root.rglob("*.py") if PRIVATE.search(public.sub("", file.read_text(encoding="utf-8")))
    }
    assert files == {"_compat.py"}


def error(layer: MaskedLinear, x: Tensor) -> float:
    with torch.no_grad():
        y = layer(x)
        return float((y - linear(x, torch.where(layer.mask, layer.weight, 0), layer.bias)).abs().max())


def x_of(layer: MaskedLinear) -> Tensor:
    return torch.randn(8, layer.in_features, generator=torch.Generator().manual_seed(0))


def add_to_gradient(layer: MaskedLinear) -> None:
    layer.weight.grad.data.add_(1.0)  # type: ignore[union-attr]


def add_to_gradient_in_numpy(layer: MaskedLinear) -> None:
    layer.weight.grad.numpy()[:] += 1  # type: ignore[union-attr]


BETWEEN: dict[str, Callable[[MaskedLinear], Any]] = {
    "set_mask": lambda layer: layer.set_mask(layer.mask.roll(1, 0)),
    "an edited mask": lambda layer: layer.mask[:5].logical_not_(),
    "pruning": lambda layer: prune_model(layer, 0.7, score="taylor"),
    "a gradient's data": add_to_gradient,
    "a gradient in NumPy": add_to_gradient_in_numpy,
    "a weight's data": lambda layer: layer.weight.data.add_(1.0),
}


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("edit", BETWEEN)
def test_nothing_acts_that_is_edited_between_backward_and_step(layer: MaskedLinear, edit: str, guarded: bool) -> None:
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    if guarded:
        freeze_masked(optimizer, layer)
    x = x_of(layer)
    for step in range(6):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        if step in (2, 4):
            BETWEEN[edit](layer)
        optimizer.step()
        if guarded:
            assert not layer.weight[~layer.mask].any(), "for every reader"
        assert error(layer, x) < 1e-4


@pytest.mark.parametrize("again", [lambda layer: layer.mask.copy_(layer.mask.clone()), lambda layer: None])
def test_drift_is_never_taken_for_what_is_dormant(layer: MaskedLinear, again: Callable[[MaskedLinear], Any]) -> None:
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    full, x = layer.full_weight, x_of(layer)
    dormant = ~layer.mask
    layer.set_mask(torch.ones_like(layer.mask))
    for step in range(6):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
        if step == 2:
            layer.mask[dormant] = False
            layer(x)
            full = layer.full_weight
        if step == 4:
            layer.mask[0] = False
        again(layer)
    layer(x)
    assert torch.equal(layer.full_weight[dormant], full[dormant])


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("edit", [lambda layer: layer.weight.add_(1), lambda layer: layer.mask[0].zero_()])
def test_what_is_exported_after_an_edit_acts_masked(layer: MaskedLinear, edit: Any, strict: bool) -> None:
    model, x = nn.Sequential(layer).eval(), x_of(layer)
    model(x)
    with torch.no_grad():
        edit(layer)
    exported = torch.export.export(model, (x,), strict=strict).module()
    torch.testing.assert_close(exported(x), model(x))


def test_a_state_may_stand_in_a_functional_call(layer: MaskedLinear) -> None:
    x, dormant = x_of(layer), layer.dormant
    full = MaskedLinear(layer.in_features, layer.out_features)
    for one in (layer, full):
        assert torch.equal(torch.func.functional_call(one, one.state_dict(), (x,)), one(x))
    assert layer.dormant is dormant
    assert full.dormant is None


def test_what_is_let_go_does_not_come_back(layer: MaskedLinear) -> None:
    mask = layer.mask.clone()
    layer.keep_dormant = False
    layer.set_mask(torch.ones_like(mask))
    with torch.no_grad():
        layer.weight.fill_(9.0)
    layer.set_mask(mask)
    layer.set_mask(torch.ones_like(mask))
    assert not layer.weight[~mask].any()
    layer.load_state_dict(MaskedLinear(layer.in_features, layer.out_features, mask=mask).state_dict())
    assert layer.dormant is None


def test_a_gradient_that_took_the_place_of_another_is_masked(layer: MaskedLinear) -> None:
    x = x_of(layer).requires_grad_()
    for _ in range(20):
        layer.weight.grad = None
        y = layer(x)
        torch.autograd.grad(y.sum(), x)  # whatever it computes beside, it gives back
        del y
        sum(((layer.weight * (place + 1)).sum() for place in range(3)), torch.zeros(())).backward()
        assert layer.weight.grad is not None
        assert not layer.weight.grad[~layer.mask].any()


def test_a_gradient_that_the_layer_has_masked_is_not_masked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = MaskedLinear(160, 130, mask=masks.random((130, 160), sparsity=0.5))
    given: list[Any] = []
    hook = GradientMask.__call__
    monkeypatch.setattr(GradientMask, "__call__", lambda self, g: (given.append(hook(self, g)), given[-1])[1])
    for _ in range(3):
        layer(x_of(layer)).sum().backward()
    assert len(given) == 3
    assert all(gradient is None for gradient in given)


def test_gradients_are_masked_of_what_was_frozen_and_of_what_was_copied(layer: MaskedLinear) -> None:
    model = nn.Sequential(nn.Linear(layer.in_features, layer.out_features)).requires_grad_(False)
    mask_model(model)
    prune_model(model, 0.5)
    model.train()
    x = x_of(layer)
    model(x)
    model.requires_grad_(True)
    model(x)
    shallow = copy.copy(layer)
    del shallow
    for one in (model[0], layer):
        (one.weight * 3).sum().backward()  # type: ignore[operator, union-attr]
        assert not one.weight.grad[~one.mask].any()  # type: ignore[index, union-attr]


def test_a_live_zero_stays_one_in_a_state(layer: MaskedLinear) -> None:
    live = tuple(layer.mask.nonzero()[0])
    with torch.no_grad():
        layer.weight[live] = 0.0
    layer.load_state_dict({"dormant": torch.full_like(layer.weight, 7.0)}, strict=False)
    other = MaskedLinear(layer.in_features, layer.out_features)
    other.load_state_dict(layer.state_dict())
    assert other.weight[live] == 0
    assert (other.full_weight[~layer.mask] == 7).all()
    other.load_state_dict({**layer.state_dict(), "dormant": torch.full_like(layer.weight, 5.0)})
    assert other.weight[live] == 0


def test_a_tensor_whose_sign_is_a_flag_is_masked() -> None:
    mask = torch.rand(80, 80) < 0.5
    negative = torch.randn(80, 80, dtype=torch.complex64).conj().imag
    want = torch.where(mask, negative.clone(), 0)
    assert negative.is_neg()
    assert torch.equal(zero_masked(negative, mask), want)
