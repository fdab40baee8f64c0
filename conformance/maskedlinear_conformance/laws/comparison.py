"""The backends against each other, directly; and each against the golden vectors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from maskedlinear_conformance.backend_under_test import MODES, BackendUnderTest, equal_bits, expectations, quantity
from maskedlinear_conformance.cases import Case
from maskedlinear_conformance.golden import Golden
from maskedlinear_conformance.laws import law

__all__ = ["Comparison"]

Pair = tuple[BackendUnderTest, BackendUnderTest]


class Comparison:
    """Golden vectors and pairs."""

    @law("golden")
    def test_golden_vectors_bit_for_bit(self, subject: BackendUnderTest, golden: Golden) -> None:
        """On integers every sum is exact, so every result is the stored one, rounded to the dtype."""
        found = subject.everything(golden.data)
        for name, result in found.items():
            equal_bits([result + 0.0], [golden.rounded(quantity(name), subject.dtype)], f"{name} of {golden.name}")

    @law("pairs")
    def test_backends_equal_each_other(self, pair: Pair, case: Case) -> None:
        """Value and gradients lie within the bound of the other's."""
        _compare(pair, case, ("y", "dx", "dW", "db"))

    @law("pairs", needs=["jvp"])
    def test_forward_mode_equals_each_other(self, pair: Pair, case: Case) -> None:
        """The directional derivative lies within the bound of the other's."""
        _compare(pair, case, ("ẏ",))

    @law("pairs", needs=[MODES])
    def test_second_order_equals_each_other(self, pair: Pair, case: Case) -> None:
        """The Hessian-vector product, by whichever modes each has, lies within the bound of the other's."""
        _compare(pair, case, ("Hx", "HW", "Hb", "Hg"))


def _compare(pair: Pair, case: Case, quantities: Sequence[str]) -> None:
    """Check each of the quantities, by every way that one has to it against every way of the other."""
    want, dtype = expectations(case, pair[0].dtype), pair[0].dtype
    for about in quantities:
        if about not in want:  # no bias
            continue
        one, other = ([a for name, a in subject.on(case).items() if quantity(name) == about] for subject in pair)
        assert one, f"{pair[0].label} must have {about}"
        assert other, f"{pair[1].label} must have {about}"
        for mine, yours in product(one, other):
            assert mine.shape == yours.shape, f"the shape of {about}"
            used = want[about].between(mine, yours, dtype)
            pair[0].record.between((pair[0].label, pair[1].label), about, dtype, used)
            assert used <= 1, f"{about} differs by {used:.3g} times the bound"
