"""``Constraints``: what training must keep of live connections: fixed values, signs (Dale's law), ties and bounds.

Arrays alone: a framework's guard (``freeze_masked``) keeps them, and both forms of a layer can have the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from maskedlinear._arrays import as_numpy
from maskedlinear.pattern import SparsityPattern

__all__ = ["FREE", "Constraints", "Entries", "dale"]

#: What stands for an entry without a constraint.
FREE: dict[str, float] = {"fixed": False, "signs": 0, "ties": -1, "lower": -np.inf, "upper": np.inf}
_DTYPES = {"fixed": np.bool_, "signs": np.int8, "ties": np.int64, "lower": np.float64, "upper": np.float64}


class Entries(NamedTuple):
    """The constraints of each entry of a weight, or of each connection of a pattern: all of one shape, ``None`` if free."""

    fixed: NDArray[np.bool_] | None
    signs: NDArray[np.int8] | None
    ties: NDArray[np.int64] | None
    lower: NDArray[np.float64] | None
    upper: NDArray[np.float64] | None

    def bounds(self) -> tuple[NDArray[np.float64] | None, NDArray[np.float64] | None]:
        """Return the least and the greatest value of each entry, signs included; arrays that broadcast to their shape."""
        lower, upper, signs = (_narrow(array) for array in (self.lower, self.upper, self.signs))
        if signs is not None:
            low, high = np.where(signs > 0, 0.0, -np.inf), np.where(signs < 0, 0.0, np.inf)
            lower = low if lower is None else np.maximum(low, lower)
            upper = high if upper is None else np.minimum(high, upper)
        return lower, upper

    def groups(self) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        """Return the flat places of tied entries and the number of the group of each, from 0; ``None`` if none is."""
        if self.ties is None:
            return None
        places = np.flatnonzero(self.ties >= 0)
        return places, np.unique(self.ties.reshape(-1)[places], return_inverse=True)[1].reshape(-1)


@dataclass(frozen=True, eq=False)
class Constraints:
    """What training keeps of a weight's live connections. What is ``None`` is free::

        Constraints(signs=np.where(is_inhibitory, -1, 1)[None, :])  # Dale's law: one sign an input, shape (1, in)
        Constraints(fixed=identity, lower=-1.0, upper=1.0)

    Each array has the weight's shape (``(out, in)``; a Flax kernel's is ``(in, out)``), or one that broadcasts to it with as
    many dimensions, such as ``(1, in)``, which is kept so and holds for connections that grow later too; or is one number.
    Or it has one entry a connection, shape ``(nnz,)``, in the order of ``pattern``.

    Args:
        fixed: booleans: live, but not trained.
        signs: -1, 0 or 1: a weight is at most 0, free, or at least 0.
        ties: whole numbers: connections of the same number >= 0 train one value; -1 has none.
        lower: the least value.
        upper: the greatest value.
        pattern: the connections that arrays of shape ``(nnz,)`` go by. Without one these are the connections of the layer.

    Raises:
        ValueError: if an array holds anything else, or a lower bound is above the upper one.
        TypeError: if ``pattern`` is none, or an array does not hold numbers.

    Example:
        >>> constraints = dale([1, 1, -1])
        >>> constraints.entries((2, 3)).signs.tolist()
        [[1, 1, -1], [1, 1, -1]]
    """

    fixed: Any = None
    signs: Any = None
    ties: Any = None
    lower: Any = None
    upper: Any = None
    pattern: SparsityPattern | None = None

    def __post_init__(self) -> None:
        """Check the arrays one by one, and copy them."""
        if self.pattern is not None and not isinstance(self.pattern, SparsityPattern):
            raise TypeError(f"pattern must be a SparsityPattern; got {type(self.pattern).__name__}")
        for name in _DTYPES:
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _checked(name, getattr(self, name)))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays that are given, by name."""
        return {name: getattr(self, name) for name in _DTYPES if getattr(self, name) is not None}

    def __deepcopy__(self, memo: Any) -> Self:
        """Return this: nothing changes it."""
        return self

    def __repr__(self) -> str:
        """Say which there are, and their shapes."""
        return f"Constraints({', '.join(f'{name}: {array.shape}' for name, array in self.arrays().items())})"

    def for_weight(self, shape: tuple[int, ...]) -> Self:
        """Return the same for a weight of ``shape`` in the dense form: arrays of one entry a connection become whole ones.

        Raises:
            ValueError: if an array does not fit the shape.
        """
        arrays: dict[str, Any] = {name: self._dense(name, array, shape) for name, array in self.arrays().items()}
        return type(self)(**arrays)

    def for_pattern(self, pattern: SparsityPattern) -> Self:
        """Return the same for the connections of ``pattern``: whole arrays become ones of one entry a connection.

        Those that are kept for each input or output, or are one number, stay so.

        Raises:
            ValueError: if an array does not fit the pattern.
        """
        arrays = {name: self._sparse(name, array, pattern) for name, array in self.arrays().items()}
        return type(self)(**arrays, pattern=pattern)

    @property
    def T(self) -> Self:  # noqa: N802 - as NumPy's
        """The same for the transposed matrix, whole: ``Constraints.from_wiring(wiring).T`` is for a kernel ``(in, out)``.

        Raises:
            ValueError: if these are of one entry a connection, and have no pattern; or of more than two axes.
        """
        arrays = self.arrays()
        if any(array.ndim > 2 or (array.ndim == 1 and self.pattern is None) for array in arrays.values()):
            raise ValueError(
                "constraints of a matrix can be transposed, or those of its connections with their pattern "
                f"(Constraints(..., pattern=pattern)); got {self}"
            )
        if self.pattern is not None:
            arrays = self.for_weight(self.pattern.shape).arrays()
        return type(self)(**{name: array.T for name, array in arrays.items()})  # type: ignore[arg-type]

    def moved(self, pattern: SparsityPattern, source: NDArray[np.integer[Any]]) -> Self:
        """Return those of a pattern whose connections have moved, which were at ``source`` before, or -1: new ones are free.

        What is kept for each input or output holds for new connections too.
        """
        arrays = {
            name: _with_free(name, array)[np.asarray(source)] if array.ndim == 1 else array
            for name, array in self.arrays().items()
        }
        return type(self)(**arrays, pattern=pattern)

    def entries(
        self,
        like: tuple[int, ...] | SparsityPattern,
        values: Any = None,
        mask: Any = None,
    ) -> Entries:
        """Return the constraints of each entry, checked against each other.

        Args:
            like: the shape of a weight in the dense form, or the connections of one in the sparse form.
            values: to check: what is fixed must be within its own bounds, and equal where tied; not checked if ``None``.
            mask: of a weight in the dense form: what is fixed must be live.

        Raises:
            ValueError: if an array does not fit; if constraints contradict each other (a sign or a bound, members of a tie
                that are not alike); or if what is fixed is not live, or outside its bounds. The entry is named.
        """
        pattern = like if isinstance(like, SparsityPattern) else None
        own = self.for_pattern(like) if isinstance(like, SparsityPattern) else self.for_weight(like)
        shape = (like.nnz,) if isinstance(like, SparsityPattern) else tuple(like)
        arrays = {}
        for name, array in own.arrays().items():
            whole = array
            if pattern is not None and array.ndim == 2:
                whole = np.broadcast_to(array, pattern.shape)[pattern.rows, pattern.indices]
            arrays[name] = np.broadcast_to(whole, shape)
        found = Entries(**{name: arrays.get(name) for name in _DTYPES})
        _refuse_contradictions(found, values, mask, _namer(pattern))
        return found

    def _dense(self, name: str, array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        pattern = self.pattern
        if array.ndim == 1 and pattern is not None and pattern.shape == tuple(shape):
            _check_length(name, array, pattern)
            whole = np.full(shape, FREE[name], array.dtype)
            whole[pattern.rows, pattern.indices] = array
            return whole
        if array.ndim == 0 or _broadcasts(array.shape, shape):
            return array
        raise ValueError(
            f"{name} must have the weight's shape {tuple(shape)}, or one that broadcasts to it, such as "
            f"{(1, *shape[1:])}; got {array.shape}{_transposed(array.shape, shape)}: those of connections need "
            "their pattern (Constraints(..., pattern=pattern), or for_pattern(pattern))"
        )

    def _sparse(self, name: str, array: NDArray[Any], pattern: SparsityPattern) -> NDArray[Any]:
        if array.ndim == 1:
            own = pattern if self.pattern is None else self.pattern
            _check_length(name, array, own)
            if own == pattern:
                return array
            if own.shape != pattern.shape:
                raise ValueError(f"{name} is of a pattern of shape {own.shape}, and the layer's is {pattern.shape}")
            return _with_free(name, array)[pattern.places_in(own)]
        if array.ndim == 0:
            return array
        if array.ndim != 2 or not _broadcasts(array.shape, pattern.shape):
            raise ValueError(
                f"{name} must have one entry for each of the {pattern.nnz} connections, or the shape (out, in) = "
                f"{pattern.shape} or (1, in) or (out, 1); got {array.shape}{_transposed(array.shape, pattern.shape)}"
            )
        if array.shape == pattern.shape and 1 not in pattern.shape:
            whole: NDArray[Any] = array[pattern.rows, pattern.indices]
            return whole
        return array

    @classmethod
    def from_wiring(cls, wiring: Any) -> Self:
        """Return what a :class:`maskedlinear.masks.Wiring` says of its connections: those that are fixed, and signs.

        Raises:
            ValueError: if it says neither.
        """
        fixed, signs = getattr(wiring, "fixed", None), getattr(wiring, "signs", None)
        if fixed is None and signs is None:
            raise ValueError(
                "this wiring has neither fixed connections nor signs: give it a table with a column of signs, or write "
                "Constraints(...)"
            )
        return cls(fixed=fixed, signs=signs, pattern=wiring.pattern)


def dale(signs_of_inputs: ArrayLike, *, in_axis: int = 1) -> Constraints:
    """Return Dale's law: all connections from one unit have its sign.

    Args:
        signs_of_inputs: shape ``(in,)``: 1 for an excitatory input, -1 for an inhibitory one, 0 for one that is free.
        in_axis: where a matrix has its inputs: 1 in ``(out, in)``, 0 in a Flax kernel, ``(in, out)``.

    Raises:
        ValueError: if it is no vector, or holds anything else.

    Example:
        >>> dale([1, -1]).signs.shape
        (1, 2)
    """
    signs = np.asarray(signs_of_inputs)
    if signs.ndim != 1 or in_axis not in (0, 1):
        raise ValueError(
            f"dale takes one sign an input, shape (in,), and in_axis 0 or 1; got {signs.shape} and {in_axis}"
        )
    return Constraints(signs=np.expand_dims(signs, 1 - in_axis))


def _checked(name: str, given: Any) -> NDArray[Any]:
    """Return a copy of one array in its dtype, which cannot be written to."""
    array = as_numpy(given) if hasattr(given, "shape") else np.asarray(given)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must hold numbers; got an array of dtype {array.dtype}")
    what, right = "numbers, not NaN", ~np.isnan(array)
    if name == "fixed":
        what, right = "booleans, or 0s and 1s", (array == 0) | (array == 1)
    elif name == "signs":
        what, right = "-1, 0 and 1", (array == -1) | (array == 0) | (array == 1)
    elif name == "ties":
        what, right = "whole numbers from -1 on", (array >= -1) & (array == np.floor(array))
    wrong = ~np.asarray(right)
    if wrong.any():
        at = _first(wrong)
        raise ValueError(f"{name} must hold {what}; got {array[at].tolist()} at {at}")
    kept: NDArray[Any] = np.array(array, _DTYPES[name])
    kept.flags.writeable = False
    return kept


def _refuse_contradictions(found: Entries, values: Any, mask: Any, name_of: Callable[[Any], str]) -> None:
    shape = next((array.shape for array in found if array is not None), ())
    lower, upper = (None if bound is None else np.broadcast_to(bound, shape) for bound in found.bounds())

    def refuse(wrong: Any, text: Callable[[Any], str]) -> None:
        if np.any(wrong):
            at = _first(np.asarray(wrong))
            raise ValueError(f"{text(at)}, for {name_of(at)}")

    if lower is not None and upper is not None:
        refuse(
            lower > upper,
            lambda at: f"a sign and bounds must leave a value; got at least {lower[at]} and at most {upper[at]}",
        )
    if mask is not None and found.fixed is not None:
        refuse(found.fixed & ~np.asarray(mask), lambda at: "what is fixed is live; the mask takes it out")
    groups = found.groups()
    for part, array in (("fixed", found.fixed), ("at least", lower), ("at most", upper)) if groups is not None else ():
        for at, first in _unlike(groups, array):  # type: ignore[arg-type]
            raise ValueError(
                f"tied connections train one value, and so must have the same constraints; {name_of(at)} and "
                f"{name_of(first)} differ in what is {part}"
            )
    if values is None or found.fixed is None:
        return
    own = np.asarray(as_numpy(values))
    for bound, is_wrong in ((lower, np.less), (upper, np.greater)):
        if bound is not None:
            refuse(
                found.fixed & is_wrong(own, bound.astype(own.dtype)),
                lambda at, bound=bound: f"a fixed value must be within its bounds; got {own[at]} and {bound[at]}",  # type: ignore[misc]
            )
    if groups is not None:
        for at, first in _unlike(groups, np.where(found.fixed, own, 0)):
            raise ValueError(
                f"connections that are fixed and tied must be equal; {name_of(at)} and {name_of(first)} differ"
            )


def _unlike(
    groups: tuple[NDArray[np.int64], NDArray[np.int64]], array: NDArray[Any] | None
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield a member of a group whose entry is not that of the group's first, and that first."""
    places, numbers = groups
    if array is None or not len(places):
        return
    firsts = places[np.unique(numbers, return_index=True)[1]][numbers]
    flat = array.reshape(-1)
    for wrong in np.flatnonzero(flat[places] != flat[firsts])[:1]:
        yield (
            tuple(int(i) for i in np.unravel_index(places[wrong], array.shape)),
            tuple(int(i) for i in np.unravel_index(firsts[wrong], array.shape)),
        )


def _with_free(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """Return one entry a connection, and at last, for the place -1, that of a free one."""
    return np.append(array, np.asarray(FREE[name], array.dtype))


def _namer(pattern: SparsityPattern | None) -> Callable[[Any], str]:
    def name_of(at: tuple[int, ...]) -> str:
        if pattern is None:
            return f"the entry {at}"
        return f"connection {at[0]}, from input {pattern.indices[at[0]]} to output {pattern.rows[at[0]]}"

    return name_of


def _narrow(array: NDArray[Any] | None) -> NDArray[Any] | None:
    """Return an array without the repeats of a broadcast: axes along which it has one entry have the length 1."""
    if array is None:
        return None
    narrow: NDArray[Any] = array[tuple(slice(None) if step else slice(0, 1) for step in array.strides)]
    return narrow


def _first(wrong: NDArray[np.bool_]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(wrong)), wrong.shape))


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return len(shape) == len(to) and all(own in (1, size) for own, size in zip(shape, to, strict=True))


def _transposed(shape: tuple[int, ...], to: tuple[int, ...]) -> str:
    return ", which is its transpose" if _broadcasts(shape[::-1], tuple(to)) else ""


def _check_length(name: str, array: NDArray[Any], pattern: SparsityPattern) -> None:
    if array.shape != (pattern.nnz,):
        raise ValueError(
            f"{name} must have one entry for each of the {pattern.nnz} connections, shape (nnz,); got {array.shape}"
        )
