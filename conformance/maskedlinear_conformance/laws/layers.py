"""Laws of layers: the function's, then 11, 12 and 13: a mask that changes, checkpoints, optimizers and dormant weights."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from maskedlinear_conformance.bounds import expected, smallest
from maskedlinear_conformance.cases import PROBE, Case, Data, odd, poisoned, with_nan
from maskedlinear_conformance.laws import law
from maskedlinear_conformance.laws.derivatives import FULL
from maskedlinear_conformance.subject import Results, Subject, equal_bits, positive_zero

__all__ = ["Layers"]

OTHER = Case((4,), 7, 5, 0.7)
SUBNORMAL = 2.0**-133  # the smallest number of bfloat16


def built(subject: Subject, data: Data) -> Any:
    """Return the backend's layer with the values of ``data``."""
    return subject.backend.layer(*(subject.send(array) for array in (data.weight, data.mask, data.bias)))


def stored(subject: Subject, data: Data) -> tuple[Any, Any, Any]:
    """Return the state of a layer made from ``data``: all weights, or the live ones and 0, in the dtype."""
    weight = subject.fetch(subject.send(data.weight))
    return (weight if subject.has("dormant weights") else np.where(data.mask, weight, 0)), data.mask, data.bias


def with_odd_dormant_values(data: Data) -> Data:
    """Put what a careless conversion loses under the mask: NaN, infinity, -0 and a subnormal number."""
    odd = np.resize([np.nan, np.inf, -0.0, SUBNORMAL, -1.5], data.weight.shape)
    return data._replace(weight=np.where(data.mask, data.weight, odd))


