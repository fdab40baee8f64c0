"""Faults of function transforms and of mask generation."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,attr-defined,no-any-return"

import numpy as np

from maskedlinear import masks
from maskedlinear_conformance.faults._sound import Fault, flat


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


class VmapByAProduct(Fault):
    """The rule for mapping multiplies with the mask."""

    name = "vmap by a product"
    laws = ("7",)

    def vmap(self, axes, x, weight, mask, bias, g):
        y, dx, dweight, dbias = super().vmap(axes, x, weight, mask, bias, g)
        leak = 0 * weight.sum().astype(y.dtype)
        return y + leak, dx, dweight, dbias


class VmapTakesOneBatchDimension(Fault):
    """The rule for mapping sums the bias gradient over the first batch dimension only."""

    name = "vmap takes one batch dimension"
    laws = ("7",)

    def vmap(self, axes, x, weight, mask, bias, g):
        found = super().vmap(axes, x, weight, mask, bias, g)
        return found if x.ndim < 4 else (*found[:3], g[:, 0].sum(1, dtype=np.float32).astype(g.dtype))


class VmapOverwritesItsInputs(Fault):
    """The rule for mapping masks the stacked weights in place."""

    name = "vmap overwrites its inputs"
    laws = ("7",)

    def vmap(self, axes, x, weight, mask, bias, g):
        found = super().vmap(axes, x, weight, mask, bias, g)
        weight[...] = 0
        return found


class CompiledCodeFiltersNanOnly(Fault):
    """Compiled code multiplies with the mask once NaN is filtered: infinity leaks."""

    name = "compiled code filters nan only"
    laws = ("7",)

    def compile(self, x, weight, mask, bias, g):
        found = self.both(x, weight, mask, bias, g)
        kept = (np.where(np.isnan(weight), 0, weight) * mask).astype(weight.dtype)
        return [self.masked_linear(x, kept, mask | True, bias), *found[1:]]


class CompiledCodeMultipliesTheGradient(Fault):
    """Compiled code multiplies the weight's gradient with the mask: NaN of x and g shows under it."""

    name = "compiled code multiplies the gradient"
    laws = ("7",)

    def compile(self, x, weight, mask, bias, g):
        found = self.both(x, weight, mask, bias, g)
        raw = self.both(x, weight, mask | True, bias, g)[2]
        return [*found[:2], (raw * mask + 0).astype(raw.dtype), found[3]]


class CompiledCodeOverwritesItsInputs(Fault):
    """Compiled code reuses the memory of x for what it keeps."""

    name = "compiled code overwrites its inputs"
    laws = ("10",)

    def compile(self, x, weight, mask, bias, g):
        found = self.both(x, weight, mask, bias, g)
        x[...] = 0
        return found


class CompiledCodeReusesItsResults(Fault):
    """Compiled code writes every result to the same place."""

    name = "compiled code reuses its results"
    laws = ("10",)

    def compile(self, x, weight, mask, bias, g):
        found = self.both(x, weight, mask, bias, g)
        key = tuple((part.shape, str(part.dtype)) for part in found if part is not None)
        kept = vars(self).setdefault("kept", {}).setdefault(key, found)
        for old, new in zip(kept, found, strict=True):
            if new is not None:
                old[...] = new
        return kept


class CompiledCodeSpecialisesOnABatch(Fault):
    """Compiled code reads an empty batch as a batch of one."""

    name = "compiled code specialises on a batch"
    laws = ("7",)

    def compile(self, x, weight, mask, bias, g):
        found = self.both(x, weight, mask, bias, g)
        return found if flat(x).shape[0] else [*found[:2], found[2] + mask.astype(x.dtype), found[3]]


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


class TiesGoToTheLater(Fault):
    """Of two equal words, the later one is cleared first."""

    name = "ties go to the later"
    laws = ("14",)

    def random_mask(self, shape, num_zeros, seed, shard, device):
        words = self.words(seed, shape[0] * shape[1])
        mask = np.ones(words.size, bool)
        mask[np.lexsort((-np.arange(words.size), words))[:num_zeros]] = False
        return mask.reshape(shape) if shard is None else mask.reshape(shape)[shard]
