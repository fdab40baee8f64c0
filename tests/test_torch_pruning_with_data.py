"""Models pruned by what goes through them: recorded activations, SparseGPT and OBS, GraSP, SynFlow, Fisher, movement."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from maskedlinear import pruning
from maskedlinear.torch import (
    dense_gradients,
    fisher_scores,
    get_masks,
    grasp_scores,
    mask_model,
    movement_scores,
    obd_scores,
    prune_model,
    prune_with_updates,
    record_activations,
    summary,
    synflow_prune,
)

transformers = pytest.importorskip("transformers")


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=16, vocab_size=32)
    return mask_model(transformers.GPT2LMHeadModel(config).eval(), include="transformer.h.*")


def tokens(seed: int = 0, batch: int = 8) -> Tensor:
    return torch.randint(0, 32, (batch, 12), generator=torch.Generator().manual_seed(seed))


def language_loss(model: Any) -> Any:
    return lambda batch: F.cross_entropy(model(batch).logits[:, :-1].mT, batch[:, 1:])


def test_wanda_records_what_goes_into_gpt2_and_restores_all() -> None:
    model, seen = gpt2(), []
    layer = model.transformer.h[1].mlp.c_proj
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().double()))
    fast = torch.backends.mha.get_fastpath_enabled()
    with record_activations(model) as activations, torch.autocast("cpu"):
        model(tokens(0))
        model(tokens(1))
    handle.remove()
    norms = torch.cat([x.reshape(-1, 64) for x in seen]).norm(dim=0)
    weight = layer.weight.detach().double()  # (in, out)
    prune_model(model, 0.5, score=activations.wanda(), scope="row")
    order = (weight.abs() * norms[:, None]).argsort(dim=0)
    expected = torch.ones_like(weight, dtype=torch.bool).scatter(0, order[:32], False)
    assert torch.equal(get_masks(model)["transformer.h.1.mlp.c_proj"], expected)
    assert len(activations.names) == 8
    assert not any(module._forward_pre_hooks for module in model.modules() if type(module).__name__ == "Dropout")
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(RuntimeError, match="mine"), record_activations(model, hessian=True) as activations:
        raise RuntimeError("mine")
    assert hooks == [len(module._forward_pre_hooks) for module in model.modules()]
    assert torch.backends.mha.get_fastpath_enabled() == fast
    with pytest.raises(ValueError, match="nothing has gone into"):
        activations.wanda()
    with pytest.raises(ValueError, match="must be of layers that there are"):
        prune_model(model, 0.6, score={"transformer.h.9": weight})


def encoder() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return mask_model(nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval())  # type: ignore[return-value]


def test_a_transformer_encoder_is_recorded_inside_its_attention_without_padding() -> None:
    model, x = encoder(), torch.randn(3, 5, 8)
    length = torch.tensor([5, 3, 4])
    real = torch.arange(5) < length[:, None]
    with torch.no_grad(), record_activations(model, hessian=True) as activations:
        activations.count_only(real)
        model(x, src_key_padding_mask=~real)
    own = x[real].double()
    np.testing.assert_allclose(
        activations.input_norms("layers.0.self_attn.in_proj_weight")[2], own.norm(dim=0), rtol=1e-5
    )
    np.testing.assert_allclose(
        activations.hessian("layers.0.self_attn.in_proj_weight")[1], 2 / 12 * own.T @ own, rtol=1e-4, atol=1e-5
    )
    attention, attended = model.layers[0].self_attn, []
    for row, n in zip(x.double(), length, strict=True):
        q, k, v = F.linear(row[:n], attention.in_proj_weight.double(), attention.in_proj_bias.double()).chunk(3, dim=1)
        heads = [part.reshape(int(n), 2, 4).transpose(0, 1) for part in (q, k, v)]
        weights = (heads[0] @ heads[1].mT / 2).softmax(dim=-1)
        attended.append((weights @ heads[2]).transpose(0, 1).reshape(int(n), 8))
    norms = torch.cat(attended).norm(dim=0).detach()
    np.testing.assert_allclose(activations.input_norms("layers.0.self_attn.out_proj")[0], norms, rtol=1e-4)
    prune_with_updates(model, 0.5, activations, block_size=4)
    assert all(row.sparsity > 0.5 for row in summary(model).rows)


@pytest.mark.parametrize("padding", ["same", 1])
def test_windows_of_convolutions_are_rows_and_what_is_unknown_is_named(padding: Any) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(4, 6, 3, padding=padding, dilation=2, groups=2, padding_mode="circular", bias=False)
    model, x = nn.ModuleList([convolution, nn.LSTM(2, 2)]), torch.randn(2, 4, 7, 9)
    with pytest.warns(UserWarning, match="goes into a LSTM"), record_activations(model, hessian=True) as activations:
        y = convolution(x)
    # ‖y‖² of one output channel is w H w, summed over positions.
    for channel in range(6):
        row = convolution.weight[channel].detach().reshape(-1).double().numpy()
        hessian = activations.hessian("0")[channel // 3] / 2 * (y.numel() / 6)
        np.testing.assert_allclose(row @ hessian @ row, y[:, channel].detach().square().sum(), rtol=1e-5)
    scores = activations.wanda()["0"]
    assert scores.shape == (6, 2, 3, 3)
    norms = activations.input_norms("0").reshape(2, 2, 3, 3)
    np.testing.assert_allclose(scores[4], np.abs(convolution.weight[4].detach().numpy()) * norms[1], rtol=1e-6)
    with pytest.raises(ValueError, match="nobody knows"):
        activations.hessian("1.weight_ih_l0")


@pytest.mark.parametrize("method", ["sparsegpt", "obs"])
def test_updates_make_up_for_what_is_pruned_in_conv1d(method: Any) -> None:
    model, x = gpt2(), tokens(batch=16)
    dense = copy.deepcopy(model)
    with record_activations(model, hessian=True, dtype=torch.float64) as activations:
        model(x)
    plain = copy.deepcopy(model)
    layer = model.transformer.h[0].mlp.c_fc
    before = layer.weight.detach().clone()
    mask, weight = getattr(pruning, method)(
        before.numpy().T, activations.hessian("transformer.h.0.mlp.c_fc")[0], 0.5, damping=0.01
    )
    prune_with_updates(model, 0.5, activations, method=method)
    assert np.array_equal(get_masks(model)["transformer.h.0.mlp.c_fc"].numpy(), mask.T)
    np.testing.assert_allclose(layer.weight.detach(), weight.T, rtol=1e-6)
    assert torch.equal(layer.masked_weight.full_weight[~torch.from_numpy(mask.T)], before[~torch.from_numpy(mask.T)])
    prune_model(plain, 0.5, scope="layer")

    @torch.no_grad()
    def loss(one: Any) -> float:
        return float((one(x).logits - dense(x).logits).square().mean())

    magnitude = loss(plain)
    assert loss(model) < magnitude
    prune_with_updates(plain, None, activations, method="obs", damping=1e-4)
    assert loss(plain) < magnitude
    with pytest.raises(ValueError, match="only removes"):
        prune_with_updates(model, 0.1, activations)


def test_grasp_is_the_hessians_product_with_the_gradient() -> None:
    model = gpt2()
    loss, batches = language_loss(model), [tokens(0), tokens(1)]
    scores = grasp_scores(model, loss, iter(batches))
    parameters = {name: value for name, value in model.named_parameters() if "c_" in name and "weight" in name}
    model.set_attn_implementation("eager")
    total = sum(loss(batch) for batch in batches)
    gradient = torch.autograd.grad(total, list(parameters.values()))
    step, ends = 1e-3, []
    for sign in (1, -1):  # H g by a difference of gradients
        moved = copy.deepcopy(model).double()
        own = dict(moved.named_parameters())
        with torch.no_grad():
            for name, g in zip(parameters, gradient, strict=True):
                own[name] += sign * step * g.double()
        moved_loss = sum(language_loss(moved)(batch) for batch in batches)
        ends.append(torch.autograd.grad(moved_loss, [own[name] for name in parameters]))
    for name, one, other in zip(parameters, *ends, strict=True):
        expected = parameters[name].detach() * (one - other) / (2 * step)
        np.testing.assert_allclose(scores[name.removesuffix(".weight")], expected, rtol=1e-2, atol=1e-7)
    prune_model(model, 0.5, score=scores)
    with pytest.raises(ValueError, match="at least one batch"):
        grasp_scores(model, loss, iter(()))
    with pytest.raises(ValueError, match="one number"):
        grasp_scores(model, lambda batch: model(batch).logits, batches)


def test_fisher_and_obd_of_a_quadratic_loss_are_exact() -> None:
    model = mask_model(nn.Linear(3, 2, bias=False).double())
    x = torch.randn(8, 3, dtype=torch.float64)
    weight = model.weight.detach().numpy()
    squares = np.mean([np.outer([1, 1], row) ** 2 for row in x.numpy()], axis=0)
    fisher = fisher_scores(model, lambda row: model(row).sum(), x)[""]
    np.testing.assert_allclose(fisher, weight**2 * squares / 2)
    diagonal = obd_scores(
        model, lambda rows: model(rows).square().sum() / 2, [torch.eye(3, dtype=torch.float64)], draws=2
    )
    np.testing.assert_allclose(diagonal[""], weight**2 / 2)  # H is the identity


class Network(nn.Module):
    """A convolution, batch normalisation and a linear layer, with a tied one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.c = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.c.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.norm(self.a(x))).mean(dim=(2, 3)))))


