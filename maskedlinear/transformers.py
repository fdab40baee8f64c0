"""Masks in the training loop of Hugging Face's ``transformers``. Needs the extra ``transformers``."""

from maskedlinear._extras import missing_framework

try:
    from maskedlinear_torch.transformers import MaskedTraining
except ModuleNotFoundError as error:
    raise missing_framework(
        error, "maskedlinear.transformers", "transformers", "torch", "transformers", "accelerate"
    ) from error

__all__ = ["MaskedTraining"]
