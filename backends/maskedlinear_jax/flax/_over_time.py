"""Masks of nnx models that change while they train: by a schedule, in rounds with rewinding, with connections that move."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from maskedlinear.pruning import SparsitySchedule
from maskedlinear.pruning._over_time import Pruning, Regrowth, lottery_rounds_by
from maskedlinear_jax._functional import boolean_mask
from maskedlinear_jax.flax._adapter import refuse_linen
from maskedlinear_jax.flax._constraint_variables import keep_own
from maskedlinear_jax.flax._dense_gradients import are_finite
from maskedlinear_jax.flax._kernel import label, masked_kernel, set_variables
from maskedlinear_jax.flax._modules import layers_of
from maskedlinear_jax.flax._regrow import regrow_model
from maskedlinear_jax.flax._sparse_nnx import SparseLinear
from maskedlinear_jax.flax._weights import masked_weights
from maskedlinear_jax.flax._whole import prune_model

__all__ = ["ScheduledPruning", "ScheduledRegrowth", "load_state", "lottery_rounds", "rewind_model"]


def bring_masks(model: Any, average: Any) -> None:
    """Give an average of a model its masks and its sparse layers' connections; what has come back starts at 0 there.

    Raises:
        ValueError: if the average has not the same masked layers; it is left as it was.
    """
    (weights, layers), (others, other_layers) = (
        (masked_weights(one), layers_of(one, SparseLinear)) for one in (model, average)
    )
    if (weights.keys(), layers.keys()) != (others.keys(), other_layers.keys()):
        raise ValueError(
            f"an average has the layers of its model; got one with the masked weights {[*others, *other_layers]}, and the "
            f"model has {[*weights, *layers]}: make it of the model as it is"
        )
    for name, weight in weights.items():
        new, old = jnp.copy(weight.live), others[name].live
        others[name].set_mask(new)
        kernel = others[name].kernel
        kernel.set_value(masked_kernel(kernel.get_value(), old | ~new))
    for name, layer in layers.items():
        other_layers[name].take_patterns(layer.patterns)


class ScheduledPruning(Pruning):
    """Prunes an nnx model at the steps of a schedule; in a training loop, after each jitted step::

        pruner = ScheduledPruning(model, CubicSchedule(0.9, begin=100, end=1000, every=10))
        for x, y in batches:
            train_step(model, optimizer, x, y)
            pruner.step()

    Inside the jitted step :func:`maskedlinear.jax.scheduled_pruning` does it.

    Args:
        model: a module with masked weights.
        schedule: the sparsity at each step, counted from 0.
        averages: averages of the model, nnx modules too, which get its masks whenever it was pruned.
        how: ``score``, ``scope``, ``of``, ``include``, ``axes``, ``seed`` and more: as :func:`prune_model` takes them;
            ``gradients`` are given to ``step``.

    Attributes:
        steps: how many steps there were.
    """

    _prune_model, _bring_masks = staticmethod(prune_model), staticmethod(bring_masks)

    def __init__(self, model: Any, schedule: SparsitySchedule, **options: Any) -> None:
        refuse_linen("ScheduledPruning", model)
        super().__init__(model, schedule, **options)

    def _has_finite_gradients(self, how: Mapping[str, Any]) -> bool:
        return are_finite(jax.tree.leaves(how.get("gradients")))


class ScheduledRegrowth(Regrowth):
    """Moves connections every few steps, ever fewer: RigL by gradient, SET at random; in a training loop::

        regrowth = ScheduledRegrowth(model, optimizer, every=100, end=7500)
        for x, y in batches:
            train_step(model, optimizer, x, y)
            regrowth.step(lambda: dense_gradients(loss, model, x, y))

    Source: U. Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020, algorithm 1; D. Mocanu et al.,
    "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by network science", Nature
    Communications 2018.

    Args:
        model: a module with masked layers of either form.
        optimizer: as in :func:`regrow_model`.
        every: how many steps lie between two that move connections.
        end: the step from which on nothing moves; the paper takes three quarters of the training.
        initial: the share of connections that would move at step 0, in [0, 1]; it falls as a cosine.
        growth: ``"gradient"`` (RigL) or ``"random"`` (SET).
        include: which layers, as in :func:`mask_model`.
        seed: of the random places.
        averages: averages of the model, nnx modules too, which get its connections whenever they have moved; new ones start
            at 0 there, too.
        exclude_dropped: as in :func:`regrow_model`.

    Attributes:
        steps: how many steps there were.

    Raises:
        ValueError: if ``every``, ``end``, ``initial`` or ``growth`` is out of its range.
    """

    _regrow_model, _bring_masks = staticmethod(regrow_model), staticmethod(bring_masks)

    def __init__(self, model: Any, *arguments: Any, **options: Any) -> None:
        refuse_linen("ScheduledRegrowth", model)
        super().__init__(model, *arguments, **options)

    def step(self, gradients: Callable[[], Mapping[str, Any]] | None = None) -> int:
        """Move connections if it is time; return how many moved. Gradients that are not finite move nothing, and are logged.

        Args:
            gradients: a function without arguments that returns what :func:`dense_gradients` does; it is called only
                where connections move by gradient.

        Raises:
            ValueError: as by :func:`regrow_model`; or if growth is by gradient and there is no such function.
        """
        moved = self.step_at(self.steps, gradients)
        self.steps += 1
        return moved

    def step_at(self, step: int, gradients: Callable[[], Mapping[str, Any]] | None = None) -> int:
        """Do what :meth:`step` does at a step that somebody else counts."""
        if self.growth == "gradient" and gradients is None:
            raise ValueError(
                "growth by gradient needs gradients, step(lambda: dense_gradients(loss, model, ...)): pass them, or say "
                "growth='random'"
            )
        if not self.due(step):
            return 0
        found = gradients() if self.growth == "gradient" and gradients is not None else None
        return self._move(step, found, found is None or are_finite(found.values()))


def load_state(model: Any, state: Any) -> None:
    """Set the Variables of a model from a state, one of an earlier version too, as ``nnx.update`` does.

    Where a state has no dormant weights (that of a plain model, or of an earlier version), those are what stands in a kernel
    under the mask. Of a :class:`SparseLinear` ``indptr`` and ``indices`` are enough; they are checked, and what is made
    of them is made anew. Where the state has no mask, the layer's own stays.

    Args:
        model: any nnx module.
        state: of ``nnx.state``, or restored from a checkpoint into the form of one: a ``State`` of Variables.

    Raises:
        ValueError: if the indices of a sparse layer are none of a layer of its shape, or the state has only one of the two;
            other Variables are set then.
    """
    refuse_linen("load_state", model)
    _load(model, state, keep_masks=False)


def rewind_model(model: Any, state: Any) -> None:
    """Set the Variables of a model back to a saved state, and keep the masks of now.

    An optimizer's state is not touched: make a new one, or load that of the same moment.

    Args:
        model: a module with masked weights.
        state: a copy of ``nnx.state(model)`` from an earlier moment, before or after it was masked, or of an earlier
            version: ``jax.tree.map(jnp.copy, nnx.state(model))``, where a jitted step donates its buffers.
    """
    refuse_linen("rewind_model", model)
    _load(model, state, keep_masks=True)


def _load(model: Any, state: Any, keep_masks: bool) -> None:
    weights = masked_weights(model).values()
    masks = [weight.mask for weight in weights]
    absent = [jnp.zeros((0,) * mask.ndim, bool) for mask in masks]
    for weight, nothing in zip(weights, absent, strict=True):
        weight.mask_variable.set_value(nothing)
        if weight.dormant is not None:
            weight.dormant.set_value(jnp.zeros_like(weight.dormant.get_value()))
    sparse = [(layer, _ends(layer)) for layer in layers_of(model, SparseLinear).values()]
    nnx.update(model, _copied(state))
    brought = [
        weight.mask_variable.get_value() for weight in weights
    ]  # before the first is set, which others may share
    for weight, mask, nothing, new in zip(weights, masks, absent, brought, strict=True):
        if keep_masks or new is nothing:
            set_variables(weight.kernel, weight.mask_variable, weight.dormant, mask)
            keep_own(weight.owner, weight.parameter, weight.mask)
        elif weight.is_ours:
            weight.owner.set_mask(new)
        else:
            checked = jnp.array(boolean_mask(new, weight.value.shape, label(weight.value)))
            set_variables(weight.kernel, weight.mask_variable, weight.dormant, checked)
            keep_own(weight.owner, weight.parameter, checked)
    for layer, ends in sparse:
        if len({new is old for new, old in zip(_ends(layer), ends, strict=True)}) > 1:
            raise ValueError(
                "the connections of a sparse layer are in its indptr and indices; got a state with one of them alone: "
                "restore both, or neither, and the layer keeps its own"
            )
        layer._complete_pattern()
        keep_own(layer, "weight_values", None)


def _ends(layer: SparseLinear) -> tuple[Any, Any]:
    return layer.indptr.get_value(), layer.indices.get_value()


def _copied(state: Any) -> Any:
    return jax.tree.map(jnp.copy, state)


def _saved(model: Any, state: Any) -> Any:
    refuse_linen("lottery_rounds", model)
    return _copied(nnx.state(model) if state is None else state)


lottery_rounds = lottery_rounds_by(prune_model, rewind_model, _saved)
