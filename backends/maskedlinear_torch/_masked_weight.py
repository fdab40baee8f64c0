"""``MaskedWeight``: how a masked layer stores its weight: +0 under the mask, and what is dormant apart.

Every road on which values reach the weight or the mask passes through here: ``set_mask``, edits in place, states,
conversions, copies, and a weight that is exchanged for another.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn

from maskedlinear.constraints import Constraints
from maskedlinear.masks import Recipe, as_mask
from maskedlinear.models import WeightAxes
from maskedlinear_torch._after_steps import forget, watch
from maskedlinear_torch._compat import take_hooks_along
from maskedlinear_torch._constraints import check_keeps_fixed, keep, load_constraints, taken_from, watch_constrained
from maskedlinear_torch._cut_weight import CutWeight, like_own
from maskedlinear_torch._dtensors import as_dtensor_like, full_tensor, is_sharded, local_part
from maskedlinear_torch._functional import as_tensor, checked_mask, recipe_of
from maskedlinear_torch._masked_state import as_boolean, named_buffers, overlay, save, settle
from maskedlinear_torch._storage import (
    DormantStore,
    GradientMask,
    KeepDormant,
    OwnWeight,
    bits_of,
    check_keep_dormant,
    layer_of,
    project,
    remember_layer,
    steps,
    version_of,
)

__all__ = ["KeepDormant", "MaskedWeight", "check_keep_dormant", "forget"]


class MaskedWeight(CutWeight):
    """The storage of a weight with a mask: what :class:`maskedlinear.torch.MaskedLinear` is beside an ``nn.Linear``."""

    recipe: Recipe | None = None  # what the mask was last made of; whoever relies on it sees whether it still is
    constraints: Constraints | None = None  # of live connections; set by constrain
    _pending_mask: Tensor | None  # of a layer on the meta device, which has no values
    # nn.Linear's states carry version 1: a missing mask is their nature, and an error in ours. Those of version 2 have
    # their dormant values in the weight, under the mask.
    _version = 3

    def _become_masked(self, keep_dormant: KeepDormant) -> None:
        """Give a linear layer what a masked one has, with the full mask, or that of a layer that shares its weight."""
        self.keep_dormant, self._dormant = keep_dormant, DormantStore()
        with torch.inference_mode(False):  # the mask outlives the call
            self.register_buffer("mask", torch.ones_like(self.weight, dtype=torch.bool, requires_grad=False))
            shape = self.weight.shape
            self._pending_mask = torch.ones(shape, dtype=torch.bool, device="cpu") if self.weight.is_meta else None
        self._share_again()
        self._adopt()

    def project(self, *, quiet: bool = False) -> None:
        """Bring weight, mask and dormant values into line: drift under the mask becomes +0, an edited mask takes effect.

        The layer does this by itself before it acts. For code that has edited masked places past everything that counts;
        of values that somebody may have meant it warns, unless it is to be ``quiet``.
        """
        own, weight, mask = self._own, self.stored_weight, self._buffers.get("mask")
        if weight is None or mask is None or weight.is_meta or mask.is_meta:
            return
        if own.is_cut and self.is_lent() and not self.is_clean():
            own.stale = True
        if own.key is None and self._pending_mask is not None and type(weight) is nn.Parameter:
            self._pending_mask = None  # of a layer made on the meta device: someone has put values in place by hand
            self._adopt()
        if own.key != id(weight):
            return
        self._place(weight)
        mask = self._buffers["mask"]
        assert mask is not None
        # Read before anything is written: another thread's edit must not be taken for projected.
        seen, seen_steps = version_of(weight), steps[0]
        seen_mask = None if mask.is_inference() else (mask, version_of(mask))
        if seen_mask is None or own.mask is None or own.mask[0] is not mask or own.mask[1] != seen_mask[1]:
            mask = self._take_edited_mask(weight, mask)
        elif (
            not quiet
            and own.may_lose_values(weight)
            and bool((bits_of(local_part(weight.detach())) != 0).logical_and_(~local_part(mask)).any())
        ):
            warnings.warn(
                f"values under the mask of {self} are set back to 0, which no optimizer has left there: if they are an "
                "average of a model whose masks have moved, give it the masks first, with set_masks(average, "
                "get_masks(model)); a merge (of an adapter, say) must be masked, as by maskedlinear.peft.mask_adapters, or "
                "the layer unmasked before it",
                stacklevel=2,
            )
        if own.weight is None or seen is None or own.weight[0] != seen[0]:
            own.shared = local_part(weight).is_shared()
        project(local_part(weight), local_part(mask), own.shared)
        if self.constraints is not None:
            keep(self)
        own.weight, own.mask, own.steps = seen, seen_mask, -1 if seen is None or seen_mask is None else seen_steps
        if own.hook is None:
            self._hook()

    @torch.no_grad()
    def _take_edited_mask(self, weight: Tensor, mask: Tensor) -> Tensor:
        """Keep what an edit of the mask has switched off; what it has switched on stands in the weight. Return the mask."""
        if mask.dtype is not torch.bool or mask.shape != weight.shape or mask.device != weight.device:
            self._buffers["mask"] = mask = as_tensor(as_boolean(mask, weight.shape)).to(weight.device)
        if self._own.mask is not None:
            old, kept = self.dormant, weight.detach()
            if old is not None:  # what stands in the weight where something is dormant already is drift
                kept = overlay(kept, old.to(weight.device))
            self._set_dormant(torch.where(mask, 0, kept))
        return mask

    def is_clean(self) -> bool:
        """Whether the layer's own weight is known to be +0 under the mask as both stand."""
        own, mask = self._own, self._buffers.get("mask")
        weight = self._parameters.get("weight") if own.lender is None else own.lender
        if own.steps != steps[0] or own.mask is None or mask is not own.mask[0] or weight is None or own.shared:
            return False
        if own.key != id(weight):
            return False
        if own.is_cut:
            return own.weight == version_of(weight) and own.mask[1] == version_of(mask)
        return own.weight == (weight.data_ptr(), weight._version) and own.mask[1] == (mask.data_ptr(), mask._version)

    def has_clean_gradient(self) -> bool:
        """Whether the gradient of the layer's own weight is known to be +0 under the mask."""
        weight = self._parameters.get("weight")
        return weight is not None and weight.grad is not None and self._own.holds_clean(weight.grad, self.mask)

    def note_clean(self) -> None:
        """Note that the weight is +0 under the mask as both stand; for whoever has seen to it."""
        own, weight, mask = self._own, self.stored_weight, self.mask
        if weight is not None and own.key == id(weight) and not weight.is_inference() and not mask.is_inference():
            own.weight, own.mask, own.steps = version_of(weight), (mask, version_of(mask)), steps[0]

    def set_mask(self, mask: Any, *, revive: bool = True) -> None:
        """Copy ``mask`` into the layer's own; it holds from the next call on.

        What it takes out becomes dormant, and dormant values that it brings back are live again, bit for bit; with
        ``keep_dormant=False`` they start at 0.

        Args:
            mask: of the weight's shape (of a layer ``(out_features, in_features)``), booleans or 0s and 1s, on any device
                but ``"meta"``.
            revive: whether connections that come back have their dormant values; or start at 0, as new ones do.

        Raises:
            ValueError: if the mask has another shape, holds anything but 0 and 1, is sparse or has no values
                (``"meta"``); the layer is left as it was.
        """
        axes = self.weight_axes if isinstance(mask, Recipe) else None
        checked = checked_mask(mask, self.mask.shape, axes)  # a copy: it may be a view of the layer's own
        if self.constraints is not None:
            check_keeps_fixed(self, like_own(checked, self.mask))
        if recipe_of(checked) != self.recipe:
            self.recipe = recipe_of(checked)
        with torch.no_grad():
            if self._pending_mask is not None:
                self._pending_mask.copy_(like_own(checked, self._pending_mask))
            if self.weight.is_meta or self.mask.is_meta:
                if not self.mask.is_meta:
                    self.mask.copy_(like_own(checked, self.mask))
                return
            full = self.full_weight  # which cuts the mask as the weight is
            checked = like_own(checked, self.mask)
            if not revive:
                full = torch.where(checked.to(self.mask.device) & ~self.mask, 0, full)
            before = None if self.constraints is None else self.mask.clone()
            self.mask.copy_(checked)
            self._split(full, before)

    @torch.no_grad()
    def _split(self, full: Tensor, before: Tensor | None = None) -> None:
        """Write full values into weight and dormant, by the mask; what is tied comes to what was live ``before``."""
        if "weight" not in self._parameters:  # computed: whoever computes it decides what is stored
            return
        mask = as_dtensor_like(self.mask, full)
        weight = self.weight if torch.compiler.is_compiling() else self.stored_weight
        assert weight is not None
        weight.copy_(torch.where(mask, full, 0))
        self._set_dormant(torch.where(mask, 0, full))
        if not torch.compiler.is_compiling():
            if self.constraints is not None:
                keep(self, before)
            self.note_clean()
            if self.is_lent():
                self.renew_copy()

    def _set_dormant(self, values: Tensor) -> None:
        """Keep dormant values, 0 where the weight is live; or let them go."""
        if not self.keep_dormant:
            self._dormant.values = None
            return
        if torch.compiler.is_compiling():  # which cannot look at values
            self._dormant.values = values
            return
        with torch.inference_mode(False):
            kept = values.clone() if values.is_inference() else values
        # Of a part that is all 0 nobody knows whether the others are: they are not asked.
        nothing = not is_sharded(kept) and not bool(bits_of(kept).any())
        self._dormant.values = None if nothing else self._kept(kept)

    @property
    def dormant(self) -> Tensor | None:
        """What is dormant, of the weight's shape, 0 where the weight is live; ``None`` if all is 0.

        Of a weight that is cut over processes it is cut alike, and may be all 0 too.
        """
        return self._dormant.values

    @dormant.setter
    def dormant(self, values: Tensor | None) -> None:  # torch.func.functional_call sets what a state has
        self._dormant.values = values

    @property
    def full_weight(self) -> Tensor:
        """Live and dormant values together, of the weight's shape; a copy, without a gradient."""
        with torch.no_grad():
            if not torch.compiler.is_compiling():
                self.project()
            weight = (self.weight if self._own.lender is None else self._own.lender).detach()
            mask, dormant = as_dtensor_like(self.mask, weight), self.dormant
            if dormant is None:
                return torch.where(mask, weight, 0)
            return torch.where(mask, weight, as_dtensor_like(dormant.to(weight.device), weight))

    @property
    def sparsity(self) -> float:
        """The fraction of masked connections, in [0, 1]; 0 for a layer without any weight.

        Of a weight that is cut over processes all of them must ask.
        """
        size = self.mask.numel()
        return (size - int(full_tensor(self.mask.sum()))) / size if size else 0.0

    @property
    def weight_axes(self) -> WeightAxes | None:
        """What the axes of the weight mean; ``None`` if nobody knows."""
        return WeightAxes(out_axis=0, in_axis=1)

    @property
    def known_mask(self) -> Tensor:
        """The mask; of a layer on the meta device, the one that it waits with."""
        return self._pending_mask if self.mask.is_meta and self._pending_mask is not None else self.mask

    def train(self, mode: bool = True) -> Self:
        """Set the layer's mode, as in ``nn.Module``, and project what has drifted."""
        self.project()
        return super().train(mode)

    def named_modules(self, *arguments: Any, **options: Any) -> Iterator[tuple[str, nn.Module]]:
        """Go through this and all modules in it, as in ``nn.Module``; whoever reads parameters of a model comes by here,
        and finds weights that are projected.
        """
        if not torch.compiler.is_compiling() and not self.is_clean():
            self.project()
        modules: Iterator[tuple[str, nn.Module]] = super().named_modules(*arguments, **options)
        return modules

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter, as in ``nn.Module``; a weight is the layer's own from here on.

        One that another masked layer has already brings that layer's mask and dormant values along.

        Raises:
            ValueError: if the two layers have different masks: a weight has one.
        """
        if name != "weight" or param is None or "mask" not in self.__dict__.get("_buffers", {}):
            super().register_parameter(name, param)
            if name == "weight":
                self._adopt()
            return
        own, stored = self._own, self.stored_weight
        if param is own.lender:  # back in its place
            own.forget_copy()
            super().register_parameter(name, param)
        elif stored is not None and self._is_copy(param, stored):
            own.lender, own.stale = stored, not self.is_clean()
            super().register_parameter(name, param)
            own.lent = id(param), version_of(param)
            self.see_to_copy()  # here, since compiled code cannot
        else:
            own.forget_copy()
            other = layer_of(param)
            if isinstance(other, MaskedWeight) and other is not self:
                self._share(other)
            self._place(param, send=True)
            super().register_parameter(name, param)
            self._adopt()
            if is_sharded(param):  # before it is gathered
                self.project()

    def _share(self, other: MaskedWeight) -> None:
        """Take the mask and the dormant values of a layer whose weight this one gets."""
        if other.mask.is_meta or self.mask.is_meta or self.mask.shape != other.mask.shape:
            return
        mine, its = local_part(as_dtensor_like(self.mask, other.mask)), local_part(other.mask)
        if not torch.equal(mine.to(its.device), its):
            if bool(its.all()):
                other.set_mask(self.mask)
            elif not bool(mine.all()):
                raise ValueError(
                    "a weight has one mask, whoever shares it; got a weight of a layer with another mask: give both "
                    "layers one mask first, with set_mask"
                )
        self._buffers["mask"], self._dormant = other.mask, other._dormant

    def _adopt(self) -> None:
        """Take the registered weight for the layer's own; of its values nothing is known yet."""
        self._unhook()
        own, weight = self._own, self._parameters.get("weight")
        own.is_cut = isinstance(weight, nn.Parameter) and is_sharded(weight)
        is_own = weight is not None and (type(weight) is nn.Parameter or own.is_cut) and not weight.is_meta
        own.key = id(weight) if is_own else None
        own.forget_copy()
        own.weight = own.gradient = None
        own.steps = -1
        mask = self._buffers.get("mask")
        own.mask = None if mask is None or mask.is_meta or mask.is_inference() else (mask, version_of(mask))
        if mask is not None:
            watch(self)
        if own.key is not None and weight is not None and mask is not None:
            remember_layer(weight, self)
            self._hook()

    def _hook(self) -> None:
        """Mask the gradients that other readers of the weight send; a frozen parameter takes no hook."""
        own = self._own
        # As this has it: the module that it is copied with may have nothing yet.
        weight = self._parameters["weight"] if own.lender is None else own.lender
        if weight is None or not weight.requires_grad or own.hook is not None:
            return
        if own.is_cut:
            own.hook = weight.register_post_accumulate_grad_hook(GradientMask(self).mask_cut)
        else:
            take_hooks_along(weight)
            own.hook = weight.register_hook(GradientMask(self))

    def watch_gradient(self) -> None:
        """Note from now on whether the own weight's gradient is +0 under the mask; for a guard, that need not mask it."""
        own, weight = self._own, self._parameters["weight"]
        if own.watch is None and own.hook is not None and weight is not None and not own.is_cut:
            own.watch = weight.register_post_accumulate_grad_hook(GradientMask(self).watch)

    def _unhook(self) -> None:
        own = self._own
        for hook in (own.hook, own.watch):
            if hook is not None:
                hook.remove()
        own.hook = own.watch = None

    def __setattr__(self, name: str, value: Any) -> None:
        # ``layer.mask = mask`` is set_mask: a buffer in the old one's place would be lost to DDP
        # (https://github.com/pytorch/pytorch/issues/63916) and go unchecked. Only a meta buffer, which cannot hold
        # values, gives way: load_state_dict(assign=True) relies on it.
        if name == "weight" and isinstance(value, Tensor) and is_sharded(value) and self._own.lender is None:
            stored = self.stored_weight
            if stored is not None and not self._is_copy(value, stored):
                self.project()  # FSDP2, which cuts the weights of modules that have a __setattr__ by it
                self._place(value)
        if name != "mask" or "mask" not in self.__dict__.get("_buffers", {}):
            super().__setattr__(name, value)
        elif self.mask.is_meta and isinstance(value, Tensor):
            super().__setattr__(name, as_mask(value, self.mask.shape))
        else:
            self.set_mask(value)

    def __getstate__(self) -> Any:
        self.project()
        return super().__getstate__()  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.__dict__["_own"] = OwnWeight()  # copy.copy has given the old one's
        self._adopt()
        watch_constrained(self)
        self._own.copied = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.project()
        mask, dormant = self.mask, self.dormant
        self._own.gradient = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.mask.is_meta:
            if not mask.is_meta and self._pending_mask is None:
                self._pending_mask = mask.cpu()  # as if the layer had been made there
        elif not mask.is_meta:
            if self.mask is not mask:  # .to_empty leaves a tensor without values, and .type(dtype) converts every one
                self._buffers["mask"] = mask.to(self.mask.device)
        elif self._pending_mask is not None:
            self._take_pending()
        if dormant is not None:
            weight = self.weight
            device = dormant.device if self.keep_dormant == "host" else weight.device
            self._dormant.values = None if weight.is_meta else dormant.to(device=device, dtype=weight.dtype)
        self._adopt()
        self._share_again()
        if self._own.is_cut:
            self.project()
        return self

    def _take_pending(self) -> None:
        """Write the mask of a layer that was made on the meta device, where it has values now."""
        pending = self._pending_mask
        assert pending is not None
        self._buffers["mask"] = torch.empty_like(self.mask, dtype=torch.bool, device=self.weight.device)
        with torch.no_grad():
            self.mask.copy_(like_own(pending, self.mask))
        self._pending_mask = None

    def _share_again(self) -> None:
        """Share the mask of a layer that has the same weight, where a conversion has given each its own."""
        weight = self._parameters.get("weight")
        other = None if weight is None else layer_of(weight)
        if isinstance(other, MaskedWeight) and other is not self and other.mask is not self.mask:
            self._share(other)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.project()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        save(self, destination, prefix, keep_vars)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Go through the buffers, as in ``nn.Module``; for what torch sends to other processes, dormant values too."""
        return named_buffers(self, super().named_buffers(prefix, recurse, remove_duplicate))

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
        state_dict, key = dict(state_dict), prefix + "mask"
        mask, dormant = state_dict.pop(key, None), state_dict.pop(prefix + "dormant", None)
        constraints = taken_from(state_dict, prefix)
        if dormant is not None and dormant.shape != self.mask.shape:
            error_msgs.append(
                f"{prefix}dormant: dormant values must have the weight's shape {tuple(self.mask.shape)}; got "
                f"{tuple(dormant.shape)}"
            )
            return
        try:
            mask = None if mask is None else as_boolean(mask, self.mask.shape)
        except ValueError as error:
            error_msgs.append(f"{key}: {error}")
            return
        self._follow()
        brings_weight = prefix + "weight" in state_dict
        assigned = bool(local_metadata.get("assign_to_params_buffers", False))
        full = self.full_weight if mask is not None and not brings_weight and not self.weight.is_meta else None
        errors = len(error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if key in missing_keys and (mask is not None or local_metadata.get("version") in (None, 1)):
            missing_keys.remove(key)
        if len(error_msgs) > errors:
            return
        if mask is not None and assigned:
            self._buffers["mask"] = mask
        elif mask is not None and not self.mask.is_meta:
            with torch.no_grad():
                self.mask.copy_(as_dtensor_like(mask, self.mask))
        if self.mask.is_meta and not self.weight.is_meta and self._pending_mask is not None:
            self._take_pending()
        if not self.mask.is_meta:
            self._pending_mask = None
        self._place(self.weight)
        self._adopt()
        try:
            self._share_again()
        except ValueError as error:
            error_msgs.append(f"{key}: {error}")
            return
        if self.weight.is_meta or self.mask.is_meta or "weight" not in self._parameters:
            return
        if brings_weight:
            settle(self, dormant, assigned)
        else:
            if full is not None:
                self._split(full)
            if dormant is not None:
                dormant = dormant.detach().to(device=self.weight.device, dtype=self.weight.dtype)
                self._set_dormant(torch.where(self.mask, 0, as_dtensor_like(dormant, self.mask)))
        load_constraints(self, constraints, prefix, error_msgs)
