"""``WeightAxes``: which axes of a parameter are outputs, inputs, or a stack of weights; and its matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["WeightAxes", "checked_axes"]


@dataclass(frozen=True)
class WeightAxes:
    """What the axes of a weight mean, in the terms of ``jax.nn.initializers``: each of them stands in one of the three.

    A weight is a stack of matrices (out, in), in which outputs, inputs and the stack may each be several axes::

        >>> from maskedlinear.models import WeightAxes
        >>> convolution = WeightAxes(out_axis=0, in_axis=(1, 2, 3))
        >>> convolution.matrix_shape((8, 3, 5, 5))
        (1, 8, 75)

    Attributes:
        out_axis: the axis of outputs, or several.
        in_axis: the axis of inputs, or several; the window of a convolution is among them.
        batch_axis: the axes of a stack: experts, scanned layers, ensembles.
        window_axis: which of the axes of inputs are a convolution's window: ``scope="erdos_renyi"`` counts their sizes
            apart (ERK). Axes are equal whatever is said of it.
    """

    out_axis: int | tuple[int, ...] = 0
    in_axis: int | tuple[int, ...] = 1
    batch_axis: int | tuple[int, ...] = ()
    window_axis: int | tuple[int, ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def of_entries(cls, ndim: int) -> WeightAxes:
        """Return the axes of a weight of which nobody knows any: one row, in which each entry stands for itself."""
        return cls(out_axis=(), in_axis=tuple(range(ndim)))

    def order(self, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Return the axes of the stack, of outputs and of inputs, counted from 0, of a weight of ``ndim`` dimensions.

        Raises:
            ValueError: if an axis of the weight is in none of them, or in more than one.
        """
        named = (self.batch_axis, self.out_axis, self.in_axis)
        groups = [tuple(axis + ndim if axis < 0 else axis for axis in _tuple(axes)) for axes in named]
        if sorted(axis for group in groups for axis in group) != list(range(ndim)):
            raise ValueError(
                f"each axis of a weight is one of outputs, inputs or a stack; got {self} for a weight of {ndim} dimensions"
            )
        return groups[0], groups[1], groups[2]

    def matrix_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Return ``(stacked, out, in)`` of a weight of this shape.

        Raises:
            ValueError: as by :meth:`order`.
        """
        stacked, out, in_ = (math.prod(shape[axis] for axis in axes) for axes in self.order(len(shape)))
        return stacked, out, in_

    def sum_of_sizes(self, shape: tuple[int, ...]) -> int:
        """Return outputs + inputs of one of the matrices of a weight of this shape; of a kernel outputs + channels + the
        sizes of its window, in whose proportion ERK shares connections out.

        Raises:
            ValueError: as by :meth:`order`, or if an axis of the window is none of the inputs.
        """
        _, out, in_ = self.matrix_shape(shape)
        window = [axis % len(shape) for axis in _tuple(self.window_axis)]
        if not set(window) <= set(self.order(len(shape))[2]):
            raise ValueError(f"a window's axes are among the inputs; got window_axis={self.window_axis} and {self}")
        sizes = [shape[axis] for axis in window]
        return out + (in_ // math.prod(sizes) if in_ else 0) + sum(sizes)

    def matrices(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return the matrices of a weight, or of its mask or scores: shape ``(stacked, out, in)``, a view if it can be.

        Raises:
            ValueError: as by :meth:`order`.
        """
        order = [axis for axes in self.order(array.ndim) for axis in axes]
        return array.transpose(order).reshape(self.matrix_shape(array.shape))

    def from_matrices(self, matrices: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """Return what :meth:`matrices` made the matrices of: an array of ``shape``.

        Raises:
            ValueError: as by :meth:`order`.
        """
        order = [axis for axes in self.order(len(shape)) for axis in axes]
        permuted = matrices.reshape([shape[axis] for axis in order])
        return permuted.transpose(np.argsort(order))


def checked_axes(kind: Any, base: type, axes: Mapping[str, Any]) -> dict[str, WeightAxes]:
    """Return axes that a module type is to be registered with, a copy.

    Raises:
        TypeError: if ``kind`` is no type of the framework's modules, ``base``, or the axes of a name are no ``WeightAxes``.
    """
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise TypeError(
            f"register_axes takes a type of modules, a subclass of {base.__module__}.{base.__name__}; got {kind!r}"
        )
    for name, value in axes.items():
        if not isinstance(value, WeightAxes):
            raise TypeError(f"the axes of {name!r} must be WeightAxes(...); got {value!r}")
    return dict(axes)


def _tuple(axes: int | tuple[int, ...]) -> tuple[int, ...]:
    return (axes,) if isinstance(axes, int) else tuple(axes)
