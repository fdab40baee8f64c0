"""What can be taken out of a network without a change of its outputs: nodes that are constant, and nodes that nothing reads.

A framework's front end walks its model in the order of computation and tells a :class:`Flow` of each layer; the plan that
comes back says which rows and columns of each layer stay, and what its bias takes over from the columns that go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Flow", "KeptNodes", "Plan", "Unfollowed", "check_unfollowed", "kept_nodes"]

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Unfollowed = Literal["raise", "keep"]


@dataclass(frozen=True)
class _Layer:
    x: int
    y: int
    weight: NDArray[Any]
    mask: Bools


@dataclass(frozen=True)
class KeptNodes:
    """Which nodes of a layer ``shrink`` has kept, of those that it had before it was first shrunk: ``layer.kept_nodes``.

    It is how names follow: :meth:`maskedlinear.masks.Wiring.edges` reads a shrunk layer by it. An attribute of the layer, in
    its copies and pickles, and in no state or checkpoint: for these, ``wiring.restrict(kept.inputs, kept.outputs)``.

    Attributes:
        shape: ``(out, in)``, before.
    """

    shape: tuple[int, int]
    _inputs: bytes  # a byte a node; bytes and no arrays, so that a layer's structure can be hashed and compared
    _outputs: bytes

    @property
    def inputs(self) -> Bools:
        """Which inputs are there, shape ``(in,)``."""
        return np.frombuffer(self._inputs, bool)

    @property
    def outputs(self) -> Bools:
        """Which outputs are there, shape ``(out,)``."""
        return np.frombuffer(self._outputs, bool)


def kept_nodes(layer: Any, outputs: Bools, inputs: Bools) -> KeptNodes:
    """Return what is kept when a layer's rows and columns are, one that may have been shrunk before."""
    before = getattr(layer, "kept_nodes", None)
    if not isinstance(before, KeptNodes) or (before.outputs.sum(), before.inputs.sum()) != (len(outputs), len(inputs)):
        return KeptNodes((len(outputs), len(inputs)), inputs.tobytes(), outputs.tobytes())
    every = []
    for old, new in ((before.inputs, inputs), (before.outputs, outputs)):
        now = old.copy()
        now[old] = new
        every.append(now.tobytes())
    return KeptNodes(before.shape, *every)


@dataclass(frozen=True)
class Plan:
    """Which nodes stay.

    Attributes:
        layers: by the name of each linear layer: booleans of its rows that stay, shape ``(out,)``, of its columns, shape
            ``(in,)``, and what is added to its bias, float64, shape ``(out,)``.
        features: by the name of each layer that keeps something a feature, booleans of those that stay.
    """

    layers: dict[str, tuple[Bools, Bools, Floats]]
    features: dict[str, Bools]


