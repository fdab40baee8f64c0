"""``maskedlinear.torch.masked_linear``: derivatives of every order and mode, transforms, compile, autocast, refusals."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from helpers import problem
from maskedlinear import spec
from maskedlinear.pattern import SparsityPattern
from maskedlinear.torch import masked_linear, sparse_linear
from maskedlinear_torch import _compat, _functional
from maskedlinear_torch._functional import apply_mask
from maskedlinear_torch._storage import keep_bits, zero_masked

COMPILERS = ["eager", "aot_eager", *(["inductor"] if shutil.which("g++") else [])]


@pytest.fixture(autouse=True, params=["rules", "expression"])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Small layers take the expression; here they take the rules of large ones, too."""
    if request.param == "rules":
        monkeypatch.setattr(_functional, "SMALL", 0)
    return str(request.param)


@pytest.fixture
def p(rng: np.random.Generator) -> list[Tensor]:
    return [torch.asarray(array) for array in problem(rng)]


def leaves(p: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias = (p[i].clone().requires_grad_() for i in (0, 1, 3))
    return x, weight, bias


def test_value_and_gradients_equal_the_spec(p: list[Tensor]) -> None:
    x, weight, bias = leaves(p)
    y = masked_linear(x, weight, p[2], bias)
    arrays = [tensor.numpy() for tensor in p]
    np.testing.assert_allclose(y.detach().numpy(), spec.forward(*arrays[:4]), rtol=1e-13)
    got = torch.autograd.grad(y, (x, weight, bias), p[4])
    for gradient, want in zip(got, spec.vjp(*arrays), strict=True):
        np.testing.assert_allclose(gradient.numpy(), want, rtol=1e-12, atol=1e-13)


def test_every_order_and_mode_against_differences(p: list[Tensor]) -> None:
    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return masked_linear(x, weight, p[2], bias)

    assert torch.autograd.gradcheck(
        layer, leaves(p), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(layer, leaves(p), check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("asked", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_any_subset_of_inputs_may_ask_for_a_gradient(p: list[Tensor], asked: tuple[int, ...]) -> None:
    inputs = [tensor.detach().requires_grad_(i in asked) for i, tensor in enumerate(leaves(p))]
    masked_linear(inputs[0], inputs[1], p[2], inputs[2]).backward(p[4])
    want = spec.vjp(*(tensor.numpy() for tensor in p))
    for i, tensor in enumerate(inputs):
        if i in asked:
            np.testing.assert_allclose(tensor.grad, want[i], rtol=1e-12, atol=1e-13)
        else:
            assert tensor.grad is None


def test_rule_saves_no_masked_copy_of_the_weight(p: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_functional, "SMALL", 0)  # the expression saves what autograd needs
    x, weight, bias = leaves(p)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        masked_linear(x, weight, p[2], bias)
    assert {tensor.data_ptr() for tensor in saved} == {tensor.data_ptr() for tensor in (x, weight, p[2])}


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_nothing_under_the_mask_leaks(p: list[Tensor], poison: float) -> None:
    x, weight, bias = leaves(p)
    dirty = torch.where(p[2], weight.detach(), poison).requires_grad_()
    clean_y, y = (masked_linear(x, w, p[2], bias) for w in (weight, dirty))
    assert torch.equal(y, clean_y)
    clean = torch.autograd.grad(clean_y, (x, weight, bias), p[4])
    for a, b in zip(torch.autograd.grad(y, (x, dirty, bias), p[4]), clean, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("where", ["x", "g"])
def test_masked_gradient_is_positive_zero(p: list[Tensor], where: str) -> None:
    x, weight, bias = leaves(p)
    g = p[4]
    if where == "x":
        x = torch.full_like(x, torch.nan)
    else:
        g = torch.full_like(g, torch.nan)
    (dw,) = torch.autograd.grad(masked_linear(x, weight, p[2], bias), weight, g)
    assert torch.equal(dw[~p[2]], torch.zeros_like(dw[~p[2]]))
    assert not dw[~p[2]].signbit().any()
    assert dw[p[2]].isnan().all()


@pytest.mark.parametrize(
    "dims", [(0, None, None, None), (None, 0, None, None), (None, None, 0, None), (None, None, None, 0), (1, 2, 0, 1)]
)
def test_vmap_over_every_argument(p: list[Tensor], dims: tuple[int | None, ...], rng: np.random.Generator) -> None:
    batched, singles = [], []
    for tensor, dim in zip(p[:4], dims, strict=True):
        if dim is None:
            copies = [tensor] * 3
        elif tensor.dtype is torch.bool:
            copies = [tensor, ~tensor, tensor.roll(1, 0)]
        else:
            copies = list(torch.asarray(rng.standard_normal((3, *tensor.shape))))
        singles.append(copies)
        batched.append(tensor if dim is None else torch.stack(copies, dim))

    def both(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        y, pullback = torch.func.vjp(lambda *a: masked_linear(a[0], a[1], mask, a[2]), x, weight, bias)
        return y, *pullback(y.sin())

    together = torch.func.vmap(both, dims)(*batched)
    for i in range(3):
        for a, b in zip(together, both(*(copies[i] for copies in singles)), strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-12, atol=1e-12)


def test_torch_func_transforms(p: list[Tensor]) -> None:
    def loss(weight: Tensor) -> Tensor:
        return masked_linear(p[0], weight, p[2], p[3]).pow(3).sum()

    hessian = torch.func.hessian(loss)(p[1])
    torch.testing.assert_close(hessian, torch.func.jacrev(torch.func.jacrev(loss))(p[1]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.func.jacfwd(loss)(p[1]), torch.func.jacrev(loss)(p[1]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.func.grad(loss)(p[1]), torch.func.jacrev(loss)(p[1]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", COMPILERS)
def test_compile_equals_eager(p: list[Tensor], backend: str) -> None:
    torch.compiler.reset()
    x, weight, bias = leaves(p)
    compiled = torch.compile(masked_linear, fullgraph=True, backend=backend)
    y, eager = compiled(x, weight, p[2], bias), masked_linear(x, weight, p[2], bias)
    torch.testing.assert_close(y, eager, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(y, (x, weight, bias), p[4]),
        torch.autograd.grad(eager, (x, weight, bias), p[4]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    with torch.no_grad():  # another mask needs no other graph
        torch.testing.assert_close(compiled(x, weight, ~p[2], bias), masked_linear(x, weight, ~p[2], bias))


def test_compiled_forward_mode(p: list[Tensor]) -> None:
    torch.compiler.reset()

    def tangent(x: Tensor, dx: Tensor) -> Tensor:
        return torch.func.jvp(lambda x: masked_linear(x, p[1], p[2], p[3]), (x,), (dx,))[1]

    dx = torch.ones_like(p[0])
    compiled = torch.compile(tangent, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(p[0], dx), tangent(p[0], dx), rtol=1e-12, atol=1e-12)


def test_checkpoint_equals_eager(p: list[Tensor]) -> None:
    x, weight, bias = leaves(p)
    y = checkpoint(masked_linear, x, weight, p[2], bias, use_reentrant=False)
    assert torch.equal(y, masked_linear(x, weight, p[2], bias))
    for a, b in zip(
        torch.autograd.grad(y.sum(), (x, weight, bias)),
        torch.autograd.grad(masked_linear(x, weight, p[2], bias).sum(), (x, weight, bias)),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_linear(p: list[Tensor], dtype: torch.dtype) -> None:
    x, weight, bias = (tensor.detach().float().requires_grad_() for tensor in leaves(p))
    full = torch.ones_like(p[2])
    with torch.autocast("cpu", dtype=dtype):
        y, dense = masked_linear(x, weight, full, bias), torch.nn.functional.linear(x, weight, bias)
        assert masked_linear(*leaves(p)[:2], full).dtype is torch.float64
    assert y.dtype is dense.dtype is dtype
    assert torch.equal(y, dense)
    got, want = (torch.autograd.grad(out.float().sum(), (x, weight, bias)) for out in (y, dense))
    for a, b in zip(got, want, strict=True):
        assert a.dtype is torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("batch", "n_in", "n_out"), [((), 5, 3), ((0,), 5, 3), ((2, 0), 5, 3), ((4,), 0, 3), ((4,), 5, 0)]
)
def test_edge_shapes(batch: tuple[int, ...], n_in: int, n_out: int) -> None:
    x = torch.ones(*batch, n_in, requires_grad=True)
    weight, bias = torch.ones(n_out, n_in, requires_grad=True), torch.full((n_out,), 2.0, requires_grad=True)
    y = masked_linear(x, weight, torch.ones(n_out, n_in, dtype=torch.bool), bias)
    assert torch.equal(y, torch.full((*batch, n_out), n_in + 2.0))
    y.sum().backward()
    for tensor in (x, weight, bias):
        assert tensor.grad is not None
        assert tensor.grad.shape == tensor.shape


def test_layouts_and_inputs_left_alone(p: list[Tensor]) -> None:
    want = masked_linear(*p[:4])
    strided = [p[0].mT.contiguous().mT, p[1].T.contiguous().T, p[2].T.contiguous().T, p[3].repeat(2)[:6]]
    before = [tensor.clone() for tensor in strided]
    torch.testing.assert_close(masked_linear(*strided), want, rtol=1e-13, atol=1e-13)
    for a, b in zip(strided, before, strict=True):
        assert torch.equal(a, b)
    rows = p[0][0, 0].expand(7, 5)
    torch.testing.assert_close(masked_linear(rows, *p[1:4])[3], want[0, 0], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", ["float", "int", "numpy", "list"])
def test_masks_of_zeros_and_ones(p: list[Tensor], kind: str) -> None:
    made: dict[str, Any] = {
        "float": p[2].double(),
        "int": p[2].int(),
        "numpy": p[2].numpy(),
        "list": p[2].tolist(),
    }
    assert torch.equal(masked_linear(p[0], p[1], made[kind], p[3]), masked_linear(*p[:4]))


def test_refusals(p: list[Tensor]) -> None:
    x, weight, mask, bias, _ = p
    cases: list[tuple[Any, type[Exception], str]] = [
        ((x[..., :4], weight, mask, bias), ValueError, r"inputs, 5; got x of shape \(4, 3, 4\)"),
        ((x, weight, mask.T, bias), ValueError, r"= \(6, 5\); got \(5, 6\), which is its transpose: pass mask.T"),
        ((x, weight, mask[:1], bias), ValueError, r"got \(1, 5\)"),
        ((x, weight, mask * 0.5, bias), ValueError, r"got 0.5 at"),
        ((x, weight, torch.full((6, 5), torch.nan), bias), ValueError, r"got nan at \(0, 0\)"),
        ((x, weight.long(), mask, bias), TypeError, r"weight must have a real floating-point dtype .*got torch.int64"),
        ((x.long(), weight, mask, bias), TypeError, r"x must have a real floating-point dtype"),
        (
            (x.float(), weight, mask, bias),
            TypeError,
            r"one dtype .*x in torch.float32 on cpu and weight in torch.float64",
        ),
        ((x.to(torch.float8_e4m3fn), weight, mask, bias), TypeError, r"float16\).*; got torch.float8_e4m3fn"),
        ((x, weight, mask, bias.float()), TypeError, r"got bias in torch.float32"),
        ((x, weight, mask, bias[:5]), ValueError, r"bias must have shape \(out,\) = \(6,\); got \(5,\)"),
        (
            (x, weight, mask.to("meta"), bias),
            ValueError,
            r"mask on meta and the weight on cpu: move the mask with .to\('cpu'\)",
        ),
        ((x.to("meta"), weight, mask, bias), ValueError, r"one device; got x in torch.float64 on meta"),
        ((x, weight[0], mask, bias), ValueError, r"weight must have 2 dimensions"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            masked_linear(*arguments)


def test_an_unchecked_mask_is_refused_inside_transforms(p: list[Tensor]) -> None:
    with pytest.raises(ValueError, match=r"must be boolean.*mask.bool\(\)"):
        torch.func.vmap(lambda mask: masked_linear(p[0], p[1], mask))(torch.ones(2, 6, 5))
    torch.compiler.reset()
    compiled = torch.compile(masked_linear, backend="eager", fullgraph=True)  # else what is refused may run uncompiled
    with pytest.raises(Exception, match=r"must be boolean"):
        compiled(p[0], p[1], p[2].double())


def test_forward_mode_within_forward_mode(p: list[Tensor]) -> None:
    x, weight, mask, bias, _ = p
    one = torch.tensor(1.0, dtype=torch.float64)

    def loss(scale: Tensor) -> Tensor:
        return masked_linear(x * scale, weight * scale, mask, bias * scale).pow(2).sum()

    jacfwd, jacrev = torch.func.jacfwd, torch.func.jacrev
    want = jacrev(jacrev(loss))(one)
    for second in (jacfwd(jacfwd(loss)), jacfwd(jacrev(loss)), jacrev(jacfwd(loss))):
        torch.testing.assert_close(second(one), want)
    want = jacrev(jacrev(jacrev(loss)))(one)
    for third in (jacfwd(jacfwd(jacfwd(loss))), jacfwd(jacrev(jacfwd(loss))), jacrev(jacfwd(jacfwd(loss)))):
        torch.testing.assert_close(third(one), want)


def test_a_torch_that_cannot_name_its_transforms(p: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    want = torch.func.jacfwd(masked_linear)(*p[:4])
    monkeypatch.setattr(_compat, "_peek", None)
    assert torch.equal(torch.func.jacfwd(masked_linear)(*p[:4]), want)
    x, weight, mask = (part.detach() for part in p[:3])

    def second(function: Any) -> Tensor:
        """The derivative of a product of x and the weight along both of them, twice."""

        def tangent(*moving: Tensor) -> Tensor:
            return torch.func.jvp(function, moving, (x, weight))[1]  # type: ignore[no-any-return]

        return torch.func.jvp(tangent, (x, weight), (x, weight))[1]  # type: ignore[no-any-return]

    twice = 2 * torch.nn.functional.linear(x, apply_mask(weight, mask))
    torch.testing.assert_close(second(lambda x, weight: masked_linear(x, weight, mask)), twice)
    pattern = SparsityPattern.from_mask(mask.numpy())
    torch.testing.assert_close(second(lambda x, weight: sparse_linear(x, weight[mask], pattern)), twice)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dims", [(0, None, None, None), (None, 0, None, 0), (0, None, 0, None), (None, None, None, 0)])
def test_vmap_rounds_half_types_once(
    dims: tuple[int | None, ...], dtype: torch.dtype, rng: np.random.Generator
) -> None:
    shapes = ((8, 64), (16, 64), (16, 64), (16,))
    drawn = [rng.standard_normal(s if d is None else (3, *s)) for s, d in zip(shapes, dims, strict=True)]
    x, weight, mask, bias = (torch.asarray(a).to(dtype) for a in drawn)
    y = torch.func.vmap(masked_linear, dims)(x, weight, mask > 0, bias)
    wide = torch.func.vmap(masked_linear, dims)(x.double(), weight.double(), mask > 0, bias.double())
    assert (y == wide.float().to(dtype)).float().mean() > 0.99


def test_arguments_that_are_no_tensors_are_refused(p: list[Tensor]) -> None:
    x, weight, mask, bias, _ = p
    for arguments, name in (
        ((x.numpy(), weight, mask, bias), "x must be a torch.Tensor; got ndarray"),
        ((None, weight, mask, bias), "x must be a torch.Tensor; got NoneType"),
        ((x, weight.tolist(), mask, bias), "weight must be a torch.Tensor; got list"),
        ((x, weight, mask, 2.0), "bias must be a torch.Tensor; got float"),
    ):
        with pytest.raises(TypeError, match=name):
            masked_linear(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"a mask must be a dense tensor; got one of layout torch.sparse_coo"):
        masked_linear(x, weight, mask.to_sparse(), bias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_keep_bits_is_apply_mask(dtype: torch.dtype, rng: np.random.Generator) -> None:
    values = torch.asarray(rng.standard_normal((33, 47))).to(dtype)
    values[::3, ::2] = torch.nan
    values[1::3, ::2] = -0.0
    values[2::3, ::5] = -torch.inf
    mask = torch.asarray(rng.random((33, 47)) > 0.5)
    for tensor, live in ((values, mask), (values.T, mask.T), (values[::2, 1:], mask[::2, 1:]), (values[:0], mask[:0])):
        with torch.no_grad():
            got = keep_bits(tensor, live)
        kind = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
        assert torch.equal(got.view(kind), apply_mask(tensor, live).contiguous().view(kind))
    in_place = values.clone()
    assert torch.equal(zero_masked(in_place, mask).view(kind), apply_mask(values, mask).view(kind))
