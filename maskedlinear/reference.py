"""The spec itself as a backend, for NumPy arrays: what the others are measured against."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskedlinear import masks, spec
from maskedlinear.backends import DISTRIBUTED, LAYERS

__all__ = ["NumpyBackend", "laid_out"]

Array = Any


class NumpyBackend:
    """``maskedlinear.spec`` on NumPy arrays; half precision accumulates in float32. See :mod:`maskedlinear.backends`."""

    name = "numpy"
    formats = ("dense",)

    def __init__(self, format: str = "dense") -> None:
        self.format = format

    def versions(self) -> Mapping[str, str]:
        """Return NumPy's version."""
        return {"numpy": np.__version__}

    def devices(self) -> Sequence[str]:
        """Return the only device that NumPy has."""
        return ("cpu",)

    def device_name(self, device: str) -> str:
        """Return the machine's architecture."""
        return platform.machine()

    def dtypes(self, device: str) -> Sequence[str]:
        """Return NumPy's floating dtypes."""
        return ("float64", "float32", "float16")

    def unsupported(self) -> Mapping[str, str]:
        """Return what NumPy does not have."""
        none = dict.fromkeys(("autodiff_vjp",), "NumPy does not differentiate")
        transforms = ("vmap", "vmap over the mask", "vmap of derivatives", "compile", "checkpoint", "scan")
        compiled = ("compile of derivatives", "compile of the hessian")
        none |= dict.fromkeys((*transforms, *compiled), "NumPy has no function transforms")
        none |= dict.fromkeys(("dense", *LAYERS), "NumPy has no layers")
        none |= dict.fromkeys(DISTRIBUTED, "NumPy has one process, and one device")
        return none | {"autocast": "NumPy has no automatic casts"}

    def expected_failures(self, device: str) -> Mapping[str, str]:
        """Return nothing: the spec obeys every law."""
        return {}

    def strict_precision(self) -> AbstractContextManager[Any]:
        """Return a context that is silent on NaN and infinity; NumPy always computes as the dtype says."""
        return np.errstate(all="ignore")

    def asarray(self, values: NDArray[Any], dtype: str, device: str, layout: str = "contiguous") -> Array:
        """Return ``values`` in ``dtype``."""
        return laid_out(np.array(values, dtype=bool if values.dtype == bool else dtype), layout)

    def asnumpy(self, array: Array) -> NDArray[Any]:
        """Return a copy of ``array`` in float64, or as it is if boolean."""
        return np.array(array, dtype=None if array.dtype == bool else np.float64)

    def masked_linear(self, x: Array, weight: Array, mask: Array, bias: Array | None) -> Array:
        """Return ``spec.forward``."""
        return _round(spec.forward(_widen(x), _widen(weight), mask, _widen(bias)), x)

    def vjp(
        self, x: Array, weight: Array, mask: Array, bias: Array | None, g: Array, wrt: Sequence[str]
    ) -> Sequence[Array]:
        """Return the parts of ``spec.vjp`` that ``wrt`` names."""
        gradients = spec.vjp(_widen(x), _widen(weight), mask, _widen(bias), _widen(g))._asdict()
        return [_round(gradients[name], x) for name in wrt]

    def jvp(
        self,
        x: Array,
        weight: Array,
        mask: Array,
        bias: Array | None,
        dx: Array | None,
        dweight: Array | None,
        dbias: Array | None,
    ) -> tuple[Array, Array]:
        """Return ``spec.jvp``."""
        wide = [_widen(array) for array in (x, weight, bias, dx, dweight, dbias)]
        y, dy = spec.jvp(wide[0], wide[1], mask, *wide[2:])
        return _round(y, x), _round(dy, x)

    def hvp(
        self,
        x: Array,
        weight: Array,
        mask: Array,
        bias: Array | None,
        g: Array,
        dx: Array,
        dweight: Array,
        dbias: Array | None,
        dg: Array,
        mode: str,
    ) -> tuple[Array, Array, Array | None, Array]:
        """Return ``spec.hvp``, whatever the mode."""
        wide = [_widen(array) for array in (x, weight, bias, g, dx, dweight, dbias, dg)]
        along_x, along_weight, along_bias, along_g = (
            _round(part, x) for part in spec.hvp(wide[0], wide[1], mask, *wide[2:])
        )
        return along_x, along_weight, along_bias, along_g

    def jvp_of_jvp(
        self,
        x: Array,
        weight: Array,
        mask: Array,
        bias: Array | None,
        tangent1: Sequence[Array | None],
        tangent2: Sequence[Array | None],
    ) -> Array:
        """Return how ``spec.jvp`` moves: it is linear in x and weight, the bias not being there any more."""
        (dx, dweight), (dx2, dweight2) = (map(_widen, direction[:2]) for direction in (tangent1, tangent2))
        return _round(spec.jvp(dx2, dweight2, mask, None, dx, dweight, None)[1], x)

    def random_mask(
        self, shape: tuple[int, int], num_zeros: int, seed: int, shard: tuple[slice, slice] | None, device: str
    ) -> Array:
        """Return ``masks.random``."""
        return masks.random(shape, num_zeros=num_zeros, seed=seed, shard=shard)

    def bernoulli_mask(
        self, shape: tuple[int, int], threshold: int, seed: int, shard: tuple[slice, slice] | None, device: str
    ) -> Array:
        """Return ``masks.bernoulli``."""
        return masks.bernoulli(shape, threshold=threshold, seed=seed, shard=shard)


def laid_out(values: NDArray[Any], layout: str) -> NDArray[Any]:
    """Return a copy of ``values`` that lies in memory as ``layout`` says; see ``maskedlinear.backends.Backend.asarray``."""
    array = np.array(values, order="C")
    if layout == "transposed":
        return np.array(array.T, order="C").T
    if layout == "strided":
        return np.repeat(array, 2, axis=-1)[..., ::2]
    if layout == "broadcast":
        return np.broadcast_to(array[:1], array.shape)
    if layout == "read-only":
        array.flags.writeable = False
    return array


def _widen(array: Array) -> Array:
    """Half precision accumulates in float32, as in every backend."""
    return array.astype(np.float32) if array is not None and array.dtype == np.float16 else array


def _round(array: Array, like: Array) -> Array:
    return None if array is None else array.astype(like.dtype)
