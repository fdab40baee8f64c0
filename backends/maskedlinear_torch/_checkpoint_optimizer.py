"""The states of optimizers in files: of masked weights what they keep of live entries, where the rest is all the same."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskedlinear.checkpoint import CheckpointError, CheckpointFile, MaskedArray, PlainArray
from maskedlinear.checkpoint._arrays import OPTIMIZER_ROLE
from maskedlinear.checkpoint._json import dumps, loads
from maskedlinear.checkpoint._names import OPTIMIZER
from maskedlinear.checkpoint._structure import Path, decode, encode
from maskedlinear.pattern import SparsityPattern
from maskedlinear_torch._checkpoint_state import DTYPES, StateArray, cut_of, dtype_name, from_host, on_host
from maskedlinear_torch._dtensors import as_dtensor_like

__all__ = ["OptimizerState", "arrays_of_optimizer"]

Optimizer = torch.optim.Optimizer

_STRUCTURE = f"{OPTIMIZER}structure"


def arrays_of_optimizer(optimizer: Optimizer, state: Mapping[str, StateArray]) -> dict[str, PlainArray]:
    """Return what a file holds of the optimizer of a model with this state: its tensors, and, as JSON, all that is none.

    Raises:
        TypeError: if it is no optimizer, or its state has something that no file holds.
    """
    parameters = _parameters(optimizer, state)
    arrays: dict[str, PlainArray] = {}

    def put(value: Any, path: Path) -> dict[str, Any] | None:
        if not isinstance(value, Tensor):
            return None
        if value.dtype not in DTYPES.values() or value.is_meta or value.layout is not torch.strided:
            raise TypeError(
                f"no file holds {'.'.join(map(str, path))}: {value.dtype}, {value.layout}, on {value.device}"
            )
        dtype = dtype_name(value.dtype)
        if not value.dim():
            return {"scalar": dtype, "bits": on_host(value).tobytes().hex()}
        name = OPTIMIZER + "/".join(map(str, path))
        if name in arrays or name == _STRUCTURE:
            raise TypeError(f"two tensors of the optimizer's state are called {name}: rename one")
        arrays[name] = PlainArray(dtype, tuple(value.shape), lambda: on_host(value))
        index = path[1] if len(path) > 2 and path[0] == "state" and isinstance(path[1], int) else len(parameters)
        weight, array, parameter = parameters[index] if index < len(parameters) else ("", None, None)
        if array is None or parameter is None or value.shape != parameter.shape or not array.holds_mask:
            return {"tensor": name}
        if array.mask is None:
            if (cut := cut_of(array.sparse)) is not None:
                arrays[name] = PlainArray(dtype, (cut.pattern.nnz,), lambda: on_host(value, cut))
            return {"tensor": name, "at": weight}
        mask = array.mask.mask
        live, held = on_host(mask).reshape(-1), on_host(value).reshape(-1)
        hidden = held[~live].view(np.uint8).reshape(-1, value.itemsize)
        if len(hidden) and (hidden != hidden[0]).any():
            return {"tensor": name, "like": weight}
        arrays[name] = PlainArray(
            dtype, (int(live.sum()),), lambda: on_host(value).reshape(-1)[on_host(mask).reshape(-1)]
        )
        return {"tensor": name, "at": weight, "fill": hidden[:1].tobytes().hex()}

    told = {
        "class": type(optimizer).__name__,
        "parameters": [[name, [int(n) for n in _shape(array, value)]] for name, array, value in parameters],
        "state": encode(optimizer.state_dict(), put),
    }
    text = np.frombuffer(dumps(told).encode(), np.uint8)
    arrays[_STRUCTURE] = PlainArray("U8", text.shape, lambda: text)
    return {name: replace(array, role=OPTIMIZER_ROLE) for name, array in arrays.items()}


def _parameters(optimizer: Any, state: Mapping[str, StateArray]) -> list[tuple[str, StateArray | None, Tensor]]:
    """Return an optimizer's parameters in the order in which its state counts them, with the names that files have."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer; got {type(optimizer).__name__}")
    names: dict[int, tuple[str, StateArray]] = {}
    for name, array in state.items():
        names.setdefault(id(array.value), (name, array))
    return [(*names.get(id(value), ("", None)), value) for group in optimizer.param_groups for value in group["params"]]


def _shape(array: StateArray | None, value: Tensor) -> tuple[int, ...]:
    return tuple(value.shape) if array is None else array.shape


