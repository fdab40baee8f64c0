"""The values of a sparse layer that processes share: FSDP2's even parts, and whole rows or columns of tensor parallelism.

Every process knows all connections; of their values it has its part. What moves values, or writes them to files, goes by
their order in the whole layer, in which one layer's values at a time are gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn

from maskedlinear.pattern import SparsityPattern
from maskedlinear_torch._dtensors import as_dtensor_like, full_tensor, is_sharded, local_part
from maskedlinear_torch._ranks import Ranks, check_alike

__all__ = [
    "Cut",
    "check_alike_where_shared",
    "contiguous_stride",
    "draw",
    "live_weights",
    "moved",
    "part_of",
    "refuse_cut_twice",
    "resize_and_copy",
    "settle",
    "whole_values",
]


@dataclass(frozen=True)
class Cut:
    """A layer's connections shared out by tensor parallelism: each process has those of some rows, or of some columns.

    The values are a DTensor of shape ``(processes, length)``, a row a process, each with its own connections in the order
    of the whole layer and zeros after them. The shape is never that of the whole layer's values, ``(nnz,)``, so that
    nothing takes the one for the other.

    Args:
        pattern: the whole layer's connections.
        dim: 0 for output rows, 1 for input columns; shared out as ``torch.chunk`` does.
        mesh: a device mesh of one dimension.
    """

    pattern: SparsityPattern
    dim: Literal[0, 1]
    mesh: Any

    @property
    def processes(self) -> int:
        return int(self.mesh.size())

    @cached_property
    def _owners(self) -> NDArray[np.int64]:
        """The process of each connection, shape ``(nnz,)``."""
        ends = self.pattern.rows if self.dim == 0 else self.pattern.indices
        return np.asarray(ends // self._step, np.int64)

    @property
    def _step(self) -> int:
        return max(-(-self.pattern.shape[self.dim] // self.processes), 1)

    @cached_property
    def length(self) -> int:
        """The most connections that a process has; at least 1."""
        return max(1, int(np.bincount(self._owners, minlength=self.processes).max()))

    @cached_property
    def slots(self) -> NDArray[np.int64]:
        """Where the value of each connection is among ``processes * length``, shape ``(nnz,)``."""
        order = np.argsort(self._owners, kind="stable")
        starts = np.searchsorted(self._owners[order], np.arange(self.processes))
        slots = np.empty(self.pattern.nnz, np.int64)
        owners = self._owners[order]
        slots[order] = owners * self.length + np.arange(self.pattern.nnz) - starts[owners]
        return slots

    @cached_property
    def local(self) -> SparsityPattern:
        """The connections that this process has, from its inputs to its outputs."""
        rank, (out, in_) = int(self.mesh.get_local_rank()), self.pattern.shape
        start, stop = (min((rank + more) * self._step, self.pattern.shape[self.dim]) for more in (0, 1))
        own = self._owners == rank
        rows, columns = self.pattern.rows[own], self.pattern.indices[own]
        if self.dim == 0:
            rows, out = rows - start, stop - start
        else:
            columns, in_ = columns - start, stop - start
        starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=out))])
        return SparsityPattern(starts, columns, in_)

    def shared_out(self, values: Tensor) -> Tensor:
        """Return the whole layer's values, shape ``(nnz,)``, as all processes have them, as the DTensor of these parts."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        every = values.new_zeros(self.processes * self.length)
        every[torch.from_numpy(self.slots).to(every.device)] = values
        alike = DTensor.from_local(every.view(self.processes, -1), self.mesh, [Replicate()], run_check=False)
        return alike.redistribute(placements=[Shard(0)])

    def own(self, values: Tensor) -> Tensor:
        """Return this process' values, shape ``(local.nnz,)``, of the DTensor of all parts; differentiable."""
        own: Tensor = values.to_local()  # type: ignore[attr-defined]
        return own.reshape(-1)[: self.local.nnz]

    def own_inputs(self, x: Tensor) -> Tensor:
        """Return the inputs of this process' connections: all of them, or those of its columns; differentiable."""
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

        if not is_sharded(x):
            x = DTensor.from_local(x, self.mesh, [Replicate()], run_check=False)
        layout = Replicate() if self.dim == 0 else Shard(x.dim() - 1)
        shared: Any = x
        if shared.placements != (layout,):
            shared = shared.redistribute(placements=[layout])
        # Each process' outputs are of all inputs: what it sends back is a part of the sum.
        own: Tensor = shared.to_local(grad_placements=[Partial()] if self.dim == 0 else None)
        if own.shape[-1] != self.local.shape[1]:  # a DTensor of uneven parts may not know how many it has in all
            raise ValueError(
                f"x must have {self.pattern.shape[1]} inputs in its last dimension, {self.local.shape[1]} of them in this "
                f"process; got {own.shape[-1]} of shape {tuple(x.shape)}"
            )
        return own

    def outputs(self, y: Tensor, layouts: Sequence[Any]) -> Tensor:
        """Return the DTensor of the outputs that processes have computed, each its own rows' or its part of a sum."""
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

        if self.dim == 1:
            whole: Any = DTensor.from_local(y, self.mesh, [Partial()], run_check=False)
            return whole.redistribute(placements=layouts or [Replicate()])  # type: ignore[no-any-return]
        shape = torch.Size((*y.shape[:-1], self.pattern.shape[0]))
        layout, stride = [Shard(y.dim() - 1)], contiguous_stride(shape)
        return DTensor.from_local(y, self.mesh, layout, run_check=False, shape=shape, stride=stride)

    def __deepcopy__(self, _: Any) -> Cut:
        """A copied layer is shared out among the same processes."""
        return self

    def evenly(self, values: Tensor) -> Tensor:
        """Return the values in the order of the whole layer, shape ``(nnz,)``: a DTensor cut as FSDP2 cuts."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        whole = whole_values(values, self)
        alike = DTensor.from_local(whole, self.mesh, [Replicate()], run_check=False)
        return alike.redistribute(placements=[Shard(0)])


def contiguous_stride(shape: torch.Size) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor."""
    return torch.empty(shape, device="meta").stride()


