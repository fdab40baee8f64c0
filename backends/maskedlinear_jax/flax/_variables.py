"""The masks of a linen model, which lie in its variables: in the collections ``masks`` and ``dormant``, beside ``params``.

Of a ``MaskedDense`` they are called ``mask`` and ``dormant`` there, of any other module's parameter ``kernel_mask`` and
``kernel_dormant``, as in nnx: linen passes by what no module asks for.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict, freeze, meta
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from maskedlinear_jax._placement import full_like, to_like
from maskedlinear_jax.flax._kernel import checked_mask, exchange, masked_kernel

__all__ = [
    "Path",
    "dormant_of",
    "has_own_mask",
    "is_linen",
    "linen_parameters",
    "linen_weights",
    "load_masks",
    "mask_variables",
    "set_linen_masks",
    "set_linen_values",
    "unmask_variables",
]

Path = tuple[str, ...]  # of a parameter
_COLLECTIONS = ("params", "masks", "dormant")


def is_linen(model: Any) -> bool:
    """Whether these are the variables of a linen model."""
    return isinstance(model, Mapping) and "params" in model and not isinstance(model["params"], nnx.Module)


def linen_parameters(variables: Mapping[str, Any]) -> dict[Path, Any]:
    """Return the parameters, out of the boxes of partitioned ones, by their paths."""
    return {
        tuple(path): jnp.asarray(meta.unbox(leaf)) if not hasattr(meta.unbox(leaf), "dtype") else meta.unbox(leaf)
        for path, leaf in flatten_dict(variables["params"]).items()
    }


def linen_weights(variables: Mapping[str, Any]) -> dict[Path, tuple[Array, Array]]:
    """Return each masked parameter and its mask, by the parameter's path.

    Raises:
        ValueError: if there is a mask of a parameter that there is not.
    """
    params, masks = flatten_dict(variables["params"]), flatten_dict(variables.get("masks", {}))
    found = {}
    for place, mask in masks.items():
        name = place[-1].removesuffix("mask").removesuffix("_") or "kernel"
        path = (*place[:-1], name)
        if path not in params:
            raise ValueError(
                f"a mask is of a parameter; got {'.'.join(place)}, and there is no {'.'.join(path)}: a collection of a "
                "model's own must not be called 'masks'"
            )
        found[path] = meta.unbox(params[path]), meta.unbox(mask)
    return found


def has_own_mask(variables: Mapping[str, Any], path: Path) -> bool:
    """Whether a parameter is the kernel of a ``MaskedDense``."""
    return path[-1] == "kernel" and (*path[:-1], "mask") in flatten_dict(variables.get("masks", {}))


def set_linen_masks(
    variables: Mapping[str, Any], masks: Mapping[Path, tuple[Array, Array | None]], *, revive: bool = True
) -> dict[str, Any]:
    """Return variables in which parameters, by their paths, have other masks, checked; weights move.

    What comes back is what it was, or, if it is not to ``revive``, 0.
    """
    flat = _flattened(variables)
    for path, (new, pruned) in masks.items():
        places = _places(path, flat)
        boxes = {name: flat[name][place] for name, place in places.items() if place in flat.get(name, {})}
        kernel, mask, dormant = (meta.unbox(boxes.get(name)) for name in _COLLECTIONS)
        old = checked_mask(kernel, mask)
        new = to_like(new, kernel if new.shape == kernel.shape else old, f"the mask of {'.'.join(path)}")
        kernel, dormant = exchange(kernel, old, dormant, new, pruned)
        if not revive:
            kernel = masked_kernel(kernel, old)
        for name, value in zip(_COLLECTIONS, (kernel, new, dormant), strict=True):
            if name in boxes:
                flat[name][places[name]] = jax.tree.map(lambda _, value=value: value, boxes[name])
    return _like(variables, flat)


def set_linen_values(variables: Mapping[str, Any], values: Mapping[Path, Array]) -> dict[str, Any]:
    """Return variables in which parameters, by their paths, have other values."""
    flat = _flattened(variables)
    for path, value in values.items():
        flat["params"][path] = jax.tree.map(lambda _, value=value: value, flat["params"][path])
    return _like(variables, flat)


def mask_variables(
    variables: Mapping[str, Any], masks: Mapping[Path, Array | None], keep_dormant: bool
) -> dict[str, Any]:
    """Return variables in which more parameters have masks, full ones if ``None``; in the boxes of partitioned ones."""
    flat = _flattened(variables)
    for path, mask in masks.items():
        boxed = flat["params"][path]
        kernel = meta.unbox(boxed)
        new = full_like(kernel, True, bool) if mask is None else to_like(mask, kernel, ".".join(path))
        values = masked_kernel(kernel, new), new, masked_kernel(kernel, ~new)
        places = _places(path, flat)
        for name, value in zip(_COLLECTIONS, values, strict=True):
            if name != "dormant" or keep_dormant:
                flat.setdefault(name, {})[places[name]] = jax.tree.map(lambda _, value=value: value, boxed)
    return _like(variables, flat)


def dormant_of(variables: Mapping[str, Any], path: Path) -> Array | None:
    """Return what is dormant of a masked parameter, if that is kept."""
    flat = _flattened(variables)
    found: Array | None = meta.unbox(flat.get("dormant", {}).get(_places(path, flat)["dormant"]))
    return found


def load_masks(variables: Mapping[str, Any], masks: Mapping[Path, Array]) -> Mapping[str, Any]:
    """Return variables in which parameters have these masks, whatever theirs were; what is under them becomes dormant."""
    flat, masked = _flattened(variables), linen_weights(variables)
    lets_go = {
        path for path in masks if path in masked and _places(path, flat)["dormant"] not in flat.get("dormant", {})
    }
    for keep_dormant in (True, False):
        part = {path: mask for path, mask in masks.items() if (path not in lets_go) is keep_dormant}
        variables = mask_variables(variables, part, keep_dormant) if part else variables
    return variables


def unmask_variables(variables: Mapping[str, Any], paths: list[Path]) -> dict[str, Any]:
    """Return variables in which parameters have no masks any more, but for those of ``MaskedDense``, which asks for one."""
    flat = _flattened(variables)
    for path in paths:
        places = _places(path, flat)
        if places["masks"][-1] != "mask":
            boxed, mask = flat["params"][path], meta.unbox(flat["masks"].pop(places["masks"]))
            flat["params"][path] = jax.tree.map(lambda kernel, mask=mask: masked_kernel(kernel, mask), boxed)
            flat.get("dormant", {}).pop(places["dormant"], None)
    return {name: tree for name, tree in _like(variables, flat).items() if tree or name not in ("masks", "dormant")}


def _flattened(variables: Mapping[str, Any]) -> dict[str, dict[Path, Any]]:
    return {name: flatten_dict(variables[name], keep_empty_nodes=True) for name in _COLLECTIONS if name in variables}


def _places(path: Path, flat: Mapping[str, Mapping[Path, Any]]) -> dict[str, Path]:
    """Return where a parameter, its mask, and what is dormant of it are, in their collections."""
    ours = path[-1] == "kernel" and (*path[:-1], "mask") in flat.get("masks", {})
    mask, dormant = ("mask", "dormant") if ours else (f"{path[-1]}_mask", f"{path[-1]}_dormant")
    return {"params": path, "masks": (*path[:-1], mask), "dormant": (*path[:-1], dormant)}


def _like(variables: Mapping[str, Any], flat: Mapping[str, Mapping[Path, Any]]) -> dict[str, Any]:
    """Return the variables with these collections, frozen where they were."""
    made = {name: unflatten_dict(tree) for name, tree in flat.items()}
    frozen = isinstance(variables["params"], FrozenDict)
    return {**variables, **{name: freeze(tree) if frozen else tree for name, tree in made.items()}}
