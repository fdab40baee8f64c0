"""``shrink``: a smaller model with the same outputs, without the nodes that pruning has made constant or unread.

The model is traced (``torch.fx``) to see what feeds what. The trace is read, not used: the smaller model is a copy of the
given one whose layers are smaller, so that its class and its ``forward`` stay what they are.
"""

from __future__ import annotations

import copy
import inspect
import operator
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from maskedlinear._table import lines
from maskedlinear.pruning._shrink import Flow, Plan, Unfollowed, check_unfollowed, kept_nodes
from maskedlinear_torch._constraints import constrained
from maskedlinear_torch._dtensors import is_sharded
from maskedlinear_torch._layer import MaskedLinear
from maskedlinear_torch._modules import copy_hooks_and_attributes, has_call_hooks, parameter_users, replace_modules
from maskedlinear_torch._sparse_layer import SparseLinear

__all__ = ["NODE_BY_NODE", "shrink"]

Model = TypeVar("Model", bound=nn.Module)

_LAYERS = (nn.Linear, MaskedLinear)
_POINTWISE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.ELU, nn.SELU, nn.CELU),
    *(nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Softplus, nn.Softsign),
    *(
        nn.LogSigmoid,
        nn.Threshold,
        nn.Identity,
        nn.Dropout,
        nn.AlphaDropout,
        nn.Flatten,
    ),  # the last where it does nothing
)
_BY_FEATURE = (nn.BatchNorm1d, nn.PReLU)  # these keep something a feature
NODE_BY_NODE = (*_POINTWISE, *_BY_FEATURE)
_NAMES = (
    *("relu", "relu6", "leaky_relu", "gelu", "silu", "mish", "tanh"),
    *("sigmoid", "elu", "selu", "celu", "hardtanh", "hardswish", "hardsigmoid"),
    *("hardshrink", "softshrink", "tanhshrink", "softplus", "softsign", "logsigmoid", "threshold"),
    *("dropout", "alpha_dropout", "add", "sub", "mul", "div", "true_divide"),
    *("neg", "negative", "abs", "exp", "log", "log1p", "sqrt"),
    *("rsqrt", "square", "pow", "sin", "cos", "erf", "clamp"),
    *("clip", "maximum", "minimum"),
)
_FUNCTIONS = {getattr(space, name) for space in (torch, nn.functional) for name in _NAMES if hasattr(space, name)} | {
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.pow, operator.abs)
}
_METHODS = {*_NAMES, "contiguous", "clone"}
_FIXED = (bool, int, float, str, type(None))  # arguments that the trace is made for
_SLACK = 1e5  # times the unit roundoff, relative to the largest output; sums over layers are taken in another order


def shrink(
    model: Model, *inputs: Any, on_unfollowed: Unfollowed = "raise", explain: bool = False, **named: Any
) -> Model:
    """Return a copy of a model without the nodes that make no difference, and with the same outputs in ``eval()``.

    A node of a linear layer goes if nothing reads it (the next layers' columns are masked), or if it is constant (its row
    is masked, or all that it reads is constant): what a constant node sends on, its bias through activation and batch
    normalisation, moves into the biases of the layers that read it. Nodes are followed from layer to layer through
    activations, ``BatchNorm1d``, dropout, sums and other operations on each feature by itself, so residual
    connections too. The model's inputs and outputs stay. What is left of a layer is a ``MaskedLinear`` if a connection in it
    is masked, else an ``nn.Linear``.

    Weights, dtypes, device, ``requires_grad``, training state and the model's class stay; changed layers have new
    parameters: make the optimizer afterwards. In training mode a constant node meets dropout and the statistics of a batch,
    which the bias does not.

    That the outputs are the same is checked, on ``inputs`` and on random ones of their shapes, in float64.

    Args:
        model: ``nn.Sequential``, or any module that ``torch.fx`` can trace. It is left as it is.
        inputs: what ``model`` is called with: an example, at least one row.
        on_unfollowed: what to do where a node that could go leads into something that is not followed (``LayerNorm``, a
            reshape, a layer that is used twice, shared or hooked, ...): ``"raise"``, or ``"keep"`` the node.
        explain: print a table of the layers before and after.
        named: what ``model`` is called with, by name.

    Raises:
        ValueError: if the model is cut over processes, or in ``DistributedDataParallel``; if it cannot be traced, changes a
            value in place that is read elsewhere, or, with
            ``on_unfollowed="raise"``, leads nodes that could go into something that is not followed.
        RuntimeError: if the smaller model's outputs are not the same.
        TypeError: if ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"shrink takes a torch.nn.Module; got {type(model).__name__}")
    if isinstance(model, DistributedDataParallel) or any(map(is_sharded, model.parameters())):
        raise ValueError(
            "shrink makes a smaller copy of a whole model; got one that is cut over processes, or in "
            "DistributedDataParallel: shrink model.module, or a whole model that has loaded the state (checkpoint.save, or "
            "get_model_state_dict with full_state_dict=True), and share that out"
        )
    check_unfollowed(on_unfollowed)
    reference = copy.deepcopy(model).eval().double()
    given = pytree.tree_map(_double, (inputs, named))
    plan = _planned(reference, given, on_unfollowed)
    small = _smaller(copy.deepcopy(model), plan)
    _check_same(reference, _smaller(copy.deepcopy(reference), plan), given)
    if explain:
        print(_table(model, small, plan))
    return small


class _Tracer(fx.Tracer):
    """Leaves our layers whole, as it does those of ``torch.nn``."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, MaskedLinear | SparseLinear) or super().is_leaf_module(m, module_qualified_name)


