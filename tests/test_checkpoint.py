"""Checkpoints: what is saved comes back bit for bit, is as small as promised, and is written whole or not at all."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from checkpoint_fuzz import arrays, read, same
from helpers import ROOT
from maskedlinear import checkpoint, masks
from maskedlinear.checkpoint import CheckpointError, CheckpointFile, MaskedArray, PlainArray
from maskedlinear.checkpoint import _file as file_module
from maskedlinear.checkpoint._container import Reader
from maskedlinear.checkpoint._file import save_arrays
from maskedlinear.checkpoint._repeats import repeats
from maskedlinear.models import WeightAxes

FLAX = WeightAxes(out_axis=1, in_axis=0)


def masked(mask, dtype="f4", **more):
    values = np.random.default_rng(0).standard_normal(mask.shape, np.float32)
    return MaskedArray.of(values.astype(dtype), mask, **more)


def entropy(array: MaskedArray) -> float:
    """Return the bytes of information in a random mask of this density."""
    p = array.nnz / array.size
    return array.size * -(p * np.log2(p) + (1 - p) * np.log2(1 - p)) / 8


def saved(array, path, **more):
    """Save an array, and return the file's size and what it says of the array."""
    save_arrays({"w": array}, path, **more)
    with CheckpointFile(path) as file:
        file.verify()
        assert same(file.array("w"), array)
        return path.stat().st_size, file.entry("w")


def test_all_comes_back_bit_for_bit_in_every_way_of_reading(tmp_path):
    made = arrays()
    checkpoint.save(made, tmp_path / "all", metadata={"note": "mine"})
    found = read(tmp_path / "all", [])
    assert list(found) == list(made)
    for name, array in made.items():
        assert same(found[name], array), name
        assert (found[name].axes, found[name].role) == (array.axes, array.role)
        assert getattr(found[name], "form", None) == getattr(array, "form", None)
    assert found["recipe"].recipe == made["recipe"].recipe
    with checkpoint.open(tmp_path / "all") as file:
        assert file.metadata == {"note": "mine"}
        assert {name: file.entry(name).mask.encoding for name in file if file.entry(name).mask} == {
            name: {"tied": "gaps", "blocks": "bits", "empty": "gaps", "none": "full", "alone": "bits"}.get(name, name)
            for name, array in made.items()
            if isinstance(array, MaskedArray)
        } | {"bool": file.entry("bool").mask.encoding, "alone": file.entry("alone").mask.encoding}
        assert file.entry("blocks").mask.repeat == (4, 3)
        assert file.entry("alone").values.codec == "true"
    loaded = checkpoint.load(tmp_path / "all")
    assert all(same(loaded[name], made[name]) for name in made)
    for again in (loaded, checkpoint.read(tmp_path / "all")):
        assert again["tied"] is again["gaps"]
        checkpoint.save(again, tmp_path / "again")
        with checkpoint.open(tmp_path / "again") as file:
            assert file.told("tied").stored_as == "gaps"


@pytest.mark.parametrize(("sparsity", "more"), [(0.999, 1024), (0.99, 0), (0.9, 1024), (0.5, 1024)])
def test_a_random_mask_costs_its_entropy(tmp_path, sparsity, more):
    array = masked(masks.random((4096, 4096) if sparsity > 0.95 else (1024, 4096), sparsity=sparsity))
    size, _ = saved(array, tmp_path / "w")
    assert size <= 1.02 * (array.values.nbytes + entropy(array)) + more


def bipartite(out, in_, edges):
    """Return random connections of nodes whose numbers of them are very unequal, as in Reactome."""
    rng = np.random.default_rng(1)
    mask = np.zeros((out, in_), np.bool_)
    outs, ins = (rng.choice(n, edges, p=(w := rng.pareto(1.0, n) + 0.05) / w.sum()) for n in (out, in_))
    mask[outs, ins] = True
    return mask