class Flow:
    """The values of a network, each with features along its last axis, and how one is made of another."""

    def __init__(self) -> None:
        self._constant: list[Bools] = []  # by value: the features that are the same whatever the network is given
        self._constants: list[Floats] = []  # and what they are; 0 elsewhere
        self._same: list[int] = []  # values with the same features stay or go together: the first of them
        self._layers: dict[str, _Layer] = {}
        self._features: dict[str, int] = {}
        self._made: list[
            tuple[int, str]
        ] = []  # values that are made whole, and by what; the network's own inputs by ""
        self._read: list[tuple[int, str]] = []  # values that are read whole, and by what; the network's outputs by ""

    def source(self, features: int, why: str = "") -> int:
        """Return a new value that all of its features are part of: an input, or made by something not followed, ``why``."""
        value = self._new(np.zeros(features, bool), np.zeros(features))
        self._made.append((value, why))
        return value

    def read(self, value: int, why: str = "") -> None:
        """Say that all features of a value are needed: an output, or read by something not followed, ``why``."""
        self._read.append((value, why))

    def linear(self, name: str, x: int, weight: Any, mask: Any, bias: Any) -> int:
        """Return y of a layer with a weight and mask of shape ``(out, in)``, and a bias of shape ``(out,)`` or ``None``."""
        weight, mask = np.asarray(weight), np.asarray(mask, bool)
        known = self._constant[x]
        constant = ~mask[:, ~known].any(axis=1)
        values = _times(weight, mask, known, self._constants[x])
        if bias is not None:
            values = values + np.asarray(bias, np.float64)
        y = self._new(constant, np.where(constant, values, 0.0))
        self._layers[name] = _Layer(x, y, weight, mask)
        return y

    def elementwise(self, inputs: Sequence[int], evaluate: Callable[[list[Floats]], Any], name: str = "") -> int:
        """Return the value that an operation makes of others feature by feature; ``name`` if it keeps something a feature.

        ``evaluate`` is given the constants of each input, shape ``(features,)``, 0 where there are none, and returns the
        operation's results.
        """
        constant = np.logical_and.reduce([self._constant[value] for value in inputs])
        results = self._constants[inputs[0]]
        if constant.any():
            results = np.asarray(evaluate([self._constants[value] for value in inputs]), np.float64)
        made = self._new(constant, np.where(constant, results, 0.0))
        for value in inputs:
            self._same[self._first(value)] = self._first(made)
        if name:
            self._features[name] = made
        return made

    def plan(self, on_unfollowed: Unfollowed) -> Plan:
        """Return what stays.

        Raises:
            ValueError: if something could go but for what is not followed, and ``on_unfollowed`` is ``"raise"``.
        """
        kept = self._kept([*self._made, *self._read])
        if on_unfollowed == "raise":
            self._check_followed()
        layers = {}
        for name, layer in self._layers.items():
            rows, columns = kept[self._first(layer.y)], kept[self._first(layer.x)]
            gone = self._constant[layer.x] & ~columns
            layers[name] = rows, columns, _times(layer.weight, layer.mask, gone, self._constants[layer.x])
        return Plan(layers, {name: kept[self._first(value)] for name, value in self._features.items()})

    def _kept(self, whole: Sequence[tuple[int, str]]) -> dict[int, Bools]:
        """Return which features of each value stay, those in ``whole`` entirely: the fewest that what stays reads."""
        kept = {self._first(value): np.zeros(len(self._constant[value]), bool) for value in range(len(self._same))}
        for value, _ in whole:
            kept[self._first(value)][:] = True
        changed = True
        while changed:  # once for a chain; a residual's layers read what they write
            changed = False
            for layer in reversed(self._layers.values()):
                needed = layer.mask[kept[self._first(layer.y)]].any(axis=0) & ~self._constant[layer.x]
                columns = kept[self._first(layer.x)]
                if (needed & ~columns).any():
                    columns |= needed
                    changed = True
        return kept

    def _check_followed(self) -> None:
        blocked = [
            f"{self._constant[value].sum()} of the {self._constant[value].size} features that go into {why} are constant"
            for value, why in self._read
            if why and self._constant[value].any()
        ]
        loose = self._kept([*self._read, *(made for made in self._made if not made[1])])
        for value, why in self._made:
            unread = ~loose[self._first(value)]
            if why and unread.any():
                blocked.append(
                    f"{unread.sum()} of the {unread.size} features that come out of {why} are read by nothing"
                )
        if blocked:
            raise ValueError(
                f"what shrink takes out it must follow from layer to layer, and here it cannot: {'; '.join(blocked)}. Say "
                "on_unfollowed='keep' to keep these nodes, and take out the others"
            )

    def _new(self, constant: Bools, constants: Floats) -> int:
        self._constant.append(constant)
        self._constants.append(constants)
        self._same.append(len(self._same))
        return len(self._same) - 1

    def _first(self, value: int) -> int:
        while self._same[value] != value:
            value = self._same[value]
        return value


def check_unfollowed(on_unfollowed: str) -> None:
    """Raise a ``ValueError`` if it is neither of the two."""
    if on_unfollowed not in ("raise", "keep"):
        raise ValueError(f"on_unfollowed must be 'raise' or 'keep'; got {on_unfollowed!r}")


def _times(weight: NDArray[Any], mask: Bools, chosen: Bools, x: Floats) -> Floats:
    """Return ``where(mask, weight, 0) · x`` over the ``chosen`` columns, in float64; nothing under the mask gets through."""
    products = weight[:, chosen].astype(np.float64) * x[chosen]
    return np.asarray(np.where(mask[:, chosen], products, 0.0).sum(axis=1))
