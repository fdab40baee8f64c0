"""The sparse form in PyTorch: the products, the function and ``SparseLinear``."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from maskedlinear import kernels, masks
from maskedlinear.pattern import SparsityPattern
from maskedlinear.torch import MaskedLinear, SparseLinear, masked_linear, sparse_linear
from maskedlinear_torch import _cpu_kernels, _gathered_products, _products
from maskedlinear_torch._products import DevicePattern
from maskedlinear_torch._sparse import product

MASK = masks.random((6, 5), sparsity=0.5, seed=7)
PATTERN = SparsityPattern.from_mask(MASK)


def arguments(dtype: torch.dtype = torch.float64, requires_grad: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Return x (4, 3, 5), the values and a bias."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 3, 5), (PATTERN.nnz,), (6,))
    return tuple(  # type: ignore[return-value]
        torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_(requires_grad)
        for shape in shapes
    )


def matrix(values: Tensor) -> Tensor:
    return values.new_zeros(6, 5).index_put((torch.tensor(MASK).nonzero(as_tuple=True)), values)


def layer_and_x() -> tuple[SparseLinear, Tensor]:
    torch.manual_seed(1)
    return SparseLinear(5, 6, mask=MASK), torch.randn(4, 5)


@pytest.fixture(params=["ours", "kernels", "plain"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The products by kernels of ours, by torch's, and as they are where there are none, in several parts."""
    if request.param != "ours":
        monkeypatch.setattr(_cpu_kernels, "are_for", lambda *_: False)
    if request.param == "plain":
        monkeypatch.setattr(_products, "_has_kernels", lambda *_: False)
        monkeypatch.setattr(_gathered_products, "_CHUNK", 40)


@pytest.mark.usefixtures("products")
def test_the_value_is_the_dense_forms() -> None:
    x, values, bias = arguments()
    for given in (bias, None):
        y = sparse_linear(x, values, PATTERN, given)
        torch.testing.assert_close(y, masked_linear(x, matrix(values), MASK, given))
        assert y.is_contiguous(), "as nn.Linear's is, so that .view works"


@pytest.mark.usefixtures("products")
def test_derivatives_of_every_order_mode_and_batch() -> None:
    def layer(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return sparse_linear(x, values, PATTERN, bias)

    batched = {"check_batched_grad": True}
    assert torch.autograd.gradcheck(
        layer, arguments(), check_forward_ad=True, check_batched_forward_grad=True, **batched
    )
    assert torch.autograd.gradgradcheck(layer, arguments(), check_fwd_over_rev=True, check_rev_over_rev=True, **batched)


def test_third_order_and_nested_forward_mode_stay_sparse() -> None:
    x, values, bias = arguments(requires_grad=False)

    def loss(values: Tensor) -> Tensor:
        return sparse_linear(x, values, PATTERN, bias).pow(3).sum()

    def dense(values: Tensor) -> Tensor:
        return masked_linear(x, matrix(values), MASK, bias).pow(3).sum()

    hessian = torch.func.hessian(loss)(values)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(dense, values))
    torch.testing.assert_close(torch.func.jacfwd(torch.func.jacfwd(loss))(values), hessian)
    third = torch.func.jacrev(torch.func.hessian(loss))(values)
    torch.testing.assert_close(third, torch.func.jacrev(torch.func.jacrev(torch.func.jacrev(dense)))(values))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"pattern": MASK},
            TypeError,
            "pattern must be a maskedlinear.pattern.SparsityPattern; got ndarray: make one with",
        ),
        (
            {"values": torch.zeros(3)},
            ValueError,
            r"one entry for each of the pattern's 15 connections; got shape \(3,\)",
        ),
        ({"values": np.zeros(15)}, TypeError, "values must be a torch.Tensor; got ndarray"),
        ({"values": torch.zeros(15, dtype=torch.int32)}, TypeError, "values"),
        ({"x": torch.zeros(4, 6)}, ValueError, r"x"),
        ({"bias": torch.zeros(5)}, ValueError, "bias"),
        ({"bias": torch.zeros(6, dtype=torch.float64)}, TypeError, "x, values and bias must have one dtype"),
    ],
)
def test_what_does_not_belong_together_is_refused(change: Any, error: type[Exception], message: str) -> None:
    given: Any = {"x": torch.zeros(4, 5), "values": torch.zeros(15), "pattern": PATTERN, "bias": None}
    with pytest.raises(error, match=message):
        sparse_linear(**(given | change))


def test_a_map_over_the_pattern_is_refused() -> None:
    device_pattern = _products.DevicePattern.of(PATTERN, torch.device("cpu"))
    mapped = [torch.stack([index, index]) for index in device_pattern]
    with pytest.raises(ValueError, match=r"a pattern cannot be mapped over by torch.vmap"):
        torch.func.vmap(
            lambda *pattern: _products.spmm(torch.zeros(15), torch.zeros(5, 2), _products.DevicePattern(*pattern))
        )(*mapped)