STRUCTURED = {
    "blocks": (masks.blocks((1024, 1024), (16, 16), sparsity=0.9), 0.88, "gaps"),
    "tall blocks": (masks.blocks((1024, 1024), (4, 1), sparsity=0.9), 0.91, "gaps"),
    "rows": (np.repeat(np.arange(256) % 7 == 3, 512).reshape(256, 512), 0.9, None),
    "columns": (np.tile(np.arange(512) % 7 == 3, 256).reshape(256, 512), 0.9, None),
    "receptive fields": (masks.receptive_field((28, 28), 5, channels=(1, 4)), 0.85, "deflate"),
    "strided": (masks.receptive_field((32, 32), 3, stride=2, dilation=2), 0.89, "deflate"),
    "autoregressive": (np.tril(np.ones((300, 300), np.bool_)), 0.95, "runs"),
    "1:4": (masks.n_of_m((512, 1024), 1, 4), 0.97, "groups"),
    "2:4": (masks.n_of_m((512, 1024), 2, 4), 0.99, "groups"),
    "Reactome": (bipartite(1177, 10994, 12000), 0.98, "rows"),
    "Reactome in Flax": (bipartite(10994, 1177, 12000), 1.0, None),
}


@pytest.mark.parametrize("name", STRUCTURED)
def test_structure_is_smaller_than_a_random_mask_can_be(tmp_path, name):
    mask, share, encoding = STRUCTURED[name]
    array = masked(mask)
    size, entry = saved(array, tmp_path / "w")
    assert size <= share * (array.values.nbytes + entropy(array))
    assert encoding in (None, entry.mask.encoding)


def test_a_mask_with_a_recipe_takes_200_bytes_and_is_checked(tmp_path):
    recipe = masks.Recipe("random", sparsity="0.99", seed=12345)
    mask = recipe.make((1000, 2000))
    array = masked(mask, recipe=recipe, axes=WeightAxes())
    size, entry = saved(array, tmp_path / "w")
    full = masked(np.ones((1, array.nnz), np.bool_), axes=WeightAxes())
    assert entry.mask.encoding == "recipe"
    assert size - saved(full, tmp_path / "full")[0] <= 200
    flax = masked(mask.T, recipe=recipe, axes=FLAX)
    assert saved(flax, tmp_path / "w")[1].mask.encoding == "recipe"
    mask[np.nonzero(mask)[0][0], np.nonzero(mask)[1][0]] = False  # pruned since
    assert saved(masked(mask, recipe=recipe), tmp_path / "w")[1].mask.encoding == "gaps"


def test_a_recipe_never_makes_much_of_a_small_file(tmp_path, monkeypatch):
    recipe = masks.Recipe("random", sparsity="0.99", seed=1)
    array = masked(recipe.make((100, 200)), recipe=recipe)
    save_arrays({"w": array}, tmp_path / "w")
    monkeypatch.setattr("maskedlinear.checkpoint._masks.largest_made", lambda nnz: 64 * nnz)
    with pytest.raises(CheckpointError, match="a recipe for 200 live entries makes 12800 at most; got 20000"):
        CheckpointFile(tmp_path / "w")
    assert saved(array, tmp_path / "w")[1].mask.encoding == "gaps"


def test_recipes_of_a_file_make_so_much_and_no_more(tmp_path, monkeypatch):
    recipe = masks.Recipe("random", sparsity="0.5", seed=1)
    some = {str(n): MaskedArray.of(np.ones((64, 64), "?"), recipe.make((64, 64)), recipe=recipe) for n in range(3)}
    monkeypatch.setattr(file_module, "LARGEST_MADE", 2 * 64 * 64)
    save_arrays(some, tmp_path / "w")
    with CheckpointFile(tmp_path / "w") as file:
        assert [file.entry(name).mask.encoding for name in file] == ["recipe", "recipe", "bits"]
    monkeypatch.setattr(file_module, "LARGEST_MADE", 64 * 64)
    with pytest.raises(CheckpointError, match="its recipes make 8192 entries of masks"):
        CheckpointFile(tmp_path / "w")


@pytest.mark.parametrize("codec", ["raw", "pcodec"])
@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", "bfloat16", "float8_e4m3fn", "i4", "u2", "c8", "?"])
def test_every_bit_of_a_value_survives(tmp_path, dtype, codec):
    import ml_dtypes

    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    raw = np.random.default_rng(0).bytes(600 * dtype.itemsize)  # NaNs with all payloads, -0, infinities
    values = (np.frombuffer(raw, dtype) if dtype != np.bool_ else np.frombuffer(raw, "u1") > 99).reshape(20, 30).copy()
    values[0, :9] = np.zeros(9, dtype)
    array = MaskedArray.of(values, np.arange(600).reshape(20, 30) % 3 != 1, dormant=True)
    saved(array, tmp_path / "w", values=codec)
    with checkpoint.open(tmp_path / "w") as file:
        assert file.array("w").numpy(dormant=True).tobytes() == values.tobytes()
        assert not (file["w"].view("u1").reshape(600, -1)[1::3]).any()


