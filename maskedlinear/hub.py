"""Models of one's own, with masked layers, on Hugging Face's Hub. Needs the extra ``torch``, and ``huggingface_hub``."""

from maskedlinear._extras import missing_framework

try:
    from maskedlinear_torch.hub import MaskedModelHubMixin, model_card
except ModuleNotFoundError as error:
    if error.name == "huggingface_hub":
        raise ModuleNotFoundError(
            "maskedlinear.hub needs huggingface_hub, which is not installed. Install it with: pip install huggingface_hub",
            name="huggingface_hub",
        ) from error
    raise missing_framework(error, "maskedlinear.hub", "torch", "torch") from error

__all__ = ["MaskedModelHubMixin", "model_card"]
