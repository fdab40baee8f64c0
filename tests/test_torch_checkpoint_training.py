"""Files of PyTorch models that train: optimizers go on bit for bit; what does not fit, or is damaged, changes nothing."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from maskedlinear import checkpoint
from maskedlinear.checkpoint import CheckpointError, MaskedArray, PlainArray, dense_state, write_dense
from maskedlinear.checkpoint._file import save_arrays
from maskedlinear.checkpoint._structure import decode, encode
from maskedlinear.cli import main
from maskedlinear.masks import Recipe
from maskedlinear.torch import (
    MaskedLinear,
    SparseLinear,
    compress,
    freeze_masked,
    mask_model,
    prune_model,
    unmask_model,
)
from maskedlinear_torch._checkpoint import arrays_of

X, Y = (torch.randn(8, n, generator=torch.Generator().manual_seed(n)) for n in (16, 4))

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, torch.tensor(0.01)),
    "AdamW fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, 0.01, foreach=True, amsgrad=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.05, initial_accumulator_value=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.001, momentum=0.9, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "Adafactor": lambda p: torch.optim.Adafactor(p),
    "LBFGS": lambda p: torch.optim.LBFGS(p, max_iter=3),
}


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(16, 32), nn.Unflatten(1, (4, 8)), nn.Conv1d(4, 4, 3), nn.Flatten(), nn.Linear(24, 4)
    )
    prune_model(mask_model(model), 0.8, scope="layer", seed=seed, score="random")
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    def loss() -> Tensor:
        optimizer.zero_grad()
        value: Tensor = ((model(X) - Y) ** 2).mean()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    for _ in range(steps):
        optimizer.step(loss)  # type: ignore[arg-type]


def bits(value: Any) -> Any:
    """Return what a structure of tensors is, in bits."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.detach().contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    return [bits(item) for item in value] if isinstance(value, list | tuple) else repr(value)


@pytest.mark.parametrize(
    ("name", "guarded"), [*((name, False) for name in OPTIMIZERS), ("Adam", True), ("AdamW fused", True), ("SGD", True)]
)
def test_training_goes_on_bit_for_bit(name: str, guarded: bool, tmp_path: Path) -> None:
    model, other = network(), network(seed=1)
    optimizer, fresh = (OPTIMIZERS[name](one.parameters()) for one in (model, other))
    if guarded:
        freeze_masked(optimizer, model), freeze_masked(fresh, other)
    train(model, optimizer, 2)
    checkpoint.save(model, tmp_path / "run", dormant=True, optimizer=optimizer)
    assert checkpoint.load_into(other, tmp_path / "run", optimizer=fresh) is other
    assert bits(fresh.state_dict()) == bits(optimizer.state_dict())
    for one, its in ((model, optimizer), (other, fresh)):
        train(one, its, 2)
    assert bits(other.state_dict()) == bits(model.state_dict())
    assert bits(fresh.state_dict()) == bits(optimizer.state_dict())


def test_what_an_optimizer_keeps_of_masked_weights_is_stored_where_they_are_live(tmp_path: Path) -> None:
    model = network()
    optimizer = freeze_masked(torch.optim.Adam(model.parameters(), 0.01), model)
    train(model, optimizer, 2)
    checkpoint.save(model, tmp_path / "run", optimizer=optimizer)
    arrays = checkpoint.load(tmp_path / "run")
    assert arrays["optimizer/state/0/exp_avg"].shape == (103,)
    assert isinstance(arrays["0.weight"], MaskedArray)
    assert arrays["0.weight"].nnz == 103
    unguarded = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    train(model, unguarded, 1)
    unguarded.state[model[0].weight]["momentum_buffer"].add_(torch.randn(32, 16))  # type: ignore[union-attr]
    checkpoint.save(model, tmp_path / "run", optimizer=unguarded)
    assert checkpoint.load(tmp_path / "run")["optimizer/state/0/momentum_buffer"].shape == (32, 16)
    checkpoint.load_into(network(), tmp_path / "run")  # which asks for no optimizer


