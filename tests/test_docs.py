"""Every Python snippet of the pages for users runs as shown: a page is one program."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from forked import JAX, TORCH
from helpers import ROOT, python

PAGES = [
    "constraints.md",
    "cpu-kernels.md",
    "exporting.md",
    "many-processes.md",
    "packing.md",
    "pruning-methods.md",
    "recurrent.md",
    "saving.md",
    "when-sparse-pays.md",
    "wirings.md",
]
DEAR = {"AOTInductor"}  # sections apart, which compile C++
# Warnings are errors, but for torch's own while it exports and compiles.
PRELUDE = """
import warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", ".isinstance.treespec, LeafSpec", FutureWarning)
warnings.filterwarnings("ignore", ".torch.jit.script_method. is deprecated", DeprecationWarning)
"""


def programs() -> list[object]:
    found = []
    for page in PAGES:
        sections = re.split(r"^## ", (ROOT / "docs" / page).read_text(), flags=re.MULTILINE)[1:]
        code = {
            text.splitlines()[0]: "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.M | re.S))
            for text in sections
        }
        found.append(pytest.param("\n".join(code[name] for name in code if name not in DEAR), id=page))
        found += [pytest.param(code[name], id=name, marks=pytest.mark.slow) for name in code if name in DEAR]
    return found


@pytest.mark.parametrize("code", programs())
def test_snippets_run(code: str, tmp_path: Path) -> None:
    assert code
    result = python(PRELUDE + code, tmp_path, imported=TORCH if "torch" in code else JAX)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("page", PAGES)
def test_local_links_exist(page: str) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / "docs" / page).read_text()):
        assert (ROOT / "docs" / target).exists(), target
