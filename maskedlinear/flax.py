"""The masked linear layer for Flax: for nnx in two forms, for linen ``MaskedDense``. Needs the extra ``flax``."""

from maskedlinear._extras import missing_framework

try:
    from maskedlinear_jax.flax import (
        Connections,
        Mask,
        MaskedDense,
        MaskedLinear,
        ScheduledPruning,
        ScheduledRegrowth,
        SparseLinear,
        compress,
        expand,
        growth_gradients,
        lottery_rounds,
        mask_model,
        masks_of,
        param_masks,
        prune_model,
        regrow_model,
        report,
        rewind_model,
        set_masks,
        set_param_masks,
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
    "ScheduledPruning",
    "ScheduledRegrowth",
    "SparseLinear",
    "compress",
    "expand",
    "growth_gradients",
    "lottery_rounds",
    "mask_model",
    "masks_of",
    "param_masks",
    "prune_model",
    "regrow_model",
    "report",
    "rewind_model",
    "set_masks",
    "set_param_masks",
    "shrink",
    "unmask_model",
]