@pytest.mark.parametrize("forms", [("dense", "sparse"), ("sparse", "dense"), ("sparse", "sparse")])
def test_an_optimizers_state_follows_the_form(forms: tuple[str, str], tmp_path: Path) -> None:
    saved, loaded = (compress(network(seed), form) for seed, form in zip((0, 1), forms, strict=True))  # type: ignore[arg-type]
    optimizer, fresh = (torch.optim.Adam(model.parameters(), 0.01) for model in (saved, loaded))
    train(saved, optimizer, 3)
    checkpoint.save(saved, tmp_path / "run", optimizer=optimizer)
    checkpoint.load_into(loaded, tmp_path / "run", optimizer=fresh)
    for model, its in ((saved, optimizer), (loaded, fresh)):
        train(model, its, 3)
    torch.testing.assert_close(loaded(X), saved(X))


def misfits(model: nn.Sequential) -> dict[str, tuple[Any, str]]:
    """Return arrays that do not fit a network, and what is said of them."""
    arrays = dict(arrays_of(model))
    whole = PlainArray.of(np.zeros((32, 16), np.int64))
    return {
        "missing": ({name: array for name, array in arrays.items() if name != "4.bias"}, "not in the file: 4.bias"),
        "unexpected": ({**arrays, "more.weight": whole}, "not in the model: more.weight"),
        "shape": (
            {**arrays, "0.weight": PlainArray.of(np.zeros((16, 32)))},
            r"0.weight: \(16, 32\) in the file, \(32, 16\)",
        ),
        "dtype": ({**arrays, "0.weight": whole}, "0.weight: int64 in the file, float32 in the model"),
        "all": (
            {"3.weight": whole},
            "(?s)not in the file: 0.weight.*not in the file: 4.bias.*not in the model: 3.weight",
        ),
    }


@pytest.mark.parametrize("kind", ["missing", "unexpected", "shape", "dtype", "all", "flipped", "cut", "tampered"])
def test_what_does_not_fit_or_is_damaged_changes_nothing(kind: str, tmp_path: Path) -> None:
    path, source, match = tmp_path / "model.safetensors", network(seed=1), "CRC-32|SHA-256|cut off|wrong|not"
    checkpoint.save(source, path, dormant=True)
    if kind == "flipped":
        data = bytearray(path.read_bytes())
        data[-3] ^= 4
        path.write_bytes(data)
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    elif kind == "tampered":
        path.write_bytes(path.read_bytes().replace(b'"0.weight/values"', b'"9.weight/values"'))
    else:
        arrays, match = misfits(source)[kind]
        save_arrays(arrays, path, framework="torch")
    plain = nn.Sequential(
        nn.Linear(16, 32), nn.Unflatten(1, (4, 8)), nn.Conv1d(4, 4, 3), nn.Flatten(), nn.Linear(24, 4)
    )
    for model in (network(), plain, compress(network(), "sparse")):
        before, types = bits(model.state_dict()), [type(module) for module in model.modules()]
        with pytest.raises(CheckpointError, match=match):
            checkpoint.load_into(model, path)
        assert bits(model.state_dict()) == before
        assert [type(module) for module in model.modules()] == types


