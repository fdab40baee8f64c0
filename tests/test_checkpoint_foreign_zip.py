""".npz files of arrays and of scipy: what is read, what is refused; and damaged files of every kind."""

from __future__ import annotations

import io
import warnings
import zipfile
from collections import UserDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from safetensors.numpy import save_file

from maskedlinear.checkpoint import CheckpointError, MaskedArray, PlainArray, read, to_scipy


def _matrix(form: str, rng: np.random.Generator) -> Any:
    dense = rng.normal(size=(6, 8)).astype(np.float32)
    dense[rng.random(dense.shape) < 0.6] = 0
    if form == "bsr":
        return scipy.sparse.bsr_array(dense, blocksize=(2, 4))
    made = getattr(scipy.sparse, f"{form}_array")(dense)
    if form in ("csr", "csc", "coo"):
        made.data[3] = 0  # a live zero, stored
    return made


@pytest.mark.parametrize("form", ["csr", "csc", "coo", "bsr", "dia"])
@pytest.mark.parametrize("compressed", [True, False])
def test_scipy_files(form: str, compressed: bool, tmp_path: Path, rng: np.random.Generator) -> None:
    matrix = _matrix(form, rng)
    path = tmp_path / "encoder.weight.npz"
    scipy.sparse.save_npz(path, matrix, compressed=compressed)
    arrays = read(path)
    assert (arrays.container, list(arrays)) == ("scipy", ["encoder.weight"])
    assert arrays.mask_sources == {"encoder.weight": "sparse layout"}
    array = arrays["encoder.weight"]
    assert isinstance(array, MaskedArray)
    np.testing.assert_array_equal(array.numpy(), matrix.toarray())
    if form in ("csr", "csc", "coo"):
        assert array.nnz == matrix.nnz
        assert (array.values == 0).sum() == 1
    state = read({"encoder.weight": matrix})["encoder.weight"]
    assert isinstance(state, MaskedArray)
    if form != "dia":  # of which scipy drops stored zeros
        np.testing.assert_array_equal(state.places, array.places)


def test_to_scipy_and_back(rng: np.random.Generator) -> None:
    weight, mask = rng.normal(size=(5, 7)), rng.random((5, 7)) < 0.4
    weight[mask] = np.where(rng.random(int(mask.sum())) < 0.3, 0, weight[mask])
    array = MaskedArray.of(weight, mask)
    matrix = to_scipy(array)
    assert isinstance(matrix, scipy.sparse.csr_array)
    assert matrix.nnz == mask.sum()  # live zeros are stored
    np.testing.assert_array_equal(matrix.toarray(), np.where(mask, weight, 0))
    back = read({"w": matrix})["w"]
    assert isinstance(back, MaskedArray)
    np.testing.assert_array_equal(back.mask(), mask)
    assert to_scipy(MaskedArray.of(np.ones((0, 3)), np.ones((0, 3)))).shape == (0, 3)
    with pytest.raises(ValueError, match=r"got shape \(2, 2, 2\)"):
        to_scipy(MaskedArray.of(np.ones((2, 2, 2)), np.ones((2, 2, 2))))
    with pytest.raises(ValueError, match=r"scipy\.sparse has no F16"):
        to_scipy(MaskedArray.of(np.ones((2, 2), np.float16), np.ones((2, 2))))


class Fresh(UserDict[str, Any]):
    """Arrays that are made anew whenever they are asked for, as those of HDF5 are."""

    def __getitem__(self, name: str) -> Any:
        return list(super().__getitem__(name))


def test_mappings_that_make_their_values() -> None:
    given = Fresh({f"w{number}": [float(number)] for number in range(8)})
    assert {name: array.numpy().tolist() for name, array in read(given).items()} == dict(given)


def test_sparse_matrices_of_a_state_that_contradict_themselves() -> None:
    twice = scipy.sparse.coo_array((np.ones(2), ([0, 0], [1, 1])), shape=(2, 2))
    with pytest.raises(CheckpointError, match=r"the sparse matrix w: .* got \(0, 1\) twice"):
        read({"w": twice})


