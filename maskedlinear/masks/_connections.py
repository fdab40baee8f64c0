"""What a wiring reads of a layer: its connections as they are now, and their weights; of any framework, importing none.

Each backend has a module with one function, ``find_weight(model, name)``, that returns a
:class:`maskedlinear.models.LayerWeight`, or ``None`` of what is no model of its framework. Which backend is asked is seen
from the types that an object's type derives from: of an object that is given, its framework is there already.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from maskedlinear._arrays import as_numpy
from maskedlinear.pattern import SparsityPattern

if TYPE_CHECKING:
    from maskedlinear.models import LayerWeight
    from maskedlinear.pruning import KeptNodes

__all__ = ["Read", "find_weight", "read"]

_BACKENDS = {"torch": "maskedlinear_torch._wiring", "flax": "maskedlinear_jax.flax._wiring"}

Read = tuple[SparsityPattern, NDArray[Any]]  # connections, and their values in the pattern's order


def find_weight(source: Any, name: str | None) -> LayerWeight | None:
    """Return the weight of a layer or model of any framework; ``None`` if ``source`` is neither.

    Args:
        source: a layer, a model, or the variables of a linen model.
        name: which weight, by its mask's name; the only one if ``None``.

    Raises:
        ValueError: if there is no such weight, or several, or it is no matrix.
    """
    packages = {kind.__module__.partition(".")[0] for kind in type(source).__mro__}
    if isinstance(source, Mapping) and "params" in source:
        packages = {"flax"}  # linen's variables
    backend = next((module for package, module in _BACKENDS.items() if package in packages), None)
    found: LayerWeight | None = None if backend is None else import_module(backend).find_weight(source, name)
    return found


def read(
    source: Any,
    own: SparsityPattern,
    *,
    name: str | None = None,
    mask: Any = None,
    pattern: SparsityPattern | None = None,
) -> Read:
    """Return the connections of a layer, or an array, between the nodes of ``own``, and their values.

    Raises:
        ValueError: if shapes do not fit; if an array does not say which of its entries are connections, and neither mask
            nor pattern does; if either is given for a layer that has its own.
        TypeError: if ``source`` is neither a layer nor an array of real numbers.
    """
    told = _told(mask, pattern)
    weight = find_weight(source, name)
    if weight is None:
        if isinstance(source, Mapping):
            raise TypeError(
                f"a dictionary is read as linen's variables with their masks, {{'params': ..., 'masks': ...}}; got one of "
                f"{', '.join(map(repr, list(source)[:4])) or 'nothing'}: pass these, a layer, or an array with its mask="
            )
        if name is not None:
            raise ValueError(f"name= is for models; got {type(source).__name__}: leave it out")
        return _of_array(as_numpy(source), own, told)
    if weight.shape != own.shape and (weight.kept is None or weight.kept.shape != own.shape):
        raise ValueError(_why_other_shape(weight.shape, own.shape))
    found, values = weight.read()
    if found is None:  # a plain layer: its weight is as good as an array
        found, values = _of_array(values, None if weight.shape != own.shape else own, told)
    elif told is not None:
        raise ValueError("mask= and pattern= are for arrays; this layer has its own: leave them out")
    return (found, values) if weight.shape == own.shape else (_as_before(found, weight.kept), values)


def _told(mask: Any, pattern: Any) -> SparsityPattern | None:
    if mask is not None and pattern is not None:
        raise ValueError("connections are told by a mask or a pattern; got both: pass one of them")
    if pattern is not None and not isinstance(pattern, SparsityPattern):
        raise TypeError(
            f"pattern must be a SparsityPattern; got {type(pattern).__name__}: an array is passed as mask=..."
        )
    return pattern if mask is None else SparsityPattern.from_mask(as_numpy(mask))


def _of_array(array: NDArray[Any], own: SparsityPattern | None, told: SparsityPattern | None) -> Read:
    """Return what a bare array says; ``own`` are the connections that it should have, ``None`` if nobody knows them."""
    if told is not None:
        if own is not None and told.shape != own.shape:
            raise ValueError(_why_other_shape(told.shape, own.shape))
        if array.shape not in (told.shape, (told.nnz,)):
            raise ValueError(
                f"values must have the shape (out, in) = {told.shape}, or ({told.nnz},), one for each connection of the "
                f"mask or pattern; got {array.shape}"
            )
        return told, array if array.ndim == 1 else array[told.rows, told.indices]
    if own is None:
        raise ValueError(
            "a plain layer that shrink has made does not say which of its entries are connections: pass mask="
        )
    if array.ndim == 1:
        raise ValueError(
            f"values of shape {array.shape} do not say whose they are, for a layer's connections change (regrowth, pruning, "
            "a state that is loaded): pass the layer itself, or its pattern=layer.pattern with them"
        )
    if array.shape != own.shape:
        raise ValueError(_why_other_shape(array.shape, own.shape))
    live = array[own.rows, own.indices]
    zeros, others = int((live == 0).sum()), int(np.count_nonzero(array)) - int(np.count_nonzero(live))
    if zeros or others:
        raise ValueError(
            f"an array without a mask must have the wiring's connections, and be 0 elsewhere; got one with {zeros} of the "
            f"{own.nnz} connections 0 (pruned, or trained to 0?) and {others} other entries that are not (grown, or never "
            "masked?): pass the layer itself, or the array with its mask=; mask=wiring.mask reads the wiring's "
            "connections, whatever they are"
        )
    return own, live


def _as_before(pattern: SparsityPattern, kept: KeptNodes | None) -> SparsityPattern:
    """Return the connections of a layer that ``shrink`` has made, by the places that their nodes had before."""
    assert kept is not None, "checked before"
    outputs, inputs = (np.flatnonzero(side) for side in (kept.outputs, kept.inputs))
    counts = np.zeros(kept.shape[0], np.int64)
    counts[outputs] = np.diff(pattern.indptr)
    return SparsityPattern(np.concatenate([[0], np.cumsum(counts)]), inputs[pattern.indices], kept.shape[1])


def _why_other_shape(shape: tuple[int, ...], own: tuple[int, int]) -> str:
    message = f"the wiring is of a layer of shape (out, in) = {own}; got {shape}"
    if len(shape) == 2 and shape == own[::-1]:
        return message + ", which is the weight's transpose: pass its .T, or the layer"
    if len(shape) == 2 and all(few <= many for few, many in zip(shape, own, strict=True)):
        return message + ": of a layer with fewer nodes, first wiring.restrict(inputs, outputs) to those that it has"
    return message
