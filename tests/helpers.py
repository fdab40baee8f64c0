"""Small things that several test files need."""

from __future__ import annotations

import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from forked import JAX, SUITE, TORCH, forked
from maskedlinear import kernels, masks

_PATIENCE = 240  # seconds that a program in several processes is given
ROOT = Path(__file__).parent.parent
OTHER_BACKEND = "from maskedlinear.reference import NumpyBackend\n\nclass Other(NumpyBackend):\n    name = 'other'\n"


class Problem(NamedTuple):
    """One layer's data in float64: x (4, 3, 5), weight (6, 5), half of it masked, bias (6,), cotangent g (4, 3, 6)."""

    x: Any
    weight: Any
    mask: Any
    bias: Any
    g: Any


def problem(rng: np.random.Generator) -> Problem:
    return Problem(
        rng.standard_normal((4, 3, 5)),
        rng.standard_normal((6, 5)),
        masks.random((6, 5), sparsity=0.5, seed=7),
        rng.standard_normal(6),
        rng.standard_normal((4, 3, 6)),
    )


def python(code: str, cwd: Path | None = None, imported: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter, outside the repository; in one that has imported a framework, if that is named."""
    path = cwd or Path("/")
    if imported:
        return _ended(imported, code, path=path)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=path, check=False)


def suite(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the conformance suite as a command with these arguments, in the folder ``path``."""
    imported = (
        TORCH if {"torch", "torch-nn"} & {*arguments} else JAX if {"jax", "nnx", "linen"} & {*arguments} else SUITE
    )
    code = "import runpy; runpy.run_module('maskedlinear_conformance', run_name='__main__', alter_sys=True)"
    # A file that is written anew within a second, as long as before, is taken for what was compiled of it: such files lie
    # in folders of the tests' own.
    return _ended(imported, code, *arguments, path=path or Path("/"), bytecode=path is None)


def _ended(imported: tuple[str, ...], code: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        status = forked(imported, code, *arguments, out=out, err=err, **options).wait()
        return subprocess.CompletedProcess(arguments, status, out.read_text(), err.read_text())


def distribution(path: Path, code: str) -> None:
    """Lay down an installed distribution that registers the class ``Other`` of ``code`` as the backend ``other``."""
    (path / "other.py").write_text(code)
    info = path / "other-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[maskedlinear.backends]\nother = other:Other\n")


def _packs() -> bool:
    if not kernels.is_available():
        return False
    from maskedlinear.kernels import _engine

    return _engine.host().way is not None


needs_kernels = pytest.mark.skipif(not kernels.is_available(), reason="the CPU kernels are not used here")
needs_packing = pytest.mark.skipif(not _packs(), reason="this processor has no instruction that picks numbers of x")
needs_x86 = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="LLVM is here for another kind of processor"
)
needs_fsdp = pytest.mark.skipif(version("torch").startswith("2.6."), reason="torch 2.6 has no fully_shard on the CPU")

IN_A_GROUP = """
import os, pathlib, sys, time
import torch
import torch.distributed as dist

rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)


def end():
    # All wait for all, in files, and none takes down gloo's threads, which may abort: pytorch/pytorch#190489, #179291.
    (folder / f"ended {rank}").touch()
    while not all((folder / f"ended {other}").exists() for other in range(size)):
        time.sleep(0.01)
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)
"""


IN_JAX_PROCESSES = """
import os, pathlib, sys, time
import jax

rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3])
jax.config.update("jax_cpu_enable_async_dispatch", False)  # of several programs under way some would wait for each other
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[4], size, rank)


def fail(*error):
    # At once: to take down would wait for the others.
    sys.__excepthook__(*error)
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(1)


sys.excepthook = fail


def end():
    # All wait for all, in files. The first, which serves the others, goes last; shutdown() would wait for all of them too,
    # and takes gloo's threads down, which may abort.
    (folder / f"ended {rank}").touch()
    while not all((folder / f"ended {other}").exists() for other in range(size)):
        time.sleep(0.01)
    while rank == 0 and not (folder / "others are gone").exists():
        time.sleep(0.01)
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)
"""


def in_jax_processes(code: str, path: Path, size: int = 2) -> None:
    """Run a program in all processes of ``jax.distributed``, a device each, as :func:`in_processes` does."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    _in_processes(JAX, IN_JAX_PROCESSES + code, path, size, address)


def in_processes(code: str, path: Path, size: int = 2) -> None:
    """Run a program in all processes of a gloo group: it is given ``rank``, ``size``, a ``folder``, and calls ``end()``.

    One that fails leaves the others waiting: what all have said is shown, and where one waits that does not end.
    """
    _in_processes(TORCH, IN_A_GROUP + code, path, size)


def _in_processes(imported: tuple[str, ...], code: str, path: Path, size: int, *more: str) -> None:
    said = [path / f"said by {rank}" for rank in range(size)]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}  # nothing is asked of the machine's network
    processes = [
        forked(
            *(imported, code, str(rank), str(size), str(path), *more),
            path=Path.cwd(),
            out=said[rank],
            err=said[rank],
            environment=environment,
        )
        for rank in range(size)
    ]
    try:
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline and all(process.poll() in (None, 0) for process in processes):
            if all(process.poll() == 0 for process in processes[1:]):
                (path / "others are gone").touch()
            if all(process.poll() == 0 for process in processes):
                break
            time.sleep(0.1)
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGABRT)  # which prints its stack
                process.wait()
    texts = "\n".join(file.read_text() for file in said)
    assert [process.returncode for process in processes] == [0] * size, texts
    assert all((path / f"ended {rank}").exists() for rank in range(size)), "a program has not come to its end"
