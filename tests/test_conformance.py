"""The conformance suite as a product: its bounds, its doors, what it reports and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from helpers import OTHER_BACKEND, distribution, suite
from maskedlinear import masks, spec
from maskedlinear.backends import Backend, BackendNotAvailableError, available, checked, load
from maskedlinear.reference import NumpyBackend
from maskedlinear_conformance import golden, report
from maskedlinear_conformance.backend_under_test import BackendUnderTest, equal_bits, positive_zero
from maskedlinear_conformance.bounds import Expected, accumulation_unit, expected, output_unit
from maskedlinear_conformance.cases import CASES, PROFILES, Case, among, draw, round_to
from maskedlinear_conformance.laws import LAWS
from maskedlinear_conformance.record import Outcome, Record


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_round_to_and_units_are_those_of_the_dtype(dtype: str, rng: np.random.Generator) -> None:
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    values = np.float32(rng.standard_normal(10_000)).astype(np.float64)
    values[:3] = np.nan, np.inf, -0.0
    np.testing.assert_array_equal(round_to(values, dtype), values.astype(kind).astype(np.float64))
    assert output_unit(dtype) == float(ml_dtypes.finfo(kind).eps) / 2
    assert accumulation_unit(dtype) == output_unit("float64" if dtype == "float64" else "float32")


def test_the_fraction_of_a_bound_at_its_edges() -> None:
    one, none = np.ones(3), np.zeros(3)
    for got, want in ((one, 0), (one + 8 * 2.0**-24, 1), (2 * one, 2.0**24 / 8), (np.nan * one, np.inf)):
        assert Expected(one, one, 5, one).used(got, "float32") == want
    assert Expected(one, one, 5, one).used(one + 5 * 2.0**-24, "float32", hard=True) == pytest.approx(1, rel=1e-6)
    assert Expected(one, none, 5, one).used(one * (1 + 1e-15), "float32") == np.inf, "a bound of 0 must be met exactly"
    half = Expected(one, none, 5, one)
    assert half.used(one + 2**-8, "bfloat16") == 1, "a half type rounds once"
    assert half.between(one, one + 2**-7, "bfloat16") == 1, "and so do two of them"
    assert Expected(np.ones(0), np.ones(0), 1, np.ones(0)).used(np.ones(0), "float32") == 0


def test_bounds_are_the_sums_over_absolute_values(rng: np.random.Generator) -> None:
    mask = masks.random((3, 4), sparsity=0.5, seed=1)
    data = draw(rng.standard_normal, (2,), mask, True, "float64")
    want = expected(data)
    assert set(want) == {"y", "dx", "dW", "db", "ẏ", "Hx", "HW", "Hb", "Hg"}
    np.testing.assert_allclose(want["y"].absolute, abs(data.x) @ (abs(data.weight) * mask).T + abs(data.bias))
    np.testing.assert_allclose(want["dW"].absolute, abs(data.g).T @ abs(data.x) * mask)
    product = abs(data.g) @ (abs(data.dweight) * mask) + abs(data.dg) @ (abs(data.weight) * mask)
    np.testing.assert_allclose(want["Hx"].absolute, product)
    assert (want["y"].length, want["dx"].length, want["dW"].length, want["Hg"].length) == (5, 3, 2, 9)
    assert "db" not in expected(data._replace(bias=None, dbias=None))


def test_the_checks_that_laws_are_made_of() -> None:
    equal_bits([np.array([np.nan, 0.0]), None], [np.array([np.nan, 0.0]), None], "equal")
    for got, want in (([0.0], [-0.0]), ([1.0], [1.0 + 2**-52]), ([np.nan], [0.0]), ([1.0], [1.0, 1.0])):
        with pytest.raises(AssertionError, match="these"):
            equal_bits([np.array(got)], [np.array(want)], "these")
    positive_zero(np.zeros(2), "zero")
    for values in ([-0.0], [np.nan], [1e-300]):
        with pytest.raises(AssertionError):
            positive_zero(np.array(values), "zero")
    subject = BackendUnderTest(NumpyBackend(), "numpy dense", "float16")
    data = Case((4,), 7, 5, 0.5).data("float16")
    y = subject.value(data)
    subject.assert_matches_spec({"y": y}, expected(data))
    with pytest.raises(AssertionError, match="another dtype"):
        subject.assert_matches_spec({"y": y + 2.0**-20}, expected(data))
    with pytest.raises(AssertionError, match="the shape of y"):
        subject.assert_matches_spec({"y": y[None]}, expected(data))


def test_registry() -> None:
    assert {"jax", "linen", "nnx", "numpy", "torch", "torch-nn"} <= set(available())
    for name in ("numpy", "torch", "torch-nn", "jax", "nnx", "linen"):
        for backend in load(name):
            assert isinstance(backend, Backend)
            assert backend.name == name
            assert "cpu" in backend.devices()
    assert [backend.format for backend in load("torch")] == ["dense", "sparse"]
    with pytest.raises(BackendNotAvailableError, match=r"no backend named 'none' is registered; registered: .*torch"):
        load("none")


def test_a_backend_that_breaks_the_protocol_is_refused() -> None:
    class Lacking(NumpyBackend):
        def unsupported(self) -> dict[str, str]:
            return {"telepathy": "none here"}

    class Silent(NumpyBackend):
        def unsupported(self) -> dict[str, str]:
            return {}

    with pytest.raises(TypeError, match=r"declares that it lacks telepathy; capabilities are: jvp"):
        checked(Lacking(), "backend 'x'")
    with pytest.raises(
        TypeError, match=r"no method 'autodiff_vjp' for the capability 'autodiff_vjp': write it, .* or declare"
    ):
        checked(Silent(), "backend 'x'")
    with pytest.raises(TypeError, match=r"lacks asarray, asnumpy, .* of maskedlinear.backends.Backend"):
        checked(object(), "backend 'x'")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "    name = 'numpy'\n",
            "must be called what it is registered as; it calls itself 'numpy': write name = 'other'",
        ),
        ("    formats = 'dense'\n", "must name its formats in a tuple; got 'dense': write formats = ('dense',)"),
        (
            "    formats = ('dense', 'csr')\n\n    def __init__(self, format):\n        self.format = 'dense'\n",
            "must keep in its attribute 'format' what it is called with, 'csr'; it has 'dense'",
        ),
        ("    def device_name(self, device):\n        raise OSError('boom')\n", "cannot be described: OSError: boom"),
        (
            "    def expected_failures(self, device):\n        pass\n",
            "must return a dictionary of patterns and reasons",
        ),
        (
            "    def dtypes(self, device):\n        return ('float8',)\n",
            "one or more of float64, float32, bfloat16, float16; got",
        ),
        ("    def dtypes(self, device):\n        return ()\n", "dtypes must return one or more of"),
        ("raise OSError('no libcuda')\n", "backend 'other' cannot be imported: no libcuda"),
        ("\nOther = None\ndel Other\n", "backend 'other' cannot be imported: module 'other' has no attribute 'Other'"),
        ("raise RuntimeError('no driver')\n", "backend 'other' cannot be imported: no driver"),
        (
            "    def __init__(self, format):\n        raise RuntimeError('no licence')\n",
            "backend 'other' cannot be made: no licence. Its class is called with each of its formats: dense",
        ),
        ("    def unsupported(self):\n        return None\n", "backend 'other' cannot say what it lacks"),
        (
            "    def unsupported(self):\n        return {**super().unsupported(), 'save': ' '}\n",
            "backend 'other' lacks save for no reason; got ' ': say why, in words",
        ),
        (
            "    def expected_failures(self, device):\n        return {'test_any*': ''}\n",
            "expected_failures must give a reason in words, or a reason and an exception; got '' for 'test_any*'",
        ),
        (
            "    def expected_failures(self, device):\n        return {'test_any*': ('upstream #1', 'OSError')}\n",
            "must give a reason in words, or a reason and an exception; got ('upstream #1', 'OSError')",
        ),
        ("    def unsupported(self):\n        raise KeyError('x')\n", "backend 'other' cannot say what it lacks"),
    ],
)
def test_a_backend_that_would_not_run_is_refused(code: str, message: str, tmp_path: Path) -> None:
    distribution(tmp_path, OTHER_BACKEND + code)
    result = suite("--backend", "numpy", "--backend", "other", "--profile", "quick", path=tmp_path)
    assert result.returncode != 0
    assert message in result.stdout + result.stderr


def test_cases_cover_the_edges() -> None:
    assert {case.density for case in CASES} >= {0.0, 0.01, 0.5, 1.0, "one", "all but one"}
    assert () in {case.batch for case in CASES}
    assert any(0 in case.batch for case in CASES)
    assert {0, 1, 4096, 16384} <= {case.in_features for case in CASES}
    assert {0, 1} <= {case.out_features for case in CASES}
    sizes = [sum(among(case.since, profile) for case in CASES) for profile in PROFILES]
    assert sizes == sorted(sizes)
    assert sizes[-1] == len(CASES)
    for dtype in ("bfloat16", "float16"):
        for kind in ("signed", "positive", "integers"):
            for array in CASES[4].data(dtype, kind):
                if array is not None and array.dtype != bool:
                    np.testing.assert_array_equal(round_to(array, dtype), array)


def test_golden_vectors_are_made_again_to_the_same_bytes() -> None:
    assert golden.make() == golden.FILE.read_bytes()
    assert f"v{golden.VERSION}." in golden.FILE.name


def test_golden_vectors_are_integers_and_right() -> None:
    for one in golden.goldens():
        data, results = one.data, one.results
        for array in (*data, *results.values()):
            assert array is None or array.dtype == bool or (array == np.round(array)).all()
        masked = data.weight * data.mask
        y = np.einsum("...i,oi->...o", data.x, masked) + (0 if data.bias is None else data.bias)
        np.testing.assert_array_equal(results["y"], y, err_msg=one.name)
        np.testing.assert_array_equal(results["dx"], np.einsum("...o,oi->...i", data.g, masked), err_msg=one.name)
        g, x = (array.reshape(-1, array.shape[-1]) for array in (data.g, data.x))
        np.testing.assert_array_equal(results["dW"], np.einsum("bo,bi->oi", g, x) * data.mask, err_msg=one.name)
    assert sum(one.exact_in("bfloat16") for one in golden.goldens()) >= 8


def test_golden_vectors_of_another_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytearray(golden.FILE.read_bytes())
    content[-1] ^= 1
    (tmp_path / "v1.safetensors").write_bytes(content)
    monkeypatch.setattr(golden, "FILE", tmp_path / "v1.safetensors")
    with pytest.raises(ValueError, match=r"must have the hash .* install the package anew"):
        golden.goldens.__wrapped__()


@pytest.mark.slow
def test_two_backends_pass_and_the_report_says_so(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    result = suite(
        *("--backend", "numpy", "--backend", "torch", "--profile", "quick", "--report", str(path)),
        *("-k", "spec or each_other or hard or vmap or checkpoint or file or golden"),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "backend torch dense: torch 2." in result.stdout
    assert (
        "lacks vmap, vmap over the mask, vmap of derivatives, compile, checkpoint, scan, compile of derivatives, compile of "
        "the hessian: NumPy has no function transforms" in result.stdout
    )
    sections = result.stdout.split("largest difference between backends, in units of the bound (at most 1)")
    assert len(sections) == 2, "the last table compares the backends"
    rows = [
        line.split() for line in sections[1].splitlines() if line.startswith(("y ", "dx", "dW", "db", "jvp", "hvp"))
    ]
    quantities = ("y", "dx", "dW", "db", "jvp", "hvp")
    assert {row[0] for row in rows if row[1] == "float32"} == set(quantities)
    assert all(0 <= float(row[2]) <= 1 for row in rows)
    found = json.loads(path.read_text())
    assert found["exit_status"] == 0
    assert set(found["header"]["backends"]) == {"numpy dense", "torch dense"}
    assert found["header"]["backends"]["numpy dense"]["lacks"]["vmap"] == "NumPy has no function transforms"
    assert found["laws"]["7"]["backends"]["numpy dense"] == {"declared": 10}, "vmap is declared, not skipped in silence"
    assert found["laws"]["1"]["backends"]["torch dense"]["passed"] > 30
    assert found["laws"]["13"]["backends"]["torch dense"] == {}
    assert found["laws"]["12f"]["backends"]["torch dense"]["passed"] == 2
    assert {row["result"] for row in found["bounds"]["pairs"]} == set(quantities)
    assert {row["result"] for row in found["bounds"]["hard"]} == {"y", "dx", "dW", "db"}
    assert all(row["status"] == "declared" for row in found["not_passed"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "nonesuch"], "no backend named 'nonesuch' is registered"),
        ([], "name at least one backend with --backend"),
        (["--backend", "numpy", "--device", "cuda"], "backend 'numpy' has no device 'cuda' here; it has: cpu"),
        (["--backend", "numpy", "-k", "nothing_of_this_name"], "deselected"),
        (["--backend", "numpy", "-k", "vmap"], "NumPy has no function transforms"),  # declared, so nothing is proven
        (["--backend", "numpy", "--profile", "enormous"], "invalid choice: 'enormous'"),
        (
            ["--backend", "torch", "--format", "coo"],
            "backend 'torch' has none of the formats coo; it has: dense, sparse",
        ),
        (["--faults", "--backend", "numpy"], "--faults brings its own backends"),
        (["--backend", "numpy", "--report", "/no/such/folder/r.json"], "must be a file in a folder that exists"),
        (["--backend", "numpy", "--report", "/tmp"], "--report must be a file in a folder that exists; got /tmp"),
    ],
)
def test_what_cannot_run_is_a_failure(arguments: list[str], message: str) -> None:
    result = suite(*arguments)
    assert result.returncode != 0
    assert message in result.stdout + result.stderr


def test_one_of_several_backends_of_which_nothing_is_proven_is_a_failure() -> None:
    result = suite("--backend", "numpy", "--backend", "jax", "--profile", "quick", "-k", "vmap_takes or dense_layer")
    assert result.returncode == 5, result.stdout
    assert result.stdout.split("nothing was proven of")[1].splitlines()[1] == "numpy dense"


def test_laws_reach_a_backend_of_one_dtype(tmp_path: Path) -> None:
    code = (
        "from maskedlinear_conformance.faults._reference_backend import ReferenceBackend\n\n"
        "class Other(ReferenceBackend):\n    name = 'other'\n"
    )
    distribution(tmp_path, code + "    def dtypes(self, device):\n        return ('float64',)\n")
    path = tmp_path / "report.json"
    one_of_each = (
        "gradients_equal_the_spec or rule_equals or linear_in or positive_zero_for_nan or empty_mask or one_by_one or "
        "file_keeps or "
        "transforms_equal or layouts_give or half_types or inputs_are_left or new_weight or checkpoint_keeps or frozen or "
        "subnormal or golden or each_other or shows_the_weight or edit_of_a_live_weight"
    )
    result = suite("--backend", "other", "--profile", "quick", "-k", one_of_each, "--report", str(path), path=tmp_path)
    assert result.returncode == 0, result.stdout
    laws = json.loads(path.read_text())["laws"]
    without = {law for law, row in laws.items() if not row["backends"]["other dense"].get("passed")}
    assert without == {"9", "12x", "pairs"}, "no half type, and no partner"
    rows = {line.split()[0]: line for line in result.stdout.splitlines() if line}
    for law in ("12x", "pairs"):
        assert rows[law].endswith("not run: one backend")


def test_what_one_of_a_pair_lacks_is_declared_and_what_both_have_by_other_modes_is_compared(tmp_path: Path) -> None:
    made = """
    def unsupported(self):
        return {**super().unsupported(), 'jvp': 'not yet', 'LACKED': 'not yet'}
