"""Faults of transforms, mask generation and layers: what is kept between calls, and what is written to files."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,attr-defined,no-any-return"

import numpy as np

from maskedlinear import masks
from maskedlinear_conformance.faults._sound import Fault, SoundLayer


class VmapUsesTheFirstMask(Fault):
    """Mapping over masks uses the first of them."""

    name = "vmap uses the first mask"
    laws = ("7",)

    def vmap(self, axes, x, weight, mask, bias, g):
        if axes[2] is not None:
            mask, axes = np.take(mask, 0, axes[2]), (*axes[:2], None, *axes[3:])
        if all(axis is None for axis in axes):
            x, axes = np.stack([x] * 3), (0, *axes[1:])
        return super().vmap(axes, x, weight, mask, bias, g)


class VmapAddsUpTheBiasGradient(Fault):
    """Mapping gives every problem the sum of the bias' gradients."""

    name = "vmap adds up the bias gradient"
    laws = ("7",)

    def vmap(self, axes, x, weight, mask, bias, g):
        y, dx, dweight, dbias = super().vmap(axes, x, weight, mask, bias, g)
        return y, dx, dweight, np.broadcast_to(dbias.sum(0), dbias.shape).astype(dbias.dtype)


class VmapDropsTheMaskOfDweight(Fault):
    """The rule for mapping does not mask the weight's gradient."""

    name = "vmap drops the mask of dweight"
    laws = ("7",)

    def vmap(self, axes, x, weight, mask, bias, g):
        found = super().vmap(axes, x, weight, mask, bias, g)
        raw = super().vmap(axes, x, weight, mask | True, bias, g)
        return found[0], found[1], raw[2], found[3]


class CompiledCodeKeepsTheFirstMask(Fault):
    """What was compiled is kept by shape, and keeps its mask."""

    name = "compiled code keeps the first mask"
    laws = ("7",)

    def compile(self, x, weight, mask, bias, g):
        kept = vars(self).setdefault("kept", {}).setdefault((x.shape, str(x.dtype)), mask.copy())
        return self.both(x, weight, kept, bias, g)


class CompiledCodeKeepsTheFirstWeight(Fault):
    """What was compiled has folded the weight as a constant."""

    name = "compiled code keeps the first weight"
    laws = ("7",)

    def compile(self, x, weight, mask, bias, g):
        kept = vars(self).setdefault("kept", {}).setdefault((x.shape, str(x.dtype)), weight.copy())
        return self.both(x, kept, mask, bias, g)


class CompiledCodeDropsTheRule(Fault):
    """Compiled code has the derivative of a product: NaN under the mask."""

    name = "compiled code drops the rule"
    laws = ("7",)

    def compile(self, x, weight, mask, bias, g):
        found = self.both(x, weight, mask, bias, g)
        return [found[0], self.product(g, weight * mask).astype(x.dtype), *found[2:]]


class CompiledCodeKeepsTheBiasOut(Fault):
    """Compiled code is kept without regard to whether there is a bias."""

    name = "compiled code keeps the bias out"
    laws = ("7",)

    def compile(self, x, weight, mask, bias, g):
        seen = vars(self).setdefault("seen", {}).setdefault((x.shape, str(x.dtype)), bias is not None)
        found = self.both(x, weight, mask, bias, g)
        return found if seen == (bias is not None) else [found[0] + 1, *found[1:]]


class CheckpointRecomputesWithoutTheMask(Fault):
    """Recomputation in the backward pass forgets the mask."""

    name = "checkpoint recomputes without the mask"
    laws = ("7",)

    def checkpoint(self, x, weight, mask, bias, g):
        return [self.masked_linear(x, weight, mask, bias), *self.both(x, weight, mask | True, bias, g)[1:]]


class ScanKeepsTheLastGradient(Fault):
    """A scan keeps the last step's gradient, not their sum."""

    name = "scan keeps the last gradient"
    laws = ("7",)

    def added(self, steps):
        return steps[-1]


class StreamStartsOneWordLate(Fault):
    """Random masks start at the second word of the stream."""

    name = "stream starts one word late"
    laws = ("14",)

    def words(self, seed, count):
        return masks.words(seed, 1, count + 1)


