"""The built wheel, installed and used from outside the repository: with nothing else, and with the frameworks."""

from __future__ import annotations

import os
import re
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
    for needed in (
        "maskedlinear/py.typed",
        "maskedlinear_jax/flax/__init__.py",
        "maskedlinear_conformance/pytest.ini",
        "maskedlinear_conformance/golden/v1.safetensors",
    ):
        assert needed in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
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


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with the built wheel, and with the frameworks of this environment."""
    path = tmp_path_factory.mktemp("with frameworks")
    python = environment(path / "env")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel, cwd=path)
    # A path named in a .pth file does not have its own .pth files read, so the editable install that lives there is not
    # seen.
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=path).strip())
    (site / "frameworks.pth").write_text(sysconfig.get_path("purelib"))
    where = run(python, "-c", "import maskedlinear, maskedlinear_torch; print(maskedlinear_torch.__file__)", cwd=path)
    assert Path(where.strip()).is_relative_to(path)
    return python


@pytest.mark.slow
def test_with_the_frameworks(python: Path, tmp_path: Path) -> None:
    out = run(
        *(python, "-m", "maskedlinear_conformance", "--backend", "torch", "--backend", "jax", "--profile", "quick"),
        *("-k", "golden or pass_from_one"),
        cwd=tmp_path,
    )
    assert "passed 6" in out
    assert "passed" in out.splitlines()[-1]


def third_party(python: Path, folder: Path, name: str, path: Path) -> str:
    """Build a third party's wheel from ``folder``, install it beside ours, and prove its backend."""
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", path, folder, cwd=path)
    (built,) = path.glob("*.whl")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", built, cwd=path)
    return run(
        python,
        "-m",
        "maskedlinear_conformance",
        "--backend",
        name,
        "--backend",
        "numpy",
        "--profile",
        "quick",
        cwd=path,
    )


@pytest.mark.slow
def test_the_example_of_a_third_partys_backend_is_proven(python: Path, tmp_path: Path) -> None:
    folder = ROOT / "examples" / "third_party_backend"
    assert len((folder / "maskedlinear_scipy.py").read_text().splitlines()) <= 100
    out = third_party(python, folder, "scipy", tmp_path)
    assert "scipy csr - numpy dense" in out
    assert "lacks reverse over reverse" in out
    assert "failed" not in out.splitlines()[-1]


@pytest.mark.slow
def test_the_page_on_writing_a_backend_works_from_an_empty_folder(python: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "writing-a-backend.md").read_text()
    files = dict(re.findall(r"^`([\w.]+)`:\n\n```\w+\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL))
    assert set(files) == {"pyproject.toml", "my_backend.py"}
    folder = tmp_path / "empty"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    out = third_party(python, folder, "mine", tmp_path)
    assert "mine dense - numpy dense" in out
    assert "not written yet" in out
    (folder / "my_backend.py").write_text(
        files["my_backend.py"].replace("np.where(mask, weight, 0)", "(mask * weight)")
    )
    with pytest.raises(AssertionError, match="test_nothing_stored_under_the_mask_leaks"):
        third_party(python, folder, "mine", tmp_path)
