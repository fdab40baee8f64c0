"""``with_bits``: a pattern that keeps a bit for each place of W, which products on GPUs go by.

The bits are leaves of the pattern's tree, as its indices are: they go where these go, and are formed of them when a pattern
is made, copied or cut, so that they are of no other one.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from maskedlinear._gpu_rule import has_bits, words_of
from maskedlinear.pattern import SparsityPattern
from maskedlinear_jax._compat import is_traced

__all__ = ["PatternWithBits", "form_bits", "kept_bits", "with_bits"]


class PatternWithBits(SparsityPattern):
    """A pattern and its bits."""

    @cached_property
    def bits(self) -> tuple[Any, Any]:
        """Where connections are, a bit for each place of 32, and which one is the first of each: int32, (out, in / 32)."""
        given: list[Any] = [self.indptr, self.rows, self.indices]
        if any(map(is_traced, given)):
            indptr, rows, indices = given
            return form_bits(indptr, rows, indices, self.shape[1])
        with jax.ensure_compile_time_eval():  # so that they are kept, and no tracer, if a program is the first to ask
            indptr, rows, indices = map(jnp.asarray, given)
            bits, firsts = form_bits(indptr, rows, indices, self.shape[1])
        if isinstance(self.indices, jax.Array):
            return bits, firsts
        return np.asarray(bits), np.asarray(firsts)

    @classmethod
    def of(cls, pattern: SparsityPattern) -> PatternWithBits:
        """Return a pattern whose indices are those of another, as they lie, and its bits."""
        made = object.__new__(cls)
        made.indptr, made.indices, made.shape = pattern.indptr, pattern.indices, pattern.shape
        vars(made).update(rows=pattern.rows, csc=pattern.csc)
        return made

    @property
    def nbytes(self) -> int:
        """The bytes of the indices, by rows and by columns, and of bits."""
        return super().nbytes + 8 * self.shape[0] * words_of(self.shape[1])

    def __repr__(self) -> str:
        """Say the shape, the number of connections, and that there are bits."""
        return super().__repr__().removesuffix(")") + ", with bits)"


def form_bits(indptr: Array, rows: Array, indices: Array, in_features: int) -> tuple[Array, Array]:
    """Return a bit for each place of W, 32 in a word, and which connection is each word's first: int32, (out, words)."""
    shape = indptr.shape[0] - 1, words_of(in_features)
    bit = lax.shift_left(jnp.int32(1), indices & 31)
    bits = jnp.zeros(shape, jnp.int32).at[rows, indices >> 5].add(bit, mode="drop")  # each of them once
    counts = lax.population_count(bits)
    return bits, indptr[:-1, None] + jnp.cumsum(counts, 1, dtype=jnp.int32) - counts


def with_bits(pattern: SparsityPattern) -> SparsityPattern:
    """Return a pattern that keeps a bit for each place of W, for the products of :func:`sparse_linear` on GPUs.

    There products go by bits where that takes less time: panels of W are unpacked by them, and the kernels of the extra
    ``jax-triton`` would form them in each program: in each training step, and in each step of a ``lax.scan``. Kept, they
    take a quarter of a byte for each place of W (8192 × 8192: 16 MiB), beside the 16 bytes of each connection. On CPUs
    nothing reads them, and products are as without.

    The pattern is used, and equal, as the one that it was made of, but is another tree: two leaves more, which a program is
    compiled for. Its indices lie where they lay: ``jax.device_put`` moves all of it to a device once. A pattern of another
    mask, as from :func:`maskedlinear.pruning.regrow_pattern`, has no bits until it is given them.

    Args:
        pattern: the connections, of shape ``(out, in)``.

    Returns:
        The pattern with bits; the same one where it has less than one connection in 128 places, since products never go by
        bits there.

    Raises:
        TypeError: if ``pattern`` is none.
        ValueError: if it is a stack of patterns: map over it, with ``jax.vmap(with_bits)``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from maskedlinear import masks
        >>> from maskedlinear.jax import sparse_linear, with_bits
        >>> from maskedlinear.pattern import SparsityPattern
        >>> pattern = SparsityPattern.from_mask(masks.random((4, 64), sparsity=0.5, seed=0))
        >>> pattern = jax.device_put(with_bits(pattern))
        >>> pattern.bits[0].shape
        (4, 2)
        >>> loss = lambda values, x, pattern: sparse_linear(x, values, pattern).sum()
        >>> jax.jit(jax.grad(loss))(jnp.ones(128), jnp.ones((3, 64)), pattern).shape
        (128,)
    """
    if not isinstance(pattern, SparsityPattern):
        raise TypeError(f"pattern must be a maskedlinear.pattern.SparsityPattern; got {type(pattern).__name__}")
    shape = np.shape(pattern.indices)
    if len(shape) != 1:
        raise ValueError(
            f"bits are of one pattern; got a stack of them, indices of shape {shape}: map over it, with jax.vmap(with_bits)"
        )
    return PatternWithBits.of(pattern) if has_bits(*pattern.shape, shape[0]) else pattern


def kept_bits(pattern: SparsityPattern) -> tuple[Any, ...]:
    """Return the two arrays that a pattern keeps; none if it keeps none."""
    return pattern.bits if isinstance(pattern, PatternWithBits) else ()
