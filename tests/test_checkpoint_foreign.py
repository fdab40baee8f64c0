"""States and folders of others read into arrays and masks, by format; and dense ones written."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch
from torch import nn
from torch.nn.utils import prune

from maskedlinear import checkpoint
from maskedlinear.checkpoint import CheckpointError, MaskedArray, PlainArray, read
from maskedlinear.torch import MaskedLinear, SparseLinear, mask_model


def _pruned() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.random_unstructured(model[0], "bias", 0.5)
    return model


def _numpy(state: dict[str, Any]) -> dict[str, NDArray[Any]]:
    return {name: value.detach().numpy() for name, value in state.items()}


def _write_pt(state: Any, folder: Path) -> Path:
    torch.save(state, folder / "model.pt")
    return folder / "model.pt"


def _write_legacy(state: Any, folder: Path) -> Path:
    torch.save(state, folder / "model.bin", _use_new_zipfile_serialization=False)
    return folder / "model.bin"


def _write_npz(state: Any, folder: Path) -> Path:
    np.savez_compressed(folder / "model.npz", **_numpy(state))
    return folder / "model.npz"


def _write_safetensors(state: Any, folder: Path) -> Path:
    save_torch(state, folder / "model")  # told by its content
    return folder / "model"


def _write_shards(state: Any, folder: Path) -> Path:
    names = list(state)
    parts = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
    for file, part in parts.items():
        save_torch({name: state[name] for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    return folder


def _write_bin(state: Any, folder: Path) -> Path:
    torch.save(state, folder / "pytorch_model.bin")
    return folder


_WRITERS = {
    "state": (lambda state, folder: state, "state"),
    "numpy": (lambda state, folder: _numpy(state), "state"),
    "pt": (_write_pt, "torch"),
    "legacy": (_write_legacy, "torch"),
    "npz": (_write_npz, "npz"),
    "safetensors": (_write_safetensors, "safetensors"),
    "shards": (_write_shards, "folder"),
    "bin": (_write_bin, "folder"),
}


@pytest.mark.parametrize("kind", _WRITERS)
def test_pruned_states_of_every_container(kind: str, tmp_path: Path) -> None:
    write, container = _WRITERS[kind]
    state = _pruned().state_dict()
    arrays = read(write(state, tmp_path))  # type: ignore[no-untyped-call]
    assert arrays.container == container
    assert set(arrays) == {"0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"}
    assert arrays.mask_sources == dict.fromkeys(("0.weight", "0.bias"), "torch.nn.utils.prune")
    for name in arrays.mask_sources:
        array, original, mask = arrays[name], state[f"{name}_orig"].numpy(), state[f"{name}_mask"].numpy()
        assert isinstance(array, MaskedArray)
        np.testing.assert_array_equal(array.numpy(), original * mask)
        np.testing.assert_array_equal(array.mask(), mask == 1)
        np.testing.assert_array_equal(array.numpy(dormant=True), original)
    np.testing.assert_array_equal(arrays["2.weight"].numpy(), state["2.weight"].numpy())
    checkpoint.save(arrays, tmp_path / "ours.safetensors")
    ours = read(tmp_path / "ours.safetensors")
    assert ours.container == "maskedlinear"
    assert ours.mask_sources == dict.fromkeys(("0.weight", "0.bias"), "maskedlinear")
    assert all(ours[name].numpy().tobytes() == array.numpy().tobytes() for name, array in arrays.items())
    raw = read(write(state, tmp_path), masks="none")  # type: ignore[no-untyped-call]
    assert raw.keys() == state.keys()
    assert not raw.mask_sources


@pytest.mark.parametrize("mask_dtype", [np.float32, np.bool_, np.int64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", ["weight", "kernel"])
def test_masks_beside_weights(name: str, mask_dtype: Any, rng: np.random.Generator) -> None:
    weight, mask = rng.normal(size=(4, 5)).astype(np.float32), rng.random((4, 5)) < 0.5
    weight[0, 0], mask[0, 0], weight[1, 1], mask[1, 1] = -0.0, True, np.nan, False
    arrays = read({f"a.{name}": weight, "a.mask": mask.astype(mask_dtype), "a.degrees": np.arange(5), "b.mask": mask})
    assert list(arrays) == [f"a.{name}", "a.degrees", "b.mask"]  # a mask without a weight is an array like any other
    array = arrays[f"a.{name}"]
    assert isinstance(array, MaskedArray)
    assert array.axes is not None
    assert array.axes.in_axis == (1 if name == "weight" else 0)
    assert arrays.mask_sources == {f"a.{name}": "mask beside weight"}
    assert array.numpy().tobytes() == np.where(mask, weight, np.float32(0)).tobytes()
    assert array.numpy(dormant=True).tobytes() == weight.tobytes()


def test_states_of_our_own_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 4))
    full = {name: value.detach().clone() for name, value in model.named_parameters()}
    masks = {"0": torch.rand(3, 2, 3, 3) < 0.5, "2": torch.rand(4, 12) < 0.5}
    mask_model(model, masks)
    arrays = read(model.state_dict())
    assert set(arrays) == full.keys()
    assert arrays.mask_sources == dict.fromkeys(("0.weight", "2.weight"), "maskedlinear")
    for name, mask in masks.items():
        array = arrays[f"{name}.weight"]
        assert isinstance(array, MaskedArray)
        np.testing.assert_array_equal(array.mask(), mask.numpy())
        np.testing.assert_array_equal(array.numpy(dormant=True), full[f"{name}.weight"].numpy())
    sparse = nn.Sequential(SparseLinear.from_masked(MaskedLinear(4, 3, mask=torch.eye(3, 4))))
    with pytest.raises(CheckpointError, match=r"0\.weight_values .* sparse form, .*checkpoint\.save"):
        read(sparse.state_dict())


def _stand(**more: Any) -> dict[str, Any]:
    return {"a.weight": np.ones((2, 3), np.float32), "a.mask": np.ones((2, 3)), **more}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (_stand(**{"a.mask": np.full((2, 3), 0.5)}), r"the mask of a\.weight: .*0s and 1s; got 0\.5 at \(0, 0\)"),
        (_stand(**{"a.mask": np.full((2, 3), np.nan)}), r"a\.weight: .*0s and 1s; got nan"),
        (_stand(**{"a.mask": np.ones((3, 2))}), r"got \(3, 2\), which is its transpose.*masks='none' reads"),
        (_stand(**{"a.mask": np.ones(3)}), r"a\.weight = \(2, 3\); got \(3,\)"),
        (_stand(**{"a.kernel": np.ones((2, 3))}), r"a\.mask could be of a\.weight or of a\.kernel"),
        (_stand(**{"a.dormant": np.ones((3, 2), np.float32)}), r"dormant of a\.weight .* got F32 \(3, 2\)"),
        ({"w_orig": np.ones(3), "w_mask": np.ones(3), "w": np.ones(3)}, "w is there beside w_orig and w_mask"),
        ({"w_orig": np.ones(3), "w_mask": np.ones(4)}, r"the mask of w: .* got \(4,\)"),
    ],
)
def test_masks_that_do_not_fit(state: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(state)
    assert read(state, masks="none").keys() == state.keys()


def test_what_is_no_state() -> None:
    for source, message in (
        (nn.Linear(2, 2), r"got Linear: of a model give its state_dict\(\), .*import_masks"),
        ({"params": {"kernel": np.ones(2)}}, "key='params'"),
        ({"a": object()}, "got object under 'a'"),
        ({"a": "text"}, "got str under 'a'"),
    ):
        with pytest.raises(TypeError, match=message):
            read(source)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="masks must be"):
        read({}, masks="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"min_sparsity .*got 2"):
        read({}, masks="zeros", min_sparsity=2)
    assert list(read({"model": {"w": np.ones(2)}}, key="model")) == ["w"]
    with pytest.raises(CheckpointError, match="under 'other'; it has 'model'"):
        read({"model": {}}, key="other")


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_masks_of_zeros(dtype: Any, rng: np.random.Generator) -> None:
    weight = np.where(rng.random((10, 10)) < 0.5, 1.5, 0.0)
    weight[0, :2] = -0.0, 1.0
    few = np.ones((10, 10))
    few[0, :5] = 0
    state = {
        name: np.asarray(array).astype(dtype)
        for name, array in {
            "a.weight": weight,
            "few.weight": few,
            "none.weight": np.zeros((4, 4)),
            "a.bias": np.zeros(10),
            "norm.weight": np.array([0.0, 1.0]),
            "embed.weight_embed": weight,
            "conv.kernel": np.stack([weight] * 3),
        }.items()
    }
    arrays = read(state | {"ids.weight": np.eye(4, dtype=np.int64)}, masks="zeros")
    assert arrays.mask_sources == dict.fromkeys(("a.weight", "conv.kernel"), "zeros")
    array = arrays["a.weight"]
    assert isinstance(array, MaskedArray)
    np.testing.assert_array_equal(array.mask(), weight != 0)
    assert array.dormant is None
    assert not array.numpy().astype(np.float32)[weight == 0].tobytes().strip(b"\0")  # +0
    assert "few.weight" in read(state, masks="zeros", min_sparsity=0.05).mask_sources
    assert not read(state).mask_sources


def _bitmask(array: NDArray[Any], prefix: str, *, offsets: bool = True) -> dict[str, NDArray[Any]]:
    """As compressed-tensors' bitmask_compress writes it."""
    live = array != 0
    counts = live.sum(axis=-1)
    held = {
        "shape": np.array(array.shape, np.int64),
        "compressed": array[live],
        "bitmask": np.packbits(live, axis=-1, bitorder="little"),
    }
    if offsets:
        held["row_offsets"] = np.asarray(np.cumsum(counts, axis=0) - counts if counts.ndim else counts * 0, np.int64)
    return {f"{prefix}.{end}": value for end, value in held.items()}


