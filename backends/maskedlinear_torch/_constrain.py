"""``constrain``: gives layers of a model constraints, all of them or none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from maskedlinear.constraints import Constraints
from maskedlinear.pruning._layers import check_known
from maskedlinear_torch._constraints import check_not_tied, keep, set_constraints, set_fixed_to_one, stored
from maskedlinear_torch._dtensors import full_tensor, is_sharded
from maskedlinear_torch._masked_weight import MaskedWeight
from maskedlinear_torch._sparse_layer import SparseLinear
from maskedlinear_torch._weights import masked_weights, walk_masked

__all__ = ["constrain"]

Given = Any  # Constraints, a Wiring or None


def constrain(model: nn.Module, constraints: Mapping[str, Given] | Given) -> nn.Module:
    """Let live connections keep values, signs, ties or bounds, from now on and through training; return the model::

        constrain(model, {"recurrent": dale(signs), "readout": Constraints(lower=-1.0, upper=1.0)})
        optimizer = freeze_masked(torch.optim.Adam(model.parameters()), model)

    Values are made to keep them at once: what is tied becomes the mean of its group, and what is outside its sign or bounds
    the nearest value inside. Every step of every optimizer is followed by the same, and what is fixed is then bit for bit
    what it was before the step. A connection whose sign stops it is +0 and live. During a step the gradients of tied
    connections are their sum, so that they train as one parameter would, and those of fixed ones are 0; before and
    afterwards ``weight.grad`` is as autograd made it (so clipping sees a gradient a connection).
    :func:`freeze_masked` does the same around what wraps an optimizer.

    What is masked is not constrained while it is: a connection that comes back keeps its own constraints, and takes the
    value of those that it is tied to. What is fixed stays live: masks that would take it out are refused, and
    :func:`prune_model` and :func:`regrow_model` take others. In the sparse form a connection takes its constraints along
    when others are regrown, a new one has those that are kept for each input or output alone. They go with the layer:
    copies, ``state_dict`` (keys ``constraint_*``, which a state may lack: the layer keeps its own then), files, ``compress``
    and ``expand``.

    Args:
        model: with masked weights of either form; or a layer.
        constraints: for each weight by its name, as :func:`get_masks` calls it, a
            :class:`maskedlinear.constraints.Constraints`; a ``Wiring`` that has signs or fixed connections, whose fixed
            ones, which pass a node on, become 1 here; or ``None`` to free it. Of a layer its own. They take
            the place of those that it had; layers that are not named keep theirs.

    Raises:
        ValueError: if a name is of no masked weight; if constraints do not fit its shape, contradict each other, or fix what
            is masked or outside its bounds; if a weight has no values, is computed, shared by layers with other constraints,
            or is tied and cut over processes. The model is left as it was.
        TypeError: if ``model`` is no module, or something else stands for constraints.

    Example:
        >>> layer = constrain(MaskedLinear(3, 2), dale([1, 1, -1]))
        >>> (layer.weight * torch.tensor([1, 1, -1]) >= 0).all().item()
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"constrain takes a torch.nn.Module; got {type(model).__name__}")
    masked_weights(model)  # which projects them
    layers = dict(walk_masked(model))
    named = constraints if isinstance(constraints, Mapping) else {"": constraints}
    if not layers:
        raise ValueError("constraints are of masked weights, and this model has none: make them with mask_model(model)")
    check_known("constraints", named, list(layers))
    checked = {name: _checked(name, layers[name], given) for name, given in named.items()}
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        own = checked.get(name, layer.constraints)
        if own is not None and (first := owners.setdefault(id(stored(layer)), name)) != name:
            raise ValueError(
                f"{first} and {name} share a weight, which has one set of constraints: give them to one layer"
            )
    for name, made in checked.items():
        set_constraints(layers[name], made)
        if made is not None:
            if not isinstance(named[name], Constraints):
                set_fixed_to_one(layers[name])
            keep(layers[name])
    return model


@torch.no_grad()
def _checked(name: str, layer: MaskedWeight | SparseLinear, given: Any) -> Constraints | None:
    """Return constraints that fit a layer as it stands."""
    if given is None:
        return None
    is_wiring = not isinstance(given, Constraints)
    if is_wiring:
        if not hasattr(given, "pattern") or not hasattr(given, "inputs"):
            raise TypeError(f"constraints must be Constraints(...), a Wiring or None; got {type(given).__name__}")
        given = Constraints.from_wiring(given)
    weight, called = stored(layer), name or "the layer"
    if weight is None or weight.is_meta:
        raise ValueError(
            f"{called} has no values of its own (it is computed, or on the meta device): constrain it then"
        )
    like: Any
    try:
        if is_sharded(weight):
            check_not_tied(given)
        if isinstance(layer, SparseLinear):
            if layer._cut is not None:
                raise ValueError("tensor parallelism has cut it: use the dense form")
            like, mask = layer.pattern, None
        else:
            like, mask = tuple(weight.shape), full_tensor(layer.mask).cpu().numpy()
        values = full_tensor(weight)
        if is_wiring and (fixed := given.entries(like).fixed) is not None:
            values = torch.where(torch.from_numpy(np.array(fixed)).to(values.device), torch.ones_like(values), values)
        given.entries(like, values, mask)
    except ValueError as error:
        raise ValueError(f"the constraints of {called}: {error}") from error
    made: Constraints = given
    return made
