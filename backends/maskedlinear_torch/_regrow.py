"""Dynamic sparse training: connections of a model move while it trains, on both forms of the layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from maskedlinear import pruning
from maskedlinear.pruning._layers import Include, layer_seed, matches
from maskedlinear_torch._dtensors import as_dtensor_like, full_tensor
from maskedlinear_torch._functional import flatten_batch
from maskedlinear_torch._layer import MaskedLinear
from maskedlinear_torch._modules import parameter_users
from maskedlinear_torch._optim import renew
from maskedlinear_torch._sparse_layer import SparseLinear

__all__ = ["DenseGradients", "dense_gradients", "regrow_model"]

Masked = MaskedLinear | SparseLinear


class DenseGradients:
    """What went in and out of masked layers in a backward pass: the gradient of every weight, without ever holding it.

    Row i of a layer's gradient is ``g[:, i]ᵀ · x``; :meth:`rows` makes some of them at a time.
    """

    def __init__(self) -> None:
        self._pairs: dict[Masked, list[tuple[Tensor, Tensor]]] = {}

    def add(self, layer: Masked, x: Tensor, g: Tensor) -> None:
        """Take down x and the cotangent of y of one call of a layer."""
        self._pairs.setdefault(layer, []).append((flatten_batch(x.detach()), flatten_batch(g.detach())))

    def rows(self, layer: Masked, start: int, stop: int) -> Tensor:
        """Return the rows ``start`` to ``stop`` of the gradient of a layer's whole weight, shape ``(stop - start, in)``.

        Raises:
            ValueError: if the layer had no backward pass.
        """
        pairs = self._pairs.get(layer)
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

    It holds each masked layer's input and the cotangent of its output, and no gradient of a weight's shape. Not inside
    ``torch.compile``. Where several processes train one model, each sees its own batch: let all of them grow by the same
    one, or at random, so that their masks stay alike.

    Args:
        model: a module with masked layers of either form.
    """
    gradients = DenseGradients()

    def look(layer: Any, arguments: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        if output.requires_grad:
            x = arguments[0] if arguments else named["input"]
            output.register_hook(lambda g: gradients.add(layer, x, g))

    layers = [layer for layer in model.modules() if isinstance(layer, Masked)]
    handles = [layer.register_forward_hook(look, with_kwargs=True) for layer in layers]
    try:
        yield gradients
    finally:
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
) -> int:
    """Move a fraction of each masked layer's connections: the weakest go, as many others come, with weight 0.

    Source: SET (at random) and RigL (by gradient); see :func:`maskedlinear.pruning.regrow`, whose places these are, the same
    on both forms of the layer. On the sparse form nothing of the weight's shape is made.

    Args:
        model: a module with :class:`MaskedLinear` or :class:`SparseLinear` layers.
        fraction: the share of live connections that move, in [0, 1]; :func:`maskedlinear.pruning.cosine_decay` lets it
            fall.
        gradients: of :func:`dense_gradients`, to grow where the gradient is largest; ``None`` grows at random.
        optimizer: whose state moves along: that of new connections starts clean, that of the others stays theirs.
            ``MaskedLinear`` layers need :func:`freeze_masked` too.
        include: which layers, as in :func:`mask_model`.
        seed: of the random places; another at each step. Layer i takes ``seed + i``.

    Returns:
        How many connections moved.

    Raises:
        ValueError: if there is no masked layer; if a layer's weight is computed, or shared with another module, which a
            weight that becomes 0 would change; if the fraction is out of its range, a weight or gradient is NaN, or
            ``gradients`` lack a layer. The model is left as it was.
    """
    layers = [
        layer for name, layer in model.named_modules() if isinstance(layer, Masked) and matches(name, layer, include)
    ]
    if not layers:
        raise ValueError("connections move in masked layers, and there is none: make them with mask_model(model)")
    _refuse_shared(model, layers)
    planned = []
    for place, layer in enumerate(layers):
        rows, own = None if gradients is None else _rows(gradients, layer), layer_seed(seed, place)
        plan: Any
        if isinstance(layer, SparseLinear):
            plan = pruning.regrow_pattern(layer.pattern, layer.weight_values, fraction, rows, seed=own)
        else:
            plan = pruning.regrow(full_tensor(layer.mask), full_tensor(layer.weight), fraction, rows, seed=own)
        planned.append(plan)
    return sum(_move(layer, plan, optimizer) for layer, plan in zip(layers, planned, strict=True))


def _refuse_shared(model: nn.Module, layers: list[Masked]) -> None:
    held = parameter_users(model)
    for layer in layers:
        name = "weight_values" if isinstance(layer, SparseLinear) else "weight"
        weight = layer._parameters.get(name)
        if weight is None:
            raise ValueError(
                f"connections move in a layer that holds its {name}; here it is computed (parametrize, prune)"
            )
        if len(held[id(weight)]) > 1:
            raise ValueError(
                f"connections move in a layer that has its {name} to itself; here {len(held[id(weight)])} modules share it: "
                "leave it out with include=..."
            )


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
    found = torch.from_numpy(plan).to(old.device)
    new, changed = found & ~old, found != old  # before the mask, which old may be, changes
    layer.set_mask(found, revive=False)
    if optimizer is not None:
        renew(optimizer, layer.weight, as_dtensor_like(changed, layer.weight))
    return int(new.sum())
