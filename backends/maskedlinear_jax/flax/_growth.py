"""The gradient that RigL grows by: of all weights of masked layers, those under the mask too.

A layer in the sparse form is not given a matrix: what goes in and the cotangent of what comes out are recorded, and the
gradient's rows are made of them as they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from maskedlinear_jax.flax._modules import kernel_gradients, layers_of, refuse_shared
from maskedlinear_jax.flax._nnx import MaskedLinear
from maskedlinear_jax.flax._sparse_nnx import SparseLinear

__all__ = ["dense_gradients"]

Rows = Callable[[int, int], Array]

_MASKED = (MaskedLinear, SparseLinear)


class _Added(nnx.Variable[Array]):
    """0, added to what a layer returns: its gradient is the cotangent there."""


class _Seen(nnx.Variable[Array]):
    """What a layer was called on."""


class _Recorded(SparseLinear):
    """A sparse layer that takes down what each of its calls is given, and adds to what it returns."""

    seen: Any
    added: Any

    @classmethod
    def adopt(cls, layer: Any) -> None:
        layer.__class__ = cls
        layer.seen, layer.added = nnx.List([]), nnx.List([])

    def __call__(self, inputs: Array) -> Array:
        place = len(self.seen)
        self.seen.append(_Seen(jnp.asarray(inputs)))
        y = super().__call__(inputs)
        if place == len(self.added):
            self.added.append(_Added(jnp.zeros_like(y)))
        recorded: Array = y + self.added[place][...]
        return recorded


def dense_gradients(loss: Callable[..., Array], model: Any, *arguments: Any) -> dict[str, Array | Rows]:
    """Return the loss's gradient with respect to *all* weights of masked layers, those under the mask too (RigL).

    They are the gradients of a model whose masks are full and whose masked weights are 0, which computes the same.

    Args:
        loss: a function of the model and ``arguments`` that returns a scalar; may be jitted with ``nnx.jit``.
        model: a module with :class:`maskedlinear.flax.MaskedLinear` or :class:`maskedlinear.flax.SparseLinear` layers.
        arguments: passed on to ``loss``.

    Returns:
        For each masked layer, by name, what :func:`regrow_model` grows by: of a ``MaskedLinear`` the gradient, of the
        kernel's shape ``(in, out)``; of a ``SparseLinear`` a function of two rows, ``start`` and ``stop``, that makes this
        part of it, shape ``(stop - start, in)``, so that it never exists as a whole.

    Raises:
        ValueError: if a layer shares its weight with another module, or ``loss`` does not call a sparse layer.
    """
    refuse_shared(model, layers_of(model, _MASKED))
    whole = _prepared(loss, model, arguments)
    wanted = nnx.DiffState(0, nnx.Any(nnx.Param, _Added))
    gradients = nnx.grad(loss, argnums=wanted)(whole, *arguments)
    dense = kernel_gradients(gradients)
    return {
        name: dense[name] if isinstance(layer, MaskedLinear) else _rows(name, layer, gradients)
        for name, layer in layers_of(whole, _MASKED).items()
    }


def _prepared(loss: Callable[..., Array], model: Any, arguments: tuple[Any, ...]) -> Any:
    """Return a copy of a model with full masks, whose sparse layers record, with a zero to add for each of their calls."""
    whole = nnx.clone(model)
    for layer in layers_of(whole, MaskedLinear).values():
        layer.kernel[...] = layer.masked_kernel
        layer.mask.set_value(jnp.ones(layer.kernel[...].shape, bool))
    recorded = layers_of(whole, SparseLinear)
    for layer in recorded.values():
        _Recorded.adopt(layer)
    if not recorded:
        return whole
    definition, state = nnx.split(whole)
    calls: dict[str, list[Any]] = {}

    def call(state: Any) -> None:
        copy = nnx.merge(definition, state)
        loss(copy, *arguments)
        for name, layer in layers_of(copy, _Recorded).items():
            calls[name] = [(added[...].shape, added[...].dtype) for added in layer.added]

    jax.eval_shape(call, state)
    for name, layer in recorded.items():
        layer.added = nnx.List([_Added(jnp.zeros(*kind)) for kind in calls[name]])
    return whole


def _rows(name: str, layer: Any, gradients: Any) -> Rows:
    """Return what makes rows of a sparse layer's whole gradient, ``gᵀ · x``, of what was recorded."""
    found = {path: leaf for path, leaf in nnx.to_flat_state(gradients) if "added" in path}
    pairs = []
    for place, seen in enumerate(layer.seen):
        path = (*filter(None, name.split(".")), "added", str(place))
        (g,) = (leaf for at, leaf in found.items() if tuple(map(str, at)) == path)
        g, x = (jnp.asarray(array[...]) for array in (g, seen))
        pairs.append((g.reshape(-1, layer.out_features), x.reshape(-1, layer.in_features)))
    if not pairs:
        raise ValueError(
            f"growth by gradient needs a call of each layer; the loss does not call {name or 'the layer'}: leave it "
            "out of the model, or grow at random"
        )

    def rows(start: int, stop: int) -> Array:
        total: Array = sum(_product(g, x, start, stop - start) for g, x in pairs)
        return total

    return rows


@partial(jax.jit, static_argnums=3)
def _product(g: Array, x: Array, start: int, size: int) -> Array:
    wide = jnp.promote_types(g.dtype, jnp.float32)
    some = lax.dynamic_slice_in_dim(g, start, size, axis=1)
    return jnp.matmul(some.T.astype(wide), x.astype(wide))