def test_bfloat16_after_pruning_takes_14_bits_through_pcodec(tmp_path):
    import ml_dtypes

    weight = np.random.default_rng(0).standard_normal((2048, 4096), np.float32)
    mask = np.abs(weight) > np.quantile(np.abs(weight), 0.9)
    array = MaskedArray.of(weight.astype(ml_dtypes.bfloat16), mask)
    size, entry = saved(array, tmp_path / "w", values="pcodec")
    assert entry.values.codec == "pcodec"
    assert 8 * size <= 14 * array.nnz


def test_pcodec_is_an_extra_and_never_makes_values_larger(tmp_path, monkeypatch):
    noise = MaskedArray.of(np.random.default_rng(0).integers(0, 1 << 62, (8, 8)), np.eye(8) == 0)
    assert saved(noise, tmp_path / "w", values="pcodec")[1].values.codec == "raw"
    array = masked(np.arange(3000).reshape(50, 60) % 2 == 0)
    saved(array, tmp_path / "w", values="pcodec")
    monkeypatch.setitem(sys.modules, "pcodec", None)
    with (
        CheckpointFile(tmp_path / "w") as file,
        pytest.raises(CheckpointError, match=r"pip install \"maskedlinear\[pcodec"),
    ):
        file.array("w")
    with pytest.raises(ModuleNotFoundError, match="maskedlinear"):
        save_arrays({"w": array}, tmp_path / "w", values="pcodec")
    with pytest.raises(ValueError, match="raw, pcodec; got 'zip'"):
        save_arrays({"w": array}, tmp_path / "w", values="zip")


def test_a_mask_alone_has_no_values_in_the_file(tmp_path, monkeypatch):
    mask = np.random.default_rng(0).random((300, 300)) < 0.1
    alone = MaskedArray.of(np.ones_like(mask), mask)
    size, entry = saved(alone, tmp_path / "w")
    assert entry.parts == ("w/mask",)
    assert size < 1.02 * entropy(alone) + 700
    # Full and structured ones take next to nothing; past a limit for a file each live entry has a bit again.
    full = {str(n): MaskedArray.of(np.ones((64, 64), np.bool_), np.ones((64, 64), np.bool_)) for n in range(3)}
    monkeypatch.setattr(file_module, "LARGEST_UNBACKED", 2 * 64 * 64)
    save_arrays(full, tmp_path / "w")
    with CheckpointFile(tmp_path / "w") as file:
        assert [file.entry(name).mask.encoding for name in file] == ["full", "full", "bits"]
        file.verify()
    monkeypatch.setattr(file_module, "LARGEST_UNBACKED", 64 * 64)
    with pytest.raises(CheckpointError, match="it claims 8192 live entries without a bit for each"):
        CheckpointFile(tmp_path / "w")


def test_rows_read_their_blocks_only_and_check_them(tmp_path, monkeypatch):
    array = masked(masks.random((3000, 1000), sparsity=0.6))
    path = tmp_path / "w"
    saved(array, path)
    dense, lengths = array.numpy(), []
    whole = Reader._bytes
    monkeypatch.setattr(Reader, "_bytes", lambda self, a, b: lengths.append(b - a) or whole(self, a, b))
    with CheckpointFile(path) as file:
        for rows in ((0, 10), (1500, 1501), (2900, 3000), (7, 7), (-5, 3000)):
            assert np.array_equal(file.rows("w", *rows), dense[slice(*rows)])
        assert max(lengths) <= 1 << 20
        lengths.clear()
        file.rows("w", 0, 10)
        assert sum(lengths) <= 3 << 20 < path.stat().st_size
    data = bytearray(path.read_bytes())
    data[8 + int.from_bytes(data[:8], "little") + 4_000_000] ^= 1  # of the values of some late row
    path.write_bytes(data)
    with CheckpointFile(path) as file:
        file.rows("w", 0, 10)
        with pytest.raises(CheckpointError, match="CRC-32"):
            file.rows("w", 2400, 3000)
        with pytest.raises(CheckpointError, match="CRC-32"):
            file.verify()


