"""``prune_with_updates`` for Flax: a model pruned by SparseGPT or OBS, which change the weights that stay."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from maskedlinear.masks._random import Sparsity
from maskedlinear.models import UpdatesMethod, check_updates_method, update_weight
from maskedlinear.pruning._layers import Include, matches
from maskedlinear_jax._placement import to_host, to_like
from maskedlinear_jax.flax._activations import Activations
from maskedlinear_jax.flax._adapter import masked_of, refuse_linen_module, refuse_unfit
from maskedlinear_jax.flax._constraint_variables import constraint_variables
from maskedlinear_jax.flax._kernel import masked_kernel
from maskedlinear_jax.flax._variables import is_linen, set_linen_values
from maskedlinear_jax.flax._whole import full_value, set_masks

__all__ = ["prune_with_updates"]


def prune_with_updates(
    model: Any,
    sparsity: Sparsity | None,
    activations: Activations,
    *,
    method: UpdatesMethod = "sparsegpt",
    n_of_m: tuple[int, int] | None = None,
    block_size: int = 128,
    damping: float = 0.01,
    include: Include = None,
) -> Any:
    """Prune masked dense layers of a model to a sparsity, and let the weights that stay make up for those that go::

        with record_activations(model, hessian=True) as activations:
            model(inputs)
        prune_with_updates(model, 0.5, activations)

    As PyTorch's: :func:`maskedlinear.pruning.sparsegpt` and :func:`maskedlinear.pruning.obs`, of each weight by itself, read
    as ``(out, in)``, on the host in float64. What is pruned becomes dormant, as it was before. Layers whose inputs are not
    recorded (convolutions, stacks) are none.

    Args:
        model: an nnx module, changed in place; or linen's variables, which stay as they are.
        sparsity: the fraction to prune of each weight, in [0, 1]; of SparseGPT one entry more in each block, as its authors'
            code does. ``None`` with ``n_of_m``; or, by ``method="obs"``, to keep the masks as they are and find the
            best weights under them, dormant ones included.
        activations: of :func:`record_activations` with ``hessian=True``.
        method: ``"sparsegpt"``, or ``"obs"``: exact, for small layers.
        n_of_m: keep n of each m successive inputs of an output instead; by SparseGPT.
        block_size: of SparseGPT, columns whose mask is chosen at a time.
        damping: added to the diagonal of a Hessian, as a fraction of its mean.
        include: which weights, as in :func:`mask_model`; all others keep masks and values.

    Returns:
        Of a module the masks before, for :func:`set_masks`; of linen's variables new ones.

    Raises:
        ValueError: as by these functions; if there is no masked weight, or one of them was not recorded or has constraints.
            The model is left as it was.
    """
    refuse_linen_module("prune_with_updates", model)
    how = check_updates_method(method, n_of_m, block_size, damping)
    chosen = {name: one for name, one in masked_of(model).items() if matches(name, one.owner, include)}
    if not chosen:
        raise ValueError(
            "prune_with_updates prunes masked weights, and there is none: make them with mask_model(model)"
        )
    made: dict[str, Any] = {}
    first: dict[Any, str] = {}  # the name of each weight, whoever shares it
    for name, one in chosen.items():
        if first.setdefault(one.key, name) != name:
            continue
        refuse_unfit("prune_with_updates", name, one)
        if not is_linen(model) and constraint_variables(one.owner, one.parameter):
            raise ValueError(
                f"{name or 'the layer'} has constraints, which new weights would break: free it by constrain(model, "
                "{name: None}), and constrain it again afterwards, or leave it out with include=..."
            )
        full = full_value(model, one) if sparsity is None and method == "obs" else masked_kernel(one.value, one.mask)
        hessians = activations.hessian(name)[None]
        made[name] = update_weight(
            to_host(full).astype(np.float64), to_host(one.mask), one.axes, hessians, method, sparsity, how
        )
    before = {name: one.mask for name, one in chosen.items()}
    new = {name: jnp.asarray(weight, chosen[name].value.dtype) for name, (_, weight) in made.items()}
    changed = set_masks(model, {name: made[first[one.key]][0] for name, one in chosen.items()})
    if is_linen(model):
        return set_linen_values(changed, {chosen[name].key: to_like(new[name], chosen[name].value) for name in new})
    for name, weight in new.items():
        chosen[name].kernel.set_value(to_like(weight, chosen[name].value))
    return before
