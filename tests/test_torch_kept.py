"""What a layer keeps of its masked weight: never stale, whatever happens to weight and mask, and no more than it must."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskedlinear import masks
from maskedlinear.torch import MaskedLinear, freeze_masked, masked_linear
from maskedlinear_torch import _functional, _kept

MASKS = [masks.random((6, 5), sparsity=0.5, seed=seed) for seed in (1, 2)]
X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the masked weight of small layers, too."""
    monkeypatch.setattr(_functional, "_SMALL", 0)


@pytest.fixture
def layer() -> MaskedLinear:
    torch.manual_seed(0)
    return MaskedLinear(5, 6, mask=MASKS[0])


def plain(layer: MaskedLinear, x: Tensor = X) -> Tensor:
    return nn.functional.linear(x, torch.where(layer.mask, layer.weight, 0), layer.bias)


def check(layer: MaskedLinear) -> None:
    """The layer gives what its weight and mask say: in inference, in training, and their gradients."""
    with torch.no_grad():
        assert torch.equal(layer(X), plain(layer))
    with torch.inference_mode():
        assert torch.equal(layer(X), plain(layer))
    x = X.clone().requires_grad_()
    inputs = [x, layer.weight, layer.bias]
    found, wanted = (torch.autograd.grad(f(x).square().sum(), inputs) for f in (layer, lambda x: plain(layer, x)))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        assert torch.equal(layer(X), plain(layer))


def stepped(layer: MaskedLinear) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    freeze_masked(optimizer, layer)
    layer(X).square().sum().backward()
    optimizer.step()


@torch.no_grad()
def in_place(layer: MaskedLinear) -> None:
    layer.weight[2, 3] += 1


def data_swapped(layer: MaskedLinear) -> None:
    layer.weight.data = torch.randn(6, 5)


def data_averaged(layer: MaskedLinear) -> None:
    layer.weight.data.mul_(0.9).add_(0.1)


def by_numpy(layer: MaskedLinear) -> None:
    layer.weight.detach().numpy()[:] = 1


def reassigned(layer: MaskedLinear) -> None:
    layer.weight = nn.Parameter(torch.randn(6, 5))


CHANGES: list[Callable[[MaskedLinear], Any]] = [
    stepped,
    in_place,
    data_swapped,
    data_averaged,
    by_numpy,
    reassigned,
    lambda layer: layer.set_mask(MASKS[1]),
    lambda layer: layer.mask.logical_not_(),
    lambda layer: layer.load_state_dict(MaskedLinear(5, 6, mask=MASKS[1]).state_dict()),
    lambda layer: layer.load_state_dict(MaskedLinear(5, 6, mask=MASKS[1]).state_dict(), assign=True),
    lambda layer: layer.reset_parameters(),
    lambda layer: layer.eval(),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: getattr(change, "__name__", "change"))
def test_nothing_is_stale_after_a_change(layer: MaskedLinear, change: Callable[[MaskedLinear], Any]) -> None:
    check(layer)
    change(layer)
    check(layer)
    change(layer)
    with torch.no_grad():
        assert torch.equal(layer(X), plain(layer)), "in inference, without a training call before"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_keeps_its_own(layer: MaskedLinear, copied: Callable[[MaskedLinear], MaskedLinear]) -> None:
    check(layer)
    other = copied(layer)
    in_place(other)
    check(other)
    check(layer)
    assert set(layer.state_dict()) == {"weight", "bias", "mask"}


def test_a_change_of_the_few_live_weights_alone_is_noticed() -> None:
    mask = torch.zeros(600, 500, dtype=torch.bool)
    mask[17, 3] = mask[400, 499] = True
    layer = MaskedLinear(500, 600, mask=mask)
    x = torch.randn(2, 500)
    with torch.no_grad():
        layer(x)
        layer.weight.data[mask] += 1
        assert torch.equal(layer(x), plain(layer, x))


def lines(layer: MaskedLinear) -> list[tuple[Any, ...]]:
    rows, columns = layer.weight.shape
    return [*((row, slice(None)) for row in range(rows)), *((slice(None), column) for column in range(columns))]


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.97])
def test_an_edit_of_any_row_or_column_is_noticed(sparsity: float) -> None:
    layer = MaskedLinear(50, 40, mask=masks.random((40, 50), sparsity=sparsity, seed=3))
    x = torch.randn(2, 50)
    edits: list[Callable[[Any], Any]] = [
        lambda line: layer.weight.data[line].mul_(2),
        lambda line: layer.weight.detach().numpy().__setitem__(line, 3),
    ]
    with torch.no_grad():
        layer(x)
        for edit in edits:
            for line in lines(layer):
                edit(line)
                assert torch.equal(layer(x), plain(layer, x)), line


