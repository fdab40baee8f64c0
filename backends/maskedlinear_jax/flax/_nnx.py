"""``MaskedLinear`` for nnx: a drop-in ``nnx.Linear`` whose mask and dormant weights are Variables of types of their own."""

from __future__ import annotations

from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from maskedlinear_jax._functional import as_array, boolean_mask
from maskedlinear_jax._placement import full_like, to_like
from maskedlinear_jax.flax._constraint_variables import (
    Constraint,
    check_keeps_fixed,
    constraint_variables,
    hold_constraints,
    keep_own,
    trusted_by,
)
from maskedlinear_jax.flax._kernel import (
    KERNEL,
    PARAMETER,
    Dormant,
    Mask,
    apply_kernel,
    checked_mask,
    full_kernel,
    live_scale,
    mask_shape,
    masked_kernel,
    recipe_of,
    remember_recipe,
    set_variables,
    sharding_of,
    value_of,
)

__all__ = ["MaskedLinear", "check_options", "check_sizes", "linear_options"]


class MaskedLinear(nnx.Linear):
    """A linear layer whose connections are chosen by a mask: ``y = x · where(mask, kernel, 0) + bias``.

    ``kernel`` is 0 where the mask is off, so that whatever reads it has the weights that act. What a masked connection was
    lies in ``dormant``, a Variable that no optimizer sees, and comes back, bit for bit, when :meth:`set_mask` brings the
    connection back. A masked connection takes no part in the forward or the backward pass, whatever stands in the kernel.
    Optimizers move a weight whose gradient is zero (momentum, weight decay), which other readers of the kernel would see:
    guard them with :func:`maskedlinear.jax.freeze_masked`.

    A layer made by ``nnx.eval_shape`` without a mask acts with the full one as soon as it has a kernel.

    Args:
        in_features: the size of the input's last dimension.
        out_features: the size of the output's last dimension.
        mask: shape ``(in_features, out_features)``, the kernel's: booleans or 0s and 1s. ``None`` is the full mask.
        init_fan_in: after ``kernel_init``, multiply each output's weights by √(in / live inputs), so that an
            initialiser that scales to the fan-in meets the ``"live"`` one; or leave them as drawn, ``"full"``. The same
            without a mask. Source: U. Evci et al., "Gradient Flow in Sparse Neural Networks and How Lottery Tickets
            Win", AAAI 2022, section 3.
        forward_mode: see :func:`maskedlinear.jax.masked_linear`.
        keep_dormant: whether weights come back; otherwise there is no ``dormant``, and a connection that comes back starts
            at 0.
        rngs: as in ``nnx.Linear``.
        **options: those of ``nnx.Linear``: ``use_bias``, ``dtype``, ``param_dtype``, ``precision``, ``kernel_init``,
            ``bias_init``, ``dot_general``, ``promote_dtype``, ``preferred_element_type``, ``kernel_metadata``,
            ``bias_metadata``. The kernel's sharding is that of mask and dormant weights too.

    Shapes:
        inputs ``(..., in_features)``; output ``(..., out_features)``.

    Raises:
        ValueError: if the mask has another shape or holds anything but 0 and 1, ``init_fan_in`` is neither choice, or a
            size is negative.
        TypeError: if ``param_dtype`` is not real floating-point, or a size no whole number.
    """

    mask: Mask
    dormant: Dormant | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        mask: Any = None,
        init_fan_in: Literal["live", "full"] = "live",
        forward_mode: bool = False,
        keep_dormant: bool = True,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        check_sizes(in_features, out_features)
        check_options(init_fan_in, options.get("param_dtype", jnp.float32))
        if 0 in (in_features, out_features):  # Flax's own initialiser divides by the size
            options.setdefault("kernel_init", nnx.initializers.zeros)
        super().__init__(in_features, out_features, rngs=rngs, **options)
        given = mask
        if mask is not None:
            mask = jnp.array(boolean_mask(mask, self.kernel.shape, PARAMETER, KERNEL))
            if init_fan_in == "live":
                self.kernel[...] = self.kernel[...] * live_scale(mask, self.kernel.dtype)
        self._begin(mask, init_fan_in, forward_mode, keep_dormant)
        remember_recipe(self.mask, given)

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """Apply the layer: shape ``(..., in)`` to ``(..., out)``; ``out_sharding`` as in ``nnx.Linear``."""
        inputs = as_array("inputs", inputs)
        bias = None if self.bias is None else self.bias[...]
        mask = self._checked_mask()
        inputs, kernel, bias = self.promote_dtype((inputs, self.kernel[...], bias), dtype=self.dtype)
        options = {"out_sharding": out_sharding, "preferred_element_type": self.preferred_element_type}
        return apply_kernel(
            inputs,
            kernel,
            mask,
            bias,
            precision=self.precision,
            forward_mode=self.forward_mode,
            dot_general=self.dot_general,
            dot_options={name: value for name, value in options.items() if value is not None},
        )

    def set_mask(self, mask: Any) -> None:
        """Replace the layer's mask; it holds from the next call on, without a new compilation; inside ``jit`` too.

        Weights move between ``kernel`` and ``dormant`` bit for bit, so that setting an old mask again brings the old outputs
        back.

        Args:
            mask: shape ``(in_features, out_features)``, booleans or 0s and 1s.

        Raises:
            ValueError: if the mask has another shape, or holds anything but 0 and 1; the layer is left as it was. Or if the
                layer is abstract.
        """
        old = self.mask.get_value()
        new = jnp.array(boolean_mask(mask, mask_shape(value_of(self.kernel), old), PARAMETER, KERNEL))
        new = to_like(new, self.kernel.get_value() if new.shape == self.kernel.shape else old)
        new = check_keeps_fixed(self, "kernel", new)
        set_variables(self.kernel, self.mask, self.dormant, new)
        keep_own(self, "kernel", new, trusted_by(new, old))
        remember_recipe(self.mask, mask)

    @property
    def masked_kernel(self) -> Array:
        """``where(mask, kernel, 0)``, shape ``(in, out)``: the kernel, without what an optimizer has left in it."""
        return masked_kernel(value_of(self.kernel), self._checked_mask())

    @property
    def full_kernel(self) -> Array:
        """The live and the dormant weights together, shape ``(in, out)``."""
        dormant = None if self.dormant is None else value_of(self.dormant)
        return full_kernel(value_of(self.kernel), self._checked_mask(), dormant)

    @property
    def sparsity(self) -> float:
        """The fraction of masked connections, in [0, 1]; 0 for a layer without any weight."""
        mask = self._checked_mask()
        return (mask.size - int(mask.sum())) / mask.size if mask.size else 0.0

    @classmethod
    def from_linear(cls, linear: nnx.Linear, mask: Any = None, *, keep_dormant: bool | None = None) -> Self:
        """Return a masked layer with a copy of ``linear``'s parameters and its options.

        Args:
            linear: any ``nnx.Linear``, a stack of them (by ``nnx.vmap``) too. Of a ``MaskedLinear`` mask and dormant weights
                are copied too; another mask that is given brings weights back and makes others dormant.
            mask: the kernel's shape, ``(in, out)``, booleans or 0s and 1s; ``None`` is the full mask.
            keep_dormant: as in the class; ``None`` is as in ``linear``, if that is masked, else ``True``.

        Raises:
            ValueError: if the mask has another shape, or holds anything but 0 and 1. Or if ``linear`` is abstract.
            TypeError: if ``linear`` is not an ``nnx.Linear``.
        """
        if not isinstance(linear, nnx.Linear):
            raise TypeError(f"from_linear takes an nnx.Linear; got {type(linear).__name__}")
        shape = value_of(linear.kernel).shape
        chosen = None if mask is None else jnp.array(boolean_mask(mask, shape, PARAMETER, KERNEL))
        layer = cls(linear.in_features, linear.out_features, rngs=nnx.Rngs(0), **linear_options(linear))
        _copy_parameters(linear, layer)
        if isinstance(linear, MaskedLinear):
            layer.kernel.set_value(linear.full_kernel)
            chosen = jnp.array(linear._checked_mask()) if chosen is None else chosen
            keep_dormant = linear.dormant is not None if keep_dormant is None else keep_dormant
            layer._begin(chosen, linear.init_fan_in, linear.forward_mode, keep_dormant)
            own = constraint_variables(linear)
            hold_constraints(
                layer, "kernel", {kind: Constraint(jnp.array(one.get_value())) for kind, one in own.items()}
            )
            check_keeps_fixed(layer, "kernel", layer.mask.get_value())
            keep_own(layer, "kernel", layer.mask.get_value())
        else:
            layer._begin(chosen, "live", False, keep_dormant is not False)
        remember_recipe(
            layer.mask, recipe_of(linear.mask) if mask is None and isinstance(linear, MaskedLinear) else mask
        )
        return layer

    @classmethod
    def adopt(cls, linear: nnx.Linear, mask: Any = None, *, keep_dormant: bool = True) -> Self:
        """Turn an ``nnx.Linear`` into a masked layer: the same object, with the same parameters and options.

        Weights under the mask become dormant.

        Args:
            linear: an ``nnx.Linear``, no subclass.
            mask: the kernel's shape, ``(in, out)``, booleans or 0s and 1s; ``None`` is the full mask.
            keep_dormant: as in the class.

        Raises:
            ValueError: if the mask has another shape, or holds anything but 0 and 1; the layer is left as it was.
            TypeError: if ``linear`` is anything else.
        """
        if type(linear) is not nnx.Linear:
            raise TypeError(
                f"adopt takes a plain nnx.Linear; got {type(linear).__name__}: a copy is made by MaskedLinear.from_linear"
            )
        shape = value_of(linear.kernel).shape
        chosen = None if mask is None else jnp.array(boolean_mask(mask, shape, PARAMETER, KERNEL))
        linear.__class__ = cls
        layer: Self = linear  # type: ignore[assignment]
        layer._begin(chosen, "live", False, keep_dormant)
        remember_recipe(layer.mask, mask)
        return layer

    def release(self) -> nnx.Linear:
        """Turn this layer into a plain ``nnx.Linear`` with the same outputs: the same object; what is dormant is dropped.

        Raises:
            TypeError: if this is a subclass.
        """
        if type(self) is not MaskedLinear:
            raise TypeError(
                f"release turns a plain MaskedLinear into an nnx.Linear; got {type(self).__name__}: to_linear makes a copy"
            )
        self.kernel[...] = self.masked_kernel
        hold_constraints(self, "kernel", {})
        for name in ("mask", "dormant", "init_fan_in", "forward_mode", "_full_at_first"):
            delattr(self, name)
        linear: nnx.Linear = self
        linear.__class__ = nnx.Linear
        return linear

    def to_linear(self) -> nnx.Linear:
        """Return a plain ``nnx.Linear`` with the same outputs: a copy, without what is dormant."""
        linear = nnx.Linear(self.in_features, self.out_features, rngs=nnx.Rngs(0), **linear_options(self))
        _copy_parameters(self, linear)
        linear.kernel[...] = self.masked_kernel
        return linear

    def _begin(self, mask: Array | None, init_fan_in: Any, forward_mode: bool, keep_dormant: bool) -> None:
        """Mask a layer that has its kernel: ``mask`` is its own; of a stack of layers, too."""
        self.init_fan_in, self.forward_mode, self._full_at_first = init_fan_in, forward_mode, mask is None
        kernel, sharding = self.kernel.get_value(), sharding_of(self.kernel)
        mask = None if mask is None else to_like(mask, kernel)
        self.mask = Mask(full_like(kernel, True, bool) if mask is None else mask, **sharding)
        dormant = full_like(kernel, 0) if mask is None else masked_kernel(kernel, ~mask)
        self.dormant = Dormant(dormant, **sharding) if keep_dormant else None
        if mask is not None:
            self.kernel.set_value(masked_kernel(kernel, mask))

    def _own_mask(self) -> Any:
        """Return the mask as it is: a state may have brought any; a layer made by ``nnx.eval_shape`` has none to give."""
        mask = self.mask.get_value()
        abstract = isinstance(mask, jax.ShapeDtypeStruct)
        return jnp.ones(mask.shape, bool) if abstract and self._full_at_first else mask

    def _checked_mask(self) -> Array:
        """Return the mask, checked."""
        return checked_mask(value_of(self.kernel), self._own_mask())

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "mask" and "mask" in vars(self) and not isinstance(value, nnx.Variable):
            self.set_mask(value)
        else:
            super().__setattr__(name, value)


