"""The PyTorch layers that several processes share, as the conformance suite sees them: DDP, FSDP2 and tensor parallelism.

See :class:`maskedlinear.backends.DistributedLayer`. What a process holds is read from its own tensors, so that a mask that
FSDP or a plan has not cut shows as whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn

from maskedlinear.backends import Shard
from maskedlinear.pattern import SparsityPattern
from maskedlinear_torch import (
    SparseColwiseParallel,
    SparseLinear,
    SparseRowwiseParallel,
    freeze_masked,
    load_patterns,
    prune_model,
    set_masks,
)
from maskedlinear_torch._conformance_layers import as_numpy, made
from maskedlinear_torch._dtensors import is_sharded

__all__ = ["PLACEMENTS", "DistributedSparseTorchLayer", "DistributedTorchLayer", "distributed_layer", "join"]

Shards = list[Shard]

PLACEMENTS = ("batch: DDP", "batch and weights: FSDP2", "outputs: ColwiseParallel", "inputs: RowwiseParallel")


def join(rank: int, size: int, folder: Path) -> None:
    """Make this process one of a gloo group, once."""
    if not distributed.is_initialized():
        torch.set_num_threads(1)
        distributed.init_process_group("gloo", init_method=f"file://{folder}/gloo", rank=rank, world_size=size)


class DistributedTorchLayer:
    """A ``MaskedLinear`` or a ``SparseLinear`` in a model, as users have it, that all processes share."""

    optimizers: Sequence[str] = ("sgd with momentum", "adamw")
    checkpoints: Sequence[str] = ("DCP", "state of the first rank")

    def __init__(self, placement: str, weight: Tensor, mask: Tensor | SparsityPattern, bias: Tensor | None) -> None:
        self.shape = tuple(weight.shape)
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self.division, _, self.way = placement.partition(": ")
        self.inner: Any = nn.Sequential(made(weight, mask, bias).module)
        self.model: Any = self._shared(self.inner)

    def _shared(self, model: nn.Module) -> nn.Module:
        if self.way == "DDP":
            return nn.parallel.DistributedDataParallel(model)
        from torch.distributed.device_mesh import init_device_mesh

        self.mesh = mesh = init_device_mesh("cpu", (self.size,))
        if self.way == "FSDP2":
            from torch.distributed.fsdp import fully_shard

            fully_shard(model, mesh=mesh)
            return model
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        styles: Sequence[Any] = (ColwiseParallel, RowwiseParallel)
        if isinstance(model[0], SparseLinear):  # type: ignore[index]
            styles = SparseColwiseParallel, SparseRowwiseParallel
        return parallelize_module(model, mesh, {"0": styles[self.way == "RowwiseParallel"]()})

    @property
    def layer(self) -> Any:
        """The layer itself."""
        return self.inner[0]

    # Which part of x, y and g is this process'

    def _rows(self, length: int) -> slice:
        if not self.division.startswith("batch"):
            return slice(0, length)
        return slice(length * self.rank // self.size, length * (self.rank + 1) // self.size)

    def _columns(self, length: int, of: str) -> slice:
        """Return which inputs or outputs come in and go out, as a plan has them: cut as ``torch.chunk`` cuts."""
        if self.division != of:
            return slice(0, length)
        step = -(-length // self.size)
        return slice(min(length, step * self.rank), min(length, step * (self.rank + 1)))

    def _part(self, whole: Tensor, of: str) -> Tensor:
        return whole[self._rows(len(whole)), self._columns(whole.shape[-1], of)]

    def _shard(self, part: Tensor, shape: tuple[int, ...], of: str) -> Shards:
        values, held = np.zeros(shape), np.zeros(shape, bool)
        where = self._rows(shape[0]), self._columns(shape[1], of)
        values[where], held[where] = as_numpy(_local(part)), True
        return [Shard(values, held)]

    def _call(self, part: Tensor, inputs: int) -> Tensor:
        """Return y of a part of x; of inputs that processes have not the same number of, torch wants to be told how many."""
        if self.way == "RowwiseParallel" and not isinstance(self.layer, SparseLinear):
            from torch.distributed.tensor import DTensor
            from torch.distributed.tensor import Shard as Cut

            shape = torch.Size((len(part), inputs))
            part = DTensor.from_local(part, self.mesh, [Cut(1)], run_check=False, shape=shape, stride=(inputs, 1))
        return self.model(part)  # type: ignore[no-any-return]

    # The protocol

    def value(self, x: Tensor) -> Shards:
        """Return ``y`` without gradients."""
        with torch.no_grad():
            y = self._call(self._part(x, "inputs"), x.shape[-1])
        return self._shard(y, (len(x), self.shape[0]), "outputs")

    def gradients(self, x: Tensor, g: Tensor) -> tuple[Shards, Shards, Shards | None]:
        """Return what ``backward`` leaves in ``.grad``."""
        part = self._part(x, "inputs").detach().clone().requires_grad_()
        self.model.zero_grad()
        self._backward(part, g)
        assert part.grad is not None
        # Each process' loss is as many times its share of the sum, so that their mean is the sum.
        along_x = part.grad / (self.size if self.division.startswith("batch") else 1)
        bias = self.layer.bias
        return (
            self._shard(along_x, tuple(x.shape), "inputs"),
            [self._of_weight(self._weight.grad)],
            None if bias is None else [held_of(bias.grad)],
        )

    def _backward(self, part: Tensor, g: Tensor) -> None:
        along = self._part(g, "outputs")
        self._call(part, self.shape[1]).backward(along * (self.size if self.division.startswith("batch") else 1))

    @property
    def _weight(self) -> Any:
        return self.layer.weight

    def _of_weight(self, tensor: Any) -> Shard:
        """Return what is here of what has the weight parameter's shape, ``(out, in)``."""
        return held_of(tensor)

    def state(self) -> tuple[Shards, Shards, Shards | None]:
        """Return the tensors of the layer as they lie here, without the copy that FSDP2 has left of the last pass."""
        if self.way == "FSDP2":
            self.model.reshard()
        weight, mask = held_of(self.layer.weight), held_of(self.layer.mask)
        dormant = self.layer.dormant
        if dormant is not None:
            kept = held_of(dormant)
            there = weight.held & mask.held & kept.held
            weight = Shard(np.where(there & ~mask.values, kept.values, weight.values), weight.held)
        bias = self.layer.bias
        return [weight], [mask], None if bias is None else [held_of(bias)]

    def visible_weight(self) -> Shards:
        """Return the parameter as it stands."""
        return [held_of(self.layer.weight)]

    def export(self) -> tuple[NDArray[Any], NDArray[Any]] | None:
        """Return what the whole state dict of the model has, on the first process."""
        state = self._whole_state()
        return (as_numpy(state["0.weight"]), as_numpy(state["0.mask"])) if self.rank == 0 else None

    def _whole_state(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        return get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def set_mask(self, mask: NDArray[Any]) -> None:
        """Call ``set_masks`` of the model that is shared."""
        set_masks(self.model, {next(iter(self._names())): mask})

    def _names(self) -> Sequence[str]:
        return ["module.0" if self.way == "DDP" else "0"]

    def prune(self, sparsity: float) -> None:
        """Call ``prune_model`` of the model that is shared."""
        prune_model(self.model, sparsity)

    def train(self, optimizer: str, x: Tensor, g: Tensor, steps: int) -> None:
        """Take steps of SGD with momentum and weight decay, or of AdamW."""
        parameters = self.model.parameters()
        chosen: torch.optim.Optimizer = (
            torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)
            if optimizer == "sgd with momentum"
            else torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)
        )
        self._guard(chosen)
        for _ in range(steps):
            chosen.zero_grad()
            self._backward(self._part(x, "inputs"), g)
            chosen.step()

    def _guard(self, optimizer: torch.optim.Optimizer) -> None:
        freeze_masked(optimizer, self.model)

    def save(self, way: str, path: Path) -> None:
        """Save the sharded state with DCP, or the whole one by the first process."""
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        if way == "DCP":
            _dcp().save({"model": get_model_state_dict(self.model)}, checkpoint_id=path)
            return
        state = self._whole_state()
        if self.rank == 0:
            torch.save(state, path / "state.pt")
        distributed.barrier()

    def load(self, way: str, path: Path) -> None:
        """Load it into what is here, or send what the first process loads."""
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_model_state_dict,
            set_model_state_dict,
        )

        if way == "DCP":
            state: dict[str, Any] = {"model": get_model_state_dict(self.model)}
            _dcp().load(state, checkpoint_id=path)
            set_model_state_dict(self.model, state["model"])
            return
        whole = torch.load(path / "state.pt") if self.rank == 0 else {}
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=self.size > 1)
        set_model_state_dict(self.model, whole, options=options)


