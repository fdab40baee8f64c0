"""``masked_linear`` as a function: one Function and one expression, and the rule that chooses between them.

The Function has the backward pass of the spec. It saves x, the weight and the mask, and no masked copy of the weight: a copy
saved as an intermediate would cost memory and break second order. It is taken where autograd alone looks on and the weight
is large. Everywhere else the expression stands, whose automatic derivatives are the same: for small weights, for which a
Function takes longer than the product; in every transform of ``torch.func`` and in forward mode; under ``torch.compile`` and
``torch.export``, since Dynamo refuses a Function with a forward-mode rule
(https://github.com/pytorch/pytorch/issues/180284) and drops such rules inside compiled ``torch.func`` transforms
(https://github.com/pytorch/pytorch/issues/192985).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor

from maskedlinear.masks import Recipe, as_mask
from maskedlinear.models import WeightAxes
from maskedlinear.spec import check_floating, check_shapes
from maskedlinear_torch._compat import in_transform, is_forward_mode, is_tracing, nothing_looks_on
from maskedlinear_torch._cpu_kernels import masked_gradient
from maskedlinear_torch._dtensors import full_tensor, is_sharded, on_parts
from maskedlinear_torch._storage import OwnWeight, is_plain, keep_bits, new_memory, steps, version_of, zero_masked

__all__ = [
    "FLOATING",
    "apply_mask",
    "as_tensor",
    "autocast_arguments",
    "check_dense",
    "checked_mask",
    "flatten_batch",
    "is_small",
    "linear",
    "mask_tensor",
    "masked_expression",
    "masked_function",
    "masked_linear",
    "recipe_of",
]

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SMALL = 1 << 14  # weights up to which a Function costs more than its rules save


def masked_linear(x: Tensor, weight: Tensor, mask: Any, bias: Tensor | None = None) -> Tensor:
    """Return ``y = x · where(mask, weight, 0)ᵀ + bias``, as :func:`maskedlinear.spec.forward` defines it.

    Differentiable any number of times, in reverse and in forward mode, and under every ``torch.func`` transform. The
    mask has no gradient; the weight's gradient is exactly +0 where the mask is ``False``, whatever x, weight and the
    cotangent hold. Under autocast the arguments are cast as those of ``torch.nn.functional.linear`` are.

    Args:
        x: shape ``(..., in)``.
        weight: shape ``(out, in)``, in x's dtype and on its device.
        mask: shape ``(out, in)``: a boolean tensor on the weight's device, or 0s and 1s, or any array of these on the
            CPU. Inside ``torch.compile`` and ``torch.vmap`` it must be a boolean tensor, since values cannot be checked
            there.
        bias: shape ``(out,)`` or ``None``.

    Returns:
        Shape ``(..., out)``.

    Raises:
        ValueError: if shapes or devices do not belong together, or the mask holds anything but 0 and 1.
        TypeError: if x, weight or bias is not a tensor, a dtype is not real floating-point, or the dtypes differ.
    """
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if isinstance(tensor, Tensor):
            check_floating(name, tensor.dtype, tensor.dtype in FLOATING)
        elif tensor is not None or name != "bias":
            raise TypeError(
                f"{name} must be a torch.Tensor; got {type(tensor).__name__}: convert it with torch.as_tensor"
            )
    if is_tracing() and isinstance(mask, Tensor) and mask.dtype is torch.bool:  # shapes are no numbers there
        return F.linear(x, apply_mask(weight, mask), bias)
    check_shapes(x.shape, weight.shape, None if bias is None else bias.shape)
    mask = mask_tensor(mask, weight)
    x, weight, bias = autocast_arguments(x, weight, bias, "weight")
    plain = type(x) is Tensor and type(weight) in (Tensor, torch.nn.Parameter)
    if is_small(weight) or not plain or torch.compiler.is_compiling() or not nothing_looks_on():
        return masked_expression(x, weight, mask, bias)
    if not torch.is_grad_enabled():  # nothing to differentiate: a Function would only cost time
        return linear(x, keep_bits(weight, mask), bias)
    return masked_function(x, weight, mask, bias, None)


def masked_expression(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    """Return y by a select and a product, which torch differentiates, transforms and compiles by itself."""
    masked = apply_mask(weight, mask)
    if x.dtype in (torch.bfloat16, torch.float16) and (in_transform() or is_forward_mode()):
        # torch's own rules for a product and a sum of half types round more than once.
        return F.linear(x.float(), masked.float(), None if bias is None else bias.float()).to(x.dtype)
    return linear(x, masked, bias)


def masked_function(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, own: OwnWeight | None) -> Tensor:
    """Return y by the Function.

    Args:
        x: shape ``(..., in)``; an ordinary tensor, as the others are.
        weight: shape ``(out, in)``.
        mask: shape ``(out, in)``.
        bias: shape ``(out,)`` or ``None``.
        own: of a layer whose weight is +0 under the mask, so that there is nothing to select; else ``None``.
    """
    return _MaskedLinear.apply(x, weight, mask, bias, own)  # type: ignore[no-any-return, no-untyped-call]


def is_small(weight: Tensor) -> bool:
    """Whether the Function would take longer for this weight than it saves."""
    return weight.numel() <= SMALL


def autocast_arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, called: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast the arguments as autocast does, if it is on, and check that they belong together.

    Raises:
        TypeError: if their dtypes differ.
        ValueError: if their devices do. ``called`` is what the message calls the weight.
    """
    kind = weight.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):  # which refuses to answer for meta
        dtype = torch.get_autocast_dtype(kind)
        x, weight = _autocast(x, dtype), _autocast(weight, dtype)
        bias = None if bias is None else _autocast(bias, dtype)
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is not None and (tensor.dtype != weight.dtype or tensor.device != weight.device):
            raise (TypeError if tensor.dtype != weight.dtype else ValueError)(
                f"x, {called} and bias must have one dtype and one device; got {name} in {tensor.dtype} on {tensor.device} "
                f"and {called} in {weight.dtype} on {weight.device}: move one of them with .to(...)"
            )
    return x, weight, bias


