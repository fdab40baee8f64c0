"""A file of any format as arrays by name, read one at a time where its format lets it; with the masks that it has."""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Literal, Self

from maskedlinear.checkpoint import CheckpointError, CheckpointFile, MaskedArray, PlainArray, read
from maskedlinear.checkpoint._arrays import OPTIMIZER_ROLE
from maskedlinear.checkpoint._dtypes import ITEMSIZE
from maskedlinear.checkpoint._entries import LARGEST_DENSE
from maskedlinear.checkpoint._foreign import files_of, is_safetensors, npz_arrays, unpacked_limit
from maskedlinear.checkpoint._foreign_masks import DORMANT, MASKS_FILE, infer_masks, mask_from_beside, stored_masks
from maskedlinear.checkpoint._foreign_zip import Zip
from maskedlinear.files.text import counted, escaped

__all__ = ["Array", "How", "Info", "Source", "infos_of", "open_source"]

Array = MaskedArray | PlainArray

_MIN_SPARSITY = 0.1  # the fraction of zeros from which they are a mask, as of checkpoint.read


@dataclass(frozen=True)
class Info:
    """What is known of an array before it is read.

    Attributes:
        dtype: safetensors' name of its dtype.
        shape: its shape.
        nbytes: what it takes in the file, its mask included; 0 of one that is the same as another; ``None`` if its format
            does not tell.
        mask: how its mask is written, or who wrote it; empty of a plain array.
        codec: how its values are: "raw", "true" (they take no bytes) or "pcodec".
        dormant: whether its dormant values are there.
        same_as: the array under whose name it is; empty if that is its own.
        role: as :attr:`maskedlinear.checkpoint.PlainArray.role` has it.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int | None
    mask: str = ""
    codec: str = "raw"
    dormant: bool = False
    same_as: str = ""
    role: str = ""

    @property
    def is_optimizers(self) -> bool:
        """Whether an optimizer keeps it, and it is no part of the model."""
        return self.role == OPTIMIZER_ROLE

    @property
    def dense_bytes(self) -> int:
        """What it takes whole."""
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class How:
    """How files are read, as options say.

    Attributes:
        masks: "stored", the masks that a file has, or "zeros", also those of weights that have none.
        key: of a state of PyTorch that has more than one.
        max_bytes: what is unpacked at most, as of :func:`maskedlinear.checkpoint.read`.
    """

    masks: Literal["stored", "zeros"] = "stored"
    key: str | None = None
    max_bytes: int | None = None


@dataclass
class Source:
    """An open file, or folder of files.

    Attributes:
        kind: its format, for people: ``"maskedlinear"``, ``"safetensors"``, ``"npz"``.
        nbytes: the size of the file, or of all of them.
        infos: what is known of each array before it is read, in the order in which they are shown.
        framework: what wrote it, as :attr:`maskedlinear.checkpoint.CheckpointFile.framework` has it.
        metadata: the user's, strings by name.
        left_out: what is in the file and no array, by name.
        how: how it is read.
        held: each array, or the file that has it.
        masks: a file of masks alone, beside the weights of a folder, if there is one.
        files: those that are open.
    """

    kind: str
    nbytes: int = 0
    infos: dict[str, Info] = field(default_factory=dict)
    framework: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    how: How = field(default_factory=How)
    held: dict[str, Array | CheckpointFile] = field(default_factory=dict, repr=False)
    masks: CheckpointFile | None = None
    files: ExitStack = field(default_factory=ExitStack, repr=False)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close all files."""
        self.files.close()

    def __iter__(self) -> Iterator[str]:
        """Yield the arrays' names."""
        return iter(self.infos)

    def array(self, name: str) -> Array:
        """Return an array, with a mask if the file has one or it was to be inferred."""
        held = self.held[name]
        array = held.array(name) if isinstance(held, CheckpointFile) else held
        if self.masks is not None and name in self.masks and self.masks.entry(name).mask is not None:
            array = mask_from_beside(name, array, self.masks)
        if self.how.masks == "zeros" and isinstance(array, PlainArray) and array.role != OPTIMIZER_ROLE:
            return infer_masks({name: array}, _MIN_SPARSITY).get(name, array)
        return array

    def check_whole(self, name: str) -> None:
        """Check that an array is not much larger whole than in the file, as one that somebody made up could be.

        Raises:
            CheckpointError: if it is, and nobody has said that it may.
        """
        info = self.infos[name]
        most = max(LARGEST_DENSE, 4096 * (info.nbytes or 0), self.how.max_bytes or 0)
        if info.mask and info.dense_bytes > most:
            raise CheckpointError(
                f"{escaped(name)} would take {info.dense_bytes} bytes whole: if that is meant, give --max-bytes "
                f"{info.dense_bytes}"
            )


