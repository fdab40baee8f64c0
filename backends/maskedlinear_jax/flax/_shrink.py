"""``shrink`` for nnx: a smaller model with the same outputs, without the nodes that pruning has made constant or unread.

The model's call is traced to a jaxpr to see what feeds what, on a copy whose layers are markers: a primitive of ours, which
only says which layer is called on what. The trace is read, not used: the smaller model is a copy of the given one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from maskedlinear._table import lines
from maskedlinear.pruning._shrink import Flow, Plan, Unfollowed, check_unfollowed, kept_nodes
from maskedlinear_jax._compat import ClosedJaxpr, Jaxpr, Literal, Primitive, ShapedArray, enable_x64
from maskedlinear_jax._placement import is_shared, is_spread
from maskedlinear_jax.flax._constraint_variables import constraint_variables
from maskedlinear_jax.flax._modules import as_double, doubled, layers_of, parameter_users, replace_modules
from maskedlinear_jax.flax._nnx import MaskedLinear

__all__ = ["shrink"]

Model = TypeVar("Model")

_ELEMENTWISE = {
    *("abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh"),
    *("atan", "atan2", "atanh", "cbrt", "ceil", "clamp", "convert_element_type", "copy"),
    *("copy_p", "cos", "cosh", "div", "eq", "erf", "erf_inv", "erfc"),
    *("exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "is_finite"),
    *("le", "log", "log1p", "logistic", "lt", "max", "min", "mul"),
    *("ne", "neg", "not", "or", "pow", "reduce_precision", "rem", "round"),
    *("rsqrt", "select_n", "sign", "sin", "sinh", "sqrt", "square", "sub"),
    *("tan", "tanh", "xor"),
}
_CALLS = ("call_jaxpr", "fun_jaxpr", "jaxpr")  # the parameter that has the body of a call, by the primitive's version
_CALLING = {
    *("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"),
    *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"),
}
_SLACK = 1e4  # times the unit roundoff, relative to the largest output; sums over layers are taken in another order

_layer_p: Any = None if Primitive is None else Primitive("layer")
if _layer_p is not None:
    _layer_p.def_abstract_eval(lambda x, *, name, features: ShapedArray((*x.shape[:-1], features), x.dtype))


def shrink(
    model: Model, *inputs: Any, on_unfollowed: Unfollowed = "raise", explain: bool = False, **named: Any
) -> Model:
    """Return a copy of a model without the nodes that make no difference, and with the same outputs in ``eval()``.

    A node of a linear layer goes if nothing reads it (the next layers' kernels are masked), or if it is constant (its column
    of the kernel is masked, or all that it reads is constant): what a constant node sends on, its bias through activation
    and batch normalisation, moves into the biases of the layers that read it. Nodes are followed from layer to layer
    through ``nnx.BatchNorm``, dropout, and whatever is made of operations on each feature by itself: activations,
    residual sums. The model's inputs and outputs stay. What is left of a layer is a ``MaskedLinear`` if a connection in it
    is masked, else an ``nnx.Linear``.

    Weights, dtypes and the model's class stay; changed layers have new parameters: make the ``nnx.Optimizer`` afterwards. In
    training a constant node meets dropout and the statistics of a batch, which the bias does not.

    That the outputs are the same is checked, on ``inputs`` and on random ones of their shapes, in float64.

    Args:
        model: ``nnx.Sequential``, or any nnx module whose call can be traced. It is left as it is.
        inputs: what ``model`` is called with: an example.
        on_unfollowed: what to do where a node that could go leads into something that is not followed
            (``nnx.LayerNorm``, a reshape, a layer that is used twice, has options of its own or shares parameters,
            ...): ``"raise"``, or ``"keep"`` the node.
        explain: print a table of the layers before and after.
        named: what ``model`` is called with, by name.

    Raises:
        ValueError: if no process has all of an array; if the model cannot be traced, or, with ``on_unfollowed="raise"``,
            leads nodes that could go into something that is not followed.
        RuntimeError: if the smaller model's outputs are not the same, or this release of JAX shows no traces.
        TypeError: if ``model`` is no nnx module that can be called.
    """
    if not isinstance(model, nnx.Module) or not callable(model):
        raise TypeError(f"shrink takes an nnx.Module that can be called; got {type(model).__name__}")
    check_unfollowed(on_unfollowed)
    if any(is_shared(leaf) and is_spread(leaf) for leaf in jax.tree.leaves((nnx.state(model), inputs, named))):
        raise ValueError(
            "shrink reads numbers that no process has whole here: bring them to all devices before, with "
            "jax.device_put(array, NamedSharding(mesh, PartitionSpec())) for each array of nnx.state(model) and of inputs"
        )
    if _layer_p is None:
        raise RuntimeError(f"shrink reads JAX's traces, and those of jax {jax.__version__} have another form")
    with enable_x64(True):
        reference = doubled(model)
        given = jax.tree.map(as_double, (inputs, named))
        plan = _planned(reference, given, on_unfollowed)
        _check_same(reference, _smaller(nnx.clone(reference), plan), given)
    small: Model = _smaller(nnx.clone(model), plan)
    if explain:
        print(_table(model, small, plan))
    return small


class _Marker(nnx.Module):
    """Stands in a layer's place while its model is traced."""

    def __init__(self, name: str, features: int) -> None:
        self.name = name
        self.features = features

    def __call__(self, x: Array, out_sharding: Any = None, use_running_average: bool = True, mask: Any = None) -> Any:
        if not use_running_average or mask is not None:
            raise ValueError(f"{self.name} is called with statistics of the batch: call the model as in evaluation")
        return _layer_p.bind(jnp.asarray(x), name=self.name, features=self.features)


