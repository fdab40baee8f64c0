"""Proof that the conformance suite notices faults: planted ones, real mechanisms, and every single bit of a large mask."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from maskedlinear_conformance.bounds import expected
from maskedlinear_conformance.cases import CASES, Case
from maskedlinear_conformance.faults import FAULTS, ReferenceBackend
from maskedlinear_conformance.laws import LAWS
from test_conformance import distribution, suite


def test_every_planted_fault_is_caught_by_a_law_that_it_breaks(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    result = suite("--faults", "--report", str(path))
    report = json.loads(path.read_text())
    assert report["uncaught"] == []
    assert [row for row in report["not_passed"] if row["status"] == "failed"] == [], (
        "an exception, or the reference backend fails"
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert len(report["faults"]) >= 240
    for name, fault in report["faults"].items():
        assert set(fault["should_break"]) == set(fault["caught_by"]), name
    assert "NOT CAUGHT" not in result.stdout
    assert "mask dropped in dx" in result.stdout


def test_a_fault_that_no_law_catches_fails_the_run(tmp_path: Path) -> None:
    code = """
import sys
from maskedlinear_conformance import faults
from maskedlinear_conformance.faults._reference_backend import Mutant
from maskedlinear_conformance.__main__ import main


class Harmless(Mutant):
    "Nothing is wrong."
    name = "harmless"
    laws = ("14",)


class Crash(Mutant):
    "Raises what has nothing to do with a law."
    name = "crash"
    laws = ("14",)

    def random_mask(self, *_):
        raise KeyError("unrelated")


faults.FAULTS.clear()
faults.FAULTS.update({kind.name: kind for kind in (Harmless, Crash) if kind.name in sys.argv[1:]})
sys.exit(main(["--faults", "-k", "frozen"]))
"""
    (tmp_path / "run.py").write_text(code)
    for name, shown in (("harmless", "NOT CAUGHT"), ("crash", "KeyError: 'unrelated'")):
        result = subprocess.run(
            [sys.executable, "run.py", name], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert result.returncode == 1, result.stdout
        assert shown in result.stdout
        assert f"{name}: not caught by law 14" in result.stdout


def test_faults_say_what_is_wrong_and_which_laws_must_break() -> None:
    assert len(FAULTS) >= 40
    for name, fault in FAULTS.items():
        assert fault.laws, name
        assert set(fault.laws) <= set(LAWS), name
        assert fault.__doc__ != ReferenceBackend.__doc__, name
    described = [fault.__doc__ for fault in FAULTS.values()]
    assert len(set(described)) == len(described)


LARGE = [case for case in CASES if case.in_features >= 4096]


@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_every_single_flipped_bit_of_a_large_mask_moves_a_result_out_of_its_bound(case: Case, dtype: str) -> None:
    # Flipping the bit of connection (o, i) moves y[b, o] by x[b, i] W[o, i] and dx[b, i] by g[b, o] W[o, i].
    data = case.data(dtype)
    want = expected(data)

    in_value, in_gradient = (np.zeros(data.mask.shape, bool) for _ in range(2))
    for row in range(len(data.x)):
        one = slice(row, row + 1)
        value = data.x[one, None, :] * data.weight
        gradient = data.g[one, :, None] * data.weight
        bounds = {
            name: want[name]._sum_error(dtype, False)[one] + want[name]._rounding(dtype)[one] for name in ("y", "dx")
        }
        in_value |= (abs(value) > bounds["y"][:, :, None])[0]
        in_gradient |= (abs(gradient) > bounds["dx"][:, None, :])[0]
    assert in_value.all() or dtype in ("bfloat16", "float16")
    assert (in_value | in_gradient).all()


def test_the_textbook_bound_would_miss_them() -> None:
    case = next(case for case in LARGE if case.in_features == 16384)
    data = case.data("float32")
    want = expected(data)["y"]
    moved = abs(data.x[:, None, :] * data.weight)
    hard = want.length * 2.0**-24 * want.absolute
    assert (moved <= hard[:, :, None]).all(axis=0).mean() > 0.9


SAVED_PRODUCT = """
import torch
from torch.nn import functional as F
from maskedlinear_torch.conformance import TorchBackend


class Copied(torch.autograd.Function):
    "What many copied: the masked product is saved, and the gradient is a product too."

    @staticmethod
    def forward(ctx, x, weight, mask, bias):
        product = weight * mask
        ctx.save_for_backward(x, product, mask)
        return F.linear(x, product, bias)

    @staticmethod
    def backward(ctx, g):
        x, product, mask = ctx.saved_tensors
        flat = g.reshape(-1, g.shape[-1])
        return g @ product, flat.T @ x.reshape(flat.shape[0], -1) * mask, None, flat.sum(0)


class Other(TorchBackend):
    name = "other"

    def op(self, x, weight, mask, bias):
        return Copied.apply(x, weight, mask, bias)
"""

STRAIGHT_THROUGH = """
import jax
import jax.numpy as jnp
from maskedlinear_jax.conformance import JaxBackend


@jax.custom_vjp
def layer(x, weight, mask, bias):
    return x @ jnp.where(mask, weight, 0).T + (0 if bias is None else bias)


def forward(x, weight, mask, bias):
    return layer(x, weight, mask, bias), (x, weight, mask, bias)


def backward(kept, g):
    x, weight, mask, bias = kept
    flat = g.reshape(-1, g.shape[-1])
    dweight = flat.T @ x.reshape(flat.shape[0], -1)
    return g @ jnp.where(mask, weight, 0), dweight, None, None if bias is None else flat.sum(0)


layer.defvjp(forward, backward)


class Other(JaxBackend):
    name = "other"

    def op(self, x, weight, mask, bias, forward_mode=False):
        return layer(x, weight, mask, bias)
"""


@pytest.mark.parametrize(
    ("code", "select", "failed"),
    [
        pytest.param(
            SAVED_PRODUCT,
            "((second_order and 12) or leak or positive_zero) and float32",
            ["test_second_order_equals_the_spec", "test_nothing_stored_under_the_mask_leaks", "test_masked_gradient"],
            marks=pytest.mark.slow,
        ),
        (
            STRAIGHT_THROUGH,
            "(positive_zero or gradients_equal or automatic) and float32",
            ["test_value_and_gradients_equal_the_spec", "test_rule_equals_automatic", "test_masked_gradient"],
        ),
    ],
    ids=["a saved product in torch", "a straight-through gradient in jax"],
)
def test_faults_of_real_backends_are_caught(code: str, select: str, failed: list[str], tmp_path: Path) -> None:
    distribution(tmp_path, code)
    result = suite("--backend", "other", "--profile", "quick", "-k", select, path=tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    for name in failed:
        assert any(line.startswith("FAILED") and name in line for line in result.stdout.splitlines()), name
