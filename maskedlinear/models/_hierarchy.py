"""What the networks of a hierarchy check, whatever the framework."""

from __future__ import annotations

from typing import Any

from maskedlinear.masks import LayeredWiring

__all__ = ["check_hierarchy"]


def check_hierarchy(layers: Any, n_outputs: Any, dropout: Any) -> None:
    """Check what a ``PathwayNetwork`` is made of.

    Raises:
        TypeError: if ``layers`` is no ``LayeredWiring``, or a number none.
        ValueError: if a number is outside its range.
    """
    if not isinstance(layers, LayeredWiring):
        raise TypeError(
            f"a PathwayNetwork is made of a LayeredWiring; got {type(layers).__name__}: "
            "LayeredWiring((wiring, ...)) makes one of wirings that follow on each other"
        )
    if isinstance(n_outputs, bool) or not isinstance(n_outputs, int):
        raise TypeError(f"n_outputs must be a whole number; got {n_outputs!r}")
    if n_outputs < 1:
        raise ValueError(f"n_outputs must be at least 1; got {n_outputs}")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float):
        raise TypeError(f"dropout must be a number; got {dropout!r}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout is a probability, between 0 and 1; got {dropout}")
