"""Law 12: weights and masks come back from a file, and arrive in another framework, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from maskedlinear.checkpoint import CheckpointError, MaskedArray, PlainArray, load
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

    @law("12f", needs=["files"])
    def test_a_file_keeps_every_bit(self, subject: BackendUnderTest, tmp_path: Path) -> None:
        """NumPy finds weights and mask in it, and a layer that had others takes them; dormant values where asked for."""
        for case, dormant in product((PROBE, replace(PROBE, bias=False), TILED), (True, False)):
            data = with_odd_dormant_values(case.data(subject.dtype))
            data.weight[np.nonzero(data.mask)[0][0], np.nonzero(data.mask)[1][0]] = -0.0  # a live zero is no hole
            other = data._replace(weight=-data.weight, mask=others(data.mask)[0])
            path = tmp_path / f"{case} {dormant}.safetensors"
            with subject.backend.strict_precision():
                layer, fresh = built(subject, data), built(subject, other)
                layer.save_file(path, dormant=dormant)
                weight, mask, bias = stored(subject, data)
                weight = weight if dormant else np.where(mask, weight, 0)
                equal_bits(_in_file(path), (weight, mask, bias), "what NumPy finds in the file")
                fresh.load_file(path)
                equal_bits(fresh.state(), (weight, mask, bias), "what the layer took from the file")
                there = called(subject, layer, data)
                for name, result in called(subject, fresh, data).items():
                    equal_bits([result], [there[name]], f"{name} of the layer that took the file")

    @law("12f", needs=["files"], enough=["float32"])
    def test_a_file_that_does_not_fit_changes_nothing(self, subject: BackendUnderTest, tmp_path: Path) -> None:
        """One of a layer with another shape is refused, and so is one that was damaged."""
        data, large = PROBE.data(subject.dtype), TILED.data(subject.dtype)
        path = tmp_path / "file.safetensors"
        with subject.backend.strict_precision():
            layer = built(subject, data)
            built(subject, large).save_file(path)
            for damaged in (False, True):
                if damaged:
                    built(subject, data._replace(weight=-data.weight)).save_file(path)
                    content = bytearray(path.read_bytes())
                    content[-1] ^= 1
                    path.write_bytes(content)
                refused = False
                try:
                    layer.load_file(path)
                except CheckpointError:
                    refused = True
                assert refused, "a file that does not fit must be a CheckpointError"
                equal_bits(layer.state(), stored(subject, data), "the layer that refused a file")

    @law("12x", needs=["files"], enough=["float32", "bfloat16"])
    def test_a_file_passes_from_one_framework_to_the_other(
        self, pair: tuple[BackendUnderTest, BackendUnderTest], tmp_path: Path
    ) -> None:
        """Weights, live and dormant, mask and bias are the same there, bit for bit."""
        for number, (case, (source, target)) in enumerate(product((PROBE, TILED), (pair, pair[::-1]))):
            data = with_odd_dormant_values(case.data(pair[0].dtype))
            other = data._replace(weight=-data.weight, mask=others(data.mask)[0])
            path = tmp_path / f"{number}.safetensors"
            with source.backend.strict_precision(), target.backend.strict_precision():
                built(source, data).save_file(path, dormant=True)
                layer = built(target, other)
                layer.load_file(path)
                kept = data._replace(weight=stored(source, data)[0])
                equal_bits(layer.state(), stored(target, kept), "what another framework's layer took from the file")

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


def _in_file(path: Path) -> tuple[Any, Any, Any]:
    """Return weight, mask and bias that a file of one layer holds, (out, in), as NumPy reads it."""
    arrays = list(load(path).values())
    (masked,) = (array for array in arrays if isinstance(array, MaskedArray))
    plain = [_numbers(array.data(), array.dtype) for array in arrays if isinstance(array, PlainArray)]
    assert len(plain) <= 1, "a file of one layer holds a weight, and perhaps a bias"
    assert masked.axes is not None, "a file says what the axes of a weight mean"
    weight = _numbers(masked.raw(dormant=True), masked.dtype)
    return masked.axes.matrices(weight)[0], masked.axes.matrices(masked.mask())[0], plain[0] if plain else None


def _numbers(held: Any, dtype: str) -> Any:
    """Return the numbers of an array as a file holds it: bfloat16 as the upper half of a float32."""
    return (held.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else held
