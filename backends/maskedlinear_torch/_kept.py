"""``Kept``: a layer's masked weight from call to call: inference derives nothing, training needs no new memory."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Kept", "mask_in_place", "masked_by_bits", "new_memory"]

_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
_BLOCK = 1 << 20  # entries that are masked at once
_GIVEN_BACK = (
    32 << 20
)  # bytes from which on glibc's allocator keeps nothing that was freed (DEFAULT_MMAP_THRESHOLD_MAX)
_HUGE_PAGE = 2 << 20
_LATTICES, _ROUNDS = 16, 8
_SAMPLES = 64


class Kept:
    """The masked weight of one layer on the CPU.

    In training it is derived at every call, into the same memory. In inference it stays as long as weight and mask are the
    same tensors, at the same addresses, in the versions that autograd counts. Edits that it does not count, through
    ``.data`` or a NumPy view, are looked for in a sample: a live weight of each row and of each column, so that an edit of
    whole rows or columns is noticed, and some entries of the mask, for one of all of it. An edit of a few scattered weights
    may not be. Weights in memory that processes share, which others may write to, are not kept at all.

    On the CPU only: elsewhere a look at the sample would wait for the device, and streams would share the memory.

    Threads may share a layer: what is kept is exchanged as a whole, only the thread that derived it for training ever
    writes to it again, and only that one reads it meanwhile.
    """

    def __init__(self) -> None:
        self._now: _Made | None = None

    @property
    def masked(self) -> Tensor | None:
        """What is kept, if anything."""
        now = self._now
        return None if now is None else now.masked

    def derive(self, weight: Tensor, mask: Tensor) -> Tensor:
        """Return the masked weight, derived now: for training, in memory of its own."""
        before, thread, versions = self._now, threading.get_ident(), _versions(weight, mask)
        self._now = None  # until it is whole
        mine = before is not None and before.writer == thread and _like(before.masked, weight)
        masked = masked_by_bits(weight, mask, before.masked if before is not None and mine else None)
        self._now = _Made(masked, weakref.ref(weight), weakref.ref(mask), versions, thread, None)
        return masked

    def of(self, weight: Tensor, mask: Tensor) -> Tensor | None:
        """Return the masked weight, for a backward pass, if it is still that of ``weight`` and ``mask``, by their versions.

        Of tensors that are these or share their memory: saved for a backward pass, they may have become other objects.
        """
        now = self._now
        if now is None or now.writer not in (0, threading.get_ident()) or now.versions != _versions(weight, mask):
            return None
        # As long as they are there, nothing else is at their addresses.
        return None if now.weight() is None or now.mask() is None else now.masked

    def at_rest(self, weight: Tensor, mask: Tensor) -> Tensor:
        """Return the masked weight for inference, derived only if weight or mask have changed."""
        now, versions, sample = self._now, _versions(weight, mask), None
        if now is not None and not now.writer and now.versions == versions and now.is_of(weight, mask):
            # Chosen when it is first asked for, which takes longer than to derive a small masked weight.
            sample = now.sample or _Sample.of(now.masked, mask, *_places(mask))
            if sample.has(mask) and sample.holds(weight):
                if now.sample is None:
                    self._now = now._replace(sample=sample)
                return now.masked
        masked = masked_by_bits(weight, mask)
        if sample is not None:
            sample = _Sample.of(masked, mask, sample.live, sample.places) if sample.has(mask) else None
        self._now = _Made(masked, weakref.ref(weight), weakref.ref(mask), versions, 0, sample)
        return masked

    def __deepcopy__(self, _: Any) -> Kept:
        """A copied layer derives its own."""
        return Kept()

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        """So does one that was saved."""
        return Kept, ()


def masked_by_bits(tensor: Tensor, mask: Tensor, into: Tensor | None = None) -> Tensor:
    """Return ``where(mask, tensor, 0)``, in the memory of ``into`` if that is given; nothing differentiates it.

    On the CPU by a logical AND of the tensor's bits with all ones or all zeros, which lets no NaN through either and
    takes a fraction of the time of ``torch.where``; some rows at a time, which are still in the cache for the second pass.
    """
    if tensor.device.type != "cpu":
        return torch.where(mask, tensor, 0)
    masked = new_memory(tensor.shape, tensor.dtype) if into is None else into
    bits, own = (_bits(matrix) for matrix in (masked, tensor.detach().resolve_neg()))
    for rows in _blocks(mask):
        _all_ones(mask[rows], bits[rows]).bitwise_and_(own[rows])
    return masked


def _all_ones(mask: Tensor, out: Tensor) -> Tensor:
    """Write all ones where a mask is ``True`` and all zeros elsewhere; any byte but 0 is ``True``, as in torch.where."""
    return out.copy_(mask).neg_()


def mask_in_place(matrix: Tensor, mask: Tensor) -> Tensor:
    """Set ``matrix`` to +0 where ``mask`` is ``False``, some rows at a time; on the CPU, where nothing differentiates it."""
    bits, scratch = _bits(matrix), None
    for rows in _blocks(mask):
        part = bits[rows]
        scratch = torch.empty_like(part) if scratch is None else scratch[: len(part)]
        part.bitwise_and_(_all_ones(mask[rows], scratch))
    return matrix


def new_memory(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a tensor on the CPU whose entries are not set.

    A large one has NumPy's memory, which asks Linux for huge pages, from the start of one on: the allocator gets such memory
    anew for every gradient, and a page fault for each 4 KiB of it takes longer than the product that is written there.
    """
    with torch.inference_mode(False), torch.no_grad():  # it may outlive the call
        if math.prod(shape) * dtype.itemsize <= _GIVEN_BACK:
            return torch.empty(shape, dtype=dtype, device="cpu")
        size = math.prod(shape) * dtype.itemsize
        spare = np.empty(size + _HUGE_PAGE, np.int8)
        start = -spare.ctypes.data % _HUGE_PAGE
        return torch.from_numpy(spare[start : start + size]).view(dtype).view(*shape)


