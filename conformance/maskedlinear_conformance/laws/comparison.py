"""The backends against each other, directly; and each against the golden vectors."""

from __future__ import annotations

from maskedlinear_conformance.cases import Case
from maskedlinear_conformance.golden import Golden
from maskedlinear_conformance.laws import law
from maskedlinear_conformance.subject import Subject, equal_bits, expectations, quantity

__all__ = ["Comparison"]


class Comparison:
    """Golden vectors and pairs."""

    @law("golden")
    def test_golden_vectors_bit_for_bit(self, subject: Subject, golden: Golden) -> None:
        """On integers every sum is exact, so every result is the stored one, rounded to the dtype."""
        found = subject.everything(golden.data)
        for name, result in found.items():
            equal_bits([result + 0.0], [golden.rounded(quantity(name), subject.dtype)], f"{name} of {golden.name}")

    @law("pairs")
    def test_backends_equal_each_other(self, pair: tuple[Subject, Subject], case: Case) -> None:
        """Every result that both have lies within the bound of the other's."""
        one, other = (subject.on(case) for subject in pair)
        dtype = pair[0].dtype
        want = expectations(case, dtype)
        for name in one.keys() & other.keys():
            assert one[name].shape == other[name].shape, f"the shape of {name}"
            used = want[quantity(name)].between(one[name], other[name], dtype)
            pair[0].record.between((pair[0].label, pair[1].label), quantity(name), dtype, used)
            assert used <= 1, f"{name} differs by {used:.3g} times the bound"
