"""Faults of storage: what shows and does not act, acts and does not show, or is lost while it is dormant."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,attr-defined,no-any-return"

from types import SimpleNamespace

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


class GuardWaitsForTheNextCall(Mutant):
    """The guard leaves it to the next call to set masked weights to 0."""

    name = "guard waits for the next call"
    laws = ("13", "15")

    def layer(self, weight, mask, bias):
        return _GuardWaitsForTheNextCall(self, weight, mask, bias)


class _GuardWaitsForTheNextCall(ReferenceLayer):
    def guard(self):
        return lambda moved: moved


class GuardStoresDrift(Mutant):
    """What a guarded step leaves under the mask becomes dormant."""

    name = "guard stores drift"
    laws = ("13", "15")

    def layer(self, weight, mask, bias):
        return _GuardStoresDrift(self, weight, mask, bias)


class _GuardStoresDrift(ReferenceLayer):
    def guard(self):
        def held(moved):
            drift = np.where(self.mask, 0, moved)
            self.dormant = np.where(drift != 0, drift, self.dormant).astype(self.weight.dtype)
            return self.backend.select(self.mask, moved)

        return held


class StaleAfterAnUncountedEdit(Mutant):
    """Calls keep the weight as it was when an edit was last counted."""

    name = "stale after an uncounted edit"
    laws = ("16",)

    def layer(self, weight, mask, bias):
        return _StaleAfterAnUncountedEdit(self, weight, mask, bias)


class _StaleAfterAnUncountedEdit(ReferenceLayer):
    def __call__(self, x):
        self.project()
        key = self.counted()
        if vars(self).get("key") != key:
            self.key, self.copy = key, self.weight.copy()
        return self.backend.masked_linear(x, self.copy, np.ones_like(self.mask), self.bias)


class StaleInTrainingAfterAnUncountedEdit(Mutant):
    """Gradients take the weight as it was when an edit was last counted."""

    name = "stale in training after an uncounted edit"
    laws = ("16",)

    def layer(self, weight, mask, bias):
        return _StaleInTrainingAfterAnUncountedEdit(self, weight, mask, bias)


class _StaleInTrainingAfterAnUncountedEdit(ReferenceLayer):
    def gradients(self, x, g):
        self.project()
        key = self.counted()
        if vars(self).get("key") != key:
            self.key, self.copy = key, self.weight.copy()
        found = self.backend.both(x, self.copy, self.mask, self.bias, g)
        return found[1], found[2], found[3]


class StaleAfterAnotherArray(Mutant):
    """Calls keep the array that the layer was made with, which one in its place does not replace."""

    name = "stale after another array"
    laws = ("16",)

    def layer(self, weight, mask, bias):
        return _StaleAfterAnotherArray(self, weight, mask, bias)


class _StaleAfterAnotherArray(ReferenceLayer):
    def __call__(self, x):
        self.project()
        key = self.counted()[1:]
        if vars(self).get("key") != key:
            self.key, self.array = key, self.weight
        return self.backend.masked_linear(x, self.array, np.ones_like(self.mask), self.bias)


class SecondEditDoesNotShow(Mutant):
    """Only the first edit after a call shows."""

    name = "second edit does not show"
    laws = ("16",)

    def layer(self, weight, mask, bias):
        return _SecondEditDoesNotShow(self, weight, mask, bias)


class _SecondEditDoesNotShow(ReferenceLayer):
    def edit_weight(self, edit, weight):
        if not vars(self).get("edited"):
            super().edit_weight(edit, weight)
        self.edited = True


class DriftActs(Mutant):
    """What an optimizer leaves under the mask acts until the next mask."""

    name = "drift acts"
    laws = ("16",)

    def layer(self, weight, mask, bias):
        return _DriftActs(self, weight, mask, bias)


class _DriftActs(ReferenceLayer):
    def project(self):
        pass

    def full(self):
        return np.where(self.mask, self.weight, self.dormant)


class DriftOfAFusedStepActs(Mutant):
    """Edits are counted and steps are not: what a fused optimizer leaves under the mask acts."""

    name = "drift of a fused step acts"
    laws = ("16",)

    def layer(self, weight, mask, bias):
        return _DriftOfAFusedStepActs(self, weight, mask, bias)


class _DriftOfAFusedStepActs(ReferenceLayer):
    def counted(self):
        return id(self.weight), self.stored.edits, self.stored.mask_edits


class DriftActsInTraining(Mutant):
    """Only inference projects away what an optimizer leaves under the mask."""

    name = "drift acts in training"
    laws = ("16",)

    def layer(self, weight, mask, bias):
        return _DriftActsInTraining(self, weight, mask, bias)


class _DriftActsInTraining(ReferenceLayer):
    def gradients(self, x, g):
        found = self.backend.both(x, self.weight, self.mask | True, self.bias, g)
        return found[1], self.backend.select(self.mask, found[2]), found[3]


class DriftActsInInference(Mutant):
    """Only training projects away what an optimizer leaves under the mask."""

    name = "drift acts in inference"
    laws = ("16",)

    def layer(self, weight, mask, bias):
        return _DriftActsInInference(self, weight, mask, bias)


class _DriftActsInInference(ReferenceLayer):
    def __call__(self, x):
        return self.backend.masked_linear(x, self.weight, np.ones_like(self.mask), self.bias)


class DriftBecomesDormant(Mutant):
    """What an optimizer leaves under the mask becomes dormant."""

    name = "drift becomes dormant"
    laws = ("16",)

    def layer(self, weight, mask, bias):
        return _DriftBecomesDormant(self, weight, mask, bias)


class _DriftBecomesDormant(ReferenceLayer):
    def project(self):
        if self.stored.clean != self.counted():
            self.dormant = np.where(self.mask | (self.weight == 0), self.dormant, self.weight)
        super().project()


class DriftIsRevived(Mutant):
    """A mask that follows a step at once brings back what the optimizer has left under the one before."""

    name = "drift is revived"
    laws = ("16",)

    def layer(self, weight, mask, bias):
        return _DriftIsRevived(self, weight, mask, bias)


class _DriftIsRevived(ReferenceLayer):
    def set_mask(self, mask):
        drift = np.where(self.mask, 0, self.weight).astype(self.weight.dtype)
        super().set_mask(mask)
        self.divide(np.where(drift != 0, drift, self.full()))


class DriftIsSaved(Mutant):
    """A state that is saved straight after a step has what the optimizer left under the mask."""

    name = "drift is saved"
    laws = ("16",)

    def layer(self, weight, mask, bias):
        return _DriftIsSaved(self, weight, mask, bias)


class _DriftIsSaved(ReferenceLayer):
    def project(self):
        if not vars(self).get("saving"):
            super().project()

    def save(self, path):
        self.saving = True
        super().save(path)
        self.saving = False


class DriftIsConverted(Mutant):
    """A conversion takes what an optimizer has left under the mask along."""

    name = "drift is converted"
    laws = ("16",)

    def dtypes(self, device):
        return ("float32", "float16")

    def layer(self, weight, mask, bias):
        return _DriftIsConverted(self, weight, mask, bias)


class _DriftIsConverted(ReferenceLayer):
    def convert(self, dtype):
        weight = self.weight.copy()
        super().convert(dtype)
        self.weight = weight.astype(dtype)
        self.note()


class EditedMaskIsIgnored(Mutant):
    """Only ``set_mask`` changes the mask: an edit of it does not act."""

    name = "edited mask is ignored"
    laws = ("16",)

    def layer(self, weight, mask, bias):
        return _EditedMaskIsIgnored(self, weight, mask, bias)


class _EditedMaskIsIgnored(ReferenceLayer):
    def edit_mask(self, mask):
        pass


class EditedMaskActsInInferenceOnly(Mutant):
    """Gradients take the mask that was last set."""

    name = "edited mask acts in inference only"
    laws = ("16",)

    def layer(self, weight, mask, bias):
        return _EditedMaskActsInInferenceOnly(self, weight, mask, bias)


class _EditedMaskActsInInferenceOnly(ReferenceLayer):
    def divide(self, full):
        super().divide(full)
        self.last = self.mask.copy()

    def gradients(self, x, g):
        self.project()
        found = self.backend.both(x, self.weight, self.last, self.bias, g)
        return found[1], found[2], found[3]


class EditedMaskMasksNoWeight(Mutant):
    """An edited mask acts on the gradient alone: the weight that it takes out stays."""

    name = "edited mask masks no weight"
    laws = ("16",)

    def layer(self, weight, mask, bias):
        return _EditedMaskMasksNoWeight(self, weight, mask, bias)


class _EditedMaskMasksNoWeight(ReferenceLayer):
    def counted(self):
        return id(self.weight), self.stored.edits, self.stored.steps


class MaskOfOneSharerOnly(Mutant):
    """Layers that share a weight have each its own mask."""

    name = "mask of one sharer only"
    laws = ("16",)

    def layer(self, weight, mask, bias):
        return _MaskOfOneSharerOnly(self, weight, mask, bias)


class _MaskOfOneSharerOnly(ReferenceLayer):
    def sharer(self):
        other = super().sharer()
        other.stored = SimpleNamespace(**vars(self.stored))
        return other


class DormantValuesOfOneSharerOnly(Mutant):
    """Layers that share a weight and a mask keep what is dormant each for itself."""

    name = "dormant values of one sharer only"
    laws = ("16",)

    def layer(self, weight, mask, bias):
        return _DormantValuesOfOneSharerOnly(self, weight, mask, bias)


class _DormantValuesOfOneSharerOnly(ReferenceLayer):
    def divide(self, full):
        super().divide(full)
        self.own = self.dormant

    def full(self):
        self.project()
        return np.where(self.mask, self.weight, self.own)


class ReadersGradientIsNotMasked(Mutant):
    """Other code that reads the weight sends it a gradient where it is masked."""

    name = "reader's gradient is not masked"
    laws = ("16",)

    def layer(self, weight, mask, bias):
        return _ReadersGradientIsNotMasked(self, weight, mask, bias)


class _ReadersGradientIsNotMasked(ReferenceLayer):
    def gradient_hook(self, gradient):
        return gradient


class ReadersGradientByAProduct(Mutant):
    """The gradient of other readers is multiplied with the mask."""

    name = "reader's gradient by a product"
    laws = ("16",)

    def layer(self, weight, mask, bias):
        return _ReadersGradientByAProduct(self, weight, mask, bias)


class _ReadersGradientByAProduct(ReferenceLayer):
    def gradient_hook(self, gradient):
        return gradient * self.mask + gradient.dtype.type(0)


class ReadersGradientByTheFirstMask(Mutant):
    """The gradient of other readers has the mask that the layer was made with."""

    name = "reader's gradient by the first mask"
    laws = ("16",)

    def layer(self, weight, mask, bias):
        return _ReadersGradientByTheFirstMask(self, weight, mask, bias)


class _ReadersGradientByTheFirstMask(ReferenceLayer):
    def divide(self, full):
        super().divide(full)
        vars(self).setdefault("first", self.mask.copy())

    def gradient_hook(self, gradient):
        return self.backend.select(self.first, gradient)
