"""Each product of the sparse form on a GPU, each way that PyTorch may go: beside float64, and beside the rule's time for it.

``python benchmarks/gpu_kernels.py cuda 100`` takes at most so many seconds, of which kernels are compiled first, on all
cores. A line of JSON for each product says which way the rule takes, and for each way how far it is from the product in
float64, as a part of that of the absolute values, whether that is wrong, what it takes and what the rule expects. On
``cpu``, with ``TRITON_INTERPRET=1``, kernels are interpreted, of small products: that says nothing of times.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskedlinear import _gpu_rule, _triton_rows, _triton_tiles
from maskedlinear._gpu_rule import Multiply, Product, Way
from maskedlinear._triton_rows import Launch, Sizes
from maskedlinear_torch import _gpu_products
from maskedlinear_torch import _triton_products as triton
from maskedlinear_torch._products import CSR

ON_CPU = sys.argv[1:2] == ["cpu"]
DTYPES = {"tf32": torch.float32, "half": torch.bfloat16, "float32": torch.float32}
WORST = {"tf32": 2.5e-3, "half": 2e-4, "float32": 4e-6}  # of a product of absolute values
if not _gpu_products._HAS_OUT_DTYPE:
    WORST["half"] = 2**-8  # panels are rounded
WAYS: tuple[Way, ...] = ("rows", "bits", "tiles", "panels")
ROUNDS = 12
COMPILING = 0.6  # of the time, at most: what is not compiled by then is when it is needed
SLOWEST = float("inf") if ON_CPU else 6  # times what the rule's own way takes: others are not timed


class Case(NamedTuple):
    """A product: of W (rows, depth) with x, of its transpose with g, or of g and x at the connections."""

    rows: int
    depth: int
    live: float
    batch: int
    multiply: Multiply
    kind: str

    @property
    def nnz(self) -> int:
        """How many connections there are."""
        return int(self.rows * self.depth * self.live)

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return DTYPES[self.multiply].itemsize

    def product(self) -> Product:
        """Return what the rule is asked about."""
        sizes = (self.depth, self.rows) if self.kind == "Wt g" else (self.rows, self.depth)
        is_of = {"sampled": self.kind == "values", "transposed": self.kind == "Wt g"}
        by_kernel = self.kind == "values" or _gpu_rule.has_bits(*sizes, self.nnz)
        place_bytes = 0 if by_kernel else _gpu_products._PLACE_BYTES
        return Product(*sizes, self.nnz, self.batch, self.itemsize, self.multiply, place_bytes=place_bytes, **is_of)


def cases() -> Iterator[Case]:
    """Yield the products, those of one pattern one after the other."""
    if ON_CPU:
        sizes, batches = ((96, 160, 0.3), (33, 70, 0.02)), (1, 20)
    else:
        large = [(8192, 8192, live) for live in (0.1, 0.5, 0.01, 0.9)]
        sizes = (
            *large,
            (2048, 2048, 0.1),
            (2048, 2048, 0.5),
            (3072, 768, 0.1),
            (1000, 777, 0.2),
            (2233, 11876, 0.00177),
        )
        batches = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 4096)
    for rows, depth, live in sizes:
        some = batches if rows == 8192 or ON_CPU else (1, 16, 33, 128, 250)
        for batch in some:
            for multiply in DTYPES:
                if multiply != "float32" or batch <= 512:  # beyond, a product takes tens of milliseconds
                    for kind in ("W x", "Wt g", "values"):
                        yield Case(rows, depth, live, batch, multiply, kind)  # type: ignore[arg-type]


def ways(case: Case) -> dict[Way, float]:
    """Return the ways that may be gone and are not far from the fastest, with the rule's seconds."""
    product = case.product()
    taken = {way: _gpu_rule.seconds(way, product) for way in WAYS if way != "bits" or case.kind == "W x"}
    if product.place_bytes and _gpu_rule.panels(product) > 1:
        taken.pop("panels")  # they ask the device where panels begin, which no graph can
    return {way: one for way, one in taken.items() if math.isfinite(one) and one <= SLOWEST * min(taken.values())}


