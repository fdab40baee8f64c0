"""Processes that train one model change its masks alike: gradients are averaged, and what was decided is compared."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from maskedlinear_torch._compat import active_ddp_module

__all__ = ["Group", "active_group", "are_finite", "averaged", "check_alike", "group_of"]

Group = Any  # a torch.distributed.ProcessGroup, None, or "model": that of the wrapped model


def group_of(model: nn.Module, group: Group | Literal["model"]) -> Group:
    """Return the process group that takes part: the one given, or that of a model in ``DistributedDataParallel``; or none.

    Raises:
        ValueError: if ``group`` is a text, but not ``"model"``.
    """
    if isinstance(group, str):
        if group != "model":
            raise ValueError(f"group must be a process group, None, or 'model'; got {group!r}")
        parallel = next((m for m in model.modules() if isinstance(m, DistributedDataParallel)), None)
        group = None if parallel is None else parallel.process_group
    return group if group is not None and distributed.get_world_size(group) > 1 else None


def active_group() -> Group:
    """Return the process group of the ``DistributedDataParallel`` whose forward pass this is; or none."""
    parallel = active_ddp_module()
    return None if parallel is None else parallel.process_group


def averaged(tensor: Tensor, group: Group) -> Tensor:
    """Return the mean of a tensor over a process group."""
    total = tensor.detach().clone().contiguous()
    distributed.all_reduce(total, group=group)
    return total.div_(distributed.get_world_size(group))


def are_finite(tensors: Sequence[Tensor], group: Group) -> bool:
    """Whether all numbers are finite, in all processes of a group."""
    finite = all(bool(tensor.isfinite().all()) for tensor in tensors)
    if group is None:
        return finite
    device = tensors[0].device if tensors else "cpu"
    return bool(averaged(torch.tensor(float(finite), device=device), group) == 1)


def check_alike(what: str, arrays: Mapping[str, Any], group: Group) -> None:
    """Raise a ``ValueError`` if arrays are not the same, bit for bit, in all processes of a group; by name."""
    own = [hashlib.blake2b(_bytes(array), digest_size=16).hexdigest() for array in arrays.values()]
    every: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(every, (list(arrays), own), group=group)
    if any(names != list(arrays) for names, _ in every):
        raise ValueError(f"processes must have the same masked weights; this one has {list(arrays)}")
    for place, name in enumerate(arrays):
        seen = [digests[place] for _, digests in every]
        if len(set(seen)) > 1:
            others = [rank for rank, digest in enumerate(seen) if digest != seen[0]]
            raise ValueError(
                f"{what} of {name or 'the model'} must be the same in all processes; got others on rank "
                f"{', '.join(map(str, others))} than on rank 0: begin with the same weights and masks (wrap the model "
                "before it is masked, or seed all processes alike), or pass group=None where one process acts alone"
            )


def _bytes(array: Any) -> bytes:
    if isinstance(array, Tensor):
        array = array.detach().cpu().contiguous().view(torch.uint8).numpy()
    return np.ascontiguousarray(array).tobytes()