class DistributedSparseTorchLayer(DistributedTorchLayer):
    """A ``SparseLinear`` in a model that all processes share."""

    checkpoints: Sequence[str] = ("DCP",)  # a state that the first rank sends has no other connections than all have

    def __init__(self, placement: str, weight: Tensor, mask: Tensor | SparsityPattern, bias: Tensor | None) -> None:
        super().__init__(placement, weight, mask, bias)
        self._begun_with = weight, mask, bias

    def load(self, way: str, path: Path) -> None:
        """Begin with a model that has the checkpoint's connections before it is shared, and load the sharded state."""
        self.inner = nn.Sequential(made(*self._begun_with).module)
        load_patterns(self.inner, path)
        self.model = self._shared(self.inner)
        super().load(way, path)

    @property
    def _weight(self) -> Any:
        return self.layer.weight_values

    def _of_weight(self, tensor: Any) -> Shard:
        """Return what is here of one value a connection, and +0 where there is none, which all hold."""
        values, pattern, slots = held_of(tensor), self._pattern(), slice(None)
        if self.layer._cut is not None:  # a row a process
            slots = self.layer._cut.slots
        matrix, held = np.zeros(self.shape), ~pattern.to_mask()
        for whole, part in ((matrix, values.values), (held, values.held)):
            whole[pattern.rows, pattern.indices] = part.reshape(-1)[slots]
        return Shard(matrix, held)

    def _pattern(self) -> SparsityPattern:
        pattern: SparsityPattern = self.layer.pattern
        return pattern

    def state(self) -> tuple[Shards, Shards, Shards | None]:
        """Return the values as they lie here, and the connections."""
        mask, bias = self._pattern().to_mask(), self.layer.bias
        connections = Shard(mask, np.ones_like(mask))
        return [self._of_weight(self._weight)], [connections], None if bias is None else [held_of(bias)]

    def visible_weight(self) -> Shards:
        """Return the values as they lie here, as a matrix."""
        return [self._of_weight(self._weight)]

    def _guard(self, optimizer: torch.optim.Optimizer) -> None:
        pass  # there is nothing that is masked