class SeedLosesItsUpperHalf(Fault):
    """Seeds from 2**32 on lose their upper half."""

    name = "seed loses its upper half"
    laws = ("14",)

    def words(self, seed, count):
        return super().words(seed & 0xFFFFFFFF, count)


class WordsOfAPairSwapped(Fault):
    """The two words of a block are swapped."""

    name = "words of a pair swapped"
    laws = ("14",)

    def words(self, seed, count):
        return masks.words(seed, 0, count + count % 2).reshape(-1, 2)[:, ::-1].reshape(-1)[:count]


class AShardIsAMaskOfItsOwn(Fault):
    """A shard is drawn as a mask of the shard's shape."""

    name = "a shard is a mask of its own"
    laws = ("14",)

    def random_mask(self, shape, num_zeros, seed, shard, device):
        whole = super().random_mask(shape, num_zeros, seed, None, device)
        if shard is None or not whole[shard].size:
            return whole if shard is None else whole[shard]
        part = whole[shard]
        return super().random_mask(part.shape, int((~part).sum()), seed, None, device)


class ZerosTakenForOnes(Fault):
    """The number of zeros is taken for the number of live connections."""

    name = "zeros taken for ones"
    laws = ("14",)

    def random_mask(self, shape, num_zeros, seed, shard, device):
        return super().random_mask(shape, shape[0] * shape[1] - num_zeros, seed, shard, device)


class FrameworkGenerator(Fault):
    """Masks come from NumPy's generator."""

    name = "framework generator"
    laws = ("14",)

    def words(self, seed, count):
        return np.random.default_rng(seed).integers(0, 2**32, count, np.uint32)


class StaleMask(Fault):
    """The masked weight is derived again when the weight changes, not when the mask does."""

    name = "stale mask"
    laws = ("11",)

    def layer(self, weight, mask, bias):
        return _StaleMask(self, weight, mask, bias)


class _StaleMask(SoundLayer):
    def set_mask(self, mask):
        self.mask = np.array(mask)


class StaleWeight(Fault):
    """The masked weight is derived again when the mask changes, not when the weight does."""

    name = "stale weight"
    laws = ("11",)

    def layer(self, weight, mask, bias):
        return _StaleWeight(self, weight, mask, bias)


class _StaleWeight(SoundLayer):
    def set_weight(self, weight):
        self.weight = weight.copy()


class MaskOfTheCallerKept(Fault):
    """The layer keeps the caller's mask itself, not a copy."""

    name = "mask of the caller kept"
    laws = ("11",)

    def layer(self, weight, mask, bias):
        return _MaskOfTheCallerKept(self, weight, mask, bias)


class _MaskOfTheCallerKept(SoundLayer):
    def set_mask(self, mask):
        self.mask = mask
        self.derive()


class DormantWeightsZeroed(Fault):
    """A new mask sets the weights under it to zero."""

    name = "dormant weights zeroed"
    laws = ("11",)

    def layer(self, weight, mask, bias):
        return _DormantWeightsZeroed(self, weight, mask, bias)


class _DormantWeightsZeroed(SoundLayer):
    def set_mask(self, mask):
        super().set_mask(mask)
        self.weight = np.where(self.mask, self.weight, 0).astype(self.weight.dtype)


class StaleMaskInTheGradient(Fault):
    """The gradient is masked with the mask that the layer was made with."""

    name = "stale mask in the gradient"
    laws = ("11",)

    def layer(self, weight, mask, bias):
        return _StaleMaskInTheGradient(self, weight, mask, bias)


class _StaleMaskInTheGradient(SoundLayer):
    def gradients(self, x, g):
        vars(self).setdefault("first", self.mask.copy())
        found = self.backend.both(x, self.weight, self.first, self.bias, g)
        return found[1], found[2], found[3]


class CheckpointLosesDormantWeights(Fault):
    """A checkpoint keeps the masked weight."""

    name = "checkpoint loses dormant weights"
    laws = ("12",)

    def layer(self, weight, mask, bias):
        return _CheckpointLosesDormantWeights(self, weight, mask, bias)


class _CheckpointLosesDormantWeights(SoundLayer):
    def kept(self, name, array):
        return np.where(self.mask, array, 0) if name == "weight" else array


