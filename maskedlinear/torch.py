"""The masked linear layer for PyTorch. Needs the extra ``torch``."""

from maskedlinear._extras import missing_framework

try:
    from maskedlinear_torch import (
        MaskedLinear,
        ScheduledPruning,
        ScheduledRegrowth,
        SparseLinear,
        compress,
        expand,
        freeze_masked,
        lottery_rounds,
        mask_model,
        masked_linear,
        masks_of,
        prune_model,
        record_growth,
        regrow_model,
        report,
        rewind_model,
        set_masks,
        shrink,
        sparse_linear,
        unmask_model,
    )
except ModuleNotFoundError as error:
    raise missing_framework(error, "maskedlinear.torch", "torch", "torch") from error

__all__ = [
    "MaskedLinear",
    "ScheduledPruning",
    "ScheduledRegrowth",
    "SparseLinear",
    "compress",
    "expand",
    "freeze_masked",
    "lottery_rounds",
    "mask_model",
    "masked_linear",
    "masks_of",
    "prune_model",
    "record_growth",
    "regrow_model",
    "report",
    "rewind_model",
    "set_masks",
    "shrink",
    "sparse_linear",
    "unmask_model",
]