def test_a_pattern_that_inference_met_first_can_be_trained() -> None:
    pattern = SparsityPattern.from_mask(MASK)
    x, values, bias = arguments()
    with torch.inference_mode():
        sparse_linear(x, values, pattern, bias)
    sparse_linear(x, values, pattern, bias).sum().backward()
    assert values.grad is not None


def test_training_equals_that_of_the_dense_form() -> None:
    torch.manual_seed(0)
    dense = MaskedLinear(5, 6, mask=MASK).double()
    sparse = SparseLinear.from_masked(dense)
    x, target = torch.randn(32, 5).double(), torch.randn(32, 6).double()
    for layer in (dense, sparse):
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
        for _ in range(20):
            optimizer.zero_grad()
            (layer(x) - target).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(sparse.weight_values, dense.weight[dense.mask])
    torch.testing.assert_close(sparse.bias, dense.bias)


def test_inference_on_one_row_sees_every_change() -> None:
    layer = SparseLinear(5, 6, mask=MASK)
    other, x = SparseLinear(5, 6, mask=~MASK), torch.randn(5)

    @torch.no_grad()
    def check(layer: SparseLinear, x: Tensor) -> None:
        for shaped in (x, x[None], x[None, None]):
            y = layer(shaped)
            torch.testing.assert_close(y, layer.to_masked().to_linear()(shaped))
            assert y.shape == (*shaped.shape[:-1], 6)

    check(layer, x)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    layer(x).square().sum().backward()
    check(layer, x)
    optimizer.step()
    check(layer, x)
    layer.weight_values.data[0] = 7.0
    check(layer, x)
    layer.weight_values.data = torch.randn(PATTERN.nnz)
    check(layer, x)
    layer.load_state_dict(other.state_dict())
    check(layer, x)
    check(copy.deepcopy(layer), x)
    layer.weight_values.data = torch.randn(2 * len(layer.weight_values))[::2]
    check(layer, x)
    check(layer.double(), x.double())
    check(SparseLinear(5, 6, bias=False, mask=MASK), x)
    with torch.inference_mode():
        check(other, x)
    other(x).sum().backward()
    with torch.no_grad(), pytest.raises(TypeError, match="one dtype"):
        other(x.double())
    with torch.no_grad(), pytest.raises(ValueError, match="number of inputs"):
        other(torch.zeros(5, 1))
    with torch.no_grad(), torch.autocast("cpu"):
        assert other(x).dtype is torch.bfloat16
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones(5))
        tangent = torch.autograd.forward_ad.unpack_dual(other(dual)).tangent
        torch.testing.assert_close(tangent, other.to_masked().masked_weight.sum(1))


def test_a_pattern_first_met_by_fake_tensors_serves_real_ones_too() -> None:
    pattern = SparsityPattern.from_mask(MASK)
    x, values, bias = arguments()
    for _ in range(2):  # what real tensors have left there serves fake ones
        with FakeTensorMode():
            fake = [torch.empty(tensor.shape, dtype=tensor.dtype, requires_grad=True) for tensor in (x, values)]
            y = sparse_linear(fake[0], fake[1], pattern)
            assert y.shape == (4, 3, 6)
            assert torch.autograd.grad(y.sum(), fake[1])[0].shape == values.shape
        y = sparse_linear(x, values, pattern, bias)
        assert type(y) is Tensor
        torch.testing.assert_close(y, masked_linear(x, matrix(values), MASK, bias))


def test_parameters_gradients_and_optimizer_state_cost_what_the_connections_cost() -> None:
    size = 1000
    layer = SparseLinear(size, size, mask=masks.random((size, size), sparsity=0.99, seed=0))
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.randn(8, size)).sum().backward()
    optimizer.step()
    kept = [*layer.parameters(), *(p.grad for p in layer.parameters())]
    kept += [getattr(layer, name) for name in DevicePattern._fields]
    kept += [part for state in optimizer.state.values() for part in state.values()]
    assert sum(part.nbytes for part in kept) <= 0.03 * 16 * size**2


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic: bool) -> None:
    layer, x = layer_and_x()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (x, torch.randn(7, 5), torch.randn(2, 3, 5)):
        batch = batch.requires_grad_()
        found, wanted = compiled(batch), layer(batch)
        torch.testing.assert_close(found, wanted)
        inputs = (batch, *layer.parameters())
        for one, other in zip(
            torch.autograd.grad(found.square().sum(), inputs),
            torch.autograd.grad(wanted.square().sum(), inputs),
            strict=True,
        ):
            torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch 2.14's own check looks at it
