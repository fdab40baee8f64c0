"""``maskedlinear diff``: what two files hold under the same names, and where it is not the same."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskedlinear._table import lines
from maskedlinear.checkpoint import MaskedArray
from maskedlinear.checkpoint._arrays import raw
from maskedlinear.checkpoint._dtypes import numbers
from maskedlinear.files.frameworks import as_the_other
from maskedlinear.files.source import Array, How, open_source
from maskedlinear.files.text import WIDTH, counted, escaped, printable, progress, say, shape_text

__all__ = ["Difference", "diff"]

_CHUNK = 1 << 20  # entries that are compared as float64 at a time


@dataclass(frozen=True)
class Difference:
    """How an array of A and that of B differ, as ``--json`` has it.

    Attributes:
        name: what both are called.
        shapes: of both; where they differ nothing else is compared.
        dtypes: safetensors' names; values of different dtypes are compared as numbers, others bit for bit.
        masked: whether each has a mask.
        switched_on: how many entries are live in B and not in A; 0 unless both have masks.
        switched_off: how many are live in A and not in B.
        values_compared: how many entries are live in both.
        values_different: how many of them differ.
        largest_difference: of their numbers; ``None`` if no numbers differ, or if NaN or infinity do.
        signs_different: how many of those that differ are 0 in both, and -0 in one.
        nans_different: how many of them are NaN in both, of other bits.
        has_dormant: whether each has dormant values.
        dormant_different: how many dormant entries differ of those that are masked in both; 0 unless both have them.
    """

    name: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtypes: tuple[str, str]
    masked: tuple[bool, bool]
    switched_on: int = 0
    switched_off: int = 0
    values_compared: int = 0
    values_different: int = 0
    largest_difference: float | None = None
    signs_different: int = 0
    nans_different: int = 0
    has_dormant: tuple[bool, bool] = (False, False)
    dormant_different: int = 0

    @property
    def is_none(self) -> bool:
        """Whether there is none."""
        pairs = (self.shapes, self.dtypes, self.masked, self.has_dormant)
        counts = (self.switched_on, self.switched_off, self.values_different, self.dormant_different)
        return all(a == b for a, b in pairs) and not any(counts)


def diff(a: Path, b: Path, how: How, dense: bool, as_json: bool) -> int:
    """Print how two files differ; return the exit status, 0 if they do not and 1 if they do.

    Args:
        a: a file.
        b: another.
        how: how both are read.
        dense: whether arrays are compared as they act, +0 under their masks, and not masks and dormant values.
        as_json: whether JSON is printed.
    """
    with open_source(a, how) as of_a, open_source(b, how) as of_b:
        first, second, notes = as_the_other(of_a, of_b)
        names = list(first), list(second)
        there = set(names[0]), set(names[1])
        both = [name for name in names[0] if name in there[1]]
        only = [name for name in names[0] if name not in there[1]], [name for name in names[1] if name not in there[0]]
        sizes = {name: first.infos[name].dense_bytes for name in both}
        add = progress(sum(sizes.values()), "comparing")
        found = []
        for name in both:
            if dense:
                first.check_whole(name)
                second.check_whole(name)
            difference = compare(name, first.array(name), second.array(name), dense)
            if not difference.is_none:
                found.append(difference)
            add(sizes[name])
    say((f"note: {printable(note)}" for note in notes), sys.stderr)
    same = not (found or only[0] or only[1])
    say(
        [_json(a, b, same, len(both), only, found)] if as_json else _text(a, b, same, len(both), only, found),
        sys.stdout,
    )
    return 0 if same else 1


def compare(name: str, a: Array, b: Array, dense: bool) -> Difference:
    """Return how two arrays differ."""
    pairs: dict[str, Any] = {"shapes": (a.shape, b.shape), "dtypes": (a.dtype, b.dtype)}
    masked = (isinstance(a, MaskedArray), isinstance(b, MaskedArray))
    if a.shape != b.shape:
        return Difference(name, **pairs, masked=masked)
    if dense or not (isinstance(a, MaskedArray) and isinstance(b, MaskedArray)):
        masked = (False, False) if dense else masked
        whole = raw(a).reshape(-1), raw(b).reshape(-1)
        values = _values(*whole, a.dtype, b.dtype)
        return Difference(name, **pairs, masked=masked, values_compared=whole[0].size, **values)
    if np.array_equal(a.places, b.places):
        of_a, of_b, common = a.values, b.values, a.nnz
    else:
        places, at_a, at_b = np.intersect1d(a.places, b.places, assume_unique=True, return_indices=True)
        of_a, of_b, common = a.values[at_a], b.values[at_b], len(places)
    return Difference(
        name,
        **pairs,
        masked=(True, True),
        switched_on=b.nnz - common,
        switched_off=a.nnz - common,
        values_compared=common,
        **_values(of_a, of_b, a.dtype, b.dtype),
        has_dormant=(a.dormant is not None, b.dormant is not None),
        dormant_different=_dormant(a, b),
    )


def _dormant(a: MaskedArray, b: MaskedArray) -> int:
    if a.dormant is None or b.dormant is None:
        return 0
    in_both = ~(a.mask() | b.mask()).reshape(-1)
    of_a, of_b = (array.raw(dormant=True).reshape(-1)[in_both] for array in (a, b))
    return int(_values(of_a, of_b, a.dtype, b.dtype)["values_different"])


def _values(a: NDArray[Any], b: NDArray[Any], dtype_a: str, dtype_b: str) -> dict[str, Any]:
    """Compare entries: of one dtype by their bits, in which -0 is not +0; of two by their numbers."""
    different, signs, nans, largest, finite = 0, 0, 0, 0.0, True
    for start in range(0, len(a), _CHUNK):
        one, other = a[start : start + _CHUNK], b[start : start + _CHUNK]
        if dtype_a == dtype_b:
            apart = _bits(one) != _bits(other)
            if not apart.any():
                continue
            one, other = numbers(one[apart], dtype_a), numbers(other[apart], dtype_b)
            different += len(one)
            is_zero, is_nan = (one == 0) & (other == 0), np.isnan(one) & np.isnan(other)
            signs, nans = signs + int(is_zero.sum()), nans + int(is_nan.sum())
            one, other = one[~(is_zero | is_nan)], other[~(is_zero | is_nan)]
        else:
            one, other = _wide(numbers(one, dtype_a)), _wide(numbers(other, dtype_b))
            apart = (one != other) & ~(np.isnan(one) & np.isnan(other))
            one, other = one[apart], other[apart]
            different += len(one)
        gaps = _gaps(one, other)
        finite = finite and bool(np.isfinite(gaps).all())
        largest = max(largest, float(gaps.max(initial=0.0)))
    return {
        "values_different": different,
        "largest_difference": largest if different > signs + nans and finite else None,
        "signs_different": signs,
        "nans_different": nans,
    }


def _gaps(one: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
    """Return how far numbers are from one another; whole ones of one dtype exactly."""
    found: NDArray[Any]
    if one.dtype == other.dtype and one.dtype.kind in "iu":
        found = np.maximum(one, other).astype(np.uint64) - np.minimum(one, other).astype(np.uint64)
    else:
        with np.errstate(invalid="ignore", over="ignore"):
            found = np.abs(_wide(one) - _wide(other))
    return found


def _bits(held: NDArray[Any]) -> NDArray[Any]:
    """Return entries as unsigned integers."""
    return np.ascontiguousarray(held).view(f"<u{held.dtype.itemsize}")


def _wide(found: NDArray[Any]) -> NDArray[Any]:
    """Return numbers as float64 or complex128."""
    return found.astype(np.complex128 if found.dtype.kind == "c" else np.float64)


def _json(
    a: Path, b: Path, same: bool, compared: int, only: tuple[list[str], list[str]], found: list[Difference]
) -> str:
    told = {
        "a": str(a),
        "b": str(b),
        "same": same,
        "compared": compared,
        "only_in_a": only[0],
        "only_in_b": only[1],
        "different": [asdict(difference) for difference in found],
    }
    return json.dumps(told, indent=1)


def _text(
    a: Path, b: Path, same: bool, compared: int, only: tuple[list[str], list[str]], found: list[Difference]
) -> list[str]:
    if same:
        return [f"{counted(compared, 'array')}, all the same"]
    shown = [printable(f"A: {a}"), printable(f"B: {b}"), ""]
    rows = [(escaped(name), f"only in {side}") for side, names in zip("AB", only, strict=True) for name in names]
    rows += [(escaped(difference.name), _said(difference)) for difference in found]
    shown += lines(rows, width=WIDTH)
    return [*shown, "", f"{len(found)} of {counted(compared, 'array')} that both have differ"]


def _said(difference: Difference) -> str:
    parts = []
    if difference.shapes[0] != difference.shapes[1]:
        parts.append("shape {} in A, {} in B".format(*map(shape_text, difference.shapes)))
    if difference.dtypes[0] != difference.dtypes[1]:
        parts.append("{} in A, {} in B".format(*difference.dtypes))
    if difference.masked[0] != difference.masked[1]:
        parts.append(f"a mask only in {'AB'[difference.masked[1]]}")
    if difference.switched_on or difference.switched_off:
        parts.append(f"{difference.switched_on} switched on, {difference.switched_off} off")
    if difference.values_different:
        by = "" if difference.largest_difference is None else f" by up to {difference.largest_difference:.3g}"
        signs, nans = difference.signs_different, difference.nans_different
        told = [f"{signs} in the sign of 0"] * bool(signs) + [f"{nans} in the bits of NaN"] * bool(nans)
        alone = f", {' and '.join(told)} alone" if told else ""
        parts.append(f"{difference.values_different} of {difference.values_compared} values differ{by}{alone}")
    if difference.has_dormant[0] != difference.has_dormant[1]:
        parts.append(f"dormant values only in {'AB'[difference.has_dormant[1]]}")
    if difference.dormant_different:
        parts.append(f"dormant values differ, {difference.dormant_different} of them")
    return "; ".join(parts)
