"""``maskedlinear inspect``, ``convert`` and ``diff``: what they show, write and do not write over."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import python
from maskedlinear import checkpoint, masks
from maskedlinear.checkpoint import MaskedArray, PlainArray
from maskedlinear.checkpoint._dense import write_dense
from maskedlinear.files import nodes
from maskedlinear.models import WeightAxes

Run = Any


def values(*shape: int) -> Any:
    return np.random.default_rng(math.prod(shape)).standard_normal(shape).astype(np.float32)


def model() -> dict[str, MaskedArray | PlainArray]:
    """A linear layer, a convolution and a stack of experts with masks, a tied weight, and a bias."""
    linear = masks.random((6, 40), sparsity=0.8, seed=0)
    linear[2] = False  # an output without inputs
    linear[:, [3, 5]] = False  # inputs that nothing uses
    kernel = masks.random((8, 27), sparsity=0.5, seed=1).reshape(8, 3, 3, 3)
    experts = masks.random((3, 160), sparsity=0.25, seed=2).reshape(3, 10, 16)
    tied = MaskedArray.of(values(6, 40), linear, axes=WeightAxes(), role="linear.weight")
    return {
        "layers.10.weight": tied,
        "layers.2.weight": MaskedArray.of(values(8, 3, 3, 3), kernel, axes=WeightAxes(0, (1, 2, 3)), dormant=True),
        "experts": MaskedArray.of(values(3, 10, 16), experts, axes=WeightAxes(2, 1, 0)),
        "head.weight": tied,
        "layers.10.bias": PlainArray.of(values(6)),
    }


def plain(array: MaskedArray | PlainArray) -> Any:
    return array.numpy()


def rows_of(out: str) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(out)["arrays"]}


# inspect


def test_inspect_shows_each_masked_weight(run: Run) -> None:
    arrays = model()
    checkpoint.save(arrays, "model.safetensors", dormant=True)
    status, out, err = run("inspect", "model.safetensors")
    assert (status, err) == (0, "")
    first, _, head, *table = out.splitlines()
    assert first.startswith("model.safetensors: maskedlinear from numpy, ")
    assert head.split("  ")[0] == "weight"
    shown = [line.split()[0] for line in table]
    assert shown == ["experts", "head.weight", "layers.2.weight", "layers.10.weight", "masked:", "not", "all:"]
    linear = arrays["layers.10.weight"]
    assert isinstance(linear, MaskedArray)
    line = next(line for line in table if line.startswith("head.weight")).split()
    assert line[1:8] == ["6", "x", "40", "F32", f"{linear.sparsity:.4g}", str(linear.nnz), "1"]
    assert not any("bias" in line for line in table)
    assert any("layers.10.bias" in line for line in run("inspect", "model.safetensors", "--all")[1].splitlines())


def test_json_has_what_the_masks_have(run: Run) -> None:
    arrays = model()
    checkpoint.save(arrays, "model.safetensors", dormant=True, metadata={"epoch": "3"})
    status, out, _ = run("inspect", "model.safetensors", "--json")
    told = json.loads(out)
    assert status == 0
    assert told.keys() == {
        *("file", "format", "framework", "metadata", "left_out", "file_bytes", "masked", "all", "optimizer", "arrays"),
    }
    assert told["metadata"] == {"epoch": "3"}
    assert told["file_bytes"] == Path("model.safetensors").stat().st_size
    rows = rows_of(out)
    for name, axes in (("layers.10.weight", (0, 1)), ("layers.2.weight", (0, 1)), ("experts", (2, 1))):
        array, row = arrays[name], rows[name]
        assert isinstance(array, MaskedArray)
        live = array.mask()
        matrices = live.reshape(8, 27) if live.ndim == 4 else live
        dead = [int((~matrices.any(axis=axis)).sum()) for axis in axes[::-1]]  # over inputs, over outputs
        assert [row["dead_outputs"], row["dead_inputs"]] == dead, name
        density = live.mean()
        entropy = -live.size * (density * math.log2(density) + (1 - density) * math.log2(1 - density)) / 8
        kept = live.size if array.dormant is not None else array.nnz
        assert row["bound_bytes"] == pytest.approx(4 * kept + entropy)
        assert row["live"] == live.sum()
        assert row["shape"] == list(live.shape)
        assert row["masked"]
        assert row["dense_bytes"] == 4 * live.size
        assert 0.9 * row["bound_bytes"] < row["file_bytes"] < 1.3 * row["bound_bytes"] + 100
    assert rows["layers.2.weight"]["dormant"] == 216 - rows["layers.2.weight"]["live"]
    tied = {rows[name]["same_as"] for name in ("head.weight", "layers.10.weight")}
    assert tied == {None, "layers.10.weight"}
    assert rows["layers.10.bias"]["dead_outputs"] is None
    assert rows["layers.10.weight"]["role"] == "linear.weight"
    assert told["masked"]["arrays"] == 4
    assert told["all"]["size"] == 240 + 216 + 480 + 6  # what is tied counts once
    assert told["all"]["file_bytes"] < told["file_bytes"]


def test_the_page_explains_every_key(run: Run) -> None:
    page = (Path(__file__).parent.parent / "docs" / "command-line.md").read_text()
    checkpoint.save(model(), "a.safetensors")
    checkpoint.save({"experts": PlainArray.of(np.zeros(3))}, "b.safetensors")
    shown = json.loads(run("inspect", "a.safetensors", "--json")[1])
    differ = json.loads(run("diff", "a.safetensors", "b.safetensors", "--json")[1])
    for keys in (shown, shown["arrays"][0], shown["all"], differ, differ["different"][0]):
        for key in keys:
            assert f"`{key}`" in page, key


def test_our_files_need_numpy_alone(tmp_path: Path) -> None:
    checkpoint.save(model(), tmp_path / "model.safetensors")
    code = (
        "import sys\nfrom maskedlinear.cli import main\n"
        "status = [main(['inspect', 'model.safetensors']), main(['diff', 'model.safetensors', 'model.safetensors']),"
        "main(['convert', 'model.safetensors', 'out.npz', '--to', 'npz'])]\n"
        "others = {'torch', 'jax', 'flax', 'matplotlib', 'scipy', 'safetensors', 'ml_dtypes', 'pcodec', 'rich'}\n"
        "print(status, others & set(sys.modules), file=sys.stderr)"
    )
    result = python(code, tmp_path)
    assert result.stderr.splitlines()[-1] == "[0, 0, 0] set()"


def test_strange_and_long_names_are_shown_whole_and_harmless(run: Run) -> None:
    strange = "a\x1b[31m\nb\\c\u202e" + ".very_long_name" * 12
    arrays = {strange: MaskedArray.of(np.ones((2, 3)), np.eye(2, 3)), "\ud7ff": PlainArray.of(np.ones(2))}
    checkpoint.save(arrays, "odd.safetensors")
    for command in (["inspect", "--all", "odd.safetensors"], ["diff", "odd.safetensors", "plain.npz"]):
        write_dense({"x": PlainArray.of(np.ones(2))}, "plain.npz")
        status, out, _ = run(*command)
        assert status in (0, 1)
        assert all(line.isprintable() and len(line) <= 120 for line in out.splitlines())
        assert r"a\x1b[31m\nb\\c\u202e.very" in out
        first = "".join(line.split("  ")[0] for line in out.splitlines())
        assert first.count(".very_long_name") == 12
    assert rows_of(run("inspect", "odd.safetensors", "--json")[1]).keys() == set(arrays)


def test_output_fits_the_encoding_of_the_stream(tmp_path: Path) -> None:
    checkpoint.save({"größe.kernel": MaskedArray.of(np.ones((4, 4)), np.eye(4))}, tmp_path / "ä.safetensors")
    command = [sys.executable, "-m", "maskedlinear", "inspect", "ä.safetensors"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    result = subprocess.run(command, capture_output=True, cwd=tmp_path, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert rb"gr\xf6\xdfe.kernel" in result.stdout


def test_kernels_are_in_out_by_their_name(run: Run) -> None:
    live = np.zeros((3, 5), bool)
    live[0] = True
    for name, dead in (("dense.kernel", [0, 2]), ("dense.weight", [2, 0]), ("dense.blob", [2, 0])):
        checkpoint.save({name: MaskedArray.of(values(3, 5), live)}, "one.safetensors")
        row = rows_of(run("inspect", "one.safetensors", "--json")[1])[name]
        assert [row["dead_outputs"], row["dead_inputs"]] == dead
    checkpoint.save({"weight": MaskedArray.of(values(3, 5, 2), np.ones((3, 5, 2)))}, "one.safetensors")
    assert "neither the file nor the name" in run("inspect", "one.safetensors")[1]


def test_a_large_shape_takes_no_memory_of_its_own() -> None:
    places = np.array([5, 10**9 + 7, 10**12 - 1])
    array = MaskedArray((10**6, 10**6), "F32", np.ones(3, np.float32), places)
    found = nodes.Nodes.of("a.weight", array)
    assert found is not None
    assert (found.dead_outputs, found.dead_inputs) == (10**6 - 3, 10**6 - 3)
    assert found.densities(256).sum() > 0
    assert nodes.entropy_bits(10**12, 3) == pytest.approx(3 * math.log2(10**12 / 3) + 3 / math.log(2), rel=1e-6)


def test_tiles_have_the_density_of_what_they_cover() -> None:
    live = masks.random((70, 45), sparsity=0.6, seed=3)
    found = nodes.Nodes.of("a.weight", MaskedArray.of(live, live))
    assert found is not None
    np.testing.assert_array_equal(found.densities(100), live)
    tiles = found.densities(20)
    assert tiles.shape == (18, 15)
    for i, j in ((0, 0), (5, 7), (17, 14)):
        assert tiles[i, j] == live[4 * i : 4 * i + 4, 3 * j : 3 * j + 3].mean()


def test_masks_are_drawn(run: Run) -> None:
    arrays = model() | {"wide.weight": MaskedArray.of(values(4, 900), masks.random((4, 900), sparsity=0.99, seed=0))}
    arrays |= {"odd": MaskedArray.of(values(3), [1, 0, 1]), "empty$": MaskedArray.of(np.ones((0, 4)), np.ones((0, 4)))}
    checkpoint.save(arrays, "model.safetensors")
    checkpoint.save({"experts": arrays["experts"]}, "one.safetensors")
    for file, name, start in (("model", "masks.png", b"\x89PNG"), ("one", "masks.svg", b"<?xml")):
        status, _, err = run("inspect", f"{file}.safetensors", "--plot", name)
        assert (status, err) == (0, "")
        assert Path(name).read_bytes().startswith(start)
    for said in ("experts", "3 x 10 x 16, sparsity 0.25", "outputs of 3 matrices", "inputs", "live", "one.safetensors"):
        assert f"<!-- {said} -->" in Path("masks.svg").read_text(), said
    before = Path("masks.png").read_bytes()
    assert run("inspect", "model.safetensors", "--plot", "masks.png")[0] == 2
    assert Path("masks.png").read_bytes() == before
    assert run("inspect", "one.safetensors", "--plot", "masks.png", "--force")[0] == 0
    assert Path("masks.png").read_bytes() != before
    status, _, err = run("inspect", "model.safetensors", "--plot", "masks.bmp")
    assert status == 2
    assert ".png, .svg, .pdf" in err
    checkpoint.save({"a": PlainArray.of(np.ones(3))}, "plain.safetensors")
    status, _, err = run("inspect", "plain.safetensors", "--plot", "none.png")
    assert status == 2
    assert "--masks zeros" in err
    assert sorted(path.suffix for path in Path().iterdir()) == [".png", *[".safetensors"] * 3, ".svg"]


def test_without_matplotlib_the_extra_is_named(tmp_path: Path) -> None:
    checkpoint.save(model(), tmp_path / "model.safetensors")
    code = (
        "import sys\nfrom maskedlinear.cli import main\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'matplotlib':\n"
        "            raise ModuleNotFoundError(name, name='matplotlib')\n"
        "sys.meta_path.insert(0, Missing())\n"
        "sys.exit(main(['inspect', 'model.safetensors', '--plot', 'a.png']))"
    )
    result = python(code, tmp_path)
    assert result.returncode == 2
    assert result.stderr.endswith('Install it with: pip install "maskedlinear[plot]"\n')


# convert


@pytest.mark.parametrize("to", ["safetensors", "npz", "torch"])
def test_convert_and_back(run: Run, to: str) -> None:
    arrays = model()
    checkpoint.save(arrays, "model.safetensors", dormant=True)
    status, out, err = run("convert", "model.safetensors", f"dense.{to}", "--to", to)
    assert status == 0
    assert out.startswith(f"dense.{to}: 5 arrays, ")
    assert "masks are zeros in this format" in err
    assert "dormant values are left out, of layers.2.weight" in err
    assert run("diff", "model.safetensors", f"dense.{to}", "--dense")[0] == 0
    status, out, _ = run("convert", f"dense.{to}", "again.safetensors", "--to", "maskedlinear", "--masks", "zeros")
    assert status == 0
    again = checkpoint.load("again.safetensors")
    for name, array in arrays.items():
        np.testing.assert_array_equal(plain(again[name]), plain(array))
    linear = again["layers.10.weight"]
    assert isinstance(linear, MaskedArray)
    np.testing.assert_array_equal(linear.mask(), arrays["layers.10.weight"].mask())


def test_dense_files_are_others_own(run: Run) -> None:
    import safetensors.numpy
    import torch

    arrays = {"w": MaskedArray.of(values(4, 6), np.eye(4, 6)), "b": PlainArray.of(np.arange(3))}
    checkpoint.save(arrays, "model.safetensors", metadata={"by": "me"})
    for to in ("safetensors", "npz", "torch"):
        assert run("convert", "model.safetensors", f"dense.{to}", "--to", to)[0] == 0
    with np.load("dense.npz") as npz:
        found = [
            safetensors.numpy.load_file("dense.safetensors"),
            dict(npz),
            torch.load("dense.torch", weights_only=True),
        ]
    for state in found:
        for name, array in arrays.items():
            np.testing.assert_array_equal(np.asarray(state[name]), plain(array))
    with safetensors.safe_open("dense.safetensors", "np") as file:
        assert file.metadata() == {"by": "me", "format": "pt"}  # nothing of ours stays behind


@pytest.mark.parametrize("codec", ["raw", "pcodec"])
def test_convert_to_ours_keeps_what_there_is(run: Run, codec: str) -> None:
    arrays = {"big.weight": MaskedArray.of(values(60, 90), masks.random((60, 90), sparsity=0.5, seed=0), dormant=True)}
    checkpoint.save(arrays | model(), "model.safetensors", dormant=True, metadata={"by": "me"})
    options = ["convert", "model.safetensors", "out.safetensors", "--to", "maskedlinear", "--values", codec]
    assert run(*options, "--dormant")[0] == 0
    assert run("diff", "model.safetensors", "out.safetensors") == (0, "6 arrays, all the same\n", "")
    with checkpoint.open("out.safetensors") as file:
        assert file.metadata == {"by": "me"}
        assert file.array("experts").axes == WeightAxes(2, 1, 0)
        assert file.told("layers.10.weight").stored_as == file.told("head.weight").stored_as
        assert file.entry("big.weight").values.codec == codec
    status, _, err = run(*options, "--force")
    assert status == 0
    assert "dormant values are left out, of big.weight, layers.2.weight; --dormant keeps them" in err
    status, out, _ = run("diff", "model.safetensors", "out.safetensors")
    assert status == 1
    assert "dormant values only in A" in out


def test_bfloat16_goes_where_it_can(run: Run) -> None:
    held = np.array([[0x3F80, 0, 0x8000], [0x7FC0, 0xBF80, 0]], np.uint16)  # 1, 0, -0, NaN, -1, 0
    checkpoint.save({"w": PlainArray("BF16", held.shape, lambda: held)}, "a.safetensors")
    status, _, err = run("convert", "a.safetensors", "a.npz", "--to", "npz")
    assert status == 2
    assert "BF16" in err
    assert not Path("a.npz").exists()
    assert run("convert", "a.safetensors", "b.safetensors", "--to", "maskedlinear", "--masks", "zeros")[0] == 0
    array = checkpoint.load("b.safetensors")["w"]
    assert isinstance(array, MaskedArray)
    assert array.places.tolist() == [0, 3, 4]
    assert run("diff", "a.safetensors", "b.safetensors", "--dense", "--json")[0] == 1  # -0 has become +0


def test_nothing_is_written_over_and_nothing_is_left_behind(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(model(), "model.safetensors")
    Path("there.npz").write_text("mine")
    Path("folder").mkdir()
    Path("link.npz").symlink_to("nowhere")
    to = ["--to", "npz"]
    for out, said in (
        ("there.npz", "--force"),
        ("folder", "is a folder"),
        ("missing/out.npz", "no such folder"),
        ("link.npz", "is there already"),
        ("/dev/null", "no file"),
    ):
        status, printed, err = run("convert", "model.safetensors", out, *to)
        assert (status, printed) == (2, "")
        assert said in err
        assert err.count("\n") == 1
    assert Path("there.npz").read_text() == "mine"
    assert run("convert", "model.safetensors", "/dev/null", *to, "--force")[0] == 2

    def fails(*_: object, **__: object) -> None:
        Path(_[1]).write_text("half")  # type: ignore[arg-type]
        raise OSError(28, "No space left on device", "out.npz")

    monkeypatch.setattr("maskedlinear.files.convert.write_dense", fails)
    for options in ([], ["--force"]):
        status, _, err = run("convert", "model.safetensors", "there.npz" if options else "out.npz", *to, *options)
        assert status == 2
        assert "No space left on device" in err
    assert Path("there.npz").read_text() == "mine"
    assert sorted(path.name for path in Path().iterdir()) == ["folder", "link.npz", "model.safetensors", "there.npz"]


def test_a_file_that_comes_meanwhile_stays(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(model(), "model.safetensors")

    def slow(arrays: Any, out: Path, **_: object) -> None:
        out.write_text("ours")
        Path("out.npz").write_text("theirs")

    monkeypatch.setattr("maskedlinear.files.convert.write_dense", slow)
    assert run("convert", "model.safetensors", "out.npz", "--to", "npz")[0] == 2
    assert Path("out.npz").read_text() == "theirs"


def test_convert_onto_itself(run: Run) -> None:
    checkpoint.save(model(), "model.safetensors", dormant=True)
    Path("model.safetensors").chmod(0o600)
    Path("link.safetensors").symlink_to("model.safetensors")
    status, _, _ = run("convert", "model.safetensors", "link.safetensors", "--to", "maskedlinear", "--force")
    assert status == 0
    assert Path("link.safetensors").is_symlink()
    assert Path("model.safetensors").stat().st_mode & 0o777 == 0o600
    assert rows_of(run("inspect", "model.safetensors", "--json")[1])["layers.2.weight"]["dormant"] == 0


def test_options_that_do_not_fit_are_refused(run: Run) -> None:
    checkpoint.save(model(), "model.safetensors")
    for option in (["--dormant"], ["--values", "pcodec"]):
        status, _, err = run("convert", "model.safetensors", "out.npz", "--to", "npz", *option)
        assert status == 2
        assert "--to maskedlinear" in err
