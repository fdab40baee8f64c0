"""The masked linear layer for PyTorch. Needs the extra ``torch``."""

from maskedlinear._extras import missing_framework

try:
    from maskedlinear_torch import (
        MaskedLinear,
        ScheduledPruning,
        ScheduledRegrowth,
        SparseLinear,
        check_masks,
        compress,
        dense_gradients,
        expand,
        freeze_masked,
        get_masks,
        import_masks,
        lottery_rounds,
        mask_model,
        masked_linear,
        onnx_translations,
        operator_decompositions,
        prune_model,
        register_axes,
        regrow_model,
        rewind_model,
        set_masks,
        shrink,
        sparse_linear,
        summary,
        unmask_model,
    )
except ModuleNotFoundError as error:
    raise missing_framework(error, "maskedlinear.torch", "torch", "torch") from error

__all__ = [
    "MaskedLinear",
    "ScheduledPruning",
    "ScheduledRegrowth",
    "SparseLinear",
    "check_masks",
    "compress",
    "dense_gradients",
    "expand",
    "freeze_masked",
    "get_masks",
    "import_masks",
    "lottery_rounds",
    "mask_model",
    "masked_linear",
    "onnx_translations",
    "operator_decompositions",
    "prune_model",
    "register_axes",
    "regrow_model",
    "rewind_model",
    "set_masks",
    "shrink",
    "sparse_linear",
    "summary",
    "unmask_model",
]
