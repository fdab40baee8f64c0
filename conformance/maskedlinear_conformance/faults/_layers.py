"""Faults of layers: what is kept between calls, what is taken for a mask, and what shapes are forgotten."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,attr-defined,no-any-return"

import numpy as np

from maskedlinear_conformance.faults._reference_backend import Mutant, flat, in_memory, new_order
from maskedlinear_conformance.faults._reference_layer import ReferenceLayer


class StaleMask(Mutant):
    """``set_mask`` replaces the mask, and leaves the weight as the old one had it."""

    name = "stale mask"
    laws = ("11",)

    def layer(self, weight, mask, bias):
        return _StaleMask(self, weight, mask, bias)


class _StaleMask(ReferenceLayer):
    def set_mask(self, mask):
        self.mask = np.array(mask)


class StaleWeight(Mutant):
    """Calls take a copy of the weight that is made anew when the mask changes, not when the weight does."""

    name = "stale weight"
    laws = ("11",)

    def layer(self, weight, mask, bias):
        return _StaleWeight(self, weight, mask, bias)


class _StaleWeight(ReferenceLayer):
    def divide(self, full):
        super().divide(full)
        self.copy = self.weight.copy()

    def __call__(self, x):
        return self.backend.masked_linear(x, self.copy, self.mask, self.bias)


class MaskOfTheCallerKept(Mutant):
    """The layer keeps the caller's mask itself, not a copy."""

    name = "mask of the caller kept"
    laws = ("11",)

    def layer(self, weight, mask, bias):
        return _MaskOfTheCallerKept(self, weight, mask, bias)


class _MaskOfTheCallerKept(ReferenceLayer):
    def set_mask(self, mask):
        super().set_mask(mask)
        self.mask = mask


class DormantWeightsZeroed(Mutant):
    """A new mask sets the weights under it to zero."""

    name = "dormant weights zeroed"
    laws = ("11",)

    def layer(self, weight, mask, bias):
        return _DormantWeightsZeroed(self, weight, mask, bias)


class _DormantWeightsZeroed(ReferenceLayer):
    def set_mask(self, mask):
        super().set_mask(mask)
        self.dormant = np.zeros_like(self.dormant)


class StaleMaskInTheGradient(Mutant):
    """The gradient is masked with the mask that the layer was made with."""

    name = "stale mask in the gradient"
    laws = ("11",)

    def layer(self, weight, mask, bias):
        return _StaleMaskInTheGradient(self, weight, mask, bias)


class _StaleMaskInTheGradient(ReferenceLayer):
    def gradients(self, x, g):
        vars(self).setdefault("first", self.mask.copy())
        self.project()
        found = self.backend.both(x, self.weight, self.first, self.bias, g)
        return found[1], found[2], found[3]


class LayerByAProduct(Mutant):
    """The function selects, the layer multiplies."""

    name = "layer by a product"
    laws = ("4",)

    def layer(self, weight, mask, bias):
        return _LayerByAProduct(self, weight, mask, bias)


class _LayerByAProduct(ReferenceLayer):
    def select(self, mask, values):
        return (values * mask).astype(values.dtype)


class LayerMultipliesItsGradient(Mutant):
    """The layer's weight gradient is multiplied with the mask."""

    name = "layer multiplies its gradient"
    laws = ("4",)

    def layer(self, weight, mask, bias):
        return _LayerMultipliesItsGradient(self, weight, mask, bias)


class _LayerMultipliesItsGradient(ReferenceLayer):
    def gradients(self, x, g):
        found = self.backend.both(x, self.weight, self.mask | True, self.bias, g)
        return super().gradients(x, g)[0], (found[2] * self.mask + 0).astype(x.dtype), found[3]


class LayerTakesOneBatchDimension(Mutant):
    """The layer's bias gradient is summed over the first batch dimension only."""

    name = "layer takes one batch dimension"
    laws = ("1",)

    def layer(self, weight, mask, bias):
        return _LayerTakesOneBatchDimension(self, weight, mask, bias)


class _LayerTakesOneBatchDimension(ReferenceLayer):
    def __call__(self, x):
        y = super().__call__(x)
        return y if x.ndim < 3 else flat(y)


class LayerKeepsItsArguments(Mutant):
    """The layer keeps the arrays that it was made with, and writes what is +0 under the mask into them."""

    name = "layer keeps its arguments"
    laws = ("10",)

    def layer(self, weight, mask, bias):
        return _LayerKeepsItsArguments(self, weight, mask, bias)


