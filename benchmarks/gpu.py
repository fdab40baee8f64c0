"""What each form takes on a GPU, as a ratio to cuBLAS in the same dtype, beside what was once expected (``TARGETS``).

``make bench-gpu`` runs the conformance suite on the GPU first, on every backend that is there, then each kernel beside
float64 and the clock (``gpu_kernels.py``), and then times the forms beside ``torch.nn.utils.prune``, torch's compressed rows
(CSR) and blocks (BSR), and JAX's BCOO, in at most eight minutes and without a network; what does not fit in is told as not
measured. ``--device cpu --quick`` runs the same code on some small layers, to see that it runs: its times say nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maskedlinear import masks
from maskedlinear.bench.measure import ratios
from maskedlinear.pattern import SparsityPattern

RESULTS = Path(__file__).parent / "results" / "gpu.json"
PACKAGES = ("torch", "triton", "jax", "jaxlib", "jax_triton", "flax", "numpy", "maskedlinear")
OUT_OF_TIME = "not measured: out of time"
LATEST = 15  # seconds that a suite whose time is up may take to tell what it found
MEMORY = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # of the GPU, which others of its processes need too
SUITES = (  # backends of one run of the suite, and its formats: the sparse form first, which has more to prove
    ("torch", ("sparse", "dense")),
    ("torch-nn", ("sparse", "dense")),
    ("jax", ("sparse", "dense")),
    ("nnx", ("sparse", "dense")),
    ("linen", ("dense",)),
)


class Row(NamedTuple):
    """One comparison: ``live`` of a square layer, in blocks if ``block`` is not 1; ``step`` is forward and backward."""

    what: str
    dtype: str
    batch: int
    live: float
    target: float | None
    step: bool = False
    block: int = 1


def _rows(what: str, dtype: str, batch: int, expected: dict[float, float], **rest: Any) -> list[Row]:
    return [Row(what, dtype, batch, live, target, **rest) for live, target in expected.items()]


TARGETS = [
    *_rows("sparse", "bfloat16", 16, {0.5: 0.7, 0.3: 0.45, 0.2: 0.32, 0.1: 0.22, 0.05: 0.17}),
    *_rows("sparse", "bfloat16", 1, {0.5: 0.7, 0.1: 0.22}),
    *_rows("sparse", "float32", 512, {0.01: 0.1, 0.05: 0.5, 0.1: 0.9}, step=True),
    *_rows("sparse", "bfloat16", 2048, {0.001: 0.15, 0.01: 1.1, 0.1: 1.15, 0.5: 1.15}, step=True),
    Row("masked", "bfloat16", 4096, 0.1, 1.08, step=True),
    Row("masked", "float32", 4096, 0.1, 1.02, step=True),
    *[Row("masked", "bfloat16", batch, 0.1, 1.02) for batch in (1, 64)],
    *_rows("blocks", "bfloat16", 2048, {0.1: 0.15, 0.25: 0.32, 0.5: 0.6}, block=64),
    *[Row("sparse", "float32", 64, live, None) for live in (0.1, 0.5)],
]
"""What was expected, of an H100 and by bytes alone, and is not reached; ``None`` where nothing was said."""


@cache
def mask_of(width: int, live: float, block: int) -> Any:
    """Return the mask of a row."""
    if block > 1:
        return masks.blocks((width, width), (block, block), sparsity=1 - live, seed=0)
    return masks.random((width, width), sparsity=1 - live, seed=0)


@cache
def pattern_of(width: int, live: float, block: int) -> SparsityPattern:
    """Return its pattern, which takes seconds to make."""
    return SparsityPattern.from_mask(mask_of(width, live, block))


def torch_calls(row: Row, width: int, device: str) -> dict[str, Callable[[], Any]]:
    """Return what to time in PyTorch; ``nn.Linear`` is cuBLAS."""
    import torch
    from torch import nn
    from torch.nn.utils import prune

    from maskedlinear.torch import MaskedLinear, SparseLinear
    from maskedlinear_torch._trial import inference, training_step

    dtype = getattr(torch, row.dtype)
    mask = torch.from_numpy(mask_of(width, row.live, row.block))
    x, g = (torch.randn(row.batch, width, device=device).to(dtype) for _ in range(2))
    layers = {
        "nn.Linear": nn.Linear(width, width, bias=False),
        "prune": prune.custom_from_mask(nn.Linear(width, width, bias=False), "weight", mask),
        "MaskedLinear": MaskedLinear(width, width, bias=False, mask=mask),
    }
    if row.what != "masked":
        layers["SparseLinear"] = SparseLinear(width, width, bias=False, pattern=pattern_of(width, row.live, row.block))
    layers = {name: layer.to(device, dtype) for name, layer in layers.items()}
    if row.step:
        return {name: training_step(layer, x, g, None) for name, layer in layers.items()}
    calls = {name: inference(layer.eval(), x) for name, layer in layers.items()}
    if row.what == "masked":
        return calls
    weight = layers["MaskedLinear"].weight.detach()
    calls["CSR"] = torch_product(weight.to_sparse_csr(), x)
    if row.block > 1:
        calls["BSR"] = torch_product(weight.to_sparse_bsr((row.block, row.block)), x)
    return calls


def torch_product(matrix: Any, x: Any) -> Callable[[], Any]:
    """Return torch's own product with a sparse matrix, as a call."""
    import torch

    def call() -> Any:
        y = torch.nn.functional.linear(x, matrix) if matrix.layout is torch.sparse_bsr else matrix @ x.mT
        if y.is_cuda:
            torch.cuda.synchronize()
        return y

    return call


