"""What a backend is, and how one is found.

A backend shows one framework's masked linear layer to the conformance suite. It is a class with the methods of
:class:`Backend` and no base class of ours, registered under the entry-point group ``maskedlinear.backends``, whether it
ships with this package or with a third party's.

Values cross the border as NumPy arrays: float64 for every floating dtype (it holds each of their values exactly), bool
for masks. So a backend needs no NumPy counterpart of its dtypes, bfloat16 for one.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import entry_points
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from maskedlinear import spec

__all__ = ["GROUP", "Backend", "BackendNotAvailableError", "NumpyBackend", "available", "load"]

GROUP = "maskedlinear.backends"

Array = Any


class BackendNotAvailableError(LookupError):
    """A backend that was asked for by name is not registered, or its framework is not installed."""


@runtime_checkable
class Backend(Protocol):
    """One framework's masked linear layer, as the conformance suite sees it.

    ``Array`` stands for the framework's own arrays. Shapes are the spec's: ``x (..., in)``, ``weight (out, in)``,
    ``mask (out, in)`` boolean, ``bias (out,)`` or ``None``, ``y`` and ``g`` ``(..., out)``.
    """

    name: str

    def versions(self) -> Mapping[str, str]:
        """Return the version of every library that takes part, by name."""

    def devices(self) -> Sequence[str]:
        """Return the devices usable here, of ``"cpu"`` and ``"cuda"``, and say nothing of the others."""

    def device_name(self, device: str) -> str:
        """Return what ``device`` is, for the report: ``"NVIDIA H200"``."""

    def dtypes(self, device: str) -> Sequence[str]:
        """Return the floating dtypes that the layer supports there, by name: ``"float32"``, ``"bfloat16"``, ..."""

    def strict(self) -> AbstractContextManager[Any]:
        """Return a context in which arithmetic is what the dtype says.

        Inside it 64-bit types exist, TF32 is off, and half types are not accumulated in half precision. The suite calls
        every other method inside it.
        """

    def asarray(self, values: NDArray[Any], dtype: str, device: str) -> Array:
        """Return ``values`` (float64 that ``dtype`` holds exactly, or bool) as the framework's array on ``device``."""

    def asnumpy(self, array: Array) -> NDArray[Any]:
        """Return ``array`` as NumPy float64 (or bool), every value unchanged."""

    def masked_linear(self, x: Array, weight: Array, mask: Array, bias: Array | None) -> Array:
        """Return ``y``."""

    def vjp(
        self, x: Array, weight: Array, mask: Array, bias: Array | None, g: Array
    ) -> tuple[Array, Array, Array | None]:
        """Return the gradients ``(dx, dW, db)`` for the cotangent ``g``; ``db`` is ``None`` without bias."""

    def jvp(
        self,
        x: Array,
        weight: Array,
        mask: Array,
        bias: Array | None,
        dx: Array,
        dweight: Array,
        dbias: Array | None,
    ) -> tuple[Array, Array]:
        """Return ``(y, ẏ)`` for the tangents of the inputs."""


class NumpyBackend:
    """The spec itself as a backend, for NumPy arrays: what the others are measured against."""

    name = "numpy"

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

    def strict(self) -> AbstractContextManager[Any]:
        """Return an empty context: NumPy always computes as the dtype says."""
        return nullcontext()

    def asarray(self, values: NDArray[Any], dtype: str, device: str) -> Array:
        """Return ``values`` in ``dtype``."""
        return np.array(values, dtype=bool if values.dtype == bool else dtype)

    def asnumpy(self, array: Array) -> NDArray[Any]:
        """Return ``array`` in float64, or as it is if boolean."""
        return np.asarray(array, dtype=None if array.dtype == bool else np.float64)

    def masked_linear(self, x: Array, weight: Array, mask: Array, bias: Array | None) -> Array:
        """Return ``spec.forward``."""
        return _round(spec.forward(_widen(x), _widen(weight), mask, _widen(bias)), x)

    def vjp(
        self, x: Array, weight: Array, mask: Array, bias: Array | None, g: Array
    ) -> tuple[Array, Array, Array | None]:
        """Return ``spec.vjp``."""
        dx, dweight, dbias = spec.vjp(_widen(x), _widen(weight), mask, _widen(bias), _widen(g))
        return _round(dx, x), _round(dweight, x), _round(dbias, x)

    def jvp(
        self,
        x: Array,
        weight: Array,
        mask: Array,
        bias: Array | None,
        dx: Array,
        dweight: Array,
        dbias: Array | None,
    ) -> tuple[Array, Array]:
        """Return ``spec.jvp``."""
        wide = [_widen(array) for array in (x, weight, bias, dx, dweight, dbias)]
        y, dy = spec.jvp(wide[0], wide[1], mask, *wide[2:])
        return _round(y, x), _round(dy, x)


def _widen(array: Array) -> Array:
    """Half precision accumulates in float32, as in every backend."""
    return array.astype(np.float32) if array is not None and array.dtype == np.float16 else array


def _round(array: Array, like: Array) -> Array:
    return None if array is None else array.astype(like.dtype)


def available() -> tuple[str, ...]:
    """Return the names of all registered backends, sorted; their frameworks need not be installed."""
    return tuple(sorted({entry.name for entry in entry_points(group=GROUP)}))


def load(name: str) -> Backend:
    """Return an instance of the backend registered as ``name``.

    Raises:
        BackendNotAvailableError: if no backend has that name, or if its framework is not installed.
        TypeError: if what is registered does not have the methods of :class:`Backend`.
    """
    found = tuple(entry_points(group=GROUP, name=name))
    if not found:
        raise BackendNotAvailableError(
            f"no backend named {name!r} is registered; registered: {', '.join(available()) or 'none'}. "
            f"A distribution registers one under the entry-point group {GROUP!r}"
        )
    try:
        backend = found[0].load()()
    except ImportError as error:
        raise BackendNotAvailableError(f"backend {name!r} cannot be imported: {error}") from error
    if not isinstance(backend, Backend):
        missing = [method for method in sorted(_METHODS) if not hasattr(backend, method)]
        raise TypeError(f"backend {name!r} lacks {', '.join(missing)} of maskedlinear.backends.Backend")
    return backend


_METHODS = {"name", *(n for n in vars(Backend) if not n.startswith("_"))}
