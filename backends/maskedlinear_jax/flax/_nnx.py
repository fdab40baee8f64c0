"""``MaskedLinear`` for nnx: a drop-in ``nnx.Linear`` whose mask is a Variable of its own type."""

from __future__ import annotations

from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from maskedlinear_jax._functional import as_array, boolean_mask
from maskedlinear_jax.flax._kernel import PARAMETER, Mask, apply_kernel, live_scale, mask_shape, masked_kernel

__all__ = ["MaskedLinear"]


class MaskedLinear(nnx.Linear):
    """A linear layer whose connections are chosen by a mask: ``y = x · where(mask, kernel, 0) + bias``.

    The whole kernel is kept. A masked connection takes no part in the forward or the backward pass, keeps its stored
    weight, and comes back when the mask brings it back. Optimizers move a weight whose gradient is zero (momentum,
    weight decay): guard them with :func:`maskedlinear.jax.freeze_masked`.

    Args:
        in_features: the size of the input's last dimension.
        out_features: the size of the output's last dimension.
        mask: shape ``(in_features, out_features)``, the kernel's: booleans or 0s and 1s. ``None`` is the full mask.
        init_fan_in: after ``kernel_init``, multiply each output's weights by √(in / live inputs), so that an
            initialiser that scales to the fan-in meets the ``"live"`` one; or leave them as drawn, ``"full"``. The same
            without a mask. Source: U. Evci et al., "Gradient Flow in Sparse Neural Networks and How Lottery Tickets
            Win", AAAI 2022, section 3.
        forward_mode: see :func:`maskedlinear.jax.masked_linear`.
        rngs: as in ``nnx.Linear``.
        **options: those of ``nnx.Linear``: ``use_bias``, ``dtype``, ``param_dtype``, ``precision``, ``kernel_init``,
            ``bias_init``, ``dot_general``, ``promote_dtype``, ``preferred_element_type``, ``kernel_metadata``,
            ``bias_metadata``. The kernel's sharding is the mask's too.

    Shapes:
        inputs ``(..., in_features)``; output ``(..., out_features)``.

    Raises:
        ValueError: if the mask has another shape or holds anything but 0 and 1, ``init_fan_in`` is neither choice, or a
            size is negative.
        TypeError: if ``param_dtype`` is not real floating-point, or a size no whole number.
    """

    mask: Mask

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        mask: Any = None,
        init_fan_in: Literal["live", "full"] = "live",
        forward_mode: bool = False,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        check_sizes(in_features, out_features)
        check_options(init_fan_in, options.get("param_dtype", jnp.float32))
        if 0 in (in_features, out_features):  # Flax's own initialiser divides by the size
            options.setdefault("kernel_init", nnx.initializers.zeros)
        super().__init__(in_features, out_features, rngs=rngs, **options)
        self.init_fan_in = init_fan_in
        self.forward_mode = forward_mode
        kernel = self.kernel[...]
        full = jnp.ones(kernel.shape, bool)
        chosen = full if mask is None else jnp.array(boolean_mask(mask, kernel.shape, PARAMETER))
        self.mask = Mask(chosen, **_sharding(self.kernel))
        if mask is not None and init_fan_in == "live":
            self.kernel[...] = kernel * live_scale(chosen, kernel.dtype)

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
        """Replace the layer's mask; it holds from the next call on, without a new compilation.

        No weight changes, so setting an old mask again brings the old outputs back, bit for bit.

        Args:
            mask: shape ``(in_features, out_features)``, booleans or 0s and 1s.

        Raises:
            ValueError: if the mask has another shape, or holds anything but 0 and 1; the layer is left as it was. Or if the
                layer is abstract.
        """
        old = _value(self.mask)
        new = jnp.array(boolean_mask(mask, mask_shape(_value(self.kernel), old), PARAMETER))
        if isinstance(old, jax.Array) and not isinstance(old, jax.core.Tracer) and not isinstance(new, jax.core.Tracer):
            new = jax.device_put(new, old.sharding)
        self.mask.set_value(new)

    @property
    def masked_kernel(self) -> Array:
        """``where(mask, kernel, 0)``, shape ``(in_features, out_features)``."""
        return masked_kernel(_value(self.kernel), self._checked_mask())

    @property
    def sparsity(self) -> float:
        """The fraction of masked connections, in [0, 1]; 0 for a layer without any weight."""
        mask = self._checked_mask()
        return (mask.size - int(mask.sum())) / mask.size if mask.size else 0.0

    @classmethod
    def from_linear(cls, linear: nnx.Linear, mask: Any = None) -> Self:
        """Return a masked layer with a copy of ``linear``'s parameters and its options.

        Args:
            linear: any ``nnx.Linear``, a stack of them (by ``nnx.vmap``) too. Of a ``MaskedLinear`` the mask is copied too,
                unless another is given.
            mask: the kernel's shape, ``(in, out)``, booleans or 0s and 1s; ``None`` is the full mask.

        Raises:
            ValueError: if the mask has another shape, or holds anything but 0 and 1. Or if ``linear`` is abstract.
            TypeError: if ``linear`` is not an ``nnx.Linear``.
        """
        if not isinstance(linear, nnx.Linear):
            raise TypeError(f"from_linear takes an nnx.Linear; got {type(linear).__name__}")
        kernel = _value(linear.kernel)
        layer = cls(linear.in_features, linear.out_features, rngs=nnx.Rngs(0), **_options(linear))
        _copy_parameters(linear, layer)
        if isinstance(linear, MaskedLinear):
            layer.init_fan_in, layer.forward_mode = linear.init_fan_in, linear.forward_mode
        if mask is not None:
            chosen = boolean_mask(mask, kernel.shape, PARAMETER)
        elif isinstance(linear, MaskedLinear):
            chosen = linear._checked_mask()
        else:
            chosen = jnp.ones(kernel.shape, bool)
        layer.mask = Mask(jnp.array(chosen), **_sharding(layer.kernel))
        return layer

    @classmethod
    def adopt(cls, linear: nnx.Linear, mask: Any = None) -> Self:
        """Turn an ``nnx.Linear`` into a masked layer: the same object, with the same parameters and options.

        Args:
            linear: an ``nnx.Linear``, no subclass.
            mask: the kernel's shape, ``(in, out)``, booleans or 0s and 1s; ``None`` is the full mask.

        Raises:
            ValueError: if the mask has another shape, or holds anything but 0 and 1; the layer is left as it was.
            TypeError: if ``linear`` is anything else.
        """
        if type(linear) is not nnx.Linear:
            raise TypeError(
                f"adopt takes a plain nnx.Linear; got {type(linear).__name__}: a copy is made by MaskedLinear.from_linear"
            )
        shape = _value(linear.kernel).shape
        chosen = jnp.ones(shape, bool) if mask is None else jnp.array(boolean_mask(mask, shape, PARAMETER))
        linear.__class__ = cls
        layer: Self = linear  # type: ignore[assignment]
        layer.init_fan_in, layer.forward_mode = "live", False
        layer.mask = Mask(chosen, **_sharding(layer.kernel))
        return layer

    def release(self) -> nnx.Linear:
        """Turn this layer into a plain ``nnx.Linear`` with the same outputs: the same object, whose masked weights become 0.

        Raises:
            TypeError: if this is a subclass.
        """
        if type(self) is not MaskedLinear:
            raise TypeError(
                f"release turns a plain MaskedLinear into an nnx.Linear; got {type(self).__name__}: to_linear makes a copy"
            )
        self.kernel[...] = self.masked_kernel
        for name in ("mask", "init_fan_in", "forward_mode"):
            delattr(self, name)
        linear: nnx.Linear = self
        linear.__class__ = nnx.Linear
        return linear

    def to_linear(self) -> nnx.Linear:
        """Return a plain ``nnx.Linear`` with the same outputs: a copy, whose masked weights are 0."""
        linear = nnx.Linear(self.in_features, self.out_features, rngs=nnx.Rngs(0), **_options(self))
        _copy_parameters(self, linear)
        linear.kernel[...] = self.masked_kernel
        return linear

    def _checked_mask(self) -> Array:
        """Return the mask; a state may have brought any."""
        mask = _value(self.mask)
        return boolean_mask(mask, mask_shape(_value(self.kernel), mask), PARAMETER)

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


