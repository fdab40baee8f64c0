"""The choice between the two forms: expected times, the choice made of them, and the table that explains it."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskedlinear.costs import LARGEST, Costs, Layer, choose, choose_forms, table

WIDTHS, BATCHES, DENSITIES = (64, 256, 1024), (1, 8, 128), (0.01, 0.1, 0.5)


def made(dense_rate: float = 1e-9, sparse_rate: float = 5e-9, fixed: float = 1e-6, a_feature: float = 0.0) -> Costs:
    """Costs of a machine on which a time is a number of products times a rate, and one row costs half.

    A feature more than a square layer's costs the sparse form ``a_feature`` seconds, twice as much for outputs.
    """
    width, batch = np.meshgrid(WIDTHS, BATCHES, indexing="ij")
    batch = np.where(batch == 1, 0.5, batch)
    products = np.stack([3.0 * width**2 * batch, 1.0 * width**2 * batch])
    density = np.asarray(DENSITIES)
    dense, sparse = products * dense_rate, fixed + products[..., None] * density * sparse_rate
    surplus = 256 * 4 + 256 / 4 - 2 * 256
    longer = sparse[:, 1, :, 1]
    uneven = [dense[:, 1], dense[:, 1], longer + surplus * a_feature, longer + 2 * surplus * a_feature]
    return Costs(
        "torch",
        "cpu",
        "none",
        WIDTHS,
        BATCHES,
        DENSITIES,
        dense,
        sparse,
        np.stack(uneven, axis=1).reshape(2, 2, 2, len(BATCHES)),
    )


def layer(out: int = 256, in_: int = 256, density: float = 0.1, **changed: Any) -> Layer:
    return replace(Layer("layer", out, in_, round(density * out * in_), 4, "dense"), **changed)


def test_expected_times_are_the_measured_ones_and_lie_between_them() -> None:
    costs = made(fixed=1e-12)
    for batch in (1, 8, 128):
        rows = 0.5 if batch == 1 else batch
        for width in (64, 128, 256, 700, 1024, 4096):
            expected = 3e-9 * width**2 * rows
            assert costs.seconds("dense", layer(width, width), batch, True) == pytest.approx(expected, rel=1e-6)
            assert costs.seconds("dense", layer(width, width), batch, False) == pytest.approx(expected / 3, rel=1e-6)
            for density in (0.01, 0.03, 0.1, 0.3, 0.8):
                sparse = costs.seconds("sparse", layer(width, width, density), batch, True)
                assert sparse == pytest.approx(5 * density * expected, rel=1e-2)
    assert costs.seconds("dense", layer(256, 256), 64, True) == pytest.approx(3e-9 * 256**2 * 64)
    assert costs.seconds("dense", layer(256, 256), 512, True) == pytest.approx(3e-9 * 256**2 * 512)
    assert costs.seconds("dense", layer(128, 512), 8, True) == pytest.approx(3e-9 * 256**2 * 8)


@pytest.mark.parametrize("batch", [1, 8, 50])
def test_long_rows_cost_more_by_their_length(batch: int) -> None:
    costs = made(a_feature=1e-7)
    square = costs.seconds("sparse", layer(256, 256), batch, True)
    assert costs.seconds("sparse", layer(64, 1024), batch, True) == pytest.approx(square + 576e-7)
    assert costs.seconds("sparse", layer(1024, 64), batch, True) == pytest.approx(square + 2 * 576e-7)
    assert costs.seconds("dense", layer(64, 1024), batch, True) == costs.seconds("dense", layer(256, 256), batch, True)


def test_no_time_is_below_the_shortest_that_was_measured() -> None:
    costs = made()
    for batch in (1, 2, 4096):
        for out, in_ in ((0, 5), (5, 0), (1, 1), (100_000, 100_000)):
            for connections in (0, min(1, out * in_), out * in_):
                small = replace(layer(out, in_, 0.0), connections=connections)
                for form in ("dense", "sparse"):
                    times = costs.dense if form == "dense" else costs.sparse
                    for training in (True, False):
                        assert costs.seconds(form, small, batch, training) >= times.min() * (1 - 1e-9)


def test_auto_takes_the_faster_form_and_says_by_how_much() -> None:
    costs = made()
    assert choose(layer(density=0.05), "auto", 8, True, costs).form == "sparse"
    few = choose(layer(density=0.5), "auto", 8, True, costs)
    assert (few.form, few.why) == ("dense", "sparse would take 2.5 times as long")
    assert choose(layer(density=0.5), "sparse", 8, True, None).form == "sparse"
    fixed = layer(density=0.01, fixed="it is shared")
    assert (choose(fixed, "auto", 8, True, costs).form, choose(fixed, "auto", 8, True, costs).why) == (
        "dense",
        "it is shared",
    )
    assert choose(fixed, "dense", 8, True, None).form == "dense"


def test_what_is_too_close_to_tell_is_measured_and_nothing_else() -> None:
    costs, asked = made(), []

    def measured() -> dict[str, float]:
        asked.append(1)
        return {"dense": 3e-3, "sparse": 2e-3}

    close, clear = layer(density=0.25), layer(density=0.01)
    assert choose(close, "auto", 8, True, costs).form == "dense"
    found = choose(close, "auto", 8, True, costs, measured)
    assert (found.form, found.why) == ("sparse", "dense takes, as measured here, 1.5 times as long")
    assert found.seconds == measured()
    asked.clear()
    assert choose(clear, "auto", 8, True, costs, measured).form == "sparse"
    assert choose(replace(close, fixed="it is shared"), "auto", 8, True, None, measured).form == "dense"
    assert choose(close, "dense", 8, True, None, measured).form == "dense"
    assert not asked
    assert choose(clear, "auto", 8, True, None, measured).seconds == measured(), "where there are no costs"
    assert len(asked) == 2


def test_a_layer_too_large_to_be_tried_goes_by_its_costs_and_without_them_keeps_its_form() -> None:
    def measured() -> dict[str, float]:
        raise AssertionError("it was tried")

    side = 1 << 14
    assert side * side > LARGEST
    for form in ("dense", "sparse"):
        for density in (1e-6, 1.0):
            found = choose(layer(side, side, density, form=form), "auto", 8, True, None, measured)
            assert (found.form, found.seconds) == (form, {})
            assert found.why.endswith(f"its dense form is too large to be tried: {side * side} weights")
    close = choose(layer(side, side, 0.25), "auto", 8, True, made(), measured)
    assert (close.form, close.why) == ("dense", "sparse would take 1.2 times as long")


def forms(layers: list[Layer], format: Any = "auto", batch: Any = 8, **asked: Any) -> list[str]:
    found = {"costs": None, "measured": None} | asked
    return [choice.form for choice in choose_forms(layers, format, batch, True, "torch", **found)]


def test_layers_that_are_alike_are_measured_once() -> None:
    asked: list[int] = []

    def measure(place: int) -> dict[str, float]:
        asked.append(place)
        return {"dense": 3e-3, "sparse": 2e-3 if place != 2 else 4e-3}

    layers = [layer(), layer(name="other", form="sparse"), layer(connections=9), layer(), layer(dtype="bfloat16")]
    layers.append(layer(device="cuda"))
    layers = [replace(one, device="tpu") if one.device == "cpu" else one for one in layers]  # without costs
    calls = [partial(measure, place) for place in range(len(layers))]
    assert forms(layers, measured=calls) == ["sparse", "sparse", "dense", "sparse", "sparse", "sparse"]
    assert asked == [0, 2, 4, 5]


def test_costs_given_are_for_the_layers_on_their_device() -> None:
    meta = layer(device="meta", fixed="it has no values yet")
    other = replace(made(), framework="jax")
    here, there = layer(density=0.01), layer(device="cuda")
    assert forms([meta, here], costs=made()) == ["dense", "sparse"]
    assert forms([here, there], "dense", costs=other) == ["dense", "dense"], "which needs none"
    assert forms([meta], costs=made()) == ["dense"]
    calls = [lambda: {"dense": 1.0, "sparse": 2.0}] * 2
    assert forms([here, there], costs=made(), measured=calls) == ["sparse", "dense"]
    with pytest.raises(ValueError, match="there are no costs for torch on 'cuda' in the package"):
        forms([here, there], costs=made())
    for layers, costs in (([there], made()), ([here], other)):
        with pytest.raises(ValueError, match=r"costs must be of torch on 'c.*', where the layer is; got those of"):
            forms(layers, costs=costs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((layer(fixed="it is shared"), "sparse", 8, True, None), "layer cannot become sparse: it is shared"),
        ((layer(), "auto", 8, True, None), "needs costs"),
    ],
)
def test_what_cannot_be_chosen_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(*arguments)


@pytest.mark.parametrize("layers", [[], [layer()]])
@pytest.mark.parametrize(
    ("format", "batch", "message"),
    [
        ("csr", 8, "format must be one of 'auto', 'dense', 'sparse'; got 'csr'"),
        ("auto", 0, "batch must be the rows of x in a call, a whole number from 1 on; got 0"),
        ("auto", 2.0, r"got 2\.0"),
        ("sparse", True, "got True"),
    ],
)
def test_what_is_asked_is_checked_whatever_layers_there_are(
    layers: list[Layer], format: Any, batch: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        forms(layers, format, batch)


def test_the_table_counts_bytes_and_flops() -> None:
    choices = [choose(layer(density=0.25), "auto", 8, True, made()), choose(layer(), "dense", 8, True, None)]
    lines = table(choices, 8, True).splitlines()
    assert lines[0] == "A training step on 8 rows of x; dense / sparse"
    connections = 256 * 256 // 4
    dense_bytes, sparse_bytes = 17 * 256 * 256, 16 * connections + 4 * (3 * connections + 514)
    assert f"{dense_bytes / 2**20:.3g} / {sparse_bytes / 2**20:.3g}" in lines[2]
    assert f"{6 * 8 * 256 * 256 / 1e6:.3g} / {6 * 8 * connections / 1e6:.3g}" in lines[2]
    kept = choose(layer(density=0.25, mask_bytes=5, index_bytes=16), "dense", 8, False, None)
    dense_bytes, sparse_bytes = 9 * 256 * 256, 20 * connections + 4 * 514
    assert f"{dense_bytes / 2**20:.3g} / {sparse_bytes / 2**20:.3g}" in table([kept], 8, False)
    assert "- / -" in lines[3]
    assert lines[3].endswith("asked for")
    assert table([], 8, False).splitlines()[-1] == "no masked layers"


def test_a_file_brings_the_costs_back(tmp_path: Path) -> None:
    costs = made()
    costs.save(tmp_path / "costs.json")
    read = Costs.load(tmp_path / "costs.json")
    assert (read.framework, read.widths, read.densities) == ("torch", WIDTHS, DENSITIES)
    np.testing.assert_allclose(read.sparse, costs.sparse, rtol=1e-3)


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_the_package_brings_costs_for_the_cpu(framework: str) -> None:
    costs = Costs.shipped(framework, "cpu")
    wide = layer(2048, 2048, 0.01)
    assert choose(wide, "auto", 256, True, costs).form == "sparse"
    assert choose(layer(2048, 2048, 0.9), "auto", 256, True, costs).form == "dense"
    with pytest.raises(ValueError, match="there are no costs for jax on 'tpu' in the package: measure them once"):
        Costs.shipped("jax", "tpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 1}, "version 1"),
        ({"widths": [64, 64, 1024]}, "ascending"),
        ({"widths": [64, 256]}, "shapes"),
        ({"batches": [2, 8, 128]}, "batch 1"),
        ({"microseconds": {}}, "'dense'"),
        ({"microseconds": None}, "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_holds_something_else_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "costs.json"
    made().save(path)
    found = None if change is None else json.loads(path.read_text(encoding="utf-8")) | change
    path.write_text(json.dumps(found), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        Costs.load(path)
