"""The names of JAX and Flax that are no public interface. Where one is missing, a slower way stands in, or an error."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

__all__ = [
    "ClosedJaxpr",
    "Jaxpr",
    "Literal",
    "Primitive",
    "ShapedArray",
    "ShardingTypeError",
    "ad",
    "automatic_axes",
    "batching",
    "children",
    "custom_partitioning",
    "dce_rules",
    "enable_x64",
    "from_the_start",
    "holds_data",
    "is_for_export",
    "is_traced",
    "make_varying",
    "mlir",
    "on_its_mesh",
    "placement",
    "sharding_of",
    "threefry_2x32",
    "without_mesh",
]

ClosedJaxpr: Any
Jaxpr: Any
Literal: Any
Primitive: Any
ShapedArray: Any
ShardingTypeError: Any
ad: Any
batching: Any
custom_partitioning: Any
mlir: Any
threefry_2x32: Any

# Without primitives the sparse products are those that JAX differentiates itself, and shrink refuses.
try:
    from jax.core import ShapedArray
    from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Primitive
    from jax.interpreters import ad, batching, mlir
except ImportError:  # pragma: no cover - of no release so far
    ClosedJaxpr = Jaxpr = Literal = Primitive = ShapedArray = ad = batching = mlir = None

# Without it both gradients of a product are formed where one is used.
dce_rules: Any
try:
    from jax.interpreters.partial_eval import dce_rules
except ImportError:  # pragma: no cover - of no release so far
    dce_rules = None

try:
    from jax.extend.random import threefry_2x32
except ImportError:  # pragma: no cover - of no release so far
    threefry_2x32 = None

# Without it XLA partitions the products as it sees fit, which is right, and slower on the CPU.
try:
    from jax.experimental.custom_partitioning import custom_partitioning
except ImportError:  # pragma: no cover - of no release so far
    custom_partitioning = None

try:
    from jax._src.core import ShardingTypeError
except ImportError:  # pragma: no cover - of no release so far
    ShardingTypeError = TypeError

_Tracer: Any = getattr(jax.core, "Tracer", None)


def is_for_export(lowering_context: Any) -> bool:
    """Whether a primitive is lowered for ``jax.export``; a JAX that cannot say refuses to keep kernels of its own."""
    parameters = getattr(getattr(lowering_context, "module_context", None), "lowering_parameters", None)
    return bool(getattr(parameters, "for_export", False))


def placement(lowering_context: Any) -> str:
    """Return where the arrays of a primitive lie that is lowered, ``"anywhere"`` if JAX does not say.

    ``"here"``: on one device, or on each its own, as in ``jax.shard_map``. ``"sharded"``: on those of a mesh that
    :func:`on_its_mesh` knows. ``"anywhere"`` else, and in a program that is exported.
    """
    axes: Any = getattr(getattr(lowering_context, "module_context", None), "axis_context", None)
    if is_for_export(lowering_context):
        return "anywhere"
    if hasattr(axes, "manual_axes"):
        left = [size for name, size in axes.mesh.shape.items() if name not in axes.manual_axes]
        return "here" if all(size == 1 for size in left) else "anywhere"
    if hasattr(axes, "axis_env") or getattr(axes, "num_devices", 0) == 1:
        return "here"
    return "anywhere" if on_its_mesh(lowering_context) is None else "sharded"


def on_its_mesh(lowering_context: Any) -> Any:
    """Return a lowering context with the mesh that a program's arrays lie on; ``None`` if it is not known.

    JAX lowers without devices, and XLA numbers them as the mesh does: any as many are as good.
    """
    context = lowering_context
    if custom_partitioning is None:
        return None
    try:
        meshes = [aval.sharding.mesh for aval in context.avals_in]
        meshes.append(getattr(context.jaxpr_eqn_ctx, "cur_abstract_mesh", None))
        count = context.module_context.axis_context.num_devices
        mesh = next((mesh for mesh in meshes if mesh is not None and not mesh.empty and mesh.size == count), None)
        if mesh is None or len(jax.devices()) < count:
            return None
        axes = dataclasses.replace(
            context.module_context.axis_context, device_assignment=tuple(jax.devices()[:count]), abstract_mesh=mesh
        )
        return without_mesh(context.replace(module_context=context.module_context.replace(axis_context=axes)))
    except (AttributeError, TypeError):
        return None


def automatic_axes() -> Any:
    """Return a context in which the explicit axes of the mesh in use are automatic: where arrays lie is no type."""
    try:
        mesh = jax.sharding.get_abstract_mesh()
        explicit, automatic = jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Auto
        if mesh.empty or explicit not in mesh.axis_types:
            return contextlib.nullcontext()
        types = tuple(automatic if kind == explicit else kind for kind in mesh.axis_types)
        return jax.sharding.use_abstract_mesh(
            jax.sharding.AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=types)
        )
    except (AttributeError, TypeError):  # pragma: no cover - of a JAX without explicit axes
        return contextlib.nullcontext()


def without_mesh(lowering_context: Any) -> Any:
    """Return a lowering context in which arrays have a shape and a dtype, and lie on no mesh."""
    avals = [ShapedArray(aval.shape, aval.dtype) for aval in lowering_context.avals_in]
    return lowering_context.replace(avals_in=avals)


def type_of(array: Any) -> Any:
    """``jax.typeof``, or its older name."""
    if hasattr(jax, "typeof"):
        return jax.typeof(array)
    return jax.core.get_aval(array)  # type: ignore[attr-defined, unused-ignore]


def sharding_of(array: Any) -> Any:
    """Return how an array's type says that it is sharded over explicit axes; ``None`` if it is on no mesh."""
    sharding = getattr(type_of(array), "sharding", None)
    return None if sharding is None or sharding.mesh.empty else sharding


def make_varying(arrays: Sequence[Any]) -> list[Any]:
    """Return arrays that vary over every axis that one of them varies over inside ``jax.shard_map``.

    Its transpose is the sum over those axes: that of a gradient.
    """
    types = [type_of(array) for array in arrays]
    each: list[frozenset[Any]] = [
        getattr(getattr(one, "mat", one), "varying", getattr(one, "vma", frozenset())) for one in types
    ]
    every = frozenset().union(*each)
    return [
        array if every == own else _vary(array, tuple(sorted(every - own)))
        for array, own in zip(arrays, each, strict=True)
    ]


def _vary(array: Any, axes: tuple[Any, ...]) -> Any:
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(array, axes, to="varying")
    return jax.lax.pvary(array, axes)  # type: ignore[attr-defined, unused-ignore]


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


def from_the_start(array: Any) -> dict[str, bool]:
    """Return what ``array.at[places].get`` is told so that no place counts from the end, where JAX has such an argument."""
    return {"wrap_negative_indices": False} if _has_wrapping(type(array.at[0])) else {}  # type: ignore[arg-type]


@functools.cache
def _has_wrapping(places: Any) -> bool:
    return "wrap_negative_indices" in inspect.signature(places.get).parameters


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
