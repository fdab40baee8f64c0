"""Law 14: random masks are the same bit for bit everywhere, and any shard is a part of the whole."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from hypothesis import strategies as st

from maskedlinear import masks
from maskedlinear_conformance.backend_under_test import BackendUnderTest, equal_bits
from maskedlinear_conformance.laws import law

__all__ = ["BERNOULLI", "FROZEN", "Generation", "digest"]

Shard = tuple[slice, slice] | None

FROZEN = {
    (1, 1, 1, 0): "6e340b9cffb37a98",
    (10, 16, 80, 0): "98137b9fd2a8e3bd",
    (32, 64, 1024, 1): "de9d1c4d1eb147c0",
    (257, 129, 33000, 2**63 + 11): "953222b958f070bf",
    (1000, 1001, 900_900, 12345): "31dce1b43456504d",
    (1000, 1001, 450, 12345): "7254307fed0d1036",
}
"""The hash of the mask for (out, in, zeros, seed) on ``mask_v1``; never to change. In the last, two words tie."""


def digest(mask: Any) -> str:
    """Return the hash of a mask: of its bits, eight a byte, row by row."""
    return hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()[:16]


HIGH = 2**17
BERNOULLI = {
    ((10, 16), 2**31, 0, (0, 10), (0, 16)): "a5cffb93796fb176",
    ((257, 129), 429496730, 2**63 + 11, (0, 257), (0, 129)): "2b52345b44f417b0",
    ((HIGH, HIGH), 2**30, 12345, (2**16 - 1, 2**16 + 1), (3, 4099)): "d3e10902df5070e6",
    ((HIGH, HIGH), 2**31 + 1, 12345, (HIGH - 1, HIGH), (HIGH - 4095, HIGH)): "fa1b3efc3e4a7d85",
}
"""The same of Bernoulli masks, for (shape, threshold, seed, rows and columns of a shard): from 2**16 rows on a mask of
``HIGH`` columns has blocks from 2**32 on."""


class Generation:
    """Law 14."""

    @law(14, needs=["masks"], enough=["float32"])
    def test_random_masks_are_the_frozen_ones(self, subject: BackendUnderTest) -> None:
        """The hashes of masks of several sizes are those published."""
        for (out, in_, zeros, seed), want in FROZEN.items():
            mask = _made(subject, (out, in_), zeros, seed, None)
            assert mask.dtype == bool, "a mask is boolean"
            assert mask.shape == (out, in_), "a mask has the shape asked for"
            assert digest(mask) == want, f"the mask of seed {seed}, {out} × {in_} with {zeros} zeros"
            shard = (slice(out // 3, out), slice(in_ // 4, in_ // 2))
            part = _made(subject, (out, in_), zeros, seed, shard)
            equal_bits([part], [mask[shard]], "a shard of the mask")

    @law(14, needs=["masks"], enough=["float32"])
    def test_any_mask_and_any_shard_of_it_is_the_cores(self, subject: BackendUnderTest) -> None:
        """For any shape, count, seed and shard; no zeros, and nothing but zeros, among them."""

        @subject.check_property(
            *(st.integers(0, 40), st.integers(0, 40), st.floats(0, 1), st.integers(0, 2**64 - 1), st.booleans()),
            examples=((7, 5, 0.0, 3, False), (7, 5, 1.0, 2**64 - 1, True), (301, 203, 0.777, 2**32, True)),
        )
        def same(out: int, in_: int, fraction: float, seed: int, cut: bool) -> None:
            zeros = int(fraction * out * in_)
            shard = (slice(out // 3, out), slice(0, in_ - in_ // 4)) if cut else None
            got = _made(subject, (out, in_), zeros, seed, shard)
            whole = masks.random((out, in_), num_zeros=zeros, seed=seed)
            equal_bits([got], [whole if shard is None else whole[shard]], "the mask")

    @law(14, needs=["bernoulli masks"], enough=["float32"])
    def test_bernoulli_masks_are_the_frozen_ones(self, subject: BackendUnderTest) -> None:
        """The hashes of masks of several sizes, and of shards of a huge one, are those published."""
        for (shape, threshold, seed, rows, columns), want in BERNOULLI.items():
            mask = _kept(subject, shape, threshold, seed, (slice(*rows), slice(*columns)))
            assert mask.dtype == bool, "a mask is boolean"
            assert digest(mask) == want, f"the Bernoulli mask {shape} of seed {seed}, rows {rows}, columns {columns}"

    @law(14, needs=["bernoulli masks"], enough=["float32"])
    def test_a_bernoulli_mask_keeps_the_words_below_its_threshold(self, subject: BackendUnderTest) -> None:
        """Not the threshold itself; none below 0, all below 2**32; for any shape, seed and shard."""

        @subject.check_property(
            *(st.integers(0, 40), st.integers(0, 40), st.integers(0, 2**64 - 1), st.booleans(), st.integers(0, 2**32)),
            examples=((7, 5, 3, False, 0), (7, 5, 3, True, 2**32), (31, 23, 2**32, True, 2**31)),
        )
        def same(out: int, in_: int, seed: int, cut: bool, threshold: int) -> None:
            words = masks.words(seed, 0, out * in_).astype(np.int64).reshape(out, in_)
            shard = (slice(out // 3, out), slice(0, in_ - in_ // 4)) if cut else None
            for below in (threshold, *(int(word) for word in words[out // 2 : out // 2 + 1, :1].flat)):
                want = words < below
                got = _kept(subject, (out, in_), below, seed, shard)
                equal_bits([got], [want if shard is None else want[shard]], "the mask")


def _kept(subject: BackendUnderTest, shape: tuple[int, int], threshold: int, seed: int, shard: Shard) -> Any:
    with subject.backend.strict_precision():
        return subject.to_numpy(subject.backend.bernoulli_mask(shape, threshold, seed, shard, subject.device))


def _made(subject: BackendUnderTest, shape: tuple[int, int], zeros: int, seed: int, shard: Shard) -> Any:
    with subject.backend.strict_precision():
        return subject.to_numpy(subject.backend.random_mask(shape, zeros, seed, shard, subject.device))
