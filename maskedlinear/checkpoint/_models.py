"""``save``, ``load`` and ``load_into``: whole models of any framework, which each backend takes apart and puts together.

No framework is imported here: of a model that is given, its own is there already.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from maskedlinear._extras import missing_framework
from maskedlinear.checkpoint._arguments import as_metadata, as_path, check_flag, check_names
from maskedlinear.checkpoint._arrays import MaskedArray, PlainArray, by_name
from maskedlinear.checkpoint._errors import CheckpointError
from maskedlinear.checkpoint._file import CheckpointFile, read_arrays, save_arrays
from maskedlinear.checkpoint._values import Codec
from maskedlinear.checkpoint._wirings import as_texts
from maskedlinear.models import first_names

__all__ = ["load", "load_into", "save"]

_TREES = "maskedlinear_jax._checkpoint"
_BACKENDS = {
    "torch": "maskedlinear_torch._checkpoint",
    "flax": "maskedlinear_jax.flax._checkpoint",
    "jax": _TREES,
    "jaxlib": _TREES,
}


def save(
    model: Any,
    path: str | os.PathLike[str],
    *,
    dormant: bool = False,
    values: Codec = "raw",
    masks: Any = None,
    optimizer: Any = None,
    metadata: Mapping[str, str] | None = None,
    wirings: Mapping[str, Any] | None = None,
) -> None:
    """Save a model: of masked weights the live values and the mask, as small as it gets, and all else as it is.

    Processes that share a model, wrapped in ``DistributedDataParallel`` or cut by FSDP2 or tensor parallelism, all call it,
    with one path: the first writes the file, one weight after the other, and all return, or raise, when it is there.

    Args:
        model: a ``torch.nn.Module``; an nnx module, with the state of its random numbers; the variables of a linen one; a
            tree of parameters, of JAX or of NumPy; or arrays by name (NumPy's, or :class:`MaskedArray` and
            :class:`PlainArray`).
        path: the file, by custom called ``.safetensors``, which it is. It is written whole or not at all.
        dormant: whether dormant values are saved, for training to go on with; the framework's own checkpoints have them.
            Of arrays by name they are saved wherever a :class:`MaskedArray` has them.
        values: ``"raw"``, or ``"pcodec"`` for live values through pcodec where that makes them smaller: by a third or more
            in bfloat16, a sixth in float32. It needs ``maskedlinear[pcodec]``, to load too.
        masks: the masks of a tree of parameters, as :func:`maskedlinear.jax.prune_tree` returns them.
        optimizer: of the model, whose state is saved too, for training to go on as if it had not stopped: a
            ``torch.optim.Optimizer``, an ``nnx.Optimizer`` or an optax state.
        metadata: strings by name, to be found again in :attr:`CheckpointFile.metadata`.
        wirings: what the nodes of layers are called, a :class:`maskedlinear.masks.Wiring` each, by the names of the layers
            (as ``get_masks`` calls their weights); :func:`wirings` returns them.

    Arrays of JAX's that several processes have parts of are gathered one after the other: all of the processes must call
    this, the first writes, and the others wait for it, and keep none.

    Raises:
        TypeError: if ``model`` is none of these, or holds what a file cannot; inside ``jit``; if another argument is of a
            type that it cannot be of.
        ValueError: if ``masks`` or ``wirings`` do not fit.
        ModuleNotFoundError: if pcodec is asked for and not installed.
        OSError: if the file cannot be written; what it was stays.
    """
    path, metadata = as_path(path), as_metadata(metadata, "maskedlinear")
    check_flag("dormant", dormant)
    backend = _backend_of(model, is_tree=masks is not None or optimizer is not None)
    if backend is not None:
        if masks is not None and backend.framework_of(model) != "tree":
            raise ValueError("masks= is for trees of parameters; this model has its own: set them by set_masks")
        make = partial(backend.arrays_of, model, dormant=dormant, **_given(masks=masks, optimizer=optimizer))
        framework = backend.framework_of(model)
        names = as_texts(model, wirings, framework)
        told = {"values": values, "framework": framework, "metadata": metadata, "wirings": names}
        backend.save_together(model, path, make, lambda arrays: save_arrays(arrays, path, **told))
        return
    if not isinstance(model, Mapping):
        raise TypeError(
            "save takes a torch.nn.Module, an nnx module, linen's variables, a tree, or arrays by name; got "
            f"{type(model).__name__}: give arrays as a dictionary"
        )
    _refuse_state(model, "save the model, or checkpoint.read(state), which finds masks by their names")
    arrays = {
        name: array if isinstance(array, PlainArray | MaskedArray) else PlainArray.of(np.asarray(array))
        for name, array in by_name(model).items()
    }
    save_arrays(arrays, path, values=values, metadata=metadata, wirings=as_texts(arrays, wirings, ""))


def load(path: str | os.PathLike[str], *, mmap: bool = False) -> dict[str, PlainArray | MaskedArray]:
    """Return all arrays of a checkpoint, whatever framework wrote it; ``.numpy()`` is an array of NumPy's.

    What has several names is one object under all of them, as :func:`save` takes it.

    Args:
        path: a file that :func:`save` wrote, or any safetensors file.
        mmap: whether plain arrays and live values are read-only views of the file, mapped into memory; what this asks of the
            file is said at :func:`open`.

    Raises:
        CheckpointError: if the file is damaged, or of a later version.
        OSError: if it cannot be read, or not be mapped.
        TypeError: if an argument is of a type that it cannot be of.
    """
    with CheckpointFile(path, mmap=mmap) as file:
        return read_arrays(file)


def load_into(
    model: Any,
    path: str | os.PathLike[str],
    *,
    names: Mapping[str, str] | Callable[[str], str] | None = None,
    optimizer: Any = None,
    mmap: bool = False,
) -> Any:
    """Load a checkpoint into a model, whose masks become the file's; return the model.

    Parameters keep their dtype, whatever floats the file has. From any framework: names and layouts of Linear,
    normalisations and their statistics, Embedding, convolutions and attention are translated; what the modules compute
    with (an ``epsilon``, heads, padding) is the model's::

        checkpoint.load_into(flax_model, "of_torch.safetensors", names={"head.": "classifier."})

    Args:
        model: a ``torch.nn.Module`` or an nnx module, which changes in place. A weight keeps the form that it has (dense or
            sparse) if it is masked already; a plain layer takes the file's. Or linen's variables, or a tree of parameters,
            which stay as they are.
        path: a file that :func:`save` wrote, from any framework.
        names: what the file calls what the model calls otherwise: how names begin, by the model's; or a function from the
            model's name to the file's.
        optimizer: to load its state too: a ``torch.optim.Optimizer`` or an ``nnx.Optimizer``, which changes in place; or
            an optax state, such as ``tx.init(params)``, in whose structure the file's is returned.
        mmap: whether the file is mapped while it is read, as by :func:`open`, so that large arrays without a mask are not in
            memory twice. The model holds copies, as ever, and nothing of the file.

    Returns:
        The model; new variables of linen; of a tree the parameters and their masks, ``None`` where there is none. With an
        optax state, that behind it.

    Raises:
        CheckpointError: if the file is damaged, or names, shapes, dtypes or kinds differ, which are all named; if it is a
            plain one of others, and the model is pruned, whose masks it would open; the model is as it was.
        ValueError: if no name of the model begins as ``names`` says.
        TypeError: if an argument is of a type that it cannot be of.
        OSError: if the file cannot be read.
    """
    _refuse_state(model, "load into the model")
    backend = _backend_of(model) or _tree_backend(model)
    if backend is None:
        raise TypeError(
            f"load_into takes a torch.nn.Module, an nnx module, linen's variables or a tree; got {type(model).__name__}"
        )
    check_names(names)
    with CheckpointFile(path, mmap=mmap) as file:
        if file.has_masks_beside:  # which a masked model would lose
            raise CheckpointError(
                f"{path} has its masks in a file beside it: load the folder by from_pretrained, or a file of "
                "save(checkpoint.read(folder), ...), which has both"
            )
        if not file.framework and (closed := backend.masked_names(model)):  # of others, whose zeros may be no masks
            raise CheckpointError(
                f"{path} says nothing of masks, and {first_names(closed)} would lose theirs: load it as the framework does, "
                "which keeps masks (load_state_dict, load_state), or call unmask_model before"
            )
        return backend.load_into(model, file, **_given(names=names, optimizer=optimizer))


def _refuse_state(model: Any, remedy: str) -> None:
    """Raise a ``TypeError`` of a state of PyTorch, which does not say what its masks belong to; the model does."""
    if isinstance(model, Mapping) and any(_backend_name(part) == _BACKENDS["torch"] for part in model.values()):
        raise TypeError(f"a dictionary of PyTorch's tensors does not say what is masked: {remedy}")


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _backend_of(model: Any, *, is_tree: bool = False) -> Any:
    """Return the backend's module that knows models of this type, or trees of what is in it; or ``None``."""
    name = _backend_name(model)
    if isinstance(model, Mapping) and isinstance(model.get("params"), Mapping):
        name = _BACKENDS["flax"]  # linen's variables
    inside = map(_backend_name, _leaves(model))
    name = name or next((found for found in inside if found not in ("", _BACKENDS["torch"])), "")
    is_flat = isinstance(model, Mapping) and not is_tree and not any(map(_is_branch, model.values()))
    return _module(name) if name else None if is_flat else _tree_backend(model)


