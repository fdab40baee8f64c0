"""What all frameworks share, made once in NumPy: the digits, the masks, the initial weights, the order of the batches."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from maskedlinear import masks
from maskedlinear.demo.settings import SIZES, Settings

__all__ = ["Float32", "Layer", "Mask", "Problem", "make_problem"]

Float32 = NDArray[np.float32]
Mask = NDArray[np.bool_]

# An output whose ReLU gives 0 for every image of its digit never learns that digit. Shifted by 1 at first, none is stuck.
_SHIFTS = (0.0, 0.0, 1.0)


class Layer(NamedTuple):
    """Where a block starts from.

    Attributes:
        mask: shape ``(out, in)``.
        weight: shape ``(out, in)``; dormant weights have values like the others.
        bias: shape ``(out,)``.
        shift: of the block's batch norm, shape ``(out,)``; its scale is 1.
    """

    mask: Mask
    weight: Float32
    bias: Float32
    shift: Float32


@dataclass(frozen=True)
class Problem:
    """The digits, the network's start, and what each step does.

    Attributes:
        train_x: n images, shape ``(n, 64)``, in [0, 1].
        train_y: their digits, shape ``(n,)``.
        test_x: as ``train_x``.
        test_y: as ``train_y``.
        layers: each block's start.
        batches: which training images each step sees, shape ``(epochs, steps an epoch, batch size)``.
        rates: the learning rate of each step, shape ``(epochs * steps an epoch,)``.
    """

    train_x: Float32
    train_y: NDArray[np.int64]
    test_x: Float32
    test_y: NDArray[np.int64]
    layers: tuple[Layer, ...]
    batches: NDArray[np.int64]
    rates: Float32

    @property
    def masks(self) -> tuple[Mask, ...]:
        """Each layer's mask, shape ``(out, in)``."""
        return tuple(layer.mask for layer in self.layers)


def make_problem(settings: Settings) -> Problem:
    """Return the problem that ``settings`` describes; the same settings give the same problem, bit for bit.

    Raises:
        ValueError: if the batch size is above the number of training images.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, digits = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        (pixels / 16).astype(np.float32),  # a pixel is a count from 0 to 16
        digits.astype(np.int64),
        test_size=0.25,
        stratify=digits,
        random_state=settings.seed,
    )
    steps = len(train_x) // settings.batch_size
    if steps == 0:
        raise ValueError(
            f"--batch-size must be at most the number of training images, {len(train_x)}; got {settings.batch_size}: "
            f"leave it out for {Settings.batch_size}"
        )
    rng = np.random.default_rng(settings.seed)
    layers = []
    for index, (n_in, n_out) in enumerate(pairwise(SIZES)):
        mask_seed = len(settings.sparsity) * settings.seed + index
        mask = masks.random((n_out, n_in), sparsity=settings.sparsity[index], seed=mask_seed)
        # K. He et al., "Delving Deep into Rectifiers", ICCV 2015; of all inputs, so that a mask changes no weight.
        weight = rng.normal(0, np.sqrt(2 / n_in), (n_out, n_in)).astype(np.float32)
        shift = np.full(n_out, _SHIFTS[index], np.float32)
        layers.append(Layer(mask, weight, np.zeros(n_out, np.float32), shift))
    order = np.stack([rng.permutation(len(train_x)) for _ in range(settings.epochs)])
    total = settings.epochs * steps
    rates = settings.optimizer.peak_rate * 0.5 * (1 + np.cos(np.pi * np.arange(total) / total))
    return Problem(
        train_x=train_x,
        train_y=train_y,
        test_x=test_x,
        test_y=test_y,
        layers=tuple(layers),
        batches=order[:, : steps * settings.batch_size].reshape(settings.epochs, steps, settings.batch_size),
        rates=rates.astype(np.float32),
    )
