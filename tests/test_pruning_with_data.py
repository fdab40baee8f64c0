"""Scores and methods that need data, against the papers' formulas in plain loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from maskedlinear import pruning
from maskedlinear.pruning import obs, obs_update, sparsegpt

Array = NDArray[np.float64]


def problem(out: int = 6, in_: int = 12, rows: int = 40, seed: int = 0) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, in_)) @ rng.standard_normal((in_, in_))
    return rng.standard_normal((out, in_)), x, x.T @ x


def surgeon(weight: Array, inverse: Array, place: int) -> Array:
    """The optimal brain surgeon's step: one weight goes, the others make up for it."""
    new = weight - weight[place] / inverse[place, place] * inverse[:, place]
    new[place] = 0
    return new


def naive_sparsegpt(weight: Array, hessian: Array, sparsity: float, size: int, m: int = 0) -> tuple[Any, Array]:
    """Algorithm 1 of the paper, with an inverse of its own for the columns that are left at each column."""
    count = weight.shape[1]
    hessian = hessian + 0.01 * np.diag(hessian).mean() * np.eye(count)
    inverses = [np.linalg.inv(hessian[column:, column:]) for column in range(count)]
    new, mask = weight.copy(), np.ones(weight.shape, bool)
    width = m or size
    for column in range(count):
        if column % width == 0:
            places = list(range(column, min(column + width, count)))
            saliency = np.array([new[:, j] ** 2 / inverses[j][0, 0] for j in places]).T
            if m:
                mask[:, places] = saliency.argsort(axis=1).argsort(axis=1) >= m // 2
            else:
                mask[:, places] = saliency > np.sort(saliency, axis=None)[int(saliency.size * sparsity)]
        for row in np.flatnonzero(~mask[:, column]):
            new[row, column:] = surgeon(new[row, column:], inverses[column], 0)
    return mask, new


