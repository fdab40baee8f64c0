"""Connections on paths of models that are no chains, against what a change of each connection does to the outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from maskedlinear.torch import MaskedLinear, compress, get_masks, mask_model, set_masks, summary, unmask_model


class Residual(nn.Module):
    """Sums over nodes and an in-place one, a normed branch, and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.twice = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 8)
        self.norm, self.scale = nn.BatchNorm1d(8), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.a(x))
        y = self.norm(self.b(torch.relu(x))) * self.scale
        y += x
        y = self.twice(torch.tanh(self.twice(y))) + 0.5
        return self.c(y / 3)


class Convolutions(nn.Module):
    """Windows, pools of maxima, groups, a residual sum and a flattened end."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=2, padding_mode="circular")
        self.norm, self.end, self.active = nn.BatchNorm2d(6), nn.Linear(6 * 4, 3), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.active(self.norm(self.a(x)))
        x = F.max_pool2d(x + self.b(x), 2)
        return self.end(torch.cat([x.mean(dim=3, keepdim=True), torch.ones(len(x), 6, 2, 1)], dim=3).flatten(1))


def mask_of(shape: Any, sparsity: float, seed: int) -> Any:
    return np.random.default_rng(seed).random(tuple(shape)) >= sparsity


def thinned(model: nn.Module, sparsity: float, seed: int) -> Any:
    mask_model(model)
    shapes = enumerate(get_masks(model).items(), seed)
    return set_masks(model, {name: mask_of(mask.shape, sparsity, number) for number, (name, mask) in shapes}) or model


def by_change(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Count the connections that change how outputs depend on inputs, of a plain model with positive weights and no biases,
    in which nothing hides a path."""
    live, plain = get_masks(model), unmask_model(copy.deepcopy(model)).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "bias" in name:
                parameter.zero_()
            elif (mask := live.get(name.removesuffix(".weight"))) is not None:
                parameter.copy_((torch.rand(mask.shape, generator=generator) + 0.1) / 10 * mask)
    x = torch.rand((32, *shape[1:]), generator=generator, dtype=torch.float64).requires_grad_()
    out = plain(x)
    direction = torch.rand(out.shape, generator=generator, dtype=torch.float64)
    (slope,) = torch.autograd.grad((out * direction).sum(), x, create_graph=True)
    weights = [plain.get_submodule(name).weight for name in live]
    gradients = torch.autograd.grad((slope * torch.rand_like(slope)).sum(), weights, materialize_grads=True)
    return sum(int((mask & (own != 0)).sum()) for mask, own in zip(live.values(), gradients, strict=True))


@pytest.mark.parametrize(
    ("make", "shape"), [(Residual, (3, 6)), (Convolutions, (2, 2, 4, 4))], ids=["residual", "convolutions"]
)
def test_paths_are_those_along_which_a_change_is_seen(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    for sparsity in (0.3, 0.7, 0.85):
        torch.manual_seed(0)
        model, x = thinned(make(), sparsity, int(100 * sparsity)), torch.randn(shape)
        state, table = copy.deepcopy(model.state_dict()), summary(model, x)
        assert table.effective_connections == by_change(model, shape), table
        assert "lie on a path" in str(table)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert model.training


def test_one_pass_counts_as_the_chain_does_in_both_forms() -> None:
    layers = [MaskedLinear(i, o, mask=mask_of((o, i), 0.8, o)) for i, o in ((12, 20), (20, 16), (16, 5))]
    chain = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.Dropout(), layers[2])

    class Own(nn.Module):
        def __init__(self, chain: nn.Module) -> None:
            super().__init__()
            self.chain = chain

        def forward(self, x: Tensor) -> Tensor:
            return self.chain(x)

    expected = summary(chain).effective_connections
    assert expected is not None
    assert expected < summary(chain).rows[0].size
    assert summary(Own(chain)).effective_connections is None
    assert summary(Own(chain), torch.randn(2, 12)).effective_connections == expected
    sparse = compress(Own(chain), "sparse")
    assert summary(sparse, torch.randn(2, 12)).effective_connections == expected


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.place, self.mix = (
            nn.Embedding(9, 8),
            nn.Parameter(torch.zeros(5, 8)),
            nn.MultiheadAttention(8, 2),
        )
        self.norm, self.up, self.head = nn.LayerNorm(8), nn.Linear(8, 4), nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        x = self.table(tokens) + self.place
        x = x + self.mix(x.mT.mT, x, x)[0]
        return {"logits": self.head(F.silu(self.up(self.norm(x))))}


def test_attention_is_followed_and_dead_values_are_found() -> None:
    torch.manual_seed(0)
    model = mask_model(Attention(), include=["mix*", "up", "head"])
    masks = {name: torch.ones_like(mask) for name, mask in get_masks(model).items()}
    tokens = torch.arange(5)
    masks["up"][1] = 0  # 8 go
    masks["head"][:, 2] = 0  # 2 go, and then the 8 that lead there
    masks["mix.out_proj"][:, :4] = 0  # 32 go, and then all of the first head: 3 · 4 · 8
    set_masks(model, masks)
    live = sum(int(mask.sum()) for mask in masks.values())
    assert summary(model, tokens).effective_connections == live - 8 - 2 - 96


def test_what_is_not_followed_is_said() -> None:
    class Odd(nn.Module):
        def __init__(self, function: Any) -> None:
            super().__init__()
            self.a, self.function = MaskedLinear(4, 4), function

        def forward(self, x: Tensor) -> Tensor:
            return self.function(self.a(x))

    for function, why in (
        (lambda y: torch.fft.rfft(y), "nobody knows what fft_rfft does to paths"),
        (lambda y: y if y.sum() > 0 else -y, "nobody knows what gt does to paths"),
        (lambda y: y.unflatten(-1, (2, 2)).add_(y[:, :2, None]), "memory that others share"),
        (lambda y: torch.no_grad()(torch.relu)(y), "the model calls relu under torch.no_grad()"),
        (lambda y: torch.zeros(3), "returns no tensor of floats that depends on its inputs"),
        (lambda y: y @ torch.ones(3, 3), "cannot be called so: RuntimeError"),
    ):
        table = summary(Odd(function), torch.randn(2, 4))
        assert table.effective_connections is None
        assert why in table.why_unknown
        assert f"is not known: {table.why_unknown}" in str(table)
