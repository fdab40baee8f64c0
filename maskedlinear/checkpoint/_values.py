"""How the values of a masked array stand in a file: as they are, through pcodec, or not at all, where all are ``True``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from maskedlinear._extras import missing_framework
from maskedlinear.checkpoint._dtypes import BITS
from maskedlinear.checkpoint._errors import CheckpointError
from maskedlinear.checkpoint._json import shown

__all__ = ["RAW", "Codec", "Values", "compress", "decompress", "stored"]

Codec = Literal["raw", "pcodec"]
Bytes = NDArray[np.uint8]

#: As what pcodec takes each dtype: 16-bit floats as integers, which it makes smaller. Others stay as they are.
_TYPES = {
    "F64": ("<f8", "f64"),
    "F32": ("<f4", "f32"),
    "F16": ("<u2", "u16"),
    "BF16": ("<u2", "u16"),
    "I64": ("<i8", "i64"),
    "I32": ("<i4", "i32"),
    "I16": ("<i2", "i16"),
    "U64": ("<u8", "u64"),
    "U32": ("<u4", "u32"),
    "U16": ("<u2", "u16"),
}
_BLOCK = 1 << 18  # values
_RECORD = 8  # bytes of a block in the index


@dataclass(frozen=True)
class Values:
    """What the header says of how values stand: ``"raw"``, ``"true"`` (they take no bytes) or ``"pcodec"``.

    Attributes:
        codec: which of these; raw values are a tensor of their dtype, the others' one of bytes, or none.
        header: pcodec's own, two bytes or more that say the version of its format.
        block: values of a block.
    """

    codec: str = "raw"
    header: bytes = b""
    block: int = 0

    @classmethod
    def from_json(cls, told: Any, dtype: str) -> Values:
        """Return what the header says, checked.

        Raises:
            ValueError: if it is no codec of this dtype.
        """
        if told == "raw" or (told == "true" and dtype == "BOOL"):
            return cls(told)
        if isinstance(told, dict) and told.keys() == {"codec", "header", "block"} and told["codec"] == "pcodec":
            header, block = told["header"], told["block"]
            is_counted = type(block) is int and 0 < block <= _BLOCK
            if dtype in _TYPES and isinstance(header, str) and len(header) <= 32 and is_counted:
                return cls("pcodec", bytes.fromhex(header), block)
        raise ValueError(f"its values, {dtype}, are raw, true (BOOL) or through pcodec; got {shown(told)}")

    def to_json(self) -> Any:
        """Return what :meth:`from_json` reads."""
        if self.codec != "pcodec":
            return self.codec
        return {"codec": "pcodec", "header": self.header.hex(), "block": self.block}


RAW = Values()


def stored(values: NDArray[Any], dtype: str, codec: Codec, *, is_live: bool) -> tuple[Values, NDArray[Any]]:
    """Return how values are to stand in a file, and what to write: through ``codec`` where that makes them smaller."""
    if is_live and dtype == "BOOL" and values.all():
        return Values("true"), values[:0]
    if codec == "pcodec" and dtype in _TYPES and len(values):
        header, data = compress(values, dtype)
        if len(data) < values.nbytes and len(values) <= 8 * len(data):
            return Values("pcodec", header, _BLOCK), data
    return RAW, values


def compress(values: NDArray[Any], dtype: str) -> tuple[bytes, Bytes]:
    """Return pcodec's header, and values through it: where each block ends (uint64), and then the blocks.

    Raises:
        ModuleNotFoundError: if pcodec is not installed.
    """
    try:
        from pcodec import ChunkConfig, PagingSpec, wrapped
    except ModuleNotFoundError as error:
        raise missing_framework(error, 'values="pcodec"', "pcodec", "pcodec") from error
    file, parts = wrapped.FileCompressor(), []
    for start in range(0, len(values), _BLOCK):
        block = np.ascontiguousarray(values[start : start + _BLOCK]).view(_TYPES[dtype][0])
        chunk = file.chunk_compressor(block, ChunkConfig(paging_spec=PagingSpec.exact_page_sizes([len(block)])))
        parts.append(chunk.write_meta() + chunk.write_page(0))
    ends = _RECORD * len(parts) + np.cumsum([len(part) for part in parts])
    return file.write_header(), np.frombuffer(ends.astype("<u8").tobytes() + b"".join(parts), np.uint8)


def decompress(
    told: Values, dtype: str, count: int, length: int, read: Callable[[int, int], Bytes], first: int, last: int
) -> NDArray[Any]:
    """Return values ``first`` to ``last`` of ``count`` that :func:`compress` made ``length`` bytes of.

    Args:
        told: what the header says of them.
        dtype: safetensors' name of theirs.
        count: how many there are.
        length: of their tensor, in bytes.
        read: returns its bytes from one place to another.
        first: the first value.
        last: the one after the last.

    Raises:
        CheckpointError: if pcodec is not installed, or knows no such version.
        ValueError: if these are no values that it wrote.
    """
    try:
        from pcodec import wrapped
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"values through pcodec: {missing_framework(error, 'they', 'pcodec', 'pcodec')}"
        ) from error
    blocks = -(-count // told.block)
    if blocks * _RECORD > length:
        raise ValueError(
            f"{blocks} blocks of values have an index of {blocks * _RECORD} bytes; their tensor has {length}"
        )
    ends = np.zeros(blocks + 1, np.int64)
    ends[0], ends[1:] = blocks * _RECORD, read(0, blocks * _RECORD).view("<i8")
    if (np.diff(ends) < 0).any() or ends[-1] != length:
        raise ValueError("the index of the values does not rise to the end of their tensor")
    numpy_type, name = _TYPES[dtype]
    begin, end = first // told.block, -(-last // told.block) if last > first else first // told.block
    offset = int(ends[begin])
    blocks_read = read(offset, int(ends[end]))
    values = np.zeros(min(count, end * told.block) - min(count, begin * told.block), numpy_type)
    for block in range(begin, end):
        into = values[(block - begin) * told.block : (block - begin + 1) * told.block]
        data = blocks_read[ends[block] - offset : ends[block + 1] - offset].tobytes()
        try:
            file, _ = wrapped.FileDecompressor.new(told.header)
            chunk, meta = file.chunk_decompressor(data, name)
            progress, used = chunk.read_page_into(data[meta:], len(into), into)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of Rust's is no Exception
            raise ValueError(f"pcodec cannot read its values: {str(error)[:200]}") from error
        if progress.n_processed != len(into) or not progress.finished or meta + used != len(data):
            raise ValueError("pcodec read another number of values, or of bytes, than there are")
    return values[first - begin * told.block : last - begin * told.block].view(BITS[dtype])
