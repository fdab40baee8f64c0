"""Faults of code that only large layers take: blocks, short cuts, and what is kept for later calls."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,attr-defined,no-any-return"

import numpy as np

from maskedlinear_conformance.faults._reference_backend import Mutant, ReferenceLayer, flat


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
