"""Run the measurements, print tables, write ``results.json`` and plots."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maskedlinear.bench.cases import NAMES
from maskedlinear.costs import Costs, Layer, choose

__all__ = ["choices", "machine", "run_bench", "tables"]


def run_bench(frameworks: Sequence[str], sets: Sequence[str], device: str, out: Path) -> int:
    """Time each framework in a process of its own; print the tables, and write ``results.json`` and plots into ``out``."""
    results: dict[str, Any] = {"machine": machine(), "versions": {}, "rows": []}
    for framework in frameworks:
        command = [sys.executable, "-m", "maskedlinear.bench.measure", framework, device, *sets]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                row = json.loads(line)
                if "description" in row:
                    results["versions"] |= row["description"]
                    continue
                results["rows"].append(row)
                print("\n".join(tables([row])), flush=True)
        if process.returncode:
            print(f"maskedlinear bench: {framework} failed", file=sys.stderr)
            return 1
    for framework in frameworks:
        results["choices"] = results.get("choices", {}) | {framework: choices(results["rows"], framework, device)}
        for how, found in results["choices"][framework].items():
            print(f"{framework}, choices {how}: {found}")
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    from maskedlinear.bench.plots import draw

    pictures = draw(results["rows"], out)
    print(f"Written to {out}: {', '.join(['results.json', *pictures])}")
    return 0


def machine() -> dict[str, Any]:
    """Return what the times depend on."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else name
    return {"cpu": name, "cores": os.cpu_count(), "system": platform.system(), "python": platform.python_version()}


def tables(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for each case, kind of call and layer: ms, the ratio to the dense layer, its range, and what is kept."""
    lines = []
    for row in rows:
        lines.append(
            f"{row['framework']}: {row['in']} -> {row['out']}, batch {row['batch']}, "
            f"{row['connections']} connections ({100 * row['density']:.3g} %)"
        )
        for name, size in row.get("peak_bytes", {}).items():
            lines.append(f"  at most above the imports {name:21} {size / 2**20:10.1f} MiB")
        for what, by_layer in row.get("times", {}).items():
            for name, found in by_layer.items():
                size = row.get("kept_bytes", {}).get(name)
                kept = f"  keeps {size / 2**20:8.2f} MiB" if what == "step" and size is not None else ""
                lines.append(
                    f"  {what:20} {name:21} {found['ms']:10.3f} ms  {found['ratio']:6.3f} "
                    f"({found['lowest']:.3f} - {found['highest']:.3f}){kept}"
                )
    return lines


def choices(rows: Sequence[dict[str, Any]], framework: str, device: str) -> dict[str, dict[str, float]]:
    """Return how well ``compress`` chose for the layers of the set "choice": times relative to the better form's.

    By costs alone, and with what it measures.
    """
    drawn = [row for row in rows if row["framework"] == framework and row["set"] == "choice"]
    if not drawn:
        return {}
    costs = Costs.shipped(framework, device) if Costs.are_shipped(framework, device) else None
    slower: dict[str, list[float]] = {"measured": []} if costs is None else {"by costs alone": [], "measured": []}
    for row in drawn:
        layer = Layer("", row["out"], row["in"], row["connections"], 4, "dense")
        for what, times in row["times"].items():
            sparse = times[NAMES[framework].sparse]["ratio"]
            forms = {"measured": row["chosen"][what]}
            if costs is not None:
                forms["by costs alone"] = choose(layer, "auto", row["batch"], what == "step", costs).form
            for how, form in forms.items():
                slower[how].append(max(1.0, sparse if form == "sparse" else 1 / sparse))
    return {
        how: {
            "choices": len(ratios),
            "within 1.1": sum(ratio <= 1.1 for ratio in ratios),
            "mean": statistics.mean(ratios),
            "worst": max(ratios),
        }
        for how, ratios in slower.items()
    }
