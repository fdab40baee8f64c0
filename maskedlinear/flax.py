"""The masked linear layer for Flax: for nnx in two forms, for linen ``MaskedDense``. Needs the extra ``flax``."""

from maskedlinear._extras import missing_framework

try:
    from maskedlinear_jax.flax import (
        Mask,
        MaskedDense,
        MaskedLinear,
        PatternIndex,
        ScheduledPruning,
        ScheduledRegrowth,
        SparseLinear,
        compress,
        dense_gradients,
        expand,
        get_masks,
        lottery_rounds,
        mask_model,
        param_masks,
        prune_model,
        regrow_model,
        rewind_model,
        set_masks,
        set_param_masks,
        shrink,
        summary,
        unmask_model,
    )
except ModuleNotFoundError as error:
    raise missing_framework(error, "maskedlinear.flax", "flax", "jax", "jaxlib", "optax", "flax") from error

__all__ = [
    "Mask",
    "MaskedDense",
    "MaskedLinear",
    "PatternIndex",
    "ScheduledPruning",
    "ScheduledRegrowth",
    "SparseLinear",
    "compress",
    "dense_gradients",
    "expand",
    "get_masks",
    "lottery_rounds",
    "mask_model",
    "param_masks",
    "prune_model",
    "regrow_model",
    "rewind_model",
    "set_masks",
    "set_param_masks",
    "shrink",
    "summary",
    "unmask_model",
]
