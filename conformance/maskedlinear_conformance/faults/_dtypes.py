"""Faults of dtypes: what is summed, rounded or cast where it should not be."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,attr-defined,no-any-return"

import numpy as np

from maskedlinear_conformance.faults._reference_backend import Mutant, flat


def _tf32(array):
    """Return float32 values rounded to 11 bits; others as they are."""
    if array.dtype != np.float32:
        return array
    mantissa, exponent = np.frexp(array)
    return np.ldexp(np.round(mantissa * 2**11) / 2**11, exponent).astype(np.float32)


class _Half(Mutant):
    """A fault that half types show."""

    def dtypes(self, device):
        return ("float16",)


class AccumulatesInFloat16(_Half):
    """Sums of half types are formed in half precision."""

    name = "accumulates in float16"
    laws = ("1", "9")

    def product(self, a, b):
        if a.dtype != np.float16:
            return super().product(a, b)
        total = np.zeros((*a.shape[:-1], *b.shape[1:]), np.float16)
        for i in range(0, a.shape[-1], 8):
            total += a[..., i : i + 8] @ b[i : i + 8]
        return total


class RoundsBeforeTheBias(_Half):
    """The product is rounded to half precision before the bias is added."""

    name = "rounds before the bias"
    laws = ("1",)

    def output(self, x, weight, mask, bias):
        y = super().output(x, weight, mask, None).astype(x.dtype)
        return y if bias is None else y + bias


class Float64InFloat32(Mutant):
    """Double precision is computed in single."""

    name = "float64 in float32"
    laws = ("1",)

    def dtypes(self, device):
        return ("float64",)

    def product(self, a, b):
        return super().product(a.astype(np.float32), b.astype(np.float32)).astype(a.dtype)


class ReadsAsTf32(Mutant):
    """Inputs are rounded to 11 bits, as tensor cores do by default."""

    name = "reads as tf32"
    laws = ("1",)

    def product(self, a, b):
        return super().product(_tf32(a), _tf32(b))


class OutputInFloat32(_Half):
    """Half precision comes back in single."""

    name = "output in float32"
    laws = ("1",)

    def masked_linear(self, x, weight, mask, bias):
        return self.output(x, weight, mask, bias)


class AutocastIgnored(_Half):
    """Automatic casts do not happen."""

    name = "autocast ignored"
    laws = ("9",)

    def autocast(self, dtype, x, weight, mask, bias, g):
        return self.both(x, weight, mask, bias, g)


class AutocastDropsTheMaskOfDweight(_Half):
    """Under automatic casts the weight's gradient is not masked."""

    name = "autocast drops the mask of dweight"
    laws = ("9",)

    def autocast(self, dtype, x, weight, mask, bias, g):
        found = super().autocast(dtype, x, weight, mask, bias, g)
        return [*found[:2], self.product(flat(g).T, flat(x.astype(dtype))).astype(dtype), found[3]]


class AutocastByAProduct(_Half):
    """Under automatic casts the mask is multiplied."""

    name = "autocast by a product"
    laws = ("9",)

    def autocast(self, dtype, x, weight, mask, bias, g):
        found = super().autocast(dtype, x, weight, mask, bias, g)
        return [(found[0] + 0 * (weight * mask).sum()).astype(dtype), *found[1:]]


class AutocastOverwritesTheWeight(_Half):
    """Under automatic casts the user's weight is masked in place."""

    name = "autocast overwrites the weight"
    laws = ("9",)

    def autocast(self, dtype, x, weight, mask, bias, g):
        found = super().autocast(dtype, x, weight, mask, bias, g)
        weight[~mask] = 0
        return found


class HalfSumsBetweenBlocks(_Half):
    """Sums are formed in single precision within a block, and rounded to half between the two blocks."""

    name = "half sums between blocks"
    laws = ("1", "9")

    def product(self, a, b):
        half = a.shape[-1] // 2
        parts = [
            super(HalfSumsBetweenBlocks, self).product(a[..., cut], b[cut]) for cut in (slice(half), slice(half, None))
        ]
        return sum(part.astype(a.dtype).astype(np.float32) for part in parts)


class LongBatchesInHalf(_Half):
    """The weight's gradient of a long batch is added up in half precision."""

    name = "long batches in half"
    laws = ("9",)

    def weight_gradient(self, g, x, mask):
        g, x = flat(g), flat(x)
        if len(x) < 1000:
            return super().weight_gradient(g, x, mask)
        total = np.zeros(mask.shape, g.dtype)
        for start in range(0, len(x), 16):
            total += (g[start : start + 16].T @ x[start : start + 16]).astype(g.dtype)
        return self.select(mask, total)


class SecondOrderInHalf(_Half):
    """Second derivatives of the weight are added up in half precision."""

    name = "second order in half"
    laws = ("9",)

    def hvp(self, x, weight, mask, bias, g, dx, dweight, dbias, dg, mode):
        found = super().hvp(x, weight, mask, bias, g, dx, dweight, dbias, dg, mode)
        total = np.zeros(mask.shape, x.dtype)
        for ahead, back in ((flat(g), flat(dx)), (flat(dg), flat(x))):
            for start in range(0, len(back), 16):
                total += (ahead[start : start + 16].T @ back[start : start + 16]).astype(x.dtype)
        return (found[0], self.select(mask, total), *found[2:])


class AutocastKeepsTheCastWeight(_Half):
    """The weight that was cast is kept by its shape."""

    name = "autocast keeps the cast weight"
    laws = ("9",)

    def autocast(self, dtype, x, weight, mask, bias, g):
        kept = vars(self).setdefault("kept", {}).setdefault(weight.shape, weight.copy())
        return super().autocast(dtype, x, kept, mask, bias, g)


class AutocastSumsInHalf(_Half):
    """Under automatic casts the bias' gradient is added up in half precision."""

    name = "autocast sums in half"
    laws = ("9",)

    def autocast(self, dtype, x, weight, mask, bias, g):
        found = super().autocast(dtype, x, weight, mask, bias, g)
        if bias is None:
            return found
        total = np.zeros(g.shape[-1], g.dtype)
        for row in flat(g):
            total = total + row
        return [*found[:3], total]


class AutocastFlipsABitWhenLarge(_Half):
    """One bit of a large mask is wrong under automatic casts."""

    name = "autocast flips a bit when large"
    laws = ("9",)

    def autocast(self, dtype, x, weight, mask, bias, g):
        mask = mask.copy()
        if mask.size > 10_000:
            mask.flat[mask.size // 3] ^= True
        return super().autocast(dtype, x, weight, mask, bias, g)


class AutocastReusesItsResults(_Half):
    """Under automatic casts the value is written to the same place again."""

    name = "autocast reuses its results"
    laws = ("9",)

    def autocast(self, dtype, x, weight, mask, bias, g):
        y, *gradients = super().autocast(dtype, x, weight, mask, bias, g)
        kept = vars(self).setdefault("kept", {}).setdefault(y.shape, y)
        kept[...] = y
        return [kept, *gradients]


class AutocastMultipliesTheGradient(_Half):
    """Under automatic casts the weight's gradient is multiplied with the mask: NaN of x and g shows under it."""

    name = "autocast multiplies the gradient"
    laws = ("9",)

    def autocast(self, dtype, x, weight, mask, bias, g):
        found = super().autocast(dtype, x, weight, mask, bias, g)
        raw = super().autocast(dtype, x, weight, mask | True, bias, g)[2]
        return [*found[:2], raw * mask + raw.dtype.type(0), found[3]]
