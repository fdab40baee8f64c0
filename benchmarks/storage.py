"""Claims: weights that are +0 under their mask cost what dense ones do, and an optimizer's guard next to nothing.

Whole training steps with fused Adam (forward, backward, step) and inferences in PyTorch, as ratios. A step of
``MaskedLinear`` takes at most 1.06 of nn.Linear's at 2048 x 2048 and batch 256, 1.00 at 4096 x 4096 and batch 32, 1.20 at
64 -> 32 and batch 64; an inference at most 1.02 from 1024 x 1024 on, and below that at most 1.5 us more. A step under
``freeze_masked`` takes at most 1.10 of the same layer's without it, at 4096 x 4096 and batch 32 and at 10994 -> 1177 and
batch 8, and 1.05 at 2048 x 2048 and batch 256.
"""

from __future__ import annotations

import torch
from torch import nn

from maskedlinear import masks
from maskedlinear.bench.measure import ratios
from maskedlinear.torch import MaskedLinear, freeze_masked
from maskedlinear_torch._trial import inference, training_step

STEPS = [(2048, 2048, 256), (4096, 4096, 32), (64, 32, 64), (10994, 1177, 8)]
INFERENCES = [(width, width, batch) for width in (1024, 2048, 4096) for batch in (1, 32, 256)] + [
    (64, 32, 64),
    (512, 512, 1),
]


def layers(in_features: int, out_features: int) -> dict[str, nn.Linear]:
    """Return the layers to compare, at a sparsity of 90 %; the guarded one once more, since the two share the machine."""
    mask = masks.random((out_features, in_features), sparsity=0.9, seed=0)
    return {
        "nn.Linear": nn.Linear(in_features, out_features),
        "MaskedLinear": MaskedLinear(in_features, out_features, mask=mask),
        "guarded": MaskedLinear(in_features, out_features, mask=mask),
    }


def main() -> None:
    """Print a line for each shape: the median ratio of five rounds, and their range."""
    for in_features, out_features, batch in STEPS:
        x, g = torch.randn(batch, in_features), torch.randn(batch, out_features)
        calls = {}
        for name, layer in layers(in_features, out_features).items():
            adam = torch.optim.Adam(layer.parameters(), fused=True)
            calls[name] = training_step(layer, x, g, freeze_masked(adam, layer) if name == "guarded" else adam)
        for name, base in (("MaskedLinear", "nn.Linear"), ("guarded", "MaskedLinear")):
            show("step", (in_features, out_features, batch), name, base, ratios(calls, base))
    for in_features, out_features, batch in INFERENCES:
        x = torch.randn(batch, in_features)
        made = layers(in_features, out_features)
        made.pop("guarded")
        calls = {name: inference(layer.eval(), x) for name, layer in made.items()}
        show("inference", (in_features, out_features, batch), "MaskedLinear", "nn.Linear", ratios(calls, "nn.Linear"))


def show(what: str, shape: tuple[int, int, int], name: str, base: str, found: dict[str, dict[str, float]]) -> None:
    """Print one ratio."""
    row, (in_features, out_features, batch) = found[name], shape
    more = 1000 * (row["least"] - found[base]["least"])
    print(
        f"{what:9} {in_features:6} -> {out_features:5} batch {batch:4}  {name:12} / {base:12} {row['ratio']:6.3f} "
        f"({row['lowest']:.3f} - {row['highest']:.3f})  {found[base]['ms']:9.4f} ms, {more:+8.1f} us at best",
        flush=True,
    )


if __name__ == "__main__":
    main()
