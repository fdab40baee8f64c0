"""``masked_linear`` as a function, with its own backward and forward-mode rules.

The rules save x, the weight and the mask, and no masked copy of the weight: a copy saved as an intermediate would cost
memory and break second order. Small layers go without the rules: a Function takes longer than their products. Under
``torch.compile`` and ``torch.export`` the plain expression stands in, whose automatic derivatives are the same: Dynamo
refuses a Function that has a forward-mode rule (https://github.com/pytorch/pytorch/issues/180284) and drops such rules
inside compiled ``torch.func`` transforms (https://github.com/pytorch/pytorch/issues/192985).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor
from torch.autograd import forward_ad

from maskedlinear.masks import as_mask
from maskedlinear.spec import check_floating, check_shapes
from maskedlinear_torch._kept import Kept, mask_in_place, masked_by_bits, new_memory

__all__ = [
    "FLOATING",
    "apply_mask",
    "as_dtensor_like",
    "as_tensor",
    "autocast_arguments",
    "can_skip_checks",
    "check_dense",
    "checked_linear",
    "checked_mask",
    "flatten_batch",
    "full_tensor",
    "in_transform",
    "is_autocast_on",
    "is_grads_batched",
    "is_nested",
    "is_plain",
    "is_tracing",
    "mask_tensor",
    "masked_linear",
    "small_linear",
]

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_SMALL = 1 << 14  # weights up to which a Function costs more than its rules save
_ZERO = torch.zeros((), device="cpu")  # of no dtype or device of its own in torch.where; a number takes longer

# Private, for want of a public way to ask which torch.func transforms are on: a torch that renames it still imports.
_peek = getattr(torch._C._functorch, "peek_interpreter_stack", None)
_is_batch = getattr(torch._C._functorch, "is_legacy_batchedtensor", None)
is_autocast_on = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


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
    if torch.compiler.is_compiling() or is_nested("Jvp"):
        return _linear(x, apply_mask(weight, mask), bias)
    return checked_linear(x, weight, mask, bias, None)


def checked_linear(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, kept: Kept | None) -> Tensor:
    """Return y for arguments that are checked; a layer hands in what it keeps of its masked weight."""
    if weight.numel() <= _SMALL and weight.itemsize > 2:
        return F.linear(x, apply_mask(weight, mask), bias)
    if torch.is_grad_enabled() or in_transform(x):
        rule = _MaskedLinearInTransform if in_transform(x) else _MaskedLinear
        return rule.apply(x, weight, mask, bias, kept)  # type: ignore[no-any-return, no-untyped-call]
    # Nothing to differentiate: a Function would only cost time.
    masked = (
        kept.at_rest(weight, mask)
        if kept is not None and _can_keep(weight, mask)
        else _apply_mask_bitwise(weight, mask)
    )
    return _linear(x, masked, bias)


def small_linear(x: Any, size: int, weight: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor | None:
    """Return y for a layer's own parameters and mask if ``size`` is small, and else ``None``, for the checks to see why.

    The plain expression is right under every transform, and torch refuses by itself what does not belong together; so
    nothing is checked, which would take as long as the masking.
    """
    small = size <= _SMALL and type(x) is Tensor and type(weight) is torch.nn.Parameter and weight.itemsize > 2
    if not small or is_autocast_on() or torch.compiler.is_compiling():
        return None
    try:
        return F.linear(x, torch.where(mask, weight, _ZERO), bias)
    except RuntimeError:
        return None


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


def can_skip_checks(x: Any, in_features: int, weight: Tensor, mask: Tensor) -> bool:
    """Whether a layer's input fits its parameters, which fit each other, and nothing looks on but autograd.

    Read at every call: the order and the forms are those that take the least time.
    """
    if type(x) is not Tensor or type(weight) is not torch.nn.Parameter or type(mask) is not Tensor or is_tracing():
        return False
    device = x.device
    return (
        x.dtype is weight.dtype
        and x.dim() > 0
        and x.shape[-1] == in_features
        and device == weight.device == mask.device
        and not torch.compiler.is_compiling()
        and device.type != "meta"
        and not torch.is_autocast_enabled(device.type)
        and not in_transform(x)
    )


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


def checked_mask(mask: Any, shape: Sequence[int]) -> Tensor:
    """Return a copy of a layer's ``mask`` as a boolean tensor, on the device where it is, checked.

    Raises:
        ValueError: if the mask has another shape, holds anything but 0 and 1, is sparse or has no values (``"meta"``).
    """
    if isinstance(mask, Tensor):
        check_dense(mask)
        if mask.is_meta:
            raise ValueError("a mask must have values; got a tensor on the meta device: pass one on another device")
        full: Tensor = full_tensor(mask.detach())
        if full.dtype is torch.bool and full.shape == tuple(shape):
            return full.clone()
        mask = full
    return as_tensor(as_mask(mask, tuple(shape)))


def check_dense(mask: Tensor) -> None:
    """Raise a ``ValueError`` that names the layout if ``mask`` is sparse, which ``torch.where`` cannot take."""
    if mask.layout is not torch.strided:
        raise ValueError(f"a mask must be a dense tensor; got one of layout {mask.layout}: pass mask.to_dense()")


def as_tensor(mask: Any) -> Tensor:
    """Return a boolean array of any framework as a tensor; one that is not a tensor is copied to the CPU."""
    # On the CPU whatever the default device is, and contiguous, because torch refuses negative strides.
    return mask if isinstance(mask, Tensor) else torch.tensor(np.ascontiguousarray(mask), device="cpu")


def apply_mask(tensor: Tensor, mask: Tensor) -> Tensor:
    """Return ``where(mask, tensor, 0)``: nothing stored under the mask gets through, NaN included."""
    return torch.where(mask, tensor, 0)


def _apply_mask_bitwise(tensor: Tensor, mask: Tensor) -> Tensor:
    """:func:`apply_mask`, several times as fast where nothing differentiates it."""
    return (
        masked_by_bits(tensor, mask) if is_plain(tensor) and tensor.device.type == "cpu" else apply_mask(tensor, mask)
    )


def is_plain(tensor: Tensor) -> bool:
    """Whether ``tensor`` is an ordinary one, a DTensor being none, and nothing differentiates what is made of it."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and not torch.is_grad_enabled()
        and forward_ad._current_level < 0
        and not in_transform(tensor)
    )


