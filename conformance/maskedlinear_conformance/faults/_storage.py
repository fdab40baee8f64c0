"""Faults of storage: what shows and does not act, acts and does not show, or is lost while it is dormant."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,attr-defined,no-any-return"

import numpy as np

from maskedlinear_conformance.faults._reference_backend import Mutant
from maskedlinear_conformance.faults._reference_layer import ReferenceLayer


class DormantValuesLeftInTheWeight(Mutant):
    """The weight keeps what is dormant under the mask, and calls select."""

    name = "dormant values left in the weight"
    laws = ("13", "15")

    def layer(self, weight, mask, bias):
        return _DormantValuesLeftInTheWeight(self, weight, mask, bias)


class _DormantValuesLeftInTheWeight(ReferenceLayer):
    def divide(self, full):
        super().divide(full)
        self.weight = np.array(full)
        self.note()

    def __call__(self, x):
        return self.backend.masked_linear(x, self.weight, self.mask, self.bias)

    def frozen_step(self, optimizer):
        step = super().frozen_step(optimizer)

        def held(x, g):
            self.weight = self.full()
            step(x, g)
            self.weight = np.where(self.mask, self.weight, self.dormant)

        return held


class MinusZeroUnderTheMask(Mutant):
    """The weight under the mask is -0 where a product with the mask makes it so."""

    name = "minus zero under the mask"
    laws = ("15",)

    def layer(self, weight, mask, bias):
        return _MinusZeroUnderTheMask(self, weight, mask, bias)


class _MinusZeroUnderTheMask(ReferenceLayer):
    def select(self, mask, values):
        return np.where(mask, values, np.copysign(values.dtype.type(0), values))


class SmallestNumberUnderTheMask(Mutant):
    """The weight under the mask is the smallest number, so that no division by it fails."""

    name = "smallest number under the mask"
    laws = ("15",)

    def layer(self, weight, mask, bias):
        return _SmallestNumberUnderTheMask(self, weight, mask, bias)


class _SmallestNumberUnderTheMask(ReferenceLayer):
    def select(self, mask, values):
        return np.where(mask, values, np.finfo(values.dtype).smallest_subnormal)


class SecondBlockNotProjected(Mutant):
    """Large weights are set to 0 in blocks of 2¹⁴ entries, and only the first is."""

    name = "second block not projected"
    laws = ("15", "16")

    def layer(self, weight, mask, bias):
        return _SecondBlockNotProjected(self, weight, mask, bias)


class _SecondBlockNotProjected(ReferenceLayer):
    def select(self, mask, values):
        mask = mask.copy()
        mask.reshape(-1)[1 << 14 :] = True
        return super().select(mask, values)

    def __call__(self, x):
        self.project()
        return self.backend.masked_linear(
            x, self.weight, self.mask if self.mask.mean() > 0.2 else self.mask | True, self.bias
        )


class NewMaskTakesNothingOut(Mutant):
    """``set_mask`` brings dormant values back and leaves what the mask takes out in the weight."""

    name = "new mask takes nothing out"
    laws = ("11", "15")

    def layer(self, weight, mask, bias):
        return _NewMaskTakesNothingOut(self, weight, mask, bias)


class _NewMaskTakesNothingOut(ReferenceLayer):
    def set_mask(self, mask):
        weight = self.weight.copy()
        super().set_mask(mask)
        self.weight = np.where(self.mask, self.weight, weight)
        self.note()


class RevivedWeightsStartAtZero(Mutant):
    """A connection that a mask brings back starts at 0."""

    name = "revived weights start at zero"
    laws = ("11", "15")

    def layer(self, weight, mask, bias):
        return _RevivedWeightsStartAtZero(self, weight, mask, bias)


class _RevivedWeightsStartAtZero(ReferenceLayer):
    def set_mask(self, mask):
        before = self.mask.copy()
        super().set_mask(mask)
        self.weight = self.weight * (before | ~self.mask)
        self.note()


class DormantValuesForgottenOnceTheyWereLive(Mutant):
    """What a mask brought back and another takes out again is not dormant."""

    name = "dormant values forgotten once they were live"
    laws = ("11", "15")

    def layer(self, weight, mask, bias):
        return _DormantValuesForgottenOnceTheyWereLive(self, weight, mask, bias)


class _DormantValuesForgottenOnceTheyWereLive(ReferenceLayer):
    def put_aside(self, full):
        first = vars(self).setdefault("first", self.mask.copy())
        return np.where(first, full.dtype.type(0), super().put_aside(full))


class DormantZerosLoseTheirSign(Mutant):
    """-0 is +0 once it was dormant."""

    name = "dormant zeros lose their sign"
    laws = ("15",)

    def layer(self, weight, mask, bias):
        return _DormantZerosLoseTheirSign(self, weight, mask, bias)


class _DormantZerosLoseTheirSign(ReferenceLayer):
    def put_aside(self, full):
        return super().put_aside(full) + full.dtype.type(0)


class DormantNanIsZero(Mutant):
    """NaN is 0 once it was dormant."""

    name = "dormant nan is zero"
    laws = ("15",)

    def layer(self, weight, mask, bias):
        return _DormantNanIsZero(self, weight, mask, bias)


class _DormantNanIsZero(ReferenceLayer):
    def put_aside(self, full):
        dormant = super().put_aside(full)
        return np.where(np.isnan(dormant), dormant.dtype.type(0), dormant)


class DormantInfinitiesAreCut(Mutant):
    """Infinity is the largest number once it was dormant."""

    name = "dormant infinities are cut"
    laws = ("15",)

    def layer(self, weight, mask, bias):
        return _DormantInfinitiesAreCut(self, weight, mask, bias)


class _DormantInfinitiesAreCut(ReferenceLayer):
    def put_aside(self, full):
        dormant, largest = super().put_aside(full), np.finfo(full.dtype).max
        return np.where(np.isinf(dormant), np.copysign(largest, dormant), dormant)


class DormantSubnormalsAreFlushed(Mutant):
    """Subnormal numbers are 0 once they were dormant."""

    name = "dormant subnormals are flushed"
    laws = ("15",)

    def layer(self, weight, mask, bias):
        return _DormantSubnormalsAreFlushed(self, weight, mask, bias)


class _DormantSubnormalsAreFlushed(ReferenceLayer):
    def put_aside(self, full):
        dormant = super().put_aside(full)
        return np.where(abs(dormant) < np.finfo(full.dtype).tiny, 0 * dormant, dormant)


class DormantValuesOfTheOldMaskMove(Mutant):
    """A revived weight is the old live weight plus its dormant value: exact for most numbers, and not for all."""

    name = "dormant values of the old mask move"
    laws = ("15",)

    def layer(self, weight, mask, bias):
        return _DormantValuesOfTheOldMaskMove(self, weight, mask, bias)


class _DormantValuesOfTheOldMaskMove(ReferenceLayer):
    def full(self):
        self.project()
        return self.weight + self.dormant


class SavedWeightIsWhole(Mutant):
    """A checkpoint has live and dormant values in its weight."""

    name = "saved weight is whole"
    laws = ("15",)

    def layer(self, weight, mask, bias):
        return _SavedWeightIsWhole(self, weight, mask, bias)


class _SavedWeightIsWhole(ReferenceLayer):
    def kept(self, name, array):
        return self.full() if name == "weight" else array

    def load(self, path):
        super().load(path)
        self.divide(np.where(self.mask, self.weight, self.dormant))


class LoadedLayerKeepsItsDormantValues(Mutant):
    """A layer that was loaded has the dormant values from before."""

    name = "loaded layer keeps its dormant values"
    laws = ("12", "15")

    def layer(self, weight, mask, bias):
        return _LoadedLayerKeepsItsDormantValues(self, weight, mask, bias)


class _LoadedLayerKeepsItsDormantValues(ReferenceLayer):
    def load(self, path):
        dormant = self.dormant
        super().load(path)
        self.dormant = np.where(self.mask, 0, dormant).astype(dormant.dtype)


class DenseStateNotDivided(Mutant):
    """The state of a plain layer is written into the weight as it is."""

    name = "dense state not divided"
    laws = ("15",)

    def layer(self, weight, mask, bias):
        return _DenseStateNotDivided(self, weight, mask, bias)


class _DenseStateNotDivided(ReferenceLayer):
    def load_other(self, weight, mask, bias):
        super().load_other(weight, mask, bias)
        if mask is None:
            self.weight = weight.copy()
            self.note()


class EarlierStateNotDivided(Mutant):
    """The state of an earlier version is written into the weight as it is, and calls select."""

    name = "earlier state not divided"
    laws = ("15",)

    def layer(self, weight, mask, bias):
        return _EarlierStateNotDivided(self, weight, mask, bias)


class _EarlierStateNotDivided(ReferenceLayer):
    def load_other(self, weight, mask, bias):
        super().load_other(weight, mask, bias)
        if mask is not None:
            self.weight = weight.copy()
            self.note()

    def __call__(self, x):
        return self.backend.masked_linear(x, self.weight, self.mask, self.bias)


class EarlierStateDividedByTheOldMask(Mutant):
    """The state of an earlier version is divided before its mask is taken."""

    name = "earlier state divided by the old mask"
    laws = ("15",)

    def layer(self, weight, mask, bias):
        return _EarlierStateDividedByTheOldMask(self, weight, mask, bias)


class _EarlierStateDividedByTheOldMask(ReferenceLayer):
    def load_other(self, weight, mask, bias):
        super().load_other(weight, None, bias)
        if mask is not None:
            self.mask = mask.copy()
            self.note()


class DenseStateLeavesDormantValues(Mutant):
    """The state of a plain layer leaves the dormant values from before."""

    name = "dense state leaves dormant values"
    laws = ("15",)

    def layer(self, weight, mask, bias):
        return _DenseStateLeavesDormantValues(self, weight, mask, bias)


class _DenseStateLeavesDormantValues(ReferenceLayer):
    def load_other(self, weight, mask, bias):
        dormant = self.dormant
        super().load_other(weight, mask, bias)
        if mask is None:
            self.dormant = dormant


class ConversionPutsDormantValuesBack(Mutant):
    """A conversion converts live and dormant values together, and leaves them in the weight."""

    name = "conversion puts dormant values back"
    laws = ("15",)

    def dtypes(self, device):
        return ("float32", "float16")

    def layer(self, weight, mask, bias):
        return _ConversionPutsDormantValuesBack(self, weight, mask, bias)


class _ConversionPutsDormantValuesBack(ReferenceLayer):
    def convert(self, dtype):
        super().convert(dtype)
        self.weight = self.full()
        self.note()


class ConversionDropsDormantValues(Mutant):
    """A conversion lets go of what is dormant."""

    name = "conversion drops dormant values"
    laws = ("15",)

    def dtypes(self, device):
        return ("float32", "float16")

    def layer(self, weight, mask, bias):
        return _ConversionDropsDormantValues(self, weight, mask, bias)


class _ConversionDropsDormantValues(ReferenceLayer):
    def convert(self, dtype):
        super().convert(dtype)
        self.dormant = np.zeros_like(self.dormant)


class DormantValuesLeftBehindByAConversion(Mutant):
    """Dormant values keep the old dtype, and their bytes are read in the new one."""

    name = "dormant values left behind by a conversion"
    laws = ("15",)

    def dtypes(self, device):
        return ("float32", "float16")

    def layer(self, weight, mask, bias):
        return _DormantValuesLeftBehindByAConversion(self, weight, mask, bias)


class _DormantValuesLeftBehindByAConversion(ReferenceLayer):
    def convert(self, dtype):
        dormant = self.dormant
        super().convert(dtype)
        self.dormant = np.resize(dormant.reshape(-1).view(dtype), dormant.shape)
