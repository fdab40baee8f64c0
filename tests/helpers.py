"""Small things that several test files need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maskedlinear import masks

ROOT = Path(__file__).parent.parent
OTHER_BACKEND = "from maskedlinear.reference import NumpyBackend\n\nclass Other(NumpyBackend):\n    name = 'other'\n"


class Problem(NamedTuple):
    """One layer's data in float64: x (4, 3, 5), weight (6, 5), half of it masked, bias (6,), cotangent g (4, 3, 6)."""

    x: Any
    weight: Any
    mask: Any
    bias: Any
    g: Any


def problem(rng: np.random.Generator) -> Problem:
    return Problem(
        rng.standard_normal((4, 3, 5)),
        rng.standard_normal((6, 5)),
        masks.random((6, 5), sparsity=0.5, seed=7),
        rng.standard_normal(6),
        rng.standard_normal((4, 3, 6)),
    )


def python(code: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter, outside the repository."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd or "/", check=False)


def suite(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the conformance suite with these arguments, in the folder ``path``."""
    return subprocess.run(
        # -B: a file that is written anew within a second, as long as before, is taken for what was compiled of it.
        [sys.executable, "-B", "-m", "maskedlinear_conformance", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=path or "/",
    )


def distribution(path: Path, code: str) -> None:
    """Lay down an installed distribution that registers the class ``Other`` of ``code`` as the backend ``other``."""
    (path / "other.py").write_text(code)
    info = path / "other-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[maskedlinear.backends]\nother = other:Other\n")
