"""What ``MaskedLinear`` stores: the weight is +0 under the mask for everyone, dormant values come back, nothing is stale."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from maskedlinear import masks
from maskedlinear.torch import (
    MaskedLinear,
    SparseLinear,
    compress,
    freeze_masked,
    mask_model,
    prune_model,
    regrow_model,
    set_masks,
    shrink,
)

SIZES = [(7, 5), (160, 130)]  # small ones take the expression in training, large ones the Function


@pytest.fixture(params=SIZES, ids=["small", "large"])
def layer(request: pytest.FixtureRequest) -> MaskedLinear:
    torch.manual_seed(0)
    in_features, out_features = request.param
    return MaskedLinear(in_features, out_features, mask=mask_like(in_features, out_features))


def mask_like(in_features: int, out_features: int, seed: int = 1) -> Tensor:
    return torch.asarray(masks.random((out_features, in_features), sparsity=0.5, seed=seed))


def x_of(layer: nn.Linear, seed: int = 0) -> Tensor:
    return torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(seed)).to(layer.weight.dtype)


def bits(tensor: Tensor) -> Tensor:
    kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    return tensor.detach().contiguous().view(kinds[tensor.itemsize])


def is_clean(layer: MaskedLinear) -> bool:
    return not bits(layer.weight)[~layer.mask].any()


def check(layer: MaskedLinear) -> None:
    """What the layer gives is what its weight says, in inference and in training, with gradients +0 under the mask."""
    x = x_of(layer)
    with torch.no_grad():
        y = layer(x)
    assert is_clean(layer)
    assert torch.equal(y, linear(x, layer.weight, layer.bias))
    with torch.inference_mode():
        assert torch.equal(layer(x), y)
    plain = layer.to_linear()
    x = x.requires_grad_()
    found = torch.autograd.grad(layer(x).square().sum(), [x, layer.weight, layer.bias])
    wanted = torch.autograd.grad(plain(x).square().sum(), [x, plain.weight, plain.bias])
    torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(found[1], torch.where(layer.mask, wanted[1], 0))
    torch.testing.assert_close(found[2], wanted[2])
    assert not bits(found[1])[~layer.mask].any()


def stepped(layer: MaskedLinear, **options: Any) -> None:
    """Two steps of momentum without a guard, the mask moving in between, so that masked places drift."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, **options)
    for _ in range(2):
        optimizer.zero_grad()
        layer(x_of(layer)).square().sum().backward()
        optimizer.step()
        layer.set_mask(layer.mask.roll(1, 0))
    optimizer.step()


@torch.no_grad()
def one_written(layer: MaskedLinear) -> None:
    layer.weight[1, 2] = 5


def one_written_past_autograd(layer: MaskedLinear) -> None:
    layer.weight.data[layer.mask.nonzero()[0].unbind()] = 5


def by_numpy(layer: MaskedLinear) -> None:
    layer.weight.detach().numpy()[:] += layer.mask.numpy()


def data_exchanged(layer: MaskedLinear) -> None:
    layer.weight.data = torch.randn_like(layer.weight)


def reassigned(layer: MaskedLinear) -> None:
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))


def reinitialised(layer: MaskedLinear) -> None:
    nn.init.ones_(layer.weight)


def other_mask(layer: MaskedLinear) -> Tensor:
    return mask_like(layer.in_features, layer.out_features, seed=2)


CHANGES: list[Callable[[MaskedLinear], Any]] = [
    stepped,
    lambda layer: stepped(layer, fused=True),
    lambda layer: stepped(layer, foreach=True),
    one_written,
    one_written_past_autograd,
    by_numpy,
    data_exchanged,
    reassigned,
    reinitialised,
    lambda layer: layer.set_mask(other_mask(layer)),
    lambda layer: layer.mask.logical_not_(),
    lambda layer: layer.mask.__setitem__(3, False),
    lambda layer: setattr(layer, "mask", other_mask(layer)),
    lambda layer: layer.load_state_dict(nn.Linear(layer.in_features, layer.out_features).state_dict()),
    lambda layer: layer.load_state_dict(twin(layer).state_dict()),
    lambda layer: layer.load_state_dict(twin(layer).state_dict(), assign=True),
    lambda layer: layer.reset_parameters(),
    lambda layer: layer.double(),
    lambda layer: layer.to("meta").to_empty(device="cpu").load_state_dict(twin(layer).state_dict()),
    lambda layer: layer.share_memory(),
    lambda layer: prune_model(layer, 0.7),
    lambda layer: regrow_model(layer, 0.3),
]


