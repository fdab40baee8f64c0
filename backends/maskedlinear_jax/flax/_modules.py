"""What is asked of a whole nnx model: its layers by name, who holds a variable, and the gradients of its kernels."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

__all__ = ["kernel_gradients", "layers_of", "owners"]


def layers_of(model: Any, kind: Any) -> dict[str, Any]:
    """Return the layers of a kind, by their paths with dots between."""
    return {".".join(map(str, path)): node for path, node in nnx.iter_graph(model) if isinstance(node, kind)}


def owners(model: Any) -> dict[int, list[Any]]:
    """Return the modules that hold each variable, by its identity: more than one where it is shared."""
    found: dict[int, list[Any]] = {}
    for _, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Pytree):
            for variable in vars(node).values():
                if isinstance(variable, nnx.Variable):
                    found.setdefault(id(variable), []).append(node)
    return found


def kernel_gradients(gradients: Any) -> dict[str, Array]:
    """Return the gradients of kernels, of what ``nnx.grad`` returns, by the names of their layers."""
    return {
        ".".join(map(str, path[:-1])): leaf[...] if isinstance(leaf, nnx.Variable) else jnp.asarray(leaf)
        for path, leaf in nnx.to_flat_state(gradients)
        if path[-1] == "kernel"
    }