"""
    distribution(tmp_path, OTHER_BACKEND + made.replace("LACKED", "reverse over reverse"))
    (tmp_path / "single.py").write_text(
        "from maskedlinear.reference import NumpyBackend\n\nclass Single(NumpyBackend):\n    name = 'single'\n"
        + made.replace("'jvp': 'not yet', ", "").replace("LACKED", "forward over reverse")
        + "    def hvp(self, x, *arrays, mode):\n"
        "        found = super().hvp(x, *arrays, mode)\n"
        "        return (found[0] + WRONG * (x.size == 144), *found[1:])\n"
    )
    entry = tmp_path / "other-1.0.dist-info" / "entry_points.txt"
    entry.write_text(entry.read_text() + "single = single:Single\n")
    asked = ("--backend", "other", "--backend", "single", "--profile", "quick", "-k", "equals_each_other")
    cases = sum(case.since == "quick" for case in CASES)
    right = {"passed": cases, "declared": cases}
    for wrong, counts in (("0", right), ("1", right | {"passed": cases - 1, "failed": 1})):
        code = (tmp_path / "single.py").read_text()
        (tmp_path / "single.py").write_text(re.sub(r"\+ \w+ \*", f"+ {wrong} *", code))
        path = tmp_path / f"{wrong}.json"
        result = suite(*asked, "--report", str(path), path=tmp_path)
        assert result.returncode == int(wrong), result.stdout
        laws = json.loads(path.read_text())["laws"]
        assert laws["pairs"]["backends"] == {"other dense": counts, "single dense": counts}
    assert laws["12x"]["backends"]["other dense"] == {}


def test_what_no_dtype_allows_is_declared(tmp_path: Path) -> None:
    distribution(tmp_path, OTHER_BACKEND + "    def dtypes(self, device):\n        return ('float64',)\n")
    (tmp_path / "single.py").write_text(
        "from other import Other\n\nclass Single(Other):\n    name = 'single'\n"
        "    def dtypes(self, device):\n        return ('float32',)\n"
    )
    entry = tmp_path / "other-1.0.dist-info" / "entry_points.txt"
    entry.write_text(entry.read_text() + "single = single:Single\n")
    result = suite("--backend", "other", "--backend", "single", "--profile", "quick", path=tmp_path)
    assert result.returncode == 0, result.stdout
    rows = {line.split()[0]: line for line in result.stdout.splitlines() if line}
    assert rows["9"].split()[-4:] == ["3", "declared", "3", "declared"], "neither has a half type"
    assert rows["pairs"].split()[-4:] == ["3", "declared", "3", "declared"], "they have no dtype in common"


def test_a_law_that_did_not_run_is_named() -> None:
    outcomes = [Outcome(law, ("a", "b"), "test", "passed", "") for law in LAWS if law not in ("6", "pairs")]
    outcomes += [Outcome("6", ("a",), "test", "declared", "why")]
    record = Record()
    record.outcomes = outcomes
    run: Any = SimpleNamespace(faults=False, partial=False, command=True, backends=["a", "b"], record=record, laws=LAWS)
    assert report.silent(run) == ["b: law 6", "a: law pairs", "b: law pairs"], "12x ran, by the first line"
    run.partial = True
    assert report.silent(run) == [], "it was left out on purpose"
    run.partial, run.backends = False, ["a"]
    assert report.silent(run) == [], "one backend has no partner"


@pytest.mark.parametrize(
    "backends",
    [("numpy", "torch", "jax"), pytest.param(("numpy", "torch", "jax", "nnx", "linen"), marks=pytest.mark.slow)],
    ids=len,
)
def test_every_backend_obeys_the_laws_and_the_report_has_what_is_printed(
    backends: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "report.json"
    asked = [option for name in backends for option in ("--backend", name)]
    result = suite(*asked, "--profile", "quick", "--report", str(path))
    assert result.returncode == 0, result.stdout
    found = json.loads(path.read_text())
    assert set(found["header"]["backends"]) == {f"{name} dense" for name in backends}
    for law, row in found["laws"].items():
        for label, counts in row["backends"].items():
            said = [f"passed {counts['passed']}"] if "passed" in counts else []
            said += [f"{counts[status]} {status}" for status in ("expected failure", "declared") if status in counts]
            assert ", ".join(said) in result.stdout, (law, label)
        assert row["title"] in result.stdout
    printed = result.stdout.split("largest distance from the spec, in units of the tight bound")[1]
    tables = dict(zip(("tight", "hard", "pairs"), printed.split(" in units of the "), strict=True))
    for name, text in tables.items():
        body = [
            line.split() for line in text.splitlines() if line.startswith(("y ", "d", "jvp", "hvp")) and "." in line
        ]
        cells = {(row[0], row[1]): [value for value in row[2:] if value != "-"] for row in body}
        written: dict[tuple[str, str], list[str]] = {}
        for row in found["bounds"][name]:
            written.setdefault((row["result"], row["dtype"]), []).append(f"{row['largest']:.3f}")
        assert {key: sorted(values) for key, values in cells.items()} == {k: sorted(v) for k, v in written.items()}
    assert found["header"]["backends"]["torch dense"]["versions"]["torch"] in result.stdout


@pytest.mark.parametrize("names", [("torch",), pytest.param(("torch", "jax", "nnx"), marks=pytest.mark.slow)], ids=len)
def test_the_sparse_formats_obey_the_laws(names: tuple[str, ...]) -> None:
    asked = [option for name in names for option in ("--backend", name)]
    result = suite(*asked, "--format", "sparse", "--profile", "quick")
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("asked", "laws"),
    [
        (
            "--backend nnx --backend linen --format dense",
            "any_shape or new_ or in_a_layer or checkpoint or shows or acts or act or dormant",
        ),
        (
            "--backend jax --backend nnx --format sparse",
            "jax and (equal_the_spec or leaks or any_batch or half) or nnx and (new_weight or shows)",
        ),
    ],
)
def test_what_is_dear_to_compile_obeys_the_laws_that_are_most_its_own(asked: str, laws: str) -> None:
    result = suite(*asked.split(), "--profile", "quick", "-k", laws)
    assert result.returncode == 0, result.stdout


def test_the_modules_of_torch_obey_the_laws_in_both_formats() -> None:
    formats = ("--format", "dense", "--format", "sparse", "--profile", "quick")
    result = suite("--backend", "torch-nn", *formats, "-k", "new_ or leaks or autocast or vmap or equal_the_spec")
    assert result.returncode == 0, result.stdout


def test_spec_and_reference_agree_on_half_precision(rng: np.random.Generator) -> None:
    data = draw(rng.standard_normal, (3,), masks.random((4, 300), sparsity=0.5), True, "float16")
    arrays = [array if array.dtype == bool else array.astype(np.float16) for array in data[:4]]
    y: Any = NumpyBackend().masked_linear(*arrays)
    exact = spec.forward(*(data[:4]))
    assert y.dtype == np.float16
    assert (y == exact.astype(np.float32).astype(np.float16)).mean() > 0.9