def test_an_optimizer_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    model, path = network(), tmp_path / "run"
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    train(model, optimizer, 1)
    checkpoint.save(model, tmp_path / "plain")
    checkpoint.save(model, path, optimizer=optimizer)
    other = network(seed=1)
    parameters = list(other.parameters())
    before = bits(other.state_dict())
    for wrong, match in (
        (torch.optim.SGD(parameters, 0.1), "'Adam'; got SGD"),
        (torch.optim.Adam(parameters[::-1]), r"(?s)those that differ:\s+0: \['0.weight', \[32, 16\]\] in the file"),
        (torch.optim.Adam(parameters[1:]), "has 5 parameters, and 6 in the file"),
        (torch.optim.Adam([{"params": [one]} for one in parameters]), "has groups of"),
    ):
        with pytest.raises(CheckpointError, match=match):
            checkpoint.load_into(other, path, optimizer=wrong)
        assert not wrong.state
    with pytest.raises(CheckpointError, match="no state of an optimizer"):
        checkpoint.load_into(other, tmp_path / "plain", optimizer=torch.optim.Adam(parameters))
    assert bits(other.state_dict()) == before
    checkpoint.save(compress(network(), "sparse"), path, optimizer=torch.optim.Adam(model.parameters()))
    dense = nn.Sequential(nn.Linear(16, 32), *list(network())[1:])
    with pytest.raises(CheckpointError, match=r"loading gives 0.weight new parameters"):
        checkpoint.load_into(dense, path, optimizer=torch.optim.Adam(dense.parameters()))
    assert type(dense[0]) is nn.Linear


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"class"', '"kind"'),
        ('"tensor":"optimizer/state/0/exp_avg"', '"tensor":"0.weight"'),
        ('"tensor":"optimizer/state/0/exp_avg"', '"tensor":"optimizer/state/2/exp_avg"'),
        ('"at":"0.weight"', '"at":"2.weight"'),
        ('"at":"0.weight"', '"like":"0.weight"'),
        ('"fill":"00000000"', '"fill":"0000"'),
        ('"scalar":"F32","bits":"', '"scalar":"F32","bits":"00000000'),
        ('"scalar":"F32"', '"scalar":"pickle"'),
        ('["params",[0', '["params",["0"'),
        ('"dict":[["state"', '"eval":[["state"'),
        ('{"class"', "[" * 5000 + '{"class"'),
    ],
)
def test_what_a_file_says_of_an_optimizer_is_checked(old: str, new: str, tmp_path: Path) -> None:
    model, other, path = network(), network(seed=1), tmp_path / "run"
    optimizer, fresh = (torch.optim.Adam(one.parameters(), 0.01) for one in (model, other))
    train(model, optimizer, 1)
    arrays, before = dict(arrays_of(model, optimizer=optimizer)), bits(other.state_dict())
    structure: Any = arrays["optimizer/structure"]
    text = structure.data().tobytes().decode()
    assert old in text
    changed = np.frombuffer(text.replace(old, new).encode(), np.uint8)
    save_arrays({**arrays, "optimizer/structure": PlainArray.of(changed)}, path, framework="torch")
    with pytest.raises(CheckpointError, match="what the file says of the optimizer is wrong"):
        checkpoint.load_into(other, path, optimizer=fresh)
    assert bits(other.state_dict()) == before
    assert not fresh.state


def test_an_optimizers_structure_is_of_a_closed_list() -> None:
    def none(*_: Any) -> None:
        return None

    def refused(*_: Any) -> Any:
        raise ValueError("no tensor")

    for value in (None, True, 1, 10**30, 0.1, -0.0, float("inf"), "a", [1, (2.5, None)], {"a": {3: [], "3": ()}}):
        again = decode(encode(value, none), refused)
        assert repr(again) == repr(value)
    assert repr(decode(encode(float("nan"), none), refused)) == "nan"
    for wrong in (print, {1.5: 2}, {"lambda": lambda: 0}, object(), b"", 1j, {(1,): 2}):
        with pytest.raises(TypeError, match="save it by itself"):
            encode([wrong], none)
    for told in ({}, {"float": "1" * 60}, {"dict": [[1, 2], [1, 3]]}, {"dict": [[1.5, 2]]}, {"tuple": 3}, {"x": 1}):
        with pytest.raises(ValueError, match=r"."):
            decode(told, refused)


def test_wrappers_leave_no_trace_in_names(tmp_path: Path) -> None:
    model, path = network(), tmp_path / "model.safetensors"
    names = list(arrays_of(model))
    inside = copy.deepcopy(model)
    inside[2] = torch.compile(inside[2])  # type: ignore[assignment]
    for wrapped in (nn.DataParallel(model), torch.compile(nn.DataParallel(model)), inside):
        assert list(arrays_of(wrapped)) == names  # type: ignore[arg-type]
        checkpoint.save(wrapped, path)
        fresh = network(seed=1)
        checkpoint.load_into(fresh, path)
        assert torch.equal(fresh[0].weight, model[0].weight)  # type: ignore[arg-type]
    checkpoint.save(model, path)
    around = nn.DataParallel(network(seed=1))
    checkpoint.load_into(around, path)
    assert torch.equal(around.module[0].weight, model[0].weight)  # type: ignore[union-attr]


class Extra(nn.Linear):
    state: Any = None
    refuses = False

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        if self.refuses and state[0]:
            raise ValueError("no such state")
        self.state = state