def test_the_products_are_sound_custom_operators() -> None:
    device_pattern = _products.DevicePattern.of(PATTERN, torch.device("cpu"))
    values = torch.randn(15, dtype=torch.float64, requires_grad=True)
    left, right = (torch.randn(size, 3, dtype=torch.float64, requires_grad=True) for size in (6, 5))
    torch.library.opcheck(torch.ops.maskedlinear.spmm.default, (values, right, *device_pattern, False))
    torch.library.opcheck(torch.ops.maskedlinear.spmm.default, (values, left, *device_pattern, True))
    torch.library.opcheck(torch.ops.maskedlinear.sddmm.default, (left, right, *device_pattern))


def test_exports_and_traces_symbolically() -> None:
    layer, x = layer_and_x()
    exported = torch.export.export(layer, (x,))
    torch.testing.assert_close(exported.module()(x), layer(x))
    graph = torch.fx.symbolic_trace(nn.Sequential(layer, nn.ReLU()))
    torch.testing.assert_close(graph(x), layer(x).relu())


HUGE = """
import io, resource, torch
from maskedlinear.torch import SparseLinear
def used(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
torch.manual_seed(0)
size, edges = 100_000, 1_000_000
before = used()
flat = torch.randint(size * size, (edges,)).unique()
layer = SparseLinear.from_edges(flat // size, flat % size, (size, size))
optimizer = torch.optim.Adam(layer.parameters())
x, first = torch.randn(64, size), None
for _ in range(3):
    optimizer.zero_grad()
    loss = (layer(x) - 1).square().mean()
    loss.backward()
    optimizer.step()
    first = first or loss.item()
torch.save(layer.state_dict(), io.BytesIO())
assert loss.item() < first
print(used() - before)
"""


@pytest.mark.slow
def test_a_layer_whose_matrix_would_fill_40_gigabytes_trains_in_one() -> None:
    result = subprocess.run([sys.executable, "-c", HUGE], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 2**30


@pytest.mark.parametrize("compiled", [False, True])
def test_forward_mode_keeps_every_tangent(compiled: bool) -> None:
    x, values, bias = arguments(requires_grad=False)

    def along(function: Any, compiled: bool = False) -> tuple[Tensor, Tensor]:
        def tangent(x: Tensor, values: Tensor) -> Any:
            return torch.func.jvp(function, (x, values), (2 * x, 3 * values))[1]

        once = torch.compile(tangent, fullgraph=True, backend="aot_eager") if compiled else tangent
        return once(x, values), torch.func.jvp(tangent, (x, values), (5 * x, 7 * values))[1]

    device_pattern = _products.DevicePattern.of(PATTERN, x.device)
    found = along(lambda x, values: product(x, values, device_pattern, 5, bias), compiled)
    wanted = along(lambda x, values: nn.functional.linear(x, matrix(values), bias))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    assert wanted[1].abs().max() > 1


def test_the_sampled_product_keeps_every_tangent() -> None:
    x, values, _ = arguments(requires_grad=False)
    g = torch.randn(4, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def second(function: Any) -> Tensor:
        pullback = torch.func.vjp(function, values)[1]

        def squared(g: Tensor) -> Any:
            return pullback(g * g)[0]

        def once(g: Tensor) -> Any:
            return torch.func.jvp(squared, (g,), (g,))[1]

        return torch.func.jvp(once, (g,), (3 * g,))[1]  # type: ignore[no-any-return]

    found = second(lambda values: sparse_linear(x, values, PATTERN))
    wanted = second(lambda values: nn.functional.linear(x, matrix(values)))
    torch.testing.assert_close(found, wanted)
    assert wanted.abs().max() > 1


@pytest.mark.skipif(not kernels.is_available(), reason="the kernels are not for this machine")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_that_are_ordered_first_give_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, values, bias = arguments(dtype)
    found = []
    for is_first in (False, True):
        monkeypatch.setattr(kernels, "is_ordered_first", lambda *_, is_first=is_first: is_first)
        found.append(torch.autograd.grad(sparse_linear(x, values, PATTERN, bias).sum(), (x, values)))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_a_map_over_nothing_gives_nothing() -> None:
    pattern = SparsityPattern.from_mask(masks.random((4, 6), sparsity=0.5, seed=0))
    values, bias = torch.randn(12), torch.randn(4)
    product = torch.vmap(lambda values, x: sparse_linear(x, values, pattern), (0, 1))
    assert product(torch.zeros(0, 12), torch.zeros(2, 0, 6)).shape == (0, 2, 4)
    assert torch.vmap(lambda values: sparse_linear(torch.ones(2, 6), values, pattern))(torch.zeros(0, 12)).shape == (
        0,
        2,
        4,
    )
    gradients = torch.func.jacrev(lambda *given: sparse_linear(given[0], given[1], pattern, given[2]), (0, 1, 2))
    made = gradients(torch.zeros(0, 6), values, bias)
    assert [one.shape for one in made] == [(0, 4, 0, 6), (0, 4, 12), (0, 4, 4)]
