"""``freeze_masked``: a zero gradient does not keep a weight still, so the optimizer is held to the mask."""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from maskedlinear_torch._functional import as_dtensor_like, full_tensor
from maskedlinear_torch._layer import MaskedLinear

__all__ = ["Guard", "freeze_masked", "renew"]

O = TypeVar("O", bound=torch.optim.Optimizer)  # noqa: E741
Known = tuple[tuple[tuple[int, int], ...], Tensor]  # the versions of masks, and what was live by them


def freeze_masked(optimizer: O, model: nn.Module) -> O:
    """Make every step of ``optimizer`` leave the masked weights of ``model`` bit-identical.

    Momentum, Adam's moments and weight decay move weights whose gradient is zero. The guard copies the weights of masked
    layers that the optimizer holds before a step, and puts the dormant entries back after it, by the masks that hold at
    that moment, also if the step raises an error. A weight that several layers share is dormant where none of them uses
    it. Where a mask has changed since the last step, what the optimizer remembers of the weight is made new (momentum,
    moments, ...), so that a revived weight starts clean; what it keeps for whole rows and columns (``Adafactor``) stays, and
    ``LBFGS``, which remembers all weights together, forgets everything.

    It costs one copy of those weights while a step runs, and a copy of their masks. A copied optimizer (``copy.deepcopy``)
    loses its guard: guard it again. To guard it twice by one model is to guard it once.

    Args:
        optimizer: any ``torch.optim.Optimizer``; its ``step`` is replaced.
        model: the module whose :class:`MaskedLinear` layers are guarded, layers added later included.

    Returns:
        The same optimizer.

    Raises:
        ValueError: if ``model`` has no ``MaskedLinear``, or, here or at a step, if one's weight is computed by a
            parametrization or by ``torch.nn.utils.prune``: no optimizer holds it.
        TypeError: if the arguments are not an optimizer and a module.
    """
    if not isinstance(optimizer, torch.optim.Optimizer) or not isinstance(model, nn.Module):
        raise TypeError(
            "freeze_masked takes an optimizer and a module, in this order; "
            f"got {type(optimizer).__name__} and {type(model).__name__}"
        )
    if not any(isinstance(module, MaskedLinear) for module in model.modules()):
        raise ValueError("freeze_masked guards MaskedLinear layers, and this model has none")
    step = optimizer.step
    if getattr(step, "guard", None) is model:
        return optimizer
    guard = Guard(optimizer, model)
    optimizer.register_load_state_dict_post_hook(lambda _: guard.reset())

    # Not a pair of hooks: those do not run after a step that raises. A method of the instance that carries the step's
    # attributes, because learning rate schedulers put their own step around it and recognise it again.
    @functools.wraps(step)
    def guarded(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        guard.before_step()
        try:
            return step(*args, **kwargs)
        finally:
            guard.after_step()

    guarded.guard = model  # type: ignore[attr-defined]
    optimizer.step = MethodType(guarded, optimizer)  # type: ignore[method-assign]
    return optimizer


class Guard:
    """Keeps the masked weights of a model still while an optimizer steps: :meth:`before_step` and :meth:`after_step`."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        self._optimizer, self._model = optimizer, model
        self._known: dict[int, Known] = {}
        self._before: dict[int, Tensor] = {}
        for layers in _users(model):
            _start_anew(optimizer, layers, self._known)

    def before_step(self) -> None:
        """Copy the weights, and let the optimizer's state start clean where a mask has changed since the last step."""
        held = {id(parameter) for group in self._optimizer.param_groups for parameter in group["params"]}
        users = [layers for layers in _users(self._model) if id(layers[0].weight) in held]
        with torch.no_grad():
            for layers in users:
                _start_anew(self._optimizer, layers, self._known)
        self._before = {id(layers[0].weight): layers[0].weight.detach().clone() for layers in users}

    def after_step(self) -> None:
        """Put the dormant entries back, by the masks that hold at this moment."""
        before, self._before = self._before, {}
        with torch.no_grad():
            for layers in _users(self._model):
                weight = layers[0].weight
                if id(weight) in before:
                    weight.copy_(torch.where(_live(layers, weight), weight, before[id(weight)]))

    def reset(self) -> None:
        """Take the masks of the next step for those of the last: a state was loaded, and with it its masks."""
        self._known.clear()


def _users(model: nn.Module) -> list[list[MaskedLinear]]:
    """Return the layers that use each masked weight; weights that another kind of module uses too are left out."""
    users: dict[int, list[MaskedLinear]] = {}
    others: set[int] = set()
    for module in model.modules():
        masked = isinstance(module, MaskedLinear)
        if masked and "weight" not in module._parameters:
            raise ValueError(
                "freeze_masked guards weights that an optimizer holds, and the weight of a MaskedLinear here is computed "
                "(by torch.nn.utils.parametrize or prune): remove that first, or put the mask into it"
            )
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if masked and name == "weight":
                users.setdefault(id(parameter), []).append(module)  # type: ignore[arg-type]
            else:
                others.add(id(parameter))
    return [layers for key, layers in users.items() if key not in others]


def _live(layers: list[MaskedLinear], weight: Tensor) -> Tensor:
    mask = layers[0].mask
    for layer in layers[1:]:
        mask = mask | layer.mask
    return as_dtensor_like(mask, weight)


def _start_anew(optimizer: torch.optim.Optimizer, layers: list[MaskedLinear], known: dict[int, Known]) -> None:
    """Make the state of those entries of a weight new whose mask is not the one that is ``known`` from the last step."""
    weight = layers[0].weight
    versions = tuple((layer.mask.data_ptr(), layer.mask._version) for layer in layers)
    last = known.get(id(weight))
    if last is not None and last[0] == versions:
        return
    live = full_tensor(_live(layers, weight))
    known[id(weight)] = versions, live.clone()
    if last is None or last[1].shape != live.shape:
        return
    renew(optimizer, weight, as_dtensor_like(last[1].to(live.device) != live, weight))


def renew(optimizer: torch.optim.Optimizer, weight: Tensor, changed: Tensor, source: Tensor | None = None) -> None:
    """Make what an optimizer keeps of a weight new where it has ``changed``; take the rest from where ``source`` says."""
    group = next((group for group in optimizer.param_groups if any(one is weight for one in group["params"])), None)
    if group is None:
        return
    for name, kept in optimizer.state.get(weight, {}).items():
        if isinstance(kept, Tensor) and kept.shape == weight.shape:
            old = kept if source is None else kept[source]
            kept.copy_(torch.where(changed, _fresh(name, group), old))
    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.state.clear()


def _fresh(name: str, group: dict[str, Any]) -> float:
    """Return what an optimizer of torch starts this part of its state with."""
    if name == "step_size":  # Rprop
        return float(group["lr"])
    return float(group.get("initial_accumulator_value", 0.0)) if name == "sum" else 0.0  # Adagrad
