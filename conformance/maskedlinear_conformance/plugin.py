"""The pytest plugin: which backends on which device, what each test runs on, and how each ended."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Generator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from maskedlinear.backends import (
    DIVISIONS,
    LAYOUTS,
    available,
    checked,
    lacking,
)
from maskedlinear_conformance import report
from maskedlinear_conformance.backend_under_test import MODES, BackendUnderTest
from maskedlinear_conformance.cases import CASES, PROFILES, Case, among
from maskedlinear_conformance.faults import ReferenceBackend
from maskedlinear_conformance.golden import goldens
from maskedlinear_conformance.laws import Law
from maskedlinear_conformance.laws.compositions import COMPILED, DERIVATIVES
from maskedlinear_conformance.laws.derivatives import FULL
from maskedlinear_conformance.record import Outcome
from maskedlinear_conformance.run import Run, reason_and_exception

__all__: list[str] = []

_RUN = pytest.StashKey[Run]()
_LARGE = 1 << 10  # products of a case from which rounding shows in half types
_DECLARED = "declared: "  # how the reason of every skip begins that the suite itself asks for


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the suite's options."""
    group = parser.getgroup("maskedlinear")
    group.addoption(
        "--backend",
        action="append",
        default=[],
        metavar="NAME",
        help=f"a backend to prove, in all its formats; once for each. Registered: {', '.join(available())}",
    )
    group.addoption(
        "--format",
        action="append",
        default=[],
        metavar="NAME",
        help="only this format of the backends named; once for each (default: each one's first; with --profile full, all)",
    )
    group.addoption(
        "--device", default="cpu", metavar="NAME", help="where to run, as the backends call it (default: cpu)"
    )
    group.addoption("--profile", choices=PROFILES, help="how much to run (default: default; with --faults: quick)")
    for kind, what in (("processes", "processes on the CPU"), ("devices", "devices of one process")):
        group.addoption(
            f"--{kind}",
            action="append",
            type=int,
            default=[],
            metavar="N",
            help=f"run the laws that distribution can break, and them alone, in N {what}; once for each N",
        )
    group.addoption(
        "--rank-timeout",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="how long a process of --processes or --devices may take for one answer (default: 300)",
    )
    group.addoption("--report", type=Path, metavar="FILE.json", help="write what was found to this file as well")
    group.addoption("--faults", action="store_true", help="prove the suite itself: run it on faulty backends instead")
    group.addoption(
        "--command", action="store_true", help="set by python -m maskedlinear_conformance: --backend is a must"
    )


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Load the backends; one that was named and cannot run is an error of the whole run."""
    config.stash[_RUN] = Run(config)


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say what is about to run."""
    run = config.stash[_RUN]
    return report.header_lines(report.header(run)) if run.backends else []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Say what a law's test runs on: each backend or pair, dtype, case, mode, layout, transform and golden vector."""
    says: Law | None = getattr(metafunc.function, "conformance", None)
    if says is None:
        return
    run = metafunc.config.stash[_RUN]
    own = [label for b in getattr(metafunc.cls, "backends", ()) for label in run.add(checked(b, f"backend {b.name!r}"))]
    labels = own or list(run.backends)
    if not labels:
        raise pytest.UsageError(
            f"{metafunc.cls.__name__} has no backend to prove: set its attribute backends, or name one with --backend"
        )
    first = "pair" if "pair" in metafunc.fixturenames else "subject"
    together: list[tuple[str, ...]] = [(label,) for label in labels]
    if first == "pair":
        together = [] if run.faults else list(combinations(labels, 2))
        for label in labels:
            _forgive_absent_partners(run, metafunc.function.__name__, label, labels)
    axes: dict[str, Callable[[BackendUnderTest], Sequence[Any]]] = {
        "case": lambda subject: [
            case
            for case in CASES
            if run.includes(case.since, subject.profile) and says.cases(case) and _shows(case, subject)
        ],
        "mode": lambda _: MODES,
        "derivative": lambda _: list(DERIVATIVES),
        "compiled": lambda _: list(COMPILED),
        "layout": lambda _: LAYOUTS,
        "transform": _transforms,
        "placement": _placements,
        "golden": lambda subject: [
            golden for golden in goldens() if among(golden.since, subject.profile) and golden.exact_in(subject.dtype)
        ],
    }
    used = [name for name in axes if name in metafunc.fixturenames]

    def tests(profile: str) -> list[Any]:
        rows = [row for several in together for row in _batched(run.subjects(several, says, profile), len(several))]
        return [_param(says, subjects, values) for subjects in rows for values in _product(subjects[0], used, axes)]

    if any(run.stale[label] for label in labels):
        for param in tests("full"):
            _heed_expected(run, f"{metafunc.function.__name__}[{param.id}]", param)
    params = tests(run.profile)
    params += [_without_a_dtype(run, says, several, len(used)) for several in together if run.dtypeless(several, says)]
    if not params:
        # One backend has no partner, no half type, or the profile is too small: nothing to run, and no test that says so.
        params = [pytest.param(*([None] * (1 + len(used))), id=_NOTHING)]
    metafunc.parametrize([first, *used], params)


