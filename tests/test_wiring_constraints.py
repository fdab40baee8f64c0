"""What a wiring says of its connections, kept in training: pass-through ones stay 1, signs stay, in both frameworks."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from torch import nn

from maskedlinear import flax as mf
from maskedlinear import torch as mt
from maskedlinear.constraints import Constraints
from maskedlinear.jax import freeze_masked
from maskedlinear.masks import LayeredWiring, Wiring

EDGES = [
    ("g1", "a"),
    ("g2", "a"),
    ("g2", "b"),
    ("g3", "top"),
    ("a", "c"),
    ("b", "c"),
    ("c", "top"),
    ("b", "top"),
    ("g4", "c"),
]
LAYERS = LayeredWiring.from_edges(EDGES)
X = np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32)


def has_kept(weights: list[Any]) -> None:
    fixed = [np.asarray(w)[v.pattern.to_mask() & _whole(v, v.fixed)] for w, v in zip(weights, LAYERS, strict=True)]
    assert sum(len(one) for one in fixed) >= 4
    assert all((one == 1).all() for one in fixed)
    moved = [np.asarray(w)[v.mask & ~_whole(v, v.fixed)] for w, v in zip(weights, LAYERS, strict=True)]
    assert all((one != 1).all() for one in moved)


def _whole(wiring: Wiring, entries: Any) -> np.ndarray:
    whole = np.zeros(wiring.pattern.shape, bool)
    whole[wiring.pattern.rows, wiring.pattern.indices] = entries
    return whole


@pytest.mark.parametrize("sparse", [False, True])
def test_pass_through_connections_stay_one_in_torch(sparse: bool) -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for wiring in LAYERS:
        out, in_ = wiring.pattern.shape
        layers += [
            mt.SparseLinear(in_, out, mask=wiring.pattern) if sparse else mt.MaskedLinear(in_, out, mask=wiring.mask),
            nn.Tanh(),
        ]
    network = nn.Sequential(*layers)
    mt.constrain(network, {str(2 * k): wiring for k, wiring in enumerate(LAYERS)})
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(4):
        optimizer.zero_grad()
        (network(torch.from_numpy(X)) - 1).square().sum().backward()
        optimizer.step()
    has_kept([network[2 * k].weight.detach() for k in range(len(LAYERS))])


def test_pass_through_connections_stay_one_in_nnx_in_both_forms() -> None:
    layers: list[Any] = []
    for place, wiring in enumerate(LAYERS):
        out, in_ = wiring.pattern.shape
        if place % 2:
            layers += [mf.SparseLinear(in_, out, pattern=wiring.pattern, rngs=nnx.Rngs(0)), jnp.tanh]
        else:
            layers += [mf.MaskedLinear(in_, out, mask=wiring.mask.T, rngs=nnx.Rngs(0)), jnp.tanh]
    network = nnx.Sequential(*layers)
    mf.constrain(network, {f"layers.{2 * k}": wiring for k, wiring in enumerate(LAYERS)})
    optimizer = nnx.Optimizer(network, freeze_masked(optax.adamw(0.1, weight_decay=0.5)), wrt=nnx.Param)

    @nnx.jit
    def step(network: Any, optimizer: Any) -> None:
        gradients = nnx.grad(lambda network: ((network(X) - 1) ** 2).sum())(network)
        optimizer.update(network, gradients, masks=mf.param_masks(network))

    for _ in range(4):
        step(network, optimizer)
    masked = [one.to_masked() if isinstance(one, mf.SparseLinear) else one for one in network.layers[::2]]
    has_kept([np.asarray(one.kernel[...]).T for one in masked])


def test_a_square_wirings_signs_are_of_the_right_ends() -> None:
    wiring = Wiring.from_edges([("a", "y", 1.5), ("a", "z", -2.0), ("b", "y", -1.0)], ["a", "b"], ["y", "z"])
    signed = Wiring(
        wiring.pattern, wiring.inputs, wiring.outputs, wiring.weights, np.sign(wiring.weights).astype(np.int8)
    )
    torch.manual_seed(0)
    layer = mt.MaskedLinear(2, 2, mask=wiring.mask)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(signed.initial_values(layer.weight.detach())))
    mt.constrain(layer, signed)
    assert layer.weight.tolist() == [[1.5, -1.0], [-2.0, 0.0]]
    ours = mf.MaskedLinear(2, 2, mask=wiring.mask.T, rngs=nnx.Rngs(0))
    ours.kernel[...] = jnp.asarray(signed.initial_values(np.zeros((2, 2), np.float32)).T)
    mf.constrain(ours, signed)
    assert ours.kernel[...].tolist() == [[1.5, -2.0], [-1.0, 0.0]]
    other = mf.MaskedLinear(2, 2, mask=wiring.mask.T, rngs=nnx.Rngs(0))
    mf.constrain(other, Constraints.from_wiring(signed))
    assert (other.constraint_signs[...] == ours.constraint_signs[...]).all()
    with pytest.raises(ValueError, match="give their transpose"):
        freeze_masked(optax.sgd(0.1), constraints={"kernel": Constraints.from_wiring(signed)}).init(
            {"kernel": jnp.ones((2, 2))}
        )
    freeze_masked(optax.sgd(0.1), constraints={"kernel": Constraints.from_wiring(signed).T}).init(
        {"kernel": ours.kernel[...]}
    )
