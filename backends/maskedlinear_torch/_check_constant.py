"""Whether the outputs of a model depend on its inputs at all, as ``check_masks`` asks: pruning may cut every path."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from maskedlinear_torch._check_masks_cut import Together
from maskedlinear_torch._dtensors import local_part

__all__ = ["is_constant"]

_OTHER_INPUTS = 4  # that are tried before outputs count as constant


def is_constant(
    run: Callable[[tuple[Any, ...], dict[str, Any]], Mapping[Any, Tensor]],
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
    together: Together,
) -> bool:
    """Whether other inputs change no bit of what a model returns, on any process, as far as can be told.

    Inputs of floats get others; where there are none, the entries of the first tensor of whole numbers change places.

    Args:
        run: calls the model with inputs and kwargs, in evaluation mode; returns its outputs by name.
        inputs: what ``check_masks`` was given.
        kwargs: the same by name.
        together: the processes that ask; each goes on for as long as the others do.
    """

    def outputs(inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        found = [local_part(tensor) for tensor in run(inputs, kwargs).values()]
        return [tensor for tensor in found if tensor.is_floating_point() or tensor.is_complex()]

    expected = outputs(inputs, kwargs)
    given = {key: x for key, x in (*enumerate(inputs), *kwargs.items()) if isinstance(x, Tensor) and x.numel() > 0}
    floats = [key for key, x in given.items() if x.is_floating_point() or x.is_complex()]
    known = [tensor for tensor in expected if tensor.numel() > 0]
    if together.say("" if given and known and all(bool(tensor.isfinite().all()) for tensor in known) else "unknown"):
        return False
    told = False
    for seed in range(_OTHER_INPUTS):
        generator, others = torch.Generator().manual_seed(seed), dict(given)
        for key in floats:
            x = given[key].detach()
            others[key] = x + (torch.randn(x.shape, generator=generator).to(x) * 3**seed) * (1 + x.abs())
        for key in () if floats else list(given)[:1]:
            x = given[key]
            others[key] = x.flatten()[torch.randperm(x.numel(), generator=generator).to(x.device)].reshape(x.shape)
        if not together.say("" if all(torch.equal(others[key], given[key]) for key in given) else "other"):
            continue
        try:
            named = {name: others.get(name, value) for name, value in kwargs.items()}
            found = outputs(tuple(others.get(place, x) for place, x in enumerate(inputs)), named)
        except Exception:  # other inputs than a user's may be none for the model: nothing is known then
            return False
        if together.say("" if len(found) == len(expected) and all(map(torch.equal, found, expected)) else "differ"):
            return False
        told = True
    return told