class Layers:
    """The layer's share of laws 1, 4 and 10, and laws 11, 12 and 13."""

    @law(1, needs=["layer"], enough=FULL, dear=True, cases=odd)
    def test_a_layer_takes_any_shape(self, subject: Subject, case: Case) -> None:
        """No batch dimension or several, an empty batch, no inputs, no bias: value and gradients equal the spec's."""
        data = case.data(subject.dtype)
        with subject.backend.strict():
            subject.near(_called(subject, built(subject, data), data), expected(data))

    @law(4, needs=["layer"])
    def test_nothing_stored_in_a_layer_under_the_mask_leaks(self, subject: Subject) -> None:
        """NaN and infinities under the mask change nothing, and the gradient there is +0, for NaN in x or g too."""
        data = PROBE.data(subject.dtype)
        with subject.backend.strict():
            for name, dirty in poisoned(data).items():
                layer = built(subject, dirty)
                for nan in ("", "x", "g"):
                    found = _called(subject, layer, with_nan(dirty, nan) if nan else dirty)
                    what = f"{name} being under the mask and NaN in {nan or 'neither x nor g'}"
                    positive_zero(found["dW"][~data.mask], f"dW under the mask, {what},")
                    if not nan:
                        subject.near(found, expected(data))

    @law(10, needs=["layer"])
    def test_a_layer_leaves_its_arguments_alone(self, subject: Subject) -> None:
        """It keeps copies of the weight, mask and bias, and writes to no x or g; no later call changes a result."""
        data, other = PROBE.data(subject.dtype), OTHER.data(subject.dtype)
        with subject.backend.strict():
            sent = [subject.send(array) for array in (data.weight, data.mask, data.bias)]
            given = [subject.send(array) for array in (data.x, data.g, other.weight, -other.x, other.g)]
            x, g, weight, *later = given
            layer = subject.backend.layer(*sent)
            first = (layer(x), *layer.gradients(x, g))
            at_once = [subject.fetch(array) for array in first]
            if subject.has("dormant weights"):
                layer.set_mask(other.mask)
            layer.set_weight(weight)
            layer(later[0])
            layer.gradients(*later)
            if subject.has("freeze_masked"):
                layer.guarded(layer.optimizers[0])(x, g)
            layer.set_weight(subject.send(-other.weight))
            equal_bits([subject.fetch(array) for array in first], at_once, "a result, after later calls")
            equal_bits([subject.fetch(array) for array in sent], (data.weight, data.mask, data.bias), "an argument")
            equal_bits(
                [subject.fetch(array) for array in given],
                (data.x, data.g, other.weight, -other.x, other.g),
                "what a method was called with",
            )

    @law(11)
    def test_a_new_mask_holds_at_the_next_call_of_the_function(self, subject: Subject) -> None:
        """The mask is an argument like the others, and going back to the old one gives the old bits."""
        data, other = PROBE.data(subject.dtype), OTHER.mask()
        before = subject.everything(data)
        changed = subject.everything(data._replace(mask=other))
        subject.near(changed, expected(data._replace(mask=other)))
        again = subject.everything(data)
        for name, result in before.items():
            equal_bits([again[name]], [result], name)

    @law(11, needs=["dormant weights"])
    def test_a_new_mask_holds_at_the_next_call_of_the_layer(self, subject: Subject) -> None:
        """Value and gradients follow the mask, weights under it stay, and restoring restores every bit."""
        data, other = PROBE.data(subject.dtype), OTHER.mask()
        with subject.backend.strict():
            layer = built(subject, data)
            before = _called(subject, layer, data)
            subject.near(before, expected(data))
            mine = other.copy()
            layer.set_mask(mine)
            mine[:] = True  # the caller's array is the caller's
            changed = _called(subject, layer, data._replace(mask=other))
            subject.near(changed, expected(data._replace(mask=other)))
            equal_bits(layer.state(), (data.weight, other, data.bias), "the layer's state")
            layer.set_mask(data.mask)
            for name, result in _called(subject, layer, data).items():
                equal_bits([result], [before[name]], name)

    @law(11, needs=["dormant weights"])
    def test_what_is_no_mask_is_refused(self, subject: Subject) -> None:
        """Half a connection, NaN, another shape or the transpose raise ``ValueError``, and the layer stays as it was."""
        data = PROBE.data(subject.dtype)
        numbers = data.mask.astype(np.float64)
        wrong = {
            "0.5": np.where(data.mask, 0, 0.5),
            "NaN": np.where(data.mask, 0, np.nan),
            "2": 2 * (1 - numbers),
            "the transpose": data.mask.T,
            "one dimension": data.mask[0],
            "a row too many": np.concatenate([data.mask, data.mask[:1]]),
        }
        with subject.backend.strict():
            layer = built(subject, data)
            for name, mask in wrong.items():
                with suppress(ValueError):
                    layer.set_mask(mask)
                    raise AssertionError(f"set_mask must refuse {name} with a ValueError")
                equal_bits(layer.state(), (data.weight, data.mask, data.bias), f"the state, after {name} was refused")
            layer.set_mask(1 - numbers)
            equal_bits(layer.state()[1:2], [~data.mask], "a mask of numbers 0 and 1")

    @law(11, needs=["layer"])
    def test_a_new_weight_holds_at_the_next_call(self, subject: Subject) -> None:
        """Nothing derived from the old weight outlives it."""
        data = PROBE.data(subject.dtype)
        moved = data._replace(weight=-data.weight)
        with subject.backend.strict():
            layer = built(subject, data)
            _called(subject, layer, data)
            layer.set_weight(subject.send(moved.weight))
            subject.near(_called(subject, layer, moved), expected(moved))
            if not subject.has("dormant weights"):
                return
            layer.set_mask(OTHER.mask())
            moved = moved._replace(mask=OTHER.mask())
            subject.near(_called(subject, layer, moved), expected(moved))

    @law(12, needs=["save"])
    def test_a_checkpoint_keeps_every_bit(self, subject: Subject, tmp_path: Path) -> None:
        """Weights, live and dormant, mask and bias come back, into a layer that had others."""
        data, other = with_odd_dormant_values(PROBE.data(subject.dtype)), OTHER.data(subject.dtype)
        for bias in (True, False):
            if not bias:
                data, other = data._replace(bias=None), other._replace(bias=None)
            path = tmp_path / str(bias)
            path.mkdir()
            with subject.backend.strict():
                layer, fresh = built(subject, data), built(subject, other)
                layer.save(path)
                fresh.load(path)
                equal_bits(fresh.state(), stored(subject, data), "the state that came back")
                x = subject.send(data.x)
                equal_bits([subject.fetch(fresh(x))], [subject.fetch(layer(x))], "y")

    @law(12, needs=["layer"], enough=["float32", "bfloat16"])
    def test_weights_and_mask_pass_from_one_framework_to_the_other(self, pair: tuple[Subject, Subject]) -> None:
        """The state of one's layer, put into the other's, is the same there, bit for bit, and computes the same."""
        data = with_odd_dormant_values(PROBE.data(pair[0].dtype))
        want = expected(PROBE.data(pair[0].dtype))
        for source, target in (pair, pair[::-1]):
            with source.backend.strict():
                layer = built(source, data)
                state = layer.state()
                there = source.fetch(layer(source.send(data.x)))
            with target.backend.strict():
                copy = target.backend.layer(*(target.send(array) for array in state))
                kept = data._replace(weight=state[0])
                equal_bits(copy.state(), stored(target, kept), "the state that arrived")
                here = target.fetch(copy(target.send(data.x)))
            target.alike({"y": here}, {"y": there}, want)

    @law(13, needs=["freeze_masked"], enough=["float32", "bfloat16"])
    def test_a_guarded_optimizer_leaves_dormant_weights(self, subject: Subject) -> None:
        """Whatever they hold, and the optimizer's momentum and decay, after a change of mask too; the live ones train."""
        data = PROBE.data(subject.dtype)
        with subject.backend.strict():
            x, g = subject.send(data.x), subject.send(data.g)
            optimizers = built(subject, data).optimizers
            assert optimizers, "the layer names no optimizer"
            for name in optimizers:
                layer = built(subject, data)
                step = layer.guarded(name)
                for mask in (data.mask, OTHER.mask(), ~data.mask):
                    layer.set_mask(mask)
                    trained = None
                    for dormant in (None, np.nan, np.inf, -0.0):
                        if dormant is not None:
                            layer.set_weight(subject.send(np.where(mask, layer.state()[0], dormant)))
                        before = layer.state()[0]
                        step(x, g)
                        first = layer.state()[0]
                        for _ in range(2):
                            step(x, g)
                        after = layer.state()[0]
                        equal_bits([after[~mask]], [before[~mask]], f"dormant weights, {dormant}, under {name}")
                        assert (after[mask] != before[mask]).mean() > 0.9, f"live weights must train under {name}"
                        if trained is None:
                            trained = after
                            if mask is data.mask:  # nothing has gathered momentum yet
                                along = ((first - before) * expected(data)["dW"].exact)[mask].sum()
                                assert along < 0, f"the first step under {name} must lower the loss"
                    layer.set_weight(subject.send(trained))

    @law(13, needs=["freeze_masked"], enough=["float32", "bfloat16"])
    def test_a_guarded_optimizer_leaves_subnormal_dormant_weights(self, subject: Subject) -> None:
        """A dormant weight may be too small for arithmetic that takes such numbers for 0: it stays, too."""
        data = PROBE.data(subject.dtype)
        data = data._replace(weight=np.where(data.mask, data.weight, smallest(subject.dtype)))
        with subject.backend.strict():
            layer = built(subject, data)
            step = layer.guarded(layer.optimizers[0])
            step(subject.send(data.x), subject.send(data.g))
            equal_bits([layer.state()[0][~data.mask]], [data.weight[~data.mask]], "dormant weights")


def _called(subject: Subject, layer: Any, data: Data) -> Results:
    x, g = subject.send(data.x), subject.send(data.g)
    found = (layer(x), *layer.gradients(x, g))
    named = zip(("y", "dx", "dW", "db"), map(subject.fetch, found), strict=True)
    return {name: array for name, array in named if array is not None}
