"""``param_masks`` and ``set_param_masks``: a model's masks as a tree like its parameters', which optimizers take."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from maskedlinear.models import first_names
from maskedlinear_jax._functional import boolean_mask
from maskedlinear_jax._optim import FrozenState, follow_masks
from maskedlinear_jax._tree import ConstrainedMask, is_unmasked, named_leaves, plain_mask
from maskedlinear_jax.flax._constraint_variables import constrained_mask
from maskedlinear_jax.flax._kernel import label, mask_shape
from maskedlinear_jax.flax._modules import at, layers_of, pure
from maskedlinear_jax.flax._sparse_nnx import SparseLinear
from maskedlinear_jax.flax._variables import is_linen, linen_weights, set_linen_masks
from maskedlinear_jax.flax._weights import masked_weights

__all__ = ["bring_masks_to", "check_guards", "param_masks", "set_param_masks"]


def param_masks(model: Any, wrt: Any = nnx.Param) -> Any:
    """Return the masks of a model in the structure of its parameters, for ``maskedlinear.jax.freeze_masked``.

    Args:
        model: an nnx module, or the variables of a linen one: ``{"params": ..., "masks": ..., ...}``.
        wrt: for nnx, the filter that the optimizer was made with.

    Returns:
        For nnx a ``State`` like ``nnx.state(model, wrt)``, for linen a mapping like ``variables["params"]``. The leaf of a
        masked weight is its mask, of its shape; of any other parameter it is ``None``, which is no leaf to JAX: jitted
        functions may take the masks as an argument. Of a weight with constraints (:func:`constrain`) it is a node that holds
        both, which the guard takes and :func:`set_param_masks` too; in the sparse form as well. A kernel that several nnx
        modules share is masked where one of them masks it. A mask that a stack of layers shares (by ``nnx.vmap``,
        ``nn.scan``) is repeated along the stack, which must be the kernel's leading axis.

    Raises:
        TypeError: if ``model`` is neither.
        ValueError: if a mask does not fit its weight, or holds anything but 0 and 1.
    """
    if isinstance(model, nnx.Module):
        live: dict[int, Any] = {}
        for weight in masked_weights(model).values():
            used, key = _whole_mask(weight.value, weight.mask_variable.get_value()), weight.key
            live[key] = _perhaps_abstract(jnp.logical_and, live[key], used) if key in live else used
        for weight in masked_weights(model).values():
            live[weight.key] = constrained_mask(weight.owner, weight.parameter, plain_mask(live[weight.key]))
        for layer in layers_of(model, SparseLinear).values():
            live[id(layer.weight_values)] = constrained_mask(layer, "weight_values", None)
        flat = nnx.to_flat_state(nnx.state(model, wrt))
        return nnx.from_flat_state([(path, live.get(id(at(model, path)))) for path, _ in flat])
    if isinstance(model, Mapping) and "params" in model:
        masks = {path: _whole_mask(kernel, mask) for path, (kernel, mask) in linen_weights(model).items()}
        boxes = flatten_dict(model["params"], keep_empty_nodes=True)
        # in the box of a partitioned parameter
        tree = {
            path: jax.tree.map(lambda _, path=path: masks.get(path), box) if jax.tree.leaves(box) else box
            for path, box in boxes.items()
        }
        return type(model["params"])(unflatten_dict(tree))
    raise TypeError(f"param_masks takes an nnx module, or linen variables with 'params'; got {type(model).__name__}")


def set_param_masks(model: Any, masks: Any, dormant: Any = None) -> Any:
    """Set the masks of a model from a tree like its parameters', the reverse of :func:`param_masks`; inside ``jit`` too.

    Weights move between the kernels and what is dormant, as by ``set_mask``. After a step of an optimizer that prunes,
    ``set_param_masks(model, optimizer.opt_state.masks, optimizer.opt_state.dormant)``.

    Args:
        model: an nnx module, whose masked weights are set in place; or the variables of a linen one, which stay as they are.
        masks: a tree as :func:`param_masks` returns it, or as the state of :func:`maskedlinear.jax.scheduled_pruning` holds
            it: of masked weights the masks, of their shapes; where it has ``None``, a weight keeps its own. What else is
            in it is not looked at.
        dormant: a tree like it: what newly masked connections were before they became 0, as that state holds it. If
            ``None``, they are what they are.

    Returns:
        The model; or new linen variables.

    Raises:
        TypeError: if ``model`` is neither.
        ValueError: if a mask is missing, does not fit its weight, or holds anything but 0 and 1.
    """
    if isinstance(model, nnx.Module):
        weights = masked_weights(model).values()
        new = _of_weights(masks, dormant, {weight.full_name: weight.value for weight in weights})
        for weight in weights:  # a kernel has one place in the trees, whoever shares it
            if weight.full_name in new:
                weight.set_mask(*new[weight.full_name])
        return model
    if is_linen(model):
        paths = {".".join(path): path for path in linen_weights(model)}
        kernels = {".".join(path): kernel for path, (kernel, _) in linen_weights(model).items()}
        new = _of_weights(masks, dormant, kernels)
        return set_linen_masks(model, {paths[name]: masks for name, masks in new.items()})
    raise TypeError(
        f"set_param_masks takes an nnx module, or linen variables with 'params'; got {type(model).__name__}"
    )


def bring_masks_to(optimizer: nnx.Optimizer[Any], model: Any, state: Any) -> None:
    """Give an optimizer this state, in which guards that hold masks of their own have those of the model."""
    state = follow_masks(state, pure(param_masks(model, optimizer.wrt)))
    nnx.update(optimizer.opt_state, nnx.state(state))


def check_guards(optimizer: nnx.Optimizer[Any] | None, model: Any) -> None:
    """Raise a ``ValueError`` if a guard that holds masks of its own was made before the model's constraints were."""
    if optimizer is None:
        return
    masks = named_leaves(pure(param_masks(model, optimizer.wrt)), of_masks=True)
    own = {name for name, mask in masks.items() if isinstance(mask, ConstrainedMask)}
    nodes = jax.tree.leaves(pure(optimizer.opt_state), is_leaf=lambda node: isinstance(node, FrozenState))
    for node in nodes:
        if isinstance(node, FrozenState) and node.masks is not None and set(node.constraints or {}) != own:
            raise ValueError(
                "the optimizer's guard was made with masks of the model before it was constrained as it is, and keeps other "
                "constraints: make the optimizer anew, with freeze_masked(..., param_masks(model)), after constrain"
            )


