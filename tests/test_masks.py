"""Masks: the generator against published answers, the stream frozen by hashes, the exact counts, every refusal."""

from __future__ import annotations

import math
import tracemalloc
from decimal import Decimal
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskedlinear import masks
from maskedlinear.masks import _random, words
from maskedlinear_conformance.laws.generation import FROZEN, digest

# Random123's kat_vectors, threefry2x32 with 20 rounds: counter, key, result.
KNOWN = [
    ((0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter: tuple[int, int], key: tuple[int, int], result: tuple[int, int]) -> None:
    c0, c1 = (np.array([word], np.uint32) for word in counter)
    assert tuple(int(word[0]) for word in masks.threefry2x32(key, c0, c1)) == result


def test_a_word_is_the_generator_at_its_counter() -> None:
    seed = 0x0123456789ABCDEF
    for i in (0, 1, 2, 65535, 65536, 65537, 2**33 - 1, 2**33, 2**33 + 1, 2**34 + 5):
        block = i >> 1
        pair = masks.threefry2x32(
            (seed >> 32, seed & 0xFFFFFFFF),
            np.array([block >> 32], np.uint32),
            np.array([block & 0xFFFFFFFF], np.uint32),
        )
        assert masks.words(seed, i, i + 1)[0] == pair[i & 1][0]


@given(st.integers(0, 2**40), st.integers(0, 200_000), st.integers(0, 2**64 - 1))
def test_words_do_not_depend_on_where_they_start(start: int, count: int, seed: int) -> None:
    whole = masks.words(seed, start, start + count)
    cut = count // 3
    np.testing.assert_array_equal(whole[cut:], masks.words(seed, start + cut, start + count))


# The stream is frozen: these hashes, and FROZEN's, never change.
BERNOULLI = {
    (10, 16, 1 << 31, 0): "a5cffb93796fb176",
    (257, 129, 12345678, 2**64 - 1): "3d8f73c69c10930e",
    (1000, 1001, (1 << 32) // 10, 5): "729c6e18ecc8fc70",
}


@pytest.mark.parametrize(("key", "want"), FROZEN.items())
def test_random_masks_are_frozen(key: tuple[int, int, int, int], want: str) -> None:
    out, in_, zeros, seed = key
    assert digest(masks.random((out, in_), num_zeros=zeros, seed=seed)) == want


@pytest.mark.parametrize(("key", "want"), BERNOULLI.items())
def test_bernoulli_masks_are_frozen(key: tuple[int, int, int, int], want: str) -> None:
    out, in_, threshold, seed = key
    assert digest(masks.bernoulli((out, in_), threshold=threshold, seed=seed)) == want


def by_sorting(shape: tuple[int, int], zeros: int, seed: int) -> Any:
    """The definition, as plainly as it can be written."""
    size = shape[0] * shape[1]
    order = np.lexsort((np.arange(size), masks.words(seed, 0, size)))
    mask = np.ones(size, bool)
    mask[order[:zeros]] = False
    return mask.reshape(shape)


@given(st.integers(0, 40), st.integers(0, 40), st.data())
def test_random_clears_the_smallest_words(out: int, in_: int, data: st.DataObject) -> None:
    zeros, seed = data.draw(st.integers(0, out * in_)), data.draw(st.integers(0, 2**64 - 1))
    mask = masks.random((out, in_), num_zeros=zeros, seed=seed)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, by_sorting((out, in_), zeros, seed))


def test_random_finds_the_boundary_from_a_window_that_misses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    stream = _random._stream

    def counted(*arguments: int) -> Any:
        passes.append(arguments)
        return stream(*arguments)

    monkeypatch.setattr(_random, "_stream", counted)
    monkeypatch.setattr(_random.math, "sqrt", lambda _: -63.9 / 8)  # a window of about ±0.1 words
    np.testing.assert_array_equal(masks.random((300, 400), num_zeros=60_000, seed=4), by_sorting((300, 400), 60_000, 4))
    assert len(passes) > 1


def test_equal_words_are_cleared_in_the_order_of_their_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_random, "words", lambda seed, start, stop: np.full(stop - start, 7, np.uint32))
    mask = masks.random((10, 10), num_zeros=33)
    assert mask.ravel().tolist() == [False] * 33 + [True] * 67


def test_masks_of_one_seed_are_nested() -> None:
    sparse, dense = (masks.random((50, 60), sparsity=s, seed=3) for s in (0.9, 0.6))
    assert not (sparse & ~dense).any()


@pytest.mark.parametrize(
    ("sparsity", "zeros"),
    [
        (0, 0),
        (1, 100),
        (0.29, 29),  # 0.29 * 100 is 28.999999999999996 in floating point
        (0.57, 57),
        (0.999, 99),
        (np.float32(0.9), 90),
        (Fraction(1, 3), 33),
        (Decimal("0.07"), 7),
        (1e-5, 0),
    ],
)
def test_sparsity_is_rounded_down_exactly(sparsity: Any, zeros: int) -> None:
    assert (~masks.random((10, 10), sparsity=sparsity)).sum() == zeros


def test_bernoulli_by_its_definition() -> None:
    words = masks.words(9, 0, 35 * 21).reshape(35, 21)
    np.testing.assert_array_equal(masks.bernoulli((35, 21), threshold=1 << 30, seed=9), words < (1 << 30))
    assert masks.bernoulli((35, 21), threshold=1 << 32).all()
    assert masks.bernoulli((35, 21), sparsity=0).all()
    assert not masks.bernoulli((35, 21), sparsity=1).any()
    np.testing.assert_array_equal(
        masks.bernoulli((35, 21), sparsity=0.75, seed=9), masks.bernoulli((35, 21), threshold=1 << 30, seed=9)
    )


@pytest.mark.parametrize("make", [masks.random, masks.bernoulli])
@given(data=st.data())
def test_any_shard_is_a_part_of_the_whole(make: Any, data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(0, 30), st.integers(0, 30)))
    shard = tuple(data.draw(st.slices(n).filter(lambda s: s.step in (None, 1))) for n in shape)
    whole = make(shape, sparsity=0.4, seed=2)
    np.testing.assert_array_equal(make(shape, sparsity=0.4, seed=2, shard=shard), whole[shard])