def _planned(model: Any, given: Any, on_unfollowed: Unfollowed) -> Plan:
    """Return what stays of a model in float64 and evaluation."""
    layers = _followed(model)
    if id(model) in {id(layer) for layer in layers.values()}:
        return Plan({}, {})  # one layer: its nodes are the model's inputs and outputs
    traced = nnx.clone(model)
    copies = dict(zip(layers, _at(traced, layers), strict=True))
    markers = {
        id(copies[name]): _Marker(name, layer.num_features if isinstance(layer, nnx.BatchNorm) else layer.out_features)
        for name, layer in layers.items()
    }
    traced = replace_modules(traced, markers, set())
    try:
        jaxpr = jax.make_jaxpr(lambda inputs, named: traced(*inputs, **named))(*given)
    except Exception as error:
        raise ValueError(
            f"shrink follows nodes on a trace of the model's call, and this {type(model).__name__} cannot be traced: {error}"
        ) from error
    return _Walk(layers).through(jaxpr).plan(on_unfollowed)


class _Walk:
    """Goes through a jaxpr equation by equation, and tells a flow what each of them does.

    What is known of a variable: an ``int``, the flow's value; a scalar, or an array made of scalars alone; or nothing.
    """

    def __init__(self, layers: dict[str, Any]) -> None:
        self._flow = Flow()
        self._layers = layers
        self._calls: dict[str, int] = {}

    def through(self, closed: ClosedJaxpr) -> Flow:
        self._count(closed.jaxpr)
        known = {var: self._source(var) for var in closed.jaxpr.invars}
        for var, const in zip(closed.jaxpr.constvars, closed.consts, strict=True):
            known[var] = const if np.size(const) == 1 else None
        for value in self._body(closed.jaxpr, known):
            if isinstance(value, int):
                self._flow.read(value)
        return self._flow

    def _count(self, jaxpr: Jaxpr) -> None:
        for eqn in jaxpr.eqns:
            if eqn.primitive is _layer_p:
                name = eqn.params["name"]
                self._calls[name] = self._calls.get(name, 0) + 1
            for body in _bodies(eqn):
                self._count(body)

    def _body(self, jaxpr: Jaxpr, known: dict[Any, Any]) -> list[Any]:
        for eqn in jaxpr.eqns:
            inputs = [var.val if isinstance(var, Literal) else known.get(var) for var in eqn.invars]
            known.update(zip(eqn.outvars, self._step(eqn, inputs), strict=True))
        return [var.val if isinstance(var, Literal) else known.get(var) for var in jaxpr.outvars]

    def _step(self, eqn: Any, inputs: list[Any]) -> list[Any]:
        name = eqn.primitive.name
        if eqn.primitive is _layer_p:
            return [self._call(eqn, inputs[0])]
        body = next(iter(_bodies(eqn)), None) if name in _CALLING else None
        if body is not None and len(body.invars) == len(inputs):
            known = dict(zip(body.invars, inputs, strict=True))
            consts: Any = next((value.consts for value in eqn.params.values() if isinstance(value, ClosedJaxpr)), [])
            known.update(zip(body.constvars, [c if np.size(c) == 1 else None for c in consts], strict=True))
            return self._body(body, known)
        if not any(isinstance(value, int) for value in inputs):
            if any(value is None for value in inputs) or name not in {*_ELEMENTWISE, "broadcast_in_dim"}:
                return [self._source(var, name) for var in eqn.outvars]
            return [eqn.primitive.bind(*map(jnp.asarray, inputs), **eqn.params)]
        if name in _ELEMENTWISE and all(value is not None for value in inputs):
            shape = eqn.outvars[0].aval.shape
            tracked = [var.aval.shape for var, value in zip(eqn.invars, inputs, strict=True) if isinstance(value, int)]
            if all(one == shape for one in tracked):
                return [self._elementwise(eqn, inputs)]
        return self._unfollowed(eqn, inputs, name)

    def _call(self, eqn: Any, x: Any) -> Any:
        name = eqn.params["name"]
        layer = self._layers[name]
        if not isinstance(x, int) or self._calls[name] > 1:
            why = "used in two places" if self._calls[name] > 1 else "of an x that is not followed"
            return self._unfollowed(eqn, [x], f"{name} ({type(layer).__name__}, {why})")[0]
        if isinstance(layer, nnx.BatchNorm):
            return self._flow.elementwise([x], lambda constants: layer(jnp.asarray(constants[0])[None])[0], name)
        kernel = np.asarray(layer.kernel[...]).T
        mask = np.asarray(layer.mask[...]).T if isinstance(layer, MaskedLinear) else np.ones(kernel.shape, bool)
        bias = None if layer.bias is None else np.asarray(layer.bias[...])
        return self._flow.linear(name, x, kernel, mask, bias)

    def _elementwise(self, eqn: Any, inputs: list[Any]) -> int:
        values = [value for value in inputs if isinstance(value, int)]

        def evaluate(constants: list[Any]) -> Any:
            rest = iter(constants)
            arguments = [
                jnp.broadcast_to(jnp.asarray(next(rest), var.aval.dtype), var.aval.shape)
                if isinstance(value, int)
                else jnp.asarray(value)
                for var, value in zip(eqn.invars, inputs, strict=True)
            ]
            result = eqn.primitive.bind(*arguments, **eqn.params)
            return np.asarray(result.reshape(-1, result.shape[-1])[0], np.float64)

        return self._flow.elementwise(values, evaluate)

    def _unfollowed(self, eqn: Any, inputs: Sequence[Any], why: str) -> list[Any]:
        for value in inputs:
            if isinstance(value, int):
                self._flow.read(value, why)
        return [self._source(var, why) for var in eqn.outvars]

    def _source(self, var: Any, why: str = "") -> int | None:
        shape = var.aval.shape
        return self._flow.source(shape[-1], why) if shape else None