def test_sparse_bitmask(tmp_path: Path, rng: np.random.Generator) -> None:
    weight = rng.normal(size=(5, 11)).astype(np.float16)
    weight[rng.random(weight.shape) < 0.7] = 0
    weight[2] = 0
    conv = rng.normal(size=(3, 2, 3)).astype(np.float32) * (rng.random((3, 2, 3)) < 0.5)
    bias = np.array([1, 0, 2], np.float32)
    later = _bitmask(weight, "layers.0") | _bitmask(conv, "conv") | {"layers.0.bias": bias}
    earlier = _bitmask(weight, "layers.0.weight") | _bitmask(conv, "conv.weight") | _bitmask(bias, "layers.0.bias")
    for state in (later, earlier):
        save_file(state, tmp_path / "model.safetensors")
        arrays = read(tmp_path / "model.safetensors")
        assert arrays.keys() == {"layers.0.weight", "conv.weight", "layers.0.bias"}
        assert arrays.mask_sources == dict.fromkeys(("layers.0.weight", "conv.weight"), "sparse-bitmask")
        np.testing.assert_array_equal(arrays["layers.0.weight"].numpy(), weight)
        np.testing.assert_array_equal(arrays["conv.weight"].numpy(), conv)
        np.testing.assert_array_equal(arrays["layers.0.bias"].numpy(), bias)
        array = arrays["layers.0.weight"]
        assert isinstance(array, MaskedArray)
        np.testing.assert_array_equal(array.mask(), weight != 0)


