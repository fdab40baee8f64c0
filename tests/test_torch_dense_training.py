"""Sparse weights that are computed of dense parameters, which train: SR-STE and Top-KAST in PyTorch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from helpers import in_processes
from maskedlinear import pruning
from maskedlinear.torch import (
    MaskedLinear,
    StraightThrough,
    TopKAST,
    get_masks,
    mask_model,
    prune_model,
    set_masks,
    summary,
)

ORIGINAL = "parametrizations.weight.original"


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)).double()


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 4, 6, 6, dtype=torch.float64, generator=random), torch.randint(0, 4, (8,), generator=random))
        for _ in range(steps)
    ]


def two_of_four(weight: Tensor) -> Tensor:
    """By the paper: of each four successive inputs, of a convolution's channels, the two largest."""
    last = weight.movedim(1, -1)
    groups = last.abs().reshape(-1, 4)
    kept = torch.zeros_like(groups).scatter(1, groups.argsort(dim=1, stable=True)[:, 2:], 1)
    return kept.reshape(last.shape).movedim(-1, 1)


def run(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    hidden = F.conv2d(x, weights["0.weight"], weights["0.bias"]).relu().flatten(1)
    return F.linear(hidden, weights["3.weight"], weights["3.bias"])


def train_by_hand(steps: int, sparse: Any, penalty: Any) -> dict[str, Tensor]:
    """Train leaves by SGD with momentum, whose gradient is that of the loss at the sparse weights plus the penalty."""
    leaves = {name: value.detach().clone() for name, value in network().named_parameters()}
    optimizer = torch.optim.SGD([value.requires_grad_() for value in leaves.values()], lr=0.1, momentum=0.9)
    for step, (x, y) in enumerate(batches(steps)):
        at = {
            name: (sparse(name, value, step) if "weight" in name else value).detach().requires_grad_()
            for name, value in leaves.items()
        }
        F.cross_entropy(run(at, x), y).backward()
        for name, value in leaves.items():
            gradient: Any = at[name].grad
            value.grad = penalty(name, value.detach(), gradient) if "weight" in name else gradient
        optimizer.step()
    return leaves


def train(model: nn.Module, method: Any, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x, y in batches(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if isinstance(method, TopKAST):
            method.step()


def assert_same(model: nn.Module, expected: dict[str, Tensor]) -> None:
    own = {name.replace(ORIGINAL, "weight"): value for name, value in model.named_parameters()}
    for name, value in expected.items():
        torch.testing.assert_close(own[name], value, rtol=1e-9, atol=1e-9)


def test_straight_through_is_the_papers_on_linear_layers_and_convolutions() -> None:
    decay, model = 0.01, network()
    method = StraightThrough(model, n_of_m=(2, 4), decay=decay)
    train(model, method, 12)
    expected = train_by_hand(
        12,
        lambda name, value, step: two_of_four(value) * value,
        lambda name, value, gradient: gradient + decay * (1 - two_of_four(value)) * value,
    )
    assert_same(model, expected)
    linear = model[3].parametrizations.weight.original.detach()
    assert np.array_equal(method.masks["3"], pruning.n_of_m(linear.abs().numpy(), 2, 4))
    assert torch.equal(model[3].weight != 0, method.masks["3"])


def test_top_kast_is_the_papers() -> None:
    penalty, live, trained, model = 0.01, 0.1, 0.3, network()
    sets: dict[str, tuple[Tensor, Tensor]] = {}

    def largest(value: Tensor, share: float) -> Tensor:
        zeros = int((1 - share) * value.numel())
        return torch.ones_like(value.flatten()).index_fill(0, value.abs().flatten().argsort(stable=True)[:zeros], 0)

    def sparse(name: str, value: Tensor, step: int) -> Tensor:
        if step % 4 == 0:
            sets[name] = tuple(largest(value.detach(), share).reshape(value.shape) for share in (live, trained))
        return sets[name][0] * value

    def penalized(name: str, value: Tensor, gradient: Tensor) -> Tensor:
        a, b = sets[name]
        return b * gradient + penalty * a * value + penalty / a.mean() * (b - a) * value

    method = TopKAST(model, forward_sparsity=0.9, backward_sparsity=0.7, every=4, penalty=penalty)
    begun = method.masks["3"]
    train(model, method, 12)
    assert_same(model, train_by_hand(12, sparse, penalized))
    assert not torch.equal(method.masks["3"], begun)  # others have taken places
    dense: Any = model[3]
    resumed = network()
    again = TopKAST(resumed, forward_sparsity=0.9, backward_sparsity=0.7, every=4)
    resumed.load_state_dict(model.state_dict())
    again.load_state_dict(method.state_dict())
    assert again.steps == 12
    assert all(torch.equal(mask, again.masks[name]) for name, mask in method.masks.items())
    assert torch.equal(resumed[3].weight, dense.weight)


@pytest.mark.parametrize("how", ["straight_through", "top_kast"])
def test_finished_weights_are_ordinary_masked_ones(how: str) -> None:
    model = network()
    parameters = set(map(id, model.parameters()))
    method: Any = (
        StraightThrough(model, sparsity=0.8)
        if how == "straight_through"
        else TopKAST(model, forward_sparsity=0.8, backward_sparsity=0.5, every=2)
    )
    assert set(map(id, model.parameters())) == parameters  # an optimizer made before holds them
    train(model, method, 3)
    assert "finish()" in str(summary(model))
    (x, _), *_ = batches(1)
    outputs, masks, dense = model(x), method.masks, model[3].parametrizations.weight.original.detach().clone()
    shown = get_masks(model)
    assert shown.keys() == masks.keys()
    assert all(torch.equal(mask, masks[name]) for name, mask in shown.items())
    with pytest.raises(ValueError, match=r"cannot be set: \w+ chooses it, until finish"):
        set_masks(model, shown)
    copied = copy.deepcopy(model)
    assert method.finish() is model
    assert torch.equal(model(x), outputs)
    assert torch.equal(copied(x), outputs)
    assert torch.equal(method.finish(copied)(x), outputs)
    assert type(copied[3]) is MaskedLinear
    assert type(model[3]) is MaskedLinear
    assert torch.equal(model[3].full_weight, dense)  # what was inactive is dormant
    assert all(torch.equal(mask, masks[name]) for name, mask in get_masks(model).items())
    assert set(map(id, model.parameters())) == parameters
    plain = network()
    plain.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(plain(x), outputs)
    prune_model(model, 0.9)
    assert summary(model).sparsity == pytest.approx(0.9, abs=0.01)
    for again in (None, copied):
        with pytest.raises(ValueError, match="finished"):
            method.finish(again)


def test_recurrent_modules_are_copied_and_averaged_after_a_pass() -> None:
    for make in (StraightThrough, lambda model, **how: TopKAST(model, forward_sparsity=0.5, backward_sparsity=0.2)):
        model, x = nn.LSTM(3, 4, num_layers=2), torch.randn(5, 3)
        method: Any = make(model, sparsity=0.5)
        model(x)[0].sum().backward()
        copied, average = copy.deepcopy(model), torch.optim.swa_utils.AveragedModel(model)
        before = model(x)[0]
        assert torch.equal(copied(x)[0], before)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.mul_(2)
        assert not torch.equal(copied(x)[0], before)
        assert torch.equal(model(x)[0], before)
        assert torch.equal(method.finish(average)(x)[0], before)
        assert torch.equal(copy.deepcopy(method.finish())(x)[0], before)


def test_the_decay_takes_the_scale_of_the_loss() -> None:
    layer = nn.Linear(8, 4, bias=False)
    StraightThrough(layer, sparsity=0.5, decay=0.5, loss_scale=lambda: 1024)
    (layer(torch.zeros(1, 8)).sum() * 1024).backward()
    dense: Any = layer.parametrizations
    expected = torch.where(layer.weight == 0, dense.weight.original, 0) * 0.5
    assert torch.equal(dense.weight.original.grad / 1024, expected)


def test_ties_nan_and_half_types_are_as_pruning_has_them() -> None:
    random = torch.Generator().manual_seed(0)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        layer = nn.Linear(16, 8, bias=False, dtype=dtype)
        with torch.no_grad():
            layer.weight.copy_(torch.randint(-3, 4, (8, 16), generator=random))
            layer.weight[0, :4] = 1e-7 if dtype is torch.float16 else 1e-39  # subnormal
        expected = pruning.prune(layer.weight.detach().double().abs().numpy(), sparsity=0.6)
        assert np.array_equal(StraightThrough(layer, sparsity=0.6).masks[""], expected), dtype
    layer = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1, float("nan"), float("inf"), -2]]))
    assert StraightThrough(layer, sparsity=0.75).masks[""].tolist() == [[False, True, False, False]]


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"0: an N:M mask needs .* multiple of m = 3; got 4; leave it out with include"
    ):
        StraightThrough(network(), n_of_m=(2, 3))
    with pytest.raises(ValueError, match="exactly one of n_of_m and sparsity"):
        StraightThrough(network())
    with pytest.raises(ValueError, match="backward_sparsity is at most forward_sparsity"):
        TopKAST(network(), forward_sparsity=0.5, backward_sparsity=0.8)
    with pytest.raises(ValueError, match="must keep a connection"):
        TopKAST(network(), forward_sparsity=1, backward_sparsity=0.8)
    with pytest.raises(ValueError, match="0, 3 have masks already: call unmask_model"):
        StraightThrough(mask_model(network()), sparsity=0.5)
    model = mask_model(network(), include="0")
    with pytest.warns(UserWarning, match=r"StraightThrough left out 0 \(masked already\)"):
        StraightThrough(model, sparsity=0.5)
    with pytest.raises(ValueError, match="there is no weight to mask"):
        StraightThrough(model, sparsity=0.5, include="3")


PROGRAM = """
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.distributed.fsdp import fully_shard
from maskedlinear.torch import StraightThrough, TopKAST

def train(model, method, xs):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for x in xs:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        isinstance(method, TopKAST) and method.step()

def main():
    xs = torch.randn(9, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for make in (
        lambda model: StraightThrough(model, n_of_m=(2, 4), decay=0.01),
        lambda model: TopKAST(model, forward_sparsity=0.8, backward_sparsity=0.5, every=3),
    ):
        models = []
        for wrap in (lambda model: model, DistributedDataParallel):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)).double()
            method = make(model)
            wrapped = wrap(model)
            train(wrapped, method, xs if wrapped is model else xs[:, rank::2])
            models.append(method.finish())
        for one, other in zip(*(model.parameters() for model in models)):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    model = fully_shard(nn.Sequential(nn.Linear(12, 16)))
    try:
        StraightThrough(model, sparsity=0.5)
    except ValueError as error:
        assert "processes have cut 0" in str(error), error
    else:
        raise AssertionError("a cut weight was taken")
    end()

main()
"""


def test_processes_train_one_model_alike_and_cut_weights_are_refused(tmp_path: Path) -> None:
    in_processes(PROGRAM, tmp_path)
