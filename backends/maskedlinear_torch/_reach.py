"""Which live connections lie on a path from an input of a model to an output, found by one pass with other arithmetic.

What goes through the model is no number, but whether an input reaches it: 0 or 1. A weight is its mask, a sum is "one of
them", and autograd brings back, in the same arithmetic, whether an output is reached. Each function of torch has a rule for
it; where there is none, nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from maskedlinear_torch._compat import without_torch_function
from maskedlinear_torch._dtensors import is_sharded
from maskedlinear_torch._masked_weight import MaskedWeight
from maskedlinear_torch._sparse_layer import SparseLinear
from maskedlinear_torch._weight_mask import WeightMask
from maskedlinear_torch._weights import walk_masked

__all__ = ["UnknownPathsError", "connections_on_paths"]


class UnknownPathsError(Exception):
    """Paths are not known: what the model does has no rule; the message says what."""


def connections_on_paths(model: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> int:
    """Return how many live connections of a model's masked weights lie on a path from one of its inputs to an output.

    Args:
        model: any module; called once, in evaluation, and as it was afterwards.
        inputs: what it is called with: shapes count, and whole numbers as they are.
        named: the same by name.

    Raises:
        UnknownPathsError: if the model does something for which there is no rule, or cannot be called so.
    """
    model = model.module if isinstance(model, DistributedDataParallel) else model
    model = model._modules.get("_orig_mod") or model  # of a compiled one
    weights: dict[int, Tensor] = {}  # 1 where a connection is live, by the identity of the weight
    for name, layer in walk_masked(model):
        own = "weight_values" if isinstance(layer, SparseLinear) else "weight"
        weight = layer._parameters.get(own) if not isinstance(layer, WeightMask) else layer.weight
        if not isinstance(weight, nn.Parameter) or weight.is_meta or is_sharded(weight):
            raise UnknownPathsError(
                f"the weight of {name or 'the layer'} is computed, cut over processes, or has no values"
            )
        live = layer.known_mask if isinstance(layer, MaskedWeight) else torch.ones_like(weight, dtype=torch.bool)
        weights.setdefault(id(weight), live.to(weight.device, torch.float32).requires_grad_())
    replaced = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, value in () if isinstance(module, WeightMask) else module._parameters.items():
            if value is not None and value.is_floating_point():
                ones = weights.get(id(value))
                replaced[f"{path}.{name}" if path else name] = (
                    torch.ones_like(value, dtype=torch.float32) if ones is None else ones
                )
    arguments, keywords = pytree.tree_map(_input, (inputs, dict(named)))
    with _sparse_layers_followed(model), torch.enable_grad():
        try:
            result = torch.func.functional_call(model, replaced, arguments, keywords, tie_weights=False)
        except UnknownPathsError:
            raise
        except Exception as error:
            raise UnknownPathsError(f"the model cannot be called so: {type(error).__name__}: {error}") from error
    reached = [leaf.flow for leaf in pytree.tree_leaves(result) if isinstance(leaf, _Reached) and _is_flow(leaf)]
    if not reached:
        raise UnknownPathsError(
            "the model returns no tensor of floats that depends on its inputs, as far as can be seen"
        )
    total = torch.stack([flow.sum() for flow in reached]).sum()
    if not total.requires_grad:
        return 0
    gradients = torch.autograd.grad(total, list(weights.values()), allow_unused=True, materialize_grads=True)
    if any(bool((gradient < 0).any()) for gradient in gradients):
        raise UnknownPathsError("weights are used in a way that is not followed")
    pairs = zip(weights.values(), gradients, strict=True)
    return sum(int(((mask > 0) & (gradient > 0)).sum()) for mask, gradient in pairs)


class _Clip(torch.autograd.Function):
    """1 where a number is positive, on the way there and back: so that nothing overflows, however deep a model is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return (gradient > 0).to(gradient.dtype)


