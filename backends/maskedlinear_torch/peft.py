"""LoRA over masked and sparse weights, of Hugging Face's ``peft``. Users import it as ``maskedlinear.peft``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from maskedlinear_torch._dtensors import as_dtensor_like
from maskedlinear_torch._functional import apply_mask
from maskedlinear_torch._masked_weight import MaskedWeight
from maskedlinear_torch._products import DevicePattern, sddmm
from maskedlinear_torch._sparse import product
from maskedlinear_torch._sparse_layer import SparseLinear
from maskedlinear_torch._weights import mask_of, walk_masked

__all__ = ["mask_adapters"]

if not hasattr(LoraLinear, "resolve_lora_variant"):  # by which variants are told from plain LoRA
    raise ImportError("maskedlinear.peft needs peft >= 0.16: pip install --upgrade peft")

_REMEDY = "leave the layer out of target_modules, or take its mask away before, with unmask_model(model, include=...)"


def mask_adapters(model: nn.Module) -> nn.Module:
    """Let the LoRA adapters of masked weights act through the masks, in place, and return the model::

        model = mask_model(network)
        prune_model(model, 0.9)
        model = mask_adapters(peft.get_peft_model(model, LoraConfig(target_modules=["query", "value"])))
        ...  # train, save and load as with PEFT alone
        merged = model.merge_and_unload()  # as sparse as before, with the same outputs

    A layer of PEFT over a masked weight W computes ``x · Wᵀ + dropout(x) · (s · (B·A) ∘ M)ᵀ``, M being W's mask as it
    stands, so that gradients of A and B are those of what is merged, and a merge leaves +0 under the mask. The masked
    product is formed at every call: one array of the weight's shape a layer, in the adapter's dtype, which autograd keeps
    until the backward pass (checkpointing the model's layers lets go of it). A and B are read past their modules' calls:
    what gathers parameters module by module (FSDP, ZeRO-3) must gather the layer as a whole. PEFT's keys, files,
    ``merge_adapter``, ``unmerge_adapter``, ``disable_adapter`` and ``set_adapter`` stay what they are. The base weights are
    frozen, so that the optimizer needs no guard. :func:`unmask_model` keeps the outputs: an adapter goes on with the last
    mask, new ones too, which no file of PEFT's has: merge before, if they are to be loaded elsewhere. While adapters are
    merged the masks must stay: an ``unmerge_adapter`` under others is an error.

    Masked are adapters of ``nn.Linear`` and of ``Conv1D`` of Hugging Face. Those that are added to the same layers later
    are masked too; where new layers get adapters, call this again. In the sparse form, a layer's adapter is computed at
    its connections alone; PEFT makes none for it, so let it be dense until then:
    ``compress(mask_adapters(get_peft_model(expand(model), config)), "sparse")``.

    Source: J. P. Muñoz et al., "SQFT: Low-cost Model Adaptation in Low-precision Sparse Foundation Models", Findings of
    EMNLP 2024 (arXiv 2410.03750): SparsePEFT.

    Args:
        model: a ``PeftModel``, or any module with PEFT's layers in it.

    Raises:
        ValueError: if no adapter is of a masked weight; if a layer's adapter is a variant that is no plain product (DoRA,
            say). The model is left as it was. Also at a call that mixes adapters in one batch (``adapter_names``).
        TypeError: if ``model`` is no module; if an adapter of a masked weight is no LoRA, or one of another module type.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"mask_adapters takes a torch.nn.Module; got {type(model).__name__}")
    for _, masked in walk_masked(model):
        if isinstance(masked, MaskedWeight):
            masked.project(quiet=True)  # some ways to begin adapters leave values under masks
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    layers = {name: layer for name, layer in found.items() if any(walk_masked(layer.get_base_layer()))}
    if not layers:
        raise ValueError(
            f"mask_adapters masks adapters of masked weights; got a model with {len(found)} adapted layers, none of them "
            "masked: call mask_model(model) and peft.get_peft_model(model, config) before, in any order"
        )
    for name, layer in layers.items():
        _check_layer(name, layer)
    for layer in layers.values():
        if not isinstance(layer, MaskedLoraLinear):
            layer.__class__ = MaskedLoraLinear
            layer.register_buffer("adapter_mask", None, persistent=False)
            layer.merged_under = {}
        layer.note_mask()
    return model


