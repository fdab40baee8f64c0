"""Tensors that are cut over processes, by FSDP2 and tensor parallelism: put together, and cut like one another."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["as_dtensor_like", "full_tensor", "is_cut_like", "is_gathered", "is_sharded", "local_part", "on_parts"]


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor; asked of its type, since what torch.fx traces with has every attribute."""
    return hasattr(type(tensor), "device_mesh")


def is_cut_like(tensor: Tensor, like: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor that each process has the part of which it has of ``like``."""
    return (
        is_sharded(tensor)
        and is_sharded(like)
        and tensor.placements == like.placements  # type: ignore[attr-defined]
        and tensor.device_mesh == like.device_mesh  # type: ignore[attr-defined]
    )


def is_gathered(tensor: Tensor, cut: Tensor) -> bool:
    """Whether ``tensor`` is less cut than ``cut``, as the copy is that FSDP2 gathers for a call of a module."""
    if not is_sharded(cut):
        return False
    return not is_sharded(tensor) or any(few < many for few, many in zip(_cuts(tensor), _cuts(cut), strict=True))


def _cuts(tensor: Tensor) -> tuple[int, int]:
    """Return the dimensions of a DTensor's mesh, and along how many of them it is cut."""
    placements = tensor.placements  # type: ignore[attr-defined]
    return len(placements), sum(not placement.is_replicate() for placement in placements)


def as_dtensor_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return ``tensor`` cut as ``like`` is if that is a DTensor, as FSDP and tensor parallelism make it; else as it is.

    Of a whole tensor each process takes its part of its own, and nothing is sent; nor of one that is cut so already.
    """
    if not is_sharded(like) or is_cut_like(tensor, like):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh  # type: ignore[attr-defined]
    # Of a sum whose parts are not added up yet (a gradient) each process has its part of all entries.
    placements = [Replicate() if own.is_partial() else own for own in like.placements]  # type: ignore[attr-defined]
    if is_sharded(tensor) and tensor.device_mesh == mesh:  # type: ignore[attr-defined]
        return tensor.redistribute(placements=placements)  # type: ignore[attr-defined, no-any-return]
    whole = full_tensor(tensor).to(like.device)
    everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=placements)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole of a DTensor, on every process; another tensor as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local_part(tensor: Tensor) -> Tensor:
    """Return this process' part of a DTensor, past autograd; another tensor as it is."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():  # else it is a view with a graph
        return tensor.to_local()  # type: ignore[attr-defined, no-any-return]


def on_parts(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Return a function of each entry of some tensors; of DTensors, which are cut alike, of this process' parts."""
    like = tensors[0]
    if not is_sharded(like):
        return function(*tensors)
    from torch.distributed.tensor import DTensor

    part = function(*map(local_part, tensors))
    return DTensor.from_local(
        part,
        like.device_mesh,  # type: ignore[attr-defined]
        like.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
