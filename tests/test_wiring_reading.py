"""Names belong to the layer: what a wiring reads are the connections that a layer has now, in both forms and frameworks."""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx
from torch import nn

from maskedlinear import checkpoint, flax, masks
from maskedlinear import torch as ours
from maskedlinear.masks import Wiring
from maskedlinear.pattern import SparsityPattern

GENES = tuple(f"gene{i}" for i in range(12))
SETS = tuple(f"set{i}" for i in range(7))
MASK = masks.random((7, 12), num_zeros=84 - 30, seed=3)
WIRING = Wiring(SparsityPattern.from_mask(MASK), GENES, SETS)
Edges = dict[tuple[str, str], float]


def truth(weight: Any, mask: Any) -> Edges:
    """What a dense weight and mask, (out, in), say, entry by entry."""
    weight, mask = np.asarray(weight), np.asarray(mask)
    return {(GENES[j], SETS[i]): float(weight[i, j]) for i, j in zip(*np.nonzero(mask), strict=True)}


def named(layer: Any, wiring: Wiring = WIRING, **which: Any) -> Edges:
    edges = list(wiring.edges(layer, **which))
    assert len({edge[:2] for edge in edges}) == len(edges)
    for input, output, weight in edges[::7]:
        assert wiring.weight(layer, input, output, **which) == weight
    assert wiring.follow(layer, **which).pattern.nnz == len(edges)
    return {(input, output): weight for input, output, weight in edges}


def of_torch(layer: Any) -> Edges:
    if isinstance(layer, ours.SparseLinear):
        return truth(layer.weight.detach(), layer.pattern.to_mask())
    return truth(layer.weight.detach(), layer.mask)