_NOTHING = "nothing to run"


def _heed_expected(run: Run, name: str, param: Any) -> None:
    """Note which expected failures match a test; one that is declared not to run is none."""
    subjects = param.values[0] if isinstance(param.values[0], tuple) else param.values[:1]
    for subject in () if param.marks else subjects:
        matched = {pattern for pattern in run.stale[subject.label] if fnmatch.fnmatchcase(name, pattern)}
        run.stale[subject.label] -= matched


def _forgive_absent_partners(run: Run, test: str, label: str, labels: Sequence[str]) -> None:
    """Take no expected failure of a pair for stale unless it names a partner that is here."""
    others = [other for other in labels if other != label]
    run.stale[label] = {
        pattern
        for pattern in run.stale[label]
        if pattern.partition("[")[0] != test or any(other in pattern for other in others)
    }


def _batched(subjects: Sequence[BackendUnderTest], size: int) -> list[tuple[BackendUnderTest, ...]]:
    return [tuple(subjects[start : start + size]) for start in range(0, len(subjects), size)]


def _without_a_dtype(run: Run, says: Law, labels: Sequence[str], values: int) -> Any:
    """Return the parameters of a test that is declared, by the dtypes that the backends name, not to run."""
    subjects = [BackendUnderTest(run.backends[label], label, "no dtype") for label in labels]
    names = " and ".join(labels)
    about = f"{names} lack {' and '.join(says.dtypes)}" if says.dtypes else f"{names} have no dtype in common"
    what = tuple(subjects) if len(subjects) > 1 else subjects[0]
    mark = pytest.mark.skip(reason=_DECLARED + about)
    return pytest.param(what, *([None] * values), id=f"{' - '.join(labels)} no dtype", marks=[mark])


def _shows(case: Case, subject: BackendUnderTest) -> bool:
    """Whether a case is for this dtype: small shapes that the quick profile lacks are left to wide types, if there are."""
    wide = set(FULL).intersection(subject.backend.dtypes(subject.device))
    small = case.since != "quick" and case.size < _LARGE
    return subject.profile != "default" or subject.dtype in FULL or not small or not wide


def _transforms(subject: BackendUnderTest) -> Sequence[str]:
    musts = ("compile", "checkpoint", "scan")
    own = subject.backend.transforms() if hasattr(subject.backend, "transforms") else ()
    return list(dict.fromkeys((*musts, *own)))


def _placements(subject: BackendUnderTest) -> Sequence[str]:
    """Return the ways to share a layer; one that stands for all where there is none, which is declared."""
    assert subject.team is not None
    kind = subject.team.kind
    if not subject.has(kind):
        return ["no placement"]
    placements = list(subject.backend.placements(kind))
    for placement in placements:
        if placement.partition(": ")[0] not in DIVISIONS:
            raise pytest.UsageError(
                f"backend {subject.backend.name!r}: a placement is one of {', '.join(DIVISIONS)}, a colon and a name; "
                f"got {placement!r}"
            )
    return placements


def _product(
    subject: BackendUnderTest, used: Sequence[str], axes: dict[str, Callable[[BackendUnderTest], Sequence[Any]]]
) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = [()]
    for name in used:
        rows = [(*row, value) for row in rows for value in axes[name](subject)]
    return rows


