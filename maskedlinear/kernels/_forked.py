"""Whether this process was forked: the threads of a pool stay behind in the parent, and OpenMP would wait for them."""

from __future__ import annotations

import os

__all__ = ["is_forked"]

_forked = False


def is_forked() -> bool:
    """Whether this process is a child that was forked after this package was imported: its products run on one thread.

    >>> is_forked()
    False
    """
    return _forked


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