def check_sizes(in_features: Any, out_features: Any) -> None:
    """Check the sizes that the two nnx layers are made with.

    Raises:
        ValueError: if one is negative.
        TypeError: if one is no whole number.
    """
    for name, size in (("in_features", in_features), ("out_features", out_features)):
        if isinstance(size, bool) or not hasattr(size, "__index__"):
            raise TypeError(f"{name} must be a whole number; got {size!r}: round it yourself, with int()")
    if in_features < 0 or out_features < 0:
        raise ValueError(f"a layer's sizes must not be negative; got in={in_features}, out={out_features}")


def check_options(init_fan_in: str, param_dtype: Any) -> None:
    """Check the options that the nnx and the linen layer share."""
    if init_fan_in not in ("live", "full"):
        raise ValueError(f"init_fan_in must be 'live' or 'full'; got {init_fan_in!r}")
    if not jnp.issubdtype(param_dtype, jnp.floating):
        raise TypeError(
            f"param_dtype must be a real floating-point dtype, so that weights have a gradient; got {param_dtype}"
        )


def linear_options(linear: nnx.Linear) -> dict[str, Any]:
    """The options that ``linear`` was made with, as keyword arguments; the initialisers are not kept by Flax."""
    zeros = jax.nn.initializers.zeros  # the parameters are copied afterwards
    names = ("use_bias", "dtype", "param_dtype", "precision", "dot_general", "promote_dtype", "preferred_element_type")
    return {name: getattr(linear, name) for name in names} | {"kernel_init": zeros, "bias_init": zeros}


def _copy_parameters(source: nnx.Linear, target: nnx.Linear) -> None:
    for name in ("kernel", "bias"):
        variable = getattr(source, name)
        if variable is not None:
            copy = variable.copy()  # with its metadata, a sharding for one
            copy.set_value(jnp.array(value_of(variable)))
            setattr(target, name, copy)
