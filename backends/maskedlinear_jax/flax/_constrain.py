"""``constrain`` for nnx: gives masked weights of a model constraints, all of them or none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from flax import linen

from maskedlinear.constraints import Constraints
from maskedlinear.models import WeightAxes
from maskedlinear.pruning._layers import check_known
from maskedlinear_jax._compat import is_traced
from maskedlinear_jax._placement import on_device, to_host, to_like
from maskedlinear_jax.flax._constraint_variables import (
    Constraint,
    hold_constraints,
    keep_own,
    made_variables,
    sparse_constraints,
    turned_to_kernel,
)
from maskedlinear_jax.flax._sparse_nnx import SparseLinear
from maskedlinear_jax.flax._variables import is_linen
from maskedlinear_jax.flax._weights import masked_weights

__all__ = ["constrain"]

Model = TypeVar("Model")
Given = Any  # Constraints, a Wiring or None


def constrain(model: Model, constraints: Mapping[str, Given] | Given) -> Model:
    """Let live connections of an nnx model keep values, signs, ties or bounds, through guarded training; return the model::

        constrain(model, {"recurrent": dale(signs, in_axis=0), "readout": Constraints(lower=-1.0, upper=1.0)})
        optimizer = nnx.Optimizer(model, freeze_masked(optax.adam(1e-3)), wrt=nnx.Param)
        optimizer.update(model, gradients, masks=param_masks(model))

    Values are made to keep them at once: what is tied becomes the mean of its group, and what is outside its sign or bounds
    the nearest value inside. They are Variables beside the masks, of the type :class:`Constraint`: states, copies, files,
    ``compress`` and ``expand`` carry them, and :func:`param_masks` has them with the masks, so that an optimizer that is
    guarded by :func:`maskedlinear.jax.freeze_masked` keeps them. One that is not guarded does not. A guard that was given
    its masks once, before, is made anew.

    What is masked is not constrained while it is: a connection that comes back keeps its own constraints, and takes the
    value of those that it is tied to. What is fixed stays live: masks that would take it out are refused (inside transforms
    it stays all the same), and :func:`prune_model` and :func:`regrow_model` take others. In the sparse form a connection
    takes its constraints along; a new one has those that are kept for each input or output alone.

    Args:
        model: any nnx module with masked weights of either form; or a layer.
        constraints: for each weight by its name, as :func:`get_masks` calls it, a
            :class:`maskedlinear.constraints.Constraints` in the kernel's axes, ``(in, out)``; a ``Wiring`` that has signs or
            fixed connections, whose fixed ones become 1; or ``None`` to free it. Of a layer its own. They take the place of
            those that it had; weights that are not named keep theirs.

    Raises:
        ValueError: if a name is of no masked weight; if constraints do not fit its shape, contradict each other, or fix what
            is masked or outside its bounds; or if a weight has no values. The model is left as it was.
        TypeError: if ``model`` is linen's, something else stands for constraints, or numbers are not known, inside ``jit``.

    Example:
        >>> layer = MaskedLinear(3, 2, rngs=nnx.Rngs(0))
        >>> kernel = constrain(layer, dale([1, 1, -1], in_axis=0)).kernel[...]
        >>> bool((kernel[:2] >= 0).all() and (kernel[2] <= 0).all())
        True
    """
    if is_linen(model) or isinstance(model, linen.Module):
        raise TypeError(
            "constrain changes an nnx module in place; linen's variables hold no constraints: give them to "
            "apply_constraints(params, constraints) and freeze_masked(..., constraints=...) of maskedlinear.jax, and to "
            "prune_tree and regrow_tree in place of prune_model and regrow_model, which would take what is fixed out"
        )
    weights = masked_weights(model, sparse=True)
    named = constraints if isinstance(constraints, Mapping) else {"": constraints}
    if not weights:
        raise ValueError("constraints are of masked weights, and this model has none: make them with mask_model(model)")
    check_known("constraints", named, list(weights))
    owners: dict[int, str] = {}
    for name in named:
        if (
            not isinstance(weights[name], SparseLinear)
            and (first := owners.setdefault(weights[name].key, name)) != name
        ):
            raise ValueError(
                f"{first} and {name} share a weight, which has one set of constraints: give them to one layer"
            )
    checked = {name: _checked(name, weights[name], given) for name, given in named.items()}
    for name, (made, value) in checked.items():
        one = weights[name]
        if isinstance(one, SparseLinear):
            one.weight_values.set_value(value)
            hold_constraints(one, "weight_values", made)
            keep_own(one, "weight_values", None)
            continue
        one.kernel.set_value(value)
        for other in weights.values():  # whoever shares it
            if not isinstance(other, SparseLinear) and other.key == one.key:
                hold_constraints(other.owner, other.parameter, made)
        keep_own(one.owner, one.parameter, one.mask)
    return model


def constraints_like(one: Any, given: Any, called: str) -> Constraints:
    """Return what is given for a weight, in its kernel's axes.

    Raises:
        ValueError: if it does not fit.
        TypeError: if it is anything else.
    """
    is_sparse = isinstance(one, SparseLinear)
    if not isinstance(given, Constraints):
        if not hasattr(given, "pattern") or not hasattr(given, "inputs"):
            raise TypeError(f"constraints must be Constraints(...), a Wiring or None; got {type(given).__name__}")
        given = Constraints.from_wiring(given)
    assert isinstance(given, Constraints)
    if is_sparse or given.pattern is None or all(array.ndim != 1 for array in given.arrays().values()):
        return given
    order = one.axes.order(one.value.ndim) if one.axes is not None and one.value.ndim == 2 else None
    if order == ((), (1,), (0,)):
        return turned_to_kernel(given, given.pattern)
    if order == ((), (0,), (1,)):
        return given
    raise ValueError(
        f"constraints of connections are of a matrix; {called} has the shape {one.value.shape}: give arrays of this shape"
    )


def _checked(name: str, one: Any, given: Any) -> tuple[dict[str, Constraint], Any]:
    """Return the Variables of constraints that fit a weight as it stands, and its values."""
    is_sparse, called = isinstance(one, SparseLinear), name or "the layer"
    value = one.weight_values.get_value() if is_sparse else one.value
    if isinstance(value, jax.ShapeDtypeStruct):
        raise ValueError(f"{called} is abstract, and has no values yet: load its state first")
    if is_traced(value) or (not is_sparse and is_traced(one.mask)):
        raise TypeError(
            "constrain reads numbers, which are not known inside a transform (jit, grad, vmap): call it outside"
        )
    if given is None:
        return {}, value
    is_wiring = not isinstance(given, Constraints)
    given = constraints_like(one, given, called)
    values = np.array(to_host(value))
    try:
        if is_sparse:
            if value.ndim != 1:
                raise ValueError("it is a stack of layers in the sparse form: use the dense form")
            made, like = sparse_constraints(given, one.pattern), one.pattern
            arrays = {k: a.T if a.ndim == 2 else a for k, a in made.arrays().items()}
            entries, mask = Constraints(**arrays, pattern=like), None
        else:
            made = entries = _whole_along_stacks(given.for_weight(value.shape), value.shape, one.axes)
            like, mask = value.shape, np.broadcast_to(to_host(one.mask), value.shape)
        if is_wiring and (fixed := entries.entries(like).fixed) is not None:
            values[fixed] = 1
            value = to_like(on_device(values), value)
        entries.entries(like, values, mask)
    except ValueError as error:
        raise ValueError(f"the constraints of {called}: {error}") from error
    return made_variables(made, value.dtype), value


def _whole_along_stacks(given: Constraints, shape: tuple[int, ...], axes: WeightAxes | None) -> Constraints:
    """Return constraints that have an entry for each layer of a stack, along which transforms map them."""
    stack = () if axes is None else axes.order(len(shape))[0]
    if not stack:
        return given
    whole: dict[str, Any] = {}
    for kind, array in given.arrays().items():
        own = array.shape or (1,) * len(shape)
        whole[kind] = np.broadcast_to(
            array, [shape[axis] if axis in stack else own[axis] for axis in range(len(shape))]
        )
    return Constraints(**whole)
