"""Scores of a tree of parameters by its derivatives, GraSP and SynFlow, in the form that ``prune_tree`` takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from maskedlinear import pruning
from maskedlinear.models import WeightAxes
from maskedlinear.pruning._layers import Include
from maskedlinear_jax._placement import to_host
from maskedlinear_jax._tree import Axes, apply_masks, axes_of, chosen_parameters, named_leaves

__all__ = ["grasp_scores", "synflow_scores"]

Scores = dict[str, NDArray[np.float64]]


def grasp_scores(
    loss: Callable[[Any], Array], params: Any, *, masks: Any = None, include: Include = None, axes: Axes = None
) -> Scores:
    """Return :func:`maskedlinear.pruning.grasp` of the parameters to prune, by name, for ``score=`` of :func:`prune_tree`.

    The Hessian's product with the gradient is one ``jax.jvp`` of ``jax.grad``: twice the cost of a gradient.

    Args:
        loss: of a tree like ``params``, a scalar; the sum over all data, outputs divided by a temperature (200 in the paper)
            before it. It must allow forward mode: layers of ours with ``forward_mode=True``.
        params: the tree, before training.
        masks: the tree of masks so far, as :func:`prune_tree` returns it.
        include: as in :func:`prune_tree`.
        axes: as there.

    Raises:
        ValueError: if no parameter is meant, or a tree does not fit.

    >>> import jax.numpy as jnp
    >>> from maskedlinear.jax import grasp_scores
    >>> grasp_scores(lambda p: (p["w"] ** 2).sum(), {"w": jnp.array([[3.0, -1.0]])})  # H g = 4 w
    {'w': array([[36.,  4.]])}
    """
    params = params if masks is None else apply_masks(params, masks)
    gradient, tangent_map = jax.linearize(jax.grad(loss), params)
    return _scored(pruning.grasp, params, tangent_map(gradient), include, axes)


def synflow_scores(
    forward: Callable[[Any], Any], params: Any, *, masks: Any = None, include: Include = None, axes: Axes = None
) -> Scores:
    """Return :func:`maskedlinear.pruning.synflow` of the parameters to prune, by name; one round of many::

        for step in range(1, 101):
            scores = synflow_scores(lambda p: model.apply({"params": p}, jnp.ones((1, 784))), params, masks=masks)
            masks = prune_tree(params, 1 - 0.1 ** (step / 100), masks=masks, score=scores)

    All parameters are absolute, in float64 where ``jax_enable_x64`` is on. Without it deep networks may overflow float32,
    which is refused.

    Args:
        forward: of a tree like ``params``, the outputs on an input of ones, as of a model in evaluation.
        params: the tree.
        masks: the tree of masks so far; none in the first round.
        include: as in :func:`prune_tree`.
        axes: as there.

    Raises:
        ValueError: if no parameter is meant, a tree does not fit, or the flow is not finite or does not change with any of
            the parameters.
    """
    positive = jax.tree.map(jnp.abs, params if masks is None else apply_masks(params, masks))
    if jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        positive = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), positive)

    def outputs(positive: Any) -> tuple[Any, Any]:
        leaves = jax.tree.leaves(forward(positive))
        return sum(jnp.sum(leaf) for leaf in leaves), sum(jnp.sum(jnp.abs(leaf)) for leaf in leaves)

    (flow, whole), gradient = jax.value_and_grad(outputs, has_aux=True)(positive)
    scores = _scored(pruning.synflow, positive, gradient, include, axes)
    largest = max(float(own.max(initial=0)) for own in scores.values())
    if not (np.isfinite(float(flow)) and np.isfinite(largest)):
        raise ValueError(f"the flow must be finite; got {float(flow)}: compute it in float64, with jax_enable_x64")
    if largest <= 1e-12 * float(whole):
        raise ValueError(
            "no signal arrives at the output's sum, which changes with no parameter: return what is before a last layer "
            "normalisation"
        )
    return scores


def _scored(score: Callable[[Any, Any], Any], params: Any, factors: Any, include: Include, axes: Axes) -> Scores:
    """Return the scores of the parameters to prune, by name, as :func:`prune_tree` takes them."""
    by_name, scores = named_leaves(factors), {}
    for name, (_, leaf) in chosen_parameters(params, include, axes, warn=True).items():
        meant: WeightAxes | None = axes_of(name, leaf.ndim, axes)
        made = score(to_host(leaf), to_host(by_name[name]))
        if meant is not None:
            made = meant.matrices(made)
            made = made[0] if len(made) == 1 else made
        scores[name] = made
    return scores
