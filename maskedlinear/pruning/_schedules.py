"""How sparse a network is at each step of its training, and how much of it moves."""

from __future__ import annotations

import math
from dataclasses import dataclass

from maskedlinear.masks._random import integer

__all__ = [
    "CubicSchedule",
    "GeometricSchedule",
    "LinearSchedule",
    "PolynomialSchedule",
    "SparsitySchedule",
    "cosine_decay",
]


@dataclass(frozen=True)
class SparsitySchedule:
    """A sparsity that rises from step to step: ``final + (initial - final) · (1 - t)^p``, t from 0 to 1; kinds differ in p.

    Use :class:`CubicSchedule`, :class:`LinearSchedule` or :class:`PolynomialSchedule`; whatever takes one takes them all.

    Attributes:
        final: the sparsity from the step ``end`` on, in [0, 1].
        begin: the first step that prunes.
        end: the last one.
        every: how many steps lie between two that prune.
        initial: the sparsity up to ``begin``.

    Raises:
        ValueError: if ``0 <= initial <= final <= 1``, ``0 <= begin < end`` or ``every >= 1`` does not hold.
        TypeError: if a number of steps is not an integer.
    """

    final: float
    begin: int
    end: int
    every: int = 1
    initial: float = 0.0

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("begin", "end", "every"):
            integer(name, getattr(self, name))
        if not 0 <= self.initial <= self.final <= 1:
            raise ValueError(f"0 <= initial <= final <= 1 must hold; got {self.initial} and {self.final}")
        if not 0 <= self.begin < self.end or self.every < 1:
            raise ValueError(
                f"0 <= begin < end and every >= 1 must hold; got begin={self.begin}, end={self.end}, every={self.every}"
            )

    def __call__(self, step: int) -> float:
        """Return the sparsity at a step, in [0, 1]; between two that prune it is that of the last one."""
        if step < self.begin:
            return self.initial
        if step >= self.end:
            return self.final
        done = (step - self.begin) // self.every * self.every / (self.end - self.begin)
        return self.final + float((self.initial - self.final) * (1 - done) ** self._exponent)

    @property
    def _exponent(self) -> float:
        """p in the formula."""
        raise NotImplementedError("take CubicSchedule, LinearSchedule or PolynomialSchedule")

    def due(self, step: int) -> bool:
        """Whether this step prunes."""
        return step == self.end or (self.begin <= step < self.end and (step - self.begin) % self.every == 0)

    def steps(self) -> list[int]:
        """Return the steps that prune, ascending."""
        return [*range(self.begin, self.end, self.every), self.end]


@dataclass(frozen=True)
class CubicSchedule(SparsitySchedule):
    """A sparsity that rises quickly and then ever more slowly: ``final + (initial - final) · (1 - t)³``, t from 0 to 1.

    Attributes and errors: those of :class:`SparsitySchedule`. Source: M. Zhu and S. Gupta, "To prune, or not to prune:
    exploring the efficacy of pruning for model compression", 2017, equation 1.
    """

    @property
    def _exponent(self) -> int:
        return 3


@dataclass(frozen=True)
class LinearSchedule(SparsitySchedule):
    """A sparsity that rises by as much at each step that prunes: ``final + (initial - final) · (1 - t)``, t from 0 to 1.

    Attributes and errors: those of :class:`SparsitySchedule`.
    """

    @property
    def _exponent(self) -> int:
        return 1


@dataclass(frozen=True)
class PolynomialSchedule(SparsitySchedule):
    """A sparsity that rises as a polynomial does: ``final + (initial - final) · (1 - t)^power``, t from 0 to 1::

        >>> from maskedlinear.pruning import PolynomialSchedule
        >>> PolynomialSchedule(0.8, begin=0, end=10, power=2)(5)
        0.6000000000000001

    As ``PolynomialDecay`` of TensorFlow's Model Optimization Toolkit, and jaxpruner's ``PolynomialSchedule`` but that t
    there is a step ahead.

    Attributes:
        power: p, above 0; the others are those of :class:`SparsitySchedule`.

    Raises:
        ValueError: if ``power`` is not above 0 and finite; and as by :class:`SparsitySchedule`.
    """

    power: float = 3.0

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if not 0 < self.power < math.inf:
            raise ValueError(f"power must be above 0 and finite; got {self.power}")

    @property
    def _exponent(self) -> float:
        return self.power


@dataclass(frozen=True)
class GeometricSchedule:
    """Rounds that each remove the same share of what is left: ``1 - (1 - final)^(round / rounds)``.

    For iterative magnitude pruning, with or without rewinding. Source: J. Frankle and M. Carbin, "The Lottery Ticket
    Hypothesis: Finding Sparse, Trainable Neural Networks", ICLR 2019, section 2.

    Attributes:
        final: the sparsity after the last round, in [0, 1).
        rounds: how many there are, 1 for one-shot pruning.

    Raises:
        ValueError: if a value is out of its range.
        TypeError: if ``rounds`` is not an integer.
    """

    final: float
    rounds: int = 1

    def __post_init__(self) -> None:
        """Check the values."""
        integer("rounds", self.rounds)
        if not 0 <= self.final < 1 or self.rounds < 1:
            raise ValueError(f"0 <= final < 1 and rounds >= 1 must hold; got {self.final} and {self.rounds}")

    def __call__(self, round: int) -> float:
        """Return the sparsity after a round, counted from 1; 0 before the first, ``final`` after the last."""
        if round >= self.rounds:
            return self.final
        return float(1 - (1 - self.final) ** (max(round, 0) / self.rounds))


def cosine_decay(step: int, end: int, initial: float = 0.3) -> float:
    """Return the share of connections that move at a step: ``initial / 2 · (1 + cos(π · step / end))``; 0 from ``end`` on.

    Source: U. Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020, section 3.

    Args:
        step: the step, from 0 on.
        end: the step from which on nothing moves; the paper takes three quarters of the training.
        initial: the share at step 0, in [0, 1].

    Raises:
        ValueError: if a value is out of its range.
    """
    if step < 0 or end < 1 or not 0 <= initial <= 1:
        raise ValueError(f"step >= 0, end >= 1 and 0 <= initial <= 1 must hold; got {step}, {end} and {initial}")
    return initial / 2 * (1 + math.cos(math.pi * step / end)) if step < end else 0.0
