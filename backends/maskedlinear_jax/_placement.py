"""Where arrays lie: on one device, on several, on those of other processes; and others laid as they are.

What JAX does by itself is not asked twice: operations on arrays keep to the devices that these are on. This is for what
comes from the host, or goes there.
"""

# mypy: disable-error-code="no-untyped-call,no-any-return"

from __future__ import annotations

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from numpy.typing import NDArray

from maskedlinear_jax._compat import is_traced

__all__ = [
    "copied",
    "counter",
    "full_like",
    "is_shared",
    "is_spread",
    "laid",
    "on_device",
    "replicated",
    "to_host",
    "to_like",
]


def is_spread(array: Any) -> bool:
    """Whether no device has the whole of an array whose numbers are known."""
    return isinstance(array, jax.Array) and not is_traced(array) and not array.sharding.is_fully_replicated


def is_shared(array: Any) -> bool:
    """Whether other processes have parts or copies of an array whose numbers are known."""
    return isinstance(array, jax.Array) and not is_traced(array) and not array.is_fully_addressable


def to_host(array: Any) -> NDArray[Any]:
    """Return the whole of an array as NumPy's; of one that other processes have parts of, all of them must ask for it."""
    if is_shared(array) and is_spread(array):
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def on_device(array: Any, dtype: Any = None) -> Array:
    """Return a copy of the host's array as JAX's, which no program is compiled for.

    ``jnp.asarray`` compiles one for each shape, and XLA keeps a megabyte or two of each.
    """
    mesh_of = getattr(jax.sharding, "get_abstract_mesh", None)
    if mesh_of is None or not mesh_of().empty:  # the array's type may be one of the mesh
        return jnp.asarray(array, dtype)
    return jax.device_put(np.array(array, dtype))  # which would share the memory of the array itself


def copied(array: Any) -> Array:
    """Return a copy of an array, which no program is compiled for where one device has it."""
    if is_traced(array) or not isinstance(array, jax.Array) or len(array.sharding.device_set) > 1:
        return jnp.copy(array)
    return jax.device_put(array, may_alias=False)


def to_like(array: Any, like: Any, name: str = "a mask") -> Array:
    """Return an array of the shape of ``like``, laid as that is.

    It is returned as it is where ``like`` was put nowhere by choice, and inside transforms, but on a mesh of explicit axes.

    Raises:
        ValueError: if the processes that ``like`` is on give different arrays.
    """
    if is_traced(like):
        return _resharded(jnp.asarray(array), _explicit_sharding(like))
    if is_traced(array) or not isinstance(like, jax.Array) or not like.committed:
        return jnp.asarray(array)
    return laid(array, like.sharding, name)


def laid(array: Any, sharding: Any, name: str = "a mask") -> Array:
    """Return an array whose numbers are known, laid like this.

    Raises:
        ValueError: as by :func:`to_like`.
    """
    if is_shared(array) or sharding.is_fully_addressable:
        return jax.device_put(array if isinstance(array, jax.Array) else jnp.asarray(array), sharding)
    whole = np.asarray(array)
    _refuse_different(whole, name)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def full_like(like: Any, value: Any, dtype: Any = None) -> Array:
    """Return an array of one value, of the shape of another and laid as that is."""
    dtype = like.dtype if dtype is None else dtype
    if is_traced(like) or not isinstance(like, jax.Array) or not like.committed:
        return jnp.full_like(like, value, dtype) if is_traced(like) else jnp.full(like.shape, value, dtype)
    part = np.broadcast_to(np.asarray(value, dtype), like.shape)
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: part[index])


def counter(params: Any) -> Array:
    """Return 0, int32, on the mesh of the parameters: from elsewhere, a jitted step would be compiled a second time."""
    for leaf in jax.tree.leaves(params):
        lies = leaf.sharding if isinstance(leaf, jax.Array) and not is_traced(leaf) and leaf.committed else None
        if isinstance(lies, NamedSharding):
            return laid(np.zeros((), np.int32), NamedSharding(lies.mesh, PartitionSpec()))
    return jnp.zeros((), jnp.int32)


def replicated(array: Array) -> Array:
    """Return an array inside a transform that is whole on each device of a mesh of explicit axes; of others, as it is."""
    sharding = _explicit_sharding(array)
    return _resharded(array, None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec()))


def _explicit_sharding(array: Any) -> Any:
    """Return how an array inside a transform is spread over explicit axes of a mesh, if it is."""
    sharding = getattr(jax.typeof(array), "sharding", None) if hasattr(jax, "typeof") else None
    return sharding if sharding is not None and any(axes is not None for axes in sharding.spec) else None


def _resharded(array: Array, sharding: Any) -> Array:
    moved: Array = array if sharding is None else jax.sharding.reshard(array, sharding)
    return moved


def _refuse_different(array: NDArray[Any], name: str) -> None:
    """Raise a ``ValueError`` in all processes if they have not the same array."""
    own = np.array([zlib.crc32(np.ascontiguousarray(array).tobytes()), math.prod(array.shape)], np.uint32)
    every = np.asarray(multihost_utils.process_allgather(own)).reshape(-1, 2)
    different = np.flatnonzero((every != every[0]).any(1))
    if len(different):
        raise ValueError(
            f"{name} must be the same in all processes; got others in process {different[0]} than in process 0: make it "
            "of what all of them have, or in one and send it to the others"
        )
