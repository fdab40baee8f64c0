"""What is known of paths through a model that is a chain of linear layers: how many live connections lie on one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from maskedlinear.pruning._paths import count_live, effective_masks, is_cut

__all__ = ["ChainLayer", "known_chain", "number_effective", "warn_of_cut"]


class ChainLayer(NamedTuple):
    """A linear layer of a chain: its mask (out, in), all ones of one without, or its pattern; and whether it is masked."""

    mask: Any
    is_masked: bool


def known_chain(layers: Sequence[ChainLayer], masked: int) -> Sequence[ChainLayer] | None:
    """Return the layers if they follow each other, and are all of the model's masked weights, so many; or ``None``."""
    follow = all(one.mask.shape[0] == other.mask.shape[1] for one, other in pairwise(layers))
    return layers if layers and follow and masked == sum(layer.is_masked for layer in layers) else None


def number_effective(chain: Sequence[ChainLayer] | None) -> int | None:
    """Return how many live connections of a chain's masked layers lie on a path; ``None`` of no chain."""
    if chain is None:
        return None
    found = effective_masks([layer.mask for layer in chain])
    return sum(count_live(mask) for mask, layer in zip(found, chain, strict=True) if layer.is_masked)


def warn_of_cut(chain: Sequence[ChainLayer] | None, stacklevel: int = 3) -> None:
    """Warn where no live connection of a chain lies on a path from an input to an output."""
    if chain is not None and is_cut([layer.mask for layer in chain]):
        warnings.warn(
            "the masks cut the network: no live connection lies on a path from an input to an output, so that its outputs "
            "do not depend on its inputs; prune less, by scope='layer', or with keep_at_least={'row': 1}",
            stacklevel=stacklevel,
        )
