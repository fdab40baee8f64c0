"""``freeze_masked``: keeps masked weights at +0 for every reader, whatever the optimizer's momentum and decay."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from maskedlinear.models import first_names
from maskedlinear_torch._compat import takes_load_hooks
from maskedlinear_torch._constraints import after_step, before_step, constrained, stored
from maskedlinear_torch._dtensors import as_dtensor_like, local_part
from maskedlinear_torch._functional import is_small
from maskedlinear_torch._masked_weight import MaskedWeight
from maskedlinear_torch._sparse_layer import SparseLinear
from maskedlinear_torch._storage import Version, count_step, version_of, zero_masked
from maskedlinear_torch._weights import walk_masked

__all__ = ["EXCHANGED", "Guard", "freeze_masked", "holds_masked", "move_state", "renew"]

EXCHANGED = "_maskedlinear_exchanged"  # the attribute of a weight whose layer has been given another form

O = TypeVar("O", bound=torch.optim.Optimizer)  # noqa: E741


def freeze_masked(optimizer: O, model: nn.Module) -> O:
    """Make every step of ``optimizer`` leave the masked weights of ``model`` at +0.

    Masked weights are set back to +0 after each step of any optimizer, guarded or not, but for what a wrapper writes after
    the step in it. The guard keeps gradients out
    of the optimizer's view where they are masked, which clipping, norms and whole-matrix methods would count; lets
    its state start clean where a mask has changed (momentum, moments, ...), so that a revived weight does; and
    projects after whatever a subclass or wrapper does around the step. What is kept for whole rows and columns
    (``Adafactor``) stays; ``LBFGS``, which remembers all weights together, forgets everything.

    What connections keep by :func:`constrain`, of layers in the sparse form too, holds after every step as well.

    It works in place and needs no memory: after each step it passes over the weights, once, which the layers then do not
    repeat, and before it over gradients that are not known to be masked. A copied optimizer (``copy.deepcopy``) loses its
    guard: guard it again. To guard it twice by one model is to guard it once.

    Args:
        optimizer: any ``torch.optim.Optimizer``; its ``step`` is replaced. One that wraps another (accelerate's, SAM,
            Lookahead) is guarded itself if it holds the weights, else the one in it that does.
        model: the module whose masked weights are guarded, those that are masked later included.

    Returns:
        The same optimizer.

    Raises:
        ValueError: if ``model`` has no masked weight in the dense form and no constraints, if the optimizer holds none of
            them, or, here or at a step, if it was made before ``compress`` or ``expand`` exchanged weights, or
            if one is computed by a parametrization or by ``torch.nn.utils.prune``: no optimizer holds it.
        TypeError: if the arguments are not an optimizer and a module.
    """
    if not isinstance(optimizer, torch.optim.Optimizer) or not isinstance(model, nn.Module):
        raise TypeError(
            "freeze_masked takes an optimizer and a module, in this order; "
            f"got {type(optimizer).__name__} and {type(model).__name__}: of a wrapper that is no torch.optim.Optimizer, "
            "guard the optimizer in it"
        )
    if not any(isinstance(module, MaskedWeight) or constrained(module) for module in model.modules()):
        raise ValueError(
            "freeze_masked guards masked weights, and this model has none: make them with mask_model(model); layers in the "
            "sparse form need no guard, but an optimizer made after compress"
        )
    holder = next((one for one in _wrapped(optimizer) if holds_masked(one, model)), None)
    if holder is None:
        raise ValueError(
            "freeze_masked guards masked weights that an optimizer holds, and this one holds none of the model's: it was "
            "made of another model or a copy (fp32 masters, say), or before layers were exchanged (compress, expand, "
            "shrink); or it wraps the optimizer that holds them, which is the one to guard"
        )
    step = holder.step
    if getattr(step, "guard", None) is model:
        return optimizer
    guard = Guard(holder, model)
    for one in _wrapped(holder):
        if takes_load_hooks(one):
            one.register_load_state_dict_post_hook(lambda _: guard.reset())

    # Not a pair of hooks: those do not run after a step that raises, and do not see what a subclass does after
    # super().step(). A method of the instance that carries the step's attributes, because learning rate schedulers put
    # their own step around it and recognise it again.
    @functools.wraps(step)
    def guarded(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        guard.before_step(has_closure=(args[0] if args else kwargs.get("closure")) is not None)
        try:
            return step(*args, **kwargs)
        finally:
            guard.after_step()

    guarded.guard = model  # type: ignore[attr-defined]
    holder.step = MethodType(guarded, holder)  # type: ignore[method-assign]
    return optimizer


def holds_masked(optimizer: torch.optim.Optimizer, model: nn.Module) -> bool:
    """Whether an optimizer holds a masked weight of a model."""
    return bool(_masked_layers(model, optimizer) or _constrained_layers(model, optimizer))


def _wrapped(optimizer: torch.optim.Optimizer) -> Iterator[torch.optim.Optimizer]:
    """Yield an optimizer, and those that it wraps, by the names that wrappers give them."""
    inner: Any = optimizer
    while isinstance(inner, torch.optim.Optimizer):
        yield inner
        names = ("optimizer", "base_optimizer", "_base_optimizer", "_optimizer", "inner_optimizer")
        inner = next((vars(inner)[name] for name in names if name in vars(inner)), None)


class Guard:
    """Keeps the masked weights of a model at +0 around each step of an optimizer: :meth:`before_step`,
    :meth:`after_step`."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        self._optimizer, self._model = optimizer, model
        # Of each weight, by its identity: the mask under which the optimizer's state is clean.
        self._clean: dict[int, Version | None] = {}
        _masked_layers(model, optimizer)
        _refuse_exchanged(optimizer, model)

    @torch.no_grad()
    def before_step(self, *, has_closure: bool = False) -> None:
        """Mask gradients that are not known to be masked, and let the state start clean where a mask has changed."""
        _refuse_exchanged(self._optimizer, self._model)
        for layer in _masked_layers(self._model, self._optimizer):
            if not layer.is_clean():  # an edited mask takes effect
                layer.project()
            weight, version = layer.stored_weight, version_of(layer.mask)
            assert weight is not None
            if version is None or self._clean.get(id(weight)) != version:
                if id(weight) in self._clean and isinstance(self._optimizer, torch.optim.LBFGS):
                    self._optimizer.state.clear()
                _clean_state(self._optimizer, weight, layer.mask)
                self._clean[id(weight)] = version
            if weight.grad is not None and not layer.has_clean_gradient():
                _zero(weight.grad, layer.mask)
            if not is_small(weight):  # whose gradient is masked in no time
                layer.watch_gradient()
        for one in _constrained_layers(self._model, self._optimizer):
            before_step(one, self._optimizer, id(self), gradients=not has_closure)

    @torch.no_grad()
    def after_step(self) -> None:
        """Set back to +0 what the step has left under the masks."""
        known = type(self._optimizer) in _BY_ENTRY
        if not known:
            count_step()  # one that wraps another may write to weights, past all that counts edits, after the step in it
        for layer in _masked_layers(self._model, self._optimizer):
            if not layer.is_clean():
                layer.project()
            if not known and layer.stored_weight is not None:
                _clean_state(self._optimizer, layer.stored_weight, layer.mask)
        for one in _constrained_layers(self._model, self._optimizer):
            after_step(one, id(self))

    def reset(self) -> None:
        """Look at the whole state anew at the next step: another one was loaded."""
        self._clean.clear()


