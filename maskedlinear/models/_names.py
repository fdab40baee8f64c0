"""What the name of a parameter says of it, where its module says nothing: why it is no weight, and what its axes mean."""

from __future__ import annotations

import re

from maskedlinear.models._axes import WeightAxes

__all__ = ["NO_WEIGHT", "SHARED", "UNKNOWN", "axes_by_name", "is_norm", "why_left_out"]

UNKNOWN = "of unknown axes"
SHARED = "shared with an embedding"
# Why a parameter is no weight; for any other reason it is one that cannot be masked.
NO_WEIGHT = (
    *("bias", "norm", "scale or vector", "embedding", "position or embedding", SHARED),
    *("adapter", "not of a floating dtype", "embedding with sparse gradients"),
)

_EMBEDDINGS = re.compile(r"pos|positions?|posemb\w*|tokens?|cls|embed\w*|emb")
_SCALES = ("scale", "gamma", "beta", "mean", "var", "count", "A_log")  # the last of state spaces
_ADAPTERS = (
    "lora_",
    "hada_",
    "lokr_",
    "oft_",
    "boft_",
    "ia3_",
    "hra_",
    "vblora_",
    "c3a_",
    "vera_",
    "randlora_",
)  # of PEFT
_KERNELS = re.compile(
    r"(kernel|weight|w)(_[a-z]+)?\d*"
)  # of three dimensions and more; Haiku's w, w_i and w_h among them


def why_left_out(name: str, ndim: int) -> str:
    """Return why a parameter is not masked unless it is asked for by name; empty if it is a matrix or a kernel.

    Args:
        name: its path, dots between.
        ndim: how many dimensions it has.
    """
    *modules, own = name.split(".")
    if "bias" in own:
        return "bias"
    if own in _SCALES:
        return "scale or vector"
    if any(map(_EMBEDDINGS.fullmatch, re.split(r"[^a-z]+", own.lower()))):
        return "position or embedding"
    if any(part.startswith(_ADAPTERS) for part in (*modules, own)):
        return "adapter"
    if ndim < 2:
        return "scale or vector"
    return "" if ndim == 2 or _KERNELS.fullmatch(own) else UNKNOWN


def is_norm(kind: type) -> bool:
    """Whether a module type is a normalisation, by its name: ``LayerNorm``, ``BatchNorm2d``, ``LlamaRMSNorm``."""
    return re.search(r"Norm(\d+d)?$", kind.__name__) is not None


def axes_by_name(name: str, ndim: int) -> WeightAxes | None:
    """Return what the axes of a parameter of a bare tree mean; ``None`` if its name does not say.

    A matrix called ``kernel`` is (in, out), as Flax keeps it, any other (out, in). Of Flax's kernels of more dimensions
    those of attention and of convolutions are known by their modules' names.

    Args:
        name: its path, dots between.
        ndim: how many dimensions it has.
    """
    *modules, own = name.split(".")
    kernel, module = own == "kernel", modules[-1].lower() if modules else ""
    # Of three dimensions, and not one more by a scan: what a stack looks like cannot be told from its name.
    attention = ndim == 3 and re.search("attention|attn", name.lower()) and "scan" not in name.lower()
    if ndim == 2:
        return WeightAxes(out_axis=1, in_axis=0) if kernel else WeightAxes()
    if kernel and attention and module in ("query", "key", "value"):
        return WeightAxes(out_axis=(1, 2), in_axis=0)
    if kernel and attention and module == "out":
        return WeightAxes(out_axis=2, in_axis=(0, 1))
    if (
        kernel and module.startswith("conv") and "scan" not in name.lower()
    ):  # channels before the window, as PyTorch has them
        return WeightAxes(out_axis=ndim - 1, in_axis=(ndim - 2, *range(ndim - 2)), window_axis=tuple(range(ndim - 2)))
    return None
