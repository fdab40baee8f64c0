"""``compress`` and ``expand`` for nnx: the masked layers of a whole model, exchanged for those of the other form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax import lax

from maskedlinear._timing import median_seconds
from maskedlinear.costs import Costs, Format, Layer, choose_forms, table
from maskedlinear.models import check_patterns
from maskedlinear.pattern import SparsityPattern
from maskedlinear_jax._trial import LayerCall, inference, training_step
from maskedlinear_jax.flax._modules import (
    copy_metadata_and_attributes,
    device_of,
    layers_of,
    parameter_users,
    replace_modules,
)
from maskedlinear_jax.flax._nnx import MaskedLinear, linear_options
from maskedlinear_jax.flax._sparse_nnx import SparseLinear

__all__ = ["as_function", "become_sparse", "compress", "expand", "get_forms", "keep_bits"]

Model = TypeVar("Model")

_STACK = "it is a stack of layers"
_NO_VALUES = "it has no values yet"
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
    forms: Mapping[str, Literal["dense", "sparse"]] | None = None,
    patterns: Mapping[str, SparsityPattern] | None = None,
    batch: int = 128,
    training: bool = True,
    costs: Costs | None = None,
    measure: bool | None = None,
    explain: bool = False,
) -> Model:
    """Give each masked layer of an nnx model the form that is faster, in place, and return the model.

    A layer used in several places is exchanged in all of them. Live weights, biases, dtypes, devices, the parameters'
    metadata and attributes of your own are kept; dormant weights are lost where a layer becomes sparse. The exchanged layers
    have new parameters: make the ``nnx.Optimizer`` afterwards.

    These keep their form, and ``explain`` says why: subclasses, layers with options of their own (``precision``,
    ``dot_general``, ...) or modules of their own, stacks of layers, parameters that are sharded, shared between layers, of a
    type of their own or with hooks, and abstract layers.

    Args:
        model: any nnx module, or a list, tuple or dict of them; a ``MaskedLinear`` or ``SparseLinear`` itself is not
            changed, and its new form returned.
        format: ``"auto"`` for the faster form; or ``"sparse"`` or ``"dense"`` for all layers.
        forms: a choice that was made before, in place of ``format``: ``"dense"`` or ``"sparse"`` by the layers' names, as
            :func:`get_forms` returns it; the layers that it does not name keep their form. Nothing is expected or measured.
        patterns: the connections, (out, in), of plain ``nnx.Linear`` layers by name, which become masked in the form chosen
            and keep the live part of their weight: so a compressed model is made of a fresh one, which may be abstract
            (``nnx.eval_shape``), and takes the state of the one that was saved. Of an abstract layer the weights are 0 until
            then, and a whole kernel is made for the dense form only.
        batch: the rows of x in a call, all batch dimensions together.
        training: whether a jitted training step should be fast (forward, backward, Adam), or an inference.
        costs: times measured on your machine, for the layers on the device that they are of; those that the package brings
            for the others and if ``None``, which are one machine's, in float32 on the CPU.
        measure: ``True`` times both forms of a layer here and now where the expected times are within a factor of 2 of each
            other, and where there are none for the device: builds and compiles them, and runs each for a tenth of a second
            or five times, whichever takes longer, in the memory that training both takes. Layers that are alike are timed
            once, those of more than 2²⁶ weights not at all. Timed twice, layers that are close may get different forms.
            ``False`` goes by the expected times alone, and ``None`` times only where there are none, unless
            ``jax.process_count()`` is above 1: where there are costs, both choose the same in every run and process.
        explain: print for each layer what was chosen and why: bytes, FLOPs, times.

    Raises:
        ValueError: if ``format``, ``forms`` or ``batch`` is none of these; if a pattern is of no plain layer or does not
            fit; if a layer that must keep its form is asked to change it; or if there are no costs for the device and
            nothing is measured. The model is left as it was.
    """
    patterns = dict(patterns or {})
    layers = _masked_layers(model, patterns)
    measured = None
    if measure or (measure is None and jax.process_count() == 1):
        measured = [
            None if facts.name in patterns else partial(_measured_seconds, layer, batch, training)
            for layer, facts in layers.values()
        ]
    choices = choose_forms(
        [facts for _, facts in layers.values()],
        format,
        batch,
        training,
        "jax",
        costs,
        measured,
        measure_close=measure is True,
        forms=forms,
    )
    made: dict[int, Any] = {}
    for (key, (layer, facts)), choice in zip(layers.items(), choices, strict=True):
        if facts.name in patterns:
            made[key] = _of_plain(layer, patterns[facts.name], choice.form)
        elif choice.form != facts.form:
            new = layer.to_masked() if isinstance(layer, SparseLinear) else SparseLinear.from_masked(layer)
            made[key] = copy_metadata_and_attributes(new, layer)
    model = replace_modules(model, made, set())
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


def become_sparse(model: Model, layers: list[Any]) -> Model:
    """Give masked layers of a model the sparse form, as :func:`compress` does, but for those that must keep theirs."""
    held = parameter_users(model)
    made: dict[int, Any] = {}
    for layer in layers:
        shared = any(len(held[id(own)]) > 1 for own in vars(layer).values() if isinstance(own, nnx.Variable))
        if isinstance(layer, MaskedLinear) and not _why_fixed(layer, shared):
            made[id(layer)] = copy_metadata_and_attributes(SparseLinear.from_masked(layer), layer)
    return replace_modules(model, made, set()) if made else model


def _measured_seconds(layer: Any, batch: int, training: bool) -> dict[str, float]:
    """Return how long a jitted step with Adam, or an inference, takes in each form of a layer, on ``batch`` rows of x."""
    dense = layer.to_masked() if isinstance(layer, SparseLinear) else layer
    with jax.default_device(device_of(dense.kernel.get_value())):
        keys = jax.random.split(jax.random.key(0))
        sizes = (layer.in_features, layer.out_features)
        x, g = (jax.random.normal(key, (batch, size)) for key, size in zip(keys, sizes, strict=True))
    x = x.astype(dense.kernel.dtype)
    calls = {}
    sparse = layer if isinstance(layer, SparseLinear) else SparseLinear.from_masked(layer)  # as it is: it may keep bits
    for form, made in (("dense", dense), ("sparse", sparse)):
        call, params, fixed = as_function(made)
        dtype = jax.eval_shape(call, params, x, fixed).dtype
        step = partial(training_step, g=g.astype(dtype)) if training else inference
        calls[form] = step(call, params, fixed, x)
    return median_seconds(calls)


def as_function(layer: Any) -> tuple[LayerCall, Any, Any]:
    """Return a layer as y of (parameters, x, what is fixed), its parameters, and what is fixed."""
    graph, params, *fixed = nnx.split(layer, nnx.Param, ...)
    return lambda params, x, fixed: nnx.merge(graph, params, *fixed)(x), params, fixed


def get_forms(model: Any) -> dict[str, Literal["dense", "sparse"]]:
    """Return the form of each masked linear layer of an nnx model, by name: what :func:`compress` has chosen.

    Plain data, for a file of JSON beside the model's state::

        forms = get_forms(compress(model))
        other = compress(mask_model(make()), forms=forms)  # takes the state of the first
    """
    layers = layers_of(model, (MaskedLinear, SparseLinear))
    return {name: "sparse" if isinstance(layer, SparseLinear) else "dense" for name, layer in layers.items()}


def keep_bits(model: Model) -> Model:
    """Keep a bit for each place of W in the sparse layers of an nnx model, for GPUs, in place; return it.

    Products on GPUs go by them: :func:`maskedlinear.jax.with_bits` says more. They are in the layers' state, so keep them
    before a state is saved, and in the model that it is restored into; :func:`load_state` takes states with and without.
    ``regrow_model`` and ``load_state`` make them anew. :func:`compress` times a layer that keeps bits with them, and loses
    them where it exchanges it, as :func:`expand` does: call this again then. Layers with so few connections
    that no product goes by bits stay as they are.

    Works under ``nnx.eval_shape`` and ``nnx.jit`` too: ``nnx.eval_shape(lambda: keep_bits(make()))``.

    Example:
        >>> from flax import nnx
        >>> from maskedlinear import masks
        >>> from maskedlinear.flax import SparseLinear, keep_bits
        >>> mask = masks.random((8, 64), sparsity=0.5, seed=0)
        >>> layer = keep_bits(SparseLinear(64, 8, mask=mask.T, rngs=nnx.Rngs(0)))
        >>> layer.bits[...].shape
        (8, 2)
    """
    for layer in layers_of(model, SparseLinear).values():
        layer._keep_bits()
    return model


def _masked_layers(model: Any, patterns: Mapping[str, SparsityPattern]) -> dict[int, tuple[Any, Layer]]:
    """Return the masked layers of a model, and those that become masked, and what a choice needs to know of them."""
    held = parameter_users(model)
    found: dict[int, tuple[Any, Layer]] = {}
    plain: dict[str, tuple[int, int]] = {}
    others: dict[str, str] = {}
    for name, layer in layers_of(model, (nnx.Linear, SparseLinear)).items():
        shared = any(len(held[id(own)]) > 1 for own in vars(layer).values() if isinstance(own, nnx.Variable))
        if isinstance(layer, MaskedLinear | SparseLinear):
            found[id(layer)] = layer, _facts(name, layer, shared)
            others[name] = "it is masked: its connections are its own"
        elif type(layer) is nnx.Linear:
            fixed = _why_fixed(layer, shared)
            if fixed not in ("", _NO_VALUES):
                others[name] = fixed
                continue
            plain[name] = layer.out_features, layer.in_features
            if isinstance(pattern := patterns.get(name), SparsityPattern):
                found[id(layer)] = layer, _facts(name, layer, shared, pattern)
    check_patterns(patterns, plain, others)
    return found


def _of_plain(layer: nnx.Linear, pattern: SparsityPattern, form: str) -> Any:
    """Return a masked layer with some of a plain one's connections; their weights are 0 where that is abstract."""
    kernel, bias = layer.kernel.get_value(), None if layer.bias is None else layer.bias.get_value()
    abstract = not isinstance(kernel, jax.Array)
    if form == "dense":
        if not abstract:
            return copy_metadata_and_attributes(MaskedLinear.from_linear(layer, pattern.to_mask().T), layer)
        options = linear_options(layer)
        new: Any = MaskedLinear(
            layer.in_features, layer.out_features, mask=pattern.to_mask().T, rngs=nnx.Rngs(0), **options
        )
        return copy_metadata_and_attributes(new, layer)
    dtype = kernel.dtype
    values = jnp.zeros(pattern.nnz, dtype) if abstract else kernel[pattern.indices, pattern.rows]
    if bias is not None and abstract:
        bias = jnp.zeros(bias.shape, bias.dtype)
    new = SparseLinear._made(pattern, values, bias, dtype=layer.dtype)
    return copy_metadata_and_attributes(new, layer)