def _refuse_exchanged(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Raise a ``ValueError`` if an optimizer steps weights that layers had before they were exchanged for another form."""
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gone = {id(parameter) for parameter in held if hasattr(parameter, EXCHANGED)}
    if not gone.difference(map(id, model.parameters()) if gone else ()):
        return
    weights = {
        name: module.weight_values if isinstance(module, SparseLinear) else module.weight
        for name, module in walk_masked(model)
    }
    known = {id(parameter) for parameter in held}
    lacking = [name for name, weight in weights.items() if weight.requires_grad and id(weight) not in known]
    if lacking:
        raise ValueError(
            "an optimizer trains a model's own weights; this one was made before compress or expand exchanged layers, and "
            f"lacks the new weights of {first_names(lacking)}: make it, and its guard, afterwards"
        )


def _masked_layers(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[MaskedWeight]:
    """Return a layer for each masked weight that an optimizer holds; layers that share a weight share its mask."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    layers: dict[int, MaskedWeight] = {}
    for module in model.modules():
        if not isinstance(module, MaskedWeight):
            continue
        weight = module.stored_weight
        if weight is None:
            raise ValueError(
                "freeze_masked guards weights that an optimizer holds, and the weight of a masked layer here is computed "
                "(by torch.nn.utils.parametrize or prune): remove that first, or put the mask into it"
            )
        if id(weight) in held:
            layers.setdefault(id(weight), module)
    return list(layers.values())


def _constrained_layers(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[nn.Module]:
    """Return the layers with constraints whose weights an optimizer holds."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [module for module in model.modules() if constrained(module) and id(stored(module)) in held]


def _zero(tensor: Tensor, mask: Tensor) -> None:
    """Set a tensor to +0 where the mask is ``False``, this process' part of a sharded one."""
    zero_masked(local_part(tensor), local_part(as_dtensor_like(mask, tensor)))


# Of torch's own, those whose update of an entry reads that entry of weight, gradient and state alone: state that is clean
# stays so. No subclass, which may do anything. Adafactor and Muon mix entries; LBFGS remembers all together.
_BY_ENTRY = tuple(
    getattr(torch.optim, name)
    for name in ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "ASGD", "Rprop")
)


def _clean_state(optimizer: torch.optim.Optimizer, weight: Tensor, mask: Tensor) -> None:
    """Make what an optimizer keeps of a weight new where it is masked."""
    _renew_entries(optimizer, weight, ~as_dtensor_like(mask, weight))


def renew(optimizer: torch.optim.Optimizer, weight: Tensor, changed: Tensor) -> None:
    """Make what an optimizer keeps of a weight new where it has ``changed``."""
    _renew_entries(optimizer, weight, changed)
    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.state.clear()


def move_state(
    optimizer: torch.optim.Optimizer, weight: Tensor, shape: torch.Size, move: Callable[[Tensor, float], Tensor]
) -> None:
    """Exchange what an optimizer keeps of each entry of a weight, which had this shape, for what ``move`` makes of it and
    of the number that it starts with."""
    state, group = optimizer.state.get(weight, {}), _group_of(optimizer, weight)
    for name, kept in state.items():
        if isinstance(kept, Tensor) and kept.shape == shape:
            new = move(kept, _fresh(name, group))
            state[name] = kept.copy_(new) if new.shape == shape else new
    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.state.clear()


def _renew_entries(optimizer: torch.optim.Optimizer, weight: Tensor, changed: Tensor) -> None:
    group = _group_of(optimizer, weight)
    for name, kept in optimizer.state.get(weight, {}).items():
        if isinstance(kept, Tensor) and kept.shape == weight.shape:
            kept.masked_fill_(changed, _fresh(name, group))


def _group_of(optimizer: torch.optim.Optimizer, weight: Tensor) -> dict[str, Any]:
    """Return the options of an optimizer for a weight; none if it does not hold it."""
    return next((group for group in optimizer.param_groups if any(one is weight for one in group["params"])), {})


def _fresh(name: str, group: dict[str, Any]) -> float:
    """Return what an optimizer of torch starts this part of its state with."""
    if name == "step_size":  # Rprop
        return float(group["lr"])
    return float(group.get("initial_accumulator_value", 0.0)) if name == "sum" else 0.0  # Adagrad
