"""``Kept``: a layer's masked weight from call to call: inference derives nothing, training needs no new memory."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

__all__ = ["Kept", "mask_in_place", "masked_by_bits"]

_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
_BLOCK = 1 << 20  # entries of a gradient that are masked at once
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
    takes a fraction of the time of ``torch.where``.
    """
    if tensor.device.type != "cpu":
        return torch.where(mask, tensor, 0)
    whole_numbers = _BITS[tensor.itemsize]
    with torch.inference_mode(False), torch.no_grad():  # it may outlive the call
        masked = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu") if into is None else into
    bits = masked.view(whole_numbers)
    torch.mul(mask.view(torch.int8), -1, out=bits)
    bits.bitwise_and_(tensor.detach().view(whole_numbers))
    return masked


def mask_in_place(matrix: Tensor, mask: Tensor) -> Tensor:
    """Set ``matrix`` to +0 where ``mask`` is ``False``, some rows at a time; on the CPU, where nothing differentiates it."""
    if not matrix.numel():
        return matrix
    bits, signs = matrix.view(_BITS[matrix.itemsize]), mask.view(torch.int8)
    step = max(1, _BLOCK // matrix.shape[1])
    scratch = bits.new_empty(min(step, len(matrix)), matrix.shape[1])
    for start in range(0, len(matrix), step):
        part = bits[start : start + step]
        part.bitwise_and_(torch.mul(signs[start : start + step], -1, out=scratch[: len(part)]))
    return matrix


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
