"""Masks in Hugging Face's ``transformers``. Needs the extra ``transformers``.

Once this is imported, ``save_pretrained`` and ``from_pretrained`` keep masks, of both forms::

    import maskedlinear.transformers

    model.save_pretrained("folder")  # dormant=True keeps what is dormant too
    model = AutoModel.from_pretrained("folder")

``MaskedTraining`` is a callback for its ``Trainer``, whose checkpoints have the masks and what is dormant.
"""

from maskedlinear._extras import missing_framework

try:
    from maskedlinear_torch.transformers import MaskedTraining, model_card
except ModuleNotFoundError as error:
    raise missing_framework(
        error, "maskedlinear.transformers", "transformers", "torch", "transformers", "accelerate"
    ) from error

__all__ = ["MaskedTraining", "model_card"]
