"""Where the axes of a parameter are when it was transposed, reshaped or broadcast: each dimension consists of pieces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maskedlinear.models import WeightAxes

__all__ = [
    "Dims",
    "Value",
    "View",
    "bound",
    "broadcast",
    "is_broadcast",
    "meaning",
    "merged",
    "parameter",
    "regrouped",
    "roles",
    "split_groups",
    "weight_axes",
]

# A piece: axes of the parameter, none where it was repeated, and how many entries lie there. A dimension consists of
# pieces, the outermost first.
Piece = tuple[tuple[int, ...], int]
Dims = tuple[tuple[Piece, ...], ...]


class View(NamedTuple):
    """A parameter as it passes through the program: by its dimensions, the axes that they hold."""

    name: str
    ndim: int
    dims: Dims


class Value(NamedTuple):
    """What is known of a value of the program: the parameters it is a form of, and whether it depends on the inputs."""

    views: tuple[View, ...] = ()
    fed: bool = False


def parameter(name: str, shape: tuple[int, ...]) -> Value:
    """Return the value of a parameter as it is given; of a vector, nothing is known."""
    dims = tuple((((axis,), size),) for axis, size in enumerate(shape))
    return Value((View(name, len(shape), dims),) if len(shape) > 1 else ())


def bound(var: Any, value: Value) -> Value:
    """Return a value with its variable's sizes; masks and random keys are no activations, whatever they were made of."""
    shape, dtype = getattr(var.aval, "shape", ()), getattr(var.aval, "dtype", None)
    views = [v._replace(dims=_resized(v.dims, shape)) for v in value.views if len(v.dims) == len(shape)]
    silent = dtype is None or any(jnp.issubdtype(dtype, kind) for kind in (jnp.bool_, jax.dtypes.extended))
    return Value(tuple(views), value.fed and not silent)


def merged(values: Sequence[Value], fed: bool) -> Value:
    """Return what is known of a value that is one of several, chosen by what may be ``fed``."""
    views = dict.fromkeys(view for value in values for view in value.views)
    return Value(tuple(views), fed or any(value.fed for value in values))


def is_broadcast(pieces: Sequence[Piece]) -> bool:
    """Whether the same entries of the parameter stand at several places here."""
    return any(not axes and size > 1 for axes, size in pieces)


def broadcast(dims: Dims, shape: tuple[int, ...]) -> Dims:
    """Return dimensions of which those of length 1 were repeated to fill ``shape``."""
    return tuple((((), size),) if _size(dim) == 1 < size else dim for dim, size in zip(dims, shape, strict=True))


def regrouped(dims: Dims, shape: tuple[int, ...]) -> Dims | None:
    """Return the dimensions after a reshape; ``None`` if lengths do not divide each other."""
    queue = [piece for dim in dims for piece in dim if piece[1] > 1]
    found = []
    for size in shape:
        dim: list[Piece] = []
        while size > 1 and queue:
            axes, length = queue.pop(0)
            common = math.gcd(size, length)
            if common == 1:
                return None
            dim.append((axes, common))
            size //= common
            if length > common:
                queue.insert(0, (axes, length // common))
        found.append(tuple(dim))
    return tuple(found)


def split_groups(pieces: Sequence[Piece], groups: int) -> tuple[list[Piece], list[Piece]]:
    """Return the stack and the outputs in a convolution's outputs: ``vmap`` makes a convolution in groups of a stack."""
    stack, rest = [], list(pieces)
    while len(rest) > 1 and groups % rest[0][1] == 0 and not {*rest[0][0]} & {a for axes, _ in rest[1:] for a in axes}:
        groups //= rest[0][1]
        stack.append(rest.pop(0))
    return stack, rest


def roles(eqn: Any, place: int, dims: Dims) -> tuple[list[Piece], list[Piece], list[Piece], list[Piece]] | None:
    """Return the pieces of a factor that are outputs, inputs, a stack and the window among the inputs; ``None`` if it is no
    weight there."""
    if eqn.primitive.name == "conv_general_dilated":
        out, *in_ = eqn.params["dimension_numbers"].rhs_spec
        stack, rest = split_groups(dims[out], eqn.params["feature_group_count"] * eqn.params["batch_group_count"])
        window = [piece for d in in_[1:] for piece in dims[d]]
        return (rest, [*dims[in_[0]], *window], stack, window) if place == 1 else None
    numbers = eqn.params.get("dimension_numbers") or eqn.params["ragged_dot_dimension_numbers"]
    contracted, shared = getattr(numbers, "dot_dimension_numbers", numbers)
    stacked = {*shared[place], *(getattr(numbers, "rhs_group_dimensions", ()) if place == 1 else ())}
    summed = set(contracted[place])
    free = set(range(len(dims))) - summed - stacked
    out_, in_, stack = (sorted(piece for d in group for piece in dims[d]) for group in (free, summed, stacked))
    return (out_, in_, stack, []) if summed else None


def weight_axes(
    ndim: int, out: list[Piece], in_: list[Piece], stack: list[Piece], window: list[Piece]
) -> WeightAxes | None:
    """Return axes by the pieces that hold them; what an index or a scan took away is a stack. ``None`` if they mix."""
    groups = [list(dict.fromkeys(axis for axes, _ in pieces for axis in axes)) for pieces in (out, in_, stack)]
    gone = set(range(ndim)) - {axis for group in groups for axis in group}
    groups[2] = sorted({*groups[2], *gone})
    if sum(map(len, groups)) != ndim:
        return None
    out_axis, in_axis, batch_axis = (group[0] if len(group) == 1 else tuple(group) for group in groups)
    window_axis = tuple(dict.fromkeys(axis for axes, _ in window for axis in axes))
    return WeightAxes(out_axis, in_axis, batch_axis, window_axis)


def meaning(axes: WeightAxes, shape: tuple[int, ...]) -> Any:
    """Return what readings of the same weight agree in; an axis of length 1 may stand anywhere."""
    return tuple(frozenset(axis for axis in group if shape[axis] > 1) for group in axes.order(len(shape)))


def _resized(dims: Dims, shape: tuple[int, ...]) -> Dims:
    """Return dimensions that were cut, or joined with others, to ``shape``: all their axes may be anywhere in them."""
    return tuple(
        dim if _size(dim) == size else ((tuple(sorted({axis for axes, _ in dim for axis in axes})), size),)
        for dim, size in zip(dims, shape, strict=True)
    )


def _size(dim: Sequence[Piece]) -> int:
    return math.prod(size for _, size in dim)
