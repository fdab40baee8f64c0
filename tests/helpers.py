"""Small things that several test files need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maskedlinear import masks

ROOT = Path(__file__).parent.parent


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
