"""Claim: 10⁸ weights are pruned globally within 10 s and 3 times the weights' memory, on two cores.

Prints a line for each of three runs, and for the sort that people use instead, which needs all magnitudes in one array.
"""

from __future__ import annotations

import subprocess
import sys

WAYS = {
    "pruning.prune, global": "pruning.prune([pruning.magnitude(w) for w in weights], sparsity=0.9)",
    "numpy: concatenate and argpartition": (
        "np.argpartition(np.concatenate([np.abs(w).reshape(-1) for w in weights]), int(0.9 * 10**8))"
    ),
}
PROGRAM = """
import time
import numpy as np
from maskedlinear import pruning
from maskedlinear.bench.peak import most_memory
weights = [np.random.default_rng(i).standard_normal((5000, 5000), dtype=np.float32) for i in range(4)]
before, start = most_memory(), time.perf_counter()
found = {way}
seconds = time.perf_counter() - start
print(f"{{seconds:6.2f}} s  {{(most_memory() - before) / sum(w.nbytes for w in weights):5.2f}} times the weights' memory")
"""


def main() -> None:
    """Run each way in a process of its own, three times, and print time and peak memory."""
    for name, way in WAYS.items():
        for _ in range(3):
            program = PROGRAM.format(way=way)
            result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
            print(f"{name:36} {result.stdout.strip()}", flush=True)


if __name__ == "__main__":
    main()