def _facts(name: str, layer: Any, shared: bool, pattern: SparsityPattern | None = None) -> Layer:
    dense = not isinstance(layer, SparseLinear)
    weight = (layer.kernel if dense else layer.weight_values).get_value()
    fixed, live = _why_fixed(layer, shared) if pattern is None else "", math.prod(weight.shape)
    copies = math.prod(weight.shape[: -2 if dense else -1])
    if pattern is not None:
        live = pattern.nnz
    elif dense and fixed in ("", _STACK):
        mask = layer.mask.get_value()
        live = int(mask.sum()) * (weight.size // max(mask.size, 1))  # a stack may share one
    return Layer(
        name,
        layer.out_features,
        layer.in_features,
        live,
        weight.dtype.itemsize,
        "plain" if pattern is not None else "dense" if dense else "sparse",
        fixed,
        min(device.platform for device in weight.devices()) if isinstance(weight, jax.Array) else jax.default_backend(),
        f"{weight.dtype}, computed in {layer.dtype or weight.dtype}",
        index_bytes=16 + _bytes_of_bits(layer, live),
        copies=copies,
    )


def _bytes_of_bits(layer: Any, live: int) -> int:
    kept = getattr(layer, "bits", None)
    return 0 if kept is None else round(8 * kept.get_value().size / max(live, 1))


def _why_fixed(layer: Any, shared: bool) -> str:
    if type(layer) not in (MaskedLinear, SparseLinear, nnx.Linear):
        return f"it is a {type(layer).__name__}, whose call may be its own"
    if shared:
        return "it shares parameters with another layer"
    dense = not isinstance(layer, SparseLinear)
    parameters = [part for part in (layer.kernel if dense else layer.weight_values, layer.bias) if part is not None]
    values = [part.get_value() for part in parameters]
    if not all(isinstance(value, jax.Array) for value in values):
        return _NO_VALUES
    if len(layers_of(layer, nnx.Module)) > 1:
        return "it has modules of its own"
    if values[0].ndim != (2 if dense else 1):
        return _STACK
    if any(type(part) is not nnx.Param for part in parameters):
        return "its parameters are of a type of their own"
    metadata = [entry for part in parameters for entry in part.get_metadata().items()]
    if any(name.startswith("on_") for name, _ in metadata):
        return "its parameters have hooks"
    if any("sharding" in name and value and "eager" not in name for name, value in metadata) or not all(
        value.sharding.is_fully_replicated for value in values
    ):
        return "its parameters are sharded"
    if isinstance(layer, MaskedLinear) and layer.forward_mode:
        return "it has forward_mode, which the sparse form does without"
    named = [name for name, usual in _OPTIONS.items() if dense and getattr(layer, name) is not usual]
    return f"the sparse form has no {' or '.join(named)}" if named else ""