def test_synflow_is_the_papers_loop_and_leaves_values_alone() -> None:
    torch.manual_seed(0)
    model = mask_model(Network())
    with torch.no_grad():
        model.norm.running_mean.copy_(torch.randn(4))
    plain, state = copy.deepcopy(model).double().eval(), copy.deepcopy(model.state_dict())
    before = synflow_prune(model, 0.8, torch.zeros(1, 1, 6, 6), rounds=10)
    assert all(mask.all() for mask in before.values())
    assert model.training
    for name, value in model.state_dict().items():
        if "weight" not in name and "mask" not in name and "dormant" not in name:
            assert torch.equal(value, state[name]), name
    assert torch.equal(model.b.full_weight, state["b.weight"])
    with torch.no_grad():
        for value in (*plain.parameters(), *plain.buffers()):
            if value.is_floating_point():
                value.abs_()
    masks = {name: torch.ones_like(value) for name, value in (("a", plain.a.weight), ("b", plain.b.weight))}
    values = {"a": plain.a.weight.detach().clone(), "b": plain.b.weight.detach().clone()}
    for step in range(1, 11):
        with torch.no_grad():
            for name, mask in masks.items():
                getattr(plain, name).weight.copy_(values[name] * mask)
        plain.zero_grad()
        plain(torch.ones(1, 1, 6, 6, dtype=torch.float64)).sum().backward()
        scores = {name: getattr(plain, name).weight.grad * values[name] * masks[name] for name in masks}
        flat = torch.cat([own.flatten() for own in scores.values()])
        count = int((1 - 0.2 ** (step / 10)) * len(flat) + 1e-9)
        edge = flat.sort().values[count - 1]
        masks = {name: (own > edge).double() for name, own in scores.items()}
    found = get_masks(model)
    assert all(torch.equal(found[name], mask.bool()) for name, mask in masks.items())
    further = synflow_prune(model, 0.85, torch.zeros(1, 1, 6, 6), rounds=3, on_empty="keep")
    assert torch.equal(further["a"], found["a"])


