"""``MaskedDense`` for linen: a drop-in ``nn.Dense`` with the collections ``masks`` and ``dormant`` of its own."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from jax import Array, lax

from maskedlinear.spec import check_shapes
from maskedlinear_jax._functional import as_array, boolean_mask
from maskedlinear_jax.flax._kernel import KERNEL, PARAMETER, apply_kernel, live_scale, masked_kernel
from maskedlinear_jax.flax._nnx import check_options

__all__ = ["MaskedDense"]


class MaskedDense(nn.Dense):
    """A dense layer whose connections are chosen by a mask: ``y = x · where(mask, kernel, 0) + bias``.

    The kernel is in ``params``, and 0 where the mask is off, so that whatever reads it has the weights that act. The mask is
    in the collection ``masks``, and what masked connections were in ``dormant``: optimizers see neither, checkpoints both.
    Pass ``params`` and ``masks`` to ``apply``. :func:`maskedlinear.flax.set_masks` changes masks and moves weights; another
    array put into ``masks`` by hand only selects. A new mask needs no new compilation.

    Attributes:
        features: the number of outputs.
        mask: the mask that ``init`` puts into the collection: booleans or 0s and 1s of the kernel's shape
            ``(in, features)``, or a function of that shape that returns one. ``None`` is the full mask.
        init_fan_in: after ``kernel_init``, multiply each output's weights by √(in / live inputs), ``"live"``, or leave
            them as drawn, ``"full"``. The same without a mask. Source: U. Evci et al., "Gradient Flow in Sparse Neural
            Networks and How Lottery Tickets Win", AAAI 2022, section 3.
        forward_mode: see :func:`maskedlinear.jax.masked_linear`.
        keep_dormant: whether ``init`` makes the collection ``dormant``. Without it, as where a transform of linen leaves it
            out, a connection that comes back starts at 0.

    The others are those of ``nn.Dense``: ``use_bias``, ``dtype``, ``param_dtype``, ``precision``, ``kernel_init``,
    ``bias_init``, ``promote_dtype``, ``dot_general``, ``dot_general_cls``.

    Shapes:
        inputs ``(..., in)``; output ``(..., features)``.

    Raises:
        ValueError: if the mask has another shape or holds anything but 0 and 1, if ``masks`` is not passed to
            ``apply``, or if ``init_fan_in`` is neither choice.
        TypeError: if ``param_dtype`` is not real floating-point.
    """

    mask: Any = None
    init_fan_in: Literal["live", "full"] = "live"
    forward_mode: bool = False
    keep_dormant: bool = True

    @nn.compact
    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """Apply the layer: shape ``(..., in)`` to ``(..., features)``; ``out_sharding`` as in ``masked_linear``."""
        check_options(self.init_fan_in, self.param_dtype)
        inputs = as_array("inputs", inputs)
        if self.has_variable("params", "kernel"):
            check_shapes(inputs.shape, meta.unbox(self.get_variable("params", "kernel")).shape[::-1])
        elif inputs.ndim == 0:
            raise ValueError("inputs must have shape (..., in); got a scalar: reshape it to (1,)")
        shape = (inputs.shape[-1], self.features)
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
            dot_options={} if out_sharding is None else {"out_sharding": out_sharding},
        )

    def _product(self) -> Any:
        if self.dot_general_cls is not None:
            return self.dot_general_cls()
        return lax.dot_general if self.dot_general is None else self.dot_general

    def _initial_mask(self, shape: tuple[int, int]) -> Any:
        if self.mask is None:
            mask = jnp.ones(shape, bool)
        else:
            given = self.mask(shape) if callable(self.mask) else self.mask
            mask = jnp.array(boolean_mask(given, shape, PARAMETER, KERNEL))
        boxed = jax.eval_shape(lambda: self._drawn_kernel(jax.random.key(0), shape, self.param_dtype))
        return jax.tree.map(lambda _: mask, boxed)  # partitioned as the kernel is

    def _initial_kernel(self, key: Array, shape: tuple[int, int], dtype: Any, mask: Array) -> Any:
        kernel = self._drawn_kernel(key, shape, dtype)  # boxed, if it is partitioned
        if self.mask is not None and self.init_fan_in == "live":
            kernel = jax.tree.map(lambda drawn: drawn * live_scale(mask, dtype), kernel)
        if self.keep_dormant and self.is_mutable_collection("dormant"):
            dormant = jax.tree.map(lambda drawn: masked_kernel(drawn, ~mask), kernel)
            self.variable("dormant", "dormant", lambda: dormant)
        return kernel if self.mask is None else jax.tree.map(lambda drawn: masked_kernel(drawn, mask), kernel)

    def _drawn_kernel(self, key: Array, shape: tuple[int, int], dtype: Any) -> Any:
        if 0 in shape and self.kernel_init is nn.linear.default_kernel_init:  # it divides by the size
            return jnp.zeros(shape, dtype)
        return self.kernel_init(key, shape, dtype)
