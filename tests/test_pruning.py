"""Pruning: exact counts against sorting by hand, the same from every framework, every refusal; and what it costs."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from helpers import python
from maskedlinear import masks, pruning
from maskedlinear.pattern import SparsityPattern
from maskedlinear.pruning import CubicSchedule, LinearSchedule, PolynomialSchedule, _growth, _select

values = st.one_of(st.sampled_from([0.0, -0.0, 1.0, math.inf, -math.inf, 5e-324, 1e-45]), st.floats(-3, 3, width=32))
layers = st.lists(
    nps.arrays(
        st.sampled_from([np.float32, np.float64]),
        nps.array_shapes(min_dims=2, max_dims=2, max_side=6),
        elements=st.floats(-3, 3, width=32),
    ),
    min_size=1,
    max_size=3,
)


def by_hand(scores: list[Any], before: list[Any], zeros: int) -> list[Any]:
    """Sort all places, and clear from the first on until there are so many zeros."""
    found = [mask.copy() for mask in before]
    live = [
        (float(s[place]), k, i)
        for k, s in enumerate(scores)
        for i, place in enumerate(np.ndindex(s.shape))
        if before[k][place]
    ]
    left = zeros - sum(int((~mask).sum()) for mask in before)
    for _, k, i in sorted(live, key=lambda entry: (entry[0] + 0.0, entry[1], entry[2]))[:left]:
        found[k].reshape(-1)[i] = False
    return found


@given(scores=layers, share=st.floats(0, 1), data=st.data())
def test_the_lowest_scores_go_exactly_as_many_as_asked_for(
    scores: list[Any], share: float, data: st.DataObject
) -> None:
    before = [
        np.array(data.draw(st.lists(st.booleans(), min_size=s.size, max_size=s.size))).reshape(s.shape) for s in scores
    ]
    masked, size = sum(int((~mask).sum()) for mask in before), sum(s.size for s in scores)
    zeros = masked + round(share * (size - masked))
    found = pruning.prune(scores, num_zeros=zeros, masks=before, on_empty="allow")
    for got, wanted in zip(found, by_hand(scores, before, zeros), strict=True):
        assert (got == wanted).all()
    assert sum(int((~mask).sum()) for mask in found) == zeros


@given(nps.arrays(np.float64, (5, 7), elements=values), st.integers(0, 35))
def test_floats_are_ordered_as_floats_are(scores: Any, zeros: int) -> None:
    wanted = by_hand([scores], [np.ones(scores.shape, bool)], zeros)[0]
    assert (pruning.prune(scores, num_zeros=zeros, on_empty="allow") == wanted).all()


def test_selection_in_blocks_is_the_same(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    scores = [rng.integers(0, 4, (40, 50)).astype(np.float32), rng.standard_normal((30, 20)).astype(np.float32)]
    before = [rng.random(s.shape) < 0.8 for s in scores]
    monkeypatch.setattr(_select, "_BLOCK", 77)
    for zeros in (700, 1500, 2600):
        found = pruning.prune(scores, num_zeros=zeros, masks=before, on_empty="allow")
        assert all((got == wanted).all() for got, wanted in zip(found, by_hand(scores, before, zeros), strict=True))


def test_long_work_says_how_far_it_is(capsys: pytest.CaptureFixture[str], rng: np.random.Generator) -> None:
    scores = [rng.standard_normal((40, 50)), rng.standard_normal((30, 20))]
    for scope in ("layer", "global"):
        told: list[float] = []
        pruning.prune(scores, sparsity=0.5, scope=scope, progress=told.append)  # type: ignore[arg-type]
        assert told == sorted(told)
        assert len(told) > 5
        assert told[-1] == 1
    pruning.prune(scores, sparsity=0.5, progress=True)
    assert capsys.readouterr().err.endswith("pruning:  99 %\rpruning: 100 %\n")
    pruning.prune(scores, sparsity=0.5)
    assert capsys.readouterr().err == ""
    with pytest.raises(TypeError, match="progress must be True, False or a function of a fraction; got 3"):
        pruning.prune(scores, sparsity=0.5, progress=3)  # type: ignore[arg-type]


def test_scopes_share_the_zeros_as_they_say(rng: np.random.Generator) -> None:
    scores = {"small": np.abs(rng.standard_normal((10, 20))), "large": 2 + np.abs(rng.standard_normal((100, 50)))}
    zeros = {}
    for scope in ("layer", "global", "erdos_renyi"):
        found = pruning.prune(scores, sparsity=0.5, scope=scope, on_empty="allow")  # type: ignore[arg-type]
        zeros[scope] = {name: int((~mask).sum()) for name, mask in found.items()}
    assert zeros["layer"] == {"small": 100, "large": 2500}
    assert zeros["global"] == {"small": 200, "large": 2400}
    assert list(zeros["erdos_renyi"].values()) == masks.erdos_renyi_num_zeros([(10, 20), (100, 50)], 0.5)


def test_shares_by_erdos_renyi_only_shrink(rng: np.random.Generator) -> None:
    scores = [rng.random(shape) for shape in ((6, 6), (6, 6), (2, 2))]
    found = None
    for zeros in range(40, 75):  # at 66 the smallest layer's share grows, as largest remainders do
        found = pruning.prune(scores, sparsity=zeros / 76, masks=found, scope="erdos_renyi", on_empty="allow")
        assert sum(int((~mask).sum()) for mask in found) == math.floor(Fraction(str(zeros / 76)) * 76)
    with pytest.raises(ValueError, match="pruning only removes connections"):
        pruning.prune(scores, sparsity=0.1, masks=found, scope="erdos_renyi")
    assert int(pruning.prune(scores, num_zeros=30, scope="erdos_renyi")[2].sum()) == 4


def test_random_scores_give_the_random_mask() -> None:
    for sparsity in (0.0, 0.3, 0.99):
        found = pruning.prune(pruning.random_scores((37, 53), seed=9), sparsity=sparsity)
        assert (found == masks.random((37, 53), sparsity=sparsity, seed=9)).all()


def test_every_framework_gives_the_same_scores_and_masks(rng: np.random.Generator) -> None:
    w, g = (rng.standard_normal((20, 30)).astype(np.float32) for _ in range(2))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tw, tg = (torch.from_numpy(a).to(dtype).requires_grad_() for a in (w, g))
        jw, jg = (jnp.asarray(t.detach().float().numpy()).astype(str(dtype).removeprefix("torch.")) for t in (tw, tg))
        nw, ng = (t.detach().float().numpy() for t in (tw, tg))
        for score in (pruning.snip, pruning.taylor, pruning.movement):
            wanted = score(nw, ng)
            for one, other in ((tw, tg), (jw, jg)):
                assert (score(one, other) == wanted).all()
        mask = pruning.prune([pruning.magnitude(nw)], sparsity=0.7)[0]
        for given_ in (tw, jw):
            assert (pruning.prune([pruning.magnitude(given_)], sparsity=0.7)[0] == mask).all()
        moved = pruning.regrow(mask, nw, 0.3, ng)
        assert (pruning.regrow(torch.from_numpy(mask), tw, 0.3, tg) == moved).all()
        assert (pruning.regrow(jnp.asarray(mask), jw, 0.3, jg) == moved).all()
        for side in ("outputs", "inputs"):
            assert (pruning.node_norm(tw, side, 2) == pruning.node_norm(jw, side, 2)).all()
            assert (pruning.node_taylor(tw, tg, side) == pruning.node_taylor(jw, jg, side)).all()


def test_scores_are_their_formulas() -> None:
    w, g = np.array([[1.0, -2.0]]), np.array([[3.0, 0.5]])
    assert pruning.magnitude(w).tolist() == [[1, 2]]
    assert pruning.snip(w, g).tolist() == [[3, 1]]
    assert pruning.taylor(w, g).tolist() == [[9, 1]]
    assert pruning.movement(w, g).tolist() == [[-3, 1]]
    assert pruning.movement(w, g, pruning.movement(w, g)).tolist() == [[-6, 2]]
    assert pruning.node_norm(w).tolist() == [3]
    assert pruning.node_norm(w, "inputs", 2).tolist() == [1, 2]
    assert pruning.node_taylor(w, g).tolist() == [4]


def test_blocks_and_groups() -> None:
    scores = np.array([[1.0, 1, 0, 9], [1, 1, 0, 0]])
    assert pruning.prune(scores, num_zeros=1, block=(2, 2)).tolist() == [[False, False, True, True]] * 2
    assert pruning.n_of_m(scores, 1, 2).tolist() == [[False, True, False, True], [False, True, False, True]]
    assert pruning.n_of_m([scores], 2, 4)[0].sum() == 4
    assert pruning.threshold(scores, 1.0).tolist() == [[True, True, False, True], [True, True, False, False]]
    before = np.array([[False, False, True, True]] * 2)
    assert pruning.prune(scores, num_zeros=1, block=(2, 2), masks=before).tolist() == before.tolist()


def test_rows_are_pruned_alike_as_by_wanda(rng: np.random.Generator) -> None:
    scores = rng.integers(0, 6, (40, 30)).astype(np.float32)
    found = pruning.prune(scores, sparsity=0.55, scope="row")
    theirs = torch.ones(40, 30, dtype=torch.bool)  # Wanda: the first of a stable sort of each row
    gone = torch.sort(torch.from_numpy(scores), dim=-1, stable=True)[1][:, : int(30 * 0.55)]
    theirs.scatter_(1, gone, False)
    assert (found == theirs.numpy()).all()
    more = pruning.prune([scores, scores[:, :20]], sparsity=0.7, masks=[found, np.ones((40, 20), bool)], scope="row")
    assert [(30 - more[0].sum(1)).tolist(), (20 - more[1].sum(1)).tolist()] == [[21] * 40, [14] * 40]
    assert not (more[0] & ~found).any()
    few = pruning.prune(scores, num_zeros=29, scope="row", keep_at_least={"row": 2}, on_empty="keep")
    assert (few.sum(1) == 2).all()
    with pytest.raises(ValueError, match="got 16 masked ones of row 0, where 3 were asked for"):
        pruning.prune(scores, num_zeros=3, masks=found, scope="row")
    with pytest.raises(ValueError, match="leaves 28 connections to prune of row 0; got 29"):
        pruning.prune(scores, num_zeros=29, scope="row", keep_at_least={"row": 2})
    with pytest.raises(ValueError, match="scope must be 'global', 'layer', 'row', 'erdos_renyi' or 'uniform_plus'"):
        pruning.prune(scores, sparsity=0.5, scope="column")  # type: ignore[arg-type]


def test_uniform_plus_keeps_the_first_layer_and_a_fifth_of_the_last(rng: np.random.Generator) -> None:
    layers = [rng.standard_normal(shape) for shape in ((10, 10), (20, 10), (5, 20))]
    zeros = [int((~mask).sum()) for mask in pruning.prune(layers, sparsity=0.3, scope="uniform_plus")]
    assert zeros == masks.uniform_plus_num_zeros([(10, 10), (20, 10), (5, 20)], 0.3) == [0, 80, 40]
    assert masks.uniform_plus_num_zeros([(10, 10), (20, 10), (5, 20)], 0.675) == [0, 190, 80]
    with pytest.raises(ValueError, match="at most 280 of 400 connections can go; got 300"):
        pruning.prune(layers, sparsity=0.75, scope="uniform_plus")


def test_schedules_of_every_power() -> None:
    how: Any = {"final": 0.8, "begin": 10, "end": 30, "every": 5, "initial": 0.2}
    cubic, linear, square = CubicSchedule(**how), LinearSchedule(**how), PolynomialSchedule(**how, power=2)
    for step in range(40):
        assert PolynomialSchedule(**how)(step) == cubic(step)
    assert [round(linear(step), 12) for step in (0, 10, 15, 19, 20, 30, 50)] == [0.2, 0.2, 0.35, 0.35, 0.5, 0.8, 0.8]
    assert square(20) == pytest.approx(0.8 - 0.6 * 0.5**2)
    assert linear.steps() == square.steps() == cubic.steps() == [10, 15, 20, 25, 30]
    for power in (0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match="power must be above 0 and finite"):
            PolynomialSchedule(**how, power=power)


def test_nodes() -> None:
    kept = pruning.prune_nodes([3.0, 1.0, 1.0, 2.0], num_zeros=1)
    assert kept.tolist() == [True, False, True, True]
    assert pruning.prune_nodes(torch.tensor([3.0, 1.0, 1.0, 2.0]), sparsity=0.5).tolist() == [True, False, False, True]
    mask = pruning.node_mask((4, 2), outputs=kept, inputs=np.array([True, False]))
    assert mask.tolist() == [[True, False], [False, False], [True, False], [True, False]]


@given(st.integers(0, 2**32), st.floats(0, 1))
@example(1, 1 / 3)  # of 57, in floating-point arithmetic 19
def test_connections_move_and_stay_as_many(seed: int, fraction: float) -> None:
    generator = np.random.default_rng(seed)
    weight, gradient = generator.standard_normal((2, 9, 11))
    mask = generator.random((9, 11)) < generator.random()
    live = int(mask.sum())
    dropped = math.floor(Fraction(str(fraction)) * live) if live < 99 else 0  # the decimal that it prints as
    moved = min(dropped, 99 - live)
    for given_ in (gradient, None):
        found = pruning.regrow(mask, weight, fraction, given_, seed=seed, exclude_dropped=True)
        assert int(found.sum()) == live
        gone, come = mask & ~found, found & ~mask
        assert int(gone.sum()) == int(come.sum()) == moved
        if moved:
            assert np.abs(weight[gone]).max() <= np.abs(weight[mask & found]).min(initial=np.inf)
        if moved and given_ is not None:
            assert np.abs(gradient[come]).min() >= np.abs(gradient[~mask & ~found]).max(initial=0)
        found = pruning.regrow(mask, weight, fraction, given_, seed=seed)
        assert (found == by_the_authors_rule(mask, weight, dropped, given_, found)).all()


def by_the_authors_rule(mask: Any, weight: Any, dropped: int, gradient: Any, found: Any) -> Any:
    """Return the mask as google-research/rigl words the rule: the first of all by |w|, then of all others by growth scores.

    Growth at random has no scores to compare with: whatever was ``found`` counts as the largest.
    """
    kept = np.zeros(mask.size, bool)
    kept[np.argsort(-np.abs(mask * weight).reshape(-1))[: int(mask.sum()) - dropped]] = True
    scores = (found if gradient is None else np.abs(gradient)).reshape(-1).astype(float)
    grown = np.argsort(-np.where(kept, scores.min() - 1, scores))[:dropped]
    kept[grown] = True
    return kept.reshape(mask.shape)


def test_what_is_dropped_may_come_back_as_in_rigl_and_set() -> None:
    mask, weight, gradient = [[1, 1, 0, 0]], [[0.1, 5, 0, 0]], [[9.0, 0, 1, 2]]
    assert pruning.regrow(mask, weight, 0.5, gradient).tolist() == [[True, True, False, False]]
    assert pruning.regrow(mask, weight, 0.5, gradient, exclude_dropped=True).tolist() == [[False, True, False, True]]
    pattern = SparsityPattern.from_mask(np.array(mask, bool))
    found, source = pruning.regrow_pattern(pattern, [0.1, 5], 0.5, lambda start, stop: np.array(gradient)[start:stop])
    assert (found == pattern, source.tolist()) == (True, [0, 1]), "what is back keeps its value"
    grown = sum(pruning.regrow(mask, weight, 0.5, seed=seed) for seed in range(90))[0]
    assert grown[1] == 90
    assert min(grown[[0, 2, 3]]) > 15, "the place that was just dropped is one of the three"
    full = np.ones((2, 3), bool)
    assert pruning.regrow(full, full * 1.0, 0.5).all()


@given(st.integers(0, 2**32), st.floats(0, 1))
def test_a_pattern_moves_as_its_mask_does(seed: int, fraction: float) -> None:
    generator = np.random.default_rng(seed)
    weight, gradient = generator.integers(-2, 3, (2, 9, 11)).astype(float)
    mask = generator.random((9, 11)) < generator.random()
    pattern = SparsityPattern.from_mask(mask)
    for full in (gradient, None):
        blocks = None if full is None else lambda start, stop: full[start:stop]  # noqa: B023
        found, source = pruning.regrow_pattern(pattern, weight[mask], fraction, blocks, seed=seed)
        assert (found.to_mask() == pruning.regrow(mask, weight, fraction, full, seed=seed)).all()
        kept = source >= 0
        rows, columns = found.rows[kept], found.indices[kept]
        assert (weight[mask][source[kept]] == weight[rows, columns]).all()
        assert found.nnz == pattern.nnz


def test_growth_in_blocks_is_the_same(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    mask, weight, gradient = rng.random((40, 50)) < 0.2, rng.standard_normal((40, 50)), rng.integers(0, 9, (40, 50))
    whole = pruning.regrow(mask, weight, 0.4, gradient.astype(float))
    scores = np.where(whole & mask, -1, gradient).reshape(-1)  # of equal ones, the larger places come
    monkeypatch.setattr(_growth, "_BLOCK", 170)
    assert (pruning.regrow(mask, weight, 0.4, gradient.astype(float)) == whole).all()
    come = np.flatnonzero(whole & ~mask)
    assert (come == np.sort(np.lexsort((np.arange(2000), scores))[2000 - len(come) :])).all()
    for dtype in (np.float16, np.float32, np.int64):
        assert (pruning.regrow(mask, weight, 0.4, gradient.astype(dtype)) == whole).all()
    gradient = gradient.astype(float)
    gradient[3, 7] = gradient[30, 1] = np.nan
    with pytest.raises(ValueError, match=r"a gradient must hold numbers; got NaN at \(3, 7\)"):
        pruning.regrow(mask, weight, 0.4, gradient)
    monkeypatch.setattr(_growth, "_DRAWS", 3)
    grown = pruning.regrow(mask, weight, 0.4, seed=5)
    assert int(grown.sum()) == int(mask.sum())


def test_growth_at_random_reaches_all_of_a_matrix_too_large_to_exist() -> None:
    to, of = np.arange(1000) * 99, np.arange(1000)
    pattern, _ = SparsityPattern.from_edges(to, of, (100_000, 100_000))
    found, source = pruning.regrow_pattern(pattern, np.arange(1000.0), 0.5, seed=1)
    come = source < 0
    assert int(come.sum()) == 500
    assert 0.4 < found.rows[come].mean() / 1e5 < 0.6
    assert 0.4 < found.indices[come].mean() / 1e5 < 0.6


def test_schedules() -> None:
    cubic = pruning.CubicSchedule(0.9, begin=10, end=110, every=10, initial=0.1)
    assert [cubic(step) for step in (0, 10, 110, 200)] == [0.1, pytest.approx(0.1), 0.9, 0.9]
    assert cubic(60) == pytest.approx(0.9 - 0.8 / 8)
    assert cubic(69) == cubic(60)
    assert [step for step in range(130) if cubic.due(step)] == [*range(10, 111, 10)]
    rounds = pruning.GeometricSchedule(0.992, 3)
    assert [rounds(i) for i in range(5)] == pytest.approx([0, 0.8, 0.96, 0.992, 0.992])
    assert pruning.GeometricSchedule(0.5)(1) == 0.5
    assert [pruning.cosine_decay(step, 100) for step in (0, 50, 100, 150)] == pytest.approx([0.3, 0.15, 0, 0])


def test_a_layer_of_no_size_is_let_through_if_that_is_allowed() -> None:
    found = pruning.prune({"a": np.zeros((0, 3)), "b": SCORES}, sparsity=0.5, on_empty="allow")
    assert found["a"].shape == (0, 3)
    assert int(found["b"].sum()) == 3


SCORES = np.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pruning.prune(SCORES, sparsity=1.5), ValueError, r"in \[0, 1\]; got 1\.5"),
        (lambda: pruning.prune(SCORES, sparsity=math.nan), ValueError, "got nan"),
        (lambda: pruning.prune(SCORES, num_zeros=7), ValueError, "from 0 to the mask's size, 6; got 7"),
        (lambda: pruning.prune(SCORES), ValueError, "exactly one of sparsity and num_zeros"),
        (lambda: pruning.prune([], sparsity=0.5), ValueError, "at least one layer"),
        (
            lambda: pruning.prune({"a": SCORES, "b": SCORES * np.nan}, sparsity=0.5),
            ValueError,
            r"got NaN at \(0, 0\) of b",
        ),
        (
            lambda: pruning.prune([SCORES, 1 + SCORES[0]], sparsity=0.5),
            ValueError,
            r"\(out, in\); got \(3,\) of layer 1",
        ),
        (lambda: pruning.prune(["no"], sparsity=0.5), TypeError, "arrays of real numbers"),
        (lambda: pruning.prune([1j * SCORES], sparsity=0.5), TypeError, "complex"),
        (lambda: pruning.prune(SCORES, sparsity=1.0), ValueError, "must keep a connection; all would be gone:"),
        (lambda: pruning.prune({"a": SCORES, "b": SCORES + 9}, sparsity=0.5), ValueError, "all would be gone of a:"),
        (lambda: pruning.prune(SCORES, sparsity=0.5, scope="all"), ValueError, "scope must be"),  # type: ignore[arg-type]
        (lambda: pruning.prune(SCORES, sparsity=0.5, on_empty="no"), ValueError, "on_empty must be"),  # type: ignore[arg-type]
        (lambda: pruning.n_of_m(SCORES[0], 1, 3), ValueError, r"\(out, in\); got \(3,\)"),
        (
            lambda: pruning.prune(SCORES, num_zeros=1, masks=SCORES > 3),
            ValueError,
            "got 4 masked ones, where 1 were asked for",
        ),
        (lambda: pruning.prune({"a": SCORES}, num_zeros=1, masks={"b": SCORES > 3}), ValueError, "and no other"),
        (lambda: pruning.prune(SCORES, num_zeros=1, masks=SCORES), ValueError, "booleans, or 0s and 1s"),
        (lambda: pruning.prune(SCORES, num_zeros=1, block=(2, 2)), ValueError, "must divide into blocks"),
        (lambda: pruning.prune(SCORES, num_zeros=1, block=(2, 1), masks=SCORES > 0), ValueError, "whole blocks"),
        (lambda: pruning.threshold(SCORES, math.nan), ValueError, "got NaN"),
        (lambda: pruning.threshold(SCORES, 1, on_empty="no"), ValueError, "on_empty must be"),  # type: ignore[arg-type]
        (
            lambda: pruning.prune({"a": SCORES, "b": SCORES[:0]}, sparsity=0.5),
            ValueError,
            r"a layer must have a connection to keep; got scores of shape \(0, 3\) of b",
        ),
        (lambda: pruning.threshold(SCORES[:, :0], 1), ValueError, r"got scores of shape \(2, 0\)"),
        (
            lambda: pruning.prune_nodes(SCORES[0][:0], num_zeros=0),
            ValueError,
            "must keep a node; of 0, 0 would be gone",
        ),
        (lambda: pruning.prune(np.array([[2**53 + 1, 2**53]]), num_zeros=1), ValueError, r"within 2\*\*53"),
        (
            lambda: pruning.movement(SCORES, SCORES, SCORES[0]),
            ValueError,
            r"the scores before must have the weight's shape, \(2, 3\); got \(3,\)",
        ),
        (lambda: pruning.CubicSchedule(0.9, begin=0.5, end=3), TypeError, "begin must be an integer; got 0.5"),  # type: ignore[arg-type]
        (lambda: pruning.GeometricSchedule(0.9, rounds=2.5), TypeError, "rounds must be an integer; got 2.5"),  # type: ignore[arg-type]
        (lambda: pruning.threshold(SCORES, 7), ValueError, "must keep a connection"),
        (lambda: pruning.n_of_m(SCORES, 1, 2), ValueError, "multiple of m = 2; got 3"),
        (lambda: pruning.n_of_m(SCORES * np.nan, 1, 3), ValueError, "NaN"),
        (lambda: pruning.snip(SCORES, SCORES.T), ValueError, r"its weight's shape, \(2, 3\); got \(3, 2\)"),
        (lambda: pruning.prune_nodes(SCORES, num_zeros=1), ValueError, r"\(nodes,\); got \(2, 3\)"),
        (lambda: pruning.prune_nodes(SCORES[0], num_zeros=3), ValueError, "must keep a node"),
        (lambda: pruning.prune_nodes([np.nan, 1.0], num_zeros=1), ValueError, "NaN for node 0"),
        (lambda: pruning.node_norm(SCORES, "rows"), ValueError, "side must be"),  # type: ignore[arg-type]
        (lambda: pruning.node_norm(SCORES[0]), ValueError, r"\(out, in\)"),
        (lambda: pruning.node_norm(SCORES, order=3), ValueError, "order must be 1 or 2"),  # type: ignore[arg-type]
        (lambda: pruning.node_mask((2, 3), outputs=[True]), ValueError, r"outputs must be booleans of shape \(2,\)"),
        (lambda: pruning.regrow(SCORES > 2, SCORES, 1.5), ValueError, r"in \[0, 1\]"),
        (
            lambda: pruning.regrow(SCORES > 2, SCORES * np.nan, 0.5),
            ValueError,
            "a live weight must be a number; got NaN",
        ),
        (lambda: pruning.regrow(SCORES > 2, SCORES, 0.5, SCORES.T), ValueError, "its weight's shape"),
        (
            lambda: pruning.regrow_pattern(SparsityPattern.full((2, 3)), [1.0], 0.5),
            ValueError,
            "each of the 6 connections; got",
        ),
        (lambda: pruning.CubicSchedule(0.5, 10, 5), ValueError, "begin < end"),
        (lambda: pruning.CubicSchedule(0.5, 0, 5, initial=0.7), ValueError, "initial <= final"),
        (lambda: pruning.GeometricSchedule(1.0, 3), ValueError, "final < 1"),
        (lambda: pruning.cosine_decay(-1, 5), ValueError, "step >= 0"),
    ],
)
def test_what_cannot_be_pruned_is_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_ten_million_weights_take_little_memory() -> None:
    code = """
import numpy as np
from maskedlinear import pruning
from maskedlinear.bench.peak import most_memory
weights = [np.random.default_rng(i).standard_normal((1000, 5000), dtype=np.float32) for i in range(2)]
before = most_memory()
found = pruning.prune([pruning.magnitude(w) for w in weights], sparsity=0.9)
assert sum(int(m.sum()) for m in found) == 1_000_000
print((most_memory() - before) / sum(w.nbytes for w in weights))
"""
    ran = python(code)
    assert not ran.stderr
    assert float(ran.stdout) < 3, "the scores, the masks, and some blocks"