def test_sparse_24_bitmask_keeps_live_zeros() -> None:
    mask = np.tile([True, False, True, False], (3, 2))
    values = np.arange(12, dtype=np.float32).reshape(3, 4)  # the first of them is a live 0
    state = {
        "a.shape": np.array([[3], [8]]),
        "a.compressed": values,
        "a.bitmask": np.packbits(mask, axis=-1, bitorder="little"),
    }
    array = read(state)["a.weight"]
    assert isinstance(array, MaskedArray)
    np.testing.assert_array_equal(array.mask(), mask)
    np.testing.assert_array_equal(array.values, np.arange(12))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a.shape": None}, r"its \.shape is missing, and is not guessed"),
        ({"a.shape": np.array([3, 13])}, r"bitmask U8 \(3, 2\); got U8 \(3, 1\)"),
        ({"a.shape": np.array([1 << 40, 1 << 40])}, r"has a bitmask U8 \(1099511627776"),
        ({"a.shape": np.array([-3, -13])}, "counts"),
        ({"a.shape": np.array([3.0, 12.0])}, "counts; got float64"),
        ({"a.bitmask": np.full((3, 2), 255, np.uint8)}, "bits past the end of a row"),
        ({"a.bitmask": np.zeros((3, 2), np.uint8)}, "0 live entries; got values of shape"),
        ({"a.bitmask": np.zeros((3, 2), np.int8)}, "got I8"),
        ({"a.compressed": np.zeros(3, np.float32)}, r"live entries; got values of shape \(3,\)"),
        ({"a.row_offsets": np.array([0, 1, 99])}, "row_offsets are not the sums"),
        ({"a.weight": np.zeros((3, 12), np.float32)}, r"a\.weight is there beside a\.compressed"),
    ],
)
def test_damaged_bitmasks(change: dict[str, Any], message: str, rng: np.random.Generator) -> None:
    weight = rng.normal(size=(3, 12)).astype(np.float32) * (rng.random((3, 12)) < 0.5)
    state = {name: array for name, array in (_bitmask(weight, "a") | change).items() if array is not None}
    if "a.shape" in change and change["a.shape"] is not None and list(change["a.shape"]) == [3, 13]:
        state["a.bitmask"] = state["a.bitmask"][:, :1]
    with pytest.raises(CheckpointError, match=message):
        read(state)


