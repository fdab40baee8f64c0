"""What the frameworks' schedules of pruning and of regrowth share: they count steps, and say what is due at each."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol

from maskedlinear._progress import Progress, progress_callback
from maskedlinear.pruning._layers import Include
from maskedlinear.pruning._schedules import GeometricSchedule, SparsitySchedule, cosine_decay

__all__ = ["Pruning", "Regrowth", "Steps", "check_regrowth", "lottery_rounds_by", "regrowth_seed"]

_logger = logging.getLogger("maskedlinear")


class Steps(ABC):
    """Counts the steps of a training, and brings averages of the model the masks that have changed.

    Attributes:
        steps: how many there were.
        averages: averages of the model.
    """

    steps = 0
    # Of the framework: gives an average the model's masks, or connections; what has come back starts at 0 there.
    _bring_masks: ClassVar[Any]

    def __init__(self, model: Any, averages: Sequence[Any]) -> None:
        self.model, self.averages = model, list(averages)

    def _update_averages(self) -> None:
        """Bring the averages the masks, after a change."""
        for average in self.averages:
            self._bring_masks(self.model, average)

    def state_dict(self) -> dict[str, Any]:
        """Return the steps so far; masks and connections are in the model's state."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the steps of a state."""
        self.steps = int(state["steps"])


class Pruning(Steps):
    """Prunes a model at the steps of a schedule; a framework's class says how.

    A training is never ended for a layer's last connection, nor because more is masked than the schedule asks for, as in a
    second training of a model: ``on_empty="keep"``, unless it is given. Where scores need gradients, and those of a step are
    not finite, as where a loss was scaled too much, it prunes at the next step instead.
    """

    _late = False
    _prune_model: ClassVar[Any]  # the framework's

    def __init__(self, model: Any, schedule: SparsitySchedule, *, averages: Sequence[Any] = (), **how: Any) -> None:
        super().__init__(model, averages)
        self.schedule, self.how = schedule, {"on_empty": "keep", **how}

    def step(self, **more: Any) -> bool:
        """Prune if the schedule says so at this step; return whether it did.

        Args:
            more: as ``prune_model`` takes it, what is of this step only.

        Raises:
            ValueError: as by ``prune_model``.
        """
        done = self.step_at(self.steps, **more)
        self.steps += 1
        return done

    def step_at(self, step: int, **more: Any) -> bool:
        """Do what :meth:`step` does at a step that somebody else counts."""
        if not (self.schedule.due(step) or self._late):
            return False
        how = {**self.how, **more}
        self._late = not self._has_finite_gradients(how)
        if self._late:
            _logger.warning("nothing is pruned at step %d: its gradients are not finite; the next step prunes", step)
            return False
        self._prune_model(self.model, self.schedule(step), **how)
        self._update_averages()
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the steps so far, and whether the next one has to prune; masks are in the model's state."""
        return {**super().state_dict(), "late": self._late}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the steps of a state."""
        super().load_state_dict(state)
        self._late = bool(state.get("late", False))

    @abstractmethod
    def _has_finite_gradients(self, how: Mapping[str, Any]) -> bool:
        """Whether the gradients that scores are made of are finite, in all processes; true where scores need none."""


class Regrowth(Steps):
    """Moves connections every few steps, ever fewer; a framework's class says how."""

    _regrow_model: ClassVar[Any]  # the framework's

    def __init__(
        self,
        model: Any,
        optimizer: Any = None,
        *,
        every: int,
        end: int,
        initial: float = 0.3,
        growth: Literal["gradient", "random"] = "gradient",
        include: Include = None,
        seed: int = 0,
        averages: Sequence[Any] = (),
        exclude_dropped: bool = False,
    ) -> None:
        check_regrowth(every, end, initial, growth)
        super().__init__(model, averages)
        self.optimizer, self.every, self.end, self.initial = optimizer, every, end, initial
        self.growth, self.include, self.seed = growth, include, seed
        self.exclude_dropped = exclude_dropped

    def due(self, step: int) -> bool:
        """Whether connections move at a step, counted from 0; never at the first."""
        return 0 < step < self.end and step % self.every == 0

    def _move(self, step: int, gradients: Any, are_finite: bool, **more: Any) -> int:
        """Move the connections that are due at a step, where the gradients are finite; return how many moved."""
        if not are_finite:
            _logger.warning("no connections move at step %d: its gradients are not finite", step)
            return 0
        moved: int = self._regrow_model(
            self.model,
            cosine_decay(step, self.end, self.initial),
            gradients=gradients,
            optimizer=self.optimizer,
            include=self.include,
            seed=regrowth_seed(self.seed, step),
            exclude_dropped=self.exclude_dropped,
            **more,
        )
        self._update_averages()
        return moved


