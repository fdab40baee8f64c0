"""Faults of mapping over problems."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,attr-defined,no-any-return"

import numpy as np

from maskedlinear_conformance.faults._reference_backend import Mutant, in_memory


class VmapUsesTheFirstMask(Mutant):
    """Mapping over masks uses the first of them."""

    name = "vmap uses the first mask"
    laws = ("7",)

    def vmap(self, axes, x, weight, mask, bias, g):
        if axes[2] is not None:
            mask, axes = np.take(mask, 0, axes[2]), (*axes[:2], None, *axes[3:])
        if all(axis is None for axis in axes):
            x, axes = np.stack([x] * 3), (0, *axes[1:])
        return super().vmap(axes, x, weight, mask, bias, g)


class VmapAddsUpTheBiasGradient(Mutant):
    """Mapping gives every problem the sum of the bias' gradients."""

    name = "vmap adds up the bias gradient"
    laws = ("7",)

    def vmap(self, axes, x, weight, mask, bias, g):
        y, dx, dweight, dbias = super().vmap(axes, x, weight, mask, bias, g)
        total = None if bias is None else np.broadcast_to(dbias.sum(0), dbias.shape).astype(dbias.dtype)
        return y, dx, dweight, total


class VmapDropsTheMaskOfDweight(Mutant):
    """The rule for mapping does not mask the weight's gradient."""

    name = "vmap drops the mask of dweight"
    laws = ("7",)

    def vmap(self, axes, x, weight, mask, bias, g):
        found = super().vmap(axes, x, weight, mask, bias, g)
        raw = super().vmap(axes, x, weight, mask | True, bias, g)
        return found[0], found[1], raw[2], found[3]


class VmapByAProduct(Mutant):
    """The rule for mapping multiplies with the mask."""

    name = "vmap by a product"
    laws = ("7",)

    def vmap(self, axes, x, weight, mask, bias, g):
        y, dx, dweight, dbias = super().vmap(axes, x, weight, mask, bias, g)
        leak = 0 * weight.sum().astype(y.dtype)
        return y + leak, dx, dweight, dbias


class VmapTakesOneBatchDimension(Mutant):
    """The rule for mapping sums the bias gradient over the first batch dimension only."""

    name = "vmap takes one batch dimension"
    laws = ("7",)

    def vmap(self, axes, x, weight, mask, bias, g):
        found = super().vmap(axes, x, weight, mask, bias, g)
        return found if x.ndim < 4 else (*found[:3], g[:, 0].sum(1, dtype=np.float32).astype(g.dtype))


class VmapOverwritesItsInputs(Mutant):
    """The rule for mapping masks the stacked weights in place."""

    name = "vmap overwrites its inputs"
    laws = ("7",)

    def vmap(self, axes, x, weight, mask, bias, g):
        found = super().vmap(axes, x, weight, mask, bias, g)
        weight[...] = 0
        return found


class VmapKeepsTheFirstWeight(Mutant):
    """What was compiled for these axes has folded the weight as a constant."""

    name = "vmap keeps the first weight"
    laws = ("7",)

    def vmap(self, axes, x, weight, mask, bias, g):
        kept = vars(self).setdefault("kept", {}).setdefault((axes, x.shape, weight.shape), weight.copy())
        return super().vmap(axes, x, kept, mask, bias, g)


class VmapReusesItsResults(Mutant):
    """Mapping writes every result of one shape to the same place."""

    name = "vmap reuses its results"
    laws = ("7",)

    def vmap(self, axes, x, weight, mask, bias, g):
        found = super().vmap(axes, x, weight, mask, bias, g)
        kept = vars(self).setdefault("kept", {}).setdefault((axes, x.shape, weight.shape, bias is None), found)
        for old, new in zip(kept, found, strict=True):
            if new is not None:
                old[...] = new
        return kept


class VmapIgnoresStrides(Mutant):
    """Mapping reads x as if it were contiguous."""

    name = "vmap ignores strides"
    laws = ("7",)

    def vmap(self, axes, x, weight, mask, bias, g):
        return super().vmap(axes, in_memory(x), weight, mask, bias, g)


class VmapFlipsABitWhenLarge(Mutant):
    """One bit of large masks is wrong when they are mapped over."""

    name = "vmap flips a bit when large"
    laws = ("7",)

    def vmap(self, axes, x, weight, mask, bias, g):
        mask = mask.copy()
        if weight.size > 10_000:
            mask[..., -1, -1] ^= True
        return super().vmap(axes, x, weight, mask, bias, g)


class VmapFiltersNanOnly(Mutant):
    """The rule for mapping filters NaN and multiplies with the mask: infinity leaks."""

    name = "vmap filters nan only"
    laws = ("7",)

    def vmap(self, axes, x, weight, mask, bias, g):
        kept = np.where(np.isnan(weight), weight.dtype.type(0), weight)
        y, *gradients = super().vmap(axes, x, kept, mask, bias, g)
        return (y + (0 * kept).sum(dtype=y.dtype), *gradients)


class VmapMultipliesTheGradient(Mutant):
    """The rule for mapping multiplies the weight's gradient with the mask: NaN of x and g shows under it."""

    name = "vmap multiplies the gradient"
    laws = ("7",)

    def vmap(self, axes, x, weight, mask, bias, g):
        y, dx, _, dbias = super().vmap(axes, x, weight, mask, bias, g)
        raw = super().vmap(axes, x, weight, mask | True, bias, g)[2]
        live = mask if axes[2] is None else np.moveaxis(mask, axes[2], 0)
        return y, dx, raw * live + raw.dtype.type(0), dbias


class VmapWithoutBiasDropsTheMask(Mutant):
    """The rule for mapping layers without bias drops the mask."""

    name = "vmap without bias drops the mask"
    laws = ("7",)

    def vmap(self, axes, x, weight, mask, bias, g):
        return super().vmap(axes, x, weight, mask | (bias is None), bias, g)
