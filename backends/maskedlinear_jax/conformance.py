"""The JAX backend, as the conformance suite sees it: :class:`maskedlinear.backends.Backend` for jax."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from maskedlinear import masks
from maskedlinear.backends import DISTRIBUTED, LAYERS
from maskedlinear.pattern import SparsityPattern
from maskedlinear.reference import laid_out
from maskedlinear_jax import _conformance_distributed as distribution
from maskedlinear_jax import masked_linear, sparse_linear
from maskedlinear_jax._compat import enable_x64

__all__ = ["JaxBackend"]

Bias = Array | None
Op = Callable[..., Array]


class JaxBackend:
    """``masked_linear`` or ``sparse_linear`` under ``jax.jit``: what users run. See :mod:`maskedlinear.backends`."""

    name = "jax"
    formats: Sequence[str] = ("dense", "sparse")

    def __init__(self, format: str = "dense") -> None:
        self.format = format
        # Each compiled as a whole; op by op, every shape would compile each operation on its own.
        self.value = jax.jit(self.op)
        self._vjp = jax.jit(partial(_value_and_gradients, self.op), static_argnames="wrt")
        loss = partial(_loss, self.op)
        self._hessian = jax.jit(jax.hessian(loss, (0, 1)))
        self._jvp = jax.jit(partial(_jvp, partial(self.op, forward_mode=True)))
        self._hvp = jax.jit(partial(_hvp, self.op), static_argnames="mode")
        self._jvp_of_jvp = jax.jit(partial(_jvp_of_jvp, partial(self.op, forward_mode=True)))
        self._mapped_derivative = cache(self._make_mapped_derivative)
        self._expression = jax.jit(partial(_value_and_gradients, _expression))
        self._transformed = cache(self._make_transformed)
        self._mapped = cache(lambda axes: jax.jit(jax.vmap(partial(_value_and_gradients, self.op), axes)))

    def op(self, x: Array, weight: Array, mask: Any, bias: Bias, forward_mode: bool = False) -> Array:
        """Return ``y``: what a backend for layers replaces. Of the sparse form the mask is a pattern."""
        if self.format == "sparse":
            return sparse_linear(x, weight[mask.rows, mask.indices], mask, bias)
        return masked_linear(x, weight, mask, bias, forward_mode=forward_mode)

    def _prepared(self, mask: Any) -> Any:
        """Return the mask; of the sparse form its pattern, whose size no transform can know."""
        return mask if self.format == "dense" else SparsityPattern.from_mask(np.asarray(mask))

    def versions(self) -> Mapping[str, str]:
        """Return the versions of jax and jaxlib."""
        return {"jax": jax.__version__, "jaxlib": version("jaxlib")}

    def devices(self) -> Sequence[str]:
        """Return the CPU, and CUDA where there is a device."""
        return ("cpu", "cuda") if jax.default_backend() == "gpu" else ("cpu",)

    def device_name(self, device: str) -> str:
        """Return the GPU's name, or the machine's architecture."""
        return str(_device(device).device_kind) if device == "cuda" else platform.machine()

    def dtypes(self, device: str) -> Sequence[str]:
        """Return the dtypes of the layer."""
        return ("float64", "float32", "bfloat16", "float16")

    def unsupported(self) -> Mapping[str, str]:
        """Return what JAX does not have."""
        functions = "these are functions; the layers are the backends nnx and linen"
        none = dict.fromkeys(LAYERS, functions)
        if self.format == "sparse":
            none |= {"vmap over the mask": "a pattern decides how many values there are"}
            sparse = ("distributed masks", "distributed pruning", "distributed optimizers", "distributed checkpoints")
            none |= dict.fromkeys(sparse, "these are functions of values: there is nothing masked, and no state")
        none |= {"processes": "the processes of JAX share devices, which are what is divided"}
        if distribution.why_not():
            none |= dict.fromkeys(DISTRIBUTED, distribution.why_not())
        return none | {"autocast": "JAX has no automatic casts"}

    def expected_failures(self, device: str) -> Mapping[str, str]:
        """Return nothing: no law is known to break."""
        return {}

    @contextmanager
    def strict_precision(self) -> Iterator[None]:
        """Turn 64-bit types on and TF32 off."""
        with enable_x64(True), jax.default_matmul_precision("highest"):
            yield

    def asarray(self, values: NDArray[Any], dtype: str, device: str, layout: str = "contiguous") -> Array:
        """Return ``values`` as an array; as NumPy's in any other layout, since JAX's own have none that users see."""
        array = np.asarray(values, bool if values.dtype == bool else jnp.dtype(dtype))
        if layout != "contiguous":
            return laid_out(array, layout)  # type: ignore[return-value]
        return _placed(array, device)

    def asnumpy(self, array: Array) -> NDArray[Any]:
        """Return ``array`` in float64, or as it is if boolean."""
        return np.array(array) if array.dtype == bool else np.asarray(array).astype(np.float64)

    def masked_linear(self, x: Array, weight: Array, mask: Array, bias: Bias) -> Array:
        """Return ``y``."""
        return self.value(x, weight, self._prepared(mask), bias)  # type: ignore[no-any-return]

    def vjp(self, x: Array, weight: Array, mask: Array, bias: Bias, g: Array, wrt: Sequence[str]) -> Sequence[Array]:
        """Return what ``jax.vjp`` gives through the default rule."""
        return self._vjp(x, weight, self._prepared(mask), bias, g, wrt=tuple(wrt))[1:]  # type: ignore[no-any-return]

    def jvp(
        self,
        x: Array,
        weight: Array,
        mask: Array,
        bias: Bias,
        dx: Array | None,
        dweight: Array | None,
        dbias: Array | None,
    ) -> tuple[Array, Array]:
        """Return what ``jax.jvp`` gives through the door to forward mode."""
        return self._jvp(x, weight, self._prepared(mask), bias, dx, dweight, dbias)  # type: ignore[no-any-return]

    def hvp(
        self,
        x: Array,
        weight: Array,
        mask: Array,
        bias: Bias,
        g: Array,
        dx: Array,
        dweight: Array,
        dbias: Array | None,
        dg: Array,
        mode: str,
    ) -> tuple[Array, Array, Array | None, Array]:
        """Differentiate the gradients once more, by ``jax.vjp`` or ``jax.jvp``, through the default rule."""
        found = self._hvp(x, weight, self._prepared(mask), bias, g, dx, dweight, dbias, dg, mode=mode)
        return found["x"], found["weight"], found.get("bias"), found["g"]

    def jvp_of_jvp(
        self,
        x: Array,
        weight: Array,
        mask: Array,
        bias: Bias,
        tangent1: Sequence[Array | None],
        tangent2: Sequence[Array | None],
    ) -> Array:
        """Return what ``jax.jvp`` of ``jax.jvp`` gives through the door to forward mode."""
        return self._jvp_of_jvp(x, weight, self._prepared(mask), bias, tuple(tangent1), tuple(tangent2))  # type: ignore[no-any-return]

    def autodiff_vjp(
        self, x: Array, weight: Array, mask: Array, bias: Bias, g: Array
    ) -> tuple[Array, Array, Array | None]:
        """Return the gradients that JAX makes of the plain expression."""
        _, dx, dweight, dbias = _padded(self._expression(x, weight, mask, bias, g))
        return dx, dweight, dbias

    def dense(self, x: Array, weight: Array, bias: Bias) -> Array:
        """Return a dense product."""
        return _dense(x, weight, bias)  # type: ignore[no-any-return]

    def vmap(
        self, axes: Sequence[int | None], x: Array, weight: Array, mask: Array, bias: Bias, g: Array
    ) -> tuple[Array, Array, Array, Array | None]:
        """Return ``jax.vmap`` of value and gradients."""
        y, dx, dweight, dbias = _padded(self._mapped(tuple(axes))(x, weight, self._prepared(mask), bias, g))
        return y, dx, dweight, dbias

    def vmap_derivative(self, derivative: str, axes: Sequence[int | None], *arrays: Array) -> Sequence[Array]:
        """Return ``jax.vmap`` of forward mode or second order."""
        return self._mapped_derivative(derivative, tuple(axes))(*arrays[:2], self._prepared(arrays[2]), *arrays[3:])  # type: ignore[no-any-return]

    def compile_derivative(self, derivative: str, *arrays: Array) -> Sequence[Array]:
        """Return the derivative as ever: all are compiled here."""
        x, weight, mask, bias, *more = arrays
        if derivative == "vjp":
            return _padded(self._vjp(x, weight, self._prepared(mask), bias, *more))  # type: ignore[no-any-return]
        if derivative == "hessian":
            (of_x, mixed), (other, of_weight) = self._hessian(x, weight, self._prepared(mask), bias, *more)
            return of_x, mixed, other, of_weight
        made: Callable[..., Any] = self.jvp if derivative == "jvp" else partial(self.hvp, mode=derivative)
        return made(*arrays)  # type: ignore[no-any-return]

    def transforms(self) -> Sequence[str]:
        """Return the transforms; ``forward mode`` is the second door, in reverse."""
        return ("compile", "eager", "checkpoint", "scan", "forward mode")

    def transformed(
        self, transform: str, x: Array, weight: Array, mask: Array, bias: Bias, g: Array
    ) -> tuple[Array, Array, Array, Array | None]:
        """Return value and gradients through ``transform``."""
        y, dx, dweight, dbias = _padded(self._transformed(transform)(x, weight, self._prepared(mask), bias, g))
        return y, dx, dweight, dbias

    def _make_mapped_derivative(self, derivative: str, axes: tuple[int | None, ...]) -> Callable[..., Any]:
        if derivative == "jvp":
            return jax.jit(jax.vmap(partial(_jvp, partial(self.op, forward_mode=True)), axes))

        def second_order(*arrays: Array) -> tuple[Array, ...]:
            found = _hvp(self.op, *arrays, mode=derivative)
            return found["x"], found["weight"], found["bias"], found["g"]

        return jax.jit(jax.vmap(second_order, axes))

    def _make_transformed(self, transform: str) -> Callable[..., Any]:
        def scanned(x: Array, weight: Array, mask: Array, bias: Bias) -> Array:
            return jax.lax.scan(lambda carry, row: (carry, self.op(row, weight, mask, bias)), None, x)[1]

        ops: dict[str, Op] = {
            "checkpoint": jax.checkpoint(self.op),
            "scan": scanned,
            "forward mode": partial(self.op, forward_mode=True),
        }
        op = ops.get(transform, self.op)
        function = partial(_value_and_gradients, op)
        return function if transform == "eager" else jax.jit(function)

    def join(self, rank: int, size: int, devices: int, folder: Path) -> None:
        """Give this process so many devices."""
        distribution.join(devices)

    def placements(self, kind: str) -> Sequence[str]:
        """Return the kinds of mesh, and ``shard_map``, with each axis that can be divided."""
        return distribution.PLACEMENTS if self.format == "dense" else distribution.BATCH

    def distributed_layer(self, placement: str, weight: Array, mask: Array, bias: Bias) -> Any:
        """Return the function with its arrays on a mesh."""
        kind: Any = (
            distribution.DistributedFunction if self.format == "dense" else distribution.DistributedSparseFunction
        )
        return kind(self.asnumpy, placement, weight, self._prepared(mask), bias)

    def random_mask(
        self, shape: tuple[int, int], num_zeros: int, seed: int, shard: tuple[slice, slice] | None, device: str
    ) -> Array:
        """Return ``masks.random`` as an array."""
        return _placed(masks.random(shape, num_zeros=num_zeros, seed=seed, shard=shard), device)

    def bernoulli_mask(
        self, shape: tuple[int, int], threshold: int, seed: int, shard: tuple[slice, slice] | None, device: str
    ) -> Array:
        """Return ``masks.bernoulli`` as an array."""
        return _placed(masks.bernoulli(shape, threshold=threshold, seed=seed, shard=shard), device)


def _device(device: str) -> Any:
    return jax.devices("gpu" if device == "cuda" else device)[0]


def _placed(array: NDArray[Any], device: str) -> Array:
    """Return ``array`` on ``device``; bound to it only if it is not the default, as users' arrays are."""
    chosen = _device(device)
    return jax.device_put(array, None if chosen == jax.devices()[0] else chosen)  # type: ignore[no-any-return]


