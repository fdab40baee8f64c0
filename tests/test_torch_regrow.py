"""Dynamic sparse training in PyTorch: both forms move alike, and weights and optimizer state move along."""

from __future__ import annotations

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
    dense_gradients,
    expand,
    freeze_masked,
    mask_model,
    prune_model,
    regrow_model,
)


def both() -> tuple[nn.Module, nn.Module, Any]:
    """Return one network in both forms, and a function that makes a step of Adam on each."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 5))
    mask_model(dense)
    prune_model(dense, 0.7, scope="layer")
    sparse = compress(expand(dense), "dense")
    sparse = nn.Sequential(SparseLinear.from_masked(dense[0]), nn.Tanh(), SparseLinear.from_masked(dense[2]))  # type: ignore[arg-type]
    x = torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(1))
    made = [torch.optim.Adam(model.parameters(), lr=0.01) for model in (dense, sparse)]
    freeze_masked(made[0], dense)

    def step() -> tuple[Any, Any]:
        found = []
        for model, optimizer in zip((dense, sparse), made, strict=True):
            optimizer.zero_grad()
            with dense_gradients(model) as gradients:
                model(x).square().mean().backward()
            optimizer.step()
            found.append((gradients, optimizer))
        return tuple(found)

    return dense, sparse, step


def weights(model: Any) -> list[Tensor]:
    return [
        model[i].masked_weight if isinstance(model[i], MaskedLinear) else model[i].to_masked().masked_weight
        for i in (0, 2)
    ]


@pytest.mark.parametrize("by", ["gradient", "chance"])
def test_both_forms_move_alike_and_train_on_alike(by: str) -> None:
    dense, sparse, step = both()
    for round_ in range(4):
        for model, (gradients, optimizer) in zip((dense, sparse), step(), strict=True):
            before = [weight.clone() for weight in weights(model)]
            moved = regrow_model(
                model,
                0.3,
                gradients=gradients if by == "gradient" else None,
                optimizer=optimizer,
                seed=10 * round_,
                exclude_dropped=round_ == 0,
            )
            dropped = sum(int(0.3 * int(count)) for count in (72, 30))
            assert moved == dropped if round_ == 0 else 0 < moved <= dropped
            for old, new in zip(before, weights(model), strict=True):
                kept = new != 0
                assert torch.equal(new[kept], old[kept])
        for i in (0, 2):
            assert np.array_equal(dense[i].mask.numpy(), sparse[i].pattern.to_mask())  # type: ignore[index]
        for one, other in zip(weights(dense), weights(sparse), strict=True):
            torch.testing.assert_close(one, other)


def test_the_recorded_gradient_is_that_of_all_weights() -> None:
    layer = MaskedLinear(6, 4, mask=masks.random((4, 6), sparsity=0.5, seed=0))
    full = nn.Linear(6, 4)
    full.weight.data, full.bias.data = layer.masked_weight.detach().clone(), layer.bias.detach().clone()
    x = torch.randn(2, 3, 6)
    with dense_gradients(layer) as gradients:
        (layer(x).sin().sum() + layer(2 * x).sum()).backward()
    (full(x).sin().sum() + full(2 * x).sum()).backward()
    torch.testing.assert_close(torch.cat([gradients.rows(layer, 0, 3), gradients.rows(layer, 3, 4)]), full.weight.grad)
    assert not layer._forward_hooks
    with dense_gradients(layer) as gradients, torch.no_grad():
        layer(x)
    with pytest.raises(ValueError, match="needs a backward pass through each layer inside dense_gradients"):
        regrow_model(layer, 0.5, gradients=gradients)


def test_a_moved_connections_state_starts_clean_and_the_others_keep_theirs() -> None:
    dense, sparse, step = both()
    for _ in range(3):
        (_, one), (_, other) = step()
    layer: Any = sparse[0]  # type: ignore[index]
    state = other.state[layer.weight_values]
    before = {
        (o, i): m.item() for o, i, m in zip(layer.pattern.rows, layer.pattern.indices, state["exp_avg"], strict=True)
    }
    regrow_model(sparse, 0.4, optimizer=other, include="0", seed=1)
    for o, i, m in zip(layer.pattern.rows, layer.pattern.indices, state["exp_avg"], strict=True):
        assert m.item() == before.get((o, i), 0.0)
    layer = dense[0]  # type: ignore[index]
    old = layer.mask.clone()
    regrow_model(dense, 0.4, optimizer=one, include="0", seed=1)
    assert not one.state[layer.weight]["exp_avg"][old != layer.mask].any()
    assert one.state[layer.weight]["exp_avg"][old & layer.mask].any()


def test_gradients_move_along() -> None:
    _, sparse, step = both()
    step()
    layer: Any = sparse[0]  # type: ignore[index]
    before = {
        (o, i): g.item()
        for o, i, g in zip(layer.pattern.rows, layer.pattern.indices, layer.weight_values.grad, strict=True)
    }
    regrow_model(sparse, 0.4, seed=1)
    for o, i, g in zip(layer.pattern.rows, layer.pattern.indices, layer.weight_values.grad, strict=True):
        assert g.item() == before.get((o, i), 0.0)


def test_a_weight_that_others_use_does_not_move() -> None:
    one, other = MaskedLinear(6, 6), MaskedLinear(6, 6)
    other.weight = one.weight
    with pytest.raises(ValueError, match="has its weight to itself; here 2 modules share it"):
        regrow_model(nn.Sequential(one, other), 0.5)
    embedding = nn.Embedding(6, 6)
    embedding.weight = one.weight  # type: ignore[assignment]
    with pytest.raises(ValueError, match="2 modules share it"):
        regrow_model(nn.Sequential(one, embedding), 0.5)
    nn.utils.parametrizations.weight_norm(one)
    with pytest.raises(ValueError, match="here it is computed"):
        regrow_model(one, 0.5)


def test_double_precision_and_named_arguments_are_recorded() -> None:
    layer = MaskedLinear(6, 4, mask=masks.random((4, 6), sparsity=0.5, seed=0), dtype=torch.float64)
    with dense_gradients(layer) as gradients:
        layer(input=torch.randn(3, 6, dtype=torch.float64)).sum().backward()
    assert gradients.rows(layer, 0, 4).dtype is torch.float64


def test_what_cannot_be_rewired_is_refused() -> None:
    layer = SparseLinear(6, 4, mask=masks.random((4, 6), sparsity=0.5, seed=0))
    pattern, source = pruning.regrow_pattern(layer.pattern, layer.weight_values, 0.5)
    for wrong, places, message in (
        (SparseLinear(6, 5).pattern, source, "of shape"),
        (SparseLinear(6, 4).pattern, source, "where each of the 12 connections was"),
        (pattern, source[:3], "a source of shape"),
        (pattern, source + 12, "or -1"),
    ):
        with pytest.raises(ValueError, match=message):
            layer.rewire(wrong, places)
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        regrow_model(layer, 1.5)
    with pytest.raises(ValueError, match="connections move in masked weights, and there is none"):
        regrow_model(nn.Sequential(layer), 0.5, include="nonesuch")
