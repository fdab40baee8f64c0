"""The package as a whole: what it imports, what its faces say, what it exports."""

from __future__ import annotations

import importlib

import pytest

from helpers import ROOT, python

FRAMEWORKS = ("torch", "jax", "jaxlib", "flax", "optax")

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {names!r}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Block())
"""


def test_core_imports_no_framework() -> None:
    code = f"import sys, maskedlinear, maskedlinear.cli; print([m for m in {FRAMEWORKS!r} if m in sys.modules])"
    result = python(code)
    assert result.stdout.strip() == "[]", result.stderr


def test_core_needs_only_numpy_and_array_api_compat() -> None:
    code = """
import sys
before = set(sys.modules)  # what .pth files load at the interpreter's start is not ours
import maskedlinear, maskedlinear.masks, maskedlinear.spec, maskedlinear.backends, maskedlinear.cli
import importlib.metadata as metadata
tops = {m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)
owners = metadata.packages_distributions()
print(sorted({d for top in tops for d in owners.get(top, []) if getattr(sys.modules.get(top), '__file__', None)}))
"""
    result = python(code)
    names = set(eval(result.stdout)) - {"maskedlinear"}
    assert {name.lower() for name in names} == {"numpy", "array-api-compat"}, names


@pytest.mark.parametrize(
    ("face", "missing", "extra"),
    [
        ("torch", "torch", "torch"),
        ("jax", "jax", "jax"),
        ("jax", "optax", "jax"),
        ("flax", "flax", "flax"),
        ("flax", "jax", "flax"),
        ("lightning", "torch", "lightning"),
        ("transformers", "transformers", "transformers"),
        ("peft", "torch", "torch"),
        ("hub", "torch", "torch"),
    ],
)
def test_face_names_the_extra_to_install(face: str, missing: str, extra: str) -> None:
    result = python(BLOCK.format(names={missing}) + f"import maskedlinear.{face}")
    last = result.stderr.strip().splitlines()[-1]
    assert last == (
        f"ModuleNotFoundError: maskedlinear.{face} needs {missing}, which is not installed. "
        f'Install it with: pip install "maskedlinear[{extra}]"'
    )


@pytest.mark.parametrize(("face", "needed"), [("peft", "peft"), ("hub", "huggingface_hub")])
def test_only_its_face_needs_a_library(face: str, needed: str) -> None:
    result = python(
        BLOCK.format(names={needed}) + f"import maskedlinear.torch; print('here'); import maskedlinear.{face}"
    )
    assert result.stdout.strip() == "here"
    assert result.stderr.strip().splitlines()[-1] == (
        f"ModuleNotFoundError: maskedlinear.{face} needs {needed}, which is not installed. "
        f"Install it with: pip install {needed}"
    )


@pytest.mark.parametrize("missing", ["pytest", "hypothesis", "safetensors"])
def test_the_suite_names_the_extra_to_install(missing: str) -> None:
    last = python(BLOCK.format(names={missing}) + "import maskedlinear_conformance").stderr.strip().splitlines()[-1]
    assert last == (
        f"ModuleNotFoundError: maskedlinear_conformance needs {missing}, which is not installed. "
        'Install it with: pip install "maskedlinear[conformance]"'
    )


def test_face_passes_other_import_errors_on() -> None:
    code = """
import sys, types
broken = types.ModuleType('torch'); broken.__version__ = '2.9.0'; broken.__path__ = []
sys.modules['torch'] = broken
import maskedlinear.torch
"""
    last = python(code).stderr.strip().splitlines()[-1]
    assert "maskedlinear[torch]" not in last
    assert "cannot import name 'Tensor' from 'torch'" in last


@pytest.mark.parametrize(
    ("face", "framework", "attributes", "need"),
    [
        ("torch", "torch", "__version__ = '2.5.1'", "torch >= 2.6"),
        ("jax", "jax", "__version__ = '0.5.3'; fake.__version_info__ = (0, 5, 3)", "jax >= 0.6"),
        ("flax", "flax", "__version__ = '0.12.0'; fake.nnx = types.SimpleNamespace(Variable=object)", "flax >= 0.12.1"),
    ],
)
def test_an_old_framework_is_refused(face: str, framework: str, attributes: str, need: str) -> None:
    code = f"""
import sys, types
fake = types.ModuleType({framework!r}); fake.{attributes}
sys.modules[{framework!r}] = fake
import maskedlinear.{face}
"""
    last = python(code).stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError:")
    assert need in last
    assert fake_version(attributes) in last


def fake_version(attributes: str) -> str:
    return attributes.split("'")[1]


PUBLIC = [
    "maskedlinear",
    "maskedlinear.backends",
    "maskedlinear.reference",
    "maskedlinear.masks",
    "maskedlinear.spec",
    "maskedlinear.torch",
    "maskedlinear.jax",
    "maskedlinear.flax",
    "maskedlinear.hub",
    "maskedlinear.lightning",
    "maskedlinear.peft",
    "maskedlinear.transformers",
    "maskedlinear_conformance",
]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_exists_and_is_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    for public in module.__all__:
        value = getattr(module, public)
        assert getattr(value, "__doc__", None), f"{name}.{public} has no docstring"


def test_every_package_is_typed() -> None:
    for package in (
        "maskedlinear",
        "backends/maskedlinear_torch",
        "backends/maskedlinear_jax",
        "conformance/maskedlinear_conformance",
    ):
        assert (ROOT / package / "py.typed").is_file()
