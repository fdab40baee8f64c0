"""``save_pretrained`` and ``from_pretrained`` of Hugging Face's ``transformers`` keep masks.

A folder has weights that anyone loads, +0 under their masks, and beside them ``masks.safetensors``, the masks alone.
``config.json`` names it in ``quantization_config``, by which transformers finds, in its registry of quantizers, who puts
the masks on a model that has been loaded. No hook of transformers is told in which folder a model is saved: so
``PreTrainedModel.save_pretrained`` is wrapped. Once a model is there it is an ordinary one: nothing of it says that it is
quantized, so that it trains, moves and takes adapters as any other.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import PreTrainedModel, Trainer
from transformers.quantizers import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from maskedlinear.checkpoint._file import MASKS_BESIDE
from maskedlinear.checkpoint._foreign_masks import MASKS_FILE
from maskedlinear.models import first_names
from maskedlinear_torch._hub_card import update_card, write_card
from maskedlinear_torch._hub_file import digest_of, read_masks, write_masks
from maskedlinear_torch._hub_masks import (
    Mask,
    as_in_model,
    as_saved,
    has_masks,
    masks_and_plain_state,
    own_keys,
    put_on,
    unmasked_skeleton,
)
from maskedlinear_torch._import_masks import warn_of_foreign_masks

try:
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
except ImportError as error:
    raise ImportError(
        f"maskedlinear.transformers needs transformers >= 4.50, which keeps a registry of what models are loaded with; "
        f"found {transformers.__version__}: pip install -U transformers"
    ) from error

__all__ = ["MasksConfig", "MasksLoader", "install"]

METHOD = "maskedlinear"
_VERSION = 1

_in_training: ContextVar[bool] = ContextVar("maskedlinear_in_training", default=False)
_pushed: ContextVar[Any] = ContextVar("maskedlinear_pushed", default=None)  # the masked model that goes to the Hub


class MasksConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What ``config.json`` says of a model's masks, under ``quantization_config``.

    Args:
        version: of what a folder with masks has.
        quant_method: ``"maskedlinear"``.

    Raises:
        ValueError: if this is of a later version.
    """

    def __init__(self, version: int = _VERSION, quant_method: str = METHOD, **_: Any) -> None:
        if version != _VERSION:
            raise ValueError(
                f"config.json has masks in version {version}; this reads version {_VERSION}: update maskedlinear"
            )
        self.quant_method, self.version = quant_method, version

    def get(self, name: str, default: Any = None) -> Any:
        """Return what is said under a name, as a dictionary does: a model's config is asked so when it is used again."""
        return getattr(self, name, default)


class MasksLoader(HfQuantizer):  # type: ignore[misc]
    """Puts masks on a model that ``from_pretrained`` has loaded; in transformers' terms a quantizer."""

    requires_calibration = False
    _masks: dict[str, Mask]
    _ignored: Any = None  # what the model itself has of keys that are not its own

    def is_serializable(self, safe_serialization: Any = None) -> bool:
        """Whether a model with masks can be saved: it can."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether a model with masks can be trained: it can."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether it can be trained whole, without adapters: it can."""
        return True

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_: Any) -> Any:
        """Read the masks, and see to it that the model is the plain one."""
        path = _find(model, checkpoint_files)
        self._masks = read_masks(path)
        for file in checkpoint_files or ():
            if str(file).endswith(".safetensors"):
                with safe_open(file, "pt") as weights:
                    digest = (weights.metadata() or {}).get(MASKS_BESIDE)
                if digest not in (None, digest_of(self._masks)):  # None: another has written it
                    raise ValueError(
                        f"{path} has masks of another save than the weights in {file}: save the model again, or delete "
                        '"quantization_config" from config.json to load it without masks'
                    )
        unmasked_skeleton(model)
        keys = {f"^{re.escape(key)}$" for key in own_keys(self._masks)}  # which checkpoints of a Trainer have
        ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), *keys]
        self._ignored = vars(model).get("_keys_to_ignore_on_load_unexpected")
        model._keys_to_ignore_on_load_unexpected = (
            ignored if int(transformers.__version__.partition(".")[0]) < 5 else set(ignored)
        )
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        masks, others = as_in_model(model, self._masks, model.base_model_prefix)
        if others:
            warnings.warn(
                f"masks of {len(others)} weights are left out, since the model has no weights of these names and shapes: "
                f"{first_names(others)}",
                stacklevel=2,
            )
        put_on(model, masks)
        return model

    def postprocess_model(self, model: Any, **options: Any) -> Any:
        """Put the masks on; from then on the model is an ordinary one."""
        del model._keys_to_ignore_on_load_unexpected
        if self._ignored is not None:
            model._keys_to_ignore_on_load_unexpected = self._ignored
        self._process_model_after_weight_loading(model, **options)
        for name in ("hf_quantizer", "quantization_method"):
            vars(model).pop(name, None)
        model.is_quantized = False
        model.config.quantization_config = self.quantization_config  # for a load with this config
        return model


class _MasksSaver(MasksLoader):
    """What a model has as its quantizer while it is saved: by then transformers has noted which files were in the folder,
    and uploads those that are written from now on."""

    def __init__(self, model: Any, state: Any, folder: Path, *, dormant: bool, names_of_files: bool) -> None:
        training = _in_training.get()
        masks, self.state = masks_and_plain_state(model, state, dormant=dormant or training, whole=training)
        self._masks = as_saved(model, masks, self.state) if names_of_files else masks
        super().__init__(MasksConfig())
        self._model, self._folder, self._training = model, folder, training
        self._due = True

    def get_state_dict_and_metadata(self, model: Any, safe_serialization: Any = None) -> tuple[dict[str, Any], Any]:
        """Write what lies beside the weights, and return those."""
        self.write()
        return self.state, {MASKS_BESIDE: digest_of(self._masks)}

    def write(self) -> None:
        """Write masks and card, once."""
        if self._due:
            self._due = False
            self._folder.mkdir(parents=True, exist_ok=True)
            write_masks(self._masks, self._folder / MASKS_FILE)
            if not self._training:
                write_card(self._model, self._folder / "README.md")