def twin(layer: MaskedLinear) -> MaskedLinear:
    return MaskedLinear(layer.in_features, layer.out_features, mask=other_mask(layer))


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: getattr(change, "__name__", "change"))
def test_nothing_is_stale_and_the_weight_is_clean_after_a_change(
    layer: MaskedLinear, change: Callable[[MaskedLinear], Any]
) -> None:
    check(layer)
    change(layer)
    check(layer)
    change(layer)
    check(layer)


@pytest.mark.parametrize("clean", [lambda layer: layer.eval(), lambda layer: layer.state_dict(), copy.deepcopy])
def test_what_is_left_under_a_mask_is_gone_before_others_look(layer: MaskedLinear, clean: Any) -> None:
    full = layer.full_weight
    stepped(layer, fused=True)
    assert is_clean(layer), "momentum has moved what is masked now, and the step was followed by a projection"
    with torch.no_grad():
        layer.weight.add_(1)
    assert not is_clean(layer)
    clean(layer)
    assert is_clean(layer)
    assert torch.equal(layer.full_weight[~layer.mask] != 0, full[~layer.mask] != 0)


def test_dormant_values_come_back_bit_for_bit(layer: MaskedLinear) -> None:
    kinds = torch.tensor([torch.nan, torch.inf, -0.0, 1e-42, 3.0]).repeat(layer.weight.numel() // 5 + 1)
    full = torch.where(layer.mask, layer.weight.detach(), kinds[: layer.weight.numel()].view_as(layer.weight))
    before, old = full.clone(), layer.mask.clone()
    layer.load_state_dict({"weight": full, "bias": layer.bias.detach()})
    assert torch.equal(bits(full), bits(before)), "a state is not written to"
    check(layer)
    for way in (copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), twin_of_state):
        other = way(layer)
        other.set_mask(torch.zeros_like(old))
        other.set_mask(torch.ones_like(old))
        assert torch.equal(bits(other.weight), bits(before))


def twin_of_state(layer: MaskedLinear) -> MaskedLinear:
    other = MaskedLinear(layer.in_features, layer.out_features, device="meta")
    other.load_state_dict(layer.state_dict(), assign=True)
    return other


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dormant_values_follow_the_dtype(layer: MaskedLinear, dtype: torch.dtype) -> None:
    full = layer.full_weight
    layer.to(dtype)
    assert layer.dormant is not None
    assert layer.dormant.dtype is dtype
    assert torch.equal(layer.full_weight, full.to(dtype))
    check(layer) if dtype is torch.float64 else None


def test_dormant_values_can_be_let_go_or_stay_on_the_host() -> None:
    torch.manual_seed(0)
    layer = MaskedLinear(7, 5, mask=mask_like(7, 5), keep_dormant=False)
    live = torch.where(layer.mask, layer.weight.detach(), 0)
    assert layer.dormant is None
    assert "dormant" not in layer.state_dict()
    layer.set_mask(torch.ones(5, 7))
    assert torch.equal(layer.weight, live), "what comes back starts at 0"
    host = MaskedLinear(7, 5, mask=mask_like(7, 5), keep_dormant="host")
    full = host.full_weight
    assert host.dormant is not None
    host.double()
    assert host.dormant.device.type == "cpu"
    assert torch.equal(host.full_weight, full.double())
    with pytest.raises(ValueError, match=r"keep_dormant must be True, False or 'host'; got 'disk'"):
        MaskedLinear(7, 5, keep_dormant="disk")  # type: ignore[arg-type]


def test_a_plain_model_that_loads_the_state_has_the_same_outputs(layer: MaskedLinear) -> None:
    stepped(layer)
    plain = nn.Linear(layer.in_features, layer.out_features)
    assert plain.load_state_dict(layer.state_dict(), strict=False).unexpected_keys == ["mask", "dormant"]
    assert torch.equal(plain(x_of(layer)), layer(x_of(layer)))
    plain.load_state_dict(layer.to_linear().state_dict())
    assert torch.equal(plain(x_of(layer)), layer(x_of(layer)))


def test_states_of_earlier_versions_load(layer: MaskedLinear) -> None:
    full = torch.randn_like(layer.weight)
    state = {"weight": full.clone(), "bias": layer.bias.detach(), "mask": other_mask(layer)}
    for assign in (False, True):
        layer.load_state_dict(state, assign=assign)
        check(layer)
        assert torch.equal(layer.full_weight, full)
        assert torch.equal(state["weight"], full)
    with pytest.raises(RuntimeError, match=r"dormant values must have the weight's shape"):
        layer.load_state_dict({**state, "dormant": torch.zeros(2, 2)})


