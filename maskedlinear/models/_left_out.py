"""Warnings of what a function for whole models leaves out, though its user would expect it to be masked or pruned."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

from maskedlinear.models._names import NO_WEIGHT, SHARED
from maskedlinear.models._summary import first_names

__all__ = ["warn_of_drift", "warn_of_left_out", "warn_of_lost", "warn_of_sparse"]


def warn_of_left_out(parameters: Iterable[tuple[str, str]], stacklevel: int = 4, by: str = "mask_model") -> None:
    """Warn of weights that a function for whole models leaves out.

    Args:
        parameters: names of parameters, and why each is left out, empty if it is not; what is no weight is left out quietly.
        stacklevel: as ``warnings.warn`` takes it; by default that of the caller's caller.
        by: what leaves them out.
    """
    groups: dict[str, list[str]] = {}
    for name, why in parameters:
        if why == SHARED or (why and why not in NO_WEIGHT):
            groups.setdefault(why, []).append(name)
    if groups:
        text = "; ".join(f"{first_names(names)} ({why})" for why, names in groups.items())
        warnings.warn(
            f"{by} left out {text}; summary(model) lists everything. What can be masked at all is masked if masks or "
            "include name it",
            stacklevel=stacklevel,
        )


def warn_of_lost(names: Sequence[str], stacklevel: int = 4) -> None:
    """Warn of weights without a mask in a model that was masked as a whole: their modules were added or replaced since."""
    if names:
        warnings.warn(
            f"{first_names(names)} have no mask and are left out, though the whole model was masked: were their modules "
            "added or replaced since, as by resize_token_embeddings? mask_model(model) masks them",
            stacklevel=stacklevel,
        )


def warn_of_sparse(names: Sequence[str], stacklevel: int = 4) -> None:
    """Warn of layers in the sparse form, which ``prune_model`` leaves out."""
    if names:
        warnings.warn(
            f"{first_names(names)} in the sparse form stay as they are: their connections do not count in the sparsity, and "
            "expand(model) makes layers of them that can be pruned; include=... says that others are meant",
            stacklevel=stacklevel,
        )


def warn_of_drift(names: Sequence[str], stacklevel: int = 4) -> None:
    """Warn of weights, of modules that know nothing of masks, that have moved under their masks."""
    if names:
        warnings.warn(
            f"{first_names(names)} moved under the mask, which acts until now: wrap the optimizer in freeze_masked, so that "
            "masked entries stay +0",
            stacklevel=stacklevel,
        )
