"""A pattern whose first use is in a transform, in a compiled or exported program: that use and all later ones are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

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