def _value_and_gradients(
    op: Op,
    x: Array,
    weight: Array,
    mask: Array,
    bias: Bias,
    g: Array,
    wrt: tuple[str, ...] = ("x", "weight", "bias"),
) -> tuple[Array, ...]:
    """Return y, and the gradients of those of ``wrt`` that exist."""
    given = {"x": x, "weight": weight, "bias": bias}
    moving = {name: given[name] for name in wrt if given[name] is not None}
    y, pullback = jax.vjp(lambda moving: op(**(given | {"mask": mask} | moving)), moving)
    (gradients,) = pullback(g)
    return (y, *(gradients[name] for name in moving))


def _loss(op: Op, x: Array, weight: Array, mask: Array, bias: Bias, g: Array) -> Array:
    return jnp.vdot(g, op(x, weight, mask, bias))


def _padded(found: Sequence[Any]) -> Any:
    """``(y, dx, dW)`` with ``None`` for the gradient of a bias that is not there."""
    return tuple(found) if len(found) == 4 else (*found, None)


def _jvp(op: Op, x: Array, weight: Array, mask: Array, bias: Bias, *tangents: Array | None) -> tuple[Array, Array]:
    given = {"x": x, "weight": weight, "bias": bias}
    moving = {name: tangent for name, tangent in zip(given, tangents, strict=True) if tangent is not None}
    y, dy = jax.jvp(
        lambda moving: op(**(given | {"mask": mask} | moving)), ({name: given[name] for name in moving},), (moving,)
    )
    return y, dy


