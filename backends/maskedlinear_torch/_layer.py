"""``MaskedLinear``: a drop-in ``torch.nn.Linear`` whose mask decides which of its weights take part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Self

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import skip_init

from maskedlinear.masks import as_mask
from maskedlinear_torch._functional import (
    FLOATING,
    apply_mask,
    as_dtensor_like,
    as_tensor,
    can_skip_checks,
    checked_linear,
    checked_mask,
    full_tensor,
    masked_linear,
    small_linear,
)
from maskedlinear_torch._kept import Kept

__all__ = ["MaskedLinear"]

torch.fx.wrap("masked_linear")  # one node of a traced graph: the checks of its arguments cannot be traced


class MaskedLinear(nn.Linear):
    """A linear layer whose connections are chosen by a mask: ``y = x · where(mask, weight, 0)ᵀ + bias``.

    The whole weight matrix is kept. A masked connection takes no part in the forward or the backward pass, keeps its
    stored weight, and comes back when the mask brings it back. ``state_dict`` has the keys ``weight``, ``bias`` and
    ``mask``; the state of a plain ``nn.Linear`` loads too and leaves the mask as it is.

    A layer on the CPU with more than 16384 weights keeps its masked weight from one call to the next, as much memory again
    as the weight: training writes it anew at every call, inference only once weight or mask have changed, as autograd
    counts. Changes that it does not count, through ``.data`` or a NumPy view, are noticed where they change the weights of a
    whole row, a whole column or more, or most of the mask; ``weight.data[0, 0] = 1`` and ``mask.data[3] = False`` may not
    be, until the layer is trained or its weight or mask changed in another way (``mask[3] = False`` and ``set_mask`` are
    counted). Elsewhere than on the CPU every call masks anew.

    Optimizers move a weight whose gradient is zero (momentum, weight decay): guard them with
    :func:`maskedlinear.torch.freeze_masked`. ``nn.TransformerEncoderLayer`` and ``nn.MultiheadAttention`` read the
    ``weight`` of their linear layers past ``forward`` in their inference fast path, and so past any mask.

    Args:
        in_features: the size of x's last dimension.
        out_features: the size of y's last dimension.
        bias: whether the layer has a bias, shape ``(out_features,)``.
        mask: shape ``(out_features, in_features)``, booleans or 0s and 1s, an array of any framework on the CPU or a
            tensor; copied. ``None`` is the full mask.
        init_fan_in: what :meth:`reset_parameters` scales the weights to: each row's ``"live"`` inputs, or the
            ``"full"`` number of inputs, as ``nn.Linear`` does. The same without a mask.
        device: as in ``nn.Linear``. A layer made on ``"meta"`` keeps the mask it was given for ``reset_parameters``.
        dtype: as in ``nn.Linear``; a real floating dtype.

    Shapes:
        x ``(..., in_features)``; y ``(..., out_features)``.

    Raises:
        ValueError: if the mask has another shape, holds anything but 0 and 1, is sparse or has no values (``"meta"``), or
            ``init_fan_in`` is neither choice.
        TypeError: if ``dtype`` is none of float64, float32, bfloat16 and float16, or a mask or a device is in another
            argument's place.
    """

    mask: Tensor
    # nn.Linear's states carry version 1: a missing mask is their nature, and an error in ours.
    _version = 2

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        mask: Any = None,
        *,
        init_fan_in: Literal["live", "full"] = "live",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if in_features < 0 or out_features < 0:
            raise ValueError(f"a layer's sizes must not be negative; got in={in_features}, out={out_features}")
        if hasattr(bias, "__len__"):
            raise TypeError(f"bias must be True or False; got {type(bias).__name__}: a mask is passed as mask=...")
        if isinstance(mask, str | torch.device):
            raise TypeError(f"mask must be an array; got {mask!r}: a device is passed as device=...")
        if dtype is not None and dtype not in FLOATING:
            raise TypeError(
                "dtype must be a real floating-point dtype of torch (float64, float32, bfloat16 or float16), so that "
                f"weights have a gradient; got {dtype!r}"
            )
        if init_fan_in not in ("live", "full"):
            raise ValueError(f"init_fan_in must be 'live' or 'full'; got {init_fan_in!r}")
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.init_fan_in = init_fan_in
        self._kept = Kept()
        self.register_buffer("mask", torch.ones_like(self.weight, dtype=torch.bool, requires_grad=False))
        # A layer on the meta device has no values: the mask waits here until reset_parameters can write it.
        self._pending_mask = (
            torch.ones(self.weight.shape, dtype=torch.bool, device="cpu") if self.weight.is_meta else None
        )
        if mask is not None:
            self.set_mask(mask)
            self._scale_to_live_inputs()

    def forward(self, input: Tensor) -> Tensor:
        """Return ``masked_linear(input, weight, mask, bias)``: shape ``(..., in)`` to ``(..., out)``."""
        weight, mask, bias = self.weight, self.mask, self.bias  # each look-up takes its time
        y = small_linear(input, self.in_features * self.out_features, weight, mask, bias)
        if y is not None:
            return y
        if can_skip_checks(input, self.in_features, weight, mask):
            return checked_linear(input, weight, mask, bias, self._kept)
        return masked_linear(input, weight, mask, bias)

    def set_mask(self, mask: Any) -> None:
        """Copy ``mask`` into the layer's own; it holds from the next call on.

        No weight changes, so setting an old mask again brings the old outputs back, bit for bit.

        Args:
            mask: shape ``(out_features, in_features)``, booleans or 0s and 1s, on any device but ``"meta"``.

        Raises:
            ValueError: if the mask has another shape, holds anything but 0 and 1, is sparse or has no values (``"meta"``);
                the layer is left as it was.
        """
        checked = checked_mask(mask, self.mask.shape)  # a copy: it may be a view of the layer's own
        with torch.no_grad():
            self.mask.copy_(as_dtensor_like(checked, self.mask))
            if self._pending_mask is not None:
                self._pending_mask.copy_(checked)

    @property
    def masked_weight(self) -> Tensor:
        """``where(mask, weight, 0)``, shape ``(out_features, in_features)``; differentiable in the weight."""
        return apply_mask(self.weight, as_dtensor_like(self.mask, self.weight))

    @property
    def sparsity(self) -> float:
        """The fraction of masked connections, in [0, 1]; 0 for a layer without any weight."""
        size = self.mask.numel()
        return (size - int(self.mask.sum())) / size if size else 0.0

    def reset_parameters(self) -> None:
        """Draw weights and bias anew, as ``nn.Linear`` does, scaled to the live inputs of each row.

        ``nn.Linear`` draws from U(-1/√in, 1/√in). With ``init_fan_in="live"`` a row with n live inputs is multiplied by
        √(in / n), which gives U(-1/√n, 1/√n): the signal keeps its variance at any sparsity. A row without live inputs
        keeps nn.Linear's range. Without a mask, or with the full one, the draw equals ``nn.Linear``'s bit for bit.

        Source: U. Evci et al., "Gradient Flow in Sparse Neural Networks and How Lottery Tickets Win", AAAI 2022, section 3.
        """
        super().reset_parameters()
        if "mask" not in self._buffers:  # nn.Linear.__init__ calls this before there is a mask
            return
        if self._pending_mask is not None and not self.mask.is_meta:
            self._take_pending()
        self._scale_to_live_inputs()

    def _scale_to_live_inputs(self) -> None:
        if self.init_fan_in == "full" or self.mask.is_meta or self.weight.is_meta:
            return
        with torch.no_grad():
            live = self.mask.sum(dim=1)
            scale = torch.where(live > 0, (self.in_features / live.clamp(min=1)).sqrt(), 1.0).to(self.weight.dtype)
            self.weight.mul_(as_dtensor_like(scale[:, None].expand(self.mask.shape).contiguous(), self.weight))
            if self.bias is not None:
                self.bias.mul_(as_dtensor_like(scale, self.bias))

    @classmethod
    def from_linear(cls, linear: nn.Linear, mask: Any = None) -> Self:
        """Return a masked layer with a copy of ``linear``'s parameters, in its dtype, device and training state.

        Args:
            linear: an ``nn.Linear``. Of a ``MaskedLinear`` the mask is copied too, unless another is given.
            mask: shape ``(out, in)``, booleans or 0s and 1s; ``None`` is the full mask.

        Raises:
            ValueError: if the mask has another shape, or holds anything but 0 and 1.
            TypeError: if ``linear`` is not an ``nn.Linear``, or one without values yet (``LazyLinear``).
        """
        if not isinstance(linear, nn.Linear) or isinstance(linear.weight, UninitializedParameter):
            raise TypeError(
                f"from_linear takes an nn.Linear that has its weight; got {type(linear).__name__}: "
                "pass an nn.Linear, or call a lazy one once before"
            )
        if mask is None and isinstance(linear, MaskedLinear):
            mask = linear.mask if linear._pending_mask is None else linear._pending_mask
        layer: Self = skip_init(  # draws nothing from the random generator
            cls,
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            init_fan_in=getattr(linear, "init_fan_in", "live"),
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        layer.set_mask(torch.ones(layer.mask.shape, dtype=torch.bool) if mask is None else mask)
        if not layer.mask.is_meta:
            layer._pending_mask = None
        _copy_parameters(linear, layer)
        return layer

    @classmethod
    def adopt(cls, linear: nn.Linear, mask: Any = None) -> Self:
        """Turn an ``nn.Linear`` into a masked layer: the same object, with the same parameters, hooks and state.

        Args:
            linear: an ``nn.Linear``, no subclass, whose weight is a parameter.
            mask: shape ``(out, in)``, booleans or 0s and 1s; ``None`` is the full mask.

        Raises:
            ValueError: if the mask has another shape, or holds anything but 0 and 1; the layer is left as it was.
            TypeError: if ``linear`` is anything else.
        """
        if type(linear) is not nn.Linear or "weight" not in linear._parameters:
            raise TypeError(
                f"adopt takes a plain nn.Linear whose weight is a parameter; got {type(linear).__name__}: a copy is made by "
                "MaskedLinear.from_linear"
            )
        if mask is not None and not isinstance(mask, Tensor):
            mask = as_tensor(as_mask(mask, linear.weight.shape))
        linear.__class__ = cls
        layer: Self = linear  # type: ignore[assignment]
        layer.init_fan_in, layer._kept = "live", Kept()
        layer.register_buffer("mask", torch.ones_like(linear.weight, dtype=torch.bool, requires_grad=False))
        shape = linear.weight.shape
        layer._pending_mask = torch.ones(shape, dtype=torch.bool, device="cpu") if linear.weight.is_meta else None
        if mask is not None:
            try:
                layer.set_mask(mask)
            except ValueError:
                layer._plain()
                raise
        return layer

    def release(self) -> nn.Linear:
        """Turn this layer into a plain ``nn.Linear`` with the same outputs: the same object, whose masked weights become 0.

        Raises:
            TypeError: if this is a subclass, or the weight is computed.
        """
        if type(self) is not MaskedLinear or "weight" not in self._parameters:
            raise TypeError(
                f"release turns a plain MaskedLinear into an nn.Linear; got {type(self).__name__}: to_linear makes a copy"
            )
        if not self.weight.is_meta:
            with torch.no_grad():
                self.weight.copy_(apply_mask(self.weight, as_dtensor_like(self.mask, self.weight)))
        return self._plain()

    def _plain(self) -> nn.Linear:
        for name in ("mask", "init_fan_in", "_kept", "_pending_mask"):
            delattr(self, name)
        linear: nn.Linear = self
        linear.__class__ = nn.Linear
        return linear

    def to_linear(self) -> nn.Linear:
        """Return a plain ``nn.Linear`` with the same outputs: a copy, whose masked weights are 0."""
        linear: nn.Linear = skip_init(
            nn.Linear,
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        _copy_parameters(self, linear)
        with torch.no_grad():
            linear.weight.copy_(apply_mask(linear.weight, full_tensor(self.mask)))
        return linear

    def extra_repr(self) -> str:
        """Add the sparsity to ``nn.Linear``'s representation."""
        return super().extra_repr() + ("" if self.mask.is_meta else f", sparsity={self.sparsity:.4g}")

    def __setattr__(self, name: str, value: Any) -> None:
        # A reassigned buffer is lost to DDP (https://github.com/pytorch/pytorch/issues/63916) and would go unchecked.
        # Only a meta buffer, which cannot hold values, gives way: load_state_dict(assign=True) relies on it.
        if name != "mask" or "mask" not in self.__dict__.get("_buffers", {}):
            super().__setattr__(name, value)
        elif self.mask.is_meta and isinstance(value, Tensor):
            super().__setattr__(name, as_mask(value, self.mask.shape))
        else:
            self.set_mask(value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        mask = self.mask
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._kept = Kept()  # the old one holds on to as much memory as the layer has left
        if self.mask.is_meta:
            if not mask.is_meta and self._pending_mask is None:
                self._pending_mask = full_tensor(mask).cpu()  # as if the layer had been made there
        elif not mask.is_meta:
            if self.mask is not mask:  # .to_empty leaves a tensor without values, and .type(dtype) converts every one
                self._buffers["mask"] = mask.to(self.mask.device)
        elif self._pending_mask is not None:
            self._take_pending()
        return self

    def _take_pending(self) -> None:
        """Write the mask of a layer that was made on the meta device, where it has values now."""
        self._buffers["mask"] = torch.empty_like(self.mask, dtype=torch.bool)
        with torch.no_grad():
            self.mask.copy_(as_dtensor_like(self._pending_mask, self.mask))  # type: ignore[arg-type]
        self._pending_mask = None

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "mask"
        if key in state_dict:
            try:
                state_dict = {**state_dict, key: as_mask(state_dict[key], self.mask.shape)}
            except ValueError as error:
                error_msgs.append(f"{key}: {error}")
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if key in state_dict:
            if not self.mask.is_meta:
                self._pending_mask = None
        elif key in missing_keys and local_metadata.get("version") != self._version:
            missing_keys.remove(key)


def _copy_parameters(source: nn.Linear, target: nn.Linear) -> None:
    target.train(source.training)
    for name, parameter in target.named_parameters():
        original = getattr(source, name)  # which a parametrization may compute
        with torch.no_grad():
            parameter.copy_(full_tensor(original))
        parameter.requires_grad_(original.requires_grad)
