"""What a run of the demo can be told, and which values make sense: checked once, before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["BATCH_NORM_EPSILON", "BATCH_NORM_KEEP", "FRAMEWORKS", "SIZES", "AdamW", "Settings"]

SIZES = (64, 32, 16, 10)
"""The number of nodes: the inputs, then the outputs of each block. A block is masked linear, batch norm, ReLU."""

BATCH_NORM_EPSILON = 1e-5
BATCH_NORM_KEEP = 0.9
"""How much of the running mean and variance a step keeps. Flax calls it momentum; PyTorch's momentum is 1 - this."""

FRAMEWORKS = {"torch": "PyTorch", "flax": "Flax"}
"""The frameworks' names on the command line, and as people write them."""


@dataclass(frozen=True)
class AdamW:
    """The optimizer's settings: named in full, because the frameworks' defaults for them differ.

    Its weight decay moves every weight, also one whose gradient is zero: so it shows whether dormant weights are guarded.
    The learning rate falls from ``peak_rate`` to 0 along half a cosine, over all steps. ``epsilon`` is larger than usual: a
    bias that batch norm follows has the gradient zero, and AdamW would make whole steps of its rounding errors.
    """

    peak_rate: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-6
    weight_decay: float = 0.01


@dataclass(frozen=True)
class Settings:
    """The settings of one run.

    Args:
        sparsity: the fraction of masked connections of each layer, in [0, 1].
        epochs: passes over the training set, at least 1.
        batch_size: images a step, at least 2; the last, partial batch of an epoch is dropped.
        seed: decides the split, the masks, the initial weights and the order of the batches; in [0, 2³²).
        frameworks: one or more of ``FRAMEWORKS``.
        optimizer: the same in all frameworks.

    Raises:
        ValueError: if a value is not in its range; the message names the option of the command line.
    """

    sparsity: tuple[float, ...] = (0.0, 0.5, 0.0)
    epochs: int = 40
    batch_size: int = 64
    seed: int = 0
    frameworks: tuple[str, ...] = tuple(FRAMEWORKS)
    optimizer: AdamW = field(default_factory=AdamW)

    def __post_init__(self) -> None:
        layers = len(SIZES) - 1
        if len(self.sparsity) != layers:
            raise ValueError(
                f"--sparsity needs one value for each of the {layers} layers; got {len(self.sparsity)}: "
                "write it as in --sparsity 0 0.5 0"
            )
        for value in self.sparsity:
            if not 0 <= value <= 1:  # false for NaN too
                raise ValueError(
                    f"--sparsity is the fraction of masked connections and must be in [0, 1]; got {value:g}: "
                    "write 50 % as 0.5"
                )
        if self.epochs < 1:
            raise ValueError(f"--epochs must be at least 1; got {self.epochs}: leave it out for {Settings.epochs}")
        if self.batch_size < 2:
            raise ValueError(
                f"--batch-size must be at least 2, because batch norm takes the variance of a batch; got "
                f"{self.batch_size}: leave it out for {Settings.batch_size}"
            )
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"--seed must be in [0, 2**32); got {self.seed}: choose a number such as 0")
        unknown = [name for name in self.frameworks if name not in FRAMEWORKS]
        if unknown or not self.frameworks:
            raise ValueError(f"--framework must be one of {', '.join(FRAMEWORKS)}; got {', '.join(unknown) or 'none'}")

    @property
    def full_length(self) -> bool:
        """Whether this run is the one that the demo promises an accuracy for: the defaults, with any seed."""
        return (self.sparsity, self.epochs, self.batch_size, self.optimizer) == (
            Settings.sparsity,
            Settings.epochs,
            Settings.batch_size,
            AdamW(),
        )