def _csr(**change: Any) -> dict[str, Any]:
    good = {"format": b"csr", "shape": [2, 3], "data": [1.0, 2.0], "indices": [0, 2], "indptr": [0, 1, 2]}
    return {name: np.asarray(array) for name, array in (good | change).items() if array is not None}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (_csr(indices=[0, 3]), "indices along axis 1 are from 0 to 2; got 3"),
        (_csr(indices=[0, -1]), "from 0 to 2; got -1"),
        (_csr(indices=[0.0, 1.0]), r"indices\.npy holds whole numbers; got float64"),
        (_csr(shape=[np.nan, 3.0]), r"shape\.npy holds whole numbers; got float64"),
        (_csr(indices=[0, 1, 2]), "indptr goes up"),
        (_csr(indptr=[0, 2, 1]), "indptr goes up"),
        (_csr(indptr=[0, 2]), "indptr goes up"),
        (_csr(indptr=[0, 2, 2], indices=[1, 1]), r"got \(0, 1\) twice: sum the duplicates"),
        (_csr(indptr=None), r"it lacks indptr\.npy"),
        (_csr(shape=[-2, 3]), "got|negative"),
        (_csr(shape=[2, 3, 4]), r"two dimensions; got shape \(2, 3, 4\)"),
        (_csr(shape=[2, 1 << 62]), r"below 2\*\*62"),
        (_csr(format=b"lil"), "saves csr, csc, coo, bsr and dia; got 'lil'"),
        (_csr(format=[b"csr"]), "got 'None'"),
        (_csr(format=b"coo", row=[0, 5], col=[0, 1]), "axis 0 are from 0 to 1; got 5"),
        (_csr(format=b"coo", row=[0], col=[0]), "each entry has an index"),
        (_csr(format=b"bsr", data=np.ones((2, 2, 2))), r"blocks divide the matrix \(2, 3\)"),
        (_csr(format=b"dia", data=np.ones((2, 3)), offsets=[0]), "each diagonal has an offset"),
        (_csr(data=np.array(["a", "b"])), "a checkpoint holds arrays of"),
    ],
)
def test_damaged_scipy_files(parts: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **parts)
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path / "a.npz")


@pytest.mark.parametrize("form", ["bsr", "dia"])
def test_what_claims_much_and_holds_nothing(form: str, tmp_path: Path) -> None:
    large = 1 << 20
    data = np.empty((0, large, large) if form == "bsr" else (0, 1 << 45))
    parts = _csr(format=form.encode(), shape=[large, large], data=data, indices=np.zeros(0, int), indptr=[0, 0])
    np.savez(tmp_path / "a.npz", **parts, offsets=np.zeros(0, int))
    array = read(tmp_path / "a.npz")["a"]
    assert isinstance(array, MaskedArray)
    assert (array.shape, array.nnz) == ((large, large), 0)