def _blocks(mask: Tensor) -> list[slice]:
    """Return the rows of a mask in parts of about ``_BLOCK`` entries."""
    step = max(1, _BLOCK // max(1, mask.shape[1]))
    return [slice(start, start + step) for start in range(0, len(mask) if mask.shape[1] else 0, step)]


class _Made(NamedTuple):
    """What is kept at one time."""

    masked: Tensor
    weight: weakref.ref[Tensor]
    mask: weakref.ref[Tensor]
    versions: tuple[int, int, int, int]
    writer: int  # the thread that may write to it again, or 0: someone may be reading it
    sample: _Sample | None

    def is_of(self, weight: Tensor, mask: Tensor) -> bool:
        """Whether it is of these very tensors."""
        return self.weight() is weight and self.mask() is mask


class _Sample(NamedTuple):
    """What a weight holds at some live places and a mask at some places, as flat indices, by the masked weight of them."""

    live: Tensor
    places: Tensor
    mask: Tensor
    weight: Tensor

    @classmethod
    def of(cls, masked: Tensor, mask: Tensor, live: Tensor, places: Tensor) -> _Sample:
        """Take a sample; a masked place whose masked weight is not 0 was a live one."""
        return cls(live, places, mask.take(places) | (masked.take(places) != 0), _bits(masked.take(live)))

    def has(self, mask: Tensor) -> bool:
        """Whether ``mask`` is still the same at these places."""
        return torch.equal(mask.take(self.places), self.mask)

    def holds(self, weight: Tensor) -> bool:
        """Whether ``weight`` is still the same at these places."""
        return torch.equal(_bits(weight.take(self.live)), self.weight)


def _versions(weight: Tensor, mask: Tensor) -> tuple[int, int, int, int]:
    return weight.data_ptr(), weight._version, mask.data_ptr(), mask._version


def _bits(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor, as whole numbers: NaN is equal to itself there."""
    return tensor.view(_BITS[tensor.itemsize])


def _like(kept: Tensor, weight: Tensor) -> bool:
    return kept.shape == weight.shape and kept.dtype == weight.dtype


def _places(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return where to look at the weight: a live place in each row and column; and at the mask: some live, some masked."""
    live, flat = _one_each(mask), mask.view(-1)
    tried = torch.arange(min(flat.numel(), 1024 * _SAMPLES), device="cpu") * 2654435761 % max(flat.numel(), 1)
    masked = tried[~flat[tried]]
    if len(masked) < _SAMPLES:
        masked = (~flat).nonzero()[:, 0]
    return live, torch.cat([places[:: max(1, len(places) // _SAMPLES)] for places in (live, masked)])


def _one_each(chosen: Tensor) -> Tensor:
    """Return places of a boolean matrix that are ``True``: one in each row and each column that has any.

    As few as it easily can, for each costs a miss of the cache: most serve a row and a column.
    """
    out, in_ = chosen.shape
    if not chosen.numel():
        return torch.empty(0, dtype=torch.int64, device="cpu")
    by_row, by_column = (torch.full((size,), -1, device="cpu") for size in (out, in_))

    def pair(row: Tensor, column: Tensor) -> None:
        """Take places of which both row and column have none yet, at most one of each."""
        for _ in range(_ROUNDS):
            free = (by_row[row] < 0) & (by_column[column] < 0)
            row, column = row[free], column[free]
            if not len(row):
                return
            order = torch.arange(len(row), device="cpu")
            for line, size in ((row, out), (column, in_)):  # one in each row; of these, one in each column
                one = torch.full((size,), -1, device="cpu")
                one[line[order]] = order
                order = one[one >= 0]
            by_row[row[order]] = by_column[column[order]] = row[order] * in_ + column[order]

    def fill(row: Tensor, column: Tensor) -> None:
        """Take a place for each row and each column that has none yet."""
        for taken, line in ((by_row, row), (by_column, column)):
            free = taken[line] < 0
            taken[line[free]] = row[free] * in_ + column[free]

    # Lattices, each of which visits every row and every column, find them where many are True.
    flat, count = chosen.view(-1), torch.arange(max(out, in_), device="cpu")
    step = next(step for step in range(max(1, round(0.618 * in_)), in_ + 2) if math.gcd(step, in_) == 1)
    lattices = []
    for start in range(_LATTICES):
        row, column = count % out, (count * step + start * (in_ // _LATTICES)) % in_
        found = flat[row * in_ + column]
        lattices.append((row[found], column[found]))
        pair(*lattices[-1])
    # Then where row and column are still free, and then a place of its own for each that is left.
    rows = (by_row < 0).nonzero()[:, 0]
    row, column = (chosen[rows] & (by_column < 0)).nonzero().unbind(1)
    mixed = torch.randperm(len(row), generator=torch.Generator().manual_seed(0), device="cpu")
    pair(rows[row][mixed], column[mixed])
    for lattice in lattices:
        fill(*lattice)
    rows = (by_row < 0).nonzero()[:, 0]
    row, column = chosen[rows].nonzero().unbind(1)
    fill(rows[row], column)
    fill(*(chosen & (by_column < 0)).nonzero().unbind(1))
    places: Tensor = torch.cat([by_row, by_column]).unique()
    return places[places >= 0]
