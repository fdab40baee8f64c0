"""``MaskedDense`` for linen: a drop-in ``nn.Dense`` whose mask lives in a collection of its own, ``masks``."""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from maskedlinear_jax._functional import boolean_mask
from maskedlinear_jax.flax._kernel import PARAMETER, apply_kernel, live_scale
from maskedlinear_jax.flax._nnx import check_options

__all__ = ["MaskedDense"]


class MaskedDense(nn.Dense):
    """A dense layer whose connections are chosen by a mask: ``y = x · where(mask, kernel, 0) + bias``.

    The whole kernel is kept, in ``params``; the mask is in the collection ``masks``, which optimizers never see and
    checkpoints do. Pass both to ``apply``. A new mask is a new value in that collection, and needs no new compilation.

    Attributes:
        features: the number of outputs.
        mask: the mask that ``init`` puts into the collection: booleans or 0s and 1s of the kernel's shape
            ``(in, features)``, or a function of that shape that returns one. ``None`` is the full mask.
        fan_in: after ``kernel_init``, multiply each output's weights by √(in / live inputs), ``"live"``, or leave them
            as drawn, ``"full"``. The same without a mask. Source: U. Evci et al., "Gradient Flow in Sparse Neural
            Networks and How Lottery Tickets Win", AAAI 2022, section 3.
        forward_mode: see :func:`maskedlinear.jax.masked_linear`.

    The others are those of ``nn.Dense``: ``use_bias``, ``dtype``, ``param_dtype``, ``precision``, ``kernel_init``,
    ``bias_init``, ``promote_dtype``, ``dot_general``, ``dot_general_cls``.

    Shapes:
        inputs ``(..., in)``; output ``(..., features)``.

    Raises:
        ValueError: if the mask has another shape or holds anything but 0 and 1, if ``masks`` is not passed to
            ``apply``, or if ``fan_in`` is neither choice.
        TypeError: if ``param_dtype`` is not real floating-point.
    """

    mask: Any = None
    fan_in: Literal["live", "full"] = "live"
    forward_mode: bool = False

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """Apply the layer: shape ``(..., in)`` to ``(..., features)``."""
        check_options(self.fan_in, self.param_dtype)
        shape = (jnp.shape(inputs)[-1], self.features)
        if not self.is_initializing() and not self.has_variable("masks", "mask"):
            raise ValueError(
                "MaskedDense needs its mask: pass the collection 'masks' that init returned along with 'params', as in "
                "model.apply({'params': params, 'masks': masks}, x)"
            )
        mask = boolean_mask(self.variable("masks", "mask", self._initial_mask, shape).value, shape, PARAMETER)
        kernel = self.param("kernel", self._initial_kernel, shape, self.param_dtype, mask)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        promoted: Any = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        x, kernel, bias = promoted
        return apply_kernel(
            x,
            kernel,
            mask,
            bias,
            precision=self.precision,
            forward_mode=self.forward_mode,
            dot_general=self._product(),
            dot_options={},
        )

    def _product(self) -> Any:
        if self.dot_general_cls is not None:
            return self.dot_general_cls()
        return lax.dot_general if self.dot_general is None else self.dot_general

    def _initial_mask(self, shape: tuple[int, int]) -> Array:
        if self.mask is None:
            return jnp.ones(shape, bool)
        given = self.mask(shape) if callable(self.mask) else self.mask
        return jnp.array(boolean_mask(given, shape, PARAMETER))

    def _initial_kernel(self, key: Array, shape: tuple[int, int], dtype: Any, mask: Array) -> Array:
        kernel: Array = self.kernel_init(key, shape, dtype)
        if self.mask is None or self.fan_in == "full":
            return kernel
        return kernel * live_scale(mask, dtype)