def test_files_of_torch(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16), nn.Linear(4, 4, dtype=torch.bfloat16))
    model[1].weight = model[0].weight
    state = model.state_dict()
    path = tmp_path / "run.ckpt"
    torch.save({"state_dict": state, "epoch": 3, "optimizer": {}}, path)
    with pytest.raises(CheckpointError, match=r"arrays by name were due: give key='state_dict' or key='optimizer'"):
        read(path)
    with pytest.raises(CheckpointError, match="due under 'model'"):
        read(path, key="model")
    arrays = read(path, key="state_dict")
    assert arrays["0.weight"] is arrays["1.weight"]  # tied
    assert arrays["0.weight"].numpy().tobytes() == state["0.weight"].view(torch.int16).numpy().tobytes()
    arrays = read({**state, "_extra_state": None, "step": 3})
    assert arrays.left_out == {"_extra_state": "NoneType", "step": "int"}
    torch.save(model, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"not unpickled.* save the model's state_dict\(\)"):
        read(tmp_path / "model.pt")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"a": print}, protocol=2))
    with pytest.raises(CheckpointError, match=r"not unpickled|no file of PyTorch"):
        read(tmp_path / "evil.pt")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match=r"arrays by name were due: save a state_dict"):
        read(tmp_path / "list.pt")
    torch.save({"a": torch.ones(1).expand(1 << 20, 1 << 20)}, tmp_path / "bomb.pt")
    with pytest.raises(CheckpointError, match=r"take 4398046511104 bytes, of 4 stored"):
        read(tmp_path / "bomb.pt")
    with pytest.raises(TypeError, match=r"got a, a Parameter of torch\.float32|on the meta device"):
        read({"a": nn.Linear(2, 2, device="meta").weight})
    with pytest.raises(TypeError, match="complex128"):
        read({"a": torch.ones(2, dtype=torch.complex128)})


@pytest.mark.filterwarnings("ignore:Sparse CS")  # of older releases of torch
@pytest.mark.parametrize("layout", ["csr", "csc", "coo"])
def test_sparse_tensors(layout: str) -> None:
    dense = torch.tensor([[0.0, 2.0, 0.0], [3.0, 0.0, 4.0]], dtype=torch.bfloat16)
    tensor = {"csr": dense.to_sparse_csr, "csc": dense.to_sparse_csc, "coo": dense.to_sparse_coo}[layout]()
    arrays = read({"a.weight": tensor, "a.bias": torch.ones(2)})
    array = arrays["a.weight"]
    assert isinstance(array, MaskedArray)
    assert arrays.mask_sources == {"a.weight": "sparse layout"}
    np.testing.assert_array_equal(array.numpy().astype(np.float32), dense.float().numpy())
    doubled = torch.sparse_coo_tensor(torch.zeros(2, 2, dtype=torch.int64), torch.ones(2), (2, 2))
    with pytest.raises(CheckpointError, match=r"the sparse tensor a: it is not coalesced"):
        read({"a": doubled})


def _both(state: Any, folder: Path) -> None:
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin.index.json").write_text("{}")


def _index(told: Any) -> Callable[[Any, Path], None]:
    def write(state: Any, folder: Path) -> None:
        save_torch(state, folder / "a.safetensors")
        save_torch(state, folder / "b.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(told))

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda state, folder: None, "got none of them"),
        (_both, "two models"),
        (_index({"weight_map": {"x": "../a.safetensors"}}), r"beside the index; it names '\.\./a"),
        (_index({"weight_map": {"x": ".."}}), "it names '..'"),
        (_index({"weight_map": {"x": "c.safetensors"}}), r"the shard c\.safetensors is missing"),
        (_index({"weight_map": {"x": 3}}), "it names 3"),
        (_index({"weight_map": ["a"]}), "weight_map"),
        (_index([]), "weight_map"),
        (_index({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}), "in b.safetensors and in another shard"),
    ],
)
def test_folders_that_are_wrong(write: Any, message: str, tmp_path: Path) -> None:
    write(nn.Linear(2, 2).state_dict(), tmp_path)
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path)


