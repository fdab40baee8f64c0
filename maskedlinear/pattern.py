"""``SparsityPattern``: which connections a sparse layer has, as indices, never as a matrix of the layer's shape.

The order of the connections is fixed, row by row and by column within a row, so that the same values mean the same layer
in every framework and in every file. A pattern is also kept by columns, because the transposed product walks it that way.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from maskedlinear._check import as_mask

__all__ = ["Orientation", "SparsityPattern"]

Orientation = Literal["out_in", "in_out"]

Int32 = NDArray[np.int32]

_LIMIT = np.iinfo(np.int32).max
_BLOCK = 1 << 24  # entries of a mask that are looked at at once


class SparsityPattern:
    """The live connections of a layer: compressed sparse rows of int32.

    Connection k goes from input ``indices[k]`` to the output whose row holds k: row i has the connections
    ``indptr[i]`` to ``indptr[i + 1] - 1``, by ascending input. Arrays cannot be written to.

    Args:
        indptr: shape ``(out + 1,)``: where each row starts, and the end of the last.
        indices: shape ``(nnz,)``: the input of each connection.
        in_features: the number of inputs.

    Raises:
        ValueError: if ``indptr`` does not start at 0, fall nowhere and end at the number of connections; if an index is
            no input, or a row's indices do not ascend (an edge is there twice, or the rows are unsorted); or if there are
            more than 2³¹ - 1 connections, inputs or outputs. :meth:`from_edges` sorts.
        TypeError: if indices or ``in_features`` are not whole numbers.
    """

    _derived: dict[Hashable, Any]  # there once something was derived

    def __init__(self, indptr: ArrayLike, indices: ArrayLike, in_features: int) -> None:
        self.indptr = _int32("indptr", indptr)
        self.indices = _int32("indices", indices)
        in_features = _check_size("inputs", in_features)
        _check_size("outputs", len(self.indptr) - 1)
        if len(self.indptr) == 0:
            raise ValueError("indptr must have one entry more than there are outputs; got none")
        self.shape = (len(self.indptr) - 1, in_features)
        counts = np.diff(self.indptr)
        if self.indptr[0] != 0 or self.indptr[-1] != len(self.indices) or (counts < 0).any():
            raise ValueError(
                f"indptr must rise from 0 to the number of connections, {len(self.indices)}; "
                f"got one from {self.indptr[0]} to {self.indptr[-1]}{', which falls' if (counts < 0).any() else ''}"
            )
        _check_range("input", self.indices, self.shape[1])
        rises = np.diff(self.indices) > 0
        starts = self.indptr[1:-1]
        rises[starts[(starts > 0) & (starts < len(self.indices))] - 1] = True  # a new row may start anywhere
        if not rises.all():
            place = int(np.argmin(rises))
            row = int(np.searchsorted(self.indptr, place, side="right")) - 1
            raise ValueError(
                f"the inputs of a row must ascend, each of them once; row {row} has {self.indices[place + 1]} after "
                f"{self.indices[place]}: SparsityPattern.from_edges sorts, and names duplicates"
            )

    @property
    def nnz(self) -> int:
        """The number of live connections."""
        return len(self.indices)

    @property
    def sparsity(self) -> float:
        """The fraction of masked connections, in [0, 1]; 0 for a layer of no size."""
        size = self.shape[0] * self.shape[1]
        return (size - self.nnz) / size if size else 0.0

    @property
    def nbytes(self) -> int:
        """The bytes of the indices, by rows and by columns."""
        out, in_ = self.shape
        return 4 * (out + 1 + in_ + 1 + 3 * self.nnz)

    @cached_property
    def rows(self) -> Int32:
        """The output of each connection, shape ``(nnz,)``."""
        return _frozen(_rows_of(self.indptr))

    @cached_property
    def csc(self) -> tuple[Int32, Int32, Int32]:
        """The transposed pattern: ``(indptr (in + 1,), outputs (nnz,), order (nnz,))``.

        ``order`` says which connection each of its entries is: the transposed values are ``values[order]``.
        """
        order = _stable_order(self.indices, self.shape[1])
        starts = np.zeros(self.shape[1] + 1, np.int32)
        np.cumsum(np.bincount(self.indices, minlength=self.shape[1]), out=starts[1:])
        return _frozen(starts), _frozen(_rows_of(self.indptr)[order]), _frozen(order)  # whose rows are not kept

    @classmethod
    def full(cls, shape: tuple[int, int]) -> Self:
        """Return the pattern of all connections of a layer of ``shape``, ``(out, in)``."""
        out, in_ = _check_size("outputs", shape[0]), _check_size("inputs", shape[1])
        _check_size("connections", out * in_)
        starts = np.arange(out + 1, dtype=np.int64) * in_
        return cls(starts, np.tile(np.arange(in_, dtype=np.int32), out), in_)

    @classmethod
    def from_mask(cls, mask: Any) -> Self:
        """Return the pattern of a mask, shape ``(out, in)``, booleans or 0s and 1s of any framework on the CPU.

        Raises:
            ValueError: if the mask is no matrix, or holds anything but 0 and 1.
        """
        mask = np.asarray(mask)
        if mask.ndim != 2:
            raise ValueError(f"a mask must have shape (out, in); got {mask.shape}")
        mask = np.asarray(as_mask(mask, mask.shape))
        out, in_ = mask.shape
        _check_size("connections", int(np.count_nonzero(mask)))
        block = max(1, _BLOCK // max(in_, 1))
        parts = [np.nonzero(mask[start : start + block])[1].astype(np.int32) for start in range(0, out, block)]
        indptr = np.zeros(out + 1, np.int32)
        np.cumsum(np.count_nonzero(mask, axis=1), out=indptr[1:])
        return cls(indptr, np.concatenate(parts) if parts else np.zeros(0, np.int32), in_)

    @classmethod
    def from_edges(
        cls, outputs: ArrayLike, inputs: ArrayLike, shape: tuple[int, int]
    ) -> tuple[Self, NDArray[np.int64]]:
        """Return the pattern of a list of edges in any order, and where each of its connections was in the list.

        Args:
            outputs: shape ``(edges,)``: the output of each edge.
            inputs: shape ``(edges,)``: its input.
            shape: ``(out, in)``.

        Returns:
            The pattern, and ``order`` with shape ``(edges,)``: values given edge by edge are ``values[order]`` in the
            pattern's order.

        Raises:
            ValueError: if the two differ in length, an edge is there twice, or one leaves the shape.
            TypeError: if indices or sizes are not whole numbers.
        """
        _check_size("connections", math.prod(np.shape(outputs)))
        to, of = _int64("outputs", outputs), _int64("inputs", inputs)
        if to.shape != of.shape:
            raise ValueError(
                f"outputs and inputs must be equally long, an edge's two ends; got {len(to)} outputs and {len(of)} inputs"
            )
        out, in_ = _check_size("outputs", shape[0]), _check_size("inputs", shape[1])
        _check_range("output", to, out)
        _check_range("input", of, in_)
        order = np.argsort(to * in_ + of, kind="stable")
        to, of = to[order], of[order]
        twice = (np.diff(to) == 0) & (np.diff(of) == 0)
        if twice.any():
            place = int(np.argmax(twice))
            raise ValueError(
                f"each edge must be there once; got the one from input {of[place]} to output {to[place]} more than once, "
                f"and {int(twice.sum())} duplicates in all: add up their values and drop them first"
            )
        indptr = np.zeros(out + 1, np.int32)
        np.cumsum(np.bincount(to, minlength=out), out=indptr[1:])
        return cls(indptr, of, in_), order

    @classmethod
    def from_scipy(cls, matrix: Any, *, orientation: Orientation | None = None) -> tuple[Self, NDArray[Any]]:
        """Return the pattern of a ``scipy.sparse`` matrix or array, and its values in the pattern's order.

        Every stored entry is a connection, one whose value is 0 too.

        Args:
            matrix: the matrix; of shape ``(out, in)`` unless ``orientation`` says otherwise, which a square one must have
                that is not its own transpose.
            orientation: ``"out_in"``: entry [i, j] is the connection from input j to output i, as in a layer's weight.
                ``"in_out"``: it is the one from i to j, as in Flax's kernels and in networkx's ``to_scipy_sparse_array``,
                whose rows are the sources. A square matrix does not show which of the two it is.

        Raises:
            ValueError: if an entry is stored twice, or the orientation is unknown, or not given of such a square matrix.
            TypeError: if ``matrix`` is not a sparse matrix, or is a complex one.
        """
        if not hasattr(matrix, "tocoo"):
            raise TypeError(
                f"from_scipy takes a scipy.sparse matrix or array; got {type(matrix).__name__}: "
                "a dense mask goes to SparsityPattern.from_mask"
            )
        entries = matrix.tocoo()
        if np.iscomplexobj(entries.data):
            raise TypeError(
                f"a layer's values are real; got a matrix of dtype {entries.data.dtype}: pass its .real, or its .imag"
            )
        if orientation not in (None, "out_in", "in_out"):
            raise ValueError(f"orientation must be 'out_in' or 'in_out'; got {orientation!r}")
        if orientation == "in_out":
            entries = entries.T
        pattern, order = cls.from_edges(entries.row, entries.col, entries.shape)
        values = np.asarray(entries.data)[order]
        if orientation is None and pattern.shape[0] == pattern.shape[1]:
            turned, other = cls.from_edges(entries.col, entries.row, entries.shape)
            if turned != pattern or (values != np.asarray(entries.data)[other]).any():
                raise ValueError(
                    "a square matrix does not tell which way its connections go: pass orientation='out_in' if entry [i, j] "
                    "is the connection from j to i, as in a layer's weight, or orientation='in_out' if it is the one from i "
                    "to j, as in networkx's to_scipy_sparse_array"
                )
        return pattern, values

    def split_rows(self, parts: int) -> list[Self]:
        """Return the patterns of as many equal parts of the outputs, in their order: those of layers side by side.

        The connections of a part are consecutive, so that its values are ``np.split(values, cuts)[part]`` with
        ``cuts = np.cumsum([part.nnz for part in parts])[:-1]``; where all parts have as many, ``values.reshape(parts, -1)``.

        Args:
            parts: how many; a divisor of the number of outputs.

        Raises:
            ValueError: if the outputs cannot be divided so.
            TypeError: if ``parts`` is no whole number.

        Example:
            >>> pattern = SparsityPattern.full((6, 2))
            >>> [part.shape for part in pattern.split_rows(3)]
            [(2, 2), (2, 2), (2, 2)]
        """
        parts = _check_size("parts", parts)
        out, in_ = self.shape
        if not parts or out % parts:
            raise ValueError(f"{out} outputs cannot be split into {parts} equal parts: take a divisor of {out}")
        height = out // parts
        cuts = [int(self.indptr[part * height]) for part in range(parts + 1)]
        return [
            type(self)(self.indptr[part * height : (part + 1) * height + 1] - first, self.indices[first:end], in_)
            for part, (first, end) in enumerate(pairwise(cuts))
        ]

    def derive(self, key: tuple[Hashable, ...], make: Callable[..., Any]) -> bool:
        """Have :meth:`derived` return ``make(pattern, *key[1:])``, made the first time; ``key[0]`` names a framework.

        Apart from :meth:`derived`, so that a compiler calls it, and does not trace how that is made.
        """
        kept: dict[Hashable, Any] = self.__dict__.setdefault("_derived", {})
        if key not in kept:
            kept[key] = make(self, *key[1:])
        return True

    def derived(self, key: tuple[Hashable, ...]) -> Any:
        """Return what :meth:`derive` keeps."""
        return self._derived[key]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is derived."""
        return {name: getattr(self, name) for name in ("indptr", "indices", "shape")}

    def to_mask(self) -> NDArray[np.bool_]:
        """Return the mask, shape ``(out, in)``: a dense matrix, a byte an entry."""
        mask = np.zeros(self.shape, bool)
        mask[self.rows, self.indices] = True
        return mask

    def to_scipy(self, values: ArrayLike | None = None) -> Any:
        """Return a ``scipy.sparse.csr_array`` of shape ``(out, in)`` with these connections, copied.

        What :meth:`from_scipy` makes of it is this pattern, and the same values, those that are 0 included.

        Args:
            values: shape ``(nnz,)``, in the pattern's order; ``True`` for all of them if ``None``. Half types, which scipy
                has not, become float32.

        Raises:
            ValueError: if there is not one value a connection.
            ModuleNotFoundError: if scipy is not installed.
        """
        try:
            from scipy.sparse import csr_array
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "to_scipy needs scipy, which is not installed. Install it with: pip install scipy", name="scipy"
            ) from error
        data = np.ones(self.nnz, bool) if values is None else np.asarray(values)
        if data.shape != (self.nnz,):
            raise ValueError(
                f"values must have one entry for each of the pattern's {self.nnz} connections; got shape {data.shape}"
            )
        if data.dtype.itemsize == 2 and data.dtype.kind in "fV":  # bfloat16 is a "V" to NumPy
            data = data.astype(np.float32)
        return csr_array((data, self.indices, self.indptr), shape=self.shape, copy=True)

    @property
    def places(self) -> NDArray[np.int64]:
        """Where each connection is in the flattened matrix (out, in), shape ``(nnz,)``."""
        return self.rows.astype(np.int64) * self.shape[1] + self.indices

    def places_in(self, other: SparsityPattern) -> NDArray[np.int64]:
        """Return where each connection is in another pattern of this shape, shape ``(nnz,)``; -1 where it has none."""
        own, others = self.places, other.places
        places = np.searchsorted(others, own)
        found = places < len(others)
        found[found] = others[places[found]] == own[found]
        return np.where(found, places, -1)

    def __eq__(self, other: object) -> bool:
        """Whether the other one has the same connections and shape."""
        if not isinstance(other, SparsityPattern):
            return NotImplemented
        same = self.shape == other.shape and self.nnz == other.nnz
        return same and bool((self.indptr == other.indptr).all() and (self.indices == other.indices).all())

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """Say the shape and the number of connections."""
        out, in_ = self.shape
        return f"SparsityPattern({in_} -> {out}, {self.nnz} connections, sparsity={self.sparsity:.4g})"


