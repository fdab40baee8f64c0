"""``ReferenceLayer``: a layer in plain NumPy with the storage of real ones, made of small steps for mutants to replace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np

from maskedlinear import checkpoint, masks
from maskedlinear.models import WeightAxes

__all__ = ["ReferenceLayer"]

Array = Any


class ReferenceLayer:
    """A layer whose weight is +0 under the mask, with what is dormant apart.

    Edits are counted as a framework counts them: those in place, and steps of optimizers, but neither what is written past
    the count, as by ``.data``, nor that a fused optimizer moves this weight. What they leave under the mask is projected
    away before the layer next acts. Layers that share a weight share all that is stored of it.
    """

    optimizers: Sequence[str] = ("momentum and decay", "fused momentum and decay")
    weight_edits: Sequence[str] = ("uncounted", "another array")

    def __init__(self, backend: Any, weight: Array, mask: Array, bias: Array | None) -> None:
        self.backend = backend
        self.stored = SimpleNamespace(weight=weight, mask=mask.copy(), dormant=None, edits=0, mask_edits=0, steps=0)
        self.bias = None if bias is None else bias.copy()
        self.divide(weight)

    # What is stored

    @property
    def weight(self) -> Array:
        """The weight that other code reads."""
        return self.stored.weight

    @weight.setter
    def weight(self, weight: Array) -> None:
        self.stored.weight = weight

    @property
    def mask(self) -> Array:
        """The mask."""
        return self.stored.mask

    @mask.setter
    def mask(self, mask: Array) -> None:
        self.stored.mask = mask

    @property
    def dormant(self) -> Array:
        """What is dormant, 0 where the weight is live."""
        return self.stored.dormant

    @dormant.setter
    def dormant(self, dormant: Array) -> None:
        self.stored.dormant = dormant

    # The steps

    def select(self, mask: Array, values: Array) -> Array:
        """Return ``where(mask, values, 0)``."""
        return self.backend.select(mask, values)

    def divide(self, full: Array) -> None:
        """Write full values into weight and dormant, by the mask."""
        self.weight = self.select(self.mask, full)
        self.dormant = self.put_aside(full)
        self.note()

    def put_aside(self, full: Array) -> Array:
        """Return what is dormant of full values."""
        return np.where(self.mask, full.dtype.type(0), full)

    def full(self) -> Array:
        """Return live and dormant values together."""
        self.project()
        return np.where(self.mask, self.weight, self.dormant)

    def counted(self) -> tuple[Any, ...]:
        """Return what changes when the weight may have drifted."""
        return id(self.weight), self.stored.edits, self.stored.steps, self.stored.mask_edits

    def note(self) -> None:
        """Note that the weight is +0 under the mask."""
        self.stored.clean, self.stored.seen = self.counted(), self.mask.copy()

    def project(self) -> None:
        """Bring weight, mask and dormant values into line."""
        if self.stored.clean != self.counted():
            off = self.stored.seen & ~self.mask
            self.dormant = np.where(off, self.weight, np.where(self.mask, self.weight.dtype.type(0), self.dormant))
            self.weight = self.select(self.mask, self.weight)
            self.note()

    def gradient_hook(self, gradient: Array) -> Array:
        """Return what the weight takes of a gradient, whoever sends it."""
        return self.backend.select(self.mask, gradient)

    def guard(self) -> Callable[[Array], Array]:
        """Return what an updated weight becomes under ``freeze_masked``."""
        return lambda moved: self.backend.select(self.mask, moved)

    def kept(self, name: str, array: Array) -> Array:
        """Return what of ``array`` a file keeps."""
        return array

    # The protocol

    def __call__(self, x: Array) -> Array:
        """Return y."""
        self.project()
        return self.backend.masked_linear(x, self.weight, np.ones_like(self.mask), self.bias)

    def gradients(self, x: Array, g: Array) -> tuple[Array, Array, Array | None]:
        """Return dx, dW and db."""
        self.project()
        found = self.backend.both(x, self.weight, self.mask, self.bias, g)
        return found[1], found[2], found[3]

    def set_mask(self, mask: Any) -> None:
        """Replace the mask."""
        mask, full = np.array(masks.as_mask(mask, self.weight.shape)), self.full()
        self.mask = mask
        self.divide(full)

    def edit_mask(self, mask: Array) -> None:
        """Write into the mask, and count it."""
        self.mask = mask.copy()
        self.stored.mask_edits += 1

    def set_weight(self, weight: Array) -> None:
        """Write into the weight, and count it."""
        self.weight[...] = weight
        self.stored.edits += 1

    def edit_weight(self, edit: str, weight: Array) -> None:
        """Write into the weight and count nothing, or put another array in its place."""
        if edit == "uncounted":
            self.weight[...] = weight
        else:
            self.weight = weight.copy()

    def visible_weight(self) -> Array:
        """Return the weight as it stands."""
        return self.weight.copy()

    def state(self) -> tuple[Array, Array, Array | None]:
        """Return weight, mask and bias."""
        to_numpy = self.backend.asnumpy
        return to_numpy(self.full()), to_numpy(self.mask), None if self.bias is None else to_numpy(self.bias)

    def save(self, path: Path) -> None:
        """Write what there is."""
        self.project()
        parts = {"weight": self.weight, "mask": self.mask, "dormant": self.dormant}
        parts |= {} if self.bias is None else {"bias": self.bias}
        np.savez(path / "state.npz", **{name: self.kept(name, array) for name, array in parts.items()})

    def load(self, path: Path) -> None:
        """Read it again."""
        with np.load(path / "state.npz") as parts:
            for name in parts:
                setattr(self, name, parts[name].astype(getattr(self, name).dtype))
        self.note()

    def save_file(self, path: Path, *, dormant: bool = False) -> None:
        """Write weight and bias."""
        self.project()
        weight = checkpoint.MaskedArray.of(self.full(), self.mask, dormant=dormant, axes=WeightAxes())
        arrays = {"weight": weight} | ({} if self.bias is None else {"bias": checkpoint.PlainArray.of(self.bias)})
        checkpoint.save(self.in_file(arrays), path)

    def in_file(self, arrays: dict[str, Any]) -> dict[str, Any]:
        """Return what of these arrays a file holds."""
        return arrays

    def load_file(self, path: Path) -> None:
        """Check what there is, and take it."""
        arrays: dict[str, Any] = checkpoint.load(path)
        self.check_file(arrays)
        weight = arrays["weight"]
        self.bias = arrays["bias"].numpy().astype(self.weight.dtype) if "bias" in arrays else None
        self.mask = weight.mask()
        self.divide(weight.numpy(dormant=True).astype(self.weight.dtype))

    def check_file(self, arrays: dict[str, Any]) -> None:
        """Refuse the arrays of another layer."""
        if arrays["weight"].shape != self.weight.shape:
            raise checkpoint.CheckpointError(f"the layer has {self.weight.shape}; got {arrays['weight'].shape}")

    def load_plain(self, path: Path) -> Callable[[Array], Array]:
        """Return a dense layer of the weight and the bias in the file."""
        with np.load(path / "state.npz") as parts:
            weight, bias = parts["weight"], parts.get("bias")
        return lambda x: self.backend.dense(x, weight, bias)

    def load_other(self, weight: Array, mask: Array | None, bias: Array | None) -> None:
        """Take the values, and divide them."""
        self.bias = None if bias is None else bias.copy()
        if mask is not None:
            self.mask = mask.copy()
        self.divide(weight)

    def convert(self, dtype: str) -> None:
        """Convert all that has a dtype."""
        self.project()
        self.weight, self.dormant = self.weight.astype(dtype), self.dormant.astype(dtype)
        self.bias = None if self.bias is None else self.bias.astype(dtype)
        self.note()

    def sharer(self) -> Self:
        """Return a layer with the same storage."""
        other = type(self)(self.backend, self.full(), self.mask, self.bias)
        other.stored = self.stored
        return other

    def reader_gradient(self, x: Array, g: Array) -> Array:
        """Return what a product with the weight sends it."""
        return self.gradient_hook(self.backend.weight_gradient(g, x, self.mask | True)).astype(x.dtype)

    def frozen_step(self, optimizer: str) -> Callable[[Array, Array], None]:
        """Return a step with momentum and weight decay, held to the mask."""
        return self.step(optimizer, self.guard())

    def unguarded_step(self, optimizer: str) -> Callable[[Array, Array], None]:
        """Return the same without a guard."""
        return self.step(optimizer, lambda moved: moved)

    def step(self, optimizer: str, guard: Callable[[Array], Array]) -> Callable[[Array, Array], None]:
        """Return a step with momentum and weight decay; a fused one counts no edit."""
        momentum = np.zeros_like(self.weight)

        def step(x: Array, g: Array) -> None:
            nonlocal momentum
            _, gradient, along_bias = self.gradients(x, g)
            momentum = momentum * 0.5 + gradient + 0.125 * self.weight
            self.weight[...] = guard(self.weight - 0.25 * momentum)
            self.stored.steps += 1
            self.stored.edits += not optimizer.startswith("fused")
            if self.bias is not None and along_bias is not None:
                self.bias = (self.bias - 0.25 * along_bias).astype(self.bias.dtype)

        return step
