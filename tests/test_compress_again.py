"""A choice of forms is the same in every run, can be saved and given again, and needs no dense model to be made of."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from maskedlinear import costs, flax, masks
from maskedlinear import torch as ours
from maskedlinear.pattern import SparsityPattern

MASKS = {"0": masks.random((64, 8), sparsity=0.2, seed=0), "2": masks.random((64, 64), sparsity=0.98, seed=0)}
PATTERNS = {name: SparsityPattern.from_mask(mask) for name, mask in MASKS.items()}
FORMS: dict[str, Any] = {"0": "dense", "2": "sparse"}


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 3))


def test_torch_makes_the_same_model_again_without_values_or_matrices() -> None:
    model = ours.compress(ours.mask_model(plain(), MASKS), forms=FORMS)
    assert ours.get_forms(model) == FORMS
    state, x = model.state_dict(), torch.randn(3, 8)
    kept = json.loads(json.dumps(ours.get_forms(model)))
    with torch.device("meta"):
        fresh, masked = plain(), nn.Sequential(ours.MaskedLinear(8, 64, mask=MASKS["0"]), nn.ReLU())
        masked.extend([ours.MaskedLinear(64, 64, mask=MASKS["2"]), nn.Linear(64, 3)])
    for other in (ours.compress(fresh, forms=kept, patterns=PATTERNS), ours.compress(masked, forms=kept)):
        assert ours.get_forms(other) == FORMS
        assert all(parameter.is_meta for parameter in other.parameters())
        other.load_state_dict(state, assign=True)
        assert torch.equal(other(x), model(x))
        assert {name for name, _ in other.named_parameters()} == {name for name, _ in model.named_parameters()}
    with torch.device("meta"):
        fresh = plain()
    by_costs = ours.get_forms(ours.compress(fresh, patterns=PATTERNS))
    assert by_costs == ours.get_forms(ours.compress(ours.mask_model(plain(), MASKS))), "as where there are weights"
    fresh.to_empty(device="cpu")
    ours.compress(fresh, forms=FORMS).load_state_dict(state)
    assert torch.equal(fresh(x), model(x))
    drawn = plain()
    bias, weight = drawn[2].bias, drawn[2].weight.detach().clone()
    wired = ours.compress(drawn, "sparse", patterns=PATTERNS)
    assert wired[2].bias is bias
    assert torch.equal(wired[2].weight, weight * torch.from_numpy(MASKS["2"]))
    assert ours.get_forms(ours.compress(nn.Linear(8, 64), "dense", patterns={"": PATTERNS["0"]})) == {"": "dense"}


def test_flax_makes_the_same_model_again_of_an_abstract_one() -> None:
    def make() -> Any:
        rngs = nnx.Rngs(0)
        return nnx.Sequential(nnx.Linear(8, 64, rngs=rngs), jnp.tanh, nnx.Linear(64, 64, rngs=rngs))

    patterns = {f"layers.{name}": pattern for name, pattern in PATTERNS.items()}
    forms = {f"layers.{name}": form for name, form in FORMS.items()}
    drawn = make()
    kernel = np.asarray(drawn.layers[2].kernel[...])
    model = flax.compress(drawn, forms=forms, patterns=patterns)
    assert flax.get_forms(model) == forms
    assert np.array_equal(model.layers[2].to_scipy().todense(), kernel.T * MASKS["2"])
    fresh = flax.compress(nnx.eval_shape(make), forms=forms, patterns=patterns)
    assert flax.get_forms(fresh) == forms
    flax.load_state(fresh, nnx.state(model))
    same = jax.tree.map(np.array_equal, *(nnx.to_pure_dict(nnx.state(one)) for one in (fresh, model)))
    assert all(jax.tree.leaves(same)), "all of the state, in the same structure"
    with pytest.raises(ValueError, match=r"layers\.0 cannot be given a pattern: it is masked"):
        flax.compress(model, patterns=patterns)


def test_the_choice_is_made_by_a_rule_and_not_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    from maskedlinear_torch import _models

    monkeypatch.setattr(_models, "measured_seconds", lambda *_: pytest.fail("something was timed"))
    for seed in range(3):
        model = ours.mask_model(plain(), {"0": masks.random((64, 8), sparsity=0.5, seed=seed)})
        assert ours.get_forms(ours.compress(model)) == {"0": "dense"}
    layer = costs.Layer("a", 10, 10, 5, 4, "dense")
    seconds = {"dense": 1.0, "sparse": 2.0}
    shipped = costs.Costs.shipped("torch", "cpu")
    half = shipped.dense[..., None].repeat(len(shipped.densities), -1) / 1.5
    own = replace(shipped, sparse=half, uneven=shipped.uneven * 0 + 1)
    for close, expected in ((False, "sparse"), (True, "dense")):
        chosen = costs.choose_forms([layer], "auto", 8, True, "torch", own, [lambda: seconds], measure_close=close)
        assert chosen[0].form == expected


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"forms": {"0": "csr"}}, ValueError, "a form is 'dense' or 'sparse'; got 'csr' for '0'"),
        ({"forms": {"3": "sparse"}}, ValueError, "forms= names masked layers: 0, 2; got 3 too"),
        ({"forms": FORMS, "format": "dense"}, ValueError, "got both, format='dense'"),
        ({"patterns": PATTERNS}, ValueError, "0 cannot be given a pattern: it is masked"),
        ({"patterns": {"3": PATTERNS["0"]}}, ValueError, r"must have its shape \(out, in\) = \(3, 64\); got \(64, 8\)"),
        (
            {"patterns": {"3": MASKS["0"]}},
            TypeError,
            r"must be a SparsityPattern; got ndarray: .*from_mask",
        ),
        (
            {"patterns": {"head": PATTERNS["0"]}},
            ValueError,
            "patterns are of plain linear layers, by name: 3; got 'head'",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changes(wrong: Any, error: type[Exception], message: str) -> None:
    model = ours.mask_model(plain(), MASKS)
    with pytest.raises(error, match=message):
        ours.compress(model, **wrong)
    assert ours.get_forms(model) == {"0": "dense", "2": "dense"}
    assert type(model[3]) is nn.Linear
