"""Weights that are cut over processes, by FSDP2 or tensor parallelism, pruned and regrown where they are.

Which entries of a weight a process has is told to the core, which asks for sums over processes and for nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskedlinear.models import AddUp, Shard, ShardedWeight, WeightAxes, count_live, prune_shards, regrow_shards
from maskedlinear.pruning._layers import Scoring, check_known
from maskedlinear_torch._dtensors import as_dtensor_like, is_sharded, local_part, on_parts
from maskedlinear_torch._masked_weight import MaskedWeight
from maskedlinear_torch._ranks import Ranks, averaged, check_alike

__all__ = ["Place", "checked_masks", "count_nodes", "cut_like", "index_of", "new_masks", "places_of", "regrown_mask"]


class Place(NamedTuple):
    """Which entries of a weight a process has.

    Attributes:
        places: for each axis, which of its places, shape ``(n,)``.
        key: the same for processes that have the same entries.
        counts: whether this process is the one of them that counts these.
    """

    places: tuple[NDArray[np.int64], ...]
    key: str
    counts: bool


def places_of(weights: Mapping[str, Tensor], ranks: Ranks | None) -> dict[str, Place]:
    """Return which entries of weights this process has, by name; every process asks.

    Raises:
        ValueError: if processes do not have all entries of a weight between them, or have some of them twice.
    """
    index = {name: index_of(weight) for name, weight in weights.items()}
    own = {name: (_key(of_weight), [len(axis) for axis in of_weight]) for name, of_weight in index.items()}
    every = {0: own} if ranks is None else ranks.gather(own)
    rank = 0 if ranks is None else torch.distributed.get_rank()
    if any(list(other) != list(own) for other in every.values()):
        raise ValueError(f"processes must have the same masked weights; this one has {list(own)}")
    places = {}
    for name, weight in weights.items():
        sizes = dict(other[name] for other in every.values())
        if sum(int(np.prod(size)) for size in sizes.values()) != weight.numel():
            raise ValueError(
                f"processes must have each entry of a weight in one part; got parts of {list(sizes.values())} of "
                f"{name or 'the weight'}, which has shape {tuple(weight.shape)}: unevenly nested cuts are not known"
            )
        leader = min(other for other, parts in every.items() if parts[name][0] == own[name][0])
        places[name] = Place(index[name], own[name][0], rank == leader)
    return places


def _key(index: Sequence[NDArray[np.int64]]) -> str:
    return hashlib.blake2b(b"|".join(axis.tobytes() for axis in index), digest_size=16).hexdigest()


def index_of(weight: Tensor) -> tuple[NDArray[np.int64], ...]:
    """Return for each axis of a weight which of its places this process has: numbers are cut as the axis is."""
    if not is_sharded(weight):
        return tuple(np.arange(size) for size in weight.shape)
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = weight.device_mesh, weight.placements  # type: ignore[attr-defined]
    found = []
    for axis, size in enumerate(weight.shape):
        cuts = [own if getattr(own, "dim", None) == axis else Replicate() for own in placements]
        numbers = torch.arange(size, device=local_part(weight).device)
        numbers = numbers.view([size if other == axis else 1 for other in range(weight.dim())])
        whole = DTensor.from_local(numbers, mesh, [Replicate()] * mesh.ndim, run_check=False)
        found.append(local_part(whole.redistribute(placements=cuts)).reshape(-1).cpu().numpy())
    return tuple(found)


def cut_like(array: Any, weight: Tensor) -> Tensor:
    """Return this process' part of an array of a weight's shape: of a whole one, or one that is cut in whatever way."""
    tensor = array.detach() if isinstance(array, Tensor) else torch.as_tensor(np.asarray(array))
    return local_part(as_dtensor_like(tensor, weight))


def count_nodes(
    mask: MaskedWeight, axes: WeightAxes | None, place: Place, ranks: Ranks | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return how many live connections the outputs and the inputs of a weight have, as :func:`count_live` does."""
    shard = Shard(place.places, cut_like(mask.known_mask, mask.weight).cpu().numpy(), counts=place.counts)
    return count_live(ShardedWeight(axes, tuple(mask.weight.shape), [shard]), add_up=_add_up(ranks))


