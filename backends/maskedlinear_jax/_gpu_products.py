"""The products of the sparse form off the CPU: gathered all at once, or by panels of W, which are multiplied dense.

XLA's compiler for GPUs makes one kernel, without temporaries, of a gather, a multiplication and a sum, unless a loop stands
around them: so nothing is cut into parts. Above a few per cent of live connections the dense product is faster: W, or the
product that is sampled, is there in panels of at most ``PANEL_BYTES``, one after the other. Which way is gone is said by
``maskedlinear._gpu_rule``. Panels are multiplied as ``jnp.dot`` multiplies, by the user's precision, as a dense layer is.
"""

# mypy: disable-error-code="no-untyped-call,no-any-return"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from maskedlinear import _gpu_rule
from maskedlinear._gpu_rule import Multiply, Product

__all__ = ["is_stack_in_panels", "sddmm", "sddmm_in_panels", "spmm", "spmm_in_panels"]

_UNROLLED = 4  # panels that stand in the program one by one, each of which looks at all connections
_SPREAD = 1.5  # of how many connections a panel has on average, so many are unpacked in one step


def _is_in_panels(rows: int, depth: int, nnz: int, batch: int, dtype: Any, sampled: bool) -> bool:
    """Whether the rule says panels, and not gathers."""
    product = Product(rows, depth, nnz, batch, jnp.dtype(dtype).itemsize, _multiply(dtype), sampled)
    return _gpu_rule.choose(("gathered", "panels"), product) == "panels"


def is_stack_in_panels(one: Array, other: Array, pattern: Any) -> bool:
    """Whether each product of a stack, of (stack, nnz) and (stack, in, batch), or of two sides, is one by panels.

    All in one, they would be as if of one pattern with empty corners.
    """
    rows, depth = (index.shape[-1] - 1 for index in (pattern.indptr, pattern.starts))
    nnz, batch = pattern.indices.shape[-1], other.shape[-1]
    return bool(one.size and other.size) and _is_in_panels(rows, depth, nnz, batch, other.dtype, one.ndim > 2)


def spmm(values: Array, right: Array, pattern: Any, *, transposed: bool) -> Array:
    """Return W · right, shape (out, batch) for right (in, batch); or, transposed, Wᵀ · right."""
    depth, batch = right.shape
    starts, across = (pattern.starts, pattern.outputs) if transposed else (pattern.indptr, pattern.indices)
    count = starts.shape[0] - 1
    if not values.size or not batch or not count:
        return jnp.zeros((count, batch), right.dtype)
    rows = pattern.indices[pattern.order] if transposed else pattern.rows
    values = values[pattern.order] if transposed else values
    if _is_in_panels(count, depth, values.size, batch, right.dtype, sampled=False):
        return spmm_in_panels(values, right, starts, rows, across)
    gathered = values[:, None] * right[across]
    return jnp.zeros((count, batch), right.dtype).at[rows].add(gathered, indices_are_sorted=True)


def sddmm(left: Array, right: Array, pattern: Any) -> Array:
    """Return left · rightᵀ at the connections, shape (nnz,), for left (out, batch) and right (in, batch)."""
    size, batch = pattern.indices.size, right.shape[1]
    if not size or not batch:
        return jnp.zeros(size, right.dtype)
    if _is_in_panels(left.shape[0], right.shape[0], size, batch, right.dtype, sampled=True):
        return sddmm_in_panels(left, right, pattern.indptr, pattern.rows, pattern.indices)
    return (left[pattern.rows] * right[pattern.indices]).sum(1)


def spmm_in_panels(values: Array, right: Array, starts: Array, rows: Array, across: Array) -> Array:
    """Return the product of W in compressed rows with right (depth, batch), panel by panel."""
    (depth, batch), count = right.shape, starts.shape[0] - 1

    def step(product: Array, first: Any, height: int) -> Array:
        def unpack(panel: Array, part: tuple[Array, ...]) -> Array:
            of, columns, numbers = part
            return panel.at[_within(of, first, height), columns].set(numbers, mode="drop")

        panel = jnp.zeros((height, depth), right.dtype)
        panel = _visit(unpack, panel, (rows, across, values), starts, first, height)
        return lax.dynamic_update_slice_in_dim(product, panel @ right, first, 0)

    return _panels(step, jnp.zeros((count, batch), right.dtype), count, depth)


def sddmm_in_panels(left: Array, right: Array, starts: Array, rows: Array, across: Array) -> Array:
    """Return left · rightᵀ at the connections, of which a panel is there in full at a time."""
    count, size = left.shape[0], across.size

    def step(sampled: Array, first: Any, height: int) -> Array:
        panel = lax.dynamic_slice_in_dim(left, first, height) @ right.T

        def sample(sampled: Array, part: tuple[Array, ...]) -> Array:
            of, columns, places = part
            local = _within(of, first, height)
            numbers = panel.at[local, columns].get(mode="fill", fill_value=0)
            # Those of other panels are written nowhere.
            return sampled.at[jnp.where(local < height, places, size)].set(numbers, mode="drop", unique_indices=True)

        return _visit(sample, sampled, (rows, across, jnp.arange(size, dtype=jnp.int32)), starts, first, height)

    return _panels(step, jnp.zeros(size, right.dtype), count, right.shape[0])


def _within(rows: Array, first: Any, height: int) -> Array:
    """Return the place of rows in a panel, ``height`` for those that are not in it."""
    local = rows - first
    return jnp.where((local >= 0) & (local < height), local, height)


def _panels(step: Callable[[Array, Any, int], Array], state: Array, count: int, depth: int) -> Array:
    """Go over all panels, one after the other: the last may go over rows of the one before it once more."""
    height = _gpu_rule.panel_rows(Product(count, depth, 0, 0, state.dtype.itemsize, "float32"))
    panels = -(-count // height)
    if panels > _UNROLLED:
        return lax.fori_loop(
            0, panels, lambda i, state: step(state, jnp.minimum(i * height, count - height), height), state
        )
    for i in range(panels):
        first = min(i * height, count - height)
        if i:  # not side by side, which would have several panels there at once
            state, after = lax.optimization_barrier((state, jnp.int32(first)))
            state = step(state, after, height)
        else:
            state = step(state, first, height)
    return state


def _visit(
    visit: Callable[[Array, tuple[Array, ...]], Array],
    state: Array,
    entries: tuple[Array, ...],
    starts: Array,
    first: Any,
    height: int,
) -> Array:
    """Return ``state`` after ``visit`` of all connections of a panel, in steps that may see others', and some twice."""
    size, panels = entries[0].size, -(-(starts.shape[0] - 1) // height)
    most = min(size, int(_SPREAD * size / panels) + 1)
    if panels <= _UNROLLED or most == size:
        return visit(state, entries)
    start, end = (jnp.clip(starts[place], 0, size) for place in (first, first + height))  # a state may have brought any

    def step(i: Array, state: Array) -> Array:
        place = jnp.minimum(start + i * most, size - most)
        return visit(state, tuple(lax.dynamic_slice_in_dim(entry, place, most) for entry in entries))

    return lax.fori_loop(0, -((start - end) // most), step, state)


def _multiply(dtype: Any) -> Multiply:
    """How the dense product multiplies numbers of ``dtype`` on a GPU: float32 by TF32, unless a precision is set."""
    if jnp.dtype(dtype) == jnp.float64:
        return "float64"
    exact = getattr(jax.config, "jax_default_matmul_precision", None) in ("highest", "float32")
    return "float32" if exact else "tf32"
