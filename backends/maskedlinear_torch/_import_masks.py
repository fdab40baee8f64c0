"""``import_masks``: models masked by other libraries become ours, in place, with the same outputs.

What is to be done is found and checked for the whole model first, a layer's forward included; then it is done.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from maskedlinear.models import first_names
from maskedlinear_torch._compat import end_pruning, pruning_hooks
from maskedlinear_torch._dtensors import is_sharded
from maskedlinear_torch._functional import FLOATING, checked_mask
from maskedlinear_torch._layer import MaskedLinear
from maskedlinear_torch._masked_weight import KeepDormant, MaskedWeight, check_keep_dormant
from maskedlinear_torch._modules import parameter_users
from maskedlinear_torch._sparse_layer import SparseLinear
from maskedlinear_torch._weight_mask import WeightMask

__all__ = ["import_masks", "warn_of_foreign_masks"]

# Of zuko.nn and nflows.transforms.made; of the recipe. By name, since none of them is imported, and recipes are copied.
_LAYER_NAMES = {"MaskedLinear", "CustomizedLinear"}


@dataclass
class _Weight:
    """A weight that another library masks: its module and name there, the parameter, and its mask."""

    name: str
    module: nn.Module
    parameter: str
    value: nn.Parameter
    mask: Tensor
    is_layer: bool  # whose class applies the mask; or a module whose parameter torch.nn.utils.prune computes


def import_masks(
    model: nn.Module, *, types: type[nn.Module] | Sequence[type[nn.Module]] = (), keep_dormant: KeepDormant = True
) -> nn.Module:
    """Turn a model that another library has masked into one with our masks, in place; return the model::

        for module in (model.encoder, model.head):
            torch.nn.utils.prune.l1_unstructured(module, "weight", 0.9)
        model = import_masks(model)

    Outputs stay the same: bit for bit, but for the recipe's layers, which sum in an order of their own. Parameters
    stay the same objects, so that optimizers go on; modules do too, with hooks, training state and attributes. What stood
    under a mask is dormant. It takes

    - parameters pruned by ``torch.nn.utils.prune``, of any module and name, once or many times over: the module's own
      parameter comes back, and the hook goes;
    - the masked linear layers of zuko and nflows, and of the CustomizedLinear recipe: types called ``MaskedLinear``
      or ``CustomizedLinear`` that have a ``mask`` of the shape of their ``weight``. Each is tried on an input, and must
      be ``x · (weight ∘ mask)ᵀ + bias``. They become :class:`MaskedLinear`; a state of theirs still loads.

    Args:
        model: any module.
        types: more types of such layers, or one.
        keep_dormant: as in :class:`MaskedLinear`.

    Raises:
        ValueError: if there is nothing to take; if a mask has another shape or holds anything but 0 and 1, a parameter is
            shared with a module that masks it otherwise, or a layer computes something else. The model is left as it was.
        TypeError: if ``model`` is no module, or ``types`` are none of modules.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"import_masks takes a torch.nn.Module; got {type(model).__name__}: a state is read by "
            "maskedlinear.checkpoint.read"
        )
    types = (types,) if isinstance(types, type) else tuple(types)
    if not all(isinstance(kind, type) and issubclass(kind, nn.Module) for kind in types):
        raise TypeError(f"types are types of modules; got {types}")
    check_keep_dormant(keep_dormant)
    weights: list[_Weight] = []
    alike: list[str] = []
    for path, module in model.named_modules():
        pruned = _pruned(path, module)
        weights += pruned
        if isinstance(module, MaskedWeight | SparseLinear):
            continue
        named = _is_named(module, types)
        mask, weight = _mask_of(module), module._parameters.get("weight")
        fits = mask is not None and weight is not None and weight.dim() == 2 and not pruned
        if named and fits:
            weights.append(_layer(path, module))
        elif named or (fits and mask is not None and weight is not None and mask.shape == weight.shape):
            alike.append(f"{path or 'the model'} ({type(module).__name__})")
    if not weights:
        raise ValueError(
            "import_masks takes parameters pruned by torch.nn.utils.prune, and layers called MaskedLinear or "
            f"CustomizedLinear with a weight and a mask; got a {type(model).__name__} without any"
            + (f"; {first_names(alike)} look like such layers: name their types in types=" if alike else "")
        )
    _check_shared(model, weights)
    if alike:
        warnings.warn(
            f"{first_names(alike)} stay as they are, though they look like masked layers: types= takes types that have a "
            "weight (out, in) and a mask of its shape",
            stacklevel=2,
        )
    for weight in weights:
        if weight.is_layer:
            _become_linear(weight.module)
        else:
            end_pruning(weight.module, weight.parameter)
    for weight in weights:
        if type(weight.module) is nn.Linear and weight.parameter == "weight":
            MaskedLinear.adopt(weight.module, weight.mask, keep_dormant=keep_dormant)
        else:
            WeightMask(weight.module, weight.parameter, weight.mask, keep_dormant=keep_dormant)
    return model


def warn_of_foreign_masks(model: nn.Module, stacklevel: int) -> None:
    """Warn of weights that another library masks, in ways that :func:`import_masks` knows: a file has no masks of theirs."""
    found = [
        f"{path}.{name}" if path else name for path, module in model.named_modules() for name in pruning_hooks(module)
    ]
    for path, module in model.named_modules():
        is_ours = isinstance(module, MaskedWeight | SparseLinear)
        mask, weight = _mask_of(module), module._parameters.get("weight")
        if not is_ours and _is_named(module, ()) and mask is not None and weight is not None and weight.dim() == 2:
            found.append(f"{path}.weight" if path else "weight")
    if found:
        warnings.warn(
            f"another library masks {first_names(found)}, and a file has its masks as arrays like any other, not as masks: "
            "call maskedlinear.torch.import_masks(model) before the model is saved",
            stacklevel=stacklevel,
        )


