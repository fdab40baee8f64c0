"""Dynamic sparse training for nnx: connections of a model move while it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from maskedlinear import pruning
from maskedlinear.pruning._layers import Include, is_meant, layer_seed
from maskedlinear_jax.flax._modules import kernel_gradients, layers_of, owners
from maskedlinear_jax.flax._nnx import MaskedLinear
from maskedlinear_jax.flax._sparse_nnx import SparseLinear

__all__ = ["growth_gradients", "regrow_model"]


def growth_gradients(loss: Callable[..., Array], model: Any, *arguments: Any) -> dict[str, Array]:
    """Return the loss's gradient with respect to *all* weights of masked layers, those under the mask too (RigL).

    They are the gradients of a model whose masks are full and whose masked weights are 0, which computes the same.

    Args:
        loss: a function of the model and ``arguments`` that returns a scalar; may be jitted with ``nnx.jit``.
        model: a module with :class:`maskedlinear.flax.MaskedLinear` layers.
        arguments: passed on to ``loss``.

    Returns:
        A gradient for each masked layer, by name, of the kernel's shape ``(in, out)``: for :func:`regrow_model`.
    """
    layers = layers_of(model, MaskedLinear)
    _refuse_shared(model, layers)
    whole = nnx.clone(model)
    for layer in layers_of(whole, MaskedLinear).values():
        layer.kernel[...] = layer.masked_kernel
        layer.set_mask(jnp.ones(layer.kernel[...].shape, bool))
    found = kernel_gradients(nnx.grad(loss)(whole, *arguments))
    return {name: found[name] for name in layers}


def regrow_model(
    model: Any,
    fraction: float,
    *,
    gradients: Mapping[str, Array] | None = None,
    include: Include = None,
    seed: int = 0,
) -> int:
    """Move a fraction of each masked layer's connections: the weakest go, as many others come, with weight 0.

    Source: SET (at random) and RigL (by gradient); see :func:`maskedlinear.pruning.regrow`. PyTorch's layers of the same
    weights move alike. Guard the optimizer with :func:`maskedlinear.jax.freeze_masked`: then new connections start with a
    clean state at its next step.

    Args:
        model: a module with :class:`maskedlinear.flax.MaskedLinear` layers.
        fraction: the share of live connections that move, in [0, 1]; :func:`maskedlinear.pruning.cosine` lets it fall.
        gradients: of :func:`growth_gradients`, to grow where they are largest; ``None`` grows at random.
        include: which layers, as in :func:`mask_model`.
        seed: of the random places; another at each step. Layer i takes ``seed + i``.

    Returns:
        How many connections moved.

    Raises:
        ValueError: if the fraction is out of its range, a weight or gradient is NaN, or a layer's gradient is missing; if a
            kernel is shared with another module, which a weight that becomes 0 would change; or if a layer is in the sparse
            form, whose connections are fixed here: ``expand`` the model first. The model is left as it was.
    """
    layers = {
        name: layer
        for name, layer in layers_of(model, (MaskedLinear, SparseLinear)).items()
        if is_meant(name, layer, include)
    }
    for name, layer in layers.items():
        if isinstance(layer, SparseLinear):
            raise ValueError(
                f"{name or 'the layer'} is in the sparse form, whose connections are fixed: expand(model) first"
            )
    _refuse_shared(model, layers)
    found: dict[str, np.ndarray[Any, Any]] = {}
    for place, (name, layer) in enumerate(layers.items()):
        if gradients is not None and name not in gradients:
            raise ValueError(f"growth by gradient needs that of each layer; {name or 'the layer'} has none")
        gradient = None if gradients is None else gradients[name].T
        mask, kernel, own = layer.mask[...], layer.kernel[...], layer_seed(seed, place)
        found[name] = pruning.regrow(mask.T, kernel.T, fraction, gradient, seed=own).T
    moved = 0
    for name, mask in found.items():
        layer = layers[name]
        new = mask & ~np.asarray(layer.mask[...])
        layer.kernel[...] = jnp.where(new, jnp.zeros((), layer.kernel[...].dtype), layer.kernel[...])
        layer.set_mask(mask)
        moved += int(np.count_nonzero(new))
    return moved


def _refuse_shared(model: Any, layers: Mapping[str, Any]) -> None:
    held = owners(model)
    for layer in layers.values():
        users = len(held[id(layer.kernel)])
        if users > 1:
            raise ValueError(
                f"connections move in a layer that has its kernel to itself; here {users} modules share it: leave it out "
                "with include=..."
            )
