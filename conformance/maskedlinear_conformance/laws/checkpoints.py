"""Law 12: weights and masks come back from a file, and arrive in another framework, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

from maskedlinear_conformance.backend_under_test import BackendUnderTest, equal_bits
from maskedlinear_conformance.bounds import expected
from maskedlinear_conformance.cases import PROBE, TILED, others
from maskedlinear_conformance.laws import law
from maskedlinear_conformance.laws.layers import built, called, stored, with_odd_dormant_values

__all__ = ["Checkpoints"]


class Checkpoints:
    """Law 12."""

    @law(12, needs=["save"])
    def test_a_checkpoint_keeps_every_bit(self, subject: BackendUnderTest, tmp_path: Path) -> None:
        """Weights, live and dormant, mask and bias come back, into a layer that had others."""
        for case in (PROBE, replace(PROBE, bias=False), TILED):
            data = with_odd_dormant_values(case.data(subject.dtype))
            other = data._replace(weight=-data.weight, mask=others(data.mask)[0])
            path = tmp_path / str(case)
            path.mkdir()
            with subject.backend.strict_precision():
                layer, fresh = built(subject, data), built(subject, other)
                layer.save(path)
                fresh.load(path)
                equal_bits(fresh.state(), stored(subject, data), "the state that came back")
                there = called(subject, layer, data)
                for name, result in called(subject, fresh, data).items():
                    equal_bits([result], [there[name]], f"{name} of the layer that was loaded")
                if subject.has("dormant weights"):
                    fresh.set_mask(other.mask)
                    equal_bits(
                        fresh.state(), (stored(subject, data)[0], other.mask, data.bias), "a new mask after that"
                    )

    @law("12x", needs=["layer"], enough=["float32", "bfloat16"])
    def test_weights_and_mask_pass_from_one_framework_to_the_other(
        self, pair: tuple[BackendUnderTest, BackendUnderTest]
    ) -> None:
        """The state of one's layer, put into the other's, is the same there, bit for bit, and computes the same."""
        for case, (source, target) in product((PROBE, TILED), (pair, pair[::-1])):
            data = with_odd_dormant_values(case.data(pair[0].dtype))
            want = expected(case.data(pair[0].dtype))
            with source.backend.strict_precision():
                layer = built(source, data)
                state = layer.state()
                there = source.to_numpy(layer(source.to_backend(data.x)))
            with target.backend.strict_precision():
                copy = target.backend.layer(*(target.to_backend(array) for array in state))
                kept = data._replace(weight=state[0])
                equal_bits(copy.state(), stored(target, kept), "the state that arrived")
                here = target.to_numpy(copy(target.to_backend(data.x)))
            target.assert_agree({"y": here}, {"y": there}, want)