def _module(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:  # of a tree of NumPy's arrays
        extra = "flax" if name == _BACKENDS["flax"] else "jax"
        raise missing_framework(error, "a tree of parameters", extra, "jax", "jaxlib", "optax", "flax") from error


def _backend_name(model: Any) -> str:
    packages = (kind.__module__.partition(".")[0] for kind in type(model).__mro__)
    return next((_BACKENDS[package] for package in packages if package in _BACKENDS), "")


def _tree_backend(model: Any) -> Any:
    """Return the module that knows trees of parameters, if this is one: of what types there are trees JAX is told."""
    is_tree = isinstance(model, Mapping | list | tuple) and any(True for _ in _leaves(model))
    if "jax" in sys.modules and not is_tree and model is not None:
        is_tree = not sys.modules["jax"].tree_util.all_leaves([model])
    return _module(_TREES) if is_tree else None


def _leaves(node: Any) -> Iterator[Any]:
    """Yield what is in mappings, lists and tuples; a list of numbers is one array."""
    for part in node.values() if isinstance(node, Mapping) else node if isinstance(node, list | tuple) else ():
        if _is_branch(part):
            yield from _leaves(part)
        else:
            yield part


def _is_branch(node: Any) -> bool:
    if isinstance(node, list | tuple):
        return any(_is_branch(part) or not isinstance(part, list | tuple | int | float) for part in node)
    return isinstance(node, Mapping)
