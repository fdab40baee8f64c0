"""The products of the sparse form on CPUs by ``maskedlinear.kernels``, which XLA calls: whether they are used, and how.

They are called where a product is lowered for CPUs, with arrays of one device and of sizes that are known; everywhere else,
and without the extra ``cpu``, the products are XLA's. They take matrices of batch by features, as x and y are: the plain
transpositions of ``turn`` and of these products undo each other when XLA simplifies a program.
"""

# mypy: disable-error-code="no-untyped-call,no-any-return"

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from maskedlinear import kernels
from maskedlinear_jax._partition import wide

_DTYPES = {"float32", "float64", "bfloat16", "float16"}

__all__ = [
    "are_gradients_at_once",
    "are_used",
    "by_batch",
    "gradients",
    "multiplies_packed",
    "multiply_packed",
    "sddmm",
    "spmm",
]

_lock = threading.Lock()


def are_used(*arrays: Array) -> bool:
    """Whether the kernels multiply these arrays on CPUs: floats of one dtype and int32, of known sizes."""
    known = all(isinstance(size, int) for array in arrays for size in array.shape)
    dtypes = {str(array.dtype) for array in arrays} - {"int32"}
    return known and len(dtypes) == 1 and dtypes <= _DTYPES and _are_registered(dtypes.pop())


def _are_registered(dtype: str) -> bool:
    with _lock:  # a name is XLA's once and for all
        return _products_are_registered(dtype)


@cache
def _products_are_registered(dtype: str) -> bool:
    """Register the handlers of a dtype with XLA, and return whether that worked."""
    if not kernels.is_available() or not hasattr(jax, "ffi"):
        return False
    from maskedlinear.kernels import _xla

    return _try(lambda: {_xla.target(kind, dtype): made for kind, made in _xla.handlers(dtype, _api()).items()})


def _try(handlers: Callable[[], dict[str, int]]) -> bool:
    """Register handlers by their names; return whether that worked, or say in ``kernels.refused`` why not."""
    try:
        for target, address in handlers().items():
            made = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(address)
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(made), platform="cpu")
    except (AttributeError, ImportError, OSError, RuntimeError, ValueError) as error:
        kernels.refused["JAX"] = str(error)  # of an interface that is not as expected
        return False
    return True


