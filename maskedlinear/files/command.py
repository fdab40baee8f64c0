"""What the commands on files have in common: a user's mistake is a line and an exit status, never a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress

from maskedlinear.files.text import is_watched, printable, say

__all__ = ["INTERRUPTED", "PIPE", "TROUBLE", "guarded"]

TROUBLE = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
PIPE = 141  # 128 + SIGPIPE


def guarded(what: str, run: Callable[[], int]) -> int:
    """Return the exit status of ``run``; what goes wrong is told in a line on the standard error stream."""
    try:
        return run()
    except BrokenPipeError:
        # Nobody reads any more, as after `| head`; the interpreter's own last flush would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE
    except KeyboardInterrupt:
        return _told(what, "interrupted", INTERRUPTED)
    except OSError as error:
        named = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        return _told(what, named, TROUBLE)
    except MemoryError as error:
        return _told(what, f"this takes more memory than there is ({error})", TROUBLE)
    except (ValueError, TypeError, ModuleNotFoundError) as error:
        return _told(what, str(error), TROUBLE)


def _told(what: str, message: str, status: int) -> int:
    clear = "\r\x1b[K" if is_watched() else ""  # what a line of progress has left
    with suppress(OSError):  # the status says it too
        say([f"{clear}{what}: {printable(message)}"], sys.stderr)
    return status
