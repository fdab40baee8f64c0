"""What can be taken out of a network: the flow of constants forward and of needs backward, on arrays."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from maskedlinear.pruning._shrink import Flow, Plan

Layers = list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]


def relu(parts: list[Any]) -> Any:
    return np.maximum(parts[0], 0.0)


def drawn(sizes: list[int], density: float, seed: int) -> Layers:
    generator = np.random.default_rng(seed)
    return [
        (generator.standard_normal((out, in_)), generator.random((out, in_)) < density, generator.standard_normal(out))
        for in_, out in pairwise(sizes)
    ]


def call(layers: Layers, x: NDArray[Any]) -> NDArray[Any]:
    for place, (weight, mask, bias) in enumerate(layers):
        x = (x if place == 0 else np.maximum(x, 0)) @ np.where(mask, weight, 0).T + bias
    return x


def planned(layers: Layers) -> Plan:
    flow = Flow()
    x = flow.source(layers[0][0].shape[1])
    for place, (weight, mask, bias) in enumerate(layers):
        x = flow.linear(str(place), x if place == 0 else flow.elementwise([x], relu), weight, mask, bias)
    flow.read(x)
    return flow.plan("raise")


def smaller(layers: Layers, plan: Plan) -> Layers:
    found = []
    for (weight, mask, bias), (rows, columns, added) in zip(layers, plan.layers.values(), strict=True):
        found.append((weight[np.ix_(rows, columns)], mask[np.ix_(rows, columns)], (bias + added)[rows]))
    return found


@given(
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=6),
    density=st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=300, deadline=None)
def test_what_stays_gives_the_same_outputs_and_nothing_more_could_go(
    sizes: list[int], density: float, seed: int
) -> None:
    layers = drawn(sizes, density, seed)
    small = smaller(layers, planned(layers))
    x = np.random.default_rng(seed).standard_normal((5, sizes[0]))
    np.testing.assert_allclose(call(small, x), call(layers, x), rtol=1e-9, atol=1e-9)
    for (_, before, _), (_, after, _) in pairwise(small):
        assert before.any(axis=1).all()  # each hidden node that stays is fed
        assert after.any(axis=0).all()  # and read
    again = planned(small)
    assert all(rows.all() and columns.all() and not added.any() for rows, columns, added in again.layers.values())


def test_a_constant_goes_through_what_lies_between_into_the_bias() -> None:
    flow = Flow()
    x = flow.source(2)
    hidden = flow.linear("a", x, np.ones((3, 2)), [[1, 1], [0, 0], [0, 0]], [0.5, -2.0, 3.0])
    scaled = flow.elementwise([hidden], lambda parts: 10 * parts[0] + 1, "norm")
    y = flow.linear(
        "b", flow.elementwise([scaled], relu), np.array([[1.0, 100.0, 2.0], [4.0, 5.0, 6.0]]), np.ones((2, 3)), None
    )
    flow.read(y)
    plan = flow.plan("raise")
    rows, _, _ = plan.layers["a"]
    assert rows.tolist() == [True, False, False]
    assert plan.features["norm"].tolist() == [True, False, False]
    _, columns, added = plan.layers["b"]
    assert columns.tolist() == [True, False, False]
    assert added.tolist() == [2 * 31.0, 6 * 31.0]  # relu(10 * -2 + 1) is 0


def test_nothing_under_the_mask_reaches_a_bias() -> None:
    flow = Flow()
    weight = np.array([[1.0, np.nan], [np.inf, 1.0]])
    hidden = flow.linear("a", flow.source(2), weight, np.zeros((2, 2)), [np.nan, 2.0])
    flow.read(flow.linear("b", hidden, weight, [[0, 0], [0, 1]], None))
    assert flow.plan("raise").layers["b"][2].tolist() == [0.0, 2.0]


def test_the_two_sides_of_a_sum_stay_or_go_together() -> None:
    flow = Flow()
    x = flow.source(4)
    mask = np.ones((3, 4), bool)
    mask[:2] = False  # nodes 0 and 1 are constant here
    left = flow.linear("left", x, np.ones((3, 4)), mask, [1.0, 2.0, 3.0])
    mask = np.ones((3, 3), bool)
    mask[0] = False  # and only node 0 there
    right = flow.linear("right", flow.elementwise([left], relu), np.ones((3, 3)), mask, [5.0, 6.0, 7.0])
    total = flow.elementwise([left, right], lambda parts: parts[0] + parts[1])
    flow.read(flow.linear("y", total, np.ones((1, 3)), np.ones((1, 3)), [0.0]))
    plan = flow.plan("raise")
    assert plan.layers["left"][0].tolist() == [False, True, True]
    assert plan.layers["right"][0].tolist() == [False, True, True]
    assert plan.layers["right"][2].tolist() == [0.0, 1.0, 1.0]  # node 0 of left; node 1 stays where it is
    assert plan.layers["y"][2].tolist() == [6.0]


def test_what_is_not_followed_is_refused_or_keeps_its_nodes() -> None:
    def flow() -> Flow:
        found = Flow()
        mask = np.ones((3, 2), bool)
        mask[1] = False
        hidden = found.linear("a", found.source(2), np.ones((3, 2)), mask, np.zeros(3))
        found.read(hidden, "norm (LayerNorm)")
        mask = np.ones((1, 3), bool)
        mask[0, 2] = False
        found.read(found.linear("b", found.source(3, "norm (LayerNorm)"), np.ones((1, 3)), mask, None))
        return found

    with pytest.raises(
        ValueError,
        match=r"1 of the 3 features that go into norm \(LayerNorm\) are constant; 1 of the 3 features that come out of norm",
    ):
        flow().plan("raise")
    plan = flow().plan("keep")
    assert all(rows.all() and columns.all() for rows, columns, _ in plan.layers.values())
