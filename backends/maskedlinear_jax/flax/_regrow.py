"""Dynamic sparse training for nnx: connections of a model move while it trains, on both forms of the layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from maskedlinear import pruning
from maskedlinear.pruning._layers import Include, layer_seed, matches
from maskedlinear_jax._optim import renewed_state
from maskedlinear_jax._tree import named_leaves
from maskedlinear_jax.flax._kernel import masked_kernel
from maskedlinear_jax.flax._modules import layers_of, pure, refuse_shared
from maskedlinear_jax.flax._nnx import MaskedLinear
from maskedlinear_jax.flax._sparse_nnx import SparseLinear

__all__ = ["regrow_model"]

Moved = tuple[
    str, Any, Any
]  # a weight's name; where it is new; where each entry was, or None if all are where they were


def regrow_model(
    model: Any,
    fraction: float,
    *,
    gradients: Mapping[str, Any] | None = None,
    optimizer: nnx.Optimizer[Any] | None = None,
    include: Include = None,
    seed: int = 0,
) -> int:
    """Move a fraction of each masked layer's connections: the weakest go, as many others come, with weight 0.

    Source: SET (at random) and RigL (by gradient); see :func:`maskedlinear.pruning.regrow`, whose places these are, the same
    on both forms of the layer. PyTorch's layers of the same weights move alike. On the sparse form nothing of the weight's
    shape is made.

    Args:
        model: a module with :class:`maskedlinear.flax.MaskedLinear` or :class:`maskedlinear.flax.SparseLinear` layers.
        fraction: the share of live connections that move, in [0, 1]; :func:`maskedlinear.pruning.cosine_decay` lets it
            fall.
        gradients: of :func:`dense_gradients`, to grow where they are largest; ``None`` grows at random.
        optimizer: whose state moves along: that of new connections starts clean, that of the others stays theirs. Sparse
            layers need it; ``MaskedLinear`` layers need :func:`maskedlinear.jax.freeze_masked`, which sees to it as well.
        include: which layers, as in :func:`mask_model`.
        seed: of the random places; another at each step. Layer i takes ``seed + i``.

    Returns:
        How many connections moved.

    Raises:
        ValueError: if there is no masked layer; if the fraction is out of its range, a weight or gradient is NaN, or a
            layer's gradient is missing; or if a weight is shared with another module, which a weight that becomes 0 would
            change. The model is left as it was.
    """
    layers = {
        name: layer
        for name, layer in layers_of(model, (MaskedLinear, SparseLinear)).items()
        if matches(name, layer, include)
    }
    if not layers:
        raise ValueError("connections move in masked layers, and there is none: make them with mask_model(model)")
    refuse_shared(model, layers)
    plans: list[Any] = []
    for place, (name, layer) in enumerate(layers.items()):
        if gradients is not None and name not in gradients:
            raise ValueError(f"growth by gradient needs that of each layer; {name or 'the layer'} has none")
        gradient, own = None if gradients is None else gradients[name], layer_seed(seed, place)
        if isinstance(layer, SparseLinear):
            plans.append(pruning.regrow_pattern(layer.pattern, layer.weight_values[...], fraction, gradient, seed=own))
        else:
            turned = None if gradient is None else gradient.T
            plans.append(pruning.regrow(layer.mask[...].T, layer.kernel[...].T, fraction, turned, seed=own).T)
    moved = [_move(*entry) for entry in zip(layers, layers.values(), plans, strict=True)]
    if optimizer is not None:
        _renew(optimizer, model, moved)
    return sum(int(np.count_nonzero(new)) for _, new, _ in moved)


def _move(name: str, layer: Any, plan: Any) -> Moved:
    """Carry out what :mod:`maskedlinear.pruning` has planned for a layer."""
    name = f"{name}." if name else ""
    if isinstance(layer, SparseLinear):
        pattern, source = plan
        layer.rewire(pattern, source)
        return f"{name}weight_values", source < 0, np.maximum(source, 0)
    new = plan & ~np.asarray(layer.mask[...])
    layer.set_mask(plan)
    layer.kernel[...] = masked_kernel(layer.kernel[...], ~new)
    return f"{name}kernel", new, None


def _renew(optimizer: nnx.Optimizer[Any], model: Any, moved: list[Moved]) -> None:
    """Let an optimizer's state follow: clean where a connection is new, and the others' own."""
    params = pure(nnx.state(model, optimizer.wrt))
    known = {name: (new, source) for name, new, source in moved}

    def of(new: Any, source: Any) -> Any:
        return new.shape, lambda kept, fresh: jnp.where(new, fresh, kept if source is None else kept[source])

    renewals = [of(*known[name]) if name in known else None for name in named_leaves(params)]
    state = renewed_state(optimizer.tx, pure(optimizer.opt_state), jax.tree.structure(params), params, renewals)
    nnx.update(optimizer.opt_state, nnx.state(state))
