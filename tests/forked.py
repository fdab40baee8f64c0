"""Processes that begin with their framework imported: forked by one that has, where a test starts dozens of them.

PyTorch takes seconds to import, and more so its distributed parts and its compiler. A server for each framework imports it
once, starts no thread, and forks. The package itself is imported by each program anew, but for what the conformance suite
takes of it.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["JAX", "SUITE", "TORCH", "Forked", "forked"]

_TOOLS = ("hypothesis", "numpy", "pytest")
SUITE = (*_TOOLS, "maskedlinear.masks", "maskedlinear.reference")
TORCH = (*_TOOLS, "torch._dynamo", *(f"torch.distributed.{part}" for part in ("checkpoint", "fsdp", "tensor")))
JAX = (*_TOOLS, "flax.linen", "flax.nnx", "jax.numpy", "optax")


class Forked:
    """A process as :class:`subprocess.Popen` has it: ``poll``, ``wait``, ``send_signal`` and ``returncode``."""

    def __init__(self, server: subprocess.Popen[str], pid: int) -> None:
        self._server, self.pid = server, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self._ended("poll")

    def wait(self) -> int:
        status = self._ended("wait")
        assert status is not None
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def _ended(self, how: str) -> int | None:
        if self.returncode is None:
            self.returncode = _ask(self._server, {"how": how, "pid": self.pid})
        return self.returncode


def forked(
    imported: tuple[str, ...],
    code: str,
    *arguments: str,
    path: Path,
    out: Path,
    err: Path,
    environment: dict[str, str] | None = None,
    bytecode: bool = True,
) -> Forked:
    """Start ``python -c code arguments`` in the folder ``path``, with modules imported and its output in two files."""
    server = _server(imported)
    said = {"path": str(path), "out": str(out), "err": str(err), "environment": dict(environment or os.environ)}
    task = {"how": "start", "code": code, "arguments": arguments, "bytecode": bytecode}
    return Forked(server, _ask(server, task | said))


def _ask(server: subprocess.Popen[str], question: dict[str, Any]) -> Any:
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(question) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


@functools.cache
def _server(imported: tuple[str, ...]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _SERVER, *imported]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # others would be there from NumPy's import on
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True, cwd="/", env=environment)


# The program of a child is run at the top level, so that it ends as any program does: with its own hook for what it raises,
# and after what waits for the end.
_SERVER = """
import faulthandler, gc, importlib, json, os, pathlib, random, sys, types, warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for name in sys.argv[1:]:
        importlib.import_module(name)
threads = list(pathlib.Path("/proc/self/task").glob("*"))  # none where the system is another
assert len(threads) <= 1, "a fork has one thread, and would wait for the others"
gc.freeze()

for line in sys.stdin:
    task = json.loads(line)
    if task["how"] == "start":
        answer = os.fork()
        if not answer:
            break
    else:
        pid, status = os.waitpid(task["pid"], os.WNOHANG if task["how"] == "poll" else 0)
        answer = os.waitstatus_to_exitcode(status) if pid else None
    print(json.dumps(answer), flush=True)
else:
    os._exit(0)

for number, name in ((1, "out"), (2, "err")):
    os.dup2(os.open(task[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.environ.clear(), os.environ.update(task["environment"])
os.chdir(task["path"])  # which is the first of sys.path
importlib.invalidate_caches()
random.seed()
faulthandler.enable()
sys.argv, sys.dont_write_bytecode = ["-c", *task["arguments"]], not task["bytecode"]
main = sys.modules["__main__"] = types.ModuleType("__main__")
exec(compile(task["code"], "<string>", "exec"), main.__dict__)
"""
