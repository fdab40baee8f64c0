"""Tables of a model's masked layers: what is live, what is dead, what it costs; and whether they act masked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from maskedlinear._table import lines

__all__ = ["MaskCheck", "ModelSummary", "WeightSummary"]


@dataclass(frozen=True)
class WeightSummary:
    """One masked layer.

    Attributes:
        name: what it is called in its model.
        form: ``"dense"`` or ``"sparse"``.
        shape: ``(out, in)``.
        connections: how many are live.
        dead_outputs: outputs without a live input.
        dead_inputs: inputs that no output uses.
        nbytes: the bytes of its parameters, mask and indices.
        flops: the operations of a forward pass for one row of x: 2 for each weight that the form multiplies.
    """

    name: str
    form: str
    shape: tuple[int, int]
    connections: int
    dead_outputs: int
    dead_inputs: int
    nbytes: int
    flops: int

    @property
    def sparsity(self) -> float:
        """The fraction of masked connections, in [0, 1]; 0 for a layer of no size."""
        size = self.shape[0] * self.shape[1]
        return (size - self.connections) / size if size else 0.0

    @classmethod
    def of_mask(cls, name: str, mask: Any, nbytes: int) -> WeightSummary:
        """Return the row of a layer in the dense form, of its mask, shape ``(out, in)``."""
        live = np.asarray(mask, bool)
        return cls(
            name,
            "dense",
            live.shape,
            int(np.count_nonzero(live)),
            int(live.shape[0] - np.count_nonzero(live.any(axis=1))),
            int(live.shape[1] - np.count_nonzero(live.any(axis=0))),
            nbytes,
            2 * live.size,
        )

    @classmethod
    def of_pattern(cls, name: str, pattern: Any, nbytes: int) -> WeightSummary:
        """Return the row of a layer in the sparse form, of its :class:`maskedlinear.pattern.SparsityPattern`."""
        in_ = pattern.shape[1]
        used = np.zeros(in_, bool)
        used[pattern.indices] = True
        return cls(
            name,
            "sparse",
            pattern.shape,
            pattern.nnz,
            int(np.count_nonzero(np.diff(pattern.indptr) == 0)),
            int(in_ - np.count_nonzero(used)),
            nbytes,
            2 * pattern.nnz,
        )


@dataclass(frozen=True)
class ModelSummary:
    """The masked layers of a model; printed, a table with a line for each and one for all.

    Attributes:
        rows: the layers, in the model's order.
    """

    rows: Sequence[WeightSummary]

    @property
    def sparsity(self) -> float:
        """The fraction of masked connections in all layers together, in [0, 1]."""
        size = sum(row.shape[0] * row.shape[1] for row in self.rows)
        return (size - sum(row.connections for row in self.rows)) / size if size else 0.0

    def __str__(self) -> str:
        """Return the table."""
        head = ("layer", "form", "in -> out", "live", "sparsity", "dead outputs", "dead inputs", "KiB", "kFLOP a row")
        table = [
            (
                row.name or "(the model)",
                row.form,
                f"{row.shape[1]} -> {row.shape[0]}",
                str(row.connections),
                f"{row.sparsity:.4g}",
                str(row.dead_outputs),
                str(row.dead_inputs),
                f"{row.nbytes / 1024:.4g}",
                f"{row.flops / 1e3:.4g}",
            )
            for row in self.rows
        ]
        total = (
            "all",
            "",
            "",
            str(sum(row.connections for row in self.rows)),
            f"{self.sparsity:.4g}",
            str(sum(row.dead_outputs for row in self.rows)),
            str(sum(row.dead_inputs for row in self.rows)),
            f"{sum(row.nbytes for row in self.rows) / 1024:.4g}",
            f"{sum(row.flops for row in self.rows) / 1e3:.4g}",
        )
        return "\n".join(lines([head, *table, total]))


@dataclass(frozen=True)
class MaskCheck:
    """What ``check_masks`` has seen; printed, a table of the layers that do not act masked.

    Attributes:
        checked: the names of the layers that were checked, in the model's order.
        failures: what does not hold, by the name of the layer; empty if everything does.
    """

    checked: list[str]
    failures: dict[str, list[str]]

    @property
    def ok(self) -> bool:
        """Whether everything that is masked acts masked."""
        return not self.failures

    def __str__(self) -> str:
        """Return the table."""
        if self.ok:
            return f"All {len(self.checked)} masked layers act masked."
        rows = [(name or "(the model)", what) for name, failures in self.failures.items() for what in failures]
        total = f"{len(self.failures)} of {len(self.checked)} masked layers do not act masked."
        return "\n".join([*lines([("layer", "what does not hold"), *rows]), total])