def _jvp_of_jvp(
    op: Op, x: Array, weight: Array, mask: Array, bias: Bias, tangent1: Sequence[Any], tangent2: Sequence[Any]
) -> Array:
    def tangent(*moving: Any) -> Any:
        return jax.jvp(lambda x, weight, bias: op(x, weight, mask, bias), moving, tuple(tangent1))[1]

    return jax.jvp(tangent, (x, weight, bias), tuple(tangent2))[1]  # type: ignore[no-any-return]


def _hvp(
    op: Op,
    x: Array,
    weight: Array,
    mask: Array,
    bias: Bias,
    g: Array,
    *directions: Array | None,
    mode: str,
) -> dict[str, Array]:
    given = {"x": x, "weight": weight, "bias": bias, "g": g}
    names = [name for name, array in given.items() if array is not None]
    direction = {name: along for name, along in zip(given, directions, strict=True) if name in names}

    def gradients(moving: dict[str, Array]) -> dict[str, Array]:
        inputs = {name: moving[name] for name in names[:-1]}
        y, pullback = jax.vjp(lambda i: op(i["x"], i["weight"], mask, i.get("bias")), inputs)
        return {**pullback(moving["g"])[0], "g": y}

    primals = {name: given[name] for name in names}
    if mode == "reverse over reverse":
        found: dict[str, Array] = jax.vjp(gradients, primals)[1](direction)[0]
        return found
    return jax.jvp(gradients, (primals,), (direction,))[1]  # type: ignore[no-any-return]


def _expression(x: Array, weight: Array, mask: Array, bias: Bias) -> Array:
    wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    y = jnp.matmul(x, jnp.where(mask, weight, 0).T, preferred_element_type=wide)
    return (y if bias is None else y + bias.astype(wide)).astype(x.dtype)


@jax.jit
def _dense(x: Array, weight: Array, bias: Bias) -> Array:
    return _expression(x, weight, jnp.ones(weight.shape, bool), bias)
