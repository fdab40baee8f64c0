"""Laws 4 and 5: what the mask keeps out, and what it is at its extremes."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np

from maskedlinear_conformance.backend_under_test import BackendUnderTest, equal_bits, positive_zero
from maskedlinear_conformance.bounds import expected
from maskedlinear_conformance.cases import HEAVY, PROBE, TILED, Case, Data, poisoned, small_or_heavy, with_nan
from maskedlinear_conformance.laws import law

__all__ = ["Masking"]


class Masking:
    """Laws 4 and 5."""

    @law(4)
    def test_nothing_stored_under_the_mask_leaks(self, subject: BackendUnderTest, case: Case) -> None:
        """NaN and infinities stored under the mask, in the weight or its tangent, change no bit of any result."""
        clean, want = case.data(subject.dtype), subject.on(case)
        for name, dirty in poisoned(clean).items():
            got = subject.everything(dirty)
            for quantity, result in want.items():
                equal_bits([got[quantity]], [result], f"{quantity}, {name} being under the mask")

    @law(4)
    def test_masked_gradient_is_positive_zero(self, subject: BackendUnderTest, case: Case) -> None:
        """The weight's gradient is exactly +0 under the mask."""
        positive_zero(subject.on(case)["dW"][~case.mask()], "dW under the mask")

    @law(4)
    def test_masked_gradient_is_positive_zero_for_nan(self, subject: BackendUnderTest) -> None:
        """It is +0 even where x or g holds NaN, which reaches the live connections; so is the second derivative."""
        for case, nan in product((PROBE, TILED), ("x", "g", "dx", "dg")):
            data = case.data(subject.dtype)
            dirty = with_nan(data, nan)
            found = {"dW": subject.gradients(dirty)["dW"]} if nan in ("x", "g") else {}
            for mode in subject.modes():
                found[f"HW by {mode}"] = subject.curvature(dirty, mode)[f"HW by {mode}"]
            for name, gradient in found.items():
                positive_zero(gradient[~data.mask], f"{name} under the mask, {nan} holding NaN,")
                assert np.isnan(gradient[data.mask]).all(), f"NaN of {nan} must reach the live connections of {name}"

    @law(4)
    def test_what_is_live_shows(self, subject: BackendUnderTest) -> None:
        """NaN and infinities of a live weight, of x and of g are not hidden: they show where the spec has them."""
        for case in (PROBE, HEAVY):
            _shows(subject, case.data(subject.dtype))

    @law(5, cases=small_or_heavy)
    def test_masking_is_idempotent(self, subject: BackendUnderTest, case: Case) -> None:
        """A weight that is masked already gives the same, bit for bit."""
        data = case.data(subject.dtype)
        masked = subject.plain(data._replace(weight=np.where(data.mask, data.weight, 0)))
        for name, result in masked.items():
            equal_bits([result], [subject.on(case)[name]], name)

    @law(5, needs=["dense"], cases=small_or_heavy)
    def test_full_mask_is_the_dense_layer(self, subject: BackendUnderTest, case: Case) -> None:
        """With every connection live, the value is that of the framework's own dense layer."""
        data = case.data(subject.dtype)
        data = data._replace(mask=np.ones_like(data.mask))
        want = expected(data)["y"]
        if data.bias is not None:  # a framework's own layer may round a half type before it adds the bias
            want = replace(want, rounded=want.rounded + abs(want.exact) + abs(data.bias))
        own = subject.call("dense", data.x, data.weight, data.bias)
        subject.assert_agree({"y": subject.value(data)}, {"y": own}, {"y": want})

    @law(5)
    def test_empty_mask_gives_the_bias(self, subject: BackendUnderTest) -> None:
        """With no connection live, the value is the bias, and x has no influence."""
        for case in (PROBE, HEAVY):
            data = case.data(subject.dtype)
            data = data._replace(mask=np.zeros_like(data.mask))
            found = subject.plain(data)
            assert data.bias is not None
            equal_bits([found["y"]], [np.broadcast_to(data.bias, found["y"].shape)], "y")
            assert not found["dx"].any(), "dx must be 0"
            positive_zero(found["dW"], "dW")
            assert not subject.value(data._replace(bias=None)).any(), "y must be 0 without a bias"


def _shows(subject: BackendUnderTest, data: Data) -> None:
    """Check that NaN and infinities of a live weight, of x and of g reach what they are connected to."""
    node, edge = np.argwhere(data.mask)[0]
    for value in (np.nan, np.inf, -np.inf):
        weight = data.weight.copy()
        weight[node, edge] = value
        dirty = data._replace(weight=weight)
        found = subject.plain(dirty)
        with np.errstate(invalid="ignore"):  # of the spec, too
            want = expected(dirty)
        for name in ("y", "dx"):
            exact = want[name].exact
            shown = np.where(np.isfinite(exact), found[name], exact)
            equal_bits([found[name]], [shown], f"{name}, {value} being a live weight,")
    for name, result, live in (("x", "y", data.mask.any(1)), ("g", "dx", data.mask.any(0))):
        row = subject.plain(with_nan(data, name))[result][0]
        assert np.isnan(row[..., live]).all(), f"NaN of {name} must reach {result} by its live connections"
