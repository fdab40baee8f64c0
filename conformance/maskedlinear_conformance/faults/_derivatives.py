"""Faults of forward mode and of second order: each class is one, and overrides the step that is wrong."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,attr-defined,no-any-return"

import numpy as np

from maskedlinear_conformance.faults._reference_backend import Mutant, flat, in_memory


class BiasTangentDropped(Mutant):
    """The tangent of the bias is dropped."""

    name = "bias tangent dropped"
    laws = ("1",)

    def jvp(self, x, weight, mask, bias, dx, dweight, dbias):
        return super().jvp(x, weight, mask, bias, dx, dweight, None)


class StillInputMoves(Mutant):
    """An input without a tangent is given itself as one."""

    name = "still input moves"
    laws = ("1",)

    def jvp(self, x, weight, mask, bias, dx, dweight, dbias):
        return super().jvp(x, weight, mask, bias, x if dx is None else dx, dweight, dbias)


class DweightNeedsDx(Mutant):
    """The weight's gradient is zero unless x asks for one too."""

    name = "dweight needs dx"
    laws = ("1",)

    def vjp(self, x, weight, mask, bias, g, wrt):
        found = super().vjp(x, weight, mask, bias, g, wrt)
        if "x" in wrt or "weight" not in wrt:
            return found
        return [0 * part if name == "weight" else part for name, part in zip(wrt, found, strict=True)]


class SecondOrderMissesTheCrossTermOfX(Mutant):
    """The gradient of x is taken as constant in the weight."""

    name = "second order misses the cross term of x"
    laws = ("1",)

    def hvp(self, x, weight, mask, bias, g, dx, dweight, dbias, dg, mode):
        found = super().hvp(x, weight, mask, bias, g, dx, dweight, dbias, dg, mode)
        return (self.input_gradient(dg, weight, mask).astype(x.dtype), *found[1:])


class SecondOrderMissesTheCrossTermOfTheWeight(Mutant):
    """The gradient of the weight is taken as constant in x."""

    name = "second order misses the cross term of the weight"
    laws = ("1",)

    def hvp(self, x, weight, mask, bias, g, dx, dweight, dbias, dg, mode):
        found = super().hvp(x, weight, mask, bias, g, dx, dweight, dbias, dg, mode)
        return (found[0], self.weight_gradient(dg, x, mask).astype(x.dtype), *found[2:])


class SecondOrderWithoutTheMask(Mutant):
    """The second derivative of the weight is not masked."""

    name = "second order without the mask"
    laws = ("1", "4")

    def hvp(self, x, weight, mask, bias, g, dx, dweight, dbias, dg, mode):
        found = super().hvp(x, weight, mask, bias, g, dx, dweight, dbias, dg, mode)
        raw = self.product(flat(g).T, flat(dx)) + self.product(flat(dg).T, flat(x))
        return (found[0], raw.astype(x.dtype), *found[2:])


class SecondOrderOfGDropped(Mutant):
    """The double backward gives the cotangent no gradient."""

    name = "second order of g dropped"
    laws = ("1",)

    def hvp(self, x, weight, mask, bias, g, dx, dweight, dbias, dg, mode):
        found = super().hvp(x, weight, mask, bias, g, dx, dweight, dbias, dg, mode)
        return (*found[:3], np.zeros_like(found[3]))


class ForwardOverReverseDropped(Mutant):
    """Forward over reverse leaves out how g moves."""

    name = "forward over reverse dropped"
    laws = ("1",)

    def hvp(self, x, weight, mask, bias, g, dx, dweight, dbias, dg, mode):
        still = np.zeros_like(dg) if mode == "forward over reverse" else dg
        return super().hvp(x, weight, mask, bias, g, dx, dweight, dbias, still, mode)


class ValueOfForwardModeIsAnother(Mutant):
    """Forward mode gives a value without the bias."""

    name = "value of forward mode is another"
    laws = ("1",)

    def jvp(self, x, weight, mask, bias, dx, dweight, dbias):
        found = super().jvp(x, weight, mask, bias, dx, dweight, dbias)
        return self.masked_linear(x, weight, mask, None), found[1]


class ForwardOverReverseByAProduct(Mutant):
    """Forward over reverse multiplies with the mask: what lies under it leaks."""

    name = "forward over reverse by a product"
    laws = ("4",)

    def hvp(self, x, weight, mask, bias, g, dx, dweight, dbias, dg, mode):
        if mode == "forward over reverse":
            weight, dweight = (array * mask for array in (weight, dweight))
        return super().hvp(x, weight, mask | (mode == "forward over reverse"), bias, g, dx, dweight, dbias, dg, mode)


class SecondDerivativeByAProduct(Mutant):
    """The second derivative of the weight is multiplied with the mask: NaN of x and g shows under it."""

    name = "second derivative by a product"
    laws = ("4",)

    def hvp(self, x, weight, mask, bias, g, dx, dweight, dbias, dg, mode):
        found = super().hvp(x, weight, mask, bias, g, dx, dweight, dbias, dg, mode)
        raw = super().hvp(x, weight, mask | True, bias, g, dx, dweight, dbias, dg, mode)[1]
        return (found[0], raw * mask + np.float32(0), *found[2:])


