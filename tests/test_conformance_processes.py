"""The conformance suite in several processes and on several devices: what runs, what is named, and what is not a pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers import distribution, suite
from maskedlinear.backends import CAPABILITIES, DISTRIBUTED
from maskedlinear_conformance.faults import FAULTS
from maskedlinear_conformance.laws import LAWS, OF_DISTRIBUTION

QUICK = ("--profile", "quick", "--tb", "short")


def cells(path: Path) -> dict[str, dict[str, Any]]:
    """Return how many tests ended in which way, by law and by label."""
    return {law: row["backends"] for law, row in json.loads(path.read_text())["laws"].items()}


def test_two_processes_of_torch_are_one(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    asked = ("--backend", "torch", "--format", "dense", "--format", "sparse", "--processes", "2", "--report", str(path))
    laws = "(outputs_of_one or whole_batch or before_or_after or prune_as_one) and (dense or not Parallel)"
    result = suite(*asked, *QUICK, "-k", laws)
    assert result.returncode == 0, result.stdout[-6000:]
    found = cells(path)
    assert set(found) == set(OF_DISTRIBUTION)
    assert found["distributed gradients"] == {
        "torch dense, 2 processes": {"passed": 4},
        "torch sparse, 2 processes": {"passed": 2},
    }
    assert found["distributed masks"]["torch dense, 2 processes"] == {"passed": 8}
    assert set(found["distributed masks"]["torch sparse, 2 processes"]) == {"declared"}
    assert json.loads(path.read_text())["header"]["shared by"] == ["2 processes"]


def test_eight_devices_of_jax_are_one(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    asked = ("--backend", "jax", "--backend", "nnx", "--devices", "8", "--report", str(path))
    laws = "(nnx and explicit and outputs or jax and automatic) and (whole_batch or gathered)"
    result = suite(*asked, *QUICK, "-k", laws)
    assert result.returncode == 0, result.stdout[-6000:]
    found = cells(path)
    assert found["distributed gradients"]["jax dense, 8 devices"] == {"passed": 3}
    assert found["distributed work"]["nnx dense, 8 devices"] == {"passed": 1}


def test_a_backend_that_cannot_take_part_has_not_passed(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    result = suite("--backend", "numpy", "--processes", "2", "--devices", "3", *QUICK, "--report", str(path))
    assert result.returncode == 5, result.stdout
    for team in ("2 processes", "3 devices"):
        assert all(set(row[f"numpy dense, {team}"]) == {"declared"} for row in cells(path).values())
        assert f"numpy dense, {team}" in result.stdout.split("nothing was proven of")[1]
    assert "not run: 1 declared" in result.stdout
    result = suite("--backend", "numpy", "--processes", "0")
    assert "--processes must be 1 or more; got 0" in result.stdout + result.stderr


BROKEN = """
import time

from maskedlinear_conformance.faults._reference_backend import ReferenceBackend
from maskedlinear_conformance.faults._reference_distributed import ReferenceShared


class Broken(ReferenceShared):
    def value(self, x):
        print("what rank", self.ranks.here[0], "had to say")
        while self.ranks.here[0] == 1:
            time.sleep(0.1)
        return super().value(x)

    def state(self):
        if self.ranks.here[0] == 1:
            raise KeyError("no state here")
        self.ranks.all_of({0: 0})


class Other(ReferenceBackend):
    name = "other"

    def placements(self, kind):
        return ("batch: reference",)

    def distributed_layer(self, placement, *arrays):
        return Broken(self, placement, *arrays)
"""


def test_a_rank_that_hangs_or_fails_is_named_with_what_it_said(tmp_path: Path) -> None:
    distribution(tmp_path, BROKEN)
    asked = ("--backend", "other", "--processes", "2", "--rank-timeout", "3", "-k", "outputs_of_one or lies_as")
    result = suite(*asked, *QUICK, path=tmp_path)
    assert result.returncode == 1
    assert "rank 1 of 2 processes did not answer within 3 s (asked: ask 0 value)" in result.stdout
    assert "what rank 1 had to say" in result.stdout
    assert "in value\n" in result.stdout, "where it hung"
    assert "rank 1 of 2 processes raised KeyError: 'no state here' (asked: ask 0 state)" in result.stdout or (
        "rank 1 of 2 processes raised KeyError: 'no state here' (asked: ask 1 state)" in result.stdout
    )


def test_each_law_of_distribution_has_a_fault_that_it_must_catch() -> None:
    assert set(DISTRIBUTED) <= set(CAPABILITIES)
    assert set(OF_DISTRIBUTION) <= set(LAWS)
    assert {law for fault in FAULTS.values() for law in fault.laws} >= set(OF_DISTRIBUTION)