def as_dtensor_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return ``tensor`` cut as ``like`` is if that is a DTensor, as FSDP and tensor parallelism make it; else as it is."""
    mesh = getattr(like, "device_mesh", None)
    if mesh is None:
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = DTensor.from_local(
        full_tensor(tensor).to(like.device), mesh, [Replicate()] * mesh.ndim, run_check=False
    )
    return everywhere.redistribute(placements=like.placements)  # type: ignore[attr-defined]


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor of a DTensor, on every process; another tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def is_tracing() -> bool:
    """Whether ``torch.jit.trace`` records: it cannot save a Function."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def in_transform(tensor: Tensor) -> bool:
    """Whether a ``torch.func`` transform is on, or ``tensor`` is a batch of gradients (``is_grads_batched``)."""
    return _peek is None or _peek() is not None or is_grads_batched(tensor)


def is_grads_batched(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a batch of gradients that ``torch.autograd.grad`` was asked for with ``is_grads_batched``."""
    return _is_batch is None or bool(_is_batch(tensor))


def is_nested(mode: Literal["Grad", "Jvp"]) -> bool:
    """Whether a transform of ``torch.func`` is on twice: of forward mode a Function's rule then loses the outer tangent.

    https://github.com/pytorch/pytorch/issues/197867
    """
    if _peek is None or _peek() is None:  # the ordinary call: no transform is on
        return False
    kind = getattr(torch._C._functorch.TransformType, mode)
    return bool(sum(level.key() == kind for level in torch._C._functorch.get_interpreter_stack() or ()) > 1)


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast as autocast casts a linear layer's arguments: float64 stays."""
    return tensor if tensor.dtype is torch.float64 else tensor.to(dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``torch.nn.functional.linear``, rounded once: of a half type that is not contiguous and no matrix, torch rounds the
    product before it adds the bias.
    """
    if bias is None or x.dim() == 2 or x.itemsize > 2 or x.is_contiguous():
        return F.linear(x, weight, bias)
    return F.linear(flatten_batch(x), weight, bias).reshape(*x.shape[:-1], weight.shape[0])


def flatten_batch(tensor: Tensor) -> Tensor:
    """Merge all batch dimensions into one, of whatever size; ``reshape(-1, n)`` cannot when n is 0."""
    return tensor if tensor.dim() == 2 else tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _can_keep(weight: Tensor, mask: Tensor) -> bool:
    """Whether the masked weight of these may be kept: ordinary ones on the CPU, of which autograd counts the versions."""
    return (
        weight.is_cpu
        and is_plain(weight)
        and weight.is_contiguous()
        and mask.is_contiguous()
        and not weight.is_shared()
        and not weight.is_inference()
        and not mask.is_inference()
    )


def _gradient(g: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """Return ``where(mask, gᵀ · x, 0)``."""
    if g.device.type == "cpu" and is_plain(g) and is_plain(x):
        product = new_memory((g.shape[1], x.shape[1]), g.dtype)
        return mask_in_place(torch.mm(g.mT, x, out=product), mask)
    return apply_mask(g.mT @ x, mask)


class _MaskedLinear(torch.autograd.Function):
    """The rules. Arguments: x, weight, mask, bias or ``None``, and what a layer keeps, or ``None``."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _MaskedLinearInTransform.setup_context(ctx, inputs, inputs[0])
        return _MaskedLinearInTransform.forward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask = ctx.saved_tensors
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            masked = ctx.kept.of(weight, mask) if ctx.kept is not None and _can_keep(weight, mask) else None
            dx = g @ (_apply_mask_bitwise(weight, mask) if masked is None else masked)
        if ctx.needs_input_grad[1]:
            dweight = _gradient(flatten_batch(g), flatten_batch(x), mask)
        if ctx.needs_input_grad[3]:
            dbias = flatten_batch(g).sum(0)
        return dx, dweight, None, dbias, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dweight: Tensor | None, _: None, dbias: Tensor | None, __: None) -> Tensor:
        x, weight, mask = ctx.saved_tensors
        # A sum of two products: half types form it in float32, so that it is rounded once.
        wide = torch.promote_types(x.dtype, torch.float32)
        dy = torch.zeros((), dtype=wide, device=x.device).expand(*x.shape[:-1], weight.shape[0])
        if dx is not None:
            dy = dy + F.linear(dx.to(wide), apply_mask(weight, mask).to(wide))
        if dweight is not None:
            dy = dy + F.linear(x.to(wide), apply_mask(dweight, mask).to(wide))
        if dbias is not None:
            dy = dy + dbias.to(wide)
        return dy.to(x.dtype)


class _MaskedLinearInTransform(_MaskedLinear):
    """The same for ``torch.func``, which needs the two steps apart; apart, they take far longer to call."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, kept: Kept | None) -> Tensor:
        if kept is not None and _can_keep(weight, mask):
            return _linear(x, kept.derive(weight, mask), bias)
        return _linear(x, _apply_mask_bitwise(weight, mask), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.save_for_forward(*inputs[:3])
        ctx.kept = inputs[4]

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        x: Tensor,
        weight: Tensor,
        mask: Tensor,
        bias: Tensor | None,
        kept: Kept | None,
    ) -> tuple[Tensor, int]:
        # torch's own rule for a linear layer rounds a half type before the bias is added, and again after.
        def front(tensor: Tensor, dim: int | None) -> Tensor:
            return tensor if dim is None else tensor.movedim(dim, 0)

        x, weight, mask = (front(t, dim) for t, dim in zip((x, weight, mask), in_dims[:3], strict=True))
        if in_dims[1:4] == (None, None, None):  # one more batch dimension
            return _MaskedLinearInTransform.apply(x, weight, mask, bias, kept), 0  # type: ignore[no-untyped-call]
        copies: int = info.batch_size
        x = x if in_dims[0] is not None else x.expand(copies, *x.shape)
        masked = apply_mask(weight, mask).expand(copies, *weight.shape[-2:])
        rows = x.reshape(copies, math.prod(x.shape[1:-1]), x.shape[-1])
        if bias is None:
            y = torch.bmm(rows, masked.mT)
        else:
            bias = front(bias, in_dims[3])
            y = torch.baddbmm(bias.expand(copies, bias.shape[-1])[:, None], rows, masked.mT)
        return y.reshape(*x.shape[:-1], y.shape[-1]), 0
