"""One process of a team: it makes backends anew, shares layers with the others, and answers what the suite asks of them.

:mod:`maskedlinear_conformance.team` starts it by its path, with the number of the socket to the suite; it imports nothing of
the suite, whose libraries it does not need.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import sys
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

__all__: list[str] = []

_OF_THE_FRAMEWORK = ("value", "gradients", "train", "gathered")  # which take the framework's arrays


class Member:
    """The backends that this process has joined with, and the layers that it shares."""

    def __init__(self, rank: int, size: int, devices: int, folder: Path) -> None:
        self.place = (rank, size, devices, folder)
        self.backends: dict[Any, Any] = {}
        self.layers: dict[int, tuple[Any, str, str, Any]] = {}

    def backend(self, kind: type[Any], format: str) -> Any:
        """Return a backend of this process' own."""
        if (kind, format) not in self.backends:
            made = kind(format)
            made.join(*self.place)
            self.backends[kind, format] = made
        return self.backends[kind, format]

    def make(
        self, number: int, made: tuple[type[Any], str], dtype: str, device: str, placement: str, arrays: tuple[Any, ...]
    ) -> None:
        """Make a layer of whole arrays, and share it."""
        backend = self.backend(*made)
        with backend.strict_precision():
            sent = [None if array is None else backend.asarray(array, dtype, device) for array in arrays]
            self.layers[number] = (backend, dtype, device, backend.distributed_layer(placement, *sent))

    def ask(self, number: int, method: str, *arguments: Any) -> Any:
        """Call a method of a shared layer, or return an attribute."""
        backend, dtype, device, layer = self.layers[number]
        with backend.strict_precision():
            if method in _OF_THE_FRAMEWORK:
                arguments = tuple(
                    backend.asarray(a, dtype, device) if isinstance(a, np.ndarray) else a for a in arguments
                )
            found = getattr(layer, method)
            return found(*arguments) if callable(found) else found

    def forget(self, number: int) -> None:
        """Let a layer go."""
        self.layers.pop(number, None)


def main(socket: int, rank: int, size: int, devices: int, folder: Path) -> None:
    """Answer one request after the other, until the suite ends or takes too long an answer for none."""
    connection = Connection(socket)
    member = Member(rank, size, devices, folder)
    with suppress(EOFError, OSError):  # the suite has ended
        while True:
            content = connection.recv_bytes()
            try:
                patience, method, *arguments = pickle.loads(content)
                faulthandler.dump_traceback_later(patience, exit=True)
                answer = (True, getattr(member, method)(*arguments))
            except BaseException as error:
                traceback.print_exc()
                answer = (False, f"raised {type(error).__name__}: {error}")
            finally:
                faulthandler.cancel_dump_traceback_later()
            sys.stdout.flush()
            sys.stderr.flush()
            connection.send(answer)
    # All have answered. None takes gloo's threads down, which may abort: pytorch/pytorch#190489, #179291.
    os._exit(0)


if __name__ == "__main__":
    faulthandler.enable()
    numbers = [int(argument) for argument in sys.argv[1:5]]
    main(numbers[0], numbers[1], numbers[2], numbers[3], Path(sys.argv[5]))
