"""Dynamic sparse training: connections of a model move while it trains, on both forms of the layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from maskedlinear import pruning
from maskedlinear._arrays import as_numpy
from maskedlinear.models import WeightAxes, refuse_shared, regrow_weight
from maskedlinear.pruning._layers import Include, layer_seed, matches
from maskedlinear_torch._dtensors import as_dtensor_like, full_tensor
from maskedlinear_torch._functional import flatten_batch
from maskedlinear_torch._layer import MaskedLinear
from maskedlinear_torch._masked_weight import MaskedWeight
from maskedlinear_torch._modules import parameter_users
from maskedlinear_torch._optim import renew
from maskedlinear_torch._ranks import Group, active_group, are_finite, averaged, check_alike, group_of
from maskedlinear_torch._sparse_layer import SparseLinear
from maskedlinear_torch._weight_mask import WeightMask
from maskedlinear_torch._weights import axes_of_mask, masked_weights, walk_masked

__all__ = ["DenseGradients", "dense_gradients", "regrow_model"]

Masked = MaskedWeight | SparseLinear


class DenseGradients:
    """The gradients of whole weights, masked entries included, of a backward pass.

    Of masked layers it holds what went in and out: row i of the gradient is ``g[:, i]ᵀ · x``, and :meth:`rows` makes some of
    them at a time. Of weights of other modules it holds the gradient.
    """

    def __init__(self) -> None:
        self.group: Group = None  # of processes, each with its own batch
        self._pairs: dict[Masked, list[tuple[Tensor, Tensor]]] = {}
        self._whole: dict[WeightMask, NDArray[Any]] = {}

    def add(self, layer: Masked, x: Tensor, g: Tensor) -> None:
        """Take down x and the cotangent of y of one call of a layer."""
        self._pairs.setdefault(layer, []).append((flatten_batch(x.detach()), flatten_batch(g.detach())))

    def add_whole(self, mask: WeightMask, g: Tensor) -> None:
        """Take down the gradient of a weight, or add one up to what there was."""
        axes = axes_of_mask(mask) or WeightAxes.of_entries(g.dim())
        matrices = axes.matrices(as_numpy(full_tensor(g.detach())))
        self._whole[mask] = self._whole.get(mask, 0) + np.array(matrices)

    def are_finite(self, model: nn.Module, group: Group) -> bool:
        """Whether all numbers are finite, in all processes: where a loss was scaled too much, none of them are of use."""
        _processes_of(model, group, self)
        pairs = [array for pairs in self._pairs.values() for pair in pairs for array in pair]
        return are_finite([*pairs, *map(torch.from_numpy, self._whole.values())], self.group)

    def rows(self, layer: Masked, start: int, stop: int) -> Tensor:
        """Return the rows ``start`` to ``stop`` of the gradient of a weight, shape ``(stop - start, in)``; those of the
        matrices of a stack follow each other.

        Raises:
            ValueError: if the layer had no backward pass.
        """
        part = self._own_rows(layer, start, stop)
        return part if self.group is None else averaged(part, self.group)

    def _own_rows(self, layer: Masked, start: int, stop: int) -> Tensor:
        """Return these rows of the gradient of this process' batch."""
        pairs = self._pairs.get(layer)
        if isinstance(layer, WeightMask) and layer in self._whole:
            matrices = self._whole[layer]
            return torch.from_numpy(matrices.reshape(-1, matrices.shape[2])[start:stop])
        if pairs is None:
            raise ValueError(
                "growth by gradient needs a backward pass through each layer inside dense_gradients; there was none "
                f"through {layer}"
            )
        wide = torch.promote_types(pairs[0][0].dtype, torch.float32)
        parts = [g[:, start:stop].mT.to(wide) @ x.to(wide) for x, g in pairs]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


