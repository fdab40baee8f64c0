"""Every Python snippet of the README runs as shown; the snippets of one section share their names."""

from __future__ import annotations

import re
import tomllib

import pytest

from forked import JAX, TORCH
from helpers import ROOT, python

README = (ROOT / "README.md").read_text()


def sections() -> dict[str, str]:
    found = {}
    for section in re.split(r"^## ", README, flags=re.MULTILINE)[1:]:
        snippets = re.findall(r"^```python\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
        if snippets:
            found[section.splitlines()[0]] = "\n".join(snippets)
    return found


def test_there_is_one_for_each_framework() -> None:
    assert list(sections()) == [
        "PyTorch",
        "Flax",
        "Plain JAX",
        "The sparse form: really smaller, really faster",
        "Where masks come from, and how they change",
        "Files, and from one framework to the other",
        "Coming from `CustomizedLinear` and `gen_mask`",
    ]


@pytest.mark.parametrize("section", sections())
def test_snippets_run(section: str) -> None:
    code = "import warnings; warnings.simplefilter('error')\n" + sections()[section]
    result = python(code, imported=TORCH if "torch" in code else JAX)
    assert result.returncode == 0, result.stderr


def test_oldest_versions_are_those_of_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    oldest = {
        re.split(">=", need)[0]: re.split(">=", need)[1] for needs in extras.values() for need in needs if ">=" in need
    }
    assert f"PyTorch {oldest['torch']}, JAX {oldest['jax']} and Flax {oldest['flax']}" in README


def test_local_links_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
