"""``check_masks`` of a model that is cut over processes: each looks at its own parts, and what one finds all report.

FSDP2 puts gathered copies in the places of parameters for a call, and knows of gradients by ``backward`` alone; a model
that it has cut cannot be copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maskedlinear_torch._compat import gradient_hooks
from maskedlinear_torch._dtensors import full_tensor, local_part, on_parts
from maskedlinear_torch._fsdp import type_of
from maskedlinear_torch._layer import MaskedLinear
from maskedlinear_torch._masked_weight import MaskedWeight
from maskedlinear_torch._ranks import Ranks
from maskedlinear_torch._storage import GradientMask, bits_of

__all__ = ["Together", "accumulated", "as_plain"]


class Together(NamedTuple):
    """The processes that check one model; each asks as often as the others.

    Attributes:
        ranks: those that it is cut over; ``None`` for one alone.
        is_cut: whether weights are cut.
    """

    ranks: Ranks | None
    is_cut: bool

    def say(self, own: str) -> str:
        """Return what the first process says that has anything to say."""
        every = {0: own} if self.ranks is None else self.ranks.gather(own)
        return next(filter(None, every.values()), "")

    def largest(self, own: dict[Any, float]) -> dict[Any, float]:
        """Return the largest of the numbers that processes have, by name."""
        found: dict[Any, float] = {}
        for numbers in [own] if self.ranks is None else self.ranks.gather(own).values():
            for key, number in numbers.items():
                found[key] = max(number, found.get(key, 0.0))
        return found

    def report(self, what: str, hidden: Mapping[str, Tensor], failures: dict[str, list[str]]) -> None:
        """Write down of which layers something under the mask is not +0: in how many places, and up to what."""
        own = {name: _largest(local_part(tensor)) for name, tensor in hidden.items()}
        largest = self.largest(own)
        for name, tensor in hidden.items():
            marks = on_parts(lambda part: (bits_of(part.contiguous()) != 0).long(), tensor)
            count = int(full_tensor(marks.sum()))
            if count:
                failures[name].append(f"{what} is not +0 in {count} masked places, but up to {largest[name]:.3g}")


def _largest(part: Tensor) -> float:
    """Return the largest absolute value, NaN before all others."""
    if part.isnan().any():
        return float("nan")
    return float(part.abs().max()) if part.numel() else 0.0


def accumulated(outputs: list[Tensor], parameters: Mapping[str, Tensor], g: list[Tensor]) -> list[Tensor | None]:
    """Return gradients as ``backward`` leaves them, and put back what was there.

    Raises:
        ValueError: if a parameter has hooks, as of an optimizer that steps in the backward pass.
    """
    for name, parameter in parameters.items():
        if any(not isinstance(getattr(hook, "__self__", hook), GradientMask) for hook in gradient_hooks(parameter)):
            raise ValueError(
                f"check_masks of a model that is cut over processes runs its backward pass; got a parameter with hooks of "
                f"others, {name}, which would take it for a training step: check it before they are registered"
            )
    before = [parameter.grad for parameter in parameters.values()]
    try:
        for parameter in parameters.values():
            parameter.grad = None
        torch.autograd.backward(outputs, g)
        return [parameter.grad for parameter in parameters.values()]
    finally:
        for parameter, gradient in zip(parameters.values(), before, strict=True):
            parameter.grad = gradient


@contextmanager
def as_plain(layers: Mapping[str, MaskedWeight]) -> Iterator[None]:
    """Have masked linear layers compute what ``nn.Linear`` does with their weight as anyone reads it."""
    ours = [layer for layer in layers.values() if _is_plain_but_for_mask(layer)]
    try:
        for layer in ours:
            vars(layer)["forward"] = nn.Linear.forward.__get__(layer)
        yield
    finally:
        for layer in ours:
            del vars(layer)["forward"]


def _is_plain_but_for_mask(layer: MaskedWeight) -> bool:
    return type_of(layer) is MaskedLinear and "weight" in layer._parameters and "forward" not in vars(layer)
