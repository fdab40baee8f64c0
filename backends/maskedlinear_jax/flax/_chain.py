"""A model that is known to be a chain: a plain ``nnx.Sequential`` of linear layers and of what acts node by node."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from maskedlinear.models import ChainLayer, known_chain
from maskedlinear_jax._placement import is_spread, to_host
from maskedlinear_jax.flax._adapter import masked_of
from maskedlinear_jax.flax._modules import layers_of
from maskedlinear_jax.flax._nnx import MaskedLinear
from maskedlinear_jax.flax._sparse_nnx import SparseLinear

__all__ = ["chain_of"]

_NAMES = (
    *("relu", "relu6", "leaky_relu", "gelu", "silu", "swish", "tanh", "sigmoid", "elu", "selu", "celu", "softplus"),
    *(
        "hard_tanh",
        "hard_sigmoid",
        "hard_silu",
        "hard_swish",
        "log_sigmoid",
        "soft_sign",
        "sin",
        "cos",
        "square",
        "abs",
    ),
)
_NODE_BY_NODE = [
    function for space in (nnx, jax.nn, jnp) for name in _NAMES if (function := getattr(space, name, None)) is not None
]


def chain_of(model: Any) -> Sequence[ChainLayer] | None:
    """Return the linear layers of a model in their order, if it is known that each takes what the one before gives; or
    ``None``: of a class of its own, with layers that mix nodes, or with weights that are used twice."""
    if not isinstance(model, nnx.Module):
        return None
    modules = list(_modules(model))
    masked, chain = {id(one.owner): one for one in masked_of(model, None).values()}, []
    layers = [module for module in modules if isinstance(module, nnx.Module) and not isinstance(module, nnx.Dropout)]
    if len({id(layer) for layer in layers}) < len(layers):
        return None
    for module in modules:
        if type(module) is SparseLinear and len(module.patterns) == 1:
            chain.append(ChainLayer(module.patterns[0], True))
        elif type(module) in (MaskedLinear, nnx.Linear):
            kernel, known = module.kernel[...], masked.get(id(module))
            if is_spread(kernel) or kernel.ndim != 2:
                return None
            live = np.ones(kernel.shape, bool) if known is None else np.broadcast_to(to_host(known.mask), kernel.shape)
            chain.append(ChainLayer(live.T, known is not None))
        elif type(module) is not nnx.Dropout and not any(module is function for function in _NODE_BY_NODE):
            return None
    number = len(masked) + len({id(layer) for layer in layers_of(model, SparseLinear).values()})
    return known_chain(chain, number)


def _modules(model: Any) -> Iterator[Any]:
    """Yield the modules of nested plain ``Sequential`` in their order; of another module itself."""
    if type(model) is nnx.Sequential:
        for module in model.layers:
            yield from _modules(module)
    else:
        yield model
