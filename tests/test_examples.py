"""The examples run: the long one shortened, whose full run is not a test."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from helpers import ROOT
from maskedlinear_jax._compat import enable_x64


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("framework", ["torch", pytest.param("flax", marks=pytest.mark.slow)])
def test_accuracy_against_sparsity(
    framework: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = example("digits_sparsity")
    monkeypatch.setattr(module, "STEPS", 60)
    monkeypatch.setattr(module, "SPARSITIES", (0.0, 0.9))
    monkeypatch.setattr(module, "SCHEDULE", {"begin": 10, "end": 40, "every": 10})
    arguments = ["--framework", framework, "--seeds", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["digits_sparsity.py", *arguments])
    assert module.main() in (0, 1)  # so short a training promises nothing
    found = json.loads((tmp_path / "sparsity.json").read_text(encoding="utf-8"))[framework]
    assert set(found) == set(module.METHODS)
    assert all(0.05 < accuracy <= 1 for rows in found.values() for row in rows for accuracy in row)
    assert found["random"][0] == found["magnitude"][0], "nothing is pruned at 0 %"
    assert (tmp_path / "sparsity.png").read_bytes()[:4] == b"\x89PNG"
    assert "static random" in capsys.readouterr().out


def test_the_wired_network_is_read_back_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert example("breast_cancer_wiring").main() == 0
    out = capsys.readouterr().out
    assert "wired: 73 parameters" in out
    assert "dense: 403 parameters" in out
    assert out.count(" -> ") >= 10


def test_a_model_goes_from_torch_to_flax_and_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = example("torch_to_flax")
    monkeypatch.setattr(module, "STEPS", 20)
    assert module.main() == 0
    out = capsys.readouterr().out
    assert out.count(" 948\n") == 4, "a tenth of the weights live at each step"
    assert "Flax, trained on" in out


def test_many_processes_and_devices_have_the_losses_of_one(tmp_path: Path) -> None:
    code = (ROOT / "examples" / "many_processes.py").read_text(encoding="utf-8")
    (tmp_path / "many.py").write_text(code.replace("= 60, 64, 8, 2", "= 12, 64, 8, 2"), encoding="utf-8")
    result = subprocess.run([sys.executable, "many.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "The losses of 12 steps differ by at most" in result.stdout
    assert "the step of JAX gathers 0 arrays" in result.stdout


def test_a_pathway_network_is_the_same_in_both_frameworks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with enable_x64(True):
        assert example("pathway_network").main(["--epochs", "3", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "LayeredWiring: 30 -> 13 -> 6 -> 1, 79 connections, of them 3 fixed" in out
    assert "  concave points  " in out, "named among the strongest"
    assert (tmp_path / "pathway_network.png").read_bytes()[:4] == b"\x89PNG"