class _LayerKeepsItsArguments(ReferenceLayer):
    def __init__(self, backend, weight, mask, bias):
        super().__init__(backend, weight, mask, bias)
        self.mask = mask

    def divide(self, full):
        kept = self.weight
        super().divide(full)
        kept[...] = self.weight
        self.weight = kept
        self.note()


class AnyNumberIsAMask(Mutant):
    """``set_mask`` takes what is larger than a half for live."""

    name = "any number is a mask"
    laws = ("11",)

    def layer(self, weight, mask, bias):
        return _AnyNumberIsAMask(self, weight, mask, bias)


class _AnyNumberIsAMask(ReferenceLayer):
    def set_mask(self, mask):
        super().set_mask(np.asarray(mask) > 0.5)


class TransposedMaskIsReshaped(Mutant):
    """``set_mask`` reshapes a mask of the wrong shape."""

    name = "transposed mask is reshaped"
    laws = ("11",)

    def layer(self, weight, mask, bias):
        return _TransposedMaskIsReshaped(self, weight, mask, bias)


class _TransposedMaskIsReshaped(ReferenceLayer):
    def set_mask(self, mask):
        super().set_mask(np.resize(mask, self.weight.shape))


class RefusedMaskIsKept(Mutant):
    """``set_mask`` keeps the mask before it looks at it."""

    name = "refused mask is kept"
    laws = ("11",)

    def layer(self, weight, mask, bias):
        return _RefusedMaskIsKept(self, weight, mask, bias)


class _RefusedMaskIsKept(ReferenceLayer):
    def set_mask(self, mask):
        if np.shape(mask) == self.mask.shape:
            self.mask = np.asarray(mask) != 0
        super().set_mask(mask)


class LayerFlipsABitWhenLarge(Mutant):
    """One bit of the mask of a large layer is wrong."""

    name = "layer flips a bit when large"
    laws = ("1",)

    def layer(self, weight, mask, bias):
        return _LayerFlipsABitWhenLarge(self, weight, mask, bias)


