"""Hostile checkpoints: each lie that a file can tell is a ``CheckpointError``, before memory is taken for it."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from checkpoint_fuzz import fuzz, put_together, taken_apart
from maskedlinear import masks
from maskedlinear.checkpoint import CheckpointError, CheckpointFile, MaskedArray, PlainArray, load
from maskedlinear.checkpoint._file import save_arrays
from maskedlinear.models import WeightAxes


@pytest.fixture
def path(tmp_path):
    return tmp_path / "hostile.safetensors"


def made(path, array=None, **more):
    """Save an array with a mask and a plain one; return header, what is said of arrays, and tensors."""
    if array is None:
        mask = masks.random((20, 50), sparsity=0.9)
        array = MaskedArray.of(
            np.random.default_rng(0).standard_normal(mask.shape, np.float32), mask, axes=WeightAxes()
        )
    save_arrays({"w": array, "b": PlainArray.of(np.ones(3, "f4"))}, path, **more)
    return taken_apart(path.read_bytes())


def refused(path, message):
    """Check that a file is refused for this reason, and takes less than a MiB or two to be."""
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message) as caught, CheckpointFile(path) as file:
            file.verify()
        assert tracemalloc.get_traced_memory()[1] < 3 << 20
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_three_thousand_changes_end_in_the_right_arrays_or_in_an_error(tmp_path):
    ends: Counter[str] = fuzz(2700, 1, tmp_path, watch=False) + fuzz(300, 2, tmp_path)
    kinds = "flip", "cut", "extend", "splice", "swap", "tensor", "told", "header", "text"
    assert all(ends[f"{kind}: error"] > 100 for kind in kinds)
    assert all(ends[f"{kind}: read"] > 5 for kind in ("swap", "tensor", "told", "header"))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (b"", "no safetensors file"),
        (b"PK\x03\x04 and so on, a zip", "no safetensors file"),
        (struct.pack("<Q", 1 << 63) + b"{}", "claim a header of 9223372036854775808 bytes"),
        (struct.pack("<Q", 8) + b"{}", "no safetensors file"),
        (struct.pack("<Q", 4) + b"null", "no JSON object"),
        (struct.pack("<Q", 4) + b"\xff\xfe{}", "no JSON that is read here"),
        (struct.pack("<Q", 20000) + b"[" * 20000, "nested too deeply"),
        (struct.pack("<Q", 60000) + b'{"a":' * 12000, "nested too deeply"),
        (struct.pack("<Q", 9) + b'{"a":NaN}', "numbers are whole"),
        (struct.pack("<Q", 11) + b'{"a":1e999}', "numbers are whole"),
        (struct.pack("<Q", 5006) + b'{"a":' + b"9" * 5000 + b"}", "at most 19 digits"),
        (struct.pack("<Q", 16) + b'{"a":{},"a":{} }', "'a' is there twice"),
        (struct.pack("<Q", 16) + b'{"\\ud800":{}    }', "no JSON that is read here"),
        (struct.pack("<Q", 24) + b'{"__metadata__":{"a":1}}', "metadata are no strings"),
        (struct.pack("<Q", 24) + b'{"__metadata__":[      ]}', "no JSON that is read|metadata are no strings"),
    ],
)
def test_what_is_no_file_of_safetensors(path, file, message):
    path.write_bytes(file)
    refused(path, message)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "more": 1}, "or more than them"),
        ({"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}, "has the dtype 'F31'"),
        ({"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}, "has the dtype"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, "list of counts"),
        ({"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}, "list of counts"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "does not take the bytes"),
        ({"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}, "does not take the bytes"),
        ({"dtype": "F32", "shape": [1 << 61, 8, 0], "data_offsets": [0, 0]}, "too large"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, "starts at 4, where 0 was due"),
        ({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "its tensors end at"),
        ({"dtype": "BOOL", "shape": [4], "data_offsets": [0, 4]}, "bytes of 0 and 1"),
    ],
)
def test_tensors_that_lie_about_themselves(path, entry, message):
    text = json.dumps({"w": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\x02\x01\0\0")
    refused(path, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a["w"].update(shape=[25, 40]), "its SHA-256 is another"),
        (lambda a: a["w"].update(shape=[1 << 40, 1 << 40]), "at most 1099511627776 entries"),
        (lambda a: a["w"].update(shape=[20, -50]), "a list of counts"),
        (lambda a: a["w"].update(shape="20"), "a list of counts"),
        (lambda a: a["w"].update(shape=[1] * 33), "a list of counts"),
        (lambda a: a["w"].update(nnz=99), "its values are F32"),
        (lambda a: a["w"].update(nnz=1001), "0 to 1000 of its entries"),
        (lambda a: a["w"].update(nnz=True), "0 to 1000 of its entries"),
        (lambda a: a["w"].update(dtype="I32"), "its values are I32"),
        (lambda a: a["w"].update(dtype={}), "its dtype and form"),
        (lambda a: a["w"].update(form="csr"), "its dtype and form"),
        (lambda a: a["w"].update(values="zip"), "raw, true"),
        (lambda a: a["w"].update(values="true"), "raw, true"),
        (lambda a: a["w"].update(dormant="raw"), "no tensor 'w/dormant'"),
        (lambda a: a["w"].update(colour="red"), r"no file of version 1 says \['colour'\]"),
        (lambda a: a["w"].update(role=7), "its role is a string"),
        (lambda a: a["w"].update(mask=None), "none of the encodings"),
        (lambda a: a["w"]["mask"].update(encoding="os.system"), "none of the encodings"),
        (lambda a: a["w"]["mask"].update(encoding=["gaps"]), "none of the encodings"),
        (lambda a: a["w"]["mask"].update(encoding="full", block=1), r"is said to have"),
        (lambda a: a["w"]["mask"].update(sha256="0" * 64), "its SHA-256 is another"),
        (lambda a: a["w"]["mask"].update(sha256="0" * 63), "has no SHA-256"),
        (lambda a: a["w"]["mask"].update(block=0), "in blocks of 1 to as many"),
        (lambda a: a["w"]["mask"].update(block=1), "have an index of 16000 bytes"),
        (lambda a: a["w"]["mask"].update(block=1001), "in blocks of 1 to as many"),
        (lambda a: a["w"]["mask"].update(repeat=[0, 1]), "repeats by two counts"),
        (lambda a: a["w"]["mask"].update(repeat=[1 << 62, 1]), "does not consist of rectangles"),
        (lambda a: a["w"]["mask"].update(repeat=[2, 1], block=75), "blocks hold whole rows"),
        (lambda a: a["w"].update(axes={"out": [0], "in": [0], "batch": []}), "each axis of a weight is one of"),
        (lambda a: a["w"].update(axes={"out": [0], "in": [1]}), "those of out, in and batch"),
        (lambda a: a["w"].update(axes={"out": [-2], "in": [1], "batch": []}), "counted from 0 to 1"),
        (lambda a: a["w"].update(axes={"out": [0], "in": [1] * 10**5, "batch": []}), "counted from 0 to 1"),
        (lambda a: a.update(v=a["w"]), "no tensor 'v/mask'"),
        (lambda a: a.update({"w/values": {}}), "two arrays are in the tensor 'w/values'"),
        (lambda a: a.update(v={"same_as": "v"}), "no array of its own"),
        (lambda a: a.update(v={"same_as": "u"}, u={"same_as": "v"}), "no array of its own"),
        (lambda a: a.update(v={"same_as": "x\x1b[2J"}), "no array of its own"),
        (lambda a: a.update(v={"same_as": ["w"]}), "is wrong: it is the same as"),
        (lambda a: a.update(v={"same_as": "w", "role": ""}), "is wrong: it is the same as"),
        (lambda a: a.update(b={"same_as": "w"}), "is wrong: it is the same as"),
        (lambda a: a.update(b={"shape": [3]}), r"only|no file of version 1"),
        (lambda a: a.update(b=[]), "an object was due"),
        (lambda a: a.pop("b"), "does not say what 'b' is"),
        (
            lambda a: a["w"].update(nnz=0, shape=[20, 50], values={"codec": "pcodec", "header": "zz", "block": 9}),
            "hexadecimal",
        ),
    ],
)
def test_headers_that_lie_about_arrays(path, change, message):
    header, told, parts = made(path)
    change(told["arrays"])
    path.write_bytes(put_together(header, told, parts))
    refused(path, message)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"version": 2, "framework": "", "arrays": {}}, "has version 2 of the format; this reads up to 1: update"),
        ({"version": True, "framework": "", "arrays": {}}, "does not say the version"),
        ({"version": 1, "framework": "", "arrays": {}, "import": "os"}, "says version, framework and arrays"),
        ({"version": 1, "framework": [], "arrays": {}}, "says version, framework and arrays"),
        ({"version": 1, "framework": "", "arrays": []}, "does not say what its arrays are"),
        ([], "does not say the version"),
    ],
)
def test_headers_that_lie_about_the_file(path, told, message):
    header, _, parts = made(path)
    path.write_bytes(put_together(header, told, parts))
    refused(path, message)


def list_of(k, unary, *planes):
    """Return the code of numbers: parameter, length of the unary stream, the stream, planes."""
    return bytes([k]) + struct.pack("<I", len(unary)) + bytes(unary) + b"".join(map(bytes, planes))


def index(*records):
    return b"".join(struct.pack("<QQ", *record) for record in records)


@pytest.mark.parametrize(
    ("encoding", "tensor", "message"),
    [
        ("gaps", index((8, 40), (8, 45)), "rise to the number of live entries, and to the end"),
        ("gaps", index((9, 32), (8, 32)), "rise to the number of live"),
        ("gaps", index((4, 31), (8, 32)), "rise to the number of live"),
        ("gaps", index((1 << 63, 32), (8, 32)), "rise to the number of live"),
        ("gaps", index((8, 32), (8, 32)), "1 bytes were due where 0 are left"),
        ("gaps", index((8, 38), (8, 38)) + list_of(0, [255]), "1 bytes were due where 0"),
        ("gaps", index((8, 38), (8, 43)) + list_of(0, [127]) + list_of(0, []), "a unary stream has 8 ones"),
        ("gaps", index((8, 39), (8, 44)) + list_of(0, [255, 0]) + list_of(0, []), "one of them in its last byte"),
        ("gaps", index((8, 38), (8, 44)) + list_of(0, [255]) + list_of(0, [0]), "are no unary stream of 0 numbers"),
        ("gaps", index((8, 42), (8, 47)) + list_of(0, [0, 0, 0, 0, 255]) + list_of(0, []), "are no unary stream of 8"),
        ("gaps", index((8, 38), (8, 43)) + list_of(5, [255]) + list_of(0, []), "have no parameter 5"),
        ("gaps", index((8, 38), (8, 43)) + list_of(255, [255]) + list_of(0, []), "have no parameter 255"),
        ("gaps", index((8, 38), (8, 43)) + list_of(1, [255]) + list_of(0, []), "1 bytes were due where 0"),
        ("gaps", index((1, 38), (8, 44)) + list_of(7, [1]) + list_of(0, [127]), "have no parameter 7"),
        ("bits", index((8, 39), (8, 46)) + bytes([255] + [0] * 5 + [4]) + bytes(7), "only fill a byte are 0"),
        ("bits", index((7, 39), (8, 46)) + bytes([255] + [0] * 6) + bytes(7), "a block has 7 live entries; got 8"),
        ("bits", index((8, 38), (8, 45)) + bytes([255] + [0] * 5) + bytes(7), "7 bytes were due"),
        ("bits", index((8, 40), (8, 47)) + bytes([255] + [0] * 7) + bytes(7), "too long, by 1"),
        ("runs", index((8, 36), (8, 36)) + struct.pack("<I", 9), "8 live entries are no 9 runs"),
        ("runs", index((8, 48), (8, 48)) + struct.pack("<I", 1) + list_of(0, [1]) + list_of(0, [64]), "have 8 entries"),
        ("rows", index((8, 36), (8, 36)) + struct.pack("<I", 99), "are no 99 in each of 5 rows"),
        ("rows", index((8, 42), (8, 42)) + struct.pack("<I", 0) + list_of(0, [31]), "have 8 live entries together"),
        ("groups", index((8, 34), (8, 34)) + b"\x05\x00", "not as many in each group of 5"),
        ("groups", index((5, 36), (8, 38)) + b"\x02\x01\0\0" + b"\x02\x00", "not as many in each group of 2"),
        ("deflate", index((8, 33), (8, 33)) + b"\x03", "1, 2, 4 or 8 bytes"),
        ("deflate", index((8, 37), (8, 37)) + b"\x01abcd", "zlib cannot read it"),
    ],
)
def test_streams_that_are_no_mask(path, encoding, tensor, message):
    mask = np.zeros((10, 10), np.bool_)
    mask[0, :8] = True  # in the first of two blocks
    header, told, parts = made(path, MaskedArray.of(np.ones((10, 10), "f4"), mask))
    told["arrays"]["w"]["mask"] |= {"encoding": encoding, "block": 50}
    told["arrays"]["w"]["mask"].pop("repeat", None)
    parts["w/mask"] = tensor
    header["w/mask"]["shape"] = [len(tensor)]
    path.write_bytes(put_together(header, told, parts))
    refused(path, message)


def test_a_stream_through_zlib_makes_no_more_than_was_claimed(path):
    import zlib

    header, told, parts = made(path, MaskedArray.of(np.ones((10, 10), "f4"), np.eye(10) == 1))
    bomb = zlib.compress(bytes(1 << 24), 9)
    told["arrays"]["w"]["mask"] |= {"encoding": "deflate", "block": 100}
    parts["w/mask"] = index((10, 17 + len(bomb))) + b"\x01" + bomb
    header["w/mask"]["shape"] = [len(parts["w/mask"])]
    path.write_bytes(put_together(header, told, parts))
    refused(path, "zlib makes other than 10 gaps")


def test_small_files_never_claim_much(path):
    header, told, parts = made(path, MaskedArray.of(np.ones((4, 4), np.bool_), np.ones((4, 4), np.bool_)))
    told["arrays"]["w"] |= {"shape": [1 << 20, 1 << 20], "nnz": 1 << 40}
    path.write_bytes(put_together(header, told, parts))
    refused(path, "it claims 1099511627776 live entries without a bit for each")
    recipe = masks.Recipe("random", sparsity="0.5")
    header, told, parts = made(path, MaskedArray.of(np.ones((4, 4), "f4"), recipe.make((4, 4)), recipe=recipe))
    told["arrays"]["w"]["shape"] = [1 << 20, 1 << 20]
    path.write_bytes(put_together(header, told, parts))
    refused(path, "a recipe for 8 live entries makes 67108864 at most")
    told["arrays"]["w"]["shape"] = [4, 5]
    path.write_bytes(put_together(header, told, parts))
    refused(path, "8 live entries were due; its recipe makes 10")
    told["arrays"]["w"]["mask"]["recipe"]["name"] = "os.system"
    path.write_bytes(put_together(header, told, parts))
    refused(path, "'os.system'")
    told["arrays"]["w"]["mask"]["recipe"] |= {"name": "random", "sparsity": "1e999"}  # larger than any float
    path.write_bytes(put_together(header, told, parts))
    refused(path, "must be in")
    values = np.random.default_rng(0).standard_normal((40, 40)).astype("f4")
    header, told, parts = made(path, MaskedArray.of(values, values > -2), values="pcodec")
    assert told["arrays"]["w"]["values"]["codec"] == "pcodec"
    told["arrays"]["w"] |= {"shape": [1 << 20, 1 << 20], "nnz": 1 << 40}
    path.write_bytes(put_together(header, told, parts))
    refused(path, "pcodec makes a bit or more of each value")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values, part: values.update(header="ff00"), "pcodec cannot read"),
        (lambda values, part: values.update(block=1), "have an index of"),
        (lambda values, part: values.update(block=1 << 30), "through pcodec"),
        (lambda values, part: part.__setitem__(slice(0, 8), b"\xff" * 8), "does not rise to the end"),
        (lambda values, part: part.__setitem__(slice(8, 12), b"\xff" * 4), "pcodec"),
    ],
)
def test_values_through_pcodec_that_are_none(path, change, message):
    values = np.random.default_rng(0).standard_normal((60, 60)).astype("f4")
    header, told, parts = made(path, MaskedArray.of(values, values > -2), values="pcodec")
    part = bytearray(parts["w/values"])
    change(told["arrays"]["w"]["values"], part)
    parts["w/values"] = bytes(part)
    path.write_bytes(put_together(header, told, parts))
    refused(path, message)


def test_a_file_without_its_digest_is_none_of_ours(path):
    header, told, parts = made(path)
    file = put_together(header, told, parts)
    path.write_bytes(file.replace(b"maskedlinear.sha256", b"maskedlinear.sha255"))
    refused(path, "has lost what it says of its arrays, or its header's SHA-256")


def test_what_is_left_of_our_keys_is_no_plain_file(path):
    """Bytes moved within a header once made one key of two, so that coded masks were read as plain arrays."""
    save_arrays({"a": MaskedArray.of(np.ones((3, 4), np.float32), np.eye(3, 4, dtype=bool))}, path)
    file = bytearray(path.read_bytes())
    for key in (b'"maskedlinear.sha256"', b'"maskedlinear.crc32"', b'"maskedlinear"'):
        place = file.index(key)
        file[place : place + len(key)] = key[:-2] + b'_"'
    path.write_bytes(file)
    with pytest.raises(CheckpointError, match="has lost what it says of its arrays"):
        CheckpointFile(path)


def test_names_of_any_characters_come_back(path):
    names = [
        "",
        " ",
        "ä.ö",
        "\x00\x1b[2J",
        "a\nb",
        '"\\',
        "\u202egnp.exe",
        "../../etc/passwd",
        "__class__",
        "a" * 10_000,
    ]
    made = {name: PlainArray.of(np.full(2, number)) for number, name in enumerate(names)}
    made |= {f"m{name}": MaskedArray.of(np.ones((2, 2)), np.eye(2) == 1) for name in names}
    save_arrays(made, path)
    assert list(load(path)) == list(made)
    with pytest.raises(ValueError, match="surrogates"):
        save_arrays({"\ud800": PlainArray.of(np.ones(2))}, path)
