"""``freeze_masked``: a zero gradient does not keep a weight still, so the optimizer is held to the mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from maskedlinear_jax._constraints import HeldTree, constraints_of_masks
from maskedlinear_jax._functional import as_array, boolean_mask
from maskedlinear_jax._placement import copied
from maskedlinear_jax._tree import ConstrainedMask, is_unmasked, named_leaves, plain_masks

__all__ = [
    "FrozenState",
    "follow_masks",
    "freeze_masked",
    "frozen_state",
    "masks_like",
    "renewed_state",
    "set_optimizer_masks",
    "to_zero",
]

Renewal = Callable[[Any, Any], Any]  # of what is kept of a parameter, and what is fresh


def freeze_masked(
    inner: optax.GradientTransformation,
    masks: Any | Callable[[Any], Any] | None = None,
    *,
    constraints: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optax transformation so that masked weights take no part in it and stay +0.

    Momentum, Adam's moments and weight decay move weights whose gradient is zero, and what they see of a gradient under a
    mask (a clip's norm, Muon's whole matrix) moves the others. So gradients are masked before the wrapped transformation,
    and its updates afterwards; its ``update`` takes the masks that hold at that step as one more argument::

        tx = freeze_masked(optax.adamw(1e-3))
        updates, state = tx.update(grads, state, params, masks={"weight": mask, "bias": None})

    Masks that seldom change can be given once, for training loops that call ``update`` themselves, such as that of
    ``flax.training.train_state.TrainState``: they are in its state, where :func:`set_optimizer_masks` changes them.

    What stands under a mask becomes +0 with the next update, exactly if it is finite and the update as wide as the
    parameter: weights that are to come back are kept elsewhere, as Flax's layers keep them. Without ``params`` it stays as
    it is.

    Where a mask has changed since the last step, the state that optax keeps for the weight is made new, so that a revived
    weight starts clean; the guard's own state holds a copy of the masks of the last step for that, a byte a parameter: of
    those that have masks, if ``masks`` says which, and of all otherwise.

    Args:
        inner: any optax transformation, or a chain of them. Wrap the whole chain: what comes before the guard sees the
            gradients under the masks, and what comes after it is not guarded.
        masks: the masks of every step that is not given others: a tree as ``update`` takes it, or a function of the
            parameters that returns one.
        constraints: what live connections keep: a tree like the parameters' or a part of it, or a mapping of names (paths
            with dots between), of :class:`maskedlinear.constraints.Constraints`, each in its parameter's axes (a Flax kernel
            is ``(in, out)``), or of one entry a connection for the values of a sparse layer. Those of an nnx model
            (:func:`maskedlinear.flax.constrain`) go with its masks, need not be given, and follow connections that move,
            which these do not. Gradients of tied connections
            are their sum, so that they train as one parameter would, and those of fixed ones 0; updates leave what is fixed
            bit for bit, what is tied equal, and no value outside its sign or bounds. Then masks may be left out. Begin with
            :func:`apply_constraints`. What is masked is not constrained, and a tied connection that comes back has the value
            of its group after its first step, up to a rounding until the second.

    Returns:
        A transformation whose ``update`` takes ``masks``: a tree of the parameters' structure whose leaves are masks of the
        parameters' shapes (booleans, or 0s and 1s outside of transforms), or ``None`` (or ``True``) for a parameter without
        a mask. ``maskedlinear.flax.param_masks`` makes it for Flax models.

    Raises:
        ValueError: by ``update``, if there are no masks, their tree differs from the parameters', or one does not have its
            parameter's shape or holds anything but 0 and 1. Or if ``masks`` is a function, or there are constraints, and
            ``params`` are not given. By ``init``, if parameters do not keep their constraints.
        TypeError: by ``update``, if an update is not an array of numbers; or if constraints are anything else.
    """
    held = None if constraints is None else HeldTree(constraints)
    guarded, always = optax.with_extra_args_support(inner), masks

    def init(params: Any) -> FrozenState:
        whole = bool(jax.tree.leaves(params))  # and not optax's own stand-in for parameters
        given = masks_like(params, _always(masks, params)) if whole and masks is not None else None
        state = frozen_state(guarded, params, plain_masks(given))
        if held is not None and whole:  # those that go with masks have been kept by whoever made these
            held.refuse_others(params, plain_masks(given))
        if masks is None or callable(masks):
            return state
        if not whole:
            return state._replace(masks=params)
        return state._replace(masks=_copied(params, masks), constraints=_arrays_of(masks))

    def update(
        updates: Any, state: FrozenState, params: Any = None, *, masks: Any = None, **extra: Any
    ) -> tuple[Any, FrozenState]:
        if masks is None:
            masks = (
                _always(always, params) if state.masks is None else _with_constraints(state.masks, state.constraints)
            )
        if masks is None and held is not None:
            masks = jax.tree.map(lambda _: None, updates)
        if masks is None:
            raise ValueError(
                "freeze_masked needs the masks of this step: tx.update(grads, state, params, masks=masks); or set them in "
                "its state, with set_optimizer_masks, where somebody else calls update"
            )
        given = masks_like(updates, masks)
        kept_of, masks = constraints_of_masks(held, given), plain_masks(given)
        if kept_of is not None and params is None:
            raise ValueError("constraints are of parameters, which are missing: tx.update(grads, state, params)")
        like = updates if params is None else params  # a gradient for each example has a dimension more
        live = jax.tree_util.tree_map_with_path(_live, like, masks, state.live)
        clean = None if params is None else jax.tree.map(_cleared, params, live, masks)
        kept = _renewed(inner, state, live, jax.tree.structure(like), updates if clean is None else clean)
        updates = jax.tree.map(_cleared, updates, live, masks)
        updates = updates if kept_of is None else kept_of.gradients(updates, clean, live)
        updates, kept = guarded.update(updates, kept, clean, **extra)
        updates = updates if kept_of is None else kept_of.updates(updates, clean, live, state.live)
        if params is None:
            updates = jax.tree.map(_held, updates, live, masks)
        else:
            updates = jax.tree.map(_held, updates, live, masks, params)
        return updates, FrozenState(kept, live, state.masks, state.constraints)

    return optax.GradientTransformationExtraArgs(init, update)


