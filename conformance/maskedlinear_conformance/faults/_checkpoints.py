"""Faults of checkpoints: what is lost on the way to a file and back."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,attr-defined,no-any-return"

from dataclasses import replace

import numpy as np

from maskedlinear.checkpoint import MaskedArray, load
from maskedlinear_conformance.faults._reference_backend import Mutant
from maskedlinear_conformance.faults._reference_layer import ReferenceLayer


class CheckpointLosesDormantWeights(Mutant):
    """A checkpoint keeps the masked weight."""

    name = "checkpoint loses dormant weights"
    laws = ("12",)

    def layer(self, weight, mask, bias):
        return _CheckpointLosesDormantWeights(self, weight, mask, bias)


class _CheckpointLosesDormantWeights(ReferenceLayer):
    def kept(self, name, array):
        return np.zeros_like(array) if name == "dormant" else array


class CheckpointLosesTheMask(Mutant):
    """A checkpoint has weights only."""

    name = "checkpoint loses the mask"
    laws = ("12",)

    def layer(self, weight, mask, bias):
        return _CheckpointLosesTheMask(self, weight, mask, bias)


class _CheckpointLosesTheMask(ReferenceLayer):
    def load(self, path):
        mask = self.mask
        super().load(path)
        self.mask = mask


class CheckpointInHalfPrecision(Mutant):
    """A checkpoint keeps half precision."""

    name = "checkpoint in half precision"
    laws = ("12",)

    def layer(self, weight, mask, bias):
        return _CheckpointInHalfPrecision(self, weight, mask, bias)


class _CheckpointInHalfPrecision(ReferenceLayer):
    def kept(self, name, array):
        return array.astype(np.float16) if array.dtype.kind == "f" else array


class CheckpointCleansNan(Mutant):
    """A checkpoint turns NaN and infinity into numbers."""

    name = "checkpoint cleans nan"
    laws = ("12",)

    def layer(self, weight, mask, bias):
        return _CheckpointCleansNan(self, weight, mask, bias)


class _CheckpointCleansNan(ReferenceLayer):
    def kept(self, name, array):
        return np.nan_to_num(array) if name == "dormant" else array


class CheckpointLosesNegativeZero(Mutant):
    """A checkpoint turns -0 into +0."""

    name = "checkpoint loses negative zero"
    laws = ("12",)

    def layer(self, weight, mask, bias):
        return _CheckpointLosesNegativeZero(self, weight, mask, bias)


class _CheckpointLosesNegativeZero(ReferenceLayer):
    def kept(self, name, array):
        return array + 0.0 if name == "dormant" else array


class StaleAfterLoading(Mutant):
    """Calls take a copy of the weight from before a checkpoint was loaded."""

    name = "stale after loading"
    laws = ("12",)

    def layer(self, weight, mask, bias):
        return _StaleAfterLoading(self, weight, mask, bias)


class _StaleAfterLoading(ReferenceLayer):
    def load(self, path):
        self.before = self.weight.copy()
        super().load(path)

    def __call__(self, x):
        weight = vars(self).get("before", self.weight)
        return self.backend.masked_linear(x, weight, np.ones_like(self.mask), self.bias)


class MaskFixedAfterLoading(Mutant):
    """A layer that was loaded takes no new mask."""

    name = "mask fixed after loading"
    laws = ("12",)

    def layer(self, weight, mask, bias):
        return _MaskFixedAfterLoading(self, weight, mask, bias)


class _MaskFixedAfterLoading(ReferenceLayer):
    def load(self, path):
        super().load(path)
        self.loaded = True

    def set_mask(self, mask):
        if not vars(self).get("loaded"):
            super().set_mask(mask)


class StaleMaskInTheGradientAfterLoading(Mutant):
    """The gradient of a layer that was loaded has the mask from before."""

    name = "stale mask in the gradient after loading"
    laws = ("12",)

    def layer(self, weight, mask, bias):
        return _StaleMaskInTheGradientAfterLoading(self, weight, mask, bias)


class _StaleMaskInTheGradientAfterLoading(ReferenceLayer):
    def load(self, path):
        self.before = self.mask.copy()
        super().load(path)

    def gradients(self, x, g):
        found = self.backend.both(x, self.weight, vars(self).get("before", self.mask), self.bias, g)
        return found[1], found[2], found[3]


class FileTakesZerosForHoles(Mutant):
    """A file's mask is where the weight is not 0."""

    name = "file takes zeros for holes"
    laws = ("12f",)

    def layer(self, weight, mask, bias):
        return _FileTakesZerosForHoles(self, weight, mask, bias)


