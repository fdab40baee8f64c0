"""The products of the sparse form on CUDA by the core's kernels in Triton, which ``jax_triton`` puts into XLA's programs.

Where that is not installed, or there is no such GPU, :func:`are_used` is false, and products are XLA's. Indices may be
traced, restored or mapped, so that none is trusted: kernels by rows check them, and bits lead to no value that is not there.
Sizes are constants of a kernel, as of a program of XLA.
"""

# mypy: disable-error-code="no-untyped-call,no-any-return"

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from maskedlinear._gpu_rule import Multiply
from maskedlinear_jax._partition import wide

__all__ = ["are_used", "bits_spmm", "rows_sddmm", "rows_spmm", "tiles_sddmm", "tiles_spmm"]

_LEAST = 80  # ten times the compute capability that the kernels are made for
_WIDEST = 1 << 21  # of a batch or of features, that programs are launched over


def are_used(*sizes: int) -> bool:
    """Whether the kernels multiply on this machine's GPU, matrices of such sizes."""
    return max(sizes) <= _WIDEST and _capability() >= _LEAST


@cache
def _capability() -> int:
    """Return ten times the compute capability of the first GPU by CUDA, if kernels can be called for it; else 0."""
    try:
        import jax_triton  # noqa: F401

        return round(10 * float(jax.devices("cuda")[0].compute_capability))
    except (
        ImportError,
        AttributeError,
        RuntimeError,
        ValueError,
    ):  # of a version, or a machine, that is not made for it
        return 0


def rows_spmm(values: Array, right: Array, starts: Array, across: Array, order: Array | None) -> Array:
    """Return W · right, shape (rows, batch), of W by compressed rows, whose values lie in ``order``, if there is one."""
    from maskedlinear import _triton_rows

    rows, (depth, batch), nnz = starts.shape[0] - 1, right.shape, across.size
    ordered = order is not None
    launch = _triton_rows.rows_spmm(rows, depth, nnz, batch, right.dtype.itemsize, ordered=ordered, checked=True)
    pointers = (values, right, starts, across, across if order is None else order)
    return _call(launch, (rows, batch), right.dtype, *pointers)


def rows_sddmm(left: Array, right: Array, pattern: Any) -> Array:
    """Return left · rightᵀ at the connections, shape (nnz,)."""
    from maskedlinear import _triton_rows

    (rows, batch), depth, nnz = left.shape, right.shape[0], pattern.indices.size
    launch = _triton_rows.rows_sddmm(rows, depth, nnz, batch, right.dtype.itemsize, checked=True)
    return _call(launch, (nnz,), right.dtype, left, right, pattern.indptr, pattern.indices)


def bits_spmm(values: Array, right: Array, pattern: Any) -> Array:
    """Return W · right, shape (rows, batch), for right (depth, batch) of at most 16 columns."""
    from maskedlinear import _triton_rows

    rows, (depth, batch) = pattern.indptr.shape[0] - 1, right.shape
    launch = _triton_rows.bits_spmm(rows, depth, batch, right.dtype.itemsize)
    return _call(launch, (rows, batch), right.dtype, values, right.T, *bits_of(pattern))


def tiles_spmm(values: Array, right: Array, pattern: Any, multiply: Multiply, *, transposed: bool) -> Array:
    """Return W · right, shape (rows, batch); or, transposed, Wᵀ · right."""
    from maskedlinear import _triton_tiles

    (rows, depth), batch = _shape(pattern), right.shape[1]
    launch = _triton_tiles.spmm(rows, depth, batch, right.dtype.itemsize, multiply, transposed=transposed)
    return _call(launch, (depth if transposed else rows, batch), right.dtype, values, right, *bits_of(pattern))


def tiles_sddmm(left: Array, right: Array, pattern: Any, multiply: Multiply) -> Array:
    """Return left · rightᵀ at the connections, shape (nnz,)."""
    from maskedlinear import _triton_tiles

    (rows, depth), batch = _shape(pattern), right.shape[1]
    launch = _triton_tiles.sddmm(rows, depth, batch, right.dtype.itemsize, multiply)
    return _call(launch, pattern.indices.shape, right.dtype, left, right, *bits_of(pattern))


def bits_of(pattern: Any) -> tuple[Array, Array]:
    """Return where a pattern has connections, a bit each, and the first one of each word: int32, shape (rows, depth / 32).

    They are formed in each program, once for all its products, so that no pattern is kept twice, or out of date. A word
    whose connections are not there, of a pattern that is none, is empty.
    """
    (rows, depth), nnz = _shape(pattern), pattern.indices.size
    words = -(-depth // 32)
    inside = (pattern.indices >= 0) & (pattern.indices < depth)
    place = jnp.where(inside, pattern.rows * words + (pattern.indices >> 5), rows * words)
    bit = jnp.left_shift(jnp.uint32(1), (pattern.indices & 31).astype(jnp.uint32))
    bits = jnp.zeros(rows * words, jnp.uint32).at[place].add(bit, mode="drop").reshape(rows, words)
    counts = jax.lax.population_count(bits).astype(jnp.int32)
    firsts = pattern.indptr[:-1, None] + jnp.cumsum(counts, 1) - counts
    bits = jnp.where((firsts >= 0) & (firsts <= nnz - counts), bits, 0)
    return jax.lax.bitcast_convert_type(bits, jnp.int32), firsts


def _shape(pattern: Any) -> tuple[int, int]:
    return pattern.indptr.shape[0] - 1, pattern.starts.shape[0] - 1


def _call(launch: Any, shape: tuple[int, ...], dtype: Any, *pointers: Array) -> Array:
    """Return the result of a kernel, of a shape, for operands of ``dtype``."""
    import jax_triton

    return jax_triton.triton_call(
        *pointers,
        kernel=launch.kernel,
        out_shape=jax.ShapeDtypeStruct(shape, wide(dtype)),
        grid=launch.grid,
        compute_capability=_capability(),
        **launch.told,
    )