def check_regrowth(every: int, end: int, initial: float, growth: str) -> None:
    """Raise a ``ValueError`` if connections cannot move like this."""
    if every < 1:
        raise ValueError(f"every must be at least 1 step; got {every}")
    if growth not in ("gradient", "random"):
        raise ValueError(f"growth must be 'gradient' or 'random'; got {growth!r}")
    cosine_decay(0, end, initial)  # checks the two


def regrowth_seed(seed: int, step: int) -> int:
    """Return the seed of the random places at a step; layers take those that follow."""
    return (seed + (step << 20)) % (1 << 64)


class LotteryRounds(Protocol):
    """The type of ``lottery_rounds``."""

    def __call__(
        self, model: Any, sparsity: float, rounds: int, *, state: Any = None, progress: Progress = False, **how: Any
    ) -> Iterator[float]:
        """Return the rounds."""


def lottery_rounds_by(
    prune: Callable[..., object], rewind: Callable[[Any, Any], object], saved: Callable[[Any, Any], Any]
) -> LotteryRounds:
    """Return a framework's ``lottery_rounds``, of its functions; ``saved`` returns a copy of a state, or of the model's."""

    def lottery_rounds(
        model: Any, sparsity: float, rounds: int, *, state: Any = None, progress: Progress = False, **how: Any
    ) -> Iterator[float]:
        """Iterative pruning with rewinding: train in the body of the loop, from the same saved weights in every round::

            for sparsity in lottery_rounds(model, 0.9, rounds=5):
                optimizer = ...  # a new one, guarded by freeze_masked
                train(model, optimizer)

        The body runs once for the dense model and once after each round of pruning, the last time at ``sparsity``. Between
        two runs the trained weights are pruned, each round by the same share of what is left, and then set back to the saved
        ones.

        Source: J. Frankle and M. Carbin, "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks", ICLR
        2019; with ``state`` of an early step: J. Frankle et al., "Linear Mode Connectivity and the Lottery Ticket
        Hypothesis", ICML 2020.

        Args:
            model: a module with masked weights.
            sparsity: the fraction of masked connections after the last round, in [0, 1).
            rounds: how many times it is pruned.
            state: what to rewind to, as ``rewind_model`` takes it; a copy of the model's present one if ``None``.
            progress: ``True`` to show on the standard error stream how many of the trainings are done; or a function that is
                called with the fraction.
            how: ``score``, ``scope``, ``of``, ``include``, ``seed`` and more: as ``prune_model`` takes them.

        Yields:
            The sparsity that the model is to be trained at; one that is pruned already may have more.

        Raises:
            ValueError: as by :class:`maskedlinear.pruning.GeometricSchedule` and ``prune_model``.
        """
        begun = saved(model, state)
        schedule, tell = GeometricSchedule(sparsity, rounds), progress_callback(progress, f"{rounds + 1} trainings")

        def run() -> Iterator[float]:
            yield schedule(0)
            for round in range(1, rounds + 1):
                tell(round / (rounds + 1))
                prune(model, schedule(round), **how)
                rewind(model, begun)
                yield schedule(round)
            tell(1.0)

        return run()

    return lottery_rounds
