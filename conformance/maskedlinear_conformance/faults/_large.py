"""Faults of code that only large layers take: blocks, short cuts, and what is kept for later calls."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,attr-defined,no-any-return"

import numpy as np

from maskedlinear_conformance.faults._reference_backend import Mutant, flat
from maskedlinear_conformance.faults._reference_layer import ReferenceLayer


class NearlyFullIsFull(Mutant):
    """A mask of which more than 99 % are live is taken for full."""

    name = "nearly full is full"
    laws = ("1", "4")

    def select(self, mask, array):
        return array if mask.size and mask.mean() > 0.99 else super().select(mask, array)


class NearlyEmptyIsEmpty(Mutant):
    """A mask of which less than 0.5 % are live is taken for empty."""

    name = "nearly empty is empty"
    laws = ("1",)

    def select(self, mask, array):
        return super().select(mask & (mask.mean() >= 0.005) if mask.size else mask, array)


class LargeFullMaskTakesAWrongShortCut(Mutant):
    """The short cut for large full masks forgets the bias."""

    name = "large full mask takes a wrong short cut"
    laws = ("1",)

    def output(self, x, weight, mask, bias):
        return super().output(x, weight, mask, None if mask.size > 1000 and mask.all() else bias)


class LargeEmptyMaskTakesAWrongShortCut(Mutant):
    """The short cut for large empty masks forgets the bias."""

    name = "large empty mask takes a wrong short cut"
    laws = ("1",)

    def output(self, x, weight, mask, bias):
        return super().output(x, weight, mask, None if mask.size > 1000 and not mask.any() else bias)


class SecondBlockUnmasked(Mutant):
    """Large masks are applied in blocks of 2²⁰ entries, and only the first is."""

    name = "second block unmasked"
    laws = ("1", "4")

    def select(self, mask, array):
        mask = mask.copy()
        mask.reshape(-1)[1 << 20 :] = True
        return super().select(mask, array)


class NoBiasNoMask(Mutant):
    """The kernel for large layers without bias drops the mask."""

    name = "no bias no mask"
    laws = ("1",)

    def output(self, x, weight, mask, bias):
        return super().output(x, weight, mask | (bias is None and mask.size > 1000), bias)


class KeptByItsText(Mutant):
    """What is derived from a mask is kept by ``str(mask)``, which leaves out the middle of a large one."""

    name = "kept by its text"
    laws = ("11",)

    def select(self, mask, array):
        kept = vars(self).setdefault("kept", {}).setdefault((mask.shape, str(mask)), mask.copy())
        return super().select(kept, array)


class KeptByItsStart(Mutant):
    """What is derived from a mask is kept by its shape, its number of connections and its first entries."""

    name = "kept by its start"
    laws = ("11",)

    def select(self, mask, array):
        key = (mask.shape, mask.sum(), mask.reshape(-1)[:64].tobytes())
        return super().select(vars(self).setdefault("kept", {}).setdefault(key, mask.copy()), array)


class LargeGradientByAProduct(Mutant):
    """The gradient of a large weight is multiplied with the mask: NaN of x and g shows under it."""

    name = "large gradient by a product"
    laws = ("4",)

    def weight_gradient(self, g, x, mask):
        if mask.size < 1024:
            return super().weight_gradient(g, x, mask)
        return self.product(flat(g).T, flat(x)) * mask + np.float32(0)


class CompiledLargeGradientByAProduct(Mutant):
    """Compiled code multiplies the gradient of a large weight with the mask: NaN of x and g shows under it."""

    name = "compiled large gradient by a product"
    laws = ("7",)

    def compile(self, x, weight, mask, bias, g):
        found = self.both(x, weight, mask, bias, g)
        if mask.size < 1024:
            return found
        raw = self.both(x, weight, mask | True, bias, g)[2]
        return [*found[:2], (raw * mask + 0).astype(raw.dtype), found[3]]


class LargeLayerKeepsItsFirstMask(Mutant):
    """A large layer does not follow ``set_mask``."""

    name = "large layer keeps its first mask"
    laws = ("11",)

    def layer(self, weight, mask, bias):
        return _LargeLayerKeepsItsFirstMask(self, weight, mask, bias)


class _LargeLayerKeepsItsFirstMask(ReferenceLayer):
    def set_mask(self, mask):
        if self.mask.size < 1000:
            super().set_mask(mask)


class CheckpointKeepsPlacesInBytes(Mutant):
    """A checkpoint keeps the places of the live connections in 8 bits each."""

    name = "checkpoint keeps places in bytes"
    laws = ("12",)

    def layer(self, weight, mask, bias):
        return _CheckpointKeepsPlacesInBytes(self, weight, mask, bias)


class _CheckpointKeepsPlacesInBytes(ReferenceLayer):
    def kept(self, name, array):
        if name != "mask":
            return array
        kept = np.zeros_like(array)
        kept.flat[np.flatnonzero(array).astype(np.uint8)] = True
        return kept


class LargeLayerNotGuarded(Mutant):
    """Dormant weights of a large layer are not guarded."""

    name = "large layer not guarded"
    laws = ("13",)

    def layer(self, weight, mask, bias):
        return _LargeLayerNotGuarded(self, weight, mask, bias)


class _LargeLayerNotGuarded(ReferenceLayer):
    def guard(self):
        return super().guard() if self.mask.size < 1000 else lambda moved: moved


MANY = 1 << 14  # weights from which these backends take another way


class ManyWeightsTakeOneBatchDimension(Mutant):
    """The way for many weights sums the bias gradient over the first batch dimension only."""

    name = "many weights take one batch dimension"
    laws = ("1", "6")

    def bias_gradient(self, g):
        total = super().bias_gradient(g)
        return total if g.shape[-1] != 128 or g.ndim < 3 else total * g.dtype.type(0.5)


class ManyWeightsNeedEveryGradient(Mutant):
    """The way for many weights gives no gradient of the weight unless x asks for one too."""

    name = "many weights need every gradient"
    laws = ("1",)

    def vjp(self, x, weight, mask, bias, g, wrt):
        found = super().vjp(x, weight, mask, bias, g, wrt)
        if mask.size <= MANY or "x" in wrt:
            return found
        return [part * (name != "weight") for name, part in zip(wrt, found, strict=True)]


class ManyWeightsTransposed(Mutant):
    """The expression of many weights is differentiated with the mask's rows backwards."""

    name = "many weights backwards"
    laws = ("2",)

    def autodiff_vjp(self, x, weight, mask, bias, g):
        return super().autodiff_vjp(x, weight, mask[::-1] if mask.size > MANY else mask, bias, g)


