"""The spec, against loops that a person can check, in every namespace that it promises to run in."""

from __future__ import annotations

from typing import Any

import array_api_strict
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from helpers import Problem, problem
from maskedlinear import spec

NAMESPACES = {
    "numpy": np.asarray,
    "torch": torch.asarray,
    "jax": jnp.asarray,
    "array_api_strict": array_api_strict.asarray,
}

pytestmark = pytest.mark.usefixtures("strict_jax")


@pytest.fixture(params=NAMESPACES)
def send(request: pytest.FixtureRequest) -> Any:
    return NAMESPACES[request.param]


@pytest.fixture
def p(rng: np.random.Generator) -> Problem:
    return problem(rng)


def back(array: Any) -> np.ndarray[Any, Any]:
    return np.asarray(array)


def loops(p: Problem) -> dict[str, np.ndarray[Any, Any]]:
    """The spec again, connection by connection."""
    y = np.zeros((4, 3, 6))
    dx, dw, db = np.zeros_like(p.x), np.zeros_like(p.weight), np.zeros_like(p.bias)
    for b in np.ndindex(4, 3):
        y[b] = p.bias
        db += p.g[b]
        for row, column in zip(*np.nonzero(p.mask), strict=True):
            y[b][row] += p.x[b][column] * p.weight[row, column]
            dx[b][column] += p.g[b][row] * p.weight[row, column]
            dw[row, column] += p.g[b][row] * p.x[b][column]
    return {"y": y, "dx": dx, "dw": dw, "db": db}


