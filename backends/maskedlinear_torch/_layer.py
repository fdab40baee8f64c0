"""``MaskedLinear``: a drop-in ``torch.nn.Linear`` whose mask decides which of its weights take part.

``weight`` is +0 wherever the mask is off, so that whatever reads it, past ``forward`` too, reads the network that acts.
What is dormant lies apart, in ``dormant``; ``full_weight`` shows both together.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
import torch.fx
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import skip_init

from maskedlinear_torch._compat import is_any_autocast_on, is_exporting, is_tracing, nothing_looks_on
from maskedlinear_torch._constraints import set_constraints
from maskedlinear_torch._dtensors import as_dtensor_like, full_tensor, is_gathered
from maskedlinear_torch._fsdp import become, type_of
from maskedlinear_torch._functional import (
    FLOATING,
    apply_mask,
    checked_mask,
    is_small,
    linear,
    masked_function,
    masked_linear,
)
from maskedlinear_torch._masked_weight import KeepDormant, MaskedWeight, check_keep_dormant, forget
from maskedlinear_torch._storage import OwnWeight

__all__ = ["MaskedLinear"]

torch.fx.wrap("masked_linear")  # one node of a traced graph: the checks of its arguments cannot be traced


class MaskedLinear(MaskedWeight, nn.Linear):
    """A linear layer whose connections are chosen by a mask: ``y = x · where(mask, weight, 0)ᵀ + bias``.

    ``weight`` is +0 where the mask is ``False``, for everyone who reads it, and so is ``weight.grad``. The values that
    a mask takes out are *dormant*: they lie apart, where no optimizer, average or reader finds them, and come back bit
    for bit when :meth:`set_mask` brings them back. :attr:`full_weight` shows live and dormant values together.

    ``state_dict`` has the keys ``weight``, ``bias``, ``mask`` and ``dormant``, which may be left out: a plain
    ``nn.Linear`` that loads it with ``strict=False`` has the same outputs. The state of a plain
    ``nn.Linear`` loads too and leaves the mask as it is; what it has under the mask becomes dormant.

    What an optimizer leaves under the mask is set back to +0 as soon as it has stepped; what a ``copy_`` or a merge
    leaves there before the layer next acts, and in ``train``, ``eval``, ``state_dict``, copies and conversions. The
    dormant values stay. So an optimizer needs no guard for the layer to be right;
    :func:`maskedlinear.torch.freeze_masked` keeps masked gradients and state out of the optimizer. An edit of masked
    places that nothing counts (through ``.data`` or NumPy) acts, and is seen, until the next counted edit, step of an
    optimizer or one of the above. A mask that is edited in place acts at the layer's next call: what it switches off
    becomes dormant, and what it switches on starts from what stands in ``weight``.

    Layers that share a weight share its mask.

    Args:
        in_features: the size of x's last dimension.
        out_features: the size of y's last dimension.
        bias: whether the layer has a bias, shape ``(out_features,)``.
        mask: shape ``(out_features, in_features)``, booleans or 0s and 1s, an array of any framework on the CPU or a
            tensor; copied. Or a :class:`maskedlinear.masks.Recipe`. ``None`` is the full mask.
        init_fan_in: what :meth:`reset_parameters` scales the weights to: each row's ``"live"`` inputs, or the
            ``"full"`` number of inputs, as ``nn.Linear`` does. The same without a mask.
        keep_dormant: whether dormant values are kept: beside the weight, one array of its shape as soon as anything is
            masked, or on the ``"host"``. ``False`` lets them go: a connection that comes back starts at 0.
        device: as in ``nn.Linear``. A layer made on ``"meta"`` keeps the mask it was given until it has values.
        dtype: as in ``nn.Linear``; a real floating dtype.

    Shapes:
        x ``(..., in_features)``; y ``(..., out_features)``.

    Raises:
        ValueError: if the mask has another shape, holds anything but 0 and 1, is sparse or has no values (``"meta"``),
            or ``init_fan_in`` or ``keep_dormant`` is none of the choices.
        TypeError: if ``dtype`` is none of float64, float32, bfloat16 and float16, or a mask or a device is in another
            argument's place.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        mask: Any = None,
        *,
        init_fan_in: Literal["live", "full"] = "live",
        keep_dormant: KeepDormant = True,
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
        check_keep_dormant(keep_dormant)
        self.__dict__["_own"] = OwnWeight()
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.init_fan_in = init_fan_in
        self._become_masked(keep_dormant)
        if mask is not None:
            self._start(checked_mask(mask, self.weight.shape))

    def _start(self, mask: Tensor) -> None:
        """Set the first mask of a layer whose weight was just drawn."""
        self.set_mask(mask)
        self._scale_to_live_inputs()

    def forward(self, input: Tensor) -> Tensor:
        """Return ``x · weightᵀ + bias``, the weight being +0 under the mask: shape ``(..., in)`` to ``(..., out)``.

        While the layer's own weight is at hand, and nothing but autograd looks on, this is the product of a dense
        layer. Where another tensor stands in the weight's place, and in transforms and compiled code, the mask is
        applied by a select.
        """
        if not torch.compiler.is_compiling():
            own, weight = self._own, self._parameters.get("weight")
            if weight is not None and own.key == id(weight) and not own.is_cut:
                if type(input) is Tensor and nothing_looks_on():
                    return self._apply_own(input, weight, own)
                if is_tracing() and self.is_clean():
                    return F.linear(input, self.weight, self.bias)
            elif own.lends(weight) and nothing_looks_on():  # by FSDP2, which has gathered what is +0 under the mask
                self.see_to_copy()
                return linear(input, self.weight, self.bias)
            elif own.key is not None and not self.is_clean() and nothing_looks_on():
                self.project()
            elif own.key is None and self._pending_mask is not None:
                self.project()  # someone may have put values in place by hand
        elif is_exporting() and self._own.has_not_stepped():
            return F.linear(input, self.weight, self.bias)
        if torch.compiler.is_compiling() and is_gathered(self.weight, self.mask):
            return F.linear(input, self.weight, self.bias)
        return masked_linear(input, self.weight, self._mask_for(self.weight), self.bias)

    def _mask_for(self, weight: Tensor) -> Tensor:
        """Return the mask as a weight is: whole, if it stands in the own one's place, and that is cut over processes."""
        return as_dtensor_like(full_tensor(self.mask) if is_gathered(weight, self.mask) else self.mask, weight)

    def _apply_own(self, x: Tensor, weight: Tensor, own: OwnWeight) -> Tensor:
        """Apply the layer's own weight, which is projected if need be; read at every call, in the forms that take least."""
        if weight.is_cuda and torch.cuda.is_current_stream_capturing():  # what is replayed later asks no versions
            return masked_linear(x, weight, self.mask, self.bias)
        if not self.is_clean():
            self.project()
        parameters = self._parameters
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401 - which may look up twice
        try:
            if torch.is_grad_enabled() and weight.requires_grad:
                if own.hook is None:  # it was frozen until now
                    self._hook()
                if is_any_autocast_on():
                    return masked_linear(x, weight, self.mask, bias)
                if not is_small(weight) and x.dtype is weight.dtype:
                    if own.gradient is not None and weight.grad is not own.gradient[0]:
                        own.gradient = None  # whose memory the new one may have
                    return masked_function(x, weight, self._buffers["mask"], bias, own)  # type: ignore[arg-type]
            return F.linear(x, weight, bias) if weight.itemsize > 2 else linear(x, weight, bias)
        except RuntimeError:  # torch refuses what does not belong together; the checks say it better
            return masked_linear(x, weight, self.mask, bias)

    @property
    def masked_weight(self) -> Tensor:
        """``where(mask, weight, 0)``, shape ``(out_features, in_features)``; differentiable in the weight."""
        if self._own.lends(self.weight) and not torch.compiler.is_compiling():
            self.see_to_copy()
            return self.weight.clone()
        return apply_mask(self.weight, self._mask_for(self.weight))

    def reset_parameters(self) -> None:
        """Draw weights, dormant ones too, and bias anew, as ``nn.Linear`` does, scaled to the live inputs of each row.

        ``nn.Linear`` draws from U(-1/√in, 1/√in). With ``init_fan_in="live"`` a row with n live inputs is multiplied by
        √(in / n), which gives U(-1/√n, 1/√n): the signal keeps its variance at any sparsity. A row without live inputs
        keeps nn.Linear's range. Without a mask, or with the full one, the draw equals ``nn.Linear``'s bit for bit.

        Source: U. Evci et al., "Gradient Flow in Sparse Neural Networks and How Lottery Tickets Win", AAAI 2022,
        section 3.
        """
        super().reset_parameters()
        if "mask" not in self._buffers or self.mask.is_meta or self.weight.is_meta:
            return  # nn.Linear.__init__ calls this before there is a mask
        with torch.no_grad():
            self._split(self.weight.detach().clone())
        self._scale_to_live_inputs()

    def _scale_to_live_inputs(self) -> None:
        if self.init_fan_in == "full" or self.mask.is_meta or self.weight.is_meta:
            return
        with torch.no_grad():
            self._place(self.weight)
            live = full_tensor(self.mask.sum(dim=1))
            scale = torch.where(live > 0, (self.in_features / live.clamp(min=1)).sqrt(), 1.0).to(self.weight.dtype)
            rows = scale[:, None].expand(self.mask.shape).contiguous()
            self._split(self.full_weight * as_dtensor_like(rows, self.weight))
            if self.bias is not None:
                self.bias.mul_(as_dtensor_like(scale, self.bias))

    @classmethod
    def from_linear(cls, linear: nn.Linear, mask: Any = None) -> Self:
        """Return a masked layer with a copy of ``linear``'s parameters, in its dtype, device and training state.

        Args:
            linear: an ``nn.Linear``. Of a ``MaskedLinear`` the mask and the dormant values are copied too; another mask
                may be given.
            mask: shape ``(out, in)``, booleans or 0s and 1s; ``None`` is the full mask. What it takes out becomes
                dormant.

        Raises:
            ValueError: if the mask has another shape, or holds anything but 0 and 1.
            TypeError: if ``linear`` is not an ``nn.Linear``, or one without values yet (``LazyLinear``).
        """
        if not isinstance(linear, nn.Linear) or isinstance(linear.weight, UninitializedParameter):
            raise TypeError(
                f"from_linear takes an nn.Linear that has its weight; got {type(linear).__name__}: "
                "pass an nn.Linear, or call a lazy one once before"
            )
        recipe = constraints = None
        if mask is None and isinstance(linear, MaskedLinear):
            mask, recipe, constraints = linear.known_mask, linear.recipe, linear.constraints
        layer: Self = skip_init(  # draws nothing from the random generator
            cls,
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            init_fan_in=getattr(linear, "init_fan_in", "live"),
            keep_dormant=getattr(linear, "keep_dormant", True),
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        full = linear.full_weight if isinstance(linear, MaskedLinear) else linear.weight.detach()
        _copy_parameters(linear, layer, full)
        if mask is not None:
            layer.set_mask(mask)
        if recipe is not None:
            layer.recipe = recipe
        set_constraints(layer, constraints)
        return layer

    @classmethod
    def adopt(cls, linear: nn.Linear, mask: Any = None, *, keep_dormant: KeepDormant = True) -> Self:
        """Turn an ``nn.Linear`` into a masked layer: the same object, with the same parameters, hooks and state.

        Its weight becomes +0 under the mask, in place, and what stood there dormant.

        Args:
            linear: an ``nn.Linear``, no subclass, whose weight is a parameter.
            mask: shape ``(out, in)``, booleans or 0s and 1s; ``None`` is the full mask.
            keep_dormant: as in the class.

        Raises:
            ValueError: if the mask has another shape, or holds anything but 0 and 1; the layer is left as it was.
            TypeError: if ``linear`` is anything else.
        """
        if type_of(linear) is not nn.Linear or "weight" not in linear._parameters:
            raise TypeError(
                f"adopt takes a plain nn.Linear whose weight is a parameter; got {type(linear).__name__}: a copy is made by "
                "MaskedLinear.from_linear"
            )
        checked = None if mask is None else checked_mask(mask, linear.weight.shape)
        become(linear, cls)
        layer: Self = linear  # type: ignore[assignment]
        layer.__dict__["_own"] = OwnWeight()
        layer.init_fan_in = "live"
        layer._become_masked(keep_dormant)
        if checked is not None:
            layer.set_mask(checked)
        return layer

    def release(self) -> nn.Linear:
        """Turn this layer into a plain ``nn.Linear`` with the same outputs: the same object; dormant values are let go.

        Raises:
            TypeError: if this is a subclass, or the weight is computed.
        """
        if type_of(self) is not MaskedLinear or "weight" not in self._parameters:
            raise TypeError(
                f"release turns a plain MaskedLinear into an nn.Linear; got {type(self).__name__}: to_linear makes a copy"
            )
        self.project()
        self._unhook()
        for name in ("mask", "init_fan_in", "keep_dormant", "_dormant", "_own", "_pending_mask"):
            delattr(self, name)
        for name in ("recipe", "constraints"):
            vars(self).pop(name, None)
        forget(self)
        linear: nn.Linear = self
        become(linear, nn.Linear)
        return linear

    def to_linear(self) -> nn.Linear:
        """Return a plain ``nn.Linear`` with the same outputs: a copy, whose masked weights are +0."""
        linear: nn.Linear = skip_init(
            nn.Linear,
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        _copy_parameters(self, linear, self.masked_weight.detach())
        return linear

    def extra_repr(self) -> str:
        """Add the sparsity to ``nn.Linear``'s representation."""
        return super().extra_repr() + self._told_sparsity()


@torch.no_grad()
def _copy_parameters(source: nn.Linear, target: nn.Linear, weight: Tensor) -> None:
    """Copy training state and parameters; ``weight`` is what the weight is to hold, which source may compute."""
    target.train(source.training)
    target.weight.copy_(full_tensor(weight))
    target.weight.requires_grad_(source.weight.requires_grad)
    if target.bias is not None:
        target.bias.copy_(full_tensor(source.bias))
        target.bias.requires_grad_(source.bias.requires_grad)