class ManyWeightsClipped(Mutant):
    """The way for many weights clips values that are larger than 40."""

    name = "many weights clipped"
    laws = ("3",)

    def output(self, x, weight, mask, bias):
        y = super().output(x, weight, mask, bias)
        return y if mask.size <= MANY else np.clip(y, -40, 40)


class ManyWeightsHideNan(Mutant):
    """The way for many weights takes NaN for 0."""

    name = "many weights hide nan"
    laws = ("4",)

    def output(self, x, weight, mask, bias):
        y = super().output(x, weight, mask, bias)
        return y if mask.size <= MANY else np.nan_to_num(y)


class ManyWeightsMaskedTwice(Mutant):
    """The way for many weights takes a weight of 0 for one that is not there yet, and puts a small number there."""

    name = "many weights masked twice"
    laws = ("5",)

    def select(self, mask, array):
        masked = super().select(mask, array)
        return masked if mask.size <= MANY or (array[~mask] != 0).any() else masked + array.dtype.type(2**-20)


class ManyWeightsNeedAConnection(Mutant):
    """The way for many weights forgets the bias where the mask is empty."""

    name = "many weights need a connection"
    laws = ("5",)

    def output(self, x, weight, mask, bias):
        return super().output(x, weight, mask, None if mask.size > MANY and not mask.any() else bias)


class ManyWeightsAccumulateInHalf(Mutant):
    """The way for many weights adds up in the dtype of x."""

    name = "many weights accumulate in half"
    laws = ("9",)

    def dtypes(self, device):
        return ("float16",)

    def output(self, x, weight, mask, bias):
        if mask.size <= MANY:
            return super().output(x, weight, mask, bias)
        terms = x[..., None, :] * self.select(mask, weight)
        y = np.add.accumulate(terms, axis=-1, dtype=x.dtype)[..., -1]
        return y if bias is None else y + bias


class LayerOfManyWeightsKeepsItsArguments(Mutant):
    """A layer of many weights keeps the array that it was made with."""

    name = "layer of many weights keeps its arguments"
    laws = ("10",)

    def layer(self, weight, mask, bias):
        return _LayerOfManyWeightsKeepsItsArguments(self, weight, mask, bias)


class _LayerOfManyWeightsKeepsItsArguments(ReferenceLayer):
    def __init__(self, backend, weight, mask, bias):
        super().__init__(backend, weight, mask, bias)
        if mask.size > MANY:
            weight[...] = self.weight
            self.weight = weight
            self.note()