def launch_of(way: Way, case: Case) -> Launch | None:
    """Return what runs a way by one kernel; ``None`` for panels."""
    of = Sizes(case.rows, case.depth, case.nnz, case.batch)
    is_transposed, size = case.kind == "Wt g", case.itemsize
    if way == "tiles" and case.kind == "values":
        return _triton_tiles.sddmm(of, size, case.multiply, checked=False)
    if way == "tiles":
        return _triton_tiles.spmm(of, size, case.multiply, transposed=is_transposed, checked=False)
    if way == "bits":
        return _triton_rows.bits_spmm(of, size, checked=False)
    if way == "rows" and case.kind == "values":
        return _triton_rows.rows_sddmm(of, size, checked=False)
    if way == "rows":
        turned = of._replace(rows=of.depth, depth=of.rows) if is_transposed else of
        return _triton_rows.rows_spmm(turned, size, ordered=is_transposed, checked=False)
    return None


def compiled(job: tuple[str, str, tuple[int, ...], dict[str, int], dict[str, Any]]) -> None:
    """Compile a kernel into Triton's cache, in a process of its own."""
    multiply, name, grid, sizes, told = job
    kernel = getattr(_triton_tiles, name, None) or getattr(_triton_rows, name)
    indices = dict.fromkeys(("bits", "firsts", "starts", "across", "order"), torch.int32)
    types = indices | dict.fromkeys(("product", "sampled"), torch.float32) | sizes
    arguments = [types.get(name, DTYPES[multiply]) for name in kernel.arg_names if name not in told]
    kernel.warmup(*arguments, grid=grid, **told)


def compile_all(end: float) -> None:
    """Compile what will be timed, as many kernels at once as there are cores, until the time is up."""
    jobs = {}
    for case in cases():
        for way in ways(case):
            if launch := launch_of(way, case):
                job = (case.multiply, launch.kernel.__name__, launch.grid, launch.sizes, launch.told)
                jobs[str(job)] = job
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(compiled, job) for job in jobs.values()]
        wait(
            waiting, timeout=max(0.0, end - time.monotonic())
        )  # one that fails fails again where it is timed, and is told
        pool.shutdown(wait=False, cancel_futures=True)


