"""Claim: packed, a sparse layer multiplies one row of x faster than MKL's compressed rows and than a dense layer.

Prints the least time of each through the module, in one run and in turns, and ratios to ``nn.Linear``, with one thread and
with all; then which kernels were used. In JAX the peers are a jitted dense product and one of the sparse form.

    python benchmarks/packed.py [--framework torch|jax]
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable

import numpy as np
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


def measure_jax(in_features: int, out_features: int, live: float) -> str:
    """Return a line of the times of one row in JAX."""
    import jax

    from maskedlinear.jax import pack as pack_weights
    from maskedlinear.jax import sparse_linear
    from maskedlinear.pattern import SparsityPattern

    rng = np.random.default_rng(0)
    pattern = SparsityPattern.from_mask(masks.random((out_features, in_features), sparsity=1 - live, seed=0))
    x, kernel = (
        rng.standard_normal((size, to), np.float32) for size, to in ((1, in_features), (in_features, out_features))
    )
    x, kernel, values = (
        jax.numpy.asarray(array) for array in (x, kernel, rng.standard_normal(pattern.nnz, np.float32))
    )
    packed = pack_weights(values, pattern)
    dense = jax.jit(lambda x: x @ kernel)
    by_rows, by_pack = jax.jit(lambda x: sparse_linear(x, values, pattern)), jax.jit(lambda x: sparse_linear(x, packed))
    np.testing.assert_allclose(by_pack(x), by_rows(x), rtol=1e-4, atol=1e-4)
    ways: dict[str, Callable[[], object]] = {
        "dense": lambda: dense(x).block_until_ready(),
        "sparse": lambda: by_rows(x).block_until_ready(),
        "packed": lambda: by_pack(x).block_until_ready(),
    }
    times = least(ways)
    told = "  ".join(f"{name} {1e6 * t:7.1f} us ({t / times['dense']:5.3f})" for name, t in times.items())
    return f"{in_features} -> {out_features}, batch 1, {live:4.0%}: {told}"


def main() -> None:
    """Print all lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=("torch", "jax"), default="torch")
    if parser.parse_args().framework == "jax":
        for in_features, out_features in SHAPES:
            for live in LIVE:
                print(measure_jax(in_features, out_features, live), flush=True)
        print(kernels.info())
        return
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
