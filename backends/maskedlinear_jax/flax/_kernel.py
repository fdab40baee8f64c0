"""What the nnx and the linen layer share: a masked kernel of shape ``(in, out)``, and the masks of a whole model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict, freeze, meta
from jax import Array, lax

from maskedlinear.spec import check_floating, check_shapes
from maskedlinear_jax._functional import check_devices, expression, rule

__all__ = ["PARAMETER", "apply_kernel", "live_scale", "masked_kernel", "param_masks"]

PARAMETER = "kernel (in, out)"


def masked_kernel(kernel: Array, mask: Array) -> Array:
    """Return ``where(mask, kernel, 0)``, shape ``(in, out)``."""
    return jnp.where(mask, kernel, jnp.zeros((), kernel.dtype))


def live_scale(mask: Array, dtype: Any) -> Array:
    """Return √(in / live inputs) for every output, shape ``(out,)``; 1 for an output without live inputs."""
    live = jnp.sum(mask, axis=0)
    ratio = mask.shape[0] / jnp.maximum(live, 1).astype(jnp.float32)
    return jnp.where(live > 0, jnp.sqrt(ratio), jnp.ones((), jnp.float32)).astype(dtype)


def apply_kernel(
    inputs: Array,
    kernel: Array,
    mask: Array,
    bias: Array | None,
    *,
    precision: Any,
    forward_mode: bool,
    dot_general: Any = lax.dot_general,
    dot_options: Mapping[str, Any],
) -> Array:
    """Apply a layer to arguments of one dtype.

    The default product goes through the JAX backend's rule. A product of the user's own (quantized, with another output
    type or an output sharding) is called as Flax's dense layers call it, on the masked kernel.
    """
    check_floating("inputs", inputs.dtype, jnp.issubdtype(inputs.dtype, jnp.floating))
    check_shapes(inputs.shape, kernel.shape[::-1])
    check_devices(mask, kernel)
    if dot_general is lax.dot_general and not dot_options:
        return (expression if forward_mode else rule)(inputs, kernel, mask, bias, 0, precision)
    contract = (((inputs.ndim - 1,), (0,)), ((), ()))
    y: Array = dot_general(inputs, masked_kernel(kernel, mask), contract, precision=precision, **dot_options)
    return y if bias is None else y + jnp.reshape(bias, (1,) * (y.ndim - 1) + (-1,))


def param_masks(model: Any, wrt: Any = nnx.Param) -> Any:
    """Return the masks of a model in the structure of its parameters, for ``maskedlinear.jax.freeze_masked``.

    Args:
        model: an nnx module, or the variables of a linen one: ``{"params": ..., "masks": ..., ...}``.
        wrt: for nnx, the filter that the optimizer was made with.

    Returns:
        For nnx a ``State`` like ``nnx.state(model, wrt)``, for linen a mapping like ``variables["params"]``. The leaf of a
        masked kernel is its mask, shape ``(in, out)``; of any other parameter it is ``True``. A kernel that several nnx
        modules share is masked where none of them uses it.

    Raises:
        TypeError: if ``model`` is neither.
    """
    if isinstance(model, nnx.Module):
        return _nnx_masks(model, wrt)
    if isinstance(model, Mapping) and "params" in model:
        return _linen_masks(model["params"], model.get("masks", {}))
    raise TypeError(f"param_masks takes an nnx module, or linen variables with 'params'; got {type(model).__name__}")


def _nnx_masks(model: nnx.Module, wrt: Any) -> Any:
    live: dict[int, Any] = {}
    for _, module in nnx.iter_graph(model):
        if isinstance(module, nnx.Variable) or not hasattr(module, "__dict__"):
            continue
        for name, variable in vars(module).items():
            if isinstance(variable, nnx.Variable):
                mask = _mask_beside(module) if name == "kernel" else True
                known = live.get(id(variable))
                live[id(variable)] = mask if known is None else _either(known, mask)
    flat = nnx.to_flat_state(nnx.state(model, wrt))
    return nnx.from_flat_state([(path, live.get(id(_at(model, path)), True)) for path, _ in flat])


def _mask_beside(module: Any) -> Any:
    """Return the mask of a module's kernel, or ``True``. A linen layer bridged to nnx has one beside its kernel too."""
    mask = getattr(module, "mask", None)
    if not isinstance(mask, nnx.Variable) or isinstance(mask, nnx.Param):
        return True
    value = mask.get_value()
    return value if getattr(value, "shape", None) == module.kernel.get_value().shape else True


def _either(one: Any, other: Any) -> Any:
    return True if one is True or other is True else jnp.logical_or(one, other)


def _at(model: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        model = getattr(model, key) if isinstance(key, str) and hasattr(model, key) else model[key]
    return model


def _linen_masks(params: Mapping[str, Any], masks: Mapping[str, Any]) -> Mapping[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            tree[name] = _linen_masks(value, masks.get(name, {}))
        else:
            leaf = meta.unbox(masks["mask"]) if name == "kernel" and "mask" in masks else True
            tree[name] = jax.tree.map(lambda _, leaf=leaf: leaf, value)  # in the box of a partitioned parameter
    return freeze(tree) if isinstance(params, FrozenDict) else tree