class StridesIgnoredInForwardMode(Mutant):
    """Forward mode reads tangents as if they were contiguous."""

    name = "strides ignored in forward mode"
    laws = ("8",)

    def jvp(self, x, weight, mask, bias, dx, dweight, dbias):
        moved = None if dweight is None else in_memory(dweight)
        return super().jvp(x, weight, mask, bias, dx, moved, dbias)


class OneBitFlippedInJvp(Mutant):
    """One bit of a large mask is wrong in what the weight's tangent adds."""

    name = "one bit flipped in jvp"
    laws = ("1",)

    def jvp(self, x, weight, mask, bias, dx, dweight, dbias):
        y, dy = super().jvp(x, weight, mask, bias, dx, None, dbias)
        mask = mask.copy()
        if mask.size > 100_000:
            mask.flat[mask.size // 3] ^= True
        return y, dy if dweight is None else (dy + self.product(x, self.select(mask, dweight).T)).astype(x.dtype)


class OneBitFlippedInSecondOrder(Mutant):
    """One bit of a large mask is wrong in forward over reverse."""

    name = "one bit flipped in second order"
    laws = ("1",)

    def hvp(self, x, weight, mask, bias, g, dx, dweight, dbias, dg, mode):
        mask = mask.copy()
        if mask.size > 100_000 and mode == "forward over reverse":
            mask.flat[mask.size // 3] ^= True
        return super().hvp(x, weight, mask, bias, g, dx, dweight, dbias, dg, mode)


class OneModeMissesTheCrossTerm(Mutant):
    """The double backward takes the gradient of x as constant in the weight; forward over reverse does not."""

    name = "one mode misses the cross term"
    laws = ("1",)

    def hvp(self, x, weight, mask, bias, g, dx, dweight, dbias, dg, mode):
        still = np.zeros_like(dweight) if mode == "reverse over reverse" else dweight
        found = super().hvp(x, weight, mask, bias, g, dx, still, dbias, dg, mode)
        return (*found[:3], super().hvp(x, weight, mask, bias, g, dx, dweight, dbias, dg, mode)[3])


class ForwardOverForwardLosesTheOuterTangent(Mutant):
    """Nested forward mode takes the tangent of the weight as constant in x."""

    name = "forward over forward loses the outer tangent"
    laws = ("1",)

    def jvp_of_jvp(self, x, weight, mask, bias, tangent1, tangent2):
        return super().jvp_of_jvp(x, weight, mask, bias, tangent1, (0 * x, *tangent2[1:]))


class ForwardOverForwardConfusesItsDirections(Mutant):
    """Nested forward mode goes along one direction twice."""

    name = "forward over forward confuses its directions"
    laws = ("1",)

    def jvp_of_jvp(self, x, weight, mask, bias, tangent1, tangent2):
        return super().jvp_of_jvp(x, weight, mask, bias, tangent1, tangent1)


class VmapOfADerivativeTakesOneDirection(Mutant):
    """Forward mode and second order, mapped over directions, take the first for all."""

    name = "vmap of a derivative takes one direction"
    laws = ("7",)

    def vmap_derivative(self, derivative, axes, *arrays):
        last = arrays[-1].copy()
        last[1:] = last[0]
        return super().vmap_derivative(derivative, axes, *arrays[:-1], last)


class CompiledDerivativeKeepsItsMask(Mutant):
    """What compiles a derivative takes the mask of the first call for a constant."""

    name = "compiled derivative keeps its mask"
    laws = ("7",)

    def compile_derivative(self, derivative, x, weight, mask, *others):
        if not hasattr(self, "constant"):
            self.constant = mask
        mask = mask if mask.shape != self.constant.shape else self.constant
        return super().compile_derivative(derivative, x, weight, mask, *others)


class CompiledGradientsByAProduct(Mutant):
    """Compiled reverse mode multiplies the weight with the mask: NaN under it."""

    name = "compiled gradients by a product"
    laws = ("7",)

    def compile_derivative(self, derivative, *arrays):
        found = super().compile_derivative(derivative, *arrays)
        if derivative != "vjp":
            return found
        return [found[0], self.product(arrays[4], arrays[1] * arrays[2]), *found[2:]]


class CompiledGradientsAddTheValue(Mutant):
    """The compiler takes two matrices of zeros for one, so that one sum is added to the other."""

    name = "compiled gradients add the value"
    laws = ("7",)

    def compile_derivative(self, derivative, *arrays):
        found = list(super().compile_derivative(derivative, *arrays))
        if derivative == "jvp":
            found[1] = found[1] + found[0]
        return found


class HessianOfTheWholeWeight(Mutant):
    """The compiled Hessian has the connections that are masked, too."""

    name = "hessian of the whole weight"
    laws = ("7",)

    def hessian(self, x, weight, mask, bias, g):
        return super().hessian(x, weight, mask | True, bias, g)


class HessianWithoutItsMixedPart(Mutant):
    """The compiled Hessian is 0 throughout, as each block by x or by weight twice is."""

    name = "hessian without its mixed part"
    laws = ("7",)

    def hessian(self, *arrays):
        return [0 * array for array in super().hessian(*arrays)]
