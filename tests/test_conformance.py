"""The conformance suite itself: its bounds, its doors, and that it notices faults."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from maskedlinear import masks, spec
from maskedlinear.backends import Backend, BackendNotAvailableError, NumpyBackend, available, load
from maskedlinear_conformance.bounds import accumulation_unit, bounds, output_unit, pair_ratio, ratio
from maskedlinear_conformance.cases import CASES, round_to


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_round_to_and_units_are_those_of_the_dtype(dtype: str, rng: np.random.Generator) -> None:
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    values = np.float32(rng.standard_normal(10_000)).astype(np.float64)
    np.testing.assert_array_equal(round_to(values, dtype), values.astype(kind).astype(np.float64))
    assert output_unit(dtype) == float(ml_dtypes.finfo(kind).eps) / 2
    assert accumulation_unit(dtype) == output_unit("float64" if dtype == "float64" else "float32")


@pytest.mark.parametrize("inputs", [64, 4096, 16384])
def test_the_tight_bound_holds_for_correct_results_and_catches_every_flipped_bit(
    inputs: int, rng: np.random.Generator
) -> None:
    # Signed, and away from 0: a connection of weight 0 is the same live and masked.
    x, weight = (
        round_to(rng.choice([-1, 1], shape) * rng.uniform(0.5, 1.5, shape), "float32")
        for shape in ((4, inputs), (8, inputs))
    )
    mask = masks.random((8, inputs), sparsity=0.5, seed=inputs)
    g = np.ones((4, 8))
    sums = bounds(x, weight, mask, None, g, (None, None, None))
    exact = spec.forward(x, weight, mask)
    y = spec.forward(np.float32(x), np.float32(weight), mask)
    assert ratio(y.astype(float), exact, sums.y, "float32") < 0.5
    caught = 0
    for place in rng.choice(8 * inputs, 200, replace=False):
        flipped = mask.copy()
        flipped.flat[place] ^= True
        wrong = spec.forward(np.float32(x), np.float32(weight), flipped).astype(float)
        caught += ratio(wrong, exact, sums.y, "float32") > 1
    assert caught == 200


def test_ratios_at_their_edges() -> None:
    one = np.ones(3)
    assert ratio(one, one, np.zeros(3), "float32") == 0
    assert ratio(one, one + 1e-300, np.zeros(3), "float32") == 0
    assert ratio(one, 2 * one, np.zeros(3), "float32") == np.inf
    assert ratio(one * np.nan, one, one, "float32") == np.inf
    assert ratio(np.ones(0), np.ones(0), np.ones(0), "float32") == 0
    assert pair_ratio(one, one + 2**-8, one, "bfloat16") < 1
    assert pair_ratio(one, one + 3 * 2**-8, one, "bfloat16") > 1


def test_registry() -> None:
    assert {"jax", "numpy", "torch"} <= set(available())
    for name in ("numpy", "torch", "jax"):
        backend = load(name)
        assert isinstance(backend, Backend)
        assert backend.name == name
        assert "cpu" in backend.devices()
    with pytest.raises(BackendNotAvailableError, match=r"no backend named 'none' is registered; registered: .*torch"):
        load("none")


def test_cases_cover_the_edges() -> None:
    assert {case.density for case in CASES} >= {0.0, 0.01, 0.5, 1.0, "one", "all but one"}
    assert () in {case.batch for case in CASES}
    assert any(0 in case.batch for case in CASES)
    assert {0, 4096} <= {case.in_features for case in CASES}
    data = CASES[-1].data("bfloat16")
    np.testing.assert_array_equal(NumpyBackend().asarray(data.x, "float32", "cpu").astype(np.float64), data.x)


def suite(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "maskedlinear_conformance", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=path or "/",
    )


def test_two_backends_pass_and_the_last_table_compares_them() -> None:
    result = suite("--backend", "numpy", "--backend", "torch", "-k", "bit or batch or spec or each_other")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "backend torch: torch 2." in result.stdout
    sections = result.stdout.split("largest difference between backends, in units of the bound (at most 1)")
    assert len(sections) == 2
    rows = [line.split() for line in sections[1].splitlines() if line.startswith(("y ", "dx", "dW", "db", "ẏ"))]
    assert {(row[0], row[1]) for row in rows} == {
        (quantity, dtype) for quantity in ("y", "dx", "dW", "db", "ẏ") for dtype in ("float64", "float32", "float16")
    }
    assert all(0 <= float(row[2]) <= 1 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "nonesuch"], "no backend named 'nonesuch' is registered"),
        ([], "name at least one backend with --backend"),
        (["--backend", "numpy", "--device", "cuda"], "backend 'numpy' has no device 'cuda' here; it has: cpu"),
        (["--backend", "numpy", "-k", "nothing_of_this_name"], "deselected"),
    ],
)
def test_what_cannot_run_is_a_failure(arguments: list[str], message: str) -> None:
    result = suite(*arguments)
    assert result.returncode != 0
    assert message in result.stdout + result.stderr


def distribution(path: Path, code: str) -> None:
    """Lay down an installed distribution that registers the class ``Other`` of ``code`` as the backend ``other``."""
    (path / "other.py").write_text(code)
    info = path / "other-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[maskedlinear.backends]\nother = other:Other\n")


FAULTS = {
    "mask dropped in dW": "def vjp(self, x, w, m, b, g):\n        dx, dw, db = super().vjp(x, w, m, b, g)\n"
    "        return dx, super().vjp(x, w, m | True, b, g)[1], db",
    "a product for a select": "def masked_linear(self, x, w, m, b):\n        import numpy as np\n"
    "        return super().masked_linear(x, (w * m).astype(w.dtype), m | True, b)",
    "one bit flipped": "def masked_linear(self, x, w, m, b):\n        m = m.copy()\n"
    "        m.flat[m.size // 2] ^= m.size > 1000\n        return super().masked_linear(x, w, m, b)",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_third_party_is_caught(tmp_path: Path, fault: str) -> None:
    head = "from maskedlinear.backends import NumpyBackend\n\nclass Other(NumpyBackend):\n    name = 'other'\n    "
    distribution(tmp_path, head + FAULTS[fault])
    result = suite("--backend", "other", path=tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "units of the bound" in result.stdout
    assert "ImportError" not in result.stdout


def test_a_third_party_that_lacks_a_method_is_refused(tmp_path: Path) -> None:
    distribution(tmp_path, "class Other:\n    name = 'other'\n")
    result = suite("--backend", "other", path=tmp_path)
    assert result.returncode != 0
    assert "backend 'other' lacks asarray, asnumpy" in result.stdout + result.stderr
