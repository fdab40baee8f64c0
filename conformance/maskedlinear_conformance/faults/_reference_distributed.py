"""``ReferenceShared``: a layer that processes or devices share, in plain NumPy, made of small steps for mutants to replace.

Processes exchange arrays by files in the folder that they share. Devices are those of one process, which does the work of
one after the other.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maskedlinear import pruning
from maskedlinear.backends import DIVISIONS, Shard

__all__ = ["PLACEMENTS", "Ranks", "ReferenceShared"]

PLACEMENTS = tuple(f"{division}: reference" for division in DIVISIONS)

Array = Any
Parts = dict[int, Array]
"""What each rank of this process has."""


class Ranks:
    """Which ranks there are, which of them are in this process, and what all have."""

    def __init__(self, name: str, rank: int, size: int, devices: int, folder: Path) -> None:
        self.count = size * devices
        self.here = range(rank * devices, (rank + 1) * devices)
        self._size, self._rank, self._folder, self._name, self._exchanges = size, rank, folder, name, 0

    def all_of(self, parts: Parts) -> Parts:
        """Return what every rank has."""
        if self._size == 1:
            return parts
        self._exchanges += 1
        names = [self._folder / f"{self._name} {self._exchanges} {rank}" for rank in range(self._size)]
        written = names[self._rank].with_suffix(".part")
        written.write_bytes(pickle.dumps(parts))
        written.rename(names[self._rank])
        found: Parts = {}
        for name in names:
            while not name.exists():
                time.sleep(0.001)
            found |= pickle.loads(name.read_bytes())
        return found

    def share(self, length: int, rank: int) -> slice:
        """Return which of so many a rank has."""
        ends = [length * number // self.count for number in range(self.count + 1)]
        return slice(ends[rank], ends[rank + 1])


class ReferenceShared:
    """A layer of which each rank keeps its cells of the weight, of the mask and of what is dormant, and the whole bias."""

    optimizers: Sequence[str] = ("momentum and decay",)
    checkpoints: Sequence[str] = ("files",)

    def __init__(self, backend: Any, placement: str, weight: Array, mask: Array, bias: Array | None) -> None:
        self.backend, self.ranks = backend, backend.ranks
        self.division = placement.partition(":")[0]
        self.shape, self.dtype = weight.shape, weight.dtype
        self.bias = bias
        self.full: Parts = {rank: np.where(self.cells(rank), weight, 0) for rank in self.ranks.here}
        self.masks: Parts = {rank: mask & self.cells(rank) for rank in self.ranks.here}

    # Who has what

    def rows(self, rank: int, length: int) -> slice:
        """Return which rows of a batch a rank computes."""
        return self.ranks.share(length, rank) if self.division.startswith("batch") else slice(0, length)

    def cells(self, rank: int) -> Array:
        """Return which entries of the weight a rank keeps."""
        held = np.zeros(self.shape, bool)
        out, in_ = slice(None), slice(None)
        if self.division in ("batch and weights", "outputs"):
            out = self.ranks.share(self.shape[0], rank)
        elif self.division == "inputs":
            in_ = self.ranks.share(self.shape[1], rank)
        held[out, in_] = True
        return held

    def mask_cells(self, rank: int) -> Array:
        """Return which entries of the mask a rank keeps."""
        return self.cells(rank)

    def shards(self, parts: Parts, held: Callable[[int], Array]) -> list[Shard]:
        """Return arrays of ranks with what of them is theirs."""
        to_numpy = self.backend.asnumpy
        return [Shard(to_numpy(parts[rank]), held(rank)) for rank in self.ranks.here]

    # The steps

    def summed(self, parts: Parts) -> Parts:
        """Return the sum over all ranks, on each."""
        every = self.ranks.all_of(parts)
        total: Array = np.sum(np.stack([every[rank] for rank in sorted(every)]), axis=0)
        return dict.fromkeys(self.ranks.here, total.astype(self.dtype))

    def shown(self, rank: int) -> Array:
        """Return what a rank keeps of the weight as it stands."""
        return np.where(self.masks[rank], self.full[rank], 0).astype(self.dtype)

    def acting_masks(self) -> Parts:
        """Return the masks by which each rank computes."""
        return self.masks

    def acting(self) -> Parts:
        """Return the weight with which each rank computes."""
        masks = self.acting_masks()
        own = {rank: np.where(masks[rank], self.full[rank], 0).astype(self.dtype) for rank in self.ranks.here}
        return self.summed(own) if self.division == "batch and weights" else own

    def averaged(self, parts: Parts) -> Parts:
        """Return gradients as training leaves them: of the whole batch, on each rank what it keeps."""
        return self.summed(parts) if self.division.startswith("batch") else parts

    def agreed(self, rank: int, mask: Array) -> Array:
        """Return what a rank takes for the mask that all have decided on."""
        return mask

    def guarded(self, rank: int, moved: Array) -> Array:
        """Return what an updated weight becomes under ``freeze_masked``."""
        kept: Array = np.where(self.masks[rank], moved, self.full[rank])
        return kept.astype(self.dtype)

    def reads(self, rank: int, weight: Array, mask: Array) -> tuple[Array, Array]:
        """Return what a rank takes from a checkpoint."""
        return weight, mask

    # The protocol

    def value(self, x: Array) -> list[Shard]:
        """Return y."""
        weights, y, held = self.acting(), {}, {}
        for rank in self.ranks.here:
            rows = self.rows(rank, len(x))
            y[rank] = np.zeros((len(x), self.shape[0]), self.dtype)
            y[rank][rows] = x[rows] @ weights[rank].T
            held[rank] = np.zeros(y[rank].shape, bool)
            held[rank][rows] = self.cells(rank).any(1) if self.division == "outputs" else True
        if self.division == "inputs":
            y = self.summed(y)
        return self.shards({rank: self.with_bias(part) for rank, part in y.items()}, held.__getitem__)

    def with_bias(self, y: Array) -> Array:
        """Return y with the bias."""
        return y if self.bias is None else (y + self.bias).astype(self.dtype)

    def gradients(self, x: Array, g: Array) -> tuple[list[Shard], list[Shard], list[Shard] | None]:
        """Return dx, dW and db."""
        weights, masks = self.acting(), self.acting_masks()
        dx, dw, db, held = {}, {}, {}, {}
        for rank in self.ranks.here:
            rows = self.rows(rank, len(x))
            dx[rank], held[rank] = np.zeros(x.shape, self.dtype), np.zeros(x.shape, bool)
            dx[rank][rows] = g[rows] @ weights[rank]
            held[rank][rows] = self.cells(rank).any(0) if self.division == "inputs" else True
            dw[rank] = g[rows].T @ x[rows]
            db[rank] = g[rows].sum(0, dtype=self.dtype)
        dw = self.averaged(dw)
        dw = {rank: np.where(masks[rank], dw[rank], 0).astype(self.dtype) for rank in dw}
        if self.division == "outputs":
            dx = self.summed(dx)
        along_bias = None
        if self.bias is not None:
            along_bias = self.shards(self.averaged(db), lambda _: np.ones(self.shape[0], bool))
        return self.shards(dx, held.__getitem__), self.shards(dw, self.cells), along_bias

    def state(self) -> tuple[list[Shard], list[Shard], list[Shard] | None]:
        """Return weight, mask and bias."""
        bias = None
        if self.bias is not None:
            parts = dict.fromkeys(self.ranks.here, self.bias)
            bias = self.shards(parts, lambda _: np.ones(self.shape[0], bool))
        return self.shards(self.full, self.cells), self.shards(self.masks, self.mask_cells), bias

    def visible_weight(self) -> list[Shard]:
        """Return the weight as it stands."""
        return self.shards({rank: self.shown(rank) for rank in self.ranks.here}, self.cells)

    def export(self) -> tuple[Array, Array] | None:
        """Return the whole weight and mask, from the first rank."""
        shown, masks = (
            self.put_together(parts) for parts in ({rank: self.shown(rank) for rank in self.ranks.here}, self.masks)
        )
        return (self.backend.asnumpy(shown), masks) if 0 in self.ranks.here else None

    def put_together(self, parts: Parts) -> Array:
        """Return the whole of what all ranks keep cells of."""
        every = self.ranks.all_of(parts)
        whole = np.zeros(self.shape, every[0].dtype)
        for rank in sorted(every, reverse=True):
            whole[self.cells(rank)] = every[rank][self.cells(rank)]
        return whole

    def set_mask(self, mask: Array) -> None:
        """Give each rank its cells of a mask."""
        self.masks = {rank: self.agreed(rank, mask) & self.mask_cells(rank) for rank in self.ranks.here}

    def prune(self, sparsity: float) -> None:
        """Mask what is smallest of all that all ranks have."""
        score = abs(self.put_together(self.full))
        mask = self.put_together(self.masks)
        zeros = int(sparsity * mask.size)
        self.set_mask(pruning.prune(np.where(mask, score, 0), num_zeros=zeros, masks=mask))

    def train(self, optimizer: str, x: Array, g: Array, steps: int) -> None:
        """Take steps with momentum and weight decay."""
        momentum = {rank: np.zeros(self.shape, self.dtype) for rank in self.ranks.here}
        for _ in range(steps):
            _, gradients, along_bias = self.gradients(x, g)
            for rank, shard in zip(self.ranks.here, gradients, strict=True):
                momentum[rank] = momentum[rank] * 0.5 + shard.values.astype(self.dtype) + 0.125 * self.full[rank]
                self.full[rank] = self.guarded(rank, self.full[rank] - 0.25 * momentum[rank])
            if self.bias is not None and along_bias is not None:
                self.bias = (self.bias - 0.25 * along_bias[0].values).astype(self.dtype)

    def save(self, way: str, path: Path) -> None:
        """Write the cells of each rank."""
        for rank in self.ranks.here:
            bias = {} if self.bias is None else {"bias": self.bias}
            held = self.cells(rank)
            np.savez(path / f"{rank}.npz", weight=self.full[rank], mask=self.masks[rank], held=held, **bias)

    def load(self, way: str, path: Path) -> None:
        """Read the cells of all, and take what is this rank's."""
        weight, mask = np.zeros(self.shape, self.dtype), np.zeros(self.shape, bool)
        for file in path.glob("*.npz"):
            with np.load(file) as parts:
                held = parts["held"]
                weight[held], mask[held] = parts["weight"][held], parts["mask"][held]
                self.bias = parts.get("bias")
        for rank in self.ranks.here:
            its_weight, its_mask = self.reads(rank, weight, mask)
            self.full[rank] = np.where(self.cells(rank), its_weight, 0).astype(self.dtype)
            self.masks[rank] = its_mask & self.cells(rank)

    def gathered(self, x: Array, g: Array) -> list[tuple[int, ...]]:
        """Return what is put together: the weight, where each rank keeps a part of it and computes with all."""
        return []
