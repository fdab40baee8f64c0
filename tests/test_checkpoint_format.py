"""Version 1 of the format is frozen: a file is read here by the words of docs/checkpoint-format.md, in plain Python."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib

import numpy as np

from helpers import ROOT
from maskedlinear import checkpoint, masks
from maskedlinear.checkpoint._codes import CODES

FILE = ROOT / "tests" / "data" / "checkpoint_v1.safetensors"
UNPACK = {"F64": "d", "F32": "f", "F16": "e", "BF16": "H", "I16": "h", "I8": "b", "U8": "B", "BOOL": "?"}


def numbers(kind: str, data: bytes) -> list:
    return list(struct.unpack(f"<{len(data) // struct.calcsize(kind)}{kind}", data))


def bits(data: bytes) -> list[int]:
    return [byte >> bit & 1 for byte in data for bit in range(8)]


class Bytes:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def take(self, count: int) -> bytes:
        assert count <= len(self.data)
        taken, self.data = self.data[:count], self.data[count:]
        return taken

    def list(self, count: int, parameters: list[int] | None = None) -> list[int]:
        """Read a list of ``count`` numbers, with a parameter in front, or these."""
        if parameters is None:
            parameters = [self.take(1)[0]] * count
        unary = bits(self.take(numbers("I", self.take(4))[0]))
        ones = [place for place, bit in enumerate(unary) if bit]
        assert len(ones) == count
        quotients = [one - before - 1 for before, one in zip([-1, *ones], ones, strict=False)]
        values = [quotient << k for quotient, k in zip(quotients, parameters, strict=True)]
        for plane in range(max(parameters, default=0)):
            there = [number for number, k in enumerate(parameters) if k > plane]
            for number, bit in zip(there, bits(self.take(-(-len(there) // 8))), strict=False):
                values[number] |= bit << plane
        return values


def gaps(found: list[int]) -> list[int]:
    """Return the places of entries with these numbers of dead ones before them."""
    return [sum(found[: number + 1]) + number for number in range(len(found))]


def block(encoding: str, stream: Bytes, nnz: int, size: int, width: int) -> list[int]:
    if encoding == "bits":
        return [place for place, bit in enumerate(bits(stream.take(-(-size // 8)))) if bit]
    if encoding == "gaps":
        return gaps(stream.list(nnz))
    if encoding == "deflate":
        kind = {1: "B", 2: "H", 4: "I", 8: "Q"}[stream.take(1)[0]]
        return gaps(numbers(kind, zlib.decompress(stream.take(len(stream.data)))))
    if encoding == "groups":
        group, planes = stream.take(2)
        words = [word for word in range(1 << group) if bin(word).count("1") * size == nnz * group]
        which = [0] * (size // group)
        for plane in range(planes):
            for number, bit in enumerate(bits(stream.take(-(-len(which) // 8)))[: len(which)]):
                which[number] |= bit << plane
        return [number * group + i for number, k in enumerate(which) for i in range(group) if words[k] >> i & 1]
    if encoding == "runs":
        runs = numbers("I", stream.take(4))[0]
        places: list[int] = []
        for dead, length in zip(stream.list(runs), stream.list(runs), strict=True):
            start = places[-1] + 1 + dead + 1 if places else dead
            places += range(start, start + length + 1)
        return places
    assert encoding == "rows"
    fewest = numbers("I", stream.take(4))[0]
    counts = [count + fewest for count in stream.list(size // width)]
    best = [max([k for k in range(33) if c << k <= width - c], default=0) for c in counts]
    found = stream.list(nnz, [k for c, k in zip(counts, best, strict=True) for _ in range(c)])
    places = []
    for row, count in enumerate(counts):
        places += [row * width + place for place in gaps(found[:count])]
        found = found[count:]
    return places


def places(mask: dict, shape: list[int], nnz: int, tensor: bytes) -> list[int]:
    rows, width = shape[0], math.prod(shape[1:])
    if mask["encoding"] == "full":
        return list(range(nnz))
    tall, broad = mask.get("repeat", [1, 1])
    line, coded = width // broad, rows // tall * (width // broad)
    blocks = -(-coded // mask["block"])
    index, found, before = numbers("Q", tensor[: 16 * blocks]), [], [0, 16 * blocks]
    for number in range(blocks):
        live, end = index[2 * number : 2 * number + 2]
        stream, start = Bytes(tensor[before[1] : end]), number * mask["block"]
        size = min(mask["block"], coded - start)
        found += [start + place for place in block(mask["encoding"], stream, live - before[0], size, line)]
        assert not stream.data
        before = [live, end]
    assert before == [nnz // (tall * broad), len(tensor)]
    whole = {(row, column) for row, column in (divmod(place, line) for place in found)}
    return [p for p in range(rows * width) if (p // width // tall, p % width // broad) in whole]


def digest(shape: list[int], live: list[int]) -> str:
    windows = sorted({place >> 16 for place in live})
    table = [n for window in windows for n in (window, sum(place >> 16 == window for place in live))]
    text = ",".join(map(str, shape)).encode()
    text += struct.pack(f"<{len(table)}Q", *table) + struct.pack(f"<{len(live)}H", *(place & 0xFFFF for place in live))
    return hashlib.sha256(text).hexdigest()


def read(file: bytes) -> dict[str, tuple]:
    """Return of each array the shape, the live places, live values, and dormant ones; of plain ones the values."""
    start = 8 + numbers("Q", file[:8])[0]
    header = json.loads(file[8:start])
    metadata = header.pop("__metadata__")
    first = 48
    assert file[8:first] == b'{"__metadata__":{"maskedlinear.sha256":"'
    assert file[first : first + 64].decode() == metadata["maskedlinear.sha256"]
    assert (
        hashlib.sha256(file[:first] + b"0" * 64 + file[first + 64 : start]).hexdigest()
        == metadata["maskedlinear.sha256"]
    )
    tensors, sums = {}, ""
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        data = file[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
        sums += "".join(f"{zlib.crc32(data[place : place + 2**20]):08x}" for place in range(0, len(data), 2**20))
        tensors[name] = data if name.endswith("/mask") else numbers(UNPACK[entry["dtype"]], data)
    assert sums == metadata["maskedlinear.crc32"]
    told = json.loads(metadata["maskedlinear"])
    assert (told["version"], told["framework"], metadata["note"]) == (1, "torch", "ä")
    found: dict[str, tuple] = {}
    for name, entry in told["arrays"].items():
        if "same_as" in entry:
            found[name] = found[entry["same_as"]]
        elif "mask" not in entry:
            found[name] = (tensors[name],)
        else:
            shape, mask = entry["shape"], entry["mask"]
            if mask["encoding"] == "recipe":
                assert mask["recipe"] == {"name": "random", "algorithm": "mask_v1", "sparsity": "0.75", "seed": "7"}
                assert entry["axes"] == {"out": [1], "in": [0], "batch": []}
                live = np.flatnonzero(masks.random((shape[1], shape[0]), sparsity=0.75, seed=7).T).tolist()
            else:
                live = places(mask, shape, entry["nnz"], tensors.get(f"{name}/mask", b""))
            assert mask["sha256"] == digest(shape, live)
            values = [True] * len(live) if entry["values"] == "true" else tensors[f"{name}/values"]
            found[name] = shape, live, values, tensors.get(f"{name}/dormant") if "dormant" in entry else None
    return found


#: Where each array of the file is live; entry (i, j) is ``100 * i + j``, as its dtype has it.
LIVE = {
    "gaps": (6, 20, lambda i, j: (7 * i + 3 * j) % 11 == 0 and i != 3),
    "bits": (8, 12, lambda i, j: (i // 2 * 3 + j // 2 * 5) % 7 < 3),
    "rows": (7, 30, lambda i, j: (i in (2, 5) and j % 2) or (i + j) % 29 == 3),
    "runs": (8, 11, lambda i, j: 2 <= j <= i + 2),
    "deflate": (3, 41, lambda i, j: j % 8 == i),
    "groups": (4, 12, lambda i, j: (j + i) % 4 in (0, 1 + j // 4 % 2)),
    "full": (2, 3, lambda i, j: True),
}


def test_a_file_of_version_1_is_read_by_the_words_of_the_page():
    found = read(FILE.read_bytes())
    assert list(found) == ["gaps", "tied", "bits", "rows", "runs", "deflate", "groups", "recipe", "full", "plain"]
    for name, (rows, columns, is_live) in LIVE.items():
        pairs = [(i, j) for i in range(rows) for j in range(columns)]
        shape, live, values, dormant = found[name]
        assert shape == [rows, columns]
        assert live == [i * columns + j for i, j in pairs if is_live(i, j)], name
        due = np.array([100 * i + j for i, j in pairs if is_live(i, j)])
        if name == "rows":  # bfloat16, the upper half of a float
            values = np.array(np.array(values, "u4") << 16).view("f4")
            assert np.allclose(values, due, rtol=2**-8)
        else:
            kind = {"gaps": "f4", "full": "f2", "runs": "u1"}.get(name, "i1")
            assert np.array_equal(values, due.astype(kind)), name
        rest = [100 * i + j for i, j in pairs if not is_live(i, j)]
        assert dormant == (np.array(rest).astype("i1").tolist() if name == "bits" else None)
    assert found["recipe"][2] == [True] * 12
    assert found["plain"] == ([0.0, 0.25, 0.5],)


def test_it_is_read_so_by_the_library_too():
    plain, loaded = read(FILE.read_bytes()), checkpoint.load(FILE)
    assert list(plain) == list(loaded)
    assert loaded["tied"].values.tobytes() == loaded["gaps"].values.tobytes()
    encodings = set()
    with checkpoint.open(FILE) as file:
        file.verify()
        for name, array in loaded.items():
            if name == "plain":
                assert array.numpy().tolist() == plain[name][0]
                continue
            shape, live, values, dormant = plain[name]
            assert (list(array.shape), array.places.tolist(), array.values.tolist()) == (shape, live, values)
            assert dormant is None or array.dormant.tolist() == dormant
            encodings.add(file.entry(name).mask.encoding)
    assert encodings == {*CODES, "full", "recipe"}


def test_the_page_names_all_that_the_code_has():
    page = (ROOT / "docs" / "checkpoint-format.md").read_text()
    for word in [
        *CODES,
        "full",
        "recipe",
        "raw",
        "true",
        "pcodec",
        "same_as",
        "dormant",
        "repeat",
        "maskedlinear.crc32",
    ]:
        assert f"`{word}`" in page or f'"{word}"' in page, word
