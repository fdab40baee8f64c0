"""What a file says that training keeps of weights, and the same in the layout of a model of another framework.

Beside a weight a file has plain arrays, ``constraint_fixed`` and the like: of a layer of ours in the layer
(``0.constraint_signs``), of another module's parameter in ``masked_<parameter>``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskedlinear.checkpoint._arrays import MaskedArray, PlainArray
from maskedlinear.checkpoint._file import CheckpointFile
from maskedlinear.checkpoint._layouts import Expected, as_it_is, laid_out
from maskedlinear.constraints import FREE, Constraints
from maskedlinear.models import WeightAxes
from maskedlinear.pattern import SparsityPattern

__all__ = ["PREFIX", "constraint_names", "constraints_of", "name_in_file"]

PREFIX = "constraint_"
_MASKED = "masked_"


def name_in_file(weight: str, kind: str, *, is_layer: bool) -> str:
    """Return what a file calls a constraint of a weight: of a layer of ours, or of any other module."""
    path, _, own = weight.rpartition(".")
    return ".".join(filter(None, (path, "" if is_layer else f"{_MASKED}{own}", f"{PREFIX}{kind}")))


def constraint_names(file: Any) -> dict[str, dict[str, str]]:
    """Return what a file calls the constraints of each of its weights, by what they keep."""
    found: dict[str, dict[str, str]] = {}
    for name in file:
        path, _, own = name.rpartition(".")
        kind = own.removeprefix(PREFIX)
        if own == kind or kind not in FREE:
            continue
        parent, _, child = path.rpartition(".")
        beside = ".".join(filter(None, (parent, child.removeprefix(_MASKED)))) if child.startswith(_MASKED) else ""
        weights = (beside, f"{path}.weight".lstrip("."), f"{path}.kernel".lstrip("."))
        weight = next((weight for weight in weights if weight and weight in file), None)
        if weight is not None:
            found.setdefault(weight, {})[kind] = name
    return found


def constraints_of(
    file: CheckpointFile,
    sources: Mapping[str, tuple[tuple[str, ...], int | None]],
    expected: Mapping[str, Expected],
    framework: str,
) -> dict[str, Constraints]:
    """Return the constraints of a model's weights, by name, in its layout; those of connections go by a pattern, (out, in).

    Args:
        file: the file.
        sources: under which names of the file each array of the model is, and which third of it.
        expected: what the model has.
        framework: what a file calls the model's framework.

    Raises:
        ValueError: if they do not fit.
    """
    names = constraint_names(file)
    found = {}
    for name, (parts, third) in sources.items():
        kinds = [kind for kind in FREE if any(kind in names.get(part, {}) for part in parts)]
        if not kinds:
            continue
        arrays, pattern = {}, None
        for kind in kinds:
            given = {part: _read(file, names[part][kind]) if kind in names.get(part, {}) else None for part in parts}
            arrays[kind] = _laid(file, kind, given, third, name, expected[name], framework)
            if arrays[kind].ndim == 1 and len(expected[name].shape) != 1:
                pattern = _pattern(file.array(parts[0]))
        found[name] = Constraints(**arrays, pattern=pattern)
    return found


def _read(file: CheckpointFile, name: str) -> NDArray[Any]:
    array = file.array(name)
    return array.numpy()


def _laid(
    file: CheckpointFile,
    kind: str,
    given: Mapping[str, NDArray[Any] | None],
    third: int | None,
    name: str,
    wanted: Expected,
    framework: str,
) -> NDArray[Any]:
    """Return one array as the model has it: what is kept for each input or output as that, where it is of one matrix."""
    weights = {part: file.array(part) for part in given}
    weight, array = next(iter(weights.values())), next(iter(given.values()))
    alone = len(weights) == 1 and third is None and array is not None
    if alone and array is not None:
        if (
            array.ndim in (0, 1)
            or as_it_is(weights, name, _of_dtype(wanted, weight), file.framework, framework) is not None
        ):
            return array
        if len(weight.shape) == len(wanted.shape) == 2 and weight.axes is not None and wanted.axes is not None:
            return array if weight.axes.order(2) == wanted.axes.order(2) else array.T
    whole = {}
    for part, own in weights.items():
        held = given[part]
        filled = FREE[kind] if held is None else _by_entry(own, held, FREE[kind]) if held.ndim == 1 else held
        whole[part] = PlainArray.of(np.broadcast_to(np.asarray(filled, np.float64), own.shape), own.axes, own.role)
    return laid_out(whole, third, name, Expected(wanted.shape, "F64", wanted.axes, wanted.role)).numpy()


def _of_dtype(wanted: Expected, weight: PlainArray | MaskedArray) -> Expected:
    return Expected(wanted.shape, weight.dtype, wanted.axes, wanted.role)


def _by_entry(weight: PlainArray | MaskedArray, array: NDArray[Any], free: float) -> NDArray[Any]:
    pattern = _pattern(weight)
    whole = np.full(pattern.shape, free)
    whole[pattern.rows, pattern.indices] = array
    return whole if _is_out_in(weight.axes) else whole.T


def _pattern(weight: PlainArray | MaskedArray) -> SparsityPattern:
    """Return the connections of a weight of a file, (out, in), by which its constraints go."""
    if not isinstance(weight, MaskedArray) or len(weight.shape) != 2:
        raise ValueError(
            f"constraints of connections are of a masked matrix; the file has them for one of {weight.shape}"
        )
    if _is_out_in(weight.axes):
        return weight.pattern()
    inputs, outputs = np.divmod(weight.places, max(weight.shape[1], 1))
    return SparsityPattern.from_edges(outputs, inputs, weight.shape[::-1])[0]


def _is_out_in(axes: WeightAxes | None) -> bool:
    return axes is None or axes.order(2)[1:] == ((0,), (1,))
