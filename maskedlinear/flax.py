"""The masked linear layer for Flax: for nnx in two forms, for linen ``MaskedDense``. Needs the extra ``flax``."""

from maskedlinear._extras import missing_framework

try:
    from maskedlinear_jax.flax import (
        Connections,
        Mask,
        MaskedDense,
        MaskedLinear,
        SparseLinear,
        compress,
        expand,
        growth_gradients,
        mask_model,
        masks_of,
        param_masks,
        prune_model,
        regrow_model,
        report,
        set_masks,
        shrink,
        unmask_model,
    )
except ModuleNotFoundError as error:
    raise missing_framework(error, "maskedlinear.flax", "flax", "jax", "jaxlib", "optax", "flax") from error

__all__ = [
    "Connections",
    "Mask",
    "MaskedDense",
    "MaskedLinear",
    "SparseLinear",
    "compress",
    "expand",
    "growth_gradients",
    "mask_model",
    "masks_of",
    "param_masks",
    "prune_model",
    "regrow_model",
    "report",
    "set_masks",
    "shrink",
    "unmask_model",
]
