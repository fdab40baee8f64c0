"""The masked linear layer for PyTorch. Needs the extra ``torch``."""

from maskedlinear._extras import missing_framework

try:
    from maskedlinear_torch import (
        MaskedLinear,
        SparseLinear,
        compress,
        expand,
        freeze_masked,
        masked_linear,
        sparse_linear,
    )
except ModuleNotFoundError as error:
    raise missing_framework(error, "maskedlinear.torch", "torch", "torch") from error

__all__ = ["MaskedLinear", "SparseLinear", "compress", "expand", "freeze_masked", "masked_linear", "sparse_linear"]
