"""Law 13: a guarded optimizer trains what is live, and leaves every dormant weight as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from maskedlinear_conformance.backend_under_test import BackendUnderTest, equal_bits, positive_zero
from maskedlinear_conformance.bounds import expected, smallest
from maskedlinear_conformance.cases import OTHER, PROBE, TILED, Data
from maskedlinear_conformance.laws import law
from maskedlinear_conformance.laws.layers import built, put

__all__ = ["Optimizers"]


def downhill(data: Data, weights: Sequence[Any], name: str) -> None:
    """Check that each step from one of ``weights`` to the next lowers the loss ⟨g, y⟩, whose gradient is constant."""
    for before, after in pairwise(weights):
        along = ((after - before) * expected(data)["dW"].exact)[data.mask].sum()
        assert along < 0, f"each step under {name} must lower the loss"


class Optimizers:
    """Law 13."""

    @law(13, needs=["freeze_masked"], enough=["float64", "float32", "bfloat16"])
    def test_a_guarded_optimizer_leaves_dormant_weights(self, subject: BackendUnderTest) -> None:
        """Whatever they hold, and the optimizer's momentum and decay, after a change of mask too; the live ones train."""
        data = PROBE.data(subject.dtype)
        with subject.backend.strict_precision():
            optimizers = built(subject, data).optimizers
            assert optimizers, "the layer names no optimizer"
            for name in optimizers:
                _guarded(subject, data, name, (data.mask, OTHER.mask(), ~data.mask), (np.nan, np.inf, -0.0))

    @law(13, needs=["freeze_masked"], enough=["float32"], since="default")
    def test_a_guarded_optimizer_takes_large_layers_and_no_bias(self, subject: BackendUnderTest) -> None:
        """There, too, dormant weights stay and live ones train."""
        for data in (replace(PROBE, bias=False).data(subject.dtype), TILED.data(subject.dtype)):
            with subject.backend.strict_precision():
                for name in built(subject, data).optimizers:
                    _guarded(subject, data, name, (data.mask, ~data.mask), (np.nan,))

    @law(13, needs=["freeze_masked"], enough=["float32", "bfloat16"])
    def test_a_guarded_optimizer_leaves_subnormal_dormant_weights(self, subject: BackendUnderTest) -> None:
        """A dormant weight may be too small for arithmetic that takes such numbers for 0: it stays, too."""
        data = PROBE.data(subject.dtype)
        data = data._replace(weight=np.where(data.mask, data.weight, smallest(subject.dtype)))
        with subject.backend.strict_precision():
            layer = built(subject, data)
            step = layer.frozen_step(layer.optimizers[0])
            step(subject.to_backend(data.x), subject.to_backend(data.g))
            equal_bits([layer.state()[0][~data.mask]], [data.weight[~data.mask]], "dormant weights")


def _guarded(subject: BackendUnderTest, data: Data, name: str, masks: Sequence[Any], values: Sequence[float]) -> None:
    """Train a layer under each of ``masks``, its dormant weights being what they were and then each of ``values``."""
    x, g = subject.to_backend(data.x), subject.to_backend(data.g)
    layer = built(subject, data)
    step = layer.frozen_step(name)
    for mask in masks:
        layer.set_mask(mask)
        trained = None
        for dormant in (None, *values):
            if dormant is not None:
                put(subject, layer, np.where(mask, layer.state()[0], dormant), mask)
            states = [layer.state()]
            for _ in range(3):
                step(x, g)
                shown = subject.to_numpy(layer.visible_weight())
                positive_zero(shown[~mask], f"the visible weight under the mask, after a step of {name},")
                states.append(layer.state())
            (before, _, bias), (after, kept, biased) = states[0], states[-1]
            equal_bits([after[~mask]], [before[~mask]], f"dormant weights, {dormant}, under {name}")
            equal_bits([kept], [mask], f"the mask, under {name}")
            assert (after[mask] != before[mask]).mean() > 0.9, f"live weights must train under {name}"
            if trained is None:
                trained = after
                if mask is data.mask:  # no momentum of another mask yet
                    trains = biased is bias is None or (biased != bias).all()
                    assert trains, f"the bias, which has no mask, must train under {name}"
                    downhill(data, [state[0] for state in states], name)
        put(subject, layer, trained, mask)
