"""How many connections each layer of a network gets, when the network gets so many."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from maskedlinear.masks._random import Sparsity, checked_fraction, integer

__all__ = ["allocate_proportionally", "erdos_renyi_num_zeros", "uniform_plus", "uniform_plus_num_zeros"]

_MOST_OF_LAST = Fraction(4, 5)  # of the last layer that uniform+ prunes


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
    sizes = _sizes(shapes)
    live = sum(sizes) - math.floor(checked_fraction(sparsity) * sum(sizes))
    return [
        size - part
        for size, part in zip(
            sizes, allocate_proportionally([sum(shape) for shape in shapes], sizes, live), strict=True
        )
    ]


def uniform_plus_num_zeros(shapes: Sequence[Sequence[int]], sparsity: Sparsity) -> list[int]:
    """Return how many zeros each layer gets by "uniform+", so that all of them together have ``floor(sparsity * size)``.

    The first layer stays dense, the last one keeps at least a fifth of its connections, and all others have one sparsity,
    which makes up for that; the last one as well, where it is at most 80 %::

        >>> from maskedlinear import masks
        >>> masks.uniform_plus_num_zeros([(10, 10), (20, 10), (5, 20)], 0.6)
        [0, 160, 80]

    Sources: T. Gale, E. Elsen and S. Hooker, "The State of Sparsity in Deep Neural Networks", 2019, section 5.2; J. Lee
    et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", ICLR 2021, whose code leaves the first layer dense
    only if it is a convolution: here the layers given are those meant.

    Args:
        shapes: the layers' shapes, from the first to the last.
        sparsity: the fraction of zeros in all layers together, in [0, 1].

    Returns:
        A number for each layer, as :func:`random` takes it.

    Raises:
        ValueError: if ``sparsity`` is out of its range or beyond what the first and the last layer leave, or a shape has a
            negative size.
        TypeError: if a size is not an integer.
    """
    sizes = _sizes(shapes)
    return uniform_plus(sizes, math.floor(checked_fraction(sparsity) * sum(sizes)))


def uniform_plus(sizes: Sequence[int], zeros: int) -> list[int]:
    """Return how many of ``zeros`` each of the layers of these sizes gets by uniform+.

    Raises:
        ValueError: if they are more than the first and the last layer leave.
    """
    most = [*sizes[:-1], *(math.floor(_MOST_OF_LAST * size) for size in sizes[-1:])]
    most[:1] = [0] * len(most[:1])
    if zeros > sum(most):
        raise ValueError(
            f"uniform+ leaves the first layer dense and a fifth of the last one live, so that at most {sum(most)} of "
            f"{sum(sizes)} connections can go; got {zeros}: prune less, or by another distribution"
        )
    return allocate_proportionally(sizes, most, zeros)


def _sizes(shapes: Sequence[Sequence[int]]) -> list[int]:
    """Return how many entries layers of these shapes have, checked."""
    dims = [[integer("a size", size) for size in shape] for shape in shapes]
    if any(min(shape, default=0) < 0 for shape in dims):
        raise ValueError(f"shapes must not have negative sizes; got {shapes}")
    return [math.prod(shape) for shape in dims]


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
