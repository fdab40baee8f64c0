"""Files of parameter trees and of optimizer states: their leaves by name, and trees like them from a file.

What else the files of Flax's models need of it: arrays on the host, and back on the devices where others were.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from numpy.typing import NDArray

from maskedlinear.checkpoint import CheckpointFile, MaskedArray, PlainArray
from maskedlinear.checkpoint._arrays import OPTIMIZER_ROLE
from maskedlinear.checkpoint._dtypes import bits, name_of
from maskedlinear.checkpoint._names import OPTIMIZER, Expected, Names, refuse, translated, warn_of_dropped
from maskedlinear.constraints import Constraints
from maskedlinear.models import WeightAxes, first_names
from maskedlinear_jax._compat import is_traced
from maskedlinear_jax._functional import boolean_mask
from maskedlinear_jax._placement import is_shared, to_host
from maskedlinear_jax._tree import axes_of, is_unmasked, leaves_like, named_leaves

__all__ = [
    "Array",
    "arrays_of",
    "axes_and_role",
    "expected_of",
    "for_writer",
    "framework_of",
    "like",
    "load_into",
    "load_optimizer",
    "masked_array",
    "masked_names",
    "on_host",
    "optimizer_arrays",
    "plain_array",
    "save_together",
    "warn_of_acting",
]

Array = PlainArray | MaskedArray


def framework_of(model: Any) -> str:
    """Return what a file calls the framework of a tree."""
    return "tree"


def masked_names(tree: Any) -> list[str]:
    """Return nothing: a tree has no masks of its own."""
    return []


def arrays_of(
    tree: Any, *, dormant: bool = False, masks: Any = None, optimizer: Any = None, stacklevel: int = 4
) -> Mapping[str, Array]:
    """Return what a file holds of a tree of parameters: by their paths, dots between.

    It warns of numbers under masks that the file lacks: a tree does not say whether they act.

    Args:
        tree: any pytree of arrays, of NumPy's too.
        dormant: whether what stands under the masks is saved.
        masks: a tree as :func:`maskedlinear.jax.prune_tree` returns it.
        optimizer: an optax state.
        stacklevel: of warnings.

    Raises:
        ValueError: if a mask does not fit, or two leaves have one name.
        TypeError: if a leaf is no array, or is traced.
    """
    leaves, lives = _named(tree), _lives(tree, masks)
    arrays: dict[str, Array] = {}
    for name, leaf in leaves.items():
        axes, role = axes_and_role(name, leaf)
        if name in lives:
            arrays[name] = masked_array(name, leaf, lives[name], dormant=dormant, axes=axes, role=role)
        else:
            arrays[name] = plain_array(name, leaf, axes, role)
    if not dormant and (
        lost := [name for name, live in lives.items() if (on_host(name, leaves[name])[~live] != 0).any()]
    ):
        warnings.warn(
            f"numbers under the masks of {first_names(lost)} are not in the file, in which they are 0: dormant=True keeps "
            "them; if a model reads them, train with maskedlinear.jax.freeze_masked; apply_masks(params, masks) clears them",
            stacklevel=stacklevel,
        )
    return {**arrays, **optimizer_arrays(optimizer, lives)}


def warn_of_acting(names: list[str], stacklevel: int = 6) -> None:
    """Warn of masked parameters of a model that act where a file has 0."""
    if names:
        warnings.warn(
            f"numbers under the masks of {first_names(names)} take part in the model's outputs, and are not in the file, "
            "whose outputs are those of the masks: train with maskedlinear.jax.freeze_masked, or call set_masks(model, "
            "get_masks(model)) before",
            stacklevel=stacklevel,
        )


def save_together(
    model: Any, path: Any, make: Callable[[], Mapping[str, Array]], write: Callable[[Mapping[str, Array]], object]
) -> None:
    """Write a file: of arrays that several processes share, the first does it, and the others wait.

    Args:
        model: a tree of arrays.
        path: of the file.
        make: returns what it holds, in all processes: what is masked gathered, in the first.
        write: writes it.

    Raises:
        OSError: in the other processes, if the first has failed.
    """
    write_together(model, make(), write)


def write_together(tree: Any, arrays: Mapping[str, Array], write: Callable[[Mapping[str, Array]], object]) -> None:
    """Write what was made of a tree: of arrays that several processes share, the first does it, and the others wait.

    They gather with it what it reads, one array after the other, as it names them.
    """
    if not any(map(is_shared, jax.tree.leaves(tree))):
        write(arrays)
        return
    every = list({id(array): array for array in arrays.values() if isinstance(array, PlainArray)}.values())
    if jax.process_index():
        while (number := _told(0)) >= 0:
            every[number].data()
        if number == _FAILED:
            raise OSError("the file was not written: the process that writes it, the first, says why")
        return

    def read(number: int) -> NDArray[Any]:
        _told(number)
        return every[number].data()

    asking = {id(array): replace(array, data=partial(read, number)) for number, array in enumerate(every)}
    end = _FAILED
    try:
        write({name: asking.get(id(array), array) for name, array in arrays.items()})
        end = _WRITTEN
    finally:
        _told(end)


_WRITTEN, _FAILED = -1, -2


def _told(number: int) -> int:
    """Return in all processes what the first says."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def load_into(tree: Any, file: CheckpointFile, *, names: Names = None, optimizer: Any = None) -> tuple[Any, ...]:
    """Return the parameters and the masks of a file as trees like ``tree``; and the optimizer's state, if asked.

    Of a weight that is masked in the file, what is under the mask is +0, or what is dormant, if the file has that.

    Raises:
        CheckpointError: if the file is damaged or does not fit; all that differs is named.
    """
    file.verify()
    leaves = _named(tree)
    expected = {name: expected_of(name, leaf, *axes_and_role(name, leaf)) for name, leaf in leaves.items()}
    constraints: dict[str, Constraints] = {}
    arrays, differences = translated(file, expected, "tree", names, constraints=constraints)
    state, more = load_optimizer(optimizer, file)
    refuse(differences + more)
    warn_of_dropped(constraints, "a tree", stacklevel=4)
    structure = jax.tree.structure(tree)
    values, masks = [], []
    for name, leaf in leaves.items():
        array = arrays.get(name)
        values.append(leaf if array is None else like(array_of(array, leaf), leaf))
        masks.append(like(array.mask(), leaf, bool) if isinstance(array, MaskedArray) else None)
    found = jax.tree.unflatten(structure, values), jax.tree.unflatten(structure, masks)
    return found if optimizer is None else (*found, state)


