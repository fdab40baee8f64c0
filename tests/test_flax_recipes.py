"""Layers of Flax remember the recipe of their mask, so that a file holds that, as long as it is still the mask."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flax import nnx

from maskedlinear import checkpoint
from maskedlinear.checkpoint import MaskedArray
from maskedlinear.flax import MaskedLinear, SparseLinear, compress, expand, mask_model, prune_model, set_masks
from maskedlinear.masks import Recipe

RECIPE = Recipe("random", sparsity=0.5, seed=3)


def saved_recipe(model: Any, path: Path) -> Recipe | None:
    checkpoint.save(model, path)
    [array] = [array for array in checkpoint.load(path).values() if isinstance(array, MaskedArray)]
    return array.recipe


def masked_convolution() -> Any:
    return mask_model(nnx.Sequential(nnx.Conv(20, 30, (3,), rngs=nnx.Rngs(0))), {"layers.0": RECIPE})


def set_afterwards() -> Any:
    model = mask_model(nnx.Sequential(nnx.Linear(40, 30, rngs=nnx.Rngs(0))))
    set_masks(model, {"layers.0": RECIPE})
    return model


KINDS: dict[str, Callable[[], Any]] = {
    "masked": lambda: MaskedLinear(40, 30, mask=RECIPE, rngs=nnx.Rngs(0)),
    "sparse": lambda: SparseLinear(40, 30, mask=RECIPE, rngs=nnx.Rngs(0)),
    "from_linear": lambda: MaskedLinear.from_linear(MaskedLinear(40, 30, mask=RECIPE, rngs=nnx.Rngs(0))),
    "compress": lambda: compress(MaskedLinear(40, 30, mask=RECIPE, rngs=nnx.Rngs(0)), "sparse"),
    "expand": lambda: expand(SparseLinear(40, 30, mask=RECIPE, rngs=nnx.Rngs(0))),
    "mask_model": masked_convolution,
    "set_masks": set_afterwards,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_has_the_recipe(kind: str, tmp_path: Path) -> None:
    assert saved_recipe(KINDS[kind](), tmp_path / "model") == RECIPE


def test_until_the_mask_is_another(tmp_path: Path) -> None:
    layer = MaskedLinear(40, 30, mask=RECIPE, rngs=nnx.Rngs(0))
    layer.set_mask(np.ones((40, 30), bool))
    assert saved_recipe(layer, tmp_path / "model") is None
    layer.set_mask(RECIPE)
    prune_model(layer, 0.7)
    assert saved_recipe(layer, tmp_path / "model") is None
    layer.set_mask(RECIPE)
    layer.mask.set_value(~layer.mask[...])  # which nobody hears of
    assert saved_recipe(layer, tmp_path / "model") is None


def test_a_recipe_goes_to_torch_and_back(tmp_path: Path) -> None:
    path = tmp_path / "model"
    layer = MaskedLinear(40, 30, mask=RECIPE, rngs=nnx.Rngs(0))
    for other in (MaskedLinear(40, 30, rngs=nnx.Rngs(1)), nnx.Linear(40, 30, rngs=nnx.Rngs(1))):
        checkpoint.save(layer, path)
        checkpoint.load_into(other, path)
        assert saved_recipe(other, path) == RECIPE
    with checkpoint.open(path) as file:
        assert file.entry("kernel").mask.recipe == RECIPE
    back = checkpoint.load_into(torch.nn.Linear(40, 30), path)
    assert (back.mask.numpy() == np.asarray(layer.mask[...]).T).all()