def of_nnx(layer: Any) -> Edges:
    layer = layer.to_masked() if isinstance(layer, flax.SparseLinear) else layer
    return truth(layer.kernel[...].T, layer.mask[...].T)


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_names_follow_a_torch_layer_through_its_life(form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    kind = ours.SparseLinear if form == "sparse" else ours.MaskedLinear
    layer = kind(12, 7, mask=MASK)
    assert named(layer) == of_torch(layer)
    before = named(layer)
    for _ in range(3):
        ours.regrow_model(layer, 0.4)
        with torch.no_grad():
            next(layer.parameters()).mul_(1.5)
    after = named(layer)
    assert after == of_torch(layer)
    assert after.keys() != before.keys()
    assert {edge for edge in after if after[edge] != 0} & before.keys(), "those that stay keep their names"
    other = kind(12, 7, mask=masks.random((7, 12), num_zeros=50, seed=9))
    other.load_state_dict(layer.state_dict())
    assert named(other) == after
    checkpoint.save(layer, tmp_path / "layer.safetensors")
    assert named(checkpoint.load_into(kind(12, 7), tmp_path / "layer.safetensors")) == after
    turned = other.to_masked() if isinstance(other, ours.SparseLinear) else ours.SparseLinear.from_masked(other)
    assert named(turned) == after
    assert named(nn.Sequential(copy.deepcopy(turned), nn.ReLU())) == after, "the one weight of a model"
    assert named(nn.ModuleDict({"a": turned, "b": nn.Linear(3, 3)}), name="a") == after
    followed = WIRING.follow(layer)
    assert (followed.inputs, followed.outputs) == (GENES, SETS)
    assert {edge[:2] for edge in followed.edges()} == set(after)
    dense = ours.expand(layer)
    ours.prune_model(dense, 0.8)
    pruned = named(dense)
    assert pruned == of_torch(dense)
    assert len(pruned) == 17
    gone = next(edge for edge in before if edge not in pruned)
    with pytest.raises(KeyError, match=r"has no connection from .* any more"):
        WIRING.weight(dense, *gone)
    assert named(dense.bfloat16()) == pytest.approx(pruned, rel=0.01)


def test_names_follow_a_flax_layer_through_its_life(tmp_path: Path) -> None:
    layer = flax.SparseLinear(12, 7, mask=MASK.T, rngs=nnx.Rngs(0))
    assert named(layer) == of_nnx(layer)
    flax.regrow_model(layer, 0.5)
    after = named(layer)
    assert after == of_nnx(layer)
    assert after.keys() != truth(MASK, MASK).keys()
    checkpoint.save(layer, tmp_path / "layer.safetensors")
    assert named(checkpoint.load_into(ours.SparseLinear(12, 7), tmp_path / "layer.safetensors")) == after
    dense = layer.to_masked()
    assert named(nnx.Sequential(dense, nnx.relu)) == after
    dense.set_mask(MASK.T)
    assert named(dense) == of_nnx(dense) != after
    graph, state = nnx.split(dense)
    with pytest.raises(TypeError, match="outside transforms"):
        jax.jit(lambda state: len(list(WIRING.edges(nnx.merge(graph, state)))))(state)


def test_names_in_linen_variables_and_in_weights_of_other_modules() -> None:
    model = flax.MaskedDense(7, mask=MASK.T)
    variables = model.init(jax.random.key(0), jnp.ones((1, 12)))
    expected = truth(variables["params"]["kernel"].T, MASK)
    assert named(variables) == expected
    variables = flax.set_masks(variables, {"": jnp.asarray(masks.random((7, 12), num_zeros=60, seed=1).T)})
    assert named(variables) == truth(variables["params"]["kernel"].T, variables["masks"]["mask"].T)
    nested = {
        "params": {"a": variables["params"], "b": {"kernel": jnp.ones((3, 3))}},
        "masks": {"a": variables["masks"]},
    }
    assert named(nested) == named(nested, name="a") == named(variables)
    with pytest.raises(TypeError, match="the variables of a linen one"):
        WIRING.edges(linen.Dense(7))
    cell = nn.RNNCell(12, 7)
    recurrent = masks.random((7, 7), num_zeros=40, seed=2)
    ours.mask_model(cell, {"weight_ih": MASK, "weight_hh": recurrent})
    assert named(cell, name="weight_ih") == truth(cell.weight_ih.detach(), MASK)
    square = Wiring(SparsityPattern.from_mask(recurrent), SETS, SETS)
    assert len(list(square.edges(cell, name="weight_hh"))) == 9
    with pytest.raises(ValueError, match="there are 2 here: weight_ih, weight_hh"):
        WIRING.edges(cell)
    with pytest.raises(ValueError, match="name= must be that of a weight"):
        WIRING.edges(cell, name="weight")


def test_names_follow_shrink() -> None:
    torch.manual_seed(0)
    first, second = MASK.copy(), np.ones((4, 7), bool)
    first[2] = second[:, 5] = False
    second[1, 0] = False
    layers = (ours.MaskedLinear(3, 12), ours.MaskedLinear(12, 7, mask=first), ours.MaskedLinear(7, 4, mask=second))
    small = ours.shrink(nn.Sequential(*layers[:2], nn.Tanh(), layers[2]), torch.ones(1, 3))
    old, new = layers[1], small[1]
    assert new.out_features == 5
    assert new.in_features < 12
    left = {edge: weight for edge, weight in named(old).items() if edge[1] not in ("set2", "set5")}
    assert named(new) == named(ours.compress(copy.deepcopy(small), "sparse")[1]) == left
    followed = WIRING.follow(new)
    assert followed.pattern.shape == (5, new.in_features)
    assert named(new, followed) == left
    assert (
        named(new, WIRING.restrict(new.kept_nodes.inputs, [name for name in SETS if name in followed.outputs])) == left
    )
    small[3].set_mask(small[3].mask & torch.tensor([True, False, True, True, True]))
    again = ours.shrink(small, torch.ones(1, 3))[1]
    twice = {edge: weight for edge, weight in left.items() if edge[1] != followed.outputs[1]}
    assert named(again) == twice, "and what is shrunk twice"
    fresh = ours.MaskedLinear(new.in_features, 5)
    fresh.load_state_dict(new.state_dict())
    with pytest.raises(ValueError, match=r"got \(5, 10\): of a layer with fewer nodes, first wiring.restrict"):
        WIRING.edges(fresh)
    assert named(fresh, followed) == left


def test_arrays_say_which_entries_are_connections_or_are_refused() -> None:
    layer = ours.MaskedLinear(12, 7, mask=MASK)
    sparse = ours.SparseLinear.from_masked(layer)
    expected = of_torch(layer)
    assert named(layer.weight) == named(layer.weight.detach().numpy()) == expected
    assert named(sparse.weight_values, pattern=sparse.pattern) == expected
    assert named(ours.unmask_model(copy.deepcopy(layer))) == expected, (
        "a plain layer has the wiring's connections or none"
    )
    assert named(flax.MaskedLinear.from_linear(nnx.Linear(12, 7, rngs=nnx.Rngs(0)), MASK.T).kernel[...].T)
    with pytest.raises(ValueError, match=r"do not say whose they are.*pass the layer itself"):
        WIRING.edges(sparse.weight_values)
    ours.prune_model(layer, 0.8)
    with pytest.raises(ValueError, match=r"13 of the 30 connections 0 .*and 0 other entries.*mask="):
        WIRING.edges(layer.weight)
    assert named(layer.weight, mask=layer.mask) == of_torch(layer)
    assert len(named(layer.weight, mask=WIRING.mask)) == 30
    with pytest.raises(ValueError, match=r"0 of the 30 connections 0 .*and 54 other"):
        WIRING.edges(nn.Linear(12, 7))
    for wrong, message in (
        (lambda: WIRING.edges(layer, mask=layer.mask), "this layer has its own"),
        (lambda: WIRING.edges(layer.weight.T), "the weight's transpose"),
        (lambda: WIRING.edges(layer.weight, mask=layer.mask.T), "the weight's transpose"),
        (lambda: WIRING.edges(layer.weight[:, 1:], mask=layer.mask), "values must have the shape"),
        (lambda: WIRING.edges(layer.weight, mask=MASK, pattern=WIRING.pattern), "got both"),
        (lambda: WIRING.edges(mask=MASK), "are of a layer"),
        (lambda: WIRING.edges(layer.weight, name="a"), "name= is for models"),
        (lambda: WIRING.edges(ours.MaskedLinear(12, 7, mask=MASK, device="meta")), "on the meta device"),
        (lambda: WIRING.edges(nn.ReLU()), "a model without any"),
        (lambda: WIRING.edges(layer, top=-1), "top must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    with pytest.raises(TypeError, match="must be arrays of real numbers"):
        WIRING.edges("layer")


def test_a_table_and_the_strongest_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = ours.SparseLinear(12, 7, pattern=WIRING.pattern)
    with torch.no_grad():
        layer.weight_values[4] = 100
    ordered = sorted(WIRING.edges(layer), key=lambda edge: -abs(edge[2]))
    assert list(WIRING.edges(layer, top=5)) == ordered[:5]
    fixed = replace(WIRING, fixed=np.arange(30) == 4, signs=np.where(np.arange(30) % 2, 1, -1))
    assert list(fixed.edges(layer, top=5)) == ordered[1:6], "what is fixed was not learnt"
    assert list(fixed.edges(layer, top=5, keep_fixed=True)) == ordered[:5]
    assert len(list(fixed.edges(layer))) == 30
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=dict))
    ours.regrow_model(layer, 0.2)
    table = fixed.to_pandas(layer, sort=True)
    assert list(table) == ["input", "output", "weight", "in_wiring", "fixed", "sign"]
    assert {len(column) for column in table.values()} == {29}
    assert (np.diff(np.abs(table["weight"])) <= 0).all()
    assert 0 < (~table["in_wiring"]).sum() == (table["sign"] == 0).sum() < 10
    for input, output, weight, own in zip(*(table[name] for name in list(table)[:4]), strict=True):
        assert WIRING.weight(layer, input, output) == weight
        assert own == bool(MASK[SETS.index(output), GENES.index(input)])
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pandas"):
        WIRING.to_pandas(layer)


def test_a_wiring_in_a_file_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "wiring.json"
    WIRING.save(path)
    assert Wiring.load(path) == WIRING
    numbered = Wiring.from_edges([(1, "b"), (2, "c")])  # type: ignore[list-item]
    numbered.save(path)
    assert Wiring.load(path) == numbered
    with pytest.raises(TypeError, match="strings or whole numbers; got"):
        Wiring.from_edges([(("a", 1), "b")]).save(path)  # type: ignore[list-item]
    assert Wiring.load(path) == numbered, "which stays when another cannot be saved"
    good = path.read_text(encoding="utf-8")
    change: Callable[[str], str]
    for change, message in (
        (lambda text: text[:-9], "no file of a wiring"),
        (lambda text: "[]", "must say version 1"),
        (lambda text: text.replace('wiring":1', 'wiring":2'), "version 1 .* it says 2"),
        (lambda text: text.replace('["b","c"]', '["b","b"]'), "once each"),
        (lambda text: text.replace('["b","c"]', '["b"]'), "a name for each"),
        (lambda text: text.replace('"<i4"', '"|O"'), "must have a dtype"),
        (lambda text: text.replace('"data":"A', '"data":"*'), "cannot be read"),
        (lambda text: text.replace('"indices"', '"others"'), "must be whole numbers"),
        (lambda text: text.replace('"arrays":{', '"arrays":{"z":{"dtype":"|b1","data":""},'), "does not know: update"),
    ):
        assert change(good) != good
        path.write_text(change(good), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            Wiring.load(path)


def test_a_picture_of_a_named_sub_network(tmp_path: Path) -> None:
    after = Wiring(SparsityPattern.from_mask(np.ones((2, 7), bool)), SETS, ("$up_{", "down"), fixed=np.arange(14) < 2)
    layers = [WIRING.mask * np.linspace(-1, 2, 84).reshape(7, 12), np.linspace(3, -1.0, 14).reshape(2, 7)]
    figure = masks.plot_wirings([WIRING, after], layers, around="gene3", top=3, path=tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    axes = figure.axes[0]
    names = {text.get_text() for text in axes.texts}
    strongest = [edge for edge in WIRING.edges(layers[0], top=30) if edge[0] == "gene3"][:3]
    assert {"gene3"} | {edge[1] for edge in strongest} <= names
    assert names & {"$up_{", "down"}
    assert not names & (set(GENES) - {"gene3"})
    lines = [line for line in axes.lines if len(line.get_xdata()) > 1]
    widths = {line.get_color(): line.get_linewidth() for line in lines if line.get_linestyle() == "-"}
    assert len(lines) >= 6
    assert len(widths) == 2, "red above 0, blue below"
    assert any(line.get_linestyle() == "--" for line in lines), "what is fixed is there, and looks fixed"
    assert len([line for line in WIRING.plot(layers[0], top=5).axes[0].lines if len(line.get_xdata()) > 1]) == 5
    with pytest.raises(KeyError, match="no node 'gene99'"):
        WIRING.plot(layers[0], around="gene99")
    with pytest.raises(ValueError, match="no output of number 0 is an input of the next"):
        masks.plot_wirings([after, WIRING])


def test_a_checkpoint_keeps_the_names_of_its_layers(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = nn.Sequential(ours.SparseLinear(12, 7, pattern=WIRING.pattern), nn.Linear(7, 3))
    ours.regrow_model(model, 0.4)
    checkpoint.save(model, path, wirings={"0": WIRING}, metadata={"author": "me"})
    assert checkpoint.wirings(path) == {"0": WIRING}
    with checkpoint.open(path) as file:
        assert file.metadata == {"author": "me"}
    plain = checkpoint.load_into(nn.Sequential(nn.Linear(12, 7), nn.Linear(7, 3)), path)
    assert named(plain[0], checkpoint.wirings(path)["0"]) == of_torch(model[0])
    checkpoint.save(checkpoint.load(path), path, wirings=checkpoint.wirings(path))
    assert checkpoint.wirings(path) == {"0": WIRING}
    checkpoint.save({"a": np.ones(3)}, tmp_path / "arrays.safetensors")
    assert checkpoint.wirings(tmp_path / "arrays.safetensors") == {}
    for wrong, error, message in (
        ({"1": WIRING}, ValueError, r"must have the layer's shape \(out, in\) = \(3, 7\); got \(7, 12\): .*follow"),
        ({"2": WIRING}, ValueError, "name= must be that of a weight"),
        ({"0": MASK}, TypeError, "wirings= has a maskedlinear.masks.Wiring"),
    ):
        with pytest.raises(error, match=message):
            checkpoint.save(model, path, wirings=wrong)
    assert checkpoint.wirings(path) == {"0": WIRING}, "the file is as it was"
    with pytest.raises(TypeError, match="a tree of parameters has none"):
        checkpoint.save({"a": {"kernel": jnp.ones((2, 2))}}, path, wirings={"a": WIRING})
