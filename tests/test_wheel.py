"""The built wheel, installed and used from outside the repository: with nothing else, and with the frameworks."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from helpers import ROOT


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, cwd=cwd, env=environment
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (built,) = out.glob("maskedlinear-*.whl")
    return built


def environment(path: Path) -> Path:
    venv.create(path, with_pip=True)
    return path / ("Scripts" if os.name == "nt" else "bin") / "python"


def test_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "maskedlinear",
        "maskedlinear_conformance",
        "maskedlinear_jax",
        "maskedlinear_torch",
    }
    for needed in ("maskedlinear/py.typed", "maskedlinear_jax/flax/__init__.py", "maskedlinear_conformance/pytest.ini"):
        assert needed in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_alone_it_needs_numpy_and_array_api_compat(wheel: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "env")
    run(python, "-m", "pip", "install", "--quiet", wheel, cwd=tmp_path)
    installed = run(python, "-m", "pip", "list", "--format=freeze", cwd=tmp_path).lower()
    assert {line.split("==")[0] for line in installed.split()} - {"pip", "setuptools"} == {
        "maskedlinear",
        "numpy",
        "array-api-compat",
    }
    code = """
import importlib
import maskedlinear
from maskedlinear import masks, spec
mask = masks.random((3, 4), sparsity=0.5)
print(spec.forward(mask * 1.0, mask * 1.0, mask).shape)
for face in ("torch", "jax", "flax"):
    try:
        importlib.import_module("maskedlinear." + face)
    except ModuleNotFoundError as error:
        print(error)
"""
    printed = run(python, "-c", code, cwd=tmp_path)
    assert "(3, 3)" in printed
    for face in ("torch", "jax", "flax"):
        assert f'pip install "maskedlinear[{face}]"' in printed
    assert "maskedlinear" in run(python, "-m", "maskedlinear", "--version", cwd=tmp_path)


def test_with_the_frameworks(wheel: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "env")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel, cwd=tmp_path)
    # The frameworks come from this environment. A path named in a .pth file does not have its own .pth files read, so
    # the editable install that lives there is not seen.
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (site / "frameworks.pth").write_text(sysconfig.get_path("purelib"))
    where = run(
        python, "-c", "import maskedlinear, maskedlinear_torch; print(maskedlinear_torch.__file__)", cwd=tmp_path
    )
    assert Path(where.strip()).is_relative_to(tmp_path)
    out = run(
        *(python, "-m", "maskedlinear_conformance", "--backend", "torch", "--backend", "jax"),
        *("-k", "(each_other or leak or zero) and (float32 or bfloat16)"),
        cwd=tmp_path,
    )
    assert "torch - jax" in out
    assert "passed" in out.splitlines()[-1]
