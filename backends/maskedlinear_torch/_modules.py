"""What is asked of a whole model: who holds a parameter, and whose weight is read by the module around it."""

from __future__ import annotations

from torch import nn

__all__ = ["owners", "readers_of_weights"]

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