@torch.no_grad()
def _planned(model: nn.Module, given: Any, on_unfollowed: Unfollowed) -> Plan:
    """Return what stays of a model in float64 and ``eval()``."""
    if isinstance(model, MaskedLinear | SparseLinear) or type(model).__module__.startswith("torch.nn.modules.linear"):
        return Plan({}, {})  # one layer: its nodes are the model's inputs and outputs
    tracer = _Tracer()
    try:
        inputs = inspect.signature(model.forward).bind(*given[0], **given[1])
        inputs.apply_defaults()
        fixed = {name: value for name, value in inputs.arguments.items() if isinstance(value, _FIXED)}
        graph = tracer.trace(model, concrete_args=fixed)
    except Exception as error:
        raise ValueError(
            f"shrink follows nodes on a trace of torch.fx, which cannot trace this {type(model).__name__}: {error}"
        ) from error
    try:
        ShapeProp(fx.GraphModule(tracer.root, graph)).propagate(*inputs.args, *inputs.kwargs.values())
    except Exception as error:
        raise ValueError(
            f"shrink checks that outputs are the same in float64, in which this {type(model).__name__} cannot be called. "
            f"Does it make tensors of another dtype? {error}"
        ) from error
    walk = _Walk(model, graph)
    for node in graph.nodes:
        walk.step(node)
    return walk.flow.plan(on_unfollowed)