def mask_tensor(mask: Any, weight: Tensor) -> Tensor:
    """Return ``mask`` as a boolean tensor on the weight's device, checked.

    An array that is not a tensor moves to the weight's device. A tensor on another device is the caller's mistake.

    Raises:
        ValueError: if the mask is on another device, has another shape, or holds anything but 0 and 1.
    """
    if not isinstance(mask, Tensor):
        return as_tensor(as_mask(mask, weight.shape)).to(weight.device)
    check_dense(mask)
    if mask.device != weight.device:
        raise ValueError(
            f"mask and weight must be on one device; got the mask on {mask.device} and the weight on {weight.device}: "
            f"move the mask with .to({str(weight.device)!r})"
        )
    if mask.dtype is torch.bool:
        return mask if mask.shape == weight.shape else as_tensor(as_mask(mask, weight.shape))
    if mask.is_meta:
        return mask_tensor(mask.bool(), weight)
    unchecked = ValueError(
        f"inside torch.compile and torch.vmap a mask must be boolean, because its values cannot be checked; "
        f"got {mask.dtype}: convert it before, with mask.bool()"
    )
    if torch.compiler.is_compiling():
        raise unchecked
    try:
        return as_tensor(as_mask(mask.detach(), weight.shape))
    except RuntimeError as error:  # vmap refuses to look at a value
        raise unchecked from error


def checked_mask(mask: Any, shape: Sequence[int], axes: WeightAxes | None = None) -> Tensor:
    """Return a copy of a layer's ``mask`` as a boolean tensor, on the device where it is, checked; of a DTensor, cut as it.

    What is made of a recipe, by the weight's axes, has it as its attribute ``recipe``, and so has what is made of that; see
    :func:`recipe_of`.

    Raises:
        ValueError: if the mask has another shape, holds anything but 0 and 1, is sparse or has no values (``"meta"``).
    """
    if isinstance(mask, Tensor):
        check_dense(mask)
        if mask.is_meta:
            raise ValueError("a mask must have values; got a tensor on the meta device: pass one on another device")
        if is_sharded(mask) and mask.shape == tuple(shape):  # what each process has is looked at by it
            part = on_parts(lambda part: checked_mask(part, part.shape), mask.detach())
            return _with_recipe(part, mask)
        full: Tensor = full_tensor(mask.detach())
        if full.dtype is torch.bool and full.shape == tuple(shape):
            return _with_recipe(full.clone(), mask)
        mask = full
    given = mask.make(tuple(shape), axes) if isinstance(mask, Recipe) else mask
    return _with_recipe(as_tensor(as_mask(given, tuple(shape))), mask)


