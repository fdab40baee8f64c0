"""``compress`` and ``expand`` for nnx: the masked layers of a whole model, exchanged for those of the other form."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar

import jax
from flax import nnx
from flax.nnx.nn import dtypes
from jax import lax

from maskedlinear._timing import median_seconds
from maskedlinear.costs import Costs, Format, Layer, choose, costs_for, table
from maskedlinear_jax._trial import LayerCall, inference, training_step
from maskedlinear_jax.flax._modules import exchanged, layers_of, owners
from maskedlinear_jax.flax._nnx import MaskedLinear
from maskedlinear_jax.flax._sparse_nnx import SparseLinear

__all__ = ["as_function", "compress", "expand"]

Model = TypeVar("Model")

_OPTIONS = {
    "dot_general": lax.dot_general,
    "promote_dtype": dtypes.promote_dtype,
    "precision": None,
    "preferred_element_type": None,
}


def compress(
    model: Model,
    format: Format = "auto",
    *,
    batch: int = 128,
    training: bool = True,
    costs: Costs | None = None,
    measure: bool = True,
    explain: bool = False,
) -> Model:
    """Give each masked layer of an nnx model the form that is faster, in place, and return the model.

    A layer used in several places is exchanged in all of them. Live weights, biases and dtypes are kept; dormant weights
    are lost where a layer becomes sparse. The exchanged layers have new parameters: make the ``nnx.Optimizer`` afterwards.

    These keep their form, and ``explain`` says why: subclasses, layers with options of their own (``precision``,
    ``dot_general``, ...), stacks of layers, kernels that are sharded or shared between layers, and abstract layers.

    Args:
        model: any nnx module, or a list, tuple or dict of them; a ``MaskedLinear`` or ``SparseLinear`` itself is not
            changed, and its new form returned.
        format: ``"auto"`` for the faster form; or ``"sparse"`` or ``"dense"`` for all layers.
        batch: the rows of x in a call, all batch dimensions together.
        training: whether a jitted training step should be fast (forward, backward, Adam), or an inference.
        costs: times measured on your machine; those that the package brings if ``None``, which are one machine's, in
            float32 on the CPU.
        measure: where the expected times are within a factor of 2 of each other, and where there are none for the device,
            time both forms of the layer here and now: compile them, and run each for about a tenth of a second. If
            ``False``, the choice is the same wherever the costs are, as processes need it that train one model together.
        explain: print for each layer what was chosen and why: bytes, FLOPs, times.

    Raises:
        ValueError: if ``format`` or ``batch`` is none of these; if a layer that must keep its form is asked to change it; or
            if there are no costs for the device and ``measure`` is ``False``. The model is left as it was.
    """
    layers = _masked_layers(model)
    device = jax.default_backend()
    choices = []
    for layer, facts in layers.values():
        known = costs_for(facts, format, costs, "jax", device, measure)
        measured = partial(_measured_seconds, layer, batch, training) if measure else None
        choices.append(choose(facts, format, batch, training, known, measured))
    made: dict[int, Any] = {}
    for (key, (layer, facts)), choice in zip(layers.items(), choices, strict=True):
        if choice.form != facts.form:
            made[key] = layer.to_masked() if isinstance(layer, SparseLinear) else SparseLinear.from_masked(layer)
    model = exchanged(model, made, set())
    if explain:
        print(table(choices, batch, training))
    return model


def expand(model: Model) -> Model:
    """Turn each ``SparseLinear`` of a model into a ``MaskedLinear`` with the same outputs, in place; return the model.

    The form whose masks can change. As with :func:`compress`, the layers have new parameters.

    Raises:
        ValueError: if a layer must keep its form; the model is left as it was.
    """
    return compress(model, "dense")


def _measured_seconds(layer: Any, batch: int, training: bool) -> dict[str, float]:
    """Return how long a jitted step with Adam, or an inference, takes in each form of a layer, on ``batch`` rows of x."""
    dense = layer.to_masked() if isinstance(layer, SparseLinear) else layer
    keys = jax.random.split(jax.random.key(0))
    x, g = (
        jax.random.normal(key, (batch, n)) for key, n in zip(keys, (layer.in_features, layer.out_features), strict=True)
    )
    x = x.astype(dense.kernel.dtype)
    calls = {}
    for form, made in (("dense", dense), ("sparse", SparseLinear.from_masked(dense))):
        call, params, fixed = as_function(made)
        dtype = jax.eval_shape(call, params, x, fixed).dtype
        step = partial(training_step, g=g.astype(dtype)) if training else inference
        calls[form] = step(call, params, fixed, x)
    return median_seconds(calls)


def as_function(layer: Any) -> tuple[LayerCall, Any, Any]:
    """Return a layer as y of (parameters, x, what is fixed), its parameters, and what is fixed."""
    graph, params, *fixed = nnx.split(layer, nnx.Param, ...)
    return lambda params, x, fixed: nnx.merge(graph, params, *fixed)(x), params, fixed


def _masked_layers(model: Any) -> dict[int, tuple[Any, Layer]]:
    """Return the masked layers of a model, and what a choice needs to know of them."""
    held = owners(model)
    found: dict[int, tuple[Any, Layer]] = {}
    for name, layer in layers_of(model, (MaskedLinear, SparseLinear)).items():
        shared = any(len(held[id(own)]) > 1 for own in vars(layer).values() if isinstance(own, nnx.Variable))
        found[id(layer)] = layer, _facts(name, layer, shared)
    return found


def _facts(name: str, layer: Any, shared: bool) -> Layer:
    dense = isinstance(layer, MaskedLinear)
    weight = (layer.kernel if dense else layer.values).get_value()
    fixed, live = _why_fixed(layer, weight, shared), weight.size
    if dense and not fixed:
        live = int(layer.mask.get_value().sum())
    form = "dense" if dense else "sparse"
    return Layer(name, layer.out_features, layer.in_features, live, weight.dtype.itemsize, form, fixed)


def _why_fixed(layer: Any, weight: Any, shared: bool) -> str:
    if type(layer) not in (MaskedLinear, SparseLinear):
        return f"it is a {type(layer).__name__}, whose call may be its own"
    if shared:
        return "it shares parameters with another layer"
    if not isinstance(weight, jax.Array):
        return "it has no values yet"
    if isinstance(layer, SparseLinear):
        return ""
    if weight.ndim != 2:
        return "it is a stack of layers"
    named = [name for name, usual in _OPTIONS.items() if getattr(layer, name) is not usual]
    if layer.forward_mode:
        return "it has forward_mode, which the sparse form does without"
    if any(type(part) is not nnx.Param for part in (layer.kernel, layer.bias) if part is not None):
        return "its parameters are of a type of their own"
    if named:
        return f"the sparse form has no {' or '.join(named)}"
    if any("sharding" in name and value for name, value in layer.kernel.get_metadata().items() if "eager" not in name):
        return "its kernel is sharded"
    return ""