class _LayerFlipsABitWhenLarge(ReferenceLayer):
    def divide(self, full):
        if self.mask.size > 100_000:
            self.mask.flat[self.mask.size // 3] ^= True
        super().divide(full)


class LargeLayerByAProduct(Mutant):
    """Large layers multiply with the mask."""

    name = "large layer by a product"
    laws = ("4",)

    def layer(self, weight, mask, bias):
        return _LargeLayerByAProduct(self, weight, mask, bias)


class _LargeLayerByAProduct(ReferenceLayer):
    def select(self, mask, values):
        return super().select(mask, values) if mask.size < 1000 else (values * mask).astype(values.dtype)


class LayerWithAFullMaskTakesAWrongShortCut(Mutant):
    """A layer with a full mask forgets its bias."""

    name = "layer with a full mask takes a wrong short cut"
    laws = ("11",)

    def layer(self, weight, mask, bias):
        return _LayerWithAFullMaskTakesAWrongShortCut(self, weight, mask, bias)


class _LayerWithAFullMaskTakesAWrongShortCut(ReferenceLayer):
    def __call__(self, x):
        self.project()
        bias = None if self.mask.size and self.mask.all() else self.bias
        return self.backend.masked_linear(x, self.weight, self.mask, bias)


class LayerKeptByItsNumberOfConnections(Mutant):
    """What is derived from a mask is kept by the number of its connections."""

    name = "layer kept by its number of connections"
    laws = ("11",)

    def layer(self, weight, mask, bias):
        return _LayerKeptByItsNumberOfConnections(self, weight, mask, bias)


class _LayerKeptByItsNumberOfConnections(ReferenceLayer):
    def select(self, mask, values):
        kept = vars(self).setdefault("masks", {}).setdefault(mask.sum(), mask.copy())
        return super().select(kept, values)


class LayerIsNotDeterministic(Mutant):
    """The order of a layer's sums changes from call to call."""

    name = "layer is not deterministic"
    laws = ("10",)

    def layer(self, weight, mask, bias):
        return _LayerIsNotDeterministic(self, weight, mask, bias)


class _LayerIsNotDeterministic(ReferenceLayer):
    def __call__(self, x):
        self.project()
        order = new_order(x.shape[-1])
        return self.backend.masked_linear(x[..., order], self.weight[:, order], self.mask[:, order], self.bias)


class CallsDropDormantWeights(Mutant):
    """A call lets go of what is dormant."""

    name = "calls drop dormant weights"
    laws = ("10", "11")

    def layer(self, weight, mask, bias):
        return _CallsDropDormantWeights(self, weight, mask, bias)


class _CallsDropDormantWeights(ReferenceLayer):
    def __call__(self, x):
        self.dormant = np.zeros_like(self.dormant)
        return super().__call__(x)


class GradientsPileUp(Mutant):
    """The layer's gradient is added to that of the call before."""

    name = "gradients pile up"
    laws = ("10", "11")

    def layer(self, weight, mask, bias):
        return _GradientsPileUp(self, weight, mask, bias)


class _GradientsPileUp(ReferenceLayer):
    def gradients(self, x, g):
        found = super().gradients(x, g)
        self.total = vars(self).get("total", 0) + found[1]
        return found[0], self.total, found[2]


class ARowIsAMask(Mutant):
    """``set_mask`` stretches a single row or column over the whole layer."""

    name = "a row is a mask"
    laws = ("11",)

    def layer(self, weight, mask, bias):
        return _ARowIsAMask(self, weight, mask, bias)


class _ARowIsAMask(ReferenceLayer):
    def set_mask(self, mask):
        fits = np.ndim(mask) == 2 and 1 in np.shape(mask)
        super().set_mask(np.broadcast_to(mask, self.mask.shape) if fits else mask)


class TheMaskIsNumbers(Mutant):
    """The layer keeps its mask as floating numbers."""

    name = "the mask is numbers"
    laws = ("11", "12")

    def layer(self, weight, mask, bias):
        return _TheMaskIsNumbers(self, weight, mask, bias)


class _TheMaskIsNumbers(ReferenceLayer):
    def state(self):
        weight, mask, bias = super().state()
        return weight, mask.astype(np.float64), bias


class LargeLayerKeepsItsFirstWeight(Mutant):
    """A large layer keeps the weight of its first call."""

    name = "large layer keeps its first weight"
    laws = ("11",)

    def layer(self, weight, mask, bias):
        return _LargeLayerKeepsItsFirstWeight(self, weight, mask, bias)


class _LargeLayerKeepsItsFirstWeight(ReferenceLayer):
    def __call__(self, x):
        if self.mask.size < 1000:
            return super().__call__(x)
        first = vars(self).setdefault("first", self.weight.copy())
        return self.backend.masked_linear(x, first, np.ones_like(self.mask), self.bias)


class OneRowTakesAnOldWeight(Mutant):
    """For one row of x a layer keeps a matrix in another format, which no new weight reaches."""

    name = "one row takes an old weight"
    laws = ("11",)

    def layer(self, weight, mask, bias):
        return _OneRowTakesAnOldWeight(self, weight, mask, bias)


class _OneRowTakesAnOldWeight(ReferenceLayer):
    def __call__(self, x):
        if x.size > x.shape[-1]:
            return super().__call__(x)
        if not hasattr(self, "matrix"):
            self.matrix = self.weight.copy()
        return self.backend.masked_linear(x, self.matrix, np.ones_like(self.mask), self.bias)

    def set_mask(self, mask):
        super().set_mask(mask)
        self.__dict__.pop("matrix", None)


class LayerIgnoresStrides(Mutant):
    """The layer reads x and g as if they were contiguous."""

    name = "layer ignores strides"
    laws = ("8",)

    def layer(self, weight, mask, bias):
        return _LayerIgnoresStrides(self, weight, mask, bias)


class _LayerIgnoresStrides(ReferenceLayer):
    def __call__(self, x):
        return super().__call__(in_memory(x))

    def gradients(self, x, g):
        return super().gradients(in_memory(x), in_memory(g))


class NewMaskReadAsItLies(Mutant):
    """``set_mask`` reads a mask as if it were contiguous."""

    name = "new mask read as it lies"
    laws = ("8",)

    def layer(self, weight, mask, bias):
        return _NewMaskReadAsItLies(self, weight, mask, bias)


class _NewMaskReadAsItLies(ReferenceLayer):
    def set_mask(self, mask):
        super().set_mask(in_memory(mask) if isinstance(mask, np.ndarray) else mask)