class OptimizerState:
    """A file's state of an optimizer, read and checked, so that nothing is changed if it does not fit.

    Raises:
        CheckpointError: if the file has none, or that of another optimizer or other parameters, or contradicts itself.
    """

    def __init__(self, optimizer: Optimizer, state: Mapping[str, StateArray], file: CheckpointFile) -> None:
        self._optimizer, self._file = optimizer, file
        self._parameters = _parameters(optimizer, state)
        self._weight: tuple[str, MaskedArray | PlainArray] | None = None  # the last one that was read
        if _STRUCTURE not in file:
            raise CheckpointError(
                "the file has no state of an optimizer of PyTorch: save it with optimizer=..., or load without it"
            )
        try:
            told = loads(self._plain(_STRUCTURE).tobytes().decode())
            if not isinstance(told, dict) or told.keys() != {"class", "parameters", "state"}:
                raise ValueError("it has no class, parameters and state")
            self._check(told)
            self._state = decode(told["state"], self._tensor)
            self._check_groups()
        except CheckpointError:
            raise
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"what the file says of the optimizer is wrong: {str(error)[:500]}") from error
        finally:
            self._weight = None

    def apply(self) -> None:
        """Give the optimizer this state; if it refuses, it has its own as it was."""
        optimizer: Any = self._optimizer
        state, groups = optimizer.state, optimizer.param_groups
        before = {key: copy(held) for key, held in state.items()}, [dict(group) for group in groups]
        try:
            optimizer.load_state_dict(self._state)
        except BaseException:
            state.clear()
            state.update(before[0])
            for group, held in zip(groups, before[1], strict=True):
                group.clear()
                group.update(held)
            optimizer.state, optimizer.param_groups = state, groups
            raise

    def _check(self, told: Mapping[str, Any]) -> None:
        if told["class"] != type(self._optimizer).__name__:
            raise CheckpointError(
                f"the file has the state of the optimizer {str(told['class'])[:100]!r}; got {type(self._optimizer).__name__}"
            )
        here = [[name, list(_shape(array, value))] for name, array, value in self._parameters]
        there = told["parameters"]
        if not isinstance(there, list):
            raise ValueError("it has no parameters")
        misfits = [
            f"{number}: {str(theirs)[:100]} in the file, {ours} here"
            for number, (ours, theirs) in enumerate(zip(here, there, strict=False))
            if ours != theirs
        ]
        if len(here) != len(there) or misfits:
            raise CheckpointError(
                f"the optimizer has {len(here)} parameters, and {len(there)} in the file: make it, of this model's "
                "parameters as they are now, as that one was made, in the same order and groups; those that differ:"
                + "".join(f"\n  {misfit}" for misfit in misfits)
            )

    def _check_groups(self) -> None:
        state = self._state
        groups = state.get("param_groups") if isinstance(state, dict) else None
        if not isinstance(groups, list) or not isinstance(state.get("state"), dict):
            raise ValueError("it has no param_groups and state")
        for group in groups:
            numbers = group.get("params") if isinstance(group, dict) else None
            if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
                raise ValueError("its groups have no parameters")
        sizes = [len(group["params"]) for group in self._optimizer.param_groups]
        if [len(group["params"]) for group in groups] != sizes:
            raise CheckpointError(f"the optimizer has groups of {sizes} parameters, and others in the file")

    def _tensor(self, told: Mapping[str, Any], path: Path) -> Tensor:
        if told.keys() == {"scalar", "bits"}:
            dtype = told["scalar"]
            number = bytearray.fromhex(told["bits"]) if isinstance(told["bits"], str) else b""
            if not isinstance(dtype, str) or dtype not in DTYPES or len(number) != DTYPES[dtype].itemsize:
                raise ValueError(f"no scalar: {str(told)[:100]}")
            return torch.frombuffer(number, dtype=DTYPES[dtype]).reshape(()).clone()
        name, weight = told.get("tensor"), told.get("at", told.get("like"))
        if not isinstance(name, str) or told.keys() - {"tensor", "at", "like", "fill"}:
            raise ValueError(f"no tensor: {str(told)[:100]}")
        held, dtype = self._plain(name), self._file.told(name).dtype
        index = path[1] if len(path) > 2 and path[0] == "state" and isinstance(path[1], int) else -1
        own, array, parameter = self._parameters[index] if 0 <= index < len(self._parameters) else ("", None, None)
        if weight is not None:
            if weight != own or array is None or not weight:
                raise ValueError(f"{name} belongs to {str(weight)[:100]}, and not to {own!r}")
            held = self._of_weight(held, told, weight, array)
        tensor = from_host(held, dtype)
        if weight is not None and array is not None and (cut := cut_of(array.sparse)) is not None:
            assert self._weight is not None  # it has the connections that the layer will have
            source, shape = self._weight[1], array.shape
            pattern = (
                source.pattern() if isinstance(source, MaskedArray) else SparsityPattern.full((shape[0], shape[1]))
            )
            return replace(cut, pattern=pattern).shared_out(tensor.to(array.value.device))
        if parameter is not None and tensor.shape == parameter.shape:
            return as_dtensor_like(tensor, parameter)
        return tensor

    def _plain(self, name: str) -> NDArray[Any]:
        array = self._file.array(name) if name.startswith(OPTIMIZER) and name in self._file else None
        if not isinstance(array, PlainArray):
            raise ValueError(f"no array without a mask is called {name[:100]!r}")
        return array.data()

    def _of_weight(self, held: NDArray[Any], told: Mapping[str, Any], weight: str, array: StateArray) -> NDArray[Any]:
        """Return what an optimizer keeps of a weight, in the form that the weight has in the model."""
        if self._weight is None or self._weight[0] != weight:
            self._weight = weight, self._file.array(weight)
        source = self._weight[1]
        size = int(np.prod(array.shape, dtype=np.int64))
        places = source.places if isinstance(source, MaskedArray) else np.arange(size)
        if "like" in told:
            if held.shape != array.shape:
                raise ValueError(f"{told['tensor']} has the shape {held.shape}, and its weight {array.shape}")
            return held if array.sparse is None else held.reshape(-1)[places]
        if held.shape != (len(places),):
            raise ValueError(f"{told['tensor']} has the shape {held.shape}, and its weight {len(places)} live entries")
        if array.sparse is not None:
            return held
        whole = np.zeros(size, held.dtype)
        fill = bytes.fromhex(str(told.get("fill", "")))
        if len(fill) not in (0, held.itemsize):
            raise ValueError(f"{told['tensor']} has {len(fill)} bytes under the mask")
        if fill:
            whole[:] = np.frombuffer(fill, held.dtype)[0]
        whole[places] = held
        return whole.reshape(array.shape)
