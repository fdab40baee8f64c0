"""Laws 11, 12 and 13: a mask that changes, what a checkpoint keeps, and optimizers that leave dormant weights alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from maskedlinear_conformance.bounds import expected
from maskedlinear_conformance.cases import PROBE, Case, Data
from maskedlinear_conformance.laws import law
from maskedlinear_conformance.subject import Subject, equal_bits

__all__ = ["Layers"]

OTHER = Case((4,), 7, 5, 0.7)


def built(subject: Subject, data: Data) -> Any:
    """Return the backend's layer with the values of ``data``."""
    return subject.backend.layer(*(subject.send(array) for array in (data.weight, data.mask, data.bias)))


def with_odd_dormant_values(data: Data) -> Data:
    """Put what a careless conversion loses under the mask: NaN, infinity, -0 and a subnormal number."""
    odd = np.resize([np.nan, np.inf, -0.0, 2.0**-140, -1.5], data.weight.shape)
    return data._replace(weight=np.where(data.mask, data.weight, odd))


class Layers:
    """Laws 11, 12 and 13."""

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

    @law(11, needs=["layer"])
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
            layer.set_mask(OTHER.mask())
            moved = moved._replace(mask=OTHER.mask())
            subject.near(_called(subject, layer, moved), expected(moved))

    @law(12, needs=["save"])
    def test_a_checkpoint_keeps_every_bit(self, subject: Subject, tmp_path: Path) -> None:
        """Weights, live and dormant, mask and bias come back, into a layer that had others."""
        data, other = with_odd_dormant_values(PROBE.data(subject.dtype)), OTHER.data(subject.dtype)
        data = data._replace(weight=subject.fetch(subject.send(data.weight)))  # as the dtype has them
        for bias in (True, False):
            if not bias:
                data, other = data._replace(bias=None), other._replace(bias=None)
            path = tmp_path / str(bias)
            path.mkdir()
            with subject.backend.strict():
                layer, fresh = built(subject, data), built(subject, other)
                layer.save(path)
                fresh.load(path)
                equal_bits(fresh.state(), (data.weight, data.mask, data.bias), "the state that came back")
                x = subject.send(data.x)
                equal_bits([subject.fetch(fresh(x))], [subject.fetch(layer(x))], "y")

    @law(12, needs=["layer"], dtypes=["float32", "bfloat16"])
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
                equal_bits(copy.state(), state, "the state that arrived")
                here = target.fetch(copy(target.send(data.x)))
            target.alike({"y": here}, {"y": there}, want)

    @law(13, needs=["freeze_masked"], dtypes=["float32", "bfloat16"])
    def test_a_guarded_optimizer_leaves_dormant_weights(self, subject: Subject) -> None:
        """Whatever its momentum and decay, after a change of mask too; the live weights train."""
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
                    before = layer.state()[0]
                    for _ in range(3):
                        step(x, g)
                    after = layer.state()[0]
                    equal_bits([after[~mask]], [before[~mask]], f"dormant weights under {name}")
                    assert (after[mask] != before[mask]).mean() > 0.9, f"live weights must train under {name}"


def _called(subject: Subject, layer: Any, data: Data) -> dict[str, Any]:
    x, g = subject.send(data.x), subject.send(data.g)
    found = (layer(x), *layer.gradients(x, g))
    return dict(zip(("y", "dx", "dW", "db"), map(subject.fetch, found), strict=True))