@pytest.mark.parametrize("density", [0.001, 0.5, 0.999])
def test_an_edit_of_most_of_the_mask_is_noticed(density: float) -> None:
    layer = MaskedLinear(200, 300, mask=masks.random((300, 200), sparsity=1 - density, seed=3))
    x = torch.randn(2, 200)
    edits: list[Callable[[], Any]] = [
        layer.mask.data.logical_not_,
        lambda: layer.mask.numpy().fill(True),
        lambda: layer.mask.numpy().fill(False),
    ]
    with torch.no_grad():
        layer(x)
        for edit in edits:
            layer(x)
            edit()
            assert torch.equal(layer(x), plain(layer, x))


@pytest.mark.parametrize("shape", [(60, 50), (7, 300), (300, 7), (1, 5), (5, 1), (0, 3), (3, 0)])
@pytest.mark.parametrize("density", [0, 0.003, 0.1, 0.5, 0.99, 1])
def test_the_sample_has_a_place_in_each_row_and_column_and_few_twice(shape: tuple[int, int], density: float) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < density
    places = _kept._one_each(mask)
    sampled = torch.zeros_like(mask)
    sampled.view(-1)[places] = True
    assert not (sampled & ~mask).any()
    for dim in range(2):
        assert torch.equal(sampled.any(dim), mask.any(dim))
    if density >= 0.1:
        assert len(places) <= 1.2 * max(shape)


def test_masks_that_are_used_once_are_not_sampled(layer: MaskedLinear, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tensor] = []
    choose = _kept._places
    monkeypatch.setattr(_kept, "_places", lambda mask: (asked.append(mask), choose(mask))[1])
    with torch.no_grad():
        for mask in MASKS * 2:
            layer.set_mask(mask)
            assert torch.equal(layer(X), plain(layer))
        assert not asked
        for _ in range(3):
            layer(X)
    assert len(asked) == 1


@pytest.mark.parametrize("shape", [(4096, 1024), (1024, 4096), (2048, 2048)])
@pytest.mark.parametrize("density", [0.01, 0.5, 1.0])
def test_places_are_chosen_in_a_moment(shape: tuple[int, int], density: float) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < density
    looked: list[int] = []
    nonzero = Tensor.nonzero

    class Counted(Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = super().__torch_function__(function, types, args, kwargs or {})
            if function is nonzero:
                looked.append(len(found))
            return found

    _kept._one_each(mask.as_subclass(Counted))
    assert sum(looked) <= 0.1 * mask.numel(), "where many are live, not all of them are listed"


def unseen(layer: MaskedLinear) -> tuple[int, int]:
    """A place that no sample is taken at."""
    sample = layer._kept._now.sample  # type: ignore[union-attr]
    assert sample is not None
    seen = {*sample.live.tolist(), *sample.places.tolist()}
    return divmod(next(place for place in range(layer.weight.numel()) if place not in seen), layer.in_features)


@pytest.mark.parametrize("name", ["weight", "mask"])
def test_another_tensor_at_the_same_address_is_not_taken_for_the_first(name: str) -> None:
    layer = MaskedLinear(50, 40, mask=masks.random((40, 50), sparsity=0.5, seed=3))
    memory = getattr(layer, name).detach().numpy().copy()
    x = torch.randn(2, 50)

    def other() -> Tensor:
        tensor = torch.from_numpy(memory)
        return tensor if name == "mask" else nn.Parameter(tensor)

    with torch.no_grad():
        first = other()
        for _ in range(2):
            torch.func.functional_call(layer, {name: first}, (x,))
        memory[unseen(layer)] = ~memory[unseen(layer)] if name == "mask" else 5
        tensor = other()
        found = torch.func.functional_call(layer, {name: tensor}, (x,))
        weight, mask = (tensor if name == known else getattr(layer, known) for known in ("weight", "mask"))
        assert torch.equal(found, nn.functional.linear(x, torch.where(mask, weight, 0), layer.bias))


@pytest.mark.parametrize("name", ["weight", "mask"])
def test_what_is_at_a_freed_address_has_no_kept_weight_in_a_backward_pass(name: str) -> None:
    tensors = {"weight": torch.randn(6, 5).numpy(), "mask": MASKS[0].copy()}
    kept = _kept.Kept()
    weight, mask = (torch.from_numpy(memory) for memory in tensors.values())
    kept.derive(weight, mask)
    assert kept.of(weight.view_as(weight), mask.view_as(mask)) is not None, "views share the memory"
    if name == "weight":
        weight = torch.from_numpy(tensors[name])
    else:
        mask = torch.from_numpy(tensors[name])
    assert kept.of(weight, mask) is None


def test_masks_one_after_another_by_functional_call(layer: MaskedLinear) -> None:
    x = X.clone().requires_grad_()
    for seed in range(20):
        mask = torch.tensor(masks.random((6, 5), sparsity=0.5, seed=seed))
        y = torch.func.functional_call(layer, {"mask": mask}, (x,))
        masked = torch.where(mask, layer.weight, 0)
        assert torch.equal(y, nn.functional.linear(x, masked, layer.bias))
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], masked.sum(0).expand(4, 5))
        with torch.no_grad():
            assert torch.equal(torch.func.functional_call(layer, {"mask": mask}, (x,)), y)
        del mask


