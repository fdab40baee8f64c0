"""Dynamic sparse training for Flax: connections of a model move while it trains, in both forms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from maskedlinear import pruning
from maskedlinear.models import refuse_fixed
from maskedlinear.pruning._layers import Include, layer_seed, matches
from maskedlinear_jax._concrete import regrow_known
from maskedlinear_jax._optim import renewed_state
from maskedlinear_jax._placement import to_host, to_like
from maskedlinear_jax._tree import Axes, named_leaves
from maskedlinear_jax.flax._adapter import masked_of, refuse_linen, refuse_linen_module, refuse_unfit
from maskedlinear_jax.flax._constraint_variables import fixed_entries, keep_own
from maskedlinear_jax.flax._kernel import masked_kernel
from maskedlinear_jax.flax._modules import check_alone, pure
from maskedlinear_jax.flax._param_masks import bring_masks_to, check_guards
from maskedlinear_jax.flax._sparse_nnx import SparseLinear
from maskedlinear_jax.flax._variables import is_linen, set_linen_masks

__all__ = ["regrow_model"]

# A weight's name in the state; where it is new; where each entry was, or None if all are where they were.
Moved = tuple[str, Any, Any]


def regrow_model(
    model: Any,
    fraction: float,
    *,
    gradients: Mapping[str, Any] | None = None,
    optimizer: nnx.Optimizer[Any] | None = None,
    include: Include = None,
    axes: Axes = None,
    seed: int = 0,
    exclude_dropped: bool = False,
) -> Any:
    """Move a fraction of each masked weight's connections: the weakest are dropped, as many others come, with weight 0.

    What is dropped may come back at once, and then has not moved: it keeps its weight and the optimizer's state.

    Source: SET (at random) and RigL (by gradient); see :func:`maskedlinear.pruning.regrow`, whose places these are, the same
    on both forms of the layer. PyTorch's layers of the same weights move alike. On the sparse form nothing of the weight's
    shape is made.

    Args:
        model: a module with masked weights of either form, or linen's variables with them.
        fraction: the share of live connections that move, in [0, 1]; :func:`maskedlinear.pruning.cosine_decay` lets it
            fall.
        gradients: of :func:`dense_gradients`, to grow where they are largest; ``None`` grows at random.
        optimizer: whose state moves along: that of new connections starts clean, that of the others stays theirs; and masks
            that :func:`maskedlinear.jax.freeze_masked` was given once are those of now. Sparse layers need it, and such
            guards; others see to it at their next step.
        include: which weights, as in :func:`mask_model`.
        axes: as in :func:`mask_model`.
        seed: of the random places; another at each step. Matrix i takes ``seed + i``.
        exclude_dropped: whether what is dropped stays away until the next time, so that the whole fraction moves.

    Returns:
        How many connections moved; of linen's variables new ones.

    Raises:
        ValueError: if there is no masked layer; if the fraction is out of its range, a weight or gradient is NaN, or a
            layer's gradient is missing; or if a weight is shared with another module, which a weight that becomes 0 would
            change. The model is left as it was.
    """
    refuse_linen_module("regrow_model", model)
    if optimizer is not None:
        refuse_linen("regrow_model(optimizer=...)", model)
    check_guards(optimizer, model)
    weights = {
        name: one
        for name, one in masked_of(model, axes, sparse=True).items()
        if matches(name, one if isinstance(one, SparseLinear) else one.owner, include)
    }
    if not weights:
        raise ValueError("connections move in masked weights, and there is none: make them with mask_model(model)")
    if not is_linen(model):
        check_alone(model, [_variable(one) for one in weights.values()])
    plans: dict[str, Any] = {}
    place = 0
    for name, one in weights.items():
        if gradients is not None and name not in gradients:
            raise ValueError(f"growth by gradient needs that of each layer; {name or 'the layer'} has none")
        if not isinstance(one, SparseLinear):
            refuse_unfit("regrow_model", name, one)
        gradient, own = None if gradients is None else gradients[name], layer_seed(seed, place)
        if isinstance(one, SparseLinear):
            plans[name], matrices = _planned_sparse(one, name, fraction, gradient, own, exclude_dropped)
        else:
            live = jnp.broadcast_to(one.mask, one.value.shape)
            fixed = None if is_linen(model) else one.fixed
            held = one.value if fixed is None else jnp.where(fixed, jnp.asarray(jnp.inf, one.value.dtype), one.value)
            arguments = (one.axes, live, held, fraction, gradient, seed, place, exclude_dropped)
            plans[name], matrices = regrow_known(*arguments)
            if fixed is not None:
                refuse_fixed(name, int(np.count_nonzero(fixed & ~to_host(plans[name]))))
        place += matrices
    if is_linen(model):
        masks = {one.key: (plans[name], None) for name, one in weights.items()}
        return set_linen_masks(model, masks, revive=False)
    moved = [_move(weights[name], name, plan) for name, plan in plans.items()]
    if optimizer is not None:
        _renew(optimizer, model, moved)
    return sum(int(new.sum()) for _, new, _ in moved)


def _variable(one: Any) -> Any:
    return one.weight_values if isinstance(one, SparseLinear) else one.kernel


def _planned_sparse(
    layer: SparseLinear, name: str, fraction: float, gradient: Any, seed: int, exclude_dropped: bool
) -> tuple[Any, int]:
    """Return the new patterns of a layer in the sparse form, or of each of a stack, where each connection was, and their
    number."""
    rows_on_host = None if gradient is None else lambda start, stop: to_host(gradient(start, stop))
    values, fixed = to_host(layer.weight_values[...]), fixed_entries(layer, "weight_values")
    values = values if fixed is None else np.where(fixed, np.asarray(np.inf, values.dtype), values)
    rows = values.reshape(-1, values.shape[-1])
    moved = [
        pruning.regrow_pattern(
            pattern, row, fraction, rows_on_host, seed=layer_seed(seed, place), exclude_dropped=exclude_dropped
        )
        for place, (pattern, row) in enumerate(zip(layer.patterns, rows, strict=True))
    ]
    patterns, sources = zip(*moved, strict=True)
    if fixed is not None:
        refuse_fixed(name, int(np.setdiff1d(np.flatnonzero(fixed), sources[0]).size))
    return (patterns, np.stack(sources).reshape(values.shape)), len(moved)


def _move(weight: Any, name: str, plan: Any) -> Moved:
    """Carry out what :mod:`maskedlinear.pruning` has planned for a weight."""
    if isinstance(weight, SparseLinear):
        patterns, source = plan
        weight.rewire(patterns, source)
        return f"{name}.weight_values" if name else "weight_values", source < 0, np.maximum(source, 0)
    new = plan & ~weight.live
    weight.set_mask(plan)
    weight.kernel.set_value(masked_kernel(weight.value, ~new))
    keep_own(weight.owner, weight.parameter, plan, plan & ~new)
    return weight.full_name, new, None


def _renew(optimizer: nnx.Optimizer[Any], model: Any, moved: list[Moved]) -> None:
    """Let an optimizer's state follow: clean where a connection is new, and the others' own."""
    params = pure(nnx.state(model, optimizer.wrt))
    known = {name: (new, source) for name, new, source in moved}

    def of(new: Any, source: Any) -> Any:
        def renewal(kept: Any, fresh: Any) -> Any:
            own = kept if source is None else jnp.take_along_axis(kept, source, axis=-1)
            return to_like(jnp.where(new, fresh, own), kept)

        return new.shape, renewal

    renewals = [of(*known[name]) if name in known else None for name in named_leaves(params)]
    state = renewed_state(optimizer.tx, pure(optimizer.opt_state), jax.tree.structure(params), params, renewals)
    bring_masks_to(optimizer, model, state)
