"""``check_masks``: what it finds in models that do not act masked, and what it leaves as it was."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import prune

from maskedlinear.models import MaskCheck
from maskedlinear.torch import MaskedLinear, check_masks, compress, mask_model, prune_model

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


class Two(nn.Module):
    """Two layers side by side; what becomes of the first is up to a subclass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        prune_model(mask_model(self), 0.5, scope="layer")

    def first(self, x: Tensor) -> Tensor:
        return self.a(x)

    def forward(self, x: Tensor) -> Any:
        return self.first(x) + self.b(x)


class ReadsDormant(Two):
    def first(self, x: Tensor) -> Tensor:
        return F.linear(x, self.a.full_weight)  # type: ignore[arg-type]


class KnowsPlain(Two):
    def first(self, x: Tensor) -> Tensor:
        return self.a(x) * (2 if type(self.a) is nn.Linear else 1)


class InTraining(Two):
    def first(self, x: Tensor) -> Tensor:
        return self.a(x) + (self.a.full_weight.sum() if self.training else 0)  # type: ignore[operator]


class InGradient(Two):
    """Only a gradient is wrong."""

    def first(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if y.requires_grad:
            factor = self.a.full_weight.sum()  # type: ignore[operator]
            y.register_hook(lambda g: g * factor)
        return y


def test_a_masked_model_is_found_to_act_masked() -> None:
    check = check_masks(Two(), X)
    assert check == MaskCheck(["a", "b"], {})
    assert check.ok
    assert str(check) == "All 2 masked layers act masked."


PLAIN, NAN = "a plain module with its weights acts otherwise", "NaN in place of its dormant values acts"


@pytest.mark.parametrize(
    ("model", "failures"),
    [
        (KnowsPlain, [f"{PLAIN} in training mode", f"{PLAIN} in evaluation mode"]),
        (
            ReadsDormant,
            [f"{what} in {mode} mode" for mode in ("training", "evaluation") for what in (NAN, PLAIN)],
        ),
        (InTraining, [f"{NAN} in training mode", f"{PLAIN} in training mode"]),
        (InGradient, [f"{NAN} in training mode: gradient of a.weight differs", f"{PLAIN} in training mode"]),
    ],
)
def test_the_layer_and_the_mode_in_which_something_leaks_are_named(model: type[Two], failures: list[str]) -> None:
    check = check_masks(model(), X)
    assert not check.ok
    assert list(check.failures) == ["a"]
    for failure, expected in zip(check.failures["a"], failures, strict=True):
        assert failure.startswith(expected)
    assert str(check).splitlines()[0].split() == ["layer", "what", "does", "not", "hold"]
    assert str(check).splitlines()[-1] == "1 of 2 masked layers do not act masked."


def test_what_stands_under_a_mask_is_reported_before_it_is_mended() -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, weight_decay=0.1)
    model(X).sum().backward()
    optimizer.step()
    model.b.weight.data[~model.b.mask] = -0.0  # type: ignore[index, operator]
    model.a.weight.data[~model.a.mask] = torch.nan  # type: ignore[index, operator]
    check = check_masks(model, X)
    assert check.failures == {
        "a": ["weight is not +0 in 32 masked places, but up to nan"],
        "b": ["weight is not +0 in 32 masked places, but up to 0"],
    }
    assert check_masks(model, X).ok


def test_a_gradient_that_is_not_masked_is_found() -> None:
    model = Two()
    model.b.weight.register_hook(lambda g: g + 1)
    assert check_masks(model, X).failures == {"b": ["gradient is not +0 in 32 masked places, but up to 1"]}