def _is_named(module: nn.Module, types: tuple[type[nn.Module], ...]) -> bool:
    """Whether a module is of types that are given, or of one that is called as those which are known."""
    return isinstance(module, types) or any(kind.__name__ in _LAYER_NAMES for kind in type(module).__mro__)


def _pruned(path: str, module: nn.Module) -> list[_Weight]:
    """Return the parameters of a module that ``torch.nn.utils.prune`` computes."""
    found = []
    for name in pruning_hooks(module):
        value, mask = module._parameters.get(f"{name}_orig"), module._buffers.get(f"{name}_mask")
        full_name = f"{path}.{name}" if path else name
        if value is None or mask is None:
            raise ValueError(
                f"{full_name} has a hook of torch.nn.utils.prune, and no {name}_orig and {name}_mask: something "
                "else computes it too; remove that before"
            )
        if isinstance(module, MaskedWeight | SparseLinear):
            raise ValueError(f"{full_name} has a mask of ours and one of torch.nn.utils.prune: prune.remove one before")
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise ValueError(f"{full_name} is of an embedding with sparse gradients, which cannot be masked")
        found.append(_Weight(full_name, module, name, value, _checked(full_name, value, mask), False))
    return found


def _mask_of(module: nn.Module) -> Tensor | None:
    """Return what a layer calls its mask: a buffer, a parameter, or, of the recipe's first version, neither."""
    for held in (module._buffers, module._parameters, vars(module)):
        mask = held.get("mask")
        if isinstance(mask, Tensor):
            return mask
    return None


def _layer(path: str, module: nn.Module) -> _Weight:
    """Return the weight of a masked linear layer, which must act as one.

    Raises:
        ValueError: if it does not, or cannot change its type.
    """
    name, value, mask = f"{path}.weight" if path else "weight", module._parameters["weight"], _mask_of(module)
    assert value is not None
    assert mask is not None
    kind = type(module).__name__
    if mask.requires_grad:
        raise ValueError(f"the mask of {name} is trained, and a mask is fixed: mask.requires_grad_(False) fixes it")
    if "forward" in vars(module):
        raise ValueError(f"{name} is of a {kind} whose forward was replaced: take it out before")
    live = _checked(name, value, mask)
    try:
        nn.Module.__new__(type(module)).__class__ = nn.Linear
    except TypeError as error:
        raise ValueError(f"{name} is of a {kind}, whose objects cannot become an nn.Linear: {error}") from error
    if not _is_masked_linear(module, value, live):
        raise ValueError(
            f"{name} is of a {kind} that does not compute x · (weight ∘ mask)ᵀ + bias: it stays what it is; take its "
            "weights from its state, with maskedlinear.checkpoint.read"
        )
    return _Weight(name, module, "weight", value, live, True)


@torch.no_grad()
def _is_masked_linear(module: nn.Module, weight: Tensor, mask: Tensor) -> bool:
    """Whether a layer, called past its hooks, has the outputs of a masked linear layer, within the rounding of sums."""
    x = torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    masked, bias = torch.where(mask.to(weight.device), weight, 0), getattr(module, "bias", None)
    training, module.training = module.training, False
    try:
        y = type(module).forward(module, x)
    except Exception:  # of anyone's code: it is not what it was taken for
        return False
    finally:
        module.training = training
    if not isinstance(y, Tensor) or y.shape != (4, len(weight)) or y.dtype != x.dtype:
        return False
    want, bound = F.linear(x, masked, bias), F.linear(x.abs(), masked.abs(), None if bias is None else bias.abs())
    return bool(((y - want).abs() <= 32 * torch.finfo(x.dtype).eps * bound).all())


def _checked(name: str, value: Tensor, mask: Tensor) -> Tensor:
    """Return a copy of a mask, on the weight's device."""
    if isinstance(value, UninitializedParameter) or value.is_meta or mask.is_meta:
        raise ValueError(f"{name} has no values yet: load its state before")
    if is_sharded(value) or is_sharded(mask):
        raise ValueError(f"{name} is sharded: import the masks before the model is sharded")
    if value.dtype not in FLOATING:
        raise ValueError(f"{name} must be of a real floating dtype to be masked; got {value.dtype}")
    try:
        return checked_mask(mask, value.shape).to(value.device)
    except ValueError as error:
        raise ValueError(f"the mask of {name}: {error}") from error


def _check_shared(model: nn.Module, weights: list[_Weight]) -> None:
    """Raise a ``ValueError`` if a parameter has users that mask it differently, or not at all."""
    users = parameter_users(model)
    for weight in weights:
        same = [other for other in weights if other.value is weight.value]
        if len(same) < len(users[id(weight.value)]) or not all(torch.equal(weight.mask, other.mask) for other in same):
            raise ValueError(
                f"a weight has one mask, whoever shares it; got {weight.name}, which another module has without this mask: "
                "prune both alike, or give one of them a copy"
            )


def _become_linear(module: nn.Module) -> None:
    """Turn a masked linear layer of another library into an ``nn.Linear``: the same object."""
    for held in (module._buffers, module._parameters, vars(module)):
        held.pop("mask", None)
    weight = module._parameters["weight"]
    assert weight is not None
    module.__class__ = nn.Linear
    vars(module).update(out_features=weight.shape[0], in_features=weight.shape[1])
    if "bias" not in module._parameters and "bias" not in vars(module):
        module.register_parameter("bias", None)
