"""The conformance suite's doors for backends of other people: registration, declarations, expected failures, test files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers import OTHER_BACKEND, distribution, suite


def test_a_backend_may_be_a_dataclass_and_have_company(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["maskedlinear_conformance.plugin"]\n')
    (tmp_path / "test_mine.py").write_text(
        "from dataclasses import dataclass\n\nfrom maskedlinear.reference import NumpyBackend\n"
        "from maskedlinear_conformance import BackendConformance\n\n\n"
        "@dataclass\nclass Mine(NumpyBackend):\n    name: str = 'mine'\n    format: str = 'dense'\n\n\n"
        "class Theirs(NumpyBackend):\n    name = 'theirs'\n\n\n"
        "class TestMine(BackendConformance):\n    backends = (Mine(),)\n\n\n"
        "class TestTheirs(BackendConformance):\n    backends = (Theirs(),)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "--profile", "quick", "-k", "TestMine and gradients_equal"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, "the other class was left out on purpose: " + result.stdout


def test_only_to_collect_is_no_failure() -> None:
    result = suite("--backend", "numpy", "--collect-only", "-q")
    assert result.returncode == 0
    assert "test_value_and_gradients_equal_the_spec[numpy dense float64" in result.stdout


def test_a_name_that_two_distributions_register_is_refused(tmp_path: Path) -> None:
    distribution(tmp_path, OTHER_BACKEND)
    second = tmp_path / "second-1.0.dist-info"
    second.mkdir()
    (second / "METADATA").write_text("Metadata-Version: 2.1\nName: second\nVersion: 1.0\n")
    (second / "entry_points.txt").write_text("[maskedlinear.backends]\nother = elsewhere:Other\n")
    result = suite("--backend", "other", path=tmp_path)
    assert result.returncode != 0
    message = "several distributions register a backend named 'other': other (other:Other), second (elsewhere:Other)"
    assert message in result.stdout + result.stderr


def test_a_third_party_that_lacks_a_method_is_refused(tmp_path: Path) -> None:
    distribution(
        tmp_path, "class Other:\n    name = 'other'\n    formats = ('dense',)\n    def __init__(self, f): pass\n"
    )
    result = suite("--backend", "other", path=tmp_path)
    assert result.returncode != 0
    assert "backend 'other' lacks asarray, asnumpy" in result.stdout + result.stderr


EXPECTING = """
    def masked_linear(self, x, weight, mask, bias):
        y = super().masked_linear(x, weight, mask, bias)
        return y + 1 if x.shape == () or x.shape[-1] == 257 else y

    def expected_failures(self, device):
        return PATTERNS
"""
WRONG = "test_value_and_gradients_equal_the_spec[[]other dense *, batch 33,*"


@pytest.mark.parametrize(
    ("patterns", "status", "shown"),
    [
        ({WRONG: "upstream #1"}, 0, "expected failure"),
        ({WRONG: ("upstream #1", AssertionError)}, 0, "expected failure"),
        ({WRONG: ("upstream #1", ValueError)}, 1, "FAILED 1 of"),
        ({WRONG: "upstream #1", "test_no_such_law*": "gone"}, 0, "stale: expected failures that match no test"),
        ({WRONG.replace("33", "12"): "upstream #1"}, 1, "XPASS(strict)"),
        ({}, 1, "FAILED 1 of"),
    ],
)
def test_expected_failures_are_reported_and_strict(
    patterns: dict[str, Any], status: int, shown: str, tmp_path: Path
) -> None:
    written = re.sub(r"<class '(\w+)'>", r"\1", repr(patterns))
    distribution(tmp_path, OTHER_BACKEND + EXPECTING.replace("PATTERNS", written))
    result = suite("--backend", "other", "--profile", "quick", "-k", "gradients_equal_the_spec", path=tmp_path)
    assert result.returncode == status, result.stdout
    assert shown in result.stdout


@pytest.mark.parametrize(
    "error", ["unittest.SkipTest('no such kernel')", "pytest.skip('declared: no')", "pytest.xfail('no such kernel')"]
)
def test_a_skip_that_a_backend_raises_is_a_failure(error: str, tmp_path: Path) -> None:
    call = error if error.startswith("pytest") else f"raise {error}"
    code = f"\n    def masked_linear(self, x, weight, mask, bias):\n        {call}\n"
    distribution(tmp_path, "import unittest\n\nimport pytest\n" + OTHER_BACKEND + code)
    path = tmp_path / "report.json"
    asked = ("--backend", "other", "--profile", "quick", "-k", "gradients_equal_the_spec or linear_in or frozen")
    result = suite(*asked, "--report", str(path), path=tmp_path)
    assert result.returncode == 1, result.stdout
    assert "skipped, which proves nothing" in result.stdout
    laws = json.loads(path.read_text())["laws"]
    assert set(laws["1"]["backends"]["other dense"]) == {"failed"}
    assert set(laws["3"]["backends"]["other dense"]) == {"failed"}, "within Hypothesis too"


@pytest.mark.parametrize(
    ("pattern", "stale"),
    [
        ("test_value_and_gradients_equal_the_spec[[]other dense float16, batch 4097x3,*", False),  # of another profile
        ("test_vmap_takes_any_batch[[]other dense*", True),  # declared
        ("test_value_and_gradients_equal_the_spec[[]other sparse*", True),
        ("test_backends_equal_each_other[[]other dense - jax dense*", False),  # whose partner is not here
        ("test_backends_equal_each_other[[]other dense - numpy dense float99*", True),
    ],
)
def test_an_expected_failure_is_stale_if_no_test_of_any_profile_can_match(
    pattern: str, stale: bool, tmp_path: Path
) -> None:
    distribution(
        tmp_path, OTHER_BACKEND + EXPECTING.replace("PATTERNS", repr({pattern: "upstream #1"})).replace("257", "9999")
    )
    path = tmp_path / "report.json"
    both = ("--backend", "other", "--backend", "numpy")
    asked = ("--profile", "quick", "-k", "gradients_equal_the_spec or vmap", "--report", str(path))
    result = suite(*both, *asked, path=tmp_path)
    assert result.returncode == 0, result.stdout
    found = json.loads(path.read_text())["stale_expected_failures"]
    assert found == ([f"other dense: {pattern}"] if stale else [])


def test_what_a_backend_lacks_may_differ_from_device_to_device(tmp_path: Path) -> None:
    code = """
    def devices(self):
        return ("cpu", "abacus")

    def unsupported(self, device):
        return {**super().unsupported(), **({"jvp": "beads move once"} if device == "abacus" else {})}
