"""What a file has, as a model calls it and lays it out: checked by name, and translated where another framework wrote it.

Names are brought to one spelling: ``encoder.layers.0.kernel`` of Flax and ``encoder.0.weight`` of PyTorch are both
``encoder.0.weight``. How arrays are laid out anew is in ``_layouts.py``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from maskedlinear.checkpoint._arrays import MaskedArray, PlainArray, are_same
from maskedlinear.checkpoint._constraints import constraint_names, constraints_of
from maskedlinear.checkpoint._errors import CheckpointError
from maskedlinear.checkpoint._file import CheckpointFile, Told
from maskedlinear.checkpoint._layouts import Expected, as_it_is, laid_out
from maskedlinear.constraints import Constraints
from maskedlinear.models import first_names

__all__ = ["OPTIMIZER", "ArraysFile", "Expected", "Names", "is_optional", "refuse", "translated", "warn_of_dropped"]

Array = PlainArray | MaskedArray
Names = Mapping[str, str] | Callable[[str], str] | None

#: Before the names of what an optimizer has.
OPTIMIZER = "optimizer/"

_LAST = {  # what modules call their parameters
    **dict.fromkeys(("kernel", "scale", "embedding"), ("weight",)),
    "running_mean": ("mean",),
    "running_var": ("var",),
    "in_proj_weight": ("in_proj", "weight"),
    "in_proj_bias": ("in_proj", "bias"),
    "q_proj_weight": ("query", "weight"),
    "k_proj_weight": ("key", "weight"),
    "v_proj_weight": ("value", "weight"),
}
_MODULES = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}
_THIRDS = ("query", "key", "value")  # of PyTorch's in_proj_weight, in this order


class _Source(NamedTuple):
    """Where in a file an array is: under a name; under three, that are put together; or a third of what is under one."""

    names: tuple[str, ...]
    third: int | None = None


def is_optional(name: str, role: str) -> bool:
    """Whether a model and a file may differ in having such an array: a counter of batches, the state of random numbers."""
    return role == "batch_norm.count" or role.startswith("rng.") or name.split(".")[-1] == "num_batches_tracked"


def translated(
    file: CheckpointFile,
    expected: Mapping[str, Expected],
    framework: str,
    names: Names = None,
    *,
    constraints: dict[str, Constraints] | None = None,
) -> tuple[dict[str, Array], list[str]]:
    """Return the arrays of a file by the names of a model and in its layouts, and what differs, a sentence each.

    Within a framework arrays are what they are. Where another wrote the file, names are matched by their spelling, layouts
    by axes: Linear, normalisations and their statistics, Embedding, convolutions, attention (PyTorch's ``in_proj_weight``
    is three kernels of Flax) and stacks, masks and dormant values with them. Arrays keep the file's dtype: floats may be of
    another than the model's.

    Args:
        file: the file, open: plain arrays are read when their data are asked for.
        expected: what the model has, by name.
        framework: what a file calls the model's framework.
        names: what the file calls what the model calls otherwise: the beginnings of names, by the model's
            (``{"encoder.": "enc."}``); or a function from the model's name to the file's.
        constraints: gets what the file says that training keeps of the model's weights, in their layouts; dropped if
            ``None``.

    Returns:
        The arrays; what is optional and not in the file is left out, as is what differs. The differences, none if all fits.

    Raises:
        ValueError: if no name of the model begins as ``names`` says.
    """
    kept = {name for own_kinds in constraint_names(file).values() for name in own_kinds.values()}
    own = {name: file.told(name).stored_as for name in file if not name.startswith(OPTIMIZER) and name not in kept}
    once = {name: file.array(name) for name in dict.fromkeys(own.values())}
    there = {name: once[first] for name, first in own.items()}
    given = _given(expected, framework, names)
    spelled: dict[str, dict[int, str]] = {}  # of what is stored once, one name
    for name, array in there.items():
        spelled.setdefault(_spelling(name, file.framework), {}).setdefault(id(array), name)
    found: dict[str, Array] = {}
    of_expected: dict[int, str] = {}
    taken: dict[_Source, tuple[str, Expected]] = {}
    differences: list[str] = []
    of_weights: dict[str, _Source] = {}
    for name, wanted in expected.items():
        asked = given.get(name, name)
        sources = [_Source((asked,))] if asked in there else []
        if not sources and (name in given or file.framework != framework):
            plain = _without_collection(asked, framework)
            sources = _sources(_spelling(plain, file.framework if name in given else framework), spelled)
        if len(sources) != 1:
            if sources:
                differences.append(
                    f"{name} may be any of {', '.join(one.names[0] for one in sources)}: say which in names="
                )
                of_expected.setdefault(id(wanted), name)
            continue
        of_expected.setdefault(id(wanted), name)
        other, other_wanted = taken.setdefault(sources[0], (name, wanted))
        if other_wanted is not wanted:
            differences.append(
                f"{sources[0].names[0]} is both {other} and {name} here: say in names= what these are there"
            )
            continue
        parts = {part: there[part] for part in sources[0].names}
        try:
            same = as_it_is(parts, name, wanted, file.framework, framework) if sources[0].third is None else None
            array = laid_out(parts, sources[0].third, name, wanted) if same is None else same
        except ValueError as error:
            differences.append(str(error))
            continue
        first = of_expected[id(wanted)]
        if first in found and not are_same(found[first], array):
            differences.append(f"{first} and {name} are one array here, and two in the file, which differ")
        found[name] = found.get(first, array)
        if first == name:
            of_weights[name] = sources[0]
    if constraints is not None and kept and not differences:
        try:
            constraints.update(constraints_of(file, of_weights, expected, framework))
        except ValueError as error:
            differences.append(f"constraints in the file: {error}")
    differences += _left_over(there, taken, expected, of_expected)
    for name, wanted in expected.items():  # what the file has under another name of the same array
        if of_expected.get(id(wanted)) in found:
            found.setdefault(name, found[of_expected[id(wanted)]])
    return found, differences


class ArraysFile:
    """Arrays by name that are read as those of an open :class:`CheckpointFile` are."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self._arrays = arrays
        self._first: dict[int, str] = {}
        for name, array in arrays.items():
            self._first.setdefault(id(array), name)

    def __iter__(self) -> Iterator[str]:
        """Yield the names."""
        return iter(self._arrays)

    def __contains__(self, name: object) -> bool:
        """Return whether there is an array of this name."""
        return name in self._arrays

    def told(self, name: str) -> Told:
        """Return what is said of an array."""
        array = self.array(name)
        form = array.form if isinstance(array, MaskedArray) else None
        return Told(array.dtype, array.shape, form, self._first[id(array)])

    def array(self, name: str) -> Array:
        """Return an array."""
        return self._arrays[name]