def axes_and_role(name: str, leaf: Any) -> tuple[WeightAxes | None, str]:
    """Return what a parameter's name says of its axes, and of what it is to its module."""
    if np.ndim(leaf) == 2 and name.split(".")[-1] == "embedding":
        return WeightAxes(out_axis=1, in_axis=0), "embedding.weight"
    return axes_of(name, np.ndim(leaf), None), ""


def _named(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree by name; two of one name are an error."""
    leaves = named_leaves(tree)
    if len(leaves) != len(jax.tree.leaves(tree)):
        raise ValueError(
            f"a file has one array of each name, the keys of its path with dots between; the tree has several of one: "
            f"rename keys with dots in them; got {first_names(list(leaves))}"
        )
    return leaves


def _lives(tree: Any, masks: Any) -> dict[str, NDArray[np.bool_]]:
    """Return the masks of those leaves of a tree that have some, checked."""
    given = leaves_like(jax.tree.structure(tree), masks, "masks")
    if given is None:
        return {}
    return {
        name: to_host(boolean_mask(mask, leaf.shape, name))
        for (name, leaf), mask in zip(_named(tree).items(), given, strict=True)
        if not is_unmasked(mask)
    }


def on_host(name: str, value: Any) -> NDArray[Any]:
    """Return an array as NumPy's; of the keys of random numbers their words. Processes that have parts of it ask together.

    Raises:
        TypeError: if it is traced, or no array.
        ValueError: if it is abstract.
    """
    _check(name, value)
    return to_host(jax.random.key_data(value) if is_key(value) else value)


def _check(name: str, value: Any) -> None:
    _refuse_traced(name, value)
    if isinstance(value, jax.ShapeDtypeStruct):
        raise ValueError(f"{name} is abstract, without values: load or initialise the model before")
    if not isinstance(value, jax.Array | np.ndarray | np.generic | int | float | bool):
        raise TypeError(f"a file holds arrays; {name} is {type(value).__name__}: leave it out of what is saved")


def _refuse_traced(name: str, value: Any) -> None:
    if is_traced(value):
        raise TypeError(f"{name} is traced, without numbers: save and load outside of jit and other transforms")


def is_key(value: Any) -> bool:
    """Whether these are typed keys of random numbers."""
    return hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def _implementation(keys: Any) -> Any:
    """Return what makes random numbers of keys, which may be abstract."""
    return jax.random.key_impl(jnp.empty((), keys.dtype))


def expected_of(name: str, value: Any, axes: WeightAxes | None = None, role: str = "") -> Expected:
    """Return what a file must have for an array, which may be abstract.

    Raises:
        TypeError: if it is traced, or of a dtype that no file holds.
    """
    _refuse_traced(name, value)
    if is_key(value):
        words = jax.eval_shape(jax.random.key_data, value)
        return Expected(tuple(words.shape), "U32", None, f"rng.key.{_implementation(value)}")
    dtype = np.dtype(value.dtype) if hasattr(value, "dtype") else np.asarray(value).dtype
    try:
        return Expected(tuple(np.shape(value)), name_of(np.empty(0, dtype)), axes, role)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from error


def plain_array(name: str, value: Any, axes: WeightAxes | None = None, role: str = "") -> PlainArray:
    """Return an array to be saved, read when its turn comes.

    Raises:
        TypeError: if it is traced, no array, or of a dtype that no file holds.
        ValueError: if it is abstract.
    """
    _check(name, value)
    told = expected_of(name, value, axes, role)
    return PlainArray(told.dtype, told.shape, lambda: bits(on_host(name, value)), told.axes, told.role)


def masked_array(name: str, value: Any, live: NDArray[np.bool_], **more: Any) -> MaskedArray:
    """Return an array and its mask to be saved, as :meth:`MaskedArray.of` does; errors as of :func:`plain_array`.

    In processes that others write for it has nothing in it.
    """
    return for_writer(MaskedArray.of(on_host(name, value), live, **more), value)


def for_writer(made: MaskedArray, value: Any) -> MaskedArray:
    """Return a masked array as it is in the process that writes; in the others, of what they share, with nothing in it."""
    if is_shared(value) and jax.process_index():
        return replace(made, values=made.values[:0].copy(), places=made.places[:0].copy(), dormant=None)
    return made


def array_of(array: Array, leaf: Any) -> NDArray[Any]:
    """Return an array of a file as NumPy's, what is dormant included, in a leaf's dtype."""
    made = array.numpy(dormant=True) if isinstance(array, MaskedArray) else array.numpy()
    return made if is_key(leaf) or not hasattr(leaf, "dtype") else made.astype(np.dtype(leaf.dtype), copy=False)


def like(array: NDArray[Any], leaf: Any, dtype: Any = None) -> Any:
    """Return an array, a new one, as what a leaf is: JAX's, where it lies; NumPy's; a number of Python's; keys.

    If ``dtype`` is given, it is something else of the leaf's shape, as a mask is.
    """
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        made = jnp.array(array)
        if dtype is None and is_key(leaf):
            made = jax.random.wrap_key_data(made, impl=_implementation(leaf))
        # What was put nowhere by choice stays so: a jitted call takes it along to where the others are.
        return jax.device_put(made, leaf.sharding) if isinstance(leaf, jax.Array) and leaf.committed else made
    if dtype is None and isinstance(leaf, bool | int | float) and not isinstance(leaf, np.generic):
        return type(leaf)(array.item())
    return np.array(array)


def optimizer_arrays(state: Any, lives: Mapping[str, NDArray[np.bool_]]) -> dict[str, Array]:
    """Return what a file holds of an optimizer's state.

    What is kept of a masked weight and is +0 under its mask goes without that: it is known by its name, which ends as the
    weight's, and its shape. Masks are masks.

    Args:
        state: any pytree, ``None`` for none.
        lives: the masks of masked weights, by their names in the tree of parameters.
    """
    arrays: dict[str, Array] = {}
    for name, leaf in {} if state is None else _named(state).items():
        plain = plain_array(f"{OPTIMIZER}{name}", leaf)
        live = _live_of(name, plain, lives)
        if plain.dtype == "BOOL" and plain.shape:
            arrays[OPTIMIZER + name] = masked_array(name, leaf, on_host(name, leaf))
        elif live is not None and not plain.data()[~live].view(np.uint8).any():
            arrays[OPTIMIZER + name] = masked_array(name, leaf, live)
        else:
            arrays[OPTIMIZER + name] = plain
    return {name: replace(array, role=OPTIMIZER_ROLE) for name, array in arrays.items()}


def _live_of(name: str, array: PlainArray, lives: Mapping[str, NDArray[np.bool_]]) -> NDArray[np.bool_] | None:
    """Return the mask of the weight of which a part of an optimizer's state is, if it has one and the part its shape."""
    return next((lives[end] for end in _ends(name) if end in lives and lives[end].shape == array.shape), None)


def _ends(name: str) -> Iterator[str]:
    """Yield a name, and what is left of it without its first part, without its first two, ..."""
    while name:
        yield name
        name = name.partition(".")[2]


def load_optimizer(template: Any, file: CheckpointFile) -> tuple[Any, list[str]]:
    """Return an optimizer's state from a file, in a template's structure, and what differs; ``None`` of no template."""
    if template is None:
        return None, []
    leaves, there = _named(template), {name for name in file if name.startswith(OPTIMIZER)}
    if not there:
        return None, ["the file has no state of an optimizer: save it with save(model, path, optimizer=...)"]
    values, differences = [], []
    for name, leaf in leaves.items():
        if OPTIMIZER + name not in there:
            differences.append(f"not in the file: {OPTIMIZER}{name}")
            continue
        wanted, told = expected_of(name, leaf), file.told(OPTIMIZER + name)
        if (wanted.shape, wanted.dtype) != (told.shape, told.dtype):
            differences.append(
                f"{OPTIMIZER}{name} is {told.dtype} {told.shape} in the file, and {wanted.dtype} {wanted.shape} here"
            )
        elif not differences:
            values.append(like(array_of(file.array(OPTIMIZER + name), leaf), leaf))
    more = sorted(there - {OPTIMIZER + name for name in leaves})
    differences += [f"not in the optimizer: {name}" for name in more]
    return (None, differences) if differences else (jax.tree.unflatten(jax.tree.structure(template), values), [])
