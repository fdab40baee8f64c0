"""What is asked of a whole model, who holds a parameter and whose weight is read from outside; and its layers
replaced."""

from __future__ import annotations

from torch import Tensor, nn

from maskedlinear_torch._compat import CALL_HOOKS, STATE_HOOKS, gradient_hooks, is_fsdp_hook
from maskedlinear_torch._products import DevicePattern
from maskedlinear_torch._storage import GradientMask
from maskedlinear_torch._weight_mask import WeightMask

__all__ = [
    "LAYERS_OWN",
    "copy_hooks_and_attributes",
    "has_call_hooks",
    "has_gradient_hooks",
    "has_state_hooks",
    "parameter_users",
    "readers_of_weights",
    "replace_modules",
]

# What only one of the layers has.
LAYERS_OWN = {
    "constraints",
    "init_fan_in",
    "keep_dormant",
    "_own",
    "_dormant",
    "_pending_mask",
    "_pattern",
    "_matrix",
    "_cut",
    "_output_layouts",
    "_packed",
    "_source",
    "_version",
    "_trained",
}
LAYERS_OWN |= set(DevicePattern._fields)
_READ_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def parameter_users(model: nn.Module) -> dict[int, list[nn.Module]]:
    """Return the modules that hold each parameter, by its identity: more than one where it is shared."""
    found: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in () if isinstance(module, WeightMask) else module._parameters.values():
            if parameter is not None:
                found.setdefault(id(parameter), []).append(module)
    return found


def readers_of_weights(model: nn.Module) -> set[int]:
    """Return the identities of layers whose weight the module around them reads past ``forward``."""
    return {id(child) for module in model.modules() if isinstance(module, _READ_WEIGHTS) for child in module.children()}


def has_call_hooks(module: nn.Module) -> bool:
    """Whether something looks on when the module is called, and may change what it is given or returns."""
    return any(vars(module)[name] for name in CALL_HOOKS)


def has_state_hooks(module: nn.Module) -> bool:
    """Whether something but FSDP2 looks on when the module's state is read or loaded."""
    return any(not is_fsdp_hook(hook) for name in STATE_HOOKS for hook in vars(module)[name].values())


def has_gradient_hooks(parameter: Tensor) -> bool:
    """Whether something but a masked layer looks on when a parameter gets its gradient."""
    return any(not isinstance(getattr(hook, "__self__", hook), GradientMask) for hook in gradient_hooks(parameter))


def copy_hooks_and_attributes(new: nn.Module, old: nn.Module) -> nn.Module:
    """Give ``new`` the hooks of ``old``, and what a user has written on it."""
    for name in CALL_HOOKS:
        new.__dict__[name] = old.__dict__[name]  # the same: a handle that removes a hook holds on to it
    for name, value in vars(old).items():
        if name not in vars(new) and name not in LAYERS_OWN:
            setattr(new, name, value)
    return new


def replace_modules(model: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """Put new modules in the places of old ones, by identity, in place; return the model, or its replacement."""
    places = [
        (parent, name) for parent in model.modules() for name, child in parent._modules.items() if id(child) in made
    ]
    for parent, name in places:
        parent._modules[name] = made[id(parent._modules[name])]
    return made.get(id(model), model)
