"""The names of a model's nodes in its checkpoint: wirings in the file's metadata, a key for each layer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from maskedlinear.checkpoint._container import LARGEST_HEADER
from maskedlinear.checkpoint._errors import CheckpointError
from maskedlinear.checkpoint._file import CheckpointFile

if TYPE_CHECKING:
    from maskedlinear.masks import Wiring

__all__ = ["as_texts", "wirings"]


def as_texts(model: Any, given: Mapping[str, Any] | None, framework: str) -> dict[str, str]:
    """Return wirings as a file keeps them, by the layers' names; each must be of a layer of the model, and fit it.

    Raises:
        TypeError: if they are no wirings by name, or the model has no layers.
        ValueError: if there is no such layer, it has other nodes, or they are too large for a header.
    """
    from maskedlinear.masks import Wiring
    from maskedlinear.masks._connections import find_weight
    from maskedlinear.masks._wiring_files import to_text

    texts: dict[str, str] = {}
    if given is None:
        return texts
    if not isinstance(given, Mapping) or not all(isinstance(wiring, Wiring) for wiring in given.values()):
        raise TypeError("wirings= has a maskedlinear.masks.Wiring for each of some layers, by name, as {'0': wiring}")
    if framework == "tree":
        raise TypeError(
            "wirings= are of a model's layers, and a tree of parameters has none: wiring.save writes a file"
        )
    for name, wiring in given.items():
        weight = find_weight(model, name)
        if weight is None and not any(key == name or not name or key.startswith(f"{name}.") for key in model):
            raise ValueError(f"wirings= are of layers, by name; there is no array of {name!r}")
        if weight is not None and weight.shape != wiring.pattern.shape:
            raise ValueError(
                f"the wiring of {name!r} must have the layer's shape (out, in) = {weight.shape}; got "
                f"{wiring.pattern.shape}: where nodes are gone, wiring.follow(layer) or restrict has what is left"
            )
        texts[name] = to_text(wiring)
    if sum(map(len, texts.values())) > LARGEST_HEADER // 2:
        raise ValueError(
            "these wirings are too large for the header of a file: write each to a file of its own, wiring.save"
        )
    return texts


def wirings(path: str | os.PathLike[str]) -> dict[str, Wiring]:
    """Return the wirings that a checkpoint was saved with, by the names of the layers; none if it has none.

    They say what the nodes of each layer are called, and which connections it was wired with; of a model that the file was
    loaded into, ``wirings(path)["0"].edges(model[0])`` are those that it has.

    Raises:
        CheckpointError: if the file is damaged, or of a later version.
        OSError: if it cannot be read.

    Example::

        checkpoint.save(model, "model.safetensors", wirings={"0": wiring})
        wiring = checkpoint.wirings("model.safetensors")["0"]
    """
    from maskedlinear.masks import Wiring
    from maskedlinear.masks._wiring_files import from_text

    with CheckpointFile(path) as file:
        found = {}
        for name, text in file.wiring_texts.items():
            try:
                found[name] = from_text(Wiring, text)
            except ValueError as error:
                raise CheckpointError(f"{os.fspath(path)}: the wiring of {name!r} cannot be read: {error}") from error
        return found