class FrozenState(NamedTuple):
    """The state of a guarded transformation.

    Attributes:
        inner: the state of the transformation itself.
        live: a tree like the parameters': what was live at the last step. Copies, so that buffers can be donated. ``None``
            for parameters that have had no mask, all of which is live.
        masks: what holds at steps that are not given masks: those that the guard was made with, or that
            :func:`set_optimizer_masks` has set; copies, too.
        constraints: what these say is kept besides, by the parameters' names; ``None`` if nothing is.
    """

    inner: Any
    live: Any
    masks: Any = None
    constraints: Any = None


def frozen_state(guarded: optax.GradientTransformation, params: Any, masks: Any = None) -> FrozenState:
    """Return the state that a guarded transformation begins with: all is live.

    Args:
        guarded: the transformation inside the guard.
        params: the parameters.
        masks: a tree that says which of them will have masks; all may if ``None``.
    """
    which = jax.tree.map(lambda leaf: False, params) if masks is None else masks_like(params, masks)
    live = jax.tree.map(
        lambda leaf, mask: None if is_unmasked(mask) else jnp.ones_like(leaf, dtype=bool), params, which
    )
    return FrozenState(guarded.init(params), live)


def _copied(params: Any, masks: Any) -> Any:
    """Return a copy of masks in the parameters' structure, checked."""
    return jax.tree_util.tree_map_with_path(_copy_of, params, plain_masks(masks_like(params, masks)))


def _copy_of(path: Any, leaf: Any, mask: Any) -> Any:
    return None if is_unmasked(mask) else _live(path, leaf, mask, mask)


def _arrays_of(masks: Any) -> dict[str, dict[str, Array]] | None:
    """Return copies of what masks say of constraints, in plain dicts, in which every wrapper keeps a state."""
    named = named_leaves(masks, of_masks=True)
    of_masks = {name: vars(mask) for name, mask in named.items() if isinstance(mask, ConstrainedMask)}
    return {
        name: {kind: copied(array) for kind, array in parts.items() if kind != "mask" and array is not None}
        for name, parts in of_masks.items()
    } or None


