"""``python -m maskedlinear_conformance --backend NAME``: the suite as a command, from an installed package."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite with pytest's own options and ours.

    Args:
        argv: the arguments; ``sys.argv`` without the program if ``None``.

    Returns:
        pytest's exit status: 0 only if something was proven and nothing failed; 1 on any failure, 4 on a backend that is
        missing, 5 if nothing ran.
    """
    settings = Path(__file__).with_name("pytest.ini")
    ours = ["-p", "maskedlinear_conformance.plugin", "-p", "no:cacheprovider", "-c", str(settings), "--command"]
    given = list(sys.argv[1:] if argv is None else argv)
    return int(pytest.main([*ours, *given, "--pyargs", "maskedlinear_conformance.test_backends"]))


if __name__ == "__main__":
    sys.exit(main())
