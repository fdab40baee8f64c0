"""What is timed: shapes, batches, densities, by the question that they answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from maskedlinear.pattern import SparsityPattern

__all__ = ["NAMES", "SETS", "Case", "Names", "cases"]


class Names(NamedTuple):
    """What a framework's layers are called in the results: its own dense one, and the two masked forms."""

    base: str
    dense: str
    sparse: str


NAMES = {
    "torch": Names("nn.Linear", "MaskedLinear", "SparseLinear"),
    "jax": Names("jnp dense", "masked_linear", "sparse_linear"),
}
SETS = ("layers", "density", "batch", "width", "choice", "peak")
_CHOICES = 40


@dataclass(frozen=True)
class Case:
    """One layer and its batch.

    Attributes:
        of: which of ``SETS`` it belongs to.
        in_features: the number of inputs.
        out_features: the number of outputs.
        batch: the number of rows of x.
        connections: how many there are.
    """

    of: str
    in_features: int
    out_features: int
    batch: int
    connections: int

    @property
    def density(self) -> float:
        """The fraction of connections that are there, in [0, 1]."""
        return self.connections / (self.in_features * self.out_features)

    def __str__(self) -> str:
        """Name the case, for tables."""
        return f"{self.in_features} -> {self.out_features}, batch {self.batch}, {self.density:.3g} live"

    def pattern(self) -> SparsityPattern:
        """Return connections at random places, always the same."""
        generator = np.random.default_rng(0)
        size = self.in_features * self.out_features
        drawn = np.sort(generator.choice(size, self.connections, replace=False))
        starts = np.searchsorted(drawn, np.arange(self.out_features + 1) * self.in_features)
        return SparsityPattern(starts, drawn % self.in_features, self.in_features)


def cases(chosen: tuple[str, ...] = SETS) -> list[Case]:
    """Return the cases of the sets named."""

    def square(of: str, width: int, batch: int, density: float) -> Case:
        return Case(of, width, width, batch, round(density * width * width))

    found = {
        # The ones that claims are made of; 11876 -> 2233 with 46,939 connections is Reactome's wiring of genes to pathways.
        "layers": [
            Case("layers", 64, 32, 64, 205),
            square("layers", 2048, 256, 0.1),
            square("layers", 2048, 256, 0.01),
            square("layers", 4096, 32, 0.01),
            Case("layers", 11876, 2233, 128, 46_939),
            Case("layers", 768, 3072, 1, 235_930),
        ],
        "density": [square("density", 4096, 32, d) for d in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.5, 0.7)]
        + [square("density", 2048, 256, d) for d in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.5, 0.7)],
        "batch": [square("batch", 2048, batch, 0.03) for batch in (1, 4, 16, 64, 256, 1024)],
        "width": [square("width", width, 32, 0.01) for width in (256, 512, 1024, 2048, 4096, 8192, 16384)],
        "choice": _drawn(_CHOICES),
        "peak": [
            *(square("peak", 4096, 32, d) for d in (0.01, 0.1)),
            Case("peak", 100_000, 100_000, 64, 1_000_000),
        ],
    }
    return [case for name in chosen for case in found[name]]


def _drawn(count: int) -> list[Case]:
    """Return layers of any shape, batch and density, always the same, to see whether ``compress`` chooses well."""
    generator = np.random.default_rng(7)

    def between(low: float, high: float) -> float:
        return float(np.exp(generator.uniform(np.log(low), np.log(high))))

    found = []
    for _ in range(count):
        in_, out, batch = int(between(48, 4096)), int(between(48, 4096)), int(between(1, 700))
        found.append(Case("choice", in_, out, batch, max(1, round(between(0.005, 0.6) * in_ * out))))
    return found