def open_source(path: Path, how: How) -> Source:
    """Open a file or a folder.

    Raises:
        CheckpointError: if it is damaged, or of no format that is read here.
        ModuleNotFoundError: if it needs a framework that is not installed.
        OSError: if it cannot be read.
    """
    files = [path / name for name in files_of(path)] if path.is_dir() else [path]
    if path.is_dir() and (path / MASKS_FILE).is_file():
        files.append(path / MASKS_FILE)
    with ExitStack() as stack:
        if all(map(_is_safetensors, files)):
            opened = {file.name: stack.enter_context(CheckpointFile(file)) for file in files}
            masks = opened.pop(MASKS_FILE, None) if path.is_dir() else None
            source = _of_safetensors(path, list(opened.values()), masks)
        else:
            source = _of_zip(path, how, stack) or _of_others(path, how)
        source.files = stack.pop_all()
    source.how, source.nbytes = how, sum(file.stat().st_size for file in files)
    if path.is_dir():
        source.kind = f"folder of {counted(len(files), 'file')}, {source.kind}"
    source.infos = {name: source.infos[name] for name in sorted(source.infos, key=_natural)}
    return source


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        return is_safetensors(file.read(9), path.stat().st_size)


def _of_safetensors(path: Path, files: Sequence[CheckpointFile], masks: CheckpointFile | None) -> Source:
    """Return the source of files of safetensors, ours or others'; no plain array is read."""
    kind = "maskedlinear" if any(file.framework for file in files) else "safetensors"
    source = Source(kind, framework=files[0].framework, metadata=files[0].metadata, masks=masks)
    others: dict[str, Array] = {}
    for file in files:
        if twice := set(file) & (source.infos.keys() | others.keys()):
            raise CheckpointError(f"{path}: {min(twice)} is in two of its files")
        if file.framework:  # a file of ours
            source.infos |= {name: _info(file, name) for name in file}
            source.held |= dict.fromkeys(file, file)
        else:
            others |= {name: file.array(name) for name in file}
    _take(source, path, others)
    if masks is not None:
        _take_masks(source, masks)
    return source


def _of_zip(path: Path, how: How, stack: ExitStack) -> Source | None:
    """Return the source of a ``.npz`` of arrays, which are read when their turn comes; ``None`` of any other file."""
    if path.is_dir() or not zipfile.is_zipfile(path):
        return None
    archive = stack.enter_context(Zip(path, unpacked_limit(path.stat().st_size, how.max_bytes)))
    if archive.is_torch or archive.is_scipy:
        return None
    arrays = npz_arrays(archive)
    source = Source("npz", left_out=arrays.left_out)
    _take(source, path, arrays, packed=True)
    return source


def _of_others(path: Path, how: How) -> Source:
    arrays = read(path, key=how.key, max_bytes=how.max_bytes)
    infos = infos_of(arrays, arrays.mask_sources, packed=arrays.container == "scipy")
    return Source(arrays.container, infos=infos, left_out=arrays.left_out, held=dict(arrays))


def _take(source: Source, path: Path, arrays: Mapping[str, Array], packed: bool = False) -> None:
    """Take arrays into a source, weights with the masks that other libraries keep beside them."""
    try:
        found, origins = stored_masks(arrays)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    source.held |= found
    source.infos |= infos_of(found, origins, packed)


def _info(file: CheckpointFile, name: str) -> Info:
    entry, first = file.entry(name), file.told(name).stored_as
    mask = entry.mask.encoding if entry.mask else ""
    own = Info(
        entry.dtype, entry.shape, entry.nbytes, mask, entry.values.codec, entry.dormant is not None, role=entry.role
    )
    return own if first == name else replace(own, nbytes=0, same_as=first)


def _take_masks(source: Source, masks: CheckpointFile) -> None:
    """Say of weights which masks a folder of Hugging Face's has for them, in a file beside them."""
    for name in masks:
        entry = masks.entry(name)
        if entry.mask is None:  # what is dormant, flat
            continue
        if name not in source.infos:
            source.left_out[name] = "a mask without its weight"
            continue
        info, hidden = source.infos[name], f"{name}{DORMANT}"
        has_dormant = hidden in masks
        if info.nbytes is not None:
            nbytes = info.nbytes + entry.nbytes + (masks.entry(hidden).nbytes if has_dormant else 0)
            info = replace(info, nbytes=nbytes)
        source.infos[name] = replace(info, mask=entry.mask.encoding, dormant=has_dormant)


def infos_of(arrays: Mapping[str, Array], origins: Mapping[str, str], packed: bool = False) -> dict[str, Info]:
    """Return what is known of arrays; what others' masks take in their files, and what is packed, is not."""
    infos: dict[str, Info] = {}
    first: dict[int, str] = {}
    for name, array in arrays.items():
        same_as = first.setdefault(id(array), name)
        dormant = isinstance(array, MaskedArray) and array.dormant is not None
        plain = Info(array.dtype, array.shape, None, origins.get(name, ""), dormant=dormant, role=array.role)
        if same_as != name:
            plain = replace(plain, nbytes=0, same_as=same_as)
        elif isinstance(array, PlainArray) and not packed:
            plain = replace(plain, nbytes=plain.dense_bytes)
        infos[name] = plain
    return infos


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Return what names are sorted by: layer 2 stands before layer 10."""
    parts = re.split(r"([0-9]+)", name)
    numbers = [(0, len(part.lstrip("0")), part.lstrip("0")) for part in parts[1::2]]
    texts = [(1, 0, part) for part in parts[::2]]
    return [key for pair in zip_longest(texts, numbers) for key in pair if key is not None]
