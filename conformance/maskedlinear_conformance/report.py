"""What a run found, for people and as JSON: the header, the laws by backend, the fractions of the bounds."""

from __future__ import annotations

import json
import math
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskedlinear import __version__
from maskedlinear.backends import CAPABILITIES, lacking
from maskedlinear_conformance import golden
from maskedlinear_conformance.faults import FAULTS, ReferenceBackend
from maskedlinear_conformance.laws import LAWS, OF_DISTRIBUTION, OF_PAIRS
from maskedlinear_conformance.record import pivot, table

if TYPE_CHECKING:
    from maskedlinear_conformance.run import Run

__all__ = ["header", "header_lines", "sections", "silent", "uncaught", "unproven", "write"]

_PROOF = ("passed", "caught")


def header(run: Run) -> dict[str, Any]:
    """Return what runs: versions, device, profile, and of each backend its versions, dtypes and capabilities."""
    return {
        "maskedlinear": __version__,
        "python": platform.python_version(),
        "device": run.device,
        "profile": run.profile,
        "shared by": [str(team) for team in run.asked],
        "golden vectors": golden.SHA256,
        "left out": run.left_out,
        "backends": {
            label: {
                "versions": dict(backend.versions()),
                "runs on": backend.device_name(run.device),
                "dtypes": list(backend.dtypes(run.device)),
                "capabilities": [name for name in CAPABILITIES if name not in lacking(backend, run.device)],
                "lacks": dict(lacking(backend, run.device)),
            }
            for label, backend in run.backends.items()
        },
    }


def header_lines(head: dict[str, Any]) -> list[str]:
    """Return the header as text."""
    lines = [
        f"maskedlinear {head['maskedlinear']}, Python {head['python']}, device {head['device']}, profile {head['profile']}, "
        f"golden vectors {head['golden vectors'][:12]}"
    ]
    for label, about in list(head["backends"].items())[:8]:
        versions = ", ".join(f"{library} {version}" for library, version in about["versions"].items())
        lines.append(f"backend {label}: {versions}; on {about['runs on']}; {', '.join(about['dtypes'])}")
        lines.append(f"  has {', '.join(about['capabilities']) or 'no more than it must'}")
        for reason in dict.fromkeys(about["lacks"].values()):
            lacking = [name for name, why in about["lacks"].items() if why == reason]
            lines.append(f"  lacks {', '.join(lacking)}: {reason}")
    if head["left out"]:
        lines.append(_left_out(head["left out"]))
    return lines + ([f"and {len(head['backends']) - 8} more backends"] if len(head["backends"]) > 8 else [])


def sections(run: Run) -> list[tuple[str, list[str]]]:
    """Return the tables at the end of a run, each with its title."""
    if run.faults:
        return [("faults, and the laws that caught each", _fault_table(run)), *_faults_left(run)]
    found = []
    stale = _stale(run)
    if stale:
        found.append(("stale: expected failures that match no test that runs", stale))
    found.append(("laws", _law_table(run) + [_left_out(run.left_out)] * bool(run.left_out)))
    nothing = unproven(run)
    if nothing:
        found.append(("nothing was proven of", nothing))
    if silent(run):
        found.append(("laws that did not run, and nobody declared it", silent(run)))
    record = run.record
    for title, cells in (
        ("largest distance from the spec, in units of the tight bound (at most 1)", record.tight),
        ("largest distance from the spec on unsigned data, in units of the hard bound (at most 1)", record.hard),
        ("largest difference between backends, in units of the bound (at most 1)", record.pairs),
    ):
        if cells:
            found.append((title, pivot(cells)))
    return found


def unproven(run: Run) -> list[str]:
    """Return the backends that tests were selected for, none of which passed; under ``--faults``, if none caught any."""
    proven = {label for outcome in run.record.outcomes if outcome.status in _PROOF for label in outcome.labels}
    if run.faults:
        return [] if proven else list(run.backends)
    return [label for label in run.backends if label in run.chosen - proven]


def silent(run: Run) -> list[str]:
    """Return the laws of which nothing ran and nothing was declared, of a run in which the caller left nothing out."""
    if run.faults or run.partial or not run.command:
        return []
    excused = set(OF_PAIRS if len(run.backends) == 1 else ())
    cells = run.record.law_table(run.laws, run.backends)
    return [
        f"{label}: law {law}"
        for law in run.laws
        if law not in excused
        for label in run.backends
        if not cells[law][label]
    ]