def jax_calls(row: Row, width: int, device: str) -> dict[str, Callable[[], Any]]:
    """Return what to time in JAX, jitted; ``dense`` is cuBLAS too."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import sparse

    from maskedlinear.jax import masked_linear, sparse_linear, with_bits

    if (jax.default_backend() == "cpu") != (device == "cpu"):
        raise RuntimeError(f"JAX computes on {jax.default_backend()}, not on {device}")
    jax.config.update("jax_default_matmul_precision", "highest")  # as PyTorch does: no TF32
    dtype = jnp.dtype(row.dtype)
    pattern = jax.device_put(pattern_of(width, row.live, row.block))
    key = jax.random.key(0)
    x, weight = (jax.random.normal(key, (size, width), dtype) for size in (row.batch, width))
    values = jax.random.normal(key, (pattern.indices.size,), dtype)
    mask = jnp.asarray(mask_of(width, row.live, row.block))
    places = jnp.stack([pattern.rows, pattern.indices], 1)

    def bcoo(x: Any, values: Any, places: Any) -> Any:
        matrix = sparse.BCOO((values, places), shape=(width, width), indices_sorted=True, unique_indices=True)
        return (matrix @ x.T).T

    layers = {"dense": (lambda x, w, _: x @ w.T, weight, 0), "masked_linear": (masked_linear, weight, mask)}
    if row.what != "masked":
        layers["sparse_linear"] = (sparse_linear, values, pattern)
        layers["sparse_linear, bits kept"] = (sparse_linear, values, jax.device_put(with_bits(pattern)))
        if row.live < 0.05 or width < 1000:  # a step of denser ones takes seconds
            layers["BCOO"] = (bcoo, values, places)
    calls = {}
    for name, (layer, weights, fixed) in layers.items():
        function = jax.jit(layer)
        if row.step:
            function = jax.jit(jax.grad(lambda x, w, f, layer=layer: layer(x, w, f).astype(jnp.float32).sum(), (0, 1)))
        calls[name] = lambda f=function, w=weights, p=fixed: jax.block_until_ready(f(x, w, p))
    return calls


def timed(framework: str, device: str, quick: bool, seconds: float) -> Iterator[dict[str, Any]]:
    """Yield what was found of each row, until the time is up."""
    end, width = time.monotonic() + seconds, 128 if quick else 8192
    kinds = {(row.what, row.dtype, row.step): row for row in TARGETS}
    for row in kinds.values() if quick else TARGETS:
        small = row._replace(batch=min(row.batch, 32)) if quick else row
        told = {"framework": framework, "width": width} | small._asdict()
        if time.monotonic() > end:
            yield told | {"times": OUT_OF_TIME}
            continue
        calls, refused = (torch_calls if framework == "torch" else jax_calls)(small, width, device), {}
        for name, call in [*calls.items()]:
            try:
                call()
            except Exception as error:  # what others cannot do must not end the rest
                del calls[name]
                refused[name] = f"{type(error).__name__}: {error}"[:200]
        yield told | {"times": ratios(calls, next(iter(calls)), 1), "failed": refused}


def suite(backend: str, form: str, device: str, quick: bool) -> list[str]:
    """Return the command that runs the suite on a form of a backend."""
    command = [sys.executable, "-m", "maskedlinear_conformance", "--backend", backend, "--format", form]
    command += ["--device", device, "--profile", "quick", "--tb=line", "-q"]
    # Some laws are enough to see that the command is right.
    return command + (["-k", "idempotent or golden"] if quick else [])


def conformance(device: str, quick: bool, seconds: float) -> dict[str, Any]:
    """Run the suite on each backend that is installed, in its forms, side by side; return what each says, or ended with."""
    end, found, commands = time.monotonic() + seconds, {}, {}
    for backend, formats in SUITES[:1] if quick else SUITES:
        if find_spec({"torch": "torch", "torch-nn": "torch", "jax": "jax"}.get(backend, "flax")) is None:
            found[backend] = "not installed"
            continue
        for form in formats[:1] if quick else formats:
            commands[f"{backend} {form}"] = suite(backend, form, device, quick)

    def run(command: list[str]) -> Any:
        left = end - time.monotonic()
        if left <= 0:
            return OUT_OF_TIME
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        ) as ran:
            try:
                printed, late = ran.communicate(timeout=left)[0], False
            except subprocess.TimeoutExpired:
                ran.send_signal(signal.SIGINT)  # what it found so far it tells
                try:
                    printed, late = ran.communicate(timeout=LATEST)[0], True
                except subprocess.TimeoutExpired:
                    ran.kill()
                    return OUT_OF_TIME
        lines = [line for line in printed.splitlines() if line.startswith("FAILED") or " passed" in line]
        if late:
            lines.append("the rest " + OUT_OF_TIME)
        failed = any(line.startswith("FAILED") for line in lines)
        return {"status": int(failed) if late else ran.returncode, "said": lines or printed.splitlines()[-3:]}

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        environment = os.environ | MEMORY | {"PYTHONPATH": os.pathsep.join([*sys.path, registered(Path(folder))])}
        for name, said in zip(commands, pool.map(run, commands.values()), strict=True):
            found[name] = said
            print(f"conformance, {name}: {said if isinstance(said, str) else said['said'][-1:]}", flush=True)
    return found


def registered(folder: Path) -> str:
    """Return a folder by which the package's backends are found by name, where it is not installed but lies here."""
    points = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["entry-points"]
    try:
        metadata.version("maskedlinear")
    except metadata.PackageNotFoundError:
        told = folder / "maskedlinear-0.dist-info"
        told.mkdir()
        (told / "METADATA").write_text("Metadata-Version: 2.1\nName: maskedlinear\nVersion: 0\n")
        lines = [
            f"[{group}]\n" + "".join(f"{name} = {at}\n" for name, at in of.items()) for group, of in points.items()
        ]
        (told / "entry_points.txt").write_text("".join(lines))
    return str(folder)


