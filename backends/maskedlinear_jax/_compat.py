"""The names of JAX and Flax that are no public interface. Where one is missing, a slower way stands in, or an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

__all__ = [
    "ClosedJaxpr",
    "Jaxpr",
    "Literal",
    "Primitive",
    "ShapedArray",
    "ad",
    "batching",
    "children",
    "enable_x64",
    "holds_data",
    "is_for_export",
    "is_traced",
    "mlir",
    "threefry_2x32",
]

ClosedJaxpr: Any
Jaxpr: Any
Literal: Any
Primitive: Any
ShapedArray: Any
ad: Any
batching: Any
mlir: Any
threefry_2x32: Any

# Without primitives the sparse products are those that JAX differentiates itself, and shrink refuses.
try:
    from jax.core import ShapedArray
    from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Primitive
    from jax.interpreters import ad, batching, mlir
except ImportError:  # pragma: no cover - of no release so far
    ClosedJaxpr = Jaxpr = Literal = Primitive = ShapedArray = ad = batching = mlir = None

try:
    from jax.extend.random import threefry_2x32
except ImportError:  # pragma: no cover - of no release so far
    threefry_2x32 = None

_Tracer: Any = getattr(jax.core, "Tracer", None)


def is_for_export(lowering_context: Any) -> bool:
    """Whether a primitive is lowered for ``jax.export``; a JAX that cannot say refuses to keep kernels of its own."""
    parameters = getattr(getattr(lowering_context, "module_context", None), "lowering_parameters", None)
    return bool(getattr(parameters, "for_export", False))


def is_traced(value: Any) -> bool:
    """Whether ``value`` is an array inside a transform, whose numbers are not known yet."""
    if _Tracer is not None:
        return isinstance(value, _Tracer)
    if not isinstance(value, jax.Array):
        return False
    try:
        np.asarray(value)
    except jax.errors.TracerArrayConversionError:
        return True
    return False


def enable_x64(on: bool) -> Any:
    """``jax.enable_x64``, or its older name."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(on)
    return jax.experimental.enable_x64(on)  # type: ignore[attr-defined, unused-ignore]


def children(module: Any) -> Mapping[str, Any]:
    """Return the attributes of an nnx module, without those that nnx keeps its books in."""
    return {name: value for name, value in vars(module).items() if not name.startswith("_pytree")}


def holds_data(module: Any, name: str) -> bool:
    """Whether nnx takes an attribute of a module for data, or for a part of the program."""
    from flax import nnx

    known = getattr(module, "_pytree__nodes", {})
    return bool(known[name]) if name in known else nnx.is_data(getattr(module, name))
