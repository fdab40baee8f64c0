"""A pattern whose first use is in a transform, in a compiled or exported program: that use and all later ones are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from helpers import python
from maskedlinear import masks
from maskedlinear.pattern import SparsityPattern
from maskedlinear.torch import sparse_linear

X = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
Product = Callable[[Tensor], Tensor]


class Layer(nn.Module):
    def __init__(self, pattern: SparsityPattern, values: Tensor) -> None:
        super().__init__()
        self.pattern, self.values = pattern, nn.Parameter(values)

    def forward(self, x: Tensor) -> Tensor:
        return sparse_linear(x, self.values, self.pattern)


def check(first: Callable[[SparsityPattern, Tensor], Any]) -> None:
    """Use a new pattern, then compare an ordinary product, its gradient and a transform's with those of a dense one."""
    pattern = SparsityPattern.from_mask(masks.random((6, 5), sparsity=0.5, seed=0))
    values = torch.randn(pattern.nnz, generator=torch.Generator().manual_seed(1))

    def dense(values: Tensor) -> Tensor:
        places = torch.tensor(pattern.rows * 5 + pattern.indices)
        return X @ torch.zeros(30).index_put((places,), values).reshape(6, 5).T

    if (made := first(pattern, values)) is not None:
        torch.testing.assert_close(made, dense(values))
    held = values.clone().requires_grad_()
    y = sparse_linear(X, held, pattern)
    torch.testing.assert_close(y, dense(values))
    y.square().sum().backward()
    expected = grad(lambda values: dense(values).square().sum())(values)
    torch.testing.assert_close(held.grad, expected)
    found = grad(lambda values: sparse_linear(X, values, pattern).square().sum())(values)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: grad(lambda values: f(values).sum()),
        lambda f: lambda values: vjp(f, values)[1](torch.ones(3, 6)),
        lambda f: lambda values: jvp(f, (values,), (values,)),
        jacrev,
        jacfwd,
        lambda f: hessian(lambda values: f(values).square().sum()),
        lambda f: lambda values: vmap(f)(values.expand(2, -1)),
        lambda f: lambda values: vmap(jacrev(f))(values.expand(2, -1)),
    ],
    ids=["grad", "vjp", "jvp", "jacrev", "jacfwd", "hessian", "vmap", "vmap of jacrev"],
)
def test_first_used_in_a_transform(transform: Callable[[Product], Callable[[Tensor], Any]]) -> None:
    def first(pattern: SparsityPattern, values: Tensor) -> None:
        transform(lambda values: sparse_linear(X, values, pattern))(values)

    check(first)


def test_first_used_without_gradients_or_in_inference_mode() -> None:
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            pattern = SparsityPattern.from_mask(masks.random((6, 5), sparsity=0.5, seed=0))
            sparse_linear(X, torch.ones(pattern.nnz), pattern)
        assert sparse_linear(X, torch.ones(pattern.nnz, requires_grad=True), pattern).requires_grad

        def first(pattern: SparsityPattern, values: Tensor, context: Any = context) -> Tensor:
            with context():
                return sparse_linear(X, values, pattern).clone()

        check(first)


@pytest.mark.parametrize("whole", [True, False])
def test_first_used_in_a_compiled_program(whole: bool) -> None:
    def of_function(pattern: SparsityPattern, values: Tensor) -> Tensor:
        made: Tensor = torch.compile(lambda values: sparse_linear(X, values, pattern), fullgraph=whole)(values)
        return made

    def of_module(pattern: SparsityPattern, values: Tensor) -> Tensor:
        made: Tensor = torch.compile(Layer(pattern, values), fullgraph=whole)(X).detach()
        return made

    check(of_function)
    check(of_module)


@pytest.mark.parametrize("strict", [False, True])
def test_first_used_in_an_exported_program(strict: bool) -> None:
    def first(pattern: SparsityPattern, values: Tensor) -> Tensor:
        program = torch.export.export(Layer(pattern, values), (X,), strict=strict)
        made: Tensor = program.module()(X).detach()
        return made

    check(first)


@pytest.mark.parametrize("dynamic", [None, True, False])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("used", [True, False])
def test_compiled_in_a_transform_for_any_size_and_in_inference_mode(
    dynamic: bool | None, whole: bool, used: bool
) -> None:
    def compiled(of: Callable[..., Any]) -> Callable[..., Any]:
        torch.compiler.reset()
        return torch.compile(of, backend="aot_eager", fullgraph=whole, dynamic=dynamic)  # type: ignore[no-any-return]

    def of(pattern: SparsityPattern, values: Tensor) -> None:
        if used:
            sparse_linear(X, values, pattern)

    def loss(values: Tensor, x: Tensor, pattern: SparsityPattern) -> Tensor:
        return sparse_linear(x, values, pattern).square().sum()

    def in_inference_mode(pattern: SparsityPattern, values: Tensor) -> Tensor:
        of(pattern, values)
        with torch.inference_mode():
            made: Tensor = compiled(Layer(pattern, values))(X)
        return made.clone()

    def of_some_sizes(pattern: SparsityPattern, values: Tensor) -> Tensor:
        of(pattern, values)
        program = compiled(Layer(pattern, values))
        program(X[:2])
        made: Tensor = program(X).detach()
        return made

    def of_a_gradient(pattern: SparsityPattern, values: Tensor) -> None:
        of(pattern, values)
        for transform in (grad, jacrev, lambda f: lambda values: jvp(f, (values,), (values,))[1]):
            made = compiled(transform(lambda values: loss(values, X, pattern)))(values)
            torch.testing.assert_close(made, transform(lambda values: loss(values, X, pattern))(values))

    def of_each_row(pattern: SparsityPattern, values: Tensor) -> None:
        of(pattern, values)
        made = compiled(vmap(lambda x: grad(loss)(values, x, pattern)))(X[:, None])
        torch.testing.assert_close(made, torch.stack([grad(loss)(values, x, pattern) for x in X[:, None]]))

    for first in (in_inference_mode, of_some_sizes, of_a_gradient, of_each_row):
        check(first)


def test_a_compiled_function_takes_any_pattern_that_was_used_and_is_compiled_once() -> None:
    programs = []

    def backend(program: Any, _: Any) -> Any:
        programs.append(program)
        return program

    product = torch.compile(sparse_linear, backend=backend, fullgraph=True)
    for seed in range(5):
        pattern = SparsityPattern.from_mask(masks.random((6, 5), sparsity=0.5, seed=seed))
        values = torch.randn(pattern.nnz)
        y = sparse_linear(X, values, pattern)
        torch.testing.assert_close(product(X, values, pattern), y)
    assert len(programs) == 1


def test_made_when_the_main_thread_has_ended_and_at_exit() -> None:
    program = """
import atexit, copy, threading, time
import torch
from maskedlinear import masks
from maskedlinear.torch import SparseLinear

def made(seed):
    layer = SparseLinear(6, 4, mask=masks.random((4, 6), sparsity=0.5, seed=seed))
    copy.deepcopy(layer).load_state_dict(layer.state_dict())
    print(layer(torch.ones(2, 6)).shape)

def serve():
    threading.main_thread().join()
    time.sleep(0.1)
    made(0)

threading.Thread(target=serve).start()
atexit.register(made, 1)
"""
    done = python(program)
    assert done.stdout.count("torch.Size([2, 4])") == 2, done.stderr