def recipe_of(mask: Any) -> Recipe | None:
    """Return the recipe that a mask is, or was just made of."""
    return mask if isinstance(mask, Recipe) else getattr(mask, "recipe", None)


def _with_recipe(checked: Tensor, mask: Any) -> Tensor:
    recipe = recipe_of(mask)
    if recipe is not None:
        checked.recipe = recipe  # type: ignore[attr-defined]
    return checked


def check_dense(mask: Tensor) -> None:
    """Raise a ``ValueError`` that names the layout if ``mask`` is sparse, which torch's select cannot take."""
    if mask.layout is not torch.strided:
        raise ValueError(f"a mask must be a dense tensor; got one of layout {mask.layout}: pass mask.to_dense()")


def as_tensor(mask: Any) -> Tensor:
    """Return a boolean array of any framework as a tensor; one that is not a tensor is copied to the CPU."""
    # On the CPU whatever the default device is, and contiguous, because torch refuses negative strides.
    return mask if isinstance(mask, Tensor) else torch.tensor(np.ascontiguousarray(mask), device="cpu")


def apply_mask(tensor: Tensor, mask: Tensor) -> Tensor:
    """Return ``where(mask, tensor, 0)``: nothing stored under the mask gets through, NaN included."""
    return torch.where(mask, tensor, 0)


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast as autocast casts a linear layer's arguments: float64 stays."""
    return tensor if tensor.dtype is torch.float64 else tensor.to(dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``torch.nn.functional.linear``, rounded once: of a half type that is not contiguous and no matrix, torch rounds the
    product before it adds the bias.
    """
    if bias is None or x.dim() == 2 or x.itemsize > 2 or x.is_contiguous():
        return F.linear(x, weight, bias)
    return F.linear(flatten_batch(x), weight, bias).reshape(*x.shape[:-1], weight.shape[0])


def flatten_batch(tensor: Tensor) -> Tensor:
    """Merge all batch dimensions into one, of whatever size; ``reshape(-1, n)`` cannot when n is 0."""
    return tensor if tensor.dim() == 2 else tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


class _MaskedLinear(torch.autograd.Function):
    """The backward pass of the spec. Arguments: x, weight, mask, bias or ``None``, and what a layer knows of its weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, own: OwnWeight | None
    ) -> Tensor:
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        # What no gradient needs is not saved: an edit of it later would be an error where there is none in nn.Linear.
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None, mask)
        ctx.own = own
        if own is not None:
            ctx.version, ctx.steps, own.made = version_of(weight), steps[0], None
        return linear(x, weight if own is not None else keep_bits(weight, mask), bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask = ctx.saved_tensors
        dx = dweight = dbias = None
        if weight is not None:
            dx = g @ _masked_weight(ctx, g, weight, mask)
        if x is not None:
            dweight = _weight_gradient(flatten_batch(g), flatten_batch(x), mask)
            if ctx.own is not None and type(dweight) is Tensor and is_plain(dweight):
                ctx.own.made = weakref.ref(dweight), dweight._version
        if ctx.needs_input_grad[3]:
            dbias = flatten_batch(g).sum(0)
        return dx, dweight, None, dbias, None


def _masked_weight(ctx: Any, g: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """Return the masked weight for dx: the layer's own as it is, if nothing can have been written to it since."""
    if not (is_plain(g) and is_plain(weight)):
        return apply_mask(weight, mask)
    if ctx.own is not None and ctx.version is not None and ctx.version == version_of(weight) and ctx.steps == steps[0]:
        return weight
    return keep_bits(weight, mask)


def _weight_gradient(g: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """Return ``where(mask, gᵀ · x, 0)``."""
    if g.is_cpu and is_plain(g) and is_plain(x):
        out = new_memory((g.shape[1], x.shape[1]), g.dtype)
        if masked_gradient(g, x, mask, out):
            return out
        return zero_masked(torch.mm(g.mT, x, out=out), mask)
    return apply_mask(g.mT @ x, mask)