def test_forward_and_vjp(send: Any, p: Problem) -> None:
    want = loops(p)
    x, weight, mask, bias, g = map(send, p)
    y = spec.forward(x, weight, mask, bias)
    assert type(y) is type(x)
    np.testing.assert_allclose(back(y), want["y"], rtol=1e-13, atol=1e-13)
    got = spec.vjp(x, weight, mask, bias, g)
    np.testing.assert_allclose(back(got.x), want["dx"], rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(back(got.weight), want["dw"], rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(back(got.bias), want["db"], rtol=1e-13, atol=1e-13)


def test_jvp_is_the_adjoint_of_vjp(send: Any, p: Problem, rng: np.random.Generator) -> None:
    tangents = [rng.standard_normal(a.shape) for a in (p.x, p.weight, p.bias)]
    y, dy = spec.jvp(*map(send, p[:4]), *map(send, tangents))
    np.testing.assert_array_equal(back(y), back(spec.forward(*map(send, p[:4]))))
    pulled = spec.vjp(*map(send, p))
    forward = (back(dy) * p.g).sum()
    backward = sum((back(c) * t).sum() for c, t in zip(pulled, tangents, strict=True))
    np.testing.assert_allclose(forward, backward, rtol=1e-12)


def test_jvp_is_the_limit_of_differences(p: Problem, rng: np.random.Generator) -> None:
    tangents = [rng.standard_normal(a.shape) for a in (p.x, p.weight, p.bias)]
    h = 1e-6
    plus = spec.forward(p.x + h * tangents[0], p.weight + h * tangents[1], p.mask, p.bias + h * tangents[2])
    minus = spec.forward(p.x - h * tangents[0], p.weight - h * tangents[1], p.mask, p.bias - h * tangents[2])
    np.testing.assert_allclose(spec.jvp(*p[:4], *tangents)[1], (plus - minus) / (2 * h), rtol=1e-7, atol=1e-7)


def test_a_tangent_of_none_is_zero(p: Problem) -> None:
    for index, name in enumerate(("dx", "dweight", "dbias")):
        tangent = p[(0, 1, 3)[index]]
        full = [np.zeros_like(a) for a in (p.x, p.weight, p.bias)]
        full[index] = tangent
        np.testing.assert_allclose(spec.jvp(*p[:4], **{name: tangent})[1], spec.jvp(*p[:4], *full)[1], rtol=1e-14)


def test_hvp_is_the_derivative_of_value_and_gradients(send: Any, p: Problem, rng: np.random.Generator) -> None:
    along = Problem(*(a if a.dtype == bool else rng.standard_normal(a.shape) for a in p))

    def moved(by: float) -> list[np.ndarray[Any, Any]]:
        x, weight, mask, bias, g = (send(a if a.dtype == bool else a + by * b) for a, b in zip(p, along, strict=True))
        return [back(a) for a in (*spec.vjp(x, weight, mask, bias, g), spec.forward(x, weight, mask, bias))]

    arrays, (dx, dweight, _, dbias, dg) = map(send, p), map(send, along)
    x, weight, mask, bias, g = arrays
    got = spec.hvp(x, weight, mask, bias, g, dx, dweight, dbias, dg)
    for a, ahead, behind in zip(got, moved(0.5), moved(-0.5), strict=True):
        np.testing.assert_allclose(back(a), ahead - behind, rtol=1e-12, atol=1e-12)  # exact: all are quadratic
    assert not back(got.weight)[~p.mask].any()
    assert spec.hvp(x, weight, mask, None, g, dx, dweight, None, dg).bias is None
    with pytest.raises(ValueError, match=r"g must have shape \(4, 3, 6\); got \(4, 3, 5\)"):
        spec.hvp(x, weight, mask, bias, g, dx, dweight, dbias, dx)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_nothing_under_the_mask_leaks(send: Any, p: Problem, poison: float) -> None:
    dirty = send(np.where(p.mask, p.weight, poison))
    x, weight, mask, bias, g = map(send, p)
    np.testing.assert_array_equal(back(spec.forward(x, dirty, mask, bias)), back(spec.forward(x, weight, mask, bias)))
    got, want = spec.vjp(x, dirty, mask, bias, g), spec.vjp(x, weight, mask, bias, g)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(back(a), back(b))
    assert not back(spec.masked_weight(dirty, mask))[~p.mask].any()


def test_masked_gradient_is_positive_zero_for_nan(send: Any, p: Problem) -> None:
    x = send(np.full_like(p.x, np.nan))
    dw = back(spec.vjp(x, *map(send, p[1:])).weight)
    assert (dw[~p.mask] == 0).all()
    assert not np.signbit(dw[~p.mask]).any()
    assert np.isnan(dw[p.mask]).all()


@pytest.mark.parametrize(
    ("batch", "n_in", "n_out"), [((), 5, 3), ((0,), 5, 3), ((2, 0), 5, 3), ((4,), 0, 3), ((4,), 5, 0)]
)
def test_edge_shapes(send: Any, batch: tuple[int, ...], n_in: int, n_out: int) -> None:
    x, weight, bias = np.ones((*batch, n_in)), np.ones((n_out, n_in)), np.full(n_out, 2.0)
    mask = np.ones((n_out, n_in), bool)
    y = spec.forward(*map(send, (x, weight, mask, bias)))
    np.testing.assert_array_equal(back(y), np.full((*batch, n_out), n_in + 2.0))
    got = spec.vjp(*map(send, (x, weight, mask, bias)), y)
    assert (tuple(got.x.shape), tuple(got.weight.shape), tuple(got.bias.shape)) == (x.shape, weight.shape, bias.shape)


def test_without_bias(p: Problem) -> None:
    assert spec.vjp(p.x, p.weight, p.mask, None, p.g).bias is None
    np.testing.assert_allclose(spec.forward(p.x, p.weight, p.mask) + p.bias, spec.forward(*p[:4]))


def test_errors_name_rule_value_and_remedy(p: Problem) -> None:
    with pytest.raises(ValueError, match=r"last dimension of x must be .* 5; got x of shape \(4, 3, 6\).*transposed"):
        spec.forward(p.g, p.weight, p.mask)
    with pytest.raises(ValueError, match=r"bias must have shape \(out,\) = \(6,\); got \(5,\)"):
        spec.forward(p.x, p.weight, p.mask, np.ones(5))
    with pytest.raises(ValueError, match=r"weight must have 2 dimensions"):
        spec.forward(p.x, p.weight[0], p.mask)
    with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., in\)"):
        spec.forward(np.float64(1.0)[()] * np.ones(()), p.weight, p.mask)
    with pytest.raises(TypeError, match=r"weight must have a real floating-point dtype .*; got int64: convert"):
        spec.forward(p.x, np.ones((6, 5), np.int64), p.mask)
    with pytest.raises(ValueError, match=r"\(6, 5\); got \(5, 6\), which is its transpose: pass mask.T"):
        spec.forward(p.x, p.weight, p.mask.T)
    with pytest.raises(ValueError, match=r"g must have shape \(4, 3, 6\); got \(4, 3, 5\)"):
        spec.vjp(*p[:4], p.x)
    with pytest.raises(ValueError, match=r"dx must have shape"):
        spec.jvp(*p[:4], dx=p.g)
    with pytest.raises(ValueError, match=r"dbias was given for a layer without bias"):
        spec.jvp(*p[:3], None, dbias=p.bias)
