"""``masks.Recipe``: exact arguments kept, a closed list of names, and layers of both frameworks that take it."""

from __future__ import annotations

import copy
import pickle
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from maskedlinear import masks
from maskedlinear.masks import Recipe
from maskedlinear.models import WeightAxes
from maskedlinear.torch import MaskedLinear, SparseLinear, mask_model, set_masks, unmask_model

RECIPE = Recipe("random", sparsity=0.9, seed=7)
MASK = masks.random((6, 20), sparsity=0.9, seed=7)


@pytest.mark.parametrize("sparsity", [0.1, 1e-5, 0, 1, 0.29, np.float32(0.1), Fraction(1, 3), Decimal("0.29"), "0.29"])
def test_a_recipe_makes_the_mask_of_its_function_and_so_does_what_json_holds(sparsity: Any) -> None:
    given = Fraction(sparsity) if isinstance(sparsity, str) else sparsity
    for recipe in (Recipe("random", sparsity=sparsity, seed=3), Recipe("bernoulli", sparsity=sparsity, seed=3)):
        expected = getattr(masks, recipe.name)((30, 40), sparsity=given, seed=3)
        again = Recipe.from_json(recipe.to_json())
        assert (recipe.make((30, 40)) == expected).all()
        assert (again.make((30, 40)) == expected).all()
        assert again == recipe
        assert hash(again) == hash(recipe)


def test_counts_and_other_ranks() -> None:
    assert (Recipe("random", num_zeros=5).make((2, 8)) == masks.random((2, 8), num_zeros=5)).all()
    assert (Recipe("bernoulli", threshold=9).make((2, 8)) == masks.bernoulli((2, 8), threshold=9)).all()
    assert (RECIPE.make((6, 5, 2, 2)).reshape(6, 20) == MASK).all()
    assert (RECIPE.make((20, 6), WeightAxes(out_axis=1, in_axis=0)) == MASK.T).all()
    stack = RECIPE.make((3, 5, 8), WeightAxes(batch_axis=0, out_axis=2, in_axis=1))
    assert (stack.transpose(0, 2, 1).reshape(24, 5) == masks.random((24, 5), sparsity=0.9, seed=7)).all()
    assert RECIPE.make((6,)).shape == (6,)
    assert RECIPE.make(()).shape == ()
    with pytest.raises(ValueError, match="num_zeros must be from 0"):
        Recipe("random", num_zeros=5).make((1, 4))


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("blocks", {"sparsity": 0.5}, "one of 'random', 'bernoulli'"),
        ("os.system", {"sparsity": 0.5}, "one of 'random', 'bernoulli'"),
        ("random", {}, "exactly one of sparsity and num_zeros; got none"),
        ("random", {"sparsity": 0.5, "num_zeros": 3}, "got sparsity and num_zeros"),
        ("random", {"threshold": 3}, "got threshold"),
        ("random", {"sparsity": 1.5}, r"in \[0, 1\]"),
        ("random", {"sparsity": float("nan")}, r"in \[0, 1\]"),
        ("random", {"sparsity": "1e9999999"}, "at most 99 digits"),
        ("random", {"num_zeros": -1}, "must not be negative"),
        ("bernoulli", {"threshold": (1 << 32) + 1}, "above 2"),
        ("random", {"sparsity": 0.5, "seed": -1}, "seed must be in"),
    ],
)
def test_bad_recipes_are_refused(name: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Recipe(name, **options)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "os.system"},
        {"algorithm": "mask_v2"},
        {"sparsity": 0.9},
        {"seed": 7},
        {"sparsity": "1/0"},
        {"sparsity": "1e9999999"},
        {"seed": "seven"},
        {"seed": str(1 << 64)},
        {"seed": "9" * 5000},
        {"shard": "all"},
        {"num_zeros": "4"},
    ],
)
def test_what_json_holds_is_checked(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        Recipe.from_json(RECIPE.to_json() | change)
    with pytest.raises(ValueError, match="a recipe has"):
        Recipe.from_json([RECIPE.to_json()])


def test_torch_layers_take_and_remember_it() -> None:
    layer = MaskedLinear(20, 6, mask=RECIPE)
    drawn = torch.Generator().manual_seed(0)
    assert (layer.mask.numpy() == MASK).all()
    for kept in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), MaskedLinear.from_linear(layer)):
        assert kept.recipe == RECIPE
    sparse = SparseLinear.from_masked(layer)
    assert sparse.recipe == sparse.to_masked().recipe == SparseLinear(20, 6, mask=RECIPE).recipe == RECIPE
    assert (SparseLinear(20, 6, mask=RECIPE).pattern.to_mask() == MASK).all()
    layer.set_mask(torch.rand(6, 20, generator=drawn) > 0.5)
    assert layer.recipe is None
    layer.set_mask(RECIPE)
    assert layer.recipe == RECIPE
    assert "recipe" not in vars(layer.release())


def test_model_functions_of_torch_take_it() -> None:
    model = nn.Sequential(nn.Linear(20, 6), nn.Conv2d(5, 6, 2), nn.ConvTranspose1d(5, 6, 4))
    mask_model(model, masks=dict.fromkeys("012", RECIPE))
    assert (model[0].mask.numpy() == MASK).all()
    assert (model[1].masked_weight.mask.numpy().reshape(6, 20) == MASK).all()  # type: ignore[union-attr]
    for _ in range(2):
        turned = model[2].masked_weight.mask.numpy()  # type: ignore[union-attr]
        assert (turned.transpose(1, 0, 2).reshape(6, 20) == MASK).all(), "the same connections, whichever axis is which"
        model[2].masked_weight.set_mask(RECIPE)  # type: ignore[operator, union-attr]
    assert model[0].recipe == model[1].masked_weight.recipe == RECIPE  # type: ignore[union-attr]
    other = Recipe("random", sparsity=0.9, seed=8)
    model[0] = SparseLinear.from_masked(model[0])  # type: ignore[arg-type]
    set_masks(model, {"0": other, "1": other})
    assert (model[0].pattern.to_mask() == other.make((6, 20))).all()  # type: ignore[operator, union-attr]
    assert (model[1].masked_weight.mask.numpy() == other.make((6, 5, 2, 2))).all()  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="the mask of 1: num_zeros"):
        set_masks(model, {"1": Recipe("random", num_zeros=1000)})
    unmask_model(model)
    assert not [name for name, _ in model.named_buffers()]


def test_flax_layers_take_it_for_the_same_connections_as_those_of_torch() -> None:
    import jax
    from flax import nnx

    from maskedlinear import flax

    expected = MASK.T
    layer = flax.MaskedLinear(20, 6, mask=RECIPE, rngs=nnx.Rngs(0))
    assert (np.asarray(layer.mask[...]) == expected).all()
    sparse = flax.SparseLinear(20, 6, mask=RECIPE, rngs=nnx.Rngs(0))
    assert (expected == sparse.pattern.to_mask().T).all()
    other = Recipe("random", sparsity=0.9, seed=8)
    flax.set_masks(sparse, {"": other})
    assert (other.make((6, 20)) == sparse.pattern.to_mask()).all()
    model = flax.mask_model(nnx.Sequential(nnx.Linear(20, 6, rngs=nnx.Rngs(0))), masks={"layers.0": RECIPE})
    assert (np.asarray(model.layers[0].mask[...]) == expected).all()
    dense = flax.MaskedDense(6, mask=RECIPE)
    assert (dense.init(jax.random.key(0), np.ones((1, 20), np.float32))["masks"]["mask"] == expected).all()