def test_weights_that_processes_share_are_not_kept(layer: MaskedLinear) -> None:
    layer.share_memory()
    with torch.no_grad():
        layer(X)
        layer.weight.detach().numpy()[0, 0] = 5  # as another process may
        assert torch.equal(layer(X), plain(layer))
    assert layer._kept.masked is None


def test_dtypes_follow_the_layer(layer: MaskedLinear) -> None:
    check(layer)
    for dtype in (torch.float64, torch.float32):
        layer.to(dtype)
        with torch.no_grad():
            assert torch.equal(layer(X.to(dtype)), plain(layer, X.to(dtype)))


@pytest.mark.parametrize("move", [lambda layer: layer.to("meta"), lambda layer: layer.half()])
def test_a_layer_that_moves_lets_go_of_what_it_kept(layer: MaskedLinear, move: Callable[[MaskedLinear], Any]) -> None:
    with torch.no_grad():
        layer(X)
    assert layer._kept.masked is not None
    move(layer)
    assert layer._kept.masked is None


def test_inference_derives_once_until_something_changes(layer: MaskedLinear, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []
    derive = _kept.masked_by_bits
    monkeypatch.setattr(_kept, "masked_by_bits", lambda *a: (made.append(a[0]), derive(*a))[1])
    with torch.no_grad():
        for _ in range(3):
            layer(X)
        assert len(made) == 1
        layer.weight[0, 0] = 3
        layer(X)
        layer.set_mask(MASKS[1])
        for _ in range(2):
            layer(X)
    assert len(made) == 3


def test_training_writes_to_the_same_memory(layer: MaskedLinear) -> None:
    places = set()
    for _ in range(3):
        stepped(layer)
        places.add(layer._kept.masked.data_ptr())  # type: ignore[union-attr]
    assert len(places) == 1
    with torch.no_grad():
        layer(X)
    held = layer._kept.masked
    stepped(layer)
    assert layer._kept.masked is not held, "what inference may still be reading is not written to"


def test_two_weights_of_one_layer_in_one_graph(layer: MaskedLinear) -> None:
    others = [torch.randn(6, 5, requires_grad=True) for _ in range(2)]
    x = X.clone().requires_grad_()
    outputs = [torch.func.functional_call(layer, {"weight": weight}, (x,)) for weight in others]
    for weight, y in zip(others, outputs, strict=True):
        found = torch.autograd.grad(y.sum(), (x, weight), retain_graph=True)
        wanted = torch.autograd.grad(masked_linear(x, weight, MASKS[0], layer.bias).sum(), (x, weight))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)


