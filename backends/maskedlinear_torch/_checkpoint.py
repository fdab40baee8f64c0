"""Files of torch modules: what :func:`maskedlinear.checkpoint.save` writes of one, and how a file is loaded into one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from maskedlinear.checkpoint import MaskedArray, PlainArray
from maskedlinear.models import WeightAxes
from maskedlinear_torch._checkpoint_load import load_into
from maskedlinear_torch._checkpoint_optimizer import arrays_of_optimizer
from maskedlinear_torch._checkpoint_ranks import save_together
from maskedlinear_torch._checkpoint_roles import axes_and_role
from maskedlinear_torch._checkpoint_state import StateArray, cut_of, dtype_name, on_host, state_arrays, why_not_saved
from maskedlinear_torch._import_masks import warn_of_foreign_masks
from maskedlinear_torch._masked_weight import MaskedWeight
from maskedlinear_torch._weights import walk_masked

__all__ = ["arrays_of", "framework_of", "load_into", "masked_names", "save_together"]

Array = PlainArray | MaskedArray


def framework_of(model: nn.Module) -> str:
    """Return what a file calls the framework of this model."""
    return "torch"


def masked_names(model: nn.Module) -> list[str]:
    """Return the names of the weights that have something masked."""
    layers = dict(walk_masked(model))
    return [
        name
        for name, one in layers.items()
        if not (isinstance(one, MaskedWeight) and one.mask.is_meta) and one.sparsity
    ]


def arrays_of(model: nn.Module, *, dormant: bool = False, optimizer: Any = None) -> Mapping[str, Array]:
    """Return what a file holds of a model: its state, masked weights as their live values and masks.

    They are read when their turn comes, one at a time; under FSDP2 and tensor parallelism by all processes together. What
    has several names is one object under all of them.

    Args:
        model: any module.
        dormant: whether dormant values are there too.
        optimizer: a ``torch.optim.Optimizer`` of the model, whose state is there too, by names that begin with
            ``"optimizer/"``.

    Raises:
        TypeError: if it is no module, or the state has something that no file holds; all of it is named.
        ValueError: if an array of the model is called as one of the optimizer's.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"save takes the model, a torch.nn.Module, itself; got {type(model).__name__}")
    warn_of_foreign_masks(model, stacklevel=5)
    state = state_arrays(model)
    refused = {name: why for name, array in state.items() if (why := why_not_saved(array))}
    if refused:
        told = "; ".join(f"{name} is {why}" for name, why in list(refused.items())[:10])
        raise TypeError(f"a file cannot hold {len(refused)} of the model's arrays: {told}")
    arrays: dict[str, Array] = {}
    made: dict[int, Array] = {}
    slot: dict[str, Any] = {}
    for name, array in state.items():
        if id(array.value) not in made:
            made[id(array.value)] = _array_of(array, dormant, slot)
        arrays[name] = made[id(array.value)]
    if optimizer is not None:
        of_optimizer = arrays_of_optimizer(optimizer, state)
        if both := arrays.keys() & of_optimizer.keys():
            raise ValueError(f"{min(both)} is the name of an array of the model and of one of the optimizer: rename it")
        arrays |= of_optimizer
    return arrays


def _array_of(array: StateArray, dormant: bool, slot: dict[str, Any]) -> Array:
    value, dtype = array.value, dtype_name(array.value.dtype)
    axes, role = axes_and_role(array)
    if array.mask_of is None and array.mask is None and array.sparse is None:
        return PlainArray(dtype, array.shape, lambda: on_host(value), axes, role)
    return _TorchArray(array, dormant, slot, dtype, axes, role)


class _TorchArray(MaskedArray):
    """A masked weight whose entries are read when they are asked for: those of one at a time are on the host.

    Args:
        array: the weight.
        dormant: whether its dormant values are asked for.
        slot: of all weights of a model, where the last one that was read has its places.
        dtype: as files call it.
        axes: what its axes mean.
        role: what it is to its module.
    """

    _array: StateArray
    _wants_dormant: bool
    _slot: dict[str, Any]

    def __init__(
        self,
        array: StateArray,
        dormant: bool,
        slot: dict[str, Any],
        dtype: str,
        axes: WeightAxes | None,
        role: str,
    ) -> None:
        layer: Any = array.sparse or array.mask
        vars(self).update(  # past what keeps it frozen
            shape=array.shape,
            dtype=dtype,
            axes=axes,
            form="dense" if array.sparse is None else "sparse",
            role=role,
            recipe=getattr(layer, "recipe", None),
            _array=array,
            _wants_dormant=dormant,
            _slot=slot,
        )

    @property
    def places(self) -> NDArray[np.int64]:
        array, slot = self._array, self._slot
        if slot.get("of") is not self:
            if array.sparse is not None:
                places = array.sparse.pattern.places
            else:
                places = np.flatnonzero(on_host(array.value if array.mask is None else array.mask.mask))
            slot.update({"of": self, "places": places})
        found: NDArray[np.int64] = slot["places"]
        return found

    @property
    def values(self) -> NDArray[Any]:
        held = on_host(self._array.value, cut_of(self._array.sparse))
        return held if self._array.sparse is not None else held.reshape(-1)[self.places]

    @property
    def dormant(self) -> NDArray[Any] | None:
        mask = self._array.mask
        if not self._wants_dormant or mask is None or mask.dormant is None:
            return None
        hidden = on_host(mask.dormant.to(self._array.value.dtype)).reshape(-1)
        found: NDArray[Any] = hidden[~on_host(mask.mask).reshape(-1)]
        return found
