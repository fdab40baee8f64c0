"""Mapped checkpoints: arrays are views of the file that outlive it, take no memory, and are checked as others are."""

from __future__ import annotations

import gc
import json
import mmap
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoint_fuzz import arrays, read, same
from maskedlinear import checkpoint, masks
from maskedlinear.checkpoint import CheckpointError, CheckpointFile, MaskedArray, PlainArray
from maskedlinear.checkpoint._container import Reader

MIB = 1 << 20


def is_view(array: Any) -> bool:
    """Return whether an array's memory is a mapped file's."""
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, memoryview) and isinstance(array.obj, mmap.mmap)


def large() -> dict[str, Any]:
    """Return a plain array of 16 MiB, and a masked one with values of 8 MiB and a mask of half a MiB."""
    rng = np.random.default_rng(0)
    mask = masks.random((2048, 2048), sparsity=0.5)
    return {
        "plain": PlainArray.of(rng.standard_normal((4096, 1024), np.float32)),
        "masked": MaskedArray.of(rng.standard_normal(mask.shape, np.float32), mask),
    }


def peak(call: Callable[[], Any]) -> tuple[Any, int]:
    """Return what a call returns, and how many bytes were allocated meanwhile, at most."""
    tracemalloc.start()
    try:
        return call(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def own_memory() -> int:
    """Return the bytes of memory that are this process's own, and no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))


def test_all_is_as_it_is_read_and_stays_when_the_file_is_closed_and_replaced(tmp_path: Path) -> None:
    path, made = tmp_path / "all", arrays()
    checkpoint.save(made, path)
    mapped, loaded = read(path, [], mmap=True), checkpoint.load(path, mmap=True)
    with checkpoint.open(path, mmap=True) as file:
        bias, rows = file["plain"], file.rows("plain", 1, 3)
        parts = [file._reader.read(part) for part in file._reader.tensors]  # what masks are decoded from
        assert all(is_view(part) for part in parts if part.size)
    with pytest.raises(ValueError, match="was closed"):
        file["plain"]
    checkpoint.save({"another": np.zeros(3)}, path)
    gc.collect()
    for name, array in made.items():
        assert same(mapped[name], array), name
        assert same(loaded[name], array), name
        held = loaded[name].data() if isinstance(array, PlainArray) else loaded[name].values
        if held.size and name != "alone":
            assert is_view(held), name
            assert not held.flags.writeable
    assert loaded["tied"] is loaded["gaps"]
    assert is_view(bias)
    assert np.array_equal(bias[1:3], rows)
    with pytest.raises(ValueError, match="read-only"):
        bias[0] = 1
    loaded["gaps"].numpy()[:] = 1  # made dense, it is the user's own


def test_what_is_mapped_is_not_copied(tmp_path: Path) -> None:
    path, made = tmp_path / "large", large()
    checkpoint.save(made, path)
    plain, masked = 16 * MIB, 8 * MIB

    def read_one(name: str, **how: bool) -> Any:
        with checkpoint.open(path, **how) as file:
            array = file.array(name)
            return array.data() if isinstance(array, PlainArray) else array

    with_copy, without = peak(lambda: read_one("plain")), peak(lambda: read_one("plain", mmap=True))
    assert with_copy[1] > plain
    assert without[1] < MIB // 4
    assert np.array_equal(without[0], with_copy[0])
    del with_copy, without
    copied, viewed = peak(lambda: read_one("masked")), peak(lambda: read_one("masked", mmap=True))
    assert copied[1] - viewed[1] > 0.75 * masked
    assert same(copied[0], viewed[0])
    del copied, viewed
    if Path("/proc/self/status").exists():
        gc.collect()
        before = own_memory()
        held = read_one("plain", mmap=True)
        assert held.sum() == made["plain"].numpy().sum()
        assert own_memory() - before < plain // 4
    every, no_plain = peak(lambda: checkpoint.load(path))[1], peak(lambda: checkpoint.load(path, mmap=True))[1]
    assert every - no_plain > 0.8 * (plain + masked)


def test_a_header_of_others_of_odd_length_costs_a_copy(tmp_path: Path) -> None:
    path, values = tmp_path / "odd", np.arange(5, dtype="<f4")
    header = json.dumps({"w": {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}}).encode()
    header += b" " * (1 - len(header) % 2)
    path.write_bytes(struct.pack("<Q", len(header)) + header + values.tobytes())
    with checkpoint.open(path, mmap=True) as file:
        held = file["w"]
    assert held.flags.aligned
    assert not held.flags.writeable
    assert not is_view(held)
    assert np.array_equal(held, values)


def test_damage_is_found_before_a_page_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w"
    checkpoint.save({"w": np.zeros(3 * MIB // 4, np.float32), "b": np.ones(2)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\1")
    with CheckpointFile(path, mmap=True) as file, pytest.raises(CheckpointError, match="CRC-32"):
        file["w"]
    for size in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            checkpoint.load(path, mmap=True)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match="added to"):
        checkpoint.load(path, mmap=True)
    path.write_bytes(whole)
    with CheckpointFile(path, mmap=True) as file:
        os.truncate(path, MIB)
        with pytest.raises(CheckpointError, match="became shorter"):
            file["w"]
    path.write_bytes(whole)
    header = Reader._read_header
    monkeypatch.setattr(Reader, "_read_header", lambda reader: (header(reader), os.truncate(path, MIB)))
    with pytest.raises(CheckpointError, match="became shorter"):
        checkpoint.open(path, mmap=True)
    with pytest.raises(TypeError, match="mmap is True or False"):
        checkpoint.open(path, mmap="r")  # type: ignore[arg-type]


def test_a_model_takes_copies_and_nothing_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written over the file later does not reach a model, and a large array is copied some rows at a time."""
    torch = pytest.importorskip("torch")
    nnx = pytest.importorskip("flax.nnx")
    nn = torch.nn

    from maskedlinear.torch import MaskedLinear
    from maskedlinear_torch import _checkpoint_load

    def build() -> Any:
        return nn.Sequential(MaskedLinear(8, 8), nn.Embedding(64, 8), nn.Linear(4, 2), nn.BatchNorm1d(2))

    monkeypatch.setattr(_checkpoint_load, "_PART", 100)
    path, source = tmp_path / "w", build()
    source[0].set_mask(masks.random((8, 8), sparsity=0.5))
    source[1].weight.data[0, 0] = -0.0
    state = {name: value.clone() for name, value in source.state_dict().items() if "dormant" not in name}
    checkpoint.save(source, path)
    file = path.read_bytes()
    for target in (build(), build().to("meta")):
        path.write_bytes(file)
        checkpoint.load_into(target, path, mmap=True)
        path.write_bytes(bytes(len(file)))
        found = target.state_dict()
        for name, value in state.items():
            assert found[name].numpy().tobytes() == value.numpy().tobytes(), name
            found[name].zero_()  # it can be written
    flax = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    checkpoint.save(flax, path)
    kernel, flax = np.array(flax.kernel[...]), nnx.Linear(64, 64, rngs=nnx.Rngs(1))
    checkpoint.load_into(flax, path, mmap=True)
    path.write_bytes(bytes(path.stat().st_size))
    assert np.array_equal(flax.kernel[...], kernel)
