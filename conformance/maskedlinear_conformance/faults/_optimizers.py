"""Faults of guarded optimizers: what moves and should stay, or stays and should move."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,attr-defined,no-any-return"

import numpy as np

from maskedlinear_conformance.faults._reference_backend import Mutant
from maskedlinear_conformance.faults._reference_layer import ReferenceLayer


class OptimizerNotGuarded(Mutant):
    """Momentum of another mask moves what is masked."""

    name = "optimizer not guarded"
    laws = ("13",)

    def layer(self, weight, mask, bias):
        return _OptimizerNotGuarded(self, weight, mask, bias)


class _OptimizerNotGuarded(ReferenceLayer):
    def guard(self):
        return lambda moved: moved


class OptimizerGuardedByAProduct(Mutant):
    """The guard multiplies the weight with the mask."""

    name = "optimizer guarded by a product"
    laws = ("13",)

    def layer(self, weight, mask, bias):
        return _OptimizerGuardedByAProduct(self, weight, mask, bias)


class _OptimizerGuardedByAProduct(ReferenceLayer):
    def guard(self):
        return lambda moved: moved * self.mask


class OptimizerGuardedByTheFirstMask(Mutant):
    """The guard keeps the mask that held when it was made."""

    name = "optimizer guarded by the first mask"
    laws = ("13",)

    def layer(self, weight, mask, bias):
        return _OptimizerGuardedByTheFirstMask(self, weight, mask, bias)


class _OptimizerGuardedByTheFirstMask(ReferenceLayer):
    def guard(self):
        mask = self.mask.copy()
        return lambda moved: self.backend.select(mask, moved)


class OptimizerGuardRounds(Mutant):
    """The guard keeps dormant weights in half precision while a step runs."""

    name = "optimizer guard rounds"
    laws = ("13",)

    def layer(self, weight, mask, bias):
        return _OptimizerGuardRounds(self, weight, mask, bias)


class _TogetherInAStep(ReferenceLayer):
    """The guard hands the optimizer live and dormant weights together, and divides them after its step."""

    def frozen_step(self, optimizer):
        step = super().frozen_step(optimizer)

        def together(x, g):
            dormant = self.full()
            step(x, g)
            self.divide(self.joined(self.weight, dormant).astype(self.weight.dtype))

        return together


class _OptimizerGuardRounds(_TogetherInAStep):
    def joined(self, weight, dormant):
        return np.where(self.mask, weight, dormant.astype(np.float16))


class OptimizerFrozenAltogether(Mutant):
    """The guard keeps every weight."""

    name = "optimizer frozen altogether"
    laws = ("13",)

    def layer(self, weight, mask, bias):
        return _OptimizerFrozenAltogether(self, weight, mask, bias)


class _OptimizerFrozenAltogether(ReferenceLayer):
    def guard(self):
        return lambda moved: self.weight.copy()


class OptimizerGuardedByABlend(Mutant):
    """The guard adds masked products of old and new: NaN and -0 are lost."""

    name = "optimizer guarded by a blend"
    laws = ("13",)

    def layer(self, weight, mask, bias):
        return _OptimizerGuardedByABlend(self, weight, mask, bias)


class _OptimizerGuardedByABlend(_TogetherInAStep):
    def joined(self, weight, dormant):
        return weight * self.mask + dormant * ~self.mask


class OptimizerGuardFlushesSubnormals(Mutant):
    """The guard adds an update of 0 in arithmetic without subnormal numbers."""

    name = "optimizer guard flushes subnormals"
    laws = ("13",)

    def layer(self, weight, mask, bias):
        return _OptimizerGuardFlushesSubnormals(self, weight, mask, bias)


class _OptimizerGuardFlushesSubnormals(_TogetherInAStep):
    def joined(self, weight, dormant):
        return np.where(self.mask, weight, np.where(abs(dormant) < np.finfo(dormant.dtype).tiny, 0 * dormant, dormant))


class OptimizerClimbs(Mutant):
    """The guard takes the update with the wrong sign."""

    name = "optimizer climbs"
    laws = ("13",)

    def layer(self, weight, mask, bias):
        return _OptimizerClimbs(self, weight, mask, bias)


class _OptimizerClimbs(ReferenceLayer):
    def guard(self):
        return lambda moved: self.backend.select(self.mask, 2 * self.weight - moved)


class OptimizerClimbsLater(Mutant):
    """From the second step on the guard takes updates with the wrong sign."""

    name = "optimizer climbs later"
    laws = ("13",)

    def layer(self, weight, mask, bias):
        return _OptimizerClimbsLater(self, weight, mask, bias)


class _OptimizerClimbsLater(ReferenceLayer):
    def guard(self):
        steps = iter((1, -1, -1))

        def held(moved):
            along = next(steps, 1) * (moved - self.weight)
            return self.backend.select(self.mask, self.weight + along)

        return held


class OptimizerMovesTheMask(Mutant):
    """The mask is a parameter like the others."""

    name = "optimizer moves the mask"
    laws = ("13",)

    def layer(self, weight, mask, bias):
        return _OptimizerMovesTheMask(self, weight, mask, bias)


class _OptimizerMovesTheMask(ReferenceLayer):
    def frozen_step(self, optimizer):
        step = super().frozen_step(optimizer)

        def moved(x, g):
            step(x, g)
            self.set_mask(np.where(np.arange(self.mask.shape[1]) == 0, ~self.mask, self.mask))

        return moved


class OptimizerFreezesTheBias(Mutant):
    """The guard keeps the bias, too."""

    name = "optimizer freezes the bias"
    laws = ("13",)

    def layer(self, weight, mask, bias):
        return _OptimizerFreezesTheBias(self, weight, mask, bias)


class _OptimizerFreezesTheBias(ReferenceLayer):
    def frozen_step(self, optimizer):
        step = super().frozen_step(optimizer)

        def held(x, g):
            bias = self.bias
            step(x, g)
            self.bias = bias

        return held


class OptimizerGuardInSinglePrecision(Mutant):
    """The guard keeps dormant weights of double precision in single while a step runs."""

    name = "optimizer guard in single precision"
    laws = ("13",)

    def dtypes(self, device):
        return ("float64",)

    def layer(self, weight, mask, bias):
        return _OptimizerGuardInSinglePrecision(self, weight, mask, bias)


class _OptimizerGuardInSinglePrecision(_TogetherInAStep):
    def joined(self, weight, dormant):
        return np.where(self.mask, weight, dormant.astype(np.float32))


class OptimizerWithoutBiasNotGuarded(Mutant):
    """The guard looks for weights that have a bias beside them."""

    name = "optimizer without bias not guarded"
    laws = ("13",)

    def layer(self, weight, mask, bias):
        return _OptimizerWithoutBiasNotGuarded(self, weight, mask, bias)


class _OptimizerWithoutBiasNotGuarded(ReferenceLayer):
    def guard(self):
        return super().guard() if self.bias is not None else lambda moved: moved
