"""Tables of a model's parameters: what is masked, dead, left out and why, and what it costs; and whether masks act."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from maskedlinear._table import lines
from maskedlinear.models._axes import WeightAxes
from maskedlinear.models._names import NO_WEIGHT

__all__ = ["MaskCheck", "ModelSummary", "UnmaskedParameter", "WeightSummary", "first_names"]

CONSTANT = (
    "The outputs do not depend on the inputs: others changed no bit of them. Perhaps no live connection lies on a path "
    "from an input to an output: prune less, or by scope='layer'."
)

_NAMES = 4  # of parameters that a table names before it counts the others


@dataclass(frozen=True)
class WeightSummary:
    """One masked weight.

    Attributes:
        name: what it is called in its model.
        form: ``"dense"`` or ``"sparse"``.
        shape: the weight's; of a linear layer ``(out, in)``.
        connections: how many are live.
        dead_outputs: outputs without a live input, in all its matrices; 0 of a weight whose axes nobody knows.
        dead_inputs: inputs that no output uses, likewise.
        nbytes: the bytes of its layer's parameters, mask and indices.
        flops: the operations of a forward pass for one row of x, one place of a window: 2 for each weight that the form
            multiplies.
    """

    name: str
    form: str
    shape: tuple[int, ...]
    connections: int
    dead_outputs: int
    dead_inputs: int
    nbytes: int
    flops: int

    @property
    def size(self) -> int:
        """How many entries it has, live or not."""
        return math.prod(self.shape)

    @property
    def sparsity(self) -> float:
        """The fraction of masked connections, in [0, 1]; 0 for a layer of no size."""
        return (self.size - self.connections) / self.size if self.size else 0.0

    @classmethod
    def of_mask(cls, name: str, mask: Any, nbytes: int, axes: WeightAxes | None = None) -> WeightSummary:
        """Return the row of a weight in the dense form, of its mask and axes; without axes one of shape ``(out, in)``."""
        live = np.asarray(mask, bool)
        axes = axes or WeightAxes()
        matrices = axes.matrices(live)
        outputs, inputs = np.count_nonzero(matrices, axis=2), np.count_nonzero(matrices, axis=1)
        return cls.of_counts(name, live.shape, outputs, inputs, nbytes, axes)

    @classmethod
    def of_counts(
        cls, name: str, shape: tuple[int, ...], outputs: Any, inputs: Any, nbytes: int, axes: WeightAxes | None
    ) -> WeightSummary:
        """Return the row of a weight in the dense form, of how many live connections each output and each input has, in each
        of its matrices: shapes ``(stacked, out)`` and ``(stacked, in)``."""
        dead_outputs, dead_inputs = int(np.count_nonzero(outputs == 0)), int(np.count_nonzero(inputs == 0))
        if axes is None or axes == WeightAxes.of_entries(len(shape)):  # nobody knows its nodes
            dead_outputs = dead_inputs = 0
        return cls(name, "dense", shape, int(outputs.sum()), dead_outputs, dead_inputs, nbytes, 2 * math.prod(shape))

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
class UnmaskedParameter:
    """A parameter without a mask.

    Attributes:
        name: what it is called in its model.
        shape: its shape; empty of one without values yet.
        why: why it is left out; empty if it could be masked.
    """

    name: str
    shape: tuple[int, ...]
    why: str = ""

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def is_weight(self) -> bool:
        """Whether it is a matrix or a kernel, masked or not; no bias, norm, scale, position, embedding or adapter."""
        return self.why not in NO_WEIGHT


@dataclass(frozen=True)
class ModelSummary:
    """The parameters of a model; printed, a table with a line for each masked weight, and what is not masked and why.

    Attributes:
        rows: the masked weights, in the model's order; one that several modules share is there once.
        unmasked: the other parameters.
        effective_connections: how many live connections of the masked weights lie on a path from an input of the model to an
            output, where that is known: in a plain ``Sequential`` of linear layers and of modules that act on each node by
            itself; in PyTorch of other models too, if ``summary`` is given an example of their inputs. ``None`` elsewhere;
            :func:`maskedlinear.pruning.effective_masks` tells it of masks in their order.
        why_unknown: why it is ``None`` although ``summary`` was given inputs; else empty.
    """

    rows: Sequence[WeightSummary]
    unmasked: Sequence[UnmaskedParameter] = ()
    effective_connections: int | None = None
    why_unknown: str = ""

    @property
    def sparsity(self) -> float:
        """The fraction of masked entries in all masked weights together, in [0, 1]."""
        return self._fraction_of(0)

    @property
    def weight_sparsity(self) -> float:
        """The fraction of masked entries in all weights, those without a mask included, in [0, 1]."""
        return self._fraction_of(sum(other.size for other in self.unmasked if other.is_weight))

    @property
    def model_sparsity(self) -> float:
        """The fraction of masked entries in all parameters of the model, in [0, 1]."""
        return self._fraction_of(sum(other.size for other in self.unmasked))

    @property
    def effective_sparsity(self) -> float | None:
        """The fraction of entries of all masked weights together that lie on no path from an input of the model to an
        output, in [0, 1]; ``None`` where that is not known."""
        size = sum(row.size for row in self.rows)
        if self.effective_connections is None:
            return None
        return 1 - self.effective_connections / size if size else 0.0

    def _fraction_of(self, others: int) -> float:
        size = sum(row.size for row in self.rows)
        masked = size - sum(row.connections for row in self.rows)
        return masked / (size + others) if size + others else 0.0

    def __str__(self) -> str:
        """Return the table."""
        head = ("weight", "form", "shape", "live", "sparsity", "dead outputs", "dead inputs", "KiB", "kFLOP a row")
        table = [
            (
                row.name or "(the model)",
                row.form,
                " x ".join(map(str, row.shape)),
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
        text = lines([head, *table, total])
        if self.effective_connections is not None:
            text.append(
                f"{self.effective_connections} live connections lie on a path from an input to an output: an effective "
                f"sparsity of {self.effective_sparsity:.4g}."
            )
        if self.why_unknown:
            text.append(
                f"How many connections lie on a path from an input to an output is not known: {self.why_unknown}."
            )
        if self.unmasked:
            text += [
                f"Of all weights {self.weight_sparsity:.4g}, of the whole model {self.model_sparsity:.4g} is masked.",
                *lines([("not masked", "numbers", "parameters"), *self._reasons()]),
            ]
        return "\n".join(text)

    def _reasons(self) -> list[tuple[str, str, str]]:
        """Return why parameters are not masked, how many numbers they have, and their names; what could be, first."""
        groups: dict[str, list[UnmaskedParameter]] = {}
        for other in sorted(self.unmasked, key=lambda other: other.why != ""):
            groups.setdefault(other.why or "could be", []).append(other)
        return [
            (why, str(sum(other.size for other in group)), first_names([other.name for other in group]))
            for why, group in groups.items()
        ]


def first_names(names: Sequence[str]) -> str:
    """Return names, of which a few stand for many."""
    more = len(names) - _NAMES
    return ", ".join(name or "(the model)" for name in names[:_NAMES]) + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True)
class MaskCheck:
    """What ``check_masks`` has seen; printed, a table of the layers that do not act masked.

    Attributes:
        checked: the names of the layers that were checked, in the model's order.
        failures: what does not hold, by the name of the layer; empty if everything does.
        is_constant: whether other inputs changed no bit of the outputs, as where no live connection lies on a path from an
            input to an output.
    """

    checked: list[str]
    failures: dict[str, list[str]]
    is_constant: bool = False

    @property
    def ok(self) -> bool:
        """Whether everything that is masked acts masked, and the outputs depend on the inputs."""
        return not self.failures and not self.is_constant

    def __str__(self) -> str:
        """Return the table."""
        constant = [CONSTANT] if self.is_constant else []
        if not self.failures:
            return "\n".join([f"All {len(self.checked)} masked layers act masked.", *constant])
        rows = [(name or "(the model)", what) for name, failures in self.failures.items() for what in failures]
        total = f"{len(self.failures)} of {len(self.checked)} masked layers do not act masked."
        return "\n".join([*lines([("layer", "what does not hold"), *rows]), total, *constant])
