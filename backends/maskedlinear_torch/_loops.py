"""What a training loop that is somebody else's does with masks; the callbacks of Lightning and of transformers call it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from torch import nn
from torch.optim import Optimizer

from maskedlinear_torch._constraints import constrained
from maskedlinear_torch._masked_weight import MaskedWeight
from maskedlinear_torch._over_time import ScheduledPruning, ScheduledRegrowth, bring_masks

__all__ = ["Loop", "has_masked"]

Schedule = ScheduledPruning | ScheduledRegrowth


class Loop:
    """Brings schedules to the steps that a trainer counts from 0.

    Args:
        schedules: of pruning and of regrowth, in the order in which they act.
        averages: averages of the trained model, which get its masks whenever they have changed.

    Raises:
        TypeError: if a schedule or an average is something else.
    """

    def __init__(self, schedules: Sequence[Schedule], averages: Sequence[nn.Module] = ()) -> None:
        for schedule in schedules:
            if not isinstance(schedule, Schedule):
                raise TypeError(
                    f"a callback takes ScheduledPruning and ScheduledRegrowth objects; got {type(schedule).__name__}"
                )
        for average in averages:
            if not isinstance(average, nn.Module):
                raise TypeError(f"averages are modules; got {type(average).__name__}: pass averages=[average]")
        self._schedules, self._averages = list(schedules), list(averages)
        self._open: ExitStack | None = None

    def start(self, optimizers: Sequence[Optimizer]) -> None:
        """Give regrowth the optimizer whose state moves along, where it has none.

        Raises:
            ValueError: if there are several to choose from.
        """
        for schedule in self._schedules:
            if isinstance(schedule, ScheduledRegrowth) and schedule.optimizer is None:
                if len(optimizers) != 1:
                    raise ValueError(
                        f"connections move together with one optimizer's state, and the trainer has {len(optimizers)}: make "
                        "the ScheduledRegrowth with the one that holds their weights"
                    )
                schedule.optimizer = optimizers[0]

    def before(self, step: int) -> None:
        """Record the passes of a step where growth will need it; the first of several batches of a step begins it."""
        if self._open is None:
            self._open = ExitStack()
            for schedule in self._schedules:
                if isinstance(schedule, ScheduledRegrowth):
                    self._open.enter_context(schedule.recording_at(step))

    def after(self, step: int, model: nn.Module, averages: Sequence[nn.Module] = ()) -> bool:
        """Prune and move after a step of the optimizer; return whether anything was due.

        Args:
            step: which, from 0.
            model: what is trained.
            averages: averages of it besides the loop's own.
        """
        self.close()
        done = False
        for schedule in self._schedules:
            done = bool(schedule.step_at(step)) or done
            schedule.steps = step + 1
        for average in (*self._averages, *averages) if done else ():
            bring_masks(model, average)
        return done

    def close(self) -> None:
        """Stop recording."""
        if self._open is not None:
            self._open.close()
            self._open = None


def has_masked(model: nn.Module) -> bool:
    """Whether a model has layers that an optimizer must be guarded for."""
    return any(isinstance(module, MaskedWeight) or constrained(module) for module in model.modules())