@pytest.mark.parametrize("read", ["past forward", "both", "autograd.grad"])
def test_the_gradient_is_zero_under_the_mask_whoever_read_the_weight(layer: MaskedLinear, read: str) -> None:
    x, mask = x_of(layer), layer.mask
    for module in (layer, copy.deepcopy(layer), layer.double().float()):
        loss = linear(x, module.weight).square().sum()
        if read == "both":
            loss = loss + module(x).square().sum()
        if read == "autograd.grad":
            gradient = torch.autograd.grad(loss, module.weight)[0]
        else:
            module.weight.grad = None
            loss.backward()
            gradient = module.weight.grad
        assert gradient is not None
        assert gradient[mask].any()
        assert not bits(gradient)[~mask].any()


def test_a_weight_that_was_frozen_gets_its_hook_when_it_is_not(layer: MaskedLinear) -> None:
    frozen = nn.Linear(layer.in_features, layer.out_features).requires_grad_(False)
    masked = MaskedLinear.from_linear(frozen, layer.mask)
    masked.requires_grad_(True)
    masked.train()
    linear(x_of(masked), masked.weight).sum().backward()
    assert masked.weight.grad is not None
    assert not masked.weight.grad[~masked.mask].any()


@pytest.fixture
def swaps() -> Any:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def test_parameters_can_be_swapped_on_conversion(layer: MaskedLinear, swaps: None) -> None:
    full = layer.full_weight
    layer(x_of(layer)).sum().backward()
    layer.double()
    check(layer)
    layer.load_state_dict(twin(layer).double().state_dict())
    check(layer)
    layer.load_state_dict({"weight": full, "bias": layer.bias.detach()}, strict=False)
    assert torch.equal(layer.full_weight, full.double())


def test_a_meta_layer_filled_by_hand_keeps_the_masks_it_got() -> None:
    """As accelerate does it: tensors set one by one, without load_state_dict."""
    source = MaskedLinear(160, 130, mask=mask_like(160, 130))
    source.set_mask(other_mask(source))
    for then in (
        lambda layer: layer,
        MaskedLinear.from_linear,
        lambda layer: layer.reset_parameters() or layer,
        lambda layer: layer.eval(),
        lambda layer: compress(layer, "sparse").to_masked(),
    ):
        layer = MaskedLinear(160, 130, mask=mask_like(160, 130), device="meta")
        for name in ("weight", "bias"):
            layer._parameters[name] = nn.Parameter(getattr(source, name).detach().clone())
        layer._buffers["mask"] = source.mask.clone()
        made = then(layer)
        assert torch.equal(made.mask, source.mask)
        check(made)


def test_a_sparse_layer_that_was_loaded_on_meta_has_its_own_connections() -> None:
    source = SparseLinear(30, 20, mask=mask_like(30, 20))
    layer = SparseLinear(30, 20, mask=torch.ones(20, 30), device="meta")
    layer.load_state_dict(source.state_dict(), assign=True)
    assert layer.pattern == source.pattern
    layer.reset_parameters()
    assert layer.weight_values.shape == source.weight_values.shape
    assert layer.to_masked().mask.equal(source.to_masked().mask)


def test_a_frozen_first_layer_lets_its_weight_be_written_after_forward(layer: MaskedLinear) -> None:
    layer.requires_grad_(False)
    x = x_of(layer).requires_grad_()
    y = layer(x)
    x.data.add_(1)
    with torch.no_grad():
        x.add_(0)  # an edit that would break a graph that had saved x
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand_as(x))


def test_projection_breaks_no_graph(layer: MaskedLinear) -> None:
    """A step of another optimizer between forward and backward, as GANs do: nn.Linear does not mind."""
    x = x_of(layer).requires_grad_()
    y = layer(x)
    other = nn.Linear(2, 2)
    other(torch.ones(2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    layer(x_of(layer))  # which projects anew
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.detach().sum(0).expand_as(x))


def test_backward_after_a_fused_step_sends_nothing_dormant() -> None:
    """Of a large layer; a small one's backward pass reads the weight as it is then, as nn.Linear's does."""
    torch.manual_seed(0)
    layer = MaskedLinear(160, 130, mask=mask_like(160, 130))
    stepped(layer)
    layer.zero_grad()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, fused=True)
    layer(x_of(layer)).square().sum().backward()
    optimizer.step()
    layer.set_mask(layer.mask.roll(2, 0))
    x = x_of(layer).requires_grad_()
    y = layer(x)
    optimizer.step()  # moves the weight and no version
    layer.weight.data[~layer.mask] = 5.0
    y.sum().backward()
    want = torch.ones_like(y) @ torch.where(layer.mask, layer.weight.detach(), 0)
    torch.testing.assert_close(x.grad, want, rtol=1e-3, atol=1e-3)


def test_weights_that_processes_share_are_written_at_masked_places_alone(layer: MaskedLinear) -> None:
    layer.share_memory()
    layer(x_of(layer))
    live = layer.mask.nonzero()[0].unbind()
    dead = (~layer.mask).nonzero()[0].unbind()
    alias = torch.from_numpy(layer.weight.detach().numpy())
    alias[live], alias[dead] = 7, 7  # another process' edit: nothing here counts it
    check(layer)
    assert layer.weight[live] == 7


