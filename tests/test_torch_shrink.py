"""``shrink`` in PyTorch: smaller models with the same outputs; what cannot be followed is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskedlinear import pruning
from maskedlinear.pruning import _shrink
from maskedlinear.torch import MaskedLinear, SparseLinear, get_masks, mask_model, prune_model, set_masks, shrink

X = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))


def without(model: nn.Module, rows: dict[str, list[int]], columns: dict[str, list[int]] | None = None) -> nn.Module:
    """Mask all linear layers, take out some of their outputs and inputs, and give every parameter a value of its own."""
    mask_model(model)
    masks = get_masks(model)
    for name, places in rows.items():
        masks[name][places] = False
    for name, places in (columns or {}).items():
        masks[name][:, places] = False
    set_masks(model, masks)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return model


def same(model: nn.Module, small: nn.Module, x: Any = X) -> None:
    with torch.no_grad():
        torch.testing.assert_close(small.eval()(x), model.eval()(x), rtol=1e-5, atol=1e-5)


def sizes(model: nn.Module) -> list[tuple[int, int]]:
    return [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)]


def mlp() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.5)),
        *(nn.Linear(8, 9, bias=False), nn.PReLU(9), nn.Linear(9, 3)),
    )


def test_nodes_go_with_what_they_send_on() -> None:
    model = without(mlp(), {"0": [1, 4], "4": [0]}, {"6": [5, 6]}).train()
    before = copy.deepcopy(model.state_dict())
    small = shrink(model, X)
    assert sizes(small) == [(6, 6), (6, 6), (6, 3)]
    assert [type(small[place]) for place in (0, 4, 6)] == [nn.Linear] * 3
    assert (small[1].num_features, small[1].running_mean.shape, small[5].weight.shape) == (6, (6,), (6,))
    assert small[4].bias is not None  # it takes over what the constants of layer 0 gave
    assert small.training
    assert small[0].training
    same(model, small)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_a_pruned_model_becomes_smaller_and_keeps_the_masks_that_are_left() -> None:
    model = without(nn.Sequential(nn.Linear(6, 50), nn.ReLU(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 4)), {})
    prune_model(model, 0.95, score="random", seed=2, on_empty="allow")
    small = shrink(model, X)
    assert sum(p.numel() for p in small.parameters()) < 0.3 * sum(p.numel() for p in model.parameters())
    assert isinstance(small[2], MaskedLinear)
    assert int(small[2].mask.sum()) < small[2].mask.numel()
    same(model, small)
    assert sizes(shrink(small, X)) == sizes(small)


def test_pruned_nodes_become_smaller_layers_that_train() -> None:
    model = without(nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 2)), {})
    kept = pruning.prune_nodes(pruning.node_norm(model[0].weight.detach()), sparsity=0.5)
    set_masks(model, {"0": pruning.node_mask((10, 6), outputs=kept)})
    small = shrink(model, X)
    assert sizes(small) == [(6, 5), (5, 2)]
    optimizer = torch.optim.SGD(small.parameters(), 0.1)
    small(X).sum().backward()
    optimizer.step()


class Residual(nn.Module):
    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 8)
        self.block = nn.ModuleDict({"up": nn.Linear(8, 16), "down": nn.Linear(16, 8)})
        self.leave = nn.Linear(8, 2)
        self.join = join

    def forward(self, x: Tensor, scale: float = 2.0) -> dict[str, Tensor]:
        h = nn.functional.relu(self.enter(x))
        h = self.join(h, self.block["down"](torch.sigmoid(self.block["up"](h)) * scale - 1).tanh())
        return {"y": self.leave(h.mul(0.5))}


@pytest.mark.parametrize("join", [lambda a, b: a + b, torch.mul, torch.maximum], ids=["add", "mul", "maximum"])
@pytest.mark.parametrize("shape", [(7, 6), (2, 3, 6), (6,)])
def test_nodes_are_followed_through_traced_modules(join: Any, shape: tuple[int, ...]) -> None:
    model = without(Residual(join), {"enter": [0, 1], "block.down": [1, 2], "block.up": [3]}, {"leave": [7]})
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    small = shrink(model, x, scale=3.0)
    assert type(small) is Residual
    assert sizes(small) == [(6, 7), (7, 15), (15, 7), (7, 2)]
    with torch.no_grad():
        torch.testing.assert_close(small(x, 3.0), model(x, 3.0), rtol=1e-5, atol=1e-5)


def test_layers_without_any_node_left_are_empty_ones() -> None:
    model = without(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), {"0": [0, 1, 2, 3]})
    small = shrink(model, X)
    assert sizes(small) == [(6, 0), (0, 2)]
    same(model, small)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_and_what_asks_for_gradients_stay(dtype: torch.dtype) -> None:
    model = without(mlp(), {"0": [1]}).to(dtype)
    model[0].weight.requires_grad_(False)
    small = shrink(model, X.to(dtype))
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert [p.requires_grad for p in small[0].parameters()] == [False, True]


def test_a_single_layer_and_full_masks_stay_as_they_are() -> None:
    for model in (nn.Linear(6, 4), MaskedLinear(6, 4), without(mlp(), {})):
        small = shrink(model, X)
        assert small is not model
        assert sizes(small) == sizes(model)
        same(model, small)


class Norm(nn.Module):
    def __init__(self, between: Any) -> None:
        super().__init__()
        self.first, self.last, self.between = nn.Linear(6, 8), nn.Linear(8, 2), between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))


UNFOLLOWED = {
    "LayerNorm": (nn.LayerNorm(8), r"go into between \(LayerNorm, not followed\)"),
    "softmax": (lambda x: x.softmax(-1), "go into softmax"),
    "flip": (lambda x: x.flip(-1), "go into flip"),
    "cumsum": (lambda x: torch.cumsum(x, -1), "go into cumsum"),
    "its own factors": (lambda x: x * torch.ones(8), "go into mul"),
    "a broadcast": (lambda x: x[:, None] + x, "go into"),
    "a sparse layer": (SparseLinear.from_masked(MaskedLinear(8, 8)), "SparseLinear, not followed"),
    "statistics of the batch": (nn.BatchNorm1d(8, track_running_stats=False), "it keeps no statistics"),
}


@pytest.mark.parametrize("case", UNFOLLOWED)
def test_what_is_not_followed_is_refused_or_kept(case: str) -> None:
    between, message = UNFOLLOWED[case]
    model = without(Norm(between), {"first": [2]})
    with pytest.raises(ValueError, match=message):
        shrink(model, X)
    small = shrink(model, X, on_unfollowed="keep")
    assert sizes(small)[0] == (6, 8)
    same(model, small)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.middle(self.first(x))))


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x)) + self.first.weight.sum()


def test_layers_that_are_used_twice_shared_read_or_hooked_keep_their_nodes() -> None:
    twice, tied, reads, hooked = without(Twice(), {"middle": [1]}), Twice(), without(Reads(), {"first": [1]}), mlp()
    tied.first.weight = tied.middle.weight
    without(tied, {"first": [1], "middle": [1]})
    without(hooked, {"0": [1]})
    hooked[0].register_forward_hook(lambda module, args, y: y + 1)
    for model, message in (
        (twice, "used in two places"),
        (tied, "used in two places"),
        (reads, "its parameters are read by the model"),
        (hooked, "it has hooks"),
    ):
        small = shrink(model, X, on_unfollowed="keep")
        same(model, small)
        assert sizes(small) == sizes(model), message
    cut = without(Twice(), {}, {"last": [1]})
    with pytest.raises(
        ValueError, match=r"1 of the 6 features that come out of middle \(MaskedLinear, used in two places\)"
    ):
        shrink(cut, X)


def test_a_change_in_place_that_something_else_sees_is_refused() -> None:
    class InPlace(Norm):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            h.relu_()
            return self.last(h)

    with pytest.raises(ValueError, match="which changes first in place while something else reads it"):
        shrink(without(InPlace(None), {"first": [1]}), X)
    small = shrink(without(nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 2)), {"0": [1]}), X)
    assert sizes(small) == [(6, 7), (7, 2)]


def test_a_model_that_cannot_be_traced_is_refused() -> None:
    class Branches(Norm):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x)) if x.sum() > 0 else x

    with pytest.raises(ValueError, match=r"torch\.fx, which cannot trace this Branches: symbolically traced"):
        shrink(Branches(None), X)
    with pytest.raises(TypeError, match=r"shrink takes a torch\.nn\.Module; got Tensor"):
        shrink(X, X)
    with pytest.raises(ValueError, match="on_unfollowed must be 'raise' or 'keep'; got 'skip'"):
        shrink(mlp(), X, on_unfollowed="skip")


def test_a_flatten_that_does_nothing_is_followed() -> None:
    model = without(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)), {"0": [1]})
    assert sizes(shrink(model, X)) == [(6, 7), (7, 2)]
    wide = without(nn.Sequential(nn.Linear(6, 8), nn.Flatten(), nn.Linear(16, 2)), {"0": [1]})
    with pytest.raises(ValueError, match="of the 8 features that go into _1"):
        shrink(wide, torch.randn(3, 2, 6))


def test_a_model_that_cannot_be_called_in_double_precision_is_refused() -> None:
    class Single(Norm):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(nn.functional.prelu(self.first(x), torch.tensor(0.2)))

    with pytest.raises(ValueError, match="in float64, in which this Single cannot be called"):
        shrink(Single(None), X)


def test_a_wrong_model_is_never_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    model = without(mlp(), {"0": [1]})
    shrink(model, X)
    right = _shrink._times
    monkeypatch.setattr(_shrink, "_times", lambda *arguments: right(*arguments) * (1 + 1e-8))
    with pytest.raises(RuntimeError, match=r"shrink would change an output by .* more than rounding can"):
        shrink(model, X)


def test_explain_prints_the_layers_before_and_after(capsys: pytest.CaptureFixture[str]) -> None:
    shrink(without(mlp(), {"0": [1]}), X, explain=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layer", "in", "->", "out", "becomes", "live"]
    assert lines[1].split() == ["0", "6", "->", "8", "6", "->", "7", "Linear", "42"]
