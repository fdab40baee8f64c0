"""Dynamic sparse training: connections of a model move while it trains, on both forms of the layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from maskedlinear import pruning
from maskedlinear._arrays import as_numpy
from maskedlinear.models import WeightAxes, refuse_fixed, refuse_shared, regrow_weight
from maskedlinear.pruning._layers import Include, layer_seed, matches
from maskedlinear_torch._constraints import fixed_entries, refuse_fixed_and_cut
from maskedlinear_torch._dtensors import as_dtensor_like, full_tensor, is_sharded, local_part, on_parts
from maskedlinear_torch._functional import flatten_batch
from maskedlinear_torch._layer import MaskedLinear
from maskedlinear_torch._masked_weight import MaskedWeight
from maskedlinear_torch._modules import parameter_users
from maskedlinear_torch._optim import move_state, renew
from maskedlinear_torch._ranks import Group, Ranks, active_group, are_finite, averaged, check_alike, group_of
from maskedlinear_torch._sparse_layer import SparseLinear
from maskedlinear_torch._sparse_shards import moved, part_of, refuse_cut_twice, settle, whole_values
from maskedlinear_torch._together import checked_masks, cut_like, index_of, places_of, regrown_mask
from maskedlinear_torch._weight_mask import WeightMask
from maskedlinear_torch._weights import axes_of_mask, masked_weights, walk_masked

__all__ = ["DenseGradients", "dense_gradients", "regrow_model"]

Masked = MaskedWeight | SparseLinear

_BLOCK = 1 << 20  # entries of a gradient that are averaged at a time, where each process keeps its part


class DenseGradients:
    """The gradients of whole weights, masked entries included, of a backward pass.

    Of masked layers it holds what went in and out: row i of the gradient is ``g[:, i]ᵀ · x``, and :meth:`rows` makes some of
    them at a time. Of weights of other modules it holds the gradient.
    """

    def __init__(self) -> None:
        self.ranks: Ranks | None = None  # processes, each with its own batch
        self._pairs: dict[Masked, list[tuple[Tensor, Tensor]]] = {}
        self._whole: dict[WeightMask, NDArray[Any]] = {}
        self._parts: dict[WeightMask, Tensor] = {}

    def add(self, layer: Masked, x: Tensor, g: Tensor) -> None:
        """Take down x and the cotangent of y of one call of a layer."""
        pair = x.detach(), g.detach()
        if isinstance(layer, SparseLinear):
            pair = full_tensor(pair[0]), full_tensor(pair[1])
        self._pairs.setdefault(layer, []).append((flatten_batch(pair[0]), flatten_batch(pair[1])))

    def add_whole(self, mask: WeightMask, g: Tensor) -> None:
        """Take down the gradient of a weight, or add one up to what there was; of a weight that is cut over processes this
        part of what its gradient is so far, which is that of all batches."""
        if is_sharded(g):
            self._parts[mask] = local_part(as_dtensor_like(g.detach(), mask.weight)).clone()
            return
        axes = axes_of_mask(mask) or WeightAxes.of_entries(g.dim())
        matrices = axes.matrices(as_numpy(g.detach()))
        self._whole[mask] = self._whole.get(mask, 0) + np.array(matrices)

    def are_finite(self, model: nn.Module, group: Group) -> bool:
        """Whether all numbers are finite, in all processes: where a loss was scaled too much, none of them are of use."""
        _processes_of(model, group, self)
        pairs = [array for pairs in self._pairs.values() for pair in pairs for array in pair]
        others = [*map(torch.from_numpy, self._whole.values()), *self._parts.values()]
        return are_finite([*pairs, *others], self.ranks)

    def part(self, layer: MaskedWeight, index: Sequence[NDArray[np.int64]]) -> Tensor:
        """Return this process' part of the gradient of a weight that is cut over processes.

        Args:
            layer: whose weight it is.
            index: for each axis of the weight, which of its places this process has.

        Raises:
            ValueError: if the layer had no backward pass.
        """
        if isinstance(layer, WeightMask) and layer in self._parts:
            return self._parts[layer]
        if isinstance(layer, WeightMask) and layer in self._whole:
            axes = axes_of_mask(layer) or WeightAxes.of_entries(layer.weight.dim())
            whole = torch.from_numpy(axes.from_matrices(self._whole[layer], tuple(layer.weight.shape)).copy())
            return whole if self.ranks is None else averaged(whole, self.ranks)
        pairs = self._pairs_of(layer)
        rows, columns = (torch.from_numpy(places) for places in index)
        if any(is_sharded(tensor) for pair in pairs for tensor in pair):  # by tensor parallelism, whose sums these are
            product = _cut_as(_product(pairs), layer.weight)
            mean = local_part(product) if self.ranks is None else self.ranks.beyond(product).mean(local_part(product))
            has = [
                torch.searchsorted(torch.from_numpy(places), own)
                for places, own in zip(index_of(product), (rows, columns), strict=True)
            ]
            return mean[has[0].to(mean.device)][:, has[1].to(mean.device)]
        out, in_ = layer.weight.shape
        step, parts = max(1, _BLOCK // max(in_, 1)), []
        for start in range(0, out, step):
            block = self.rows(layer, start, min(start + step, out))
            own = rows[(rows >= start) & (rows < start + step)] - start
            parts.append(block[own.to(block.device)][:, columns.to(block.device)])
        return torch.cat(parts) if parts else torch.zeros(len(rows), len(columns))

    def of(self, layer: MaskedWeight) -> Tensor:
        """Return the gradient of a whole weight, of its own shape.

        Raises:
            ValueError: if the layer had no backward pass.
        """
        shape = tuple(layer.weight.shape)
        axes = axes_of_mask(layer) or WeightAxes.of_entries(len(shape))
        stacked, out, in_ = axes.matrix_shape(shape)
        rows = self.rows(layer, 0, stacked * out).detach().cpu().numpy()
        return torch.from_numpy(np.ascontiguousarray(axes.from_matrices(rows.reshape(stacked, out, in_), shape)))

    def rows(self, layer: Masked, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return the rows ``start`` to ``stop`` of the gradient of a weight, shape ``(stop - start, in)``; those of the
        matrices of a stack follow each other. They may be in ``out``, a matrix of as many rows or more, which was given.

        Raises:
            ValueError: if the layer had no backward pass.
        """
        part = self._own_rows(layer, start, stop, out)
        return part if self.ranks is None else averaged(part, self.ranks)

    def _own_rows(self, layer: Masked, start: int, stop: int, out: Tensor | None) -> Tensor:
        """Return these rows of the gradient of this process' batch."""
        if isinstance(layer, WeightMask) and layer in self._whole:
            matrices = self._whole[layer]
            return torch.from_numpy(matrices.reshape(-1, matrices.shape[2])[start:stop])
        return _product([(x, g[:, start:stop]) for x, g in self._pairs_of(layer)], out)

    def _pairs_of(self, layer: Masked) -> list[tuple[Tensor, Tensor]]:
        if layer not in self._pairs:
            raise ValueError(
                "growth by gradient needs a backward pass through each layer inside dense_gradients; there was none "
                f"through {layer}"
            )
        return self._pairs[layer]