def test_threads_share_a_layer(layer: MaskedLinear) -> None:
    x, wrong = x_of(layer), []
    want = layer(x).detach()

    def train() -> None:
        for _ in range(30):
            if not torch.equal(layer(x), want):
                wrong.append("forward")
            gradient = torch.autograd.grad(layer(x).sum(), layer.weight)[0]
            if bits(gradient)[~layer.mask].any():
                wrong.append("gradient")

    threads = [threading.Thread(target=train) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_layers_that_share_a_weight_still_do_after_copies_and_conversions() -> None:
    one, other = MaskedLinear(7, 5, mask=mask_like(7, 5)), MaskedLinear(7, 5)
    other.weight = one.weight
    model = nn.ModuleList([one, other])
    for way in (lambda m: m, copy.deepcopy, lambda m: m.double(), lambda m: pickle.loads(pickle.dumps(m))):
        model = way(model)
        one, other = model
        other.set_mask(~other.mask)
        assert torch.equal(one.mask, other.mask)
        check(one)
        check(other)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert one.mask is other.mask
    with pytest.raises(ValueError, match="one mask, whoever shares it"):
        set_masks(model, {"0": one.mask, "1": ~one.mask})


def test_the_guard_makes_nothing_of_a_weights_size() -> None:
    layer = MaskedLinear(1200, 1000, mask=mask_like(1200, 1000))  # of several blocks
    optimizer = freeze_masked(torch.optim.AdamW(layer.parameters(), fused=True), layer)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x_of(layer)).sum().backward()
        optimizer.step()
    optimizer.zero_grad()
    layer(x_of(layer)).sum().backward()
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.step()
    made = max((event.cpu_memory_usage for event in profile.events()), default=0)
    assert made < layer.weight.nbytes / 2


def test_exported_programs_hold_a_plain_weight(layer: MaskedLinear) -> None:
    stepped(layer)
    layer.eval()
    for strict in (False, True):
        program = torch.export.export(layer, (x_of(layer),), strict=strict)
        assert not any("where" in str(node.target) for node in program.graph.nodes)
        assert torch.equal(program.module()(x_of(layer)), layer(x_of(layer)))
    stepped(layer)  # exported as it is: with its drift, it is masked by the program
    layer.set_mask(other_mask(layer))
    stepped(layer)
    program = torch.export.export(layer, (x_of(layer),), strict=False)
    torch.testing.assert_close(program.module()(x_of(layer)), layer(x_of(layer)))


def test_a_model_masked_in_inference_mode_can_be_trained() -> None:
    model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.inference_mode():
        mask_model(model, {"0": mask_like(7, 5)})
    optimizer = freeze_masked(torch.optim.AdamW(model.parameters()), model)
    model(torch.ones(3, 7)).sum().backward()
    optimizer.step()
    check(model[0])


def test_a_copy_of_a_parameter_that_is_merged_past_autograd_is_not_silent(layer: MaskedLinear) -> None:
    layer(x_of(layer))
    layer.weight.data += 1  # as PEFT merges an adapter
    assert torch.equal(layer(x_of(layer)), linear(x_of(layer), layer.weight, layer.bias)), "the merge acts"
    assert not is_clean(layer)
    with pytest.warns(UserWarning, match="values under the mask .* are set back to 0, which no optimizer has left"):
        layer.eval()
    check(layer)


def test_what_a_new_layer_has_in_its_memory_is_not_dormant(monkeypatch: pytest.MonkeyPatch) -> None:
    def dirty(*arguments: Any, empty_like: Any = torch.empty_like, **options: Any) -> Tensor:
        new = empty_like(*arguments, **options)
        return new.fill_(torch.nan) if new.is_floating_point() else new

    for keep_dormant in (True, False):
        layer = MaskedLinear(40, 30, mask=mask_like(40, 30), keep_dormant=keep_dormant)
        model = nn.Sequential(layer, nn.ReLU(), MaskedLinear(30, 4))
        layer.set_mask(layer.mask & (torch.arange(30) > 0)[:, None])  # an output without inputs
        full, smaller = layer.full_weight, torch.arange(30) > 0
        monkeypatch.setattr(torch, "empty_like", dirty)
        dense, small = SparseLinear.from_masked(layer).to_masked(), shrink(model, torch.ones(2, 40))
        monkeypatch.undo()
        assert dense.dormant is None
        assert small[0].out_features == 29
        assert torch.equal(small[0].full_weight, full[smaller])
        assert dense.keep_dormant == small[0].keep_dormant == keep_dormant
        assert layer.keep_dormant or small[0].dormant is None
