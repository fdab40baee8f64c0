"""A layer's product in one Function, and what is said instead whatever looks on; half types as float32, rounded once."""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from maskedlinear import kernels, masks
from maskedlinear.pattern import SparsityPattern
from maskedlinear.torch import SparseLinear, sparse_linear
from maskedlinear_torch import _compat, _layer_product

OUT, IN, BATCH = 30, 50, 4
PATTERN = SparsityPattern.from_mask(masks.random((OUT, IN), sparsity=0.7, seed=0))
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
EACH = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
Sides = tuple[Tensor, Tensor, Tensor]


def problem(dtype: torch.dtype) -> tuple[Sides, Tensor]:
    """Return x, values and bias, and a cotangent."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((BATCH, IN), (PATTERN.nnz,), (OUT,), (BATCH, OUT))
    x, values, bias, g = (torch.randn(shape, generator=draw).to(dtype) for shape in shapes)
    return (x.requires_grad_(), values.requires_grad_(), bias.requires_grad_()), g


def product(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    return sparse_linear(x, values, PATTERN, bias)


def exact(sides: Sides, g: Tensor) -> tuple[Tensor, ...]:
    """Return y and the gradients in float64, by a dense matrix."""
    x, values, bias = (side.detach().double().requires_grad_() for side in sides)
    rows, columns = (torch.tensor(index).long() for index in (PATTERN.rows, PATTERN.indices))
    weight = torch.zeros(OUT, IN, dtype=torch.float64).index_put((rows, columns), values)
    y = nn.functional.linear(x, weight, bias)
    return y.detach(), *torch.autograd.grad(y, (x, values, bias), g.double())


def check(found: Any, wanted: Any, dtype: torch.dtype) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype is dtype
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(one.double(), other, rtol=2 * eps, atol=2e-2 if dtype.itemsize == 2 else 64 * eps)


@EACH
def test_eager(dtype: torch.dtype) -> None:
    sides, g = problem(dtype)
    y = product(*sides)
    check((y.detach(), *torch.autograd.grad(y, sides, g)), exact(sides, g), dtype)


@HALF
@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled(dtype: torch.dtype, fullgraph: bool) -> None:
    sides, g = problem(dtype)
    torch.compiler.reset()
    y = torch.compile(product, backend="aot_eager", fullgraph=fullgraph)(*sides)
    check((y.detach(), *torch.autograd.grad(y, sides, g)), exact(sides, g), dtype)


@HALF
def test_compiled_under_autocast(dtype: torch.dtype) -> None:
    (x, *_), _ = problem(torch.float32)
    layer = SparseLinear(IN, OUT, pattern=PATTERN)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager")
    with torch.autocast("cpu", dtype):
        y, wanted = compiled(x), layer(x)
    assert y.dtype is dtype
    torch.testing.assert_close(y, wanted)


@HALF
@pytest.mark.parametrize("strict", [False, True])
def test_exported(dtype: torch.dtype, strict: bool) -> None:
    (x, *_), _ = problem(dtype)
    layer = SparseLinear(IN, OUT, pattern=PATTERN, dtype=dtype)
    program = torch.export.export(layer, (x.detach(),), strict=strict)
    torch.testing.assert_close(program.module()(x.detach()), layer(x.detach()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("rows", [1, BATCH])
def test_a_program_that_is_recorded_multiplies(dtype: torch.dtype, grad: bool, rows: int) -> None:
    """By ``make_fx`` and by ``torch.jit.trace``, with other numbers than those that it was recorded of."""
    layer = SparseLinear(IN, OUT, pattern=PATTERN, dtype=dtype)
    x, other = torch.ones(rows, IN, dtype=dtype), torch.randn(rows, IN, dtype=dtype)
    near = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-2 if dtype is not torch.float32 else 1e-5}
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        graph = make_fx(lambda x: layer(x))(x)
        torch.testing.assert_close(graph(other), layer(other), **near)
        warnings.simplefilter("ignore")  # torch's own, of sizes that become constants, and of the trace itself
        traced = torch.jit.trace(layer, (x,))  # type: ignore[no-untyped-call]
        torch.testing.assert_close(traced(other), layer(other), **near)


@EACH
def test_a_cotangent_may_have_a_tangent(dtype: torch.dtype) -> None:
    sides, g = problem(dtype)
    tangent = torch.randn(BATCH, OUT).to(dtype)
    y = product(*sides)
    with forward_ad.dual_level():
        found = torch.autograd.grad(y, sides, forward_ad.make_dual(g, tangent))
        tangents = [forward_ad.unpack_dual(one).tangent for one in found]
    check(tangents, exact(sides, tangent)[1:], dtype)  # gradients are linear in it


@EACH
@pytest.mark.parametrize("how", ["torch.func.vmap", "is_grads_batched"])
def test_cotangents_may_be_mapped_over(dtype: torch.dtype, how: str) -> None:
    sides, g = problem(dtype)
    y, stack = product(*sides), torch.stack([g, 2 * g, -g])

    def pull(g: Tensor, **more: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, sides, g, retain_graph=True, **more)

    ways: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "torch.func.vmap": lambda: torch.func.vmap(pull)(stack),
        "is_grads_batched": lambda: pull(stack, is_grads_batched=True),
    }
    found = ways[how]()
    for place, one in enumerate(stack):
        check([grad[place] for grad in found], exact(sides, one)[1:], dtype)


@EACH
def test_gradients_may_be_differentiated_again(dtype: torch.dtype) -> None:
    sides, g = problem(dtype)
    x, values, _ = sides
    (dx,) = torch.autograd.grad(product(*sides), x, g, create_graph=True)
    (again,) = torch.autograd.grad(dx.sum(), values)
    rows = torch.tensor(PATTERN.rows).long()
    check([again], [g.double().sum(0)[rows]], dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_torch_that_cannot_say_what_looks_on_goes_by_operators(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_compat, "_dispatch_modes", lambda: 1)
    sides, g = problem(dtype)
    assert not _layer_product.is_layer_product(*sides)
    y = product(*sides)
    check((y.detach(), *torch.autograd.grad(y, sides, g)), exact(sides, g), dtype)


@EACH
def test_what_a_gradient_does_not_need_may_change(dtype: torch.dtype) -> None:
    """Of frozen values, x may be overwritten after the call, and is not kept; of x without gradient, values may."""
    (x, values, bias), g = problem(dtype)
    assert _layer_product.is_layer_product(x, values, bias)
    wanted = exact((x, values, bias), g)
    inner = x.detach().clone().requires_grad_()
    overwritten = inner * 1
    y = product(overwritten, values.detach(), bias.detach())
    overwritten.detach().zero_()
    overwritten.relu_()
    check(torch.autograd.grad(y, inner, g, allow_unused=True), wanted[1:2], dtype)
    own = values.detach().clone().requires_grad_()
    y = product(x.detach(), own, bias.detach())
    with torch.no_grad():
        own.zero_()
    check(torch.autograd.grad(y, own, g), wanted[2:3], dtype)


LAID: dict[str, Callable[[Tensor], Tensor]] = {
    "by rows": lambda x: x,
    "by features": lambda x: x.mT.contiguous().mT,
    "with gaps": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "in three dimensions": lambda x: x.view(2, BATCH // 2, IN),
    "turned in three dimensions": lambda x: x.view(2, BATCH // 2, IN).transpose(0, 1),
    "by features, in three dimensions": lambda x: x.mT.contiguous().mT.unflatten(0, (2, -1)),
    "by features, turned in three dimensions": lambda x: x.view(2, BATCH // 2, IN).mT.contiguous().mT,
    "in five dimensions": lambda x: x.view(1, 2, 1, BATCH // 2, IN),
    "one row, over and over": lambda x: x[:1].expand(3, 4, IN),
    "one row": lambda x: x[0],
    "no row": lambda x: x[:0],
    "negated when it is read": lambda x: torch._neg_view(x),
}


@EACH
@pytest.mark.parametrize("lies", LAID)
@pytest.mark.parametrize("has_bias", [True, False])
def test_x_may_lie_anyhow_and_y_be_written_to(dtype: torch.dtype, lies: str, has_bias: bool) -> None:
    (x, values, bias), _ = problem(dtype)
    assert _layer_product.is_layer_product(x, values, bias)
    y = sparse_linear(LAID[lies](x), values, PATTERN, bias if has_bias else None)
    y.mul_(2)
    y += 1
    with torch.no_grad():
        without = sparse_linear(LAID[lies](x), values, PATTERN, bias if has_bias else None)
    assert torch.equal(without * 2 + 1, y)
    without += torch.ones_like(without, requires_grad=True)  # as to the y of a dense layer, made without gradients
    with torch.inference_mode():
        assert torch.equal(sparse_linear(LAID[lies](x), values, PATTERN, bias if has_bias else None) * 2 + 1, y)
    wide = [side.detach().double().requires_grad_() for side in (x, values, bias)]
    rows, columns = (torch.tensor(index).long() for index in (PATTERN.rows, PATTERN.indices))
    weight = torch.zeros(OUT, IN, dtype=torch.float64).index_put((rows, columns), wide[1])
    wanted = nn.functional.linear(LAID[lies](wide[0]), weight, wide[2] if has_bias else None) * 2 + 1
    assert y.shape == wanted.shape
    torch.testing.assert_close(y.double(), wanted, rtol=8 * torch.finfo(dtype).eps, atol=32 * torch.finfo(dtype).eps)
    sides = slice(3 if has_bias else 2)
    found = torch.autograd.grad(y.sum(), (x, values, bias)[sides])
    for one, other in zip(found, torch.autograd.grad(wanted.sum(), wide[sides]), strict=True):
        assert one.dtype is dtype
        torch.testing.assert_close(
            one.double(), other, rtol=4 * torch.finfo(dtype).eps, atol=64 * torch.finfo(dtype).eps
        )


@pytest.mark.parametrize("lies", sorted(LAID.keys() - {"one row", "one row, over and over", "no row"}))
def test_x_is_kept_once(lies: str) -> None:
    """As it is, or, where the products need a copy, the copy alone."""
    (x, values, bias), _ = problem(torch.float32)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    given = LAID[lies](x)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = sparse_linear(given, values, PATTERN, bias)
    assert y.requires_grad
    storages = {
        one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in kept if one.numel() == x.numel()
    }
    assert list(storages.values()) == [x.nbytes]


@pytest.mark.parametrize("rows", [1, BATCH])
def test_what_a_layer_gives_without_gradients_may_be_written_to(rows: int) -> None:
    layer = SparseLinear(IN, OUT, pattern=PATTERN)
    with torch.no_grad():
        outputs = [layer(torch.ones(*shape, IN)) for shape in ((rows,), (2, rows), (1, 1, rows))]
    for y in outputs:
        y += torch.ones_like(y, requires_grad=True)
        assert y.requires_grad


@pytest.mark.parametrize("shape", [(6, 8, 0), (6, 8, 1), (6, 8, 30), (6, 0, 0), (0, 8, 0)], ids=str)
@pytest.mark.parametrize("batch", [0, 1, 2, 5, 33])
def test_any_of_the_gradients_may_be_all_that_is_wanted(batch: int, shape: tuple[int, int, int]) -> None:
    out, in_, connections = shape
    mask = (torch.arange(out * in_) < connections).view(out, in_)
    g, numbers = torch.randn(batch, out), torch.randn(batch, in_)
    for of_x, of_values, of_bias in itertools.product((True, False), repeat=3):
        layer, x = SparseLinear(in_, out, mask=mask), numbers.clone().requires_grad_(of_x)
        layer.weight_values.requires_grad_(of_values)
        layer.bias.requires_grad_(of_bias)
        if of_x or of_values or of_bias:
            layer(x).backward(g)
        wanted = (
            (of_x, x, g @ layer.weight.detach()),
            (of_values, layer.weight_values, (g.mT @ numbers)[mask]),
            (of_bias, layer.bias, g.sum(0)),
        )
        for is_wanted, parameter, gradient in wanted:
            assert (parameter.grad is not None) is is_wanted
            if is_wanted:
                torch.testing.assert_close(parameter.grad, gradient)


def test_a_bias_gradient_of_many_rows_is_as_near_as_that_of_a_dense_layer() -> None:
    layer, dense, g = SparseLinear(8, 3, mask=torch.ones(3, 8)), nn.Linear(8, 3), torch.full((100_000, 3), 0.1)
    for one in (layer, dense):
        one(torch.zeros(len(g), 8, requires_grad=True)).backward(g)
    exact = g.double().sum(0)
    error, other = ((one.bias.grad.double() / exact - 1).abs().max() for one in (layer, dense))
    assert error <= max(2 * other, 1e-6)


@pytest.mark.parametrize("batch", [0, 3])
@pytest.mark.parametrize("grad", [True, False])
def test_what_does_not_belong_together_is_said_at_every_call(batch: int, grad: bool) -> None:
    x = torch.zeros(batch, 8)
    changes: dict[str, tuple[Callable[[SparseLinear], Any], Tensor, type[Exception], str]] = {
        "no values": (
            lambda layer: setattr(layer.weight_values, "data", torch.empty(0)),
            x,
            ValueError,
            "values must have",
        ),
        "fewer values": (
            lambda layer: setattr(layer.weight_values, "data", torch.empty(9)),
            x,
            ValueError,
            "values must have",
        ),
        "another bias": (
            lambda layer: setattr(layer.bias, "data", torch.empty(5)),
            x,
            ValueError,
            r"bias must have shape",
        ),
        "whole numbers": (lambda layer: None, x.long(), TypeError, "x must have a real floating-point dtype"),
        "another dtype": (lambda layer: None, x.double(), TypeError, "one dtype and one device"),
        "another width": (lambda layer: None, torch.zeros(batch, 7), ValueError, "the last dimension of x"),
        "no dimension": (lambda layer: None, torch.zeros(()), ValueError, "got a scalar"),
        "no tensor": (lambda layer: None, [[0.0] * 8], TypeError, "x must be a torch.Tensor"),  # type: ignore[dict-item]
        "no memory": (lambda layer: None, x.to("meta"), ValueError, "one dtype and one device"),
    }
    for change, given, error, text in changes.values():
        layer = SparseLinear(8, 6, mask=torch.eye(6, 8))
        change(layer)
        with pytest.raises(error, match=text), torch.set_grad_enabled(grad):
            layer(given)


def test_indices_that_were_changed_between_the_passes_are_told_and_none_outlives_them() -> None:
    layer = SparseLinear(8, 6, mask=torch.eye(6, 8))
    x = torch.randn(3, 8, requires_grad=True)
    y = layer(x)
    layer.indices.fill_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    layer = SparseLinear(8, 6, mask=torch.eye(6, 8))
    y, indices = layer(x), weakref.ref(layer.indices)
    y.sum().backward()
    del layer
    assert indices() is None
    assert y.shape == (3, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_without_gradients_is_multiplied_as_with_them_where_kernels_take_less_time_than_mkl(
    dtype: torch.dtype,
) -> None:
    # 600,000 connections, more than two fifths: with registers of 64 bytes by kernels, bit by bit as in training.
    layer = SparseLinear(1024, 1024, mask=masks.random((1024, 1024), sparsity=0.4, seed=0), dtype=dtype)
    x = torch.randn(1, 1024, dtype=dtype)
    trained = layer(x).detach()
    with torch.no_grad():
        infers = layer(x)
        layer.weight_values.mul_(2)
        torch.testing.assert_close(layer(x) - layer.bias, 2 * (infers - layer.bias))
    if kernels.is_available() and kernels.is_row_by_kernel((1024, 1024), layer.weight_values.numel()):
        assert torch.equal(infers, trained)
    reference = x.double() @ (layer.weight.detach().double() / 2).T + layer.bias.detach().double()
    torch.testing.assert_close(infers.double(), reference, rtol=0, atol=1e-4 if dtype is torch.float32 else 1e-12)


@pytest.mark.parametrize(("shape", "live"), [((2048, 2048), 0.3), ((512, 512), 0.9), ((64, 32), 1.0)])
def test_a_row_of_a_sparse_or_a_small_matrix_is_left_to_mkl(shape: tuple[int, int], live: float) -> None:
    if kernels.is_available():
        assert not kernels.is_row_by_kernel(shape, int(live * shape[0] * shape[1]))