def _value(variable: nnx.Variable[Array]) -> Array:
    """Return a Variable's array, or raise a ``ValueError`` if it has none."""
    value = variable.get_value()
    if isinstance(value, jax.ShapeDtypeStruct):
        raise ValueError(
            "this layer is abstract (made by nnx.eval_shape) and has no values: restore its state first, with nnx.update"
        )
    return value


def _sharding(kernel: nnx.Variable[Array]) -> dict[str, Any]:
    """Return the metadata of ``kernel`` that says how it is sharded."""
    return {name: value for name, value in kernel.get_metadata().items() if "sharding" in name or "mesh" in name}


def _options(linear: nnx.Linear) -> dict[str, Any]:
    """The options that ``linear`` was made with, as keyword arguments; the initialisers are not kept by Flax."""
    zeros = jax.nn.initializers.zeros  # the parameters are copied afterwards
    names = ("use_bias", "dtype", "param_dtype", "precision", "dot_general", "promote_dtype", "preferred_element_type")
    return {name: getattr(linear, name) for name in names} | {"kernel_init": zeros, "bias_init": zeros}


def _copy_parameters(source: nnx.Linear, target: nnx.Linear) -> None:
    for name in ("kernel", "bias"):
        variable = getattr(source, name)
        if variable is not None:
            copy = variable.copy()  # with its metadata, a sharding for one
            copy.set_value(jnp.array(_value(variable)))
            setattr(target, name, copy)
