"""JSON as a checkpoint's header has it: objects, lists, strings, booleans and counts, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, NoReturn

__all__ = ["dumps", "loads", "shown"]


def dumps(value: Any) -> str:
    """Return JSON without spaces."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def loads(text: str) -> Any:
    """Return what a text of JSON says.

    Raises:
        ValueError: if it is none, is nested too deeply, or has a name twice, a fraction, ``NaN``, a number of more than 19
            digits, or a string that is no Unicode.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_unique, parse_float=_refused, parse_constant=_refused, parse_int=_count
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def shown(value: object) -> str:
    """Return what a file says, as it can stand in a message: in quotes, without control characters, and not too long."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{shown(name)} is there twice")
        name.encode()  # raises for half a surrogate pair, which no other program reads
        if isinstance(value, str):
            value.encode()
        found[name] = value
    return found


def _count(digits: str) -> int:
    if len(digits) > 19:
        raise ValueError(f"a number has at most 19 digits; got {shown(digits)}")
    return int(digits)


def _refused(text: str) -> NoReturn:
    raise ValueError(f"numbers are whole; got {shown(text)}")
