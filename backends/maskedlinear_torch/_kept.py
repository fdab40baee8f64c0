"""``Kept``: a layer's masked weight from call to call: inference derives nothing, training needs no new memory."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

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
_SAMPLES = 64

Key = tuple[int, int, int, int]


class Kept:
    """The masked weight of one layer on the CPU or another device.

    In training it is derived at every call, into the same memory. In inference it stays as long as weight and mask have
    the versions that autograd counts. Edits that it does not count, through ``.data`` or a NumPy view, are looked for in a
    sample of the live weights: what changes all of them, as an average of models does, is noticed; a single one may not
    be. Weights in memory that processes share, which others may write to, are not kept at all.
    """

    def __init__(self) -> None:
        self.key: Key | None = None
        self.masked: Tensor | None = None
        self._places: tuple[tuple[int, int], Tensor] | None = None  # of the sample, for a mask and its version
        self._sample: Tensor | None = None
        self._shared = False  # whether someone may be reading it
        self._owner = 0

    def derive(self, weight: Tensor, mask: Tensor) -> Tensor:
        """Return the masked weight, derived now: for training, in memory of its own."""
        mine = self.masked is not None and not self._shared and self._owner == threading.get_ident()
        fits = mine and _like(self.masked, weight)
        self.key = None  # until it is whole
        self.masked = masked_by_bits(weight, mask, self.masked if fits else None)
        self._owner, self._shared, self._sample = threading.get_ident(), False, None
        self.key = _key(weight, mask)
        return self.masked

    def of(self, weight: Tensor, mask: Tensor) -> Tensor | None:
        """Return the masked weight if it is still that of ``weight`` and ``mask``, by their versions."""
        key, masked = self.key, self.masked
        return masked if key is not None and key == _key(weight, mask) else None

    def at_rest(self, weight: Tensor, mask: Tensor) -> Tensor:
        """Return the masked weight for inference, derived only if weight or mask have changed."""
        masked, sample = self.of(weight, mask), self._look(weight, mask)
        if masked is None or self._sample is None or not torch.equal(self._sample, sample):
            masked = masked_by_bits(weight, mask)
            self.key = None
            self.masked, self._sample = masked, sample
            self.key = _key(weight, mask)
        self._shared = True
        return masked

    def _look(self, weight: Tensor, mask: Tensor) -> Tensor:
        """Return the sample of the weight as it is now."""
        key = (mask.data_ptr(), mask._version)
        if self._places is None or self._places[0] != key:
            self._places = key, _some_live(mask)
        return weight.detach().view(-1).index_select(0, self._places[1]).view(torch.uint8)

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
    bits, own = (matrix.view(_BITS[tensor.itemsize]) for matrix in (masked, tensor.detach()))
    for rows in _blocks(mask):
        torch.mul(mask[rows].view(torch.int8), -1, out=bits[rows]).bitwise_and_(own[rows])
    return masked


def mask_in_place(matrix: Tensor, mask: Tensor) -> Tensor:
    """Set ``matrix`` to +0 where ``mask`` is ``False``, some rows at a time; on the CPU, where nothing differentiates it."""
    bits, scratch = matrix.view(_BITS[matrix.itemsize]), None
    for rows in _blocks(mask):
        part = bits[rows]
        scratch = torch.empty_like(part) if scratch is None else scratch[: len(part)]
        part.bitwise_and_(torch.mul(mask[rows].view(torch.int8), -1, out=scratch))
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


def _key(weight: Tensor, mask: Tensor) -> Key:
    return weight.data_ptr(), weight._version, mask.data_ptr(), mask._version


def _like(kept: Tensor | None, weight: Tensor) -> bool:
    return (
        kept is not None and kept.shape == weight.shape and kept.dtype == weight.dtype and kept.device == weight.device
    )


def _some_live(mask: Tensor) -> Tensor:
    """Return some live places of a mask, spread over all of it."""
    flat = mask.view(-1)
    tried = torch.arange(min(flat.numel(), 1024 * _SAMPLES), device=flat.device) * 2654435761 % max(flat.numel(), 1)
    live = tried[flat[tried]]
    if len(live) < _SAMPLES:
        live = flat.nonzero().view(-1)
    return live[:: max(1, len(live) // _SAMPLES)]
