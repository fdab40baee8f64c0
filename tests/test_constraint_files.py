"""Constraints in files: from PyTorch to nnx and back, in both forms; never dropped without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from maskedlinear import flax as mf
from maskedlinear import torch as mt
from maskedlinear.checkpoint import load_into, save
from maskedlinear.cli import main
from maskedlinear.constraints import Constraints, dale
from test_torch_constraints import ALL, IN, MASK, OUT, model


def entries(network: Any) -> Any:
    """The constraints of the first layer, as whole arrays, (out, in)."""
    if isinstance(network, nn.Module):
        layer = network[0]
        return layer.constraints.entries(layer.pattern if hasattr(layer, "pattern") else (OUT, IN)), layer.weight
    layer = network.layers[0]
    masked = layer.to_masked() if isinstance(layer, mf.SparseLinear) else layer
    arrays = {
        kind: np.asarray(getattr(masked, f"constraint_{kind}")[...])
        for kind in ("fixed", "signs", "ties", "lower", "upper")
    }
    return Constraints(**arrays).T.entries((OUT, IN)), np.asarray(masked.kernel[...]).T


def on_mask(array: np.ndarray) -> np.ndarray:
    """Of live connections in the order of (out, in), in float32, as Flax has them."""
    return (array if array.ndim == 1 else array[MASK]).astype(np.float32)


def flax_model(sparse: bool) -> Any:
    layer: Any = mf.MaskedLinear(IN, OUT, mask=MASK.T, rngs=nnx.Rngs(0))
    return nnx.Sequential(mf.SparseLinear.from_masked(layer) if sparse else layer)


@pytest.mark.parametrize(("here", "there"), [(False, True), (True, False)])
def test_torch_to_nnx_and_back(here: bool, there: bool, tmp_path: Path) -> None:
    given = Constraints(fixed=ALL.fixed, ties=ALL.ties, upper=ALL.upper, signs=ALL.signs, lower=np.full((1, IN), -5.0))
    source = model(here, given)
    save(source, tmp_path / "torch.mlin")
    target = load_into(flax_model(there), tmp_path / "torch.mlin")
    got, weight = entries(target)
    own, start = entries(source)
    assert np.array_equal(weight, start.detach().numpy())
    for kind in ("fixed", "signs", "lower", "upper"):
        np.testing.assert_array_equal(on_mask(getattr(got, kind)), on_mask(getattr(own, kind)))
    groups = on_mask(own.ties), on_mask(got.ties)
    assert len(set(zip(*groups, strict=True))) == len(set(groups[0])) == 3
    if there:
        assert target.layers[0].constraint_lower.shape == (IN, 1), "kept for each input, also of connections that grow"
    save(target, tmp_path / "nnx.mlin")
    again = model(here, None)
    load_into(again, tmp_path / "nnx.mlin")
    back, weight = entries(again)
    assert torch.equal(weight, start)
    assert again[0].constraints.lower.shape == (1, IN)
    for kind in ("fixed", "signs", "lower", "upper"):
        np.testing.assert_array_equal(on_mask(getattr(back, kind)), on_mask(getattr(own, kind)))
    fresh = load_into(flax_model(there), tmp_path / "nnx.mlin")
    np.testing.assert_array_equal(on_mask(entries(fresh)[0].ties), on_mask(got.ties))


def test_other_modules_plain_models_and_those_that_hold_none(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Linear(4, 4))
    mt.mask_model(network)
    mt.prune_model(network, 0.3)
    mt.constrain(network, {"0": Constraints(signs=np.array([1, -1])[None, :, None, None]), "1": dale([1, 1, -1, -1])})
    save(network, tmp_path / "torch.mlin")
    plain = nnx.Sequential(nnx.Conv(2, 3, (3, 3), rngs=nnx.Rngs(0)), nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    load_into(plain, tmp_path / "torch.mlin")
    assert plain.layers[1].constraint_signs.shape == (4, 1)
    assert (plain.layers[0].kernel_constraint_signs[...] == jnp.array([1, -1])[:, None]).all()
    save(plain, tmp_path / "nnx.mlin")
    assert not main(["diff", str(tmp_path / "torch.mlin"), str(tmp_path / "nnx.mlin")]), "they say the same"
    again = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Linear(4, 4))
    load_into(again, tmp_path / "nnx.mlin")
    assert again[1].constraints.signs.shape == (1, 4)
    assert (again.get_submodule("0.masked_weight").constraints.entries((3, 2, 3, 3)).signs[:, 1] == -1).all()
    tree = {
        "0": {"kernel": jnp.zeros((3, 3, 2, 3)), "bias": jnp.zeros(3)},
        "1": {"kernel": jnp.zeros((4, 4)), "bias": jnp.zeros(4)},
    }
    for one in (tree, {"params": tree}):
        with pytest.warns(UserWarning, match="have constraints in the file, which .* cannot hold"):
            load_into(one, tmp_path / "torch.mlin")
