"""``WeightMask``: the mask of a weight whose module stays what it is, a convolution, an attention, experts.

It is a child of that module, so that it goes wherever the module goes: conversions, copies, states. The module computes as
it always does, with a weight that is +0 under the mask, and the mask's hook sees to its gradient. Every optimizer's step is
followed by a projection, and so is every other edit in place, by a hook before the module's next call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn

from maskedlinear.models import WeightAxes
from maskedlinear_torch._functional import checked_mask
from maskedlinear_torch._masked_weight import KeepDormant, MaskedWeight, forget
from maskedlinear_torch._storage import OwnWeight, layer_of

__all__ = ["WeightMask", "child_name"]


class WeightMask(MaskedWeight):
    """The mask and the dormant values of one parameter of a module.

    Args:
        module: whose parameter it is; gets this as its child ``"masked_<name>"``.
        name: of the parameter.
        mask: of its shape, booleans or 0s and 1s; ``None`` is the full mask.
        keep_dormant: as in :class:`MaskedLinear`.

    Raises:
        ValueError: if the mask has another shape, or holds anything but 0 and 1; the module is left as it was.
    """

    def __init__(self, module: nn.Module, name: str, mask: Any = None, *, keep_dormant: KeepDormant = True) -> None:
        weight = module._parameters[name]
        assert weight is not None
        checked = None if mask is None else checked_mask(mask, weight.shape, _axes_of(module, name, weight))
        super().__init__()
        self.__dict__["_own"] = OwnWeight()
        self.__dict__["_owner"] = module, name  # no child of its child
        self._moved = False
        self._parameters["weight"] = weight
        self._become_masked(keep_dormant)
        module.add_module(child_name(name), self)
        handles = [module.register_load_state_dict_pre_hook(self._hand_over)]
        if not isinstance(module, nn.MultiheadAttention):  # whose hooks would turn off its encoder's fast inference
            handles.append(module.register_forward_pre_hook(self._before_call))
        self.__dict__["_handles"] = handles
        if checked is not None:
            self.set_mask(checked)

    @property
    def owner(self) -> tuple[nn.Module, str]:
        """The module whose parameter this masks, and the parameter's name."""
        owner: tuple[nn.Module, str] = self.__dict__["_owner"]
        return owner

    @property
    def weight_axes(self) -> WeightAxes | None:
        """What the axes of the weight mean; ``None`` if nobody knows."""
        return _axes_of(*self.owner, self.weight)

    def release(self) -> None:
        """Let go of mask and dormant values: the module has its weight as it acts."""
        module, name = self.owner
        if self.stored_weight is not None:
            self.project()
        self._unhook()
        del module._modules[child_name(name)]
        for handle in self.__dict__["_handles"]:
            handle.remove()
        forget(self)

    def project(self, *, quiet: bool = False) -> None:
        """Bring weight, mask and dormant values into line, as in a masked layer."""
        self._follow()
        super().project(quiet=quiet)

    def is_clean(self) -> bool:
        """Whether the weight that the module has now is known to be +0 under the mask."""
        return self.stored_weight is self._parameters.get("weight") and super().is_clean()

    def extra_repr(self) -> str:
        """Say whose it is, and how sparse."""
        module, name = self.owner
        return f"{name} of {type(module).__name__}{self._told_sparsity()}"

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Go through no parameters: the weight is the module's, for whoever asks modules one by one too."""
        return iter(())

    @property
    def stored_weight(self) -> Tensor | None:
        """The parameter that the module has now, ``None`` if it is computed; or what FSDP2 has gathered that from."""
        module, name = self.owner
        weight, stored = module._parameters.get(name), self._parameters.get("weight")
        return stored if weight is not None and stored is not None and self._is_copy(weight, stored) else weight

    def _in_place(self) -> Tensor | None:
        """Return what the module has in the weight's place now."""
        module, name = self.owner
        return module._parameters.get(name)

    def is_lent(self) -> bool:
        """Whether a copy that FSDP2 has gathered is in the weight's place."""
        module, name = self.owner
        return self.stored_weight is not module._parameters.get(name)

    def _require(self) -> Tensor:
        """Return the parameter that the module has now.

        Raises:
            ValueError: if it has none any more.
        """
        module, name = self.owner
        weight = module._parameters.get(name)
        if weight is None:
            raise ValueError(
                f"the masked parameter {name!r} of a {type(module).__name__} is computed now (by parametrize, weight_norm "
                "or prune), so that its mask does not act: call unmask_model before, or compute it from a masked one"
            )
        return weight

    def _before_call(self, *_: Any) -> None:
        """See to it that the module is called with a weight that is +0 under the mask; a lent one is left alone."""
        if torch.compiler.is_compiling():
            return
        if self._moved:  # a conversion may have put another parameter in place, or lost its hooks
            self._moved = False
            self._follow()
            self._unhook()
        if self._require() is not self._parameters.get("weight"):
            if self.is_lent():
                self.see_to_copy()
            return
        if self.weight.requires_grad and self._own.hook is None:
            self._hook()
        if not self.is_clean():
            self.project()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._moved = True  # the module converts the parameter once more, after this
        return super()._apply(fn, recurse)

    def _follow(self) -> None:
        """Take the parameter that the module has now for the weight."""
        weight, stored = self._require(), self._parameters.get("weight")
        if weight is stored or not isinstance(weight, nn.Parameter):
            return
        if stored is None or not self._is_copy(weight, stored):
            other = layer_of(weight)
            if isinstance(other, MaskedWeight) and other is not self:
                self._share(other)
            self._place(weight)
            self._parameters["weight"] = weight
            self._adopt()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "weight" and "_owner" in self.__dict__:
            module, own = self.owner
            setattr(module, own, self._parameters["weight"])

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(prefix + "weight", None)  # the module saves it

    def _hand_over(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Give this what a state has for the module's parameter: it is to be divided into live and dormant values."""
        name = self.owner[1]
        if prefix + name in state_dict:
            state_dict[f"{prefix}{child_name(name)}.weight"] = state_dict[prefix + name]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        missing_keys: list[str] = rest[2]
        if prefix + "weight" in missing_keys:  # the module says so
            missing_keys.remove(prefix + "weight")


def _axes_of(module: nn.Module, name: str, weight: Tensor) -> WeightAxes | None:
    from maskedlinear_torch._weights import module_axes  # the table of module types, which needs this module

    return module_axes(module, name, weight)


def child_name(name: str) -> str:
    """Return what the child is called that has a parameter's mask; not as torch's ``prune`` calls its buffers."""
    return f"masked_{name}"