def _api() -> Any:
    from maskedlinear.kernels import _xla

    return _xla.read_api((Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h").read_text())


def multiplies_packed(kind: str, batch: Any) -> bool:
    """Whether this machine multiplies what is packed in a way, ``kind``, with as many rows."""
    return bool(kind) and isinstance(batch, int) and batch > 0 and _packed_kind(batch) == kind


@cache
def _packed_kind(batch: int) -> str:
    if not kernels.is_available() or not hasattr(jax, "ffi"):
        return ""
    from maskedlinear.kernels import _engine, _packing, _xla_packed

    way = _engine.host().way
    if way is None or batch > _packing.MOST_VECTORS or not _is_packed_registered():
        return ""
    _xla_packed.compile_task(batch)
    return way.kind


def _is_packed_registered() -> bool:
    with _lock:
        return _packed_handler_is_registered()


@cache
def _packed_handler_is_registered() -> bool:
    from maskedlinear.kernels import _xla_packed

    return _try(lambda: {_xla_packed.target(): _xla_packed.handler(_api())})


def multiply_packed(x: Array, layout: Any, rows: int) -> Array:
    """Return the product of x (batch, in) with a packed Wᵀ, (batch, rows)."""
    from maskedlinear.kernels import _xla_packed

    result = jax.ShapeDtypeStruct((x.shape[0], rows), x.dtype)
    return jax.ffi.ffi_call(_xla_packed.target(), result)(x, *layout)


def spmm(values: Array, right: Array, pattern: Any, *, transposed: bool) -> Array:
    """Return the product of a matrix by batch with Wᵀ, or, ``transposed``, with W: (batch, out) for right (batch, in).

    Of half types it is float32.
    """
    starts, across = (pattern.starts, pattern.outputs) if transposed else (pattern.indptr, pattern.indices)
    rows, dtype = starts.shape[0] - 1, right.dtype
    batch, depth = right.shape
    if not (values.size and rows and right.size):
        return jnp.zeros((batch, rows), wide(dtype))
    is_ordered = not transposed
    if transposed and kernels.is_ordered_first(values.size, batch, str(dtype)):
        values, is_ordered = _in_order(values, pattern.order), True
    shapes, operands = [(batch, rows), _room(depth, batch, dtype)], [values, right, starts, across]
    if is_ordered:
        return _call("spmm", (rows, depth), batch, dtype, shapes, operands)
    return _call("spmm_ordered", (rows, depth), batch, dtype, shapes, [*operands, pattern.order])


def _in_order(values: Array, order: Array) -> Array:
    from maskedlinear.kernels import _xla

    _xla.compile_order(str(values.dtype))
    made = jax.ShapeDtypeStruct(values.shape, values.dtype)
    return jax.ffi.ffi_call(_xla.target("order", str(values.dtype)), made)(values, order)


def sddmm(left: Array, right: Array, pattern: Any) -> Array:
    """Return the sum over the batch of left (batch, out) times right (batch, in) at the connections, shape (nnz,).

    Of half types it is float32.
    """
    dtype, shape = right.dtype, pattern.indices.shape
    if not (pattern.indices.size and left.size and right.size):
        return jnp.zeros(shape, wide(dtype))
    shapes = [shape, *(_room(side.shape[1], side.shape[0], dtype) for side in (left, right))]
    layer = (left.shape[1], right.shape[1])
    shapes.append((kernels.sampled_numbers(layer, right.shape[0], pattern.indices.size, str(dtype)),))
    return _call("sddmm", layer, right.shape[0], dtype, shapes, [left, right, pattern.indptr, pattern.indices])


def by_batch(array: Array, lead: int) -> Array:
    """Return an array of features by a batch of any axes, behind ``lead`` axes, as matrices of batch by features."""
    turned = jnp.moveaxis(array, lead, -1)
    return turned.reshape(*turned.shape[:lead], math.prod(turned.shape[lead:-1]), turned.shape[-1])


def are_gradients_at_once(values: Array, batch: int, depth: int) -> bool:
    """Whether both gradients of a product take less time by :func:`gradients` than by two products, on such a CPU."""
    return (
        values.size > 0
        and are_used(values)
        and kernels.are_gradients_at_once(depth, batch, values.size, str(values.dtype))
    )


def gradients(values: Array, left: Array, right: Array, pattern: Any) -> tuple[Array, Array]:
    """Return :func:`sddmm`, and the product of left (batch, out) with W, (batch, in), where they are made at once."""
    (batch, depth), dtype = right.shape, right.dtype
    rooms = [_room(side.shape[1], batch, dtype) for side in (left, right)]
    shapes = [values.shape, right.shape, *rooms, (kernels.part_numbers(depth, batch, str(dtype)),)]
    operands = [values, left, right, pattern.indptr, pattern.indices]
    sampled, product, *_ = _results("gradients", (left.shape[1], depth), batch, dtype, shapes, operands)
    return sampled, product


def _room(features: int, batch: int, dtype: Any) -> tuple[int]:
    direct = kernels.is_direct(batch, by_batch=True, dtype=str(dtype))
    return (0 if direct else kernels.panel_numbers(features, batch, str(dtype)),)


def _call(kind: str, shape: tuple[int, int], batch: int, dtype: Any, shapes: list[Any], operands: list[Array]) -> Array:
    return _results(kind, shape, batch, dtype, shapes, operands)[0]


def _results(
    kind: str, shape: tuple[int, int], batch: int, dtype: Any, shapes: list[Any], operands: list[Array]
) -> Sequence[Array]:
    from maskedlinear.kernels import _calls, _xla

    name = str(jnp.dtype(dtype))
    connections = operands[-1].shape[0]
    _calls.prepare(kind, name, shape, batch, connections)
    results = [jax.ShapeDtypeStruct(shape, wide(dtype)) for shape in shapes]
    return jax.ffi.ffi_call(_xla.target(kind, name), results)(*operands)
