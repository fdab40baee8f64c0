"""The PyTorch layers, as the conformance suite sees them: its function gone through a module, as users write it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from maskedlinear.pattern import SparsityPattern
from maskedlinear_torch import MaskedLinear, SparseLinear
from maskedlinear_torch._conformance_layers import Placed, TorchLayer, made
from maskedlinear_torch.conformance import Bias, Call, TorchBackend

__all__ = ["TorchNnBackend"]

_TOGETHER = 16  # modules whose compiled calls are kept at once


class TorchNnBackend(TorchBackend):
    """``MaskedLinear`` and ``SparseLinear``: values as in inference, gradients as in training.

    What torch compiles, checkpoints or casts is the module's call; the transforms of ``torch.func`` and second order go
    through ``torch.func.functional_call``. A ``MaskedLinear`` is kept for each shape and dtype, and given weights and
    mask in place, as a training loop does.
    """

    name = "torch-nn"

    def __init__(self, format: str = "dense") -> None:
        super().__init__(format)
        self._kept: dict[Any, TorchLayer] = {}
        self._calls = cache(_dense_call)
        self._sparse_calls: dict[Any, Call] = {}
        self._compiled_modules = 0

    def masked_linear(self, x: Tensor, weight: Tensor, mask: Tensor, bias: Bias) -> Tensor:
        """Return ``y`` of a layer, without gradients."""
        return self._layer(weight, mask, bias)(x)

    def op(self, x: Tensor, weight: Tensor, mask: Any, bias: Bias) -> Tensor:
        """Return ``y`` of a layer whose parameters these are for one call."""
        fixed = Placed.of(mask, x.device) if isinstance(mask, SparsityPattern) else mask
        return self.traceable(weight, mask, bias)(x, weight, fixed, bias)

    def _prepared(self, mask: Tensor) -> Any:
        """Return the mask as layers take it, and make them: in a transform, theirs would be tensors of the transform."""
        prepared = super()._prepared(mask)
        for bias in (False, True) if mask.dim() == 2 else ():
            self._call_of(mask.shape, prepared, bias, mask.device)
        return prepared

    def traceable(self, weight: Tensor, mask: Any, bias: Bias) -> Call:
        """Return the call of a layer with other parameters: one for each shape, or for each pattern."""
        return self._call_of(weight.shape, mask, bias is not None, weight.device)

    def _call_of(self, shape: Any, mask: Any, bias: bool, device: torch.device) -> Call:
        if not isinstance(mask, SparsityPattern):
            return self._calls(shape, bias)
        key = (mask.shape, mask.indptr.tobytes(), mask.indices.tobytes(), bias, device)
        if key not in self._sparse_calls:
            self._sparse_calls[key] = _sparse_call(mask, bias, device)
        return self._sparse_calls[key]

    def vmap(
        self, axes: Sequence[int | None], x: Tensor, weight: Tensor, mask: Tensor, bias: Bias, g: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return what the layer gives mapped over: it is made before, since what it draws is refused in a map."""
        self._prepared(mask if axes[2] is None else mask.select(axes[2], 0))
        return super().vmap(axes, x, weight, mask, bias, g)

    def through(
        self,
        transform: Callable[[Call], Call],
        x: Tensor,
        weight: Tensor,
        mask: Tensor,
        bias: Bias,
        g: Tensor,
        wrt: Sequence[str] = ("x", "weight", "bias"),
    ) -> tuple[Tensor, list[Tensor]]:
        """Return y by what ``transform`` makes of the layer, and the gradients of those of ``wrt`` that exist."""
        layer = self._layer(weight, mask, bias)
        leaves = {"x": x.detach(), "weight": layer.weight} | ({} if bias is None else {"bias": layer.module.bias})
        for name, leaf in leaves.items():
            leaf.requires_grad_(name in wrt)
        y = transform(layer.module)(leaves["x"])
        asked = [name for name in wrt if name in leaves]
        found = torch.autograd.grad(y, [leaves[name] for name in asked], g)
        return y, [layer.matrix(part) if name == "weight" else part for name, part in zip(asked, found, strict=True)]

    def compiled(self, compiler: Callable[[Call], Call], module: Call) -> Call:
        """Return the call of a module compiled, with the module as an argument."""
        self._compiled_modules += 1
        if self._compiled_modules % _TOGETHER == 0:
            torch.compiler.reset()  # each is compiled anew, and torch refuses what has changed too often
        call = compiler(_call)
        return lambda x: call(module, x)

    def dense(self, x: Tensor, weight: Tensor, bias: Bias) -> Tensor:
        """Return ``y`` of ``nn.Linear``."""
        linear = nn.Linear(x.shape[-1], weight.shape[0], bias is not None, device="meta")
        own: dict[str, Any] = {"weight": weight, "bias": bias}
        return torch.func.functional_call(linear, own, (x,))  # type: ignore[no-any-return]

    def _layer(self, weight: Tensor, mask: Tensor, bias: Bias) -> TorchLayer:
        if self.format == "sparse":  # its connections are fixed
            return self.layer(weight, mask, bias)
        key = (weight.shape, weight.dtype, weight.device, bias is not None)
        if key not in self._kept:
            self._kept[key] = made(weight, mask, bias)
        layer = self._kept[key]
        layer.set_mask(mask)
        layer.set_weight(weight)
        if bias is not None:
            with torch.no_grad():
                layer.module.bias.copy_(bias)
        return layer


def _call(module: Call, x: Tensor) -> Tensor:
    return module(x)


def _dense_call(shape: tuple[int, int], bias: bool) -> Call:
    """Return the call of a layer that has no values of its own, and takes them as arguments."""
    layer = MaskedLinear(shape[1], shape[0], bias, device="meta")

    def call(x: Tensor, weight: Tensor, mask: Tensor, bias: Bias) -> Tensor:
        own: dict[str, Any] = {"weight": weight, "mask": mask, "bias": bias}
        return torch.func.functional_call(layer, own, (x,))  # type: ignore[no-any-return]

    return call


def _sparse_call(pattern: SparsityPattern, bias: bool, device: torch.device) -> Call:
    """Return the call of a layer with these connections, which takes values and bias as arguments."""
    layer = SparseLinear(pattern.shape[1], pattern.shape[0], bias, pattern=pattern, device=device)

    def call(x: Tensor, weight: Tensor, mask: Placed, bias: Bias) -> Tensor:
        own: dict[str, Any] = {"weight_values": mask.values(weight), "bias": bias}
        return torch.func.functional_call(layer, own, (x,))  # type: ignore[no-any-return]

    return call
