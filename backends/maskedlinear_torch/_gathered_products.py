"""The products where torch has no kernels for compressed rows (without MKL, of batches of gradients): gathered, in parts."""

from __future__ import annotations

import torch
from torch import Tensor

from maskedlinear_torch._cpu_kernels import CSR

__all__ = ["sddmm_gathered", "spmm_gathered"]

_CHUNK = 1 << 22  # numbers that are gathered at once


def spmm_gathered(values: Tensor, right: Tensor, csr: CSR) -> Tensor:
    """Return W · right, for values in the order of the rows of ``csr``."""
    product = right.new_zeros(len(csr.starts) - 1, right.shape[1])
    rows = _rows(csr)
    for part in _parts(csr, right.shape[1]):
        # Not in place, which a batch of gradients refuses.
        product = product.index_add(0, rows[part], values[part, None] * right.index_select(0, csr.across[part]))
    return product


def sddmm_gathered(left: Tensor, right: Tensor, csr: CSR) -> Tensor:
    """Return left · rightᵀ at the connections."""
    rows = _rows(csr)
    parts = [
        (left.index_select(0, rows[part]) * right.index_select(0, csr.across[part])).sum(1)
        for part in _parts(csr, right.shape[1])
    ]
    return torch.cat(parts)


def _rows(csr: CSR) -> Tensor:
    """Return the row of each connection: how many have begun up to it. (``repeat_interleave`` hangs in a forked child.)"""
    begun = csr.starts[1:-1]
    counts = csr.across.new_zeros(csr.across.numel() + 1).index_add(0, begun, torch.ones_like(begun))
    return counts[:-1].cumsum(0, dtype=torch.int32)


def _parts(csr: CSR, batch: int) -> list[slice]:
    step = max(1, _CHUNK // batch)
    return [slice(start, start + step) for start in range(0, csr.across.numel(), step)]
