"""``CheckpointFile``: an open checkpoint, read a tensor, or some rows of one, at a time; and how one is written."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, Self, get_args

import numpy as np
from numpy.typing import NDArray

from maskedlinear.checkpoint._arguments import as_metadata, as_path, check_flag
from maskedlinear.checkpoint._arrays import Form, MaskedArray, PlainArray, held
from maskedlinear.checkpoint._container import METADATA, Reader, Tensor, write
from maskedlinear.checkpoint._dtypes import BITS, ITEMSIZE, as_numpy
from maskedlinear.checkpoint._entries import LARGEST_DENSE, LARGEST_MADE, LARGEST_UNBACKED, Entry
from maskedlinear.checkpoint._errors import CheckpointError
from maskedlinear.checkpoint._json import dumps, loads, shown
from maskedlinear.checkpoint._masks import LARGEST, Mask, encode
from maskedlinear.checkpoint._values import RAW, Codec, Values, decompress, stored
from maskedlinear.models import first_names

__all__ = ["MASKS_BESIDE", "VERSION", "Arrays", "CheckpointFile", "open", "read_arrays", "save_arrays"]

VERSION = 1
_KEY = "maskedlinear"
_WIRING = "maskedlinear.wiring:"  # before a layer's name: what its nodes are called
MASKS_BESIDE = "maskedlinear.masks"  # in the metadata of plain weights: which masks, in a file beside them, are theirs

Arrays = Mapping[str, PlainArray | MaskedArray]


class Told(NamedTuple):
    """What a file says of an array.

    Attributes:
        dtype: safetensors' name.
        shape: of the whole array.
        form: of a masked one, whether its layer had it as a whole matrix or as its live values; ``None`` of a plain one.
        stored_as: the name under which it is stored: another one, if it is the same array.
    """

    dtype: str
    shape: tuple[int, ...]
    form: Form | None
    stored_as: str


class CheckpointFile:
    """An open checkpoint: names, what is said of each array, and the arrays, read when they are asked for.

    Args:
        path: a file that :func:`save` wrote, or any safetensors file, whose arrays are plain.
        mmap: as of :func:`open`.

    Raises:
        CheckpointError: if the file is damaged, or of a later version.
        OSError: if it cannot be read.
        TypeError: if an argument is of a type that it cannot be of.
    """

    def __init__(self, path: str | os.PathLike[str], *, mmap: bool = False) -> None:
        check_flag("mmap", mmap)
        self._reader = Reader(as_path(path), mapped=mmap)
        try:
            self._read_entries()
        except BaseException:
            self.close()
            raise

    def _read_entries(self) -> None:
        reader = self._reader
        told: Any = {"version": VERSION, "framework": "", "arrays": {name: {} for name in reader.tensors}}
        # Files of plain arrays, as in Hugging Face's folders, have one key of ours: another may be what is left of ours.
        if any(key.startswith(_KEY) for key in reader.metadata if key != MASKS_BESIDE):
            if _KEY not in reader.metadata or not reader.is_summed:
                reader.fail(
                    "it is one of maskedlinear's, and has lost what it says of its arrays, or its header's SHA-256"
                )
            try:
                told = loads(reader.metadata[_KEY])
            except ValueError as error:
                reader.fail(f"what it says of its arrays is no JSON: {str(error)[:200]}")
        if not isinstance(told, dict) or type(told.get("version")) is not int or told["version"] < 1:
            reader.fail("it does not say the version of its format")
        if told["version"] > VERSION:
            reader.fail(
                f"it has version {told['version']} of the format; this reads up to {VERSION}: update maskedlinear"
            )
        framework, entries = told.get("framework"), told.get("arrays")
        if told.keys() != {"version", "framework", "arrays"} or not isinstance(framework, str):
            reader.fail(f"it says version, framework and arrays of itself; got {shown(told)}")
        if not isinstance(entries, dict):
            reader.fail("it does not say what its arrays are")
        #: What wrote it: "torch", "nnx", "linen", "tree" or "numpy"; empty for a plain safetensors file.
        self.framework: str = framework
        #: Whether its masks are in a file beside it, as in folders of Hugging Face.
        self.has_masks_beside = MASKS_BESIDE in reader.metadata
        #: What the nodes of layers are called, as text, by the layers' names; see ``checkpoint.wirings``.
        self.wiring_texts = {
            key.removeprefix(_WIRING): value for key, value in reader.metadata.items() if key.startswith(_WIRING)
        }
        #: The user's metadata, strings by name.
        self.metadata = {key: value for key, value in reader.metadata.items() if not key.startswith(_KEY)}
        self._entries: dict[str, Entry] = {}
        self._same_as: dict[str, str] = {}
        used: set[str] = set()
        for name, entry in entries.items():
            if isinstance(entry, dict) and "same_as" in entry:
                if entry.keys() != {"same_as"} or not isinstance(entry["same_as"], str) or name in reader.tensors:
                    reader.fail(f"what it says of {shown(name)} is wrong: it is the same as {shown(entry['same_as'])}")
                self._same_as[name] = entry["same_as"]
                continue
            try:
                self._entries[name] = Entry.from_json(name, entry, reader.tensors)
            except ValueError as error:
                reader.fail(f"what it says of {shown(name)} is wrong: {error}")
            for part in self._entries[name].parts:
                if part in used:
                    reader.fail(f"two arrays are in the tensor {shown(part)}")
                used.add(part)
        if others := reader.tensors.keys() - used:
            reader.fail(f"it does not say what {shown(min(others))} is")
        for name, other in self._same_as.items():
            if other not in self._entries:
                reader.fail(f"{shown(name)} is the same as {shown(other)}, which is no array of its own")
        unbacked = sum(entry.unbacked for entry in self._entries.values())
        if unbacked > LARGEST_UNBACKED:
            reader.fail(f"it claims {unbacked} live entries without a bit for each; at most {LARGEST_UNBACKED} are so")
        made = sum(entry.made for entry in self._entries.values())
        if made > LARGEST_MADE:
            reader.fail(
                f"its recipes make {made} entries of masks, more than 64 for each byte; at most {LARGEST_MADE} are so"
            )
        self._names = list(entries)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Close the file; what was read stays, and views of a mapped file keep it mapped."""
        self._reader.close()

    def __iter__(self) -> Iterator[str]:
        """Yield the arrays' names."""
        return iter(self._names)

    def __len__(self) -> int:
        """Return the number of arrays."""
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        """Return whether there is an array of this name."""
        return name in self._entries or name in self._same_as

    def entry(self, name: str) -> Entry:
        """Return what the file says of an array; nothing of the array is read.

        Raises:
            KeyError: if there is none of this name.
        """
        return self._entries[self._own(name)]

    def _own(self, name: str) -> str:
        """Return the name under which an array is stored."""
        if name not in self:
            raise KeyError(f"the file has no array {shown(name)}; it has {first_names(self._names)}")
        return self._same_as.get(name, name)

    def told(self, name: str) -> Told:
        """Return what the file says of an array, and under which name it has it; nothing of the array is read.

        Raises:
            KeyError: if there is none of this name.
        """
        entry = self.entry(name)
        return Told(entry.dtype, entry.shape, None if entry.mask is None else entry.form, self._same_as.get(name, name))

    def array(self, name: str) -> PlainArray | MaskedArray:
        """Return an array: a plain one is read when its ``data`` is asked for; of a masked one live values and places are.

        Raises:
            KeyError: if there is none of this name.
            CheckpointError: if what the file says of it does not fit.
        """
        name = self._own(name)
        entry, reader = self._entries[name], self._reader
        if entry.mask is None:
            return PlainArray(entry.dtype, entry.shape, lambda: reader.read(name), entry.axes, entry.role)
        nnz, dead = entry.mask.nnz, math.prod(entry.shape) - entry.mask.nnz
        places, _ = self._places(name, entry.mask)
        array = MaskedArray(
            entry.shape,
            entry.dtype,
            self._values(f"{name}/values", entry.values, entry.dtype, nnz, 0, nnz),
            places,
            None
            if entry.dormant is None
            else self._values(f"{name}/dormant", entry.dormant, entry.dtype, dead, 0, dead),
            entry.axes,
            entry.form,
            entry.role,
            entry.mask.recipe,
        )
        if array.digest != entry.mask.sha256:
            reader.fail(f"the mask of {shown(name)} is not the one that was saved: its SHA-256 is another")
        return array

    def _places(self, name: str, mask: Mask, rows: tuple[int, int] | None = None) -> tuple[NDArray[np.int64], int]:
        reader, part = self._reader, f"{name}/mask"
        length = reader.tensors[part][3] - reader.tensors[part][2] if mask.is_coded else 0
        try:
            return mask.decode(length, lambda start, stop: reader.read_part(part, start, stop), rows)
        except CheckpointError:
            raise
        except ValueError as error:
            reader.fail(f"the mask of {shown(name)}: {error}")

    def _values(self, part: str, told: Values, dtype: str, count: int, first: int, last: int) -> NDArray[Any]:
        reader = self._reader
        if told.codec == "true":
            return np.ones(last - first, np.bool_)
        if told.codec == "raw":
            return reader.read_part(part, first, last)
        length = reader.tensors[part][3] - reader.tensors[part][2]
        try:
            return decompress(
                told, dtype, count, length, lambda start, stop: reader.read_part(part, start, stop), first, last
            )
        except CheckpointError:
            raise
        except ValueError as error:
            reader.fail(f"{shown(part)}: {error}")

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Return an array whole, in its own dtype, +0 under its mask.

        Raises:
            KeyError: if there is none of this name.
            CheckpointError: if what the file says of it does not fit, or if it would take more than 1 GiB, and more than
                4096 times what it takes in the file: ``array(name)`` has it as it is.
        """
        self.check_whole(name)
        return self.array(name).numpy()

    def rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Return rows ``start`` to ``stop``, along the first axis, of an array, as :meth:`__getitem__` returns it whole.

        No more is read than the blocks in which these rows lie; the mask's SHA-256 is not compared, only CRC-32s.
        A mask with a recipe is made whole.

        Raises:
            IndexError: if the array is a scalar.
            KeyError, CheckpointError: as by :meth:`__getitem__`.
        """
        name = self._own(name)
        entry = self._entries[name]
        if not entry.shape:
            raise IndexError(f"a scalar has no rows; {shown(name)} is one: take [name]")
        start, stop, _ = slice(start, stop).indices(entry.shape[0])
        stop = max(start, stop)
        width = math.prod(entry.shape[1:])
        shape = (stop - start, *entry.shape[1:])
        if entry.mask is None:
            flat = self._reader.read_part(name, start * width, stop * width)
            return as_numpy(flat.reshape(shape), entry.dtype)
        self._check_dense(name, entry, (stop - start) * width)
        places, before = self._places(name, entry.mask, (start, stop))
        flat = np.zeros((stop - start) * width, BITS[entry.dtype])
        last = before + len(places)
        flat[places - start * width] = self._values(
            f"{name}/values", entry.values, entry.dtype, entry.mask.nnz, before, last
        )
        return as_numpy(flat.reshape(shape), entry.dtype)

    def check_whole(self, name: str) -> None:
        """Raise a :class:`CheckpointError` if an array is one that :meth:`__getitem__` does not return whole."""
        entry = self.entry(name)
        self._check_dense(name, entry, math.prod(entry.shape))

    def _check_dense(self, name: str, entry: Entry, size: int) -> None:
        if entry.mask is not None and size * ITEMSIZE[entry.dtype] > max(LARGEST_DENSE, 4096 * entry.nbytes):
            self._reader.fail(
                f"{shown(name)} would be dense {size * ITEMSIZE[entry.dtype]} bytes, of {entry.nbytes} in the file: if that "
                "is meant, take array(name).numpy()"
            )

    def verify(self) -> None:
        """Check all of the file, an array at a time: each sum, each mask and its SHA-256, each value that is compressed.

        Call it before something is changed by what the file holds.

        Raises:
            CheckpointError: if anything does not fit.
        """
        for name, entry in self._entries.items():
            if entry.mask is None:
                self._reader.check(name)
            else:
                self.array(name)


