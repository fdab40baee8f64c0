"""The script of ``make bench-gpu``, on small layers on the CPU: its code runs, and what others cannot do is told."""

from __future__ import annotations

import importlib.util
import json
import sys
from typing import Any

import pytest

from helpers import ROOT


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("bench_gpu", ROOT / "benchmarks" / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_gpu", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ratios", lambda calls, base, block: {name: {"ratio": 1.0} for name in calls})
    return module


@pytest.mark.parametrize(("framework", "base"), [("torch", "nn.Linear"), ("jax", "dense")])
def test_every_kind_of_row_is_timed(
    script: Any, framework: str, base: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is compiled takes JAX seconds.
    kept = [row for row in script.TARGETS if row.what == "blocks" or (row.dtype == "float32" and row.step)]
    monkeypatch.setattr(script, "TARGETS", kept)
    rows = list(script.timed(framework, "cpu", quick=True, seconds=1000))
    assert {row["what"] for row in rows} == {"sparse", "masked", "blocks"}
    for row in rows:
        script.show(row)
        ours = {"torch": "SparseLinear", "jax": "sparse_linear"}[framework]
        assert base in row["times"]
        assert (ours in row["times"]) == (row["what"] != "masked")
    assert "expected 0.6" in capsys.readouterr().out
    assert next(script.timed(framework, "cpu", quick=True, seconds=-1))["times"] == "not measured: out of time"


def test_what_was_not_measured_is_said_so(script: Any) -> None:
    found = json.loads(script.RESULTS.read_text())
    if found["gpu"] == "not measured":
        assert found["rows"] == [], "nothing is claimed"
    else:
        assert found["conformance"]
        assert found["versions"]
    assert script.conformance("cuda", quick=True, seconds=-1) == {"torch sparse": "not measured: out of time"}


def test_a_suite_whose_time_is_up_tells_what_it_found(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told = """
import signal, sys, time
def stop(*_):
    print("FAILED one" if "fails" in sys.argv else "", "3 passed", sep="\\n", flush=True)
    sys.exit(2)
signal.signal(signal.SIGINT, stop)
print("begun", flush=True)
time.sleep(60)
"""
    for fails in ([], ["fails"]):
        monkeypatch.setattr(script, "suite", lambda *_, fails=fails: [sys.executable, "-c", told, *fails])
        found = script.conformance("cpu", quick=True, seconds=3)["torch sparse"]
        assert found["status"] == len(fails)
        assert found["said"][-2:] == ["3 passed", "the rest not measured: out of time"]
        assert ("FAILED one" in found["said"]) == bool(fails)