class MaskedLoraLinear(LoraLinear):  # type: ignore[misc]
    """PEFT's LoRA layer over a masked linear layer of either form, its product being masked as the weight is.

    Attributes:
        adapter_mask: the mask of the weight when it was last asked for, which outlives that mask; ``None`` in the sparse
            form, and where there has been none.
    """

    adapter_mask: Tensor | None
    merged_under: dict[str, Any]  # the mask, or the pattern, of each merged adapter's merge

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return y of the base layer, and what the active adapters add to it: shape ``(..., in)`` to ``(..., out)``."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "masked adapters act on a whole batch; got adapter_names: call the model once for each adapter, chosen by "
                "set_adapter, with its rows"
            )
        if self.disable_adapters or self.merged:
            y: Tensor = super().forward(x, *args, **kwargs)
            return y
        y = self.base_layer(x, *args, **kwargs)
        dtype = y.dtype
        for adapter in self.active_adapters:
            if adapter in self.lora_A:
                y = y + self._share(x, adapter)
        return y.to(dtype)

    def _share(self, x: Tensor, adapter: str) -> Tensor:
        """Return what one adapter adds to y."""
        delta, bias, base = self.get_delta_weight(adapter), self._delta_bias(adapter), self.get_base_layer()
        x = self.lora_dropout[adapter](x.to(delta.dtype))
        if isinstance(base, SparseLinear):
            return product(x, delta, _pattern_of(base), base.in_features, bias)
        return F.linear(x, delta.T if self.fan_in_fan_out else delta, bias)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return ``s · (B·A) ∘ M`` of an adapter, in the weight's shape; in the sparse form its values, shape ``(nnz,)``."""
        _check_adapter("", self, adapter)
        base, mask = self.get_base_layer(), self.note_mask()
        if isinstance(base, SparseLinear):
            a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
            wide = torch.promote_types(b.dtype, torch.float32)
            values: Tensor = sddmm(b.to(wide), a.to(wide).mT.contiguous(), _pattern_of(base)) * self.scaling[adapter]
            return values.to(b.dtype)
        delta: Tensor = super().get_delta_weight(adapter)
        return delta if mask is None else apply_mask(delta, as_dtensor_like(mask, delta))

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """Make an adapter, as PEFT does; some ways to begin (OLoRA) change the base weight, past all that counts edits."""
        super().update_layer(*args, **kwargs)
        self.project_base()

    def project_base(self) -> None:
        """Set what stands under the base weight's mask back to +0."""
        masked = mask_of(self.get_base_layer(), "weight")
        if masked is not None:
            masked.project(quiet=True)

    def note_mask(self) -> Tensor | None:
        """Return the mask of the base layer's weight as it stands; of one that has none any more, its last."""
        base = self.get_base_layer()
        masked = mask_of(base, "weight")
        kept = (
            self.adapter_mask if self.adapter_mask is None else self.adapter_mask.bool()
        )  # .type() converts all buffers
        mask = None if isinstance(base, SparseLinear) else kept if masked is None else masked.mask
        if mask is not self.adapter_mask:
            self.adapter_mask = mask
        return mask

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the weight, as PEFT does; in the sparse form, into its values."""
        before = list(self.merged_adapters)
        if isinstance(self.get_base_layer(), SparseLinear):
            for adapter in check_adapters_to_merge(self, adapter_names):
                if adapter in self.lora_A:
                    self._add_to_values(adapter, 1, safe_merge)
                    self.merged_adapters.append(adapter)
        else:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        now = self._mask_of_now()
        self.merged_under |= {adapter: now for adapter in self.merged_adapters if adapter not in before}

    def unmerge(self) -> None:
        """Take the merged adapters out of the weight again, as PEFT does.

        Raises:
            ValueError: if the mask is another than at the merge.
        """
        now = self._mask_of_now()
        if any(not _are_same(mask, now) for mask in self.merged_under.values()):
            raise ValueError(
                "an adapter is taken out of a weight under the mask that it was merged under, and this weight has another "
                "one now: bring that back, with set_masks, or go on with the merged model"
            )
        self.merged_under.clear()
        if not isinstance(self.get_base_layer(), SparseLinear):
            super().unmerge()
            return
        while self.merged_adapters:
            self._add_to_values(self.merged_adapters.pop(), -1, False)

    def _mask_of_now(self) -> Any:
        """Return what the adapters' product is masked by: a copy of a mask, or the pattern of the sparse form."""
        base, mask = self.get_base_layer(), self.note_mask()
        return base.pattern if isinstance(base, SparseLinear) else None if mask is None else mask.clone()

    @torch.no_grad()
    def _add_to_values(self, adapter: str, sign: int, safe: bool) -> None:
        """Add an adapter to the values of a layer in the sparse form, or take it out of them."""
        base, bias = self.get_base_layer(), self._delta_bias(adapter)
        changes = [(base.weight_values, self.get_delta_weight(adapter))] + ([] if bias is None else [(base.bias, bias)])
        if bias is not None and base.bias is None:
            raise ValueError(
                f"an adapter's bias is merged into the layer's, and this has none; got {adapter!r} with lora_bias=True: "
                "make it without"
            )
        if safe and not all(bool((parameter + change).isfinite().all()) for parameter, change in changes):
            raise ValueError(
                f"merged weights must be finite with safe_merge=True; got others of adapter {adapter!r}, which is broken"
            )
        for parameter, change in changes:
            parameter.add_(change, alpha=sign)

    def _delta_bias(self, adapter: str) -> Tensor | None:
        """Return what an adapter adds to the bias; ``None`` without ``lora_bias``."""
        bias: Tensor | None = self.lora_B[adapter].bias
        return None if bias is None else bias * self.scaling[adapter]


def _are_same(mask: Any, other: Any) -> bool:
    if isinstance(mask, Tensor) and isinstance(other, Tensor):
        return torch.equal(mask, other.to(mask.device))
    return type(mask) is type(other) and bool(mask == other)


def _check_layer(name: str, layer: Any) -> None:
    """Raise unless every adapter of a layer is a product that can be masked."""
    if type(layer) not in (LoraLinear, MaskedLoraLinear):
        raise TypeError(
            f"adapters can be masked that are LoRA's of an nn.Linear or a Conv1D of Hugging Face; got "
            f"{type(layer).__module__}.{type(layer).__name__} at {name!r}, over a masked weight: {_REMEDY}"
        )
    for adapter in layer.lora_A:
        _check_adapter(f" at {name!r}", layer, adapter)


def _check_adapter(where: str, layer: Any, adapter: str) -> None:
    """Raise if an adapter is a variant of LoRA, which does not act as a product that is added to the weight."""
    variant = layer.lora_variant.get(adapter)
    if variant is not None:
        raise ValueError(
            f"the adapters of masked weights must be plain LoRA; got {type(variant).__name__} of adapter {adapter!r}"
            f"{where}: make it without use_dora and the like, {_REMEDY}"
        )


def _pattern_of(layer: SparseLinear) -> DevicePattern:
    return DevicePattern(*(getattr(layer, name) for name in DevicePattern._fields))
