"""``scheduled_regrowth``: connections that move inside a jitted training step, as an optax transformation (RigL, SET)."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from maskedlinear.masks._random import checked_seed, integer
from maskedlinear.models import WeightAxes
from maskedlinear.pruning import cosine_decay
from maskedlinear.pruning._layers import Include, check_known, matches
from maskedlinear.pruning._over_time import check_regrowth, regrowth_seed
from maskedlinear_jax._functional import boolean_mask
from maskedlinear_jax._growth import key_words, share_words
from maskedlinear_jax._optim import freeze_masked, frozen_state, masks_like, to_zero
from maskedlinear_jax._placement import counter, to_like
from maskedlinear_jax._select import check_comparable
from maskedlinear_jax._stacks import regrow_parameter
from maskedlinear_jax._tree import Axes, is_unmasked, leaves_like, named_leaves, refuse_constrained, stack_axes

__all__ = ["RegrowthState", "scheduled_regrowth"]


class RegrowthState(NamedTuple):
    """The state of :func:`scheduled_regrowth`.

    Attributes:
        step: how many updates there were, int32.
        masks: a tree like the parameters', of booleans of their shapes: what is live in the next forward pass; ``None`` for
            those without a mask.
        inner: the state of the transformation itself, guarded by :func:`freeze_masked`.
    """

    step: Array
    masks: Any
    inner: Any


def scheduled_regrowth(
    inner: optax.GradientTransformation,
    *,
    masks: Any,
    every: int,
    end: int,
    initial: float = 0.3,
    growth: Literal["gradient", "random"] = "gradient",
    seed: int = 0,
    include: Include = None,
    axes: Axes = None,
    exclude_dropped: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optax transformation so that connections move every few steps, ever fewer, inside the jitted step::

        params = {"kernel": jax.random.normal(jax.random.key(0), (64, 10))}
        masks = prune_tree(params, 0.9)
        params = apply_masks(params, masks)  # +0 where they are masked, and so they stay
        tx = scheduled_regrowth(optax.adamw(1e-3), masks=masks, every=100, end=7500)
        state = tx.init(params)

        @jax.jit
        def step(params, state, x):
            grads = jax.grad(lambda params: ((x @ params["kernel"] - 1) ** 2).mean())(params)  # of all weights
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(300):
            params, state = step(params, state, jnp.ones((8, 64)))

    The model takes the parameters as they are, without :func:`apply_masks`: they are +0 under the masks, so that its outputs
    are those of the masked weights, and its gradients those of *all* weights, by which RigL grows. Masked gradients are 0
    wherever a connection could grow; where somebody masks them (Flax's masked layers do), grow at random, which needs none.
    The wrapped transformation sees the gradients under the masks, and what is masked stays +0, as by :func:`freeze_masked`.

    Update i, counted from 0, moves connections of what it has updated, where ``0 < i < end`` and ``every`` divides i, by the
    gradients that it was given: to the masks, bit for bit, that :func:`regrow_tree` gives for these weights, the masks
    before and these gradients, with the fraction ``cosine_decay(i, end, initial)`` and the seed
    ``(seed + (i << 20)) % 2**64``. Those of new connections are in ``state.masks``; they start at 0, and with a clean state
    of the optimizer at the next update. What has gone is +0. Between two that move the step costs nothing more. It can be
    the body of ``jax.lax.scan`` as well.

    A compiled step cannot raise errors: where a gradient is not finite, of any parameter, as in a step of mixed precision
    that overflows, the move that is due is left out. A weight that is NaN counts as the largest.

    Source: U. Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020, algorithm 1 (but that a step which
    moves connections updates weights too); D. Mocanu et al., "Scalable training of artificial neural networks with adaptive
    sparse connectivity inspired by network science", Nature Communications 2018.

    Args:
        inner: any optax transformation, or a chain of them. Wrap the whole chain.
        masks: the masks to begin with: a tree as :func:`prune_tree` returns it. Copied, so that buffers can be donated.
        every: how many steps lie between two that move connections.
        end: the step from which on nothing moves; the paper takes three quarters of the training.
        initial: the share of connections that would move at step 0, in [0, 1]; it falls as a cosine.
        growth: ``"gradient"`` (RigL) or ``"random"`` (SET).
        seed: of the random places, an integer in [0, 2⁶⁴).
        include: in which of the parameters with masks connections move, as in :func:`prune_tree`; the other masks stay.
        axes: as in :func:`prune_tree`. Each matrix of a stack keeps the number of its connections.
        exclude_dropped: as in :func:`regrow_tree`.

    Returns:
        A transformation whose ``update`` needs ``params``, and whose state is a :class:`RegrowthState`.

    Raises:
        ValueError: if ``every``, ``end``, ``initial``, ``growth`` or ``seed`` is out of its range; by ``init`` and
            ``update``, if no parameter that is meant has a mask, or masks or gradients do not fit; by ``update``, if there
            are no ``params``.
        TypeError: if ``every``, ``end`` or ``seed`` is not an integer; by ``init`` and ``update``, if parameters whose
            connections move are not real floating-point.
    """
    check_regrowth(integer("every", every), integer("end", end), initial, growth)
    seed, guarded = checked_seed(seed), freeze_masked(inner)
    steps = range(every, end, every)
    shares = np.array([share_words(cosine_decay(step, end, initial)) for step in steps])
    keys = np.array([key_words(regrowth_seed(seed, step)) for step in steps])

    def init(params: Any) -> RegrowthState:
        structure: Any = jax.tree.structure(params)
        refuse_constrained("scheduled_regrowth", masks)
        given = structure.flatten_up_to(masks_like(params, masks))
        live = [
            None if is_unmasked(mask) else jnp.copy(to_like(boolean_mask(mask, leaf.shape, name), leaf, name))
            for (name, leaf), mask in zip(named_leaves(params).items(), given, strict=True)
        ]
        _moving(params, live, include, axes)
        tree = jax.tree.unflatten(structure, live)
        return RegrowthState(counter(params), tree, frozen_state(inner, params, tree))

    def update(updates: Any, state: RegrowthState, params: Any = None, **extra: Any) -> tuple[Any, RegrowthState]:
        if params is None:
            raise ValueError("scheduled_regrowth needs the parameters of this step: tx.update(grads, state, params)")
        gradients, structure = updates, jax.tree.structure(updates)
        live: list[Any] = leaves_like(structure, state.masks, "masks") or []
        moving = _moving(params, live, include, axes)
        updates, kept = guarded.update(updates, state.inner, params, masks=state.masks, **extra)
        after_this = optax.safe_increment(state.step)
        if not steps:
            return updates, RegrowthState(after_this, state.masks, kept)
        # What moves are the weights that the caller will have. Behind the barrier there is only an addition left to do,
        # there and here, which no compiler can round in two ways.
        updates = lax.optimization_barrier(updates)  # type: ignore[no-untyped-call]
        place = jnp.clip(state.step // every - 1, 0, len(steps) - 1)

        def move() -> Any:
            leaves = jax.tree.leaves(optax.apply_updates(params, updates))
            dense: list[Any] = jax.tree.leaves(gradients)
            before, changed, found, number = jax.tree.leaves(params), jax.tree.leaves(updates), list(live), 0
            finite = jnp.stack([jnp.isfinite(gradient).all() for gradient in dense]).all()
            for at, known in moving.items():
                gradient = dense[at] if growth == "gradient" else None
                words = (jnp.asarray(shares)[place], jnp.asarray(keys)[place])
                new, matrices = regrow_parameter(known, live[at], leaves[at], gradient, *words, number, exclude_dropped)
                number += matrices
                found[at] = jnp.where(finite, new, live[at])
                gone = live[at] & ~found[at]
                changed[at] = jnp.where(gone, to_zero(before[at], changed[at].dtype), changed[at])
            return jax.tree.unflatten(structure, changed), jax.tree.unflatten(structure, found)

        due = (state.step > 0) & (state.step < end) & (state.step % every == 0)
        updates, new = lax.cond(due, move, lambda: (updates, state.masks))
        return updates, RegrowthState(after_this, new, kept)

    return optax.GradientTransformationExtraArgs(init, update)


def _moving(params: Any, masks: list[Any], include: Include, axes: Axes) -> dict[int, WeightAxes]:
    """Return the axes of the parameters whose connections move, by their place among the leaves."""
    named = named_leaves(params)
    check_known("axes", axes or (), list(named))
    found = {}
    for place, (name, leaf) in enumerate(named.items()):
        if not is_unmasked(masks[place]) and matches(name, leaf, include):
            check_comparable([leaf])
            found[place] = stack_axes(name, leaf.ndim, axes)
    if not found:
        raise ValueError(
            f"connections move in parameters with masks, and there is none that include={include!r} means: make masks with "
            "prune_tree"
        )
    return found
