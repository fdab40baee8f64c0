"""``maskedlinear demo`` from the settings to the exit status: train, compare, show, write."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from maskedlinear.demo.pictures import draw_pictures
from maskedlinear.demo.problem import Problem
from maskedlinear.demo.report import make_report
from maskedlinear.demo.settings import FRAMEWORKS, Settings
from maskedlinear.demo.table import print_report
from maskedlinear.demo.training import Run

__all__ = ["run_demo"]


def run_demo(settings: Settings, problem: Problem, out: Path) -> int:
    """Train the network in each framework, print the comparison, and write the pictures and ``report.json``.

    Args:
        settings: the settings that made ``problem``.
        problem: what to train.
        out: an existing folder for the report. Files of an earlier run in it are overwritten.

    Returns:
        The exit status: 0 if every promise is kept, 1 if one is broken; then a sentence on each goes to stderr.
    """
    console = Console()
    runs = _train_all(settings, problem, console)
    report = make_report(settings, problem, runs)
    print_report(report, console)
    files = draw_pictures(problem, runs, out)
    (out / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    console.print(
        f"Written to {out}: {', '.join([*files, 'report.json'])}", highlight=False, markup=False, soft_wrap=True
    )
    for sentence in report["broken_promises"]:
        print(f"maskedlinear demo: {sentence}", file=sys.stderr)
    return 1 if report["broken_promises"] else 0


def _train_all(settings: Settings, problem: Problem, console: Console) -> dict[str, Run]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs  {task.fields[status]}"),
        TimeElapsedColumn(),
    )
    runs = {}
    with Progress(*columns, console=console) as progress:
        tasks = {
            name: progress.add_task(f"{FRAMEWORKS[name]:8}", start=False, total=settings.epochs, status="")
            for name in settings.frameworks
        }
        for name, task in tasks.items():
            runner = import_module(f"maskedlinear.demo.{name}_runner")  # imports the framework
            progress.start_task(task)
            runs[name] = runner.run(problem, settings, _advance(progress, task))
    return runs


def _advance(progress: Progress, task: TaskID) -> Callable[[float, float], None]:
    def on_epoch(loss: float, accuracy: float) -> None:
        progress.update(task, advance=1, status=f"loss {loss:.3f}  accuracy {accuracy:.1%}")

    return on_epoch