class _FileTakesZerosForHoles(ReferenceLayer):
    def in_file(self, arrays):
        weight = arrays["weight"]
        return arrays | {"weight": MaskedArray.of(weight.numpy(), weight.numpy() != 0, axes=weight.axes)}


class FileKeepsDormantValuesUnasked(Mutant):
    """A file has dormant values though nobody asked for them."""

    name = "file keeps dormant values unasked"
    laws = ("12f",)

    def layer(self, weight, mask, bias):
        return _FileKeepsDormantValuesUnasked(self, weight, mask, bias)


class _FileKeepsDormantValuesUnasked(ReferenceLayer):
    def save_file(self, path, *, dormant=False):
        super().save_file(path, dormant=True)


class FileLosesDormantValues(Mutant):
    """A file has no dormant values though they were asked for."""

    name = "file loses dormant values"
    laws = ("12f",)

    def layer(self, weight, mask, bias):
        return _FileLosesDormantValues(self, weight, mask, bias)


class _FileLosesDormantValues(ReferenceLayer):
    def in_file(self, arrays):
        return arrays | {"weight": replace(arrays["weight"], dormant=None)}


class FileSaysTheOtherAxes(Mutant):
    """A file says that rows are inputs."""

    name = "file says the other axes"
    laws = ("12f",)

    def layer(self, weight, mask, bias):
        return _FileSaysTheOtherAxes(self, weight, mask, bias)


class _FileSaysTheOtherAxes(ReferenceLayer):
    def in_file(self, arrays):
        weight = arrays["weight"]
        return arrays | {"weight": replace(weight, axes=type(weight.axes)(out_axis=1, in_axis=0))}


class MaskStaysWhenAFileIsLoaded(Mutant):
    """A layer keeps its own mask when it takes a file."""

    name = "mask stays when a file is loaded"
    laws = ("12f",)

    def layer(self, weight, mask, bias):
        return _MaskStaysWhenAFileIsLoaded(self, weight, mask, bias)


class _MaskStaysWhenAFileIsLoaded(ReferenceLayer):
    def load_file(self, path):
        mask = self.mask
        super().load_file(path)
        full = self.full()
        self.mask = mask
        self.divide(full)


class HalfOfAFileIsTakenBeforeItIsRefused(Mutant):
    """A file that does not fit is refused after its bias has been taken."""

    name = "half of a file is taken before it is refused"
    laws = ("12f",)

    def layer(self, weight, mask, bias):
        return _HalfOfAFileIsTakenBeforeItIsRefused(self, weight, mask, bias)


class _HalfOfAFileIsTakenBeforeItIsRefused(ReferenceLayer):
    def load_file(self, path):
        arrays = load(path)
        if "bias" in arrays:
            self.bias = arrays["bias"].numpy().astype(self.weight.dtype)
        super().load_file(path)


class FileThatDoesNotFitIsTaken(Mutant):
    """A file of another shape is taken."""

    name = "file that does not fit is taken"
    laws = ("12f",)

    def layer(self, weight, mask, bias):
        return _FileThatDoesNotFitIsTaken(self, weight, mask, bias)


class _FileThatDoesNotFitIsTaken(ReferenceLayer):
    def check_file(self, arrays):
        pass
