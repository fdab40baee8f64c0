"""Faults of results that are not there: ``None`` where there should be a gradient."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,attr-defined,no-any-return"

from maskedlinear_conformance.faults._reference_backend import Mutant
from maskedlinear_conformance.faults._reference_layer import ReferenceLayer


class NoSecondDerivativeOfX(Mutant):
    """The second derivatives of x, bias and g are left out, as where unused inputs are allowed."""

    name = "no second derivative of x"
    laws = ("1", "golden")

    def hvp(self, x, weight, mask, bias, g, dx, dweight, dbias, dg, mode):
        return None, super().hvp(x, weight, mask, bias, g, dx, dweight, dbias, dg, mode)[1], None, None


class NoGradientOfTheBias(Mutant):
    """The bias asks for a gradient and gets none."""

    name = "no gradient of the bias"
    laws = ("1",)

    def vjp(self, x, weight, mask, bias, g, wrt):
        found = super().vjp(x, weight, mask, bias, g, wrt)
        return [None if name == "bias" else part for name, part in zip(wrt, found, strict=True)]


class NoDerivativeOfTheExpression(Mutant):
    """The plain expression is not differentiated at all."""

    name = "no derivative of the expression"
    laws = ("2",)

    def autodiff_vjp(self, x, weight, mask, bias, g):
        return None, None, None


class CompiledCodeHasNoGradientOfX(Mutant):
    """Compiled code gives no gradient of x and of the bias."""

    name = "compiled code has no gradient of x"
    laws = ("7",)

    def compile(self, x, weight, mask, bias, g):
        found = self.both(x, weight, mask, bias, g)
        return [found[0], None, found[2], None]


class VmapHasNoGradientOfTheBias(Mutant):
    """Mapping gives no gradient of the bias."""

    name = "vmap has no gradient of the bias"
    laws = ("7",)

    def vmap(self, axes, x, weight, mask, bias, g):
        return (*super().vmap(axes, x, weight, mask, bias, g)[:3], None)


class AutocastHasNoGradientOfX(Mutant):
    """Under automatic casts neither x nor the bias has a gradient."""

    name = "autocast has no gradient of x"
    laws = ("9",)

    def dtypes(self, device):
        return ("float16",)

    def autocast(self, dtype, x, weight, mask, bias, g):
        found = super().autocast(dtype, x, weight, mask, bias, g)
        return [found[0], None, found[2], None]


class LayerHasNoGradientOfX(Mutant):
    """The layer gives no gradient of x."""

    name = "layer has no gradient of x"
    laws = ("1", "4", "11")

    def layer(self, weight, mask, bias):
        return _LayerHasNoGradientOfX(self, weight, mask, bias)


class _LayerHasNoGradientOfX(ReferenceLayer):
    def gradients(self, x, g):
        return (None, *super().gradients(x, g)[1:])