def _product(pairs: Sequence[tuple[Tensor, Tensor]], out: Tensor | None = None) -> Tensor:
    """Return ``gᵀ · x``, summed over all calls of a layer; in ``out``, if it can be."""
    wide = torch.promote_types(pairs[0][0].dtype, torch.float32)
    if out is not None and len(pairs) == 1 and {t.dtype for t in (*pairs[0], out)} == {wide}:
        x, g = pairs[0]
        return torch.mm(g.mT, x, out=out[: g.shape[1]])
    parts = [g.mT.to(wide) @ x.to(wide) for x, g in pairs]
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


@contextmanager
def dense_gradients(model: nn.Module) -> Iterator[DenseGradients]:
    """Take down what :func:`regrow_model` grows by (RigL), in the forward and backward passes inside::

        with dense_gradients(model) as gradients:
            loss(model(x)).backward()
        regrow_model(model, 0.3, gradients=gradients, optimizer=optimizer)

    It holds each masked layer's input and the cotangent of its output, and no gradient of a weight's shape; of masked
    weights of other modules their gradients. Not inside ``torch.compile``. In a model in ``DistributedDataParallel`` or
    FSDP2 each process sees its own batch: connections grow by the mean of the gradients of all of them. Of weights of other
    modules that are cut over processes it holds each process' part of ``weight.grad``, as it stands after the backward pass:
    begin without gradients of earlier ones.

    Args:
        model: a module with masked layers of either form.
    """
    gradients = DenseGradients()

    def look(layer: Any, arguments: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        if output.requires_grad:
            x = arguments[0] if arguments else named["input"]
            gradients.ranks = gradients.ranks or active_group()
            output.register_hook(lambda g: gradients.add(layer, x, g))

    layers = [layer for layer in model.modules() if isinstance(layer, MaskedLinear | SparseLinear)]
    shared_out = [layer for layer in layers if isinstance(layer, SparseLinear) and layer._cut is not None]
    masks = [mask for mask in model.modules() if isinstance(mask, WeightMask)]
    hooked = [layer for layer in layers if layer not in shared_out]
    handles = [layer.register_forward_hook(look, with_kwargs=True, prepend=True) for layer in hooked]
    try:
        for layer in shared_out:  # what goes in and out of all processes' parts, which hooks do not see
            layer._look = look
        for mask in masks:
            mask.project()  # which renews the hook of a copy
            mask._own.record = partial(gradients.add_whole, mask)
        yield gradients
    finally:
        for mask in masks:
            mask._own.record = None
        for layer in shared_out:
            layer._look = None
        for handle in handles:
            handle.remove()


def regrow_model(
    model: nn.Module,
    fraction: float,
    *,
    gradients: DenseGradients | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    include: Include = None,
    seed: int = 0,
    exclude_dropped: bool = False,
    group: Group = "model",
) -> int:
    """Move a fraction of each masked layer's connections: the weakest are dropped, as many others come, with weight 0.

    What is dropped may come back at once, and then has not moved: it keeps its weight and the optimizer's state.

    Source: SET (at random) and RigL (by gradient); see :func:`maskedlinear.pruning.regrow`, whose places these are, the same
    on both forms of the layer. On the sparse form nothing of the weight's shape is made. Weights that FSDP2 or tensor
    parallelism has cut over processes move theirs where they are, to the places of one process with the whole; all of them
    call this. Where fewer than a quarter of a weight are candidates, growth at random puts its mask together, a bit an
    entry.

    Args:
        model: a module with masked weights of either form.
        fraction: the share of live connections that move, in [0, 1]; :func:`maskedlinear.pruning.cosine_decay` lets it
            fall.
        gradients: of :func:`dense_gradients`, to grow where the gradient is largest; ``None`` grows at random.
        optimizer: whose state moves along: that of new connections starts clean, that of the others stays theirs.
            Those in the dense form need :func:`freeze_masked` too.
        include: which layers, as in :func:`mask_model`.
        seed: of the random places; another at each step. Layer i takes ``seed + i``.
        exclude_dropped: whether what is dropped stays away until the next time, so that the whole fraction moves.
        group: the processes that train one model together, as in :func:`maskedlinear.torch.prune_model`: masks and weights
            are compared before connections move. By default those of a model in ``DistributedDataParallel``, whose passes
            the ``gradients`` may have seen, or that FSDP2 or tensor parallelism has cut; ``None`` where one process acts
            alone.

    Returns:
        How many connections moved.

    Raises:
        ValueError: if there is no masked layer; if a layer's weight is computed, or shared with another module, which a
            weight that becomes 0 would change; if the fraction is out of its range, a weight or gradient is NaN,
            ``gradients`` lack a layer, processes have different masks, or fixed connections would move.
            The model is left as it was.
    """
    masked_weights(model)  # which projects them
    named = {name: layer for name, layer in walk_masked(model) if matches(name, layer, include)}
    layers = list(named.values())
    if not layers:
        raise ValueError("connections move in masked weights, and there is none: make them with mask_model(model)")
    _refuse_shared(model, layers)
    for layer in layers:
        if isinstance(layer, SparseLinear):
            refuse_cut_twice(layer)
    ranks = _processes_of(model, group, gradients)
    fixed = {name: fixed_entries(layer) for name, layer in named.items()}
    is_cut = any(isinstance(layer, MaskedWeight) and is_sharded(layer.weight) for layer in layers)
    dense = {name: layer for name, layer in named.items() if isinstance(layer, MaskedWeight) and is_cut}
    refuse_fixed_and_cut(dense)
    places = places_of({name: layer.weight for name, layer in dense.items()}, ranks) if is_cut else {}
    if ranks is not None:
        keys = {name: place.key for name, place in places.items()}
        check_alike("what is live", {name: _live_values(layer) for name, layer in named.items()}, ranks, keys)
    plans: dict[str, Any] = {}
    number = 0
    for name, layer in named.items():
        rows, own = None if gradients is None else _rows(gradients, layer), layer_seed(seed, number)
        if isinstance(layer, SparseLinear):
            settle(layer)
            values = whole_values(layer.weight_values.detach(), layer._cut)
            held = _held_fast(as_numpy(values), fixed[name])
            plans[name] = pruning.regrow_pattern(
                layer.pattern, held, fraction, rows, seed=own, exclude_dropped=exclude_dropped
            )
            if (fast := fixed[name]) is not None:
                refuse_fixed(name, int(np.setdiff1d(np.flatnonzero(fast), plans[name][1]).size))
            number += 1
            continue
        axes = axes_of_mask(layer)
        if is_cut:
            part = None if gradients is None else gradients.part(layer, places[name].places)
            plans[name], matrices = regrown_mask(layer, axes, places[name], ranks, fraction, part, own, exclude_dropped)
        else:
            arrays = layer.mask.cpu().numpy(), _held_fast(as_numpy(layer.weight.detach()), fixed[name])
            plans[name], matrices = regrow_weight(axes, *arrays, fraction, rows, own, exclude_dropped)
            if (fast := fixed[name]) is not None:
                refuse_fixed(name, int(np.count_nonzero(fast & ~plans[name])))
        number += matrices
    if is_cut:
        plans |= checked_masks({name: (layer.weight, plans[name]) for name, layer in dense.items()}, places, ranks)
    moved = {name: _move(layer, plans[name], optimizer) for name, layer in named.items()}
    if not is_cut or ranks is None:
        return sum(moved.values())
    elsewhere = sum(moved[name] for name, place in places.items() if not place.counts)
    alike = sum(moved[name] for name in named if name not in places)  # in every process
    return int(ranks.add_up(np.array([sum(moved.values()) - elsewhere - alike]))[0]) + alike


def _processes_of(model: nn.Module, group: Group, gradients: DenseGradients | None) -> Ranks | None:
    """Return the processes that move connections together; gradients are averaged over them from now on."""
    together = group_of(model, group)
    if together is None and group is not None and gradients is not None:
        together = gradients.ranks
    if gradients is not None:
        gradients.ranks = together
    return together


def _held_fast(values: NDArray[Any], fixed: NDArray[np.bool_] | None) -> NDArray[Any]:
    """Return values by which fixed connections are the last to go."""
    return values if fixed is None else np.where(fixed, np.asarray(np.inf, values.dtype), values)


def _live_values(layer: Masked) -> tuple[Tensor, ...]:
    """Return what is others where connections or weights are; of a weight that is cut over processes this one's part."""
    if isinstance(layer, SparseLinear):
        values = layer.weight_values  # of those that processes share, each has its own part
        return layer.pattern.indptr, layer.pattern.indices, *(() if is_sharded(values) else (values,))
    return cut_like(layer.mask, layer.weight), layer.weight


def _cut_as(product: Tensor, weight: Tensor) -> Tensor:
    """Return a gradient cut as its weight is along those dimensions of its mesh that the gradient was made on.

    Raises:
        ValueError: if the weight is on no such mesh.
    """
    names, own = product.device_mesh.mesh_dim_names, getattr(weight, "device_mesh", None)  # type: ignore[attr-defined]
    if own == product.device_mesh:  # type: ignore[attr-defined]
        return as_dtensor_like(product, weight)
    if own is None or names is None or own.mesh_dim_names is None or not set(names) <= set(own.mesh_dim_names):
        raise ValueError(
            "growth by gradient needs a weight on the device mesh on which its layer computes, or on one that has that "
            f"mesh's dimensions, by name; got a weight on {own} and a gradient on {product.device_mesh}"  # type: ignore[attr-defined]
        )
    cuts = [weight.placements[own.mesh_dim_names.index(name)] for name in names]  # type: ignore[attr-defined]
    return product.redistribute(placements=cuts)  # type: ignore[attr-defined, no-any-return]


def _refuse_shared(model: nn.Module, layers: list[Masked]) -> None:
    held = parameter_users(model)
    for layer in layers:
        name = "weight_values" if isinstance(layer, SparseLinear) else "weight"
        weight = layer._parameters.get(name)
        if weight is None:
            raise ValueError(
                f"connections move in a layer that holds its {name}; here it is computed (parametrize, prune)"
            )
        refuse_shared(name, len(held.get(id(weight), ())))


def _rows(gradients: DenseGradients, layer: Masked) -> Callable[[int, int], Tensor]:
    """Return a function of two rows that returns these rows of a gradient, in memory that those after the next ones take.

    As many rows as were asked for are made ahead, those before them, while these are looked at: growth goes from the last
    rows to the first. Not where processes make them together, nor off the CPU.
    """
    kept: list[Tensor | None] = [None, None]  # fresh memory costs more than what is written to it
    ahead: dict[tuple[int, int], Future[Tensor]] = {}
    pool = ThreadPoolExecutor(1)  # its thread ends with this function

    def make(start: int, stop: int) -> Tensor:
        out = kept[0] if kept[0] is not None and len(kept[0]) >= stop - start else None
        with torch.no_grad():
            found = gradients.rows(layer, start, stop, out)
        if type(found) is Tensor and found.device.type == "cpu":
            kept[0], kept[1] = (
                kept[1],
                found if out is None else kept[0],
            )  # this one rests while the other is written to
        return found

    def rows(start: int, stop: int) -> Tensor:
        made = ahead.pop((start, stop), None)
        for unwanted in ahead.values():
            unwanted.exception()  # which waits until it writes no more
        ahead.clear()
        found = make(start, stop) if made is None else made.result()
        if start and gradients.ranks is None and type(found) is Tensor and found.device.type == "cpu":
            before = max(0, 2 * start - stop), start
            ahead[before] = pool.submit(make, *before)
        return found.cpu()

    return rows


def _move(layer: Masked, plan: Any, optimizer: torch.optim.Optimizer | None) -> int:
    """Carry out what :mod:`maskedlinear.pruning` has planned for a layer; return how many connections moved here."""
    if isinstance(layer, SparseLinear):
        pattern, source = plan
        shape, before = layer.weight_values.shape, layer._cut
        layer.rewire(pattern, source)
        if optimizer is not None:
            places = torch.from_numpy(source).to(layer.weight_values.device)

            def follow(kept: Tensor, fresh: float) -> Tensor:
                return part_of(moved(kept, places, fresh, before), kept, layer._cut)

            move_state(optimizer, layer.weight_values, shape, follow)
        return int(np.count_nonzero(source < 0))
    found = plan if isinstance(plan, Tensor) else torch.from_numpy(np.ascontiguousarray(plan)).to(layer.mask.device)
    old, part = cut_like(layer.mask, layer.weight), local_part(found)
    new, changed = int((part & ~old).sum()), part != old  # before the mask, which old may be, changes
    layer.set_mask(found, revive=False)
    if optimizer is not None:
        renew(optimizer, layer.weight, on_parts(lambda _: changed, layer.weight.detach()))
    return new