def test_a_mask_too_large_to_be_an_array_costs_its_live_entries(tmp_path):
    rng = np.random.default_rng(0)
    places = np.unique(rng.integers(0, 10**10, 300_000))
    values = rng.standard_normal(len(places)).astype("f4")
    array = MaskedArray((100_000, 100_000), "F32", values, places)
    tracemalloc.start()
    size, _ = saved(array, tmp_path / "w")
    with CheckpointFile(tmp_path / "w") as file:
        some = file.rows("w", 500, 510)
        with pytest.raises(CheckpointError, match=r"would be dense 40000000000 bytes"):
            file["w"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * 12 * 300_000 / 10
    assert size < 1.01 * (values.nbytes + entropy(array))
    inside = (places >= 500 * 100_000) & (places < 510 * 100_000)
    assert np.array_equal(some.reshape(-1)[places[inside] - 500 * 100_000], values[inside])
    assert np.count_nonzero(some) == np.count_nonzero(inside)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 0, 2), (2, 3, 4, 5), (1, 100_000), (100_000, 1)])
def test_any_shape(tmp_path, shape):
    array = masked(np.random.default_rng(0).random(shape) < 0.3, dormant=True)
    saved(array, tmp_path / "w")
    with CheckpointFile(tmp_path / "w") as file:
        assert file["w"].shape == shape
        if shape:
            assert file.rows("w", 0, 2).shape == (min(2, shape[0]), *shape[1:])
        else:
            with pytest.raises(IndexError, match="scalar"):
                file.rows("w", 0, 1)


def test_blocks_hold_a_million_live_entries_at_most(tmp_path):
    mask = np.zeros((1000, 10_000), np.bool_)  # all of them in one corner
    mask[:180, ::2] = np.random.default_rng(0).random((180, 5000)) < 0.9
    mask[:180] |= np.random.default_rng(1).random((180, 10_000)) < 0.5
    array = MaskedArray.of(np.ones(mask.shape, np.uint8), mask)
    _, entry = saved(array, tmp_path / "w")
    counts = np.diff(np.searchsorted(array.places, np.arange(0, array.size, entry.mask.block)), append=array.nnz)
    assert array.nnz > 1 << 20 >= counts.max()


def test_the_digest_is_the_masks_and_not_the_forms(tmp_path):
    mask = masks.random((40, 50), sparsity=0.8, seed=1)
    dense = masked(mask)
    assert MaskedArray.of_pattern(dense.values, dense.pattern()).digest == dense.digest
    assert dense.digest == "907c803214b0a65cfd770645a32fd91153f78b648d9f0af0b8caa5073c041264"
    assert masked(mask.reshape(50, 40)).digest != dense.digest


def test_safetensors_itself_reads_the_file(tmp_path):
    from safetensors.numpy import load_file

    made = arrays()
    save_arrays(made, tmp_path / "w.safetensors")
    found = load_file(tmp_path / "w.safetensors")
    assert np.array_equal(found["plain"], made["plain"].numpy())
    assert np.array_equal(found["gaps/values"], made["gaps"].values)


