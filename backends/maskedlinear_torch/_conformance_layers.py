"""``MaskedLinear`` and ``SparseLinear`` as the conformance suite sees them: :class:`maskedlinear.backends.Layer`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own idiom

from maskedlinear import checkpoint
from maskedlinear.pattern import SparsityPattern
from maskedlinear_torch import MaskedLinear, SparseLinear, freeze_masked
from maskedlinear_torch._products import DevicePattern

__all__ = ["Placed", "SparseTorchLayer", "TorchLayer", "as_numpy", "made", "values_of"]


class TorchLayer:
    """A ``MaskedLinear`` as :class:`maskedlinear.backends.Layer`."""

    optimizers = ("sgd with momentum", "adamw", "fused adamw")
    weight_edits = (".data", "NumPy", "another parameter")

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
        """Write into the parameter, which its version counts."""
        with torch.no_grad():
            self.weight.copy_(weight)

    def edit_weight(self, edit: str, weight: Tensor) -> None:
        """Write past the version, into the parameter's memory, or put another parameter in its place."""
        if edit == ".data":
            self.weight.data.copy_(weight)
        elif edit == "NumPy" and weight.device.type == "cpu":
            own, given = (tensor.detach().contiguous().view(torch.uint8).numpy() for tensor in (self.weight, weight))
            own[...] = given
        elif edit == "NumPy":  # of the CPU only; elsewhere what another library would do
            torch.utils.dlpack.from_dlpack(self.weight.detach()).copy_(weight)
        else:
            setattr(self.module, self._parameter, nn.Parameter(weight.clone()))

    _parameter = "weight"

    def visible_weight(self) -> Tensor:
        """Return the module's ``weight`` as it stands."""
        weight: Tensor = self.module.weight
        return weight.detach().clone()

    def state(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]:
        """Return the state as NumPy arrays."""
        bias = self.module.bias
        return as_numpy(self.full_weight()), self.mask(), None if bias is None else as_numpy(bias)

    def full_weight(self) -> Tensor:
        """Return live and dormant values together."""
        full: Tensor = self.module.full_weight
        return full

    def mask(self) -> NDArray[Any]:
        """Return the mask as a NumPy array."""
        return as_numpy(self.module.mask)

    def save(self, path: Path) -> None:
        """Save the ``state_dict``."""
        torch.save(self.module.state_dict(), path / "state.pt")

    def load(self, path: Path) -> None:
        """Load it."""
        self.module.load_state_dict(torch.load(path / "state.pt"))

    def save_file(self, path: Path, *, dormant: bool = False) -> None:
        """Save the module."""
        checkpoint.save(self.module, path, dormant=dormant)

    def load_file(self, path: Path) -> None:
        """Load it into the module."""
        checkpoint.load_into(self.module, path)

    def load_plain(self, path: Path) -> Callable[[Tensor], Tensor]:
        """Return an ``nn.Linear`` that has loaded it with ``strict=False``."""
        linear = self._plain()
        missing, unexpected = linear.load_state_dict(torch.load(path / "state.pt"), strict=False)
        assert not missing, f"nn.Linear finds its parameters in a state; missing: {missing}"
        assert set(unexpected) <= {"mask", "dormant"}, f"a state has mask and dormant besides; got {unexpected}"
        return linear

    def load_other(self, weight: Tensor, mask: Tensor | None, bias: Tensor | None) -> None:
        """Load the state of an ``nn.Linear``, or one as version 2 of ``MaskedLinear`` wrote it."""
        linear = self._plain()
        with torch.no_grad():
            linear.weight.copy_(weight)
            if bias is not None:
                linear.bias.copy_(bias)
        state: Any = linear.state_dict()
        if mask is not None:
            state["mask"] = mask
            state._metadata = {"": {"version": 2}}
        self.module.load_state_dict(state)

    def _plain(self) -> nn.Linear:
        options: Any = {"device": self.weight.device, "dtype": self.weight.dtype}
        return nn.Linear(self.module.in_features, self.module.out_features, self.module.bias is not None, **options)

    def convert(self, dtype: str) -> None:
        """Call ``.to``."""
        self.module.to(getattr(torch, dtype))

    def edit_mask(self, mask: NDArray[Any]) -> None:
        """Write into the buffer."""
        self.module.mask.copy_(torch.tensor(mask))

    def sharer(self) -> TorchLayer:
        """Return a ``MaskedLinear`` that is given the same parameters."""
        twin = MaskedLinear(self.module.in_features, self.module.out_features, self.module.bias is not None)
        twin.weight, twin.bias = self.module.weight, self.module.bias
        return TorchLayer(twin)

    def reader_gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """Return the gradient that ``F.linear`` of the module's ``weight`` leaves in the parameter."""
        self.module.zero_grad()
        F.linear(x, self.module.weight).backward(g)
        return self.matrix(_grad(self.weight))

    def frozen_step(self, optimizer: str) -> Callable[[Tensor, Tensor], None]:
        """Return a step of an optimizer under ``freeze_masked``."""
        return self._step(freeze_masked(self._optimizer(optimizer), self.module))

    def unguarded_step(self, optimizer: str) -> Callable[[Tensor, Tensor], None]:
        """Return a step of an optimizer as it is."""
        return self._step(self._optimizer(optimizer))

    def _optimizer(self, name: str) -> torch.optim.Optimizer:
        """Return SGD with momentum and weight decay, or AdamW; a fused step moves no version."""
        parameters = self.module.parameters()
        if name == "sgd with momentum":
            return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)
        return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1, fused=name == "fused adamw")

    def _step(self, optimizer: torch.optim.Optimizer) -> Callable[[Tensor, Tensor], None]:
        def step(x: Tensor, g: Tensor) -> None:
            optimizer.zero_grad()
            self.module(x).backward(g)
            optimizer.step()

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

    def edit_weight(self, edit: str, weight: Tensor) -> None:
        """Write the live ones into the parameter, past its version, or put another in its place."""
        super().edit_weight(edit, values_of(weight, self.module.pattern))

    _parameter = "weight_values"

    def full_weight(self) -> Tensor:
        """Return the live values: there are no others."""
        return self.matrix(self.weight)

    def mask(self) -> NDArray[Any]:
        """Return the pattern as a mask."""
        mask: NDArray[Any] = self.module.pattern.to_mask()
        return mask


def made(weight: Tensor, mask: Tensor | SparsityPattern, bias: Tensor | None) -> TorchLayer:
    """Return a ``MaskedLinear`` with copies of these; of a pattern, a ``SparseLinear``."""
    out, in_ = weight.shape
    options: Any = {"device": weight.device, "dtype": weight.dtype}
    if isinstance(mask, SparsityPattern):
        layer = SparseTorchLayer(SparseLinear(in_, out, bias is not None, pattern=mask, **options))
        layer.set_weight(weight)
        if bias is not None:
            with torch.no_grad():
                layer.module.bias.copy_(bias)
        return layer
    linear = nn.Linear(in_, out, bias is not None, **options)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
    return TorchLayer(MaskedLinear.from_linear(linear, mask))


class Placed(NamedTuple):
    """A pattern in tensors alone, which can be compiled: where its connections are in a flat weight, and its indices."""

    places: Tensor
    indices: DevicePattern

    @classmethod
    def of(cls, pattern: SparsityPattern, device: torch.device) -> Placed:
        """Return that of ``pattern``."""
        flat = pattern.places
        return cls(torch.tensor(flat, device=device), DevicePattern.of(pattern, device))

    def values(self, weight: Tensor) -> Tensor:
        """Return the weights at the connections, in the pattern's order."""
        return weight.reshape(-1).gather(0, self.places)


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
