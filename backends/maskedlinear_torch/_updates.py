"""``prune_with_updates``: a model pruned by SparseGPT or OBS, which change the weights that stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from maskedlinear.masks._random import Sparsity
from maskedlinear.models import UpdatesMethod, WeightAxes, check_updates_method, update_weight
from maskedlinear.pruning._layers import Include, matches
from maskedlinear_torch._activations import Activations
from maskedlinear_torch._masked_weight import MaskedWeight
from maskedlinear_torch._ranks import Group, check_alike, group_of
from maskedlinear_torch._weights import module_of
from maskedlinear_torch._whole import one_a_weight

__all__ = ["prune_with_updates"]


def prune_with_updates(
    model: nn.Module,
    sparsity: Sparsity | None,
    activations: Activations,
    *,
    method: UpdatesMethod = "sparsegpt",
    n_of_m: tuple[int, int] | None = None,
    block_size: int = 128,
    damping: float = 0.01,
    include: Include = None,
    group: Group = "model",
) -> dict[str, Tensor]:
    """Prune each masked weight of a model to a sparsity, and let the weights that stay make up for those that go::

        with record_activations(model, hessian=True) as activations:
            model(inputs)
        prune_with_updates(model, 0.5, activations)

    Source: :func:`maskedlinear.pruning.sparsegpt` and :func:`maskedlinear.pruning.obs`, of each weight by itself, read as a
    matrix ``(out, in)``; computed on the host in float64. The weights that stay are others afterwards: keep
    ``copy.deepcopy(model.state_dict())`` to go back. What is pruned becomes dormant, as it was before.

    Args:
        model: a module with masked weights; :func:`mask_model` makes them.
        sparsity: the fraction to prune of each weight, in [0, 1]; of SparseGPT one entry more in each block, as its authors'
            code does. ``None`` with ``n_of_m``; or, by ``method="obs"``, to keep the masks as they are and find the
            best weights under them, dormant ones included.
        activations: of :func:`record_activations` with ``hessian=True``.
        method: ``"sparsegpt"``, or ``"obs"``: exact, for small layers.
        n_of_m: keep n of each m successive inputs of an output instead; by SparseGPT.
        block_size: of SparseGPT, columns whose mask is chosen at a time.
        damping: added to the diagonal of a Hessian, as a fraction of its mean.
        include: which weights, as in :func:`mask_model`; all others keep masks and values.
        group: as in :func:`prune_model`; new weights are compared before they are set.

    Returns:
        The masks before.

    Raises:
        ValueError: as by these functions; if there is no masked weight, one of them was not recorded, or has values that are
            computed. The model is left as it was.
    """
    how = check_updates_method(method, n_of_m, block_size, damping)
    layers = {name: layer for name, layer in one_a_weight(model).items() if matches(name, module_of(layer), include)}
    if not layers:
        raise ValueError(
            "prune_with_updates prunes masked weights, and there is none: make them with mask_model(model)"
        )
    made = {
        name: _of_weight(name, layer, activations.hessian(name), method, sparsity, how)
        for name, layer in layers.items()
    }
    ranks = group_of(model, group)
    if ranks is not None:
        check_alike("the new weight", {name: weight for name, (_, weight) in made.items()}, ranks)
    before = {name: layer.mask.clone() for name, layer in layers.items()}
    for name, (mask, weight) in made.items():
        layer = layers[name]
        layer.set_mask(mask)
        new = torch.from_numpy(weight).to(layer.weight.device, layer.weight.dtype)
        with torch.no_grad():
            layer.weight.copy_(torch.where(layer.mask, new, 0))
    return before


def _of_weight(
    name: str, layer: MaskedWeight, hessians: NDArray[Any], method: str, sparsity: Any, how: Mapping[str, Any]
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Return the new mask and values of a weight, of its own shape."""
    if not isinstance(layer.weight, nn.Parameter):
        raise ValueError(
            f"the weight of {name or 'the layer'} is computed (parametrize, prune): its values cannot change"
        )
    full = layer.full_weight if sparsity is None and method == "obs" else layer.weight.detach()
    value, mask = full.double().cpu().numpy(), layer.mask.cpu().numpy()
    return update_weight(value, mask, layer.weight_axes or WeightAxes(), hessians, method, sparsity, how)
