"""Masked connections come back where their scores say so: as PyTorch's, in nnx and in linen's variables."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from maskedlinear import masks, pruning
from maskedlinear import torch as in_torch
from maskedlinear.flax import MaskedLinear, get_masks, prune_model, summary
from maskedlinear.masks import Wiring


def test_connections_come_back_with_their_values_as_in_pytorch() -> None:
    rng = np.random.default_rng(0)
    weight, gradient = rng.standard_normal((2, 6, 8)).astype(np.float32)
    mask = masks.random((6, 8), sparsity=0.5, seed=1)
    scores = {"": pruning.movement(weight, gradient)}
    theirs = in_torch.MaskedLinear(8, 6, bias=False, mask=mask)
    ours = MaskedLinear(8, 6, mask=mask.T, use_bias=False, rngs=nnx.Rngs(0))
    ours.kernel.set_value(jnp.asarray(weight.T * mask.T))
    assert ours.dormant is not None
    ours.dormant.set_value(jnp.asarray(weight.T * ~mask.T))
    with torch.no_grad():
        theirs.set_mask(np.ones_like(mask))
        theirs.weight.copy_(torch.from_numpy(weight))
        theirs.set_mask(mask)
    variables = {
        "params": {"layer": {"kernel": jnp.asarray(weight.T * mask.T)}},
        "masks": {"layer": {"kernel_mask": jnp.asarray(mask.T)}},
        "dormant": {"layer": {"kernel_dormant": jnp.asarray(weight.T * ~mask.T)}},
    }
    in_torch.prune_model(theirs, 0.4, score=scores, keep_masked=False)
    prune_model(ours, 0.4, score=scores, keep_masked=False)
    after = prune_model(variables, 0.4, score={"layer": scores[""]}, keep_masked=False)
    new = theirs.mask.numpy()
    assert (new & ~mask).any()
    for kernel, found in (
        (ours.kernel[...], ours.mask[...]),
        (after["params"]["layer"]["kernel"], get_masks(after)["layer"]),
    ):
        np.testing.assert_array_equal(np.asarray(found).T, new)
        np.testing.assert_array_equal(np.asarray(kernel).T, np.where(new, weight, 0))
    prune_model(ours, 0.2, keep_masked=False, of="weights")
    assert summary(ours).weight_sparsity == pytest.approx(9 / 48)  # floor(0.2 * 48)
    with pytest.raises(ValueError, match="pruning only removes connections"):
        prune_model(ours, 0.1)


def test_what_holds_no_masks_is_named() -> None:
    wiring = Wiring.from_edges([("a", "p"), ("b", "p")])
    with pytest.raises(TypeError, match=r"linen's variables with their masks"):
        list(wiring.edges({"kernel": jnp.ones((2, 1))}))
    given = torch.full((3, 4), 0.5, requires_grad=True)
    np.testing.assert_array_equal(
        masks.bernoulli((3, 4), probabilities=given, seed=2),  # type: ignore[arg-type]
        masks.bernoulli((3, 4), sparsity=0.5, seed=2),
    )