def new_masks(
    weights: Mapping[str, tuple[MaskedWeight, WeightAxes | None]],
    places: Mapping[str, Place],
    ranks: Ranks | None,
    sparsity: float,
    *,
    score: Scoring,
    **how: Any,
) -> dict[str, Tensor]:
    """Return the masks of weights, pruned further, each cut as its weight is; as :func:`prune_weights` makes whole ones.

    A function that makes scores is called with weights and gradients as they are, cut: operations of torch on them are
    those of the whole.

    Raises:
        ValueError: as by :func:`prune_weights`; or if the masks of replicas differ.
    """
    by_name = isinstance(score, Mapping)
    if by_name:
        check_known("scores", score, list(weights))  # type: ignore[arg-type]
        check_known("scores, which each layer must have,", weights, list(score))  # type: ignore[arg-type]
    sharded = {}
    for name, (layer, axes) in weights.items():
        weight, gradient, scores = layer.weight.detach(), None, None
        if layer.weight.grad is not None and (callable(score) or score in ("snip", "taylor")):
            gradient = as_dtensor_like(layer.weight.grad.detach(), weight)
            if not is_sharded(weight) and ranks is not None:  # of a copy in each process, of its own batch
                gradient = averaged(gradient, ranks)
        if callable(score) or by_name:
            made: Any = score(weight, gradient) if callable(score) else score[name]  # type: ignore[index]
            if tuple(made.shape) != tuple(weight.shape):
                raise ValueError(
                    f"scores must have their weight's shape (out, in) = {tuple(weight.shape)}; got {tuple(made.shape)} of "
                    f"{name or 'the layer'}"
                )
            scores = _numbers(cut_like(made, weight))
        shard = Shard(
            places[name].places,
            cut_like(layer.mask, weight).cpu().numpy(),
            _numbers(local_part(weight)),
            None if gradient is None else _numbers(local_part(gradient)),
            scores,
            places[name].counts,
        )
        sharded[name] = ShardedWeight(axes, tuple(weight.shape), [shard], _dtype(weight if scores is None else scores))
    pruned = prune_shards(
        sharded,
        sparsity,
        add_up=_add_up(ranks),
        score=None if callable(score) or by_name else score,  # type: ignore[arg-type]
        **how,
    )
    return checked_masks({name: (layer.weight, pruned[name][0]) for name, (layer, _) in weights.items()}, places, ranks)


def regrown_mask(
    layer: MaskedWeight,
    axes: WeightAxes | None,
    place: Place,
    ranks: Ranks | None,
    fraction: float,
    gradient: Tensor | None,
    seed: int,
    exclude_dropped: bool,
) -> tuple[NDArray[np.bool_], int]:
    """Return this process' part of a weight's mask, some of whose connections have moved, and the number of matrices.

    Args:
        layer: whose weight it is.
        axes: of the weight.
        place: which part this process has.
        ranks: the processes.
        fraction: of the connections, that move.
        gradient: this part of the gradient to grow by; ``None`` grows at random.
        seed: of the random places.
        exclude_dropped: as :func:`maskedlinear.pruning.regrow` takes it.
    """
    weight = layer.weight.detach()
    numbers = _numbers(local_part(weight))
    own = None if gradient is None else _numbers(gradient)
    shard = Shard(place.places, cut_like(layer.mask, weight).cpu().numpy(), numbers, own, None, place.counts)
    found, number = regrow_shards(
        ShardedWeight(axes, tuple(weight.shape), [shard], _dtype(weight)),
        fraction,
        add_up=_add_up(ranks),
        by_gradient=gradient is not None,
        seed=seed,
        exclude_dropped=exclude_dropped,
    )
    return found[0], number


def checked_masks(
    masks: Mapping[str, tuple[Tensor, NDArray[np.bool_]]], places: Mapping[str, Place], ranks: Ranks | None
) -> dict[str, Tensor]:
    """Return parts of masks as masks that are cut as their weights are, compared among replicas.

    Raises:
        ValueError: if replicas have others.
    """
    if ranks is not None:
        keys = {name: place.key for name, place in places.items()}
        check_alike("the new mask", {name: mask for name, (_, mask) in masks.items()}, ranks, keys)
    tensors = {name: torch.from_numpy(np.ascontiguousarray(part)) for name, (_, part) in masks.items()}
    return {
        name: on_parts(lambda part, mask=tensors[name]: mask.to(part.device), weight.detach())
        for name, (weight, _) in masks.items()
    }


def _add_up(ranks: Ranks | None) -> AddUp:
    return (lambda numbers: numbers) if ranks is None else ranks.add_up


def _numbers(part: Tensor) -> Any:
    """Return numbers as NumPy's where they are that already; else as they are, of which a block at a time is made so."""
    part = part.detach()
    return part.numpy() if part.is_cpu and part.dtype in (torch.float32, torch.float64) else part


def _dtype(numbers: Any) -> np.dtype[Any]:
    """Return the dtype that the core reads numbers in."""
    if isinstance(numbers, np.ndarray):
        own: np.dtype[Any] = numbers.dtype
        return own
    wide = {torch.float64: "float64", torch.int64: "int64", torch.int32: "int32"}
    return np.dtype(wide.get(numbers.dtype, "float32"))
