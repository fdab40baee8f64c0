"""Masks in Lightning's training loop. Users import it as ``maskedlinear.lightning``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import nn

if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
    from pytorch_lightning import Callback
else:
    try:
        from lightning.pytorch import Callback
    except ModuleNotFoundError:
        from pytorch_lightning import Callback

from maskedlinear_torch._loops import Loop, Schedule
from maskedlinear_torch._optim import freeze_masked, holds_masked
from maskedlinear_torch._whole import summary

__all__ = ["MaskedTraining"]


class MaskedTraining(Callback):  # type: ignore[misc]
    """Prunes, moves connections and keeps masked weights still while Lightning trains::

        pruning = ScheduledPruning(module, CubicSchedule(0.9, begin=100, end=1000, every=10))
        trainer = lightning.Trainer(callbacks=[MaskedTraining(pruning)])
        trainer.fit(module, data)

    It guards the optimizers with :func:`maskedlinear.torch.freeze_masked`, and brings the schedules to the steps that
    ``trainer.global_step`` counts: steps of optimizers, whatever ``accumulate_grad_batches`` is. Masks are in the module's
    checkpoints, and training goes on from one at the schedules' right step. For ``lightning.pytorch`` and for
    ``pytorch_lightning``; automatic and manual optimization.

    Args:
        schedules: of pruning and of regrowth, in the order in which they act; none only keeps masked weights still. A
            ``ScheduledRegrowth`` without an optimizer gets the trainer's.
        log: whether the model's sparsity is logged, and shown in the progress bar, when it has changed.
        averages: averages of the trained module (``torch.optim.swa_utils.AveragedModel``, or copies that somebody averages),
            which get its masks whenever they have changed. Those of Lightning's own callbacks (``EMAWeightAveraging``,
            ``WeightAveraging``, which needs ``use_buffers=False``, since a mask has no mean) do without being named.

    Raises:
        TypeError: if a schedule or an average is something else.
    """

    def __init__(self, *schedules: Schedule, log: bool = True, averages: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self._loop, self._log, self._step = Loop(schedules, averages), log, 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Guard the optimizers."""
        _averages(trainer)
        for optimizer in trainer.optimizers:  # of several (of a GAN, say) those that hold a masked weight
            if holds_masked(optimizer, pl_module):
                freeze_masked(optimizer, pl_module)
        self._loop.start(trainer.optimizers)
        self._step = trainer.global_step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Record what growth needs."""
        self._loop.before(trainer.global_step)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Prune and move, if an optimizer has stepped."""
        averages = _averages(trainer)
        done = [self._loop.after(step, pl_module, averages) for step in range(self._step, trainer.global_step)]
        self._step = trainer.global_step
        if any(done) and self._log:
            pl_module.log("sparsity", summary(pl_module).sparsity, prog_bar=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop recording."""
        self._loop.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Stop recording."""
        self._loop.close()


def _averages(trainer: Any) -> list[nn.Module]:
    """Return the averages that Lightning's callbacks keep, under a private name.

    Raises:
        RuntimeError: if one does not have it there.
    """
    averages = []
    for callback in trainer.callbacks:
        average = getattr(callback, "_average_model", None)
        if isinstance(average, nn.Module):
            averages.append(average)
        elif _is_averaging(callback) and not hasattr(callback, "_average_model"):
            raise RuntimeError(
                f"MaskedTraining brings the masks to the average that a {type(callback).__name__} keeps, and this Lightning "
                "keeps it elsewhere: average with torch.optim.swa_utils.AveragedModel, and pass averages=[average]"
            )
    return averages


def _is_averaging(callback: Any) -> bool:
    return any(kind.__name__ == "WeightAveraging" for kind in type(callback).__mro__)
