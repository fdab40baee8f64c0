"""``maskedlinear bench``: what it measures, prints and draws, on cases that take no time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from maskedlinear.bench import SETS, cases, jax_layers, measure, torch_layers
from maskedlinear.bench.cases import Case
from maskedlinear.bench.command import choices, machine, tables
from maskedlinear.bench.costs import measure_costs
from maskedlinear.bench.peak import peak
from maskedlinear.bench.plots import crossover, draw
from maskedlinear.cli import main

TINY = [Case(of, 32, 16, 4, count) for of, count in (("layers", 50), ("density", 20), ("density", 200), ("choice", 9))]


@pytest.mark.parametrize("framework", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_every_layer_is_measured_and_shown(
    framework: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(measure, "cases", lambda _: TINY)
    monkeypatch.setattr(measure, "ROUNDS", 2)
    monkeypatch.setattr(measure, "SHORTEST", 0.0)
    measure.main([framework, "cpu", "layers"])
    first, *rows, choice = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert framework in first["description"]
    base = {"torch": torch_layers, "jax": jax_layers}[framework].BASE
    assert len(rows) == 3
    found = choices([choice], framework, "cpu")
    assert set(found) == {"by costs alone", "measured"}
    for how in found.values():
        assert how["choices"] == 2
        assert 1 <= how["mean"] <= how["worst"]
    assert choices(rows, framework, "cpu") == {}
    for row in rows:
        assert {"step", "inference"} <= set(row["times"])
        for by_layer in row["times"].values():
            assert by_layer[base]["ratio"] == 1
            assert all(found["lowest"] <= found["ratio"] <= found["highest"] for found in by_layer.values())
    sparse = {"torch": "SparseLinear", "jax": "sparse_linear"}[framework]
    assert rows[1]["kept_bytes"][sparse] < rows[2]["kept_bytes"][sparse]
    text = "\n".join(tables(rows))
    assert "32 -> 16, batch 4, 50 connections (9.77 %)" in text
    assert "weight * mask" in text
    assert draw(rows, tmp_path) == ["time.png", "memory.png"]
    assert (tmp_path / "time.png").read_bytes()[:4] == b"\x89PNG"
    assert draw(rows[:1], tmp_path) == []


@pytest.mark.parametrize(
    ("framework", "passes"),
    [("torch", 3), pytest.param("jax", 3, marks=pytest.mark.slow)],  # JAX compiles anew in each pass
)
def test_costs_are_measured_and_written(
    framework: str, passes: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(measure, "ROUNDS", 2)
    monkeypatch.setattr(measure, "SHORTEST", 0.0)
    costs = measure_costs(framework, tmp_path / "costs.json", "cpu", (8, 16), (1, 2, 4), (0.1, 0.5), passes)
    assert (costs.framework, costs.device, costs.widths) == (framework, "cpu", (8, 16))
    assert framework in costs.machine


@pytest.mark.slow
def test_the_most_memory_of_a_layer_grows_with_what_it_keeps() -> None:
    case = Case("peak", 1024, 1024, 4, 1000)
    dense, sparse = (peak("torch", "cpu", name, case) for name in ("nn.Linear", "SparseLinear"))
    assert dense > 16 * 1024 * 1024 > sparse


def test_cases_have_as_many_connections_as_they_say() -> None:
    assert {case.of for case in cases()} == set(SETS)
    for case in cases(("layers",)):
        if case.in_features < 4096:
            pattern = case.pattern()
            assert (pattern.nnz, pattern.shape) == (case.connections, (case.out_features, case.in_features))


def test_where_the_sparse_form_crosses_the_dense_one() -> None:
    assert crossover([0.1, 1, 10], [1, 10, 100], [10, 10, 10]) == pytest.approx(1)
    assert crossover([1, 100], [1, 100], [10, 10]) == pytest.approx(10)
    assert crossover([1, 10], [1, 2], [10, 10]) is None


def test_costs_are_of_one_framework(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", "--costs", str(tmp_path / "costs.json")]) == 2
    assert "--costs measures one framework" in capsys.readouterr().err


def test_the_machine_is_described_without_its_name() -> None:
    assert set(machine()) == {"cpu", "cores", "system", "python"}


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["bench", "--set", "nonesuch"]) == 2
    file = tmp_path / "file"
    file.write_text("")
    assert main(["bench", "--out", str(file)]) == 2
    assert "--out must be a folder" in capsys.readouterr().err
    for missing in ("optax", "flax"):
        monkeypatch.setattr(
            "maskedlinear.cli.find_spec", lambda name, missing=missing: None if name == missing else True
        )
        for more in ([], ["--costs", str(tmp_path / "costs.json")]):
            assert main(["bench", "--framework", "jax", *more]) == 2
            assert f"maskedlinear bench needs {missing}, which is not installed" in capsys.readouterr().err