def warn_of_dropped(constraints: Mapping[str, Constraints], model: str, stacklevel: int) -> None:
    """Warn of constraints in a file, for a model that cannot hold them."""
    if constraints:
        warnings.warn(
            f"{first_names(list(constraints))} have constraints in the file, which {model} cannot hold, and which are "
            "dropped: load the file into an nnx or PyTorch model, or give them to "
            "maskedlinear.jax.freeze_masked(constraints=...) yourself",
            stacklevel=stacklevel,
        )


def refuse(differences: Sequence[str], model: str = "model") -> None:
    """Raise a :class:`CheckpointError` that tells them if there are differences."""
    if differences:
        raise CheckpointError(
            f"the file does not fit the {model}, and nothing was changed; where only names differ, "
            "names={'here.': 'in_the_file.'} says so:\n  " + "\n  ".join(differences)
        )


def _left_over(
    there: Mapping[str, Array],
    taken: Iterable[_Source],
    expected: Mapping[str, Expected],
    of_expected: Mapping[int, str],
) -> list[str]:
    """Return what is in one of the two only."""
    used = {id(there[name]) for source in taken for name in source.names}
    lacking = [name for name, one in expected.items() if id(one) not in of_expected and not is_optional(name, one.role)]
    more = [name for name, array in there.items() if id(array) not in used and not is_optional(name, array.role)]
    return [*(f"not in the file: {name}" for name in lacking), *(f"not in the model: {name}" for name in more)]


def _sources(spelling: str, spelled: Mapping[str, Mapping[int, str]]) -> list[_Source]:
    """Return where in a file an array of this spelling may be."""
    if spelling in spelled:
        return [_Source((name,)) for name in spelled[spelling].values()]
    *modules, module, last = ("", *spelling.split(".")) if "." not in spelling else spelling.split(".")
    if module in _THIRDS:
        fused = spelled.get(".".join((*modules, "in_proj", last)), {})
        return [_Source((name,), _THIRDS.index(module)) for name in fused.values()]
    if module == "in_proj":
        thirds = [list(spelled.get(".".join((*modules, third, last)), {}).values()) for third in _THIRDS]
        return [_Source(tuple(names[0] for names in thirds))] if all(len(names) == 1 for names in thirds) else []
    return []


def _given(expected: Iterable[str], framework: str, names: Names) -> dict[str, str]:
    """Return what the user says that the file calls arrays of the model, by name."""
    if names is None:
        return {}
    if callable(names):
        given = {name: names(name) for name in expected}
        if wrong := next((name for name, there in given.items() if not isinstance(there, str)), None):
            raise TypeError(
                f"a function as names= returns the file's name, a string; got {given[wrong]!r} for {wrong!r}"
            )
        return given
    starts = {here.rstrip("."): there.rstrip(".") for here, there in names.items()}
    used: set[str] = set()
    found: dict[str, str] = {}
    for name in expected:
        for whole in dict.fromkeys((name, _without_collection(name, framework))):
            start = whole
            while start and start not in starts:
                start = start.rpartition(".")[0]
            if start in starts and name not in found:
                used.add(start)
                found[name] = ".".join(filter(None, (starts[start], whole[len(start) :].lstrip("."))))
    unused = [here for here in names if here.rstrip(".") not in used]
    if unused:
        raise ValueError(
            f"names= says what names of the model begin with; got {', '.join(map(repr, unused))}, where the model has "
            f"{', '.join(expected)}"
        )
    return found


def _without_collection(name: str, framework: str) -> str:
    first, _, rest = name.partition(".")
    return rest if framework == "linen" and first in ("params", "batch_stats") and rest else name


def _spelling(name: str, framework: str) -> str:
    """Return what all frameworks' names of an array are taken for."""
    parts = _without_collection(name, framework).split(".")
    modules = [
        _MODULES.get(part, part)
        for part, after in pairwise(parts)
        if not (part == "layers" and after.isdigit())  # in which nnx.Sequential has its modules
    ]
    return ".".join((*modules, *_LAST.get(parts[-1], parts[-1:])))
