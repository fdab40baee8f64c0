"""``scheduled_pruning``: pruning by a schedule inside a jitted training step, as an optax transformation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from maskedlinear import pruning
from maskedlinear.models import refuse_unknown
from maskedlinear.pruning._layers import Include
from maskedlinear_jax._functional import boolean_mask
from maskedlinear_jax._optim import freeze_masked, frozen_state, to_zero
from maskedlinear_jax._placement import counter, full_like, to_host, to_like
from maskedlinear_jax._select import check_comparable
from maskedlinear_jax._stacks import (
    Counts,
    Group,
    Shapes,
    check_compiled_scope,
    check_on_empty,
    clear_group,
    grouped,
    masked_so_far,
    refuse_empty,
    refuse_more,
)
from maskedlinear_jax._tree import (
    Axes,
    axes_of,
    chosen_parameters,
    is_unmasked,
    leaves_like,
    named_leaves,
    refuse_constrained,
    stack_axes,
)

__all__ = ["PruningState", "scheduled_pruning"]


class PruningState(NamedTuple):
    """The state of :func:`scheduled_pruning`.

    Attributes:
        step: how many updates there were, int32.
        masks: a tree like the parameters', of booleans of their shapes: what is live in the next forward pass; ``None`` for
            those that are not pruned.
        dormant: a tree like it: what the parameters were where they were pruned, and 0 elsewhere.
        inner: the state of the transformation itself, guarded by :func:`freeze_masked`.
    """

    step: Array
    masks: Any
    dormant: Any
    inner: Any


def scheduled_pruning(
    inner: optax.GradientTransformation,
    schedule: pruning.SparsitySchedule,
    *,
    masks: Any = None,
    include: Include = None,
    axes: Axes = None,
    scope: pruning.Scope = "layer",
    on_empty: pruning.OnEmpty = "keep",
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optax transformation so that it prunes the smallest weights by a schedule, inside the jitted step::

        tx = scheduled_pruning(optax.adamw(1e-3), CubicSchedule(0.9, begin=100, end=1000, every=10))
        state = tx.init(params)

        @jax.jit
        def step(params, state, x):
            grads = jax.grad(lambda params: loss(apply_masks(params, state.masks), x))(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

    The masks are in the state, ``state.masks``, and what is pruned too, ``state.dormant``: the parameters are +0 there, and
    stay so, as by :func:`freeze_masked`. :func:`apply_masks` masks their gradients in a model that knows nothing of masks.
    Update i, counted from 0, prunes what it has updated, where the schedule says so: to the masks, bit for bit, that
    :func:`prune_tree` gives for these weights and the masks before, each matrix of a stack a layer by itself. Between two
    that prune the step costs nothing more.

    A compiled step cannot raise errors: by default it does what it can instead, and what ``on_empty="raise"`` is to refuse
    is checked before, which ``scope="global"`` does not let it. A weight that is NaN counts as the largest.

    Args:
        inner: any optax transformation, or a chain of them. Wrap the whole chain.
        schedule: the sparsity at each update.
        masks: the masks to begin with, concrete: a tree as :func:`prune_tree` returns it. Full ones if ``None``.
        include: which parameters, as in :func:`prune_tree`.
        axes: as in :func:`prune_tree`.
        scope: ``"layer"``, ``"erdos_renyi"``, ``"uniform_plus"`` or ``"global"``, as in :func:`maskedlinear.pruning.prune`.
        on_empty: what is done where a matrix would lose its last connection: ``"keep"`` leaves it its best, prunes fewer
            if need be, and none where more is masked already than the schedule asks for; ``"raise"``, or ``"allow"``.

    Returns:
        A transformation whose ``update`` needs ``params``, and whose state is a :class:`PruningState`.

    Raises:
        ValueError: if ``scope`` or ``on_empty`` is none of these, or both are as said above; by ``init`` and
            ``update``, if no parameter is meant or the masks do not fit, or, where nothing else is said by ``on_empty``, if
            they have more zeros than the schedule begins with, or a parameter would lose its last connection; by
            ``update``, if there are no ``params``.
        TypeError: by ``init`` and ``update``, if parameters to prune are not real floating-point.
    """
    check_compiled_scope(scope)
    check_on_empty(on_empty, scope)
    guarded = freeze_masked(inner)
    steps = np.asarray(schedule.steps(), np.int32)
    plans: dict[Any, list[Group]] = {}

    def planned(params: Any) -> list[Group]:
        chosen = {name: leaf for name, (_, leaf) in chosen_parameters(params, include, axes).items()}
        key = tuple((name, tuple(leaf.shape)) for name, leaf in chosen.items())
        if key not in plans:
            if scope == "erdos_renyi":
                refuse_unknown([name for name, shape in key if axes_of(name, len(shape), axes) is None])
            known = {name: stack_axes(name, len(shape), axes) for name, shape in key}
            shapes = {name: known[name].matrix_shape(shape) for name, shape in key}
            given = _given(masks, params, chosen)
            live = {name: np.count_nonzero(known[name].matrices(mask), axis=(1, 2)) for name, mask in given.items()}
            plans[key] = _plan(
                shapes, live, schedule, scope, on_empty, {name: known[name].sum_of_sizes(shape) for name, shape in key}
            )
        for group in plans[key]:
            check_comparable([chosen[name] for name in group.names])
        return plans[key]

    def init(params: Any) -> PruningState:
        planned(params)
        structure = jax.tree.structure(params)
        chosen = chosen_parameters(params, include, axes, warn=True)
        given = _given(masks, params, {name: leaf for name, (_, leaf) in chosen.items()})
        live: list[Any] = [None] * len(jax.tree.leaves(params))
        dormant = list(live)
        for name, (place, leaf) in chosen.items():
            live[place], dormant[place] = jnp.copy(to_like(given[name], leaf)), full_like(leaf, 0)
        trees = [jax.tree.unflatten(structure, part) for part in (live, dormant)]
        return PruningState(counter(params), trees[0], trees[1], frozen_state(inner, params, trees[0]))

    def update(updates: Any, state: PruningState, params: Any = None, **extra: Any) -> tuple[Any, PruningState]:
        if params is None:
            raise ValueError("scheduled_pruning needs the parameters of this step: tx.update(grads, state, params)")
        groups = planned(params)
        updates, kept = guarded.update(updates, state.inner, params, masks=state.masks, **extra)
        # What is pruned are the weights that the caller will have. Behind the barrier there is only an addition left to do,
        # there and here, which no compiler can round in two ways.
        updates = lax.optimization_barrier(updates)  # type: ignore[no-untyped-call]
        place = jnp.minimum(jnp.searchsorted(steps, state.step), len(steps) - 1)

        def prune() -> Any:
            after = optax.apply_updates(params, updates)
            new = _pruned(after, state.masks, groups, include, axes, place, on_empty == "keep")

            def part(update: Any, param: Any, after: Any, old: Any, new: Any, dormant: Any) -> Any:
                if old is None:
                    return update, None
                gone = old & ~new
                return jnp.where(gone, to_zero(param, update.dtype), update), jnp.where(gone, after, dormant)

            parts = jax.tree.map(part, updates, params, after, state.masks, new, state.dormant)
            structure: Any = jax.tree.structure(updates)
            changed, dormant = zip(*structure.flatten_up_to(parts), strict=True)
            return jax.tree.unflatten(structure, changed), new, jax.tree.unflatten(structure, dormant)

        due = jnp.asarray(steps)[place] == state.step
        updates, new, dormant = lax.cond(due, prune, lambda: (updates, state.masks, state.dormant))
        return updates, PruningState(optax.safe_increment(state.step), new, dormant, kept)

    return optax.GradientTransformationExtraArgs(init, update)