def test_shards_across_chunks() -> None:
    shape = (3, _random._CHUNK - 5)
    for make in (masks.random, masks.bernoulli):
        whole = make(shape, sparsity=0.5, seed=6)
        for shard in [(slice(1, 3), slice(100, -100)), (slice(1, 2), slice(None)), (slice(0, 3), slice(0, 1))]:
            np.testing.assert_array_equal(make(shape, sparsity=0.5, seed=6, shard=shard), whole[shard])


def test_a_sharded_jax_array_is_made_shard_by_shard() -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("d",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    mask = jax.make_array_from_callback((8, 6), sharding, lambda i: masks.random((8, 6), sparsity=0.5, seed=1, shard=i))
    np.testing.assert_array_equal(np.asarray(mask), masks.random((8, 6), sparsity=0.5, seed=1))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sparsity": 1.5}, ValueError, r"sparsity is the fraction of zeros and must be in \[0, 1\]; got 1.5"),
        ({"sparsity": -0.1}, ValueError, r"got -0.1"),
        ({"sparsity": float("nan")}, ValueError, r"got nan"),
        ({"sparsity": Decimal("NaN")}, ValueError, r"got NaN"),
        ({"sparsity": "half"}, TypeError, r"sparsity must be a number in \[0, 1\]; got 'half'"),
        ({}, ValueError, r"exactly one of sparsity and num_zeros; got sparsity=None, num_zeros=None"),
        ({"sparsity": 0.5, "num_zeros": 3}, ValueError, r"exactly one of .* got sparsity=0.5, num_zeros=3"),
        ({"num_zeros": 13}, ValueError, r"num_zeros must be from 0 to the mask's size, 12; got 13"),
        ({"num_zeros": -1}, ValueError, r"got -1"),
        ({"num_zeros": 1.0}, TypeError, r"num_zeros must be an integer; got 1.0"),
        ({"num_zeros": True}, TypeError, r"num_zeros must be an integer; got True"),
        ({"num_zeros": 1, "seed": -1}, ValueError, r"seed must be in \[0, 2\*\*64\); got -1"),
        ({"num_zeros": 1, "seed": 2**64}, ValueError, r"seed must be in"),
        ({"num_zeros": 1, "seed": 0.5}, TypeError, r"seed must be an integer; got 0.5"),
        ({"num_zeros": 1, "shard": (slice(0, 4, 2), slice(None))}, ValueError, r"two slices .* of step 1"),
    ],
)
def test_random_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        masks.random((3, 4), **arguments)