def open(path: str | os.PathLike[str], *, mmap: bool = False) -> CheckpointFile:
    """Open a checkpoint to read some arrays of it, or some rows of one::

        with checkpoint.open("model.safetensors", mmap=True) as file:
            file["embedding.weight"]  # a view of the file
            file.rows("encoder.weight", 0, 128)

    Args:
        path: a file that :func:`save` wrote, or any safetensors file.
        mmap: whether the file is mapped into memory, for large ones. Then plain arrays, and the live ``values`` of masked
            ones that are not compressed, are read-only views of the file, which take no memory of their own, and masks are
            decoded from it; all is compared with its CRC-32 before, as ever. Views stay good when the file is closed, or
            replaced as :func:`save` does it. But the file must not be written over or cut off in place while they are used:
            they would show what is written; where it is cut off, the system ends the process (SIGBUS).

    Raises:
        CheckpointError: if the file is damaged, or of a later version.
        OSError: if it cannot be read, or not be mapped.
        TypeError: if an argument is of a type that it cannot be of.
    """
    return CheckpointFile(path, mmap=mmap)


def read_arrays(file: CheckpointFile) -> dict[str, PlainArray | MaskedArray]:
    """Return all arrays of a file, read now; what has several names is one object under all of them."""
    own = {name: file.told(name).stored_as for name in file}
    made = {name: held(file.array(name)) for name in dict.fromkeys(own.values())}
    return {name: made[stored_as] for name, stored_as in own.items()}