def test_extra_state_is_saved_if_it_is_a_tensor(tmp_path: Path) -> None:
    model, fresh, path = Extra(2, 2), Extra(2, 2), tmp_path / "model.safetensors"
    model.state = {"steps": 3}
    with pytest.raises(TypeError, match=r"_extra_state is no tensor but dict: let get_extra_state return a tensor"):
        checkpoint.save(model, path)
    model.state, fresh.state = torch.tensor([3, 4]), torch.tensor([0, 0])
    checkpoint.save(model, path)
    checkpoint.load_into(fresh, path)
    assert fresh.state.tolist() == [3, 4]


class Refusing(torch.optim.SGD):
    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self.state[self.param_groups[0]["params"][0]]["more"] = 1
        raise ValueError("no such optimizer")


@pytest.mark.parametrize("refuses", ["optimizer", "extra state"])
def test_what_may_refuse_does_so_before_anything_has_changed(refuses: str, tmp_path: Path) -> None:
    path, kind = tmp_path / "a.safetensors", Refusing if refuses == "optimizer" else torch.optim.SGD

    def made(seed: int) -> tuple[nn.Module, Any]:
        torch.manual_seed(seed)
        model = nn.Sequential(network(seed), Extra(4, 4), Extra(4, 4))
        model[1].state, model[2].state = torch.full((2, 2), seed)
        return model, freeze_masked(kind(model.parameters(), lr=0.1 + seed, momentum=0.9), model)

    for seed in (1, 0):  # the last is what is loaded into
        model, optimizer = made(seed)
        for _ in range(seed + 1):
            model(X).sum().backward()
            optimizer.step()
        if seed:
            checkpoint.save(model, path, optimizer=optimizer)
    model[2].refuses = refuses == "extra state"  # type: ignore[index]
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    ids = [id(group) for group in optimizer.param_groups]
    with pytest.raises(ValueError, match="no such"):
        checkpoint.load_into(model, path, optimizer=optimizer)
    torch.testing.assert_close((model.state_dict(), optimizer.state_dict()), before, rtol=0, atol=0)
    assert [id(group) for group in optimizer.param_groups] == ids
    optimizer.step()


def test_a_tensor_that_nothing_is_written_into_is_named(tmp_path: Path) -> None:
    path, model = tmp_path / "a.safetensors", nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    checkpoint.save(model, path)
    before = model[0].weight.detach().clone()
    model[1].bias = nn.Parameter(torch.zeros(1).expand(2))
    with torch.inference_mode():
        model[1].weight = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(
        CheckpointError, match=r"1\.weight: of inference mode, or expanded.*\n  1\.bias: of inference mode"
    ):
        checkpoint.load_into(model, path)
    assert torch.equal(model[0].weight, before)


def test_what_no_file_holds_is_named(tmp_path: Path) -> None:
    checkpoint.save(nn.Linear(2, 2), tmp_path / "file")
    with pytest.raises(CheckpointError, match="weight: without values in the model yet"):
        checkpoint.load_into(nn.LazyLinear(2), tmp_path / "file")
    with torch.device("meta"):
        absent = nn.Linear(2, 2)
    sparse, lazy = nn.Linear(2, 2), nn.LazyLinear(2)
    sparse.register_buffer("kept", torch.eye(2).to_sparse())
    complex_ = nn.Linear(2, 2, dtype=torch.complex128)
    for model, match in (
        (nn.Sequential(absent), "2 of the model's arrays: 0.weight is on the meta device"),
        (nn.Sequential(sparse), "0.kept is of the layout torch.sparse_coo"),
        (nn.Sequential(lazy), "0.weight is without values yet"),
        (nn.Sequential(complex_), "0.weight is of torch.complex128"),
    ):
        with pytest.raises(TypeError, match=match):
            arrays_of(model)