def _of_weights(masks: Any, dormant: Any, kernels: Mapping[str, Any]) -> dict[str, tuple[Array, Array | None]]:
    """Return the masks of kernels, by name, from a tree, and what is dormant there; copies, so that one can be donated."""
    given = {name: plain_mask(mask) for name, mask in named_leaves(masks, of_masks=True).items()}
    pruned = {} if dormant is None else named_leaves(dormant, of_masks=True)
    missing = [name for name in kernels if name not in given or (dormant is not None and name not in pruned)]
    if missing:
        raise ValueError(f"there must be a mask for each masked weight; got none for {first_names(missing)}")
    found = {}
    for name, kernel in kernels.items():
        if not is_unmasked(given[name]):
            live = jnp.copy(boolean_mask(given[name], kernel.shape, label(kernel)))
            found[name] = live, None if pruned.get(name) is None else jnp.asarray(pruned[name])
    return found


def _whole_mask(kernel: Any, mask: Any) -> Any:
    """Return a weight's mask in its shape, checked: a copy, so that either can be donated; abstract if it is."""

    def whole(mask: Array) -> Array:
        return jnp.copy(jnp.broadcast_to(boolean_mask(mask, mask_shape(kernel, mask), label(kernel)), kernel.shape))

    return _perhaps_abstract(whole, mask)


def _perhaps_abstract(function: Callable[..., Array], *masks: Any) -> Any:
    abstract = any(isinstance(mask, jax.ShapeDtypeStruct) for mask in masks)
    return jax.eval_shape(function, *masks) if abstract else function(*masks)
