"""``scheduled_pruning``: pruning by a schedule inside a jitted training step, as an optax transformation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from maskedlinear import pruning
from maskedlinear.models import refuse_unknown
from maskedlinear.pruning._edges import zeros_by_scope
from maskedlinear.pruning._layers import Include
from maskedlinear_jax._functional import boolean_mask
from maskedlinear_jax._optim import freeze_masked, to_zero
from maskedlinear_jax._select import check_comparable, clear_smallest
from maskedlinear_jax._tree import (
    Axes,
    as_matrix,
    axes_of,
    chosen_parameters,
    from_matrix,
    is_unmasked,
    leaves_like,
    matrix_shape,
    named_leaves,
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
    schedule: pruning.CubicSchedule,
    *,
    masks: Any = None,
    include: Include = None,
    axes: Axes = None,
    scope: pruning.Scope = "layer",
    on_empty: Literal["raise", "allow"] = "raise",
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
    :func:`prune_tree` gives for these weights and the masks before. Between two that prune the step costs nothing more.

    A compiled step cannot raise errors, so that what may fail is checked before: by ``scope="global"`` a layer may lose its
    last connection, which needs ``on_empty="allow"``. A weight that is NaN counts as the largest.

    Args:
        inner: any optax transformation, or a chain of them. Wrap the whole chain.
        schedule: the sparsity at each update.
        masks: the masks to begin with, concrete: a tree as :func:`prune_tree` returns it. Full ones if ``None``.
        include: which parameters, as in :func:`prune_tree`.
        axes: as in :func:`prune_tree`.
        scope: ``"layer"``, ``"erdos_renyi"`` or ``"global"``, as in :func:`maskedlinear.pruning.prune`.
        on_empty: ``"raise"`` or ``"allow"`` where a parameter would lose its last connection.

    Returns:
        A transformation whose ``update`` needs ``params``, and whose state is a :class:`PruningState`.

    Raises:
        ValueError: if ``scope`` or ``on_empty`` is none of these, or both are as said above; by ``init`` and
            ``update``, if no parameter is meant, the masks do not fit or have more zeros than the schedule begins with,
            or a parameter would lose its last connection; by ``update``, if there are no ``params``.
        TypeError: by ``init`` and ``update``, if parameters to prune are not real floating-point.
    """
    if scope not in ("global", "layer", "erdos_renyi"):
        raise ValueError(f"scope must be 'layer', 'erdos_renyi' or 'global'; got {scope!r}")
    if on_empty not in ("raise", "allow"):
        raise ValueError(f"on_empty must be 'raise' or 'allow'; got {on_empty!r}")
    if scope == "global" and on_empty == "raise":
        raise ValueError(
            "pruning by scope='global' may take a parameter's last connection, which a compiled step cannot refuse: say "
            "on_empty='allow', or scope='layer'"
        )
    guarded = freeze_masked(inner)
    steps = np.asarray(schedule.steps(), np.int32)
    plans: dict[Any, list[_Group]] = {}

    def planned(params: Any) -> list[_Group]:
        chosen = {name: leaf for name, (_, leaf) in chosen_parameters(params, include, axes).items()}
        key = tuple((name, tuple(leaf.shape)) for name, leaf in chosen.items())
        if key not in plans:
            live = {name: int(np.count_nonzero(mask)) for name, mask in _given(masks, params, chosen).items()}
            if any(one.batch_axis not in ((), None) for one in (axes or {}).values()):
                raise ValueError(
                    "scheduled_pruning takes each parameter for one matrix; got axes with a batch_axis: prune such a stack "
                    "between steps, with prune_tree"
                )
            if scope == "erdos_renyi":
                refuse_unknown([name for name, shape in key if axes_of(name, len(shape), axes) is None])
            shapes = {name: matrix_shape(name, shape, axes) for name, shape in key}
            plans[key] = _plan(shapes, live, schedule, scope, on_empty)
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
            live[place], dormant[place] = jnp.array(given[name]), jnp.zeros(leaf.shape, leaf.dtype)
        trees = [jax.tree.unflatten(structure, part) for part in (live, dormant)]
        return PruningState(jnp.zeros((), jnp.int32), trees[0], trees[1], guarded.init(params))

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
            new = _pruned(after, state.masks, groups, include, axes, place)

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


class _Group(NamedTuple):
    """Parameters that are compared with each other, by name, and how many zeros they have after each pruning."""

    names: Sequence[str]
    zeros: list[int]


def _plan(
    shapes: Mapping[str, tuple[int, ...]], live: Mapping[str, int], schedule: Any, scope: pruning.Scope, on_empty: str
) -> list[_Group]:
    """Return the groups of parameters, with an entry of ``zeros`` for each step that prunes."""
    groups: dict[tuple[str, ...], _Group] = {}
    left = dict(live)
    for step in schedule.steps():
        for names, zeros in zeros_by_scope(shapes, left, schedule(step), None, scope):
            size = sum(math.prod(shapes[name]) for name in names)
            group = groups.setdefault(tuple(names), _Group(names, []))
            least = group.zeros[-1] if group.zeros else size - sum(live[name] for name in names)
            if zeros < least:
                raise ValueError(
                    f"pruning only removes connections; got {least} masked ones of {', '.join(names)}, where the schedule "
                    f"asks for {zeros} at step {step}: begin with a higher sparsity, or with fewer masked connections"
                )
            group.zeros.append(zeros)
            if len(names) == 1:
                left[names[0]] = size - zeros
                if on_empty == "raise" and live[names[0]] and zeros == size:
                    raise ValueError(
                        f"a layer must keep a connection; all would be gone of {names[0]}: prune less, or "
                        "pass on_empty='allow'"
                    )
    return list(groups.values())


def _given(masks: Any, params: Any, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return the masks to begin with of the parameters to prune."""
    so_far = {} if masks is None else named_leaves(masks, of_masks=True)
    if masks is not None and set(so_far) != set(known := named_leaves(params)):
        raise ValueError(f"masks must be a tree like the parameters', of {list(known)}; got {list(so_far)}")
    return {
        name: np.ones(leaf.shape, bool)
        if is_unmasked(so_far.get(name))
        else np.asarray(boolean_mask(so_far[name], leaf.shape, name))
        for name, leaf in chosen.items()
    }


def _pruned(params: Any, masks: Any, groups: Sequence[_Group], include: Include, axes: Axes, place: Array) -> Any:
    """Return the masks after a pruning, the one at ``place`` among the schedule's."""
    chosen, structure = chosen_parameters(params, include, axes), jax.tree.structure(params)
    leaves: list[Any] = list(leaves_like(structure, masks, "masks") or [])
    for names, zeros in groups:
        before = [as_matrix(name, leaves[chosen[name][0]], axes) for name in names]
        masked = sum(mask.size for mask in before) - sum(jnp.sum(mask, dtype=jnp.int32) for mask in before)
        count = jnp.asarray(np.asarray(zeros, np.int32))[place] - masked
        weights = [as_matrix(name, chosen[name][1], axes) for name in names]
        for name, mask in zip(names, clear_smallest(weights, before, count), strict=True):
            at, leaf = chosen[name]
            leaves[at] = from_matrix(name, mask, leaf.shape, axes)
    return jax.tree.unflatten(structure, leaves)
