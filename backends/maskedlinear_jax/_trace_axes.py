"""``trace_axes``: what the axes of a tree's weights mean, read off the program that uses them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax

from maskedlinear.models import WeightAxes, why_left_out
from maskedlinear_jax import _axis_pieces as pieces
from maskedlinear_jax._axis_pieces import Dims, Value, View
from maskedlinear_jax._compat import ClosedJaxpr, Literal
from maskedlinear_jax._tree import named_leaves

__all__ = ["trace_axes"]

# Operations by their names in a trace. What is in none of these sets ends a parameter's way, and is never guessed at.
_CALLS = {
    *("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2", "shard_map"),
    *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_vmap_call"),
}
_BODIES = ("jaxpr", "call_jaxpr", "fun_jaxpr", "call")
_SUMS = {"add", "sub", "add_any", "concatenate"}
_BY_ENTRY = {
    *("add", "sub", "add_any", "mul", "div", "max", "min", "pow", "clamp", "select_n"),
    *("neg", "sign", "abs", "round", "floor", "ceil", "square", "integer_pow", "sqrt", "rsqrt", "exp", "exp2", "expm1"),
    *("log", "log1p", "tanh", "logistic", "erf", "sin", "cos", "convert_element_type", "reduce_precision", "copy"),
    *("copy_p", "name", "sharding_constraint", "pvary", "pcast"),
}
_IN_PLACE = {"slice", "dynamic_slice", "pad", "rev", "concatenate"}  # no entry moves to another dimension
_EACH = {"optimization_barrier", "device_put"}  # one result for each operand


def trace_axes(fn: Callable[..., Any], params: Any, *inputs: Any) -> dict[str, WeightAxes]:
    """Return what the axes of a tree's weights mean, by name, as the program ``fn(params, *inputs)`` uses them.

    Nothing is computed. A weight is a parameter of two dimensions or more that takes part in a product: axes that are
    summed over are inputs, those shared with the other factor, scanned over or picked by an index are a stack, and all
    others are outputs; in a convolution its numbers of dimensions say so. Embeddings, which are indexed, are not in the
    result, tied ones neither; nor is what is added to activations or scales them (biases, positions, norms); nor adapters
    (``lora_a``). For any other parameter that is left out there is a warning: where no product can be read, as of two
    parameters with each other, and where products disagree, as of a weight and its transpose.

    What the program does not say takes a user's word: ``trace_axes(...) | {"experts.up": WeightAxes(2, 1, 0)}``. An axis
    of experts or of an ensemble that all get the same input counts as outputs, since only the result has it.

    Args:
        fn: the forward pass, as ``lambda params, x: model.apply({"params": params}, x)``. With ``graph, params, rest =
            nnx.split(model, nnx.Param, ...)`` it calls ``nnx.merge(graph, params, rest)(x)``; if it changes ``rest``
            (random keys, averages), that is one of the inputs, as for ``jax.jit``. Flags, and masks that are not boolean,
            are not inputs: it closes over them.
        params: the tree; arrays, or ``jax.ShapeDtypeStruct``.
        *inputs: what activations are computed of, at least one; of any shapes that the model takes.

    Returns:
        The axes of weights, as ``axes`` of :func:`prune_tree`, :func:`regrow_tree` and :func:`scheduled_pruning`.

    Raises:
        ValueError: if there is no input.
        RuntimeError: if this release of JAX has no traces that can be read.

    Example:
        >>> import jax.numpy as jnp
        >>> from maskedlinear.jax import prune_tree, trace_axes
        >>> params = {"up": jnp.ones((3, 8, 16))}
        >>> axes = trace_axes(lambda params, x: jnp.einsum("eti,eio->eto", x, params["up"]), params, jnp.ones((3, 5, 8)))
        >>> axes
        {'up': WeightAxes(out_axis=2, in_axis=1, batch_axis=0)}
        >>> masks = prune_tree(params, 0.9, axes=axes, scope="erdos_renyi")
    """
    if not inputs:
        raise ValueError(
            "trace_axes tells weights from biases by the inputs; got none: pass what fn closes over, as in "
            "trace_axes(fn, params, x)"
        )
    if Literal is None:
        raise RuntimeError(
            f"trace_axes reads JAX's traces, which it cannot in this release, {jax.__version__}: write the axes by hand"
        )
    leaves, structure = jax.tree.flatten(params)

    def program(leaves: Any, *inputs: Any) -> Any:
        return fn(jax.tree.unflatten(structure, leaves), *inputs)

    jaxpr = jax.make_jaxpr(program)(leaves, *inputs).jaxpr
    shapes = {name: var.aval.shape for name, var in zip(named_leaves(params), jaxpr.invars, strict=False)}
    values = [pieces.parameter(name, shape) for name, shape in shapes.items()]
    trace = _Trace()
    trace.follow(jaxpr, values + [Value(fed=True)] * (len(jaxpr.invars) - len(values)))
    weights, left = {}, []
    for name, shape in shapes.items():
        readings = trace.readings(name)
        if len(shape) < 2 or name in trace.indexed or why_left_out(name, len(shape)) == "adapter":
            continue
        if not readings and name not in trace.added:
            left.append(f"{name} (in no product that can be read)")
        elif None in readings or len({pieces.meaning(axes, shape) for axes in readings}) > 1:
            left.append(f"{name} (its products disagree about them)")
        elif readings:
            weights[name] = readings[0]
    if left:
        text = f"trace_axes does not know the axes of {', '.join(left)}: add them by hand if these are weights"
        warnings.warn(text, stacklevel=2)
    return weights


class _Trace:
    """Follows parameters through a program, and notes what it does with them."""

    def __init__(self) -> None:
        self.products: dict[str, list[tuple[bool, WeightAxes | None]]] = {}
        self.indexed: set[str] = set()
        self.added: set[str] = set()

    def readings(self, name: str) -> list[Any]:
        """Return a parameter's axes in each product; in those with activations, if there are any."""
        found = self.products.get(name, [])
        return [axes for fed, axes in found if fed] or [axes for _, axes in found]

    def follow(self, body: Any, given: Sequence[Value]) -> list[Value]:
        """Go through a program of which the arguments' values are known; return its results' values."""
        jaxpr = _opened(body)
        known = {var: pieces.bound(var, value) for var, value in zip(jaxpr.invars, given, strict=True)}

        def read(atoms: Sequence[Any]) -> list[Value]:
            return [Value() if isinstance(atom, Literal) else known.get(atom, Value()) for atom in atoms]

        for eqn in jaxpr.eqns:
            values = self._results(eqn, read(eqn.invars))
            known.update({var: pieces.bound(var, value) for var, value in zip(eqn.outvars, values, strict=True)})
        return read(jaxpr.outvars)

    def _results(self, eqn: Any, given: list[Value]) -> list[Value]:
        name, params, fed = eqn.primitive.name, eqn.params, any(value.fed for value in given)
        results = [Value(fed=fed)] * len(eqn.outvars)
        if not any(value.views for value in given):
            return results
        if name in _CALLS:
            body = next((params[key] for key in _BODIES if key in params), None)
            fits = body is not None and len(_opened(body).invars) == len(given)
            return self.follow(body, given) if fits else results
        if name == "cond":
            branches = [self.follow(body, given[1:]) for body in params["branches"]]
            return [pieces.merged(values, given[0].fed) for values in zip(*branches, strict=True)]
        if name == "scan":
            consts, first = params["num_consts"], params["num_consts"] + params["num_carry"]
            carry = _carried(params["jaxpr"], consts, given[consts:first], fed)
            self.follow(params["jaxpr"], [*given[:consts], *carry, *map(self._scanned, given[first:])])
            return carry + results[len(carry) :]
        if name == "while":
            first, last = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
            carry = _carried(params["body_jaxpr"], last - first, given[last:], fed)
            self.follow(params["cond_jaxpr"], given[:first] + carry)
            self.follow(params["body_jaxpr"], given[first:last] + carry)
            return carry
        if name in ("dot_general", "ragged_dot_general", "conv_general_dilated"):
            self._product(eqn, given)
            return results
        if name in _EACH:
            return given
        if name == "split":
            return given * len(results)
        return [self._passed(eqn, given)] if len(results) == 1 else results

    def _scanned(self, value: Value) -> Value:
        """Return what a scan's body sees of what is scanned over; what are vectors then were rows of a table."""
        self.indexed |= {view.name for view in value.views if len(view.dims) < 3}
        return value._replace(views=tuple(v._replace(dims=v.dims[1:]) for v in value.views if len(v.dims) > 2))

    def _product(self, eqn: Any, given: list[Value]) -> None:
        """Note the axes of a factor; where both are parameters, neither is known to be the other's input."""
        for place, other in ((0, 1), (1, 0)):
            for view in given[place].views if not given[other].views else ():
                roles = pieces.roles(eqn, place, view.dims)
                if roles and not pieces.is_broadcast(roles[1]):  # else the same for all inputs: a scale
                    reading = given[other].fed, pieces.weight_axes(view.ndim, *roles)
                    self.products.setdefault(view.name, []).append(reading)

    def _passed(self, eqn: Any, given: list[Value]) -> Value:
        """Return the result of any other operation: a form of its operands, if their axes can be told."""
        views = []
        for place, value in enumerate(given):
            others = any(other.fed for i, other in enumerate(given) if i != place and eqn.invars[i].aval.shape)
            for view in value.views:
                dims = self._moved(eqn, place, view, others)
                views += [] if dims is None else [view._replace(dims=dims)]
        return Value(tuple(dict.fromkeys(views)), any(value.fed for value in given))

    def _moved(self, eqn: Any, place: int, view: View, others: bool) -> Dims | None:
        """Return the dimensions of an operand after an operation; ``others``: whether it meets activations there."""
        name, params, dims = eqn.primitive.name, eqn.params, view.dims
        before, after = eqn.invars[place].aval.shape, eqn.outvars[0].aval.shape
        if name == "transpose":
            return tuple(dims[d] for d in params["permutation"])
        if name == "squeeze":
            return tuple(dim for d, dim in enumerate(dims) if d not in params["dimensions"])
        if name == "reshape":
            order = params.get("dimensions") or range(len(dims))
            return pieces.regrouped(tuple(dims[d] for d in order), after)
        if name == "broadcast_in_dim":
            held = dict(zip(params["broadcast_dimensions"], dims, strict=True))
            return pieces.broadcast(tuple(held.get(d, ()) for d in range(len(after))), after)
        if name == "tile":
            return tuple((((), times), *dim) for times, dim in zip(params["reps"], dims, strict=True))
        if name == "stack" and not others:
            return (*dims[: params["axis"]], (), *dims[params["axis"] :])
        if name in ("gather", "slice", "dynamic_slice") and place == 0:
            sizes = after if name == "slice" else params["slice_sizes"]
            if sum(size == 1 < all_ for size, all_ in zip(sizes, before, strict=True)) > len(dims) - 2:
                self.indexed |= {view.name} if name != "slice" else set()  # a vector is picked from it
                return None
            return dims if name != "gather" else None
        if len(before) != len(after) or name not in _BY_ENTRY | _IN_PLACE:
            return None
        if name in _BY_ENTRY:
            dims = pieces.broadcast(dims, after)
        if others and (name in _SUMS or any(map(pieces.is_broadcast, dims))):
            self.added.add(view.name)
        return None if others and name in _BY_ENTRY | {"concatenate"} else dims


def _opened(body: Any) -> Any:
    return body.jaxpr if isinstance(body, ClosedJaxpr) else body


def _carried(body: Any, consts: int, carry: list[Value], fed: bool) -> list[Value]:
    """Return what a loop carries, as each round sees it: what the loop never changes is as before."""
    rounds = zip(carry, _opened(body).invars[consts:], _opened(body).outvars, strict=False)
    return [value if before is after else Value(fed=fed) for value, before, after in rounds]
