"""Law 14: random masks are the same bit for bit everywhere, and any shard is a part of the whole."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from hypothesis import strategies as st

from maskedlinear import masks
from maskedlinear_conformance.laws import law
from maskedlinear_conformance.subject import Subject, equal_bits

__all__ = ["FROZEN", "Generation", "digest"]

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


class Generation:
    """Law 14."""

    @law(14, needs=["masks"], enough=["float32"])
    def test_random_masks_are_the_frozen_ones(self, subject: Subject) -> None:
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
    def test_any_mask_and_any_shard_of_it_is_the_cores(self, subject: Subject) -> None:
        """For any shape, count, seed and shard; no zeros, and nothing but zeros, among them."""

        @subject.holds_for(
            *(st.integers(0, 40), st.integers(0, 40), st.floats(0, 1), st.integers(0, 2**64 - 1), st.booleans()),
            also=((7, 5, 0.0, 3, False), (7, 5, 1.0, 2**64 - 1, True), (301, 203, 0.777, 2**32, True)),
        )
        def same(out: int, in_: int, fraction: float, seed: int, cut: bool) -> None:
            zeros = int(fraction * out * in_)
            shard = (slice(out // 3, out), slice(0, in_ - in_ // 4)) if cut else None
            got = _made(subject, (out, in_), zeros, seed, shard)
            whole = masks.random((out, in_), num_zeros=zeros, seed=seed)
            equal_bits([got], [whole if shard is None else whole[shard]], "the mask")


def _made(subject: Subject, shape: tuple[int, int], zeros: int, seed: int, shard: Any) -> Any:
    with subject.backend.strict():
        return subject.fetch(subject.backend.random_mask(shape, zeros, seed, shard, subject.device))