class Everything(nn.Module):
    """Dropout, drawn from three generators, buffers that move, a frozen layer and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.a.requires_grad_(False)

    def forward(self, x: Tensor, *, scale: float) -> Any:
        y = self.drop(self.norm(self.b(self.a(x)))) * scale
        if self.training:
            y = y * random.random() + np.random.rand()
        return y


def test_everything_is_left_as_it_was() -> None:
    model = copy.deepcopy(mask_model(Everything()))
    prune_model(model, 0.5)
    model.norm.eval()  # type: ignore[union-attr]
    x = X.clone().requires_grad_()
    model(x, scale=2.0).sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    drawn = [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()]  # type: ignore[index, union-attr]
    known = [layer._own.copied for layer in model.modules() if isinstance(layer, MaskedLinear)]
    with torch.no_grad():
        assert check_masks(model, x, scale=2.0).ok
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is grads[name] for name, parameter in model.named_parameters())
    assert not model.a.weight.requires_grad  # type: ignore[union-attr]
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(torch.get_rng_state(), drawn[0])
    assert random.getstate() == drawn[1]
    assert (np.random.get_state()[1] == drawn[2]).all()  # type: ignore[index]
    assert known == [layer._own.copied for layer in model.modules() if isinstance(layer, MaskedLinear)]
    assert torch.equal(x, X)
    model.eval()
    assert check_masks(model, x, scale=2.0).ok
    assert not model.training


@dataclass
class Output:
    first: Tensor
    rest: dict[str, Any]


@pytest.mark.parametrize("make", [tuple, list, lambda pair: Output(pair[0], {"parts": [None, 3, pair[1]]})])
def test_outputs_of_every_structure_are_compared(make: Callable[[list[Tensor]], Any]) -> None:
    class Structured(ReadsDormant):
        def forward(self, x: Tensor) -> Any:
            return make([self.b(x), self.first(x)])

    failures = check_masks(Structured(), X).failures
    assert f"{NAN} in evaluation mode: output 1 differs" in failures["a"]
    assert list(failures) == ["a"]


def test_layers_that_are_to_blame_together_are_named_together() -> None:
    class Together(Two):
        def forward(self, x: Tensor) -> Tensor:
            plain = type(self.a) is type(self.b) is nn.Linear
            return super().forward(x) * (2 if plain else 1)  # type: ignore[no-any-return]

    assert list(check_masks(Together(), X).failures) == ["a", "b"]


def test_of_a_model_that_is_not_deterministic_nan_is_seen() -> None:
    generator = torch.Generator().manual_seed(0)

    class Noisy(Two):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.randn(8, generator=generator)  # type: ignore[no-any-return]

    class NoisyReader(Noisy, ReadsDormant):
        pass

    with pytest.warns(UserWarning, match=r"two calls of the model in \w+ mode, .* differ"):
        assert check_masks(Noisy(), X).ok
    with pytest.warns(UserWarning, match=r"two calls of the model in \w+ mode, .* differ"):
        failures = check_masks(NoisyReader(), X).failures
    assert list(failures) == ["a"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_shared_computed_and_own_layers_are_checked_in_every_dtype(dtype: torch.dtype) -> None:
    class Own(MaskedLinear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    torch.manual_seed(0)
    mask = torch.rand(8, 8) < 0.5
    model = nn.Sequential(*(MaskedLinear(8, 8, mask=mask) for _ in range(4)), Own(8, 8, mask=mask))
    model[1].weight = model[0].weight
    nn.utils.parametrizations.weight_norm(model[2])
    prune.random_unstructured(model[3], "weight", 0.5)
    model.to(dtype)
    check = check_masks(model, X.to(dtype))
    assert check.ok, str(check)
    assert check.checked == ["0", "1", "2", "3", "4"]


def test_what_cannot_be_checked_is_refused() -> None:
    with pytest.raises(TypeError, match=r"check_masks takes a torch\.nn\.Module; got Tensor"):
        check_masks(X)  # type: ignore[arg-type]
    sparse = compress(nn.Sequential(MaskedLinear(8, 8)), "sparse")
    for model in (nn.Linear(8, 8), sparse):
        with pytest.raises(ValueError, match=r"this model has none: make them with mask_model\(model\)"):
            check_masks(model, X)
    with pytest.raises(ValueError, match="got a model on the meta device"):
        check_masks(MaskedLinear(8, 8, device="meta"), X)

    class Text(Two):
        def forward(self, x: Tensor) -> Any:
            return "text"

    with pytest.raises(ValueError, match="compares the tensors that a model returns; got none in a str"):
        check_masks(Text(), X)
    model = mask_model(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as error:
        check_masks(model, X[:1])
    assert "This was in training mode" in error.value.__notes__[0]
    assert model.training
