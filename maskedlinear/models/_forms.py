"""The connections that ``compress`` is told for plain layers, checked: a model is compressed without a dense one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maskedlinear.models._summary import first_names
from maskedlinear.pattern import SparsityPattern

__all__ = ["check_patterns"]


def check_patterns(
    patterns: Mapping[str, Any], plain: Mapping[str, tuple[int, int]], others: Mapping[str, str]
) -> None:
    """Check that each pattern is of a plain layer, and fits it.

    Args:
        patterns: by the names of layers, as ``compress`` was given them.
        plain: ``(out, in)`` of the layers that they may be of, by name.
        others: why another layer cannot be given a pattern, by name.

    Raises:
        TypeError: if one is no :class:`SparsityPattern`.
        ValueError: if one is of no such layer, or has another shape.
    """
    for name, pattern in patterns.items():
        if name in others:
            raise ValueError(f"{name or 'the layer'} cannot be given a pattern: {others[name]}")
        if name not in plain:
            raise ValueError(
                f"patterns are of plain linear layers, by name: {first_names(list(plain)) or 'there are none'}; got {name!r}"
            )
        if not isinstance(pattern, SparsityPattern):
            raise TypeError(
                f"the pattern of {name!r} must be a SparsityPattern; got {type(pattern).__name__}: of a mask (out, in), "
                "SparsityPattern.from_mask(mask)"
            )
        if pattern.shape != plain[name]:
            fits = ", which is its transpose" if pattern.shape == plain[name][::-1] else ""
            raise ValueError(
                f"the pattern of {name!r} must have its shape (out, in) = {plain[name]}; got {pattern.shape}{fits}"
            )
