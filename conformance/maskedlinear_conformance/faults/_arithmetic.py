"""Faults of value and gradients: each class is one, and overrides the step that is wrong."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,attr-defined,no-any-return"

import numpy as np

from maskedlinear_conformance.faults._reference_backend import Mutant, flat, in_memory, new_order


def _flipped(mask):
    """Return a mask with one bit wrong, if it is large."""
    mask = mask.copy()
    if mask.size > 100_000:
        mask.flat[mask.size // 3] ^= True
    return mask


class MaskIgnoredForward(Mutant):
    """The mask is dropped in the forward pass."""

    name = "mask ignored forward"
    laws = ("1", "5")

    def output(self, x, weight, mask, bias):
        return super().output(x, weight, np.ones_like(mask), bias)


class MaskDroppedInDx(Mutant):
    """The mask is dropped in dx."""

    name = "mask dropped in dx"
    laws = ("1", "2")

    def input_gradient(self, g, weight, mask):
        return self.product(g, weight)


class MaskDroppedInDweight(Mutant):
    """The mask is dropped in dW: a straight-through gradient."""

    name = "mask dropped in dweight"
    laws = ("1", "4")

    def weight_gradient(self, g, x, mask):
        return self.product(flat(g).T, flat(x))


class MaskDroppedInJvp(Mutant):
    """The tangent of the weight is not masked in forward mode."""

    name = "mask dropped in jvp"
    laws = ("1", "4")

    def jvp(self, x, weight, mask, bias, dx, dweight, dbias):
        y, dy = super().jvp(x, weight, mask, bias, dx, None, dbias)
        return y, dy if dweight is None else (dy + self.product(x, dweight.T)).astype(x.dtype)


class MaskTransposedWhenSquare(Mutant):
    """A square mask is read as (in, out)."""

    name = "mask transposed when square"
    laws = ("1",)

    def select(self, mask, array):
        return super().select(mask.T if mask.shape[0] == mask.shape[1] else mask, array)


class ProductForSelect(Mutant):
    """The mask is multiplied: 0 * NaN is NaN."""

    name = "product for select"
    laws = ("4",)

    def select(self, mask, array):
        return array * mask


class NanFilteredInfinityNot(Mutant):
    """NaN is filtered after a product with the mask, infinity is not."""

    name = "nan filtered infinity not"
    laws = ("4",)

    def select(self, mask, array):
        return np.nan_to_num(array, nan=0.0, posinf=np.inf, neginf=-np.inf) * mask


class ProductInDweight(Mutant):
    """The weight's gradient is multiplied with the mask: -0 and NaN."""

    name = "product in dweight"
    laws = ("4",)

    def weight_gradient(self, g, x, mask):
        return self.product(flat(g).T, flat(x)) * mask


class NegativeZeroInDweight(Mutant):
    """The weight's gradient is -0 under the mask."""

    name = "negative zero in dweight"
    laws = ("4",)

    def weight_gradient(self, g, x, mask):
        return np.where(mask, super().weight_gradient(g, x, mask), -0.0)


class ProductInTangent(Mutant):
    """The tangent of the weight is multiplied with the mask."""

    name = "product in tangent"
    laws = ("4",)

    def jvp(self, x, weight, mask, bias, dx, dweight, dbias):
        y, dy = super().jvp(x, weight, mask, bias, dx, None, dbias)
        return y, dy if dweight is None else (dy + self.product(x, (dweight * mask).T)).astype(x.dtype)


class OneBitOfALargeMaskFlipped(Mutant):
    """One bit of a large mask is wrong."""

    name = "one bit of a large mask flipped"
    laws = ("1",)

    def output(self, x, weight, mask, bias):
        return super().output(x, weight, _flipped(mask), bias)


class OneBitFlippedInDx(Mutant):
    """One bit of a large mask is wrong in dx only."""

    name = "one bit flipped in dx"
    laws = ("1",)

    def input_gradient(self, g, weight, mask):
        return super().input_gradient(g, weight, _flipped(mask))


