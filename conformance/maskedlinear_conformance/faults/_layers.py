"""Faults of layers: what is kept between calls, what is written to files, and what optimizers do to dormant weights."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,attr-defined,no-any-return"

import numpy as np

from maskedlinear_conformance.faults._sound import Fault, SoundLayer, flat


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


class OptimizerGuardedByABlend(Fault):
    """The guard adds masked products of old and new: NaN and -0 are lost."""

    name = "optimizer guarded by a blend"
    laws = ("13",)

    def layer(self, weight, mask, bias):
        return _OptimizerGuardedByABlend(self, weight, mask, bias)


class _OptimizerGuardedByABlend(SoundLayer):
    def guard(self):
        return lambda moved: moved * self.mask + self.weight * ~self.mask


class OptimizerGuardFlushesSubnormals(Fault):
    """The guard adds an update of 0 in arithmetic without subnormal numbers."""

    name = "optimizer guard flushes subnormals"
    laws = ("13",)

    def layer(self, weight, mask, bias):
        return _OptimizerGuardFlushesSubnormals(self, weight, mask, bias)


class _OptimizerGuardFlushesSubnormals(SoundLayer):
    def guard(self):
        def held(moved):
            tiny = np.finfo(self.weight.dtype).tiny
            return np.where(self.mask, moved, np.where(abs(self.weight) < tiny, 0 * self.weight, self.weight))

        return held


class OptimizerClimbs(Fault):
    """The guard takes the update with the wrong sign."""

    name = "optimizer climbs"
    laws = ("13",)

    def layer(self, weight, mask, bias):
        return _OptimizerClimbs(self, weight, mask, bias)


class _OptimizerClimbs(SoundLayer):
    def guard(self):
        return lambda moved: np.where(self.mask, 2 * self.weight - moved, self.weight)


class LayerByAProduct(Fault):
    """The function selects, the layer multiplies."""

    name = "layer by a product"
    laws = ("4",)

    def layer(self, weight, mask, bias):
        return _LayerByAProduct(self, weight, mask, bias)


class _LayerByAProduct(SoundLayer):
    def derive(self):
        self.masked = (self.weight * self.mask).astype(self.weight.dtype)


class LayerMultipliesItsGradient(Fault):
    """The layer's weight gradient is multiplied with the mask."""

    name = "layer multiplies its gradient"
    laws = ("4",)

    def layer(self, weight, mask, bias):
        return _LayerMultipliesItsGradient(self, weight, mask, bias)


class _LayerMultipliesItsGradient(SoundLayer):
    def gradients(self, x, g):
        found = self.backend.both(x, self.weight, self.mask | True, self.bias, g)
        return super().gradients(x, g)[0], (found[2] * self.mask + 0).astype(x.dtype), found[3]


class LayerTakesOneBatchDimension(Fault):
    """The layer's bias gradient is summed over the first batch dimension only."""

    name = "layer takes one batch dimension"
    laws = ("1",)

    def layer(self, weight, mask, bias):
        return _LayerTakesOneBatchDimension(self, weight, mask, bias)


class _LayerTakesOneBatchDimension(SoundLayer):
    def __call__(self, x):
        y = super().__call__(x)
        return y if x.ndim < 3 else flat(y)


class LayerKeepsItsArguments(Fault):
    """The layer keeps the arrays that it was made with, and writes new values into them."""

    name = "layer keeps its arguments"
    laws = ("10",)

    def layer(self, weight, mask, bias):
        return _LayerKeepsItsArguments(self, weight, mask, bias)


class _LayerKeepsItsArguments(SoundLayer):
    def __init__(self, backend, weight, mask, bias):
        super().__init__(backend, weight, mask, bias)
        self.weight, self.mask = weight, mask

    def set_mask(self, mask):
        kept = self.mask
        super().set_mask(mask)
        kept[...] = self.mask
        self.mask = kept

    def set_weight(self, weight):
        self.weight[...] = weight
        self.derive()


class AnyNumberIsAMask(Fault):
    """``set_mask`` takes what is larger than a half for live."""

    name = "any number is a mask"
    laws = ("11",)

    def layer(self, weight, mask, bias):
        return _AnyNumberIsAMask(self, weight, mask, bias)


class _AnyNumberIsAMask(SoundLayer):
    def set_mask(self, mask):
        super().set_mask(np.asarray(mask) > 0.5)


class TransposedMaskIsReshaped(Fault):
    """``set_mask`` reshapes a mask of the wrong shape."""

    name = "transposed mask is reshaped"
    laws = ("11",)

    def layer(self, weight, mask, bias):
        return _TransposedMaskIsReshaped(self, weight, mask, bias)


class _TransposedMaskIsReshaped(SoundLayer):
    def set_mask(self, mask):
        super().set_mask(np.resize(mask, self.weight.shape))


class RefusedMaskIsKept(Fault):
    """``set_mask`` keeps the mask before it looks at it."""

    name = "refused mask is kept"
    laws = ("11",)

    def layer(self, weight, mask, bias):
        return _RefusedMaskIsKept(self, weight, mask, bias)


class _RefusedMaskIsKept(SoundLayer):
    def set_mask(self, mask):
        if np.shape(mask) == self.mask.shape:
            self.mask = np.asarray(mask) != 0
        super().set_mask(mask)