class Clock:
    """Takes the time of a call: of CUDA graphs, each after the second-level cache was emptied."""

    def __init__(self, device: str) -> None:
        self.emptied = torch.empty((4 if ON_CPU else 384) << 20, dtype=torch.uint8, device=device)

    def __call__(self, call: Callable[[], Any]) -> float:
        """Return the median, in seconds."""
        if ON_CPU:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graph.replay()
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(ROUNDS)]
        for start, end in events:
            self.emptied.zero_()
            start.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize()
        return sorted(start.elapsed_time(end) for start, end in events)[ROUNDS // 2] / 1e3


class Pattern:
    """A random pattern on the device, by rows and by columns."""

    def __init__(self, case: Case, device: str) -> None:
        self.mask = torch.zeros(case.rows, case.depth, dtype=torch.bool, device=device)
        self.mask.view(-1)[torch.randperm(self.mask.numel(), device=device)[: case.nnz]] = True
        place = torch.zeros_like(self.mask, dtype=torch.int32)
        place[self.mask] = torch.arange(case.nnz, dtype=torch.int32, device=device)
        self.by_rows = CSR(*self._rows(self.mask), None)
        self.by_columns = CSR(*self._rows(self.mask.T), place.T[self.mask.T].contiguous(), self.by_rows)

    @staticmethod
    def _rows(mask: Tensor) -> tuple[Tensor, Tensor]:
        counts = mask.sum(1).cumsum(0)
        return torch.cat([counts.new_zeros(1), counts]).int(), mask.nonzero()[:, 1].int().contiguous()


def calls(case: Case, pattern: Pattern, values: Tensor, g: Tensor, x: Tensor) -> dict[Way, Callable[[], Tensor]]:
    """Return the ways of a product of x (batch, depth) and g (batch, rows)."""
    by_rows, up = pattern.by_rows, ON_CPU
    left, right = g.mT.contiguous(), x.mT.contiguous()
    if case.kind == "values":
        return {
            "rows": lambda: triton.rows_sddmm(left, right, by_rows),
            "tiles": lambda: triton.tiles_sddmm(left, right, by_rows, case.multiply, up),
            "panels": lambda: _gpu_products.sddmm_in_panels(left, right, by_rows),
        }
    turned = case.kind == "Wt g"
    side, csr = (g, pattern.by_columns) if turned else (x, by_rows)
    laid = left if turned else right
    return {
        "rows": lambda: triton.rows_spmm(values, laid, csr),
        "bits": lambda: triton.bits_spmm(values, laid, by_rows),
        "tiles": lambda: triton.tiles_spmm(values, side.mT, by_rows, case.depth, turned, case.multiply, up),
        "panels": lambda: _gpu_products.spmm_in_panels(values, side.mT, csr),
    }


def dense_of(case: Case, matrix: Tensor, g: Tensor, x: Tensor) -> Tensor:
    """Return the product with the dense matrix, as a layer makes it."""
    return x @ matrix.mT if case.kind == "W x" else g @ matrix if case.kind == "Wt g" else g.mT @ x


def timed(case: Case, pattern: Pattern, clock: Clock) -> dict[str, Any]:
    """Return what a product took, each way, and how far it is from float64."""
    device, dtype = pattern.mask.device, DTYPES[case.multiply]
    torch.set_float32_matmul_precision("high" if case.multiply == "tf32" else "highest")
    values = torch.randn(case.nnz, device=device).to(dtype)
    matrix = torch.zeros(pattern.mask.shape, dtype=dtype, device=device)
    matrix[pattern.mask] = values
    g, x = (torch.randn(case.batch, size, device=device).to(dtype) for size in (case.rows, case.depth))
    wanted, scale = (
        dense_of(case, *of) for of in zip(*((t.double(), t.double().abs()) for t in (matrix, g, x)), strict=True)
    )
    wanted, scale = (of[pattern.mask] if case.kind == "values" else of.mT for of in (wanted, scale))
    base = clock(lambda: dense_of(case, matrix, g, x))
    found: dict[str, Any] = {"dense us": round(base * 1e6, 1), "ways": {}}
    expected, ways_of = ways(case), calls(case, pattern, values, g, x)
    found["chosen"] = min(expected, key=lambda way: expected[way])
    for way, seconds in expected.items():
        one: dict[str, Any] = {"rule us": round(seconds * 1e6, 1), "wrong": True}
        try:
            error = float(((ways_of[way]().double() - wanted).abs() / scale.clamp(min=1e-30)).max())
            one |= {
                "error": error,
                "wrong": not error <= WORST[case.multiply],
                "us": round(clock(ways_of[way]) * 1e6, 1),
            }
            one["ratio"] = round(one["us"] / found["dense us"], 3)
        except Exception as failed:  # what one kernel does must not keep the others from being told
            one["failed"] = f"{type(failed).__name__}: {failed}"[:200]
        found["ways"][way] = one
    return found


def main(device: str, seconds: float) -> None:
    """Write the products that there was time for, each as it is known: after an illegal access nothing more is."""
    torch.manual_seed(0)
    end = time.monotonic() + seconds
    if ON_CPU:
        _gpu_products.has_triton = lambda tensor: True
    else:
        compile_all(time.monotonic() + COMPILING * seconds)
    clock, pattern = Clock(device), None
    for case in cases():
        if time.monotonic() > end:
            break
        if (
            pattern is None
            or pattern.mask.shape != (case.rows, case.depth)
            or pattern.by_rows.across.numel() != case.nnz
        ):
            pattern = None  # before the next one takes its memory
            pattern = Pattern(case, device)
        print(json.dumps(case._asdict() | timed(case, pattern, clock)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
