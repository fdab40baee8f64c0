"""Distributed checkpoints (``torch.distributed.checkpoint``, DCP) of models with sparse layers.

DCP loads into tensors that are there, and resizes none. The connections of a sparse layer come with a state, and their
number with them: so a model is given those of a checkpoint before DCP loads it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from maskedlinear.models import first_names
from maskedlinear_torch._sparse_layer import SparseLinear
from maskedlinear_torch._sparse_shards import settle
from maskedlinear_torch._sparse_state import pattern_of_state, take_pattern
from maskedlinear_torch._weights import walk_masked

__all__ = ["atomic_writer", "load_patterns"]

_WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def atomic_writer(path: str | os.PathLike[str], **options: Any) -> Any:
    """Return a DCP writer for a folder that has the old checkpoint or the new one, whenever processes are killed.

        dcp.save(state, storage_writer=atomic_writer("checkpoint"))
        dcp.load(state, checkpoint_id="checkpoint")

    torch's own writes ``.metadata``, without which there is no checkpoint, last: in a new folder it leaves a whole one or
    none. In the folder of an earlier checkpoint, it overwrites that one's files first. This one writes beside them, has
    ``.metadata`` exchanged in one step by the process that coordinates, and removes the earlier files only then; those of
    a save that was killed are removed by the next. Nobody else may save into the folder at the same time.

    Args:
        path: a folder, new or with a checkpoint, on a file system whose renames are atomic.
        options: of ``torch.distributed.checkpoint.FileSystemWriter``.
    """
    from maskedlinear_torch._dcp_writer import AtomicFileSystemWriter

    return AtomicFileSystemWriter(path, **options)


def load_patterns(
    model: nn.Module,
    checkpoint_id: str | os.PathLike[str] | None = None,
    *,
    storage_reader: Any = None,
    prefix: str | None = None,
) -> nn.Module:
    """Give the sparse layers of a model the connections of a distributed checkpoint, in place; return the model.

    DCP cannot load a layer of which the checkpoint has more or fewer connections: ``Size mismatch between saved ...
    weight_values``. This comes first, before the model is wrapped and the optimizer made::

        load_patterns(model, "checkpoint")
        fully_shard(model)  # or parallelize_module, or DistributedDataParallel, or nothing
        state = {"model": model.state_dict()}
        dcp.load(state, checkpoint_id="checkpoint")
        model.load_state_dict(state["model"])

    The values of layers whose connections change are 0 until a state is loaded. Layers that tensor parallelism shares out
    take any connections too; those that FSDP2 has cut, as many as they have. All processes call it; each reads the
    connections, and no values.

    Args:
        model: any module; layers in the dense form take their masks from the state, and are left alone.
        checkpoint_id: of the checkpoint, as in ``torch.distributed.checkpoint.load``.
        storage_reader: in place of ``checkpoint_id``, or with it.
        prefix: what the checkpoint's names have before the model's, as ``"model."``; found out if ``None``.

    Raises:
        ValueError: if the checkpoint lacks a layer's connections, or has them under several prefixes; if they have another
            shape, or the layer has been cut by FSDP2 and they are of another number. The model is left as it was.
        TypeError: if ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_patterns takes a torch.nn.Module; got {type(model).__name__}")
    layers = {_bare(name): layer for name, layer in walk_masked(model) if isinstance(layer, SparseLinear)}
    if not layers:
        return model
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    if storage_reader is None:
        if checkpoint_id is None:
            raise ValueError("load_patterns reads a checkpoint; got none: pass its checkpoint_id, or a storage_reader")
        storage_reader = FileSystemReader(checkpoint_id)
    elif checkpoint_id is not None:
        storage_reader.reset(checkpoint_id)
    saved = storage_reader.read_metadata().state_dict_metadata
    start = _prefix(layers, saved) if prefix is None else prefix
    keys = {name: (f"{start}{_joined(name)}indptr", f"{start}{_joined(name)}indices") for name in layers}
    lacking = [name for name, pair in keys.items() if not all(key in saved for key in pair)]
    if lacking:
        raise ValueError(_why_lacking(lacking, start, saved))
    into = {key: torch.empty(saved[key].size, dtype=torch.int32) for pair in keys.values() for key in pair}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load(into, storage_reader=storage_reader)
    patterns = {}
    for name, layer in layers.items():  # all are checked before one is changed
        indptr, indices = (into[key] for key in keys[name])
        settle(layer)
        patterns[name] = pattern_of_state(layer, indptr, indices, indices)
    for name, layer in layers.items():
        if patterns[name] != layer.pattern:
            take_pattern(layer, patterns[name])
            with torch.no_grad():
                layer.weight_values.zero_()
    return model


def _bare(name: str) -> str:
    """Return a layer's name without those of wrappers."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _joined(name: str) -> str:
    return f"{name}." if name else ""


def _prefix(layers: dict[str, SparseLinear], saved: dict[str, Any]) -> str:
    """Return what a checkpoint has before the names of all layers that it has."""

    def candidates(name: str) -> Iterator[str]:
        for key in saved:
            start = key.removesuffix(f"{_joined(name)}indptr")
            if start != key and (not start or start.endswith(".")):
                yield start

    counts: dict[str, int] = {}
    for name in layers:
        for start in set(candidates(name)):
            counts[start] = counts.get(start, 0) + 1
    best = [start for start, count in counts.items() if count == max(counts.values())]
    if len(best) > 1:
        raise ValueError(
            f"the checkpoint has connections under several prefixes: {first_names(best)}: say which with prefix=..."
        )
    return best[0] if best else ""


def _why_lacking(lacking: list[str], start: str, saved: dict[str, Any]) -> str:
    dense = [name for name in lacking if any(key.endswith(f"{start}{_joined(name)}mask") for key in saved)]
    remedy = (
        "it has them in the dense form: expand(model), and compress it after loading"
        if dense
        else "pass prefix=..., what its names have before the model's"
    )
    return f"the checkpoint has no connections, indptr and indices, of {first_names(lacking)}: {remedy}"
