"""The masked linear layer for Flax: for nnx in two forms, for linen ``MaskedDense``. Needs the extra ``flax``."""

from maskedlinear._extras import missing_framework

try:
    from maskedlinear_jax.flax import (
        Dormant,
        Mask,
        MaskedDense,
        MaskedLinear,
        PatternIndex,
        ScheduledPruning,
        ScheduledRegrowth,
        SparseLinear,
        check_masks,
        compress,
        dense_gradients,
        expand,
        get_masks,
        load_state,
        lottery_rounds,
        mask_model,
        param_masks,
        prune_model,
        register_axes,
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
    "Dormant",
    "Mask",
    "MaskedDense",
    "MaskedLinear",
    "PatternIndex",
    "ScheduledPruning",
    "ScheduledRegrowth",
    "SparseLinear",
    "check_masks",
    "compress",
    "dense_gradients",
    "expand",
    "get_masks",
    "load_state",
    "lottery_rounds",
    "mask_model",
    "param_masks",
    "prune_model",
    "register_axes",
    "regrow_model",
    "rewind_model",
    "set_masks",
    "set_param_masks",
    "shrink",
    "summary",
    "unmask_model",
]
