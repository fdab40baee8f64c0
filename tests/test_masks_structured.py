"""Masks with a structure, of whole networks, of distributions over layers: by what defines each of them."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import pytest
import torch
import zuko
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from maskedlinear import masks
from maskedlinear.pattern import SparsityPattern

sizes = st.integers(0, 12)


def digest(found: Any) -> str:
    whole = hashlib.sha256()
    for mask in found if isinstance(found, list) else [found]:
        whole.update(repr(mask.shape).encode() + np.packbits(mask).tobytes())
    return whole.hexdigest()[:16]


@given(out=sizes, in_=st.integers(0, 40), share=st.floats(0, 1), seed=st.integers(0, 2**64 - 1))
def test_a_constant_fan_in_is_constant_and_nested(out: int, in_: int, share: float, seed: int) -> None:
    inputs = round(share * in_)
    mask = masks.constant_fan_in((out, in_), inputs, seed=seed)
    assert mask.shape == (out, in_)
    assert (mask.sum(axis=1) == inputs).all()
    if inputs < in_:
        assert (masks.constant_fan_in((out, in_), inputs + 1, seed=seed) >= mask).all()
    words = masks.words(seed, 0, out * in_).reshape(out, in_)
    for row in range(out):
        order = sorted(range(in_), key=lambda i: (words[row, i], i))
        assert set(np.flatnonzero(mask[row])) == set(order[in_ - inputs :])


@given(out=sizes, groups=st.integers(0, 6), m=st.integers(1, 8), share=st.floats(0, 1))
def test_every_group_of_an_n_m_mask_has_n(out: int, groups: int, m: int, share: float) -> None:
    n = round(share * m)
    mask = masks.n_of_m((out, groups * m), n, m, seed=3)
    assert (mask.reshape(-1, m).sum(axis=1) == n).all()


def test_structured_masks_made_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from maskedlinear.masks import _structured

    whole = [masks.constant_fan_in((9, 30), 7, seed=5), masks.n_of_m((9, 30), 2, 5, seed=5)]
    monkeypatch.setattr(_structured, "_CHUNK", 64)
    assert all(
        (one == other).all()
        for one, other in zip(
            whole, [masks.constant_fan_in((9, 30), 7, seed=5), masks.n_of_m((9, 30), 2, 5, seed=5)], strict=True
        )
    )


@given(rows=st.integers(1, 5), columns=st.integers(1, 5), height=st.integers(1, 4), width=st.integers(1, 4))
def test_blocks_are_whole_and_as_many_as_asked_for(rows: int, columns: int, height: int, width: int) -> None:
    mask = masks.blocks((rows * height, columns * width), (height, width), sparsity=0.5, seed=1)
    grid = mask.reshape(rows, height, columns, width)
    assert (grid.all(axis=(1, 3)) == grid.any(axis=(1, 3))).all()
    assert int((~grid.any(axis=(1, 3))).sum()) == rows * columns // 2


@pytest.mark.parametrize(
    ("grid", "options"),
    [
        ((7,), {"size": 3}),
        ((7, 6), {"size": 3, "stride": 2, "padding": 1}),
        ((6, 8), {"size": (2, 3), "stride": (1, 2), "dilation": (2, 1), "channels": (2, 3)}),
        ((5, 5), {"size": 3, "padding": "same", "channels": (1, 2)}),
        ((3, 4, 5), {"size": 2, "stride": (1, 2, 1)}),
    ],
)
def test_a_receptive_field_is_that_of_a_convolution(grid: tuple[int, ...], options: dict[str, Any]) -> None:
    in_channels, out_channels = options.get("channels", (1, 1))
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(grid) - 1]
    names = {"size": "kernel_size"}
    torch_options = {names.get(name, name): value for name, value in options.items() if name != "channels"}
    convolution = kind(in_channels, out_channels, bias=False, **torch_options)
    nn.init.ones_(convolution.weight)
    x = torch.zeros(1, in_channels, *grid)
    jacobian = torch.autograd.functional.jacobian(lambda x: convolution(x).reshape(-1), x)
    wanted = jacobian.reshape(jacobian.shape[0], -1) != 0
    assert (masks.receptive_field(grid, **options) == wanted.numpy()).all()


def depends(found: list[np.ndarray[Any, Any]]) -> Any:
    reached = np.eye(found[0].shape[1], dtype=np.int64)
    for mask in found:
        reached = np.minimum(mask.astype(np.int64) @ reached, 1)
    return reached.astype(bool)


@pytest.mark.parametrize("order", [None, [2, 0, 3, 1]])
def test_an_autoregressive_network_depends_on_what_comes_before(order: list[int] | None) -> None:
    found = masks.autoregressive(4, (16, 16), multiplier=2, order=order, context=3)
    assert [mask.shape for mask in found] == [(16, 7), (16, 16), (8, 16)]
    places = np.arange(4) if order is None else np.array(order)
    before = places[:, None] > places[None, :]
    assert (depends(found)[:, :4] == np.repeat(before, 2, axis=0)).all()
    assert depends(found)[:, 4:].all(), "the first feature's outputs depend on the context, too"
    assert [mask.shape for mask in masks.autoregressive(4, ())] == [(4, 4)]
    assert not masks.autoregressive(1, (3,))[0].any()


@given(data=st.data(), out=st.integers(1, 6), in_=st.integers(1, 6))
def test_a_factored_network_depends_on_what_it_may(data: st.DataObject, out: int, in_: int) -> None:
    bits = data.draw(st.lists(st.booleans(), min_size=out * in_, max_size=out * in_).filter(any))
    adjacency = np.array(bits).reshape(out, in_)
    assert (depends(masks.from_adjacency(adjacency, (40, 40))) == adjacency).all()
    assert not (depends(masks.from_adjacency(adjacency, (2,))) & ~adjacency).any()


def test_the_stacks_of_zuko_and_nflows_are_reproduced() -> None:
    # Digests of the masks that nflows 0.14 builds with MADE(features=5, hidden_features=12, num_blocks=2,
    # output_multiplier=3) and zuko 1.5.0 with MaskedMLP(adjacency, (12, 9)).
    assert digest(masks.autoregressive(5, (12,) * 5, multiplier=3)) == NFLOWS
    adjacency = np.random.default_rng(0).random((6, 7)) < 0.4
    assert digest(masks.from_adjacency(adjacency, (12, 9))) == ZUKO


@pytest.mark.parametrize("context", [0, 2])
def test_random_degrees_are_the_papers(context: int) -> None:
    stacks = [masks.autoregressive(6, (40, 40), degrees="random", seed=seed, context=context) for seed in (0, 1, 0)]
    assert all(np.array_equal(a, b) for a, b in zip(stacks[0], stacks[2], strict=True))
    assert not np.array_equal(stacks[0][0], stacks[1][0])
    for found in stacks:
        reached = depends(found)
        assert np.array_equal(reached[:, :6], np.tri(6, k=-1, dtype=bool)), (
            "wide enough for every dependency, and no more"
        )
        degrees = found[0][:, :6].sum(1)  # a node of degree d sees the first d features
        assert degrees.min() >= (0 if context else 1)
        assert degrees.max() == 5
        assert len(set(degrees[:6])) < 6 or list(degrees[:5]) != sorted(degrees[:5]), "not cyclic"
        own = np.array([degrees[row].max(initial=0) for row in found[1]])
        assert np.array_equal(found[1], own[:, None] >= degrees)
    with pytest.raises(ValueError, match="degrees must be 'cyclic' or 'random'; got 'any'"):
        masks.autoregressive(6, (4,), degrees="any")  # type: ignore[arg-type]


@pytest.mark.parametrize("hidden", [(9,), (8, 8, 8), (3, 7, 7, 5), (7, 2, 2)])
def test_residual_stacks_are_those_of_zuko(hidden: tuple[int, ...]) -> None:
    for seed in range(5):
        adjacency = np.random.default_rng(seed).random((5, 7)) < 0.5
        net = zuko.nn.MaskedMLP(torch.tensor(adjacency), hidden, residual=True)
        want = [layer.mask.numpy() for layer in net.modules() if isinstance(layer, zuko.nn.MaskedLinear)]
        found = masks.from_adjacency(adjacency, hidden, residual=True)
        assert len(found) == len(want)
        assert all(np.array_equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "channels": (2, 3)}, {"padding": "same", "channels": (3, 1)}],
)
def test_receptive_fields_are_the_same_without_a_matrix(options: dict[str, Any]) -> None:
    dense = masks.receptive_field((7, 9), 3, **options)
    sparse = masks.receptive_field_pattern((7, 9), 3, **options)
    assert sparse == SparsityPattern.from_mask(dense)
    assert masks.receptive_field_pattern((224, 224), 3, padding="same").nnz == (3 * 224 - 2) ** 2


NFLOWS, ZUKO = "212b561db18f63d8", "f83da472e71030a5"


def test_erdos_renyi_shares_add_up_and_follow_the_rule() -> None:
    shapes = [(300, 784), (100, 300), (10, 100)]
    zeros = masks.erdos_renyi_num_zeros(shapes, 0.9)
    total = sum(math.prod(shape) for shape in shapes)
    assert sum(zeros) == math.floor(0.9 * total)
    live = [math.prod(shape) - count for shape, count in zip(shapes, zeros, strict=True)]
    assert live[2] == 1000, "the smallest layer would get more than it has places for"
    assert live[0] / live[1] == pytest.approx(1084 / 400, rel=1e-3)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=6),
    st.fractions(0, 1, max_denominator=50),
)
def test_erdos_renyi_is_exact_and_within_each_layer(shapes: list[tuple[int, int]], sparsity: Any) -> None:
    zeros = masks.erdos_renyi_num_zeros(shapes, float(sparsity))
    sizes_ = [math.prod(shape) for shape in shapes]
    assert all(0 <= count <= size for count, size in zip(zeros, sizes_, strict=True))
    assert abs(sum(zeros) - float(sparsity) * sum(sizes_)) <= 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: masks.constant_fan_in((3, 4), 5),
            ValueError,
            "inputs must be from 0 to the layer's number of inputs, 4; got 5",
        ),
        (lambda: masks.constant_fan_in((3, 4), 1.5), TypeError, r"inputs must be an integer; got 1\.5"),
        (lambda: masks.n_of_m((3, 6), 2, 4), ValueError, "multiple of m = 4; got 6"),
        (lambda: masks.n_of_m((3, 8), 5, 4), ValueError, "n from 0 to m"),
        (
            lambda: masks.blocks((4, 6), (4, 4), sparsity=0.5),
            ValueError,
            r"must divide into blocks; got blocks of \(4, 4\)",
        ),
        (lambda: masks.blocks((4, 4), 2, sparsity=0.5), ValueError, r"\(outputs, inputs\); got 2"),  # type: ignore[arg-type]
        (lambda: masks.receptive_field((4, 4), 5), ValueError, "must fit into the grid's 4 places"),
        (lambda: masks.receptive_field((4, 4), 2, padding="same"), ValueError, "to be even"),
        (lambda: masks.receptive_field((4, 4), (2, 2, 2)), ValueError, "one for each of the grid's 2 dimensions"),
        (lambda: masks.receptive_field((4, 0), 1), ValueError, "from 1 on"),
        (lambda: masks.receptive_field((4, 4), 2, stride=0), ValueError, "stride must be 1 or more"),
        (lambda: masks.receptive_field((4, 4), 2, channels=(0, 1)), ValueError, "channels"),
        (lambda: masks.autoregressive(0, (3,)), ValueError, "features and hidden layers must have sizes from 1 on"),
        (lambda: masks.autoregressive(3, (3,), order=[0, 1, 1]), ValueError, "permutation of 0 to 2"),
        (lambda: masks.autoregressive(3, (3,), multiplier=0), ValueError, "multiplier"),
        (lambda: masks.from_adjacency([[0, 0]], (3,)), ValueError, "some of them 1"),
        (lambda: masks.from_adjacency([[0, 2]], (3,)), ValueError, "0s and 1s"),
        (lambda: masks.erdos_renyi_num_zeros([(3, 4)], 1.5), ValueError, r"in \[0, 1\]; got 1\.5"),
        (lambda: masks.erdos_renyi_num_zeros([(-1, 4)], 0.5), ValueError, "negative"),
    ],
)
def test_what_makes_no_mask_is_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