@pytest.mark.parametrize(
    "header", ["{'a': 1, 1: 2}", "(", "\n   x\n  y", "{'descr': ('<f4',), 'fortran_order': False, 'shape': (1,)}"]
)
def test_headers_on_which_numpy_stumbles(header: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("w.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode())
    with pytest.raises(CheckpointError, match=r"w\.npy"):
        read(tmp_path / "a.npz")


def test_an_entry_without_a_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", w=np.ones(2))
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes().replace(b"w.npy", b"\0.npy"))
    with pytest.raises(CheckpointError, match=r"\.npy files; got ''"):
        read(tmp_path / "a.npz")


def test_npz_of_arrays(tmp_path: Path, rng: np.random.Generator) -> None:
    weight = np.asfortranarray(rng.normal(size=(3, 4)))
    np.savez(
        tmp_path / "a.npz",
        **{
            "a/b.weight": weight,
            "big": weight.astype(">f4"),
            "n": np.int32(3),
            "t": np.array("v1"),
            "e": np.ones((0, 2)),
        },
    )
    arrays = read(tmp_path / "a.npz")
    assert arrays.container == "npz"
    np.testing.assert_array_equal(arrays["a/b.weight"].numpy(), weight)
    np.testing.assert_array_equal(arrays["big"].numpy(), weight.astype(np.float32))
    assert arrays["n"].numpy() == 3
    assert arrays.left_out == {"t": "text, <U2"}
    assert arrays["e"].shape == (0, 2)


def _npy(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array)
    return buffer.getvalue()


def test_npz_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.savez(path, a=np.array([{}], object))
    with pytest.raises(CheckpointError, match=r"a\.npy: it holds Python objects"):
        read(path)
    good = _npy(np.ones(4))
    claims = (
        good.replace(b"(4,), }", b"(9**9), }"),
        good.replace(b"(4,)", b"(5,)"),
        good[:-3],
        good + b"\0",
        b"\x93NUMPY\x09\0",
    )
    for data in claims:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.npy", data)
        with pytest.raises(CheckpointError, match=r"a\.npz: a\.npy: "):
            read(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", good)
        archive.writestr("readme.txt", "a")
    with pytest.raises(CheckpointError, match=r"entries of a \.npz are \.npy files; got 'readme\.txt'"):
        read(path)
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("a.npy", good)
        archive.writestr("a.npy", good)
    with pytest.raises(CheckpointError, match="two of its entries have one name"):
        read(path)
    np.save(tmp_path / "a.npy", np.ones(2))
    with pytest.raises(CheckpointError, match=r"a \.npy file has one array and no name"):
        read(tmp_path / "a.npy")
    (tmp_path / "a.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(CheckpointError, match=r"no file of a known kind; it begins with b'\\x89HDF"):
        read(tmp_path / "a.h5")


def test_what_is_packed_too_well(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, a=np.zeros(1 << 20))
    with pytest.raises(
        CheckpointError, match=r"claim 8388736 bytes unpacked, and at most 1000 are read: .*max_bytes=8388736"
    ):
        read(path, max_bytes=1000)
    assert read(path)["a"].shape == (1 << 20,)
    torch.save({"a": torch.zeros(1000)}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as stored,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    with pytest.raises(CheckpointError, match="entries of a file of PyTorch are not compressed"):
        read(tmp_path / "b.pt")
    data = bytearray((tmp_path / "a.pt").read_bytes())
    data[data.index(b"\0" * 2000) + 900] = 1  # in the tensor
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match="data/0 is not as it was written: its CRC-32"):
        read(tmp_path / "a.pt")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["pt", "npz", "scipy", "bitmask"])
def test_damaged_files_are_errors_or_arrays(kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    weight = (rng.normal(size=(6, 9)) * (rng.random((6, 9)) < 0.4)).astype(np.float32)
    path = tmp_path / "file"
    if kind == "pt":
        torch.save({"a.weight_orig": torch.ones(6, 9), "a.weight_mask": torch.from_numpy(weight != 0)}, path)
    elif kind == "npz":
        with path.open("wb") as file:
            np.savez_compressed(file, **{"a.weight": weight, "a.mask": weight != 0})
    elif kind == "scipy":
        with path.open("wb") as file:
            scipy.sparse.save_npz(file, scipy.sparse.csr_array(weight))
    else:
        live = weight != 0
        counts = live.sum(axis=1)
        parts = {"shape": np.array([6, 9]), "compressed": weight[live], "row_offsets": np.cumsum(counts) - counts}
        parts["bitmask"] = np.packbits(live, axis=1, bitorder="little")
        save_file({f"a.{name}": array for name, array in parts.items()}, path)
    good = path.read_bytes()
    assert any(isinstance(array, MaskedArray) for array in read(path).values())
    refused = 0
    for _ in range(60):
        data = bytearray(good)
        for at in rng.integers(len(data), size=rng.integers(1, 4)):
            data[at] ^= int(rng.integers(1, 256))
        if rng.random() < 0.3:
            data = data[: rng.integers(len(data))]
        path.write_bytes(data)
        try:
            for array in read(path).values():
                assert isinstance(array, PlainArray | MaskedArray)
                assert array.numpy().shape == array.shape
        except CheckpointError:
            refused += 1
    assert refused > 20
