"""LoRA of Hugging Face's ``peft`` over masked and sparse weights. Needs the extra ``torch``, and ``peft``."""

from maskedlinear._extras import missing_framework

try:
    from maskedlinear_torch.peft import mask_adapters
except ModuleNotFoundError as error:
    if error.name == "peft":
        raise ModuleNotFoundError(
            "maskedlinear.peft needs peft, which is not installed. Install it with: pip install peft", name="peft"
        ) from error
    raise missing_framework(error, "maskedlinear.peft", "torch", "torch") from error

__all__ = ["mask_adapters"]
