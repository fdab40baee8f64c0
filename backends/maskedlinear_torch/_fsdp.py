"""What FSDP2 does to modules: it makes a class of its own of each type, and puts gathered copies in the places of
parameters, for a call. Its public names alone are used."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

__all__ = ["become", "reshard", "type_of"]

_types: dict[tuple[type, type], type] = {}


def _fsdp_module() -> Any:
    """Return the class of FSDP2's modules, if anyone has imported it."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)


def type_of(module: nn.Module) -> type[nn.Module]:
    """Return the type of a module, without what ``fully_shard`` has put before it."""
    kind, sharded = type(module), _fsdp_module()
    if sharded is not None and kind.__bases__[0] is sharded:
        return kind.__bases__[1]
    return kind


def become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Make a module one of another type; one of FSDP2 stays one."""
    own = type(module)
    if type_of(module) is not own:
        made = _types.get((own, kind))
        if made is None:
            ours = {
                name: value for name, value in vars(own).items() if name not in ("__doc__", "__module__", "__dict__")
            }
            made = _types[own, kind] = type(f"FSDP{kind.__name__}", (own.__bases__[0], kind), ours)
        kind = made
    module.__class__ = kind


def reshard(module: nn.Module) -> None:
    """Let go of the copies that FSDP2 has gathered for modules of a model: parameters are cut again, as they are stored."""
    sharded = _fsdp_module()
    if sharded is not None:
        for part in module.modules():
            if isinstance(part, sharded):
                part.reshard()
