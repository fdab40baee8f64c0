"""How many connections each layer of a network gets, when the network gets so many."""

from __future__ import annotations

import math
from collections.abc import Sequence

from maskedlinear.masks._random import Sparsity, checked_fraction, integer

__all__ = ["erdos_renyi_num_zeros"]


def erdos_renyi_num_zeros(shapes: Sequence[Sequence[int]], sparsity: Sparsity) -> list[int]:
    """Return how many zeros each layer gets, so that all of them together have ``floor(sparsity * size)``.

    A layer's live connections are proportional to the sum of its dimensions (out + in), so that small layers stay denser; no
    layer gets more than it has places for. For kernels with more dimensions this is ERK, for matrices Erdős–Rényi.
    Sources: D. Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired
    by network science", Nature Communications 2018; U. Evci et al., "Rigging the Lottery", ICML 2020.

    Args:
        shapes: the layers' shapes, ``(out, in)`` or with more dimensions.
        sparsity: the fraction of zeros in all layers together, in [0, 1].

    Returns:
        A number for each layer, as :func:`random` takes it: ``random(shape, num_zeros=...)``.

    Raises:
        ValueError: if ``sparsity`` is out of its range, or a shape has a negative size.
        TypeError: if a size is not an integer.
    """
    dims = [[integer("a size", size) for size in shape] for shape in shapes]
    if any(min(shape, default=0) < 0 for shape in dims):
        raise ValueError(f"shapes must not have negative sizes; got {shapes}")
    sizes = [math.prod(shape) for shape in dims]
    live = sum(sizes) - math.floor(checked_fraction(sparsity) * sum(sizes))
    return [
        size - part
        for size, part in zip(sizes, allocate_proportionally([sum(shape) for shape in dims], sizes, live), strict=True)
    ]


def allocate_proportionally(weights: Sequence[int], most: Sequence[int], total: int) -> list[int]:
    """Divide ``total`` in proportion to ``weights``, none above its ``most``, in whole numbers.

    What does not divide goes to the largest remainders, the first of equal ones.
    """
    parts = [0] * len(most)
    open_, left = [i for i, size in enumerate(most) if size], total
    while open_:  # the layers that would get more than they have places for are filled, and the rest divided anew
        scale = sum(weights[i] for i in open_)
        full = [i for i in open_ if weights[i] * left >= most[i] * scale]
        if not full:
            break
        for i in full:
            parts[i] = most[i]
        left -= sum(most[i] for i in full)
        open_ = [i for i in open_ if i not in full]
    if open_:
        scale = sum(weights[i] for i in open_)
        for i in open_:
            parts[i] = weights[i] * left // scale
        order = sorted(open_, key=lambda i: (-(weights[i] * left % scale), i))
        for i in order[: left - sum(parts[i] for i in open_)]:
            parts[i] += 1
    return parts
