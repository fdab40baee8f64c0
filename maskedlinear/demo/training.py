"""The training loop, once for all frameworks: what a framework must offer is the small interface ``Runner``."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from maskedlinear.demo.problem import Float32, Problem

__all__ = ["Gradients", "Run", "Runner", "train"]

Float64 = NDArray[np.float64]


class Gradients(NamedTuple):
    """A masked layer's gradients: ``weight`` (out, in) and ``bias`` (out,)."""

    weight: NDArray[Any]
    bias: NDArray[Any]


class Runner(Protocol):
    """One framework's network and optimizer."""

    def step(self, x: Float32, y: NDArray[np.int64]) -> float:
        """Take one optimizer step on images ``(batch, 64)`` and digits ``(batch,)``; return the loss before it."""

    def gradients(self) -> tuple[Gradients, ...]:
        """Return each masked layer's gradients of the latest step."""

    def evaluate(self, x: Float32) -> NDArray[np.int64]:
        """Return the digits ``(n,)`` that the network sees in images ``(n, 64)``; changes nothing."""

    def weights(self) -> tuple[Float32, ...]:
        """Return a copy of each masked layer's weight, dormant ones included, shape ``(out, in)``."""

    def sparsity(self) -> tuple[float, ...]:
        """Return each masked layer's fraction of masked connections, in [0, 1], as the layer itself says."""


@dataclass(frozen=True)
class Run:
    """What one framework's training came to.

    Attributes:
        losses: the cross entropy of each step's batch, before the step; shape ``(epochs, steps an epoch)``.
        accuracies: the test accuracy after each epoch, in [0, 1]; shape ``(epochs,)``.
        gradients: each masked layer's gradients of the first step, float32.
        initial: each masked layer's weight before training, shape ``(out, in)``, as read from the framework.
        final: the same after it.
        sparsity: each masked layer's fraction of masked connections after training, in [0, 1].
        seconds: the whole training, evaluations included.
        first_step_seconds: the part of it until the first step was done, in which JAX compiles the step.
    """

    losses: Float64
    accuracies: Float64
    gradients: tuple[Gradients, ...]
    initial: tuple[Float32, ...]
    final: tuple[Float32, ...]
    sparsity: tuple[float, ...]
    seconds: float
    first_step_seconds: float


def train(runner: Runner, problem: Problem, on_epoch: Callable[[float, float], None]) -> Run:
    """Train ``runner`` on ``problem``.

    Args:
        runner: a framework's network, fresh.
        problem: the data and the order of the batches.
        on_epoch: is called after each epoch with its mean loss and the test accuracy, in [0, 1].
    """
    initial = runner.weights()
    losses = np.zeros(problem.batches.shape[:2])
    accuracies = np.zeros(len(problem.batches))
    gradients: tuple[Gradients, ...] = ()
    first_step_seconds = 0.0
    start = time.perf_counter()
    for epoch, batches in enumerate(problem.batches):
        for step, batch in enumerate(batches):
            losses[epoch, step] = runner.step(problem.train_x[batch], problem.train_y[batch])
            if not gradients:
                first_step_seconds = time.perf_counter() - start
                gradients = runner.gradients()
        accuracies[epoch] = np.mean(runner.evaluate(problem.test_x) == problem.test_y)
        on_epoch(float(losses[epoch].mean()), float(accuracies[epoch]))
    seconds = time.perf_counter() - start
    return Run(
        losses=losses,
        accuracies=accuracies,
        gradients=gradients,
        initial=initial,
        final=runner.weights(),
        sparsity=runner.sparsity(),
        seconds=seconds,
        first_step_seconds=first_step_seconds,
    )