class _Walk:
    """Goes through a graph node by node, and tells a flow what each of them does."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.flow = Flow()
        self._model = model
        self._values: dict[fx.Node, int] = {}
        self._held = parameter_users(model)
        calls = [node for node in graph.nodes if node.op == "call_module"]
        called = Counter(id(model.get_submodule(str(node.target))) for node in calls)
        self._twice = {key for key, count in called.items() if count > 1}
        self._read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}

    def step(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self._source(node)
        elif node.op == "output":
            self._read_whole(node)
        elif node.op == "call_module":
            self._call(node, self._model.get_submodule(str(node.target)))
        elif node.op == "call_function" and node.target in _FUNCTIONS:
            self._pointwise(node, node.target)  # type: ignore[arg-type]
        elif node.op == "call_method" and str(node.target).rstrip("_") in _METHODS:
            self._pointwise(node, lambda this, *rest, **named: getattr(this, str(node.target))(*rest, **named))
        else:
            self._unfollowed(node, f"{node.target if isinstance(node.target, str) else node.name}")

    def _call(self, node: fx.Node, module: nn.Module) -> None:
        name, kind = str(node.target), type(module)
        why = self._why_not(name, module)
        (x,) = node.all_input_nodes if len(node.all_input_nodes) == 1 else (None,)
        if why or x not in self._values:
            self._unfollowed(node, f"{name} ({kind.__name__}, {why or 'of what is no tensor'})")
        elif isinstance(module, nn.Linear):
            weight = module.weight.detach().cpu().numpy()
            mask = module.mask.cpu().numpy() if isinstance(module, MaskedLinear) else np.ones(weight.shape, bool)
            bias = None if module.bias is None else module.bias.cpu().numpy()
            self._values[node] = self.flow.linear(name, self._values[x], weight, mask, bias)
        elif isinstance(module, nn.PReLU) and module.weight.numel() == 1:
            self._pointwise(node, module)
        else:
            self._pointwise(node, module, name if kind in _BY_FEATURE else "")

    def _why_not(self, name: str, module: nn.Module) -> str:
        """Return why a module is not followed, or nothing if it is."""
        if type(module) not in (*_LAYERS, *_POINTWISE, *_BY_FEATURE):
            return "not followed"
        if id(module) in self._twice:
            return "used in two places"
        if any(len(self._held[id(own)]) > 1 for own in module._parameters.values() if own is not None):
            return "its parameters are shared"
        if name in self._read:
            return "its parameters are read by the model around it"
        if constrained(module):
            return "it has constraints: free it before, by constrain(model, ...)"
        if has_call_hooks(module) or "forward" in vars(module):
            return "it has hooks, or a forward of its own"
        if isinstance(module, nn.BatchNorm1d) and module.running_mean is None:
            return "it keeps no statistics"
        return ""

    def _pointwise(self, node: fx.Node, function: Callable[..., Any], name: str = "") -> None:
        inputs = node.all_input_nodes
        shapes = {_shape(value) for value in (node, *inputs)}
        whole = isinstance(function, nn.Flatten) and len(_shape(node) or ()) < 2
        if any(value not in self._values for value in inputs) or len(shapes) > 1 or whole:
            self._unfollowed(node, f"{node.name}, of shapes {', '.join(map(str, map(_shape, inputs)))}")
            return
        if isinstance(function, _BY_FEATURE) and len(_shape(node) or ()) > 2:
            dims = len(_shape(node) or ())
            self._unfollowed(node, f"{name or node.target} ({type(function).__name__} of x with {dims} dimensions)")
            return
        if _in_place(node, function) and len(inputs[0].users) > 1:
            raise ValueError(
                f"shrink cannot follow {node.name}, which changes {inputs[0].name} in place while something else reads it: "
                "use the operation that returns a new tensor"
            )

        def evaluate(constants: list[Any]) -> Any:
            rows = {value: torch.from_numpy(c.copy())[None] for value, c in zip(inputs, constants, strict=True)}
            device = next((parameter.device for parameter in self._model.parameters()), torch.device("cpu"))
            arguments, named = fx.map_arg((node.args, node.kwargs), lambda value: rows[value].to(device))
            return function(*arguments, **named)[0].cpu().numpy()

        self._values[node] = self.flow.elementwise([self._values[value] for value in inputs], evaluate, name)

    def _unfollowed(self, node: fx.Node, why: str) -> None:
        self._read_whole(node, why)
        self._source(node, why)

    def _read_whole(self, node: fx.Node, why: str = "") -> None:
        for value in node.all_input_nodes:
            if value in self._values:
                self.flow.read(self._values[value], why)

    def _source(self, node: fx.Node, why: str = "") -> None:
        shape = _shape(node)
        if shape:
            self._values[node] = self.flow.source(shape[-1], why)


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    meta: Any = node.meta.get("tensor_meta")
    return tuple(meta.shape) if hasattr(meta, "shape") else None


def _in_place(node: fx.Node, function: Any) -> bool:
    target = str(node.target)
    return bool(
        (node.op == "call_method" and target.endswith("_"))
        or node.kwargs.get("inplace", False)
        or (isinstance(function, nn.Module) and getattr(function, "inplace", False))
    )


@torch.no_grad()
def _smaller(model: Model, plan: Plan) -> Model:
    """Exchange the layers of a model for what the plan leaves of them, in place, and return the model."""
    made: dict[int, nn.Module] = {}
    for name, (rows, columns, added) in plan.layers.items():
        layer = model.get_submodule(name)
        if not (rows.all() and columns.all() and not added[rows].any()):
            made[id(layer)] = _smaller_layer(layer, rows, columns, added[rows])  # type: ignore[arg-type]
    for name, kept in plan.features.items():
        module = model.get_submodule(name)
        if not kept.all():
            made[id(module)] = _fewer_features(copy.deepcopy(module), torch.from_numpy(kept))
    replace_modules(model, made)
    return model


def _smaller_layer(layer: nn.Linear, rows: Any, columns: Any, added: Any) -> nn.Linear:
    weight, bias = layer.weight, layer.bias
    kept = kept_nodes(layer, rows, columns)
    rows, columns, added = (torch.from_numpy(part).to(weight.device) for part in (rows, columns, added))
    mask = layer.mask[rows][:, columns] if isinstance(layer, MaskedLinear) else None
    has_bias = bias is not None or bool(added.any())
    kind = nn.Linear if mask is None or bool(mask.all()) else MaskedLinear
    sizes, options = (int(columns.sum()), int(rows.sum())), {"device": weight.device, "dtype": weight.dtype}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # a layer may have no node left
        new: nn.Linear = nn.utils.skip_init(kind, *sizes, has_bias, **options)
    full = layer.full_weight if isinstance(layer, MaskedLinear) else weight
    new.weight.copy_(full[rows][:, columns])
    if isinstance(new, MaskedLinear):
        new.init_fan_in, new.keep_dormant = layer.init_fan_in, layer.keep_dormant  # type: ignore[assignment]
        new.set_mask(mask)
    new.weight.requires_grad_(weight.requires_grad)
    if has_bias:
        old = torch.zeros_like(added) if bias is None else bias[rows].double()
        new.bias.copy_(old + added)
        new.bias.requires_grad_((weight if bias is None else bias).requires_grad)
    new.train(layer.training)
    new = copy_hooks_and_attributes(new, layer)  # type: ignore[assignment]
    new.kept_nodes = kept  # type: ignore[assignment]
    return new


def _fewer_features(module: nn.Module, kept: Tensor) -> nn.Module:
    """Keep some features of a module, in place, and return it."""
    for name, own in module._parameters.items():
        if own is not None:
            module._parameters[name] = nn.Parameter(own[kept.to(own.device)], own.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.dim():
            module._buffers[name] = buffer[kept.to(buffer.device)]
    setattr(module, "num_parameters" if isinstance(module, nn.PReLU) else "num_features", int(kept.sum()))
    return module


@torch.no_grad()
def _check_same(model: nn.Module, small: nn.Module, given: Any) -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            return tensor
        return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype).to(tensor.device)

    for example in (given, pytree.tree_map(drawn, given)):
        results = []
        for one in (model, small):
            inputs, named = copy.deepcopy(example)
            results.append(pytree.tree_leaves(one(*inputs, **named)))
        for expected, found in zip(*results, strict=True):
            if not isinstance(expected, Tensor):
                continue
            if expected.shape != found.shape:
                raise RuntimeError(f"shrink would change an output's shape, {expected.shape}, to {found.shape}")
            if not expected.is_floating_point():
                continue  # an argmax may turn on rounding
            scale = expected.abs().nan_to_num(0, 0).max() if expected.numel() else 0
            slack = _SLACK * torch.finfo(expected.dtype).eps * float(scale)
            if not torch.allclose(found, expected, rtol=0, atol=slack, equal_nan=True):
                raise RuntimeError(
                    f"shrink would change an output by {float((found - expected).abs().max()):.3g}, more than rounding can, "
                    f"{slack:.3g}: forward does something that its trace does not show. The model is as it was"
                )


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _table(model: nn.Module, small: nn.Module, plan: Plan) -> str:
    rows = [("layer", "in -> out", "becomes", "live")]
    for name in plan.layers:
        old: Any = model.get_submodule(name)
        new: Any = small.get_submodule(name)
        live = int(new.mask.sum()) if isinstance(new, MaskedLinear) else new.weight.numel()
        before, after = (f"{layer.in_features} -> {layer.out_features}" for layer in (old, new))
        rows.append((name, before, f"{after} {type(new).__name__}", str(live)))
    return "\n".join(lines(rows))