def wrong(**changes):
    array = masked(np.eye(4) == 1)
    return MaskedArray(**{**{name: getattr(array, name) for name in ("shape", "dtype", "values", "places")}, **changes})


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"w": wrong(places=np.array([0, 10, 5, 15]))}, "must ascend"),
        ({"w": wrong(places=np.array([0, 5, 10, 16]))}, "below 16"),
        ({"w": wrong(values=np.zeros(3, "f4"))}, "values of 'w' must have the shape"),
        ({"w": wrong(dormant=np.zeros(3, "f4"))}, "dormant of 'w' must have the shape"),
        ({"w": wrong(), "w/values": PlainArray.of(np.ones(2))}, "one tensor of each name"),
        ({"__metadata__": PlainArray.of(np.ones(2))}, "rename it"),
    ],
)
def test_what_no_file_can_hold_is_refused_and_leaves_nothing(tmp_path, arrays, message):
    (tmp_path / "w").write_bytes(b"old")
    with pytest.raises(ValueError, match=message):
        save_arrays(arrays, tmp_path / "w")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_an_exception_while_writing_leaves_the_old_file_and_no_other(tmp_path):
    def fails():
        raise RuntimeError("it was not there after all")

    path = tmp_path / "w"
    save_arrays({"w": wrong()}, path)
    old = path.read_bytes()
    with pytest.raises(RuntimeError, match="not there"):
        save_arrays({"w": wrong(), "x": PlainArray("F32", (3,), fails)}, path)
    with pytest.raises(OSError, match="w"):
        save_arrays({"w": wrong()}, tmp_path / "none" / "w")
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32", reason="permissions and links are POSIX's")
def test_a_file_is_replaced_as_users_expect(tmp_path):
    path, link = tmp_path / "w", tmp_path / "link"
    old = os.umask(0o027)
    try:
        save_arrays({"w": wrong()}, path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.chmod(0o604)
    link.symlink_to(path)
    with CheckpointFile(link) as before:
        save_arrays({"w": masked(np.eye(5) == 1)}, link)
        assert np.array_equal(before["w"], wrong().numpy())  # the old file, which is open
    assert link.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o604
    with CheckpointFile(path) as after:
        assert after["w"].shape == (5, 5)


def test_a_file_that_is_protected_stays(tmp_path, monkeypatch):
    (tmp_path / "w").write_bytes(b"old")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as for whoever is not root
    with pytest.raises(PermissionError, match="protected against writing"):
        save_arrays({"w": wrong()}, tmp_path / "w")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


KILLED = """
import os, random, signal, sys, time
import numpy as np
from pathlib import Path
from maskedlinear.checkpoint import CheckpointFile, MaskedArray, PlainArray
from maskedlinear.checkpoint._file import save_arrays
from maskedlinear.checkpoint._repeats import repeats

path, count = Path(sys.argv[1]), int(sys.argv[2])
mask = np.random.default_rng(0).random((200, 1000)) < 0.3

def left():
    return len([name for name in os.listdir(path.parent) if name.endswith(".tmp")])

def save(version):
    values = np.full(mask.shape, version, np.float32)
    save_arrays({"w": MaskedArray.of(values, mask), "b": PlainArray.of(values[:, :500])}, path)

save(0)
began = time.perf_counter()
save(0)
took, last, seen, random = time.perf_counter() - began, 0, set(), random.Random(0)
for kills in range(20 * count):
    if kills >= count and len(seen) > 1 and left():
        break
    child = os.fork()
    if not child:
        for version in range(last + 1, last + 1000):
            save(version)
        os._exit(0)
    time.sleep(random.uniform(0, 2 * took) * (1 + kills // 5))  # longer and longer, where forks are slow to begin
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with CheckpointFile(path) as file:
        file.verify()
        found = {*np.unique(file.array("w").values), *np.unique(file["b"])}
    assert len(found) == 1 and min(found) >= last, (found, last)
    last = int(min(found))
    seen.add(last)
print(len(seen), left())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
@pytest.mark.parametrize("count", [15, pytest.param(200, marks=pytest.mark.slow)])
def test_a_kill_at_any_instant_leaves_a_whole_file(tmp_path, count):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "w"), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    versions, left = map(int, done.stdout.split())
    assert versions > 1  # some saves came to their end
    assert left > 0  # and some did not


@pytest.mark.parametrize(
    "call", [lambda arrays, path: checkpoint.save(arrays, path), lambda arrays, _: checkpoint.read(arrays)]
)
def test_two_keys_of_one_name_lose_nothing(tmp_path, call):
    with pytest.raises(ValueError, match="got two keys that are '1': rename one"):
        call({1: np.ones(2), "1": np.zeros(2)}, tmp_path / "a")


@pytest.mark.parametrize(("breaks", "tall"), [((), 4), ((400,), 4), ((402,), 2), ((401,), 1), ((3,), 1)])
def test_rows_that_repeat_are_found_wherever_they_cease_to(breaks, tall):
    mask = np.repeat(np.random.default_rng(0).random((128, 40)) < 0.3, 4, axis=0)
    for row in breaks:
        mask[row:, :7] ^= True
    mask[:, 0] = np.arange(512) // 4 % 2 if tall == 4 else mask[:, 0]
    assert repeats(np.flatnonzero(mask), mask.shape)[0] == tall
