"""``freeze_masked``: a zero gradient does not keep a weight still, so the optimizer is held to the mask."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from maskedlinear_torch._layer import MaskedLinear

__all__ = ["freeze_masked"]

O = TypeVar("O", bound=torch.optim.Optimizer)  # noqa: E741


def freeze_masked(optimizer: O, model: nn.Module) -> O:
    """Make every step of ``optimizer`` leave the masked weights of ``model`` bit-identical.

    Momentum, Adam's moments and weight decay move weights whose gradient is zero. The guard copies each masked layer's
    weight before a step and puts the masked entries back after it, by the mask that holds at that moment. It costs one
    copy of the masked layers' weights while a step runs. A copied optimizer (``copy.deepcopy``) loses its guard, as it
    loses every hook: guard it again.

    Args:
        optimizer: any ``torch.optim.Optimizer``; changed in place.
        model: the module whose :class:`MaskedLinear` layers are guarded, layers added later included.

    Returns:
        The same optimizer.

    Raises:
        ValueError: if ``model`` has no ``MaskedLinear``.
    """

    def layers() -> list[MaskedLinear]:
        return [module for module in model.modules() if isinstance(module, MaskedLinear)]

    if not layers():
        raise ValueError("freeze_masked guards MaskedLinear layers, and this model has none")
    saved: list[tuple[MaskedLinear, Tensor]] = []

    def before(*_: Any) -> None:
        saved[:] = [(layer, layer.weight.detach().clone()) for layer in layers()]

    def after(*_: Any) -> None:
        with torch.no_grad():
            for layer, weight in saved:
                layer.weight.copy_(torch.where(layer.mask, layer.weight, weight))
        saved.clear()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    return optimizer
