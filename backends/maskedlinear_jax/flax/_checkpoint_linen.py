"""Files of linen's variables: each array by collection and path, a parameter with its mask and what is dormant of it."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from flax.traverse_util import flatten_dict
from numpy.typing import NDArray

from maskedlinear.checkpoint import MaskedArray
from maskedlinear.checkpoint._names import Expected
from maskedlinear.models import WeightAxes
from maskedlinear_jax._checkpoint import (
    Array,
    array_of,
    axes_and_role,
    expected_of,
    like,
    masked_array,
    on_host,
    plain_array,
    warn_of_acting,
)
from maskedlinear_jax._tree import named_leaves
from maskedlinear_jax.flax._checkpoint_load import fitted_mask
from maskedlinear_jax.flax._kernel import checked_mask, full_kernel
from maskedlinear_jax.flax._variables import dormant_of, has_own_mask, linen_weights, load_masks

__all__ = ["lives", "load_variables", "variables_arrays", "variables_expected"]

_PARAMS = "params."


def lives(variables: Mapping[str, Any]) -> dict[str, NDArray[np.bool_]]:
    """Return the masks of masked parameters, of their shapes, by their paths in ``params``."""
    return {".".join(path): on_host("a mask", _live(*parts)) for path, parts in linen_weights(variables).items()}


def _live(kernel: Any, mask: Any) -> Any:
    """Return the mask of a parameter in its shape."""
    return jnp.broadcast_to(checked_mask(kernel, mask), kernel.shape)


def _leaves(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arrays but masks and what is dormant, by name."""
    return named_leaves({name: tree for name, tree in variables.items() if name not in ("masks", "dormant")})


def _told(name: str, leaf: Any) -> tuple[WeightAxes | None, str]:
    is_weight = name.startswith(_PARAMS) and np.ndim(leaf) > 1
    return axes_and_role(name.removeprefix(_PARAMS), leaf) if is_weight else (None, "")


def variables_expected(variables: Mapping[str, Any]) -> dict[str, Expected]:
    """Return what a file must have for a model."""
    return {name: expected_of(name, leaf, *_told(name, leaf)) for name, leaf in _leaves(variables).items()}


def variables_arrays(variables: Mapping[str, Any], dormant: bool) -> dict[str, Array]:
    """Return what a file holds of a model.

    Raises:
        ValueError: if a mask does not fit, or an array is abstract or on other processes too.
        TypeError: if something is no array, traced, or of a dtype that no file holds.
    """
    found = {name: plain_array(name, leaf, *_told(name, leaf)) for name, leaf in _leaves(variables).items()}
    arrays: dict[str, Array] = dict(found)
    acting = []
    for path, (kernel, mask) in linen_weights(variables).items():
        own, live = ".".join(path), _live(kernel, mask)
        kept = dormant_of(variables, path) if dormant else None
        full = kernel if kept is None else full_kernel(kernel, live, kept)
        name = _PARAMS + own
        axes, role = _told(name, kernel)
        arrays[name] = masked_array(name, full, on_host("a mask", live), dormant=kept is not None, axes=axes, role=role)
        if not has_own_mask(variables, path) and bool(((kernel != 0) & ~live).any()):
            acting.append(own)
    warn_of_acting(acting)
    return arrays


def load_variables(variables: Mapping[str, Any], arrays: Mapping[str, Array], differences: list[str]) -> Any:
    """Return variables like these with the arrays of a file and its masks; or add to what differs.

    Args:
        variables: which stay as they are.
        arrays: the file's, by the names of the variables and in their layouts.
        differences: what differs so far; if anything does, these are returned as they are.
    """
    masked = linen_weights(variables)
    parameters = {".".join(path): path for path in flatten_dict(variables["params"])}
    masks: dict[tuple[str, ...], Any] = {}
    for own, path in parameters.items():
        array = arrays.get(_PARAMS + own)
        if isinstance(array, MaskedArray) or (array is not None and path in masked):
            live = array.mask() if isinstance(array, MaskedArray) else np.ones(array.shape, bool)
            kernel = meta.unbox(flatten_dict(variables["params"])[path])
            own_mask = masked[path][1] if path in masked else live
            try:
                masks[path] = like(fitted_mask(own, live, own_mask), own_mask if path in masked else kernel, bool)
            except ValueError as error:
                differences.append(str(error))
    if any(isinstance(array, MaskedArray) and not name.startswith(_PARAMS) for name, array in arrays.items()):
        differences.append("masks are of parameters; the file has some of other collections")
    if differences:
        return variables
    leaves = _leaves(variables)
    values = [like(array_of(arrays[name], leaf), leaf) if name in arrays else leaf for name, leaf in leaves.items()]
    rest = {name: tree for name, tree in variables.items() if name not in ("masks", "dormant")}
    filled = jax.tree.unflatten(jax.tree.structure(rest), values)
    return type(variables)(load_masks({**variables, **filled}, masks))  # type: ignore[call-arg]