"""
    distribution(tmp_path, OTHER_BACKEND + code)
    for device, status in (("cpu", "passed"), ("abacus", "declared")):
        path = tmp_path / f"{device}.json"
        asked = ("--backend", "other", "--profile", "quick", "-k", "any_subset_of", "--device", device)
        result = suite(*asked, "--report", str(path), path=tmp_path)
        assert result.returncode == 0, result.stdout
        found = json.loads(path.read_text())
        assert status in found["laws"]["1"]["backends"]["other dense"]
        assert ("jvp" in found["header"]["backends"]["other dense"]["capabilities"]) == (device == "cpu")


def test_each_format_is_run_as_a_backend_of_its_own(tmp_path: Path) -> None:
    distribution(tmp_path, OTHER_BACKEND + "    formats = ('dense', 'csr')\n")
    result = suite("--backend", "other", "--profile", "quick", "-k", "each_other or gradients_equal", path=tmp_path)
    assert result.returncode == 0, result.stdout
    assert "left out: other csr; --format runs them, and so does --profile full" in result.stdout
    assert "other dense - other csr" not in result.stdout
    both = ("--backend", "other", "--profile", "quick", "--format", "csr", "--format", "dense")
    result = suite(*both, "-k", "each_other or gradients_equal", path=tmp_path)
    assert result.returncode == 0, result.stdout
    assert "other dense - other csr" in result.stdout


def test_the_door_for_ones_own_test_file(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["maskedlinear_conformance.plugin"]\n')
    (tmp_path / "mine.py").write_text(OTHER_BACKEND)
    mine = (
        "from maskedlinear_conformance import BackendConformance\n\nfrom mine import Other\n\n\n"
        "class TestMine(BackendConformance):\n    backends = (Other(),)\n\n\ndef test_other_things():\n    pass\n"
    )
    (tmp_path / "test_mine.py").write_text(mine)
    command = [sys.executable, "-m", "pytest", "-q", "--profile", "quick", "-k", "leaks or gradients_equal or things"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "nothing under the mask leaks" in result.stdout
    assert "other dense" in result.stdout
    result = subprocess.run([*command[:-1], "things"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, "a run of other tests only proves nothing, and need not"
    (tmp_path / "test_mine.py").write_text(
        "from maskedlinear_conformance import BackendConformance\n\n\nclass TestNone(BackendConformance):\n    pass\n"
    )
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode != 0
    assert "TestNone has no backend to prove" in result.stdout + result.stderr
    (tmp_path / "test_mine.py").write_text(mine)
    (tmp_path / "mine.py").write_text(
        OTHER_BACKEND + "    def masked_linear(self, x, weight, mask, bias):\n"
        "        return super().masked_linear(x, (weight * mask).astype(weight.dtype), mask | True, bias)\n"
    )
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 1
    assert "test_nothing_stored_under_the_mask_leaks[other dense float32, batch" in result.stdout


def test_examples_are_the_same_at_every_run_unless_a_seed_is_given(tmp_path: Path) -> None:
    spy = """
    def random_mask(self, shape, num_zeros, seed, shard, device):
        with open(LOG, "a") as log:
            print(shape, num_zeros, seed, file=log)
        return super().random_mask(shape, num_zeros, seed, shard, device)
"""
    log = tmp_path / "log"
    distribution(tmp_path, OTHER_BACKEND + spy.replace("LOG", repr(str(log))))

    def drawn(*options: str) -> str:
        log.write_text("")
        assert suite("--backend", "other", "-k", "any_shard", *options, path=tmp_path).returncode == 0
        return log.read_text()

    first = drawn()
    assert first == drawn()
    assert drawn("--hypothesis-seed", "3") not in ("", first)