@pytest.mark.parametrize("make", [masks.random, masks.bernoulli])
@pytest.mark.parametrize(
    ("shape", "error", "message"),
    [
        ((-1, 4), ValueError, r"must not be negative; got \(-1, 4\)"),
        ((3,), ValueError, r"shape must be \(out, in\); got \(3,\)"),
        (12, ValueError, r"shape must be \(out, in\); got 12"),
        ((3.0, 4), TypeError, r"a size must be an integer; got 3.0"),
    ],
)
def test_shapes_are_refused(make: Any, shape: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(shape, sparsity=0.5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, r"exactly one of sparsity, threshold and probabilities"),
        ({"sparsity": 0.5, "threshold": 1}, ValueError, r"exactly one of sparsity, threshold and probabilities"),
        ({"threshold": 2**32 + 1}, ValueError, r"threshold must be in \[0, 2\*\*32\]; got 4294967297"),
        ({"threshold": -1}, ValueError, r"got -1"),
        ({"sparsity": 2}, ValueError, r"got 2"),
        ({"sparsity": 0.5, "probabilities": np.ones((3, 4))}, ValueError, "threshold=None and probabilities"),
        ({"probabilities": np.full((3, 4), 1.5)}, ValueError, r"probabilities must be in \[0, 1\]; got 1.5"),
        ({"probabilities": [0.5, 0.5, np.nan, 0.5]}, ValueError, "got nan"),
        ({"probabilities": np.ones((4, 3))}, ValueError, r"\(out, in\) = \(3, 4\).*the transpose"),
        ({"probabilities": np.ones((3, 4), complex)}, TypeError, "real numbers"),
    ],
)
def test_bernoulli_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        masks.bernoulli((3, 4), **arguments)


def test_bernoulli_of_a_matrix_of_probabilities_is_that_of_each_entry() -> None:
    probabilities = np.linspace(0, 1, 12).reshape(3, 4) ** 2
    drawn = words(7, 0, 12).reshape(3, 4).astype(object)
    want = [
        [drawn[i, j] < math.floor(Fraction(float(probabilities[i, j])) * 2**32) for j in range(4)] for i in range(3)
    ]
    assert np.array_equal(masks.bernoulli((3, 4), probabilities=probabilities, seed=7), want)
    many = np.broadcast_to(np.array([0.0, 0.1, 0.5, 1.0])[:, None], (4, 300_000))  # across blocks of rows
    found = masks.bernoulli(many.shape, probabilities=many, seed=7)
    assert not found[0].any()
    assert found[3].all()
    np.testing.assert_allclose(found.mean(1), [0, 0.1, 0.5, 1], atol=0.005)
    assert np.array_equal(found, masks.bernoulli(many.shape, probabilities=many[:, :1], seed=7))
    part = (slice(1, 3), slice(70_000, 200_001))
    assert np.array_equal(masks.bernoulli(many.shape, probabilities=many, seed=7, shard=part), found[part])
    assert np.array_equal(
        masks.bernoulli((5, 9), probabilities=0.25, seed=1), masks.bernoulli((5, 9), sparsity=0.75, seed=1)
    )


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float16, np.float64])
def test_as_mask_reads_zeros_and_ones(dtype: Any) -> None:
    want = masks.random((3, 4), sparsity=0.5)
    given_mask = want.astype(dtype)
    np.testing.assert_array_equal(masks.as_mask(given_mask, (3, 4)), want)
    np.testing.assert_array_equal(masks.as_mask(given_mask.tolist(), (3, 4)), want)


@pytest.mark.parametrize("send", [torch.asarray, jnp.asarray], ids=["torch", "jax"])
def test_as_mask_stays_in_its_framework(send: Any) -> None:
    given_mask = send(masks.random((3, 4), sparsity=0.5).astype(np.float32))
    checked = masks.as_mask(given_mask, (3, 4))
    assert type(checked) is type(given_mask)
    with pytest.raises(ValueError, match=r"got 0.5 at \(0, "):
        masks.as_mask(given_mask * 0.5, (3, 4))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones((4, 3)), r"weight \(out, in\) = \(3, 4\); got \(4, 3\), which is its transpose: pass mask.T"),
        (np.ones((3, 5)), r"= \(3, 4\); got \(3, 5\)$"),
        (np.ones(12), r"got \(12,\)"),
        (1, r"got \(\)"),
        (np.full((3, 4), 0.5), r"booleans, or 0s and 1s; got 0.5 at \(0, 0\): choose the connections first"),
        (np.where(np.arange(12).reshape(3, 4) == 6, np.nan, 1.0), r"got nan at \(1, 2\)"),
        (np.full((3, 4), -1), r"got -1 at \(0, 0\)"),
        (np.full((3, 4), "x"), r"got an array of dtype"),
        (None, r"got an array of dtype object"),
        ([[1, 0], [1]], r"got nested lists of different lengths: make the rows equally long"),
        (np.ones((3, 4), complex), r"0s and 1s; got an array of dtype complex128"),
    ],
)
def test_as_mask_refuses(mask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        masks.as_mask(mask, (3, 4))


def test_a_mask_takes_little_more_than_itself() -> None:
    tracemalloc.start()
    mask = masks.random((3, 1 << 20), sparsity=0.9)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak - mask.nbytes < 4 << 20
