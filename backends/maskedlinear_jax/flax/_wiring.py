"""The weight of a Flax layer that a wiring reads by name, of both forms, nnx and linen, as it is now."""

from __future__ import annotations

from typing import Any

import jax
from flax import linen, nnx

from maskedlinear.models import LayerWeight, choose_weight, matrix_shape, read_matrix
from maskedlinear.pattern import SparsityPattern
from maskedlinear_jax._compat import is_traced
from maskedlinear_jax._placement import to_host
from maskedlinear_jax.flax._adapter import masked_of, parameters_of, refuse_linen_module
from maskedlinear_jax.flax._sparse_nnx import SparseLinear
from maskedlinear_jax.flax._variables import is_linen

__all__ = ["find_weight"]


def find_weight(model: Any, name: str | None) -> LayerWeight | None:
    """Return the weight of an nnx layer, or the one that is called ``name`` in a model or in linen's variables.

    Returns ``None`` if ``model`` is none of these.

    Raises:
        ValueError: if there is no such weight, or several, it is no matrix, or has no values.
        TypeError: if ``model`` is a linen module, or its numbers are not known, inside a transform.
    """
    if isinstance(model, linen.Module):
        refuse_linen_module("a wiring", model)
    if not isinstance(model, nnx.Module) and not is_linen(model):
        return None
    masked = masked_of(model, sparse=True)
    every = [weight for weight in parameters_of(model) if not weight.fixed and weight.sparse is None]
    plain = {weight.name: weight for weight in every if name is not None or (not weight.why and weight.mask is None)}
    found = choose_weight(masked, plain, name)
    if isinstance(found, SparseLinear):
        if found.weight_values.get_value().ndim != 1:
            raise ValueError("a wiring is of one matrix; this is a stack of layers: take one of them")
        return LayerWeight((found.out_features, found.in_features), lambda: _of_sparse(found), _kept(found))
    is_masked = any(found is weight for weight in masked.values())
    shape = matrix_shape(tuple(found.value.shape), found.axes)
    module = found.owner if is_masked else found.users[0].module
    mask = found.mask if is_masked else None

    def read() -> Any:
        return read_matrix(_numpy(found.value), None if mask is None else _numpy(mask), found.axes)

    return LayerWeight(shape, read, _kept(module))


def _of_sparse(layer: SparseLinear) -> tuple[SparsityPattern, Any]:
    return layer.pattern, _numpy(layer.weight_values.get_value())


def _numpy(array: Any) -> Any:
    if is_traced(array):
        raise TypeError("names are read outside transforms (jit, grad, vmap): inside, numbers are not known")
    if isinstance(array, jax.ShapeDtypeStruct):
        raise ValueError("this layer is abstract, and has no weights yet: load its state first")
    return to_host(array)


def _kept(module: Any) -> Any:
    return vars(module).get("kept_nodes") if isinstance(module, nnx.Module) else None
