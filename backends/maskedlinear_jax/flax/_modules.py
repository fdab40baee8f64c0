"""What is asked of a whole nnx model, its layers, who holds a variable, kernels' gradients; and its layers replaced."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from maskedlinear.models import refuse_shared
from maskedlinear_jax._compat import children, holds_data, is_traced

__all__ = [
    "as_double",
    "at",
    "check_alone",
    "children_of",
    "copy_metadata_and_attributes",
    "device_of",
    "doubled",
    "layers_of",
    "parameter_users",
    "pure",
    "replace_modules",
]


def layers_of(model: Any, kind: Any) -> dict[str, Any]:
    """Return the layers of a kind, by their paths with dots between."""
    return {".".join(map(str, path)): node for path, node in nnx.iter_graph(model) if isinstance(node, kind)}


def children_of(node: Any) -> Mapping[Any, Any]:
    """Return what a node of an nnx graph holds, by name: a module, or a plain container, as a bridged linen model has."""
    if isinstance(node, Mapping):
        return node
    if isinstance(node, (list, tuple)):
        return dict(enumerate(node))
    return {} if isinstance(node, nnx.Variable) else getattr(node, "__dict__", {})


def at(model: Any, path: tuple[Any, ...]) -> Any:
    """Return what is at a path of an nnx model, of its state, or of a tree."""
    for key in path:
        model = model[key] if isinstance(model, (Mapping, Sequence)) else getattr(model, key)
    return model


def parameter_users(model: Any) -> dict[int, list[Any]]:
    """Return the modules that hold each variable, by its identity: more than one where it is shared."""
    found: dict[int, list[Any]] = {}
    for _, node in nnx.iter_graph(model):
        if not isinstance(node, nnx.Variable):
            for variable in children_of(node).values():
                if isinstance(variable, nnx.Variable):
                    found.setdefault(id(variable), []).append(node)
    return found


def check_alone(model: Any, weights: Iterable[Any]) -> None:
    """Raise a ``ValueError`` if a weight whose connections are to move is shared."""
    held = parameter_users(model)
    for variable in weights:
        users = held[id(variable)]
        refuse_shared(next(name for name, part in children_of(users[0]).items() if part is variable), len(users))


def pure(tree: Any) -> Any:
    """Return a tree of Variables as one of arrays."""
    return nnx.as_pure(tree) if hasattr(nnx, "as_pure") else nnx.to_arrays(nnx.pure(tree))  # type: ignore[attr-defined, unused-ignore]


def device_of(array: Any) -> jax.Device | None:
    """Return the device that an array lies on; ``None`` if on several, or traced."""
    devices = [] if is_traced(array) else list(array.devices())
    return devices[0] if len(devices) == 1 else None


def copy_metadata_and_attributes(new: Any, old: Any) -> Any:
    """Give ``new``, the other form of a layer, what a user has written on ``old``: metadata and attributes."""
    for one, other in ((_weight(new), _weight(old)), (new.bias, old.bias)):
        for name, value in () if other is None else other.get_metadata().items():
            if name not in one.get_metadata():
                one.set_metadata(name, value)
    known = vars(new).keys() | vars(type(old)(1, 1, rngs=nnx.Rngs(0))).keys() | type(old).__annotations__.keys()
    for name in vars(old).keys() - known:
        value = getattr(old, name)
        setattr(new, name, nnx.data(value) if holds_data(old, name) else nnx.static(value))
    return new


def replace_modules(node: Any, made: dict[int, Any], seen: set[int]) -> Any:
    """Return ``node`` with all layers that ``made`` has a new form of replaced, in place where it can change."""
    if id(node) in made:
        return made[id(node)]
    if isinstance(node, tuple):
        parts = [replace_modules(part, made, seen) for part in node]
        if all(new is old for new, old in zip(parts, node, strict=True)):
            return node
        return type(node)(*parts) if hasattr(node, "_fields") else tuple(parts)
    if not isinstance(node, nnx.Pytree | list | dict) or isinstance(node, nnx.Variable) or id(node) in seen:
        return node
    seen.add(id(node))
    if isinstance(node, nnx.List | list):
        named: list[tuple[Any, Any]] = list(enumerate(node))
    else:
        named = list((node if isinstance(node, dict) else children(node)).items())
    for name, child in named:
        new = replace_modules(child, made, seen)
        if new is child:
            continue
        if isinstance(node, list | dict | nnx.List):
            node[name] = new
        else:
            setattr(node, name, nnx.data(new))
    return node


def _weight(layer: Any) -> Any:
    """Return the Variable of a masked layer's weights, of either form."""
    return layer.kernel if hasattr(layer, "kernel") else layer.weight_values


def doubled(model: Any) -> Any:
    """Return a copy in float64 and evaluation."""
    copy = nnx.clone(model)
    copy.eval()
    nnx.update(copy, jax.tree.map(as_double, nnx.state(copy)))
    for _, node in nnx.iter_graph(copy):
        if isinstance(node, nnx.Module) and getattr(node, "dtype", None) is not None:
            node.dtype = None  # type: ignore[attr-defined]  # that of the parameters
        if isinstance(node, nnx.Module) and hasattr(node, "param_dtype"):
            node.param_dtype = jnp.float64  # that of a recurrent cell's carry
    return copy


def as_double(value: Any) -> Any:
    """Return an array in float64 if it is of floats."""
    floating = hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.floating)
    return jnp.asarray(value, jnp.float64) if floating else value