def save_arrays(
    arrays: Arrays,
    path: str | os.PathLike[str],
    *,
    values: Codec = "raw",
    framework: str = "numpy",
    metadata: Mapping[str, str] | None = None,
    wirings: Mapping[str, str] | None = None,
) -> None:
    """Write arrays into one file, whole or not at all; what has several names, and is one object, once.

    Args:
        arrays: by name.
        path: the file.
        values: ``"raw"``, or ``"pcodec"`` for live (and dormant) values through pcodec where that makes them smaller.
        framework: what the arrays are from.
        metadata: strings by name.
        wirings: what the nodes of layers are called, as text, by the layers' names.

    Raises:
        ValueError: if two tensors would have one name, an array contradicts itself, or metadata are no strings.
        ModuleNotFoundError: if pcodec is asked for and not installed.
        OSError: if the file cannot be written; what it was stays.
    """
    if values not in get_args(Codec):
        raise ValueError(f"values are one of {', '.join(get_args(Codec))}; got {values!r}")
    path, metadata = as_path(path), as_metadata(metadata, _KEY)
    tensors: dict[str, Tensor] = {}
    entries: dict[str, Any] = {}

    def add(name: str, dtype: str, data: NDArray[Any]) -> None:
        insert(name, Tensor(dtype, data.shape, lambda: data))

    def insert(name: str, tensor: Tensor) -> None:
        if name in tensors or name == METADATA:
            raise ValueError(f"a file has one tensor of each name, none {METADATA}; got another {name!r}: rename it")
        tensors[name] = tensor

    names: dict[int, str] = {}
    unbacked = made = 0
    for name, array in arrays.items():
        first = names.setdefault(id(array), name)
        if first != name:
            entries[name] = {"same_as": first}
        elif isinstance(array, PlainArray):
            insert(name, Tensor(array.dtype, array.shape, array.data))
            entries[name] = Entry(array.dtype, array.shape, array.axes, array.role).to_json()
        else:
            _check(name, array)
            how, data = stored(array.values, array.dtype, values, is_live=True)
            parts = {} if how == Values("true") else {"values": (how, data)}
            if array.dormant is not None:
                parts["dormant"] = stored(array.dormant, array.dtype, values, is_live=False)
            dormant = parts["dormant"][0] if "dormant" in parts else None
            for is_backed in (False, True):
                mask, coded = encode(array, is_backed=is_backed)
                nbytes = sum(data.nbytes for _, data in parts.values()) + (0 if coded is None else coded.nbytes)
                said = array.dtype, array.shape, array.axes, array.role, array.form, mask, how, dormant
                entry = Entry(*said, nbytes=nbytes)
                if unbacked + entry.unbacked <= LARGEST_UNBACKED and made + entry.made <= LARGEST_MADE:
                    break
            unbacked, made = unbacked + entry.unbacked, made + entry.made
            if coded is not None:
                add(f"{name}/mask", "U8", coded)
            for end, (codec, part) in parts.items():
                if codec == RAW:  # read once more when its turn comes: a backend's arrays are not held here
                    insert(f"{name}/{end}", Tensor(array.dtype, part.shape, partial(getattr, array, end)))
                else:
                    add(f"{name}/{end}", "U8", part)
            entries[name] = entry.to_json()
    for name, entry in entries.items():
        if "same_as" in entry and name in tensors:
            raise ValueError(
                f"{name!r} is a second name of {entry['same_as']!r}, and that of one of its tensors: rename it"
            )
    told = {"version": VERSION, "framework": framework, "arrays": entries}
    nodes = {_WIRING + layer: text for layer, text in (wirings or {}).items()}
    write(path, tensors, {**metadata, **nodes, _KEY: dumps(told)})


def _check(name: str, array: MaskedArray) -> None:
    """Raise unless an array's places are those of a mask, and its values fit them."""
    places, dead = array.places, array.size - array.nnz
    if array.size > LARGEST:
        raise ValueError(f"an array with a mask has at most {LARGEST} entries; {name!r} has {array.size}: split it")
    if len(places) and (places[0] < 0 or places[-1] >= array.size or (places[1:] <= places[:-1]).any()):
        raise ValueError(f"the places of {name!r} must ascend, each of them once, from 0 and below {array.size}")
    for what, data, count in (("values", array.values, array.nnz), ("dormant", array.dormant, dead)):
        if data is not None and (data.shape != (count,) or data.dtype != BITS[array.dtype]):
            raise ValueError(
                f"{what} of {name!r} must have the shape ({count},) and dtype {BITS[array.dtype]}; got {data.shape}, "
                f"{data.dtype}"
            )
