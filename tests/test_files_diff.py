"""``maskedlinear diff``, files of others, and a user's mistakes: a status and a line, never a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskedlinear import checkpoint, masks
from maskedlinear.checkpoint import MaskedArray, PlainArray
from maskedlinear.checkpoint._file import save_arrays
from maskedlinear.cli import main
from maskedlinear.files import text
from maskedlinear.files.diff import compare
from maskedlinear.models import WeightAxes

Run = Any
LIVE = masks.random((5, 8), sparsity=0.5, seed=0)


def weight() -> Any:
    return np.arange(1, 41, dtype=np.float32).reshape(5, 8)


def saved(path: str, live: Any = LIVE, numbers: Any = None, **more: Any) -> None:
    array = MaskedArray.of(weight() if numbers is None else numbers, live, **more)
    checkpoint.save({"w": array, "b": PlainArray.of(np.ones(3, np.float32))}, path)


def only_difference(out: str) -> dict[str, Any]:
    (difference,) = json.loads(out)["different"]
    return dict(difference)


def test_the_same_is_0(run: Run) -> None:
    saved("a")
    saved("b", form="sparse", role="linear.weight")  # how it is kept does not matter
    assert run("diff", "a", "b") == (0, "2 arrays, all the same\n", "")
    told = json.loads(run("diff", "a", "b", "--json")[1])
    assert told == {"a": "a", "b": "b", "same": True, "compared": 2, "only_in_a": [], "only_in_b": [], "different": []}


def test_masks_that_moved(run: Run) -> None:
    moved = LIVE.copy()
    moved[0] = ~LIVE[0]
    saved("a")
    saved("b", moved)
    status, out, _ = run("diff", "a", "b", "--json")
    found = only_difference(out)
    assert status == 1
    assert found["switched_off"] == LIVE[0].sum()
    assert found["switched_on"] == 8 - LIVE[0].sum()
    assert found["values_compared"] == LIVE[1:].sum()
    assert found["values_different"] == 0
    assert f"{found['switched_on']} switched on, {found['switched_off']} off" in run("diff", "a", "b")[1]


def test_values_that_differ(run: Run) -> None:
    other = weight()
    places = np.argwhere(LIVE)[:3]
    other[tuple(places[0])] += 0.5
    other[tuple(places[1])] -= 2
    other[~LIVE] = 7  # which is under the mask, and not in the file
    saved("a")
    saved("b", numbers=other)
    status, out, _ = run("diff", "a", "b")
    assert status == 1
    assert f"2 of {LIVE.sum()} values differ by up to 2\n" in out
    other[tuple(places[2])] = np.nan
    saved("b", numbers=other)
    found = only_difference(run("diff", "a", "b", "--json")[1])
    assert (found["values_different"], found["largest_difference"]) == (3, None)
    saved("a", numbers=other)
    assert run("diff", "a", "b")[0] == 0  # the same NaN, bit for bit


def test_minus_zero_is_not_zero() -> None:
    zero, minus = (MaskedArray.of(np.full((5, 8), number), LIVE) for number in (0.0, -0.0))
    found = compare("w", zero, minus, False)
    assert (found.values_different, found.largest_difference) == (LIVE.sum(), None)
    assert (found.signs_different, found.nans_different) == (LIVE.sum(), 0)


def test_what_differs_in_bits_alone_is_said(run: Run) -> None:
    first = np.array([0.0, -0.0, 1.0, np.nan, np.nan], np.float32)
    second = np.array([-0.0, 0.0, 1.5, 0.0, 0.0], np.float32)
    second[3:] = np.array([0x7FC00001, 0xFFC00000], np.uint32).view(np.float32)
    for a, b, told in (
        (first, second, "5 of 5 values differ by up to 0.5, 2 in the sign of 0 and 2 in the bits of NaN alone"),
        (first[:2], second[:2], "2 of 2 values differ, 2 in the sign of 0 alone"),
        (first[3:], second[3:], "2 of 2 values differ, 2 in the bits of NaN alone"),
        (first[2:3], second[2:3], "1 of 1 values differ by up to 0.5"),
    ):
        save_arrays({"w": PlainArray.of(a)}, "a")
        save_arrays({"w": PlainArray.of(b)}, "b")
        status, out, _ = run("diff", "a", "b")
        assert status == 1
        assert f"w  {told}\n" in out, out


@pytest.mark.parametrize("dtype", ["i8", "u8"])
def test_large_whole_numbers_differ_by_what_they_do(dtype: str) -> None:
    a = np.array([2**53, 2**62, np.iinfo(dtype).min, 5], dtype)
    found = compare("w", PlainArray.of(a), PlainArray.of(a + np.array([1, 3, 0, 0], dtype)), False)
    assert (found.values_different, found.largest_difference, found.signs_different) == (2, 3.0, 0)
    ends = np.array([np.iinfo(dtype).min, np.iinfo(dtype).max], dtype)
    found = compare("w", PlainArray.of(ends), PlainArray.of(ends[::-1]), False)
    assert found.largest_difference == 2.0**64


def test_dtypes_are_compared_as_numbers() -> None:
    single = MaskedArray.of(np.arange(40.0).reshape(5, 8).astype(np.float32), LIVE)
    bits = (single.values.view(np.uint32) >> 16).astype(np.uint16)  # exact below 256
    half = MaskedArray(single.shape, "BF16", bits, single.places)
    found = compare("w", single, half, False)
    assert found.dtypes == ("F32", "BF16")
    assert not found.is_none
    assert found.values_different == 0
    double = MaskedArray.of(single.numpy().astype(np.float64) + 0.25, LIVE)
    found = compare("w", half, double, False)
    assert (found.values_different, found.largest_difference) == (LIVE.sum(), 0.25)


@pytest.mark.parametrize("dtype", ["?", "i1", "u8", "f2", "f4", "f8", "c8"])
def test_every_dtype(dtype: str) -> None:
    a = np.array([0, 1, 1], dtype)
    b = np.array([0, 1, 0], dtype)
    found = compare("w", PlainArray.of(a), PlainArray.of(b), False)
    assert (found.values_compared, found.values_different, found.largest_difference) == (3, 1, 1.0)


def test_many_values_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskedlinear.files.diff._CHUNK", 7)
    a = weight()
    b = a.copy()
    b.flat[[0, 13, 39]] += (1, 5, 3)
    found = compare("w", PlainArray.of(a), PlainArray.of(b), False)
    assert (found.values_different, found.largest_difference) == (3, 5.0)


def test_names_shapes_and_masks_of_one_side(run: Run) -> None:
    saved("a")
    save_arrays({"w": PlainArray.of(weight() * LIVE), "c": PlainArray.of(np.ones(2))}, "b")
    status, out, _ = run("diff", "a", "b")
    assert status == 1
    assert [line.split(maxsplit=1) for line in out.splitlines()[3:6]] == [
        ["b", "only in A"],
        ["c", "only in B"],
        ["w", "a mask only in A"],
    ]
    assert "1 of 1 array that both have differ" in out
    told = json.loads(run("diff", "b", "a", "--json", "--dense")[1])
    assert (told["only_in_a"], told["only_in_b"], told["different"]) == (["c"], ["b"], [])
    save_arrays({"w": PlainArray.of(weight()[:4]), "b": PlainArray.of(np.ones(3, np.float32))}, "b")
    assert "shape 5 x 8 in A, 4 x 8 in B" in run("diff", "a", "b")[1]


def test_dormant_values(run: Run) -> None:
    saved("a", dormant=True)
    other = weight()
    other[tuple(np.argwhere(~LIVE)[0])] = -1
    saved("b", numbers=other, dormant=True)
    assert "w  dormant values differ, 1 of them" in run("diff", "a", "b")[1]
    assert run("diff", "a", "b", "--dense")[0] == 0
    saved("b")
    assert "dormant values only in A" in run("diff", "a", "b")[1]


def test_a_small_file_does_not_become_huge_unasked(run: Run) -> None:
    few = MaskedArray((1 << 20, 1 << 10), "F32", np.ones(2, np.float32), np.array([5, 1 << 29]))
    save_arrays({"w": few}, "a")
    assert run("inspect", "a")[0] == 0
    assert run("diff", "a", "a")[0] == 0
    for command in (["convert", "a", "out", "--to", "npz"], ["diff", "a", "a", "--dense"]):
        status, out, err = run(*command)
        assert (status, out) == (2, "")
        assert "w would take 4294967296 bytes whole" in err
        assert "--max-bytes 4294967296" in err
    assert not Path("out").exists()


def test_files_of_two_frameworks(run: Run) -> None:
    array = MaskedArray.of(weight(), LIVE, axes=WeightAxes(), role="linear.weight", dormant=True)
    turned = MaskedArray.of(weight().T, LIVE.T, axes=WeightAxes(1, 0), role="linear.weight", dormant=True)
    bias, count = PlainArray.of(np.ones(5, np.float32), role="linear.bias"), PlainArray.of(np.array(3))
    more = {"net.bn.num_batches_tracked": count, "more.weight": PlainArray.of(np.ones(5))}
    save_arrays({"net.0.weight": array, "net.0.bias": bias, **more}, "a", framework="torch")
    save_arrays({"net.layers.0.kernel": turned, "net.layers.0.bias": bias}, "b", framework="nnx")
    told = json.loads(run("diff", "a", "b", "--json")[1])
    assert (told["only_in_a"], told["only_in_b"], told["different"]) == (["more.weight"], [], [])
    assert told["compared"] == 2
    told = json.loads(run("diff", "b", "a", "--json")[1])
    assert (told["only_in_a"], told["only_in_b"], told["different"]) == ([], ["more.weight"], [])
    other = LIVE.copy()
    other[1] = ~LIVE[1]
    array = MaskedArray.of(weight(), other, axes=WeightAxes(), role="linear.weight", dormant=True)
    save_arrays({"net.0.weight": array, "net.0.bias": bias}, "a", framework="torch")
    found = only_difference(run("diff", "a", "b", "--json")[1])
    assert found["name"] == "net.layers.0.kernel"
    assert (found["switched_on"], found["switched_off"]) == (LIVE[1].sum(), 8 - LIVE[1].sum())


# files of others


def test_a_folder_of_shards_and_masks_beside_them(run: Run) -> None:
    arrays = {"model.0.weight": PlainArray.of(weight() * LIVE), "model.1.weight": PlainArray.of(np.ones((3, 4)))}
    Path("folder").mkdir()
    index = {}
    for number, (name, array) in enumerate(arrays.items()):
        file = f"model-0000{number}-of-00002.safetensors"
        checkpoint.write_dense({name: array}, f"folder/{file}")
        index[name] = file
    Path("folder/model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert "folder of 2 files, safetensors" in run("inspect", "folder")[1]
    true = MaskedArray.of(np.ones((5, 8), bool), LIVE, form="sparse")
    hidden = PlainArray.of(np.arange((~LIVE).sum(), dtype=np.float32))
    save_arrays({"model.0.weight": true, "model.0.weight.dormant": hidden, "gone": true}, "folder/masks.safetensors")
    status, out, _ = run("inspect", "folder", "--json")
    told = json.loads(out)
    assert status == 0
    assert told["left_out"] == {"gone": "a mask without its weight"}
    row = told["arrays"][0]
    assert (row["live"], row["form"], row["dormant"]) == (LIVE.sum(), "sparse", (~LIVE).sum())
    assert row["file_bytes"] > row["dense_bytes"]
    assert run("convert", "folder", "out.safetensors", "--to", "maskedlinear", "--dormant")[0] == 0
    array = checkpoint.load("out.safetensors")["model.0.weight"]
    assert isinstance(array, MaskedArray)
    np.testing.assert_array_equal(array.mask(), LIVE)
    np.testing.assert_array_equal(array.numpy(), weight() * LIVE)
    np.testing.assert_array_equal(array.dormant, hidden.data())
    assert run("diff", "folder", "out.safetensors")[0] == 0
    save_arrays({"model.1.weight": true}, "folder/masks.safetensors")
    status, _, err = run("inspect", "folder")
    assert status == 2
    assert "masks.safetensors: a mask beside its weight has its shape" in err


def test_a_pruned_state_of_pytorch(run: Run) -> None:
    import torch
    from torch.nn.utils import prune

    layer = prune.random_unstructured(torch.nn.Linear(8, 5), "weight", 0.5)
    torch.save({"state_dict": layer.state_dict(), "epoch": 3}, "pruned.pt")
    status, out, err = run("inspect", "pruned.pt", "--json", "--key", "state_dict")
    assert (status, err) == (0, "")
    rows = {row["name"]: row for row in json.loads(out)["arrays"]}
    assert rows["weight"]["encoding"] == "torch.nn.utils.prune"
    assert rows["weight"]["live"] == 20
    assert rows["weight"]["file_bytes"] is None
    assert run("convert", "pruned.pt", "out", "--to", "maskedlinear", "--key", "state_dict")[0] == 0
    torch.save(layer, "whole.pt")  # pickled
    status, out, err = run("inspect", "whole.pt")
    assert (status, out, err.count("\n")) == (2, "", 1)


def test_scipy_and_masks_in_safetensors(run: Run) -> None:
    from scipy import sparse

    sparse.save_npz("matrix.npz", sparse.csr_array(weight() * LIVE))
    row = json.loads(run("inspect", "matrix.npz", "--json")[1])["arrays"][0]
    assert (row["name"], row["live"], row["file_bytes"]) == ("matrix", LIVE.sum(), None)
    state = {"a.weight_orig": PlainArray.of(weight()), "a.weight_mask": PlainArray.of(LIVE.astype(np.float32))}
    checkpoint.write_dense(state, "pruned.safetensors")
    row = json.loads(run("inspect", "pruned.safetensors", "--json")[1])["arrays"][0]
    assert (row["name"], row["live"], row["encoding"]) == ("a.weight", LIVE.sum(), "torch.nn.utils.prune")


# mistakes


def test_mistakes_are_a_line(run: Run) -> None:
    saved("good")
    data = bytearray(Path("good").read_bytes())
    Path("cut").write_bytes(data[:-3])
    data[-1] ^= 1
    Path("flipped").write_bytes(data)
    Path("text").write_text("hello\n" * 10)
    Path("empty").write_bytes(b"")
    Path("folder").mkdir()
    Path("loop").symlink_to("loop")
    for name in ("missing", "cut", "flipped", "text", "empty", "folder", "loop", "good/inside", "x" * 300, "bell\x07"):
        for command in (["inspect", name], ["diff", "good", name], ["convert", name, "out", "--to", "maskedlinear"]):
            status, out, err = run(*command)
            assert (status, out) == (2, ""), command
            assert err.startswith(f"maskedlinear {command[0]}: "), command
            assert err.count("\n") == 1, err
            assert err.rstrip("\n").isprintable()
        assert not Path("out").exists()


def test_damage_of_plain_arrays_is_found_when_it_is_looked_for(run: Run) -> None:
    saved("a")
    data = Path("a").read_bytes()
    Path("a").write_bytes(data.replace(np.ones(3, np.float32).tobytes(), np.ones(3, np.float32).tobytes()[::-1]))
    assert run("inspect", "a")[0] == 0  # only what has masks is read
    status, out, err = run("inspect", "a", "--check")
    assert (status, out) == (2, "")
    assert "CRC-32" in err


def test_the_command_line_itself(run: Run) -> None:
    for arguments in (["inspect"], ["diff", "a"], ["convert", "a", "b"], ["convert", "a", "b", "--to", "pickle"]):
        status, out, err = run(*arguments)
        assert (status, out) == (2, "")
        assert f"See maskedlinear {arguments[0]} --help" in err
    for command in ("inspect", "convert", "diff"):
        status, out, _ = run(command, "--help")
        assert status == 0
        assert f"examples:\n  maskedlinear {command} " in out
        assert "exit status: 0 " in out


def test_interrupts_leave_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    saved("a")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("maskedlinear.files.convert.save_arrays", interrupted)
    assert run("convert", "a", "out", "--to", "maskedlinear") == (130, "", "maskedlinear convert: interrupted\n")
    assert [path.name for path in Path().iterdir()] == ["a"]


def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    arrays = {f"layer.{i}.weight": PlainArray.of(np.ones(1)) for i in range(3000)}
    save_arrays(arrays, tmp_path / "many")
    command = f'"{sys.executable}" -m maskedlinear inspect --all many | head -n 1; echo "${{PIPESTATUS[0]}}"'
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.stdout.splitlines()[-1] == "141"
    assert result.stderr == ""


def test_progress_of_what_is_large_and_watched(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text.progress(10**9, "reading")(10**9)
    assert capsys.readouterr().err == ""  # no terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    add = text.progress(10**9, "reading")
    add(5 * 10**8)
    add(5 * 10**8)
    assert capsys.readouterr().err == "\rreading:  50 %\rreading: 100 %\n"
    text.progress(10**6, "reading")(10**6)
    assert capsys.readouterr().err == ""


def test_sizes_and_fractions_read_well() -> None:
    sizes = {
        0: "0 B",
        999: "999 B",
        1000: "1.00 kB",
        9_996: "10.0 kB",
        99_960: "100 kB",
        999_600: "1.00 MB",
        2**62: "4612 PB",
    }
    assert {size: text.size_text(size) for size in sizes} == sizes
    assert [text.fraction(value) for value in (0, 0.5, 0.98, 0.99999, 1)] == ["0", "0.5", "0.98", "<1", "1"]


def test_closed_streams(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    saved("a")
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["inspect", "a"]) == 0
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["diff", "a", "missing"]) == 2  # and not 1, which is "different"
