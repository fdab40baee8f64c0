"""A model that is known to be a chain: a plain ``Sequential`` of linear layers and of modules that act node by node."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from maskedlinear.models import ChainLayer, known_chain
from maskedlinear_torch._dtensors import is_sharded
from maskedlinear_torch._layer import MaskedLinear
from maskedlinear_torch._modules import has_call_hooks
from maskedlinear_torch._shrink import NODE_BY_NODE
from maskedlinear_torch._sparse_layer import SparseLinear
from maskedlinear_torch._weights import walk_masked

__all__ = ["chain_of"]


def chain_of(model: nn.Module) -> Sequence[ChainLayer] | None:
    """Return the linear layers of a model in their order, if it is known that each takes what the one before gives; or
    ``None``: of a class of its own, with hooks, with layers that mix nodes, or with weights that are used twice."""
    model = model.module if isinstance(model, DistributedDataParallel) else model
    modules = list(_modules(model))
    layers = [module for module in modules if isinstance(module, nn.Linear | SparseLinear)]
    if len({id(layer) for layer in layers}) < len(layers) or any(map(has_call_hooks, modules)):
        return None
    chain = []
    for module in modules:
        if type(module) in (MaskedLinear, nn.Linear) and "weight" in module._parameters:
            weight = module._parameters["weight"]
            if weight is None or weight.is_meta or is_sharded(weight):
                return None
            if isinstance(module, MaskedLinear):
                chain.append(ChainLayer(module.known_mask.cpu().numpy(), True))
            else:
                chain.append(ChainLayer(np.ones(tuple(weight.shape), bool), False))
        elif type(module) is SparseLinear and module._cut is None:
            chain.append(ChainLayer(module.pattern, True))
        elif type(module) not in NODE_BY_NODE:
            return None
    masked_layers = [layer for _, layer in walk_masked(model)]
    return known_chain(chain, len({id(layer) for layer in masked_layers}))


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of nested plain ``Sequential`` in their order; of another module itself."""
    if type(model) is nn.Sequential and not has_call_hooks(model):
        for module in model:
            yield from _modules(module)
    else:
        yield model
