"""What is asked of a whole model, who holds a parameter and whose weight is read from outside; and its layers exchanged."""

from __future__ import annotations

from torch import nn

__all__ = ["dressed", "exchange", "has_call_hooks", "owners", "readers_of_weights"]

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
_READ_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def owners(model: nn.Module) -> dict[int, list[nn.Module]]:
    """Return the modules that hold each parameter, by its identity: more than one where it is shared."""
    found: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                found.setdefault(id(parameter), []).append(module)
    return found


def readers_of_weights(model: nn.Module) -> set[int]:
    """Return the identities of layers whose weight the module around them reads past ``forward``."""
    return {id(child) for module in model.modules() if isinstance(module, _READ_WEIGHTS) for child in module.children()}


def has_call_hooks(module: nn.Module) -> bool:
    """Whether something looks on when the module is called, and may change what it is given or returns."""
    return any(vars(module)[name] for name in _HOOKS)


def dressed(new: nn.Module, old: nn.Module) -> nn.Module:
    """Give ``new`` the hooks of ``old``, and what a user has written on it."""
    for name in _HOOKS:
        new.__dict__[name] = old.__dict__[name]  # the same: a handle that removes a hook holds on to it
    for name, value in vars(old).items():
        if name not in vars(new) and not name.startswith("_") and name != "fan_in":
            setattr(new, name, value)
    return new


def exchange(model: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """Put new modules in the places of old ones, by their identity, in place; return the model, or its own exchange."""
    places = [
        (parent, name) for parent in model.modules() for name, child in parent._modules.items() if id(child) in made
    ]
    for parent, name in places:
        parent._modules[name] = made[id(parent._modules[name])]
    return made.get(id(model), model)