class CheckpointLosesTheMask(Fault):
    """A checkpoint has weights only."""

    name = "checkpoint loses the mask"
    laws = ("12",)

    def layer(self, weight, mask, bias):
        return _CheckpointLosesTheMask(self, weight, mask, bias)


class _CheckpointLosesTheMask(SoundLayer):
    def load(self, path):
        mask = self.mask
        super().load(path)
        self.mask = mask
        self.derive()


class CheckpointInHalfPrecision(Fault):
    """A checkpoint keeps half precision."""

    name = "checkpoint in half precision"
    laws = ("12",)

    def layer(self, weight, mask, bias):
        return _CheckpointInHalfPrecision(self, weight, mask, bias)


class _CheckpointInHalfPrecision(SoundLayer):
    def kept(self, name, array):
        return array.astype(np.float16) if array.dtype.kind == "f" else array


class CheckpointCleansNan(Fault):
    """A checkpoint turns NaN and infinity into numbers."""

    name = "checkpoint cleans nan"
    laws = ("12",)

    def layer(self, weight, mask, bias):
        return _CheckpointCleansNan(self, weight, mask, bias)


class _CheckpointCleansNan(SoundLayer):
    def kept(self, name, array):
        return np.nan_to_num(array) if name == "weight" else array


class CheckpointLosesNegativeZero(Fault):
    """A checkpoint turns -0 into +0."""

    name = "checkpoint loses negative zero"
    laws = ("12",)

    def layer(self, weight, mask, bias):
        return _CheckpointLosesNegativeZero(self, weight, mask, bias)


class _CheckpointLosesNegativeZero(SoundLayer):
    def kept(self, name, array):
        return array + 0.0 if name == "weight" else array


class StaleAfterLoading(Fault):
    """What was derived before a checkpoint was loaded is used after it."""

    name = "stale after loading"
    laws = ("12",)

    def layer(self, weight, mask, bias):
        return _StaleAfterLoading(self, weight, mask, bias)


class _StaleAfterLoading(SoundLayer):
    def load(self, path):
        masked = self.masked
        super().load(path)
        self.masked = masked


class OptimizerNotGuarded(Fault):
    """Momentum and weight decay move dormant weights."""

    name = "optimizer not guarded"
    laws = ("13",)

    def layer(self, weight, mask, bias):
        return _OptimizerNotGuarded(self, weight, mask, bias)


class _OptimizerNotGuarded(SoundLayer):
    def guard(self):
        return lambda moved: moved


class OptimizerGuardedByAProduct(Fault):
    """The guard multiplies the weight with the mask."""

    name = "optimizer guarded by a product"
    laws = ("13",)

    def layer(self, weight, mask, bias):
        return _OptimizerGuardedByAProduct(self, weight, mask, bias)


class _OptimizerGuardedByAProduct(SoundLayer):
    def guard(self):
        return lambda moved: moved * self.mask


class OptimizerGuardedByTheFirstMask(Fault):
    """The guard keeps the mask that held when it was made."""

    name = "optimizer guarded by the first mask"
    laws = ("13",)

    def layer(self, weight, mask, bias):
        return _OptimizerGuardedByTheFirstMask(self, weight, mask, bias)


class _OptimizerGuardedByTheFirstMask(SoundLayer):
    def guard(self):
        mask = self.mask.copy()
        return lambda moved: np.where(mask, moved, self.weight)


class OptimizerGuardRounds(Fault):
    """The guard keeps dormant weights in half precision while a step runs."""

    name = "optimizer guard rounds"
    laws = ("13",)

    def layer(self, weight, mask, bias):
        return _OptimizerGuardRounds(self, weight, mask, bias)


class _OptimizerGuardRounds(SoundLayer):
    def guard(self):
        return lambda moved: np.where(self.mask, moved, self.weight.astype(np.float16))


class OptimizerFrozenAltogether(Fault):
    """The guard keeps every weight."""

    name = "optimizer frozen altogether"
    laws = ("13",)

    def layer(self, weight, mask, bias):
        return _OptimizerFrozenAltogether(self, weight, mask, bias)


class _OptimizerFrozenAltogether(SoundLayer):
    def guard(self):
        return lambda moved: self.weight
