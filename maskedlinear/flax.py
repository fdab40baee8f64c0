"""The masked linear layer for Flax: ``MaskedLinear`` for nnx, ``MaskedDense`` for linen. Needs the extra ``flax``."""

from maskedlinear._extras import missing_framework

try:
    from maskedlinear_jax.flax import Mask, MaskedDense, MaskedLinear, param_masks
except ModuleNotFoundError as error:
    raise missing_framework(error, "maskedlinear.flax", "flax", "jax", "jaxlib", "optax", "flax") from error

__all__ = ["Mask", "MaskedDense", "MaskedLinear", "param_masks"]