def whole_values(tensor: Tensor, cut: Cut | None) -> Tensor:
    """Return all of a layer's values, or what is kept of each, on every process, shape ``(nnz,)``; differentiable."""
    whole = full_tensor(tensor)
    return whole if cut is None else whole.reshape(-1)[torch.from_numpy(cut.slots).to(whole.device)]


def part_of(values: Tensor, like: Tensor, cut: Cut | None) -> Tensor:
    """Return whole values, shape ``(nnz,)`` and the same on every process, shared out as ``like``."""
    if cut is not None:
        values = cut.shared_out(values)
        return as_dtensor_like(values, like) if values.shape == like.shape else values
    return as_dtensor_like(values, like)


def moved(tensor: Tensor, places: Tensor, fresh: float, cut: Cut | None) -> Tensor:
    """Return what is kept of each connection, shape ``(nnz,)``, from where it was; ``fresh`` where that is nowhere (-1)."""
    whole = whole_values(tensor, cut)
    return torch.where(places >= 0, whole[places.clamp(min=0)], fresh)


def resize_and_copy(parameter: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    """Change a parameter and its gradient, which stay the same objects, but may become of another size.

    Raises:
        RuntimeError: if the size changes while a graph holds the parameter.
    """
    gradient = None if parameter.grad is None else change(parameter.grad)
    values = change(parameter)
    if values.shape == parameter.shape:
        parameter.copy_(values)
        if gradient is not None and parameter.grad is not None:
            parameter.grad.copy_(gradient)
        return
    new = nn.Parameter(values, requires_grad=parameter.requires_grad)
    new.grad = gradient
    vars(new).update(vars(parameter))
    parameter.grad = None
    torch.utils.swap_tensors(parameter, new)


def refuse_cut_twice(layer: Any) -> None:
    """Raise a ``ValueError`` if connections of a layer cannot move, since FSDP2 has cut again what tensor parallelism had
    shared out: processes would have other numbers of them, and FSDP2 cannot take parts of another size.
    """
    if layer._cut is not None and getattr(layer, "_is_fsdp_managed_module", False):
        raise ValueError(
            "connections of a sparse layer move under FSDP2 or under tensor parallelism; got one that is cut by both: leave "
            "it out of one of them, or keep its connections (include=... says which layers move)"
        )


def check_alike_where_shared(parameter: Tensor, arrays: Callable[[], Mapping[str, Any]]) -> None:
    """Raise a ``ValueError`` if processes that share a parameter have different arrays."""
    if is_sharded(parameter):
        mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
        check_alike("what is moved", arrays(), Ranks(tuple(mesh.get_all_groups()), mesh.device_type))


def draw(parameter: Tensor, bound: Tensor, cut: Cut | None = None) -> None:
    """Draw a parameter's entries from U(-bound, bound); where processes share it, the first one's draws."""
    drawn = torch.empty_like(bound).uniform_(-1, 1).mul_(bound)
    if is_sharded(parameter):
        from torch.distributed.tensor import Replicate, distribute_tensor

        mesh = parameter.device_mesh  # type: ignore[attr-defined]
        drawn = distribute_tensor(drawn, mesh, [Replicate()] * mesh.ndim).to_local()
    parameter.copy_(part_of(drawn, parameter, cut))


def live_weights(layer: Any) -> tuple[SparsityPattern, Tensor]:
    """Return the connections of a masked layer in the dense form, and their values, whole and on every process.

    Where rows of the weight are shared out, as FSDP2 shares them, what is live in them is gathered, and no more.
    """
    mask, weight = layer.known_mask, layer.weight.detach()
    if not is_sharded(weight) or weight.is_meta:
        pattern = SparsityPattern.from_mask(full_tensor(mask).cpu().numpy())
        return pattern, weight.new_empty(pattern.nnz) if weight.is_meta else weight[full_tensor(mask)]
    if tuple(str(placement) for placement in weight.placements) != ("S(0)",):
        mask, whole = full_tensor(mask), full_tensor(weight)
        return SparsityPattern.from_mask(mask.cpu().numpy()), whole[mask]
    own_mask, own = local_part(as_dtensor_like(mask, weight)), local_part(weight)
    group = weight.device_mesh.get_group()
    counts, columns, values = (
        _joined(part, group) for part in (own_mask.sum(1), own_mask.nonzero()[:, 1], own[own_mask])
    )
    starts = np.concatenate([[0], np.cumsum(counts.cpu().numpy())])
    return SparsityPattern(starts, columns.cpu().numpy(), weight.shape[1]), values


def _joined(part: Tensor, group: Any) -> Tensor:
    """Return all processes' parts, of different lengths, one after the other."""
    size = distributed.get_world_size(group)
    lengths = [torch.zeros(1, dtype=torch.int64, device=part.device) for _ in range(size)]
    distributed.all_gather(lengths, torch.tensor([len(part)], device=part.device), group=group)
    longest = int(max(lengths))
    parts = [part.new_empty(longest) for _ in range(size)]
    distributed.all_gather(parts, torch.nn.functional.pad(part.contiguous(), (0, longest - len(part))), group=group)
    return torch.cat([part[: int(length)] for part, length in zip(parts, lengths, strict=True)])


def settle(layer: Any) -> None:
    """Have FSDP2 put its own part of each parameter back into a layer, where a forward pass has left gathered ones.

    What is written to gathered parameters is lost. FSDP2 puts its own back before a state is read.
    """
    if getattr(layer, "_is_fsdp_managed_module", False) and not all(map(is_sharded, layer.parameters(recurse=False))):
        layer.state_dict()
