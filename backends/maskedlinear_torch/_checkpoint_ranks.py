"""One file of a model that several processes have: the first of them writes it, the others wait, and all learn of an error.

Of weights that are cut over processes, all put together the one that the writer asks for, one at a time.
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from threading import Timer
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from maskedlinear.checkpoint import MaskedArray, PlainArray
from maskedlinear_torch._dtensors import is_sharded
from maskedlinear_torch._ranks import Group

__all__ = ["save_together"]

Array = PlainArray | MaskedArray
Arrays = Mapping[str, Array]

_PATIENCE = 30.0  # seconds, after which it is said that processes are waited for


def save_together(
    model: nn.Module, path: os.PathLike[str], make: Callable[[], Arrays], write: Callable[[Arrays], None]
) -> None:
    """Save a model into one file, by all processes that share it: those of ``DistributedDataParallel`` or of DTensors.

    A model that this process has alone it saves alone.

    Args:
        model: the model.
        path: the file.
        make: returns the model's arrays, to be read when they are asked for.
        write: writes them.

    Raises:
        ValueError: in all processes, if they name different files.
        Exception: in all processes, what one of them has met.
    """
    groups, is_cut = _groups_of(model)
    if not groups:
        write(make())
        return
    arrays: Arrays = {}
    failure: BaseException | None = None
    try:
        arrays = make()
    except BaseException as error:
        failure = error
    _begin(path, failure, groups)
    if all(distributed.get_rank(group) == 0 for group in groups):
        try:
            write(_announced(arrays, lambda part: _gathered(part, groups)) if is_cut else arrays)
        except BaseException as error:
            failure = error
        _gathered(("end", _portable(failure)), groups)
        if failure is not None:
            raise failure
        return
    while True:
        part, of = next(said for said in _gathered(None, groups) if said is not None)
        if part == "end":
            break
        read = getattr(arrays[of], part)
        if part == "data":
            read()
    if of is not None:
        of.add_note("in the process that writes the file for all")
        raise of


def _groups_of(model: nn.Module) -> tuple[list[Group], bool]:
    """Return the groups through which, one after the other, all processes of a model are reached; and if it is cut."""
    if not isinstance(model, nn.Module) or not distributed.is_available() or not distributed.is_initialized():
        return [], False
    parallel = [module.process_group for module in model.modules() if isinstance(module, DistributedDataParallel)]
    tensors: list[Any] = [tensor for tensor in (*model.parameters(), *model.buffers()) if is_sharded(tensor)]
    meshes = sorted(dict.fromkeys(tensor.device_mesh for tensor in tensors), key=lambda mesh: -mesh.size())
    groups: list[Group]
    if meshes and not parallel and all(set(_ranks(mesh)) <= set(_ranks(meshes[0])) for mesh in meshes):
        groups = [meshes[0].get_group(number) for number in range(meshes[0].ndim)]
    elif parallel and not meshes and all(group == parallel[0] for group in parallel):
        groups = parallel[:1]
    else:
        groups = [distributed.group.WORLD] if parallel or meshes else []
    return [group for group in groups if distributed.get_world_size(group) > 1], bool(meshes)


def _ranks(mesh: Any) -> list[int]:
    found: list[int] = mesh.mesh.flatten().tolist()
    return found


def _gathered(own: Any, groups: list[Group]) -> list[Any]:
    """Return what each process has, in all of them."""
    found = [own]
    for group in groups:
        every: list[Any] = [None] * distributed.get_world_size(group)
        distributed.all_gather_object(every, found, group=group)
        found = [one for part in every for one in part]
    return found


def _begin(path: os.PathLike[str], failure: BaseException | None, groups: list[Group]) -> None:
    """Wait for all, and raise an error in all of them if one has met one, or names another file."""
    waiting = Timer(_PATIENCE, warnings.warn, [_WAITING])
    waiting.daemon = True
    waiting.start()
    try:
        every = _gathered((os.fspath(path), _portable(failure)), groups)
    finally:
        waiting.cancel()
    if failure is not None:
        raise failure
    for _, error in every:
        if error is not None:
            error.add_note("in another process of the model")
            raise error
    if len(paths := {name for name, _ in every}) > 1:
        raise ValueError(
            f"processes that share a model save it into one file; got {', '.join(sorted(paths))}: give all the same path, "
            "or, of DistributedDataParallel, save model.module, which one saves alone"
        )


_WAITING = (
    "checkpoint.save waits for the other processes that share the model: call it in all of them, or, of "
    "DistributedDataParallel, save model.module, which one saves alone"
)


def _portable(error: BaseException | None) -> BaseException | None:
    """Return an error that can be sent to other processes, and raised there."""
    if error is None:
        return None
    try:
        if isinstance(error, Exception):
            pickle.loads(pickle.dumps(error))
            return error
    except Exception:  # of anyone's own classes
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")


def _announced(arrays: Arrays, say: Callable[[tuple[str, str]], Any]) -> Arrays:
    """Return arrays of which it is said, before a part is read, which one it is, so that all processes read it."""
    made: dict[int, Array] = {}
    last: dict[str, Any] = {}
    for name, array in arrays.items():
        if id(array) not in made:
            made[id(array)] = (
                _Announced(array, name, say, last) if isinstance(array, MaskedArray) else _plain(array, name, say)
            )
    return {name: made[id(array)] for name, array in arrays.items()}


def _plain(array: PlainArray, name: str, say: Callable[[tuple[str, str]], Any]) -> PlainArray:
    def data() -> NDArray[Any]:
        say(("data", name))
        return array.data()

    return replace(array, data=data)


class _Announced(MaskedArray):
    """A masked weight whose parts are read in all processes at once, and kept here until another weight's are.

    Args:
        whole: the weight.
        name: its name.
        say: tells all processes which part of which weight they shall read.
        last: of all weights of a model, where the last one that was read has its parts.
    """

    _whole: MaskedArray
    _name: str
    _say: Callable[[tuple[str, str]], Any]
    _last: dict[str, Any]

    def __init__(
        self, whole: MaskedArray, name: str, say: Callable[[tuple[str, str]], Any], last: dict[str, Any]
    ) -> None:
        told = {key: getattr(whole, key) for key in ("shape", "dtype", "axes", "form", "role", "recipe")}
        vars(self).update(told, _whole=whole, _name=name, _say=say, _last=last)  # past what keeps it frozen

    def _read(self, part: str) -> Any:
        if self._last.get("of") is not self:
            self._last.clear()
            self._last["of"] = self
        if part not in self._last:
            self._say((part, self._name))
            self._last[part] = getattr(self._whole, part)
        return self._last[part]

    @property
    def places(self) -> NDArray[np.int64]:
        found: NDArray[np.int64] = self._read("places")
        return found

    @property
    def values(self) -> NDArray[Any]:
        found: NDArray[Any] = self._read("values")
        return found

    @property
    def dormant(self) -> NDArray[Any] | None:
        found: NDArray[Any] | None = self._read("dormant")
        return found