def kernels(device: str, seconds: float) -> Any:
    """Return what PyTorch's products took, each beside float64, or why there is nothing."""
    if find_spec("torch") is None or find_spec("triton") is None:
        return "not measured: PyTorch or Triton is not installed"
    command = [sys.executable, str(Path(__file__).with_name("gpu_kernels.py")), device, str(seconds)]
    environment = os.environ | ({"TRITON_INTERPRET": "1", "MASKEDLINEAR_KERNELS": "0"} if device == "cpu" else {})
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        rows = [json.loads(line) for line in process.stdout]
    wrong = [row for row in rows if any(way["wrong"] for way in row["ways"].values())]
    for row in wrong:
        print("wrong:", row, flush=True)
    return {"status": process.returncode, "wrong": len(wrong), "rows": rows}


def gpu_name(device: str) -> str:
    """Return the GPU's name, or say that there is none."""
    if device == "cpu":
        return "not measured: a dry run on the CPU"
    import torch

    return torch.cuda.get_device_name()


def main() -> None:
    """Write ``results/gpu.json``: the GPU, versions, what the suite found, and the times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small layers, and few laws: to see that it runs")
    parser.add_argument("--minutes", type=float, default=8.0, help="of all of it, at most (default: 8)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rows", choices=("torch", "jax"), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rows:  # a process of its own for each framework: one must not hold the memory that the other needs
        for row in timed(given.rows, given.device, given.quick, given.seconds):
            print(json.dumps(row), flush=True)
        return
    end = time.monotonic() + 60 * given.minutes - 20  # for what is under way when the time is up
    results: dict[str, Any] = {
        "gpu": gpu_name(given.device),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES if find_spec(name) and name != "maskedlinear"},
        "conformance": conformance(given.device, given.quick, 0.4 * 60 * given.minutes),
        "kernels": kernels(given.device, 0.4 * (end - time.monotonic())),
        "rows": [],
    }
    for part, framework in ((0.6, "torch"), (1.0, "jax")):
        if find_spec(framework) is None:
            continue
        command = [sys.executable, __file__, "--rows", framework, "--device", given.device]
        command += ["--seconds", str(part * (end - time.monotonic())), *(["--quick"] if given.quick else [])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | MEMORY) as process:
            assert process.stdout is not None
            for line in process.stdout:
                results["rows"].append(json.loads(line))
                show(results["rows"][-1])
    given.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"Written to {given.out}")
    ran = [found for found in (*results["conformance"].values(), results["kernels"]) if isinstance(found, dict)]
    if any(found["status"] or found.get("wrong") for found in ran):
        raise SystemExit(
            "The conformance suite, or the kernels beside float64, found what does not hold: see the results"
        )


def show(row: dict[str, Any]) -> None:
    """Print the ratios of one row."""
    what = f"{row['framework']:5} {row['what']:6} {row['dtype']:8} batch {row['batch']:4} {row['live']:6.1%}"
    if isinstance(row["times"], str):
        print(f"{what}  {row['times']}", flush=True)
        return
    times = ", ".join(f"{name} {np.round(found['ratio'], 3)}" for name, found in row["times"].items())
    failed = f"; failed: {', '.join(row['failed'])}" if row["failed"] else ""
    print(f"{what}  {times}; expected {row['target']}{failed}", flush=True)


if __name__ == "__main__":
    main()
