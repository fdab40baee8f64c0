"""Faults of mask generation."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,attr-defined,no-any-return"

import numpy as np

from maskedlinear import masks
from maskedlinear_conformance.faults._reference_backend import Mutant


class StreamStartsOneWordLate(Mutant):
    """Random masks start at the second word of the stream."""

    name = "stream starts one word late"
    laws = ("14",)

    def words(self, seed, count):
        return masks.words(seed, 1, count + 1)


class SeedLosesItsUpperHalf(Mutant):
    """Seeds from 2**32 on lose their upper half."""

    name = "seed loses its upper half"
    laws = ("14",)

    def words(self, seed, count):
        return super().words(seed & 0xFFFFFFFF, count)


class WordsOfAPairSwapped(Mutant):
    """The two words of a block are swapped."""

    name = "words of a pair swapped"
    laws = ("14",)

    def words(self, seed, count):
        return masks.words(seed, 0, count + count % 2).reshape(-1, 2)[:, ::-1].reshape(-1)[:count]


class AShardIsAMaskOfItsOwn(Mutant):
    """A shard is drawn as a mask of the shard's shape."""

    name = "a shard is a mask of its own"
    laws = ("14",)

    def random_mask(self, shape, num_zeros, seed, shard, device):
        whole = super().random_mask(shape, num_zeros, seed, None, device)
        if shard is None or not whole[shard].size:
            return whole if shard is None else whole[shard]
        part = whole[shard]
        return super().random_mask(part.shape, int((~part).sum()), seed, None, device)


class ZerosTakenForOnes(Mutant):
    """The number of zeros is taken for the number of live connections."""

    name = "zeros taken for ones"
    laws = ("14",)

    def random_mask(self, shape, num_zeros, seed, shard, device):
        return super().random_mask(shape, shape[0] * shape[1] - num_zeros, seed, shard, device)


class FrameworkGenerator(Mutant):
    """Masks come from NumPy's generator."""

    name = "framework generator"
    laws = ("14",)

    def words(self, seed, count):
        return np.random.default_rng(seed).integers(0, 2**32, count, np.uint32)


class TiesGoToTheLater(Mutant):
    """Of two equal words, the later one is cleared first."""

    name = "ties go to the later"
    laws = ("14",)

    def random_mask(self, shape, num_zeros, seed, shard, device):
        words = self.words(seed, shape[0] * shape[1])
        mask = np.ones(words.size, bool)
        mask[np.lexsort((-np.arange(words.size), words))[:num_zeros]] = False
        return mask.reshape(shape) if shard is None else mask.reshape(shape)[shard]


class NoZerosClearsOne(Mutant):
    """A mask without zeros has one all the same."""

    name = "no zeros clears one"
    laws = ("14",)

    def random_mask(self, shape, num_zeros, seed, shard, device):
        return super().random_mask(shape, max(num_zeros, min(1, shape[0] * shape[1])), seed, shard, device)


class AllZerosLeavesOne(Mutant):
    """A mask of nothing but zeros keeps one connection, as a partition needs."""

    name = "all zeros leaves one"
    laws = ("14",)

    def random_mask(self, shape, num_zeros, seed, shard, device):
        size = shape[0] * shape[1]
        return super().random_mask(shape, min(num_zeros, size - 1) if size > 1 else num_zeros, seed, shard, device)


class OddShardsStartOneWordEarly(Mutant):
    """A shard that starts at an odd place reads the block's first word."""

    name = "odd shards start one word early"
    laws = ("14",)

    def random_mask(self, shape, num_zeros, seed, shard, device):
        whole = super().random_mask(shape, num_zeros, seed, None, device)
        if shard is None:
            return whole
        start = (shard[0].start or 0) * shape[1] + (shard[1].start or 0)
        return np.roll(whole.reshape(-1), start % 2).reshape(shape)[shard]


class WordsAreSigned(Mutant):
    """Words are compared as signed integers."""

    name = "words are signed"
    laws = ("14",)

    def words(self, seed, count):
        return super().words(seed, count) ^ np.uint32(0x80000000)


class CounterLosesItsHighWord(Mutant):
    """Blocks from 2**32 on are counted from 0 again."""

    name = "counter loses its high word"
    laws = ("14",)

    def bernoulli_mask(self, shape, threshold, seed, shard, device):
        if shape[0] * shape[1] <= 2**33:
            return super().bernoulli_mask(shape, threshold, seed, shard, device)
        rows, columns = shard
        again = [row % (2**33 // shape[1]) for row in range(rows.start, rows.stop)]
        shards = [(slice(row, row + 1), columns) for row in again]
        return np.concatenate([masks.bernoulli(shape, threshold=threshold, seed=seed, shard=one) for one in shards])


class ThresholdIsKept(Mutant):
    """A Bernoulli mask keeps the word that equals its threshold."""

    name = "threshold is kept"
    laws = ("14",)

    def bernoulli_mask(self, shape, threshold, seed, shard, device):
        return super().bernoulli_mask(shape, min(threshold + 1, 2**32), seed, shard, device)


class ThresholdWraps(Mutant):
    """The threshold is a word, so that the one that keeps everything is 0."""

    name = "threshold wraps"
    laws = ("14",)

    def bernoulli_mask(self, shape, threshold, seed, shard, device):
        return super().bernoulli_mask(shape, threshold & 0xFFFFFFFF, seed, shard, device)


class BernoulliMaskKeepsTheOthers(Mutant):
    """A Bernoulli mask keeps the words that are not below its threshold."""

    name = "bernoulli mask keeps the others"
    laws = ("14",)

    def bernoulli_mask(self, shape, threshold, seed, shard, device):
        return ~super().bernoulli_mask(shape, threshold, seed, shard, device)
