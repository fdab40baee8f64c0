"""Tensors that are cut over processes, by FSDP2 and tensor parallelism: put together, and cut like one another."""

from __future__ import annotations

from torch import Tensor

__all__ = ["as_dtensor_like", "full_tensor", "is_sharded", "local_part"]


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor; asked of its type, since what torch.fx traces with has every attribute."""
    return hasattr(type(tensor), "device_mesh")


def as_dtensor_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return ``tensor`` cut as ``like`` is if that is a DTensor, as FSDP and tensor parallelism make it; else as it is."""
    if not is_sharded(like):
        return tensor
    mesh = like.device_mesh  # type: ignore[attr-defined]
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = DTensor.from_local(
        full_tensor(tensor).to(like.device), mesh, [Replicate()] * mesh.ndim, run_check=False
    )
    return everywhere.redistribute(placements=like.placements)  # type: ignore[attr-defined]


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole of a DTensor, on every process; another tensor as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local_part(tensor: Tensor) -> Tensor:
    """Return this process' part of a DTensor; another tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
