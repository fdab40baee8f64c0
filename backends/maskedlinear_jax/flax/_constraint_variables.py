"""The constraints of a masked weight of an nnx model: Variables beside its mask, which go where the model's state goes.

Arrays are in the kernel's axes, or of one entry a connection in the sparse form; states, jitted steps and copies carry them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from numpy.typing import NDArray

from maskedlinear.constraints import FREE, Constraints
from maskedlinear.pattern import SparsityPattern
from maskedlinear_jax._compat import is_traced
from maskedlinear_jax._constraints import keep_constraints
from maskedlinear_jax._placement import copied, on_device, to_host
from maskedlinear_jax._tree import ConstrainedMask
from maskedlinear_jax.flax._kernel import mask_names
from maskedlinear_jax.flax._modules import children_of

__all__ = [
    "Constraint",
    "check_keeps_fixed",
    "constrained_mask",
    "constraint_variables",
    "fixed_entries",
    "hold_constraints",
    "in_other_form",
    "keep_own",
    "known_constraints",
    "made_variables",
    "move_constraints",
    "sparse_constraints",
    "trusted_by",
    "turned_to_kernel",
]

_PREFIX = "constraint_"
_DTYPES = {"fixed": bool, "signs": jnp.int8, "ties": jnp.int32, "lower": jnp.float32, "upper": jnp.float32}


@nnx.register_variable_name("constraints", overwrite=True)
class Constraint(nnx.Variable[Array]):
    """What training keeps of a weight: in the state and in checkpoints, and no parameter; set by ``constrain``."""


def _name(owner: Any, parameter: str, kind: str) -> str:
    """Return what a constraint of a parameter is called in its module."""
    is_ours = parameter == "weight_values" or mask_names(children_of(owner), parameter)[0] == "mask"
    return f"{'' if is_ours else f'{parameter}_'}{_PREFIX}{kind}"


def constraint_variables(owner: Any, parameter: str = "kernel") -> dict[str, Constraint]:
    """Return the Variables of a parameter's constraints, by what they keep; none if it has none."""
    children = children_of(owner)
    found = {kind: children.get(_name(owner, parameter, kind)) for kind in FREE}
    return {kind: variable for kind, variable in found.items() if isinstance(variable, Constraint)}


def hold_constraints(owner: Any, parameter: str, variables: dict[str, Constraint]) -> None:
    """Let a module have these constraints of a parameter, in the place of those that it had."""
    for kind in FREE:
        name = _name(owner, parameter, kind)
        if kind in variables:
            setattr(owner, name, variables[kind])
        elif isinstance(children_of(owner).get(name), Constraint):
            delattr(owner, name)


def made_variables(constraints: Constraints | None, dtype: Any) -> dict[str, Constraint]:
    """Return Variables of constraints, bounds in the dtype of the values; the numbers of ties from 0 on."""
    made = {}
    for kind, array in ({} if constraints is None else constraints.arrays()).items():
        kept: NDArray[Any] = array
        if kind == "ties":
            numbers = np.unique(array[array >= 0])
            kept = np.where(array >= 0, np.searchsorted(numbers, array), -1)
        wanted = dtype if kind in ("lower", "upper") else _DTYPES[kind]
        made[kind] = Constraint(on_device(kept, wanted))
    return made


def _arrays(owner: Any, parameter: str) -> dict[str, Any]:
    return {kind: variable.get_value() for kind, variable in constraint_variables(owner, parameter).items()}


def known_constraints(owner: Any, parameter: str = "kernel") -> Constraints | None:
    """Return the constraints of a parameter, in the kernel's axes; ``None`` if it has none.

    Raises:
        TypeError: if numbers are not known, inside a transform.
    """
    arrays = _arrays(owner, parameter)
    if any(is_traced(array) for array in arrays.values()):
        raise TypeError("constraints are read outside transforms (jit, grad, vmap): inside, numbers are not known")
    pattern = owner.pattern if parameter == "weight_values" and any(a.ndim == 1 for a in arrays.values()) else None
    return Constraints(**{kind: to_host(array) for kind, array in arrays.items()}, pattern=pattern) if arrays else None


def constrained_mask(owner: Any, parameter: str, mask: Any) -> Any:
    """Return a mask with what is kept of its weight; the mask itself if there is nothing."""
    arrays = _arrays(owner, parameter)
    if not arrays:
        return mask
    if parameter == "weight_values":
        ends = owner.indices.get_value(), owner.rows.get_value()
        arrays = {kind: _of_connections(array, *ends) for kind, array in arrays.items()}
    signs, lower, upper = (arrays.get(kind) for kind in ("signs", "lower", "upper"))
    if signs is not None:
        infinite = jnp.asarray(jnp.inf, children_of(owner)[parameter].get_value().dtype)
        low, high = jnp.where(signs > 0, 0, -infinite), jnp.where(signs < 0, 0, infinite)
        lower = low if lower is None else jnp.maximum(low, lower)
        upper = high if upper is None else jnp.minimum(high, upper)
    parts = (None if part is None else copied(part) for part in (arrays.get("fixed"), arrays.get("ties"), lower, upper))
    return ConstrainedMask(mask, *parts)


