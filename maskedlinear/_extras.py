"""What a face says when its framework is not there, in one place for all faces."""

from __future__ import annotations

__all__ = ["missing_framework"]


def missing_framework(error: ModuleNotFoundError, face: str, extra: str, *frameworks: str) -> ModuleNotFoundError:
    """Return the error to raise in place of ``error``: a remedy if a framework is missing, else ``error`` unchanged."""
    if error.name not in frameworks:
        return error
    return ModuleNotFoundError(
        f'{face} needs {error.name}, which is not installed. Install it with: pip install "maskedlinear[{extra}]"',
        name=error.name,
    )
