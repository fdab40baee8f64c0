"""How a mask stands in a file: whole, as the recipe that made it, or coded block by block, whichever is smallest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskedlinear.checkpoint._arrays import MaskedArray
from maskedlinear.checkpoint._codes import CODES, LARGEST_BITS, LARGEST_LIVE, WIDEST, Bytes, Places, group_of
from maskedlinear.checkpoint._json import shown
from maskedlinear.checkpoint._repeats import repeated, repeats
from maskedlinear.checkpoint._rice import Stream
from maskedlinear.masks import Recipe
from maskedlinear.models import WeightAxes

__all__ = ["LARGEST", "Mask", "encode"]

LARGEST = 1 << 40  # entries of an array
_LIVE = 1 << 16  # live entries that a block should have
_FEW = 1 << 14  # live entries on which zlib is tried
_RECORD = 16  # bytes of a block in the index


@dataclass(frozen=True)
class Mask:
    """What the header says of a mask.

    A mask is seen as a matrix: its first axis by all others. Where it consists of equal rectangles (blocks, whole rows or
    columns), the smaller one is coded that has an entry for each of them.

    Attributes:
        shape: of the mask.
        nnz: how many entries are live.
        sha256: the mask's digest.
        encoding: ``"full"``, ``"recipe"`` or one of :data:`CODES`.
        block: entries of a block, of the coded matrix.
        repeat: the sizes of the rectangles.
        recipe: what made it.
        axes: of the weight; a recipe makes the matrix (out, in) that they give.
    """

    shape: tuple[int, ...]
    nnz: int
    sha256: str
    encoding: str
    block: int = 0
    repeat: tuple[int, int] = (1, 1)
    recipe: Recipe | None = None
    axes: WeightAxes | None = None

    @classmethod
    def from_json(cls, told: Any, shape: tuple[int, ...], nnz: int, axes: WeightAxes | None) -> Mask:
        """Return what the header says, checked.

        Raises:
            ValueError: if it contradicts itself or the shape, or is of no known encoding.
        """
        size = math.prod(shape)
        if not isinstance(told, dict) or told.get("encoding") not in ("full", "recipe", *CODES):
            raise ValueError(f"its mask is in none of the encodings full, recipe, {', '.join(CODES)}: {shown(told)}")
        encoding, sha256 = told["encoding"], told.get("sha256")
        known = {"full": set(), "recipe": {"recipe"}}.get(encoding, {"block", "repeat"})
        if told.keys() - known - {"encoding", "sha256"}:
            raise ValueError(f"its mask is said to have {shown(sorted(told))}")
        if not isinstance(sha256, str) or len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
            raise ValueError(f"its mask has no SHA-256: {shown(sha256)}")
        if encoding == "full":
            if nnz != size:
                raise ValueError(f"the full mask has {size} live entries; got {nnz}")
            return cls(shape, nnz, sha256, encoding)
        if encoding == "recipe":
            if size > largest_made(nnz):
                raise ValueError(f"a recipe for {nnz} live entries makes {largest_made(nnz)} at most; got {size}")
            return cls(shape, nnz, sha256, encoding, recipe=Recipe.from_json(told.get("recipe")), axes=axes)
        block, repeat = told.get("block"), told.get("repeat", [1, 1])
        rows, width = _matrix(shape)
        if not isinstance(repeat, list) or len(repeat) != 2 or not all(type(n) is int and n > 0 for n in repeat):
            raise ValueError(f"its mask repeats by two counts; got {shown(repeat)}")
        height, breadth = repeat
        if not size or rows % height or width % breadth or nnz % (height * breadth):
            raise ValueError(
                f"a mask of {(rows, width)}, {nnz} live, does not consist of rectangles of {shown(repeat)}"
            )
        coded, line = size // (height * breadth), width // breadth
        if type(block) is not int or not 0 < block <= coded:
            raise ValueError(f"a mask of {coded} entries is in blocks of 1 to as many; got {shown(block)}")
        if (encoding == "rows" or height * breadth > 1) and (block % line or line > WIDEST):
            raise ValueError(f"its blocks hold whole rows, of {line} entries; got blocks of {block}")
        if encoding == "bits" and block > LARGEST_BITS:
            raise ValueError(f"blocks of bits have at most {LARGEST_BITS} entries; got {block}")
        return cls(shape, nnz, sha256, encoding, block, (height, breadth))

    def to_json(self) -> dict[str, Any]:
        """Return what :meth:`from_json` reads."""
        told: dict[str, Any] = {"encoding": self.encoding, "sha256": self.sha256}
        if self.recipe is not None:
            told["recipe"] = self.recipe.to_json()
        if self.block:
            told["block"] = self.block
        if self.repeat != (1, 1):
            told["repeat"] = list(self.repeat)
        return told

    @property
    def is_coded(self) -> bool:
        """Whether a tensor holds it."""
        return self.encoding in CODES

    def decode(
        self, length: int, read: Callable[[int, int], Bytes], rows: tuple[int, int] | None = None
    ) -> tuple[Places, int]:
        """Return the live entries of some rows, by their places in the whole flattened mask, and how many are before them.

        Args:
            length: of the tensor, in bytes; 0 if there is none.
            read: returns its bytes from one place to another.
            rows: the first row and the one after the last, along the first axis; all if ``None``.

        Raises:
            ValueError: if that is no mask of this shape and number of live entries.
        """
        height, width = _matrix(self.shape)
        first, last = rows or (0, height)
        if self.encoding == "full":
            return np.arange(first * width, last * width), first * width
        if self.encoding == "recipe":
            assert self.recipe is not None
            mask = self.recipe.make(self.shape, self.axes)
            if (made := np.count_nonzero(mask)) != self.nnz:  # before there is an array of the places
                raise ValueError(f"{self.nnz} live entries were due; its recipe makes {made}")
            return _between(np.flatnonzero(mask), 0, first * width, last * width)
        # The rows of the coded matrix, then the blocks, in which they lie.
        tall, broad = self.repeat
        line, coded = width // broad, math.prod(self.shape) // (tall * broad)
        lower, upper = first // tall * line, -(-last // tall) * line
        blocks = range(lower // self.block, -(-upper // self.block) if upper > lower else lower // self.block)
        index = self._index(length, read, coded)
        live = index[0, blocks.start], index[0, blocks.stop]
        places = np.empty((live[1] - live[0]) * tall * broad, np.int64)
        offset = int(index[1, blocks.start])
        data = read(offset, int(index[1, blocks.stop]))
        done = 0
        for block in blocks:
            nnz, start = index[0, block + 1] - index[0, block], block * self.block
            stream = Stream(data[index[1, block] - offset : index[1, block + 1] - offset])
            found = CODES[self.encoding].read(stream, int(nnz), min(self.block, coded - start), line)
            stream.end()
            if self.repeat == (1, 1):
                np.add(found, start, out=places[done : done + len(found)])
                done += len(found)
                continue
            for part in repeated(found + start, line, self.repeat):
                places[done : done + len(part)] = part
                done += len(part)
        return _between(places, int(live[0]) * tall * broad, first * width, last * width)

    def _index(self, length: int, read: Callable[[int, int], Bytes], coded: int) -> NDArray[np.int64]:
        """Return how many live entries, and which bytes, are before each block and at the end, shape ``(2, blocks + 1)``."""
        blocks = -(-coded // self.block)
        if blocks * _RECORD > length:
            raise ValueError(f"{blocks} blocks have an index of {blocks * _RECORD} bytes; its tensor has {length}")
        index = np.zeros((2, blocks + 1), np.int64)
        index[:, 1:] = read(0, blocks * _RECORD).view("<i8").reshape(blocks, 2).T
        index[1, 0] = blocks * _RECORD
        counts = np.diff(index)
        nnz = self.nnz // math.prod(self.repeat)
        if (index < 0).any() or (counts < 0).any() or index[0, -1] != nnz or index[1, -1] != length:
            raise ValueError("its index does not rise to the number of live entries, and to the end of its tensor")
        if (counts[0] > min(LARGEST_LIVE, self.block)).any():
            raise ValueError(f"a block has at most {min(LARGEST_LIVE, self.block)} live entries; got {counts[0].max()}")
        return index


def largest_made(nnz: int) -> int:
    """Return how many entries a mask of a recipe may have: 2²⁶, or, where many are live, 64 for each of these."""
    return max(1 << 26, 64 * nnz)


def encode(array: MaskedArray, *, is_backed: bool = False) -> tuple[Mask, Bytes | None]:
    """Return what the header says of an array's mask, and the tensor that holds it, if it needs one.

    Args:
        array: its places ascend.
        is_backed: whether the tensor must have a bit or more for each live entry.
    """
    shape, nnz, digest = array.shape, array.nnz, array.digest
    if nnz == array.size and not (is_backed and nnz):
        return Mask(shape, nnz, digest, "full"), None
    if not is_backed and _is_made(array):
        return Mask(shape, nnz, digest, "recipe", recipe=array.recipe, axes=array.axes), None
    coded, places, repeat = _matrix(shape), array.places, (1, 1)
    found = (1, 1) if is_backed else repeats(places, coded)
    if found != (1, 1):
        smaller = coded[0] // found[0], coded[1] // found[1]
        rectangles = _rectangles(places, coded[1], found)
        if smaller[1] <= WIDEST and _block(rectangles, math.prod(smaller), smaller[1], whole_rows=True):
            coded, places, repeat = smaller, rectangles, found
    best: tuple[int, str, int, list[Bytes]] | None = None
    for encoding, block in _candidates(places, coded, repeat != (1, 1)):
        if is_backed and encoding in ("runs", "groups", "deflate"):
            continue
        parts = _coded(encoding, places, coded, block)
        length = sum(map(len, parts))
        if best is None or length < best[0]:
            best = length, encoding, block, parts
    assert best is not None
    _, encoding, block, parts = best
    return Mask(shape, nnz, digest, encoding, block, repeat), np.concatenate(parts)


def _is_made(array: MaskedArray) -> bool:
    """Return whether an array has a recipe that makes its mask, and may."""
    if array.recipe is None or array.size > largest_made(array.nnz):
        return False
    try:
        mask = array.recipe.make(array.shape, array.axes)
    except (TypeError, ValueError):  # it was the recipe of another shape
        return False
    return np.count_nonzero(mask) == array.nnz and bool(mask.reshape(-1)[array.places].all())


def _candidates(places: Places, shape: tuple[int, int], is_repeated: bool) -> Iterator[tuple[str, int]]:
    """Yield the encodings that could be the smallest, by estimates, and the entries of their blocks."""
    height, width = shape
    size, nnz = height * width, len(places)
    block = _block(places, size, width, whole_rows=is_repeated)
    density = nnz / size
    small = _block(places, size, width, whole_rows=is_repeated, largest=LARGEST_BITS) if density > 0.2 else 0
    if small:
        yield "bits", small
    if density < 0.45 or not small:
        yield "gaps", block
    if nnz == 0:
        return
    bits = size * float(_entropy(density)) / nnz  # of information in a live entry, of a random mask
    if all(_cost_of_runs(some, density) < len(some) * bits for some in (places[:_FEW], places)):
        yield "runs", block
    group = group_of(places, size)
    if group and block % group == 0 and len(places) < size:
        yield "groups", block
        return
    few = places[:_FEW] - places[0]
    deflated, rice = (sum(map(len, CODES[code].write(few, size, width))) for code in ("deflate", "gaps"))
    if deflated < 0.97 * rice:
        yield "deflate", block
    if height > 4 * nnz or width > WIDEST:
        return
    counts = np.diff(np.searchsorted(places, np.arange(height + 1) * width))
    by_rows = width * float(_entropy(counts / width).sum()) + height * (np.log2(counts.std() + 1) + 1)
    if by_rows < bits * nnz:
        rows = _block(places, size, width, whole_rows=True)
        if rows:
            yield "rows", rows


def _cost_of_runs(places: Places, density: float) -> float:
    """Return about how many bits the runs take of which these are live entries."""
    runs = 1 + int(np.count_nonzero(places[1:] - places[:-1] != 1))
    live, dead = len(places) / runs, len(places) * (1 / density - 1) / runs
    return runs * float(np.log2(live) + np.log2(dead + 1) + 2)


def _entropy(density: Any) -> Any:
    """Return the bits of information in an entry that is live with this probability."""
    p = np.clip(density, 1e-300, 1 - 1e-16)
    return -p * np.log2(p) - (1 - p) * np.log2(1 - p)


def _block(places: Places, size: int, width: int, *, whole_rows: bool, largest: int = LARGEST) -> int:
    """Return of how many entries blocks are, so that none has too many live ones; 0 if they cannot be of whole rows."""
    block = max(1, min(size, largest, size * _LIVE // max(len(places), 1)))
    while True:
        if block >= width:
            block -= block % width
        elif whole_rows:
            block = width if width <= largest else 0
        if not block:
            return 0
        counts = np.diff(np.searchsorted(places, np.arange(0, size, block)), append=len(places))
        if counts.max() <= LARGEST_LIVE:
            return block
        if whole_rows and block == width:
            return 0
        block //= 2


def _coded(encoding: str, places: Places, shape: tuple[int, int], block: int) -> list[Bytes]:
    """Return the parts of a mask's tensor: the index, and each block's stream."""
    size, width = shape[0] * shape[1], shape[1]
    starts = range(0, size, block)
    bounds = [*np.searchsorted(places, np.array(starts)).tolist(), len(places)]
    index = np.zeros((len(starts), 2), "<i8")
    parts = [index.view(np.uint8).reshape(-1)]
    length = parts[0].size
    for number, start in enumerate(starts):
        here = places[bounds[number] : bounds[number + 1]] - start
        stream = CODES[encoding].write(here, min(block, size - start), width)
        length += sum(map(len, stream))
        index[number] = bounds[number + 1], length
        parts += stream
    return parts


def _rectangles(places: Places, width: int, repeat: tuple[int, int]) -> Places:
    """Return the places of rectangles in the matrix of these: of the upper left entry of each."""
    rows, columns = np.divmod(places, width)
    first = (rows % repeat[0] == 0) & (columns % repeat[1] == 0)
    found: Places = rows[first] // repeat[0] * (width // repeat[1]) + columns[first] // repeat[1]
    return found


def _between(places: Places, before: int, start: int, stop: int) -> tuple[Places, int]:
    """Return the places from ``start`` on and below ``stop``, and how many are before them, of places that follow others."""
    first, last = np.searchsorted(places, (start, stop)).tolist()
    return places[first:last], before + first


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the first axis, and the product of all others."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)
