"""The products of the sparse form on CUDA by the core's kernels in Triton, which ``jax_triton`` puts into XLA's programs.

Where that is not installed, or there is no such GPU, :func:`are_used` is false, and products are XLA's. Indices may be
traced, restored or mapped, so that none is trusted: the kernels check those that they read, and words of bits.
Sizes are arguments of a kernel, though constants of a program of XLA.
"""

# mypy: disable-error-code="no-untyped-call,no-any-return"

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from maskedlinear._gpu_rule import Multiply, words_of
from maskedlinear_jax._partition import wide

__all__ = ["are_used", "bits_of", "bits_spmm", "rows_sddmm", "rows_spmm", "tiles_sddmm", "tiles_spmm"]

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

    sizes = _triton_rows.Sizes(starts.shape[0] - 1, right.shape[0], values.size, right.shape[1])
    launch = _triton_rows.rows_spmm(sizes, right.dtype.itemsize, ordered=order is not None, checked=True)
    pointers = (values, right, starts, across, across if order is None else order)
    return _product(launch, (sizes.rows, sizes.batch), right.dtype, *pointers)


def rows_sddmm(left: Array, right: Array, pattern: Any) -> Array:
    """Return left · rightᵀ at the connections, shape (nnz,)."""
    from maskedlinear import _triton_rows

    launch = _triton_rows.rows_sddmm(_sizes(pattern, right), right.dtype.itemsize, checked=True)
    return _product(launch, pattern.indices.shape, right.dtype, left, right, pattern.indptr, pattern.indices)


def bits_spmm(values: Array, right: Array, pattern: Any) -> Array:
    """Return W · right, shape (rows, batch), for right (depth, batch) of at most 16 columns."""
    from maskedlinear import _triton_rows

    sizes = _sizes(pattern, right)
    launch = _triton_rows.bits_spmm(sizes, right.dtype.itemsize, checked=True)
    return _product(launch, (sizes.rows, sizes.batch), right.dtype, values, right.T, *bits_of(pattern))


def tiles_spmm(values: Array, right: Array, pattern: Any, multiply: Multiply, *, transposed: bool) -> Array:
    """Return W · right, shape (rows, batch); or, transposed, Wᵀ · right."""
    from maskedlinear import _triton_tiles

    sizes = _sizes(pattern, right)
    launch = _triton_tiles.spmm(sizes, right.dtype.itemsize, multiply, transposed=transposed, checked=True)
    shape = launch.grid[2], sizes.depth if transposed else sizes.rows, sizes.batch
    right = right.T if launch.told["ALONG"] else right
    return _product(launch, shape, right.dtype, values, right, *bits_of(pattern)).sum(0)


def tiles_sddmm(left: Array, right: Array, pattern: Any, multiply: Multiply) -> Array:
    """Return left · rightᵀ at the connections, shape (nnz,)."""
    from maskedlinear import _triton_tiles

    launch = _triton_tiles.sddmm(_sizes(pattern, right), right.dtype.itemsize, multiply, checked=True)
    return _product(launch, pattern.indices.shape, right.dtype, left, right, *bits_of(pattern))


def bits_of(pattern: Any) -> tuple[Array, Array]:
    """Return where a pattern has connections, a bit each, and the first one of each word: int32, shape (rows, depth / 32).

    Where it keeps none they are formed in each program: once for all products of a step, which XLA finds to be of the same
    bits, but in each step of a loop, and again for what ``jax.checkpoint`` computes anew.

    Raises:
        ValueError: if it keeps bits of another shape.
    """
    rows, depth = (index.shape[0] - 1 for index in (pattern.indptr, pattern.starts))
    words = jax.ShapeDtypeStruct((rows, words_of(depth)), jnp.int32)
    if pattern.bits is None:
        from maskedlinear import _triton_rows

        launch = _triton_rows.form_bits(rows, depth, pattern.indices.size, checked=True)
        formed: tuple[Array, Array] = _call(launch, (words, words), pattern.indptr, pattern.indices)
        return formed
    kept = pattern.bits, pattern.firsts
    if any(one.shape != words.shape or one.dtype != words.dtype for one in kept):
        raise ValueError(
            f"the arrays of a pattern do not belong together: its bits must be int32 of shape {words.shape} for W of shape "
            f"{(rows, depth)}; got {[f'{one.dtype}{list(one.shape)}' for one in kept]}: make it again, by with_bits or pack"
        )
    return kept


def _sizes(pattern: Any, right: Array) -> Any:
    from maskedlinear._triton_rows import Sizes

    rows, depth = (index.shape[0] - 1 for index in (pattern.indptr, pattern.starts))
    return Sizes(rows, depth, pattern.indices.size, right.shape[1])


def _product(launch: Any, shape: tuple[int, ...], dtype: Any, *pointers: Array) -> Array:
    """Return the product that a kernel writes, of a shape, for operands of ``dtype``."""
    return _call(launch, jax.ShapeDtypeStruct(shape, wide(dtype)), *pointers)


def _call(launch: Any, made: Any, *pointers: Array) -> Any:
    """Return what a kernel makes, of the shapes and dtypes of ``made``."""
    import jax_triton

    return jax_triton.triton_call(
        *pointers,
        *launch.sizes.values(),
        kernel=launch.kernel,
        out_shape=made,
        grid=launch.grid,
        compute_capability=_capability(),
        **launch.told,
    )
