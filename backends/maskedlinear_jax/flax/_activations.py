"""``record_activations`` for Flax: what goes into masked dense layers, of nnx and linen, for Wanda, SparseGPT and OBS."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from flax import linen, nnx
from numpy.typing import NDArray

from maskedlinear import pruning
from maskedlinear.models import first_names
from maskedlinear.pruning._layers import Include, check_known, matches
from maskedlinear_jax._compat import is_traced
from maskedlinear_jax._placement import to_host
from maskedlinear_jax.flax._adapter import masked_of, refuse_linen_module
from maskedlinear_jax.flax._modules import at
from maskedlinear_jax.flax._variables import is_linen

__all__ = ["Activations", "record_activations"]

_NNX = (nnx.Linear, nnx.LinearGeneral)
_LINEN = (linen.Dense, linen.DenseGeneral)


class Activations:
    """Sums over all rows x that have gone into each weight: of squares, and of ``x xᵀ`` if asked for; on the host, float64.

    Attributes:
        names: of the weights whose inputs are recorded, those of :func:`get_masks`.
    """

    def __init__(self, weights: dict[str, Any], hessian: bool) -> None:
        self.names = list(weights)
        self._weights = weights
        self._squares = {name: np.zeros(self._width(name)) for name in weights}
        self._products = {name: np.zeros((self._width(name),) * 2) for name in weights} if hessian else None
        self._rows = dict.fromkeys(weights, 0)

    def input_norms(self, name: str) -> NDArray[np.float64]:
        """Return ``‖x‖₂`` of each input of a weight, shape ``(in,)``.

        Raises:
            ValueError: if there is no such weight, or nothing has gone into it.
        """
        self._check(name)
        return np.asarray(np.sqrt(self._squares[name]))

    def hessian(self, name: str) -> NDArray[np.float64]:
        """Return ``2/n Σ x xᵀ`` over the n rows that have gone into a weight, shape ``(in, in)``.

        Raises:
            ValueError: if there is no such weight, nothing has gone into it, or no Hessians were asked for.
        """
        self._check(name)
        if self._products is None:
            raise ValueError("Hessians are recorded only if asked for: record_activations(model, hessian=True)")
        return np.asarray(self._products[name] * (2 / self._rows[name]))

    def wanda(self) -> dict[str, NDArray[np.float64]]:
        """Return :func:`maskedlinear.pruning.wanda` of each recorded weight, ``(out, in)`` by name, for :func:`prune_model`.

        Raises:
            ValueError: if nothing has gone into one of them.
        """
        return {name: pruning.wanda(self._matrix(name), self.input_norms(name)) for name in self.names}

    def _matrix(self, name: str) -> NDArray[Any]:
        weight = self._weights[name]
        return np.asarray(weight.axes.matrices(np.where(to_host(weight.mask), to_host(weight.value), 0))[0])

    def _width(self, name: str) -> int:
        weight = self._weights[name]
        return int(weight.axes.matrix_shape(weight.value.shape)[2])

    def _check(self, name: str) -> None:
        check_known("names", [name], self.names)
        if not self._rows[name]:
            raise ValueError(
                f"nothing has gone into {name or 'the layer'}: call the model inside record_activations, or leave it out "
                "with include=..."
            )

    def _add(self, name: str, x: Any) -> None:
        if is_traced(x):
            raise ValueError("activations are recorded outside of transforms: call the model without jit, grad or scan")
        rows = to_host(x).astype(np.float64).reshape(-1, self._width(name))
        self._squares[name] += np.square(rows).sum(axis=0)
        if self._products is not None:
            self._products[name] += rows.T @ rows
        self._rows[name] += len(rows)


@contextmanager
def record_activations(model: Any, *, hessian: bool = False, include: Include = None) -> Iterator[Activations]:
    """Record what goes into each masked dense layer in the calls inside, which are not jitted::

        with record_activations(model) as activations:
            model(x)
        prune_model(model, 0.5, score=activations.wanda(), scope="row")

    Recorded are ``Linear`` and ``LinearGeneral`` of nnx, ``Dense`` and ``DenseGeneral`` of linen, masked ones too; of
    attention these are its projections. Masked weights of other modules are left out: a warning names them. The model is as
    it was afterwards, whatever is raised inside.

    Args:
        model: an nnx module with masked weights; or linen's variables with them, which ``module.apply`` is given inside.
        hessian: whether ``x xᵀ`` is summed too: 8 · in² bytes a weight.
        include: which weights, as in :func:`mask_model`.

    Raises:
        ValueError: if there is nothing to record.
    """
    refuse_linen_module("record_activations", model)
    masked = {name: one for name, one in masked_of(model).items() if matches(name, one.owner, include)}
    weights = {name: one for name, one in masked.items() if _is_known(model, name, one)}
    left_out = [name for name in masked if name not in weights]
    if left_out:
        warnings.warn(
            f"what goes into {first_names(left_out)} is not recorded, since it is not one dense layer's: prune it by "
            "another score, or leave them out with include=...",
            stacklevel=3,
        )
    if not weights:
        raise ValueError(
            f"there is no masked dense layer to record the inputs of: include={include!r} means none; make masks with "
            "mask_model(model)"
        )
    activations = Activations(weights, hessian)
    with _linen_calls(activations) if is_linen(model) else _nnx_calls(model, activations):
        yield activations


def _is_known(model: Any, name: str, weight: Any) -> bool:
    """Whether a masked weight is one matrix, of a dense layer if that can be told here: linen's tell it when they act."""
    if weight.axes is None or weight.axes.matrix_shape(weight.value.shape)[0] != 1:
        return False
    return is_linen(model) or (isinstance(_layer(model, name), _NNX) and _is_last(_layer(model, name)))


def _layer(model: Any, name: str) -> Any:
    try:
        return at(model, tuple(int(key) if key.isdigit() else key for key in name.split(".") if key))
    except (AttributeError, KeyError, IndexError, TypeError):
        return None


def _is_last(layer: Any) -> bool:
    """Whether a layer sums over the last axes of its input, in their order."""
    axis = getattr(layer, "axis", -1)
    axes = tuple(axis) if isinstance(axis, tuple | list) else (axis,)
    return (
        axes == tuple(range(-len(axes), 0))
        and not getattr(layer, "batch_axis", None)
        and not getattr(layer, "batch_dims", ())
    )


@contextmanager
def _nnx_calls(model: Any, activations: Activations) -> Iterator[None]:
    """Have the layers of a model tell what they are called on."""
    layers = {name: _layer(model, name) for name in activations.names}
    before = [(layer, layer.__class__) for layer in layers.values()]
    try:
        for name, layer in layers.items():
            layer.__class__ = _telling(layer.__class__, name, activations._add)
        yield
    finally:
        for layer, kind in before:
            layer.__class__ = kind


def _telling(kind: Any, name: str, tell: Callable[[str, Any], None]) -> Any:
    def call(self: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
        tell(name, inputs)
        return kind.__call__(self, inputs, *arguments, **named)

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})


@contextmanager
def _linen_calls(activations: Activations) -> Iterator[None]:
    def look(call: Any, arguments: Any, named: Any, context: Any) -> Any:
        module = context.module
        if context.method_name == "__call__" and isinstance(module, _LINEN) and _is_last(module):
            name = ".".join(module.path)
            if name in activations.names:
                activations._add(name, arguments[0] if arguments else named["inputs"])
        return call(*arguments, **named)

    with linen.intercept_methods(look):
        yield