def _rows_of(indptr: Int32) -> Int32:
    return np.repeat(np.arange(len(indptr) - 1, dtype=np.int32), np.diff(indptr))


def _frozen(array: Int32) -> Int32:
    array.flags.writeable = False
    return array


def _stable_order(indices: Int32, size: int) -> Int32:
    """Return what sorts indices below ``size``, equal ones in their order: by halves, which NumPy sorts in linear time."""
    order = np.argsort((indices & 0xFFFF).astype(np.uint16), kind="stable").astype(np.int32)
    if size > 1 << 16:
        order = order[np.argsort((indices >> 16).astype(np.uint16)[order], kind="stable")]
    return order


def _int64(name: str, values: ArrayLike) -> NDArray[np.int64]:
    array = np.asarray(values)
    _check_size("connections", max(array.size - 1, 0))  # indptr has one entry more than it counts
    if array.size == 0:
        array = array.astype(np.int64)
    if array.ndim != 1:
        raise ValueError(f"{name} must have one dimension; got shape {array.shape}")
    if array.dtype.kind not in "iu":
        raise TypeError(
            f"{name} must be whole numbers; got an array of dtype {array.dtype}: convert it, if it holds any"
        )
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name} must be below 2**31; got {array.max()}")
    return array.astype(np.int64)


def _int32(name: str, values: ArrayLike) -> Int32:
    array = np.asarray(values)
    if array.dtype != np.int32 or array.ndim != 1:
        array = _int64(name, values)
        if array.size and (array.max() > _LIMIT or array.min() < -_LIMIT):
            raise ValueError(f"{name} must be below 2**31; got one from {array.min()} to {array.max()}")
    return _frozen(array.astype(np.int32))


def _check_size(what: str, size: Any) -> int:
    try:
        size = operator.index(size)
    except TypeError:
        raise TypeError(f"the number of {what} must be a whole number; got {size!r}") from None
    if not 0 <= size <= _LIMIT:
        raise ValueError(f"a pattern has 0 to 2**31 - 1 {what}, because its indices are int32; got {size}")
    return int(size)


def _check_range(what: str, indices: NDArray[Any], size: int) -> None:
    if indices.size and (indices.min() < 0 or indices.max() >= size):
        wrong = indices.min() if indices.min() < 0 else indices.max()
        raise ValueError(f"an {what} must be one of the {size}, from 0 to {size - 1}; got {wrong}")
