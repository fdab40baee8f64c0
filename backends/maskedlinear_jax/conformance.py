"""The JAX backend, as the conformance suite sees it: :class:`maskedlinear.backends.Backend` for jax."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import jax
import jax.experimental
import numpy as np
from jax import Array
from numpy.typing import NDArray

from maskedlinear_jax import masked_linear

__all__ = ["JaxBackend"]


class JaxBackend:
    """``maskedlinear.jax.masked_linear``, under ``jax.jit``, on one device."""

    name = "jax"

    def versions(self) -> Mapping[str, str]:
        """Return the versions of jax and jaxlib."""
        return {"jax": jax.__version__, "jaxlib": version("jaxlib")}

    def devices(self) -> Sequence[str]:
        """Return the CPU, and CUDA where there is a device."""
        return ("cpu", "cuda") if jax.default_backend() == "gpu" else ("cpu",)

    def device_name(self, device: str) -> str:
        """Return the GPU's name, or the machine's architecture."""
        return str(self._device(device).device_kind) if device == "cuda" else platform.machine()

    def dtypes(self, device: str) -> Sequence[str]:
        """Return the dtypes of the layer."""
        return ("float64", "float32", "bfloat16", "float16")

    @contextmanager
    def strict(self) -> Iterator[None]:
        """Turn 64-bit types on and TF32 off."""
        with _enable_x64(True), jax.default_matmul_precision("highest"):
            yield

    def asarray(self, values: NDArray[Any], dtype: str, device: str) -> Array:
        """Return ``values`` as an array."""
        return jax.device_put(jax.numpy.asarray(values, bool if values.dtype == bool else dtype), self._device(device))  # type: ignore[no-any-return]

    def asnumpy(self, array: Array) -> NDArray[Any]:
        """Return ``array`` in float64, or as it is if boolean."""
        return np.asarray(array) if array.dtype == bool else np.asarray(array).astype(np.float64)

    def masked_linear(self, x: Array, weight: Array, mask: Array, bias: Array | None) -> Array:
        """Return ``y``."""
        return _value(x, weight, mask, bias)  # type: ignore[no-any-return]

    def vjp(
        self, x: Array, weight: Array, mask: Array, bias: Array | None, g: Array
    ) -> tuple[Array, Array, Array | None]:
        """Return what ``jax.vjp`` gives through the default rule."""
        return _vjp(x, weight, mask, bias, g)  # type: ignore[no-any-return]

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
        """Return what ``jax.jvp`` gives through the door to forward mode."""
        return _jvp(x, weight, mask, bias, dx, dweight, dbias)  # type: ignore[no-any-return]

    def _device(self, device: str) -> Any:
        return jax.devices("gpu" if device == "cuda" else device)[0]


def _enable_x64(on: bool) -> Any:
    """``jax.enable_x64``, or its older name."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(on)
    return jax.experimental.enable_x64(on)  # type: ignore[attr-defined, unused-ignore]


# Compiled as a whole, as users run them; op by op, every shape would compile each operation on its own.
_value = jax.jit(masked_linear)


@jax.jit
def _vjp(x: Array, weight: Array, mask: Array, bias: Array | None, g: Array) -> tuple[Array, Array, Array | None]:
    _, pullback = jax.vjp(lambda x, weight, bias: masked_linear(x, weight, mask, bias), x, weight, bias)
    dx, dweight, dbias = pullback(g)
    return dx, dweight, dbias


@jax.jit
def _jvp(
    x: Array, weight: Array, mask: Array, bias: Array | None, dx: Array, dweight: Array, dbias: Array | None
) -> tuple[Array, Array]:
    def layer(x: Array, weight: Array, bias: Array | None) -> Array:
        return masked_linear(x, weight, mask, bias, forward_mode=True)

    y, dy = jax.jvp(layer, (x, weight, bias), (dx, dweight, dbias))
    return y, dy