def _of_connections(array: Array, inputs: Array, outputs: Array) -> Array:
    """Return what is kept for each input or output, shape ``(in, 1)`` or ``(1, out)``, as one entry a connection."""
    if array.ndim != 2:
        return array
    return array[jnp.minimum(inputs, array.shape[0] - 1), jnp.minimum(outputs, array.shape[1] - 1)]


def fixed_entries(owner: Any, parameter: str = "kernel") -> Any:
    """Return which entries of a parameter are fixed, of its shape, traced if they are; ``None`` if none is."""
    made = constrained_mask(owner, parameter, None)
    if made is None or made.fixed is None:
        return None
    fixed = jnp.broadcast_to(made.fixed, children_of(owner)[parameter].get_value().shape)
    return fixed if is_traced(fixed) else to_host(fixed)


def check_keeps_fixed(owner: Any, parameter: str, new: Any, called: str = "") -> Any:
    """Return a new mask, which must keep fixed connections live; inside transforms it is made to.

    Args:
        owner: the module.
        parameter: its parameter.
        new: the mask; of values in the sparse form where they were, among the old ones.
        called: what an error calls the weight.

    Raises:
        ValueError: if it does not.
    """
    fixed = fixed_entries(owner, parameter)
    if fixed is None:
        return new
    if parameter == "weight_values":
        kept = np.zeros(fixed.shape, bool)
        kept[np.asarray(new)[np.asarray(new) >= 0]] = True
        gone = np.argwhere(fixed & ~kept)
    elif is_traced(new) or is_traced(fixed):
        return new | jnp.broadcast_to(fixed, new.shape) if new.ndim == fixed.ndim else new | fixed.any(0)
    else:
        gone = np.argwhere(fixed & ~to_host(new))
    if len(gone):
        raise ValueError(
            f"a fixed connection stays live; {len(gone)}{f' of {called}' if called else ''} would be gone, the one at "
            f"{tuple(map(int, gone[0]))} first: free them before, by constrain(model, ...), or leave them where they are"
        )
    return new


def keep_own(owner: Any, parameter: str, mask: Any, trusted: Any = None) -> None:
    """Make a parameter keep its constraints, where its mask has it live.

    Args:
        owner: the module.
        parameter: its parameter.
        mask: the mask, ``None`` in the sparse form.
        trusted: as :func:`maskedlinear_jax._constraints.keep_constraints` takes it.
    """
    variable = children_of(owner)[parameter]
    value = variable.get_value()
    if constraint_variables(owner, parameter).keys() <= {"fixed"} or isinstance(value, jax.ShapeDtypeStruct):
        return  # what is fixed stays as it is
    live, sure = (None if part is None else jnp.broadcast_to(part, value.shape) for part in (mask, trusted))
    variable.set_value(keep_constraints(value, constrained_mask(owner, parameter, live), sure))


def trusted_by(new: Any, old: Any) -> Any:
    """Return where values are that those come to which are tied to them: what was live before a mask's change, and is."""
    return new & old if isinstance(old, jax.Array) and old.dtype == jnp.bool_ and old.shape == new.shape else None


def move_constraints(layer: Any, source: Any) -> None:
    """Let constraints of one entry a connection follow those: new ones, at -1 in ``source``, are free."""
    for kind, variable in constraint_variables(layer, "weight_values").items():
        array = variable.get_value()
        if array.ndim == 1:
            moved = jnp.where(source >= 0, array[jnp.maximum(source, 0)], jnp.asarray(FREE[kind], array.dtype))
            variable.set_value(moved)


def in_other_form(new: Any, old: Any, pattern: SparsityPattern) -> None:
    """Give the other form of a linear layer the constraints that it had, which go by the kernel's axes."""
    of_new, of_old = ("kernel", "weight_values") if hasattr(new, "kernel") else ("weight_values", "kernel")
    own = known_constraints(old, of_old)
    if own is None:
        return
    made = turned_to_kernel(own, pattern) if of_new == "kernel" else sparse_constraints(own, pattern)
    hold_constraints(new, of_new, made_variables(made, children_of(old)[of_old].get_value().dtype))


def turned_to_kernel(given: Constraints, pattern: SparsityPattern) -> Constraints:
    """Return constraints of which those of one entry a connection are whole arrays in a kernel's axes."""
    own: dict[str, Any] = {}
    for kind, array in given.arrays().items():
        of_connections: Any = {kind: array}
        is_whole = array.ndim != 1
        own[kind] = array if is_whole else Constraints(**of_connections, pattern=pattern).T.arrays()[kind]
    return Constraints(**own)


def sparse_constraints(given: Constraints, pattern: SparsityPattern) -> Constraints:
    """Return constraints, whole arrays in a kernel's axes, as those of connections; what is kept for each input or output
    stays in the kernel's axes.

    Raises:
        ValueError: if they do not fit.
    """
    turned = Constraints(**{k: a.T if a.ndim == 2 else a for k, a in given.arrays().items()}, pattern=given.pattern)
    arrays = turned.for_pattern(pattern).arrays()
    return Constraints(**{k: a.T if a.ndim == 2 else a for k, a in arrays.items()}, pattern=pattern)
