"""A file of one framework in the names and layouts of another's, so that both can be compared array by array."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from maskedlinear.checkpoint import CheckpointFile, MaskedArray, PlainArray
from maskedlinear.checkpoint._constraints import constraint_names, name_in_file
from maskedlinear.checkpoint._names import Expected, is_optional, translated
from maskedlinear.constraints import Constraints
from maskedlinear.files.source import Source, infos_of

__all__ = ["as_the_other"]

_LEFT_OVER = "not in the model: "  # how what only the file has is told


def as_the_other(first: Source, second: Source) -> tuple[Source, Source, list[str]]:
    """Return two files that are compared by name, the first in the second's names if another framework wrote it.

    Masks and dormant values move with the layout. What a framework keeps for itself, as counters of batches, is left out.

    Returns:
        The two, and what could not be translated, a sentence each.
    """
    files = {id(held): held for source in (first, second) for held in source.held.values()}
    ours = [file for file in files.values() if isinstance(file, CheckpointFile)]
    frameworks = (first.framework, second.framework)
    if (
        len(ours) != 2
        or len(files) != 2
        or len(set(frameworks)) == 1
        or not set(frameworks) <= {"torch", "nnx", "linen"}
    ):
        return first, second, []
    constraints: dict[str, Constraints] = {}
    arrays, told = translated(ours[0], _expected(ours[1]), second.framework, constraints=constraints)
    arrays |= _constraint_arrays(constraints, ours[1])
    others = {sentence.removeprefix(_LEFT_OVER) for sentence in told if sentence.startswith(_LEFT_OVER)}
    held = {**arrays, **{name: ours[0].array(name) for name in others if name not in arrays}}
    roles = {name: ours[1].entry(name).role for name in second}
    kept = {name: info for name, info in second.infos.items() if name in arrays or not is_optional(name, roles[name])}
    first = Source(
        first.kind, first.nbytes, infos_of(held, {}), framework=second.framework, how=first.how, held=dict(held)
    )
    second = Source(second.kind, second.nbytes, kept, framework=second.framework, how=second.how, held=second.held)
    return first, second, [one for one in told if not one.startswith("not in the ")]


def _constraint_arrays(
    constraints: Mapping[str, Constraints], file: CheckpointFile
) -> dict[str, PlainArray | MaskedArray]:
    """Return the arrays of constraints by a file's names: its own where they say the same."""
    names, found = constraint_names(file), dict[str, PlainArray | MaskedArray]()
    for weight, made in constraints.items():
        for kind, array in made.arrays().items():
            name = names.get(weight, {}).get(kind, name_in_file(weight, kind, is_layer=True))
            there = file.array(name) if name in file else None
            is_same = there is not None and _is_same(array, there.numpy())
            found[name] = there if there is not None and is_same else PlainArray.of(array)
    return found


def _is_same(one: Any, other: Any) -> bool:
    """Whether arrays of constraints, in any dtype and kept narrow or whole, say the same; of ties which are one group."""
    try:
        pair = np.broadcast_arrays(one.astype(np.float32), other.astype(np.float32))
    except ValueError:
        return False
    if one.dtype.kind != "i" or one.dtype.itemsize == 1:
        return bool(np.array_equal(pair[0], pair[1]))
    groups = [
        np.where(each >= 0, np.unique(each, return_inverse=True)[1].reshape(each.shape), -1).ravel() for each in pair
    ]
    number = len(set(zip(*groups, strict=True)))
    return all(len(np.unique(each)) == number for each in groups) and np.array_equal(groups[0] < 0, groups[1] < 0)


def _expected(file: CheckpointFile) -> Mapping[str, Expected]:
    own: dict[str, Expected] = {}
    constraints = {name for kinds in constraint_names(file).values() for name in kinds.values()}
    for name in (name for name in file if name not in constraints):
        entry, stored_as = file.entry(name), file.told(name).stored_as
        own.setdefault(stored_as, Expected(entry.shape, entry.dtype, entry.axes, entry.role))
    return {name: own[file.told(name).stored_as] for name in file if name not in constraints}
