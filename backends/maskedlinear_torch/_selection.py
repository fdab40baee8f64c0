"""Masks of the largest magnitudes, chosen on the device where a weight is: for masks that are made anew at each pass.

The masks that :mod:`maskedlinear.pruning` makes, by bits, so that no float is rounded or flushed; of equal magnitudes the
later ones stay, and NaN counts as the largest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from maskedlinear.models import WeightAxes

__all__ = ["Order", "largest_entries", "largest_in_groups"]

_WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Order(NamedTuple):
    """In which order a weight's axes are those of its stack, of outputs and of inputs, and how many are the stack's."""

    axes: tuple[int, ...]
    stacked: int

    @classmethod
    def of(cls, axes: WeightAxes, ndim: int) -> Order:
        """Return the order of a weight of ``ndim`` dimensions, once: compilers do not follow how it is found."""
        groups = axes.order(ndim)
        return cls(tuple(axis for group in groups for axis in group), len(groups[0]))


def largest_entries(weight: Tensor, zeros: int, order: Order) -> Tensor:
    """Return a mask of a weight without the ``zeros`` entries of smallest magnitude of each of its matrices.

    Args:
        weight: floating, of any shape.
        zeros: how many, fewer than a matrix has.
        order: of its axes.
    """
    if not zeros:
        return torch.ones_like(weight, dtype=torch.bool)
    keys = _keys(weight, order)
    matrices = keys.reshape(*keys.shape[: order.stacked], -1)
    if torch.are_deterministic_algorithms_enabled():  # which kthvalue refuses on CUDA, for its indices
        edge = matrices.sort(dim=-1).values[..., zeros - 1 : zeros]
    else:
        edge = matrices.kthvalue(zeros, dim=-1, keepdim=True).values
    equal = matrices == edge
    left = zeros - (matrices < edge).sum(dim=-1, keepdim=True)
    live = (matrices > edge) | (equal & (equal.cumsum(dim=-1) > left))
    return _back(live.reshape(keys.shape), order)


def largest_in_groups(weight: Tensor, n: int, m: int, order: Order) -> Tensor:
    """Return a mask of the ``n`` largest magnitudes of each ``m`` successive inputs of a weight.

    Args:
        weight: floating, of any shape.
        n: how many, from 0 to ``m``.
        m: the size of a group, of which the number of inputs is a multiple.
        order: of its axes; inputs follow each other with the last of them fastest.
    """
    keys = _keys(weight, order)
    groups = keys.reshape(-1, m)
    smaller = torch.zeros_like(groups, dtype=torch.int16)  # how many of its group each entry comes after
    places = torch.arange(m, device=weight.device)
    for place in range(m):
        other = groups[:, place : place + 1]
        smaller += (other < groups) | ((other == groups) & (places > place))
    return _back((smaller >= m - n).reshape(keys.shape), order)


def _keys(weight: Tensor, order: Order) -> Tensor:
    """Return whole numbers ordered as the magnitudes are, their axes in order."""
    whole = _WHOLE[weight.element_size()]
    bits = weight.detach().contiguous().view(whole) & torch.iinfo(whole).max
    return bits.permute(order.axes)


def _back(mask: Tensor, order: Order) -> Tensor:
    """Return a mask with its axes as the weight has them."""
    return mask.permute([order.axes.index(axis) for axis in range(len(order.axes))]).contiguous()
