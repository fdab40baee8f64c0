"""``ReferenceBackend``: every capability in plain NumPy, made of small steps. Each mutant replaces one of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from maskedlinear import masks
from maskedlinear.reference import NumpyBackend
from maskedlinear_conformance.faults._reference_distributed import PLACEMENTS, Ranks, ReferenceShared
from maskedlinear_conformance.faults._reference_layer import ReferenceLayer

__all__ = ["Array", "Mutant", "ReferenceBackend", "ReferenceLayer", "flat", "in_memory", "new_order"]

Array = Any
Shard = tuple[slice, slice] | None
_orders = itertools.count()


def in_memory(array: Array) -> Array:
    """Return the values as they lie in memory, whatever the strides say."""
    base = array if array.base is None else array.base
    return base.reshape(-1)[: array.size].reshape(array.shape) if base.size >= array.size else array


def new_order(size: int) -> Array:
    """Return an order of ``size`` terms, another one at each call, and the same in every run: no fault shows by chance."""
    return np.random.default_rng(next(_orders)).permutation(size)


def flat(array: Array) -> Array:
    """Merge all batch dimensions into one."""
    return array.reshape(math.prod(array.shape[:-1]), array.shape[-1])


class ReferenceBackend(NumpyBackend):
    """A backend that obeys every law."""

    name = "reference"
    laws: tuple[str, ...] = ()  # those that a fault must break

    def unsupported(self) -> Mapping[str, str]:
        """Return nothing: it has every capability."""
        return {}

    # The steps

    def select(self, mask: Array, array: Array) -> Array:
        """Return ``where(mask, array, 0)``, in new memory."""
        return np.where(mask, array, array.dtype.type(0))

    def product(self, a: Array, b: Array) -> Array:
        """Return a · b, not yet rounded to a narrow dtype."""
        wide = np.promote_types(a.dtype, np.float32)
        return a.astype(wide) @ b.astype(wide)

    def output(self, x: Array, weight: Array, mask: Array, bias: Array | None) -> Array:
        """Return y, not yet rounded."""
        y = self.product(x, self.select(mask, weight).T)
        return y if bias is None else y + bias.astype(y.dtype)

    def input_gradient(self, g: Array, weight: Array, mask: Array) -> Array:
        """Return dx, not yet rounded."""
        return self.product(g, self.select(mask, weight))

    def weight_gradient(self, g: Array, x: Array, mask: Array) -> Array:
        """Return dW, not yet rounded."""
        return self.select(mask, self.product(flat(g).T, flat(x)))

    def bias_gradient(self, g: Array) -> Array:
        """Return db, not yet rounded."""
        return flat(g).sum(0, dtype=np.promote_types(g.dtype, np.float32))

    # The protocol

    def masked_linear(self, x: Array, weight: Array, mask: Array, bias: Array | None) -> Array:
        """Return y."""
        return self.output(x, weight, mask, bias).astype(x.dtype)

    def vjp(
        self, x: Array, weight: Array, mask: Array, bias: Array | None, g: Array, wrt: Sequence[str]
    ) -> Sequence[Array]:
        """Return the gradients asked for."""
        made = {
            "x": lambda: self.input_gradient(g, weight, mask),
            "weight": lambda: self.weight_gradient(g, x, mask),
            "bias": lambda: self.bias_gradient(g),
        }
        return [made[name]().astype(x.dtype) for name in wrt]

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
        """Return y and ẏ."""
        dy = np.zeros((*x.shape[:-1], weight.shape[0]), np.promote_types(x.dtype, np.float32))
        if dx is not None:
            dy = dy + self.product(dx, self.select(mask, weight).T)
        if dweight is not None:
            dy = dy + self.product(x, self.select(mask, dweight).T)
        if dbias is not None:
            dy = dy + dbias.astype(dy.dtype)
        return self.masked_linear(x, weight, mask, bias), dy.astype(x.dtype)

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
        """Return Hx, HW, Hb and Hg."""
        along_x = self.input_gradient(g, dweight, mask) + self.input_gradient(dg, weight, mask)
        along_weight = self.weight_gradient(g, dx, mask) + self.weight_gradient(dg, x, mask)
        along_bias = None if bias is None else self.bias_gradient(dg).astype(x.dtype)
        along_g = self.jvp(x, weight, mask, bias, dx, dweight, dbias)[1]
        return along_x.astype(x.dtype), along_weight.astype(x.dtype), along_bias, along_g

    def jvp_of_jvp(
        self,
        x: Array,
        weight: Array,
        mask: Array,
        bias: Array | None,
        tangent1: Sequence[Array | None],
        tangent2: Sequence[Array | None],
    ) -> Array:
        """Return what moves along both directions; the function is linear in x and in the weight."""
        parts = [
            self.product(one[0], self.select(mask, two[1]).T)
            for one, two in ((tangent1, tangent2), (tangent2, tangent1))
        ]
        return (parts[0] + parts[1]).astype(x.dtype)

    def both(self, x: Array, weight: Array, mask: Array, bias: Array | None, g: Array) -> list[Array]:
        """Return y, dx, dW and db."""
        wrt = ("x", "weight") if bias is None else ("x", "weight", "bias")
        found = [self.masked_linear(x, weight, mask, bias), *self.vjp(x, weight, mask, bias, g, wrt)]
        return found if len(found) == 4 else [*found, None]

    def autodiff_vjp(self, x: Array, weight: Array, mask: Array, bias: Array | None, g: Array) -> Any:
        """Return the spec's gradients: NumPy has no derivatives of its own."""
        return NumpyBackend.vjp(self, x, weight, mask, bias, g, ("x", "weight", "bias"))

    def dense(self, x: Array, weight: Array, bias: Array | None) -> Array:
        """Return the spec's value with a full mask."""
        return NumpyBackend.masked_linear(self, x, weight, np.ones(weight.shape, bool), bias)

    def vmap(
        self, axes: Sequence[int | None], x: Array, weight: Array, mask: Array, bias: Array | None, g: Array
    ) -> tuple[Array, ...]:
        """Return y, dx, dW and db of each problem, stacked."""
        arrays = (x, weight, mask, bias, g)
        count = next(a.shape[axis] for a, axis in zip(arrays, axes, strict=True) if axis is not None)
        found = [
            self.both(*(a if axis is None else np.take(a, i, axis) for a, axis in zip(arrays, axes, strict=True)))
            for i in range(count)
        ]
        return tuple(None if part[0] is None else np.stack(part) for part in zip(*found, strict=True))

    def derivative(self, derivative: str, *arrays: Array) -> Sequence[Array]:
        """Return ``jvp``, or ``hvp`` by a mode; compiled, the gradients or the Hessian too."""
        named: dict[str, Any] = {"jvp": self.jvp, "vjp": self.both, "hessian": self.hessian}
        return named.get(derivative, partial(self.hvp, mode=derivative))(*arrays)  # type: ignore[no-any-return]

    def hessian(self, x: Array, weight: Array, mask: Array, bias: Array | None, g: Array) -> Sequence[Array]:
        """Return the second derivatives of ⟨g, y⟩ by x and weight: g where a connection is live."""
        live = self.select(mask, np.ones_like(weight))
        mixed = np.einsum("...o,oj,ij->...ioj", g, live, np.eye(x.shape[-1], dtype=x.dtype))
        none = (np.zeros(side.shape * 2, x.dtype) for side in (x, weight))
        return next(none), mixed, np.moveaxis(mixed, (-2, -1), (0, 1)), next(none)

    def vmap_derivative(self, derivative: str, axes: Sequence[int | None], *arrays: Array) -> Sequence[Array]:
        """Return the derivatives of each problem, stacked."""
        count = next(len(array) for array, axis in zip(arrays, axes, strict=True) if axis is not None)
        found = [
            self.derivative(derivative, *(a if axis is None else a[i] for a, axis in zip(arrays, axes, strict=True)))
            for i in range(count)
        ]
        return [np.stack(part) for part in zip(*found, strict=True)]

    def compile_derivative(self, derivative: str, *arrays: Array) -> Sequence[Array]:
        """Call."""
        return self.derivative(derivative, *arrays)

    def transforms(self) -> Sequence[str]:
        """Return those that every backend has."""
        return ("compile", "checkpoint", "scan")

    def transformed(
        self, transform: str, x: Array, weight: Array, mask: Array, bias: Array | None, g: Array
    ) -> Sequence[Array]:
        """Return y, dx, dW and db by way of a transform."""
        return getattr(self, transform)(x, weight, mask, bias, g)  # type: ignore[no-any-return]

    def compile(self, *arguments: Array) -> Sequence[Array]:
        """Call."""
        return self.both(*arguments)

    def checkpoint(self, *arguments: Array) -> Sequence[Array]:
        """Call."""
        return self.both(*arguments)

    def scan(self, x: Array, weight: Array, mask: Array, bias: Array | None, g: Array) -> Sequence[Array]:
        """Call for one step after the other."""
        if not len(x):
            return self.both(x, weight, mask, bias, g)
        steps = [self.both(row, weight, mask, bias, along) for row, along in zip(x, g, strict=True)]
        y, dx, dweight, dbias = zip(*steps, strict=True)
        total = None if bias is None else self.added(dbias)
        return np.stack(y), np.stack(dx), self.added(dweight), total

    def added(self, steps: Sequence[Array]) -> Array:
        """Return the sum of what each step gave, in a wide type, rounded at the end."""
        return np.sum(steps, axis=0, dtype=np.promote_types(steps[0].dtype, np.float32)).astype(steps[0].dtype)

    def autocast(
        self, dtype: str, x: Array, weight: Array, mask: Array, bias: Array | None, g: Array
    ) -> Sequence[Array]:
        """Round the inputs, then call."""
        x, weight = x.astype(dtype), weight.astype(dtype)
        return self.both(x, weight, mask, None if bias is None else bias.astype(dtype), g)

    def layer(self, weight: Array, mask: Array, bias: Array | None) -> ReferenceLayer:
        """Return a layer."""
        return ReferenceLayer(self, weight, mask, bias)

    def join(self, rank: int, size: int, devices: int, folder: Path) -> None:
        """Meet in the folder."""
        self.ranks = Ranks(type(self).__name__, rank, size, devices, folder)

    def placements(self, kind: str) -> Sequence[str]:
        """Return one for each division."""
        return PLACEMENTS

    def distributed_layer(self, placement: str, weight: Array, mask: Array, bias: Array | None) -> ReferenceShared:
        """Return a layer that ranks share."""
        return ReferenceShared(self, placement, weight, mask, bias)

    def random_mask(self, shape: tuple[int, int], num_zeros: int, seed: int, shard: Shard, device: str) -> Array:
        """Return the mask, made by its definition."""
        words = self.words(seed, shape[0] * shape[1])
        places = words.astype(np.uint64) << np.uint64(32) | np.arange(words.size, dtype=np.uint64)
        mask = np.ones(words.size, bool)
        if num_zeros:
            mask = places > np.partition(places, num_zeros - 1)[num_zeros - 1]
        return mask.reshape(shape) if shard is None else mask.reshape(shape)[shard]

    def words(self, seed: int, count: int) -> Array:
        """Return the first words of the stream."""
        return masks.words(seed, 0, count)


class Mutant(ReferenceBackend):
    """What every mutant is: the reference backend but for one step, in the dtype that shows most faults."""

    def dtypes(self, device: str) -> Sequence[str]:
        """Return one of NumPy's: what is wrong in every precision is not run thrice."""
        return ("float32",)
