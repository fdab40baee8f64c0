"""Claim: a random mask of 10⁸ entries takes under 5 s, and under 1 GiB beyond the mask itself, on two cores.

Prints a line for each way to make a mask, with NumPy's own generator, which promises no stable stream, for comparison.
"""

from __future__ import annotations

import subprocess
import sys

SHAPE = (10_000, 10_000)
WAYS = {
    "masks.random, exact count": "masks.random(SHAPE, sparsity=0.9, seed=1)",
    "masks.bernoulli": "masks.bernoulli(SHAPE, sparsity=0.9, seed=1)",
    "numpy: Generator.random >= 0.9": "np.random.default_rng(1).random(SHAPE, np.float32) >= 0.9",
    "numpy: Generator.permutation, exact count": (
        "(np.random.default_rng(1).permutation(SHAPE[0] * SHAPE[1]) >= 0.9 * SHAPE[0] * SHAPE[1]).reshape(SHAPE)"
    ),
}
PROGRAM = """
import resource, time
import numpy as np
from maskedlinear import masks
SHAPE = {shape}
masks.random((100, 100), sparsity=0.5)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
mask = {way}
seconds = time.perf_counter() - start
extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 - mask.nbytes / 2**20
print(f"{{seconds:6.2f}} s  {{max(extra, 0):6.0f}} MiB beyond the mask  {{(~mask).sum()}} zeros")
"""


def main() -> None:
    """Run each way in a process of its own, three times, and print time and peak memory."""
    for name, way in WAYS.items():
        for _ in range(3):
            program = PROGRAM.format(shape=SHAPE, way=way)
            result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
            print(f"{name:42} {result.stdout.strip()}", flush=True)


if __name__ == "__main__":
    main()
