"""What the nnx and the linen layer share: a masked kernel of shape ``(in, out)``, and the masks of a whole model.

A kernel is +0 under its mask; its dormant values lie apart. All that changes masks goes through :func:`exchange`.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict, freeze, meta
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array, lax

from maskedlinear.spec import check_floating, check_shapes
from maskedlinear_jax._functional import boolean_mask, check_devices, expression, rule

__all__ = [
    "PARAMETER",
    "Dormant",
    "Mask",
    "apply_kernel",
    "checked_mask",
    "exchange",
    "full_kernel",
    "is_linen",
    "linen_layers",
    "live_scale",
    "mask_shape",
    "masked_kernel",
    "param_masks",
    "set_linen_masks",
    "set_param_masks",
    "set_variables",
    "value_of",
]

PARAMETER = "kernel (in, out)"


# Under this name nnx's bridge finds the collection of linen masks, and the other way round.
@nnx.register_variable_name("masks", overwrite=True)
class Mask(nnx.Variable[Array]):
    """The mask of a layer: in the state and in checkpoints, and no parameter, so out of every optimizer's sight."""


@nnx.register_variable_name("dormant", overwrite=True)
class Dormant(nnx.Variable[Array]):
    """The weights of a layer's masked connections, 0 elsewhere: in the state and in checkpoints, and no parameter."""


def value_of(variable: nnx.Variable[Array]) -> Array:
    """Return a Variable's array, or raise a ``ValueError`` if it has none."""
    return _concrete(variable.get_value())


def _concrete(value: Any) -> Array:
    if isinstance(value, jax.ShapeDtypeStruct):
        raise ValueError(
            "this layer is abstract (made by nnx.eval_shape) and has no values: restore its state first, with nnx.update"
        )
    array: Array = value
    return array


def mask_shape(kernel: Any, mask: Any) -> tuple[int, ...]:
    """Return the shape that a layer's mask must have: its kernel's, or one layer's, if a stack of layers shares a mask."""
    shape: tuple[int, ...] = kernel.shape
    return shape[-2:] if mask.ndim == 2 else shape


def masked_kernel(kernel: Array, mask: Array) -> Array:
    """Return ``where(mask, kernel, 0)``, shape ``(in, out)``."""
    return jnp.where(mask, kernel, jnp.zeros((), kernel.dtype))


def full_kernel(kernel: Array, mask: Array, dormant: Array | None) -> Array:
    """Return the live and the dormant weights together, bit for bit.

    Where nothing is dormant, what stands in the kernel under the mask is: there earlier versions kept it, and there it is
    if a mask was exchanged by hand. Elsewhere it is what an optimizer has left, and no weight.
    """
    if dormant is None:
        return masked_kernel(kernel, mask)
    bits = lax.bitcast_convert_type(dormant, f"uint{8 * dormant.dtype.itemsize}")  # subnormals are 0 to XLA on the CPU
    return jnp.where(mask | (bits == 0), kernel, dormant)


def exchange(
    kernel: Array, mask: Array, dormant: Array | None, new: Array, pruned: Array | None = None
) -> tuple[Array, Array | None]:
    """Return what is in the kernel and what is dormant under a ``new`` mask; of ``pruned`` what the new one takes."""
    full = full_kernel(kernel, mask, dormant)
    if pruned is not None:
        full = jnp.where(mask & ~new, pruned, full)
    return masked_kernel(full, new), None if dormant is None else masked_kernel(full, ~new)


def set_variables(children: Mapping[Any, Any], new: Array, pruned: Array | None = None) -> None:
    """Give an nnx layer, of which these are the Variables, another mask, checked and its own; weights move."""
    kernel, dormant = value_of(children["kernel"]), children.get("dormant")
    kept = dormant.get_value() if isinstance(dormant, nnx.Variable) else None
    if isinstance(kept, jax.ShapeDtypeStruct):
        kept = jnp.zeros(kept.shape, kept.dtype)
    try:
        old = checked_mask(kernel, children["mask"].get_value())
    except ValueError:  # a state brought it, or none at all: what is dormant is known without it
        old = jnp.zeros(new.shape, bool)
    kernel, kept = exchange(kernel, old, kept, new, pruned)
    children["kernel"].set_value(kernel)
    children["mask"].set_value(new)
    if isinstance(dormant, nnx.Variable):
        dormant.set_value(kept)


