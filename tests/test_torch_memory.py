"""What the kernels read is memory: tensors whose memory does not hold their numbers are copied first, or refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers import needs_kernels
from maskedlinear.torch import MaskedLinear, SparseLinear, pack

FEATURES, OUT = 64, 48


def layer(seed: int = 0) -> SparseLinear:
    torch.manual_seed(seed)
    return SparseLinear(FEATURES, OUT, mask=torch.rand(OUT, FEATURES) < 0.5)


def negative(tensor: Tensor) -> Tensor:
    """Return a view that is the tensor times -1, which its memory is not."""
    view = torch._neg_view(tensor)
    assert view.is_neg()
    return view


@pytest.mark.parametrize("batch", [1, 4, 130])
@pytest.mark.parametrize("packed", [False, True])
def test_a_view_with_the_negative_bit_is_multiplied_as_what_it_is(batch: int, packed: bool) -> None:
    sparse = layer()
    model = pack(sparse).eval() if packed else sparse
    x = torch.randn(batch, FEATURES)
    with torch.no_grad():
        torch.testing.assert_close(model(negative(x)), model(-x))


@pytest.mark.parametrize("make", [negative, lambda g: torch._efficientzerotensor(*g.shape)], ids=["negative", "zeros"])
@pytest.mark.parametrize("batch", [1, 4, 130])
def test_gradients_that_have_no_memory_of_their_own_are_taken_as_what_they_are(make, batch: int) -> None:
    sparse = layer()
    x, g = torch.randn(batch, FEATURES, requires_grad=True), torch.randn(batch, OUT)
    found = torch.autograd.grad(sparse(x), [x, sparse.weight_values], make(g))
    want = torch.autograd.grad(sparse(x), [x, sparse.weight_values], make(g).clone().resolve_neg())
    torch.testing.assert_close(found, want)


def test_the_gradient_of_a_dense_layers_few_live_weights_is_that_of_what_it_is_given() -> None:
    torch.manual_seed(0)
    dense = MaskedLinear(FEATURES, OUT, mask=torch.rand(OUT, FEATURES) < 0.1)
    x, g = torch.randn(80, FEATURES), torch.randn(80, OUT)
    (found,) = torch.autograd.grad(dense(negative(x)), [dense.weight], negative(g))
    (want,) = torch.autograd.grad(dense(x), [dense.weight], g)
    torch.testing.assert_close(found, want)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 4, 130])
def test_x_of_zeros_without_memory_gives_the_bias(batch: int) -> None:
    sparse = layer()
    zeros = torch._efficientzerotensor(batch, FEATURES)
    for model in (sparse, pack(sparse).eval()):
        torch.testing.assert_close(model(zeros), sparse.bias.expand(batch, OUT))


@torch.no_grad()
@needs_kernels
def test_values_whose_storage_was_freed_are_refused() -> None:
    sparse = layer()
    sparse.weight_values.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"has none: its storage was freed .* bring it back"):
        sparse(torch.randn(8, FEATURES))
