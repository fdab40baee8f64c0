"""What a run came to, in numbers: the one source of the table on the screen, of ``report.json`` and of the exit status."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import numpy as np

from maskedlinear import __version__
from maskedlinear.demo.problem import Problem
from maskedlinear.demo.reference import BOUND, Reference, first_step, largest_difference
from maskedlinear.demo.settings import FRAMEWORKS, SIZES, Settings
from maskedlinear.demo.training import Run

__all__ = ["LEAST_ACCURACY", "MOST_POINTS", "broken_promises", "make_report"]

LEAST_ACCURACY = 0.95
"""The test accuracy that every framework exceeds at the default settings."""

MOST_POINTS = 1.0
"""By how many percentage points the frameworks' test accuracies differ at most, at the default settings."""

_DISTRIBUTIONS = {"torch": ("torch",), "flax": ("flax", "jax", "optax")}


def make_report(settings: Settings, problem: Problem, runs: Mapping[str, Run]) -> dict[str, Any]:
    """Return all numbers of a run, ready for JSON.

    Args:
        settings: the run's settings.
        problem: what was trained.
        runs: each framework's training, by its name in ``FRAMEWORKS``.

    Returns:
        A dictionary with the keys ``versions``, ``settings``, ``layers``, ``bound`` (8·u), ``frameworks`` (a dictionary by
        name), ``comparison`` (with two frameworks, else ``None``) and ``broken_promises`` (sentences; none is the good
        case). Times are in seconds, accuracies in [0, 1]; an infinite or undefined number is ``None``.
    """
    references = first_step(problem)
    report = {
        "versions": _versions(runs),
        "settings": {"sizes": SIZES} | asdict(settings),
        "layers": [
            {"in": mask.shape[1], "out": mask.shape[0], "connections": mask.size, "masked": int((~mask).sum())}
            for mask in problem.masks
        ],
        "bound": BOUND,
        "frameworks": {name: _framework(problem, run, references) for name, run in runs.items()},
        "comparison": _comparison(runs, references),
    }
    report["broken_promises"] = broken_promises(settings, report)
    clean: dict[str, Any] = _finite(report)
    return clean


def broken_promises(settings: Settings, report: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each promise that a run breaks; the accuracy is promised for the default settings only."""
    broken = []
    comparison = report["comparison"]
    for name, numbers in report["frameworks"].items():
        if settings.full_length and not numbers["test_accuracy"] > LEAST_ACCURACY:
            broken.append(
                f"{FRAMEWORKS[name]} reached a test accuracy of {numbers['test_accuracy']:.2%}; "
                f"more than {LEAST_ACCURACY:.0%} is promised."
            )
        if numbers["dormant_changed"]:
            broken.append(
                f"AdamW changed {numbers['dormant_changed']} of {numbers['dormant']} dormant weights in {FRAMEWORKS[name]}; "
                "freeze_masked promises none."
            )
        broken += _beyond_bound(f"the float64 spec and {FRAMEWORKS[name]}", numbers["first_gradients"])
    if comparison:
        if settings.full_length and not comparison["accuracy_points"] <= MOST_POINTS:
            broken.append(
                f"The test accuracies differ by {comparison['accuracy_points']:.2f} points; "
                f"at most {MOST_POINTS:g} is promised."
            )
        broken += _beyond_bound("the two frameworks", comparison["first_gradients"])
    return broken


def _beyond_bound(between: str, difference: Mapping[str, Any]) -> list[str]:
    if difference["bound_ratio"] <= 1:
        return []
    return [
        f"The first step's gradients differ between {between} by {difference['bound_ratio']:.3g} times the bound "
        f"8*u*S (at most {difference['absolute']:.2e}); at most 1 is promised."
    ]


def _framework(problem: Problem, run: Run, references: tuple[Reference, ...]) -> dict[str, Any]:
    changed = sum(
        # Compared as integers, bit for bit: as floats -0.0 equals 0.0, and NaN not even itself.
        int(np.count_nonzero((before.view(np.uint32) != after.view(np.uint32)) & ~mask))
        for before, after, mask in zip(run.initial, run.final, problem.masks, strict=True)
    )
    exact = [reference.gradients for reference in references]
    return {
        "test_accuracy": float(run.accuracies[-1]),
        "last_epoch_loss": float(run.losses[-1].mean()),
        "seconds": run.seconds,
        "first_step_seconds": run.first_step_seconds,
        "sparsity": list(run.sparsity),
        "dormant": sum(int((~mask).sum()) for mask in problem.masks),
        "dormant_changed": changed,
        "first_gradients": largest_difference(run.gradients, exact, references)._asdict(),
        "losses": run.losses.mean(axis=1).tolist(),
        "accuracies": run.accuracies.tolist(),
    }


def _comparison(runs: Mapping[str, Run], references: tuple[Reference, ...]) -> dict[str, Any] | None:
    if len(runs) != 2:
        return None
    one, other = runs.values()
    return {
        "accuracy_points": 100 * abs(float(one.accuracies[-1] - other.accuracies[-1])),
        "largest_loss_difference": float(np.abs(one.losses - other.losses).max()),
        "first_gradients": largest_difference(one.gradients, other.gradients, references)._asdict(),
    }


def _versions(runs: Mapping[str, Run]) -> dict[str, str]:
    used = ["numpy", "scikit-learn", *(part for name in runs for part in _DISTRIBUTIONS[name])]
    return {"maskedlinear": __version__, "python": platform.python_version()} | {name: version(name) for name in used}


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: the same structure with ``None`` for them."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