@pytest.mark.parametrize("m", [0, 4])
def test_sparsegpt_is_the_papers_algorithm(m: int) -> None:
    weight, x, hessian = problem()
    given = weight.copy()
    chosen: dict[str, Any] = {"n_of_m": (m // 2, m)} if m else {"sparsity": 0.5}
    mask, new = sparsegpt(weight, hessian, block_size=4, **chosen)
    expected, updated = naive_sparsegpt(weight, hessian, 0.5, 4, m)
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_allclose(new, updated, atol=1e-9)
    np.testing.assert_array_equal(weight, given)
    assert not new[~mask].any()
    assert np.square(x @ (new - weight).T).sum() < 0.7 * np.square(x @ (weight * mask - weight).T).sum()


def test_sparsegpt_keeps_what_is_masked_and_takes_dead_inputs_first() -> None:
    weight, x, _ = problem()
    x[:, 3] = 0
    so_far = pruning.prune(np.abs(weight), sparsity=0.2)
    mask, _ = sparsegpt(weight, x.T @ x, 0.5, mask=so_far)
    assert not mask[~so_far].any()
    assert not mask[:, 3].any()
    assert (~mask).sum() == weight.size // 2 + 1
    unchanged, same = sparsegpt(weight, x.T @ x, 0, mask=np.ones_like(so_far))
    assert unchanged.all()
    np.testing.assert_array_equal(np.delete(same - weight, 3, axis=1), 0)
    for wrong, says in (((0.1,), "only removes"), ((0.5, (1, 2)), "exactly one"), ((None, (1, 5)), "multiple")):
        with pytest.raises(ValueError, match=says):
            sparsegpt(weight, x.T @ x, wrong[0], n_of_m=wrong[1] if len(wrong) > 1 else None, mask=so_far)
    with pytest.raises(ValueError, match="positive definite"):
        sparsegpt(weight, x[:2].T @ x[:2], 0.5, damping=0)
    with pytest.raises(ValueError, match="finite"):
        sparsegpt(weight * np.nan, x.T @ x, 0.5)


def test_obs_takes_the_steps_of_the_surgeon() -> None:
    weight, x, hessian = problem()
    losses, traces, orders = [], [], []
    for row in weight:
        rest, left, trace, order, cost = row.copy(), list(range(12)), [row.copy()], [], []
        while left:
            inverse = np.linalg.inv(hessian[np.ix_(left, left)])
            saliency = rest[left] ** 2 / np.diag(inverse) / 2
            at = int(saliency.argmin())
            cost.append(saliency[at])
            rest[left] = surgeon(rest[left], inverse, at)
            order.append(left.pop(at))
            trace.append(rest.copy())
        losses.append(cost), traces.append(trace), orders.append(order)
    lowest = np.argsort(losses, axis=None)[: weight.size // 2]
    taken = np.bincount(lowest // 12, minlength=6)
    mask, new = obs(weight, hessian, 0.5)
    for row, number in enumerate(taken):
        assert set(np.flatnonzero(~mask[row])) == set(orders[row][:number])
        np.testing.assert_allclose(new[row], traces[row][number], atol=1e-8)
    np.testing.assert_allclose(obs_update(weight, hessian, mask), new)
    alone = np.zeros_like(new)
    for row, live in enumerate(mask):
        alone[row, live] = np.linalg.lstsq(x[:, live], x @ weight[row], rcond=None)[0]
    np.testing.assert_allclose(new, alone, atol=1e-8)
    so_far = pruning.prune(np.abs(weight), sparsity=0.25)
    further, _ = obs(weight, hessian, 0.5, mask=so_far)
    assert not further[~so_far].any()
    assert (~further).sum() == weight.size // 2
    with pytest.raises(ValueError, match="only removes"):
        obs(weight, hessian, 0.1, mask=so_far)


def test_scores_are_the_papers_products_and_refuse_what_does_not_fit() -> None:
    weight, x, hessian = problem()
    norms = np.sqrt(np.square(x).sum(axis=0))
    scores = pruning.wanda(weight, norms)
    assert scores[2, 5] == abs(weight[2, 5]) * norms[5]
    gradient = weight @ hessian
    np.testing.assert_array_equal(pruning.synflow(weight, gradient), np.abs(weight * gradient))
    np.testing.assert_array_equal(pruning.obd(weight, gradient), gradient * weight**2 / 2)
    with pytest.raises(ValueError, match="squares"):
        pruning.fisher(weight, gradient)
    with pytest.raises(ValueError, match="norms of its inputs"):
        pruning.wanda(weight.T, norms)
    with pytest.raises(ValueError, match="weight's shape"):
        pruning.grasp(weight, gradient.T)
    # Of the loss w·A·w / 2 with g = A w the flow is ‖g‖²; to first order, w_q out, it loses 2 w_q (A g)_q.
    w, step = weight[0], 1e-6
    flow = [np.square(hessian @ (w * (1 - step * (np.arange(12) == q)))).sum() for q in range(12)]
    lost = (np.square(hessian @ w).sum() - np.array(flow)) / (2 * step)
    np.testing.assert_allclose(pruning.grasp(w, hessian @ (hessian @ w)), lost, rtol=1e-3)


def test_rows_are_compared_by_themselves() -> None:
    scores = np.array([[3.0, 1.0, 1.0, 2.0], [9.0, 8.0, 7.0, 6.0]])
    expected = [[True, False, False, True], [True, True, False, False]]
    np.testing.assert_array_equal(pruning.prune(scores, sparsity=0.5, scope="row"), expected)
    so_far = np.array([[False, True, True, True], [True] * 4])
    assert pruning.prune(scores, sparsity=0.5, scope="row", masks=so_far)[0].tolist() == [False, False, True, True]
    with pytest.raises(ValueError, match="only removes"):
        pruning.prune(scores, num_zeros=0, scope="row", masks=so_far)
    with pytest.raises(ValueError, match="leaves 1 connections to prune of row 0"):
        pruning.prune(scores, sparsity=0.5, scope="row", keep_at_least={"row": 3})
    kept = pruning.prune(scores, sparsity=1, scope="row", on_empty="keep")
    assert kept.tolist() == [[False] * 4, [True, False, False, False]]