def test_synflow_of_transformers_needs_a_signal() -> None:
    model = gpt2()
    synflow_prune(model, 0.7, tokens()[:1], rounds=3)
    assert summary(model).sparsity == pytest.approx(0.7, abs=1e-3)
    model, place = gpt2(), torch.arange(64) == 5
    layer = model.transformer.h[0].mlp
    layer.c_fc.masked_weight.set_mask(~place.expand(16, 64))  # which leaves 16 connections of c_proj without an input
    table = summary(model, input_ids=tokens()[:1])
    assert table.effective_connections == sum(row.connections for row in table.rows) - 16, str(table)
    with pytest.raises(ValueError, match="no signal"):
        synflow_prune(encoder(), 0.5, torch.zeros(1, 5, 8), rounds=3)  # which ends in a layer normalisation
    with pytest.raises(TypeError, match="output"):
        synflow_prune(model, 0.8, tokens()[:1], output=lambda _: None)  # type: ignore[arg-type, return-value]


def test_synflow_takes_rounding_for_no_signal() -> None:
    """What a last layer normalisation leaves of a sum is zero on one machine, and what rounding leaves on another."""

    class Cancelled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            return torch.cat([y, y * (-1 - 1e-15)])

    with pytest.raises(ValueError, match="no signal"):
        synflow_prune(mask_model(Cancelled(4, 6, bias=False)), 0.5, torch.zeros(1, 4), rounds=2)


def test_movement_lets_masked_connections_come_back() -> None:
    torch.manual_seed(0)
    model = mask_model(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 3, 2)))
    prune_model(model, 0.5)
    x, scores, full = torch.randn(16, 6), None, {}
    dense = copy.deepcopy(model)
    for _ in range(2):
        with dense_gradients(model) as gradients:
            model(x).square().sum().backward()
        dense.zero_grad()
        # The dense gradient is that of a plain model with the weights that act.
        plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 3, 2))
        plain.load_state_dict(model.state_dict(), strict=False)
        plain(x).square().sum().backward()
        scores = movement_scores(model, gradients, scores)
        for name, layer in (("0", model[0]), ("3", model[3].masked_weight)):
            moved = -(layer.full_weight * plain[int(name)].weight.grad).double().numpy()
            full[name] = full.get(name, 0) + moved
            np.testing.assert_allclose(scores[name], full[name], rtol=1e-4, atol=1e-6)
    masked = {name: ~mask for name, mask in get_masks(model).items()}
    original = model[0].full_weight
    prune_model(model, 0.5, score=scores, keep_masked=False)
    now = get_masks(model)
    assert any((now[name] & was).any() for name, was in masked.items())
    assert summary(model).sparsity == pytest.approx(0.5, abs=0.01)
    assert torch.equal(model[0].weight[now["0"]], original[now["0"]])
