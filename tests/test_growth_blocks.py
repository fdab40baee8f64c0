"""Growth by gradient looks at blocks: the places are those of one sort of all, whatever the blocks."""

from __future__ import annotations

import numpy as np
import pytest

from maskedlinear import pruning
from maskedlinear.pattern import SparsityPattern
from maskedlinear.pruning import _growth


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_places_are_those_of_one_sort(seed: int, exclude: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    out, in_ = rng.integers(3, 30, 2)
    monkeypatch.setattr(_growth, "_ASKED", int(rng.integers(1, 60)))
    monkeypatch.setattr(_growth, "_BLOCK", int(rng.integers(1, 40)))
    mask = rng.random((out, in_)) < 0.3
    weight = np.round(rng.standard_normal((out, in_)) * 2).astype(np.float32)
    gradient = np.round(rng.standard_normal((out, in_)) * 2).astype(np.float32)  # many are equal
    live = np.flatnonzero(mask)
    count = int(0.4 * len(live))
    dropped = live[np.argsort(np.abs(weight.ravel()[live]), kind="stable")[:count]]
    kept = np.setdiff1d(live, dropped)
    scores = np.abs(gradient).ravel()
    scores[live if exclude else kept] = -1
    wanted = np.zeros(out * in_, bool)
    wanted[kept] = True
    wanted[np.argsort(scores, kind="stable")[out * in_ - count :]] = True  # of equal ones the later
    for growth in (gradient, gradient.astype(np.int8)):
        found = pruning.regrow(mask, weight, 0.4, growth, exclude_dropped=exclude)
        np.testing.assert_array_equal(found.ravel(), wanted)
    pattern = SparsityPattern.from_mask(mask)
    moved, source = pruning.regrow_pattern(
        pattern, weight[mask], 0.4, lambda start, stop: gradient[start:stop], exclude_dropped=exclude
    )
    np.testing.assert_array_equal(moved.to_mask().ravel(), wanted)
    np.testing.assert_array_equal(source, moved.places_in(pattern))
    place = int(rng.choice(live))  # of a live connection too
    gradient.ravel()[[place, -1]] = np.nan
    for fraction in (0, 0.4):
        with pytest.raises(ValueError, match=rf"got NaN at \({place // in_}, {place % in_}\)"):
            pruning.regrow(mask, weight, fraction, gradient, exclude_dropped=exclude)


def test_columns_beyond_16_bits_are_in_order() -> None:
    rng = np.random.default_rng(0)
    outputs, inputs = np.divmod(np.unique(rng.integers(0, 4 * 200_000, 500)), 200_000)
    pattern, _ = SparsityPattern.from_edges(outputs, inputs, (4, 200_000))
    np.testing.assert_array_equal(pattern.csc[2], np.argsort(pattern.indices, kind="stable"))
    np.testing.assert_array_equal(pattern.csc[1], pattern.rows[pattern.csc[2]])