def uncaught(run: Run) -> list[str]:
    """Return the faults that did not break every law that they should."""
    caught = _caught(run)
    return [name for name, fault in FAULTS.items() if not set(fault.laws) <= caught.get(name, {}).keys()]


def write(run: Run, path: Path, status: int) -> None:
    """Write the report as JSON: the header, the laws, the fractions, and every test that did not pass."""
    record = run.record
    content = {
        "header": header(run),
        "exit_status": status,
        "laws": {
            law: {"title": LAWS[law], "backends": cells}
            for law, cells in record.law_table(run.laws, run.backends).items()
        },
        "bounds": {
            name: [{"result": r, "dtype": d, "of": o, "largest": _finite(v)} for (r, d, o), v in cells.items()]
            for name, cells in (("tight", record.tight), ("hard", record.hard), ("pairs", record.pairs))
        },
        "stale_expected_failures": _stale(run),
        "nothing_proven_of": unproven(run),
        "did_not_run": silent(run),
        "not_passed": [outcome._asdict() for outcome in record.outcomes if outcome.status not in ("passed", "caught")],
    }
    if run.faults:
        content["faults"] = {
            name: {"fault": fault.__doc__, "should_break": fault.laws, "caught_by": _caught(run).get(name, {})}
            for name, fault in FAULTS.items()
        }
        content["uncaught"] = uncaught(run)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _finite(value: float) -> float | str:
    """JSON has no infinity."""
    return value if math.isfinite(value) else str(value)


def _left_out(formats: list[str]) -> str:
    return f"left out: {', '.join(formats)}; --format runs them, and so does --profile full"


def _law_table(run: Run) -> list[str]:
    labels = list(run.backends)
    body = []
    for law, cells in run.record.law_table(run.laws, labels).items():
        row = [_cell(cells.get(label, {})) for label in labels]
        if law in OF_PAIRS and len(labels) == 1:
            row = ["not run: one backend"]
        if law in OF_DISTRIBUTION:
            row = [
                f"not run: {cell}" if set(cells.get(label, {})) == {"declared"} else cell
                for label, cell in zip(labels, row, strict=True)
            ]
        body.append([law, LAWS[law], *row])
    return table(["law", "", *labels], body)


def _cell(counts: dict[str, int]) -> str:
    if not counts:
        return "did not run"
    if "failed" in counts:
        return f"FAILED {counts['failed']} of {sum(counts.values())}"
    said = [f"passed {counts['passed']}"] if "passed" in counts else []
    said += [f"{counts[status]} {status}" for status in ("expected failure", "declared") if status in counts]
    return ", ".join(said)


def _stale(run: Run) -> list[str]:
    return [f"{label}: {pattern}" for label, patterns in run.stale.items() for pattern in sorted(patterns)]


def _caught(run: Run) -> dict[str, dict[str, str]]:
    """Each fault's laws that caught it, with the first message of each."""
    caught: dict[str, dict[str, str]] = {}
    for outcome in run.record.outcomes:
        if outcome.status == "caught":
            caught.setdefault(outcome.labels[0], {}).setdefault(outcome.law, outcome.message)
    return caught


def _fault_table(run: Run) -> list[str]:
    caught = _caught(run)
    body = [
        [
            name,
            str(fault.__doc__).rstrip("."),
            ", ".join(law for law in LAWS if law in caught.get(name, {})) or "NOT CAUGHT",
        ]
        for name, fault in FAULTS.items()
    ]
    return table(["fault", "what is wrong", "laws broken"], body)


def _faults_left(run: Run) -> list[tuple[str, list[str]]]:
    caught = _caught(run)
    missing = {name: [law for law in FAULTS[name].laws if law not in caught.get(name, {})] for name in uncaught(run)}
    lines = [f"{name}: not caught by law {', '.join(laws)}" for name, laws in missing.items()]
    reference = [o for o in run.record.outcomes if o.labels[0] == ReferenceBackend.name and o.status == "failed"]
    lines += [f"{ReferenceBackend.name}: {outcome.test}: {outcome.message}" for outcome in reference]
    return [("what is missing from the laws", lines)] if lines else []
