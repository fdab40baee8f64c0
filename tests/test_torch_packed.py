"""Packed layers of torch: what they compute, that nothing in them is ever out of date, and that no weight is lost."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from helpers import needs_kernels
from maskedlinear import checkpoint, kernels, masks
from maskedlinear.constraints import Constraints
from maskedlinear.torch import MaskedLinear, PackedLinear, SparseLinear, compress, constrain, pack, unpack

IN, OUT = 45, 70


def sparse(live=0.3, bias=True, seed=0):
    torch.manual_seed(seed)
    return SparseLinear(IN, OUT, bias, mask=masks.random((OUT, IN), sparsity=1 - live, seed=seed))


def model(seed=0):
    torch.manual_seed(seed)
    layers = SparseLinear(IN, OUT, mask=masks.random((OUT, IN), sparsity=0.7, seed=seed)), nn.LayerNorm(OUT)
    return nn.Sequential(*layers, SparseLinear(OUT, 9, False, mask=masks.random((9, OUT), sparsity=0.6, seed=seed)))


def dense(layer, x):
    y = x.double() @ layer.weight.double().T
    return y if layer.bias is None else y + layer.bias.double()


@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_computes_what_the_layer_did(bias):
    for live in (0.0004, 0.02, 0.3, 1.0):  # one connection, which does not pay; at 0.02 it does with AVX-512
        layer = sparse(live, bias)
        packed = pack(layer)
        assert isinstance(layer, SparseLinear)  # a layer by itself is not changed
        if live != 0.02:
            assert packed.is_packed == (kernels.is_available() and live > 0.02)
        for shape in ((IN,), (1, IN), (3, IN), (2, 2, IN), (5, IN), (0, IN), (4, 9, IN)):
            x = torch.randn(shape)
            y = packed(x)
            assert y.shape == (*shape[:-1], OUT)
            torch.testing.assert_close(y.double(), dense(layer, x), rtol=1e-5, atol=1e-5)
        x = torch.randn(IN, 3).T  # columns that do not lie side by side
        torch.testing.assert_close(packed(x).double(), dense(layer, x), rtol=1e-5, atol=1e-5)


@needs_kernels  # of MKL's products threads may change bits
def test_threads_do_not_change_a_bit():
    torch.manual_seed(0)
    packed, x = pack(SparseLinear(300, 900, mask=torch.rand(900, 300) < 0.5)), torch.randn(4, 300)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(packed(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    assert torch.equal(torch.stack([packed(row) for row in x]), found[0])


def test_nan_and_infinity_go_where_they_did():
    layer = sparse(0.2, bias=False)
    packed = pack(layer)
    for number in (torch.nan, torch.inf):
        x = torch.ones(1, IN)
        x[0, 8] = number
        reached = torch.from_numpy(layer.pattern.to_mask()[:, 8].copy())
        assert torch.equal(~packed(x)[0].isfinite(), reached)


def test_there_are_no_parameters_and_no_training():
    made = pack(model())
    assert [name for name, _ in made.named_parameters()] == ["1.weight", "1.bias"]
    layer = made[0]
    with pytest.raises(RuntimeError, match=r"in training mode: call model.eval\(\), or maskedlinear.torch.unpack"):
        made.train()(torch.ones(1, IN))
    with torch.no_grad():
        made(torch.ones(1, IN))
    made.eval()(torch.ones(1, IN))
    layer.weight_values.requires_grad_()
    with pytest.raises(RuntimeError, match="whose values require them"):
        made(torch.ones(1, IN))


def test_gradients_of_x_in_every_way():
    layer = sparse()
    packed, x = pack(layer), torch.randn(2, IN, requires_grad=True)
    weight = layer.weight.detach()
    packed(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(2, IN))
    torch.testing.assert_close(torch.func.jacrev(packed)(x[0].detach()), weight)
    torch.testing.assert_close(torch.func.jvp(packed, (x[0].detach(),), (torch.ones(IN),))[1], weight.sum(1))
    torch.testing.assert_close(torch.vmap(packed)(x.detach()), packed(x.detach()))


def test_what_is_written_to_the_values_counts():
    packed, x = pack(sparse()), torch.randn(1, IN)
    before = packed(x)
    packed.weight_values.mul_(2)
    torch.testing.assert_close(packed(x) - packed.bias, 2 * (before - packed.bias))
    zeros = torch.zeros_like(packed.weight_values)
    assert torch.equal(torch.func.functional_call(packed, {"weight_values": zeros}, x)[0], packed.bias)
    with pytest.raises(ValueError, match="bias"):  # no memory beyond it is read
        torch.func.functional_call(packed, {"bias": torch.zeros(3)}, x)


def test_states_go_both_ways_and_are_packed_anew():
    first, second = model(0), model(1)
    x = torch.randn(1, IN)
    state, expected = copy.deepcopy(second.state_dict()), second(x).detach()
    packed = pack(first)
    assert packed.load_state_dict(state).missing_keys == []
    assert packed[0].pattern == second[0].pattern
    assert packed[0].is_packed == kernels.is_available()
    torch.testing.assert_close(packed(x), expected)
    third = model(2)
    third.load_state_dict(packed.state_dict())
    assert torch.equal(third(x), expected)
    with pytest.raises(RuntimeError, match="indices"):
        packed.load_state_dict({**state, "0.indices": state["0.indices"].flip(0)})


def test_copies_pickles_and_files_hold_all_of_it(tmp_path):
    original = model(3)
    x = torch.randn(2, IN)
    packed = pack(copy.deepcopy(original))
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), packed(x))
        assert other[0].is_packed == packed[0].is_packed
    checkpoint.save(packed, tmp_path / "packed.safetensors")
    checkpoint.save(original, tmp_path / "sparse.safetensors")
    assert (tmp_path / "packed.safetensors").read_bytes() == (tmp_path / "sparse.safetensors").read_bytes()
    taken, plain = pack(model(4)), nn.Sequential(nn.Linear(IN, OUT), nn.LayerNorm(OUT), nn.Linear(OUT, 9, bias=False))
    checkpoint.load_into(taken, tmp_path / "packed.safetensors")
    assert torch.equal(taken(x), packed(x))
    loaded = checkpoint.load_into(plain, tmp_path / "packed.safetensors")
    torch.testing.assert_close((plain if loaded is None else loaded)(x), packed(x))


def test_unpacking_gives_the_layer_back():
    original = model(5)
    constrain(original, {"0": Constraints(lower=-0.5)})
    original[0].weight_values.requires_grad_(False)
    original[2].note = "kept"
    expected = copy.deepcopy(original)
    hooked = []
    original[2].register_forward_hook(lambda *_: hooked.append(1))
    made = unpack(pack(original))
    assert type(made[0]) is SparseLinear
    assert made[2].note == "kept"
    x = torch.randn(1, IN)
    assert torch.equal(made(x), expected(x))
    assert hooked
    assert [p.requires_grad for p in made.parameters()] == [p.requires_grad for p in expected.parameters()]
    assert all(
        torch.equal(a, b) for a, b in zip(made.state_dict().values(), expected.state_dict().values(), strict=True)
    )


def test_other_dtypes_and_devices_go_by_rows():
    packed = pack(sparse())
    for dtype in (torch.float64, torch.bfloat16):
        other = copy.deepcopy(packed).to(dtype)
        assert not other.is_packed
        x = torch.randn(1, IN, dtype=dtype)
        torch.testing.assert_close(other(x).float(), packed(x.float()), rtol=0.05, atol=0.05)
    assert copy.deepcopy(packed).double().float().is_packed == packed.is_packed
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(torch.randn(1, IN)).dtype is torch.bfloat16
    with pytest.raises(TypeError, match="dtype"):
        packed(torch.randn(1, IN, dtype=torch.float64))
    with pytest.raises(ValueError, match="x"):
        packed(torch.randn(1, IN + 1))


def test_compiled_and_exported():
    made, x = pack(model(6)), torch.randn(1, IN)
    with torch.no_grad():
        expected = made(x)
        torch.testing.assert_close(torch.compile(made, backend="eager", fullgraph=True)(x), expected)
        torch.testing.assert_close(torch.export.export(made, (x,)).module()(x), expected)
        torch.testing.assert_close(torch.fx.symbolic_trace(made[0])(x), made[0](x))
    torch.testing.assert_close(torch.fx.symbolic_trace(made)(x), expected)  # gradients are on


def test_what_cannot_be_packed_is_named():
    with pytest.raises(ValueError, match=r'compress\(model, "sparse"\)'):
        pack(nn.Sequential(nn.Linear(3, 3), MaskedLinear(3, 3)))
    with pytest.raises(TypeError, match="Module"):
        pack(torch.ones(3))
    wide = nn.Sequential(sparse(), sparse().double())
    with pytest.raises(ValueError, match=r"1 of the model's 2 sparse layers cannot be packed: 1: .*model.float\(\)"):
        pack(wide)
    assert type(wide[0]) is SparseLinear
    tied = nn.Sequential(sparse(), sparse())
    tied[1].weight_values = tied[0].weight_values
    with pytest.raises(ValueError, match="shares parameters"):
        pack(tied)
    both = pack(compress(nn.Sequential(MaskedLinear(IN, OUT, mask=torch.rand(OUT, IN) < 0.3)), "sparse"))
    assert type(both[0]) is PackedLinear