def test_masks_beside_the_weights_of_a_folder(tmp_path: Path, rng: np.random.Generator) -> None:
    weight, mask = rng.normal(size=(4, 6)).astype(np.float32), rng.random((4, 6)) < 0.5
    mask[0, 0], weight[0, 0] = True, 0  # a live zero
    save_file({"a.weight": np.where(mask, weight, np.float32(0)), "a.bias": weight[0]}, tmp_path / "model.safetensors")
    live = MaskedArray.of(np.ones((4, 6), bool), mask)

    def save(**masks: Any) -> None:
        checkpoint.save(
            {name.replace("_", "."): array for name, array in masks.items()}, tmp_path / "masks.safetensors"
        )

    save(a_weight=live, b_weight=live)
    arrays = read(tmp_path)
    array = arrays["a.weight"]
    assert isinstance(array, MaskedArray)
    assert (arrays.mask_sources, set(arrays)) == ({"a.weight": "maskedlinear"}, {"a.weight", "a.bias"})
    assert arrays.left_out == {"b.weight": "a mask without its weight"}
    assert array.dormant is None
    np.testing.assert_array_equal(array.mask(), mask)
    save(a_weight=live, a_weight_dormant=weight[~mask])
    array = read(tmp_path)["a.weight"]
    assert isinstance(array, MaskedArray)
    np.testing.assert_array_equal(array.numpy(dormant=True), weight)
    save(a_weight=live, a_weight_dormant=weight[mask][:1])
    with pytest.raises(CheckpointError, match=r"masks\.safetensors: what is dormant of a\.weight is F32"):
        read(tmp_path)
    save(a_bias=live)
    with pytest.raises(CheckpointError, match=r"a mask beside its weight has its shape.*got \(4, 6\) for a\.bias"):
        read(tmp_path)


def test_dense_states_load_strictly(tmp_path: Path) -> None:
    pruned = _pruned()
    x = torch.randn(3, 8)
    arrays = read(pruned.state_dict())
    want = pruned(x)
    plain = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    states: list[Any] = [{n: torch.from_numpy(a) for n, a in checkpoint.dense_state(arrays).items()}]
    for end in ("pt", "safetensors", "npz"):
        checkpoint.write_dense(arrays, tmp_path / f"dense.{end}")
    states.append(torch.load(tmp_path / "dense.pt", weights_only=True))
    states.append(load_file(tmp_path / "dense.safetensors"))
    with np.load(tmp_path / "dense.npz") as held:
        states.append({name: torch.from_numpy(held[name]) for name in held.files})
    for state in states:
        plain.load_state_dict(state)
        assert torch.equal(plain(x), want)
        plain.zero_grad()
    assert b"maskedlinear" not in (tmp_path / "dense.safetensors").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_dense_files_of_half_types_and_ties(tmp_path: Path) -> None:
    weight = (np.arange(6).reshape(2, 3) - 1).astype(ml_dtypes.bfloat16)
    array = MaskedArray.of(weight, weight != 0)
    arrays = {"file": array, "self": array, "scalar": PlainArray.of(np.float32(2))}
    for end in ("pt", "safetensors"):
        checkpoint.write_dense(arrays, tmp_path / f"a.{end}")
    torch_state = torch.load(tmp_path / "a.pt", weights_only=True)
    assert torch_state["file"].data_ptr() == torch_state["self"].data_ptr()
    for state in (torch_state, load_file(tmp_path / "a.safetensors")):
        assert state["self"].dtype is torch.bfloat16
        assert state["self"].tolist() == [[-1, 0, 1], [2, 3, 4]]
        assert state["scalar"].shape == ()
    path = tmp_path / "a.npz"
    checkpoint.write_dense({"file": PlainArray.of(np.ones(2))}, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"a \.npz has no BF16, which file is of"):
        checkpoint.write_dense(arrays, path)
    with pytest.raises(ValueError, match=r"got 'a\.h5'"):
        checkpoint.write_dense(arrays, tmp_path / "a.h5")
    broken = PlainArray("F32", (2,), lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    with pytest.raises(ZeroDivisionError):
        checkpoint.write_dense({"a": broken}, path)
    assert path.read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {"a.pt", "a.safetensors", "a.npz"}
