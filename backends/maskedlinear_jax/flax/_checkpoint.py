"""Files of Flax's models: of nnx modules, which are loaded in place, and of linen's variables, which are made anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
from flax import nnx

from maskedlinear.checkpoint import CheckpointFile
from maskedlinear.checkpoint._names import Names, refuse, translated, warn_of_dropped
from maskedlinear.constraints import Constraints
from maskedlinear_jax import _checkpoint as trees
from maskedlinear_jax._checkpoint import Array, load_optimizer, optimizer_arrays
from maskedlinear_jax.flax import _checkpoint_linen as linen
from maskedlinear_jax.flax._adapter import masked_of, refuse_linen_module
from maskedlinear_jax.flax._checkpoint_load import load_module
from maskedlinear_jax.flax._checkpoint_nnx import is_nnx, live_of, module_arrays, module_expected
from maskedlinear_jax.flax._sparse_nnx import SparseLinear
from maskedlinear_jax.flax._variables import is_linen

__all__ = ["arrays_of", "framework_of", "load_into", "masked_names", "save_together"]


def framework_of(model: Any) -> str:
    """Return what a file calls the framework of this model."""
    return "nnx" if is_nnx(model) else "linen" if is_linen(model) else "tree"


def masked_names(model: Any) -> list[str]:
    """Return the names of the weights that have something masked."""
    masks = {
        name: one if isinstance(one, SparseLinear) else one.mask for name, one in masked_of(model, sparse=True).items()
    }
    return [
        name
        for name, mask in masks.items()
        if (mask.sparsity > 0 if isinstance(mask, SparseLinear) else isinstance(mask, jax.Array) and not mask.all())
    ]


def arrays_of(model: Any, *, dormant: bool = False, masks: Any = None, optimizer: Any = None) -> Mapping[str, Array]:
    """Return what a file holds of a model: of nnx every array of its state, by the path; of linen every variable.

    Args:
        model: an nnx module, or a list, tuple or dict of them; linen's variables; or a tree of Flax's (``nnx.State``).
        dormant: whether dormant values are saved.
        masks: those of a tree, as :func:`maskedlinear.jax.prune_tree` returns them.
        optimizer: an ``nnx.Optimizer``, or an optax state.

    Raises:
        TypeError: if ``model`` is a linen module, or holds what a file cannot.
        ValueError: if an array is abstract.
    """
    refuse_linen_module("save", model)
    kind = framework_of(model)
    if kind == "tree":
        return trees.arrays_of(model, dormant=dormant, masks=masks, optimizer=_state_of(optimizer), stacklevel=5)
    arrays = linen.variables_arrays(model, dormant) if kind == "linen" else module_arrays(model, dormant)
    if optimizer is None:
        return arrays
    lives = linen.lives(model) if kind == "linen" else live_of(model)
    return {**arrays, **optimizer_arrays(_state_of(optimizer), lives)}


def save_together(
    model: Any, path: Any, make: Callable[[], Mapping[str, Array]], write: Callable[[Mapping[str, Array]], object]
) -> None:
    """Write a file: of arrays that several processes share, the first does it, and the others wait."""
    trees.write_together(nnx.state(model) if is_nnx(model) else model, make(), write)


def load_into(model: Any, file: CheckpointFile, *, names: Names = None, optimizer: Any = None) -> Any:
    """Load a file into an nnx module, in place, and return it; or return new variables, or a new tree and its masks.

    What cannot change in place is returned: with an optax state as ``optimizer`` (a template of it), model and state. An
    ``nnx.Optimizer`` is loaded in place.

    Raises:
        CheckpointError: if the file is damaged or does not fit; all names and shapes that differ are named, and nothing was
            changed.
    """
    refuse_linen_module("load_into", model)
    kind, template = framework_of(model), _state_of(optimizer)
    if kind == "tree":
        return trees.load_into(model, file, names=names, optimizer=template)
    file.verify()
    expected = linen.variables_expected(model) if kind == "linen" else module_expected(model)
    constraints: dict[str, Constraints] = {}
    arrays, differences = translated(file, expected, kind, names, constraints=constraints)
    state, more = load_optimizer(template, file)
    differences += more
    update = partial(nnx.update, optimizer, state) if isinstance(optimizer, nnx.Optimizer) else None
    if kind == "linen":
        loaded: Any = linen.load_variables(model, arrays, differences)
    else:
        loaded = load_module(model, arrays, differences, update, None if update is None else optimizer, constraints)
    refuse(differences)
    if kind == "linen":
        warn_of_dropped(constraints, "linen's variables", stacklevel=4)
    if kind == "linen" and update is not None:
        update()
    return loaded if optimizer is None or update is not None else (loaded, state)


def _state_of(optimizer: Any) -> Any:
    return nnx.state(optimizer) if isinstance(optimizer, nnx.Optimizer) else optimizer
