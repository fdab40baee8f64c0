"""Jitted training steps and inferences to be timed, in the form of calls."""

# mypy: disable-error-code="no-untyped-call,no-any-return"

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import optax
from jax import Array

__all__ = ["LayerCall", "forward_backward", "inference", "training_step"]

LayerCall = Callable[..., Array]
"""A layer as a function: y of (parameters, x, what is fixed)."""


def training_step(layer: LayerCall, params: Any, fixed: Any, x: Array, g: Array) -> Callable[[], None]:
    """Return forward, backward with the cotangent ``g``, and a step of Adam, as a call that keeps parameters of its own."""
    optimizer = optax.adam(1e-3)

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Any, state: Any, fixed: Any, x: Array) -> Any:
        y, (gradients, dx) = _gradients(layer, params, x, fixed, g)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, y, dx

    params = jax.tree.map(jax.numpy.array, params)  # a copy, which is given away
    now = [params, optimizer.init(params)]

    def step() -> None:
        params, state, y, dx = update(*now, fixed, x)
        now[:] = jax.block_until_ready((params, state))
        jax.block_until_ready((y, dx))

    return step


def forward_backward(layer: LayerCall, params: Any, fixed: Any, x: Array, g: Array) -> Callable[[], Any]:
    """Return forward and backward, as a call."""
    return partial(_block, partial(jax.jit(partial(_gradients, layer)), params, x, fixed, g))


def inference(layer: LayerCall, params: Any, fixed: Any, x: Array) -> Callable[[], Any]:
    """Return the forward pass, as a call."""
    return partial(_block, partial(jax.jit(layer), params, x, fixed))


def _gradients(layer: LayerCall, params: Any, x: Array, fixed: Any, g: Array) -> Any:
    y, pull = jax.vjp(lambda params, x: layer(params, x, fixed), params, x)
    return y, pull(g)


def _block(call: Callable[[], Any]) -> Any:
    return jax.block_until_ready(call())
