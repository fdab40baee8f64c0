"""``LayerWeight``: the one weight of a layer that names are read for, as each framework's adapter finds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from maskedlinear._arrays import as_numpy
from maskedlinear.models._axes import WeightAxes
from maskedlinear.models._summary import first_names
from maskedlinear.pattern import SparsityPattern
from maskedlinear.pruning import KeptNodes

__all__ = ["LayerWeight", "choose_weight", "matrix_shape", "read_matrix"]


@dataclass(frozen=True)
class LayerWeight:
    """The weight of a layer, as a backend found it.

    Attributes:
        shape: ``(out, in)``.
        read: returns the pattern and its values, shape ``(nnz,)``; of a layer without a mask ``None`` and the whole weight,
            shape ``(out, in)``.
        kept: which nodes ``shrink`` has left of those that the layer had, if it has taken out any.
    """

    shape: tuple[int, int]
    read: Callable[[], tuple[SparsityPattern | None, NDArray[Any]]]
    kept: KeptNodes | None = None


def choose_weight(masked: Mapping[str, Any], plain: Mapping[str, Any], name: str | None) -> Any:
    """Return the weight called ``name``, or the only one: of those with a mask, or else of those that could have one.

    Raises:
        ValueError: if there is none, or there are several.
    """
    if name is not None:
        every = {**plain, **masked}
        if name not in every:
            raise ValueError(
                f"name= must be that of a weight, as get_masks calls it: {first_names(list(every))}; got {name!r}"
            )
        return every[name]
    for weights in (masked, plain):
        if len(weights) == 1:
            return next(iter(weights.values()))
        if weights:
            raise ValueError(
                f"a wiring is of one weight, and there are {len(weights)} here: {first_names(list(weights))}. Pass its "
                "layer, or say name='...'"
            )
    raise ValueError("a wiring is of a layer's weight; got a model without any")


def matrix_shape(shape: tuple[int, ...], axes: WeightAxes | None) -> tuple[int, int]:
    """Return ``(out, in)`` of a weight of this shape.

    Raises:
        ValueError: if nobody knows its axes, or it is a stack of matrices.
    """
    if axes is None:
        raise ValueError("which axes of this weight are inputs and outputs is not known: tell them by register_axes")
    stacked, out, in_ = axes.matrix_shape(shape)
    if stacked != 1:
        raise ValueError(
            f"a wiring is of one matrix; this weight is a stack of {stacked}: pass weight and mask of one of them"
        )
    return out, in_


def read_matrix(weight: Any, mask: Any, axes: WeightAxes) -> tuple[SparsityPattern | None, NDArray[Any]]:
    """Return what :attr:`LayerWeight.read` returns, of a weight and its mask, as arrays of NumPy's and as their axes say."""
    matrix = axes.matrices(as_numpy(weight))[0]
    if mask is None:
        return None, matrix
    pattern = SparsityPattern.from_mask(axes.matrices(as_numpy(mask))[0])
    return pattern, matrix[pattern.rows, pattern.indices]
