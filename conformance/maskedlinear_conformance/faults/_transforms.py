"""Faults of compilation, checkpointing and scans."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,attr-defined,no-any-return"

import numpy as np

from maskedlinear_conformance.faults._reference_backend import Mutant, flat, in_memory, new_order


class CompiledCodeKeepsTheFirstMask(Mutant):
    """What was compiled is kept by shape, and keeps its mask."""

    name = "compiled code keeps the first mask"
    laws = ("7",)

    def compile(self, x, weight, mask, bias, g):
        kept = vars(self).setdefault("kept", {}).setdefault((x.shape, str(x.dtype)), mask.copy())
        return self.both(x, weight, kept, bias, g)


class CompiledCodeKeepsTheFirstWeight(Mutant):
    """What was compiled has folded the weight as a constant."""

    name = "compiled code keeps the first weight"
    laws = ("7",)

    def compile(self, x, weight, mask, bias, g):
        kept = vars(self).setdefault("kept", {}).setdefault((x.shape, str(x.dtype)), weight.copy())
        return self.both(x, kept, mask, bias, g)


class CompiledCodeDropsTheRule(Mutant):
    """Compiled code has the derivative of a product: NaN under the mask."""

    name = "compiled code drops the rule"
    laws = ("7",)

    def compile(self, x, weight, mask, bias, g):
        found = self.both(x, weight, mask, bias, g)
        return [found[0], self.product(g, weight * mask).astype(x.dtype), *found[2:]]


class CompiledCodeKeepsTheBiasOut(Mutant):
    """Compiled code is kept without regard to whether there is a bias."""

    name = "compiled code keeps the bias out"
    laws = ("7",)

    def compile(self, x, weight, mask, bias, g):
        seen = vars(self).setdefault("seen", {}).setdefault((x.shape, str(x.dtype)), bias is not None)
        found = self.both(x, weight, mask, bias, g)
        return found if seen == (bias is not None) else [found[0] + 1, *found[1:]]


class CheckpointRecomputesWithoutTheMask(Mutant):
    """Recomputation in the backward pass forgets the mask."""

    name = "checkpoint recomputes without the mask"
    laws = ("7",)

    def checkpoint(self, x, weight, mask, bias, g):
        return [self.masked_linear(x, weight, mask, bias), *self.both(x, weight, mask | True, bias, g)[1:]]


class ScanKeepsTheLastGradient(Mutant):
    """A scan keeps the last step's gradient, not their sum."""

    name = "scan keeps the last gradient"
    laws = ("7",)

    def added(self, steps):
        return steps[-1]


class CompiledCodeFiltersNanOnly(Mutant):
    """Compiled code multiplies with the mask once NaN is filtered: infinity leaks."""

    name = "compiled code filters nan only"
    laws = ("7",)

    def compile(self, x, weight, mask, bias, g):
        found = self.both(x, weight, mask, bias, g)
        kept = (np.where(np.isnan(weight), 0, weight) * mask).astype(weight.dtype)
        return [self.masked_linear(x, kept, mask | True, bias), *found[1:]]


class CompiledCodeMultipliesTheGradient(Mutant):
    """Compiled code multiplies the weight's gradient with the mask: NaN of x and g shows under it."""

    name = "compiled code multiplies the gradient"
    laws = ("7",)

    def compile(self, x, weight, mask, bias, g):
        found = self.both(x, weight, mask, bias, g)
        raw = self.both(x, weight, mask | True, bias, g)[2]
        return [*found[:2], (raw * mask + 0).astype(raw.dtype), found[3]]


class CompiledCodeOverwritesItsInputs(Mutant):
    """Compiled code reuses the memory of x for what it keeps."""

    name = "compiled code overwrites its inputs"
    laws = ("10",)

    def compile(self, x, weight, mask, bias, g):
        found = self.both(x, weight, mask, bias, g)
        x[...] = 0
        return found


