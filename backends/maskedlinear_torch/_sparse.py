"""``sparse_linear``: the masked linear layer with one value a connection, and no matrix of the layer's shape."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskedlinear.pattern import SparsityPattern
from maskedlinear.spec import check_floating, check_shapes
from maskedlinear_torch._functional import FLOATING, autocast_arguments, flatten_batch
from maskedlinear_torch._layer_product import belong_together, is_layer_product, layer_product
from maskedlinear_torch._products import DevicePattern, is_fake, laid_out, spmm

__all__ = ["check_tensors", "product", "real_tensor", "sparse_linear"]


def sparse_linear(x: Tensor, values: Tensor, pattern: SparsityPattern, bias: Tensor | None = None) -> Tensor:
    """Return ``y = x · Wᵀ + bias``, where W has ``values`` at the connections of ``pattern`` and nothing elsewhere.

    Differentiable any number of times, in reverse and in forward mode, under every ``torch.func`` transform (but for a map
    over the pattern) and under ``torch.compile``, whose programs take any pattern that has been used, and are compiled anew
    for one that was not. Time and memory grow with the connections and the batch. Half types are computed in float32 and
    rounded once. NaN or infinity in x reaches only what it is connected to; on GPUs, above a few per cent of the
    connections, all that is summed with it, as in a dense product.

    Args:
        x: shape ``(..., in)``.
        values: shape ``(nnz,)``, in x's dtype and on its device, in the pattern's order.
        pattern: the connections, of shape ``(out, in)``. Its indices move to x's device once, and stay there.
        bias: shape ``(out,)`` or ``None``.

    Returns:
        Shape ``(..., out)``.

    Raises:
        ValueError: if shapes, devices, or the number of values do not belong together.
        TypeError: if ``pattern`` is none, an argument is not a tensor, or dtypes are not floating or differ.
    """
    if not isinstance(pattern, SparsityPattern):
        raise TypeError(
            f"pattern must be a maskedlinear.pattern.SparsityPattern; got {type(pattern).__name__}: make one with "
            "SparsityPattern.from_mask(mask), SparsityPattern.from_edges(...) or SparsityPattern.from_scipy(matrix)"
        )
    check_tensors(x, values, bias)
    device_pattern = DevicePattern.new if is_fake(values) else DevicePattern.of  # fake indices are not kept
    return product(x, values, device_pattern(pattern, values.device), pattern.shape[1], bias)


def check_tensors(x: Tensor, values: Tensor, bias: Tensor | None) -> None:
    """Raise unless the arguments are tensors of floating dtypes."""
    for name, tensor in (("x", x), ("values", values), ("bias", bias)):
        if isinstance(tensor, Tensor):
            check_floating(name, tensor.dtype, tensor.dtype in FLOATING)
        elif tensor is not None or name != "bias":
            raise TypeError(
                f"{name} must be a torch.Tensor; got {type(tensor).__name__}: convert it with torch.as_tensor"
            )


def product(x: Tensor, values: Tensor, pattern: DevicePattern, in_features: int, bias: Tensor | None) -> Tensor:
    """Return y, or raise if the arguments do not belong together."""
    if is_layer_product(x, values, bias) and belong_together(x, values, pattern, in_features, bias):
        return layer_product(x, values, pattern, bias)
    check_tensors(x, values, bias)
    if tuple(values.shape) != (len(pattern.indices),):
        raise ValueError(
            f"values must have one entry for each of the pattern's {len(pattern.indices)} connections; got shape "
            f"{tuple(values.shape)}"
        )
    out = len(pattern.indptr) - 1  # whose shape Dynamo does not know where sizes are dynamic
    check_shapes(x.shape, (out, in_features), None if bias is None else bias.shape)
    x, values, bias = autocast_arguments(x, values, bias, "values")
    if is_layer_product(x, values, bias):
        return layer_product(x, values, pattern, bias)
    wide = torch.promote_types(x.dtype, torch.float32)
    columns = spmm(values.to(wide), laid_out(flatten_batch(x).mT.to(wide), pattern), pattern)
    y = columns.mT.contiguous().reshape(*x.shape[:-1], out)
    if bias is not None:
        y = y + bias.to(wide)  # last: hooks of FSDP2 get lost where a view is written to in place
    return y.to(x.dtype)


def real_tensor(name: str, numbers: Any) -> Tensor:
    """Return numbers as a tensor, if they are real."""
    tensor = numbers if isinstance(numbers, Tensor) else torch.tensor(np.asarray(numbers), device="cpu")
    if tensor.is_complex():
        raise TypeError(f"{name} must be real; got {tensor.dtype}: pass their .real")
    return tensor
