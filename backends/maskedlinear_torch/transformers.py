"""Masks in Hugging Face's ``transformers``: in the files of models, from when this is imported, and in the training loop of
its ``Trainer``. Users import it as ``maskedlinear.transformers``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import TrainerCallback

from maskedlinear_torch._hub_card import model_card
from maskedlinear_torch._hub_pretrained import install
from maskedlinear_torch._loops import Loop, Schedule, has_masked
from maskedlinear_torch._optim import Guard
from maskedlinear_torch._whole import summary

__all__ = ["MaskedTraining", "model_card"]

install()


class MaskedTraining(TrainerCallback):  # type: ignore[misc]
    """Prunes, moves connections and keeps masked weights still while a ``transformers.Trainer`` trains::

        pruning = ScheduledPruning(model, CubicSchedule(0.9, begin=100, end=1000, every=10))
        trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[MaskedTraining(pruning)])
        trainer.train()

    It guards the optimizer as :func:`maskedlinear.torch.freeze_masked` does, around each of its steps, and brings the
    schedules to the steps that ``state.global_step`` counts, whatever ``gradient_accumulation_steps`` is. Masks are in the
    model's checkpoints, and training goes on from one at the schedules' right step. When the sparsity has changed, it is
    written into ``state.log_history``.

    Args:
        schedules: of pruning and of regrowth, in the order in which they act; none only keeps masked weights still. A
            ``ScheduledRegrowth`` without an optimizer gets the trainer's.
        averages: averages of the trained model (``torch.optim.swa_utils.AveragedModel``, or copies that somebody averages),
            which get its masks whenever they have changed.

    Raises:
        TypeError: if a schedule or an average is something else.
    """

    def __init__(self, *schedules: Schedule, averages: Sequence[nn.Module] = ()) -> None:
        self._loop = Loop(schedules, averages)
        self._guard: Guard | None = None
        self._sparsity: float | None = None  # after the last change

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Guard the optimizer."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        self._guard = Guard(optimizer, model) if has_masked(model) else None
        self._loop.start([optimizer])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record what growth needs."""
        self._loop.before(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hold the masked weights."""
        if self._guard is not None:
            self._guard.before_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put them back; prune and move, while there are gradients to score by. This step is not yet counted."""
        if self._guard is not None:
            self._guard.after_step()
        if self._loop.after(state.global_step, kwargs["model"]):
            self._sparsity = summary(kwargs["model"]).sparsity
            state.log_history.append({"sparsity": self._sparsity, "step": state.global_step + 1})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop recording; say so if the best checkpoint, which is the model now, has other masks than the last step."""
        self._loop.close()
        model = kwargs["model"]
        now, last = summary(model).sparsity if has_masked(model) else None, self._sparsity
        if last is not None and now is not None and now < last:
            warnings.warn(
                f"the trainer has gone back to its best checkpoint, which has the masks of an earlier step: sparsity "
                f"{now:.4g}, where the schedule has come to {last:.4g}. Let only checkpoints count that come after its end",
                stacklevel=2,
            )