def _plan(
    shapes: Shapes, live: Counts, schedule: Any, scope: pruning.Scope, on_empty: str, sums: Mapping[str, int]
) -> list[Group]:
    """Return the groups of parameters, whose ``zeros`` have a row for each step that prunes."""
    tables: dict[tuple[str, ...], Any] = {}
    left, steps = dict(live), schedule.steps()
    for place, step in enumerate(steps):
        for group in grouped(shapes, left, schedule(step), scope, sums=sums):
            # Of no zeros at the steps that compare others with each other.
            table = tables.setdefault(group.names, np.zeros((len(steps), *group.zeros.shape), np.int64))
            if on_empty != "keep":
                masked = table[place - 1] if place else masked_so_far(group, shapes, live)
                asked = f"the schedule asks for {{}} at step {step}"
                refuse_more(group, masked, asked, "begin with a higher sparsity, or with fewer masked connections")
            if on_empty == "raise":
                refuse_empty(group, shapes, live)
            table[place] = group.zeros
            if group.zeros.ndim:
                (name,) = group.names
                least = left[name] > 0 if on_empty == "keep" else 0
                after = np.maximum(shapes[name][1] * shapes[name][2] - group.zeros, least)
                left[name] = np.minimum(left[name], after)
    return [Group(names, table) for names, table in tables.items()]


def _given(masks: Any, params: Any, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return the masks to begin with of the parameters to prune."""
    refuse_constrained("scheduled_pruning", masks)
    so_far = {} if masks is None else named_leaves(masks, of_masks=True)
    if masks is not None and set(so_far) != set(known := named_leaves(params)):
        raise ValueError(f"masks must be a tree like the parameters', of {list(known)}; got {list(so_far)}")
    return {
        name: np.ones(leaf.shape, bool)
        if is_unmasked(so_far.get(name))
        else to_host(boolean_mask(so_far[name], leaf.shape, name))
        for name, leaf in chosen.items()
    }


def _pruned(
    params: Any, masks: Any, groups: Sequence[Group], include: Include, axes: Axes, place: Array, keep: bool
) -> Any:
    """Return the masks after a pruning, the one at ``place`` among the schedule's."""
    chosen, structure = chosen_parameters(params, include, axes), jax.tree.structure(params)
    leaves: list[Any] = list(leaves_like(structure, masks, "masks") or [])
    for names, zeros in groups:
        stacks = [stack_axes(name, chosen[name][1].ndim, axes) for name in names]
        at = [chosen[name][0] for name in names]
        weights, before = [chosen[name][1] for name in names], [leaves[one] for one in at]
        after = clear_group(jnp.asarray(zeros.astype(np.int32))[place], weights, before, keep, stacks)
        for one, mask in zip(at, after, strict=True):
            leaves[one] = mask
    return jax.tree.unflatten(structure, leaves)
