"""Training steps and inferences to be timed; and those of both forms of one layer, for ``compress``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from maskedlinear._timing import median_seconds
from maskedlinear_torch._layer import MaskedLinear
from maskedlinear_torch._sparse_layer import SparseLinear

__all__ = ["inference", "measured_seconds", "training_step"]


@torch.inference_mode(False)  # tensors that were made in inference cannot be trained
def measured_seconds(layer: MaskedLinear | SparseLinear, batch: int, training: bool) -> dict[str, float]:
    """Return how long a step with Adam, or an inference, takes in each form of a layer, on ``batch`` rows of x.

    The layer, its hooks and the random state are left alone.
    """
    own = next(layer.parameters())
    with torch.random.fork_rng(devices=[own.device] if own.is_cuda else []):
        dense = layer.to_masked() if isinstance(layer, SparseLinear) else MaskedLinear.from_linear(layer)
        x, g = (
            torch.randn(batch, size, device=own.device).to(own.dtype)
            for size in (layer.in_features, layer.out_features)
        )
    calls = {}
    for form, made in (("dense", dense), ("sparse", SparseLinear.from_masked(dense))):
        parameters = [parameter for parameter in made.parameters() if parameter.requires_grad]
        fused = own.device.type in ("cpu", "cuda")
        adam = torch.optim.Adam(parameters, fused=fused) if parameters else None
        calls[form] = training_step(made, x, g, adam) if training else inference(made, x)
    return median_seconds(calls)


def training_step(
    layer: nn.Module, x: Tensor, g: Tensor, optimizer: torch.optim.Optimizer | None
) -> Callable[[], None]:
    """Return forward, backward with the cotangent ``g``, and a step of the optimizer, as a call."""
    x = x.clone().requires_grad_()  # as below another layer

    @torch.enable_grad()
    def step() -> None:
        layer.zero_grad()
        x.grad = None
        layer(x).backward(g)
        if optimizer is not None:
            optimizer.step()
        _wait(x)

    return step


def inference(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    """Return a forward pass that nothing will differentiate, as a call."""

    @torch.inference_mode()
    def call() -> None:
        layer(x)
        _wait(x)

    return call


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()
