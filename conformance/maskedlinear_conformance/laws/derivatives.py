"""Laws 1, 2 and 3: value and derivatives of every order and mode, and what relates them to each other."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
from hypothesis import strategies as st

from maskedlinear import masks
from maskedlinear_conformance.backend_under_test import (
    FIRST,
    INPUTS,
    BackendUnderTest,
    by_name,
    equal_bits,
    expectations,
    positive_zero,
)
from maskedlinear_conformance.bounds import expected
from maskedlinear_conformance.cases import HEAVY, PROBE, Case, Data, draw, small_or_heavy
from maskedlinear_conformance.laws import law

__all__ = ["FULL", "Derivatives", "problems"]

FULL = ("float64", "float32")
"""The dtypes that suffice where a law is not about rounding."""


def integer_problem(dtype: str, seed: int, batch: tuple[int, ...], in_: int, out: int, tenths: int) -> Data:
    """Return a problem for any shape and a density in tenths, of integers so small that ``dtype`` holds every sum."""
    generator = np.random.default_rng(seed)
    limit = 4 if dtype in FULL else 1
    mask = masks.random((out, in_), num_zeros=in_ * out * (10 - tenths) // 10, seed=seed)
    return draw(lambda shape: generator.integers(-limit, limit + 1, shape).astype(float), batch, mask, True, "float64")


def problems(subject: BackendUnderTest) -> tuple[st.SearchStrategy[Data], dict[str, list[tuple[Any, ...]]]]:
    """Return a strategy for such problems, and, for ``examples``, some that are not thin: Hypothesis likes small shapes."""
    drawn = st.builds(
        integer_problem,
        dtype=st.just(subject.dtype),
        seed=st.integers(0, 2**32),
        batch=st.lists(st.integers(0, 4), max_size=3).map(tuple),
        in_=st.integers(0, 40),
        out=st.integers(0, 40),
        tenths=st.integers(0, 10),
    )
    heavy: tuple[tuple[int, ...], int, int, int] = (HEAVY.batch, HEAVY.in_features, HEAVY.out_features, 5)
    solid = [heavy, ((3, 2, 2), 37, 29, 5), ((2, 1, 5), 40, 3, 2)]
    taken = solid[:2] if subject.profile == "quick" else solid
    return drawn, {"examples": [(integer_problem(subject.dtype, seed, *one),) for seed, one in enumerate(taken)]}


class Derivatives:
    """Laws 1, 2 and 3."""

    @law(1)
    def test_value_and_gradients_equal_the_spec(self, subject: BackendUnderTest, case: Case) -> None:
        """Value and gradients lie within the tight bound of the spec's."""
        found, first = subject.on(case), ("y", "dx", "dW", "db")
        subject.assert_matches_spec(
            {name: found[name] for name in first if name in found}, expectations(case, subject.dtype)
        )

    @law(1, needs=["jvp"])
    def test_forward_mode_equals_the_spec(self, subject: BackendUnderTest, case: Case) -> None:
        """The directional derivative, and the value beside it, lie within the tight bound of the spec's."""
        found = subject.on(case)
        subject.assert_matches_spec(
            {name: found[name] for name in ("y by jvp", "ẏ")}, expectations(case, subject.dtype)
        )

    @law(1)
    def test_second_order_equals_the_spec(self, subject: BackendUnderTest, case: Case, mode: str) -> None:
        """The Hessian-vector product lies within the tight bound of the spec's, by each mode, and is +0 under the mask."""
        found = {name: array for name, array in subject.on(case).items() if name.endswith(mode)}
        subject.assert_matches_spec(found, expectations(case, subject.dtype))
        positive_zero(found[f"HW by {mode}"][~case.mask()], "HW under the mask")

    @law(1)
    def test_unsigned_data_obeys_the_hard_bound(self, subject: BackendUnderTest, case: Case) -> None:
        """On data that does not cancel, results lie within K·u·S of the spec's."""
        found = subject.plain(case.data(subject.dtype, "positive"))
        subject.assert_matches_spec(found, expectations(case, subject.dtype, "positive"), hard=True)

    @law(1, enough=FULL)
    def test_any_subset_of_inputs_may_ask_for_a_gradient(self, subject: BackendUnderTest) -> None:
        """Gradients do not depend on which others are asked for."""
        for case in (PROBE, HEAVY):
            data, want = case.data(subject.dtype), expectations(case, subject.dtype)
            counts = (1,) if case == HEAVY and subject.profile == "quick" else (1, 2, 3)
            for wrt in (*(some for count in counts for some in combinations(INPUTS, count)), INPUTS[::-1]):
                subject.assert_matches_spec(subject.gradients(data, wrt), want)

    @law(1, needs=["jvp"], enough=FULL)
    def test_any_subset_of_inputs_may_move(self, subject: BackendUnderTest) -> None:
        """An input that does not move adds nothing to the directional derivative."""
        data = PROBE.data(subject.dtype)
        for count in (1, 2):
            for still in combinations(("dx", "dweight", "dbias"), count):
                zero = {name: np.zeros_like(getattr(data, name)) for name in still}
                found = subject.tangent(data._replace(**dict.fromkeys(still)))
                subject.assert_matches_spec(found, expected(data._replace(**zero)))

    @law(2, needs=["autodiff_vjp"], cases=small_or_heavy)
    def test_rule_equals_automatic_differentiation(self, subject: BackendUnderTest, case: Case) -> None:
        """The gradients are those that the framework itself makes of the forward expression."""
        data = case.data(subject.dtype)
        found = by_name(FIRST[1:], subject.call("autodiff_vjp", *data[:5]), data.bias)
        subject.assert_agree(found, subject.on(case), expectations(case, subject.dtype))

    @law(3, needs=["jvp"], enough=FULL)
    def test_forward_and_reverse_mode_are_adjoint(self, subject: BackendUnderTest) -> None:
        """⟨g, J v⟩ = ⟨Jᵀ g, v⟩ for every shape and mask, exactly, on integers."""

        drawn, solid = problems(subject)

        @subject.check_property(drawn, **solid)
        def adjoint(data: Data) -> None:
            ahead = (data.g * subject.tangent(data)["ẏ"]).sum()
            back = subject.gradients(data)
            along = (("dx", data.dx), ("dW", data.dweight), ("db", data.dbias))
            behind = sum((back[name] * direction).sum() for name, direction in along)
            assert ahead == behind, f"⟨g, J v⟩ is {ahead} and ⟨Jᵀ g, v⟩ is {behind}"

    @law(3, enough=FULL)
    def test_linear_in_x_and_in_the_weight(self, subject: BackendUnderTest) -> None:
        """The value without bias is linear in x and in the weight, exactly, on integers."""

        drawn, solid = problems(subject)

        @subject.check_property(drawn, **solid)
        def linear(data: Data) -> None:
            data = data._replace(bias=None, dbias=None)
            for name, other in (("x", data.dx), ("weight", data.dweight)):
                mixed = data._replace(**{name: 2 * getattr(data, name) - other})
                want = 2 * subject.value(data) - subject.value(data._replace(**{name: other}))
                equal_bits([subject.value(mixed) + 0.0], [want + 0.0], f"y, as a function of {name}")
