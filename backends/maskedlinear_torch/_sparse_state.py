"""The connections in a sparse layer's state: written, and taken before its values are shared out and copied."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from maskedlinear.pattern import SparsityPattern
from maskedlinear_torch._compat import is_sending_state
from maskedlinear_torch._dtensors import as_dtensor_like, full_tensor, is_sharded
from maskedlinear_torch._products import DevicePattern
from maskedlinear_torch._sparse_shards import part_of, refuse_cut_twice, resize_and_copy

__all__ = ["load_pattern", "named_buffers", "pattern_of_state", "save_pattern", "shared_out_as", "take_pattern"]

_KEPT = ("indptr", "indices")  # the others are derived of them


def _kept(layer: Any) -> dict[str, Tensor]:
    """Return copies: distributed checkpoints are loaded into them, and copies of models may share the layer's own."""
    indices = DevicePattern.of(layer.pattern, layer.weight_values.device)
    return {name: getattr(indices, name).clone() for name in _KEPT}


def save_pattern(layer: Any, state: dict[str, Any], prefix: str) -> None:
    """Write a layer's connections to a state."""
    state.update({prefix + name: kept for name, kept in _kept(layer).items()})


def load_pattern(
    layer: Any, state: dict[str, Any], prefix: str, strict: bool, missing_keys: list[str], error_msgs: list[str]
) -> bool:
    """Take the connections out of a state, and into a layer; return whether there is nothing wrong with them.

    The other arguments are those of ``nn.Module._load_from_state_dict``. A state without connections leaves the layer its
    own.
    """
    keys = [prefix + name for name in _KEPT]
    if any(key in state for key in keys):
        try:
            indptr, indices = (state.pop(key, None) for key in keys)
            values = state.get(prefix + "weight_values", layer.weight_values)
            take_pattern(layer, pattern_of_state(layer, indptr, indices, values))
        except (ValueError, TypeError) as error:
            error_msgs.append(f"{prefix}indices: {error}")
            return False
    elif strict:
        missing_keys.extend(keys)
    return True


def named_buffers(layer: Any, buffers: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Add a layer's connections to its buffers if torch asks what it shall send to the other processes, or load into them.

    ``torch.distributed.checkpoint.state_dict`` knows parameters and buffers alone.
    """
    if not is_sending_state():
        return buffers
    return chain(buffers, _kept(layer).items())


def pattern_of_state(layer: Any, indptr: Any, indices: Any, values: Any) -> SparsityPattern:
    """Return the connections of a state, if the layer can take them; its own if the state is on the meta device.

    Raises:
        TypeError: if parts are missing.
        ValueError: if they are no pattern of the layer's shape, not as many as the values, or of another number than FSDP2
            has cut.
    """
    given = {"indptr": indptr, "indices": indices, "weight_values": values}
    if not all(isinstance(part, Tensor) for part in given.values()):
        kinds = ", ".join(f"{name}: {type(part).__name__}" for name, part in given.items())
        raise TypeError(
            f"a state must have both indptr and indices, tensors as the values are; got {kinds}: pass the state of a "
            "whole layer, or one without connections"
        )
    own: SparsityPattern = layer.pattern
    if indices.is_meta or indptr.is_meta:
        return own
    pattern = SparsityPattern(indptr.cpu().numpy(), indices.cpu().numpy(), layer.in_features)
    is_own_cut = layer._cut is not None and values is layer.weight_values  # the state has none
    if pattern.shape[0] != layer.out_features or (values.shape != indices.shape and not is_own_cut):
        raise ValueError(
            f"a state must have {layer.out_features} outputs, as the layer, and as many values as connections; got "
            f"{pattern.shape[0]} outputs, {tuple(values.shape)} values and {pattern.nnz} connections"
        )
    if pattern != own:
        refuse_cut_twice(layer)
    if pattern.nnz != own.nnz and layer._cut is None and is_sharded(layer.weight_values):
        raise ValueError(
            f"FSDP2 has cut the values of {own.nnz} connections, and cannot cut those of another number; got {pattern.nnz}: "
            "load the state, or (for a distributed checkpoint) maskedlinear.torch.load_patterns, before fully_shard"
        )
    return pattern


@torch.no_grad()
def take_pattern(layer: Any, pattern: SparsityPattern) -> None:
    """Give a layer other connections, whose values are to come: where their number changes, there are zeros until then."""
    values = layer.weight_values
    if pattern.nnz != layer.pattern.nnz or (layer._cut is not None and pattern != layer.pattern):
        zeros = torch.zeros(pattern.nnz, dtype=values.dtype, device=values.device)
        values.grad = None
        if layer._cut is None:
            values.data = zeros
        else:
            layer._cut = replace(layer._cut, pattern=pattern)
            resize_and_copy(values, lambda _: layer._cut.shared_out(zeros))
    layer._pattern = pattern
    layer._place()


@torch.no_grad()
def shared_out_as(values: Tensor, own: Tensor, layer: Any) -> Tensor:
    """Return what a state has for one of a layer's parameters that processes share, shared out as that is."""
    if layer._cut is not None and own is layer.weight_values:
        if values.shape != (layer.pattern.nnz,):
            return values  # which is an error
        return part_of(full_tensor(values).to(own.device), own, layer._cut)
    return values if is_sharded(values) or values.shape != own.shape else as_dtensor_like(values, own)
