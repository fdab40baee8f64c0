"""``Run``: what the caller asked for, the backends and teams that take part, and what each law's test runs on."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from maskedlinear.backends import Backend, BackendNotAvailableError, available, checked, load
from maskedlinear_conformance.backend_under_test import BackendUnderTest
from maskedlinear_conformance.bounds import DTYPES
from maskedlinear_conformance.cases import among
from maskedlinear_conformance.faults import FAULTS, ReferenceBackend
from maskedlinear_conformance.laws import LAWS, OF_DISTRIBUTION, Law
from maskedlinear_conformance.laws.distribution import Distribution
from maskedlinear_conformance.record import Record
from maskedlinear_conformance.team import KINDS, Team, Teams

__all__ = ["Run", "reason_and_exception"]


class Run:
    """One run of the suite: its settings, its backends, and what it found."""

    def __init__(self, config: pytest.Config) -> None:
        self.device: str = config.getoption("--device")
        self.faults: bool = config.getoption("--faults")
        self.profile: str = config.getoption("--profile") or ("quick" if self.faults else "default")
        self.seeded = config.getoption("--hypothesis-seed", None) is not None
        self.command: bool = config.getoption("--command")
        self.teams = Teams(config.getoption("--rank-timeout"))
        self.asked = _teams(config, self.teams)
        self.distributed = bool(self.asked)
        self.laws: dict[str, str] = {
            number: title
            for number, title in LAWS.items()
            if self.faults or (number in OF_DISTRIBUTION) == self.distributed
        }
        self.record = Record()
        path: Path | None = config.getoption("--report")
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise pytest.UsageError(f"--report must be a file in a folder that exists; got {path}")
        self.left_out: list[str] = []  # further formats than a backend's first, which only full runs unasked
        self.backends: dict[str, Backend] = {}
        self.share: dict[str, list[Team]] = {}  # who shares a backend's layers, by its label
        self.stale: dict[str, set[str]] = {}  # expected failures of each that match no test of any profile
        self.chosen: set[str] = set()  # those of the backends that a test was selected for
        self.partial = False  # whether the caller chose among the tests, so that a law may be left out
        names = list(dict.fromkeys(config.getoption("--backend")))
        if self.faults:
            if names or self.distributed:
                raise pytest.UsageError("--faults brings its own backends: leave out --backend, --processes, --devices")
            self.asked = [self.teams.get("processes", 2), self.teams.get("devices", 4)]
            for made in (ReferenceBackend(), *(fault() for fault in FAULTS.values())):
                self.add(made)
        elif self.command and not names:
            raise pytest.UsageError(f"name at least one backend with --backend; registered: {', '.join(available())}")
        chosen: list[str] = config.getoption("--format")
        for name in names:
            try:
                loaded = load(name)
                missing = set(chosen) - {backend.format for backend in loaded}
                if missing == set(chosen) != set():
                    raise pytest.UsageError(
                        f"backend {name!r} has none of the formats {', '.join(sorted(missing))}; it has: "
                        f"{', '.join(backend.format for backend in loaded)}"
                    )
                for backend in loaded:
                    if chosen and backend.format not in chosen:
                        continue
                    if not chosen and backend is not loaded[0] and self.profile != "full":
                        self.left_out.append(f"{backend.name} {backend.format}")
                    else:
                        self.add(backend)
            except (BackendNotAvailableError, TypeError) as error:
                raise pytest.UsageError(str(error)) from error

    def add(self, backend: Any) -> list[str]:
        """Take a backend into the run; return its label, or one for each team that is to share its layers."""
        if self.faults:
            return [self._add(backend, backend.name, self.asked)]
        label = f"{backend.name} {backend.format}"
        return [self._add(backend, f"{label}, {team}", [team]) for team in self.asked] or [
            self._add(backend, label, [])
        ]

    def _add(self, backend: Any, label: str, teams: list[Team]) -> str:
        if label in self.backends and self.backends[label] is not backend:
            raise pytest.UsageError(
                f"two backends of this run are called {label!r}, and only one would be proven: give each class its own name"
            )
        if label not in self.backends:
            self._heed(backend)
            self.backends[label], self.share[label] = backend, teams
            self.stale[label] = {name for name in backend.expected_failures(self.device) if self._asks_for_any(name)}
        return label

    def _heed(self, backend: Backend) -> None:
        """Refuse a backend that cannot say what the run needs to know of it."""
        called = f"backend {backend.name!r}"
        try:
            devices = backend.devices()
            if self.device not in devices:
                raise pytest.UsageError(f"{called} has no device {self.device!r} here; it has: {', '.join(devices)}")
            dtypes = backend.dtypes(self.device)
            backend.versions().items()
            backend.device_name(self.device)
            expected = backend.expected_failures(self.device)
        except Exception as error:
            if isinstance(error, pytest.UsageError):
                raise
            raise pytest.UsageError(f"{called} cannot be described: {type(error).__name__}: {error}") from error
        if not isinstance(expected, Mapping):
            raise pytest.UsageError(
                f"{called}: expected_failures must return a dictionary of patterns and reasons; got {expected!r}: "
                "return {} if there are none"
            )
        for pattern, why in expected.items():
            reason, raised = reason_and_exception(why)
            if not isinstance(reason, str) or not reason.strip() or not _is_exception(raised):
                raise pytest.UsageError(
                    f"{called}: expected_failures must give a reason in words, or a reason and an exception; "
                    f"got {why!r} for {pattern!r}"
                )
        try:
            checked(backend, called, self.device)
        except TypeError as error:
            raise pytest.UsageError(f"{error} (device {self.device!r})") from error
        if not dtypes or not set(dtypes) <= set(DTYPES):
            raise pytest.UsageError(
                f"{called}: dtypes must return one or more of {', '.join(DTYPES)}; got {list(dtypes)}: leave out the others"
            )

    def asks_for(self, says: Law) -> bool:
        """Whether this is a run for such laws: for those of distribution, or for the others."""
        return says.number in self.laws

    def _asks_for_any(self, pattern: str) -> bool:
        """Whether an expected failure is of a law that this run is for."""
        name = pattern.partition("[")[0]
        shared = any(fnmatch.fnmatchcase(test, name) for test in vars(Distribution))
        return self.faults or shared == self.distributed

    def dtypeless(self, labels: Sequence[str], says: Law) -> bool:
        """Whether a test cannot run because these backends, together, have none of the dtypes that it is about."""
        if self.faults or not self.asks_for(says):
            return False
        kinds = [set(self.backends[label].dtypes(self.device)) for label in labels]
        return not set.intersection(*kinds, set(says.dtypes or DTYPES))

    def includes(self, since: str, profile: str) -> bool:
        """Whether what belongs to ``since`` runs in ``profile``; on faults what the default one has always does."""
        return among(since, "default" if self.faults and profile == "quick" else profile)

    def subjects(self, labels: Sequence[str], says: Law, profile: str) -> list[BackendUnderTest]:
        """Return the backends of ``labels``, in each dtype that a test of ``profile`` runs in and that all of them have.

        Of a faulty one, nothing for a law that it need not break.
        """
        if self.faults and not all(
            label == ReferenceBackend.name or says.number in FAULTS[label].laws for label in labels
        ):
            return []
        dtypes = [dtype for dtype in DTYPES if all(dtype in self.backends[n].dtypes(self.device) for n in labels)]
        if not self.includes(says.since, profile) or not self.asks_for(says):
            return []
        of_distribution = says.number in OF_DISTRIBUTION
        teams = self.share[labels[0]] if of_distribution else [None]
        return [
            BackendUnderTest(self.backends[label], label, dtype, self.device, profile, self.record, self.seeded, team)
            for dtype in says.kinds(dtypes, "full" if self.faults and not of_distribution else profile)
            for team in teams
            for label in labels
        ]


def reason_and_exception(why: Any) -> tuple[Any, Any]:
    """Return the reason of an expected failure, and the exception that it must raise."""
    return why if isinstance(why, tuple) and len(why) == 2 else (why, AssertionError)


def _is_exception(raised: Any) -> bool:
    return isinstance(raised, type) and issubclass(raised, Exception)


def _teams(config: pytest.Config, teams: Teams) -> list[Team]:
    """Return the teams that the caller asks for."""
    found = []
    for kind in KINDS:
        for number in config.getoption(f"--{kind}"):
            if number < 1:
                raise pytest.UsageError(f"--{kind} must be 1 or more; got {number}")
            found.append(teams.get(kind, number))
    return list(dict.fromkeys(found))
