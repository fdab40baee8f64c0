"""safetensors files, written whole or not at all, and read with each claim of theirs checked before it is believed.

Our own few lines and not the safetensors library, because the core needs NumPy alone, and because a tensor is written and
read here a part at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import mmap
import os
import secrets
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray

from maskedlinear.checkpoint._dtypes import BITS, ITEMSIZE
from maskedlinear.checkpoint._errors import CheckpointError
from maskedlinear.checkpoint._json import dumps, loads, shown

__all__ = ["LARGEST_HEADER", "METADATA", "SUMS", "Reader", "Tensor", "replacing", "write"]

METADATA = "__metadata__"
LARGEST_HEADER = 25_000_000  # bytes; what the Hugging Face Hub reads. A tensor takes some 150.
_DIGEST, _SUMS = SUMS = "maskedlinear.sha256", "maskedlinear.crc32"  # of the header, and of each MiB of the tensors
_BEFORE_DIGEST = f'{{"{METADATA}":{{"{_DIGEST}":"'.encode()
_CHUNK = 1 << 20  # bytes of a tensor that have one CRC-32


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written: what it is, and how to get its numbers when their turn comes.

    Attributes:
        dtype: safetensors' name.
        shape: its shape.
        data: returns it as :func:`maskedlinear.checkpoint._dtypes.bits` does.
    """

    dtype: str
    shape: tuple[int, ...]
    data: Callable[[], NDArray[Any]]

    @property
    def nbytes(self) -> int:
        """Its size in the file, in bytes."""
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, summed: bool = True) -> None:
    """Write a safetensors file: into another beside it, which takes its name when all of it is on the disk.

    Each MiB of a tensor has a CRC-32, and the header a SHA-256, in the metadata. A file that was there gives its
    permissions; a link stays, and what it points to is written. What is not ``summed`` is for others, who may edit it.

    Raises:
        OSError: if the file cannot be written; what ``path`` was stays.
        ValueError: if the header would be too long.
    """
    order = sorted(tensors, key=lambda name: (-ITEMSIZE[tensors[name].dtype], name))
    entries: dict[str, Any] = {}
    end = 0
    for name in order:
        tensor = tensors[name]
        entries[name] = {
            "dtype": tensor.dtype,
            "shape": [int(n) for n in tensor.shape],
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    # The sums are known when all tensors have been written, and so take their place in the header then.
    zeros = "0" * 8 * sum(-(-tensors[name].nbytes // _CHUNK) for name in order)
    start = len(_header(entries, metadata, zeros if summed else None))
    with replacing(path) as file:
        file.seek(start)
        sums = "".join(_write(file, name, tensors[name]) for name in order)
        file.seek(0)
        header = _header(entries, metadata, sums if summed else None)
        assert len(header) == start
        file.write(header)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a new file beside another, which takes its name when all of it is on the disk; after an error it is gone."""
    path = Path(os.path.realpath(path))
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(f"{path} is protected against writing: choose another name, or change its permissions")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no folder: make it before {path.name} is saved there")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give the name of a file, as in {path / 'model.safetensors'}")
    temporary = path.with_name(f".{path.name[:60]}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            if path.exists():
                temporary.chmod(stat.S_IMODE(path.stat().st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _write(file: BinaryIO, name: str, tensor: Tensor) -> str:
    """Write a tensor, and return the CRC-32 of each MiB of it."""
    data = tensor.data()
    if data.dtype != BITS[tensor.dtype] or data.shape != tensor.shape:
        raise ValueError(f"{name} was announced as {tensor}, and came as {data.dtype} {data.shape}")
    view = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
    sums = []
    for start in range(0, len(view), _CHUNK):
        part = view[start : start + _CHUNK]
        file.write(part)
        sums.append(f"{zlib.crc32(part):08x}")
    return "".join(sums)


def _header(entries: Mapping[str, Any], metadata: Mapping[str, str], sums: str | None) -> bytes:
    """Return the file up to its tensors. The digest is that of these bytes with zeros in its own place, which is fixed."""
    summed = {} if sums is None else {_DIGEST: "0" * 64, _SUMS: sums}
    text = dumps({METADATA: {**summed, **metadata}, **entries}).encode()
    if len(text) > LARGEST_HEADER:
        raise ValueError(
            f"a header has at most {LARGEST_HEADER} bytes; got {len(text)}: save fewer arrays in a file, or less metadata"
        )
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head if sums is None else head.replace(b"0" * 64, hashlib.sha256(head).hexdigest().encode(), 1)


def _sync_folder(folder: Path) -> None:
    """Have the folder's entry on the disk too, where a system can do that."""
    if hasattr(os, "O_DIRECTORY"):
        with contextlib.suppress(OSError):  # the file is there; not each file system can do this too
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


class Reader:
    """An open safetensors file, ours or another's, whose header has been checked; reads tensors, or parts of them.

    Args:
        path: the file.
        mapped: whether what is read are read-only views of the file, mapped into memory, and not copies.

    Attributes:
        metadata: what its metadata says, strings by name.
        tensors: dtype, shape and the two offsets of each tensor, by name.
        is_summed: whether it has the sums that :func:`write` adds.

    Raises:
        CheckpointError: if the file is none of safetensors, or its header contradicts itself or the file's size.
        OSError: if it cannot be read.
    """

    def __init__(self, path: Path, *, mapped: bool = False) -> None:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder; checkpoint.read reads those of Hugging Face")
        self.path = path
        self._file: BinaryIO = path.open("rb")
        self._map: NDArray[np.uint8] | None = None
        try:
            self._read_header()
            if mapped:
                self._map = self._mapped()
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Close the file. What is mapped stays so for as long as there are arrays that are views of it."""
        self._file.close()
        self._map = None

    def fail(self, message: str) -> NoReturn:
        """Raise a :class:`CheckpointError` that names the file."""
        raise CheckpointError(f"{self.path}: {message}")

    def _read_header(self) -> None:
        self._size = size = os.fstat(self._file.fileno()).st_size
        first = self._file.read(8)
        length = int.from_bytes(first, "little")
        if size < 8:
            self.fail(f"no safetensors file, or one that is cut off: it has {size} bytes")
        if not 2 <= length <= min(size - 8, LARGEST_HEADER):
            self.fail(
                f"no safetensors file that is read here: its first eight bytes claim a header of {length} bytes, of "
                f"{size - 8} that follow and {LARGEST_HEADER} at most; checkpoint.read reads other formats"
            )
        text = self._file.read(length)
        try:
            header = loads(text.decode())
        except ValueError as error:
            self.fail(f"its header is no JSON that is read here: {str(error)[:200]}")
        if not isinstance(header, dict):
            self.fail("its header is no JSON object")
        metadata = header.pop(METADATA, {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            self.fail("its metadata are no strings by name")
        self.metadata: dict[str, str] = metadata
        self._start = 8 + length
        checked = {name: self._checked(name, entry) for name, entry in header.items()}
        #: By where they lie.
        self.tensors = dict(sorted(checked.items(), key=lambda item: item[1][2:]))
        end = 0
        for name, (_, _, start, stop) in self.tensors.items():
            if start != end:
                self.fail(f"tensors lie one behind the other; {shown(name)} starts at {start}, where {end} was due")
            end = stop
        if self._start + end != size:
            self.fail(f"its tensors end at {self._start + end}, and the file at {size}: it is cut off or was added to")
        self.is_summed = _DIGEST in metadata
        if self.is_summed:
            self._read_sums(first + text)

    def _read_sums(self, head: bytes) -> None:
        """Check the header's SHA-256, and find where the CRC-32 of each tensor stand."""
        place = 8 + len(_BEFORE_DIGEST)
        zeroed = head[:place] + b"0" * 64 + head[place + 64 :]
        if head[8:place] != _BEFORE_DIGEST or self.metadata[_DIGEST] != hashlib.sha256(zeroed).hexdigest():
            self.fail("its header is not as it was written: its SHA-256 is another")
        self._sums = self.metadata.get(_SUMS, "")
        self._first_sum: dict[str, int] = {}
        count = 0
        for name, (_, _, start, stop) in self.tensors.items():
            self._first_sum[name] = count
            count += -(-(stop - start) // _CHUNK)
        if len(self._sums) != 8 * count:
            self.fail(f"each MiB of a tensor has a CRC-32; there are {len(self._sums) // 8} for {count}")

    def _checked(self, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            self.fail(f"{shown(name)} has no dtype, shape and data_offsets, or more than them")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in ITEMSIZE:
            self.fail(f"{shown(name)} has the dtype {shown(dtype)}; known are {', '.join(ITEMSIZE)}")
        for what, numbers in (("shape", shape), ("offsets", offsets)):
            if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
                self.fail(f"{shown(name)} has the {what} {shown(numbers)}, where a list of counts was due")
        if len(shape) > 32 or len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * ITEMSIZE[dtype]:
            self.fail(f"{shown(name)}, {dtype} of shape {shown(shape)}, does not take the bytes {offsets}")
        if math.prod(n for n in shape if n) * ITEMSIZE[dtype] >= 1 << 62:  # NumPy counts so, where another axis is 0
            self.fail(f"{shown(name)} has the shape {shown(shape)}, which is too large")
        return dtype, tuple(shape), offsets[0], offsets[1]

    def read(self, name: str) -> NDArray[Any]:
        """Return a tensor, as :func:`maskedlinear.checkpoint._dtypes.bits` has it.

        Raises:
            CheckpointError: if a CRC-32 is another than when it was written.
        """
        dtype, shape, start, stop = self.tensors[name]
        return self.read_part(name, 0, (stop - start) // ITEMSIZE[dtype]).reshape(shape)

    def read_part(self, name: str, first: int, last: int) -> NDArray[Any]:
        """Return entries ``first`` to ``last`` of a tensor, flat. Each MiB in which they are is compared with its CRC-32.

        Raises:
            CheckpointError: if a CRC-32 is another than when it was written.
        """
        dtype, _, start, stop = self.tensors[name]
        size, length = ITEMSIZE[dtype], stop - start
        if not 0 <= first <= last <= length // size:
            self.fail(f"{shown(name)} has {length // size} entries; asked for {first} to {last}")
        if first == last:
            return np.empty(0, BITS[dtype])
        if not self.is_summed:
            return self._viewed(name, self._bytes(start + first * size, start + last * size))
        chunk = first * size // _CHUNK
        begin = chunk * _CHUNK
        data = self._bytes(start + begin, start + min(length, -(-last * size // _CHUNK) * _CHUNK))
        at = self._first_sum[name] + chunk
        for place in range(0, len(data), _CHUNK):
            if f"{zlib.crc32(data[place : place + _CHUNK].data):08x}" != self._sums[8 * at : 8 * at + 8]:
                self.fail(f"{shown(name)} is not as it was written: its CRC-32 is another")
            at += 1
        return self._viewed(name, data[first * size - begin : last * size - begin])

    def _viewed(self, name: str, data: NDArray[np.uint8]) -> NDArray[Any]:
        dtype = self.tensors[name][0]
        if dtype == "BOOL" and data.max() > 1:
            self.fail(f"{shown(name)} is of booleans, which are bytes of 0 and 1; it has others")
        viewed = data.view(BITS[dtype])
        if not viewed.flags.aligned:  # a header of others that does not end at a multiple of 8 bytes
            viewed = viewed.copy()
            viewed.flags.writeable = False
        return viewed

    def check(self, name: str) -> None:
        """Raise a :class:`CheckpointError` if a tensor is not as it was written; it is looked at a MiB at a time."""
        dtype, _, start, stop = self.tensors[name]
        count, step = (stop - start) // ITEMSIZE[dtype], _CHUNK // ITEMSIZE[dtype]
        for first in range(0, count, step):
            self.read_part(name, first, min(count, first + step))

    def _bytes(self, start: int, stop: int) -> NDArray[np.uint8]:
        if self._file.closed:
            raise ValueError(f"{self.path} was closed: read its arrays before that")
        if self._map is not None:
            self._check_size()
            return self._map[self._start + start : self._start + stop]
        data = np.empty(stop - start, np.uint8)
        self._file.seek(self._start + start)
        if self._file.readinto(data.data) != data.size:  # type: ignore[attr-defined]
            self.fail("it became shorter while it was read")
        return data

    def _mapped(self) -> NDArray[np.uint8]:
        """Return the whole file as bytes that nobody can write, which its views keep mapped."""
        self._check_size()
        try:
            return np.frombuffer(mmap.mmap(self._file.fileno(), self._size, access=mmap.ACCESS_READ), np.uint8)
        except ValueError as error:  # it was cut off since
            self.fail(f"it cannot be mapped: {error}")

    def _check_size(self) -> None:
        """Raise unless the file is as long as its header says: behind its end, pages cannot be touched (SIGBUS)."""
        if os.fstat(self._file.fileno()).st_size < self._size:
            self.fail("it became shorter while it was read")
