"""What every optimizer's step is followed by: masked weights that it has moved are +0 under their masks again."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from maskedlinear_torch._cut_weight import CutWeight
from maskedlinear_torch._storage import steps

__all__ = ["forget", "watch"]

_alive: weakref.WeakSet[CutWeight] = weakref.WeakSet()


def watch(mask: CutWeight) -> None:
    """Look at a masked weight after each step from now on."""
    _alive.add(mask)


def forget(mask: CutWeight) -> None:
    """Let go of a masked weight that is none any more."""
    _alive.discard(mask)


@torch.no_grad()
def _project_after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Set back to +0 what a step has left under the masks of the weights that it has moved, whoever reads them next."""
    if not _alive:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for mask in list(_alive):
        weight, own = mask.stored_weight, mask._own
        if weight is not None and id(weight) in held and not mask.is_clean():
            mask.project()
        elif own.is_cut and own.steps == steps[0] - 1:  # or it would be looked at when it has been gathered
            own.steps = steps[0]


register_optimizer_step_post_hook(_project_after_step)
