"""What a backend shows of a layer that several processes or devices share: how it takes part, and what each of them holds.

It is the part of the protocol of :mod:`maskedlinear.backends` that ``--processes`` and ``--devices`` of the conformance
suite ask for. The suite starts processes of its own, in each of which it makes the backend anew and calls the methods below,
in all of them alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from numpy.typing import NDArray

__all__ = ["DISTRIBUTED", "DIVISIONS", "DistributedLayer", "DistributedMethods", "Shard"]

DISTRIBUTED = (
    "processes",
    "devices",
    "distributed masks",
    "distributed pruning",
    "distributed optimizers",
    "distributed checkpoints",
    "compiled program",
)
"""The capabilities of what several processes or devices share; the first two are a must for all the others."""

DIVISIONS = ("batch", "batch and weights", "outputs", "inputs")
"""What the ranks of a placement divide among them: the batch (data parallelism), the batch and the weights (fully sharded
data parallelism), the outputs, or the inputs of the layer (tensor parallelism)."""

Array = Any


class Shard(NamedTuple):
    """What one process or device holds of an array.

    Attributes:
        values: float64 or boolean, of the whole array's shape, in the spec's orientation.
        held: booleans of that shape: which of them it holds. The others mean nothing.
    """

    values: NDArray[Any]
    held: NDArray[Any]


Shards = Sequence[Shard]


class DistributedMethods(Protocol):
    """What a backend has for ``"processes"`` or ``"devices"``."""

    def join(self, rank: int, size: int, devices: int, folder: Path) -> None:
        """Take part as process ``rank`` of ``size``, each with so many ``devices`` of its own.

        It is called in a process that has used no framework yet, before anything else; once for each format. ``folder`` is
        empty at first, and the same for all: processes may meet in it.
        """

    def placements(self, kind: str) -> Sequence[str]:
        """Return the ways to share a layer among ``kind``, ``"processes"`` or ``"devices"``.

        Each is one of ``DIVISIONS`` and a name: ``"batch: DDP"``, ``"outputs: explicit mesh"``.
        """

    def distributed_layer(self, placement: str, weight: Array, mask: Array, bias: Array | None) -> DistributedLayer:
        """Return a layer with these values, as ``layer`` makes it, that is then shared in one of ``placements``."""


class DistributedLayer(Protocol):
    """A layer that several processes or devices share.

    Every process is called with the same arguments, whole arrays in the spec's shapes, and takes its own part of them. It
    returns its shards: one for each device that is its own. Methods that belong to a capability that the backend lacks are
    never called.

    Attributes:
        optimizers: the optimizers that ``train`` takes, by name, for ``"distributed optimizers"``.
        checkpoints: the ways of ``save`` and ``load``, by name, for ``"distributed checkpoints"``.
    """

    optimizers: Sequence[str]
    checkpoints: Sequence[str]

    def value(self, x: Array) -> Shards:
        """Return what is here of ``y``, as in inference."""

    def gradients(self, x: Array, g: Array) -> tuple[Shards, Shards, Shards | None]:
        """Return what is here of ``(dx, dW, db)`` of ``⟨g, y⟩``, summed over the whole batch, as training leaves them."""

    def state(self) -> tuple[Shards, Shards, Shards | None]:
        """Return what is here of weight, mask and bias; of the weight live values, and dormant ones under the mask."""

    def visible_weight(self) -> Shards:
        """Return what is here of the weight as it stands, as other code reads it."""

    def export(self) -> tuple[NDArray[Any], NDArray[Any]] | None:
        """Return the whole weight as it stands, and its mask, as exporters gather them; ``None`` where another process does.

        For ``"distributed masks"``.
        """

    def set_mask(self, mask: NDArray[Any]) -> None:
        """Give the shared layer a new mask, ``(out, in)``, as users do, for ``"distributed masks"``."""

    def prune(self, sparsity: float) -> None:
        """Mask the smallest weights by the backend's model functions, for ``"distributed pruning"``.

        ``floor(sparsity · size)`` entries are masked then, those that are now among them.
        """

    def train(self, optimizer: str, x: Array, g: Array, steps: int) -> None:
        """Take steps of one of ``optimizers`` under ``freeze_masked``; the loss is ``⟨g, y⟩`` of the whole batch."""

    def save(self, way: str, path: Path) -> None:
        """Write the framework's own checkpoint into the folder ``path``, by one of ``checkpoints``."""

    def load(self, way: str, path: Path) -> None:
        """Read it again, into a layer that as many processes or devices share, or more, or fewer."""

    def gathered(self, x: Array, g: Array) -> Sequence[tuple[int, ...]]:
        """Return the shapes of what the compiled program of value and gradients gathers, for ``"compiled program"``.

        They are those of the results on one device of every operation that brings together what devices hold apart
        (all-gather, all-to-all, collective permutations); a sum over devices is none.
        """
