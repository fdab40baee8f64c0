"""Hostile checkpoints by the thousand: whatever is done to a file, the right arrays or ``CheckpointError`` come of it.

``tests/test_checkpoint_hostile.py`` runs 3,000; this runs as many as one likes::

    PYTHONPATH=.:tests python tests/checkpoint_fuzz.py 1000000
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
import time
import tracemalloc
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from maskedlinear import masks
from maskedlinear.checkpoint import CheckpointError, CheckpointFile, MaskedArray, PlainArray
from maskedlinear.checkpoint._dtypes import ITEMSIZE
from maskedlinear.checkpoint._file import save_arrays
from maskedlinear.models import WeightAxes

MIB = 1 << 20
SLACK = 4 * MIB  # allocated for any file: Python's objects of its header, a MiB of a tensor

SMALL = [0, 1, 2, 3, 7, 8, 9, 255, 256, 4095]
LARGE = [1 << 20, (1 << 20) + 1, 1 << 26, 1 << 31, 1 << 32, 1 << 40, 1 << 47, (1 << 62) - 1, 1 << 62, (1 << 63) - 1]
NUMBERS = [*SMALL, *LARGE, 1 << 63, (1 << 64) - 1, 10**30, -1, -(1 << 63)]
STRINGS = ["raw", "true", "pcodec", "gaps", "rows", "runs", "bits", "groups", "deflate", "full", "recipe"]
STRINGS += ["dense", "sparse", "F32", "U8", "BOOL", "BF16", "C64", "F9", "os.system", "random", "a", "plain"]
STRINGS += ["gaps/mask", "", "\x00\x1b[2J", "\u202e", "0" * 64]
KEYS = ["shape", "dtype", "nnz", "form", "mask", "values", "dormant", "axes", "role", "same_as", "encoding"]
KEYS += ["sha256", "block", "repeat", "recipe", "name", "seed", "codec", "header", "version", "arrays", "framework"]
TEXTS = ["NaN", "Infinity", "1e999", "-0", "1.5", "{", ",", "9" * 5000, "[" * 5000, '{"a":' * 3000, '"\\ud800"']
FILES = ["gaps tied plain", "bits rows", "runs deflate bytes", "groups blocks recipe", "full empty none", "alone bool"]


def arrays() -> dict[str, PlainArray | MaskedArray]:
    """Return arrays of which each encoding, codec and kind of entry is one."""
    rng = np.random.default_rng(0)

    def masked(mask: Any, dtype: str = "f4", **more: Any) -> MaskedArray:
        return MaskedArray.of(rng.standard_normal(mask.shape).astype(dtype), mask, **more)

    ends = masks.receptive_field((40,), 9)
    uneven = rng.random((64, 200)) < np.where(np.arange(64) % 8 == 0, 0.7, 0.01)[:, None]
    made = masks.Recipe("random", sparsity="0.9", seed=3)
    gaps = masked(masks.random((24, 50), sparsity=0.9), role="linear.weight", axes=WeightAxes())
    return {
        "gaps": gaps,
        "tied": gaps,
        "bits": masked(rng.random((6, 5, 4)) < 0.5, dormant=True),
        "rows": masked(uneven, "f2"),
        "runs": masked(np.tril(np.ones((30, 31), np.bool_)), form="sparse"),
        "deflate": masked(ends),
        "blocks": masked(masks.blocks((16, 24), (4, 3), sparsity=0.6)),
        "groups": masked(masks.n_of_m((6, 32), 3, 8)),
        "recipe": masked(made.make((20, 30)), recipe=made, axes=WeightAxes()),
        "full": masked(np.ones((3, 4), np.bool_), dormant=True),
        "empty": masked(np.zeros((3, 4), np.bool_)),
        "none": masked(np.zeros((0, 4), np.bool_)),
        "alone": MaskedArray.of(np.ones((9, 9), np.bool_), rng.random((9, 9)) < 0.2),
        "bool": MaskedArray.of(rng.random((9, 9)) < 0.5, rng.random((9, 9)) < 0.2),
        "plain": PlainArray.of(rng.standard_normal(5), role="linear.bias"),
        "scalar": PlainArray.of(np.float32(3)),
        "bytes": PlainArray.of(rng.random(7) < 0.5),
    }


def files(folder: Path) -> list[bytes]:
    """Return the files that are changed: small ones, so that many can be, with a few arrays each."""
    made, found = arrays(), []
    rng = np.random.default_rng(1)
    many = MaskedArray.of(rng.standard_normal((60, 60)).astype("f4"), rng.random((60, 60)) < 0.4, dormant=True)
    path = folder / "made.safetensors"
    for names in FILES:
        save_arrays({name: made[name] for name in names.split()}, path, metadata={"note": "0.9"})
        found.append(path.read_bytes())
    save_arrays({"pcodec": many}, path, values="pcodec")
    return [*found, path.read_bytes()]


def taken_apart(file: bytes) -> tuple[dict[str, Any], dict[str, Any], dict[str, bytes]]:
    """Return a file's header, what it says of its arrays, and its tensors' bytes."""
    length = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + length])
    told = json.loads(header["__metadata__"].pop("maskedlinear"))
    data = file[8 + length :]
    return header, told, {n: data[slice(*e["data_offsets"])] for n, e in header.items() if n != "__metadata__"}


def put_together(header: dict[str, Any], told: Any, parts: dict[str, bytes], *, offsets: bool = True) -> bytes:
    """Return a file of these, whose sums are right, and whose offsets are, if they are to be."""
    end, sums, data = 0, "", b""
    for name, part in parts.items():
        if offsets and isinstance(header.get(name), dict):
            header[name]["data_offsets"] = [end, end + len(part)]
        end += len(part)
        data += part
        sums += "".join(f"{zlib.crc32(part[start : start + MIB]):08x}" for start in range(0, len(part), MIB))
    told = told if isinstance(told, str) else json.dumps(told)
    given = header.get("__metadata__", {})
    if not isinstance(given, dict):
        return b"\0" * 8 + json.dumps({"__metadata__": given}).encode()
    metadata = {**given, "maskedlinear": told, "maskedlinear.crc32": sums}
    metadata = {"maskedlinear.sha256": "0" * 64, **{k: v for k, v in metadata.items() if k != "maskedlinear.sha256"}}
    rest = {name: entry for name, entry in header.items() if name != "__metadata__"}
    text = json.dumps({"__metadata__": metadata, **rest}, separators=(",", ":")).encode()
    head = len(text).to_bytes(8, "little") + text
    return head.replace(b"0" * 64, hashlib.sha256(head).hexdigest().encode(), 1) + data


def changed(random: Random, file: bytes) -> tuple[str, bytes]:
    """Return what was done to a file, and the file."""
    what = random.choice(["flip", "cut", "extend", "splice", "swap", "tensor", "told", "told", "header", "text"])
    data = bytearray(file)
    if what == "flip":
        head = 8 + int.from_bytes(file[:8], "little")
        for _ in range(random.choice([1, 1, 2, 8])):
            place = random.randrange(random.choice([8, head, len(data)]))
            data[place] ^= 1 << random.randrange(8)
    elif what == "cut":
        del data[random.randrange(len(data)) :]
    elif what == "extend":
        data += random.randbytes(random.choice([1, 8, 1000]))
    elif what == "splice":
        start, stop = sorted(random.randrange(len(data)) for _ in range(2))
        place = random.randrange(len(data))
        data[place : place + random.choice([0, stop - start])] = data[start:stop]
    else:
        return what, forged(random, what, file)
    return what, bytes(data)


def forged(random: Random, what: str, file: bytes) -> bytes:
    """Return a file with something else in it, and with sums that are right."""
    header, told, parts = taken_apart(file)
    if what == "swap":
        first, second = random.choice(list(parts)), random.choice(list(parts))
        if random.random() < 0.5:
            header[first], header[second] = header[second], header[first]
        parts[first], parts[second] = parts[second], parts[first]
    elif what == "tensor":
        for _ in range(random.choice([1, 1, 3])):
            name = random.choice([*parts, *(name for name in parts if "/" in name)])
            parts[name] = other_bytes(random, parts[name])
            entry = header[name]
            if entry["dtype"] == "U8":
                entry["shape"] = [len(parts[name])]
    elif what == "told":
        for _ in range(random.choice([1, 1, 1, 2, 4])):
            change_tree(random, told)
    elif what == "header":
        for _ in range(random.choice([1, 1, 3])):
            change_tree(random, header)
        return put_together(header, told, parts, offsets=random.random() < 0.5)
    else:
        text = json.dumps(told)
        place = random.randrange(len(text))
        new = random.choice(TEXTS)
        told = text[:place] + new + text[place + random.choice([0, 1, len(new)]) :]
        if random.random() < 0.2:
            told = text.replace('"nnz":', '"nnz": 1, "nnz":', 1)
    return put_together(header, told, parts)


def other_bytes(random: Random, data: bytes) -> bytes:
    """Return other bytes: some bits, a number at the front, or the length are others."""
    new = bytearray(data)
    kind = random.randrange(5)
    if kind == 0 or len(new) < 9:
        new += random.randbytes(random.choice([1, 8, 16]))
    elif kind == 1:
        del new[random.randrange(len(new)) :]
    elif kind == 2:
        number = random.choice([n for n in NUMBERS if 0 <= n < 1 << 64])
        place = 8 * random.randrange(len(new) // 8)
        new[place : place + 8] = number.to_bytes(8, "little")
    else:
        for _ in range(random.choice([1, 2, 20])):
            new[random.randrange(len(new))] = random.choice([0, 1, 255, random.randrange(256)])
    return bytes(new)


def change_tree(random: Random, tree: Any) -> None:
    """Change one thing somewhere in an object of JSON."""
    nodes = [tree]
    for node in nodes:
        children = node.values() if isinstance(node, dict) else node
        nodes += [child for child in children if isinstance(child, dict | list) and child]
    node = random.choice(nodes)
    if not node:
        return
    place = random.choice(list(node) if isinstance(node, dict) else range(len(node)))
    old, kind = node[place], random.randrange(10)
    if kind == 0:
        del node[place]
    elif kind == 1 and isinstance(node, dict):
        node[random.choice([*KEYS, *STRINGS])] = other_value(random, old)
    elif kind == 2:
        other = random.choice(nodes)
        values = list(other.values() if isinstance(other, dict) else other)
        node[place] = copy.deepcopy(random.choice(values)) if values else 0
    elif kind == 3 and isinstance(old, list):
        node[place] = old * random.choice([2, 40]) + [random.choice(NUMBERS)]
    elif kind == 4 and isinstance(old, int):
        node[place] = old + random.choice([-1, 1, 8, -8])
    else:
        node[place] = other_value(random, old)


def other_value(random: Random, old: Any) -> Any:
    if isinstance(old, str) and random.random() < 0.8:
        return random.choice(STRINGS)
    if isinstance(old, int) and random.random() < 0.8:
        return random.choice(NUMBERS)
    return random.choice([*NUMBERS, *STRINGS, None, True, False, [], {}, [[]], 0.5, {"codec": "pcodec"}, [1, 1]])


def read(path: Path, claims: list[int], *, mmap: bool = False) -> dict[str, Any]:
    """Return all arrays of a file, mapped or not, read in every way; add to ``claims`` how many bytes it claims to hold.

    Raises:
        CheckpointError: if it is not right.
        AssertionError: if arrays contradict themselves, or the ways to read them each other.
    """
    found: dict[str, Any] = {}
    with CheckpointFile(path, mmap=mmap) as file:
        for name in file:
            entry = file.entry(name)
            size, each = int(np.prod(entry.shape, dtype=object)), ITEMSIZE[entry.dtype]
            if entry.mask is not None:  # places, values, dormant values
                claims.append((8 + each) * entry.mask.nnz + (size * each if entry.dormant else 0))
                claims.append(size if entry.mask.encoding == "recipe" else 0)
        file.verify()
        for name in file:
            array = found[name] = file.array(name)
            size = int(np.prod(array.shape, dtype=object))
            if isinstance(array, PlainArray):
                held = array.data()
                assert held.shape == array.shape
                found[name] = replace(array, data=lambda held=held: held)
            else:
                assert array.values.shape == array.places.shape == (array.nnz,)
                assert not array.nnz or 0 <= array.places[0] <= array.places[-1] < size
                assert (np.diff(array.places) > 0).all()
                assert array.dormant is None or array.dormant.shape == (size - array.nnz,)
            if size > 1 << 16:  # another way would be slow
                continue
            whole = file[name]
            if array.shape:
                cut = array.shape[0] // 2
                halves = [file.rows(name, 0, cut), file.rows(name, cut, array.shape[0])]
                assert np.concatenate(halves).tobytes() == whole.tobytes(), name
    return found


def same(first: Any, second: Any) -> bool:
    """Return whether two arrays are the same, bit for bit."""
    if type(first) is not type(second) or (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    if isinstance(first, PlainArray):
        return first.data().tobytes() == second.data().tobytes()
    dormant = [b"" if array.dormant is None else array.dormant.tobytes() for array in (first, second)]
    return (
        first.digest == second.digest and first.values.tobytes() == second.values.tobytes() and dormant[0] == dormant[1]
    )


def fuzz(count: int, seed: int, folder: Path, *, watch: bool = True) -> Counter[str]:
    """Change files ``count`` times and read them; return how often what was done ended how.

    Args:
        count: how often.
        seed: of what is done.
        folder: where files are written.
        watch: whether allocations are watched, which takes half of the time.
    """
    random = Random(seed)
    path = folder / "hostile.safetensors"
    made = files(folder)
    right = []
    for file in made:
        path.write_bytes(file)
        right.append(read(path, []))
    ends: Counter[str] = Counter()
    for number in range(count):
        which = random.randrange(len(made))
        what, file = changed(random, made[which])
        path.write_bytes(file)
        start = time.perf_counter()
        if watch:
            tracemalloc.start()
        claims = [len(file)]
        try:
            found = read(path, claims, mmap=number % 2 == 1)
        except CheckpointError as error:
            str(error).encode()  # it can be shown
            found = None
        except BaseException as error:
            (folder / "failing.safetensors").write_bytes(file)
            raise AssertionError(f"{what}, number {number} of seed {seed}, in {folder}/failing.safetensors") from error
        if watch:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak <= 2 * sum(claims) + SLACK, (what, number, peak, claims)
        took = time.perf_counter() - start
        assert took < 20, f"{what}, number {number} of seed {seed}, took {took} s"
        # Sums were not made anew. Where all is gone that says whose file it is, it is one of arrays as they are.
        if found is not None and what in ("flip", "cut", "extend", "splice") and b'"maskedlinear' in file:
            wrong = [name for name in right[which] if name not in found or not same(right[which][name], found[name])]
            assert not wrong, (what, number, wrong)
            assert len(found) == len(right[which]), (what, number)
        ends[f"{what}: {'error' if found is None else 'read'}"] += 1
    return ends


if __name__ == "__main__":
    import tempfile

    total, step = int(sys.argv[1]) if len(sys.argv) > 1 else 3000, 10_000
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    begun = time.perf_counter()
    sums: Counter[str] = Counter()
    where = Path(tempfile.mkdtemp())
    for part in range(0, total, step):
        sums += fuzz(min(step, total - part), first + part // step, where, watch=part % (5 * step) == 0)
        print(f"{part + step} in {time.perf_counter() - begun:.0f} s: {dict(sorted(sums.items()))}", flush=True)