class OneBitFlippedInDweight(Mutant):
    """One bit of a large mask is wrong in dW only."""

    name = "one bit flipped in dweight"
    laws = ("1", "4")

    def weight_gradient(self, g, x, mask):
        return super().weight_gradient(g, x, _flipped(mask))


class LastRowUnmasked(Mutant):
    """The last row of a large mask is read as live, as by a tile that is not full."""

    name = "last row unmasked"
    laws = ("1",)

    def select(self, mask, array):
        if mask.shape[0] % 16 and mask.size > 1000:
            mask = np.concatenate([mask[:-1], np.ones_like(mask[-1:])])
        return super().select(mask, array)


class BiasGradientOverTheFirstAxisOnly(Mutant):
    """The bias' gradient is summed over the first batch dimension, not over all."""

    name = "bias gradient over the first axis only"
    laws = ("6",)

    def bias_gradient(self, g):
        return super().bias_gradient(g if g.ndim < 3 else g[:, :1])


class BiasGradientIsAMean(Mutant):
    """The bias' gradient is the mean over the batch."""

    name = "bias gradient is a mean"
    laws = ("1",)

    def bias_gradient(self, g):
        return super().bias_gradient(g) / max(1, flat(g).shape[0])


class BiasGradientOverTheWrongAxis(Mutant):
    """The bias' gradient of a square batch is summed over the outputs."""

    name = "bias gradient over the wrong axis"
    laws = ("1",)

    def bias_gradient(self, g):
        return super().bias_gradient(g.T if g.ndim == 2 and g.shape[0] == g.shape[1] else g)


class WritesIntoTheWeight(Mutant):
    """The forward pass masks the user's weight in place."""

    name = "writes into the weight"
    laws = ("10", "8")

    def output(self, x, weight, mask, bias):
        if weight.flags.writeable:
            weight *= mask
        return super().output(x, weight, mask, bias)


class WritesIntoTheCotangent(Mutant):
    """The backward pass writes into the user's cotangent."""

    name = "writes into the cotangent"
    laws = ("10", "8")

    def bias_gradient(self, g):
        found = super().bias_gradient(g)
        if g.flags.writeable and g.size:
            g[..., 0] = 0
        return found


class WritesIntoX(Mutant):
    """The forward pass adds to the user's x in place."""

    name = "writes into x"
    laws = ("10", "8")

    def output(self, x, weight, mask, bias):
        found = super().output(x, weight, mask, bias)
        if x.flags.writeable:
            x[..., :1] += 1
        return found


class NotDeterministic(Mutant):
    """The order of the sum changes from call to call."""

    name = "not deterministic"
    laws = ("10",)

    def product(self, a, b):
        order = new_order(a.shape[-1])
        return super().product(a[..., order], b[order])


class BatchesInAnotherOrder(Mutant):
    """Several batch dimensions are flattened in Fortran's order."""

    name = "batches in another order"
    laws = ("1", "6")

    def output(self, x, weight, mask, bias):
        if x.ndim < 3:
            return super().output(x, weight, mask, bias)
        rows = flat(np.swapaxes(x, 0, 1))
        return super().output(rows, weight, mask, bias).reshape(*x.shape[:-1], weight.shape[0])


class RowsSeeEachOther(Mutant):
    """The batch is centred first."""

    name = "rows see each other"
    laws = ("1", "6")

    def output(self, x, weight, mask, bias):
        y = super().output(x, weight, mask, bias)
        return y - y.mean(0) if y.ndim == 2 and len(y) > 1 else y


class EmptyBatchLeavesGarbage(Mutant):
    """The weight's gradient of an empty batch is not written."""

    name = "empty batch leaves garbage"
    laws = ("1",)

    def weight_gradient(self, g, x, mask):
        found = super().weight_gradient(g, x, mask)
        return found if flat(x).shape[0] else found + mask.astype(found.dtype)


class NoInputsNoBias(Mutant):
    """A layer without inputs forgets its bias."""

    name = "no inputs no bias"
    laws = ("1",)

    def output(self, x, weight, mask, bias):
        return super().output(x, weight, mask, bias if x.shape[-1] else None)


