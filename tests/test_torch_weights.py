"""Masks on any weight of a PyTorch model: convolutions, attention, recurrent layers, experts, modules of one's own."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from maskedlinear import pruning
from maskedlinear.models import WeightAxes
from maskedlinear.torch import (
    MaskedLinear,
    check_masks,
    compress,
    dense_gradients,
    freeze_masked,
    get_masks,
    mask_model,
    prune_model,
    register_axes,
    regrow_model,
    rewind_model,
    set_masks,
    summary,
    unmask_model,
)


class Experts(nn.Module):
    """Three experts as a stack of matrices, and a kernel of a shape of one's own: (in, heads, size)."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(3, 5, 4))
        self.kernel = nn.Parameter(torch.randn(5, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,ihs->...hs", torch.einsum("...i,eoi->...o", x, self.up_proj), self.kernel).flatten(-2)


class Network(nn.Module):
    """A weight of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.up = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ConvTranspose1d(8, 6, 3)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.rnn, self.head = nn.LSTM(6, 5, num_layers=2, bidirectional=True), nn.Linear(10, 4)
        self.experts, self.bilinear = Experts(), nn.Bilinear(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.norm(self.conv(x)).flatten(2)).mT
        y = self.head(self.rnn(self.attention(y, y, y, need_weights=False)[0])[0])
        return self.bilinear(self.experts(y), y)  # type: ignore[no-any-return]


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
register_axes(Experts, {"up_proj": WeightAxes(1, 2, 0), "kernel": WeightAxes(in_axis=0, out_axis=(1, 2))})


def network(sparsity: float = 0.0) -> Network:
    torch.manual_seed(0)
    model = mask_model(Network())
    if sparsity:
        prune_model(model, sparsity, scope="layer")
    return model  # type: ignore[return-value]


def parameter(model: nn.Module, name: str) -> Tensor:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return parameters.get(name, parameters.get(f"{name}.weight"))  # type: ignore[return-value]


def is_clean(model: nn.Module) -> bool:
    """Whether weights and gradients are +0 under the masks, read past everything that could mend them."""
    for name, mask in get_masks(model).items():
        weight = parameter(model, name)
        for tensor in (weight.detach(), weight.grad):
            if tensor is not None and tensor.contiguous().view(torch.int32)[~mask].any():
                return False
    return True


def test_every_kind_is_masked_and_counted() -> None:
    model = network()
    torch.manual_seed(0)
    plain = Network()
    assert torch.equal(model(X), plain(X))
    assert list(get_masks(model)) == [
        *("conv", "up", "attention.in_proj_weight", "attention.out_proj"),
        *(f"rnn.weight_{kind}_l{i}{side}" for i in (0, 1) for side in ("", "_reverse") for kind in ("ih", "hh")),
        *("head", "experts.up_proj", "experts.kernel", "bilinear"),
    ]
    assert isinstance(model.head, MaskedLinear)
    assert type(model.conv) is nn.Conv2d
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    prune_model(model, 0.75, scope="layer")
    table = summary(model)
    assert [row.sparsity for row in table.rows] == pytest.approx([0.75] * 16, abs=0.05)
    assert {other.why for other in table.unmasked} == {"bias", "norm"}
    every = sum(p.numel() for p in plain.parameters())
    assert sum(part.size for part in (*table.rows, *table.unmasked)) == every
    zeros = sum(int((~mask).sum()) for mask in get_masks(model).values())
    assert table.model_sparsity == zeros / every
    assert check_masks(model, X).ok
    assert unmask_model(model) is model
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
    "fused Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, weight_decay=0.1, fused=True),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_is_masked_stays_so_while_it_trains(optimizer: str, guarded: bool) -> None:
    model = network(0.5)
    twin = copy.deepcopy(model)
    stepper, other = OPTIMIZERS[optimizer](model.parameters()), OPTIMIZERS[optimizer](twin.parameters())
    if guarded:
        freeze_masked(stepper, model)
    for step in range(4):
        for one, steps in ((model, stepper), (twin, other)):
            steps.zero_grad()
            one(X).square().mean().backward()
            steps.step()
        if step == 1:
            prune_model(model, 0.7, on_empty="keep")
            set_masks(twin, get_masks(model))
            model.zero_grad(), twin.zero_grad()  # which are of other masks
        assert is_clean(model)
        assert is_clean(twin), "a copy has its hooks and its place among those that are cleaned"
    if not guarded:
        torch.testing.assert_close(model(X), twin(X))
    check = check_masks(model, X)
    assert check.failures == {}
    assert check.is_constant, "one connection of conv and of up are left, which do not meet"


def test_dormant_values_come_back_bit_for_bit() -> None:
    model = network()
    y, start = model(X), {name: p.clone() for name, p in model.named_parameters()}
    before = prune_model(model, 0.9, on_empty="keep")
    assert not torch.equal(model(X), y)
    for _ in range(2):
        model = pickle_and_back(copy.deepcopy(model)).double().float()
    set_masks(model, before)
    assert all(torch.equal(p, start[name]) for name, p in model.named_parameters())


def pickle_and_back(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("meta", [False, True])
def test_a_state_brings_masks_and_dormant_values(assign: bool, meta: bool) -> None:
    model = network(0.8).eval()
    state = copy.deepcopy(model.state_dict())
    if meta and not assign:
        other: nn.Module = mask_model(Network().to("meta")).to_empty(device="cpu")
    else:
        with torch.device("meta" if meta else "cpu"):
            other = mask_model(Network())
    other.load_state_dict(state, assign=assign)
    assert torch.equal(other.eval()(X), model(X))
    assert all(torch.equal(mask, get_masks(model)[name]) for name, mask in get_masks(other).items())
    full = {name: torch.ones_like(mask) for name, mask in get_masks(model).items()}
    set_masks(model, full), set_masks(other, full)
    assert torch.equal(other(X), model(X))
    stepper = torch.optim.AdamW(other.parameters(), lr=0.01)
    set_masks(other, {name: state[key] for name, key in keys(other).items()})
    other(X).sum().backward()
    stepper.step()
    assert is_clean(other)


def keys(model: nn.Module) -> dict[str, str]:
    """The key of each mask in a state."""
    state = model.state_dict()
    return {
        name: next(
            key
            for key in (f"{name}.mask", f"{name}.masked_weight.mask", ".masked_".join(name.rsplit(".", 1)) + ".mask")
            if key in state
        )
        for name in get_masks(model)
    }


def inside(name: str) -> str:
    """The key of the mask of a parameter."""
    return ".masked_".join(name.rsplit(".", 1)) + ".mask"


def test_states_of_plain_models_and_of_masked_ones_go_into_each_other() -> None:
    model, plain = network(0.8).eval(), Network().eval()
    found = plain.load_state_dict(model.state_dict(), strict=False)
    assert found.missing_keys == []
    assert torch.equal(plain(X), model(X))
    torch.manual_seed(1)
    other, masks = Network(), get_masks(model)
    model.load_state_dict(other.state_dict())
    assert all(torch.equal(mask, masks[name]) for name, mask in get_masks(model).items())
    assert is_clean(model)
    set_masks(model, {name: torch.ones_like(mask) for name, mask in masks.items()})
    assert all(torch.equal(p, dict(other.named_parameters())[name]) for name, p in model.named_parameters())


def test_rewinding_keeps_the_masks() -> None:
    model = network()
    state = copy.deepcopy(model.state_dict())
    prune_model(model, 0.5)
    masks = get_masks(model)
    rewind_model(model, state)
    assert all(torch.equal(mask, masks[name]) for name, mask in get_masks(model).items())
    assert is_clean(model)


def test_stacks_are_pruned_matrix_by_matrix_and_in_the_order_of_outputs_and_inputs() -> None:
    model = network()
    prune_model(model, 0.5, scope="layer", include="experts.*")
    masks = {name: mask.numpy() for name, mask in get_masks(model).items()}
    stack = model.experts.up_proj.detach()
    full = {name: part.detach() for name, part in Network().named_parameters()}
    assert [int(mask.sum()) for mask in masks["experts.up_proj"]] == [10, 10, 10]
    assert set(full) >= {"experts.up_proj"}
    alone = [pruning.prune(np.abs(matrix), sparsity=0.5) for matrix in dormant_and_live(model, "experts.up_proj")]
    assert (masks["experts.up_proj"] == np.stack(alone)).all()
    assert not stack[~torch.from_numpy(masks["experts.up_proj"])].any()
    kernel = dormant_and_live(model, "experts.kernel")
    alone_kernel = pruning.prune(np.abs(kernel.reshape(5, 4).T), sparsity=0.5)
    assert (masks["experts.kernel"] == alone_kernel.T.reshape(5, 2, 2)).all()


def dormant_and_live(model: nn.Module, name: str) -> Any:
    child: Any = model.get_submodule(inside(name).removesuffix(".mask"))
    return child.full_weight.numpy()


def test_fractions_of_all_weights_and_of_the_whole_model() -> None:
    model = mask_model(network_without_head(), include="0")
    with pytest.raises(ValueError, match=r"numbers cannot be masked, where .* are in masked weights"):
        prune_model(model, 0.9, of="model")
    for sparsity in (0.2, 0.25):
        prune_model(model, sparsity, of="weights")
        assert summary(model).weight_sparsity == pytest.approx(sparsity, abs=0.01)
    for scope in ("global", "layer"):
        prune_model(model, 0.3 + 0.05 * (scope == "layer"), of="model", scope=scope)
        assert summary(model).model_sparsity == pytest.approx(0.3 + 0.05 * (scope == "layer"), abs=0.01)
    with pytest.raises(ValueError, match="of must be"):
        prune_model(model, 0.5, of="all")  # type: ignore[arg-type]


def network_without_head() -> nn.Module:
    return nn.Sequential(nn.Conv1d(4, 8, 3), nn.Flatten(), nn.Linear(8, 12)).requires_grad_(True)


def test_rows_and_layers_keep_their_best() -> None:
    model = network()
    with pytest.raises(ValueError, match=r"keep_at_least=.* leaves \d+ connections to prune"):
        prune_model(model, 0.95, keep_at_least={"row": 1, "layer": 8})
    prune_model(model, 0.95, keep_at_least={"row": 1, "layer": 8}, on_empty="keep")
    for name, mask in get_masks(model).items():
        assert int(mask.sum()) >= min(8, mask.numel()), name
    assert summary(model).sparsity == pytest.approx(0.95, abs=0.2)
    assert all(row.dead_outputs == 0 for row in summary(model).rows)


def test_connections_of_every_kind_move() -> None:
    model = network(0.8)
    before, live = get_masks(model), {name: int(mask.sum()) for name, mask in get_masks(model).items()}
    with dense_gradients(model) as gradients:
        model(X).square().mean().backward()
    plain = copy.deepcopy(model)
    unmask_model(plain).zero_grad()
    plain(X).square().mean().backward()
    optimizer = freeze_masked(torch.optim.AdamW(model.parameters(), lr=0.01), model)
    assert regrow_model(model, 0.3, gradients=gradients, optimizer=optimizer) > 0
    for name, mask in get_masks(model).items():
        assert int(mask.sum()) == live[name]
        grown, g = mask & ~before[name], parameter(plain, name).grad
        assert g is not None
        if mask.dim() == 2 and grown.any():  # where the dense gradient is largest, of what was masked
            assert g[grown].abs().min() >= g[~mask & ~before[name]].abs().max() * (1 - 1e-5), name
        assert not parameter(model, name)[grown].any()
    optimizer.zero_grad()
    assert is_clean(model)
    assert regrow_model(model, 0.3) > 0


def test_a_tied_head_counts_as_an_embedding_unless_it_is_asked_for() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.middle, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.middle(self.table(x)))  # type: ignore[no-any-return]

    with pytest.warns(UserWarning, match=r"left out table \(shared with an embedding\)"):
        model = mask_model(Tied())
    assert list(get_masks(model)) == ["middle"]
    assert [(other.name, other.why) for other in summary(model).unmasked if other.why != "bias"] == [
        ("table.weight", "shared with an embedding")
    ]
    mask_model(model, include="head")
    prune_model(model, 0.5, include=["head", "table"])
    mask, tokens = get_masks(model)["head"], torch.tensor([[1, 2, 8]])
    assert torch.equal(mask, get_masks(model)["table"])
    assert float(mask.float().mean()) == 0.5
    assert len(summary(model).rows) == 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        model(tokens).square().sum().backward()
        optimizer.step()
        assert not model.table.weight[~mask].any()  # type: ignore[union-attr, index]
    assert check_masks(model, tokens).ok


def test_what_cannot_be_masked_is_named() -> None:
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 4, 2)),
        torch_prune.random_unstructured(nn.Linear(4, 4), "weight", 0.5),
        nn.LazyLinear(5),
        nn.Linear(5, 5),
    )
    with pytest.warns(
        UserWarning, match="computed by a parametrization.*pruned by torch.nn.utils.prune.*without values"
    ):
        mask_model(model)
    assert list(get_masks(model)) == ["3"]
    for name, why in (("1.weight_orig", "pruned by"), ("2", "without values yet")):
        with pytest.raises(ValueError, match=f"{name} cannot be masked: it is {why}"):
            mask_model(model, include=[name])
    reasons = {other.name: other.why for other in summary(model).unmasked}
    assert reasons["2.weight"].startswith("without values yet")
    assert reasons["1.weight_orig"].startswith("pruned by")


def test_adapters_positions_and_embeddings_are_left_out_without_a_word() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(4, 4)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})
            self.pos_embed, self.table = nn.Parameter(torch.zeros(1, 7, 4)), nn.Embedding(5, 4)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = mask_model(Adapted())
    assert list(get_masks(model)) == ["base"]
    assert {other.why for other in summary(model).unmasked} == {
        *("adapter", "bias", "embedding", "position or embedding"),
    }
    mask_model(model, {"table": np.eye(5, 4)})
    assert torch.equal(model.table.weight != 0, torch.eye(5, 4, dtype=torch.bool))  # type: ignore[union-attr]


def test_layers_in_the_sparse_form_are_not_passed_over_in_silence() -> None:
    torch.manual_seed(0)
    model = mask_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    prune_model(model, 0.5)
    compress(model[0:1], "sparse")
    model[0] = compress(model[0], "sparse")
    with pytest.raises(ValueError, match="masks must be of layers that there are; got '0'"):
        mask_model(model, {"0": torch.ones(8)})  # which is no name of its bias
    with pytest.warns(UserWarning, match="0 in the sparse form stay as they are"):
        prune_model(model, 0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune_model(model, 0.95, include="1")
    assert summary(model).sparsity == pytest.approx(0.725, abs=0.03)


def test_a_parameter_that_is_exchanged_is_masked_too() -> None:
    model = network(0.5)
    model.conv.weight = nn.Parameter(torch.ones_like(model.conv.weight))
    model.eval()
    mask = get_masks(model)["conv"]
    assert torch.equal(model.conv.weight != 0, mask)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    model(X).sum().backward()
    optimizer.step()
    assert is_clean(model)


def test_axes_are_checked() -> None:
    with pytest.raises(TypeError, match="takes a type of"):
        register_axes(dict, {})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be WeightAxes"):
        register_axes(nn.Linear, {"weight": (0, 1)})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="each axis of a weight is one of outputs, inputs or a stack"):
        WeightAxes(0, 1).matrix_shape((2, 3, 4))
