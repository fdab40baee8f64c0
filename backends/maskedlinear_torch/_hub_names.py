"""What the arrays of a model are called in the files of Hugging Face's ``transformers``, and which entries are which: it
renames weights as it saves them, and takes them apart, of experts say, as they were before its own models changed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

try:
    from transformers.core_model_loading import revert_weight_conversion
except ImportError:  # before 5: names are those of the model

    def revert_weight_conversion(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a state as it is saved."""
        return state


__all__ = ["Block", "SavedNames"]

_LAYER = re.compile(r"^(?:.*?\.)?\d+(?=\.)")  # up to the first number: what is merged, is within a layer


@dataclass(frozen=True)
class Block:
    """Arrays of a model and those that are saved of them, which have the same entries in another order.

    Attributes:
        shapes: of the model's arrays, by name.
        saved: of each saved array by name, its entries' places in the model's arrays, flat, one behind the other.
    """

    shapes: Mapping[str, tuple[int, ...]]
    saved: Mapping[str, NDArray[np.int64]]

    def to_saved(self, array: Callable[[str], NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return saved arrays, of the model's, which ``array`` returns by name."""
        flat = np.concatenate([array(name).reshape(-1) for name in self.shapes])
        return {name: flat[places] for name, places in self.saved.items()}

    def to_model(self, array: Callable[[str], NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return the model's arrays, of the saved ones, which ``array`` returns by name."""
        parts = {name: array(name) for name in self.saved}
        ends = np.cumsum([math.prod(shape) for shape in self.shapes.values()])
        flat = np.zeros(ends[-1], np.result_type(*(part.dtype for part in parts.values())))
        for name, places in self.saved.items():
            flat[places] = parts[name]
        pieces = np.split(flat, ends[:-1])
        return {name: piece.reshape(shape) for piece, (name, shape) in zip(pieces, self.shapes.items(), strict=True)}


class SavedNames:
    """What a model's arrays are called where it is saved.

    Args:
        model: of transformers.
        shapes: of the arrays of the plain model's state, by name.

    Attributes:
        renamed: the saved name of each array that is saved as it is.
        converted: the names of saved arrays that are made of others.
    """

    def __init__(self, model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
        self._model = model
        arrays = {name: torch.empty(tuple(shape), device="meta") for name, shape in shapes.items()}
        names = {id(array): name for name, array in arrays.items()}
        saved = revert_weight_conversion(model, dict(arrays))
        self.renamed = {names[id(array)]: name for name, array in saved.items() if id(array) in names}
        self._shapes = {name: tuple(shape) for name, shape in shapes.items() if name not in self.renamed}
        self.converted = {name for name, array in saved.items() if id(array) not in names}
        self._groups = self._grouped(arrays) if self.converted else []

    def _grouped(self, arrays: Mapping[str, Tensor]) -> list[tuple[list[str], set[str]]]:
        """Return the names of arrays that are saved together, and as what: those of a layer, or all if that does not do."""
        layers: dict[str, list[str]] = {}
        for name in self._shapes:
            layers.setdefault(_layer(name), []).append(name)
        try:
            groups = [
                (names, set(revert_weight_conversion(self._model, {name: arrays[name] for name in names})))
                for names in layers.values()
            ]
        except Exception:  # on parts of what belongs together transformers fails in many ways
            groups = []
        whole = [name for _, names in groups for name in names]
        return groups if sorted(whole) == sorted(self.converted) else [(list(self._shapes), self.converted)]

    def blocks(self, *, model: Collection[str] = (), saved: Collection[str] = ()) -> Iterator[Block]:
        """Yield what is saved otherwise than as it is, as far as it has to do with these arrays, of the model or saved.

        Raises:
            ValueError: if entries are not saved one by one.
        """
        for names, saved_names in self._groups:
            if not saved_names.isdisjoint(saved) or not set(names).isdisjoint(model):
                yield self._block(names)

    def _block(self, names: list[str]) -> Block:
        shapes = {name: self._shapes[name] for name in names}
        places, end = {}, 0
        for name, shape in shapes.items():
            size = math.prod(shape)
            places[name] = torch.arange(end, end + size).view(shape)
            end += size
        saved = {name: array.numpy() for name, array in revert_weight_conversion(self._model, places).items()}
        found = np.bincount(np.concatenate([array.reshape(-1) for array in saved.values()]), minlength=end)
        if len(found) != end or (found != 1).any():
            raise ValueError(f"entries of {', '.join(names)} are not saved one by one: call unmask_model before")
        return Block(shapes, saved)


def _layer(name: str) -> str:
    found = _LAYER.match(name)
    return found.group() if found else ""
