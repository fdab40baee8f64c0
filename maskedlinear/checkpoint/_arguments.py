"""What users hand to the functions of files, checked before anything is read or written."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from maskedlinear.checkpoint._arrays import MaskedArray, PlainArray

__all__ = ["as_metadata", "as_path", "check_arrays", "check_count", "check_flag", "check_names"]


def as_path(path: Any) -> Path:
    """Return a path; anything else is a ``TypeError``."""
    if isinstance(path, str | os.PathLike):
        try:
            return Path(path)
        except TypeError:  # a PathLike of bytes
            pass
    raise TypeError(f"a file is given by its path, a str or a pathlib.Path; got {type(path).__name__}")


def as_metadata(metadata: Any, own: str = "") -> dict[str, str]:
    """Return a user's metadata, checked; none of their keys may begin with what is our ``own``.

    Raises:
        TypeError: if they are no mapping.
        ValueError: if they are no strings by name.
    """
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata are strings by name, as in {{'author': 'me'}}; got {type(metadata).__name__}")
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str) or (own and key.startswith(own)):
            none = f", none of them {own}..." if own else ""
            raise ValueError(f"metadata are strings by name{none}; got {key!r}: {value!r}")
    return dict(metadata)


def check_names(names: Mapping[str, str] | Callable[[str], str] | None) -> None:
    """Raise a ``TypeError`` unless these are strings by strings, or a function."""
    if names is None or callable(names):
        return
    if not isinstance(names, Mapping):
        raise TypeError(
            "names= has what the file calls arrays, by how the model's names begin, as in {'encoder.': 'enc.'}, or is a "
            f"function of a name; got {type(names).__name__}"
        )
    for here, there in names.items():
        if not isinstance(here, str) or not isinstance(there, str):
            raise TypeError(f"names= has strings by strings, as in {{'encoder.': 'enc.'}}; got {here!r}: {there!r}")


def check_flag(name: str, flag: Any) -> None:
    """Raise a ``TypeError`` unless this is ``True`` or ``False``."""
    if not isinstance(flag, bool):
        raise TypeError(f"{name} is True or False; got {flag!r}")


def check_count(name: str, count: Any) -> None:
    """Raise an error unless this is a number of bytes, or ``None``."""
    if count is not None and (not isinstance(count, int) or isinstance(count, bool)):
        raise TypeError(f"{name} is a whole number of bytes; got {count!r}")
    if count is not None and count < 0:
        raise ValueError(f"{name} is a whole number of bytes; got {count}")


def check_arrays(arrays: Any, function: str) -> None:
    """Raise a ``TypeError`` unless these are arrays by name."""
    if not isinstance(arrays, Mapping):
        raise TypeError(
            f"{function} takes arrays by name, as load and read return them; got {type(arrays).__name__}: of a model, save "
            "it, and load the file; or read(model.state_dict())"
        )
    for name, array in arrays.items():
        if not isinstance(name, str):
            raise TypeError(f"{function} takes arrays by name, a string each; got the name {name!r}")
        if not isinstance(array, PlainArray | MaskedArray):
            raise TypeError(
                f"{function} takes arrays as load and read return them; {name!r} is {type(array).__name__}: "
                "read(arrays) makes them of a dictionary of arrays"
            )