def checked_mask(kernel: Array, mask: Any) -> Array:
    """Return a layer's mask; a state may have brought any."""
    return boolean_mask(_concrete(mask), mask_shape(kernel, mask), PARAMETER)


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
        modules share is masked where one of them masks it. A mask that a stack of layers shares (by ``nnx.vmap``,
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


def set_param_masks(model: Any, masks: Any, dormant: Any = None) -> Any:
    """Set the masks of a model from a tree like its parameters', the reverse of :func:`param_masks`; inside ``jit`` too.

    Weights move between the kernels and what is dormant, as by ``set_mask``. After a step of an optimizer that prunes,
    ``set_param_masks(model, optimizer.opt_state.masks, optimizer.opt_state.dormant)``.

    Args:
        model: an nnx module, whose :class:`maskedlinear.flax.MaskedLinear` layers are set in place; or the variables of a
            linen one, which stay as they are.
        masks: a tree as :func:`param_masks` returns it, or as the state of :func:`maskedlinear.jax.scheduled_pruning` holds
            it: of masked kernels the masks, shape ``(in, out)``. Others are not looked at.
        dormant: a tree like it: what newly masked connections were before they became 0, as that state holds it. If
            ``None``, they are what they are.

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
        new: dict[int, Any] = {}  # by the identity of a kernel, which has one place in the trees, whoever shares it
        for path, children in layers:
            if id(children["kernel"]) not in new:
                kernel = children["kernel"].get_value()
                new[id(children["kernel"])] = _at_kernel(masks, dormant, path, kernel)
        for _, children in layers:
            set_variables(children, *new[id(children["kernel"])])
        return model
    if is_linen(model):
        kernels = {path: kernel for path, (kernel, _) in linen_layers(model).items()}
        return set_linen_masks(
            model, {path: _at_kernel(masks, dormant, path, kernel) for path, kernel in kernels.items()}
        )
    raise TypeError(
        f"set_param_masks takes an nnx module, or linen variables with 'params'; got {type(model).__name__}"
    )


def is_linen(model: Any) -> bool:
    """Whether these are the variables of a linen model."""
    return isinstance(model, Mapping) and "params" in model and not isinstance(model["params"], nnx.Module)


def linen_layers(variables: Mapping[str, Any]) -> dict[tuple[str, ...], tuple[Array, Array]]:
    """Return kernel and mask of each masked layer, by its path."""
    params, masks = flatten_dict(variables["params"]), flatten_dict(variables.get("masks", {}))
    return {
        tuple(path): (meta.unbox(params[(*path, "kernel")]), meta.unbox(mask))
        for (*path, name), mask in masks.items()
        if name == "mask"
    }


def set_linen_masks(
    variables: Mapping[str, Any], masks: Mapping[tuple[str, ...], tuple[Array, Array | None]]
) -> dict[str, Any]:
    """Return variables in which layers, by their paths, have other masks, checked; weights move."""
    names = [name for name in ("params", "masks", "dormant") if name in variables]
    flat = {name: flatten_dict(variables[name], keep_empty_nodes=True) for name in names}
    for path, (new, pruned) in masks.items():
        places = {"params": (*path, "kernel"), "masks": (*path, "mask"), "dormant": (*path, "dormant")}
        boxes = {name: flat[name][place] for name, place in places.items() if place in flat.get(name, {})}
        kernel, mask, dormant = (meta.unbox(boxes.get(name)) for name in places)
        old = checked_mask(kernel, mask)
        kernel, dormant = exchange(kernel, old, dormant, new, pruned)
        for name, value in (("params", kernel), ("masks", new), ("dormant", dormant)):
            if name in boxes:
                flat[name][places[name]] = jax.tree.map(lambda _, value=value: value, boxes[name])
    made = {name: unflatten_dict(tree) for name, tree in flat.items()}
    return {
        **variables,
        **{name: freeze(tree) if isinstance(variables[name], FrozenDict) else tree for name, tree in made.items()},
    }


def _nnx_masks(model: nnx.Module, wrt: Any) -> Any:
    live: dict[int, Any] = {}
    for _, node in nnx.iter_graph(model):
        children = _children(node)
        for name, child in children.items():
            if isinstance(child, nnx.Variable):
                mask = children.get("mask") if name == "kernel" else None
                used = _kernel_mask(child.get_value(), mask.get_value()) if isinstance(mask, Mask) else True
                live[id(child)] = _both(live[id(child)], used) if id(child) in live else used
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


def _at_kernel(masks: Any, dormant: Any, path: tuple[Any, ...], kernel: Any) -> tuple[Array, Array | None]:
    """Return the mask of a layer's kernel from a tree, a copy, so that either can be donated; and what is dormant there."""
    path = (*path, "kernel")
    try:
        mask = _leaf(masks, path)
        pruned = None if dormant is None else jnp.asarray(_leaf(dormant, path))
    except (KeyError, AttributeError, IndexError, TypeError) as error:
        raise ValueError(
            f"there must be a mask for each masked kernel; got none for {'.'.join(map(str, path))}"
        ) from error
    mask = jnp.ones(kernel.shape, bool) if mask is True else jnp.copy(boolean_mask(mask, kernel.shape, PARAMETER))
    return mask, pruned


def _leaf(tree: Any, path: tuple[Any, ...]) -> Any:
    found = meta.unbox(_at(tree, path))
    return found.get_value() if isinstance(found, nnx.Variable) else found


def _kernel_mask(kernel: Any, mask: Any) -> Any:
    """Return a layer's mask in its kernel's shape, checked; abstract if it is."""

    def whole(mask: Array) -> Array:
        return jnp.broadcast_to(boolean_mask(mask, mask_shape(kernel, mask), PARAMETER), kernel.shape)

    return _perhaps_abstract(whole, mask)


def _both(one: Any, other: Any) -> Any:
    if one is True or other is True:
        return other if one is True else one
    return _perhaps_abstract(jnp.logical_and, one, other)


def _perhaps_abstract(function: Callable[..., Array], *masks: Any) -> Any:
    abstract = any(isinstance(mask, jax.ShapeDtypeStruct) for mask in masks)
    return jax.eval_shape(function, *masks) if abstract else function(*masks)
