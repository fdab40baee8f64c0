"""``freeze_masked``: a zero gradient does not keep a weight still, so the optimizer is held to the mask."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

__all__ = ["freeze_masked"]


def freeze_masked(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Wrap an optax transformation so that its updates leave masked weights bit-identical.

    Momentum, Adam's moments and weight decay move weights whose gradient is zero. The wrapped transformation's
    ``update`` takes the masks that hold at that step as one more argument::

        tx = freeze_masked(optax.adamw(1e-3))
        updates, state = tx.update(grads, state, params, masks={"weight": mask, "bias": True})

    Args:
        inner: any optax transformation, or a chain of them. Wrap the whole chain: what comes after the guard is not
            guarded.

    Returns:
        A transformation whose ``update`` needs ``masks``: a tree of the parameters' structure whose leaves are boolean
        arrays of the parameters' shapes, or ``True`` for a parameter without a mask. ``maskedlinear.flax.param_masks``
        makes it for Flax models. ``update`` raises ``ValueError`` without it, or if the trees differ.
    """
    guarded = optax.with_extra_args_support(inner)

    def update(updates: Any, state: Any, params: Any = None, *, masks: Any = None, **extra: Any) -> tuple[Any, Any]:
        if masks is None:
            raise ValueError("freeze_masked needs the masks of this step: tx.update(grads, state, params, masks=masks)")
        updates, state = guarded.update(updates, state, params, **extra)

        # p + (-0.0) is p for every p, bit for bit; -0.0 + 0.0 is not.
        def held(update: Any, mask: Any) -> Any:
            return jnp.where(mask, update, jnp.asarray(-0.0, update.dtype))

        return jax.tree.map(held, updates, masks), state

    return optax.GradientTransformationExtraArgs(guarded.init, update)
