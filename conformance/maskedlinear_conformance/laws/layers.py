"""Laws of layers: the function's, and 11: a mask that changes, and dormant weights."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from maskedlinear.reference import laid_out
from maskedlinear_conformance.backend_under_test import (
    FIRST,
    BackendUnderTest,
    Results,
    by_name,
    equal_bits,
    expectations,
    positive_zero,
)
from maskedlinear_conformance.bounds import expected
from maskedlinear_conformance.cases import HEAVY, OTHER, PROBE, TILED, Case, Data, odd, others, poisoned, with_nan
from maskedlinear_conformance.laws import law
from maskedlinear_conformance.laws.arrays import alike_rows
from maskedlinear_conformance.laws.derivatives import FULL

__all__ = ["Layers", "built", "called", "put", "stored", "with_odd_dormant_values"]

SUBNORMAL = 2.0**-133  # the smallest number of bfloat16


def built(subject: BackendUnderTest, data: Data) -> Any:
    """Return the backend's layer with the values of ``data``."""
    return subject.backend.layer(*(subject.to_backend(array) for array in (data.weight, data.mask, data.bias)))


def stored(subject: BackendUnderTest, data: Data) -> tuple[Any, Any, Any]:
    """Return the state of a layer made from ``data``: all weights, or the live ones and 0, in the dtype."""
    weight = subject.to_numpy(subject.to_backend(data.weight))
    return (weight if subject.has("dormant weights") else np.where(data.mask, weight, 0)), data.mask, data.bias


def put(subject: BackendUnderTest, layer: Any, weight: Any, mask: Any) -> None:
    """Give a layer that keeps dormant weights these ones and this mask."""
    layer.set_mask(np.ones_like(mask))
    layer.set_weight(subject.to_backend(weight))
    layer.set_mask(mask)


def with_odd_dormant_values(data: Data) -> Data:
    """Put what a careless conversion loses under the mask: NaN, infinity, -0 and a subnormal number."""
    odd = np.resize([np.nan, np.inf, -0.0, SUBNORMAL, -1.5], data.weight.shape)
    return data._replace(weight=np.where(data.mask, data.weight, odd))


def called(subject: BackendUnderTest, layer: Any, data: Data, layout: str = "contiguous") -> Results:
    """Return y, dx, dW and db of a layer."""
    x, g = subject.to_backend(data.x, layout), subject.to_backend(data.g, layout)
    found = (layer(x), *layer.gradients(x, g))
    return by_name(FIRST, [subject.to_numpy(array) for array in found], data.bias)


class Layers:
    """The layer's share of laws 1, 4, 8 and 10, and law 11."""

    @law(
        1,
        needs=["layer"],
        enough=FULL,
        dear=True,
        cases=lambda case: case.since == "quick" or odd(case) or not case.bias,
    )
    def test_a_layer_takes_any_shape(self, subject: BackendUnderTest, case: Case) -> None:
        """Value and gradients equal the spec's, of large layers, odd ones and ones without bias or connections."""
        data = case.data(subject.dtype)
        with subject.backend.strict_precision():
            subject.assert_matches_spec(called(subject, built(subject, data), data), expectations(case, subject.dtype))

    @law(4, needs=["layer"])
    def test_nothing_stored_in_a_layer_under_the_mask_leaks(self, subject: BackendUnderTest) -> None:
        """NaN and infinities under the mask change nothing, and the gradient there is +0, for NaN in x or g too."""
        data, large = PROBE.data(subject.dtype), TILED.data(subject.dtype)
        with subject.backend.strict_precision():
            for name, dirty in (*poisoned(data).items(), *poisoned(large).items()):
                layer = built(subject, dirty)
                for nan in ("", "x", "g"):
                    found = called(subject, layer, with_nan(dirty, nan) if nan else dirty)
                    what = f"{name} being under the mask and NaN in {nan or 'neither x nor g'}"
                    positive_zero(found["dW"][~dirty.mask], f"dW under the mask, {what},")
                    if not nan:
                        subject.assert_matches_spec(found, expected(large if len(dirty.x) == len(large.x) else data))

    @law(8, needs=["layer"], enough=FULL, dear=True)
    def test_a_layer_takes_any_layout(self, subject: BackendUnderTest, layout: str) -> None:
        """However x, g and what a layer is made of or given later lie in memory, it computes the same and leaves them."""
        broadcast = layout == "broadcast"
        for case in (PROBE, TILED):
            data = case.data(subject.dtype)
            data = alike_rows(data) if broadcast else data
            with subject.backend.strict_precision():
                sent = [subject.to_backend(array, layout) for array in (data.weight, data.mask, data.bias)]
                layer = subject.backend.layer(*sent)
                subject.assert_matches_spec(called(subject, layer, data, layout), expected(data), hard=broadcast)
                equal_bits(
                    map(subject.to_numpy, sent), (data.weight, data.mask, data.bias), "an argument was written to"
                )
                if subject.has("dormant weights"):
                    data = data._replace(mask=~data.mask, weight=-data.weight)
                    layer.set_mask(laid_out(data.mask, layout))
                    layer.set_weight(subject.to_backend(data.weight, layout))
                    subject.assert_matches_spec(called(subject, layer, data, layout), expected(data), hard=broadcast)

    @law(10, needs=["layer"])
    def test_a_layer_leaves_its_arguments_alone(self, subject: BackendUnderTest) -> None:
        """It keeps copies, writes to no x or g and computes the same twice; no later call changes a result."""
        for case, other in ((PROBE, OTHER), (HEAVY, replace(HEAVY, density=0.7))):
            _left_alone(subject, case.data(subject.dtype), other.data(subject.dtype))

    @law(11, enough=["float32", "bfloat16"])
    def test_a_new_mask_holds_at_the_next_call_of_the_function(self, subject: BackendUnderTest) -> None:
        """The mask is an argument like the others, and going back to the old one gives the old bits."""
        for data in (PROBE.data(subject.dtype), TILED.data(subject.dtype)):
            before = subject.everything(data)
            for mask in others(data.mask):
                changed = data._replace(mask=mask)
                subject.assert_matches_spec(subject.everything(changed), expected(changed))
                again = subject.everything(data)
                for name, result in before.items():
                    equal_bits([again[name]], [result], name)

    @law(11, needs=["dormant weights"])
    def test_a_new_mask_holds_at_the_next_call_of_the_layer(self, subject: BackendUnderTest) -> None:
        """Value and gradients follow the mask, weights under it stay, and restoring restores every bit."""
        for case in (PROBE, TILED):
            _remasked(subject, case.data(subject.dtype))

    @law(11, needs=["dormant weights"])
    def test_what_is_no_mask_is_refused(self, subject: BackendUnderTest) -> None:
        """Half a connection, NaN, another shape or the transpose raise ``ValueError``, and the layer stays as it was."""
        data = PROBE.data(subject.dtype)
        numbers = data.mask.astype(np.float64)
        wrong = {
            "0.5": np.where(data.mask, 0, 0.5),
            "NaN": np.where(data.mask, 0, np.nan),
            "2": 2 * (1 - numbers),
            "-1": numbers - 1,
            "the transpose": data.mask.T,
            "one dimension": data.mask[0],
            "a single row": data.mask[:1],
            "a single column": data.mask[:, :1],
            "a row too many": np.concatenate([data.mask, data.mask[:1]]),
        }
        with subject.backend.strict_precision():
            layer = built(subject, data)
            for name, mask in wrong.items():
                with suppress(ValueError):
                    layer.set_mask(mask)
                    raise AssertionError(f"set_mask must refuse {name} with a ValueError")
                equal_bits(layer.state(), (data.weight, data.mask, data.bias), f"the state, after {name} was refused")
            layer.set_mask(1 - numbers)
            equal_bits(layer.state()[1:2], [~data.mask], "a mask of numbers 0 and 1")

    @law(11, needs=["layer"])
    def test_a_new_weight_holds_at_the_next_call(self, subject: BackendUnderTest) -> None:
        """Nothing derived from the old weight outlives it."""
        data, large = PROBE.data(subject.dtype), TILED.data(subject.dtype)
        row = {name: getattr(large, name)[:1] for name in ("x", "g", "dx", "dg")}
        for some in (data, large, large._replace(**row)):  # one row may go another way
            _reweighted(subject, some)


