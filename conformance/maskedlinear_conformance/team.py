"""Teams: the processes that the suite starts for the laws that distribution can break, asked as if they were one.

A team lives as long as the run, since to start it takes seconds; all backends share it. One member that fails or hangs takes
the team with it, and what each had said is shown; the next law to ask starts another.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count as number_from
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

__all__ = ["KINDS", "MemberError", "SharedLayer", "Team", "Teams"]

KINDS = ("processes", "devices")
_GRACE = 10.0  # seconds that others have to end after one has failed, or to say where they are
_START_PATIENCE = 300.0
_SAID = 6000  # characters of what each said
_START = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"


class MemberError(RuntimeError):
    """A process of a team has failed, has ended by itself, or has not answered in time."""


class Team:
    """Processes that share layers, each with some devices of its own; started when they are first asked.

    Attributes:
        kind: ``"processes"``, or ``"devices"`` of one process.
        count: how many of them.
    """

    def __init__(self, teams: Teams, kind: str, count: int) -> None:
        self.teams, self.kind, self.count = teams, kind, count
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._numbers = number_from(0)

    def __str__(self) -> str:
        """Name the team, for pytest and the report."""
        return (
            f"{self.count} {self.kind if self.count > 1 else {'processes': 'process', 'devices': 'device'}[self.kind]}"
        )

    def of(self, count: int) -> Team:
        """Return a team of another number."""
        return self.teams.get(self.kind, count)

    def others(self, profile: str) -> list[Team]:
        """Return teams of other numbers, to which checkpoints go: of one, and in larger profiles of more or fewer."""
        counts = [1]
        if profile != "quick":
            counts.append(self.count + 1 if self.kind == "processes" else max(1, self.count // 2))
        return [self.of(number) for number in dict.fromkeys(counts)]

    @contextmanager
    def shared(
        self, made: tuple[type[Any], str], dtype: str, device: str, placement: str, *arrays: Any
    ) -> Iterator[Any]:
        """Give a layer that all members share, see :class:`SharedLayer`; afterwards they let it go."""
        number = next(self._numbers)
        self.ask("make", number, made, dtype, device, placement, arrays)
        yield SharedLayer(self, number)
        if self._processes:
            self.ask("forget", number)

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        """Ask all members the same, and return their answers by rank.

        Raises:
            MemberError: if one fails, ends or does not answer: named, with what each said. The team is gone then.
        """
        if not self._processes:
            self._start()
        # To make a layer, a process may first have to import the framework, and to meet the others.
        patience = max(self.teams.patience, _START_PATIENCE) if method == "make" else self.teams.patience
        answers: dict[int, tuple[bool, Any]] = {}
        for connection in self._connections:
            with suppress(OSError):  # of one that has ended, which shows below
                connection.send((patience, method, *arguments))
        ends = time.monotonic() + patience + _GRACE  # a member that waits too long says where, and ends by itself
        while len(answers) < len(self._connections) and time.monotonic() < ends:
            left = {c: rank for rank, c in enumerate(self._connections) if rank not in answers}
            for ready in wait(list(left), timeout=0.5):
                rank = left[ready]  # type: ignore[index]
                try:
                    answers[rank] = self._connections[rank].recv()
                except (EOFError, OSError):
                    answers[rank] = (False, _ended(self._processes[rank], patience))
                if not answers[rank][0]:
                    ends = min(ends, time.monotonic() + _GRACE)
        failed = {rank: why for rank, (fine, why) in sorted(answers.items()) if not fine}
        silent = [rank for rank in range(len(self._connections)) if rank not in answers]
        if not failed and not silent:
            return [answers[rank][1] for rank in range(len(answers))]
        # First what raised, rather than what waited for it.
        first = min(failed, key=lambda rank: not failed[rank].startswith("raised")) if failed else silent[0]
        why = failed.get(first, f"did not answer within {patience:g} s")
        alike = len(failed) == len(self._connections) and len(set(failed.values())) == 1 and why.startswith("raised")
        said = self.said() if alike else self.stop()  # whoever failed as all others did can go on
        raise MemberError(f"rank {first} of {self} {why} (asked: {method} {_asked(arguments)})\n{said}")

    def said(self) -> str:
        """Return what each has said."""
        if self._folder is None:
            return ""
        folder = Path(self._folder.name)
        texts = (_said(folder, rank).read_text(errors="replace").strip() for rank in range(len(self._processes)))
        return "\n".join(f"rank {rank} said: {text[-_SAID:] or 'nothing'}" for rank, text in enumerate(texts))

    def stop(self) -> str:
        """End the members; return what each said."""
        for connection in self._connections:
            connection.close()  # upon which each ends
        for process in self._processes:
            for last in (signal.SIGABRT, signal.SIGKILL):  # the first prints where it is
                with suppress(subprocess.TimeoutExpired):
                    process.wait(2)
                    break
                process.send_signal(last)
            process.wait()
        said = self.said()
        if self._folder is not None:
            self._folder.cleanup()
        self._processes, self._connections, self._folder = [], [], None
        return said

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="maskedlinear-team-")
        folder = Path(self._folder.name)
        (folder / "meeting").mkdir()
        size, devices = (self.count, 1) if self.kind == "processes" else (1, self.count)
        environment = os.environ | {
            "GLOO_SOCKET_IFNAME": "lo",  # nothing is asked of the machine's network
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
        }
        for rank in range(size):
            ours, theirs = Pipe()
            place = [theirs.fileno(), rank, size, devices, folder / "meeting"]
            program = [sys.executable, "-c", _START, str(Path(__file__).with_name("member.py")), *map(str, place)]
            with _said(folder, rank).open("w") as file:
                process = subprocess.Popen(
                    program,
                    stdout=file,
                    stderr=file,
                    stdin=subprocess.DEVNULL,
                    env=environment,
                    pass_fds=[theirs.fileno()],
                )
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)


class SharedLayer:
    """A layer that the members of a team share: :class:`maskedlinear.backends.DistributedLayer`, all ranks together."""

    def __init__(self, team: Team, number: int) -> None:
        self.team, self._number = team, number

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        """Return what a method returns on each member, or an attribute."""
        return self.team.ask("ask", self._number, method, *arguments)

    def shards(self, method: str, *arguments: Any) -> list[Any]:
        """Return the shards of an array, of all ranks; each of a process or a device."""
        return [shard for shards in self.ask(method, *arguments) for shard in shards]

    def several(self, method: str, *arguments: Any) -> list[list[Any] | None]:
        """Return the shards of several arrays, array by array; ``None`` for one that there is not."""
        found = self.ask(method, *arguments)
        return [
            None if arrays[0] is None else [shard for shards in arrays for shard in shards]
            for arrays in zip(*found, strict=True)
        ]


class Teams:
    """The teams of a run, each started when it is first asked.

    Attributes:
        patience: how many seconds a member has for an answer.
    """

    def __init__(self, patience: float = 300.0) -> None:
        self.patience = patience
        self._teams: dict[tuple[str, int], Team] = {}

    def get(self, kind: str, number: int) -> Team:
        """Return the team of so many ``"processes"`` or ``"devices"``."""
        return self._teams.setdefault((kind, number), Team(self, kind, number))

    def stop(self) -> None:
        """End them all."""
        for team in self._teams.values():
            team.stop()


def _said(folder: Path, rank: int) -> Path:
    return folder / f"said by {rank}"


def _ended(process: subprocess.Popen[bytes], patience: float) -> str:
    """Say how a process ended that has closed its connection: its own clock ends one that hangs, with status 1."""
    try:
        status = process.wait(5)
    except subprocess.TimeoutExpired:
        return "closed its connection"
    return f"did not answer within {patience:g} s" if status == 1 else f"ended by itself, with status {status}"


def _asked(arguments: Sequence[Any]) -> str:
    return " ".join(str(a) for a in arguments if isinstance(a, str | int | float))
