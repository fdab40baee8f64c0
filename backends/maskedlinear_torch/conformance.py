"""The PyTorch backend, as the conformance suite sees it: :class:`maskedlinear.backends.Backend` for torch."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskedlinear_torch import masked_linear

__all__ = ["TorchBackend"]


class TorchBackend:
    """``maskedlinear.torch.masked_linear``, eager, on one device."""

    name = "torch"

    def versions(self) -> Mapping[str, str]:
        """Return the versions of torch and, where it is built for one, CUDA."""
        cuda = {"cuda": torch.version.cuda} if torch.version.cuda else {}
        return {"torch": torch.__version__, **cuda}

    def devices(self) -> Sequence[str]:
        """Return the CPU, and CUDA where there is a device."""
        return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

    def device_name(self, device: str) -> str:
        """Return the GPU's name, or the machine's architecture."""
        return torch.cuda.get_device_name() if device == "cuda" else platform.machine()

    def dtypes(self, device: str) -> Sequence[str]:
        """Return the dtypes of the layer."""
        return ("float64", "float32", "bfloat16", "float16")

    @contextmanager
    def strict(self) -> Iterator[None]:
        """Turn TF32 and reductions in half precision off."""
        matmul = torch.backends.cuda.matmul
        precision = torch.get_float32_matmul_precision()
        half, brain = matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction
        try:
            torch.set_float32_matmul_precision("highest")
            matmul.allow_fp16_reduced_precision_reduction = matmul.allow_bf16_reduced_precision_reduction = False
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
            matmul.allow_fp16_reduced_precision_reduction = half
            matmul.allow_bf16_reduced_precision_reduction = brain

    def asarray(self, values: NDArray[Any], dtype: str, device: str) -> Tensor:
        """Return ``values`` as a tensor."""
        tensor = torch.tensor(np.asarray(values))
        return tensor.to(device=device, dtype=torch.bool if values.dtype == bool else getattr(torch, dtype))

    def asnumpy(self, array: Tensor) -> NDArray[Any]:
        """Return ``array`` in float64, or as it is if boolean."""
        host = array.detach().cpu()
        return host.numpy() if host.dtype is torch.bool else host.double().numpy()

    def masked_linear(self, x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``y``."""
        return masked_linear(x, weight, mask, bias)

    def vjp(
        self, x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, g: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the gradients that ``torch.autograd.grad`` gives, as a training loop's ``backward`` does."""
        inputs = [array.detach().requires_grad_() for array in (x, weight, bias) if array is not None]
        y = masked_linear(inputs[0], inputs[1], mask, *inputs[2:])
        dx, dweight, *dbias = torch.autograd.grad(y, inputs, g)
        return dx, dweight, dbias[0] if dbias else None

    def jvp(
        self,
        x: Tensor,
        weight: Tensor,
        mask: Tensor,
        bias: Tensor | None,
        dx: Tensor,
        dweight: Tensor,
        dbias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return what ``torch.func.jvp`` gives."""
        primals = tuple(array for array in (x, weight, bias) if array is not None)
        tangents = tuple(array for array in (dx, dweight, dbias) if array is not None)

        def layer(x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
            return masked_linear(x, weight, mask, *bias)

        return tuple(torch.func.jvp(layer, primals, tangents))