def _param(says: Law, subjects: tuple[BackendUnderTest, ...], values: tuple[Any, ...]) -> Any:
    needs = [*says.needs, *(value for value in values if isinstance(value, str))]
    needs += [subjects[0].team.kind] if subjects[0].team else []
    declared = set()
    for subject in subjects:
        unsupported = lacking(subject.backend, subject.device)
        for need in needs:
            ways = (need,) if isinstance(need, str) else need
            if all(way in unsupported for way in ways):
                declared |= {f"{subject.label} lacks {way}: {unsupported[way]}" for way in ways}
    names = " - ".join(subject.label for subject in subjects) + f" {subjects[0].dtype}"
    if subjects[0].team and str(subjects[0].team) not in names:  # of a fault, which all teams share
        names += f" {subjects[0].team}"
    marks = [pytest.mark.skip(reason=_DECLARED + "; ".join(sorted(declared)))] if declared else []
    what = subjects if len(subjects) > 1 else subjects[0]
    return pytest.param(what, *values, id=", ".join([names, *map(str, values)]), marks=marks)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the failures that a backend expects, and drop what has nothing to run on."""
    run = config.stash[_RUN]
    items[:] = [item for item in items if not item.name.endswith(f"[{_NOTHING}]")]
    for item in items:
        for subject in _subjects(item):
            for pattern, why in subject.backend.expected_failures(run.device).items():
                if fnmatch.fnmatchcase(item.name, pattern):
                    reason, raised = reason_and_exception(why)
                    item.add_marker(pytest.mark.xfail(reason=reason, raises=raised, strict=True))


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    """Note that the caller chose: what did not run is then what was not asked for."""
    for item in items:
        if _subjects(item):
            item.config.stash[_RUN].partial = True


def _subjects(item: pytest.Item) -> tuple[BackendUnderTest, ...]:
    params = getattr(getattr(item, "callspec", None), "params", {})
    found: tuple[Any, ...] = params["pair"] if "pair" in params else (params.get("subject"),)
    return tuple(subject for subject in found if isinstance(subject, BackendUnderTest))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """Under ``--faults``, leave out what a law has yet to say of a fault that it has caught already."""
    caught = item.config.stash[_RUN].record.caught
    says: Law | None = getattr(getattr(item, "function", None), "conformance", None)
    is_known = says is not None and any((subject.label, says.number) in caught for subject in _subjects(item))
    return True if is_known else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note how a law's test ended; under ``--faults``, a broken law is what is wanted of a faulty backend."""
    result = yield
    subjects = _subjects(item)
    says: Law | None = getattr(getattr(item, "function", None), "conformance", None)
    if says is None or not subjects or (call.when != "call" and result.passed) or call.when == "teardown":
        return result
    run = item.config.stash[_RUN]
    if result.skipped and not _is_asked_for(result, call):
        _skipped_by_itself(result)
    status, message = _status(result)
    broken = call.excinfo is not None and call.excinfo.errisinstance(AssertionError)
    if run.faults and status == "failed" and broken and subjects[0].label != ReferenceBackend.name:
        status, result.outcome, result.wasxfail = "caught", "skipped", "the fault was caught"
        message = str(call.excinfo.value).partition("\n")[0] if call.excinfo else ""
    labels = tuple(subject.label for subject in subjects)
    run.record.ended(Outcome(says.number, labels, item.name, status, message))
    return result


def _is_asked_for(result: pytest.TestReport, call: pytest.CallInfo[None]) -> bool:
    """Whether a skip is a declared one, or an expected failure; what is called may raise either by itself."""
    if hasattr(result, "wasxfail"):
        return call.excinfo is None or not call.excinfo.errisinstance(pytest.xfail.Exception)
    return call.when == "setup" and _reason(result).startswith(_DECLARED)


def _skipped_by_itself(result: pytest.TestReport) -> None:
    """Make a failure of a skip that nobody declared."""
    reason = str(result.__dict__.pop("wasxfail", None) or _reason(result))
    result.outcome = "failed"
    result.longrepr = f"skipped, which proves nothing: {reason}: declare it in unsupported() or expected_failures()"


def _reason(result: pytest.TestReport) -> str:
    said = str(result.longrepr[2] if isinstance(result.longrepr, tuple) else result.longrepr)
    return said.removeprefix("Skipped: ")


def _status(result: pytest.TestReport) -> tuple[str, str]:
    if hasattr(result, "wasxfail"):
        return ("expected failure" if result.skipped else "failed"), str(result.wasxfail)
    if result.passed:
        return "passed", ""
    if result.skipped:
        return "declared", _reason(result).removeprefix(_DECLARED)
    crash = getattr(result.longrepr, "reprcrash", None)
    return "failed", str(crash.message if crash else result.longrepr).partition("\n")[0]


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the processes of the run."""
    if _RUN in config.stash:
        config.stash[_RUN].teams.stop()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail a run in which nothing was proven, or a fault was not caught; write the report."""
    run = session.config.stash.get(_RUN, None)
    if run is None or not run.backends or session.config.option.collectonly:
        return
    run.chosen = {subject.label for item in session.items for subject in _subjects(item)}
    if exitstatus == pytest.ExitCode.OK and (run.command or run.chosen):
        if not run.chosen or report.unproven(run) or report.silent(run):
            session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
        elif run.faults and report.uncaught(run):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
    path: Path | None = session.config.getoption("--report")
    if path is not None:
        report.write(run, path, int(session.exitstatus))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what was found."""
    run = config.stash[_RUN]
    if not run.record.outcomes:
        return
    for title, lines in report.sections(run):
        terminalreporter.section(title)
        terminalreporter.write_line("\n".join(lines))