class _Reached(Tensor):
    """What an input reaches: as a tensor, of the shape that a model expects; ``flow`` says which of its numbers are reached.

    Of whole numbers, as of tokens, all are, and ``flow`` is these numbers.
    """

    flow: Tensor
    shares: bool  # perhaps, its memory with other tensors

    @classmethod
    def of(cls, flow: Tensor) -> _Reached:
        """Return the tensor of a flow."""
        made = flow.as_subclass(cls)
        made.flow, made.shares = flow, False
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with without_torch_function():
            return _follow(func, args, kwargs)


def _input(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.dtype is torch.bool:
        return value
    if value.is_complex():
        raise UnknownPathsError("an input is complex")
    flow = torch.ones_like(value, dtype=torch.float32) if value.is_floating_point() else value
    return _Reached.of(flow)


def _is_flow(value: Any) -> TypeGuard[_Reached]:
    """Whether something is a tensor of floats that an input may reach."""
    return isinstance(value, _Reached) and value.flow.is_floating_point()


def _plain(value: Any) -> Any:
    return value.flow if isinstance(value, _Reached) else value


def _made(result: Any) -> Any:
    """Return the result of a rule as the model gets it."""

    def wrapped(leaf: Any) -> Any:
        return _Reached.of(_Clip.apply(leaf)) if isinstance(leaf, Tensor) else leaf  # type: ignore[no-untyped-call]

    return pytree.tree_map(wrapped, result)


def _follow(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Do what a function of torch does, for what is reached."""
    name = getattr(func, "__name__", str(func))
    leaves = pytree.tree_leaves((args, kwargs))
    flows = [leaf for leaf in leaves if _is_flow(leaf)]
    if name == "__get__":
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        value = func(_plain(args[0]), *args[1:])
        if not isinstance(value, Tensor):
            return value
        if attribute in ("T", "mT", "H", "mH"):
            return _made(value) if flows else _Reached.of(value)
        raise UnknownPathsError(f"nobody knows what .{attribute} of a tensor does to paths")
    if name in _READ or name.startswith("new_") or name.endswith("_like"):  # sizes, and constants of them
        return func(*pytree.tree_map(_plain, args), **pytree.tree_map(_plain, kwargs))
    if not flows:  # whole numbers of the inputs: all that is made of them is reached, but for booleans
        if name == "embedding":  # of any row, not only of those that the example has
            return _made(args[1].sum(dim=0).expand(*_plain(args[0]).shape, args[1].shape[1]).clone())
        return pytree.tree_map(_input, func(*pytree.tree_map(_plain, args), **pytree.tree_map(_plain, kwargs)))
    called = _called(name)
    rule = _RULES.get(called)
    if not torch.is_grad_enabled():
        raise UnknownPathsError(f"the model calls {called} under torch.no_grad()")
    if rule is None or "out" in kwargs:
        raise UnknownPathsError(f"nobody knows what {called} does to paths")
    in_place = name.endswith("_") and (not name.endswith("__") or name.startswith("__i"))
    in_place = kwargs.pop("inplace", False) is True or in_place
    result = _made(rule(func, args, kwargs))
    if rule is _moved:
        for one in (*flows, *pytree.tree_leaves(result)):
            one.shares = True
    if not in_place:
        return result
    changed = args[0] if args else kwargs.get("input")
    if not isinstance(changed, _Reached) or result.shape != changed.flow.shape or (changed.shares and len(flows) > 1):
        raise UnknownPathsError(f"{called} in place changes a constant, a shape, or memory that others share")
    changed.flow = result.flow
    return changed


def _called(name: str) -> str:
    """Return what a function is called, of the name of one that works in place or of an operator."""
    own = name.strip("_")
    return own[1:] if name.startswith("__") and own[:1] in ("i", "r") and own[1:] in _OPERATORS else own


def _factor(value: Any) -> Any:
    """Return a constant as what it multiplies paths by: 0 where it cuts them; of masks the mask."""
    if not isinstance(value, Tensor) or value.requires_grad:
        return value
    return (value != 0).float() if value.is_floating_point() or value.dtype is torch.bool else value


def _elementwise(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """One of the operands reaches each number of the result."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    shape = torch.broadcast_shapes(*(_plain(tensor).shape for tensor in tensors))
    return torch.stack([tensor.flow.expand(shape) for tensor in tensors if _is_flow(tensor)]).sum(dim=0)


def _multiplied(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """As above, and a constant that is 0 cuts a path."""
    total = _elementwise(func, args, kwargs)
    for other in args:
        if isinstance(other, Tensor) and not isinstance(other, _Reached):
            total = total * _factor(other)
    return total


def _first(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What goes in goes out, number by number; other operands are constants."""
    x = _operand(args, kwargs)
    if any(_is_flow(leaf) and leaf is not x for leaf in pytree.tree_leaves((args, kwargs))):
        raise UnknownPathsError(f"nobody knows what {func.__name__} of several tensors does to paths")
    return x.flow.clone()


def _cast(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Floats stay what they are, of whatever type."""
    found = func(*pytree.tree_map(_plain, args), **pytree.tree_map(_plain, kwargs))
    if not isinstance(found, Tensor):  # the name of a type
        return found
    if not found.is_floating_point():
        raise UnknownPathsError("what an input reaches becomes whole numbers or booleans")
    return found.float()


def _operand(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Reached:
    x = args[0] if args else kwargs.get("input")
    if not _is_flow(x):
        raise UnknownPathsError("a constant stands where what an input reaches is expected")
    return x


def _moved(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Numbers change their places; constants among them are reached by nothing."""

    def zero(leaf: Any) -> Any:
        if isinstance(leaf, _Reached):
            return leaf.flow
        is_constant = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return torch.zeros_like(leaf, dtype=torch.float32) if is_constant else leaf

    args, kwargs = pytree.tree_map(zero, args), pytree.tree_map(zero, kwargs)
    if func.__name__ == "pad":
        kwargs, args = {**kwargs, "value": None}, args[:3]
    return func(*args, **kwargs)


def _summed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """One number of those that are reduced reaches the result."""
    x, rest = (
        _operand(args, kwargs).flow,
        {key: value for key, value in kwargs.items() if key in ("dim", "axis", "keepdim")},
    )
    found: Tensor = torch.sum(x, *args[1:], **rest)
    return found


def _mixed(dims: Callable[[Tensor, tuple[Any, ...], dict[str, Any]], tuple[int, ...]]) -> Callable[..., Tensor]:
    """Return the rule of what mixes all numbers along some dimensions."""

    def rule(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        x = _operand(args, kwargs).flow
        along = dims(x, args, kwargs)
        return (x.sum(dim=along, keepdim=True) if along else x).expand(x.shape).clone()

    return rule


def _dim(x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    if not isinstance(dim, int):
        raise UnknownPathsError("a softmax has no dimension")
    return (dim,)


def _last(x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
    return tuple(range(-len(tuple(shape)), 0))


def _in_groups(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x, groups = _operand(args, kwargs).flow, args[1] if len(args) > 1 else kwargs["num_groups"]
    parts = x.reshape(len(x), groups, -1)
    return parts.sum(dim=2, keepdim=True).expand(parts.shape).reshape(x.shape)


def _product(bias: int | None, number: int = 2) -> Callable[..., Tensor]:
    """Return the rule of products of operands (the first ones): each brings on what reaches it, where others are not 0.

    Args:
        bias: the place of a bias, which brings nothing; ``None`` if there is none.
        number: how many operands there are before further arguments.
    """

    def rule(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        keys = ("input", "weight")
        given = list(args) + [kwargs[key] for key in keys[len(args) :] if key in kwargs]
        operands, rest = given[:number], list(given[number:])
        named = {key: value for key, value in kwargs.items() if key not in (*keys, "bias")}
        if bias is not None and len(given) > bias:
            rest[bias - number] = None
        results = []
        for place, operand in enumerate(operands):
            if _is_flow(operand):
                others = [
                    operand.flow if at == place else torch.ones_like(other.flow) if _is_flow(other) else _factor(other)
                    for at, other in enumerate(operands)
                ]
                results.append(func(*others, *rest, **named))
        return torch.stack(results).sum(dim=0)

    return rule


def _added_product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """``addmm(bias, x, w)``, in which the bias may be reached too."""
    found = _product(None)(torch.matmul, args[1:3], {})
    return found + args[0].flow if _is_flow(args[0]) else found


def _einsum(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    operands = args[1] if len(args) == 2 and isinstance(args[1], tuple | list) else args[1:]
    return _product(None, len(operands))(lambda *tensors: torch.einsum(args[0], *tensors), tuple(operands), {})


def _attention(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Values of every position arrive everywhere, by weights that each number of queries and keys changes."""
    if len(args) < 3 or not all(map(_is_flow, args[:3])):
        raise UnknownPathsError("attention is not of three tensors that inputs reach")
    query, key, value = (one.flow for one in args[:3])
    shape = (*query.shape[:-1], value.shape[-1])
    if key.shape[:-2] != query.shape[:-2]:  # heads of queries that share their key and value
        times = query.shape[-3] // key.shape[-3]
        key, value = (one.repeat_interleave(times, dim=-3) for one in (key, value))
    by_key = key.sum(dim=(-2, -1), keepdim=True) + value.sum(dim=-2, keepdim=True)
    found: Tensor = (by_key + query.sum(dim=-1, keepdim=True)).expand(shape).clone()
    return found


def _attention_heads(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, None]:
    """``multi_head_attention_forward`` of ``(length, ..., in)``."""
    if not all(map(_is_flow, args[:3])) or args[7] is not None or args[8] is not None:
        raise UnknownPathsError("attention is not of three tensors that inputs reach, or adds positions of its own")
    separate = kwargs.get("use_separate_proj_weight")
    projections = [kwargs[f"{one}_proj_weight"] for one in "qkv"] if separate else args[5].chunk(3)
    parts = [
        _Clip.apply(F.linear(x.flow, weight)).unflatten(-1, (args[4], -1))  # type: ignore[no-untyped-call]
        for x, weight in zip(args[:3], projections, strict=True)
    ]
    query, key, value = parts
    heads = value.sum(dim=0) + key.sum(dim=0).sum(dim=-1, keepdim=True) + query.sum(dim=-1, keepdim=True)
    return F.linear(_Clip.apply(heads.flatten(-2)), args[11]), None  # type: ignore[no-untyped-call]


def _pooled(dimensions: int) -> Callable[..., Tensor]:
    """Return the rule of a pool of maxima: each number of a window may be it."""

    def rule(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode")
        given = dict(zip(names, args, strict=False)) | kwargs
        dilation = given.get("dilation", 1)
        if any(one != 1 for one in (dilation if isinstance(dilation, tuple | list) else (dilation,))):
            raise UnknownPathsError("nobody knows what a dilated pool does to paths")
        pool = getattr(F, f"avg_pool{dimensions}d")
        rest = {key: given[key] for key in names[1:4] + names[5:] if given.get(key) is not None}
        found: Tensor = pool(_operand(args, kwargs).flow, **rest)
        return found

    return rule


def _as_it_is(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A sum of numbers with weights that are not negative."""
    if kwargs.get("mode") == "bicubic":
        raise UnknownPathsError("nobody knows what a bicubic interpolation does to paths")
    found: Tensor = func(*pytree.tree_map(_plain, args), **pytree.tree_map(_plain, kwargs))
    return found


_OPERATORS = {"add", "sub", "mul", "truediv", "matmul", "pow", "div"}
_READ = {
    "size",
    "dim",
    "numel",
    "nelement",
    "stride",
    "is_contiguous",
    "is_floating_point",
    "is_complex",
    "__len__",
} | {*("get_device", "element_size", "ndimension", "__repr__", "register_hook", "__hash__")}
_ELEMENTWISE = {
    *("relu", "relu6", "leaky_relu", "gelu", "silu", "mish", "tanh", "sigmoid", "elu", "selu", "celu", "softplus"),
    *("hardtanh", "hardswish", "hardsigmoid", "softsign", "logsigmoid", "threshold", "add", "sub", "rsub", "maximum"),
    *("minimum", "neg", "abs", "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "square", "pow", "sin", "cos", "erf"),
    *("clamp", "clip", "clamp_min", "clamp_max", "reciprocal", "clone", "contiguous", "detach", "nan_to_num", "where"),
    *("masked_fill", "lerp", "addcmul", "hardshrink", "softshrink", "tanhshrink"),
}
_RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(("mul", "multiply", "div", "divide", "truediv", "true_divide"), _multiplied),
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout"), _first),
    **dict.fromkeys(("feature_alpha_dropout", "batch_norm", "prelu", "float", "double", "half", "bfloat16"), _first),
    **dict.fromkeys(("to", "type", "type_as", "requires_grad"), _cast),
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "transpose", "swapaxes", "permute", "movedim"), _moved),
    **dict.fromkeys(("squeeze", "unsqueeze", "expand", "expand_as", "repeat", "repeat_interleave", "tile"), _moved),
    **dict.fromkeys(("chunk", "split", "split_with_sizes", "tensor_split", "unbind", "narrow", "select"), _moved),
    **dict.fromkeys(("getitem", "index_select", "flip", "roll", "cat", "concat", "concatenate", "stack"), _moved),
    **dict.fromkeys(("hstack", "vstack", "pad", "t", "view_as", "reshape_as", "unfold", "broadcast_to"), _moved),
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle", "swapdims", "channel_shuffle"), _moved),
    **dict.fromkeys(("sum", "mean", "amax", "amin", "logsumexp"), _summed),
    **dict.fromkeys(("softmax", "log_softmax"), _mixed(_dim)),
    **dict.fromkeys(("layer_norm", "rms_norm"), _mixed(_last)),
    "instance_norm": _mixed(lambda x, _, __: tuple(range(2, x.dim()))),
    "group_norm": _in_groups,
    **dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d"), _product(2)),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _product(2)),
    **dict.fromkeys(("matmul", "mm", "bmm"), _product(None)),
    "addmm": _added_product,
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
    "multi_head_attention_forward": _attention_heads,
    **{f"max_pool{number}d": _pooled(number) for number in (1, 2, 3)},
    **{f"{kind}_pool{number}d": _as_it_is for kind in ("avg", "adaptive_avg") for number in (1, 2, 3)},
    **dict.fromkeys(("interpolate", "cumsum"), _as_it_is),
    "normalize": _mixed(lambda x, args, named: (named.get("dim", 1),)),
}


@contextmanager
def _sparse_layers_followed(model: nn.Module) -> Iterator[None]:
    """Have a model in ``eval``, and layers in the sparse form follow what is reached; as they were afterwards."""
    modes = {module: module.training for module in model.modules()}
    sparse = [module for module in modes if isinstance(module, SparseLinear)]
    if any("forward" in vars(layer) or layer._cut is not None for layer in sparse):
        raise UnknownPathsError("a layer in the sparse form has a forward of its own, or is cut over processes")
    try:
        model.eval()
        for layer in sparse:
            vars(layer)["forward"] = _sparse_forward(layer)
        yield
    finally:
        for layer in sparse:
            vars(layer).pop("forward", None)
        for module, training in modes.items():
            module.training = training


def _sparse_forward(layer: SparseLinear) -> Callable[[Any], Any]:
    def forward(input: Any) -> Any:
        if not _is_flow(input):  # a constant, as of a first state
            return torch.zeros(*input.shape[:-1], layer.out_features, device=input.device)
        values, x = layer.weight_values, input.flow.reshape(-1, layer.in_features)
        rows = torch.from_numpy(layer.pattern.rows.astype("int64")).to(x.device)
        columns = torch.from_numpy(layer.pattern.indices.astype("int64")).to(x.device)
        y = x.new_zeros(len(x), layer.out_features).index_add(1, rows, x[:, columns] * values)
        return _made(y.reshape(*input.flow.shape[:-1], layer.out_features))

    return forward
