"""``python -m maskedlinear_conformance --backend NAME``: the suite as a command, from an installed package."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite with pytest's own options and ours; return pytest's exit status, non-zero on any failure.

    Args:
        argv: the arguments; ``sys.argv`` without the program if ``None``.
    """
    settings = Path(__file__).with_name("pytest.ini")
    ours = ["-p", "maskedlinear_conformance.plugin", "-p", "no:cacheprovider", "-c", str(settings)]
    given = list(sys.argv[1:] if argv is None else argv)
    return int(pytest.main([*ours, *given, "--pyargs", "maskedlinear_conformance"]))


if __name__ == "__main__":
    sys.exit(main())
