"""``with_bits``: a pattern that keeps a bit for each place of W, which kernels for GPUs would else form in every program.

The bits are leaves of the pattern's tree, as its indices are: they go where these go, and follow from them when a pattern is
made, copied or cut, so that they are of no other one.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from functools import cached_property
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from maskedlinear._gpu_rule import has_bits, words_of
from maskedlinear.pattern import SparsityPattern
from maskedlinear_jax._compat import is_traced

__all__ = ["PatternWithBits", "bits_of", "with_bits"]

_BLOCK = 1 << 24  # places of W that are looked at at once


class PatternWithBits(SparsityPattern):
    """A pattern and its bits."""

    @classmethod
    def of(cls, pattern: SparsityPattern) -> PatternWithBits:
        """Return a pattern with its bits; made anew, and so checked: its indices may come from anywhere."""
        return cls(np.asarray(pattern.indptr), np.asarray(pattern.indices), pattern.shape[1])

    @cached_property
    def bits(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Where connections are, a bit for each place of 32, and which one is the first of each: int32, (out, in / 32)."""
        out, depth = self.shape
        words = words_of(depth)
        bits, counts = np.zeros((out, words), np.int32), np.zeros((out, words), np.int32)
        height = max(1, _BLOCK // max(1, depth))
        for first in range(0, out, height):
            live = np.zeros((min(height, out - first), words * 32), bool)
            of = slice(self.indptr[first], self.indptr[first + len(live)])
            live[self.rows[of] - first, self.indices[of]] = True
            bits[first : first + height] = np.packbits(live, axis=1, bitorder="little").view("<i4")
            counts[first : first + height] = live.reshape(*counts[first : first + height].shape, 32).sum(2, np.int32)
        before = np.cumsum(counts, dtype=np.int32).reshape(counts.shape) - counts
        return bits, before


def with_bits(pattern: SparsityPattern) -> SparsityPattern:
    """Return a pattern that keeps a bit for each place of W, for the products of :func:`sparse_linear` on GPUs.

    There the kernels of the extra ``jax-triton`` go by bits, and form them in each program that is not told them: in
    each training step, and in each step of a ``lax.scan``. Kept, they take a quarter of a byte for each place of W
    (8192 × 8192: 16 MiB), beside the 16 bytes of each connection. Where nothing reads them, on CPUs and without the extra,
    products are as without.

    The pattern is used, and equal, as the one that it was made of, but is another tree: two leaves more, which a program is
    compiled for. A pattern of another mask, as from :func:`maskedlinear.pruning.regrow_pattern`, has none until it is given
    them.

    Args:
        pattern: the connections, of shape ``(out, in)``.

    Returns:
        The pattern with bits; the same one where they would take more than 32 bytes a connection, since products never go by
        them there.

    Raises:
        TypeError: if ``pattern`` is none, or its indices are traced: this is a step of its own, outside of ``jit``.
        ValueError: if it is a stack of patterns: give each its bits, then stack them.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from maskedlinear import masks
        >>> from maskedlinear.jax import sparse_linear, with_bits
        >>> from maskedlinear.pattern import SparsityPattern
        >>> pattern = with_bits(SparsityPattern.from_mask(masks.random((4, 64), sparsity=0.5, seed=0)))
        >>> pattern.bits[0].shape
        (4, 2)
        >>> loss = lambda values, x, pattern: sparse_linear(x, values, pattern).sum()
        >>> jax.jit(jax.grad(loss))(jnp.ones(128), jnp.ones((3, 64)), pattern).shape
        (128,)
    """
    if not isinstance(pattern, SparsityPattern):
        raise TypeError(f"pattern must be a maskedlinear.pattern.SparsityPattern; got {type(pattern).__name__}")
    if any(is_traced(leaf) for leaf in jax.tree.leaves(pattern)):
        raise TypeError(
            "with_bits takes a pattern whose indices have values, not traced ones: it is a step of its own, outside of jit "
            "and grad, whose result goes into them as an argument"
        )
    if np.ndim(pattern.indices) != 1:
        raise ValueError(
            f"bits are of one pattern; got a stack of them, indices of shape {np.shape(pattern.indices)}: give bits to "
            "each, and stack_patterns after that"
        )
    if not has_bits(*pattern.shape, pattern.nnz):
        return pattern
    return PatternWithBits.of(pattern)


def bits_of(pattern: SparsityPattern) -> tuple[Any, ...]:
    """Return the two arrays that a pattern keeps; none if it keeps none."""
    return pattern.bits if isinstance(pattern, PatternWithBits) else ()
