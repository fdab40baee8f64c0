""".npz files, of arrays by name and of ``scipy.sparse.save_npz``: what a zip claims is checked before it is unpacked."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from maskedlinear.checkpoint._arrays import MaskedArray
from maskedlinear.checkpoint._errors import CheckpointError
from maskedlinear.checkpoint._foreign_masks import from_entries

__all__ = ["Zip", "array_of_scipy"]


class Zip:
    """A zip file, its claims checked.

    Args:
        path: the file.
        limit: how many bytes its entries may take unpacked, all together.

    Raises:
        CheckpointError: if it is damaged, has two entries of one name, or claims more than ``limit``.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except Exception as error:  # whatever zipfile meets in what is none
            raise CheckpointError(f"{path}: no zip file that is whole: {error}") from error
        files = [entry for entry in self._zip.infolist() if not entry.filename.endswith("/")]
        self._entries = {entry.filename: entry for entry in files}
        try:
            self._check(len(files), limit)
        except BaseException:
            self._zip.close()
            raise

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._zip.close()

    def _check(self, count: int, limit: int) -> None:
        if len(self._entries) != count:
            raise CheckpointError(f"{self.path}: two of its entries have one name")
        claimed = sum(entry.file_size for entry in self._entries.values())
        if claimed > limit:
            raise CheckpointError(
                f"{self.path}: its entries claim {claimed} bytes unpacked, and at most {limit} are read: if that is right, "
                f"give max_bytes={claimed}"
            )

    @property
    def is_torch(self) -> bool:
        """Whether it is one of ``torch.save``."""
        return any(name.endswith("data.pkl") for name in self._entries)

    @property
    def is_scipy(self) -> bool:
        """Whether it is one of ``scipy.sparse.save_npz``."""
        return {"format.npy", "shape.npy", "data.npy"} <= self._entries.keys()

    def check_stored(self) -> None:
        """Check that nothing is compressed, as nothing is that torch writes, that entries do not share bytes, and all sums.

        Raises:
            CheckpointError: if something is, or a CRC-32 is another, which torch does not look at.
        """
        packed = [name for name, entry in self._entries.items() if entry.compress_type != zipfile.ZIP_STORED]
        if packed or sum(entry.file_size for entry in self._entries.values()) > self.path.stat().st_size:
            raise CheckpointError(
                f"{self.path}: entries of a file of PyTorch are not compressed, and take no more than the file; got "
                f"{packed[0] if packed else 'more'}"
            )
        try:
            damaged = self._zip.testzip()
        except Exception as error:
            raise CheckpointError(f"{self.path}: no zip file that is whole: {error}") from error
        if damaged is not None:
            raise CheckpointError(
                f"{self.path}: {damaged} is not as it was written: its CRC-32 is another; of a file that was saved without, "
                "give read what torch.load returns"
            )

    def names(self) -> Iterator[str]:
        """Yield the names of the entries of a ``.npz``, all of which end in ``.npy``."""
        for name in self._entries:
            if not name.endswith(".npy"):
                raise CheckpointError(f"{self.path}: entries of a .npz are .npy files; got {name!r}")
            yield name

    def array(self, name: str) -> NDArray[Any]:
        """Return one array, whose header must claim as many bytes as the entry has.

        Raises:
            CheckpointError: if it is damaged, holds objects, or is not there.
        """
        shape, dtype, data, fortran = self._read(name, whole=True)
        flat = np.frombuffer(data, dtype)
        return flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)

    def kind(self, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Return the shape and dtype of an array, of which no more than the header is read.

        Raises:
            CheckpointError: as by :meth:`array`.
        """
        return self._read(name, whole=False)[:2]

    def _read(self, name: str, *, whole: bool) -> tuple[tuple[int, ...], np.dtype[Any], bytearray, bool]:
        if name not in self._entries:
            raise CheckpointError(f"{self.path}: it lacks {name}")
        try:
            with self._zip.open(self._entries[name]) as file:
                version = np.lib.format.read_magic(file)
                header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                if version not in header:
                    raise ValueError(f"it has version {version} of the .npy format, where 1.0 or 2.0 was due")
                shape, fortran, dtype = header[version](file)
                if dtype.hasobject:
                    raise ValueError("it holds Python objects, which only pickle reads; save arrays of numbers")
                due = math.prod(shape) * dtype.itemsize
                if min(shape, default=0) < 0 or due != self._entries[name].file_size - file.tell():
                    raise ValueError(
                        f"its header claims {due} bytes, {dtype} {str(shape)[:100]}, which it does not have"
                    )
                if not whole:
                    return shape, dtype, bytearray(), fortran
                data = bytearray(due)
                view, at = memoryview(data), 0
                while at < due:
                    got = file.readinto(view[at:])  # type: ignore[attr-defined]
                    if not got:
                        raise ValueError("it is cut off")
                    at += got
                if file.read(1):  # which also compares the CRC-32
                    raise ValueError("it goes on past its end")
        except MemoryError:
            raise
        except Exception as error:  # whatever NumPy meets in what is no header
            raise CheckpointError(f"{self.path}: {name}: {error}") from error
        return shape, dtype, data, fortran


def array_of_scipy(archive: Zip) -> MaskedArray:
    """Return the matrix of ``scipy.sparse.save_npz``, of any format; each stored entry is live, one that is 0 too.

    Raises:
        CheckpointError: if it is damaged, an index is out of bounds, or an entry is stored twice.
    """
    form = archive.array("format.npy")
    name = form.item() if form.shape == () else None
    name = name.decode("ascii", "replace") if isinstance(name, bytes) else str(name)
    data = archive.array("data.npy")
    try:
        shape = tuple(_whole(archive, "shape.npy").reshape(-1).tolist())
        if name == "coo":
            places = _coo_places(archive, len(shape))
        else:
            if len(shape) != 2:
                raise ValueError(f"a matrix of format {name!r} has two dimensions; got shape {shape}")
            if name in ("csr", "csc"):
                first, second = _compressed(archive, shape[name == "csc"], len(data))
                places = np.stack([first, second] if name == "csr" else [second, first])
            elif name == "bsr":
                places, data = _blocks(archive, shape, data)
            elif name == "dia":
                places, data = _diagonals(archive, shape, data)
            else:
                raise ValueError(f"scipy saves csr, csc, coo, bsr and dia; got {name!r}")
        return from_entries(shape, data, places)
    except (ValueError, TypeError, IndexError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{archive.path}: {error}") from error


def _coo_places(archive: Zip, ndim: int) -> NDArray[np.int64]:
    names = ("row.npy", "col.npy") if "row.npy" in archive._entries else ("coords.npy",)
    parts = [_whole(archive, name) for name in names]
    return np.stack(parts) if len(parts) == 2 else parts[0].reshape(ndim, -1)


def _whole(archive: Zip, name: str) -> NDArray[np.int64]:
    array = archive.array(name)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} holds whole numbers; got {array.dtype}")
    return array.astype(np.int64)


def _compressed(archive: Zip, rows: int, nnz: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return both indices of each entry of a compressed matrix, the compressed one first."""
    starts, indices = _whole(archive, "indptr.npy"), _whole(archive, "indices.npy")
    right = starts.shape == (rows + 1,) and indices.shape == (nnz,) and starts[0] == 0 and starts[-1] == nnz
    if not right or (np.diff(starts) < 0).any():
        raise ValueError(
            f"indptr goes up from 0 to the {nnz} entries in {rows + 1} steps, and indices are as many; got {starts.shape} "
            f"and {indices.shape}"
        )
    return np.repeat(np.arange(rows), np.diff(starts)), indices


def _blocks(archive: Zip, shape: tuple[int, ...], data: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[Any]]:
    if data.ndim != 3 or 0 in data.shape[1:] or shape[0] % data.shape[1] or shape[1] % data.shape[2]:
        raise ValueError(f"blocks divide the matrix {shape}; got data of shape {data.shape}")
    count, height, width = data.shape
    rows, columns = _compressed(archive, shape[0] // height, count)
    block, row, column = np.unravel_index(np.arange(data.size), data.shape)
    return np.stack([rows[block] * height + row, columns[block] * width + column]), data.reshape(-1)


def _diagonals(archive: Zip, shape: tuple[int, ...], data: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[Any]]:
    offsets = _whole(archive, "offsets.npy")
    if data.ndim != 2 or offsets.shape != (len(data),):
        raise ValueError(f"each diagonal has an offset; got data {data.shape} and offsets {offsets.shape}")
    diagonal, columns = np.unravel_index(np.arange(data.size), data.shape)
    rows = columns - offsets[diagonal]
    inside = (rows >= 0) & (rows < shape[0]) & (columns < shape[1])
    return np.stack([rows[inside], columns[inside]]), data.reshape(-1)[inside]
