"""Faults of edits and drift: what is written to a weight, a mask or a sharer and does not act as it should."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,attr-defined,no-any-return"

from types import SimpleNamespace

import numpy as np

from maskedlinear_conformance.faults._reference_backend import Mutant
from maskedlinear_conformance.faults._reference_layer import ReferenceLayer


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
