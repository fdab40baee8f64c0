"""Masks of a small transformer, shaped as LLaMA, against the algorithms of Wanda's and SparseGPT's authors, to the entry."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from maskedlinear.torch import get_masks, mask_model, prune_model, prune_with_updates, record_activations

HIDDEN, FORWARD, BLOCKS, HEADS = 128, 384, 3, 4


class Block(nn.Module):
    """Attention and a gated feed-forward part, each after a root mean square norm."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(HIDDEN, FORWARD, bias=False) for _ in range(2))
        self.down = nn.Linear(FORWARD, HIDDEN, bias=False)
        self.before, self.between = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.before(x)
        heads = [layer(normed).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)]
        x = x + self.o(F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))
        normed = self.between(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.blocks = nn.Embedding(64, HIDDEN), nn.Sequential(*(Block() for _ in range(BLOCKS)))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.blocks(self.embedding(tokens))
        return hidden


def transformer_and_batches() -> tuple[Transformer, list[Tensor]]:
    torch.manual_seed(0)
    return Transformer().eval(), [torch.randint(0, 64, (1, 64)) for _ in range(8)]


@torch.no_grad()
def authors_masks(
    model: Transformer,
    batches: list[Tensor],
    add_batch: Callable[[Any, Tensor, int], Any],
    prune: Callable[..., Tensor],
) -> dict[str, Tensor]:
    """Prune one block after the other in place, each on what the pruned ones before give it; return what stays."""
    kept, hidden = {}, [model.embedding(batch) for batch in batches]
    for number, block in enumerate(model.blocks):
        layers = {name: layer for name, layer in block.named_children() if isinstance(layer, nn.Linear)}
        sums: dict[str, Any] = dict.fromkeys(layers)
        for count, x in enumerate(hidden):
            for inputs, names in inputs_of(block, x):
                sums |= {name: add_batch(sums[name], inputs.reshape(-1, inputs.shape[-1]), count) for name in names}
        for name, layer in layers.items():
            kept[f"blocks.{number}.{name}"] = prune(layer.weight, sums[name])
        hidden = [block(x) for x in hidden]
    return kept


def inputs_of(block: Any, x: Tensor) -> Iterator[tuple[Tensor, tuple[str, ...]]]:
    """Yield what goes into the layers of a block, and which these are."""
    seen: dict[str, Tensor] = {}
    handles = [
        getattr(block, name).register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[0]}))
        for name in ("q", "o", "up", "down")
    ]
    block(x)
    for handle in handles:
        handle.remove()
    for name, names in (("q", ("q", "k", "v")), ("o", ("o",)), ("up", ("gate", "up")), ("down", ("down",))):
        yield seen[name], names


def differing(masks: dict[str, Any], expected: dict[str, Tensor]) -> tuple[int, int]:
    assert masks.keys() == expected.keys()
    return (
        sum(mask.numel() for mask in masks.values()),
        sum(int((mask != expected[name]).sum()) for name, mask in masks.items()),
    )


def test_wanda_of_a_transformer_is_the_authors_in_638976_entries() -> None:
    """The authors' code is ``WrappedGPT.add_batch`` and ``prune_wanda`` of github.com/locuslab/wanda."""

    def add_batch(scaler_row: Tensor | None, rows: Tensor, count: int) -> Tensor:
        scaler_row = torch.zeros(rows.shape[1]) if scaler_row is None else scaler_row
        return scaler_row * (count / (count + 1)) + torch.norm(rows.t(), p=2, dim=1) ** 2 / (count + 1)

    def prune(weight: Tensor, scaler_row: Tensor) -> Tensor:
        metric = weight.abs() * scaler_row.reshape(1, -1).sqrt()
        lowest = torch.sort(metric, dim=-1, stable=True).indices[:, : int(metric.shape[1] * 0.5)]
        mask = torch.zeros_like(metric, dtype=torch.bool).scatter_(1, lowest, True)
        weight[mask] = 0
        return ~mask

    plain, batches = transformer_and_batches()
    model = mask_model(copy.deepcopy(plain), include="blocks.*")
    for block in range(BLOCKS):
        with torch.no_grad(), record_activations(model, include=f"blocks.{block}.*") as activations:
            for batch in batches:
                model(batch)
        prune_model(model, 0.5, score=activations.wanda(), scope="row", include=f"blocks.{block}.*")
    expected = authors_masks(plain, batches, add_batch, prune)
    assert differing(get_masks(model), expected) == (638_976, 0)
    with torch.no_grad():
        torch.testing.assert_close(model(batches[0]), plain(batches[0]))


def test_sparsegpt_of_a_transformer_is_the_authors_in_638976_entries() -> None:
    """The authors' code is ``SparseGPT.add_batch`` and ``fasterprune`` of github.com/IST-DASLab/sparsegpt, in float64."""

    def add_batch(hessian: Tensor | None, rows: Tensor, count: int) -> Tensor:
        hessian = torch.zeros((rows.shape[1],) * 2, dtype=rows.dtype) if hessian is None else hessian
        rows = math.sqrt(2 / (count + 1)) * rows.t()
        return hessian * (count / (count + 1)) + rows.matmul(rows.t())

    def prune(weight: Tensor, hessian: Tensor) -> Tensor:
        rest, (rows, columns) = weight.clone(), weight.shape
        dead = torch.diag(hessian) == 0
        hessian[dead, dead] = 1
        rest[:, dead] = 0
        diagonal = torch.arange(columns)
        hessian[diagonal, diagonal] += 0.01 * torch.mean(torch.diag(hessian))
        inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
        kept = torch.ones_like(rest, dtype=torch.bool)
        for start in range(0, columns, 128):
            stop = min(start + 128, columns)
            own, errors = rest[:, start:stop].clone(), torch.zeros(rows, stop - start, dtype=rest.dtype)
            factor = inverse[start:stop, start:stop]
            saliency = own**2 / (torch.diag(factor).reshape((1, -1))) ** 2
            threshold = torch.sort(saliency.flatten())[0][int(saliency.numel() * 0.5)]
            pruned = saliency <= threshold
            for column in range(stop - start):
                value = own[:, column]
                quantized = value.masked_fill(pruned[:, column], 0)
                error = (value - quantized) / factor[column, column]
                own[:, column:] -= error.unsqueeze(1).matmul(factor[column, column:].unsqueeze(0))
                own[:, column], errors[:, column] = quantized, error
            rest[:, start:stop], kept[:, start:stop] = own, ~pruned
            rest[:, stop:] -= errors.matmul(inverse[start:stop, stop:])
        weight.copy_(rest)
        return kept

    plain, batches = transformer_and_batches()
    plain.double()
    model = mask_model(copy.deepcopy(plain), include="blocks.*")
    for block in range(BLOCKS):
        with torch.no_grad(), record_activations(model, hessian=True, include=f"blocks.{block}.*") as activations:
            for batch in batches:
                model(batch)
        prune_with_updates(model, 0.5, activations, include=f"blocks.{block}.*")
    expected = authors_masks(plain, batches, add_batch, prune)
    assert differing(get_masks(model), expected) == (638_976, 0)
    with torch.no_grad():
        torch.testing.assert_close(model(batches[0]), plain(batches[0]))
