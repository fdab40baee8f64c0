"""Claim: packed, a sparse layer multiplies one row of x faster than MKL's compressed rows and than a dense layer.

Prints the least time of each through the module, in one run and in turns, and ratios to ``nn.Linear``, with one thread and
with all; then which kernels were used.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import torch
from torch import nn

from maskedlinear import kernels, masks
from maskedlinear.torch import SparseLinear, pack

SHAPES = [(768, 3072), (3072, 768)]
LIVE = [0.5, 0.3, 0.2, 0.1, 0.05, 0.01]
BATCHES = [1, 2, 4]
TURNS, CALLS = 30, 10


def least(ways: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the least seconds of each way, called some times in each of many turns."""
    found = dict.fromkeys(ways, float("inf"))
    for _ in range(TURNS):
        for name, way in ways.items():
            for _ in range(CALLS):
                start = time.perf_counter()
                way()
                found[name] = min(found[name], time.perf_counter() - start)
    return found


@torch.inference_mode()
def measure(in_features: int, out_features: int, live: float, batch: int) -> str:
    """Return a line of a layer's times."""
    shape = out_features, in_features
    sparse = SparseLinear(in_features, out_features, mask=masks.random(shape, sparsity=1 - live, seed=0))
    dense, packed, x = nn.Linear(in_features, out_features), pack(sparse), torch.randn(batch, in_features)
    torch.testing.assert_close(packed(x), sparse(x), rtol=1e-4, atol=1e-4)
    rows = torch.sparse_csr_tensor(sparse.indptr, sparse.indices, sparse.weight_values.detach(), shape)
    column = x.T.contiguous() if batch > 1 else x[0].clone()
    ways: dict[str, Callable[[], object]] = {
        "nn.Linear": lambda: dense(x),
        "MKL": (lambda: torch.mv(rows, column)) if batch == 1 else (lambda: rows @ column),
        "SparseLinear": lambda: sparse(x),
        "packed": lambda: packed(x),
    }
    times = least(ways)
    told = "  ".join(f"{name} {1e6 * t:7.1f} us ({t / times['nn.Linear']:5.3f})" for name, t in times.items())
    return f"{in_features} -> {out_features}, batch {batch}, {live:4.0%}: {told}{'' if packed.is_packed else '  (by rows)'}"


def main() -> None:
    """Print all lines."""
    warnings.filterwarnings("ignore", ".*[Ss]parse")
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        print(f"{threads} threads")
        for in_features, out_features in SHAPES:
            for batch in BATCHES if (in_features, out_features) == SHAPES[0] else BATCHES[:1]:
                for live in LIVE:
                    print(measure(in_features, out_features, live, batch), flush=True)
    print(kernels.info())


if __name__ == "__main__":
    main()