def test_sharded_models_are_saved_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        mesh, path = init_device_mesh("cpu", (1,)), tmp_path / "run"
        model, other, single = network(), network(seed=1), network(seed=2)
        for sharded in (model, other):
            fully_shard(sharded, mesh=mesh)
        optimizer, fresh, alone = (torch.optim.Adam(one.parameters(), 0.01) for one in (model, other, single))
        train(model, optimizer, 1)
        checkpoint.save(model, path, dormant=True, optimizer=optimizer)
        for one, its in ((other, fresh), (single, alone)):
            checkpoint.load_into(one, path, optimizer=its)
        for one, its in ((model, optimizer), (other, fresh), (single, alone)):
            train(one, its, 1)
        expected = [value.full_tensor() for value in model.parameters()]  # type: ignore[operator]
        assert all(hasattr(value, "full_tensor") for value in other.parameters())
        assert bits([value.full_tensor() for value in other.parameters()]) == bits(expected)  # type: ignore[operator]
        torch.testing.assert_close(list(single.parameters()), expected)
    finally:
        distributed.destroy_process_group()


def test_a_recipe_is_all_that_a_file_has_of_its_mask(tmp_path: Path) -> None:
    recipe, path, full = Recipe("random", sparsity=0.9, seed=7), tmp_path / "model", tmp_path / "full"
    values = 104_858 * 4
    layer = MaskedLinear(1024, 1024, bias=False, mask=recipe)
    checkpoint.save(layer, path)
    checkpoint.save(MaskedLinear(1024, 1024, bias=False), full)
    overhead = path.stat().st_size - values - (full.stat().st_size - 4 * 1024 * 1024)
    assert overhead <= 200, "beside the live values, and what a file has without a mask"
    for fresh in (nn.Linear(1024, 1024, bias=False), SparseLinear(1024, 1024, False, mask=np.eye(1024))):
        checkpoint.load_into(fresh, path)
        assert fresh.recipe == recipe
        assert torch.equal(fresh.weight, layer.weight)
    layer.mask[3] = False
    checkpoint.save(layer, path)
    assert path.stat().st_size > values + 20_000, "of another mask the recipe is not believed"
    assert (checkpoint.load(path)["weight"].mask() == layer.mask.numpy()).all()  # type: ignore[union-attr]


def test_computed_weights_are_saved_with_their_masks(tmp_path: Path) -> None:
    def normalised() -> MaskedLinear:
        return torch.nn.utils.parametrizations.spectral_norm(MaskedLinear(6, 4))  # type: ignore[no-any-return]

    layer, fresh, path = normalised(), normalised(), tmp_path / "layer"
    layer.set_mask(torch.rand(4, 6) > 0.5)
    checkpoint.save(layer, path)
    assert "mask" in checkpoint.load(path)
    checkpoint.load_into(fresh, path)
    assert torch.equal(fresh.eval()(X[:, :6]), layer.eval()(X[:, :6]))


def test_what_others_load_is_without_the_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 1)
    checkpoint.save(model, "training.safetensors", optimizer=optimizer)
    checkpoint.save(model, "model.safetensors")
    arrays = checkpoint.load("training.safetensors")
    kept = {name for name, array in arrays.items() if array.role == "optimizer"}
    assert kept == {name for name in arrays if name.startswith("optimizer/")}
    assert kept
    assert dense_state(arrays).keys() == checkpoint.load("model.safetensors").keys()
    write_dense(arrays, "a.pt")
    assert main(["convert", "training.safetensors", "b.pt", "--to", "torch"]) == 0
    out, err = capsys.readouterr()
    assert f"b.pt: {len(arrays) - len(kept)} arrays" in out
    assert f"left out, {len(kept)} arrays" in err
    for name in ("a.pt", "b.pt"):
        plain = unmask_model(network(1))
        plain.load_state_dict(torch.load(name), strict=True)
        assert torch.equal(plain(X), model(X))
    told = []
    for name in ("training.safetensors", "model.safetensors"):
        assert main(["inspect", name, "--json"]) == 0
        told.append(json.loads(capsys.readouterr().out))
    assert told[0]["all"] == told[1]["all"]
    assert told[0]["masked"] == told[1]["masked"]
    assert told[0]["optimizer"]["arrays"] == len(kept)
    assert told[1]["optimizer"]["arrays"] == 0
    assert main(["convert", "training.safetensors", "c.safetensors", "--to", "maskedlinear", "--masks", "zeros"]) == 0
    again = torch.optim.AdamW((model := network(1)).parameters())
    checkpoint.load_into(model, "c.safetensors", optimizer=again)
    assert main(["inspect", "training.safetensors"]) == 0
    assert f"optimizer: {len(kept)}" in capsys.readouterr().out