def _bodies(eqn: Any) -> list[Jaxpr]:
    found = [eqn.params[name] for name in _CALLS if name in eqn.params]
    return [body.jaxpr if isinstance(body, ClosedJaxpr) else body for body in found]


def _followed(model: Any) -> dict[str, Any]:
    """Return the layers that are followed as such, by name: others are seen as what they compute."""
    held, found = parameter_users(model), {}
    for name, layer in layers_of(model, (nnx.Linear, nnx.BatchNorm)).items():
        if type(layer) not in (nnx.Linear, MaskedLinear, nnx.BatchNorm):
            continue
        variables = [own for own in vars(layer).values() if isinstance(own, nnx.Variable)]
        if any(len(held[id(own)]) > 1 for own in variables):
            continue
        if isinstance(layer, nnx.BatchNorm):
            usual = layer.axis == -1 and layer.use_running_average and layer.mean[...].ndim == 1
        else:
            usual = layer.kernel[...].ndim == 2 and layer.dot_general is jax.lax.dot_general
        if usual and not constraint_variables(layer):
            found[name] = layer
    return found


def _at(model: Any, names: Iterable[str]) -> list[Any]:
    by_name = layers_of(model, nnx.Module)
    return [by_name[name] for name in names]


def _smaller(model: Any, plan: Plan) -> Any:
    """Exchange the layers of a model for what the plan leaves of them, in place, and return the model."""
    made: dict[int, Any] = {}
    for layer, (rows, columns, added) in zip(_at(model, plan.layers), plan.layers.values(), strict=True):
        if not (rows.all() and columns.all() and not added[rows].any()):
            made[id(layer)] = _smaller_layer(layer, rows, columns, added[rows])
    for layer, kept in zip(_at(model, plan.features), plan.features.values(), strict=True):
        if not kept.all():
            layer.num_features = int(kept.sum())
            for own in vars(layer).values():
                if isinstance(own, nnx.Variable) and own.get_value() is not None:
                    own.set_value(own.get_value()[kept])
    return replace_modules(model, made, set())


