"""Masks in the training loop of Lightning. Needs the extra ``lightning``."""

from maskedlinear._extras import missing_framework

try:
    from maskedlinear_torch.lightning import MaskedTraining
except ModuleNotFoundError as error:
    raise missing_framework(
        error, "maskedlinear.lightning", "lightning", "torch", "lightning", "pytorch_lightning"
    ) from error

__all__ = ["MaskedTraining"]