def _with_constraints(masks: Any, constraints: Any) -> Any:
    """Return masks of a state with the constraints that it has beside them."""
    if constraints is None:
        return masks
    leaves, structure = jax.tree.flatten(masks, is_leaf=lambda node: node is None)
    names, kinds = named_leaves(masks, of_masks=True), ("fixed", "ties", "lower", "upper")
    made = [
        ConstrainedMask(leaf, *(constraints[name].get(kind) for kind in kinds)) if name in constraints else leaf
        for name, leaf in zip(names, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, made)


def follow_masks(state: Any, masks: Any) -> Any:
    """Return an optimizer's state whose guards, if they hold masks of their own, go by these from the next step on."""

    def replaced(node: Any) -> Any:
        if not isinstance(node, FrozenState) or node.masks is None:
            return node
        held = named_leaves(plain_masks(masks), of_masks=True)
        names = list(named_leaves(node.masks, of_masks=True))
        leaves, structure = jax.tree.flatten(node.masks, is_leaf=lambda leaf: leaf is None)
        new = [old if old is None else jnp.copy(held[name]) for name, old in zip(names, leaves, strict=True)]
        return node._replace(masks=jax.tree.unflatten(structure, new), constraints=_arrays_of(masks))

    return jax.tree.map(replaced, state, is_leaf=lambda node: isinstance(node, FrozenState))


def set_optimizer_masks(state: Any, masks: Any) -> Any:
    """Return an optimizer's state whose :func:`freeze_masked` goes by these masks from the next step on.

    For loops that call ``update`` without ``masks``, such as ``flax.training.train_state.TrainState``'s, when masks have
    changed::

        state = state.replace(opt_state=set_optimizer_masks(state.opt_state, masks))

    Args:
        state: the state of a guarded transformation, however deep in wrappers (``optax.chain``, ``masked``, ``MultiSteps``).
        masks: a tree as ``update`` takes it; copied, so that buffers can be donated.

    Raises:
        ValueError: if there is no guard in the state.
    """
    found = False

    def replaced(node: Any) -> Any:
        nonlocal found
        if not isinstance(node, FrozenState):
            return node
        found = True
        plain = plain_masks(masks)
        copied = jax.tree.map(lambda mask: None if mask is True else jnp.copy(mask), plain)
        return node._replace(live=_with_room(node.live, plain), masks=copied, constraints=_arrays_of(masks))

    state = jax.tree.map(replaced, state, is_leaf=lambda node: isinstance(node, FrozenState))
    if not found:
        raise ValueError("there is no freeze_masked in this optimizer's state: wrap the transformation in it first")
    return state


def _with_room(live: Any, masks: Any) -> Any:
    """Return what is live with an array for each parameter that gets a mask, so that it keeps its structure from then on."""

    def held(node: Any) -> bool:
        return node is None or isinstance(node, optax.MaskedNode)

    try:
        return jax.tree.map(
            lambda old, mask: jnp.ones(jnp.shape(mask), bool) if old is None and not is_unmasked(mask) else old,
            *(live, masks),
            is_leaf=held,
        )
    except ValueError:  # a tree of another structure, which the next step reads by its names
        return live


def _renewed(inner: optax.GradientTransformation, state: FrozenState, live: Any, structure: Any, params: Any) -> Any:
    """Return the inner state, made new for each entry whose mask is not that of the last step."""

    def renewal(before: Any, now: Any) -> tuple[tuple[int, ...], Renewal] | None:
        if now is None:
            return None
        where = ~now if before is None else before != now
        return where.shape, lambda kept, fresh: jnp.where(where, fresh, kept)

    pairs = zip(structure.flatten_up_to(state.live), structure.flatten_up_to(live), strict=True)
    return renewed_state(inner, state.inner, structure, params, [renewal(*pair) for pair in pairs])


def renewed_state(
    tx: optax.GradientTransformation,
    state: Any,
    structure: Any,
    params: Any,
    renewals: Sequence[tuple[tuple[int, ...], Renewal] | None],
) -> Any:
    """Return a state in which what is kept of each parameter, an entry an entry, is what a function makes of it.

    Args:
        tx: whose state it is.
        state: the state.
        structure: that of the parameters' tree.
        params: the parameters.
        renewals: for each parameter, in order, its shape and a function of what is kept and what ``tx`` would begin with; or
            ``None``, to keep it.
    """

    def parts(node: Any) -> list[Any] | None:
        """Return what a node has for each parameter, if it is a tree like theirs; optax leaves some out."""
        try:
            found: list[Any] = structure.flatten_up_to(node)
        except (ValueError, TypeError):
            return None
        whole = all(isinstance(part, optax.MaskedNode) or jax.tree_util.all_leaves([part]) for part in found)
        return found if whole else None

    def renew(kept: Any, fresh: Any, renewal: tuple[tuple[int, ...], Renewal] | None) -> Any:
        if renewal is None or isinstance(kept, optax.MaskedNode) or jnp.shape(kept) != renewal[0]:
            return kept  # factored moments do not fit
        return renewal[1](kept, fresh)

    def renewed(kept: Any, fresh: Any) -> Any:
        old, new = parts(kept), parts(fresh)
        if old is None or new is None:
            return kept
        return structure.unflatten([renew(*entry) for entry in zip(old, new, renewals, strict=True)])

    return jax.tree.map(renewed, state, tx.init(params), is_leaf=lambda node: parts(node) is not None)


def _always(masks: Any, params: Any) -> Any:
    if not callable(masks):
        return masks
    if params is None:
        raise ValueError("masks is a function of the parameters, which are missing: tx.update(grads, state, params)")
    return masks(params)


def masks_like(updates: Any, masks: Any) -> Any:
    """Return ``masks`` if it has the structure of ``updates``: lists are masks there, not branches."""

    def is_left_out(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    def chosen(update: Any, mask: Any) -> Any:
        return update if is_left_out(update) else mask

    try:
        return jax.tree.map(chosen, updates, masks, is_leaf=is_left_out)
    except (ValueError, TypeError) as error:
        given, names = named_leaves(masks, of_masks=True), list(named_leaves(updates))
        if set(names) <= set(given):  # of Variables, say, where the masks are in a tree of arrays; or of a part of them
            return jax.tree.unflatten(jax.tree.structure(updates), [given[name] for name in names])
        raise ValueError(
            f"the masks must be a tree like the parameters', {jax.tree.structure(updates)}, with a mask or None for each; "
            f"got {jax.tree.structure(masks)}: for Flax, maskedlinear.flax.param_masks makes it"
        ) from error


def _live(path: Any, value: Any, mask: Any, before: Any) -> Array | None:
    """Return what is live of a parameter, as booleans of its shape; ``None`` if it has never had a mask."""
    name = f"parameter {jax.tree_util.keystr(path)}"
    update = as_array(f"the update of {name}", value)
    if is_unmasked(mask):
        return None if before is None else jnp.ones_like(update, dtype=bool)
    if mask is False:
        raise ValueError(f"the mask of {name} must be an array, or None where there is none; got {mask}")
    try:
        return jnp.copy(boolean_mask(mask, update.shape, name))
    except ValueError as error:
        raise ValueError(f"the mask of {name}: {error}") from error


def _cleared(array: Any, live: Any, mask: Any) -> Any:
    """Return a parameter or its gradient, or one for each example, with +0 under the mask."""
    if is_unmasked(mask):
        return array
    array = jnp.asarray(array)
    return jnp.where(jnp.broadcast_to(live, array.shape), array, jnp.zeros((), array.dtype))


def _held(update: Any, live: Any, mask: Any, param: Any = None) -> Any:
    """Return an update that leaves +0 where the mask is off."""
    array = jnp.asarray(update)
    if is_unmasked(mask):
        return array
    # +0 + (-0.0) is +0, where +0.0 would do too; and -0.0 leaves everything else as it is.
    return jnp.where(live, array, jnp.asarray(-0.0, array.dtype) if param is None else to_zero(param, array.dtype))


def to_zero(param: Any, dtype: Any) -> Array:
    """Return the update after which a parameter is +0: p + (-p) is, for every finite p; others stay as they are."""
    param = jnp.asarray(param)
    return jnp.where(jnp.isfinite(param), -param, -jnp.zeros((), param.dtype)).astype(dtype)
