"""How an array of one framework is laid out in another: by what its axes mean, values, masks and dormant values alike.

A weight goes by way of its matrices (stacked, out, in), flat: their entries stand in one order in all frameworks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from maskedlinear.checkpoint._arrays import MaskedArray, PlainArray
from maskedlinear.checkpoint._dtypes import FLOATS
from maskedlinear.models import WeightAxes

__all__ = ["Expected", "as_it_is", "laid_out"]

Array = PlainArray | MaskedArray

_FAMILIES = {"nnx": "flax", "linen": "flax"}
_FLIPPED = "_flipped"  # at the end of the kind of a transposed convolution whose window runs the other way
_NORMS = ("batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm")
_KINDS = ("attention", "bilinear", "conv", "conv_transpose", "embedding", "linear", *_NORMS)


@dataclass(frozen=True, eq=False)
class Expected:
    """An array that a model has; one object under several names is one array that has them.

    Attributes:
        shape: its shape.
        dtype: safetensors' name of its dtype.
        axes: what its axes mean, if it is a weight of which they are known.
        role: as in :class:`maskedlinear.checkpoint.PlainArray`.
    """

    shape: tuple[int, ...]
    dtype: str
    axes: WeightAxes | None = None
    role: str = ""


class _Layout(NamedTuple):
    """How an array lies: its shape, its axes, ``None`` for one that is flat as it is, and which of them run backwards."""

    shape: tuple[int, ...]
    axes: WeightAxes | None
    backwards: tuple[int, ...] = ()

    @property
    def order(self) -> tuple[int, ...]:
        """The axes of the stack, the outputs and the inputs, in this order."""
        if self.axes is None:
            return tuple(range(len(self.shape)))
        return tuple(axis for group in self.axes.order(len(self.shape)) for axis in group)

    @property
    def ordered(self) -> tuple[int, ...]:
        """The lengths in this order."""
        return tuple(self.shape[axis] for axis in self.order)

    def flat(self, array: Array) -> Array:
        """Return an array that lies so as its matrices, flat."""
        if isinstance(array, PlainArray):
            return replace(
                array,
                shape=(math.prod(self.shape),),
                data=lambda: np.flip(array.data(), self.backwards).transpose(self.order).reshape(-1),
            )
        return _moved(array, self.flat_places, (array.size,))

    def shaped(self, flat: Array) -> Array:
        """Return the reverse of :meth:`flat`."""
        back = np.argsort(self.order)
        if isinstance(flat, PlainArray):
            return replace(
                flat,
                shape=self.shape,
                data=lambda: np.flip(flat.data().reshape(self.ordered).transpose(back), self.backwards),
            )
        return _moved(flat, self.shaped_places, self.shape)

    def flat_places(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where in the flat matrices entries of the array are."""
        at = self._turned(np.unravel_index(places, self.shape))
        return np.ravel_multi_index(tuple(at[axis] for axis in self.order), self.ordered)

    def shaped_places(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the reverse of :meth:`flat_places`."""
        at = np.unravel_index(places, self.ordered)
        return np.ravel_multi_index(self._turned([at[place] for place in np.argsort(self.order)]), self.shape)

    def _turned(self, at: Sequence[NDArray[Any]]) -> tuple[NDArray[Any], ...]:
        return tuple(self.shape[axis] - 1 - place if axis in self.backwards else place for axis, place in enumerate(at))


def as_it_is(arrays: Mapping[str, Array], name: str, wanted: Expected, source: str, target: str) -> Array | None:
    """Return the array of a file if the model has it as it is, checked; ``None`` if it may be laid out otherwise.

    Args:
        arrays: what is in the file, by name.
        name: what the model calls it.
        wanted: what the model has there.
        source: the framework that wrote the file.
        target: the model's.

    Raises:
        ValueError: if it has another shape or dtype.
    """
    [own, array], *more = arrays.items()
    is_known = _FAMILIES.get(source, source) == _FAMILIES.get(target, target)
    nobody_says = array.axes is None and source in ("", "numpy", "tree")
    nobody_says |= wanted.axes is None and target == "tree" and source in _FAMILIES  # a tree, as of a part of a model
    if more or not (is_known or (nobody_says and own.split(".")[-1] == name.split(".")[-1])):
        return None
    if array.role and wanted.role and _kind(array.role).endswith(_FLIPPED) != _kind(wanted.role).endswith(_FLIPPED):
        return None
    _check_dtype(array, name, wanted)
    if array.shape != wanted.shape:
        raise ValueError(f"{name} is {array.shape} in the file, and {wanted.shape} here")
    return array


def laid_out(arrays: Mapping[str, Array], third: int | None, name: str, wanted: Expected) -> Array:
    """Return arrays of a file, put together, or a third of one, as the model has it.

    Args:
        arrays: what is in the file, by name.
        third: which third of its outputs is meant; ``None`` if all.
        name: what the model calls it.
        wanted: what the model has there.

    Raises:
        ValueError: if it does not fit.
    """
    for array in arrays.values():
        _check_dtype(array, name, wanted)
    own, first = next(iter(arrays.items()))
    _check_kinds(name, _kind(first.role), _kind(wanted.role))
    layouts, target = [_layout(one, array, wanted) for one, array in arrays.items()], _layout(name, wanted, first)
    is_whole, is_bias = len(arrays) == 1 and third is None, name.endswith("bias")
    unknown = [layout.axes is None for layout in (layouts[0], target)]
    if is_bias or max(len(first.shape), len(wanted.shape)) < 2:
        layouts, target = [_Layout(one.shape, None) for one in layouts], _Layout(wanted.shape, None)
    elif any(unknown) and is_whole and _is_alike(own, name, first, wanted):
        layouts, target = [_Layout(first.shape, None)], _Layout(wanted.shape, None)
    elif any(unknown):
        raise ValueError(
            f"{name} is {own} in the file, and {'the file' if unknown[0] else 'the model'} does not say what its axes mean: "
            "tell them by register_axes, or lay its array out yourself, from checkpoint.load"
        )
    fits = _outputs(layouts, third) == _outputs([target], None) and len({array.dtype for array in arrays.values()}) == 1
    if is_whole and not is_bias and (target.axes is None or len(first.shape) == len(wanted.shape)):
        fits = fits and layouts[0].ordered == target.ordered
    if not fits:
        shapes = ", ".join(f"{one} {array.shape}" for one, array in arrays.items())
        raise ValueError(
            f"{name} is {'' if third is None else 'a third of '}{shapes} in the file, and {wanted.shape} here"
        )
    parts = [layout.flat(array) for layout, array in zip(layouts, arrays.values(), strict=True)]
    flat = _joined(parts) if third is None else _third(parts[0], third)
    found = replace(target.shaped(flat), axes=wanted.axes, role=wanted.role)
    if isinstance(found, MaskedArray) and isinstance(first, MaskedArray) and is_whole:
        return replace(found, recipe=first.recipe)  # which makes matrices, wherever they lie
    return found


def _check_dtype(array: Array, name: str, wanted: Expected) -> None:
    """Raise a ``ValueError`` unless the dtypes are one, or both of floats: a model's parameters keep theirs."""
    if array.dtype != wanted.dtype and not {array.dtype, wanted.dtype} <= set(FLOATS):
        raise ValueError(f"{name} is {array.dtype} in the file, and {wanted.dtype} here")


def _check_kinds(name: str, source: str, target: str) -> None:
    """Raise a ``ValueError`` if a parameter is of different kinds of modules; an embedding's may be an output layer's."""
    kinds = [kind.removesuffix(_FLIPPED).replace("attention", "linear") for kind in (source, target)]
    if kinds[0] != kinds[1] and all(kind in _KINDS for kind in kinds) and set(kinds) != {"embedding", "linear"}:
        raise ValueError(f"{name} is of {kinds[0]} in the file, and of {kinds[1]} here")
    if "conv_transpose" in kinds and "" in kinds:
        raise ValueError(
            f"{name} is of a transposed convolution, and {'the file' if not source else 'the model'} does not say which way "
            "its window runs: lay its array out yourself, from checkpoint.load"
        )


def _layout(name: str, array: Any, other: Any) -> _Layout:
    """Return how an array lies, by what it says, or by Flax's customs for the role that it or its counterpart has."""
    kind, kind_there = _kind(array.role), _kind(other.role)
    axes = array.axes or (_kernel_axes(len(array.shape), array.role or other.role) if name.endswith("kernel") else None)
    if {kind, kind_there} == {"embedding", "linear"} and kind == "embedding":
        axes = WeightAxes(out_axis=0, in_axis=1)  # an embedding that is the matrix of an output layer, too
    backwards: tuple[int, ...] = ()
    if axes is not None and kind.endswith(_FLIPPED) and kind_there == kind.removesuffix(_FLIPPED):
        backwards = axes.order(len(array.shape))[2][1:]  # the window, behind the channels
    return _Layout(tuple(array.shape), axes, backwards)


def _kernel_axes(ndim: int, role: str) -> WeightAxes | None:
    """Return the axes of a ``kernel`` of Flax, of which no module is at hand."""
    kind, _, part = role.partition(".")
    if kind == "linear" and ndim == 2:
        return WeightAxes(out_axis=1, in_axis=0)
    if kind == "conv" and ndim > 2:
        return WeightAxes(out_axis=ndim - 1, in_axis=(ndim - 2, *range(ndim - 2)))
    if kind == "attention" and ndim == 3:
        is_out = part.startswith("out")
        return WeightAxes(out_axis=2, in_axis=(0, 1)) if is_out else WeightAxes(out_axis=(1, 2), in_axis=0)
    return None


def _is_alike(own: str, name: str, array: Array, wanted: Expected) -> bool:
    """Whether an array whose axes one side does not know is the same on both: a parameter of a user's own, a norm's."""
    is_named_alike = own.split(".")[-1] == name.split(".")[-1] and not array.role and not wanted.role
    return is_named_alike or _kind(array.role) in _NORMS


def _outputs(layouts: Sequence[_Layout], third: int | None) -> tuple[int, ...]:
    """Return the lengths (stacked, out, in) of arrays put together, or of a third of one; of flat ones the length."""
    first = layouts[0]
    if first.axes is None:
        told = [(1, math.prod(layout.shape), 1) for layout in layouts]
    else:
        told = [layout.axes.matrix_shape(layout.shape) for layout in layouts if layout.axes is not None]
    stacked, out, in_ = told[0]
    if third is not None:
        return (stacked, out // 3, in_) if stacked == 1 and out % 3 == 0 else ()
    if any(one[::2] != (stacked, in_) for one in told) or (stacked != 1 and len(told) > 1):
        return ()
    return stacked, sum(one[1] for one in told), in_


def _moved(array: MaskedArray, move: Any, shape: tuple[int, ...]) -> MaskedArray:
    """Return a masked array whose entries stand elsewhere."""

    def ordered(places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        moved = move(places) if len(places) else places
        order = np.argsort(moved)
        return moved[order], order

    places, order = ordered(array.places)
    dormant = array.dormant
    if dormant is not None:
        dormant = dormant[ordered(np.flatnonzero(~array.mask().reshape(-1)))[1]]
    return replace(
        array, shape=shape, values=array.values[order], places=places, dormant=dormant, recipe=None, axes=None
    )


def _third(flat: Array, third: int) -> Array:
    size = flat.shape[0] // 3
    start = third * size
    if isinstance(flat, PlainArray):
        return replace(flat, shape=(size,), data=lambda: flat.data()[start : start + size])
    first, last = np.searchsorted(flat.places, (start, start + size))
    dormant = flat.dormant
    if dormant is not None:
        dormant = dormant[start - first : start + size - last]
    return replace(
        flat, shape=(size,), values=flat.values[first:last], places=flat.places[first:last] - start, dormant=dormant
    )


def _joined(parts: Sequence[Array]) -> Array:
    """Return flat arrays one behind the other: masked if one is, then with +0 for what is dormant of those without it."""
    if len(parts) == 1:
        return parts[0]
    size = sum(part.shape[0] for part in parts)
    if all(isinstance(part, PlainArray) for part in parts):
        return PlainArray(
            parts[0].dtype,
            (size,),
            lambda: np.concatenate([part.data() for part in parts if isinstance(part, PlainArray)]),
        )
    masked = [
        part
        if isinstance(part, MaskedArray)
        else MaskedArray(part.shape, part.dtype, part.data(), np.arange(part.shape[0]), form="dense")
        for part in parts
    ]
    starts = np.cumsum([0, *(part.size for part in masked)])
    dormant = None
    if any(part.dormant is not None for part in masked):
        dormant = np.concatenate(
            [
                np.zeros(part.size - part.nnz, part.values.dtype) if part.dormant is None else part.dormant
                for part in masked
            ]
        )
    return MaskedArray(
        (size,),
        masked[0].dtype,
        np.concatenate([part.values for part in masked]),
        np.concatenate([part.places + start for part, start in zip(masked, starts, strict=False)]),
        dormant,
    )


def _kind(role: str) -> str:
    return role.partition(".")[0]
