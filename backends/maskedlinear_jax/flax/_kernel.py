"""What the nnx and the linen layer share: a masked kernel of shape ``(in, out)``, and the masks of a whole model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict, freeze, meta
from jax import Array, lax

from maskedlinear.spec import check_floating, check_shapes
from maskedlinear_jax._functional import boolean_mask, check_devices, expression, rule

__all__ = [
    "PARAMETER",
    "Mask",
    "apply_kernel",
    "live_scale",
    "mask_shape",
    "masked_kernel",
    "param_masks",
    "set_param_masks",
]

PARAMETER = "kernel (in, out)"


# Under this name nnx's bridge finds the collection of linen masks, and the other way round.
@nnx.register_variable_name("masks", overwrite=True)
class Mask(nnx.Variable[Array]):
    """The mask of a layer: in the state and in checkpoints, and no parameter, so out of every optimizer's sight."""


def mask_shape(kernel: Any, mask: Any) -> tuple[int, ...]:
    """Return the shape that a layer's mask must have: its kernel's, or one layer's, if a stack of layers shares a mask."""
    shape: tuple[int, ...] = kernel.shape
    return shape[-2:] if mask.ndim == 2 else shape


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
        modules share is masked where none of them uses it. A mask that a stack of layers shares (by ``nnx.vmap``,
        ``nn.scan``) is repeated along the stack, which must be the kernel's leading axis.

    Raises:
        TypeError: if ``model`` is neither.
        ValueError: if a mask does not fit its kernel, or holds anything but 0 and 1.
    """
    if isinstance(model, nnx.Module):
        return _nnx_masks(model, wrt)
    if isinstance(model, Mapping) and "params" in model:
        return _linen_masks(model["params"], model.get("masks", {}))
    raise TypeError(f"param_masks takes an nnx module, or linen variables with 'params'; got {type(model).__name__}")


def set_param_masks(model: Any, masks: Any) -> Any:
    """Set the masks of a model from a tree like its parameters', the reverse of :func:`param_masks`; inside ``jit`` too.

    After a step of an optimizer that prunes, ``set_param_masks(model, optimizer.opt_state.masks)``.

    Args:
        model: an nnx module, whose :class:`maskedlinear.flax.MaskedLinear` layers are set in place; or the variables of a
            linen one, which stay as they are.
        masks: a tree as :func:`param_masks` returns it, or as the state of :func:`maskedlinear.jax.scheduled_pruning` holds
            it: of masked kernels the masks, shape ``(in, out)``. Others are not looked at.

    Returns:
        The model; or new linen variables.

    Raises:
        TypeError: if ``model`` is neither.
        ValueError: if a mask is missing, does not fit its kernel, or holds anything but 0 and 1.
    """
    if isinstance(model, nnx.Module):
        layers = [
            (path, children)
            for path, node in nnx.iter_graph(model)
            for children in [_children(node)]
            if isinstance(children.get("mask"), Mask) and "kernel" in children
        ]
        made = [_mask_at(masks, (*path, "kernel"), children["kernel"].get_value()) for path, children in layers]
        for (_, children), mask in zip(layers, made, strict=True):
            children["mask"].set_value(mask)
        return model
    if isinstance(model, Mapping) and "params" in model:
        return {**model, "masks": _linen_set(model.get("masks", {}), model["params"], masks, ())}
    raise TypeError(
        f"set_param_masks takes an nnx module, or linen variables with 'params'; got {type(model).__name__}"
    )


def _nnx_masks(model: nnx.Module, wrt: Any) -> Any:
    live: dict[int, Any] = {}
    for _, node in nnx.iter_graph(model):
        children = _children(node)
        for name, child in children.items():
            if isinstance(child, nnx.Variable):
                mask = children.get("mask") if name == "kernel" else None
                used = _kernel_mask(child.get_value(), mask.get_value()) if isinstance(mask, Mask) else True
                live[id(child)] = _either(live[id(child)], used) if id(child) in live else used
    flat = nnx.to_flat_state(nnx.state(model, wrt))
    return nnx.from_flat_state([(path, live.get(id(_at(model, path)), True)) for path, _ in flat])


def _children(node: Any) -> Mapping[Any, Any]:
    """Return what a node of an nnx graph holds, by name: a module, or a plain container, as a bridged linen model has."""
    if isinstance(node, Mapping):
        return node
    if isinstance(node, (list, tuple)):
        return dict(enumerate(node))
    return {} if isinstance(node, nnx.Variable) else getattr(node, "__dict__", {})


def _at(model: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        model = model[key] if isinstance(model, (Mapping, Sequence)) else getattr(model, key)
    return model


def _linen_masks(params: Mapping[str, Any], masks: Mapping[str, Any]) -> Mapping[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            tree[name] = _linen_masks(value, masks.get(name, {}))
        else:
            masked = name == "kernel" and "mask" in masks
            leaf = _kernel_mask(meta.unbox(value), meta.unbox(masks["mask"])) if masked else True
            tree[name] = jax.tree.map(lambda _, leaf=leaf: leaf, value)  # in the box of a partitioned parameter
    return freeze(tree) if isinstance(params, FrozenDict) else tree


def _mask_at(masks: Any, path: tuple[Any, ...], kernel: Any) -> Array:
    """Return the mask of a kernel from a tree."""
    try:
        found = meta.unbox(_at(masks, path))
    except (KeyError, AttributeError, IndexError, TypeError) as error:
        raise ValueError(
            f"there must be a mask for each masked kernel; got none for {'.'.join(map(str, path))}"
        ) from error
    found = found.get_value() if isinstance(found, nnx.Variable) else found
    return jnp.ones(kernel.shape, bool) if found is True else boolean_mask(found, kernel.shape, PARAMETER)


def _linen_set(old: Mapping[str, Any], params: Any, masks: Any, path: tuple[str, ...]) -> dict[str, Any]:
    """Return a collection of masks like an old one, of the masks in a tree like the parameters'."""
    new: dict[str, Any] = {}
    for name, value in old.items():
        if isinstance(value, Mapping):
            new[name] = _linen_set(value, params[name], masks, (*path, name))
        else:
            mask = _mask_at(masks, (*path, "kernel"), meta.unbox(params["kernel"]))
            new[name] = jax.tree.map(lambda _, mask=mask: mask, value)
    return new


def _kernel_mask(kernel: Any, mask: Any) -> Any:
    """Return a layer's mask in its kernel's shape, checked; abstract if it is."""

    def whole(mask: Array) -> Array:
        return jnp.broadcast_to(boolean_mask(mask, mask_shape(kernel, mask), PARAMETER), kernel.shape)

    return _perhaps_abstract(whole, mask)


def _either(one: Any, other: Any) -> Any:
    return True if one is True or other is True else _perhaps_abstract(jnp.logical_or, one, other)


def _perhaps_abstract(function: Callable[..., Array], *masks: Any) -> Any:
    abstract = any(isinstance(mask, jax.ShapeDtypeStruct) for mask in masks)
    return jax.eval_shape(function, *masks) if abstract else function(*masks)
