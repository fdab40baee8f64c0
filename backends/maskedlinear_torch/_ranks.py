"""Processes that train one model change its masks alike: gradients are averaged, and what was decided is compared."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from maskedlinear_torch._compat import active_ddp_module
from maskedlinear_torch._dtensors import is_sharded, local_part

__all__ = ["Group", "Ranks", "active_group", "are_finite", "averaged", "check_alike", "group_of"]

Group = Any  # a torch.distributed.ProcessGroup, None, or "model": that of the model, wrapped or cut


@dataclass(frozen=True)
class Ranks:
    """Processes that act together: those of a group, or of groups that cross each other, as the dimensions of a mesh do.

    Attributes:
        groups: one after the other of them adds up, which all processes have part in then.
        device: where what is sent has to lie; ``None`` if that does not matter.
        is_cut: whether weights are cut over the processes.
    """

    groups: tuple[Any, ...]
    device: str | None = None
    is_cut: bool = False

    @property
    def size(self) -> int:
        """How many processes there are."""
        return math.prod(distributed.get_world_size(group) for group in self.groups)

    def add_up(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the sum of an array over the processes."""
        total = torch.from_numpy(np.array(numbers))
        total = total if self.device is None else total.to(self.device)
        self.sum_(total)
        return total.cpu().numpy()

    def sum_(self, tensor: Tensor) -> Tensor:
        """Make a tensor, in place, the sum over the processes."""
        for group in self.groups:
            distributed.all_reduce(tensor, group=group)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean of a tensor over the processes."""
        return self.sum_(tensor.detach().clone().contiguous()).div_(self.size)

    def beyond(self, tensor: Tensor) -> Ranks:
        """Return the processes that differ in more than in their parts of a DTensor: the groups across its mesh."""
        mesh = set(tensor.device_mesh.mesh.reshape(-1).tolist())  # type: ignore[attr-defined]
        groups = [own for own in self.groups if not set(distributed.get_process_group_ranks(own)) <= mesh]
        return Ranks(tuple(groups), self.device, self.is_cut)

    def gather(self, own: Any) -> dict[int, Any]:
        """Return what each process has, by its rank among all."""
        every = {distributed.get_rank(): own}
        for group in self.groups:
            parts: list[Any] = [None] * distributed.get_world_size(group)
            distributed.all_gather_object(parts, every, group=group)
            every = {rank: what for part in parts for rank, what in part.items()}
        return dict(sorted(every.items()))


def group_of(model: nn.Module, group: Group | Literal["model"]) -> Ranks | None:
    """Return the processes that take part: of the group given, or those of a model in ``DistributedDataParallel`` or one
    that is cut over processes; or none.

    Raises:
        ValueError: if ``group`` is a text, but not ``"model"``; or if weights are cut over other processes than its.
    """
    if isinstance(group, str) and group != "model":
        raise ValueError(f"group must be a process group, None, or 'model'; got {group!r}")
    parallel = next((m for m in model.modules() if isinstance(m, DistributedDataParallel)), None)
    meshes = dict.fromkeys(one.device_mesh for one in model.parameters() if is_sharded(one))  # type: ignore[attr-defined]
    if not meshes:
        if isinstance(group, str):
            group = None if parallel is None else parallel.process_group
        return Ranks((group,)) if group is not None and distributed.get_world_size(group) > 1 else None
    groups = [own for mesh in meshes for own in mesh.get_all_groups()]
    groups += [parallel.process_group] if parallel is not None else []
    ranks = _crossing(groups, next(iter(meshes)).device_type)
    together = _all_of(ranks, list(meshes))
    if len(together) != ranks.size:
        raise ValueError(
            "processes that cut the weights of a model must form a grid, a mesh that has those of all of them; got groups "
            f"{[distributed.get_process_group_ranks(own) for own in ranks.groups]} here: cut it by parts of one device mesh"
        )
    if not isinstance(group, str):
        given = {distributed.get_rank()} if group is None else set(distributed.get_process_group_ranks(group))
        if given != together:
            raise ValueError(
                f"weights are cut over processes, which act together, ranks {sorted(together)}; got "
                f"group={'None' if group is None else sorted(given)}: leave it at 'model', in all of them"
            )
    return ranks if ranks.size > 1 else None


def _all_of(ranks: Ranks, meshes: Sequence[Any]) -> set[int]:
    """Return the ranks of all processes; they are asked only where no one mesh tells."""
    own = {frozenset(distributed.get_process_group_ranks(group)) for group in ranks.groups}
    for mesh in meshes:
        dimensions = {frozenset(distributed.get_process_group_ranks(group)) for group in mesh.get_all_groups()}
        if mesh.size() == ranks.size and own <= dimensions:
            return set(mesh.mesh.reshape(-1).tolist())
    return set(ranks.gather(None))


def _crossing(groups: Sequence[Any], device: str) -> Ranks:
    """Return groups without those that others contain, and those of one process."""
    kept: list[tuple[set[int], Any]] = []
    for group in sorted(groups, key=distributed.get_world_size, reverse=True):
        ranks = set(distributed.get_process_group_ranks(group))
        if len(ranks) > 1 and not any(ranks <= others for others, _ in kept):
            kept.append((ranks, group))
    return Ranks(tuple(group for _, group in kept), device, is_cut=True)


def active_group() -> Ranks | None:
    """Return the processes of the ``DistributedDataParallel`` whose forward pass this is; or none."""
    parallel = active_ddp_module()
    return None if parallel is None else Ranks((parallel.process_group,))


def averaged(tensor: Tensor, ranks: Ranks) -> Tensor:
    """Return the mean of a tensor over processes."""
    return ranks.mean(tensor)


def are_finite(tensors: Sequence[Tensor], ranks: Ranks | None) -> bool:
    """Whether all numbers are finite, in all processes."""
    parts = [local_part(tensor) for tensor in tensors]
    finite = all(bool(part.isfinite().all()) for part in parts)
    if ranks is None:
        return finite
    device = ranks.device if ranks.device is not None else parts[0].device if parts else "cpu"
    return bool(averaged(torch.tensor(float(finite), device=device), ranks) == 1)


def check_alike(
    what: str,
    arrays: Mapping[str, Any],
    ranks: Ranks,
    places: Mapping[str, str] | None = None,
    remedy: str = "begin with the same weights and masks (wrap the model before it is masked, or seed all processes alike)",
) -> None:
    """Raise a ``ValueError`` if arrays are not the same, bit for bit, in all processes; by name.

    Args:
        what: they are.
        arrays: by name; of a weight that is cut over processes this one's part, or several arrays of it.
        ranks: the processes.
        places: what says, by name, which part this process has; processes that have the same one are compared.
        remedy: what an error says is to be done.
    """
    own = [(_digest(array), (places or {}).get(name)) for name, array in arrays.items()]
    every = ranks.gather((list(arrays), own))
    if any(names != list(arrays) for names, _ in every.values()):
        raise ValueError(f"processes must have the same masked weights; this one has {list(arrays)}")
    for number, name in enumerate(arrays):
        first: dict[str | None, tuple[int, str]] = {}
        others: dict[int, list[int]] = {}
        for rank, (_, seen) in every.items():
            digest, place = seen[number]
            leader, leading = first.setdefault(place, (rank, digest))
            if digest != leading:
                others.setdefault(leader, []).append(rank)
        for leader, differing in others.items():
            raise ValueError(
                f"{what} of {name or 'the model'} must be the same in all processes; got others on rank "
                f"{', '.join(map(str, differing))} than on rank {leader}: {remedy}, or pass group=None where one process "
                "acts alone"
            )


def _digest(arrays: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays if isinstance(arrays, tuple) else (arrays,):
        if isinstance(array, Tensor):
            part = local_part(array.detach()).cpu().contiguous()
            array = part.reshape(-1).view(torch.uint8).numpy()
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
