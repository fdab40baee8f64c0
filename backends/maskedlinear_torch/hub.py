"""``MaskedModelHubMixin``: models of one's own, with masked layers, on the Hub. Users import it as ``maskedlinear.hub``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin, hf_hub_download
from torch import nn

from maskedlinear import checkpoint
from maskedlinear_torch._hub_card import card_section, model_card

__all__ = ["MaskedModelHubMixin", "model_card"]

_FILE = "model.safetensors"
_NOTE = (
    "`pip install maskedlinear` to load it: the file has live values and masks, which `maskedlinear.checkpoint` reads."
)


class MaskedModelHubMixin(PyTorchModelHubMixin):
    """``huggingface_hub.PyTorchModelHubMixin`` for models with masks::

        class Network(nn.Module, MaskedModelHubMixin):
            def __init__(self, width: int = 64) -> None:
                super().__init__()
                self.layer = nn.Linear(width, width)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.layer(x)

        model = mask_model(Network(width=32))
        prune_model(model, 0.9)
        model.save_pretrained("folder")  # or push_to_hub("name/network")
        model = Network.from_pretrained("folder")

    The folder's ``model.safetensors`` is what :func:`maskedlinear.checkpoint.save` writes, as small as the live values and
    the masks, without what is dormant; :func:`maskedlinear.checkpoint.load` reads it anywhere. ``from_pretrained`` gives
    the layers that the class makes the masks that they were saved with, and their form; files that were saved without
    masks load too. The card says how sparse the model is.
    """

    def _save_pretrained(self, save_directory: Path) -> None:
        checkpoint.save(_module(self), Path(save_directory) / _FILE)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        map_location: str | torch.device = "cpu",
        strict: bool = True,
        **options: Any,
    ) -> Self:
        """Make a model and load a file into it.

        Raises:
            CheckpointError: if the file is damaged, or does not fit the model.
            ValueError: if it is to be loaded where it does not fit.
        """
        if not strict:
            raise ValueError("masks are loaded into a model that the file fits; got strict=False: leave it out")
        path = Path(model_id) / _FILE
        if not Path(model_id).is_dir():
            path = Path(
                hf_hub_download(
                    model_id,
                    _FILE,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                )
            )
        model = cls(**options)
        module = checkpoint.load_into(_module(model), path)
        module.to(map_location).eval()
        return model

    def generate_model_card(self, *arguments: Any, **options: Any) -> ModelCard:
        """Return the card that ``save_pretrained`` writes if there is none, with a section on sparsity."""
        card = super().generate_model_card(*arguments, **options)
        card.text = f"{card.text.rstrip()}\n\n{card_section(_module(self), _NOTE)}\n"
        return card


def _module(model: Any) -> nn.Module:
    """Return the model that is a module.

    Raises:
        TypeError: if it is none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"MaskedModelHubMixin goes with a torch.nn.Module; got {type(model).__name__}: derive the class from both"
        )
    return model