class CompiledCodeReusesItsResults(Mutant):
    """Compiled code writes every result to the same place."""

    name = "compiled code reuses its results"
    laws = ("10",)

    def compile(self, x, weight, mask, bias, g):
        found = self.both(x, weight, mask, bias, g)
        key = tuple((part.shape, str(part.dtype)) for part in found if part is not None)
        kept = vars(self).setdefault("kept", {}).setdefault(key, found)
        for old, new in zip(kept, found, strict=True):
            if new is not None:
                old[...] = new
        return kept


class CompiledCodeSpecialisesOnABatch(Mutant):
    """Compiled code reads an empty batch as a batch of one."""

    name = "compiled code specialises on a batch"
    laws = ("7",)

    def compile(self, x, weight, mask, bias, g):
        found = self.both(x, weight, mask, bias, g)
        return found if flat(x).shape[0] else [*found[:2], found[2] + mask.astype(x.dtype), found[3]]


class CompiledCodeKeepsTheFirstX(Mutant):
    """Compiled code gives the gradient of the x that it was compiled for."""

    name = "compiled code keeps the first x"
    laws = ("7",)

    def compile(self, x, weight, mask, bias, g):
        kept = vars(self).setdefault("kept", {}).setdefault((x.shape, str(x.dtype)), x.copy())
        return [self.masked_linear(x, weight, mask, bias), *self.both(kept, weight, mask, bias, g)[1:]]


class CompiledCodeKeepsTheFirstBias(Mutant):
    """Compiled code has folded the bias as a constant."""

    name = "compiled code keeps the first bias"
    laws = ("7",)

    def compile(self, x, weight, mask, bias, g):
        kept = vars(self).setdefault("kept", {}).setdefault((x.shape, str(x.dtype)), bias)
        return self.both(x, weight, mask, kept if bias is not None and kept is not None else bias, g)


class CompiledCodeKeptByTheNumberOfConnections(Mutant):
    """What was compiled for a mask serves every mask with as many connections in each row."""

    name = "compiled code kept by the number of connections"
    laws = ("7",)

    def compile(self, x, weight, mask, bias, g):
        key = (x.shape, str(x.dtype), tuple(mask.sum(1)))
        return self.both(x, weight, vars(self).setdefault("kept", {}).setdefault(key, mask.copy()), bias, g)


class CompiledCodeIgnoresStrides(Mutant):
    """Compiled code reads x as if it were contiguous."""

    name = "compiled code ignores strides"
    laws = ("8",)

    def compile(self, x, weight, mask, bias, g):
        return self.both(in_memory(x), weight, mask, bias, g)


class CompiledCodeFlipsABitWhenLarge(Mutant):
    """One bit of a large mask is wrong in compiled code."""

    name = "compiled code flips a bit when large"
    laws = ("7",)

    def compile(self, x, weight, mask, bias, g):
        mask = mask.copy()
        if mask.size > 100_000:
            mask.flat[mask.size // 3] ^= True
        return self.both(x, weight, mask, bias, g)


class CompiledCodeMultipliesWhenLarge(Mutant):
    """Compiled code for large layers multiplies with the mask in dx."""

    name = "compiled code multiplies when large"
    laws = ("7",)

    def compile(self, x, weight, mask, bias, g):
        found = self.both(x, weight, mask, bias, g)
        return found if mask.size < 10_000 else [found[0], self.product(g, weight * mask), *found[2:]]


class CompiledCodeIsNotDeterministic(Mutant):
    """The order of the sum changes from call to call of compiled code."""

    name = "compiled code is not deterministic"
    laws = ("10",)

    def compile(self, x, weight, mask, bias, g):
        order = new_order(x.shape[-1])
        y = self.masked_linear(x[..., order], weight[:, order], mask[:, order], bias)
        return [y, *self.both(x, weight, mask, bias, g)[1:]]


class CheckpointWithAnEmptyMaskForgetsTheBias(Mutant):
    """Recomputation takes a short cut for empty masks."""

    name = "checkpoint with an empty mask forgets the bias"
    laws = ("7",)

    def checkpoint(self, x, weight, mask, bias, g):
        found = self.both(x, weight, mask, bias, g)
        return found if mask.any() or not mask.size else [0 * found[0], *found[1:]]