class ABatchDimensionAppears(Mutant):
    """An input without batch dimensions gets one."""

    name = "a batch dimension appears"
    laws = ("1",)

    def output(self, x, weight, mask, bias):
        y = super().output(x, weight, mask, bias)
        return y[None] if y.ndim == 1 else y


class StridesIgnored(Mutant):
    """Memory is read as if it were contiguous."""

    name = "strides ignored"
    laws = ("8",)

    def masked_linear(self, x, weight, mask, bias):
        return super().masked_linear(in_memory(x), in_memory(weight), mask, bias)


class ExplicitZerosDropped(Mutant):
    """A live weight that is 0 is taken for a masked one."""

    name = "explicit zeros dropped"
    laws = ("golden", "3")

    def vjp(self, x, weight, mask, bias, g, wrt):
        return super().vjp(x, weight, mask & (weight != 0), bias, g, wrt)


class FullMaskTakesAWrongShortCut(Mutant):
    """The short cut for full masks forgets the bias."""

    name = "full mask takes a wrong short cut"
    laws = ("5",)

    def output(self, x, weight, mask, bias):
        return super().output(x, weight, mask, None if mask.size and mask.all() else bias)


class EmptyMaskTakesAWrongShortCut(Mutant):
    """The short cut for empty masks gives zeros."""

    name = "empty mask takes a wrong short cut"
    laws = ("1", "5")

    def output(self, x, weight, mask, bias):
        y = super().output(x, weight, mask, bias)
        return y if mask.any() else 0 * y


class LiveWeightsRescaled(Mutant):
    """Outputs are divided by the density, as dropout does."""

    name = "live weights rescaled"
    laws = ("1",)

    def output(self, x, weight, mask, bias):
        density = mask.mean() if mask.any() else 1.0
        return (super().output(x, weight, mask, bias) / density).astype(np.promote_types(x.dtype, np.float32))


class ProductForSelectInLargeLayers(Mutant):
    """The kernel for large layers multiplies with the mask."""

    name = "product for select in large layers"
    laws = ("4",)

    def select(self, mask, array):
        return super().select(mask, array) if mask.size < 1024 else array * mask + array.dtype.type(0)


class StridesOfLargeBatchesIgnored(Mutant):
    """The kernel for large batches reads x as if it were contiguous."""

    name = "strides of large batches ignored"
    laws = ("8",)

    def masked_linear(self, x, weight, mask, bias):
        return super().masked_linear(in_memory(x) if x.size >= 200 else x, weight, mask, bias)


class ResultsAreReused(Mutant):
    """Every value of one shape is written to the same place."""

    name = "results are reused"
    laws = ("10",)

    def masked_linear(self, x, weight, mask, bias):
        y = super().masked_linear(x, weight, mask, bias)
        kept = vars(self).setdefault("kept", {}).setdefault((y.shape, str(y.dtype)), y)
        kept[...] = y
        return kept


class KeptByTheNumberOfConnections(Mutant):
    """What is derived from a mask is kept by its shape and number of connections."""

    name = "kept by the number of connections"
    laws = ("11",)

    def output(self, x, weight, mask, bias):
        kept = vars(self).setdefault("kept", {}).setdefault((mask.shape, mask.sum()), mask.copy())
        return super().output(x, weight, kept, bias)


class LiveNanFiltered(Mutant):
    """NaN in x is taken for 0, and so hidden."""

    name = "live nan filtered"
    laws = ("4",)

    def output(self, x, weight, mask, bias):
        return super().output(np.where(np.isnan(x), x.dtype.type(0), x), weight, mask, bias)


class LiveInfinityClamped(Mutant):
    """Weights are clamped to finite numbers."""

    name = "live infinity clamped"
    laws = ("4",)

    def output(self, x, weight, mask, bias):
        return super().output(x, np.clip(weight, -3e38, 3e38), mask, bias)


class BiasGradientOverTwoAxesOnly(Mutant):
    """The bias' gradient is summed over two batch dimensions at most."""

    name = "bias gradient over two axes only"
    laws = ("6",)

    def bias_gradient(self, g):
        return super().bias_gradient(g if g.ndim < 4 else g[:, :, :1])
