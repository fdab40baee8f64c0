"""Which live connections lie on a path from an input to an output: the others are live in name only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskedlinear._arrays import as_numpy
from maskedlinear._check import as_mask
from maskedlinear.pattern import SparsityPattern

__all__ = ["count_live", "effective_masks", "effective_sparsity", "is_cut"]

Nodes = NDArray[np.bool_]


def effective_masks(masks: Sequence[Any]) -> list[Any]:
    """Return the masks of the connections of a chain of layers that lie on a path from an input to an output.

    A live connection from a node that no input reaches, or to one that leads to no output, is not among them: whatever the
    inputs are, it carries a constant, or nothing::

        >>> from maskedlinear import pruning
        >>> first, second = [[1, 0], [0, 1], [0, 0]], [[1, 0, 1]]
        >>> [mask.astype(int).tolist() for mask in pruning.effective_masks([first, second])]
        [[[1, 0], [0, 0], [0, 0]], [[1, 0, 0]]]

    Source: A. Vysogorets and J. Kempe, "Connectivity Matters: Neural Network Pruning Through the Lens of Effective
    Sparsity", JMLR 2023.

    Args:
        masks: of layers of which each takes what the one before gives, node by node (activations, dropout and batch
            normalisation between them change nothing; whatever mixes nodes, such as a softmax or a layer normalisation,
            does): masks of shape ``(out, in)``, of any framework, or :class:`maskedlinear.pattern.SparsityPattern`.

    Returns:
        For each mask another: a boolean NumPy array, or a pattern for a pattern.

    Raises:
        ValueError: if there are no masks, one is no mask, or a layer has other inputs than the one before has outputs.
    """
    layers, reached, leading = _followed(masks)
    found: list[Any] = []
    for number, layer in enumerate(layers):
        if isinstance(layer, SparsityPattern):
            on_path = reached[number][layer.indices] & leading[number][layer.rows]
            starts = np.concatenate([[0], np.cumsum(on_path)])[layer.indptr]
            found.append(SparsityPattern(starts, layer.indices[on_path], layer.shape[1]))
        else:
            found.append(layer & reached[number] & leading[number][:, None])
    return found


def effective_sparsity(masks: Sequence[Any]) -> float:
    """Return the fraction of connections of a chain of layers that lie on no path from an input to an output, in [0, 1].

    At least as large as the fraction that is masked. Args and errors: those of :func:`effective_masks`.
    """
    found = effective_masks(masks)
    size = sum(math.prod(mask.shape) for mask in found)
    return 1 - sum(count_live(mask) for mask in found) / size if size else 0.0


def is_cut(masks: Sequence[Any]) -> bool:
    """Return whether a chain that has inputs and outputs has no path between them.

    Args and errors: those of :func:`effective_masks`.
    """
    layers, reached, _ = _followed(masks)
    last = _step(layers[-1], reached[-1])
    return bool(layers[0].shape[1] and last.size and not last.any())


def count_live(mask: Any) -> int:
    """Return how many connections a mask or a pattern has."""
    return mask.nnz if isinstance(mask, SparsityPattern) else int(np.count_nonzero(mask))


def _followed(masks: Sequence[Any]) -> tuple[list[Any], list[Nodes], list[Nodes]]:
    """Return the layers, checked; of each which inputs an input of the chain reaches, and which outputs lead to one."""
    layers = [mask if isinstance(mask, SparsityPattern) else _checked(mask) for mask in masks]
    if not layers:
        raise ValueError("a chain has at least one layer; got no masks")
    for number in range(1, len(layers)):
        if layers[number].shape[1] != layers[number - 1].shape[0]:
            raise ValueError(
                f"each layer of a chain takes what the one before gives; layer {number} has {layers[number].shape[1]} "
                f"inputs, and the one before {layers[number - 1].shape[0]} outputs: give masks of shape (out, in), from "
                "the first layer to the last"
            )
    reached = [np.ones(layers[0].shape[1], bool)]
    for layer in layers[:-1]:
        reached.append(_step(layer, reached[-1]))
    leading = [np.ones(layers[-1].shape[0], bool)]
    for layer in reversed(layers[1:]):
        leading.append(_step_back(layer, leading[-1]))
    return layers, reached, leading[::-1]


def _checked(mask: Any) -> Nodes:
    array = as_numpy(mask)
    if array.ndim != 2:
        raise ValueError(f"a mask of a chain must have shape (out, in); got {array.shape}")
    return np.asarray(as_mask(array, array.shape), bool)


def _step(layer: Any, inputs: Nodes) -> Nodes:
    """Return which outputs of a layer some of these inputs reach."""
    if isinstance(layer, SparsityPattern):
        return np.bincount(layer.rows[inputs[layer.indices]], minlength=layer.shape[0]) > 0
    return np.asarray((layer if inputs.all() else layer[:, inputs]).any(axis=1))


def _step_back(layer: Any, outputs: Nodes) -> Nodes:
    """Return which inputs of a layer lead to some of these outputs."""
    if isinstance(layer, SparsityPattern):
        return np.bincount(layer.indices[outputs[layer.rows]], minlength=layer.shape[1]) > 0
    return np.asarray(layer[outputs].any(axis=0))
