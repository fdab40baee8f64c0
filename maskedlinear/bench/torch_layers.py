"""The layers that are timed in PyTorch, each as a training step and as an inference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own idiom
from torch.nn.utils import prune

from maskedlinear.bench.cases import NAMES, Case
from maskedlinear.torch import MaskedLinear, SparseLinear, compress, freeze_masked
from maskedlinear_torch._trial import inference, training_step

__all__ = ["BASE", "DENSE", "GUARDED", "SPARSE", "calls", "chosen", "description", "device_of", "kept"]

BASE, DENSE, SPARSE = NAMES["torch"]
GUARDED = "MaskedLinear, guarded"


class _ProductMask(nn.Linear):
    """The recipe that many copied: ``weight * mask``, with the mask as floats."""

    mask: Tensor

    def __init__(self, in_features: int, out_features: int, mask: Tensor) -> None:
        super().__init__(in_features, out_features)
        self.register_buffer("mask", mask.float())

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * self.mask, self.bias)


def description() -> dict[str, str]:
    """Return what ran."""
    return {"torch": torch.__version__, "threads": str(torch.get_num_threads())}


def device_of(device: str) -> str:
    """Return what torch calls a device of this name; whether there is one shows when it is used."""
    return torch.device(device).type


def _layers(case: Case) -> dict[str, Callable[[], nn.Module]]:
    in_, out, pattern = case.in_features, case.out_features, case.pattern()

    def mask() -> Tensor:
        return torch.from_numpy(pattern.to_mask())

    found: dict[str, Callable[[], nn.Module]] = {
        BASE: lambda: nn.Linear(in_, out),
        DENSE: lambda: MaskedLinear(in_, out, mask=mask()),
        SPARSE: lambda: SparseLinear(in_, out, pattern=pattern),
    }
    if case.of == "layers":
        found["weight * mask"] = lambda: _ProductMask(in_, out, mask())
        found["torch.nn.utils.prune"] = lambda: prune.custom_from_mask(nn.Linear(in_, out), "weight", mask())
    return found


def calls(case: Case, device: str = "cpu", only: Sequence[str] = ()) -> dict[str, dict[str, Callable[[], Any]]]:
    """Return the calls to time, by what they are and by layer: whole steps with Adam, forward + backward, and inference.

    ``only`` names layers; all of them if it is empty.
    """
    x, g = (torch.randn(case.batch, size, device=device) for size in (case.in_features, case.out_features))
    found: dict[str, dict[str, Callable[[], Any]]] = {"step": {}, "inference": {}}
    if case.of == "layers":
        found |= {"forward + backward": {}, "step, unfused Adam": {}}
    for name, make in _layers(case).items():
        if only and name not in only:
            continue
        layer = make().to(device)
        found["step"][name] = training_step(layer, x, g, torch.optim.Adam(layer.parameters(), fused=True))
        found["inference"][name] = inference(layer, x)
        if case.of == "layers":
            found["forward + backward"][name] = training_step(layer, x, g, None)
            found["step, unfused Adam"][name] = training_step(layer, x, g, torch.optim.Adam(layer.parameters()))
        if case.of == "layers" and name == DENSE:
            layer = make().to(device)
            guarded = freeze_masked(torch.optim.Adam(layer.parameters(), fused=True), layer)
            found["step"][GUARDED] = training_step(layer, x, g, guarded)
    return found


def kept(case: Case, device: str = "cpu") -> dict[str, int]:
    """Return the bytes that training keeps from step to step: parameters, gradients, Adam's state, masks and indices."""
    found = {}
    for name, make in _layers(case).items():
        layer = make().to(device)
        optimizer = torch.optim.Adam(layer.parameters(), fused=True)
        x, g = (torch.randn(case.batch, size, device=device) for size in (case.in_features, case.out_features))
        training_step(layer, x, g, optimizer)()
        tensors = [*layer.parameters(), *layer.buffers()]
        tensors += [p.grad for p in layer.parameters() if p.grad is not None]
        tensors += [part for state in optimizer.state.values() for part in state.values()]
        dormant = layer.dormant if isinstance(layer, MaskedLinear) else None
        indices = 0
        if isinstance(layer, SparseLinear):  # in the pattern, and as tensors
            placed = (layer.indptr, layer.indices, layer.starts, layer.outputs, layer.order)
            indices = layer.pattern.nbytes + sum(t.nbytes for t in placed)
        found[name] = sum(t.nbytes for t in tensors) + indices + (0 if dormant is None else dormant.nbytes)
    return found


def chosen(case: Case, device: str, training: bool) -> str:
    """Return the form that ``compress`` gives the layer, with what it measures."""
    layer = MaskedLinear(case.in_features, case.out_features, mask=torch.from_numpy(case.pattern().to_mask()))
    made = compress(layer.to(device), batch=case.batch, training=training, measure=True)
    return "sparse" if isinstance(made, SparseLinear) else "dense"