def _smaller_layer(layer: Any, rows: Any, columns: Any, added: Any) -> nnx.Linear:
    """Return a copy of a layer without some of its outputs (``rows``) and inputs, the kernel's columns and rows."""
    inner = np.ix_(columns, rows)
    new: Any = nnx.clone(layer)
    new.kept_nodes = nnx.static(kept_nodes(layer, rows, columns))
    new.in_features, new.out_features = int(columns.sum()), int(rows.sum())
    for own in ("kernel", "mask", "dormant"):
        variable = getattr(new, own, None)
        if variable is not None:
            variable.set_value(variable.get_value()[inner])
    if layer.bias is not None:
        old = layer.bias[...]
        new.bias.set_value(jnp.asarray(np.asarray(old, np.float64)[rows] + added, old.dtype))
    elif added.any():
        new.bias, new.use_bias = nnx.Param(jnp.asarray(added, layer.kernel[...].dtype)), True
    plain: nnx.Linear = new.release() if isinstance(new, MaskedLinear) and bool(new.mask[...].all()) else new
    return plain


def _check_same(model: Any, small: Any, given: Any) -> None:
    generator = np.random.default_rng(0)

    def drawn(value: Any) -> Any:
        floating = hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.floating)
        return jnp.asarray(generator.standard_normal(value.shape), value.dtype) if floating else value

    for inputs, named in (given, jax.tree.map(drawn, given)):
        expected = model(*inputs, **named)
        try:
            found = small(*inputs, **named)
        except Exception as error:
            raise RuntimeError(
                f"shrink made a model that cannot be called; the given one is as it was: {error}"
            ) from error
        for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
            if not hasattr(one, "dtype") or not jnp.issubdtype(one.dtype, jnp.floating):
                continue  # an argmax may turn on rounding
            finite = jnp.nan_to_num(jnp.abs(one), nan=0.0, posinf=0.0)
            unit = float(jnp.finfo(one.dtype).eps)  # type: ignore[no-untyped-call]
            slack = _SLACK * unit * float(finite.max(initial=0.0))
            if one.shape != other.shape or not jnp.allclose(other, one, rtol=0, atol=slack, equal_nan=True):
                raise RuntimeError(
                    f"shrink would change an output by more than rounding can, {slack:.3g}: the call does something that "
                    "its trace does not show. The model is as it was"
                )


def _table(model: Any, small: Any, plan: Plan) -> str:
    rows = [("layer", "in -> out", "becomes", "live")]
    for name, old, new in zip(plan.layers, _at(model, plan.layers), _at(small, plan.layers), strict=True):
        live = int(new.mask[...].sum()) if isinstance(new, MaskedLinear) else new.kernel[...].size
        before, after = (f"{layer.in_features} -> {layer.out_features}" for layer in (old, new))
        rows.append((name, before, f"{after} {type(new).__name__}", str(live)))
    return "\n".join(lines(rows))