def _dcp() -> Any:
    from torch.distributed import checkpoint

    return checkpoint


def held_of(tensor: Any) -> Shard:
    """Return what this process holds of a tensor: of a DTensor its own part, of another one all."""
    if not is_sharded(tensor):
        return Shard(as_numpy(tensor), np.ones(tuple(tensor.shape), bool))
    from torch.distributed.tensor import distribute_tensor

    # Where its entries are: the numbers of all, cut as it is.
    numbers = torch.arange(tensor.numel()).reshape(tensor.shape)
    places = distribute_tensor(numbers, tensor.device_mesh, tensor.placements).to_local().flatten().numpy()
    values = np.zeros(tensor.numel(), bool if tensor.dtype is torch.bool else np.float64)
    held = np.zeros(tensor.numel(), bool)
    values[places], held[places] = as_numpy(_local(tensor)).ravel(), True
    return Shard(values.reshape(tensor.shape), held.reshape(tensor.shape))


def _local(tensor: Any) -> Tensor:
    local: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return local


def distributed_layer(
    placement: str, weight: Tensor, mask: Tensor | SparsityPattern, bias: Tensor | None
) -> DistributedTorchLayer:
    """Return the layer of a mask or of a pattern."""
    kind = DistributedSparseTorchLayer if isinstance(mask, SparsityPattern) else DistributedTorchLayer
    return kind(placement, weight, mask, bias)
