"""Whole models at 90 and 95 %, beside the dense ones in eager PyTorch, compiled by it, and in onnxruntime, in the same run.

Networks of the sizes of BERT-base (128 tokens), ViT-B/16 and MLP-Mixer-B/16 with random weights, float32. All linear layers
are pruned by magnitude to one sparsity, and stand in the sparse form. Prints the time of an inference, and of a training
step (forward, backward, AdamW), as ratios to eager dense, and which share of it the linear layers take.

    python benchmarks/models.py [--model NAME] [--sparsity S] [--batch N] [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import io
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskedlinear import kernels
from maskedlinear.torch import compress, mask_model, prune_model

WIDTH, HEADS, LAYERS = 768, 12, 12


class Attention(nn.Module):
    """Attention of several heads, with a linear layer for each of queries, keys, values and outputs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Return what the next part reads, of the shape of x."""
        heads = [part(x).unflatten(-1, (HEADS, -1)).transpose(-3, -2) for part in (self.query, self.key, self.value)]
        mixed = nn.functional.scaled_dot_product_attention(*heads)
        return self.out(mixed.transpose(-3, -2).flatten(-2))


def mlp(width: int, hidden: int) -> nn.Sequential:
    """Return two layers with a GELU between them."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class Block(nn.Module):
    """A layer of a transformer, or, given a number of tokens, of a mixer."""

    def __init__(self, width: int, tokens: int = 0) -> None:
        super().__init__()
        self.tokens = tokens
        self.mix = mlp(tokens, width // 2) if tokens else Attention(width)
        self.feed = mlp(width, 4 * width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Return what the next part reads, of the shape of x."""
        normed = self.norms[0](x)
        x = x + (self.mix(normed.mT).mT if self.tokens else self.mix(normed))
        return x + self.feed(self.norms[1](x))


class Encoder(nn.Module):
    """Layers over embedded words, or over the patches of an image."""

    def __init__(self, kind: str, layers: int, width: int) -> None:
        super().__init__()
        self.is_text = kind == "bert"
        self.embed = nn.Embedding(30522, width) if self.is_text else nn.Conv2d(3, width, 16, 16)
        self.layers = nn.Sequential(*(Block(width, 196 if kind == "mixer" else 0) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        """Return what the next part reads, of the shape of x."""
        x = self.embed(x)
        return self.layers(x if self.is_text else x.flatten(2).mT)

    def inputs(self, batch: int) -> Tensor:
        """Return a batch of what it reads."""
        return torch.randint(0, 30522, (batch, 128)) if self.is_text else torch.randn(batch, 3, 224, 224)


def least(call: Callable[[], Any], repeats: int) -> float:
    """Return the shortest time of some calls, after one that warms up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def onnx_call(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    """Return a call of the dense model in onnxruntime, with as many threads as PyTorch has."""
    import onnxruntime

    file = io.BytesIO()
    torch.onnx.export(model, (x,), file, dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def step_of(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """Return a training step."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def linear_share(model: nn.Module, x: Tensor, repeats: int) -> float:
    """Return the share of an inference's time that is spent in layers with a weight of two axes, the embedding apart."""
    spent, starts = [0.0], [0.0]

    def begin(*_: Any) -> None:
        starts[0] = time.perf_counter()

    def end(*_: Any) -> None:
        spent[0] += time.perf_counter() - starts[0]

    layers = [module for module in model.modules() if hasattr(module, "in_features")]
    hooks = [handle for module in layers for handle in
             (module.register_forward_pre_hook(begin), module.register_forward_hook(end))]  # fmt: skip
    total = 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        model(x)
        total += time.perf_counter() - start
    for hook in hooks:
        hook.remove()
    return spent[0] / total


def measure(kind: str, sparsity: float, batch: int, *, quick: bool) -> dict[str, Any]:
    """Return the times of one network, in seconds, and shares."""
    torch.manual_seed(0)
    layers, width, repeats = (1, 96, 1) if quick else (LAYERS, WIDTH, 5)
    dense = Encoder(kind, layers, width).eval()
    x = dense.inputs(batch)
    model = Encoder(kind, layers, width).eval()
    prune_model(mask_model(model), sparsity, scope="layer")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparse = compress(model, "sparse")
    row: dict[str, Any] = {"model": kind, "sparsity": sparsity, "batch": batch}
    with torch.inference_mode():
        expected, found = model(x), sparse(x)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        row["eager dense"] = least(lambda: dense(x), repeats)
        row["sparse"] = least(lambda: sparse(x), repeats)
        row["linear share, dense"] = linear_share(dense, x, repeats)
        row["linear share, sparse"] = linear_share(sparse, x, repeats)
    with torch.no_grad():
        if not quick:
            compiled = torch.compile(dense)
            row["compiled dense"] = least(lambda: compiled(x), repeats)
        row["onnxruntime dense"] = least(onnx_call(dense, x), repeats)
    row["eager dense, step"] = least(step_of(dense.train(), x), max(1, repeats - 2))
    row["sparse, step"] = least(step_of(sparse.train(), x), max(1, repeats - 2))
    return row


def report(row: dict[str, Any]) -> str:
    """Return a line: ratios to the dense model in eager PyTorch."""
    base, step = row["eager dense"], row["eager dense, step"]
    parts = [
        f"{name} {row[name] / base:.2f}" for name in ("sparse", "compiled dense", "onnxruntime dense") if name in row
    ]
    parts.append(f"sparse step {row['sparse, step'] / step:.2f}")
    parts.append(
        f"linear layers take {row['linear share, dense']:.0%} of dense, {row['linear share, sparse']:.0%} of sparse"
    )
    what = f"{row['model']} at {row['sparsity']:.0%}, batch {row['batch']}"
    return f"{what}: eager dense {1000 * base:.0f} ms; to it: {'; '.join(parts)}"


def main() -> None:
    """Measure all networks, or those that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("bert", "vit", "mixer"), action="append")
    parser.add_argument("--sparsity", type=float, action="append")
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--quick", action="store_true", help="one small layer, once: a try of the program itself")
    parser.add_argument("--out", type=Path, help="a JSON file for the times")
    options = parser.parse_args()
    print(kernels.info())
    rows = []
    for kind in options.model or ("bert", "vit", "mixer"):
        for sparsity in options.sparsity or (0.9, 0.95):
            for batch in options.batch or (1, 8):
                rows.append(measure(kind, sparsity, batch, quick=options.quick))
                print(report(rows[-1]), flush=True)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
