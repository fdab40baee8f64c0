"""What is handed to the functions of files by mistake is named, with what it should be, and no file is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from maskedlinear import checkpoint
from maskedlinear.cli import main


@pytest.fixture
def file(tmp_path: Path) -> Path:
    checkpoint.save(nn.Linear(3, 2), tmp_path / "a.safetensors", metadata={"author": "me"})
    return tmp_path / "a.safetensors"


@pytest.mark.parametrize("path", [3, None, b"a", ["a"], object()])
def test_a_path_is_a_path(path: Any, file: Path) -> None:
    arrays, model = checkpoint.load(file), nn.Linear(3, 2)
    calls: tuple[Callable[[], Any], ...] = (
        lambda: checkpoint.save(model, path),
        lambda: checkpoint.load(path),
        lambda: checkpoint.load_into(model, path),
        lambda: checkpoint.open(path),
        lambda: checkpoint.write_dense(arrays, path),
    )
    for call in calls:
        with pytest.raises(TypeError, match=f"by its path, a str or a pathlib.Path; got {type(path).__name__}"):
            call()
    with pytest.raises(TypeError, match=f"a path or arrays by name; got {type(path).__name__}"):
        checkpoint.read(path)


@pytest.mark.parametrize("wrong", [3, b"a", ["a"], object()])
def test_other_arguments_are_of_their_types(wrong: Any, file: Path, tmp_path: Path) -> None:
    arrays, model, out, kind = (
        checkpoint.load(file),
        nn.Linear(3, 2),
        tmp_path / "out.safetensors",
        type(wrong).__name__,
    )
    state = {"a": np.ones(2)}
    calls: tuple[tuple[Callable[[], Any], str], ...] = (
        (lambda: checkpoint.save(model, out, metadata=wrong), f"metadata are strings by name, .* got {kind}"),
        (lambda: checkpoint.write_dense(arrays, out, metadata=wrong), f"metadata are strings by name, .* got {kind}"),
        (lambda: checkpoint.save(model, out, dormant=wrong), "dormant is True or False; got"),
        (lambda: checkpoint.save(model, out, optimizer=wrong), rf"must be a torch\.optim\.Optimizer; got {kind}"),
        (lambda: checkpoint.load_into(model, file, optimizer=wrong), rf"a torch\.optim\.Optimizer; got {kind}"),
        (lambda: checkpoint.load_into(model, file, names=wrong), f"how the model's names begin, .* got {kind}"),
        (lambda: checkpoint.write_dense(wrong, out), f"write_dense takes arrays by name, .* got {kind}: of a model"),
        (lambda: checkpoint.dense_state(wrong), f"dense_state takes arrays by name, .* got {kind}"),
        (lambda: checkpoint.to_scipy(wrong), f"to_scipy takes an array with a mask; got {kind}"),
        (lambda: checkpoint.read(state, key=wrong), "key is the name of a state in a file of several"),
        (
            lambda: checkpoint.read(state, max_bytes=wrong if wrong != 3 else 3.0),
            "max_bytes is a whole number of bytes",
        ),
    )
    for call, match in calls:
        with pytest.raises(TypeError, match=match):
            call()
    for options in ({"values": wrong}, {"masks": wrong}):
        with pytest.raises(ValueError, match=r"got|masks= is for trees"):
            checkpoint.save(model, out, **options)
    with pytest.raises(ValueError, match="min_sparsity is a fraction"):
        checkpoint.read(state, min_sparsity=wrong)
    assert not out.exists()


def test_what_is_in_an_argument_is_looked_at_too(file: Path, tmp_path: Path) -> None:
    arrays, model, out = checkpoint.load(file), nn.Linear(3, 2), tmp_path / "out.safetensors"
    for names in ({3: "a"}, {"weight": 3}):
        with pytest.raises(TypeError, match="names= has strings by strings"):
            checkpoint.load_into(model, file, names=names)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"returns the file's name, a string; got 3 for 'weight'"):
        checkpoint.load_into(model, file, names=lambda name: 3)  # type: ignore[arg-type, return-value]
    for metadata in ({1: "a"}, {"a": 1}):
        for write in (checkpoint.save, checkpoint.write_dense):
            with pytest.raises(ValueError, match=r"metadata are strings by name.*; got"):
                write(arrays, out, metadata=metadata)  # type: ignore[operator]
    with pytest.raises(TypeError, match=r"'a' is ndarray: read\(arrays\) makes them"):
        checkpoint.write_dense({"a": np.ones(2)}, out)  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="'weight' is Tensor"):
        checkpoint.dense_state(model.state_dict())
    with pytest.raises(TypeError, match="a string each; got the name 3"):
        checkpoint.write_dense({3: arrays["weight"]}, out)  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"out\.npz has no place for them"):
        checkpoint.write_dense(arrays, tmp_path / "out.npz", metadata={"a": "b"})
    with pytest.raises(ValueError, match="max_bytes is a whole number of bytes; got -1"):
        checkpoint.read(file, max_bytes=-1)
    with checkpoint.open(file) as opened:
        for get in (lambda: opened["kernel"], lambda: opened.rows("kernel", 0, 1), lambda: opened.array("kernel")):
            with pytest.raises(KeyError, match=r"no array 'kernel'; it has .*weight"):
                get()
    assert sorted(path.name for path in tmp_path.iterdir()) == [file.name]


def test_metadata_that_a_format_has_no_place_for_are_told(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for end in ("npz", "safetensors"):
        assert main(["convert", str(file), str(file.with_name(f"out.{end}")), "--to", end]) == 0
        assert ("metadata are left out, of author" in capsys.readouterr().err) == (end == "npz")
