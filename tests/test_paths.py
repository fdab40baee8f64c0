"""Connections on a path from input to output: by hand, in both forms and frameworks, and what is said of a cut network."""

from __future__ import annotations

import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from maskedlinear import flax as in_flax
from maskedlinear import pruning
from maskedlinear import torch as in_torch
from maskedlinear.pattern import SparsityPattern

MASKS = [  # the last node of the first layer has no reader, the second of the second layer no live input
    np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]], bool),
    np.array([[1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]], bool),
    np.array([[1, 1, 0, 0], [0, 0, 1, 0]], bool),
]
CUT = [MASKS[0], MASKS[1], np.array([[0, 1, 0, 0], [0, 1, 0, 0]], bool)]
X = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)


def in_both(masks: list[Any]) -> tuple[nn.Sequential, nnx.Sequential]:
    first, second, third = (in_torch.MaskedLinear(*mask.shape[::-1], mask=mask) for mask in masks)
    layers = [in_flax.MaskedLinear(*m.shape[::-1], mask=m.T, rngs=nnx.Rngs(i)) for i, m in enumerate(masks)]
    theirs = nnx.Sequential(layers[0], nnx.relu, nnx.Sequential(layers[1], jnp.tanh), layers[2])
    return nn.Sequential(first, nn.ReLU(), nn.Sequential(second, nn.Dropout(0.1), nn.Tanh()), third), theirs


def test_effective_masks_by_all_paths_in_both_forms() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        masks = [rng.random(shape) < 0.25 for shape in ((7, 5), (6, 7), (4, 6))]
        a, b, c = (mask.astype(int) for mask in masks)
        wanted = [a * (c @ b).sum(0)[:, None], b * a.sum(1) * c.sum(0)[:, None], c * (b @ a).sum(1)]  # numbers of paths
        found = pruning.effective_masks([torch.from_numpy(masks[0]), jnp.asarray(masks[1]), masks[2]])
        patterns = pruning.effective_masks([SparsityPattern.from_mask(mask) for mask in masks])
        for mask, pattern, paths in zip(found, patterns, wanted, strict=True):
            assert (mask == (paths > 0)).all()
            assert (pattern.to_mask() == mask).all()
        live = sum(int((paths > 0).sum()) for paths in wanted)
        assert pruning.effective_sparsity(masks) == pytest.approx(1 - live / (35 + 42 + 24))
    with pytest.raises(ValueError, match="layer 1 has 3 inputs, and the one before 4 outputs"):
        pruning.effective_masks([MASKS[0], MASKS[0]])
    with pytest.raises(ValueError, match="at least one layer"):
        pruning.effective_sparsity([])


def test_the_summary_counts_them_where_it_can_know() -> None:
    for model, module in zip(in_both(MASKS), (in_torch, in_flax), strict=True):
        table = module.summary(model)
        assert (table.effective_connections, table.effective_sparsity) == (2 + 2 + 2, pytest.approx(1 - 6 / 36))
        assert "6 live connections lie on a path" in str(table)
        sparse = module.compress(model, "sparse")
        assert module.summary(sparse).effective_connections == 6
    model, theirs = in_both(MASKS)
    unknown = (
        nn.Sequential(*model[:1], nn.Softmax(-1), *model[1:]),
        nnx.Sequential(*theirs.layers, lambda x: x[:, ::-1]),
    )
    for other, module in zip(unknown, (in_torch, in_flax), strict=True):
        assert module.summary(other).effective_connections is None
    model.register_forward_hook(lambda module, arguments, output: output + arguments[0].sum())
    assert in_torch.summary(model).effective_connections is None


def test_a_cut_network_is_told() -> None:
    for model, module in zip(in_both(CUT), (in_torch, in_flax), strict=True):
        assert module.summary(model).effective_connections == 0
        x: Any = torch.from_numpy(X) if module is in_torch else jnp.asarray(X)
        check = module.check_masks(model, x)
        assert (check.ok, check.failures, check.is_constant) == (False, {}, True)
        assert "The outputs do not depend on the inputs" in str(check)
    for model, module in zip(in_both(MASKS), (in_torch, in_flax), strict=True):
        x = torch.from_numpy(X) if module is in_torch else jnp.asarray(X)
        assert module.check_masks(model, x).ok
        scores = {name: m.astype(np.float32) for name, m in zip(module.get_masks(model), CUT, strict=True)}
        with pytest.warns(UserWarning, match="no live connection lies on a path from an input to an output"):
            module.prune_model(model, 0.7223, score=scores)


def test_tokens_change_places_and_what_cannot_be_told_is_not_claimed() -> None:
    class Tokens(nn.Module):
        def __init__(self, live: float) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(9, 4), in_torch.MaskedLinear(4, 2, mask=np.full((2, 4), live > 0))

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(tokens))

    tokens = torch.arange(8).reshape(2, 4)
    assert in_torch.check_masks(Tokens(1), tokens).ok
    assert in_torch.check_masks(Tokens(0), tokens).is_constant
    assert in_torch.check_masks(Tokens(0), torch.full((2, 4), 3)).ok, "no other input is known"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        in_torch.prune_model(in_torch.mask_model(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))), 0.5)
