"""A pattern's indices as tensors, made once for a device, whoever asks first: a call, a transform, or ``torch.compile``.

A transform wraps what is made while it is on, and Dynamo traces how it is made: kept for later calls, it would break them.
"""

from __future__ import annotations

from threading import Thread
from typing import NamedTuple

import torch
from torch import Tensor

from maskedlinear.pattern import SparsityPattern
from maskedlinear_torch._cpu_kernels import CSR

__all__ = ["DevicePattern"]


class DevicePattern(NamedTuple):
    """A pattern on a device: int32 tensors, as in :class:`maskedlinear.pattern.SparsityPattern` by rows and by columns."""

    indptr: Tensor
    indices: Tensor
    starts: Tensor
    outputs: Tensor
    order: Tensor

    @classmethod
    def of(cls, pattern: SparsityPattern, device: torch.device) -> DevicePattern:
        """Return the indices of ``pattern`` on ``device``, made once for each."""
        pattern.derive(("torch", device), _made_apart)
        return pattern.derived(("torch", device))  # type: ignore[no-any-return]

    @classmethod
    def new(cls, pattern: SparsityPattern, device: torch.device) -> DevicePattern:
        """Return tensors of the pattern's own."""
        arrays = (pattern.indptr, pattern.indices, *pattern.csc)
        with torch.inference_mode(False):  # they outlive the call, and others may differentiate
            return cls(*(torch.tensor(array, device=device) for array in arrays))

    def ends(self) -> tuple[Tensor, Tensor]:
        """Return the row and the column of each value."""
        return torch.zeros_like(self.outputs).index_copy(0, self.order.long(), self.outputs), self.indices

    def csr(self, transposed: bool) -> CSR:
        """Return the pattern by rows, or, transposed, by columns."""
        if transposed:
            return CSR(self.starts, self.outputs, self.order, CSR(self.indptr, self.indices, None))
        return CSR(self.indptr, self.indices, None)


def _made_apart(pattern: SparsityPattern, device: torch.device) -> DevicePattern:
    """Return tensors of the pattern's own, made in a thread where no transform or mode is on: they outlive these."""
    made: list[DevicePattern | BaseException] = []

    def make() -> None:
        try:
            made.append(DevicePattern.new(pattern, device))
        except BaseException as error:
            made.append(error)

    thread = Thread(target=make)  # no pool, which refuses work once the program's main thread has ended
    try:
        thread.start()
    except RuntimeError:  # as of Python 3.12 threads do, too
        return DevicePattern.new(pattern, device)
    thread.join()
    if isinstance(made[0], BaseException):
        raise made[0]
    return made[0]


# Dynamo calls it when it meets a pattern, whichever that is, and then traces where the tensors lie, not how they are made.
torch.compiler.assume_constant_result(SparsityPattern.derive)
