"""What all tests share: deterministic data, JAX without implicit conversions, and how much of the machine a worker takes.

Frameworks are imported where they are used: what they read of the environment is set before.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import numpy as np

_COMPILED = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Let a worker of pytest-xdist, and the processes that its tests start, compute on one thread and compile once.

    What JAX compiles goes to a folder that lives as long as the run. Each worker has its own: JAX writes entries in place,
    so that another process could read half of one. Of ``make test``, XLA compiles with less care, which takes a third of
    the time.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    flags = ["--xla_cpu_multi_thread_eigen=false"]
    if config.option.markexpr:  # `make test-all` proves what users run
        flags.append("--xla_backend_optimization_level=0")
        if version("jaxlib").startswith("0.10."):  # another may not know them, and XLA ends the process then
            flags += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # dozens of processes would compile the package anew
    config.stash[_COMPILED] = tempfile.mkdtemp(prefix="maskedlinear-jax-")
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "NPROC": "1",  # XLA's own pools
        "XLA_FLAGS": " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip(),
        "JAX_COMPILATION_CACHE_DIR": config.stash[_COMPILED],
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def pytest_unconfigure(config: pytest.Config) -> None:
    if _COMPILED in config.stash:
        shutil.rmtree(config.stash[_COMPILED], ignore_errors=True)


@pytest.fixture
def rng() -> np.random.Generator:
    import numpy as np

    return np.random.default_rng(0)


@pytest.fixture
def strict_jax() -> Iterator[None]:
    """64-bit types on; implicit promotion of dtypes and ranks is an error."""
    import jax

    from maskedlinear_jax._compat import enable_x64

    with (
        enable_x64(True),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.default_matmul_precision("highest"),
    ):
        yield


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs ``maskedlinear`` in the test's folder and returns its status and what it printed."""
    from maskedlinear.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(list(arguments))
        out, err = capsys.readouterr()
        return status, out, err

    return run
