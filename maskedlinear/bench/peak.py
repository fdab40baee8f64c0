"""The most memory that building and training one layer takes, above what the imports take: a process for each."""

from __future__ import annotations

import importlib
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

from maskedlinear.bench.cases import Case

__all__ = ["main", "most_memory", "peak"]

_STEPS = 3
_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


def peak(framework: str, device: str, name: str, case: Case) -> int:
    """Return the bytes that training the layer ``name`` took at most, beyond the imports."""
    arguments = [framework, device, name, json.dumps(astuple(case))]
    command = [sys.executable, "-m", "maskedlinear.bench.peak", *arguments]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main(argv: Sequence[str]) -> None:
    """Build the layer, take some steps, and print the bytes."""
    framework, device, name, fields = argv
    layers = importlib.import_module(f"maskedlinear.bench.{framework}_layers")
    case = Case(*json.loads(fields))
    tiny = layers.calls(Case(case.of, 8, 8, case.batch, 8), device, (name,))["step"][name]
    tiny()  # imports and initialises what is loaded late
    before = most_memory()
    step = layers.calls(case, device, (name,))["step"][name]
    for _ in range(_STEPS):
        step()
    print(most_memory() - before)


def most_memory() -> int:
    """Return the most bytes that this process had in memory so far."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss counts the process that started this one, too
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT


if __name__ == "__main__":
    main(sys.argv[1:])
