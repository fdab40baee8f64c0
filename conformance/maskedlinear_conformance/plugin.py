"""The pytest plugin: which backends on which device, what ran, and the tables at the end."""

from __future__ import annotations

import itertools
import platform
from collections.abc import Sequence

import pytest

from maskedlinear import __version__
from maskedlinear.backends import Backend, BackendNotAvailableError, available, load
from maskedlinear_conformance.record import Record

__all__: list[str] = []

_BACKENDS = pytest.StashKey[list[Backend]]()
_RECORD = pytest.StashKey[Record]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --backend and --device."""
    group = parser.getgroup("maskedlinear")
    group.addoption(
        "--backend",
        action="append",
        default=[],
        metavar="NAME",
        help=f"a backend to prove; once for each. Registered: {', '.join(available())}",
    )
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where to run (default: cpu)")


def pytest_configure(config: pytest.Config) -> None:
    """Load the backends; one that was named and cannot run is an error of the whole run."""
    names = list(dict.fromkeys(config.getoption("--backend")))
    if not names:
        raise pytest.UsageError(f"name at least one backend with --backend; registered: {', '.join(available())}")
    device = config.getoption("--device")
    backends = []
    for name in names:
        try:
            backend = load(name)
        except (BackendNotAvailableError, TypeError) as error:
            raise pytest.UsageError(str(error)) from error
        if device not in backend.devices():
            raise pytest.UsageError(
                f"backend {name!r} has no device {device!r} here; it has: {', '.join(backend.devices())}"
            )
        backends.append(backend)
    config.stash[_BACKENDS] = backends
    config.stash[_RECORD] = Record()


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say what is about to run."""
    device = config.getoption("--device")
    lines = [f"maskedlinear {__version__}, Python {platform.python_version()}, device {device}"]
    for backend in config.stash[_BACKENDS]:
        versions = ", ".join(f"{library} {version}" for library, version in backend.versions().items())
        dtypes = ", ".join(backend.dtypes(device))
        lines.append(f"backend {backend.name}: {versions}; on {backend.device_name(device)}; {dtypes}")
    return lines


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test for every backend, or pair of backends, in every dtype that they have on the device."""
    device = metafunc.config.getoption("--device")
    backends = metafunc.config.stash[_BACKENDS]

    def each(groups: Sequence[tuple[Backend, ...]]) -> list[tuple[tuple[Backend, ...], str]]:
        return [
            (group, dtype)
            for group in groups
            for dtype in group[0].dtypes(device)
            if all(dtype in backend.dtypes(device) for backend in group)
        ]

    if "pair" in metafunc.fixturenames:
        runs = each(list(itertools.combinations(backends, 2)))
        names = [f"{one.name} - {other.name}, {dtype}" for (one, other), dtype in runs]
        metafunc.parametrize(("pair", "dtype"), runs, ids=names)
    elif "backend" in metafunc.fixturenames:
        singles = [(backend, dtype) for (backend,), dtype in each([(backend,) for backend in backends])]
        metafunc.parametrize(("backend", "dtype"), singles, ids=[f"{b.name}, {dtype}" for b, dtype in singles])


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """The device of the run: ``"cpu"`` or ``"cuda"``."""
    return str(request.config.getoption("--device"))


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    """Where the tests note how much of a bound was used."""
    return request.config.stash[_RECORD]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out comparisons of pairs when there is one backend: there is no pair to compare."""
    if len(config.stash[_BACKENDS]) == 1:
        items[:] = [item for item in items if "pair" not in getattr(item, "fixturenames", ())]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print how much of the bound the results used."""
    measured = config.stash[_RECORD]
    if measured.spec:
        terminalreporter.section("largest distance from the spec, in units of the bound (at most 1)")
        terminalreporter.write_line("\n".join(measured.spec_table()))
    if measured.pairs:
        terminalreporter.section("largest difference between backends, in units of the bound (at most 1)")
        terminalreporter.write_line("\n".join(measured.pair_table()))
