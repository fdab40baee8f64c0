"""``maskedlinear convert``: a file's arrays in another format, written whole or not at all."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from maskedlinear.checkpoint import MaskedArray, PlainArray, write_dense
from maskedlinear.checkpoint._file import save_arrays
from maskedlinear.checkpoint._values import Codec
from maskedlinear.files.output import check_free, written
from maskedlinear.files.source import Array, How, Source, open_source
from maskedlinear.files.text import counted, escaped, listed, printable, progress, say, size_text

__all__ = ["convert"]

_ENDS = {"safetensors": ".safetensors", "npz": ".npz", "torch": ".pt"}  # by which write_dense knows what to write


def convert(path: Path, out: Path, how: How, to: str, dormant: bool, values: Codec, force: bool) -> int:
    """Write what a file holds in another format; return the exit status.

    Args:
        path: the file to read.
        out: the file to write.
        how: how ``path`` is read.
        to: "maskedlinear"; or "safetensors", "npz" or "torch", which are dense and have no masks.
        dormant: whether dormant values are written too.
        values: how live values are written: "raw" or "pcodec".
        force: whether ``out`` may be there already.
    """
    if to not in _ENDS:
        return _written(
            path, out, how, force, lambda source, file: _ours(source, file, dormant, values), ".safetensors"
        )
    if dormant or values != "raw":
        raise ValueError(f"--dormant and --values go with --to maskedlinear; a dense {to} file has no place for them")
    return _written(path, out, how, force, _dense, _ENDS[to])


def _written(
    path: Path, out: Path, how: How, force: bool, write: Callable[[Source, Path], tuple[int, list[str]]], end: str
) -> int:
    check_free(out, force)
    with open_source(path, how) as source:
        with written(out, force, end) as temporary:
            written_count, notes = write(source, temporary)
        count, before = counted(written_count, "array"), size_text(source.nbytes)
        if source.left_out:
            notes.append(f"what is no array is left out: {listed(list(source.left_out))}")
    say([printable(f"{out}: {count}, {size_text(out.stat().st_size)} ({path}: {before})")], sys.stdout)
    say((f"note: {printable(note)}" for note in notes), sys.stderr)
    return 0


def _ours(source: Source, out: Path, dormant: bool, values: Codec) -> tuple[int, list[str]]:
    arrays: dict[str, Array] = {}
    own: dict[str, Array] = {}  # by the name under which each stands in the file, so that what is tied stays so
    left_out = []
    add = progress(sum(info.dense_bytes for info in source.infos.values()), "reading")
    for name, info in source.infos.items():
        first = info.same_as or name
        if first not in own:
            array = source.array(first)
            if isinstance(array, MaskedArray) and array.dormant is not None and not dormant:
                left_out.append(first)
                array = replace(array, dormant=None)
            own[first] = array
        arrays[name] = own[first]
        add(info.dense_bytes)
    save_arrays(arrays, out, values=values, framework=source.framework or "numpy", metadata=source.metadata)
    notes = [f"dormant values are left out, of {listed(left_out)}; --dormant keeps them"] if left_out else []
    return len(arrays), notes


def _dense(source: Source, out: Path) -> tuple[int, list[str]]:
    """Write arrays whole, each read when its turn comes; return how many, and notes."""
    lost: dict[str, list[str]] = {"masks are zeros in this format": [], "dormant values are left out": []}
    masks, dormant = lost.values()
    add = progress(sum(info.dense_bytes for info in source.infos.values() if not info.is_optimizers), "writing")

    def raw(name: str) -> NDArray[Any]:
        array = source.array(name)
        add(source.infos[name].dense_bytes)
        if isinstance(array, PlainArray):
            return array.data()
        masks.append(name)
        if array.dormant is not None:
            dormant.append(name)
        return array.raw()

    arrays: dict[str, Array] = {}
    own: dict[str, Array] = {}
    for name, info in source.infos.items():
        if info.is_optimizers:  # plain models load the file strictly
            continue
        source.check_whole(name)
        if out.suffix == ".npz" and "\0" in name:
            raise ValueError(f"{escaped(name)}: a .npz file cuts names off at NUL; --to safetensors keeps them")
        first = info.same_as or name
        lazy = PlainArray(info.dtype, info.shape, lambda first=first: raw(first))  # type: ignore[misc]
        arrays[name] = own.setdefault(first, lazy)
    takes_metadata = out.suffix == ".safetensors"
    write_dense(arrays, out, metadata=source.metadata if takes_metadata else None)
    if source.metadata and not takes_metadata:
        lost["metadata are left out"] = list(source.metadata)
    notes = [f"{what}, of {listed(names)}" for what, names in lost.items() if names]
    if optimizers := len(source.infos) - len(arrays):
        notes.append(f"the state of an optimizer is left out, {counted(optimizers, 'array')}")
    return len(arrays), notes