def _left_alone(subject: BackendUnderTest, data: Data, other: Data) -> None:
    """Check that a layer leaves alone what it is made of and called with, and what it has returned."""
    with subject.backend.strict_precision():
        sent = [subject.to_backend(array) for array in (data.weight, data.mask, data.bias)]
        given = [subject.to_backend(array) for array in (data.x, data.g, other.weight, -other.x, other.g)]
        x, g, weight, *later = given
        layer = subject.backend.layer(*sent)
        before = layer.state()
        first = (layer(x), *layer.gradients(x, g))
        at_once = [subject.to_numpy(array) for array in first]
        twice = [subject.to_numpy(array) for array in (layer(x), *layer.gradients(x, g))]
        equal_bits(twice, at_once, "the same call again")
        equal_bits(layer.state(), before, "the layer's state, after calls")
        if subject.has("dormant weights"):
            layer.set_mask(other.mask)
        layer.set_weight(weight)
        layer(later[0])
        layer.gradients(*later)
        if subject.has("freeze_masked"):
            layer.frozen_step(layer.optimizers[0])(x, g)
        layer.set_weight(subject.to_backend(-other.weight))
        equal_bits([subject.to_numpy(array) for array in first], at_once, "a result, after later calls")
        equal_bits([subject.to_numpy(array) for array in sent], (data.weight, data.mask, data.bias), "an argument")
        equal_bits(
            [subject.to_numpy(array) for array in given],
            (data.x, data.g, other.weight, -other.x, other.g),
            "what a method was called with",
        )


def _remasked(subject: BackendUnderTest, data: Data) -> None:
    """Check a layer under other masks, and under the first again."""
    with subject.backend.strict_precision():
        layer = built(subject, data)
        before = called(subject, layer, data)
        subject.assert_matches_spec(before, expected(data))
        for mask in (*others(data.mask), data.mask | True, data.mask & False):
            mine, changed = mask.copy(), data._replace(mask=mask)
            layer.set_mask(mine)
            mine[:] = ~mine  # the caller's array is the caller's
            found = called(subject, layer, changed)
            subject.assert_matches_spec(found, expected(changed))
            positive_zero(found["dW"][~mask], "dW under the new mask")
            equal_bits(layer.state(), (data.weight, mask, data.bias), "the layer's state")
            layer.set_mask(data.mask)
            for name, result in called(subject, layer, data).items():
                equal_bits([result], [before[name]], name)


def _reweighted(subject: BackendUnderTest, data: Data) -> None:
    """Check a layer with other weights, as an optimizer writes them, and then under another mask too."""
    kept = data.weight if subject.has("dormant weights") else -data.weight
    moved = data._replace(weight=np.where(data.mask, -data.weight, kept))
    with subject.backend.strict_precision():
        layer = built(subject, data)
        called(subject, layer, data)
        layer.set_weight(subject.to_backend(moved.weight))
        subject.assert_matches_spec(called(subject, layer, moved), expected(moved))
        if subject.has("dormant weights"):
            moved = moved._replace(mask=others(data.mask)[0])
            layer.set_mask(moved.mask)
            subject.assert_matches_spec(called(subject, layer, moved), expected(moved))
