"""``constrain`` in PyTorch: fixed values, signs, ties and bounds of both forms, under every optimizer."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from helpers import in_processes, needs_fsdp
from maskedlinear.constraints import Constraints, dale
from maskedlinear.torch import (
    MaskedLinear,
    SparseLinear,
    compress,
    constrain,
    expand,
    freeze_masked,
    mask_model,
    prune_model,
    regrow_model,
    set_masks,
)

OUT, IN = 6, 8
MASK = np.random.default_rng(1).random((OUT, IN)) < 0.6
LIVE = np.argwhere(MASK)
FIXED = np.zeros((OUT, IN), bool)
FIXED[tuple(LIVE[::7].T)] = True
TIES = np.full((OUT, IN), -1)
TIES[tuple(LIVE[1::7].T)] = 0
TIES[tuple(LIVE[2::7].T)] = 5
SIGNS = np.zeros((OUT, IN), int)
SIGNS[tuple(LIVE[3::7].T)] = 1
SIGNS[tuple(LIVE[4::7].T)] = -1
UPPER = np.full((OUT, IN), np.inf)
UPPER[tuple(LIVE[5::7].T)] = 0.01
ALL = Constraints(fixed=FIXED, ties=TIES, signs=SIGNS, upper=UPPER)
CONNECTED = torch.from_numpy(MASK)

OPTIMIZERS: dict[str, Any] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
    "Adam, fused": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),  # of more, without a line search, it diverges
}
X = torch.randn(9, IN, generator=torch.Generator().manual_seed(1))
T = torch.randn(9, OUT, generator=torch.Generator().manual_seed(2))


def model(sparse: bool = False, given: Constraints | None = ALL, dtype: Any = None) -> nn.Sequential:
    torch.manual_seed(0)
    layer: Any = MaskedLinear(IN, OUT, mask=MASK, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.abs() * torch.tensor([1, -1] * 4))
    network = nn.Sequential(SparseLinear.from_masked(layer) if sparse else layer)
    return network if given is None else constrain(network, {"0": given})  # type: ignore[return-value]


def train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> None:
    x, t = X.to(next(network.parameters()).dtype), T.to(next(network.parameters()).dtype)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (network(x) - t).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    for _ in range(steps):
        closure()
        optimizer.step(closure) if isinstance(optimizer, torch.optim.LBFGS) else optimizer.step()  # type: ignore[arg-type]


def bits(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().contiguous().view(torch.int32)


def is_kept(weight: torch.Tensor, start: torch.Tensor, live: Any = CONNECTED) -> None:
    assert torch.equal(bits(weight)[FIXED], bits(start)[FIXED]), "fixed"
    for group in (0, 5):
        assert len(set(bits(weight)[(group == TIES) & live.numpy()].tolist())) == 1, "tied"
    assert (weight[SIGNS > 0] >= 0).all()
    assert (weight[SIGNS < 0] <= 0).all()
    assert (weight <= torch.from_numpy(UPPER).float()).all()
    assert not bits(weight)[weight == 0].any(), "what stops is +0"


@pytest.mark.parametrize("guarded", [True, False])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_kept_under_every_optimizer(name: str, sparse: bool, guarded: bool) -> None:
    network = model(sparse)
    start = network[0].weight.clone()
    is_kept(start, start)
    optimizer = OPTIMIZERS[name](network.parameters())
    if guarded:
        assert freeze_masked(optimizer, network) is optimizer
    train(network, optimizer)
    weight = network[0].weight
    is_kept(weight, start)
    free = CONNECTED.numpy() & ~FIXED
    assert (weight != start)[free].float().mean() > 0.5, "the others train"
    assert torch.equal(weight != 0, CONNECTED & (weight != 0))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", ["momentum", "Adam", "AdamW", "RMSprop"])
def test_tied_connections_train_as_one_parameter(name: str, sparse: bool) -> None:
    ties = Constraints(ties=np.where(TIES >= 0, TIES, np.arange(OUT * IN).reshape(OUT, IN) + 10))
    network = model(sparse, ties, torch.float64)
    groups = torch.from_numpy(np.unique(np.where(MASK, ties.ties, -1), return_inverse=True)[1].reshape(OUT, IN))
    weight = network[0].weight.detach()
    shared = torch.zeros(int(groups.max()) + 1, dtype=torch.float64)
    shared[groups[CONNECTED]] = weight[CONNECTED]
    shared.requires_grad_(True)
    bias = network[0].bias.detach().clone().requires_grad_(True)

    class Gathered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.bias = nn.Parameter(shared), nn.Parameter(bias)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ torch.where(CONNECTED, self.shared[groups], 0).T + self.bias

    one = Gathered()
    optimizer = freeze_masked(OPTIMIZERS[name](network.parameters()), network)
    train(network, optimizer, 20)
    train(one, OPTIMIZERS[name](one.parameters()), 20)
    got = network[0].weight.detach()
    want = torch.where(CONNECTED, one.shared[groups], 0).detach()
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)
    before = network[0].weight_values.grad if sparse else network[0].weight.grad
    assert before is not None
    kept = before.clone()
    optimizer.step()
    assert torch.equal(before, kept), "gradients are as autograd made them, after a step too"


def test_accumulated_gradients_and_closures_are_summed_once() -> None:
    ties = Constraints(ties=np.where(MASK, 0, -1))
    closed, plain = model(given=ties), model(given=ties)
    for one in (closed, plain):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.01)

        def closure(one: nn.Module = one) -> torch.Tensor:
            loss = (one(X) - T).square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        closure()
        if one is closed:
            freeze_masked(optimizer, one)
            optimizer.step(closure)  # type: ignore[arg-type]
        else:
            closure()
            optimizer.step()
    assert torch.equal(closed[0].weight, plain[0].weight)


def test_a_compiled_step_keeps_them() -> None:
    network = model()
    start = network[0].weight.clone()
    optimizer = freeze_masked(torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9), network)
    compiled = torch.compile(network, backend="eager")
    train(compiled, optimizer)  # type: ignore[arg-type]
    is_kept(network[0].weight, start)


def test_edits_are_projected_before_the_layer_acts() -> None:
    network = model()
    with torch.no_grad():
        network[0].weight.fill_(-1.0)
    network(X)
    weight = network[0].weight
    assert (weight[SIGNS > 0] == 0).all()
    assert (weight[(TIES == 0)] == -1).all()
    assert not weight[~CONNECTED].any()


@pytest.mark.parametrize("sparse", [False, True])
def test_copies_states_and_files_carry_them(sparse: bool, tmp_path: Path) -> None:
    from maskedlinear.checkpoint import load_into, save

    network = model(sparse)
    pickled = io.BytesIO()
    torch.save(network, pickled)
    pickled.seek(0)
    fresh = model(sparse, None)
    fresh.load_state_dict(network.state_dict())
    save(network, tmp_path / "model.mlin")
    filed = model(sparse, None)
    load_into(filed, tmp_path / "model.mlin")
    other = compress(copy.deepcopy(network), "sparse") if not sparse else expand(copy.deepcopy(network))
    copies = {
        "deepcopy": copy.deepcopy(network),
        "pickle": torch.load(pickled, weights_only=False),
        "state": fresh,
        "file": filed,
        "other form": other,
        "moved": copy.deepcopy(network).double().float(),
    }
    start = network[0].weight.clone()
    for name, one in copies.items():
        assert one[0].constraints is not None, name
        assert torch.equal(bits(one[0].weight), bits(start)), name
        train(one, freeze_masked(OPTIMIZERS["AdamW"](one.parameters()), one), 2)
        is_kept(one[0].weight, start)
    plain = nn.Sequential(nn.Linear(IN, OUT))
    if not sparse:
        plain.load_state_dict(network.state_dict(), strict=False)
        assert torch.allclose(plain(X), network(X))
        network.load_state_dict(plain.state_dict(), strict=False)
        assert network[0].constraints is not None, "a state without constraints leaves them as they are"
    with pytest.raises(RuntimeError, match="constraint"):
        plain.load_state_dict(network.state_dict())


@pytest.mark.parametrize("sparse", [False, True])
def test_regrowth_and_pruning_leave_what_is_fixed(sparse: bool) -> None:
    network = model(sparse, Constraints(fixed=FIXED, signs=dale(np.array([1, -1] * 4)).signs))
    layer = network[0]
    start = layer.weight.detach().clone()
    optimizer = freeze_masked(OPTIMIZERS["momentum"](network.parameters()), network)
    for step in range(3):
        assert regrow_model(network, 0.4, optimizer=optimizer, seed=step)
        train(network, optimizer, 2)
        weight = layer.weight.detach()
        assert torch.equal(bits(weight)[FIXED], bits(start)[FIXED])
        assert (weight * torch.tensor([1, -1] * 4) >= 0).all(), "new connections have the sign of their input"
    kept = {name: value.clone() for name, value in network.state_dict().items()}
    if not sparse:
        with pytest.raises(ValueError, match="fixed connections are never pruned or moved"):
            prune_model(network, 1.0, on_empty="allow")
        with pytest.raises(ValueError, match="a fixed connection stays live"):
            set_masks(network, {"0": np.zeros((OUT, IN), bool)})
    assert all(torch.equal(kept[name], value) for name, value in network.state_dict().items()), "left as it was"
    if not sparse:
        prune_model(network, 1 - FIXED.mean(), on_empty="allow")
        assert torch.equal(layer.mask, torch.from_numpy(FIXED))
    constrain(network, {"0": Constraints(fixed=True if sparse else layer.mask)})
    with pytest.raises(ValueError, match="fixed connections are never pruned or moved"):
        regrow_model(network, 0.5)


def test_a_masked_member_of_a_tie_sleeps_and_comes_back_with_its_value() -> None:
    network = model(given=Constraints(ties=TIES))
    optimizer = freeze_masked(OPTIMIZERS["momentum"](network.parameters()), network)
    members = np.argwhere(TIES == 0)
    away = MASK.copy()
    away[tuple(members[0])] = False
    network[0].set_mask(away)
    train(network, optimizer, 3)
    live = (TIES == 0) & away
    value = network[0].weight[live]
    assert len(set(value.tolist())) == 1
    assert network[0].weight[tuple(members[0])] == 0
    network[0].set_mask(MASK)
    assert torch.equal(network[0].weight[TIES == 0], value[:1].expand(len(members)))


def test_masked_weights_of_other_modules() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.LSTM(48, 4))
    mask_model(network)
    prune_model(network, 0.4)
    constrain(
        network,
        {
            "0": Constraints(signs=np.array([1, -1])[None, :, None, None], upper=0.1),
            "2.weight_hh_l0": dale([1, 1, -1, -1]),
        },
    )
    optimizer = freeze_masked(OPTIMIZERS["AdamW"](network.parameters()), network)
    for _ in range(4):
        optimizer.zero_grad()
        network(torch.randn(2, 2, 6, 6))[0].square().sum().backward()
        optimizer.step()
        kernel, recurrent = network[0].weight, network[2].weight_hh_l0
        assert kernel[:, 0].min() >= 0
        assert kernel.max() <= 0.1
        assert kernel[:, 1].max() <= 0
        assert (recurrent[:, :2] >= 0).all()
        assert (recurrent[:, 2:] <= 0).all()
    again = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.LSTM(48, 4))
    mask_model(again)
    again.load_state_dict(network.state_dict())
    assert repr(again.get_submodule("0.masked_weight").constraints) == repr(
        network.get_submodule("0.masked_weight").constraints
    )


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    network = model(given=None)
    fixed, masked = tuple(LIVE[0]), tuple(np.argwhere(~MASK)[0])

    def at(place: Any, value: Any, fill: Any = 0) -> Any:
        array = np.full((OUT, IN), fill)
        array[place] = value
        return array

    wrong = {
        r"what is fixed is live.*\(0": Constraints(fixed=at(masked, 1)),
        "must leave a value": Constraints(signs=1, upper=-1.0),
        "a fixed value must be within its bounds": Constraints(fixed=at(fixed, 1), lower=9.0),
        "differ in what is fixed": Constraints(fixed=FIXED, ties=np.where(MASK, 0, -1)),
        "differ in what is at least": Constraints(signs=SIGNS, ties=np.where(MASK, 0, -1)),
        "which is its transpose": Constraints(signs=np.ones((IN, OUT))),
    }
    for text, given in wrong.items():
        with pytest.raises(ValueError, match=text):
            constrain(network, {"0": given})
    with pytest.raises(ValueError, match="constraints must be of layers"):
        constrain(network, {"1": ALL})
    with pytest.raises(TypeError, match="Constraints"):
        constrain(network, {"0": SIGNS})
    with pytest.raises(ValueError, match="signs must hold"):
        Constraints(signs=[2])
    assert network[0].constraints is None
    constrain(network, {"0": ALL})
    constrain(network, {"0": None})
    assert network[0].constraints is None


@pytest.mark.parametrize("sparse", [False, True])
def test_a_step_that_fails_half_way_is_not_done_twice(sparse: bool) -> None:
    class Failing(torch.optim.AdamW):
        fails = True

        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            if self.fails:
                raise RuntimeError("after the parameters have moved")

    network = model(sparse)
    weight = network[0].weight_values if sparse else network[0].weight
    start = network[0].weight.clone()
    optimizer = Failing(network.parameters(), lr=0.1, weight_decay=0.5)
    (network(X) - T).square().sum().backward()
    gradient = weight.grad.clone()
    with pytest.raises(RuntimeError, match="moved"):
        optimizer.step()
    optimizer.fails = False
    optimizer.step()
    assert torch.equal(weight.grad, gradient), "as autograd made it"
    is_kept(network[0].weight, start)


UNDER_FSDP2 = """
import numpy as np, torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from maskedlinear.constraints import Constraints, dale
from maskedlinear.torch import MaskedLinear, SparseLinear, constrain, freeze_masked, regrow_model
mask = np.random.default_rng(0).random((5, 4)) < 0.7
fixed = mask & (np.random.default_rng(1).random((5, 4)) < 0.3)
for sparse in (False, True):
    torch.manual_seed(0)
    layer = MaskedLinear(4, 5, mask=mask)
    with torch.no_grad():
        layer.weight.abs_()
    layer = SparseLinear.from_masked(layer) if sparse else layer
    model = nn.Sequential(layer)
    constrain(model, {"0": Constraints(fixed=fixed, signs=np.ones((1, 4)), upper=0.6)})
    start = layer.weight.detach().clone()
    fully_shard(model)
    optimizer = freeze_masked(torch.optim.AdamW(model.parameters(), lr=0.3, weight_decay=0.1), model)
    for _ in range(4):
        optimizer.zero_grad()
        (model(torch.randn(3, 4)) + 2).square().sum().backward()
        optimizer.step()
    model.reshard() if hasattr(model, "reshard") else None
    weight = model[0].weight.detach()
    weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    assert torch.equal(weight[fixed], start[fixed]), (sparse, weight, start)
    assert weight.min() >= 0 and weight.max() <= 0.6001
    assert (weight != start)[mask & ~fixed].any()
    try:
        constrain(model, {"0": Constraints(ties=0)})
        raise SystemExit("ties must be refused")
    except ValueError as error:
        assert "ties are kept" in str(error), error
end()
"""


@needs_fsdp
def test_under_fsdp2(tmp_path: Path) -> None:
    in_processes(UNDER_FSDP2, tmp_path)