def _find(model: Any, checkpoint_files: list[str] | None) -> Path:
    """Return where the masks of a model are that is being loaded, fetched from the Hub if need be.

    Raises:
        FileNotFoundError: if they are nowhere.
    """
    source = str(model.config.name_or_path)
    folder = Path(checkpoint_files[0]).parent if checkpoint_files else Path(source)
    if (folder / MASKS_FILE).is_file():
        return folder / MASKS_FILE
    cause: Exception | None = None
    if source and not Path(source).is_dir():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        # Where the weights are: <cache>/models--<owner>--<name>/snapshots/<commit>/<subfolder>
        found = re.search(r"(.*)[/\\]models--[^/\\]+[/\\]snapshots[/\\]([^/\\]+)[/\\]?(.*)", str(folder))
        cache, commit, subfolder = found.groups() if found else (None, None, None)
        try:
            return Path(
                hf_hub_download(source, MASKS_FILE, subfolder=subfolder or None, revision=commit, cache_dir=cache)
            )
        except EntryNotFoundError as error:
            cause = error
    raise FileNotFoundError(
        f"config.json says that there are masks, and there is no {MASKS_FILE} in {folder}: give from_pretrained the folder "
        'that save_pretrained wrote, or delete "quantization_config" from config.json to load the model without masks'
    ) from cause


def _is_ours(config: Any) -> bool:
    return isinstance(config, MasksConfig | dict) and config.get("quant_method") == METHOD


def _saving(original: Any) -> Any:
    """Return ``save_pretrained`` that keeps masks."""

    @functools.wraps(original)
    def save_pretrained(
        self: Any,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: Any = None,
        *arguments: Any,
        dormant: bool = False,
        **options: Any,
    ) -> Any:
        masked, only_adapters = has_masks(self), getattr(self, "_hf_peft_config_loaded", False)
        if not only_adapters and not _in_training.get():
            warn_of_foreign_masks(self, stacklevel=3)
        if not masked and _is_ours(getattr(self.config, "quantization_config", None)):
            del self.config.quantization_config
        if not masked or only_adapters or Path(save_directory).is_file():
            return original(self, save_directory, is_main_process, state_dict, *arguments, **options)
        if isinstance(getattr(self, "hf_quantizer", None), MasksLoader):  # which releases before 5 leave there
            del self.hf_quantizer
        if getattr(self, "hf_quantizer", None) is not None:
            raise ValueError(
                f"a folder has one quantization_config; got a model with masks that is quantized by "
                f"{self.hf_quantizer.quantization_config.quant_method}: call unmask_model before it is saved"
            )
        if options.get("distributed_checkpoint") and not _in_training.get():
            raise ValueError("a distributed checkpoint has no file of masks: save with distributed_checkpoint=False")
        saver = _MasksSaver(
            self,
            state_dict,
            Path(save_directory),
            dormant=dormant,
            names_of_files=options.get("save_original_format", True),
        )
        if not is_main_process:
            saver._due = False
        self.hf_quantizer = saver
        self.config.quantization_config = saver.quantization_config
        try:
            with _set(_pushed, self):
                result = original(self, save_directory, is_main_process, saver.state, *arguments, **options)
            saver.write()  # releases of transformers before 4.57 may not have asked for the state
            return result
        finally:
            del self.hf_quantizer

    save_pretrained._keeps_masks = True  # type: ignore[attr-defined]
    return save_pretrained


@contextmanager
def _set(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def _pushing(original: Any) -> Any:
    """Return ``push_to_hub`` during which it is known which model's card is written."""

    @functools.wraps(original)
    def push_to_hub(self: Any, *arguments: Any, **options: Any) -> Any:
        with _set(_pushed, self if has_masks(self) else None):
            return original(self, *arguments, **options)

    return push_to_hub


def _saving_card(original: Any) -> Any:
    """Return ``ModelCard.save`` that says of a masked model, which is on its way to the Hub, how sparse it is."""

    @functools.wraps(original)
    def save(self: Any, *arguments: Any, **options: Any) -> Any:
        if (model := _pushed.get()) is not None:
            update_card(model, self)
        return original(self, *arguments, **options)

    return save


def _train(original: Any) -> Any:
    """Return ``Trainer.train``, whose checkpoints have the whole state, for it to go on from."""

    @functools.wraps(original)
    def train(self: Any, *arguments: Any, **options: Any) -> Any:
        with _set(_in_training, True):
            return original(self, *arguments, **options)

    return train


def install() -> None:
    """Have transformers keep masks, from now on and once."""
    if getattr(PreTrainedModel.save_pretrained, "_keeps_masks", False):
        return
    register_quantization_config(METHOD)(MasksConfig)
    register_quantizer(METHOD)(MasksLoader)
    PreTrainedModel.save_pretrained = _saving(PreTrainedModel.save_pretrained)
    PreTrainedModel.push_to_hub = _pushing(PreTrainedModel.push_to_hub)
    # transformers makes a card of its own, and puts it into the folder last.
    ModelCard.save = _saving_card(ModelCard.save)  # type: ignore[method-assign]
    Trainer.train = _train(Trainer.train)
