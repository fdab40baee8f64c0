"""The state of an optimizer as JSON: numbers, strings and containers of a closed list, and tensors by reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["Path", "decode", "encode"]

Path = tuple[str | int, ...]

_DIGITS = 18  # of a whole number that the header's JSON has as one


def encode(value: Any, tensor: Callable[[Any, Path], dict[str, Any] | None], path: Path = ()) -> Any:
    """Return a structure as what JSON holds.

    Args:
        value: of ``None``, booleans, numbers, strings, lists, tuples, dictionaries with strings or whole numbers for keys,
            and the framework's tensors.
        tensor: returns how a tensor is referred to, an object that :func:`decode` hands to its own ``tensor``; of anything
            else ``None``. Gets the keys and indices at which it stands, too.

    Raises:
        TypeError: if there is something else in it; the message says where.
    """
    told = tensor(value, path)
    if told is not None:
        return told
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return value if abs(value) < 10**_DIGITS else {"int": str(value)}
    if isinstance(value, float):
        return {"float": repr(float(value))}
    if isinstance(value, list | tuple):
        items = [encode(item, tensor, (*path, place)) for place, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, Mapping) and all(type(key) in (str, int) for key in value):
        return {"dict": [[key, encode(item, tensor, (*path, key))] for key, item in value.items()]}
    raise TypeError(
        "the state of an optimizer is saved if it is of None, booleans, numbers, strings, lists, tuples, dictionaries and "
        f"tensors; got {type(value).__name__} at {'.'.join(map(str, path)) or 'the top'}: save it by itself"
    )


def decode(told: Any, tensor: Callable[[Mapping[str, Any], Path], Any], path: Path = ()) -> Any:
    """Return what :func:`encode` made JSON of.

    Args:
        told: the JSON, from a file: nothing of it is believed.
        tensor: returns the tensor that an object refers to, or raises a ``ValueError``.

    Raises:
        ValueError: if it is something else.
    """
    if told is None or isinstance(told, bool | str | int):
        return told
    if isinstance(told, list):
        return [decode(item, tensor, (*path, place)) for place, item in enumerate(told)]
    kind, held = next(iter(told.items())) if isinstance(told, dict) and told else ("", None)
    if kind == "float" and len(told) == 1 and isinstance(held, str) and len(held) < 40:
        return float(held)
    if kind == "int" and len(told) == 1 and isinstance(held, str) and len(held) < 4000:
        return int(held)
    if kind == "tuple" and len(told) == 1 and isinstance(held, list):
        return tuple(decode(held, tensor, path))
    if kind == "dict" and len(told) == 1 and isinstance(held, list):
        items: dict[str | int, Any] = {}
        for pair in held:
            if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) not in (str, int) or pair[0] in items:
                raise ValueError(f"a dictionary is of pairs, each key once; got {str(pair)[:100]}")
            items[pair[0]] = decode(pair[1], tensor, (*path, pair[0]))
        return items
    if not isinstance(told, dict):
        raise ValueError(f"got {str(told)[:100]}")
    return tensor(told, path)
