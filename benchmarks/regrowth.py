"""Claim: RigL on the sparse form moves 30 % of 4 million connections of a 20,000 x 20,000 weight within 2 s, and of 10
million of a 100,000 x 100,000 one within 30 s and 2 GiB, on two cores.

Prints the median of a few runs, and the most memory, of ``regrow_model`` by gradient, the gradient's products (a batch of
32) among it; the program ends with an error if the claim does not hold.
"""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import statistics, time
import numpy as np
import torch
from maskedlinear.bench.peak import most_memory
from maskedlinear.pattern import SparsityPattern
from maskedlinear.torch import SparseLinear, dense_gradients, regrow_model
size, connections, runs = {size}, {connections}, {runs}
generator = np.random.default_rng(0)
places = np.unique(generator.integers(0, size**2, connections))
starts = np.searchsorted(places, np.arange(size + 1, dtype=np.int64) * size)
layer = SparseLinear(size, size, bias=False, pattern=SparsityPattern(starts, places % size, size))
seconds, counts = [], []
for _ in range(runs):  # each by another gradient, or what it drops would come back
    with dense_gradients(layer) as gradients:
        layer(torch.randn(32, size)).square().mean().backward()
    start = time.perf_counter()
    counts.append(regrow_model(layer, 0.3, gradients=gradients))
    seconds.append(time.perf_counter() - start)
gib = most_memory() / 2**30
what = f"{{size}} x {{size}}, {{layer.pattern.nnz}} connections, {{counts[0]}} moved"
print(f"{{what}}: {{statistics.median(seconds):.2f}} s, {{gib:.2f}} GiB", flush=True)
raise SystemExit(not (statistics.median(seconds) <= {most} and gib <= 2))
"""


def main() -> None:
    """Run both sizes, each in a process of its own."""
    failed = False
    for size, connections, runs, most in ((20_000, 4_000_000, 5, 2), (100_000, 10_000_000, 1, 30)):
        program = PROGRAM.format(size=size, connections=connections, runs=runs, most=most)
        failed |= subprocess.run([sys.executable, "-c", program], check=False).returncode != 0
    sys.exit(failed)


if __name__ == "__main__":
    main()
