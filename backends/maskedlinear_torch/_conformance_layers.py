"""``MaskedLinear`` and ``SparseLinear`` as the conformance suite sees them: :class:`maskedlinear.backends.Layer`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskedlinear.pattern import SparsityPattern
from maskedlinear_torch import MaskedLinear, SparseLinear, freeze_masked
from maskedlinear_torch._products import DevicePattern

__all__ = ["Placed", "SparseTorchLayer", "TorchLayer", "as_numpy", "made", "values_of"]


class TorchLayer:
    """A ``MaskedLinear`` as :class:`maskedlinear.backends.Layer`."""

    optimizers = ("sgd with momentum", "adamw")

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``y`` as in inference; ``gradients`` goes the way of training."""
        with torch.no_grad():
            y: Tensor = self.module(x)
        return y

    def gradients(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return what ``backward`` leaves in ``.grad``."""
        x = x.detach().requires_grad_()
        self.module.zero_grad()
        self.module(x).backward(g)
        bias = self.module.bias
        return _grad(x), self.matrix(_grad(self.weight)), None if bias is None else _grad(bias)

    @property
    def weight(self) -> Tensor:
        """The parameter that holds the weights."""
        weight: Tensor = self.module.weight
        return weight

    def matrix(self, values: Tensor) -> Tensor:
        """Return what has the weight parameter's shape as ``(out, in)``."""
        return values

    def set_mask(self, mask: Any) -> None:
        """Call ``set_mask``."""
        self.module.set_mask(mask)

    def set_weight(self, weight: Tensor) -> None:
        """Write into the parameter."""
        with torch.no_grad():
            self.weight.copy_(weight)

    def state(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]:
        """Return the state as NumPy arrays."""
        bias = self.module.bias
        return as_numpy(self.matrix(self.weight)), self.mask(), None if bias is None else as_numpy(bias)

    def mask(self) -> NDArray[Any]:
        """Return the mask as a NumPy array."""
        return as_numpy(self.module.mask)

    def save(self, path: Path) -> None:
        """Save the ``state_dict``."""
        torch.save(self.module.state_dict(), path / "state.pt")

    def load(self, path: Path) -> None:
        """Load it."""
        self.module.load_state_dict(torch.load(path / "state.pt"))

    def frozen_step(self, optimizer: str) -> Callable[[Tensor, Tensor], None]:
        """Return a step of SGD with momentum and weight decay, or of AdamW."""
        parameters = self.module.parameters()
        made: torch.optim.Optimizer
        if optimizer == "adamw":
            made = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)
        else:
            made = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)
        freeze_masked(made, self.module)

        def step(x: Tensor, g: Tensor) -> None:
            made.zero_grad()
            self.module(x).backward(g)
            made.step()

        return step


class SparseTorchLayer(TorchLayer):
    """A ``SparseLinear`` as :class:`maskedlinear.backends.Layer`."""

    @property
    def weight(self) -> Tensor:
        """The values of the connections."""
        values: Tensor = self.module.weight_values
        return values

    def matrix(self, values: Tensor) -> Tensor:
        """Return one value a connection laid out as ``(out, in)``."""
        pattern = self.module.pattern
        matrix = values.detach().new_zeros(pattern.shape)
        places = (torch.tensor(ends, dtype=torch.int64) for ends in (pattern.rows, pattern.indices))
        matrix[tuple(places)] = values.detach()
        return matrix

    def set_weight(self, weight: Tensor) -> None:
        """Write the live ones into the parameter."""
        super().set_weight(values_of(weight, self.module.pattern))

    def mask(self) -> NDArray[Any]:
        """Return the pattern as a mask."""
        mask: NDArray[Any] = self.module.pattern.to_mask()
        return mask


def made(weight: Tensor, mask: Tensor | SparsityPattern, bias: Tensor | None) -> TorchLayer:
    """Return a ``MaskedLinear`` with copies of these; of a pattern, a ``SparseLinear``."""
    out, in_ = weight.shape
    options: Any = {"device": weight.device, "dtype": weight.dtype}
    layer: TorchLayer
    if isinstance(mask, SparsityPattern):
        layer = SparseTorchLayer(SparseLinear(in_, out, bias is not None, pattern=mask, **options))
    else:
        layer = TorchLayer(MaskedLinear(in_, out, bias is not None, **options))
        layer.set_mask(mask)
    layer.set_weight(weight)
    if bias is not None:
        with torch.no_grad():
            layer.module.bias.copy_(bias)
    return layer


class Placed(NamedTuple):
    """A pattern in tensors alone, which can be compiled: where its connections are in a flat weight, and its indices."""

    places: Tensor
    indices: DevicePattern

    @classmethod
    def of(cls, pattern: SparsityPattern, device: torch.device) -> Placed:
        """Return that of ``pattern``."""
        flat = pattern.rows.astype(np.int64) * pattern.shape[1] + pattern.indices
        return cls(torch.tensor(flat, device=device), DevicePattern.of(pattern, device))

    def values(self, weight: Tensor) -> Tensor:
        """Return the weights at the connections, in the pattern's order."""
        return weight.reshape(-1).index_select(0, self.places)


def values_of(weight: Tensor, pattern: SparsityPattern) -> Tensor:
    """Return the weights at the connections, in the pattern's order."""
    return Placed.of(pattern, weight.device).values(weight)


def as_numpy(array: Tensor) -> NDArray[Any]:
    """Return a copy of ``array`` in float64, or as it is if boolean."""
    host = array.detach().cpu()
    return np.array(host.numpy() if host.dtype is torch.bool else host.double().numpy())


def _grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad.clone()
