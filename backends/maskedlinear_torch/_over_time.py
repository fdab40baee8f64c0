"""Masks that change while a model trains: by a schedule, in rounds with rewinding, and with connections that move."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from maskedlinear.pruning._layers import matches
from maskedlinear.pruning._over_time import Pruning, Regrowth, lottery_rounds_by
from maskedlinear_torch._layer import MaskedLinear
from maskedlinear_torch._masked_weight import MaskedWeight
from maskedlinear_torch._ranks import are_finite, group_of
from maskedlinear_torch._regrow import DenseGradients, dense_gradients, regrow_model
from maskedlinear_torch._sparse_layer import SparseLinear
from maskedlinear_torch._weight_mask import WeightMask
from maskedlinear_torch._weights import masked_weights, module_of
from maskedlinear_torch._whole import prune_model

__all__ = ["ScheduledPruning", "ScheduledRegrowth", "bring_masks", "lottery_rounds", "rewind_model"]


def bring_masks(model: nn.Module, average: nn.Module) -> None:
    """Give an average of a model its masks and its sparse layers' connections; what has come back starts at 0 there.

    Either may be wrapped: an average in ``AveragedModel``, a model in ``DistributedDataParallel`` or by ``torch.compile``.

    Raises:
        ValueError: if a masked layer of the model is none of the same form in the average; no mask has changed then.
    """
    layers = {
        name: layer
        for name, layer in _unwrapped(model).named_modules()
        if isinstance(layer, MaskedWeight | SparseLinear)
    }
    others = dict(_unwrapped(average).named_modules())
    for name, layer in layers.items():
        form = next(form for form in (MaskedLinear, WeightMask, SparseLinear) if isinstance(layer, form))
        if not isinstance(others.get(name), form):
            raise ValueError(
                f"an average has the layers of its model; got one in which {name or 'the model'} is a "
                f"{type(others.get(name)).__name__}, where the model has a {form.__name__}: make it of the model as it is"
            )
    for name, layer in layers.items():
        other: Any = others[name]
        if isinstance(layer, MaskedWeight):
            other.set_mask(layer.mask, revive=False)
        elif other.pattern != layer.pattern:
            other.rewire(layer.pattern, layer.pattern.places_in(other.pattern))


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the module in an average, a parallel or a compiled one."""
    while True:
        if isinstance(model, AveragedModel | DataParallel | DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        else:
            return model


class ScheduledPruning(Pruning):
    """Prunes a model at the steps of a schedule; in a training loop, after each step of the optimizer::

        pruner = ScheduledPruning(model, CubicSchedule(0.9, begin=100, end=1000, every=10))
        for x, y in batches:
            ...
            optimizer.step()
            pruner.step()

    Args:
        model: a module with masked weights.
        schedule: the sparsity at each step, counted from 0.
        averages: averages of the model (``torch.optim.swa_utils.AveragedModel``, or copies that somebody averages), which
            get its masks whenever it was pruned.
        how: ``score``, ``scope``, ``include``, ``block``, ``seed``, ``group`` and more: as :func:`prune_model` takes them.

    Attributes:
        steps: how many steps there were.
    """

    _prune_model, _bring_masks = staticmethod(prune_model), staticmethod(bring_masks)

    def _has_finite_gradients(self, how: Mapping[str, Any]) -> bool:
        score = how.get("score", "magnitude")
        if not (callable(score) or score in ("snip", "taylor")):
            return True
        layers = masked_weights(self.model).items()
        meant = [layer for name, layer in layers if matches(name, module_of(layer), how.get("include"))]
        gradients = [layer.weight.grad for layer in meant if layer.weight.grad is not None]
        return are_finite(gradients, group_of(self.model, how.get("group", "model")))


class ScheduledRegrowth(Regrowth):
    """Moves connections every few steps, ever fewer: RigL by gradient, SET at random; in a training loop::

        regrowth = ScheduledRegrowth(model, optimizer, every=100, end=7500)
        for x, y in batches:
            with regrowth.recording():
                loss(model(x), y).backward()
            optimizer.step()
            regrowth.step()

    Source: U. Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020, algorithm 1; D. Mocanu et al.,
    "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by network science", Nature
    Communications 2018.

    Args:
        model: a module with masked layers of either form.
        optimizer: as in :func:`regrow_model`.
        every: how many steps lie between two that move connections.
        end: the step from which on nothing moves; the paper takes three quarters of the training.
        initial: the share of connections that would move at step 0, in [0, 1]; it falls as a cosine.
        growth: ``"gradient"`` (RigL) or ``"random"`` (SET).
        include: which layers, as in :func:`mask_model`.
        seed: of the random places.
        averages: averages of the model (``torch.optim.swa_utils.AveragedModel``, or copies that somebody averages), which
            get its connections whenever they have moved; new ones start at 0 there, too.
        exclude_dropped: as in :func:`regrow_model`.
        group: the processes that train one model together, as in :func:`regrow_model`.

    Attributes:
        steps: how many steps there were.

    Raises:
        ValueError: if ``every``, ``end``, ``initial`` or ``growth`` is out of its range.
    """

    _gradients: DenseGradients | None = None
    _regrow_model, _bring_masks = staticmethod(regrow_model), staticmethod(bring_masks)

    def __init__(self, *arguments: Any, group: Any = "model", **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.group = group

    def recording(self) -> AbstractContextManager[Any]:
        """Return the context for the forward and backward passes of this step: it records where growth will need it."""
        return self.recording_at(self.steps)

    def recording_at(self, step: int) -> AbstractContextManager[Any]:
        """Do what :meth:`recording` does at a step that somebody else counts."""
        if self.growth == "random" or not self.due(step):
            return nullcontext()
        return self._recording()

    def step(self) -> int:
        """Move connections if it is time; return how many moved.

        Raises:
            ValueError: as by :func:`regrow_model`; or if growth is by gradient and nothing was recorded at this step.
            Gradients that are not finite, as of a step that a ``GradScaler`` skips, move nothing, and are logged.
        """
        moved = self.step_at(self.steps)
        self.steps += 1
        return moved

    def step_at(self, step: int) -> int:
        """Do what :meth:`step` does at a step that somebody else counts."""
        gradients, self._gradients = self._gradients, None
        if not self.due(step):
            return 0
        if self.growth == "gradient" and gradients is None:
            raise ValueError("growth by gradient needs the passes of this step inside `with regrowth.recording():`")
        are_finite = gradients is None or gradients.are_finite(self.model, self.group)
        return self._move(step, gradients, are_finite, group=self.group)

    @contextmanager
    def _recording(self) -> Iterator[None]:
        with dense_gradients(self.model) as self._gradients:
            yield


def rewind_model(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Set weights, biases and buffers of a model back to a saved state, and keep the masks of now.

    An optimizer's state is not touched: make a new one, or load that of the same moment.

    Args:
        model: a module with masked weights.
        state: a copy of ``model.state_dict()`` from an earlier moment, before or after it was masked.

    Raises:
        RuntimeError: as by ``load_state_dict``, if the state is of another model.
    """
    masks = {
        f"{name}.mask" if name else "mask": layer.mask.clone()
        for name, layer in model.named_modules()
        if isinstance(layer, MaskedWeight)
    }
    model.load_state_dict({**state, **masks})


lottery_rounds = lottery_rounds_by(
    prune_model,
    rewind_model,
    lambda model, state: copy.deepcopy(model.state_dict() if state is None else dict(state)),
)