def test_a_weight_changed_between_forward_and_backward_is_an_error_as_in_every_layer(layer: MaskedLinear) -> None:
    y = layer(X)
    in_place(layer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_second_order_through_a_layer(layer: MaskedLinear) -> None:
    x = X.double().requires_grad_()
    layer = layer.double()
    assert torch.autograd.gradgradcheck(lambda x: layer(x), (x,))
    y = torch.func.jvp(layer, (x.detach(),), (x.detach(),))[1]
    torch.testing.assert_close(y, nn.functional.linear(x, layer.masked_weight))


def test_weights_made_in_inference_mode_are_not_kept() -> None:
    with torch.inference_mode():
        layer = MaskedLinear(5, 6, mask=MASKS[0])
        assert torch.equal(layer(X), plain(layer))
        layer.weight.mul_(2)
        assert torch.equal(layer(X), plain(layer))


def test_threads_do_not_write_to_each_others_memory(layer: MaskedLinear) -> None:
    layer(X)
    before = layer._kept.masked
    thread = threading.Thread(target=lambda: layer(X))
    thread.start()
    thread.join()
    assert layer._kept.masked is not before


def test_what_one_thread_may_write_to_another_does_not_read(layer: MaskedLinear) -> None:
    found: list[Tensor | None] = []

    def elsewhere(call: Callable[[], Tensor | None]) -> Tensor | None:
        thread = threading.Thread(target=lambda: found.append(call()))
        thread.start()
        thread.join()
        return found.pop()

    kept, weight, mask = layer._kept, layer.weight, layer.mask
    with torch.no_grad():
        trained = kept.derive(weight, mask)
        assert kept.of(weight, mask) is trained
        assert elsewhere(lambda: kept.of(weight, mask)) is None
        resting = elsewhere(lambda: kept.at_rest(weight, mask))
        assert resting is not trained
        assert kept.of(weight, mask) is resting, "nobody writes to it"
        assert kept.derive(weight, mask) is not resting


def test_training_threads_get_right_gradients() -> None:
    layer = MaskedLinear(200, 200, mask=masks.random((200, 200), sparsity=0.5, seed=0))
    wanted, wrong = layer.masked_weight.detach().sum(0), []

    def work() -> None:
        for _ in range(50):
            x = torch.randn(3, 200, requires_grad=True)
            found = torch.autograd.grad(layer(x).sum(), x)[0]
            if not torch.allclose(found, wanted.expand(3, 200), atol=1e-4):
                wrong.append(found)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_masks_of_other_bytes_than_0_and_1_mask_as_in_torch_where() -> None:
    mask = torch.where(torch.tensor(MASKS[0]), 255, 0).to(torch.uint8).view(torch.bool)
    weight = torch.randn(6, 5)
    wanted = torch.where(torch.tensor(MASKS[0]), weight, 0)
    assert torch.equal(_kept.masked_by_bits(weight, mask), wanted)
    assert torch.equal(_kept.mask_in_place(weight.clone(), mask), wanted)
    with torch.no_grad():
        assert torch.equal(masked_linear(X, weight, mask), X @ wanted.mT)


def test_a_weight_that_torch_has_only_marked_as_negated() -> None:
    weight = torch.randn(6, 5, dtype=torch.complex64).conj().imag
    assert weight.is_neg()
    with torch.no_grad():
        found = masked_linear(X, weight, MASKS[0])
    torch.testing.assert_close(found, X @ torch.where(torch.tensor(MASKS[0]), weight.resolve_neg(), 0).mT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_masking_in_place_gives_positive_zero_in_parts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_kept, "_BLOCK", 12)
    mask = torch.tensor(MASKS[0])
    matrix = torch.full((6, 5), float("nan"), dtype=dtype)
    matrix[mask] = -1.5
    found = _kept.mask_in_place(matrix.clone(), mask)
    assert torch.equal(found, torch.where(mask, matrix, 0))
    assert not found[~mask].signbit().any()
    assert torch.equal(_kept.masked_by_bits(matrix, mask), found)
    assert _kept.mask_in_place(torch.zeros(3, 0), torch.zeros(3, 0, dtype=torch.bool)).shape == (3, 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_large_gradients_and_weights_in_huge_pages(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_kept, "_GIVEN_BACK", 0)
    monkeypatch.setattr(_kept, "_BLOCK", 10)  # rows two at a time
    layer = MaskedLinear(5, 6, mask=MASKS[0], dtype=dtype)
    x = X.to(dtype)
    for step in range(2):
        layer(x).square().sum().backward()
        gradient = layer.weight.grad.clone()
        wanted = torch.autograd.grad(plain(layer, x).square().sum(), layer.weight)[0]
        torch.testing.assert_close(gradient, (step + 1) * wanted)
        assert not gradient[~layer.mask].any()
    assert layer.weight.grad.data_ptr() % (2 << 20) == 0
    assert pickle.loads(pickle.dumps(layer.weight.grad)).equal(layer.weight.grad)