@contextmanager
def dense_gradients(model: nn.Module) -> Iterator[DenseGradients]:
    """Take down what :func:`regrow_model` grows by (RigL), in the forward and backward passes inside::

        with dense_gradients(model) as gradients:
            loss(model(x)).backward()
        regrow_model(model, 0.3, gradients=gradients, optimizer=optimizer)

    It holds each masked layer's input and the cotangent of its output, and no gradient of a weight's shape; of masked
    weights of other modules their gradients. Not inside ``torch.compile``. In a model in ``DistributedDataParallel`` each
    process sees its own batch: connections grow by the mean of the gradients of all of them.

    Args:
        model: a module with masked layers of either form.
    """
    gradients = DenseGradients()

    def look(layer: Any, arguments: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        if output.requires_grad:
            x = arguments[0] if arguments else named["input"]
            gradients.group = gradients.group or active_group()
            output.register_hook(lambda g: gradients.add(layer, x, g))

    layers = [layer for layer in model.modules() if isinstance(layer, MaskedLinear | SparseLinear)]
    masks = [mask for mask in model.modules() if isinstance(mask, WeightMask)]
    handles = [layer.register_forward_hook(look, with_kwargs=True) for layer in layers]
    try:
        for mask in masks:
            mask.project()  # which renews the hook of a copy
            mask._own.record = partial(gradients.add_whole, mask)
        yield gradients
    finally:
        for mask in masks:
            mask._own.record = None
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
    group: Group = "model",
) -> int:
    """Move a fraction of each masked layer's connections: the weakest go, as many others come, with weight 0.

    Source: SET (at random) and RigL (by gradient); see :func:`maskedlinear.pruning.regrow`, whose places these are, the same
    on both forms of the layer. On the sparse form nothing of the weight's shape is made.

    Args:
        model: a module with masked weights of either form.
        fraction: the share of live connections that move, in [0, 1]; :func:`maskedlinear.pruning.cosine_decay` lets it
            fall.
        gradients: of :func:`dense_gradients`, to grow where the gradient is largest; ``None`` grows at random.
        optimizer: whose state moves along: that of new connections starts clean, that of the others stays theirs.
            Those in the dense form need :func:`freeze_masked` too.
        include: which layers, as in :func:`mask_model`.
        seed: of the random places; another at each step. Layer i takes ``seed + i``.
        group: the processes that train one model together, as in :func:`maskedlinear.torch.prune_model`: masks and weights
            are compared before connections move. By default those of a model in ``DistributedDataParallel``, whose passes
            the ``gradients`` may have seen; ``None`` where one process acts alone.

    Returns:
        How many connections moved.

    Raises:
        ValueError: if there is no masked layer; if a layer's weight is computed, or shared with another module, which a
            weight that becomes 0 would change; if the fraction is out of its range, a weight or gradient is NaN,
            ``gradients`` lack a layer, or processes have different masks. The model is left as it was.
    """
    masked_weights(model)  # which projects them
    named = {name: layer for name, layer in walk_masked(model) if matches(name, layer, include)}
    layers = list(named.values())
    if not layers:
        raise ValueError("connections move in masked weights, and there is none: make them with mask_model(model)")
    _refuse_shared(model, layers)
    together = _processes_of(model, group, gradients)
    if together is not None:
        check_alike("what is live", {name: _live_values(layer) for name, layer in named.items()}, together)
    planned: list[Any] = []
    place = 0
    for layer in layers:
        rows, own = None if gradients is None else _rows(gradients, layer), layer_seed(seed, place)
        if isinstance(layer, SparseLinear):
            planned.append(pruning.regrow_pattern(layer.pattern, layer.weight_values, fraction, rows, seed=own))
            place += 1
            continue
        arrays = full_tensor(layer.mask).cpu().numpy(), as_numpy(full_tensor(layer.weight.detach()))
        mask, matrices = regrow_weight(axes_of_mask(layer), *arrays, fraction, rows, own)
        planned.append(mask)
        place += matrices
    return sum(_move(layer, plan, optimizer) for layer, plan in zip(layers, planned, strict=True))


def _processes_of(model: nn.Module, group: Group, gradients: DenseGradients | None) -> Group:
    """Return the processes that move connections together; gradients are averaged over them from now on."""
    together = group_of(model, group)
    if together is None and group is not None and gradients is not None:
        together = gradients.group
    if gradients is not None:
        gradients.group = together
    return together


def _live_values(layer: Masked) -> Tensor:
    """Return numbers that are others where connections or weights are."""
    if isinstance(layer, SparseLinear):
        return torch.cat([layer.indptr.double(), layer.indices.double(), layer.weight_values.detach().double()])
    return torch.cat(
        [full_tensor(layer.mask).double().flatten(), full_tensor(layer.weight.detach()).double().flatten()]
    )


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


def _rows(gradients: DenseGradients, layer: Masked) -> Any:
    return lambda start, stop: gradients.rows(layer, start, stop).cpu()


def _move(layer: Masked, plan: Any, optimizer: torch.optim.Optimizer | None) -> int:
    """Carry out what :mod:`maskedlinear.pruning` has planned for a layer; return how many connections moved."""
    if isinstance(layer, SparseLinear):
        pattern, source = plan
        layer.rewire(pattern, source)
        places = torch.from_numpy(source).to(layer.weight_values.device)
        if optimizer is not None:
            renew(optimizer, layer.weight_values, places < 0, places.clamp(min=0))
        return int(np.count_nonzero(source < 0))
    old = full_tensor(layer.mask)
    found = torch.from_numpy(np.ascontiguousarray(plan)).to(old.device)
    new, changed = found & ~old, found != old  # before the mask, which old may be, changes
    layer.set_mask(found, revive=False)
    if optimizer is not None:
        renew(optimizer, layer.weight, as_dtensor_like(changed, layer.weight))
    return int(new.sum())
